"""files: what is no regular file is refused, and how the disk is claimed on systems that do it differently."""

from __future__ import annotations

import errno
import os
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from qwq_lite.system.files import RandomAccessFile

SIZE = (1 << 20) + 5
posix = pytest.mark.skipif(sys.platform == "win32", reason="its C library claims")


def allocated(path: Path, claim: bool) -> int:
    """Bytes that were written, once the file is `SIZE` zeros instead of what was in it."""
    path.write_bytes(b"old" * SIZE)
    with RandomAccessFile(path, "r+") as file, pytest.MonkeyPatch.context() as patch:
        written = []
        write = file.write_from

        def spy(buffer: memoryview, offset: int) -> None:
            written.append(len(buffer))
            write(buffer, offset)

        patch.setattr(file, "write_from", spy)
        file.allocate(SIZE, claim=claim)
    assert path.read_bytes() == bytes(SIZE)
    return sum(written)


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_folder_is_refused(mode: Any, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no regular file"):
        RandomAccessFile(tmp_path, mode)


@posix
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_pipe_that_takes_the_place_of_a_file_is_neither_waited_for_nor_kept_open(
    mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the name and its open, which only O_NONBLOCK keeps from waiting."""
    path, really, opened = tmp_path / "file", os.open, []
    path.touch()

    def swapped(path: Path, *arguments: int) -> int:
        path.unlink()
        os.mkfifo(path)
        opened.append(really(path, *arguments))
        return opened[0]

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(OSError, match="no regular file"):
        RandomAccessFile(path, mode)
    with pytest.raises(OSError) as closed:
        os.fstat(opened[0])
    assert closed.value.errno == errno.EBADF


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system's own call")
def test_a_system_that_claims_space_needs_no_zeros(tmp_path: Path) -> None:
    assert allocated(tmp_path / "file", claim=True) == 0


@posix
@pytest.mark.parametrize("code", [None, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_zeros_are_written_where_space_cannot_be_claimed(
    code: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, offset: int, size_bytes: int) -> None:
        raise OSError(code, "no")

    monkeypatch.setattr(sys, "platform", "linux")
    if code is None:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    assert allocated(tmp_path / "file", claim=True) == SIZE
    assert allocated(tmp_path / "file", claim=False) == 0, "write calls hear of a full disk by themselves"


@posix
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EIO])
def test_a_disk_that_is_full_says_so(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, size_bytes: int) -> None:
        raise OSError(code, "no")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with RandomAccessFile(tmp_path / "file", "r+") as file, pytest.raises(OSError, match="no") as error:
        file.allocate(SIZE)
    assert error.value.errno == code


@posix
@pytest.mark.parametrize(("refused", "zeros"), [(0, 0), (1, 0), (2, SIZE)])
def test_macos_claims_in_one_piece_or_in_several(
    refused: int, zeros: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as another system can tell: what is asked for, and what follows from the answers."""
    import fcntl

    asked: list[tuple[int, ...]] = []

    def answer(fd: int, command: int, request: bytes) -> bytes:
        asked.append((command, *struct.unpack("=IiqqQ", request)))
        if len(asked) <= refused:
            raise OSError(errno.ENOSPC, "no")
        return request

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.setattr(fcntl, "fcntl", answer)
    assert allocated(tmp_path / "file", claim=True) == zeros
    assert asked == [(42, 6, 3, 0, SIZE, 0), (42, 4, 3, 0, SIZE, 0)][: refused + 1]
