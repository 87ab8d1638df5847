"""A loaded model, wherever its engine runs: the protocol Model."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol

from qwq_lite.backend.hardware import EngineReport
from qwq_lite.chat.chat import Chat
from qwq_lite.chat.engine import Engine
from qwq_lite.events import Reply
from qwq_lite.plan.run_plan import RunPlan
from qwq_lite.prompt.chat_template import Message


class Model(Engine, Protocol):
    """A loaded model. As a context manager it is unloaded at the end.

    n_ctx: tokens of context. plan: what it runs with. notices: what the user should know of that, one line each.
    engine: llama.cpp and its devices.
    """

    n_ctx: int
    plan: RunPlan
    notices: tuple[str, ...]
    engine: EngineReport

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unload()

    def chat(self, system: str | None = None, *, messages: Sequence[Message] = ()) -> Chat:
        """A conversation: the system prompt, and messages of an earlier one where they are given."""
        return Chat(self, system, messages=messages)

    def ask(self, text: str, system: str | None = None, **options: Any) -> Reply:
        """One answer to one question. Options as in `chat.options.Options`."""
        return self.chat(system).ask(text, **options)

    async def aask(self, text: str, system: str | None = None, **options: Any) -> Reply:
        """As `ask`, without holding up the event loop."""
        return await self.chat(system).aask(text, **options)
