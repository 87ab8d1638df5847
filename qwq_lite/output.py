"""A file that appears under its name whole or not at all: allocated under a temporary name, written in any order, renamed.

Order of the end: data, fsync, rename, fsync of the folder. Killed at any moment, the final name holds what it held before
or a complete file. The temporary file lies beside the final one, `.NAME.part`, and is locked while it is written, so a
second writer of the same name is refused and a dead one's remains are used again.
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


@contextmanager
def output_file(
    final: Path, size_bytes: int, *, private: bool = False, mapped: bool = False
) -> Iterator[RandomAccessFile]:
    """A locked temporary file of `size_bytes` zeros that takes the final name when the block ends without an exception.

    private: only its owner may read it, where the system knows such modes.
    mapped: the block writes through a mapping, so the disk must be claimed before it begins, at any price.
    Raises: OutputError for a full disk, a folder that cannot be written, another program at the same file, a name that
    is a folder's, a device's, a pipe's or a socket's.
    """
    temporary = temporary_name(final)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_system_errors_named(final, size_bytes))
        _check_names(final, temporary)
        file = stack.enter_context(RandomAccessFile(temporary, "r+"))
        stack.enter_context(locked(file))
        _check_own(file, temporary)
        try:
            if private and hasattr(os, "fchmod"):
                with contextlib.suppress(OSError):  # a file system without modes
                    os.fchmod(file.fileno(), 0o600)
            file.allocate(size_bytes, claim=mapped)
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


def _check_names(final: Path, temporary: Path) -> None:
    if final.exists() and not final.is_file():  # a rename would put a file in the place of a pipe or a device
        raise OutputError(
            f"{final}: is a folder, a device, a pipe or a socket, no file to replace; choose another place"
        )
    if temporary.is_symlink() or (temporary.exists() and not temporary.is_file()):
        raise OutputError(
            f"{temporary}: is no regular file, and the output is written under this name first; remove it"
        )


def _check_own(file: RandomAccessFile, temporary: Path) -> None:
    """The locked file must still be the one under the temporary name: a writer that has just ended has renamed its own."""
    try:
        ours = os.path.samestat(os.fstat(file.fileno()), temporary.lstat()) and temporary.lstat().st_nlink == 1
    except FileNotFoundError:
        ours = False
    if not ours:
        raise OutputError(f"{temporary}: another program has just finished or linked this file; start again")


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
                " make room, or choose another place"
            ) from error
        raise OutputError(f"{final}: cannot be written: {error.strerror or error}; choose another place") from error
