"""Text on standard input: all of it as the question, what is piped in beside a question, or one line. Each within a bound.

Knows no model. Beside a question standard input is often there by accident: a pipe that a program inherited and that never
says anything, or a file that a loop of the shell reads line by line. Neither may hold up an answer or lose its text.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import threading
import time

from qwq_lite.cli import console
from qwq_lite.errors import UsageError

MOST = 1 << 26  # bytes or characters: four for each token of the largest --ctx, more than any context holds
WAIT_S = 3.0  # for the first byte of a pipe; a model that is loaded meanwhile takes about as long
_TICK_S = 0.2  # a wait without an end is not interrupted by Ctrl-C on Windows
_CHUNK = 1 << 16  # bytes


def read_all() -> str:
    """All of standard input. Raises: UsageError for more than MOST, and for what is no UTF-8."""
    binary = getattr(sys.stdin, "buffer", None)
    if binary is None:  # what a caller put in its place
        return _check_length(sys.stdin.read(MOST + 1), "standard input")
    data = binary.read(MOST + 1)
    if len(data) > MOST:
        raise _too_long("standard input")
    return _decode(data)


def read_line() -> str:
    """The next line. Raises: EOFError after the last one; UsageError for one that is longer than MOST."""
    text = _check_length(sys.stdin.readline(MOST + 1), "a line of standard input")
    if not text:
        raise EOFError
    return text.removesuffix("\n")


def _decode(data: bytes | bytearray) -> str:
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input is no UTF-8 text (byte {error.start:,} is {data[error.start]:#04x})"
        ) from error


def _check_length(text: str, what: str) -> str:
    if len(text) > MOST:
        raise _too_long(what)
    return text


def _too_long(what: str) -> UsageError:
    return UsageError(f"{what} has more than {MOST >> 20} MiB, which no context holds; give a part of it")


class Beside:
    """What is piped in beside a question. It is read on a thread of its own from here on; nothing is read of a terminal."""

    def __init__(self) -> None:
        self._read = bytearray()
        self._begun, self._ended = threading.Event(), threading.Event()
        self._asked = time.monotonic()
        self._source = _descriptor()
        if self._source is not None:
            threading.Thread(target=self._take, args=(self._source,), daemon=True).start()

    def text(self) -> str:
        """All of it; "" where there is none, or none has begun WAIT_S after the start. Raises: UsageError as `read_all`."""
        if self._source is None:
            return ""
        if not self._begun.wait(max(0.0, self._asked + WAIT_S - time.monotonic())):
            console.note(
                f"standard input is an open pipe that said nothing for {WAIT_S:.0f} s, and is ignored; to wait for it,"
                " give it the question too and say -p -"
            )
            return ""
        while not self._ended.wait(_TICK_S):
            pass
        if len(self._read) > MOST:
            raise _too_long("standard input")
        return _decode(self._read)

    def _take(self, source: int) -> None:
        # By the descriptor: a thread that holds Python's own buffer at the end of the program is a fatal error.
        with contextlib.suppress(OSError):
            while len(self._read) <= MOST and (data := os.read(source, _CHUNK)):
                self._read += data
                self._begun.set()
        self._ended.set()
        self._begun.set()


def _descriptor() -> int | None:
    """Of what may be read beside a question; None for a terminal, for nothing, and for a file that another program reads."""
    try:
        source = sys.stdin.fileno()
        status = os.fstat(source)
    except (AttributeError, ValueError, OSError):  # there is none, or it is closed
        return None
    if os.isatty(source):
        return None
    if stat.S_ISREG(status.st_mode):
        place = os.lseek(source, 0, os.SEEK_CUR)
        if 0 < place < status.st_size:  # `while read line; do …; done <file`: the rest is the loop's
            console.note(
                f"standard input is a file that is being read by another program, and is ignored from byte {place} on"
            )
        return None if place else source
    return source
