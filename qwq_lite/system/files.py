"""What operating systems do differently with files: positioned access, allocation, locks, replacement.

Knows nothing of what the files hold. POSIX has positioned calls that any number of threads may use on one descriptor;
Windows has none in Python, so its branch moves one file position under a lock. The Windows branch is untried.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Literal

from qwq_lite.errors import OutputError

WINDOWS = sys.platform == "win32"
_LOCKED_BYTE = 1 << 62  # Windows' locks bar reading and writing: lock a byte that no file reaches
_ZEROS = 1 << 20  # bytes of one write
# Not every file system can claim space; musl, BSDs and NFS say so in different words.
_CANNOT_CLAIM = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


class RandomAccessFile:
    """One open regular file that several threads read from, or write to, at positions of their own.

    Mode "r" opens an existing file; "r+" opens one for reading and writing, and creates it when it is not there.
    Raises: OSError as the system gives it, or EINVAL for a folder, a device, a pipe or a socket.
    """

    def __init__(self, path: Path, mode: Literal["r", "r+"] = "r") -> None:
        flags = os.O_RDONLY if mode == "r" else os.O_RDWR | os.O_CREAT
        for name in ("O_BINARY", "O_CLOEXEC", "O_NONBLOCK", "O_NOCTTY"):  # those that this system has
            flags |= getattr(os, name, 0)
        with contextlib.suppress(FileNotFoundError):  # first, for to open a device is to use it
            _check_regular(path, path.stat())
        self._fd = os.open(path, flags, 0o666)
        try:  # again: by now the name may be a pipe's, and with O_NONBLOCK its open has not waited
            _check_regular(path, os.fstat(self._fd))
        except OSError:
            self.close()
            raise
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

    def allocate(self, size_bytes: int, *, claim: bool = False) -> None:
        """Make the file `size_bytes` zeros, and claim the disk for it where the system can.

        A disk that is too full says so here (OSError ENOSPC) instead of halfway through.
        claim: where the system cannot, claim it by writing the zeros. Who writes by calls hears of a full disk from them;
        who writes through a mapping is ended by the system (SIGBUS) at the first page that finds no room.
        """
        os.ftruncate(self._fd, 0)
        claimed = _allocate(self._fd, size_bytes)
        os.ftruncate(self._fd, size_bytes)
        if claim and not claimed:
            zeros = memoryview(bytes(_ZEROS))
            for start in range(0, size_bytes, _ZEROS):
                self.write_from(zeros[: size_bytes - start], start)

    def sync(self) -> None:
        """Return when the system says that the bytes are on the disk."""
        if sys.platform == "darwin":
            import fcntl

            with contextlib.suppress(OSError):  # fsync alone leaves the bytes in the drive's cache on macOS
                fcntl.fcntl(self._fd, fcntl.F_FULLFSYNC)
                return
        os.fsync(self._fd)


def _check_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "a folder, a device, a pipe or a socket, no regular file", str(path))


def _allocate(fd: int, size_bytes: int) -> bool:
    """Whether the disk holds room for `size_bytes` of an empty file. Raises: OSError when it is too full."""
    if WINDOWS or size_bytes == 0:  # the C library's _chsize_s, which is ftruncate there, writes zeros itself
        return True
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size_bytes)
        except OSError as error:
            if error.errno not in _CANNOT_CLAIM:
                raise
            return False
        return True
    return _allocate_on_macos(fd, size_bytes)


def _allocate_on_macos(fd: int, size_bytes: int) -> bool:
    """F_PREALLOCATE from the end of an empty file on, in one piece or else in several. Untried."""
    if sys.platform != "darwin":
        return False
    import fcntl

    preallocate, contiguous, everything, from_end = 42, 2, 4, 3  # sys/fcntl.h; Python names none of them
    for flags in (contiguous | everything, everything):
        # struct fstore_t: flags, mode of the position, offset, length, and the bytes that were allocated
        request = struct.pack("=IiqqQ", flags, from_end, 0, size_bytes, 0)
        with contextlib.suppress(OSError):  # no room now may be room for a write, which lets caches be purged first
            fcntl.fcntl(fd, preallocate, request)
            return True
    return False


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
