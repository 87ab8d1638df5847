"""closing and reserve: a thought ends in time and at a good place, and an answer follows it, whatever is written."""

from __future__ import annotations

import re
from itertools import chain

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwq_lite.chat.options import Options
from qwq_lite.engine import reply_rules
from qwq_lite.engine.reply_rules import Thoughts
from qwq_lite.events import Notice
from qwq_lite.reply.policies.closing import Window
from qwq_lite.reply.policy import WINDOW, Stop
from qwq_lite.text import breaks
from tests.thoughts import (
    CLOSE,
    MODELS,
    OPEN,
    PLAIN,
    TAGS,
    TEXTS,
    UNDIVIDED,
    Run,
    Words,
    answer_of,
    endless,
    ends_well,
    rules_of,
    run,
    sentence,
)

BUDGETS = [0, 64, 512, 960, 4096]


def most_of(budget: int) -> int:
    return budget + max(budget // 10, 96)


def check_close(words: Words, found: Run, opens: int, closes: int) -> None:
    """That the thought was ended in its window, where a text may end, and with each forced word once."""
    rewind, track = found.rewind, found.track
    assert rewind is not None
    n_at, whole = len(found.thought), words.text(found.thought)
    n_words = reply_rules._SPARE + len(rewind.forced)
    assert opens <= n_at <= closes
    assert track.n_thinking <= closes
    assert track.tokens[rewind.n_tokens :][: len(rewind.forced)] == list(rewind.forced)
    made = words.text(track.tokens[: rewind.n_tokens + len(rewind.forced)])
    body = re.sub(r"\s*(\*\*Final Answer\*\*)?\s*\Z", "", made)
    assert whole.startswith(body)
    after, late, in_time = whole[len(body) :], 2 * n_at >= opens + closes, n_at + n_words < closes - 12
    if not late:
        assert re.match(r"\s*\n[ \t]*\n", after), "a paragraph in the first half"
    elif in_time:
        assert ends_well(body, after), "a line or a sentence in the second"
    before = words.text(found.thought[: (opens + closes) // 2 - 1])[len(words.text(found.thought[: opens + 1])) :]
    assert re.search(r"\n\n[^\s]", before) is None or not late, "a paragraph in the first half is not passed over"
    assert rewind.n_tokens >= n_at - 98
    near = words.text(found.thought[-96:])
    if breaks.n_after_last(near) is None and n_at > 96:
        assert body == whole.rstrip()
    elif breaks.n_after_last(near) is not None:
        assert ends_well(body, after)


@pytest.mark.parametrize("budget", BUDGETS)
@settings(max_examples=20)
@given(text=TEXTS, model=MODELS)
@example(text="so ", model=TAGS)
@example(text=sentence(60, ".\n\n", "so"), model=UNDIVIDED)
@example(text=sentence(150, ". ", "so"), model=TAGS)
@example(text="好" * 70 + "。", model=UNDIVIDED)
def test_a_thought_ends_in_its_window_at_a_good_place(budget: int, text: str, model: Thoughts) -> None:
    words = Words()
    rules = rules_of(words, Options(thinking_budget=budget), model)
    found = run(words, rules, endless(words, text, most_of(budget)), endless(words, PLAIN))
    track = found.track
    assert track.n_thinking <= most_of(budget) == (rules.thinking_limit or 0)
    assert track.thought_end == "budget"
    assert found.rewind is not None
    assert track.tokens.count(CLOSE) == (model is TAGS)
    assert words.text(track.tokens).count("**Final Answer**\n\n") == (model is UNDIVIDED)
    if budget:
        check_close(words, found, budget, most_of(budget))
    else:
        assert (found.rewind.n_tokens, found.thought) == (0, [])
    assert found.n_answer <= reply_rules.ANSWER_RESERVE
    assert isinstance(found.stop, Stop)
    assert found.stop.reason == "length"
    if found.n_answer > 1:
        assert track.texts("length")[1].endswith("is.")


@settings(max_examples=30)
@given(text=TEXTS, model=MODELS, asked_at=st.integers(0, 200))
@example(text="so ", model=UNDIVIDED, asked_at=5)
@example(text=sentence(30, ". ", "so"), model=TAGS, asked_at=17)
def test_a_reader_who_waits_has_the_thought_end_soon(text: str, model: Thoughts, asked_at: int) -> None:
    words = Words()
    found = run(
        words, rules_of(words, Options(), model), endless(words, text), endless(words, PLAIN), asked_at=asked_at
    )
    assert found.track.thought_end == "asked"
    check_close(words, found, asked_at + 1, asked_at + 1 + 96)


@pytest.mark.parametrize("fence", ["```", "````", "~~~"])
@pytest.mark.parametrize("model", [TAGS, UNDIVIDED])
def test_a_thought_within_a_block_of_code_ends_too(model: Thoughts, fence: str) -> None:
    words = Words()
    rules = rules_of(words, Options(thinking_budget=64), model)
    text = chain(words.tokenize(f"Let me try:\n\n{fence}python\n"), endless(words, "x = 1\ny = 2\n\n"))
    found = run(words, rules, text, endless(words, PLAIN), n_most=500)
    assert found.track.state.phase == "answer"
    assert found.track.n_thinking <= most_of(64)
    if model is UNDIVIDED:  # the block is closed before the heading, which begins the answer
        thought, answer = found.track.texts("length")
        assert thought.rstrip().endswith(f"\n{fence}")
        assert answer.startswith("**Final Answer**")


@pytest.mark.parametrize("reserve", [1, 3, 16, 96, 400, 1024])
@settings(max_examples=15)
@given(answer=TEXTS, model=MODELS, budget=st.sampled_from([0, 64]))
@example(answer=sentence(300, ". ", "so"), model=TAGS, budget=64)
@example(answer=PLAIN, model=TAGS, budget=64)
def test_an_answer_has_the_room_that_was_kept_for_it(reserve: int, answer: str, model: Thoughts, budget: int) -> None:
    words = Words()
    rules = rules_of(words, Options(thinking_budget=budget, answer_reserve=reserve), model)
    found = run(words, rules, endless(words, PLAIN), endless(words, answer), n_most=3000)
    assert found.n_answer <= reserve
    assert found.stop is not None
    assert found.stop.reason == "length"
    written = found.track.tokens[-found.n_answer :]
    n_early = reserve - min(96, reserve // 2)
    if reserve == 1 and not words.text(written).strip():  # white space used it up
        return
    shown, after = answer_of(words, found)
    if found.n_answer < reserve:
        assert found.n_answer > n_early
        assert ends_well(shown, after)
    else:  # nothing ended where it could have
        whole = words.text(written[:-1])
        assert len(whole) - (breaks.n_after_last(whole) or len(whole)) <= len(words.text(written[: n_early + 1]))


@pytest.mark.parametrize("budget", [0, 64])
@pytest.mark.parametrize("model", [TAGS, UNDIVIDED])
def test_an_answer_does_not_end_before_it_has_a_text(budget: int, model: Thoughts) -> None:
    words = Words()
    found = run(words, rules_of(words, Options(thinking_budget=budget), model), endless(words, PLAIN), iter(()))
    assert found.stop == Stop("stop", mute=True)
    assert found.track.texts("stop")[1].endswith("so")
    assert found.n_answer == 2


@given(text=TEXTS, budget=st.sampled_from([64, 100]))
@example(text="One\n", budget=64)
@example(text="One.\n\n", budget=64)
def test_the_tag_may_be_taken_early_after_a_newline_of_the_window(text: str, budget: int) -> None:
    words = Words()
    found = run(words, rules_of(words, Options(thinking_budget=budget)), endless(words, text), iter(()))
    assert found.rewind is not None
    after_newline = [n for n in range(budget, len(found.thought)) if words.piece(found.thought[n - 1]).endswith(b"\n")]
    assert found.eager == after_newline
    assert all(budget <= n < most_of(budget) for n in found.eager)
    undivided = run(words, rules_of(words, Options(thinking_budget=64), UNDIVIDED), endless(words, text), iter(()))
    assert undivided.eager == []


@given(text=TEXTS, reserve=st.sampled_from([3, 40]))
@example(text="One\n", reserve=40)
def test_a_thought_whose_tag_is_taken_early_was_ended_by_its_budget(text: str, reserve: int) -> None:
    """And its answer has a limit as after any other end."""
    words = Words()
    rules = rules_of(words, Options(thinking_budget=64, answer_reserve=reserve))
    found = run(words, rules, endless(words, text + "so\nso "), endless(words, PLAIN), takes_tag=True)
    assert found.rewind is not None
    assert len(found.eager) <= 1
    assert found.track.thought_end == "budget"
    assert found.track.tokens.count(CLOSE) == 1
    assert found.track.n_thinking <= most_of(64)
    assert 1 <= found.n_answer <= reserve
    assert [event.kind for event in found.events if isinstance(event, Notice)] == ["closed"]


@pytest.mark.parametrize("budget", [0, 64])
@pytest.mark.parametrize("model", [TAGS, UNDIVIDED])
@pytest.mark.parametrize("stop", ["\n\n", "\n", "Answer"])
def test_what_ends_a_thought_is_no_stop_text(budget: int, model: Thoughts, stop: str) -> None:
    words = Words()
    rules = rules_of(words, Options(thinking_budget=budget, stop=[stop]), model)
    found = run(words, rules, endless(words, PLAIN), iter(words.tokenize(f"It is so.{stop}No.")))
    assert found.stop is not None
    assert found.stop.reason == "stop"
    assert found.track.texts("stop")[1].endswith("It is so.")


@pytest.mark.parametrize("block", ["$$\nx=1\n$$\n", "\\[\nx=1\n\\]\n", "$$\n", "**Final Answer**\n", "\\boxed{1}\n"])
@pytest.mark.parametrize("n", [1, 5])
def test_formulas_within_a_block_of_code_keep_no_thought_from_its_end(block: str, n: int) -> None:
    words = Words()
    rules = rules_of(words, Options(thinking_budget=64), UNDIVIDED)
    text = f"Let me show:\n```latex\n{block * n}```\nand so on and on, "
    found = run(words, rules, endless(words, text), endless(words, PLAIN), n_most=2000)
    assert found.track.thought_end == "budget"
    assert found.track.n_thinking <= most_of(64)
    assert found.stop is not None


def test_no_thought_has_no_tokens_and_the_heading_counts_for_neither() -> None:
    words = Words()
    found = run(
        words, rules_of(words, Options(thinking_budget=0), UNDIVIDED), iter(()), iter(words.tokenize("It is so."))
    )
    assert found.rewind is not None
    assert found.track.ended("stop") == ("", "**Final Answer**\n\nIt is so.", 0, 5, "budget")


def test_a_thought_that_the_model_opens_itself_has_no_token_with_a_budget_of_none() -> None:
    words = Words()
    rules = rules_of(words, Options(thinking_budget=0), opened=False)
    found = run(words, rules, endless(words, PLAIN), iter([OPEN, *words.tokenize("It is so.")]), n_most=100)
    assert found.track.tokens[:2] == [OPEN, CLOSE]
    assert found.track.texts("stop") == ("", "It is so.")
    assert found.track.ended("stop")[2:] == (0, 5, "budget")  # the end token too


def test_a_thought_that_ends_by_itself_in_the_window_is_not_ended() -> None:
    words = Words()
    rules = rules_of(words, Options(thinking_budget=64))
    text = [*words.tokenize(" so") * 70, CLOSE]
    found = run(words, rules, iter(text), endless(words, PLAIN), n_most=5000)
    assert (found.rewind, found.track.thought_end, found.track.n_thinking) == (None, "itself", 71)
    assert len(found.track.tokens) == 5000  # nothing bounds its answer


@pytest.mark.parametrize("budget", [19_000, 20_000, 20_090, 30_000, None])
@pytest.mark.parametrize("text", ["so ", PLAIN])
def test_the_context_leaves_room_for_the_answer_whatever_the_budget(budget: int | None, text: str) -> None:
    """A window that opened first does not keep the context's from closing the thought."""
    words = Words()
    rules = rules_of(words, Options(thinking_budget=budget), n_ctx=21_125)
    found = run(words, rules, endless(words, text, 25_000), endless(words, PLAIN), n_most=22_000)
    assert found.track.n_thinking <= (rules.thinking_limit or 0) <= 21_124 - reply_rules.ANSWER_RESERVE


@pytest.mark.parametrize("budget", [1, 64, 512, 959, 960, 961, 4096])
def test_a_window_is_a_tenth_of_its_budget_and_at_least_so_many_tokens(budget: int) -> None:
    assert Window.of_budget(budget) == (budget, most_of(budget), "budget")
    assert Window.ending(budget, "context") == (max(0, budget - WINDOW), budget, "context")


@pytest.mark.parametrize("text", [" so" * 80, "So. " + "so " * 600])
def test_where_no_break_is_near_nothing_is_taken_back(text: str) -> None:
    words = Words()
    budget = 64 if "." not in text else 256
    found = run(words, rules_of(words, Options(thinking_budget=budget)), endless(words, text), endless(words, PLAIN))
    assert found.rewind is not None
    assert found.rewind.n_tokens == len(found.thought)
    notices = [event for event in found.events if isinstance(event, Notice)]
    assert notices == [Notice("the thought was ended by its budget", "closed")]
