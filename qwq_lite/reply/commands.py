"""What a reader may ask of a running reply (answer now, steer), and the log of a reply for another engine. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from qwq_lite.errors import UsageError

Drop = Literal["paragraph", "sentence"]


@dataclass(frozen=True)
class Conclude:
    """End the thought at its next break, and answer."""


@dataclass(frozen=True)
class Steer:
    """Take back the end of the thought, and go on from a hint in the model's own voice.

    hint: a text, of which white space at both ends does not count, but for newlines at its end. drop: None takes back nothing.
    """

    hint: str
    drop: Drop | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.hint, str) or not self.hint.strip():
            raise UsageError(
                f"the hint is {self.hint!r}; a text is expected, such as 'Wait, I should try n = 0 first.'"
            )
        try:
            self.hint.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the hint holds half of a surrogate pair, at character {error.start}") from error
        if self.drop not in (None, *get_args(Drop)):
            raise UsageError(f"drop is {self.drop!r}; {', '.join(get_args(Drop))} and None are allowed")
        object.__setattr__(self, "hint", self.hint.lstrip().rstrip(" \t\r"))


Command = Conclude | Steer
# A token that was taken in and its time, in seconds since the reply was asked for; an order that was carried out; None for a
# text that was rewritten because the tag that ends the thought was nearly the likeliest token.
LogEntry = tuple[int, float] | Conclude | Steer | None


@dataclass(frozen=True)
class ReplyLog:
    """What was done to a reply, for another engine to do it again and go on.

    seed: of its draws. elapsed_s: seconds since it was asked for. entries: in their order; they lead to the same state, for
    policies are folds. n_seen: texts and notices that its reader has already, the first ones of those that follow from them.
    """

    seed: int
    elapsed_s: float = 0.0
    entries: tuple[LogEntry, ...] = ()
    n_seen: int = 0
