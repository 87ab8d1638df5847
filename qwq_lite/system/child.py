"""Starts code of this package in a child process, from a script, a notebook or a frozen application.

What ends such a child does not end who started it. Nothing of the caller is imported there. A child's results go through a
pipe of their own: what a sitecustomize, a library or llama.cpp prints to its streams is kept as text for an error message.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwq_lite.errors import UsageError
from qwq_lite.system import windows_job

# How a process ends that meets an instruction its CPU lacks, or a wrongly compiled one: SIGILL, STATUS_ILLEGAL_INSTRUCTION.
ILLEGAL_INSTRUCTION = (-int(getattr(signal, "SIGILL", 4)), 0xC000001D, 0xC000001D - (1 << 32))
MARK = "QWQ_LITE_WORKER"  # in a child's environment: what it is to run, as module:function
_RESULTS = "QWQ_LITE_RESULTS"  # in a child's environment: the descriptor (Windows: the handle) that its results go to
TIMEOUT_S = 120  # the first load of a CUDA build compiles kernels for cards newer than itself
PARENT = os.getppid()  # as early as can be: a host may die while its child still imports
_PACKAGE = "qwq_lite"
_IN_PARTS = ("llama_cpp", "gguf")  # whole, they import a tenth of a second of what is not used here
_ready = False  # whether this program asked, at its start, if it is a child


def run_worker_if_asked() -> None:
    """Give a frozen application its engine's process: call it first thing in the main script.

    A frozen application has no Python to start, so it starts itself. In such a copy this function does the child's work and
    never returns; in the application, and in one that is not frozen, it returns at once.

    Example:
        import qwq_lite

        if __name__ == "__main__":
            qwq_lite.run_worker_if_asked()
            main()
    """
    global _ready  # noqa: PLW0603 - a fact about the process
    _ready = True
    target = os.environ.get(MARK)
    if target is None:
        return
    if target.partition(".")[0] != _PACKAGE:
        raise UsageError(f"{MARK} is {target!r}; {_PACKAGE} sets it, for its own children only")
    serve(target)
    sys.exit(0)


def serve(target: str) -> None:
    """The child's side: call `module:function`, without what no child of this package needs."""
    for name in _IN_PARTS:
        spec = importlib.util.find_spec(name)
        if spec is not None:  # its modules are found, and its __init__ is not run
            sys.modules[name] = importlib.util.module_from_spec(spec)
    module, _, function = target.partition(":")
    getattr(importlib.import_module(module), function)()


def is_child() -> bool:
    """Whether this process is one of this package's own children."""
    return MARK in os.environ


@dataclass(frozen=True)
class Child:
    """A started child. Its standard output and error come together as process.stdout."""

    process: subprocess.Popen[bytes]
    results: int  # the descriptor from which its results are read


def start(target: str, python: str | None = None) -> Child:
    """Start `module:function` of this package in a child, behind three unbuffered pipes and without a window.

    Raises: UsageError in a frozen application that never called `run_worker_if_asked`: it would only open itself once more.
    """
    command = _command(target, python)
    with _results_pipe() as (read, options):
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                **_start_options(target, options),
            )
        except BaseException:
            os.close(read)
            raise
    if sys.platform == "win32":
        windows_job.tie(int(process._handle))  # type: ignore[attr-defined] # Popen keeps it so
    return Child(process, read)


def ask(module: str, function: str, question: str = "") -> subprocess.CompletedProcess[str]:
    """Call `module.function()` in a child, with `question` on its standard input, and wait for its end.

    stdout of what is returned is what the child gave to `send`, stderr is what it printed.
    Raises: subprocess.TimeoutExpired, with what was sent until then; UsageError as `start`.
    """
    target, sent = f"{module}:{function}", list[bytes]()
    command = _command(target, None)
    with _results_pipe() as (read, options):
        reading = threading.Thread(target=lambda: sent.append(_read_all(read)), daemon=True)
        try:
            reading.start()
        except RuntimeError:  # no memory for a thread, or the interpreter is ending
            os.close(read)
            raise
        try:
            done = subprocess.run(
                command,
                input=question,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                timeout=TIMEOUT_S,
                check=False,
                **_start_options(target, options),
            )
            ended: BaseException | None = None
        except BaseException as error:
            ended = error
    reading.join()  # the block above has closed the other end here, and the child's has gone with it
    result = sent[0].decode("utf-8", "replace")
    if ended is not None:
        if isinstance(ended, subprocess.TimeoutExpired):
            ended.output = sent[0]
        raise ended
    return subprocess.CompletedProcess(done.args, done.returncode, result, done.stdout or "")


def results() -> int:
    """The child's side: the descriptor that its results go to. Its own children do not inherit it."""
    number = int(os.environ[_RESULTS])
    if sys.platform == "win32":
        import msvcrt

        return msvcrt.open_osfhandle(number, os.O_BINARY)
    os.set_inheritable(number, False)
    return number


def send(text: str) -> None:
    """The child's side of `ask`: its result."""
    with os.fdopen(results(), "w", encoding="utf-8") as file:
        file.write(text)


@contextmanager
def _results_pipe() -> Iterator[tuple[int, dict[str, Any]]]:
    """The end of a pipe to read from, and the options with which Popen gives its other end to a child.

    The other end is closed here when the block ends, so that the child's end of life is the end of the file. The end to read from
    belongs to the caller.
    """
    read, write = (_above_standard_streams(end) for end in os.pipe())
    try:
        if sys.platform == "win32":  # untried
            import msvcrt

            handle = msvcrt.get_osfhandle(write)
            os.set_handle_inheritable(handle, True)
            startup = subprocess.STARTUPINFO(lpAttributeList={"handle_list": [handle]})
            yield read, {"startupinfo": startup, "results": handle}
        else:
            yield read, {"pass_fds": (write,), "results": write}
    finally:
        os.close(write)


def _above_standard_streams(descriptor: int) -> int:
    """The same descriptor above 2: where a host has closed its streams, a pipe may get their numbers, which a child replaces."""
    if descriptor > 2 or sys.platform == "win32":
        return descriptor
    import fcntl

    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(descriptor)
    return moved


def _read_all(descriptor: int) -> bytes:
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def _start_options(target: str, options: dict[str, Any]) -> dict[str, Any]:
    """What every child is started with: no console window, its environment, the pipe for its results."""
    number = options.pop("results")
    if sys.platform == "win32":
        options["creationflags"] = subprocess.CREATE_NO_WINDOW
    # ggml's backtrace of an abort comes after the reason, hides it and may wait for a debugger.
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1", MARK: target, _RESULTS: str(number)}
    return {"env": environment, **options}


def _command(target: str, python: str | None) -> list[str]:
    if python is None and getattr(sys, "frozen", False):
        if not _ready:
            raise UsageError(
                "a frozen application starts itself as its engine: call qwq_lite.run_worker_if_asked() first thing in its main"
                " script, or give load(python=...)"
            )
        return [sys.executable]
    # -c and the parent's own path: with -m, a file called numpy.py in the current folder would be taken for numpy. Of what a
    # program may have put there, Python itself imports from str entries only; "" is the current folder too.
    places = [place for place in sys.path if isinstance(place, str) and place]
    places.append(str(Path(__file__).parent.parent))  # where this is, also after a change of folder
    code = f"import sys; sys.path[:] = {places!r}; from qwq_lite.system import child; child.serve({target!r})"
    return [python or sys.executable, "-c", code]
