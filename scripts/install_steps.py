"""Carry a decision out: the virtual environment, the engine with its check, the project. Only the standard library.

Every engine is loaded and computes in child processes before it is kept; one that fails is uninstalled, the reason is
printed, and the next attempt is made. What failed in a compiled engine is left out of the next build of it. pip's own
output goes to install.log in the virtual environment.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from qwq_lite.selftest.engine_check import Ended
from scripts.install_decisions import ACCELERATORS, Attempt, Decision, title, without_words
from scripts.install_engine import Examined, examine, last_line
from scripts.install_facts import STAMP, Engine, read_extra, read_stamp, shown_path, venv_python
from scripts.install_flags import build_environment
from scripts.install_index import INDEX_TIMEOUT_S, Index
from scripts.install_processes import Runner, run_process, say

LOG = "install.log"
_OLDEST_PIP = (21, 3)  # the first with editable installs of a pyproject.toml without setup.py
_MOST_BUILDS = 2  # in one run, where a build's engine fails its check: each takes minutes
_BUILD_VARIABLES = ("CMAKE_ARGS", "CC", "CXX", "CFLAGS", "CXXFLAGS")
_FROM_CACHE = re.compile(r"Using cached llama_cpp\S+\.whl")
_CAUSE = re.compile(
    r"CMake Error.*|.*\bfatal error\b.*|.*No space left on device.*|.*\berror: (?!subprocess|metadata).*"
)
_DOWNLOAD_BROKE = re.compile(r"Downloading[\s\S]*(Read timed out|timed out|IncompleteRead|Connection broken)")
_LIMPS = "since models can be loaded without the buffers that fail, and run slower"


class InstallError(Exception):
    """What stopped the installation, in one line."""


@dataclass(frozen=True)
class _Result:
    """What came of one attempt: an engine that was looked at, or the reason why there is none."""

    found: Examined
    installed: bool = False
    from_cache: bool = False  # pip had compiled it some time before


@dataclass
class Installer:
    """Where things go and how processes are run."""

    root: Path
    venv: Path
    requirement: str
    index: Index
    asked: str = "auto"
    extras: tuple[str, ...] = ()
    force: bool = False
    run: Runner = run_process
    say: Callable[[str], None] = say
    failures: list[str] = field(default_factory=list)
    _builds: int = 0
    _limping: Engine | None = None  # the engine that is there, where it fails only in what llama.cpp can go without

    def make_venv(self) -> None:
        """Make the environment if it is not there, and see to a pip that can install the project editable."""
        if not venv_python(self.venv).exists():
            self.say(f"making a virtual environment in {shown_path(self.venv)}")
            done = self.run([sys.executable, "-m", "venv", str(self.venv)], env=os.environ, log=None)
            if done.returncode != 0 or not venv_python(self.venv).exists():
                why = last_line(done.errors or done.output) or "it did not end in time"
                raise InstallError(f"{sys.executable} -m venv {self.venv} failed: {why}")
        version = self._python("-m", "pip", "--version")
        if version.returncode != 0:
            if self._python("-m", "ensurepip").returncode != 0:
                raise InstallError(
                    f"there is no pip in {self.venv} and ensurepip fails: delete that folder and run this again"
                )
            version = self._python("-m", "pip", "--version")
        numbers = re.match(r"pip (\d+)\.(\d+)", version.output)
        if numbers and (int(numbers[1]), int(numbers[2])) < _OLDEST_PIP:
            self._pip("install", "--upgrade", "pip >= 21.3")

    def look(self) -> Engine | None:
        """The engine that is in the environment and is to be kept, with what the stamp says of it."""
        if not venv_python(self.venv).exists():
            return None
        found = examine(venv_python(self.venv), self.run)
        if found.notice:
            self.say(found.notice)
        if found.engine is None:
            if not found.absent:
                self.say(f"the engine that is installed is not used: {found.reason}")
            return None
        engine = self._with_stamp(found.engine)
        if not found.reason:
            return engine
        # Nothing here builds another of an unknown kind, and what took minutes and ended so is not done at every run.
        kept = found.limps and (engine.accel not in ACCELERATORS or read_stamp(self.venv).get("limps") is True)
        then = f"it is kept, {_LIMPS}" if kept else "it is to be replaced"
        self.say(f"ATTENTION: llama-cpp-python {engine.version} is installed and {found.reason}; {then}")
        self._limping = engine if found.limps else None
        return engine if kept else None

    def _with_stamp(self, engine: Engine) -> Engine:
        stamp = read_stamp(self.venv)
        if stamp.get("version") != engine.version or stamp.get("accel") != engine.accel:
            return engine  # someone else put it there
        how, asked, extra = (str(stamp[key]) if stamp.get(key) else None for key in ("how", "asked", "extra"))
        tried, without = (_texts(stamp.get(key)) for key in ("tried", "without"))
        return replace(engine, how=how, asked=asked, extra=extra, tried=tried, without=without)

    def install_engine(self, decision: Decision) -> Engine:
        """Make the attempts in their order until one gives an engine that loads, finds its device and computes.

        Raises: InstallError with every reason when none does.
        """
        tried = tuple(attempt.label for attempt in decision.attempts)
        waiting = deque(decision.attempts)
        last: Attempt | None = None
        while waiting:
            attempt = waiting.popleft()
            if last is not None and last.accel != attempt.accel:
                if self._limping and self._limping.accel == last.accel:
                    break
                self.say(
                    f"ATTENTION: no {title(last.accel)} engine could be installed, going on with {title(attempt.accel)}"
                )
            last = attempt
            result = self._attempt(attempt)
            engine = result.found.engine
            if engine:
                engine = replace(engine, how=attempt.how, asked=self.asked, tried=tried, extra=attempt.extra)
                engine = replace(engine, without=attempt.without)
                if not result.found.reason:
                    self._write_stamp(engine, limps=False)
                    return engine
            again = self._next_build(attempt, result)
            self._drop(attempt, result)
            self._limping = engine if result.found.limps else self._limping
            if again:
                waiting.appendleft(again)
            elif result.installed:
                waiting = deque(other for other in waiting if other.family != attempt.family)
        if self._limping is None:
            raise InstallError("no engine could be installed. " + "; ".join([*self.failures, *decision.left_out]))
        self.say(
            f"ATTENTION: nothing better could be installed than an engine that fails in part; it is kept, {_LIMPS}"
        )
        self._write_stamp(self._limping, limps=True)
        return self._limping

    def _drop(self, attempt: Attempt, result: _Result) -> None:
        """Say why an attempt's engine is not used, and uninstall it. One that fails in part waits for a better one."""
        found = result.found
        self.failures.append(f"{attempt.label}: {found.reason}")
        self.say(f"  {attempt.label} is not used: {found.reason}")
        if result.from_cache:
            self.say(f"  it came from pip's cache, which keeps it: {self._pip_line('cache remove llama_cpp_python')}")
        if result.installed and not found.limps:
            self._pip("uninstall", "--yes", "llama-cpp-python")

    def _next_build(self, attempt: Attempt, result: _Result) -> Attempt | None:
        """The build that may mend what failed, or None: past pip's cache, else without what failed."""
        if not result.installed or attempt.how != "compile" or self._builds >= _MOST_BUILDS:
            return None
        if result.from_cache:
            # Compiled long ago, or in a cache that is shared with a machine whose CPU can do more.
            return replace(attempt, cached=False)
        more = tuple(each for each in result.found.suspects if each not in attempt.without)
        return replace(attempt, without=(*attempt.without, *more), cached=False) if more else None

    def _attempt(self, attempt: Attempt) -> _Result:
        done = self._wheel(attempt) if attempt.how == "wheel" else self._compile(attempt)
        if isinstance(done, str):
            return _Result(Examined(reason=done))
        self._limping = None
        # The engine that is now there satisfies this; pip only fetches what it depends on.
        needed = [f"llama-cpp-python{self.requirement}"]
        if attempt.extra:
            self.say(f"  NVIDIA's runtime libraries ({attempt.extra}), some hundreds of MB")
            needed += read_extra((self.root / "pyproject.toml").read_text(encoding="utf-8"), attempt.extra)
        depended = self._pip("install", "--only-binary", "llama-cpp-python", *needed)
        if depended.returncode:
            return _Result(Examined(reason=pip_reason(depended.output)), installed=True)
        found = examine(venv_python(self.venv), self.run, attempt.accel)
        if found.notice:
            self.say(found.notice)
        return _Result(found, installed=True, from_cache=_came_from_cache(attempt, done))

    def _wheel(self, attempt: Attempt) -> Ended | str:
        name = attempt.name or attempt.accel
        absent = self.index.absent(name, self.requirement)
        if absent:
            return absent
        self.say(f"asking {self.index.page(name)} for a wheel")
        # Only this page: --no-index keeps pip from asking the user's own indexes, which have no wheel to offer.
        where = ("--no-index", "--find-links", self.index.page(name), "--only-binary", ":all:")
        patience = ("--retries", "0", "--timeout", str(INDEX_TIMEOUT_S))
        install = ("install", "--no-deps", "--force-reinstall", *where)
        done = self._pip(*install, *patience, f"llama-cpp-python{self.requirement}")
        if done.returncode and _DOWNLOAD_BROKE.search(done.output):
            # The index answered, so the line is slow: a large file deserves more patience than a silent server.
            done = self._pip(*install, "--retries", "3", "--timeout", "30", f"llama-cpp-python{self.requirement}")
        if done.returncode:
            return self.index.explain(name, pip_reason(done.output))
        return done

    def _compile(self, attempt: Attempt) -> Ended | str:
        env = build_environment(os.environ, attempt.cmake_args, attempt.without)
        options: tuple[str, ...] = ()
        if not attempt.cached or any(os.environ.get(name) for name in _BUILD_VARIABLES):
            # pip's cache does not know what an engine was built with: it would hand out one built for something else.
            options = ("--no-cache-dir", "--no-binary", "llama-cpp-python")
        note = "unless pip has it in its cache" if not options else f"details in {shown_path(self.venv / LOG)}"
        what = title(attempt.accel) + without_words(attempt.without)
        self.say(f"compiling llama-cpp-python for {what}: {attempt.duration}, {note}")
        arguments = ("install", "--no-deps", "--force-reinstall", *options, f"llama-cpp-python{self.requirement}")
        done = self._pip(*arguments, env=env)
        self._builds += not _came_from_cache(attempt, done)
        return pip_reason(done.output) if done.returncode else done

    def install_project(self, engine: Engine) -> None:
        """The project, editable, with its extras. The engine satisfies it already, and pip may not build another."""
        stamp = read_stamp(self.venv)
        # Extras of earlier runs stay: `make demo` after `make test` takes nothing away.
        wanted = sorted({*_texts(stamp.get("extras")), *self.extras})
        pyproject = (self.root / "pyproject.toml").read_bytes()
        state = {"extras": wanted, "for": engine.extra, "pyproject": hashlib.sha256(pyproject).hexdigest()}
        command = venv_python(self.venv).with_name("qwq-lite.exe" if sys.platform == "win32" else "qwq-lite")
        if not self.force and command.exists() and all(stamp.get(key) == value for key, value in state.items()):
            return
        extras = [*wanted, engine.extra] if engine.extra else wanted
        what = f"{self.root}[{','.join(extras)}]" if extras else str(self.root)
        self.say("installing qwq-lite" + (f" with {', '.join(extras)}" if extras else ""))
        done = self._pip("install", "--only-binary", "llama-cpp-python", "--editable", what)
        if done.returncode:
            raise InstallError(
                f"qwq-lite could not be installed: {pip_reason(done.output)} (details in {shown_path(self.venv / LOG)})"
            )
        self._write_stamp(engine, **state)

    def _write_stamp(self, engine: Engine, **more: object) -> None:
        stamp = {**read_stamp(self.venv), **more, "version": engine.version, "accel": engine.accel}
        stamp |= {"how": engine.how, "asked": engine.asked, "tried": list(engine.tried), "extra": engine.extra}
        stamp["without"] = list(engine.without)
        (self.venv / STAMP).write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")

    def _pip(self, *arguments: str, env: Mapping[str, str] = os.environ) -> Ended:
        pip = [str(venv_python(self.venv)), "-m", "pip", "--disable-pip-version-check", "--no-input"]
        return self.run([*pip, *arguments], env=env, log=self.venv / LOG)

    def _python(self, *arguments: str) -> Ended:
        return self.run([str(venv_python(self.venv)), *arguments], env=os.environ, log=None)

    def _pip_line(self, arguments: str) -> str:
        return f"{shown_path(venv_python(self.venv))} -m pip {arguments}"


def _came_from_cache(attempt: Attempt, done: Ended) -> bool:
    return attempt.how == "compile" and attempt.cached and _FROM_CACHE.search(done.output) is not None


def carry_out(decision: Decision, installer: Installer, present: Engine | None) -> str:
    """Do what was decided. Returns the line to end with. Raises: InstallError, one line."""
    if decision.fatal:
        raise InstallError(decision.fatal)
    installer.make_venv()
    if decision.keep and present is not None:
        installer.say(decision.keep)
        engine = present
    else:
        engine = installer.install_engine(decision)
    if engine.integrated_only:
        installer.say("the only GPU shares the system's memory: it may be no faster than --accel cpu --force")
    installer.install_project(engine)
    folder = "Scripts\\" if sys.platform == "win32" else "bin/"
    found = f"{len(engine.devices)} device{'s'[: len(engine.devices) != 1]} ({', '.join(engine.devices)})"
    what = title("cpu") if engine.accel == "cpu" else f"{title(engine.accel)}, {found}"
    what += without_words(engine.without)
    doctor = f"{shown_path(installer.venv)}{os.sep}{folder}qwq-lite doctor"
    return f"qwq-lite is installed with llama-cpp-python {engine.version} for {what}; next: {doctor}"


def pip_reason(output: str) -> str:
    """The line of pip's output that says what went wrong: the compiler's own words before pip's summary."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    causes = [line for line in lines if _CAUSE.fullmatch(line) and not line.startswith("error: ")]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    errors = [line for line in errors if line != "Exception:"]  # a traceback follows, its last line is the reason
    return (causes or errors[-1:] or lines[-1:] or ["pip said nothing"])[0]


def _texts(value: object) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else ()
