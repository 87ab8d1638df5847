"""Terminal habits that every command shares: UTF-8, closed pipes, errors in one line, no escape sequence from a model."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click

from qwq_lite.errors import QwqError, UsageError

NO_ANSWER, INTERRUPTED = 3, 130
_CANNOT_WRITE = (errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EBADF)

# Control characters but tab and newline: without ESC and the C1 range no escape sequence is left, however it is split.
_CONTROLS = {code: None for code in [*range(0x20), *range(0x7F, 0xA0)] if chr(code) not in "\t\n"}


def run(command: click.Command) -> None:
    """Run the command line and exit: 0; 1 for the error tree, 2 for usage, 3 for no answer, 130 for Ctrl-C.

    128 + N after signal N, where the command cleans up after it (`signals_raise`).
    """
    _prepare_streams()
    try:
        # Not command.main(): it turns a closed pipe into exit status 1 before it can be seen here.
        with command.make_context("qwq-lite", sys.argv[1:]) as context:
            command.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Abort:
        raise SystemExit(INTERRUPTED) from None
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except click.exceptions.Exit as error:
        raise SystemExit(error.exit_code) from None
    except QwqError as error:
        click.echo(f"qwq-lite: {one_line(str(error))}", err=True)
        raise SystemExit(error.exit_status) from None
    except KeyboardInterrupt as error:
        raise SystemExit(128 + error.number if isinstance(error, TerminationSignal) else INTERRUPTED) from None
    except OSError as error:
        status = _report(error)
        # What is left in the buffer cannot be written either: the interpreter must not try again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(status) from None


def _report(error: OSError) -> int:
    """Say what the system refused, and return the exit status: 0 where the reader is gone, as with `| head`."""
    if isinstance(error, BrokenPipeError):
        return 0
    place = error.filename
    if place is None and error.errno in _CANNOT_WRITE:  # files of results raise OutputError, which names them
        place = "standard output"
    if place is None and _is_folder_gone():
        place = "the current folder no longer exists, change to one that does"
    click.echo(f"qwq-lite: {one_line((f'{place}: ' if place else '') + (error.strerror or str(error)))}", err=True)
    return 1


def _is_folder_gone() -> bool:
    try:
        Path.cwd()
    except OSError:
        return True
    return False


def _prepare_streams() -> None:
    """UTF-8 on all three streams. One that is closed is empty, or writes nowhere; standard error drops what it cannot write."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # else the next file that is opened would get this number
            if null != number:
                os.dup2(null, number)
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115 - a descriptor
    # A terminal can always be written to, and on Windows it is no plain file. What a caller put in its place stays.
    if not sys.stderr.isatty() and sys.stderr is sys.__stderr__:
        sys.stderr = io.TextIOWrapper(_Forgiving(2, "w", closefd=False), line_buffering=True)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not (stream is sys.stdin and stream.isatty()):
            stream.reconfigure(encoding="utf-8", errors="replace")


class _Forgiving(io.FileIO):
    """Standard error on a full disk or a closed pipe: notes are lost, results are not."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


class Command(click.Command):
    """A command whose texts and paths refuse to be empty: an empty one is an unset variable of a script, and never ignored.

    may_be_empty: options to which an empty text says something.
    """

    def __init__(self, *args: Any, may_be_empty: Collection[str] = (), **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._may_be_empty = may_be_empty

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = self.make_parser(ctx).parse_args(args=list(args))[0]  # as typed: an empty path is the current folder
        for parameter in self.params:
            value = given.get(parameter.name or "")
            if not isinstance(parameter.type, click.types.StringParamType | click.Path):
                continue  # those say themselves what they take
            if (value == "" or (isinstance(value, list | tuple) and "" in value)) and (
                parameter.name not in self._may_be_empty
            ):
                name = (
                    "/".join(parameter.opts) if isinstance(parameter, click.Option) else parameter.human_readable_name
                )
                left = ", or leave it out" if not parameter.required else ""
                raise UsageError(f"{name} is empty; give it a value{left}")
        return super().parse_args(ctx, args)


def one_line(text: str) -> str:
    return escaped(" ".join(text.split()))


def printable(text: str) -> str:
    """What a model writes, in any script: without control characters but tab and newline."""
    return text.translate(_CONTROLS)


def escaped(text: str) -> str:
    """A name or a value from a stranger's file: what is not to be seen, or turns the line around, as Python's escapes."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii") for c in text
    )


def size(n_bytes: int) -> str:
    """A file's or a tensor's size, in powers of ten."""
    for unit, name, digits in ((1e9, "GB", 2), (1e6, "MB", 1), (1e3, "kB", 1)):
        if n_bytes >= unit:
            return f"{n_bytes / unit:.{digits}f} {name}"
    return f"{n_bytes} bytes"


def note(text: str) -> None:
    """A line for the user on stderr, beside the results on stdout."""
    click.secho(text, err=True, dim=True)


def warn(text: str) -> None:
    click.secho(text, err=True, fg="yellow", bold=True)


class TerminationSignal(KeyboardInterrupt):
    """A signal other than Ctrl-C asks the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def signals_raise() -> Iterator[None]:
    """Raises `TerminationSignal` for a signal that would end the process at once, so that no half-written file is left.

    SIGTERM, SIGHUP and SIGQUIT; on Windows Ctrl-Break, untried. One that is ignored stays so, as under nohup. After the first
    the others are ignored until the block has ended. Only in the main thread; elsewhere it does nothing.
    """
    import signal
    import threading

    def end(number: int, _frame: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        raise TerminationSignal(number)

    known = (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP", "SIGQUIT", "SIGBREAK"))
    before = [number for number in known if number is not None and signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        before.clear()
    try:
        for number in before:
            signal.signal(number, end)
        yield
    finally:
        for number in before:
            signal.signal(number, signal.SIG_DFL)


class Interrupts:
    """What Ctrl-C does while the block runs: it cancels the answer, unless a line is being read. Ctrl-\\ concludes the thought.

    A second Ctrl-C before the answer has ended raises KeyboardInterrupt, as ever. Between answers it is never lost and never
    ends the program.
    """

    def __init__(self, cancel: Callable[[], None], conclude: Callable[[], object]) -> None:
        self._cancel, self._conclude = cancel, conclude
        self._reading = False
        self._pressed = False

    def __enter__(self) -> Interrupts:
        import signal

        self._before = {signal.SIGINT: signal.signal(signal.SIGINT, self._handle)}
        quit_signal = getattr(signal, "SIGQUIT", None) or getattr(
            signal, "SIGBREAK", None
        )  # Windows: Ctrl-Break, untried
        if quit_signal is not None:
            self._before[quit_signal] = signal.signal(quit_signal, lambda _number, _frame: self._conclude())
        return self

    def __exit__(self, *_: object) -> None:
        import signal

        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self._reading or self._pressed:
            raise KeyboardInterrupt
        self._pressed = True
        self._cancel()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A line is being read: Ctrl-C raises KeyboardInterrupt, to drop it."""
        self._reading, self._pressed = True, False
        try:
            yield
        finally:
            self._reading = False
