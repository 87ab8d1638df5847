"""closing, reserve and deadline: a thought ends in time and at a good place, and an answer follows it, whatever is written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, cycle

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwq_lite import breaks, control
from qwq_lite.control import Rules, Thoughts
from qwq_lite.events import Event, Notice
from qwq_lite.generation import Rewind, Stop
from qwq_lite.model import Options
from qwq_lite.policies.closing import LEAST, MARGIN, Window
from qwq_lite.policies.deadline import fitted
from qwq_lite.sampling import Sampling
from qwq_lite.track import Track

END, OPEN, CLOSE = range(3)
TAGS, UNDIVIDED = Thoughts("tags", OPEN, CLOSE), Thoughts("undivided")
BUDGETS = [0, 64, 512, 960, 4096]
_TOKEN = re.compile(r"[.!?…。！？:*]+\n*| ?\w{1,6}| *\n+|.", re.DOTALL)


class Words:
    """An invented vocabulary: words and signs, a stop as one token with the newlines after it. Ids as they come up."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._pieces: list[bytes] = [b"", b"", b""]

    def tokenize(self, text: str) -> list[int]:
        for word in (words := _TOKEN.findall(text)):
            if word not in self._ids:
                self._ids[word] = len(self._pieces)
                self._pieces.append(word.encode())
        return [self._ids[word] for word in words]

    def piece(self, token: int) -> bytes:
        return self._pieces[token]

    def text(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self.piece, tokens)).decode()


@dataclass
class Run:
    """A reply that was made. thought: all that the model wrote until the thought was ended, before anything was taken back;
    rewind: what ended it; n_at: tokens that there were then; eager: the reply's length at draws that had a tag to take early.
    """

    track: Track
    thought: list[int]
    rewind: Rewind | None = None
    stop: Stop | None = None
    events: list[Event] = field(default_factory=list)
    eager: list[int] = field(default_factory=list)
    closed_s: float = 0.0
    end_s: float = 0.0

    @property
    def n_answer(self) -> int:
        """Tokens that the model wrote after the forced ones."""
        assert self.rewind is not None
        return len(self.track.tokens) - self.rewind.n_tokens - len(self.rewind.forced)


def rules_of(words: Words, options: Options, model: Thoughts = TAGS, n_ctx: int = 100_000, n_prompt: int = 1) -> Rules:
    prompt = [*words.tokenize(" so") * (n_prompt - 1), OPEN]
    end = frozenset({END})
    return control.rules(
        options, model, prompt, "How many?", n_ctx, end, words.piece, words.tokenize, templated=model is TAGS
    )


def run(
    words: Words, rules: Rules, thought: Iterator[int], answer: Iterator[int], *, n_most: int = 20_000,
    asked_at: int | None = None, cost: Callable[[int], float] = lambda n: 0.0,
) -> Run:  # fmt: skip
    """Let a model write: `thought` as long as it thinks, then `answer`. cost: seconds of the n-th token of the reply."""
    track = Track(rules.policies, rules.begin, words.piece, words.tokenize)
    found, now = Run(track, []), 0.0
    for rewind in rules.begin.rewinds:
        found.rewind = rewind
    while track.n_taken < n_most and found.stop is None:
        if asked_at == len(track.tokens) and found.rewind is None:
            assert track.conclude()
        draw, n = track.constrain(Sampling()), len(track.tokens)
        thinks = track.state.phase == "thinking"
        if draw.eager is not None:
            assert thinks
            assert draw.eager == (CLOSE, MARGIN)
            found.eager.append(n)
        token = draw.forced if draw.forced is not None else next(thought if thinks else answer, END)
        if token in draw.banned:
            token = words.tokenize("so")[0]
        now += cost(n)
        if thinks and draw.forced is None:
            found.thought.append(token)
        events, action = track.take(token, now)
        found.events += events
        if isinstance(action, Rewind):
            assert found.rewind is None, "a thought is ended once"
            found.rewind, found.closed_s = action, now
        elif isinstance(action, Stop):
            found.stop, found.end_s = action, now
    return found


def endless(words: Words, text: str, n: int = 400) -> Iterator[int]:
    """A text again and again, in the tokens of the whole for n of them at least."""
    return cycle(words.tokenize(text * (1 + 4 * n // len(words.tokenize(text)))))


def sentence(n: int, stop: str, word: str) -> str:
    return " ".join([word.capitalize(), *[word] * n]) + stop


SENTENCES = st.builds(sentence, st.integers(0, 50), st.sampled_from([". ", "? ", "!", "... ", ",", ""]), st.just("so"))
CHINESE = st.builds(
    lambda n, stop: "好" * n + stop, st.integers(1, 60), st.sampled_from(["。", "？", "，", "……", "。”"])
)
GAPS = st.sampled_from(["\n", "\n\n", " ", " ", "", "\n\n1. ", "\n- ", " 3.14 ", " e.g. "])
TEXTS = st.lists(st.one_of(SENTENCES, CHINESE, GAPS), min_size=1, max_size=12).map("".join).filter(str.strip)
MODELS = st.sampled_from([TAGS, UNDIVIDED])
PLAIN = "Then so it is. "


def most_of(budget: int) -> int:
    return budget + max(budget // 10, 96)


def ends_well(kept: str, after: str) -> bool:
    """Whether a text ends with a line or a sentence, by what the model wrote after it."""
    return (
        re.search(r"[.!?。！？…][\"'”’」』）)\]*_`]*\Z", kept) is not None
        or "\n" in after[: len(after) - len(after.lstrip())]
    )


def answer_of(words: Words, found: Run) -> tuple[str, str]:
    """The answer that counts, less a heading, and what the model wrote after it."""
    written = words.text(found.track.tokens[-found.n_answer :]).lstrip("\n")
    shown = found.track.texts("length")[1].removeprefix("**Final Answer**").lstrip("\n")
    assert written.startswith(shown)
    return shown, written[len(shown) :]


def check_close(words: Words, found: Run, opens: int, closes: int) -> None:
    """That the thought was ended in its window, where a text may end, and with each forced word once."""
    rewind, track = found.rewind, found.track
    assert rewind is not None
    n_at, whole = len(found.thought), words.text(found.thought)
    n_words = control._SPARE + len(rewind.forced)
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
    assert track.n_thinking <= most_of(budget) == (rules.thinking_budget or 0)
    assert track.thought_end == "budget"
    assert found.rewind is not None
    assert track.tokens.count(CLOSE) == (model is TAGS)
    assert words.text(track.tokens).count("**Final Answer**\n\n") == (model is UNDIVIDED)
    if budget:
        check_close(words, found, budget, most_of(budget))
    else:
        assert (found.rewind.n_tokens, found.thought) == (0, [])
    assert found.n_answer <= control.ANSWER_RESERVE
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


@pytest.mark.parametrize("model", [TAGS, UNDIVIDED])
def test_a_thought_within_a_block_of_code_ends_too(model: Thoughts) -> None:
    words = Words()
    rules = rules_of(words, Options(thinking_budget=64), model)
    text = chain(words.tokenize("Let me try:\n\n```python\n"), endless(words, "x = 1\ny = 2\n\n"))
    found = run(words, rules, text, endless(words, PLAIN), n_most=500)
    assert found.track.state.phase == "answer"
    assert found.track.n_thinking <= most_of(64)


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
    n_early = reserve - min(96, reserve // 4)
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
    assert found.track.n_thinking <= (rules.thinking_budget or 0) <= 21_124 - control.ANSWER_RESERVE


@pytest.mark.parametrize("budget", [1, 64, 512, 959, 960, 961, 4096])
def test_a_window_is_a_tenth_of_its_budget_and_at_least_so_many_tokens(budget: int) -> None:
    assert Window.of_budget(budget) == (budget, most_of(budget), "budget")
    assert Window.ending(budget, "context") == (max(0, budget - LEAST), budget, "context")


COSTS = {"constant": (0.1, 0.0), "growing": (0.1, 0.3 / 4096), "steep": (0.02, 0.0005)}


@pytest.mark.parametrize("how", COSTS)
@settings(max_examples=12)
@given(text=TEXTS, longer=st.floats(1, 3), model=MODELS)
@example(text="so ", longer=1.5, model=TAGS)
@example(text=PLAIN, longer=2, model=UNDIVIDED)
def test_a_thought_ends_in_time_for_the_answer(how: str, text: str, longer: float, model: Thoughts) -> None:
    """Where there is time for 160 tokens of it, what the answer is expected to take is left, forced words and all."""
    base, slope = COSTS[how]
    words, n_prompt = Words(), 50

    def seconds(n: int) -> float:
        return base + slope * (n_prompt + n)

    n_answer = control._ANSWER_TOKENS[model.style]
    within = longer * sum(map(seconds, range(160 + n_answer)))
    rules = rules_of(words, Options(within=within), model, n_prompt=n_prompt)
    answer = words.tokenize(sentence(n_answer - 3, ".", "so"))
    assert len(answer) == n_answer - 1  # and an end token
    found = run(words, rules, endless(words, text, 4000), iter(answer), cost=seconds, n_most=9000)
    assert found.track.thought_end == "deadline"
    assert found.stop == Stop("stop", mute=True)
    assert found.end_s <= within + seconds(found.track.n_taken)  # the line is taken in the middle of a token
    assert within - found.end_s <= 110 * seconds(found.track.n_taken)


@pytest.mark.parametrize("within", [1e-9, 1.0])
@settings(max_examples=40)
@given(text=TEXTS, model=MODELS, answer=TEXTS)
@example(text="so ", model=TAGS, answer="so ")
@example(text="so ", model=UNDIVIDED, answer=PLAIN)
@example(text="so ", model=TAGS, answer=" So. ")
@example(text="so ", model=UNDIVIDED, answer="\nSo. ")
@example(text="so ", model=TAGS, answer="\n\n So. ")
def test_an_answer_begins_even_after_the_deadline_and_ends_at_its_next_sentence(
    within: float, text: str, model: Thoughts, answer: str
) -> None:
    words = Words()
    rules = rules_of(words, Options(within=within), model)
    found = run(words, rules, endless(words, text), endless(words, answer), cost=lambda n: 1.0, n_most=500)
    assert (found.track.state.phase, found.track.thought_end) == ("answer", "deadline")
    assert found.stop is not None
    assert found.stop.reason == "deadline"
    shown, after = answer_of(words, found)
    assert shown.strip()
    assert 1 <= found.n_answer <= 97
    if found.n_answer < 90:
        assert ends_well(shown.rstrip(), shown[len(shown.rstrip()) :] + after)


@pytest.mark.parametrize("text", [" so" * 80, "So. " + "so " * 600])
def test_where_no_break_is_near_nothing_is_taken_back(text: str) -> None:
    words = Words()
    budget = 64 if "." not in text else 256
    found = run(words, rules_of(words, Options(thinking_budget=budget)), endless(words, text), endless(words, PLAIN))
    assert found.rewind is not None
    assert found.rewind.n_tokens == len(found.thought)
    notices = [event for event in found.events if isinstance(event, Notice)]
    assert notices == [Notice("the thought was ended by its budget", "closed")]


@given(
    st.floats(0.01, 1),
    st.floats(0, 0.001),
    st.integers(64, 128),
    st.lists(st.floats(0, 0.1), min_size=128, max_size=128),
)
def test_the_cost_is_a_known_line_and_what_nine_of_ten_stay_below(
    base: float, slope: float, n: int, noise: list[float]
) -> None:
    line = tuple((100 + i, base + slope * (100 + i)) for i in range(n))
    assert fitted(line) == pytest.approx((base, slope), rel=1e-4, abs=1e-7)
    samples = tuple((fill, seconds + more) for (fill, seconds), more in zip(line, noise, strict=False))
    fills, times = np.array(samples).T
    expected = max(0.0, float(np.polyfit(fills, times, 1)[0]))
    cost = fitted(samples)
    assert cost.slope == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert cost.base == pytest.approx(np.sort(times - cost.slope * fills)[int(0.9 * n)], abs=1e-9)
    below = sum(seconds <= cost.base + cost.slope * fill + 1e-12 for fill, seconds in samples)
    assert below >= 0.9 * n


@pytest.mark.parametrize("n", [8, 16, 63])
def test_few_tokens_give_no_slope(n: int) -> None:
    assert fitted(tuple((i, 1.0 + i) for i in range(n))) == (1.0 + int(0.9 * n), 0.0)
