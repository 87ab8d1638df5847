"""track: after any tokens and rewinds a reply is what its standing tokens fold to, and what was shown is never taken back.

What a rewind forces, what the reader asks for and what a rewrite spells anew are part of that.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwq_lite.events import Answer, Event, FinishReason, Notice, Thinking
from qwq_lite.reply import fold
from qwq_lite.reply.builder import ReplyBuilder
from qwq_lite.reply.fold import Given, utf8
from qwq_lite.reply.policies.phases import Phases
from qwq_lite.reply.policies.stops import Stops
from qwq_lite.reply.policy import Begin, Phase, Policy, Rewind, Stop, Taken, Verdict
from tests.samples import examples
from tests.tracks import (
    CLOSE,
    END,
    HEAD,
    LOOP,
    NEWLINE,
    OPEN,
    PIECES,
    REST,
    SAMPLING,
    ST,
    WHOLE,
    A,
    B,
    everything,
    phase_of,
    take,
    texts,
    track_of,
    untokenized,
)


@dataclass(frozen=True)
class Loops(Policy):
    """Rewinds a thought by `back` tokens, not beyond its beginning, where it sees LOOP, `most` times in a reply.

    State: how many tokens stood before the thought (None outside of it), and the rewinds that the reply had.
    """

    back: int = 1
    most: int = 2
    name: ClassVar[str] = "loops"

    def start(self, begin: Begin) -> tuple[int | None, int]:
        return (0 if begin.phase == "thinking" else None), len(begin.rewinds)

    def observe(self, state: tuple[int | None, int], taken: Taken) -> Verdict:
        first, n_rewinds = state
        if taken.phase == "answer":
            first = None
        elif first is None:
            first = taken.n_tokens
        if taken.token == LOOP and first is not None and n_rewinds < self.most:
            place = max(first, taken.n_tokens - self.back)
            return Verdict((first, n_rewinds), Rewind(place, frozenset({LOOP}), "loop"))
        return Verdict((first, n_rewinds))


@dataclass(frozen=True)
class Holds(Policy):
    """Holds back some characters, by the number of tokens."""

    most: int = 3
    name: ClassVar[str] = "holds"

    def start(self, begin: Begin) -> None:
        return None

    def observe(self, state: None, taken: Taken) -> Verdict:
        return Verdict(None, hold=taken.n_tokens % (self.most + 1))


@dataclass(frozen=True)
class Waits(Policy):
    """Shows nothing until a rewind was made, and all at once then: what stands may be more than was shown."""

    name: ClassVar[str] = "waits"

    def start(self, begin: Begin) -> bool:
        return bool(begin.rewinds)

    def observe(self, rewound: bool, taken: Taken) -> Verdict:
        return Verdict(rewound, hold=0 if rewound else 1000)


@dataclass(frozen=True)
class Hashes(Policy):
    """Remembers all that it was ever told, so that a state that differs anywhere in its history differs here.

    Since when the reader waits it learns from the tokens: it may begin before that is known.
    """

    name: ClassVar[str] = "hashes"

    def start(self, begin: Begin) -> tuple[int, str]:
        return 0, repr(replace(begin, asked_at=None))

    def observe(self, state: tuple[int, str], taken: Taken) -> Verdict:
        return Verdict((state[0] + 1, hashlib.sha256(f"{state[1]}{taken}".encode()).hexdigest()))


@dataclass
class Reader:
    """What someone who reads the events makes of them, and of nothing else."""

    thought: str = ""
    answer: str = ""
    shown: str = ""
    n_lost: int = 0
    restarts: list[Event] = field(default_factory=list)

    def read(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, Thinking):
                assert event.text
                self.thought += event.text
                self.shown += event.text
            elif isinstance(event, Answer):
                assert event.text
                self.answer += event.text
            elif isinstance(event, Notice) and event.kind == "restarted":
                self.restarts.append(event)
            else:
                assert isinstance(event, Notice)
                found = re.fullmatch(r"the last (\d+) characters of the thought no longer count(: \w+)?", event.text)
                assert found
                lost = event.n_lost
                assert lost == int(found[1])
                assert 0 < lost <= len(self.thought)
                self.thought = self.thought[: len(self.thought) - lost]
                self.n_lost += lost


class Folded(NamedTuple):
    """What a reply is. answers: one more each time that it began anew, which `restarts` say."""

    state: fold.State
    thought: str
    answers: list[str]
    restarts: list[Event]

    @property
    def answer(self) -> str:
        """All of it that was shown."""
        return "".join(self.answers)

    def texts(self, reason: FinishReason) -> tuple[str, str]:
        if reason == "stop" and self.state.phase == "thinking":
            return "", self.thought.strip()
        return self.thought.strip(), next((text.rstrip() for text in reversed(self.answers) if text.strip()), "")


def folded(policies: tuple[Policy, ...], begin: Begin, tokens: list[int], times: list[float] | None = None) -> Folded:
    """What a reply of these tokens is."""
    times = [0.0] * len(tokens) if times is None else times
    timed = [(token, PIECES[token], time_s) for token, time_s in zip(tokens, times, strict=True)]
    state, events = fold.fold(policies, begin, timed)
    thought, answers = "", [""]
    restarts: list[Event] = []
    for event in events:
        if isinstance(event, Thinking):
            thought += event.text
        elif isinstance(event, Answer):
            answers[-1] += event.text
        else:
            assert isinstance(event, Notice)
            assert event.kind == "restarted"
            restarts.append(event)
            answers.append("")
    return Folded(state, thought, answers, restarts)


class Both:
    """A track, its reader, and what they should hold: what the tokens that stand fold to."""

    def __init__(self, policies: tuple[Policy, ...], phase: Phase) -> None:
        self.policies, self.begin = policies, Begin(phase)
        self.track, self.reader = ReplyBuilder(policies, self.begin, PIECES.__getitem__, untokenized), Reader()
        self.standing: list[int] = []
        self.times: list[float] = []
        self.n_taken = self.n_forced = 0
        self.it = folded(policies, self.begin, [])

    def make(self, step: int | Rewind | str) -> Rewind | Stop | None:
        """Do the step, see that all is right after it, and tell what came of it."""
        answer, n_restarts = self.reader.answer, len(self.reader.restarts)
        action: Rewind | Stop | None = None
        if isinstance(step, str):
            self.conclude()
        elif isinstance(step, Rewind):
            if not self.rewind(step):
                return None
            action = step
        else:
            action = self.take(step)
        if isinstance(action, Rewind):
            self.begin = replace(self.begin, rewinds=(*self.begin.rewinds, action))
            del self.standing[action.n_tokens :], self.times[action.n_tokens :]
            if self.begin.asked_at is not None:
                self.begin = replace(self.begin, asked_at=min(self.begin.asked_at, action.n_tokens))
        assert self.track.state.given.asked_at == self.begin.asked_at
        before, self.it = self.it, folded(self.policies, self.begin, self.standing, self.times)
        self.check()
        assert self.reader.answer.startswith(answer)
        news = self.reader.restarts[n_restarts:]
        assert not news if isinstance(action, Rewind) else self.it.restarts == [*before.restarts, *news]
        return action

    def take(self, token: int) -> Rewind | Stop | None:
        forced = self.track.constrain(SAMPLING).forced
        token = token if forced is None else forced
        self.n_taken += 1
        self.n_forced += forced is not None
        events, action = self.track.take(token, self.n_taken / 2)
        self.reader.read(events)
        self.standing.append(token)
        self.times.append(self.n_taken / 2)
        return action

    def rewind(self, rewind: Rewind) -> bool:
        """Whether it could be done; if not, nothing was."""
        before = everything(self.track)
        try:
            self.reader.read(self.track.rewind(rewind))
        except ValueError:
            assert everything(self.track) == before
            begin, n = replace(self.begin, rewinds=(*self.begin.rewinds, rewind)), rewind.n_tokens
            kept = folded(self.policies, begin, self.standing[:n], self.times[:n])
            assert n > len(self.standing) or len(kept.answer) < len(self.reader.answer)
            return False
        return True

    def conclude(self) -> None:
        """Ask for the answer; to ask again changes nothing."""
        before = everything(self.track)
        thinks = phase_of(self.track) == "thinking"
        assert self.track.conclude() == thinks
        news = thinks and self.begin.asked_at is None
        assert (everything(self.track) == before) == (not news)
        if news:
            assert self.track.state.given.asked_at == len(self.standing)
            self.begin = replace(self.begin, asked_at=len(self.standing))

    def check(self) -> None:
        track, reader, it = self.track, self.reader, self.it
        assert (track.state, track.tokens) == (it.state, self.standing)
        assert reader.answer == it.answer
        ahead = reader.thought.removeprefix(it.thought)  # what was shown and comes again is not shown twice
        assert reader.thought == it.thought + ahead
        # The forced tokens may end a character that the standing ones began.
        follows, _ = utf8(it.state.pending, b"".join(PIECES[token] for token in it.state.forced))
        assert (it.state.held + follows).startswith(ahead)
        assert (track.texts("length"), track.texts("stop")) == (it.texts("length"), it.texts("stop"))
        assert len(reader.shown) == len(reader.thought) + reader.n_lost
        counts = (track.attempt, track.n_taken, track.n_forced)
        assert counts == (len(self.begin.rewinds), self.n_taken, self.n_forced)

    def end(self) -> None:
        """The reply ends where no policy ended it, all that was forced taken in."""
        while self.track.state.forced:
            if isinstance(self.make(0), Stop):
                return
        it, reader = self.it, self.reader
        reader.read(self.track.flush())
        answers = [*it.answers[:-1], it.answers[-1] + reader.answer[len(it.answer) :]]
        whole = it._replace(thought=reader.thought, answers=answers)
        assert (self.track.texts("length"), self.track.texts("stop")) == (whole.texts("length"), whole.texts("stop"))


TOKENS = st.integers(0, len(PIECES) - 1)
FORCED = st.lists(TOKENS, max_size=3).map(tuple)
REWINDS = st.builds(
    lambda n_tokens, banned, forced: Rewind(n_tokens, banned, forced=forced),
    st.integers(0, 12),
    st.frozensets(TOKENS, max_size=2),
    FORCED,
)
STEPS = st.lists(st.one_of(TOKENS, TOKENS, TOKENS, REWINDS, st.just("conclude")), max_size=25)
POLICIES = st.builds(
    lambda back, most, holds, stops: (
        Phases(OPEN, CLOSE),
        *stops,
        Loops(back, most),
        *holds,
        Hashes(),
    ),
    st.integers(0, 4),
    st.integers(0, 3),
    st.sampled_from([(), (Holds(),), (Holds(9),), (Waits(),)]),
    st.sampled_from([(), (Stops(frozenset({END}), ("STOP", "ab")),), (Stops(frozenset({END}), (), 12),)]),
)


@examples(500)
@given(POLICIES, st.sampled_from(["thinking", "answer"]), STEPS)
@example((Phases(OPEN, CLOSE), Loops(3)), "thinking", [A, WHOLE, HEAD, LOOP, REST, A, CLOSE, A])
@example((Phases(OPEN, CLOSE), Stops(frozenset(), ("STOP",))), "thinking", [A, CLOSE, ST, Rewind(1), CLOSE, A])
@example((Phases(OPEN, CLOSE), Holds()), "answer", [A, B, A, CLOSE, NEWLINE, CLOSE, B, CLOSE])
@example((Phases(OPEN, CLOSE), Hashes()), "thinking", [A, B, Rewind(1, forced=(A, B)), A, A, Rewind(2), A, B])
@example((Phases(OPEN, CLOSE), Hashes()), "thinking", [A, HEAD, B, Rewind(2, forced=(B,)), A])
@example((Phases(OPEN, CLOSE), Hashes()), "thinking", [A, "conclude", B, B, Rewind(2), B])
@example((Phases(OPEN, CLOSE), Hashes()), "thinking", [A, B, "conclude", B, "conclude", Rewind(1), B, "conclude"])
def test_a_reply_is_what_its_standing_tokens_fold_to(
    policies: tuple[Policy, ...], phase: Phase, steps: list[int | Rewind | str]
) -> None:
    """After tokens, rewinds, and a reader's word that the thought is to end."""
    both = Both(policies, phase)
    for step in steps:
        if isinstance(both.make(step), Stop):
            return
    both.end()


@given(
    st.lists(TOKENS.filter(lambda token: token != CLOSE), max_size=20), st.integers(0, 20), st.lists(TOKENS, max_size=6)
)
def test_after_a_rewind_a_thought_goes_on_as_if_the_rest_had_never_been(
    tokens: list[int], n_tokens: int, more: list[int]
) -> None:
    """By policies that do not look at the rewinds of their reply."""
    n_tokens = min(n_tokens, len(tokens))
    rewound, straight = track_of(Phases(OPEN, CLOSE), Holds()), track_of(Phases(OPEN, CLOSE), Holds())
    take(rewound, *tokens)
    rewound.rewind(Rewind(n_tokens))
    take(rewound, *more)
    take(straight, *tokens[:n_tokens], *more)
    assert (texts(rewound), rewound.tokens) == (texts(straight), straight.tokens)
    assert rewound.state._replace(given=Given()) == straight.state


def test_a_policy_rewinds_and_says_what_no_longer_counts_and_why() -> None:
    track = track_of(Phases(OPEN, CLOSE), Loops(back=2))
    assert take(track, WHOLE, A, B) == [Thinking("人"), Thinking("a"), Thinking(" b")]
    events, action = track.take(LOOP)
    assert action == Rewind(2, frozenset({LOOP}), "loop")
    reader = Reader("人a b")
    reader.read(events)
    assert isinstance(events[-1], Notice)
    assert events[-1].text.endswith("characters of the thought no longer count: loop")
    assert (reader.thought, track.tokens, track.attempt, track.n_taken) == ("人a", [WHOLE, A], 1, 4)
    assert track.constrain(SAMPLING).banned == {LOOP}
    take(track, B)
    assert track.constrain(SAMPLING).banned == frozenset()
    assert texts(track) == ("人a b", "")


def test_a_rewind_that_takes_nothing_back_that_was_shown_says_nothing() -> None:
    track = track_of(Phases(OPEN, CLOSE), Holds(9))
    take(track, A)
    assert track.rewind(Rewind(0, why="quietly")) == ()
    assert (track.attempt, track.state.held) == (1, "")


def test_what_stands_and_was_not_shown_yet_is_shown_by_a_rewind() -> None:
    """Where the rewind is what makes it sure. Thought or answer, each as what it is."""
    track = track_of(Phases(OPEN, CLOSE), Waits())
    assert take(track, A, B) == []
    assert track.rewind(Rewind(1)) == (Thinking("a"),)
    track = track_of(Phases(OPEN, CLOSE), Waits())
    assert take(track, A, CLOSE, B, A) == [Thinking("a")]
    assert track.rewind(Rewind(3)) == (Answer(" b"),)
    assert take(track, A) == [Answer("a")]


def test_a_rewind_without_a_reason_says_only_how_much() -> None:
    track = track_of()
    take(track, A, B)
    assert track.rewind(Rewind(1)) == (Notice("the last 2 characters of the thought no longer count", "rewound", 2),)


def test_a_rewind_within_a_character_brings_its_bytes_back() -> None:
    track = track_of()
    take(track, A, HEAD, A)
    assert track.state.pending == b""
    track.rewind(Rewind(2))
    assert track.state.pending == b"\xe4"
    assert take(track, REST) == [Thinking("人")]
    assert texts(track)[0] == "a人"


def test_a_rewind_behind_the_first_byte_of_a_character_forgets_it() -> None:
    track = track_of()
    take(track, A, HEAD)
    track.rewind(Rewind(1))
    assert take(track, REST) == [Thinking("\ufffd\ufffd")]


def test_a_rewind_across_the_closing_tag_is_a_thought_again() -> None:
    track = track_of(Phases(OPEN, CLOSE))
    take(track, A, NEWLINE, CLOSE, NEWLINE)
    assert phase_of(track) == "answer"
    assert track.rewind(Rewind(2)) == ()
    assert phase_of(track) == "thinking"
    assert take(track, B, CLOSE, A) == [Thinking(" b"), Answer("a")]
    assert texts(track) == ("a\n b", "a")


def test_a_replacement_for_a_character_that_the_closing_tag_cut_no_longer_counts_after_a_rewind() -> None:
    track = track_of(Phases(OPEN, CLOSE))
    assert take(track, A, HEAD, CLOSE) == [Thinking("a"), Thinking("\ufffd")]
    assert track.rewind(Rewind(2)) == (Notice("the last 1 characters of the thought no longer count", "rewound", 1),)
    assert take(track, REST, CLOSE) == [Thinking("人")]
    assert texts(track)[0] == "a人"


def test_newlines_at_the_start_of_a_thought_are_not_shown_after_a_rewind_either() -> None:
    track = track_of(Phases(OPEN, CLOSE))
    take(track, A)
    track.rewind(Rewind(0))
    assert take(track, NEWLINE, NEWLINE, B) == [Thinking(" b")]


@pytest.mark.parametrize("n_tokens", [0, 1, 2, 3, 5])
def test_a_rewind_that_would_take_back_shown_text_of_the_answer_changes_nothing(n_tokens: int) -> None:
    """And so does one to a place that was not reached yet."""
    track = track_of(Phases(OPEN, CLOSE))
    take(track, A, CLOSE, NEWLINE, B)
    before = everything(track)
    with pytest.raises(ValueError, match=f"rewind to token {n_tokens} of 4"):
        track.rewind(Rewind(n_tokens))
    assert everything(track) == before
    assert take(track, A) == [Answer("a")]


def test_a_rewind_to_a_place_before_the_reply_changes_nothing() -> None:
    track = track_of()
    take(track, A, B)
    before = everything(track)
    with pytest.raises(ValueError, match="rewind to token -1 of 2"):
        track.rewind(Rewind(-1))
    assert everything(track) == before


def test_a_rewind_of_text_that_an_answer_only_holds_is_allowed() -> None:
    track = track_of(Phases(OPEN, CLOSE), Stops(frozenset({END}), ("STOP",)))
    take(track, A, CLOSE, B, ST)
    assert track.rewind(Rewind(3)) == ()
    assert take(track, A) == [Answer("a")]
    assert texts(track)[1] == " ba"


def test_rewinds_to_one_place_add_up_their_bans() -> None:
    track = track_of()
    take(track, A, B)
    track.rewind(Rewind(1, frozenset({B})))
    take(track, ST)
    track.rewind(Rewind(1, frozenset({ST})))
    assert track.constrain(SAMPLING).banned == {B, ST}
    assert track.attempt == 2


def test_policies_begin_again_with_all_rewinds_of_the_reply() -> None:
    @dataclass(frozen=True)
    class Begins(Hashes):
        def start(self, begin: Begin) -> tuple[int, str]:
            return len(begin.rewinds), ",".join(rewind.why for rewind in begin.rewinds)

    track = track_of(Begins())
    take(track, A, B)
    track.rewind(Rewind(1, why="first"))
    track.rewind(Rewind(0, why="second"))
    assert track.state.policies == ((2, "first,second"),)


def test_what_a_reply_ends_with_is_shown_once() -> None:
    track = track_of(Phases(OPEN, CLOSE), Stops(frozenset({END}), ("STOP",)), phase="answer")
    assert take(track, ST, HEAD) == []
    assert track.flush() == (Answer("ST\ufffd"),)
    assert texts(track)[1] == "ST\ufffd"


def test_text_is_without_the_space_around_it() -> None:
    """As the model wrote it in the events; the reply that is kept leaves out what only parted thought and answer."""
    track = track_of(Phases(OPEN, CLOSE))
    take(track, B, NEWLINE, CLOSE, NEWLINE, B, NEWLINE)
    assert texts(track) == ("b", " b")


def test_an_end_token_is_counted() -> None:
    track = track_of(Stops(frozenset({END})))
    events, action = track.take(END)
    assert isinstance(action, Stop)
    assert (events, track.n_taken, track.tokens) == ((), 1, [END])
    assert track.state == fold.start((), Begin("thinking"))._replace(n_tokens=1, policies=track.state.policies)


def test_a_reply_that_ends_while_it_thinks_is_all_answer_where_the_model_ended_it() -> None:
    track = track_of(Phases(OPEN, CLOSE), Stops(frozenset({END})))
    take(track, A, B, NEWLINE, END)
    assert track.texts("stop") == ("", "a b")
    others: tuple[FinishReason, ...] = ("length", "context", "cancelled", "deadline")
    for reason in others:
        assert track.texts(reason) == ("a b", "")


def test_a_second_closing_tag_says_how_much_of_the_answer_no_longer_counts() -> None:
    track = track_of(Phases(OPEN, CLOSE))
    assert take(track, A, CLOSE, B, WHOLE) == [Thinking("a"), Answer(" b"), Answer("人")]
    assert take(track, CLOSE) == [Notice("the 3 characters of the answer so far no longer count", "restarted", 3)]
    assert texts(track) == ("a", " b人")
    assert take(track, NEWLINE, A) == [Answer("a")]
    assert texts(track) == ("a", "a")
