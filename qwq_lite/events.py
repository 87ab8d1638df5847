"""What a reply is made of while it comes, and what it is when it is there. Data only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "context", "cancelled"]


@dataclass(frozen=True)
class Progress:
    """Work before the first token. stage "load": parts of 1; stage "prefill": tokens."""

    stage: Literal["load", "prefill"]
    done: float
    total: float


@dataclass(frozen=True)
class Thinking:
    """More text of the thought."""

    text: str


@dataclass(frozen=True)
class Answer:
    """More text of the answer."""

    text: str


@dataclass(frozen=True)
class Notice:
    """Something the user should know, in one line.

    kind: "left-out" (messages that no longer fit), "full" (the context), "rewound" (a part of the thought no longer counts),
    "slow" (far below the machine's bandwidth).
    """

    text: str
    kind: Literal["left-out", "full", "rewound", "slow"]


@dataclass(frozen=True)
class Stats:
    """Counts and seconds of one reply.

    n_reused: tokens of the prompt that were in the cache already; n_prefilled: those that were computed. n_generated: tokens
    drawn, an end token and those that a rewind took back among them. n_dropped: messages that no longer fitted.
    """

    n_prompt: int = 0
    n_reused: int = 0
    n_prefilled: int = 0
    n_generated: int = 0
    n_dropped: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    @property
    def decode_tok_s(self) -> float:
        """Tokens a second; the first one comes from the prompt's own decode and does not count."""
        return (self.n_generated - 1) / self.decode_s if self.n_generated > 1 and self.decode_s else 0.0


@dataclass(frozen=True)
class Reply:
    """A finished reply. finish_reason: "stop" (the model ended its turn), "length" (max_tokens), "context" (no room),
    "cancelled"."""

    answer: str
    thinking: str
    finish_reason: FinishReason
    stats: Stats = field(default_factory=Stats)


@dataclass(frozen=True)
class Done:
    """The last event of every reply."""

    reply: Reply


Event = Progress | Thinking | Answer | Notice | Done
