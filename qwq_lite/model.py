"""A loaded model as an application sees it. `local` has it in this process; a remote one will share the protocol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from qwq_lite.events import Event
from qwq_lite.prompt import Message


@dataclass(frozen=True)
class Options:
    """What the user asks for in one reply; None leaves it to the file, then to the catalogue.

    seed: None draws one at random. max_tokens: None ends at the context's end.
    """

    seed: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


class EventStream(Protocol):
    """Events in order, the last one Done. Leaving the iteration cancels, and so does `cancel` from any thread."""

    def __iter__(self) -> Iterator[Event]: ...
    def cancel(self) -> None: ...


class Model(Protocol):
    """Makes replies to messages, one after the other. Any thread may call."""

    def generate(self, messages: Sequence[Message], options: Options) -> EventStream: ...
    def close(self) -> None: ...
