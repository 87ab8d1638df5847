"""From options and a question to the rules of a reply, and what options may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwq_lite.chat import options
from qwq_lite.chat.options import EFFORTS, Options, ThoughtStyle
from qwq_lite.engine import reply_rules
from qwq_lite.engine.ignored_options import list_ignored
from qwq_lite.engine.reply_rules import PieceTokenizer, Rules, Thoughts
from qwq_lite.errors import UsageError
from qwq_lite.prompt.question import read_question
from qwq_lite.reply.policies.closing import Closing
from qwq_lite.reply.policies.deadline import Deadline
from qwq_lite.reply.policies.loops import Loops
from qwq_lite.reply.policies.order import ORDER
from qwq_lite.reply.policies.reserve import Reserve
from qwq_lite.reply.policies.script import Script
from qwq_lite.reply.policies.stops import Stops
from qwq_lite.reply.policy import Policy
from qwq_lite.reply.script_masks import ScriptMasks

END, OPEN, CLOSE, START = 256, 257, 258, 259
NAMES = {OPEN: "<think>", CLOSE: "</think>"}
TAGS, SPELLED, UNDIVIDED = Thoughts("tags", OPEN, CLOSE), Thoughts("tags"), Thoughts("undivided")
SPECIAL = {"<think>": OPEN, "</think>": CLOSE, "<|im_end|>": END}
TEMPLATE = "{{ messages[-1].content.split('</think>')[-1] }}"
PROMPT = [START, *b"assistant\n"]


def piece(token: int) -> bytes:
    return bytes([token]) if token < END else NAMES.get(token, "").encode()


def tokenize(text: str) -> list[int]:
    return list(text.encode())


TOKENIZER = PieceTokenizer(frozenset({END}), piece, tokenize)


def rules_of(
    options: Options, thoughts: Thoughts, prompt: list[int], question: str = "How many?", *, n_ctx: int = 40_960,
    templated: bool = True,
) -> Rules:  # fmt: skip
    asked = read_question([said("user", question)] if templated else question)
    return reply_rules.make_rules(options, thoughts, asked, prompt, n_ctx, TOKENIZER)


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def policy_of(rules: Rules, kind: type[Any]) -> Any:
    return next((policy for policy in rules.policies if isinstance(policy, kind)), None)


def names(policies: tuple[Policy, ...]) -> list[str]:
    return [policy.name for policy in policies]


@pytest.mark.parametrize("template", [None, TEMPLATE, "{{ messages }}"])
@pytest.mark.parametrize("known", [None, "tags", "undivided", "none"])
@pytest.mark.parametrize("asked", ["tags", "undivided", "none"])
@pytest.mark.parametrize("special", [{}, SPECIAL])
def test_the_users_word_counts_first(
    asked: ThoughtStyle, known: ThoughtStyle | None, special: Mapping[str, int], template: str | None
) -> None:
    ids = (OPEN, CLOSE) if special and asked == "tags" else (None, None)
    assert reply_rules.find_thoughts(asked, known, special, template) == Thoughts(asked, *ids)


@pytest.mark.parametrize(
    ("known", "special", "template", "found"),
    [
        ("undivided", SPECIAL, None, TAGS),
        ("none", SPECIAL, TEMPLATE, TAGS),
        (None, SPECIAL, None, TAGS),
        ("undivided", {}, TEMPLATE, UNDIVIDED),
        ("tags", {}, None, SPELLED),
        ("none", {}, TEMPLATE, Thoughts("none")),
        (None, {}, TEMPLATE, SPELLED),
        (None, {}, "{{ messages }}", Thoughts("none")),
        (None, {}, None, Thoughts("none")),
        (None, {"<think>": OPEN}, None, Thoughts("none")),
        (None, {"</think>": CLOSE}, None, Thoughts("tags", None, CLOSE)),
    ],
)
def test_then_the_models_tokens_then_what_is_known_of_it_then_its_template(
    known: ThoughtStyle | None, special: dict[str, int], template: str | None, found: Thoughts
) -> None:
    assert reply_rules.find_thoughts(None, known, special, template) == found


@pytest.mark.parametrize(
    ("thoughts", "end", "phase"),
    [
        (TAGS, [OPEN, *b"\n"], "thinking"),
        (TAGS, [OPEN], "thinking"),
        (TAGS, [OPEN, *b"\n\n", CLOSE, *b"\n\n"], "answer"),
        (TAGS, [], "answer"),
        (TAGS, [CLOSE, *b"\n"], "answer"),
        (TAGS, [OPEN, *b"x", CLOSE, OPEN, *b"\n"], "thinking"),
        (TAGS, [*b"<think>\n"], "answer"),
        (SPELLED, [*b"<think>\n"], "thinking"),
        (SPELLED, [*b"<think>"], "thinking"),
        (SPELLED, [*b"x>\n"], "answer"),
        (SPELLED, [], "answer"),
        (UNDIVIDED, [], "thinking"),
        (UNDIVIDED, [OPEN], "thinking"),
    ],
)
def test_a_reply_begins_where_the_prompt_leaves_the_model(thoughts: Thoughts, end: list[int], phase: str) -> None:
    rules = rules_of(Options(), thoughts, [*PROMPT, *end])
    assert (rules.begin.phase, rules.begin.undivided) == (phase, thoughts.style == "undivided")
    assert (rules.begin.rewinds, rules.begin.asked_at) == ((), None)


def test_a_spelled_thought_that_the_template_closed_is_closed() -> None:
    class Chars:  # a token is a word here: a tail of few tokens holds both tags
        words = ("assistant\n", "<think>", "\n\n", "</think>", "\n\n")

    rules = reply_rules.make_rules(
        Options(), SPELLED, read_question([said("user", "")]), list(range(5)), 4096,
        PieceTokenizer(frozenset(), lambda n: Chars.words[n].encode(), tokenize),
    )  # fmt: skip
    assert rules.begin.phase == "answer"


def test_tags_count_at_the_prompts_end_only_and_in_a_templates_prompt_only() -> None:
    assert rules_of(Options(), TAGS, [OPEN, *b"\n", *PROMPT, *b" and so on"]).begin.phase == "answer"
    assert rules_of(Options(), TAGS, [*PROMPT, OPEN, *b"\n"], templated=False).begin.phase == "answer"
    assert rules_of(Options(), UNDIVIDED, PROMPT, templated=False).begin.phase == "thinking"


@pytest.mark.parametrize(
    ("question", "heading"),
    [
        ("How many are there?", "**Final Answer**"),
        ("一共有多少个？", "**最终答案**"),
        ("已知函数f(x)=x+1，求最小值", "**最终答案**"),
        ("What does 你好 mean in English?", "**Final Answer**"),
        ("", "**Final Answer**"),
        ("3 + 4 = ?", "**Final Answer**"),
    ],
)
def test_what_ends_a_thought_without_tags_is_in_the_questions_language(question: str, heading: str) -> None:
    assert reply_rules.closing_words(UNDIVIDED, question) == (f"\n\n{heading}\n\n",)
    closing = policy_of(rules_of(Options(), UNDIVIDED, PROMPT, question), Closing)
    assert closing.words == (f"\n\n{heading}\n\n",)
    assert closing.n_words >= len(tokenize(closing.words[0]))
    assert (closing.eager, closing.constrains) == (None, False)


@pytest.mark.parametrize("question", ["How many?", "多少？"])
def test_what_ends_a_thought_with_tags_is_the_tag(question: str) -> None:
    assert reply_rules.closing_words(TAGS, question) == ("\n", CLOSE, "\n\n")
    assert reply_rules.closing_words(SPELLED, question) == ("\n</think>\n\n",)


MATRIX = "Write the 16x16 zero matrix as a Python list."


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    ("prompt", "question", "may_repeat"),
    [
        ("Text", "Text", False),
        (MATRIX, MATRIX, True),
        ([1, 2, 3], "", True),  # nobody knows
        ([], "", False),
        ([said("system", "S")], "", False),
        ([said("user", "A"), said("assistant", MATRIX)], "A", False),
        ([said("user", "A"), said("user", "B")], "B", False),
        ([{"role": "user"}], "", False),
        ([said("user", None)], "", False),
        ([said("user", MATRIX)], MATRIX, True),
        ([said("user", MATRIX), said("assistant", "[[0]]"), said("user", "Continue.")], "Continue.", True),
        ([said("system", "Repeat each line ten times."), said("user", "A")], "A", True),
        ([said("user", parts("A", "B"))], "A\nB", False),
        ([said("user", parts("A", MATRIX))], f"A\n{MATRIX}", True),
        ([said("user", parts("请写一个故事。"))], "请写一个故事。", False),
        ([said("user", [{"type": "image_url", "image_url": {"url": "u"}}, *parts(MATRIX)])], None, True),
    ],
)
def test_a_prompt_asks_what_the_user_said_last_and_for_repetition_where_that_was_ever_asked(
    prompt: Any, question: str | None, may_repeat: bool
) -> None:
    asked = read_question(prompt)
    assert question is None or asked.text == question
    assert asked.may_repeat == may_repeat


@pytest.mark.parametrize("thoughts", [TAGS, SPELLED, UNDIVIDED, Thoughts("none")])
@pytest.mark.parametrize("prompt", ["How many?", MATRIX, [1, 2, 3], [said("user", parts(MATRIX))]])
def test_loops_are_looked_for_and_those_that_were_asked_for_are_none(thoughts: Thoughts, prompt: Any) -> None:
    asked = prompt != "How many?"
    rules = reply_rules.make_rules(Options(), thoughts, read_question(prompt), PROMPT, 4096, TOKENIZER)
    assert policy_of(rules, Loops) == Loops(asked, undivided=thoughts is UNDIVIDED)


@pytest.mark.parametrize("masked", [frozenset[str](), frozenset({"thai"}), frozenset({"han"})])
def test_a_heading_that_ends_a_thought_has_no_letter_that_the_answer_may_not_have(masked: frozenset[str]) -> None:
    """Wherever the words stand: in closing, in script, and in what a budget of nothing forces."""
    masks = ScriptMasks([bytes([n]) for n in range(256)], masked) if masked else None
    heading = "**Final Answer**\n\n" if "han" in masked else "**最终答案**\n\n"
    rules = reply_rules.make_rules(
        Options(thinking_budget=0), UNDIVIDED, read_question("一共有多少个？"), PROMPT, 4096, TOKENIZER, (masks, None)
    )  # fmt: skip
    assert policy_of(rules, Closing).words == (f"\n\n{heading}",)
    assert b"".join(map(piece, rules.begin.rewinds[0].forced)).decode() == heading
    script = policy_of(rules, Script)
    assert script == (Script(masks, None, (f"\n\n{heading}",)) if masks else None)


@pytest.mark.parametrize("thoughts", [TAGS, SPELLED, UNDIVIDED])
def test_a_budget_of_nothing_ends_the_thought_before_its_first_token(thoughts: Thoughts) -> None:
    opening = [OPEN] if thoughts is TAGS else [*b"<think>\n"]
    rules = rules_of(Options(thinking_budget=0), thoughts, [*PROMPT, *opening])
    (rewind,) = rules.begin.rewinds
    written = b"".join(map(piece, rewind.forced)).decode()
    expected = "**Final Answer**\n\n" if thoughts is UNDIVIDED else "</think>\n\n"
    assert (rewind.n_tokens, written, rewind.ends, rewind.why) == (0, expected, "budget", "")
    assert (CLOSE in rewind.forced) == (thoughts is TAGS)
    assert rules.begin.undivided == (thoughts is UNDIVIDED)


@pytest.mark.parametrize("end", [[], [OPEN, *b"\n\n", CLOSE, *b"\n\n"]])
def test_a_budget_of_nothing_forces_nothing_where_no_thought_is_open(end: list[int]) -> None:
    rules = rules_of(Options(thinking_budget=0), TAGS, [*PROMPT, *end])
    assert (rules.begin.phase, rules.begin.rewinds) == ("answer", ())


@pytest.mark.parametrize("effort", ["low", "medium", "high"])
def test_an_effort_is_a_budget_by_name(effort: Any) -> None:
    n = EFFORTS[effort]
    assert Options(effort=effort).budget == Options(thinking_budget=n).budget == n
    by_name, by_number = (rules_of(o, TAGS, PROMPT) for o in (Options(effort=effort), Options(thinking_budget=n)))
    assert by_name == by_number
    assert by_name.thinking_limit == n + max(n // 10, 96)
    assert Options().budget is None


def test_efforts_grow() -> None:
    assert list(EFFORTS.values()) == sorted(set(EFFORTS.values()))


STYLES = st.sampled_from([TAGS, SPELLED, UNDIVIDED, Thoughts("none")])


@given(
    STYLES,
    st.integers(1, 200),
    st.integers(201, 50_000),
    st.none() | st.integers(0, 60_000),
    st.none() | st.integers(1, 60_000),
    st.none() | st.floats(0.01, 1000),
)
def test_thought_and_answer_have_room_in_the_context(
    thoughts: Thoughts, n_prompt: int, n_ctx: int, budget: int | None, reserve: int | None, within: float | None
) -> None:
    options = Options(thinking_budget=budget, answer_reserve=reserve, within=within)
    rules = rules_of(options, thoughts, [START] * n_prompt, n_ctx=n_ctx)
    room = n_ctx - n_prompt
    assert names(rules.policies) == [name for name in ORDER if name in names(rules.policies)]
    deadline, closing, kept = (policy_of(rules, kind) for kind in (Deadline, Closing, Reserve))
    assert (deadline is None) == (within is None)
    if within is not None:
        assert (deadline.within_s, deadline.n_prompt) == (within, n_prompt)
    if thoughts.style == "none":
        assert (rules.thinking_limit, closing, kept, rules.begin.phase) == (None, None, None, "answer")
        return
    assert rules.thinking_limit is not None
    assert 1 <= kept.n_tokens <= max(1, room // 2, min(reply_rules.ANSWER_RESERVE, room // 2))
    assert kept.n_tokens == min(reply_rules.ANSWER_RESERVE if reserve is None else reserve, max(1, room // 2))
    assert rules.thinking_limit + kept.n_tokens <= room or room == 1
    assert budget is None or rules.thinking_limit <= budget + max(budget // 10, 96)
    assert deadline is None or deadline.n_answer <= kept.n_tokens
    assert list(closing.windows) == sorted(closing.windows)
    assert all(0 <= window.opens <= window.closes for window in closing.windows)
    assert {window.cause for window in closing.windows} == {"context"} | ({"budget"} if budget is not None else set())


def test_stop_texts_and_the_most_tokens_are_the_users() -> None:
    rules = rules_of(Options(stop=["STOP", "x"], max_tokens=7), TAGS, PROMPT)
    assert policy_of(rules, Stops) == Stops(frozenset({END}), ("STOP", "x"), 7)


THOUGHT = {
    "thinking_budget": 64,
    "effort": "low",
    "answer_reserve": 64,
    "answer_temperature": 0.5,
    "answer_top_p": 0.9,
    "think_script": "latin",
}


@pytest.mark.parametrize("name", THOUGHT)
def test_an_option_about_a_thought_is_said_to_be_ignored_where_there_is_none(name: str) -> None:
    options = Options(**{name: THOUGHT[name]})  # type: ignore[arg-type] # each its own
    (notice,) = list_ignored(options, "none", templated=True)
    assert notice.kind == "ignored"
    assert notice.text.startswith(f"{name} (--")
    assert not [
        *list_ignored(options, "tags", templated=True),
        *list_ignored(options, "undivided", templated=True),
    ]


@pytest.mark.parametrize(
    ("options", "style", "templated", "words"),
    [
        (
            Options(effort="low", answer_reserve=9),
            "none",
            True,
            "answer_reserve (--answer-reserve), effort (--effort) are",
        ),
        (Options(history="all"), "tags", True, "history (--history) is ignored: this model marks"),
        (Options(tools=[{"name": "clock"}]), "tags", False, "tools is ignored: the prompt is no list of messages"),
        (Options(when_full="error"), "none", False, "when_full (--when-full) is ignored: the prompt is no list"),
    ],
)
def test_what_is_ignored_is_named_with_the_reason(
    options: Options, style: ThoughtStyle, templated: bool, words: str
) -> None:
    (notice,) = list_ignored(options, style, templated=templated)
    assert notice.text.startswith(words)


@pytest.mark.parametrize(
    ("options", "style"),
    [
        (Options(), "none"),
        (Options(thinking_budget=0), "none"),
        (Options(think_script="any"), "none"),
        (Options(history="answer"), "tags"),
        (Options(history="all"), "undivided"),
        (Options(within=5.0, stop=["x"], seed=1), "none"),
    ],
)
def test_what_is_done_without_the_option_too_is_not_ignored(options: Options, style: ThoughtStyle) -> None:
    assert [*list_ignored(options, style, templated=True)] == []


@pytest.mark.parametrize("model", [TAGS, UNDIVIDED, Thoughts("none")])
def test_a_stop_text_counts_in_a_thought_that_is_part_of_the_answers_text(model: Thoughts) -> None:
    rules = rules_of(Options(stop=["STOP"]), model, PROMPT)
    assert policy_of(rules, Stops).undivided is (model is UNDIVIDED)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"thinking_budget": -1}, "thinking_budget is -1, a whole number from 0"),
        ({"thinking_budget": 1.5}, "thinking_budget is 1.5"),
        ({"thinking_budget": True}, "thinking_budget is True"),
        ({"thinking_budget": 64, "effort": "low"}, "both given"),
        ({"thinking_budget": 0, "effort": "low"}, "both given"),
        ({"effort": "most"}, "effort is 'most'; low, medium, high are allowed"),
        ({"within": 0}, "within is 0, a number of seconds above 0"),
        ({"within": -1.0}, "within is -1.0"),
        ({"within": float("inf")}, "within is inf"),
        ({"within": float("nan")}, "within is nan"),
        ({"within": "60"}, "within is '60', a number is allowed"),
        ({"answer_reserve": 0}, "answer_reserve is 0, a whole number from 1"),
        ({"answer_temperature": "hot"}, "answer_temperature is 'hot'"),
        ({"answer_top_p": True}, "answer_top_p is True"),
        ({"thought_style": "xml"}, "thought_style is 'xml'; tags, undivided, none are allowed"),
        ({"history": "some"}, "history is 'some'; all, answer are allowed"),
        ({"budget": 5}, "there is no option 'budget'; known are seed"),
    ],
)
def test_an_option_that_cannot_be_meant_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        options.parse_options(given)


@pytest.mark.parametrize("given", [{"effort": ["low"]}, {"effort": {}}, {"history": []}, {"thought_style": 1}])
def test_an_option_of_another_type_is_refused_too(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        options.parse_options(given)


@pytest.mark.parametrize("number", [10**400, -(10**400)])
def test_a_number_beyond_all_others_is_refused(number: int) -> None:
    for name in ("within", "thinking_budget", "answer_reserve"):
        with pytest.raises(UsageError):
            options.parse_options({name: number})
