"""generation: a reply's text does not depend on where its tokens are cut; tags and ends do what they are for."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwq_lite.events import Answer, Event, FinishReason, Thinking
from qwq_lite.generation import Phase, Rules, State, advance, close

TEXT, END, OPEN, CLOSE = 0, 1, 2, 3
RULES = Rules(frozenset({END}), think_open=OPEN, think_close=CLOSE)
TEXTS = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("人工智能答案😀👩‍🚀🇨🇳éß\n")))

Token = tuple[int, bytes]
Shown = tuple[str, str, FinishReason | None]


def run(tokens: Iterable[Token], rules: Rules = RULES, phase: Phase = "answer") -> Shown:
    """Thought, answer and finish after the tokens, or after the first of them that ends the reply."""
    state = State(phase=phase)
    events: list[Event] = []
    finish: FinishReason | None = None
    for token, piece in tokens:
        step = advance(rules, state, token, piece)
        state, finish = step.state, step.finish
        events += step.events
        if finish is not None:
            break
    thought = "".join(event.text for event in events if isinstance(event, Thinking))
    answer = "".join(event.text for event in events if isinstance(event, Answer))
    return thought, answer, finish


def text(*pieces: str | bytes) -> list[Token]:
    return [(TEXT, piece.encode() if isinstance(piece, str) else piece) for piece in pieces]


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    ends = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(ends)]


def ended(pieces: Iterable[bytes]) -> list[Token]:
    return [*text(*pieces), (END, b"")]


@given(TEXTS, st.lists(st.integers(0, 1000)))
@example("人😀", [1, 2, 3, 4, 5, 6])
def test_a_text_cut_anywhere_is_the_same_text(whole: str, places: list[int]) -> None:
    assert run(ended(cut(whole.encode(), places))) == ("", whole.lstrip("\n"), "stop")


@given(st.binary(), st.lists(st.integers(0, 1000)))
@example(b"\xe4\xba", [1])
@example(b"a\xf0\x9f\x98", [2, 3])
@example(b"\xed\xa0\x80", [1, 2])
def test_bytes_that_are_no_text_become_replacement_characters_wherever_they_are_cut(
    data: bytes, places: list[int]
) -> None:
    expected = data.decode("utf-8", "replace").lstrip("\n")
    assert run(ended(cut(data, places))) == ("", expected, "stop")


@given(TEXTS, st.lists(st.integers(0, 1000)))
def test_no_replacement_character_is_shown_while_a_character_is_unfinished(whole: str, places: list[int]) -> None:
    clean = whole.replace("\ufffd", "")
    assert "\ufffd" not in run(text(*cut(clean.encode(), places)))[1]


@given(TEXTS, TEXTS, st.lists(st.integers(0, 1000)))
def test_text_before_the_closing_tag_is_thought_and_after_it_the_answer(
    thought: str, answer: str, places: list[int]
) -> None:
    tokens = [*text(*cut(thought.encode(), places)), (CLOSE, b"</think>"), *ended(cut(answer.encode(), places))]
    assert run(tokens, phase="thinking") == (thought.lstrip("\n"), answer.lstrip("\n"), "stop")


def test_an_opening_tag_at_the_start_begins_a_thought() -> None:
    tokens = [(OPEN, b"<think>"), *text("\n", "Hm."), (CLOSE, b"</think>"), *text("\n\n", "5"), (END, b"")]
    assert run(tokens) == ("Hm.", "5", "stop")


def test_an_opening_tag_within_an_answer_is_text() -> None:
    assert run([*text("The tag "), (OPEN, b"<think>"), *text(" opens")]) == ("", "The tag <think> opens", None)


def test_tags_are_text_for_a_model_that_has_none() -> None:
    assert run(text("</think>", "a"), Rules(frozenset({END}))) == ("", "</think>a", None)


@pytest.mark.parametrize("newlines", [("\n\n",), ("\n", "\n"), ("\n\nThe", " answer")])
def test_newlines_that_follow_the_closing_tag_are_dropped(newlines: tuple[str, ...]) -> None:
    _, answer, _ = run([(CLOSE, b"</think>"), *text(*newlines, "x\n\ny")], phase="thinking")
    assert answer == "".join(newlines).lstrip("\n") + "x\n\ny"


def test_a_character_that_the_closing_tag_cuts_belongs_to_the_thought() -> None:
    tokens = [*text("a", b"\xe4\xba"), (CLOSE, b"</think>"), *text(b"\xba", "b")]
    assert run(tokens, phase="thinking") == ("a\ufffd", "\ufffdb", None)


def test_an_end_token_stops_and_shows_nothing_of_itself() -> None:
    step = advance(RULES, State(n_tokens=3), END, b"")
    assert (step.events, step.finish, step.state.n_tokens) == ((), "stop", 3)


def test_an_end_token_flushes_an_unfinished_character() -> None:
    assert run(ended([b"a\xe4"])) == ("", "a\ufffd", "stop")


def test_as_many_tokens_as_allowed_end_with_length() -> None:
    rules = Rules(frozenset({END}), max_tokens=3)
    assert run(text("a", "b", "c", "d"), rules) == ("", "abc", "length")
    assert run(text("a", "b"), rules) == ("", "ab", None)


def test_the_last_token_allowed_flushes_an_unfinished_character() -> None:
    rules = Rules(frozenset({END}), max_tokens=2)
    assert run(text("a", b"\xf0\x9f", b"\x98\x80"), rules) == ("", "a\ufffd", "length")


def test_tags_count_as_tokens() -> None:
    rules = Rules(frozenset({END}), max_tokens=2, think_open=OPEN, think_close=CLOSE)
    assert run([(OPEN, b""), (CLOSE, b""), *text("a")], rules) == ("", "", "length")


def test_a_reply_that_is_left_shows_its_unfinished_character() -> None:
    assert close(State(phase="thinking", pending=b"\xe4\xba")) == (Thinking("\ufffd"),)
    assert close(State()) == ()
