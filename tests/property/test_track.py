"""track: after any tokens and rewinds a reply is what its standing tokens fold to, and what was shown is never taken back."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwq_lite import generation
from qwq_lite.events import Answer, Event, Notice, Thinking
from qwq_lite.generation import Begin, Draw, Force, Phase, Policy, Rewind, Stop, Taken, Verdict
from qwq_lite.policies.phases import Phases
from qwq_lite.policies.stops import Stops
from qwq_lite.sampling import Sampling
from qwq_lite.track import Track

SAMPLING = Sampling()
END, OPEN, CLOSE, LOOP, FORCE, STOP = range(6)
PIECES = [
    b"",
    b"<think>",
    b"</think>",
    b"loop",
    b"f",
    b"STOP",
    b"a",
    b"\n",
    "人".encode(),
    b"\xe4",
    b"\xba\xba",
    b" b",
    b"\xff",
    b"ST",
]
A, NEWLINE, WHOLE, HEAD, REST, B, INVALID, ST = range(6, 14)


class Silent:
    """What most of these policies have nothing to say to."""

    def constrain(self, state: Any, draw: Draw) -> Draw:
        return draw


@dataclass(frozen=True)
class Loops(Silent):
    """Rewinds a thought by `back` tokens, not beyond its beginning, where it sees LOOP, `most` times in a reply.

    State: how many tokens stood before the thought (None outside of it), and the rewinds that the reply had.
    """

    back: int = 1
    most: int = 2
    name: ClassVar[str] = "loops"
    constrains: ClassVar[bool] = True

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
class Forces(Silent):
    """Lets other tokens follow FORCE; once a rewind was made, other ones."""

    name: ClassVar[str] = "forces"
    constrains: ClassVar[bool] = True

    def start(self, begin: Begin) -> tuple[int, ...]:
        return (A, HEAD, REST) if not begin.rewinds else (B,)

    def observe(self, state: tuple[int, ...], taken: Taken) -> Verdict:
        return Verdict(state, Force(state) if taken.token == FORCE else None)


@dataclass(frozen=True)
class Holds(Silent):
    """Holds back some characters, by the number of tokens."""

    most: int = 3
    name: ClassVar[str] = "holds"
    constrains: ClassVar[bool] = True

    def start(self, begin: Begin) -> None:
        return None

    def observe(self, state: None, taken: Taken) -> Verdict:
        return Verdict(None, hold=taken.n_tokens % (self.most + 1))


@dataclass(frozen=True)
class Waits(Silent):
    """Shows nothing until a rewind was made, and all at once then: what stands may be more than was shown."""

    name: ClassVar[str] = "waits"
    constrains: ClassVar[bool] = True

    def start(self, begin: Begin) -> bool:
        return bool(begin.rewinds)

    def observe(self, rewound: bool, taken: Taken) -> Verdict:
        return Verdict(rewound, hold=0 if rewound else 1000)


@dataclass(frozen=True)
class Hashes(Silent):
    """Remembers all that it was ever told, so that a state that differs anywhere in its history differs here."""

    name: ClassVar[str] = "hashes"
    constrains: ClassVar[bool] = True

    def start(self, begin: Begin) -> tuple[int, str]:
        return 0, repr(begin)

    def observe(self, state: tuple[int, str], taken: Taken) -> Verdict:
        return Verdict((state[0] + 1, hashlib.sha256(f"{state[1]}{taken}".encode()).hexdigest()))


@dataclass
class Reader:
    """What someone who reads the events makes of them, and of nothing else."""

    thought: str = ""
    answer: str = ""
    shown: str = ""
    n_lost: int = 0

    def read(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, Thinking):
                assert event.text
                self.thought += event.text
                self.shown += event.text
            elif isinstance(event, Answer):
                assert event.text
                self.answer += event.text
            else:
                assert isinstance(event, Notice)
                found = re.fullmatch(r"the last (\d+) characters of the thought no longer count(: \w+)?", event.text)
                assert found
                lost = int(found[1])
                assert 0 < lost <= len(self.thought)
                self.thought = self.thought[: len(self.thought) - lost]
                self.n_lost += lost


def track_of(*policies: Policy, phase: Phase = "thinking") -> Track:
    return Track(policies, Begin(phase), PIECES.__getitem__)


def take(track: Track, *tokens: int) -> list[Event]:
    return [event for token in tokens for event in track.take(token)[0]]


def phase_of(track: Track) -> Phase:
    return track.state.phase


def folded(policies: tuple[Policy, ...], begin: Begin, tokens: list[int]) -> tuple[generation.State, str, str]:
    """State, thought and answer that a reply of these tokens has."""
    state, events = generation.fold(policies, begin, [(token, PIECES[token]) for token in tokens])
    thought = "".join(event.text for event in events if isinstance(event, Thinking))
    return state, thought, "".join(event.text for event in events if isinstance(event, Answer))


def everything(track: Track) -> dict[str, Any]:
    """All that a track holds, to tell whether a call changed it. Its policies are frozen, and compare as themselves."""
    return copy.deepcopy({name: value for name, value in vars(track).items() if name != "_piece"})


TOKENS = st.integers(0, len(PIECES) - 1)
STEPS = st.lists(
    st.one_of(TOKENS, TOKENS, TOKENS, st.builds(Rewind, st.integers(0, 12), st.frozensets(TOKENS, max_size=2))),
    max_size=25,
)
POLICIES = st.builds(
    lambda back, most, holds, stops: (
        Phases(OPEN, CLOSE),
        *stops,
        Loops(back, most),
        Forces(),
        *holds,
        Hashes(),
    ),
    st.integers(0, 4),
    st.integers(0, 3),
    st.sampled_from([(), (Holds(),), (Holds(9),), (Waits(),)]),
    st.sampled_from([(), (Stops(frozenset({END}), ("STOP", "ab")),), (Stops(frozenset({END}), (), 12),)]),
)


@settings(max_examples=500)
@given(POLICIES, st.sampled_from(["thinking", "answer"]), STEPS)
@example((Phases(OPEN, CLOSE), Loops(3)), "thinking", [A, WHOLE, HEAD, LOOP, REST, A, CLOSE, A])
@example((Phases(OPEN, CLOSE), Forces()), "thinking", [FORCE, A, HEAD, Rewind(2), HEAD, REST])
@example((Phases(OPEN, CLOSE), Stops(frozenset(), ("STOP",))), "thinking", [A, CLOSE, ST, Rewind(1), CLOSE, A])
def test_a_reply_is_what_its_standing_tokens_fold_to(
    policies: tuple[Policy, ...], phase: Phase, steps: list[int | Rewind]
) -> None:
    track, reader = Track(policies, Begin(phase), PIECES.__getitem__), Reader()
    standing: list[int] = []
    rewinds: list[Rewind] = []
    n_taken = 0
    for step in steps:
        action: Rewind | Stop | None = None
        answer_before = reader.answer
        if isinstance(step, Rewind):
            before = everything(track)
            try:
                reader.read(track.rewind(step))
            except ValueError:
                assert everything(track) == before
                kept = folded(policies, Begin(phase, (*rewinds, step)), standing[: step.n_tokens])[2]
                assert step.n_tokens > len(standing) or len(kept) < len(reader.answer)
                continue
            action = step
        else:
            forced = track.constrain(SAMPLING).forced
            token = step if forced is None else forced
            events, action = track.take(token)
            reader.read(events)
            standing.append(token)
            n_taken += 1
        if isinstance(action, Rewind):
            rewinds.append(action)
            del standing[action.n_tokens :]
        state, thought, answer = folded(policies, Begin(phase, tuple(rewinds)), standing)
        assert (track.state, track.tokens) == (state, standing)
        assert (reader.thought, reader.answer) == (thought, answer)
        assert (track.thinking, track.answer) == (thought.strip(), answer.rstrip())
        assert reader.answer.startswith(answer_before)
        assert len(reader.shown) == len(reader.thought) + reader.n_lost
        assert (track.attempt, track.n_taken) == (len(rewinds), n_taken)
        if isinstance(action, Stop):
            return
    reader.read(track.flush())
    assert (track.thinking, track.answer) == (reader.thought.strip(), reader.answer.rstrip())


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
    assert (rewound.thinking, rewound.answer, rewound.tokens) == (straight.thinking, straight.answer, straight.tokens)
    assert rewound.state._replace(bans={}) == straight.state


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
    assert track.thinking == "人a b"


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
    assert track.rewind(Rewind(1)) == (Notice("the last 2 characters of the thought no longer count", "rewound"),)


def test_a_rewind_within_a_character_brings_its_bytes_back() -> None:
    track = track_of()
    take(track, A, HEAD, A)
    assert track.state.pending == b""
    track.rewind(Rewind(2))
    assert track.state.pending == b"\xe4"
    assert take(track, REST) == [Thinking("人")]
    assert track.thinking == "a人"


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
    assert (track.thinking, track.answer) == ("a\n b", "a")


def test_a_replacement_for_a_character_that_the_closing_tag_cut_no_longer_counts_after_a_rewind() -> None:
    track = track_of(Phases(OPEN, CLOSE))
    assert take(track, A, HEAD, CLOSE) == [Thinking("a"), Thinking("\ufffd")]
    assert track.rewind(Rewind(2)) == (Notice("the last 1 characters of the thought no longer count", "rewound"),)
    assert take(track, REST, CLOSE) == [Thinking("人")]
    assert track.thinking == "a人"


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
    assert track.answer == " ba"


def test_a_rewind_into_forced_tokens_forces_the_rest_of_them_again() -> None:
    @dataclass(frozen=True)
    class Always(Forces):
        def start(self, begin: Begin) -> tuple[int, ...]:
            return (A, HEAD, REST)

    track = track_of(Always())
    take(track, FORCE, A, HEAD, REST, B)
    track.rewind(Rewind(2))
    assert track.state.forced == (HEAD, REST)
    assert track.constrain(SAMPLING) == Draw(SAMPLING, forced=HEAD)


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
    assert track.answer == "ST\ufffd"


def test_text_is_without_the_space_around_it() -> None:
    """As the model wrote it in the events; the reply that is kept leaves out what only parted thought and answer."""
    track = track_of(Phases(OPEN, CLOSE))
    take(track, B, NEWLINE, CLOSE, NEWLINE, B, NEWLINE)
    assert (track.thinking, track.answer) == ("b", " b")


def test_an_end_token_is_counted() -> None:
    track = track_of(Stops(frozenset({END})))
    events, action = track.take(END)
    assert isinstance(action, Stop)
    assert (events, track.n_taken, track.tokens) == ((), 1, [END])
    assert track.state == generation.start((), Begin("thinking"))._replace(n_tokens=1, policies=track.state.policies)
