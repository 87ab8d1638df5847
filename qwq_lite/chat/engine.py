"""What a conversation needs of a model, wherever that runs: the protocol Engine."""

from __future__ import annotations

import os
import sys
from collections.abc import Hashable
from typing import Any, Protocol

from qwq_lite.errors import EngineClosed
from qwq_lite.prompt.question import Prompt
from qwq_lite.reply.stream import Stream


def check_running(model: str | os.PathLike[str]) -> None:
    """Raises: EngineClosed where the interpreter has begun to end: threads stand still, modules are gone, and a reply would never
    come. A handler of atexit comes before that."""
    if sys.is_finalizing():
        raise EngineClosed(
            f"{model}: the interpreter is ending; ask or save before, in a handler of atexit at the latest"
        )


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
