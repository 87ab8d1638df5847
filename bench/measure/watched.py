"""A command in a child, watched: wall time, CPU seconds, the most anonymous memory, and the files that it makes.

Anonymous memory is RssAnon, looked at every 40 ms, of the command and of what it starts; Linux alone tells it. Files are what
appears in the folder of its output and in its folder for temporary files, which is its own and empty, and on Linux what it
holds open for writing, wherever that lies and whether or not it has a name. Knows no converter.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

LINUX = sys.platform.startswith("linux")
_STEP_S = 0.04  # a look takes 0.1 ms
_MORE_EVERY = 8  # steps; open files and children take longer to list than the rest
_STANDARD = frozenset(("0", "1", "2"))  # the child's own streams, which lead to the bench


class CommandFailed(Exception):
    """The command ended with another status than 0. Holds the command and the end of what it said."""


@dataclass(frozen=True)
class Run:
    """cpu_s: user and system, of the command and of what it waited for. anonymous_mb: None where the system does not say.

    start_s: until the first file appeared in the output's folder. files: names that appeared or were written.
    """

    wall_s: float
    cpu_s: float
    anonymous_mb: float | None
    start_s: float | None
    files: frozenset[str]
    said: str


@dataclass
class _Watch:
    """What was seen so far of one child."""

    pid: int
    folders: Sequence[Path]
    begin: float = field(default_factory=time.perf_counter)
    anonymous_kb: int = 0
    start_s: float | None = None
    cpu_s: float = 0.0
    files: set[str] = field(default_factory=set)
    family: list[int] = field(default_factory=list)
    steps: int = 0

    def look(self) -> None:
        names = {entry.name for folder in self.folders for entry in os.scandir(folder)}
        if names and self.start_s is None:
            self.start_s = time.perf_counter() - self.begin
        self.files |= names
        with contextlib.suppress(OSError, psutil.Error):  # it has just ended
            if LINUX:
                if self.steps % _MORE_EVERY == 0:
                    self.family = _family(self.pid)
                    self.files |= _written(self.pid)
                self.anonymous_kb = max(self.anonymous_kb, sum(map(_anonymous_kb, self.family)))
            if not hasattr(os, "wait4"):
                times = psutil.Process(self.pid).cpu_times()
                self.cpu_s = times.user + times.system
        self.steps += 1


def run(command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> Run:
    """Run a command that writes into `folder`, which holds nothing else, and wait for it.

    Raises: CommandFailed.
    """
    with (
        tempfile.TemporaryDirectory(prefix="qwq-lite-watched-") as room,
        tempfile.TemporaryFile() as said,
    ):
        temporary = dict.fromkeys(("TMPDIR", "TMP", "TEMP"), room)
        begin = time.perf_counter()
        child = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {}), **temporary},
        )
        watch = _Watch(child.pid, (folder, Path(room)), begin)
        try:
            cpu_s = _wait(child, watch)
        finally:
            if child.returncode is None:
                child.kill()
                child.wait()
        wall_s = time.perf_counter() - begin
        said.seek(0)
        text = said.read().decode("utf-8", "replace")
    if child.returncode:
        raise CommandFailed(f"{' '.join(command)} ended with {child.returncode}: {text[-2000:]}")
    anonymous_mb = watch.anonymous_kb * 1024 / 1e6 if LINUX else None
    return Run(wall_s, cpu_s, anonymous_mb, watch.start_s, frozenset(watch.files), text)


def _wait(child: subprocess.Popen[bytes], watch: _Watch) -> float:
    """Look until the child ends; its CPU seconds."""
    while True:
        watch.look()
        if hasattr(os, "wait4"):
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                child.returncode = os.waitstatus_to_exitcode(status)
                return usage.ru_utime + usage.ru_stime
        elif child.poll() is not None:
            return watch.cpu_s  # of the last look: Windows forgets a process's times with its handle
        time.sleep(_STEP_S)


def _family(pid: int) -> list[int]:
    """The process and its children. Source: Linux proc(5), children"""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a kernel without the file, or a thread that has ended
            found += map(int, (task / "children").read_text().split())
    return found


def _anonymous_kb(pid: int) -> int:
    """Source: Linux proc(5), status"""
    try:
        with Path(f"/proc/{pid}/status").open("rb", buffering=0) as file:
            _, found, rest = file.read(4096).partition(b"RssAnon:")
    except FileNotFoundError:  # a child that has ended since it was found
        return 0
    return int(rest.split(maxsplit=1)[0]) if found else 0  # a zombie has no memory


def _written(pid: int) -> set[str]:
    """Names of files that the process holds open for writing, nameless ones too. Source: Linux proc(5), fd and fdinfo"""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            target = str(link.readlink())
            if link.name in _STANDARD or not target.startswith("/") or target.startswith("/dev/"):
                continue
            flags = Path(f"/proc/{pid}/fdinfo/{link.name}").read_text().split("flags:")[1].split()[0]
            if int(flags, 8) & (os.O_WRONLY | os.O_RDWR):
                found.add(Path(target).name)
    return found
