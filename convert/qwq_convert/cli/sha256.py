"""The usual digest of a whole file, FILE.sha256 beside it, in the form that sha256sum reads. Knows no formats.

Source of the form: GNU coreutils, sha256sum; a backslash or a newline in a name is escaped, and a backslash begins that line.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from qwq_lite.errors import OutputError
from qwq_lite.system.output import output_files

_CHUNK = 8 << 20  # bytes


def beside(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def check(files: Iterable[Path], sources: Sequence[Path], force: bool) -> None:
    """Whether each digest can take its name, asked before work starts. sources: files that must not be replaced.

    Raises: OutputError.
    """
    for path in map(beside, files):
        if path.exists() and not path.is_file():
            raise OutputError(
                f"{path}: is no regular file, and --sha256 would write under this name; move it, or leave out --sha256"
            )
        if os.path.lexists(path) and not force:
            raise OutputError(f"{path}: exists; replace it with --force, or leave out --sha256")
        for source in sources:
            if path.exists() and source.is_file() and source.samefile(path):
                raise OutputError(f"{path}: is {source}, which the conversion reads; choose another -o")


def remove(files: Iterable[Path]) -> list[Path]:
    """Remove the digests of files that have been replaced: they would call the new ones damaged. Returns what was removed.

    Raises: OutputError.
    """
    old = [path for path in map(beside, files) if path.is_file()]
    for path in old:
        try:
            path.unlink()
        except OSError as error:
            raise OutputError(
                f"{path}: is the digest of the file that was replaced, and cannot be removed: {error.strerror or error};"
                " remove it"
            ) from error
    return old


def write(file: Path, force: bool, on_progress: Callable[[str, int], None]) -> str:
    """Read the whole file, write its digest beside it, and return that, hex. Raises: OutputError."""
    whole = hashlib.sha256()
    try:
        with file.open("rb", buffering=0) as opened:
            while chunk := opened.read(_CHUNK):
                whole.update(chunk)
                on_progress(file.name, len(chunk))
    except OSError as error:
        raise OutputError(
            f"{file}: is complete, and could not be read again for its digest: {error.strerror or error};"
            f" `qwq-lite verify` checks it without {beside(file).name}"
        ) from error
    line = _line(whole.hexdigest(), file.name)
    with output_files([(beside(file), len(line))], fresh=not force) as (opened_digest,):
        opened_digest.write_from(memoryview(line), 0)
    return whole.hexdigest()


def _line(digest: str, name: str) -> bytes:
    raw = os.fsencode(name)  # a name may be no text on Linux
    escaped = raw.replace(b"\\", b"\\\\").replace(b"\n", b"\\n")
    return b"%b%b  %b\n" % (b"\\" if escaped != raw else b"", digest.encode("ascii"), escaped)
