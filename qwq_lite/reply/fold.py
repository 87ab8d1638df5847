"""What a token does to a reply: text, phase, end. Pure, and tested without a model. Knows no engine and no terminal.

`advance` takes a token into the reply and asks the policies, in their order, what follows from it: go on, rewind,
stop. `constrain` asks them what the next token may be. A policy is a deterministic fold over the reply's tokens, so
a rewind folds the tokens that stand again from the first, and every state is as if the others had never been.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from qwq_lite.events import Answer, Event, Notice, Thinking, ThoughtEnd
from qwq_lite.reply.policy import WINDOW, Begin, Draw, Phase, Policy, Rewind, Rewrite, Stop, Taken, Turn
from qwq_lite.sampling import Sampling
from qwq_lite.text.lines import Line, LinePiece, follow


class Given(NamedTuple):
    """What a reply's rewinds and its reader decided, by the reply's length."""

    bans: Mapping[int, frozenset[int]] = MappingProxyType({})  # tokens not allowed there
    forced: Mapping[int, tuple[int, ...]] = MappingProxyType({})  # tokens that come there
    ended_at: int | None = None  # the thought is over here, whatever its text
    asked_at: int | None = None  # as in Begin


class State(NamedTuple):
    """A reply so far."""

    phase: Phase = "answer"
    n_tokens: int = 0
    pending: bytes = b""  # of an unfinished UTF-8 character
    held: str = ""  # text that is not shown yet
    n_shown: int = 0  # characters shown in this phase
    forced: tuple[int, ...] = ()  # tokens that come next
    given: Given = Given()
    policies: tuple[Any, ...] = ()  # each one's own state
    turned_at: int = 0  # the reply's length when its phase began, for the first time
    line: Line = Line()  # the line that is being written


class Step(NamedTuple):
    """What came of one token."""

    state: State  # the one before an action is carried out
    events: tuple[Event, ...] = ()
    action: Rewind | Rewrite | Stop | None = None  # for the caller to carry out


_NO_EVENTS: tuple[Event, ...] = ()
_NO_ROWS: tuple[LinePiece, ...] = ()
_new = tuple.__new__  # a NamedTuple's own way takes three times as long
ASKED: tuple[ThoughtEnd, int] = ("asked", WINDOW)


def start(policies: tuple[Policy, ...], begin: Begin) -> State:
    """The state of a reply without tokens."""
    bans: dict[int, frozenset[int]] = {}
    forced: dict[int, tuple[int, ...]] = {}
    ended_at: int | None = None
    for rewind in begin.rewinds:  # what came after its place was of another text
        place = rewind.n_tokens
        bans = {n: banned for n, banned in bans.items() if n <= place}
        bans[place] = bans.get(place, frozenset()) | rewind.banned
        forced = {n: tokens[: place - n] for n, tokens in forced.items() if n < place}
        if ended_at is not None and ended_at > place:
            ended_at = None
        if rewind.forced:
            forced[place] = rewind.forced
            if rewind.ends:
                ended_at = place + len(rewind.forced)
    return State(
        begin.phase,
        forced=forced.get(0, ()),
        given=Given(bans, forced, ended_at, begin.asked_at),
        policies=tuple(policy.start(begin) for policy in policies),
    )


def constrain(policies: tuple[Policy, ...], state: State, sampling: Sampling) -> Draw:
    """What the next token may be."""
    if state.forced:
        return Draw(sampling, forced=state.forced[0])
    draw = Draw(sampling, banned=state.given.bans.get(state.n_tokens, frozenset()), pending=state.pending)
    for policy, own in zip(policies, state.policies, strict=True):
        if policy.constrains:
            draw = policy.constrain(own, draw)
    return draw


def advance(policies: tuple[Policy, ...], state: State, token: int, piece: bytes, time_s: float = 0.0) -> Step:
    """Take one token into the reply. `piece` is its bytes, empty for a control token; time_s: when, since the request."""
    text, pending = utf8(state.pending, piece)
    given = state.given
    n_tokens = state.n_tokens + 1
    end = ASKED if given.asked_at is not None and n_tokens > given.asked_at else None
    line, rows = state.line, _NO_ROWS
    if line.text is not None or "\n" in text:
        line, rows = follow(line, text)
    taken = _new(Taken, (token, text, state.phase, n_tokens, time_s, bool(state.forced), False, end, text, line, rows))
    states: list[Any] = []
    forced = state.forced[1:] if n_tokens not in given.forced else given.forced[n_tokens]
    turn: Turn | None = None
    action: Rewind | Rewrite | Stop | None = None
    hold = 0
    for policy, own in zip(policies, state.policies, strict=True):
        own, wanted, n_held, turned, ending = policy.observe(own, taken)  # noqa: PLW2901 - its new state
        states.append(own)
        if n_held > hold:  # noqa: PLR1730 - max() takes as long as all the rest of this loop
            hold = n_held
        if wanted is None and turned is None and ending is None:  # nearly always
            continue
        if turned is not None and turn is None:
            turn = turned
            begun = _text_of_turn(state.held + text, turn)
            line, rows = follow(Line(), begun)
            taken = taken._replace(phase=turn.phase, text=begun, turned=True, line=line, rows=rows)
        if ending is not None:
            taken = taken._replace(end=ending)
        if action is None:
            action = wanted
    if turn is None and n_tokens == given.ended_at and taken.phase == "thinking":  # no policy knew the words
        turn, line = Turn("answer"), Line()
    if turn is not None and isinstance(action, Stop) and action.drop > turn.n_chars:
        turn = None  # the phase's first text is cut away
    if turn is None and not isinstance(action, Stop):  # nearly every token
        state, events = _show_held(state, n_tokens, pending, state.held + text, forced, tuple(states), hold, line)
        return _new(Step, (state, events, action))
    after = State(
        state.phase,
        n_tokens,
        pending,
        state.held + text,
        state.n_shown,
        forced,
        given,
        tuple(states),
        state.turned_at,
        line,
    )
    events = _NO_EVENTS
    if turn is not None:
        after, events = _begin_phase(after, state, text, turn)
    if isinstance(action, Stop):
        return _stop(after, state, events, action)
    after, more = _show(after, hold)
    return Step(after, events + more, action)


def _text_of_turn(whole: str, turn: Turn) -> str:
    """What a turn leaves of the text to the phase that begins."""
    return "" if turn.mute or not turn.n_chars else whole[-turn.n_chars :]


def _stop(after: State, before: State, events: tuple[Event, ...], action: Stop) -> Step:
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


def fold(
    policies: tuple[Policy, ...], begin: Begin, tokens: Iterable[tuple[int, bytes, float]]
) -> tuple[State, list[Event]]:
    """The state after tokens that stand, and all that they show. What was decided on them is history and not asked again.

    tokens: each with its bytes and its time.
    """
    state = start(policies, begin)
    events: list[Event] = []
    for token, piece, time_s in tokens:
        step = advance(policies, state, token, piece, time_s)
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


def _begin_phase(counted: State, before: State, text: str, turn: Turn) -> tuple[State, tuple[Event, ...]]:
    """The new phase with the text that belongs to it, and what was left to show of the old one."""
    if turn.mute:  # the tag ends an unfinished character too; bytes after it begin a new one
        old, new, pending, cut = before.held, "", b"", before.pending
    else:
        whole = before.held + text
        place = len(whole) - turn.n_chars
        old, new, pending, cut = whole[: max(0, place - turn.n_tag)], whole[place:], counted.pending, b""
    events = close(before._replace(held=old, pending=cut))
    turned_at = counted.n_tokens
    if before.phase == turn.phase == "answer":
        turned_at = before.turned_at
        n_void = before.n_shown + sum(len(event.text) for event in events if isinstance(event, Answer))
        if n_void:
            events += (Notice(f"the {n_void} characters of the answer so far no longer count", "restarted", n_void),)
    return counted._replace(phase=turn.phase, held=new, pending=pending, n_shown=0, turned_at=turned_at), events


def _show(state: State, hold: int) -> tuple[State, tuple[Event, ...]]:
    return _show_held(state, state.n_tokens, state.pending, state.held, state.forced, state.policies, hold, state.line)


def _show_held(
    state: State,
    n_tokens: int,
    pending: bytes,
    held: str,
    forced: tuple[int, ...],
    policies: tuple[Any, ...],
    hold: int,
    line: Line,
) -> tuple[State, tuple[Event, ...]]:
    """The state with what is new in it, once of `held` all but `hold` characters is shown. It is made once: it is large."""
    n_shown, events = state.n_shown, _NO_EVENTS
    if not n_shown:
        held = held.lstrip("\n")  # template and model part phases with newlines
    place = len(held) - hold
    if place > 0:
        text = held[:place] if hold else held
        events = (Thinking(text) if state.phase == "thinking" else Answer(text),)
        held, n_shown = held[place:], n_shown + place
    fields = (state.phase, n_tokens, pending, held, n_shown, forced, state.given, policies, state.turned_at, line)
    return _new(State, fields), events
