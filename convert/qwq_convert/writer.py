"""The output file: allocated whole under a temporary name, written in place in any order, then renamed.

Order of the end: data, fsync, rename, fsync of the folder. Killed at any moment, the final name holds what it held before
or a complete file. The temporary file lies beside the final one, `.NAME.part`, and is locked while it is written, so a
second conversion to the same name is refused and a dead one's remains are used again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwq_lite.errors import OutputError
from qwq_lite.files import WINDOWS, RandomAccessFile, locked, replace


def temporary_name(final: Path) -> Path:
    return final.with_name(f".{final.name}.part")


def check_destination(final: Path, force: bool) -> None:
    """Everything about the output's name that can be known before work starts. Raises: OutputError."""
    folder = final.parent
    if not folder.is_dir():
        raise OutputError(f"{final}: the folder {folder} is not there; make it first, or choose another -o")
    if final.is_dir():
        raise OutputError(f"{final}: is a folder; name a file with -o, for example {final / 'model.gguf'}")
    if final.exists() and not final.is_file():
        raise OutputError(f"{final}: is no regular file and will not be replaced; choose another -o")
    if final.exists() and not force:
        raise OutputError(f"{final}: exists; replace it with --force, or choose another -o")


@contextmanager
def output_file(final: Path, size_bytes: int) -> Iterator[RandomAccessFile]:
    """A locked temporary file of `size_bytes` zeros that takes the final name when the block ends without an exception.

    Raises: OutputError for a full disk, a folder that cannot be written, another program at the same file.
    """
    temporary = temporary_name(final)
    if temporary.is_symlink() or (temporary.exists() and not temporary.is_file()):
        raise OutputError(
            f"{temporary}: is no regular file, and the output is written under this name first; remove it"
        )
    with _system_errors_named(final, size_bytes), RandomAccessFile(temporary, "r+") as file, locked(file):
        _check_own(file, temporary)
        try:
            file.allocate(size_bytes)
            yield file
            file.sync()
            if WINDOWS:  # an open file cannot be renamed there
                file.close()
            replace(temporary, final)
        except BaseException:
            if WINDOWS:
                file.close()
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def _check_own(file: RandomAccessFile, temporary: Path) -> None:
    """The locked file must still be the one under the temporary name: a conversion that has just ended has renamed its own."""
    try:
        ours = os.path.samestat(os.fstat(file.fileno()), temporary.lstat()) and temporary.lstat().st_nlink == 1
    except FileNotFoundError:
        ours = False
    if not ours:
        raise OutputError(f"{temporary}: another conversion has just finished or linked this file; start again")


@contextmanager
def _system_errors_named(final: Path, size_bytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            free = shutil.disk_usage(final.parent).free
            raise OutputError(
                f"{final}: the disk is full: {size_bytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
                f" in {final.parent};"
                " make room, or choose another -o"
            ) from error
        raise OutputError(f"{final}: cannot be written: {error.strerror or error}; choose another -o") from error
