"""Replies in the making, in a vocabulary of a few tokens: tags, words, bytes of a character."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

from qwq_lite.events import Event
from qwq_lite.reply.builder import ReplyBuilder
from qwq_lite.reply.policy import Begin, Phase, Policy, Taken, Verdict
from qwq_lite.sampling import Sampling

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


@dataclass(frozen=True)
class Sees(Policy):
    """Keeps each token as it was told of it."""

    name: ClassVar[str] = "sees"

    def start(self, begin: Begin) -> tuple[Taken, ...]:
        return ()

    def observe(self, state: tuple[Taken, ...], taken: Taken) -> Verdict:
        return Verdict((*state, taken))


def seen(track: ReplyBuilder) -> tuple[Taken, ...]:
    """What the first policy was told, a Sees."""
    told: tuple[Taken, ...] = track.state.policies[0]
    return told


def track_of(*policies: Policy, phase: Phase = "thinking") -> ReplyBuilder:
    return ReplyBuilder(policies, Begin(phase), PIECES.__getitem__, untokenized)


def untokenized(_text: str) -> list[int]:
    raise AssertionError("no policy here rewrites a text")


def texts(track: ReplyBuilder) -> tuple[str, str]:
    """Thought and answer of a reply that is cut here."""
    return track.texts("length")


def take(track: ReplyBuilder, *tokens: int) -> list[Event]:
    return [event for token in tokens for event in track.take(token)[0]]


def phase_of(track: ReplyBuilder) -> Phase:
    return track.state.phase


def everything(track: ReplyBuilder) -> dict[str, Any]:
    """All that a track holds, to tell whether a call changed it. Its policies are frozen, and compare as themselves."""
    own = {name: value for name, value in vars(track).items() if name not in ("_piece", "_tokenize")}
    return copy.deepcopy({k: vars(v) if type(v).__module__ == ReplyBuilder.__module__ else v for k, v in own.items()})
