"""Saves a conversation's KV cache to a file and restores it, on the caller's thread but for the copies.

`call` runs a job on the engine's thread and returns what it returns: `Scheduler.call`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from qwq_lite.backend.context import ContextSettings
from qwq_lite.engine.sequences import Sequences
from qwq_lite.errors import EngineError, FormatError
from qwq_lite.formats.gguf_header import Header
from qwq_lite.store import state_file

T = TypeVar("T")
_TRIES = 5


class Call(Protocol):
    def __call__(self, job: Callable[[Sequences], T], /) -> T: ...


def save(call: Call, session: Hashable, path: Path, fingerprint: str, extra: dict[str, Any]) -> None:
    """Write a session's tokens and K and V to a file; none of them when the cache holds it no longer.

    The row is not kept: after `restore` the last token is decoded again.
    Raises: OutputError; UsageError when `extra` is no JSON; EngineError when the session does not stand still.
    """

    def fill(payload: memoryview) -> None:
        if tokens and not call(lambda sequences: sequences.copy_state(session, tokens, payload)):
            raise _Changed

    for _ in range(_TRIES):
        tokens, n_bytes = call(lambda sequences: sequences.held(session))
        try:
            state_file.write(path, state_file.SavedState(fingerprint, tokens, extra), n_bytes, fill)
            return
        except _Changed:  # a reply came in between
            continue
    raise EngineError(f"{path}: not saved, the conversation goes on while it is; wait until its reply has ended")


def restore(call: Call, session: Hashable, path: Path, fingerprint: str) -> dict[str, Any]:
    """Bring back what `save` wrote, idle, for the session's next prompt. Returns the caller's own words.

    Raises: FormatError for a damaged file, another model's, or one that the context is too small for; EngineError.
    """
    with state_file.read(path) as (saved, payload):
        if saved.fingerprint != fingerprint:
            raise FormatError(
                f"{path}: was saved by another model or with other cache types ({saved.fingerprint}, this one is"
                f" {fingerprint}); load that one"
            )
        if saved.tokens:
            refused = call(lambda sequences: sequences.adopt(session, saved.tokens, payload))
            if refused:
                raise FormatError(f"{path}: {refused}")
        return saved.extra


class _Changed(Exception):
    """The session is not what it was when its size was asked for."""


def fingerprint(header: Header, settings: ContextSettings) -> str:
    """What a saved state depends on: the headers and the size of the model's files, and the types of the cache."""
    digest = hashlib.blake2b(digest_size=16)
    for part in header.files:
        with part.path.open("rb") as file:
            digest.update(file.read(part.data_offset))
    digest.update(f"{header.file_bytes}:{settings.type_k}:{settings.type_v}".encode())
    return digest.hexdigest()
