"""The exception for an engine's process that ended: its signal or exit status, and out of memory where that is known."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

from qwq_lite.errors import EngineCrashed
from qwq_lite.system import child, process_limits, running_engines
from qwq_lite.system.units import GIB
from qwq_lite.worker.crashed_request import ANOTHER


def crash_error(
    file: Path, pid: int, code: int, reason: str, said: str, *, ran_out_of_memory: bool = False
) -> EngineCrashed:
    """The exception for a process that is gone; its engine is taken off the list of those that run.

    Args:
        code: its exit status, -N for signal N.
        reason: why this program ended it, "" where it did not.
        said: its last line.
        ran_out_of_memory: the kernel has killed a process for lack of memory meanwhile.
    """
    name = ""
    if code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
    ended = reason or (f"it was killed ({name or -code})" if code < 0 else f"it ended with exit status {code}")
    lost = running_engines.forget(pid)
    if name == "SIGKILL" and not reason and ran_out_of_memory:
        ended += ", out of memory"
        if lost is not None:
            free = process_limits.available_memory_bytes()
            ended += f" (it needs {lost.n_bytes / GIB:.1f} GiB, {free / GIB:.1f} are free without it)"
    # Another would die of it too: its kernels were built for another CPU, or wrongly.
    advice = "; run: qwq-lite doctor" if code in child.ILLEGAL_INSTRUCTION else ANOTHER
    crash = EngineCrashed(f"{file}: the engine's process is gone: {ended}{f': {said}' if said else ''}{advice}")
    crash.signal = name
    return crash
