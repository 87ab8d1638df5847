"""What a reply is made of while it comes, and what it is when it is there. Data only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "context", "cancelled", "deadline", "loop"]
ThoughtEnd = Literal["itself", "budget", "deadline", "asked", "context", "loop"]
LoopEnd = Literal["rewound", "closed", "stopped"]
NoticeKind = Literal[
    "left-out",
    "full",
    "rewound",
    "restarted",
    "closed",
    "late",
    "slow",
    "loop",
    "warmed",
    "ignored",
    "resumed",
    "recomputed",
]


@dataclass(frozen=True)
class Progress:
    """How far something has come. stage "load": parts of 1; "prefill": tokens of the prompt; "thinking": tokens of the
    thought, of those that it may have at most."""

    stage: Literal["load", "prefill", "thinking"]
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
    "restarted" (the answer so far no longer counts), "closed" (the thought was ended for an answer), "late" (what was asked
    came too late to be done), "slow" (far below the machine's bandwidth), "loop" (the answer repeated itself and was ended),
    "warmed" (the rest of the thought is sampled less greedily than was asked for), "ignored" (options that have nothing to act
    on), "resumed" (the engine's process ended, another goes on with the reply), "recomputed" (the model's cache cannot be cut:
    what stands is computed again). n_lost: so many of the last characters that were shown of the thought, or of the answer that
    began anew, no longer count.
    """

    text: str
    kind: NoticeKind
    n_lost: int = 0


@dataclass(frozen=True)
class Stats:
    """Counts and seconds of one reply.

    n_reused: tokens of the prompt that were in the cache already; n_prefilled: those that were computed. n_generated: tokens
    drawn or forced, an end token and those that a rewind took back among them. n_dropped: messages that no longer fitted.
    n_thinking, n_answer: tokens that stand, of `Reply.thinking` with what ended it, and of what follows; n_forced: those of all
    that were not drawn; n_refused: tokens that were drawn and not taken, for they bring letters of a masked script.
    thinking_budget: as asked for; thinking_limit: most tokens that the thought could have, by budget,
    context or max_tokens, None where the model does not think. thought_end: what ended the thought, "itself" where the model
    did, None where it did not end or there was none. time_left_s: to the deadline, None
    without one. n_ctx: cells of the KV cache, n_kv: those that this reply left in use. loops: what was done about each, in their
    order: "rewound" (the thought went on from the first copy), "closed" (it was ended), "stopped" (the reply was).
    """

    n_prompt: int = 0
    n_reused: int = 0
    n_prefilled: int = 0
    n_generated: int = 0
    n_dropped: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    n_thinking: int = 0
    n_answer: int = 0
    n_forced: int = 0
    n_refused: int = 0
    thinking_budget: int | None = None
    thinking_limit: int | None = None
    thought_end: ThoughtEnd | None = None
    time_left_s: float | None = None
    n_ctx: int = 0
    n_kv: int = 0
    loops: tuple[LoopEnd, ...] = ()

    @property
    def decode_tok_s(self) -> float:
        """Tokens a second; the first one comes from the prompt's own decode and does not count."""
        return (self.n_generated - 1) / self.decode_s if self.n_generated > 1 and self.decode_s else 0.0


@dataclass(frozen=True)
class Reply:
    """A finished reply.

    finish_reason: "stop" (the model ended its turn), "length" (max_tokens, or the answer's room after a thought that was
    ended), "context" (no room), "deadline", "loop" (it repeated itself), "cancelled". undivided: the model marks no thought;
    where its text names no answer all of it is the answer, also of one that was cut, and thinking + answer is the text. A
    thought with tags that was cut, or one that was cancelled, leaves no answer.
    """

    answer: str
    thinking: str
    finish_reason: FinishReason
    stats: Stats = field(default_factory=Stats)
    undivided: bool = False


@dataclass(frozen=True)
class Done:
    """The last event of every reply."""

    reply: Reply


Event = Progress | Thinking | Answer | Notice | Done
