"""Text and JSON files of an untrusted folder: read without waiting, refused with the file's name. Knows no checkpoints."""

from __future__ import annotations

import errno
import io
import json
import reprlib
from collections import Counter
from pathlib import Path
from typing import Any

from qwq_lite.errors import CheckpointError
from qwq_lite.system.files import RandomAccessFile

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120
MAX_TEXT_BYTES = 64 << 20  # a tokenizer.json of 150,000 tokens is 7 to 11 MB


def printable(name: str) -> str:
    """A name from a stranger's file as a message can hold it: as it is, or quoted when it is long or cannot be printed."""
    return name if len(name) <= 200 and name.isprintable() else quote(name)


def quote(value: object) -> str:
    """A value from a stranger's file as a message can hold it: in Python's spelling, shortened in the middle."""
    return _SHORT.repr(value)


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it; JSON can spell lone surrogates, which it cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_listed(path: Path) -> bool:
    """Whether a folder lists the name. A link that leads nowhere and a pipe are listed: they are not taken for absent."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def explain_unreadable(path: Path, error: OSError) -> str:
    """Why a listed name cannot be read as a file, and what to do."""
    if path.is_symlink() and isinstance(error, FileNotFoundError):
        return f"is a link to {printable(str(path.readlink()))}, which is not there; fetch the file again, or remove the link"
    if error.errno == errno.EINVAL:  # RandomAccessFile's word for what is no regular file
        return "is a folder, a device, a pipe or a socket and no file; put the file in its place, or remove it"
    return f"cannot be read: {error.strerror or error}; make it readable, or remove it"


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises: CheckpointError naming the file, for everything that is not one."""
    text = read_text(path)
    refuse_stand_in(path, text[:64].encode(errors="replace"))
    try:
        value = json.loads(text, object_pairs_hook=reject_duplicate_keys)
    except RecursionError as error:
        raise CheckpointError(f"{path}: is nested too deeply; fetch it again") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, a JSON object is expected; fetch it again")
    return value


def read_text(path: Path) -> str:
    """A text file in UTF-8. Raises: CheckpointError naming the file, for everything that is not one."""
    try:
        with RandomAccessFile(path) as file:  # waits for no pipe, and opens no device
            if file.size() > MAX_TEXT_BYTES:
                raise CheckpointError(
                    f"{path}: is larger than {MAX_TEXT_BYTES >> 20} MiB, which no such file is; fetch it again"
                )
            content = bytearray(file.size())
            file.read_into(memoryview(content), 0)
        return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8").read()
    except OSError as error:
        raise CheckpointError(f"{path}: {explain_unreadable(path, error)}") from error
    except (EOFError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as UTF-8 text: {error}") from error


def refuse_stand_in(path: Path, start: bytes) -> None:
    """What is found where weights or JSON should be when a download went wrong, told by its first bytes."""
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: is a Git LFS pointer and not the file; run `git lfs pull` in the folder")
    if start.lstrip()[:1] == b"<":
        raise CheckpointError(f"{path}: is a web page and not the file; fetch it again")
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        raise CheckpointError(
            f"{path}: is a pickle under another name, which can run code and is never opened: take *.safetensors"
        )


def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys occur once: which of two values under one name is meant cannot be told."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {printable(twice)} occurs twice")
    return found
