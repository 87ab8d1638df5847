"""A saved sequence on disk: its tokens, what belongs to them, and K and V as llama.cpp wrote them. Knows no engine.

    magic 8 bytes | length of the JSON, u64 little-endian | BLAKE2b-256 of the JSON | JSON | padding to 64 | payload

The JSON holds `fingerprint` (model and cache types), `tokens`, `extra` (the caller's own), `payload_bytes` and `digest`, that
of the payload. llama.cpp reads a damaged state without a word, or ends the process over one that was cut: so nothing of it
reaches llama.cpp before the digests are right. The payload is written and read through a mapping, 4.25 GiB of it for QwQ at
32,768 tokens, and never stands in Python's memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwq_lite.errors import FormatError, UsageError
from qwq_lite.system import files
from qwq_lite.system.output import output_file

_MAGIC = b"QWQSTAT1"
_START = 48  # where the JSON begins
_ALIGN = 64
_MOST_JSON = 1 << 28
_PIECE = 1 << 24  # bytes hashed at a time


@dataclass(frozen=True)
class SavedState:
    """What a file says about its payload."""

    fingerprint: str
    tokens: list[int]
    extra: dict[str, Any]  # JSON of the caller's own


def write(path: Path, saved: SavedState, payload_bytes: int, fill: Callable[[memoryview], None]) -> None:
    """Write a file that appears under `path` whole or not at all, readable by its owner alone.

    fill: writes the payload into the mapping that it is given, all `payload_bytes` of it.
    Raises: UsageError for what is no JSON; OutputError for a folder or a disk that does not take it, another writer, or
    a path that is no file's.
    """
    # A digest has a fixed length, so the place of the payload is known before it is.
    start = len(_head(saved, payload_bytes, bytes(32)))
    with (
        output_file(path, start + payload_bytes, private=True, mapped=True) as file,
        _map_file(file, mmap.ACCESS_WRITE) as whole,
        whole[start:] as payload,
    ):
        fill(payload)
        whole[:start] = _head(saved, payload_bytes, _digest(payload))


@contextlib.contextmanager
def read(path: Path) -> Iterator[tuple[SavedState, memoryview]]:
    """What a file holds, and its payload as a mapping that the block may read, checked against the digest.

    Raises: FormatError for a file that is not one, was cut or changed, and for a pipe, which is not waited for.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(files.RandomAccessFile(path))
            # Copy on write: ctypes takes the address of writable buffers only, and nothing is written.
            whole = stack.enter_context(_map_file(file, mmap.ACCESS_COPY))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise FormatError(f"{path}: cannot be read as a saved state: {reason}") from error
        saved, start, digest = _parse(path, whole)
        payload = stack.enter_context(whole[start:])
        if _digest(payload) != digest:
            raise FormatError(f"{path}: its bytes have changed since it was saved; delete it and ask again")
        yield saved, payload


def _parse(path: Path, whole: memoryview) -> tuple[SavedState, int, bytes]:
    length = int.from_bytes(whole[8:16], "little")
    if bytes(whole[:8]) != _MAGIC or not 0 < length <= min(_MOST_JSON, len(whole)):
        raise FormatError(f"{path}: is no saved state (it does not begin with {_MAGIC.decode()})")
    start = _align(_START + length)
    text = bytes(whole[_START : _START + length])
    if hashlib.blake2b(text, digest_size=32).digest() != whole[16:_START] or any(whole[_START + length : start]):
        raise FormatError(f"{path}: the description of its state is damaged; delete it and ask again")
    try:  # whoever wrote the digest may be another program
        data = json.loads(text)
        saved = SavedState(str(data["fingerprint"]), [int(token) for token in data["tokens"]], dict(data["extra"]))
        n_bytes, digest = int(data["payload_bytes"]), bytes.fromhex(data["digest"])
    except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
        raise FormatError(f"{path}: the description of its state is damaged: {error!r}; delete it") from error
    if len(whole) != start + n_bytes:
        raise FormatError(f"{path}: has {len(whole)} bytes, {start + n_bytes} were saved; it was cut, delete it")
    return saved, start, digest


def _head(saved: SavedState, payload_bytes: int, digest: bytes) -> bytes:
    try:
        text = json.dumps(
            {**asdict(saved), "payload_bytes": payload_bytes, "digest": digest.hex()}, allow_nan=False
        ).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"a saved state takes JSON only: {error}") from error
    own = hashlib.blake2b(text, digest_size=32).digest()
    head = _MAGIC + len(text).to_bytes(8, "little") + own + text
    return head.ljust(_align(len(head)), b"\0")


def _align(n: int) -> int:
    return -(-n // _ALIGN) * _ALIGN


def _digest(payload: memoryview) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    for start in range(0, len(payload), _PIECE):
        digest.update(payload[start : start + _PIECE])
    return digest.digest()


@contextlib.contextmanager
def _map_file(file: files.RandomAccessFile, access: int) -> Iterator[memoryview]:
    mapping = mmap.mmap(file.fileno(), 0, access=access)
    view = memoryview(mapping)
    try:
        yield view
        # Linux's fsync, which comes after, writes mapped pages too. A flush holds the interpreter for as long as the disk takes.
        if access == mmap.ACCESS_WRITE and sys.platform != "linux":
            mapping.flush()
    finally:
        # While an error is on its way up its traceback may hold a part of the mapping, which then closes with it.
        with contextlib.suppress(BufferError):
            view.release()
            mapping.close()
