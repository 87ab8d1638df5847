"""track: a text that goes on with given words has the tokens that tokenizing all of it gives, a hint's too.

By an invented tokenizer in which a stop and the newlines after it are one token, and so are a word and the space before it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwq_lite.events import Notice
from qwq_lite.reply.builder import ReplyBuilder
from qwq_lite.reply.commands import Drop, Steer
from qwq_lite.reply.policies.phases import Phases
from qwq_lite.reply.policy import Begin, Policy, Rewind, Rewrite, Taken, Verdict
from qwq_lite.text import breaks
from tests.samples import examples
from tests.tracks import CLOSE, OPEN, SAMPLING, everything, phase_of, texts

SPELLING = re.compile(r"[.!?]\n+| ?\w+|\n+|.")


class Vocabulary:
    """Ids of pieces of text, made as they are met. CLOSE stands for itself."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = [b"", b"<think>", b"</think>"]

    def id(self, piece: bytes) -> int:
        if piece not in self.pieces[CLOSE + 1 :]:
            self.pieces.append(piece)
        return self.pieces.index(piece, CLOSE + 1)

    def tokenize(self, text: str) -> list[int]:
        found = SPELLING.findall(text)
        assert "".join(found) == text
        return [self.id(piece.encode()) for piece in found]

    def text(self, tokens: Iterable[int]) -> str:
        return b"".join(self.pieces[token] for token in tokens).decode()

    def thought(self, tokens: Iterable[int]) -> ReplyBuilder:
        """A thought of these tokens that nobody ends."""
        track = self.track(Phases(OPEN, CLOSE))
        for token in tokens:
            track.take(token)
        return track

    def track(self, *policies: Policy) -> ReplyBuilder:
        return ReplyBuilder(policies, Begin("thinking"), self.pieces.__getitem__, self.tokenize)


@dataclass(frozen=True)
class Rewrites(Policy):
    """Rewrites a reply once, where it has so many tokens."""

    at: int
    rewrite: Rewrite
    name: ClassVar[str] = "rewrites"

    def start(self, begin: Begin) -> bool:
        return not begin.rewinds

    def observe(self, state: bool, taken: Taken) -> Verdict:
        return Verdict(state, self.rewrite if state and taken.n_tokens == self.at else None)


def test_the_invented_tokenizer_joins_a_stop_and_the_newline_after_it() -> None:
    words = Vocabulary()
    assert [words.text([token]) for token in words.tokenize("So it is.\nNo. Ah.\n\n")] == (
        ["So", " it", " is", ".\n", "No", ".", " Ah", ".\n\n"]
    )


def rewritten(words: Vocabulary, tokens: list[int], rewrite: Rewrite) -> tuple[ReplyBuilder, list[int]]:
    """A thought of these tokens whose last one a policy rewrites, and the tokens that it will have then."""
    track = words.track(Phases(OPEN, CLOSE), Rewrites(len(tokens), rewrite))
    for token in tokens[:-1]:
        assert track.take(token)[1] is None
    action = track.take(tokens[-1])[1]
    assert isinstance(action, Rewind)
    assert (action.why, action.ends, action.banned) == (rewrite.why, rewrite.ends, frozenset())
    assert (track.tokens, track.state.forced) == (tokens[: action.n_tokens], action.forced)
    assert track.attempt == 1
    if len(action.forced) > 1:  # one comes next at least, else only what must goes
        assert tokens[action.n_tokens : action.n_tokens + 1] != [action.forced[0]]
    standing = [*track.tokens, *action.forced]
    while (forced := track.constrain(SAMPLING).forced) is not None:
        assert track.take(forced)[1] is None
    assert track.tokens == standing
    assert track.n_forced == len(action.forced)
    return track, standing


def test_a_stop_that_a_newline_now_follows_is_spelled_with_it() -> None:
    words = Vocabulary()
    tokens = words.tokenize("So it is.")
    track, standing = rewritten(words, tokens, Rewrite(0, ("\n", CLOSE, "\n\n"), "why", "budget"))
    assert standing == [*words.tokenize("So it is.\n"), CLOSE, *words.tokenize("\n\n")]
    assert standing[: len(tokens) - 1] == tokens[:-1]
    assert standing[len(tokens) - 1] == words.id(b".\n") != tokens[-1]
    assert texts(track) == ("So it is.", "")
    assert (phase_of(track), track.thought_end) == ("answer", "budget")


TALK = st.text("ab人.\n ", min_size=1, max_size=30)
WORDS = st.lists(
    st.one_of(st.just(CLOSE), st.sampled_from(["\n", "\n\n", "\n\nWait.", "\nSo\n", " and", "b"])),
    min_size=1,
    max_size=4,
).map(tuple)


def spelled(words: Vocabulary, kept: str, more: tuple[str | int, ...]) -> list[int]:
    """A text that goes on with words: texts that follow each other are one, newlines before everything are none."""
    tokens: list[int] = []
    text = kept
    for word in more:
        if isinstance(word, int):
            tokens += [*words.tokenize(text), word]
            text = ""
        else:
            text += word if text or tokens else word.lstrip("\n")
    return [*tokens, *words.tokenize(text)]


@examples(300)
@given(TALK, st.integers(0, 30), WORDS)
@example("So it is.", 0, ("\n", CLOSE))
@example("a.\nb", 1, ("\n\nWait.",))
@example("a.\n b", 0, ("b",))
def test_a_rewritten_thought_has_the_tokens_that_tokenizing_its_text_gives(
    whole: str, n_drop: int, more: tuple[str | int, ...]
) -> None:
    words = Vocabulary()
    kept = whole[: max(0, len(whole) - n_drop)].rstrip()
    _, standing = rewritten(words, words.tokenize(whole), Rewrite(n_drop, more))
    assert standing == spelled(words, kept, more)


@examples(300)
@given(TALK, st.integers(0, 30), WORDS, st.lists(st.integers(0, 1000)))
def test_a_rewritten_thought_has_the_text_whatever_tokens_the_model_wrote_it_in(
    whole: str, n_drop: int, more: tuple[str | int, ...], places: list[int]
) -> None:
    """Bytes of one character may be in two tokens, and tokens that no tokenizer would make stand before the last line."""
    words, data = Vocabulary(), whole.encode()
    ends = [0, *sorted({place % len(data) for place in places} - {0}), len(data)]
    tokens = [words.id(data[a:b]) for a, b in itertools.pairwise(ends)]
    kept = whole[: max(0, len(whole) - n_drop)].rstrip()
    _, standing = rewritten(words, tokens, Rewrite(n_drop, more))
    assert words.text(standing) == words.text(spelled(words, kept, more))


@given(TALK, WORDS)
def test_a_rewrite_without_a_number_drops_what_follows_the_last_break(whole: str, more: tuple[str | int, ...]) -> None:
    """All, where there is none and the thought is short."""
    words = Vocabulary()
    n_after = breaks.n_after_last(whole)
    kept = "" if n_after is None else whole[: len(whole) - n_after].rstrip()
    _, standing = rewritten(words, words.tokenize(whole), Rewrite(None, more))
    assert standing == spelled(words, kept, more)


def test_a_long_thought_without_a_break_loses_nothing_for_a_better_end() -> None:
    words = Vocabulary()
    whole = "a" + " b" * 100
    _, standing = rewritten(words, words.tokenize(whole), Rewrite(None, ("\n", CLOSE)))
    assert standing == [*words.tokenize(f"{whole}\n"), CLOSE]


def test_an_unfinished_character_is_dropped_by_a_rewrite() -> None:
    words = Vocabulary()
    tokens = [*words.tokenize("a b"), words.id(b"\xe4")]
    assert rewritten(words, tokens, Rewrite(0, ("\n", CLOSE)))[1] == [*words.tokenize("a b\n"), CLOSE]


def test_a_rewrite_leaves_the_tag_before_the_thought_alone() -> None:
    words = Vocabulary()
    rewrite = Rewrite(1, ("\nb",))
    track = ReplyBuilder((Phases(OPEN, CLOSE), Rewrites(2, rewrite)), Begin(), words.pieces.__getitem__, words.tokenize)
    track.take(OPEN)
    assert track.take(words.id(b"a"))[1] == Rewind(1, forced=(words.id(b"b"),))
    assert track.tokens == [OPEN]


# A hint for the thought.

THOUGHT = "It is odd.\n\nSo n is 1. Or n is"
LEFT: list[tuple[Drop | None, str]] = [
    (None, THOUGHT),
    ("sentence", "It is odd.\n\nSo n is 1."),
    ("paragraph", "It is odd."),
]


@pytest.mark.parametrize(("drop", "left"), LEFT)
def test_a_hint_takes_the_place_of_the_last_sentence_or_paragraph_or_follows_what_there_is(
    drop: Drop | None, left: str
) -> None:
    words = Vocabulary()
    tokens = words.tokenize(THOUGHT)
    track = words.thought(tokens)
    before = everything(track)
    rewind = track.steer(Steer("Wait, n = 0.\n", drop))
    assert everything(track) == before
    assert rewind is not None
    assert rewind == Rewind(rewind.n_tokens, why="it was given a hint", forced=rewind.forced)
    expected = words.tokenize(f"{left}\n\nWait, n = 0.\n")
    assert [*tokens[: rewind.n_tokens], *rewind.forced] == expected
    events = track.rewind(rewind)
    n_lost = len(THOUGHT) - max(len(left), len(words.text(tokens[: rewind.n_tokens])))
    why = f"the last {n_lost} characters of the thought no longer count: it was given a hint"
    assert events == ((Notice(why, "rewound", n_lost),) if n_lost else ())
    for token in rewind.forced:
        assert track.constrain(SAMPLING).forced == token
        track.take(token)
    assert (track.tokens, track.n_forced) == (expected, len(rewind.forced))
    assert texts(track) == (f"{left}\n\nWait, n = 0.", "")
    assert phase_of(track) == "thinking"


@given(TALK, st.sampled_from([None, "sentence", "paragraph"]), st.sampled_from(["b", "Wait.", "So.\n", "a\n\n"]))
def test_a_hint_is_spelled_as_if_the_thought_had_it_from_the_beginning(
    whole: str, drop: Drop | None, hint: str
) -> None:
    words = Vocabulary()
    tokens = words.tokenize(whole)
    track = words.thought(tokens)
    rewind = track.steer(Steer(hint, drop))
    assert rewind is not None
    n_drop = 0 if drop is None else breaks.n_unfinished(whole, drop)
    kept = whole[: len(whole) - n_drop].rstrip()
    assert [*tokens[: rewind.n_tokens], *rewind.forced] == spelled(words, kept, (f"\n\n{hint}",))


def test_a_hint_comes_first_where_no_thought_is_yet_or_none_is_left() -> None:
    words = Vocabulary()
    for tokens in ([], words.tokenize("\n"), words.tokenize("It is")):
        track = words.thought(tokens)
        assert track.steer(Steer("Wait.", "sentence")) == Rewind(
            0, why="it was given a hint", forced=tuple(words.tokenize("Wait."))
        )
