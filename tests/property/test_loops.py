"""Loops are found where their definition says, at the token that is due, whatever the way to a text."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bench.measure.repeats import stretches
from qwq_lite.reply.policies.loops import IN_ANSWER, IN_THOUGHT, Loops, LoopState
from qwq_lite.reply.policy import Action, Begin, Rewind, Stop, Taken
from qwq_lite.reply.repetition import WINDOW, Limit
from qwq_lite.text.lines import Line, follow
from tests.samples import examples
from tests.thoughts import CLOSE


def found(policy: Loops, tokens: Sequence[int], begin: Begin, texts: Sequence[str] = ()) -> tuple[int, Action]:
    """The reply's length at which the policy has a word on it, and the word; -1 where it never has."""
    state: LoopState = policy.start(begin)
    line = Line()
    for n, (token, text) in enumerate(itertools.zip_longest(tokens, texts, fillvalue="x"), 1):
        line, _ = follow(line, str(text))
        verdict = policy.observe(state, Taken(int(token), str(text), begin.phase, n, line=line))
        if verdict.action is not None or verdict.end is not None:
            return n, verdict.action
        state = verdict.state
    return -1, None


def exact(tokens: list[int], limit: Limit) -> int:
    """By brute force: when the first stretch has so many copies and tokens."""
    ends = [
        repeat.start + length
        for repeat in stretches(tokens, limit.n_copies)
        if (length := max(limit.n_copies * repeat.period, limit.n_tokens)) <= repeat.end - repeat.start
    ]
    return min(ends, default=-1)


def near(tokens: list[int]) -> int:
    """By brute force: the first token that ends eight that were there before, as do four in five of the last 512."""
    grams = [tuple(tokens[max(0, n - 7) : n + 1]) for n in range(len(tokens))]
    seen: set[tuple[int, ...]] = set()
    n_old = [0]
    for gram in grams:
        n_old.append(n_old[-1] + (len(gram) == 8 and gram in seen))
        seen.add(gram)
    full = range(WINDOW, len(tokens) + 1)
    circles = (n for n in full if 10 * (n_old[n] - n_old[n - WINDOW]) >= 8 * WINDOW and n_old[n] > n_old[n - 1])
    return next(circles, -1)


def first(*places: int) -> int:
    return min((place for place in places if place >= 0), default=-1)


def noise(n: int, seed: int = 0) -> list[int]:
    """Tokens of which none comes twice."""
    return random.Random(seed).sample(range(1000, 200_000), n)


COPIES = st.builds(
    lambda period, n: (period * (n // len(period) + 1))[:n],
    st.lists(st.integers(0, 3), min_size=1, max_size=48),
    st.integers(0, 300),
)
MIXED = st.lists(st.one_of(COPIES, st.lists(st.integers(0, 3), max_size=20)), max_size=6).map(
    lambda parts: [token for part in parts for token in part]
)


@examples(200)
@given(MIXED)
@example([0] * 63 + [1] * 64)
@example(([0] * 30 + [1]) * 4)
@example([0, 1, 2] * 40 + [3] + [0, 1, 2] * 40)
def test_in_a_thought_a_loop_is_found_by_both_definitions_at_the_same_token(tokens: list[int]) -> None:
    n, _ = found(Loops(), tokens, Begin("thinking"))
    assert n == first(exact(tokens, IN_THOUGHT), near(tokens))


@examples(60)
@given(st.lists(COPIES, max_size=4).map(lambda parts: [token for part in parts for token in part * 4]))
def test_in_an_answer_only_exact_loops_are_found(tokens: list[int]) -> None:
    assert found(Loops(), tokens, Begin("answer"))[0] == exact(tokens, IN_ANSWER)
    assert found(Loops(asked=True), tokens, Begin("answer"))[0] == -1


@pytest.mark.parametrize(
    "period", [1, 2, 5, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 127, 128, 255, 500, 513, 1000, 1024]
)
@pytest.mark.parametrize("n_before", [0, 15, 333])
def test_thresholds_are_exact_for_every_period(period: int, n_before: int) -> None:
    """Of a thought about repetition and of an answer alike; a token less is no loop."""
    tokens = noise(n_before + period)
    copies = [*tokens[:n_before], *(tokens[n_before:] * 16), *tokens[n_before:]]
    due = n_before + max(16 * period, 512)
    longer = (copies + tokens[n_before:] * (512 // period))[:due]
    for policy, begin in ((Loops(), Begin("answer")), (Loops(asked=True), Begin("thinking"))):
        assert found(policy, longer, begin)[0] == due
        assert found(policy, longer[:-1], begin)[0] == -1
    four = tokens[:n_before] + (tokens[n_before:] * 64)[: max(4 * period, 64)]
    assert found(Loops(), four, Begin("thinking"))[0] == first(len(four), near(four))
    if period < 100:
        assert found(Loops(), four[:-1], Begin("thinking"))[0] == -1


@pytest.mark.parametrize("period", [1025, 1500])
def test_a_longer_period_is_none(period: int) -> None:
    assert found(Loops(), noise(period) * 20, Begin("answer"))[0] == -1


@given(st.integers(0, 1000), st.sampled_from([Begin("thinking"), Begin("answer")]))
@settings(max_examples=20)
def test_what_does_not_repeat_is_no_loop(seed: int, begin: Begin) -> None:
    assert found(Loops(), noise(6000, seed), begin)[0] == -1
    counting = [token for n in noise(1500, seed) for token in (1, 2, 3, n)]  # "118. 119. 120." and so on
    assert found(Loops(), counting, begin)[0] == -1


@pytest.mark.parametrize("n_old", [300, 409, 410, 512])
def test_four_in_five_of_the_last_tokens_make_a_near_loop(n_old: int) -> None:
    """Old ones come in runs of sixteen, in which the first seven complete nothing that was there before."""
    thought = noise(3000)
    runs = [thought[16 * n : 16 * n + n_old * 16 // 512 + 7] for n in range(100)]
    tokens = thought + [token for n, part in enumerate(runs) for token in (*part[: n_old * 16 // 512 + 7], 300_000 + n)]
    assert found(Loops(), tokens, Begin("thinking"))[0] == near(tokens)


def test_a_near_loop_is_left_where_the_text_begins_to_come_again() -> None:
    """Headings change, the blocks under them do not."""
    before, block = noise(700), noise(120, 1)
    blocks = [[500_000 + n, *block] for n in range(20)]
    tokens = before + [token for part in blocks for token in part]
    n, action = found(Loops(), tokens, Begin("thinking"))
    assert n == near(tokens)
    assert action == Rewind(len(before) + len(block) + 2, frozenset({block[0]}), "it went round in circles", loop=True)


@given(MIXED.filter(bool), st.integers(1, 40), st.integers(0, 40))
def test_an_exact_loop_is_left_at_the_end_of_its_first_copy(period: list[int], n_shorter: int, n_before: int) -> None:
    period = noise(len(period))[:n_shorter]
    tokens = [*range(n_before), *period * (4 + 64 // len(period))]
    _, action = found(Loops(), tokens, Begin("thinking"))
    assert action == Rewind(n_before + len(period), frozenset({period[0]}), "it repeated itself", loop=True)


# The states of one reply are lengths of one text; what goes another way is folded again.


def state_of(policy: Loops, begin: Begin, tokens: Sequence[int], texts: Sequence[str] = ()) -> LoopState:
    state, line = policy.start(begin), Line()
    for n, (token, text) in enumerate(itertools.zip_longest(tokens, texts, fillvalue="x"), 1):
        line, _ = follow(line, str(text))
        state = policy.observe(state, Taken(int(token), str(text), begin.phase, n, line=line)).state
    return state


@examples(60)
@given(MIXED, MIXED, st.data())
def test_a_reply_that_is_folded_again_knows_nothing_of_what_was_taken_back(
    tokens: list[int], others: list[int], data: st.DataObject
) -> None:
    """One policy serves the reply before and after a rewind."""
    policy, begin = Loops(), Begin("thinking")
    kept = tokens[: data.draw(st.integers(0, len(tokens)))]
    state_of(policy, begin, tokens)
    assert found(policy, kept + others, begin) == found(Loops(), kept + others, begin)
    assert state_of(policy, begin, kept + others)[1:] == state_of(Loops(), begin, kept + others)[1:]


def test_an_older_state_of_a_text_that_went_on_cannot_go_another_way() -> None:
    """It would change what the other one says: such a reply is folded again."""
    policy, begin = Loops(), Begin("thinking")
    older = state_of(policy, begin, [1, 2, 3])
    policy.observe(older, Taken(4, "x", "thinking", 4))
    with pytest.raises(AssertionError, match="folded again"):
        policy.observe(older, Taken(5, "x", "thinking", 4))


# Code, and where a phase ends.


def cut(text: str, places: Sequence[int]) -> list[str]:
    ends = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(ends)]


def coded(before: str, places: Sequence[int], n: int) -> tuple[list[int], list[str]]:
    """A text in such pieces, and then one token again and again."""
    pieces = cut(before, places)
    return [*noise(len(pieces)), *[7] * n], [*pieces, *["0, "] * n]


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 99)),
    st.sampled_from(["```python\n", "So:\n\n  ```\nx\n", "a\n```\nb\n```\nc\n```\n", "```\na\n``` b\n"]),
)
def test_in_code_an_answer_may_repeat_itself_four_times_as_long(places: list[int], before: str) -> None:
    tokens, texts = coded(before, places, 3000)
    n = len(tokens) - 3000
    assert found(Loops(), tokens, Begin("answer"), texts) == (n + 2048, Stop("loop"))


@given(
    st.lists(st.integers(0, 99)), st.sampled_from(["``` is a fence, a ```\n", "So:\nx``` y\n", "```\nb\n```\n", "``\n"])
)
def test_after_code_and_where_there_was_none_it_may_not(places: list[int], before: str) -> None:
    tokens, texts = coded(before, places, 3000)
    n = len(tokens) - 3000
    assert found(Loops(), tokens, Begin("answer"), texts) == (n + 512, Stop("loop"))


def test_a_loop_of_blocks_of_code_ends_where_one_is_closed() -> None:
    """Within a block it is not long enough yet; outside it is."""
    block = [("```\n", 1), *((f"line {n}\n", 10 + n) for n in range(58)), ("```\n", 2)]
    tokens, texts = [n for _, n in block] * 40, [text for text, _ in block] * 40
    n, action = found(Loops(), tokens, Begin("answer"), texts)
    assert action == Stop("loop")
    assert n == 60 * 16


@settings(max_examples=20)
@given(st.lists(st.integers(0, 99)), st.sampled_from(["```python\n", "So:\n\n  ```\nx\n"]))
def test_in_code_a_thought_may_repeat_itself_no_longer(places: list[int], before: str) -> None:
    tokens, texts = coded(before, places, 100)
    n, action = found(Loops(), tokens, Begin("thinking"), texts)
    assert n == len(tokens) - 100 + 64
    assert isinstance(action, Rewind)


def test_where_code_ends_in_the_midst_of_a_stretch_it_is_a_loop_at_once() -> None:
    """And where it begins one is none any more. What opens and closes a block comes as the same token here."""
    for n_in_code, expected in ((1000, 1001), (400, 512)):
        texts = ["```\n", *["x"] * (n_in_code - 2), "\n", "```\n", *["x"] * 2000]
        assert found(Loops(), [7] * len(texts), Begin("answer"), texts) == (expected, Stop("loop"))
    texts = [*["x"] * 400, "\n```\n", *["x"] * 3000]
    assert found(Loops(), [7] * len(texts), Begin("answer"), texts) == (2048, Stop("loop"))


def test_old_tokens_in_code_do_not_count() -> None:
    block, text = noise(600), ["x"] * 600
    thought = [*block, 1, *block], [*text, "\n```\n", *text]
    assert found(Loops(), thought[0], Begin("thinking"), thought[1])[0] == -1
    assert found(Loops(), thought[0], Begin("thinking"))[0] > 0


@pytest.mark.parametrize(
    ("start", "counts"), [("    ", False), ("\t", False), ("| ", False), ("   ", True), ("- ", True)]
)
@pytest.mark.parametrize("n_pieces", [1, 2, 3])
def test_old_tokens_in_lines_that_are_set_apart_do_not_count(start: str, counts: bool, n_pieces: int) -> None:
    """Indented code and tables, also where the line's start comes in several tokens."""
    pieces = cut(f"\n{start}", [1, 2][: n_pieces - 1])
    line = [*range(len(pieces)), *noise(80)]
    lines = [token for n in range(30) for token in (*line, 300_000 + n)]
    texts = [*pieces, *["x"] * 81] * 30
    assert (found(Loops(), lines, Begin("thinking"), texts)[0] > 0) == counts


def test_a_phase_knows_nothing_of_the_one_before() -> None:
    policy = Loops()
    state = state_of(policy, Begin("thinking"), [*noise(300), *[7] * 60])
    state = policy.observe(state, Taken(CLOSE, "", "answer", 361, turned=True)).state
    assert state[1:] == policy.start(Begin("answer"))._replace(origin=361)[1:]
    for n in range(511):
        verdict = policy.observe(state, Taken(7, "0", "answer", 362 + n))
        assert verdict.action is None
        state = verdict.state
    assert policy.observe(state, Taken(7, "0", "answer", 873)).action == Stop("loop")


def test_an_answer_that_begins_anew_each_time_is_a_loop_too() -> None:
    """It is the same phase: the closing tag comes again with the text."""
    policy, n = Loops(), 0
    state: Any = policy.start(Begin("answer"))
    for token in noise(40) * 100:
        n += 1
        verdict = policy.observe(state, Taken(token, "x", "answer", n, turned=n % 40 == 0))
        if verdict.action:
            break
        state = verdict.state
    assert (n, verdict.action) == (640, Stop("loop"))


@pytest.mark.parametrize("undivided", [False, True])
def test_where_repetition_was_asked_for_an_answer_and_what_may_be_one_go_on(undivided: bool) -> None:
    policy = Loops(asked=True, undivided=undivided)
    assert found(policy, [7] * 5000, Begin("answer")) == (-1, None)
    assert found(policy, noise(700) * 3, Begin("thinking")) == (-1, None)  # nearly
    assert found(policy, [7] * 5000, Begin("thinking"))[0] == (-1 if undivided else 512)
