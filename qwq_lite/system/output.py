"""Writes a file that appears under its name complete or not at all: temporary name, allocation, sync, rename.

Order of the end: data, fsync, rename, fsync of the folder. Killed at any moment, the final name holds what it held before
or a complete file. The temporary file lies beside the final one, `.NAME.part`, and is locked while it is written, so a
second writer of the same name is refused and a dead one's remains are used again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from qwq_lite.errors import OutputError
from qwq_lite.system.files import WINDOWS, RandomAccessFile, locked, replace


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
    with output_files([(final, size_bytes)], private=private, mapped=mapped) as (file,):
        yield file


@contextmanager
def output_files(
    wanted: Sequence[tuple[Path, int]], *, private: bool = False, mapped: bool = False, fresh: bool = False
) -> Iterator[list[RandomAccessFile]]:
    """The same for several files, (final, size in bytes) each: all are synced before the first one takes its name.

    fresh: what has come under a final name meanwhile is not replaced. Raises: OutputError, as `output_file`.
    """
    files: list[RandomAccessFile] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(_system_errors_named(wanted[0][0], sum(size for _, size in wanted)))
        try:
            for final, size_bytes in wanted:
                files.append(stack.enter_context(_temporary(final)))
                if private and hasattr(os, "fchmod"):
                    with contextlib.suppress(OSError):  # a file system without modes
                        os.fchmod(files[-1].fileno(), 0o600)
                files[-1].allocate(size_bytes, claim=mapped)
            yield files
            for file in files:
                file.sync()
            for final, _ in wanted:
                if fresh and os.path.lexists(final):
                    raise OutputError(
                        f"{final}: another program has made it meanwhile; it stays, and nothing was written"
                    )
            for file, (final, _) in zip(files, wanted, strict=True):
                if WINDOWS:  # an open file cannot be renamed there
                    file.close()
                replace(file.path, final)
        except BaseException:
            for file in files:
                if WINDOWS:
                    file.close()
                with contextlib.suppress(OSError):  # one that has its name already is complete
                    file.path.unlink()
            raise


@contextmanager
def _temporary(final: Path) -> Iterator[RandomAccessFile]:
    """The file under its temporary name, locked."""
    temporary = temporary_name(final)
    _check_names(final, temporary)
    with RandomAccessFile(temporary, "r+") as file, locked(file):
        _check_own(file, temporary)
        yield file


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
