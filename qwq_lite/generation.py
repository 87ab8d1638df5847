"""What a token does to a reply: text, phase, end. Pure, and tested without a model. Knows no engine and no terminal.

`advance` takes a token into the reply and asks the policies, in their order, what follows from it: go on, force tokens,
rewind, stop. `constrain` asks them what the next token may be. A policy is a deterministic fold over the reply's tokens, so
a rewind folds the tokens that stand again from the first, and every state is as if the others had never been.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from qwq_lite.events import Answer, Event, FinishReason, Thinking
from qwq_lite.sampling import Sampling

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Mask = npt.NDArray[np.float32]

Phase = Literal["thinking", "answer"]


@dataclass(frozen=True)
class Force:
    """The next tokens are these; nothing is sampled."""

    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Rewind:
    """Only the reply's first `n_tokens` stand; what comes next is sampled again, with another seed and without `banned`.

    why: a few words for the notice.
    """

    n_tokens: int
    banned: frozenset[int] = frozenset()
    why: str = ""


@dataclass(frozen=True)
class Stop:
    """The reply ends. mute: the token is no text; drop: so many trailing characters of what is held do not belong to it."""

    reason: FinishReason
    drop: int = 0
    mute: bool = False


Action = Force | Rewind | Stop | None  # None: go on


@dataclass(frozen=True)
class Turn:
    """A phase begins. n_chars: so many trailing characters belong to it already; mute: the token is a tag, not text."""

    phase: Phase
    n_chars: int = 0
    mute: bool = False


@dataclass(frozen=True)
class Begin:
    """What a fold starts from: the phase in which the prompt leaves the model, and the rewinds that this reply had."""

    phase: Phase = "answer"
    rewinds: tuple[Rewind, ...] = ()


# What is made for each token is a NamedTuple: a frozen dataclass takes four times as long to make.


class Taken(NamedTuple):
    """One token, as a policy sees it.

    text: the characters that it completed, of the phase that it leaves the reply in; n_tokens: the reply's length with it;
    turned: the phase begins with this token.
    """

    token: int
    text: str
    phase: Phase
    n_tokens: int
    turned: bool = False


class Draw(NamedTuple):
    """What the next token may be. Each policy in turn may change it.

    masks: rows that are added to the logits, shape (n_vocab,), 0 or minus infinity; banned: tokens that are masked;
    forced: the token itself, and nothing is sampled.
    """

    sampling: Sampling
    masks: tuple[Mask, ...] = ()
    banned: frozenset[int] = frozenset()
    forced: int | None = None


class Verdict(NamedTuple):
    """A policy's word on a token: its next state, and what follows.

    hold: so many trailing characters of the phase's text are not to be shown yet.
    """

    state: Any
    action: Action = None
    hold: int = 0
    turn: Turn | None = None


class Policy(Protocol):
    """One rule of a reply. Its state is its own, immutable, and a function of `begin` and the tokens alone.

    constrains: whether it has a word on what may be drawn; one that has not is not asked.
    """

    @property
    def name(self) -> str: ...
    @property
    def constrains(self) -> bool: ...
    def start(self, begin: Begin) -> Any: ...
    def constrain(self, state: Any, draw: Draw) -> Draw: ...
    def observe(self, state: Any, taken: Taken) -> Verdict: ...


class State(NamedTuple):
    """A reply so far.

    pending: bytes of an unfinished UTF-8 character; held: text that is not shown yet; at_start: nothing shown in this phase;
    forced: tokens that come next; bans: tokens not allowed, by the reply's length; policies: each one's own state.
    """

    phase: Phase = "answer"
    n_tokens: int = 0
    pending: bytes = b""
    held: str = ""
    at_start: bool = True
    forced: tuple[int, ...] = ()
    bans: Mapping[int, frozenset[int]] = MappingProxyType({})
    policies: tuple[Any, ...] = ()


class Step(NamedTuple):
    """What came of one token. action: a Rewind or Stop that the caller carries out; the state is the one before it."""

    state: State
    events: tuple[Event, ...] = ()
    action: Rewind | Stop | None = None


def start(policies: tuple[Policy, ...], begin: Begin) -> State:
    """The state of a reply without tokens."""
    bans: dict[int, frozenset[int]] = {}
    for rewind in begin.rewinds:
        bans = {n: banned for n, banned in bans.items() if n <= rewind.n_tokens}  # those after it were of another text
        bans[rewind.n_tokens] = bans.get(rewind.n_tokens, frozenset()) | rewind.banned
    return State(begin.phase, bans=bans, policies=tuple(policy.start(begin) for policy in policies))


def constrain(policies: tuple[Policy, ...], state: State, sampling: Sampling) -> Draw:
    """What the next token may be."""
    if state.forced:
        return Draw(sampling, forced=state.forced[0])
    draw = Draw(sampling, banned=state.bans.get(state.n_tokens, frozenset()))
    for policy, own in zip(policies, state.policies, strict=True):
        if policy.constrains:
            draw = policy.constrain(own, draw)
    return draw


def advance(policies: tuple[Policy, ...], state: State, token: int, piece: bytes) -> Step:
    """Take one token into the reply. `piece` is its bytes, empty for a control token."""
    text, pending = utf8(state.pending, piece)
    taken = Taken(token, text, state.phase, state.n_tokens + 1)
    states: list[Any] = []
    forced = state.forced[1:]
    turn: Turn | None = None
    action: Rewind | Stop | None = None
    hold = 0
    for policy, own in zip(policies, state.policies, strict=True):
        verdict = policy.observe(own, taken)
        states.append(verdict.state)
        hold = max(hold, verdict.hold)
        if verdict.turn is not None and turn is None:
            turn = verdict.turn
            taken = taken._replace(phase=turn.phase, text=_begun(state.held + text, turn), turned=True)
        if isinstance(verdict.action, Force):
            forced += verdict.action.tokens
        elif action is None:
            action = verdict.action
    after = State(
        state.phase, taken.n_tokens, pending, state.held + text, state.at_start, forced, state.bans, tuple(states)
    )
    events: tuple[Event, ...] = ()
    if turn is not None:
        after, events = _turned(after, state, text, turn)
    if isinstance(action, Stop):
        return _stopped(after, state, events, action)
    after, more = _show(after, hold)
    return Step(after, events + more, action)


def _begun(whole: str, turn: Turn) -> str:
    """What a turn leaves of the text to the phase that begins."""
    return "" if turn.mute or not turn.n_chars else whole[-turn.n_chars :]


def _stopped(after: State, before: State, events: tuple[Event, ...], action: Stop) -> Step:
    """The last step: what is held is shown, but for what does not belong to the reply."""
    if action.mute:
        after, events = after._replace(held=before.held, pending=before.pending), ()
        return Step(after, close(before), action)
    if action.drop:
        after = after._replace(held=after.held[: max(0, len(after.held) - action.drop)], pending=b"")
    return Step(after, events + close(after), action)


def close(state: State) -> tuple[Event, ...]:
    """What is left to show when a phase ends: text that was held, and an unfinished character as U+FFFD."""
    rest = state._replace(held=state.held + state.pending.decode("utf-8", "replace"), pending=b"")
    return _show(rest, 0)[1]


def fold(policies: tuple[Policy, ...], begin: Begin, tokens: Iterable[tuple[int, bytes]]) -> tuple[State, list[Event]]:
    """The state after tokens that stand, and all that they show. What was decided on them is history and not asked again."""
    state = start(policies, begin)
    events: list[Event] = []
    for token, piece in tokens:
        step = advance(policies, state, token, piece)
        state = step.state
        events += step.events
    return state, events


def utf8(pending: bytes, piece: bytes) -> tuple[str, bytes]:
    """Complete characters of pending + piece, and the bytes of one that is not finished.

    A character is never split, whatever the pieces; bytes that cannot begin or continue one become U+FFFD.
    """
    if not pending:
        try:
            return piece.decode(), b""
        except UnicodeDecodeError:
            pass
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(pending + piece)
    return text, decoder.getstate()[0]


def _turned(counted: State, before: State, text: str, turn: Turn) -> tuple[State, tuple[Event, ...]]:
    """The new phase with the text that belongs to it, and what was left to show of the old one."""
    if turn.mute:  # the tag ends an unfinished character too; bytes after it begin a new one
        old, new, pending, cut = before.held, "", b"", before.pending
    else:
        whole = before.held + text
        place = len(whole) - turn.n_chars
        old, new, pending, cut = whole[:place], whole[place:], counted.pending, b""
    events = close(before._replace(held=old, pending=cut))
    return counted._replace(phase=turn.phase, held=new, pending=pending, at_start=True), events


def _show(state: State, hold: int) -> tuple[State, tuple[Event, ...]]:
    held = state.held
    if state.at_start:
        held = held.lstrip("\n")  # template and model part phases with newlines
    place = len(held) - hold
    if place <= 0:
        return (state if held is state.held else state._replace(held=held)), ()
    text = held[:place] if hold else held
    event = Thinking(text) if state.phase == "thinking" else Answer(text)
    rest = State(
        state.phase, state.n_tokens, state.pending, held[place:], False, state.forced, state.bans, state.policies
    )
    return rest, (event,)
