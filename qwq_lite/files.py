"""What operating systems do differently with files: positioned access, allocation, locks, replacement.

Knows nothing of what the files hold. POSIX has positioned calls that any number of threads may use on one descriptor;
Windows has none in Python, so its branch moves one file position under a lock. The Windows branch is untried.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Literal

from qwq_lite.errors import OutputError

WINDOWS = sys.platform == "win32"
_LOCKED_BYTE = 1 << 62  # Windows' locks bar reading and writing: lock a byte that no file reaches


class RandomAccessFile:
    """One open file that several threads read from, or write to, at positions of their own.

    Mode "r" opens an existing file; "r+" opens one for reading and writing, and creates it when it is not there.
    Raises: OSError as the system gives it.
    """

    def __init__(self, path: Path, mode: Literal["r", "r+"] = "r") -> None:
        flags = os.O_RDONLY if mode == "r" else os.O_RDWR | os.O_CREAT
        self._fd = os.open(path, flags | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0), 0o666)
        self._position = threading.Lock()
        self.path = path

    def __enter__(self) -> RandomAccessFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from `offset` on. Raises: EOFError when the file ends before it is full."""
        done = 0
        while done < len(buffer):
            if WINDOWS:
                with self._position:
                    os.lseek(self._fd, offset + done, os.SEEK_SET)
                    piece = os.read(self._fd, len(buffer) - done)
                buffer[done : done + len(piece)] = piece
                count = len(piece)
            else:
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
            if count == 0:
                raise EOFError(f"{self.path}: ends at byte {offset + done}, {len(buffer) - done} bytes short")
            done += count

    def write_from(self, buffer: memoryview, offset: int) -> None:
        """Write all of `buffer` at `offset`."""
        done = 0
        while done < len(buffer):
            if WINDOWS:
                with self._position:
                    os.lseek(self._fd, offset + done, os.SEEK_SET)
                    done += os.write(self._fd, buffer[done:])
            else:
                done += os.pwrite(self._fd, buffer[done:], offset + done)

    def allocate(self, size_bytes: int) -> None:
        """Make the file `size_bytes` zeros, and claim the disk for it where the system can.

        A disk that is too full says so here (OSError ENOSPC) instead of halfway through.
        """
        os.ftruncate(self._fd, 0)
        os.ftruncate(self._fd, size_bytes)
        if hasattr(os, "posix_fallocate") and size_bytes:  # Linux; macOS and Windows find out while writing
            os.posix_fallocate(self._fd, 0, size_bytes)

    def sync(self) -> None:
        """Return when the system says that the bytes are on the disk."""
        if sys.platform == "darwin":
            import fcntl

            with contextlib.suppress(OSError):  # fsync alone leaves the bytes in the drive's cache on macOS
                fcntl.fcntl(self._fd, fcntl.F_FULLFSYNC)
                return
        os.fsync(self._fd)


@contextlib.contextmanager
def locked(file: RandomAccessFile) -> Iterator[None]:
    """Hold the only lock on an open file; it ends with the process, however that ends.

    Raises: OutputError at once when another process holds it.
    """
    try:
        _lock(file.fileno())
    except OSError as error:
        raise OutputError(
            f"{file.path}: another program is writing this file; wait for it, or choose another -o"
        ) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):  # closed before its rename on Windows
            _unlock(file.fileno())


def _lock(fd: int) -> None:
    if WINDOWS:
        import msvcrt

        os.lseek(fd, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    else:
        import fcntl

        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _unlock(fd: int) -> None:
    if WINDOWS:
        import msvcrt

        os.lseek(fd, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    else:
        import fcntl

        fcntl.flock(fd, fcntl.LOCK_UN)


def replace(temporary: Path, final: Path) -> None:
    """Give a finished, synced file its final name in one step, and make the name survive a power cut."""
    temporary.replace(final)
    if WINDOWS:  # a folder cannot be opened there, and NTFS journals its own names
        return
    fd = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
