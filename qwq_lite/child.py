"""How code of this package is started in a process of its own, from a script, a notebook or a frozen application.

What ends such a child does not end who started it. Nothing of the caller is imported there.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import subprocess
import sys

from qwq_lite import windows_job
from qwq_lite.errors import UsageError

# How a process ends that meets an instruction its CPU lacks, or a wrongly compiled one: SIGILL, STATUS_ILLEGAL_INSTRUCTION.
ILLEGAL_INSTRUCTION = (-int(getattr(signal, "SIGILL", 4)), 0xC000001D, 0xC000001D - (1 << 32))
MARK = "QWQ_LITE_WORKER"  # in a child's environment: what it is to run, as module:function
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


def start(target: str, python: str | None = None) -> subprocess.Popen[bytes]:
    """Start `module:function` of this package in a child, behind three unbuffered pipes and without a window.

    Raises: UsageError in a frozen application that never called `run_worker_if_asked`: it would only open itself once more.
    """
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        _command(target, python),
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        bufsize=0,
        creationflags=_hidden(),
        env=_environment(target),
    )
    if sys.platform == "win32":
        windows_job.tie(int(process._handle))  # type: ignore[attr-defined] # Popen keeps it so
    return process


def ask(module: str, function: str, question: str = "") -> subprocess.CompletedProcess[str]:
    """Call `module.function()` in a child, with `question` on its standard input, and wait for its end.

    Raises: subprocess.TimeoutExpired; UsageError as `start`.
    """
    target = f"{module}:{function}"
    return subprocess.run(
        _command(target, None),
        input=question,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=TIMEOUT_S,
        check=False,
        creationflags=_hidden(),
        env=_environment(target),
    )


def _hidden() -> int:
    """Creation flags of a child that opens no console window."""
    if sys.platform == "win32":
        return subprocess.CREATE_NO_WINDOW
    return 0


def _command(target: str, python: str | None) -> list[str]:
    if python is None and getattr(sys, "frozen", False):
        if not _ready:
            raise UsageError(
                "a frozen application starts itself as its engine: call qwq_lite.run_worker_if_asked() first thing in its main"
                " script, or give load(python=...)"
            )
        return [sys.executable]
    # -c and the parent's own path: with -m, a file called numpy.py in the current folder would be taken for numpy.
    places = [place for place in sys.path if place]  # "" is the current folder too
    code = f"import sys; sys.path[:] = {places!r}; from qwq_lite import child; child.serve({target!r})"
    return [python or sys.executable, "-c", code]


def _environment(target: str) -> dict[str, str]:
    # ggml's backtrace of an abort comes after the reason, hides it and may wait for a debugger.
    return {**os.environ, "GGML_NO_BACKTRACE": "1", MARK: target}
