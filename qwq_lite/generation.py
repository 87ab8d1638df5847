"""What a token does to a reply: text, phase, end. Pure, and tested without a model. Knows no engine and no terminal."""

from __future__ import annotations

import codecs
import dataclasses
from dataclasses import dataclass
from typing import Literal

from qwq_lite.events import Answer, Event, FinishReason, Thinking

Phase = Literal["thinking", "answer"]


@dataclass(frozen=True)
class Rules:
    """What holds for a whole reply. think_open, think_close: ids of the model's thinking tags, None where it has none."""

    end_tokens: frozenset[int]
    max_tokens: int | None = None
    think_open: int | None = None
    think_close: int | None = None


@dataclass(frozen=True)
class State:
    """A reply so far. pending: bytes of an unfinished UTF-8 character; at_start: nothing shown in this phase yet."""

    phase: Phase = "answer"
    n_tokens: int = 0
    pending: bytes = b""
    at_start: bool = True


@dataclass(frozen=True)
class Step:
    """What came of one token."""

    state: State
    events: tuple[Event, ...] = ()
    finish: FinishReason | None = None


def advance(rules: Rules, state: State, token: int, piece: bytes) -> Step:
    """Take one sampled token into the reply. `piece` is its bytes, empty for a control token."""
    if token in rules.end_tokens:
        return Step(state, close(state), "stop")
    counted = dataclasses.replace(state, n_tokens=state.n_tokens + 1)
    limit: FinishReason | None = (
        "length" if rules.max_tokens is not None and counted.n_tokens >= rules.max_tokens else None
    )
    if token == rules.think_close:
        return Step(dataclasses.replace(counted, phase="answer", pending=b"", at_start=True), close(state), limit)
    if token == rules.think_open and state.at_start:
        return Step(dataclasses.replace(counted, phase="thinking"), (), limit)
    text, pending = utf8(state.pending, piece)
    shown = text.lstrip("\n") if state.at_start else text  # the template and the model part phases with newlines
    after = dataclasses.replace(counted, pending=pending, at_start=state.at_start and not shown)
    events = (_event(state.phase, shown),) if shown else ()
    return Step(after, events + (close(after) if limit else ()), limit)


def close(state: State) -> tuple[Event, ...]:
    """What is left to show when a phase ends: an unfinished character, as U+FFFD."""
    return (_event(state.phase, state.pending.decode("utf-8", "replace")),) if state.pending else ()


def utf8(pending: bytes, piece: bytes) -> tuple[str, bytes]:
    """Complete characters of pending + piece, and the bytes of one that is not finished.

    A character is never split, whatever the pieces; bytes that cannot begin or continue one become U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(pending + piece)
    return text, decoder.getstate()[0]


def _event(phase: Phase, text: str) -> Event:
    return Thinking(text) if phase == "thinking" else Answer(text)
