"""What a conversation needs of a model, wherever that runs: `local` has it in this process. And what can be asked of it."""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qwq_lite.history import WhenFull
from qwq_lite.prompt import Message
from qwq_lite.stream import Stream

Prompt = Sequence[Message] | str | Sequence[int]


@dataclass(frozen=True)
class Options:
    """What the user asks for in one reply; None leaves it to the file, then to the catalogue.

    seed: None draws one at random. A conversation that begins with a seed begins in an empty cache: its reply then does not
    depend on what else was computed before. max_tokens: of thought and answer together; None ends at the context's end.
    stop: texts that end the answer where one begins. tools: JSON schemas for the model's template.
    when_full: what happens to messages that no longer fit: "drop" leaves out the oldest turns, with a Notice; "error"
    raises ContextFull.
    """

    seed: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    stop: Sequence[str] = ()
    tools: Sequence[Any] = ()
    when_full: WhenFull = "drop"


class Engine(Protocol):
    """Makes replies, one after the other. Any thread may call.

    A session is one conversation's place in the cache, under a name that the caller chooses.
    """

    def generate(self, prompt: Prompt, *, session: Hashable = None, **options: Any) -> Stream: ...
    async def agenerate(self, prompt: Prompt, *, session: Hashable = None, **options: Any) -> Stream: ...
    def tokenize(self, text: str) -> list[int]: ...
    def save_session(self, session: Hashable, path: str | os.PathLike[str], extra: dict[str, Any]) -> None: ...
    def restore_session(self, session: Hashable, path: str | os.PathLike[str]) -> dict[str, Any]: ...
    def fork_session(self, session: Hashable, twin: Hashable) -> None: ...
    def release_session(self, session: Hashable) -> None: ...
    def unload(self) -> None: ...
