"""The engines that run on this machine and the memory that each holds, for messages about too little memory.

One small file for each, in the user's own state folder, named after its process and machine (homes may be shared by several). A
file whose process is gone, or whose number another process has now, counts for nothing and is deleted by who reads it.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import psutil

from qwq_lite.system import child
from qwq_lite.system.units import GIB

_SUFFIX = ".engine.json"
_NUMBERS = itertools.count(1)
_SAME_S = 1.0  # two readings of when a process began differ by less


@dataclass(frozen=True)
class RunningEngine:
    """A loaded model."""

    pid: int  # of the process that holds it
    application: str  # that loaded it
    model: str
    n_bytes: int  # of its plan, GPUs included

    def line(self) -> str:
        return f"{self.application} (process {self.pid}) holds {self.n_bytes / GIB:.1f} GiB for {self.model}"


def register(model: Path, n_bytes: int) -> Callable[[], None]:
    """Enter this process's engine; what is returned takes it out again. Never raises, also not where nothing can be written."""
    process = psutil.Process()
    path = folder() / f"{process.pid}-{next(_NUMBERS)}{_here()}"
    with contextlib.suppress(OSError, psutil.Error):
        entry = {
            "pid": process.pid,
            "started": process.create_time(),
            "application": _application(process.parent() if child.is_child() else process),
            "model": model.name,
            "n_bytes": n_bytes,
        }
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, made = tempfile.mkstemp(dir=path.parent)  # for its owner only, and whole when it has its name
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(entry, file)
            Path(made).replace(path)
        except OSError:
            Path(made).unlink()

    def leave() -> None:
        with contextlib.suppress(OSError):
            path.unlink()

    return leave


def running() -> list[RunningEngine]:
    """Engines that hold memory now, the largest first."""
    found = []
    with contextlib.suppress(OSError):
        for path in sorted(folder().glob(f"*{glob.escape(_here())}")):
            with contextlib.suppress(OSError):
                entry = _read(path)
                if entry is None:
                    path.unlink()
                else:
                    found.append(entry)
    return sorted(found, key=lambda entry: -entry.n_bytes)


def forget(pid: int) -> RunningEngine | None:
    """Take out the engine of a process that has died, and return what it was."""
    found = None
    with contextlib.suppress(OSError):
        for path in folder().glob(f"{pid}-*{glob.escape(_here())}"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
                found = _entry(json.loads(path.read_text("utf-8")))
                path.unlink()
    return found


def _here() -> str:
    """How names of this machine's entries end: homes may be shared by several."""
    return f"@{platform.node()}{_SUFFIX}"


def folder() -> Path:
    return platformdirs.user_state_path("qwq-lite", appauthor=False) / "engines"


def _read(path: Path) -> RunningEngine | None:
    """What a file says; None where its process is gone, or it says nothing."""
    try:
        entry = json.loads(path.read_text("utf-8"))
        process = psutil.Process(int(entry["pid"]))
        if abs(process.create_time() - float(entry["started"])) > _SAME_S or process.status() == psutil.STATUS_ZOMBIE:
            return None
        return _entry(entry)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, psutil.Error):
        return None


def _entry(data: dict[str, Any]) -> RunningEngine:
    return RunningEngine(int(data["pid"]), str(data["application"]), str(data["model"]), int(data["n_bytes"]))


def _application(process: psutil.Process | None) -> str:
    """A program's name: its script's where an interpreter runs one."""
    if process is None:
        return "a program that has ended"
    name = process.name()
    words = process.cmdline()[1:]
    if name.lower().startswith("python") and words and words[0] != "-c":
        script = next((word for word in words if not word.startswith("-")), "")
        return Path(script).name or name
    return str(name)
