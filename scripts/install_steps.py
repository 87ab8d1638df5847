"""Carry a decision out: the virtual environment, the engine with its check, the project. Only the standard library.

Every engine is loaded in a child process before it is kept; one that fails is uninstalled, the reason is printed, and
the next attempt is made. pip's own output goes to install.log in the virtual environment. Everything that starts a
process goes through one `Runner`, which tests replace.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Protocol

from scripts.install_decisions import Attempt, Decision, title
from scripts.install_facts import STAMP, Engine, read_extra, read_stamp, shown_path, venv_python
from scripts.install_index import INDEX_TIMEOUT_S, Index

LOG = "install.log"
_CHECK = Path(__file__).with_name("install_check.py")
_CHECK_TIMEOUT_S = 180  # a CUDA driver can take its time at the first start
_ILLEGAL_WINDOWS = 0xC000001D  # STATUS_ILLEGAL_INSTRUCTION
_OLDEST_PIP = (21, 3)  # the first with editable installs of a pyproject.toml without setup.py
_SHOWN = re.compile(r"\s*(Downloading \S+ \(\S+ [MG]B|Building wheel.*(started|still running)|Using cached llama)")
_FROM_CACHE = re.compile(r"Using cached llama_cpp\S+\.whl")
_CAUSE = re.compile(
    r"CMake Error.*|.*\bfatal error\b.*|.*No space left on device.*|.*\berror: (?!subprocess|metadata).*"
)
_DOWNLOAD_BROKE = re.compile(r"Downloading[\s\S]*(Read timed out|timed out|IncompleteRead|Connection broken)")


class InstallError(Exception):
    """What stopped the installation, in one line."""


@dataclass(frozen=True)
class Finished:
    """A process that ended. Where its output went to a log, `output` holds both streams, in their order."""

    returncode: int
    output: str
    errors: str = ""


class Runner(Protocol):
    def __call__(self, command: Sequence[str], *, env: Mapping[str, str], log: Path | None) -> Finished: ...


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_process(command: Sequence[str], *, env: Mapping[str, str], log: Path | None) -> Finished:
    """Run to the end. With `log`, everything goes there and the lines that show progress to the terminal too.

    Without it nothing is shown, and the process is ended after three minutes.
    """
    if log is None:
        try:
            done = subprocess.run(
                command,
                env=dict(env),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_CHECK_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Finished(1, json.dumps({"error": f"it did not answer within {_CHECK_TIMEOUT_S} s"}))
        return Finished(done.returncode, done.stdout, done.stderr)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        with subprocess.Popen(
            command, env=dict(env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process:
            assert process.stdout is not None
            output = _follow(process.stdout, file)
    return Finished(process.returncode, output)


def _follow(lines: IO[str], log: IO[str]) -> str:
    kept = []
    for line in lines:
        log.write(line)
        log.flush()
        kept.append(line)
        if _SHOWN.match(line):
            say(f"  {line.strip()}")
    return "".join(kept)


@dataclass(frozen=True)
class _Result:
    """What came of one attempt: an engine, or a reason."""

    engine: Engine | None = None
    reason: str = ""
    installed: bool = False  # it was there and failed its check
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

    def make_venv(self) -> None:
        """Make the environment if it is not there, and see to a pip that can install the project editable."""
        if not venv_python(self.venv).exists():
            self.say(f"making a virtual environment in {shown_path(self.venv)}")
            done = self.run([sys.executable, "-m", "venv", str(self.venv)], env=os.environ, log=None)
            if done.returncode or not venv_python(self.venv).exists():
                raise InstallError(
                    f"{sys.executable} -m venv {self.venv} failed: {_last_line(done.errors or done.output)}"
                )
        version = self._python("-m", "pip", "--version")
        if version.returncode:
            if self._python("-m", "ensurepip").returncode:
                raise InstallError(
                    f"there is no pip in {self.venv} and ensurepip fails: delete that folder and run this again"
                )
            version = self._python("-m", "pip", "--version")
        numbers = re.match(r"pip (\d+)\.(\d+)", version.output)
        if numbers and (int(numbers[1]), int(numbers[2])) < _OLDEST_PIP:
            self._pip("install", "--upgrade", "pip >= 21.3")

    def look(self) -> Engine | None:
        """The engine that is in the environment and loads, with what the stamp says of it."""
        if not venv_python(self.venv).exists():
            return None
        engine = self.check()
        if isinstance(engine, str):
            return None
        stamp = read_stamp(self.venv)
        if stamp.get("version") != engine.version or stamp.get("accel") != engine.accel:
            return engine  # someone else put it there
        how, asked, extra = (str(stamp[key]) if stamp.get(key) else None for key in ("how", "asked", "extra"))
        return replace(engine, how=how, asked=asked, extra=extra, tried=_texts(stamp.get("tried")))

    def check(self) -> Engine | str:
        """Load the engine in a child process: what it found, or why it cannot be used."""
        return read_check(self._python("-I", str(_CHECK)))

    def install_engine(self, decision: Decision) -> Engine:
        """Make the attempts in their order until one gives an engine that loads and finds its device.

        Raises: InstallError with every reason when none does.
        """
        tried = tuple(attempt.label for attempt in decision.attempts)
        waiting = deque(decision.attempts)
        failed: set[tuple[str, str, str]] = set()
        last: Attempt | None = None
        while waiting:
            attempt = waiting.popleft()
            if attempt.family in failed:
                continue
            if last is not None and last.accel != attempt.accel:
                self.say(
                    f"ATTENTION: no {title(last.accel)} engine could be installed, going on with {title(attempt.accel)}"
                )
            last = attempt
            result = self._attempt(attempt)
            if result.engine:
                engine = replace(result.engine, how=attempt.how, asked=self.asked, tried=tried, extra=attempt.extra)
                self._write_stamp(engine)
                return engine
            self.failures.append(f"{attempt.label}: {result.reason}")
            self.say(f"  {attempt.label} is not used: {result.reason}")
            if result.from_cache:
                # Compiled long ago, or in a cache that is shared with a machine whose CPU can do more.
                waiting.appendleft(replace(attempt, cached=False))
            elif result.installed:
                failed.add(attempt.family)
        raise InstallError("no engine could be installed. " + "; ".join([*self.failures, *decision.left_out]))

    def _attempt(self, attempt: Attempt) -> _Result:
        done = self._wheel(attempt) if attempt.how == "wheel" else self._compile(attempt)
        if isinstance(done, str):
            return _Result(reason=done)
        # The engine that is now there satisfies this; pip only fetches what it depends on.
        needed = [f"llama-cpp-python{self.requirement}"]
        if attempt.extra:
            self.say(f"  NVIDIA's runtime libraries ({attempt.extra}), some hundreds of MB")
            needed += read_extra((self.root / "pyproject.toml").read_text(encoding="utf-8"), attempt.extra)
        depended = self._pip("install", "--only-binary", "llama-cpp-python", *needed)
        outcome = pip_reason(depended.output) if depended.returncode else self.check()
        if isinstance(outcome, Engine) and attempt.accel not in ("cpu", outcome.accel):
            outcome = f"it loads and finds no device for {title(attempt.accel)}"
        if isinstance(outcome, Engine):
            return _Result(outcome)
        self._pip("uninstall", "--yes", "llama-cpp-python")
        from_cache = attempt.cached and _FROM_CACHE.search(done.output) is not None
        return _Result(reason=outcome, installed=True, from_cache=from_cache)

    def _wheel(self, attempt: Attempt) -> Finished | str:
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

    def _compile(self, attempt: Attempt) -> Finished | str:
        mine = os.environ.get("CMAKE_ARGS", "")
        env = {**os.environ, "CMAKE_ARGS": f"{mine} {attempt.cmake_args}".strip()}
        options: tuple[str, ...] = ()
        if not attempt.cached or mine:
            # pip's cache does not know CMAKE_ARGS: it would hand out an engine built for something else.
            options = ("--no-cache-dir", "--no-binary", "llama-cpp-python")
        note = "unless pip has it in its cache" if not options else f"details in {shown_path(self.venv / LOG)}"
        self.say(f"compiling llama-cpp-python for {title(attempt.accel)}: {attempt.duration}, {note}")
        arguments = ("install", "--no-deps", "--force-reinstall", *options, f"llama-cpp-python{self.requirement}")
        done = self._pip(*arguments, env=env)
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
        (self.venv / STAMP).write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")

    def _pip(self, *arguments: str, env: Mapping[str, str] = os.environ) -> Finished:
        pip = [str(venv_python(self.venv)), "-m", "pip", "--disable-pip-version-check", "--no-input"]
        return self.run([*pip, *arguments], env=env, log=self.venv / LOG)

    def _python(self, *arguments: str) -> Finished:
        return self.run([str(venv_python(self.venv)), *arguments], env=os.environ, log=None)


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
    doctor = f"{shown_path(installer.venv)}{os.sep}{folder}qwq-lite doctor"
    return f"qwq-lite is installed with llama-cpp-python {engine.version} for {what}; next: {doctor}"


def read_check(done: Finished) -> Engine | str:
    """What install_check printed, or how it died, in words."""
    died = _death(done.returncode)
    if died:
        return died
    try:
        found = json.loads(_last_line(done.output))
    except ValueError:
        return f"the check ended with status {done.returncode} and said nothing"
    if "error" in found:
        return " ".join(str(found["error"]).split())
    devices = [device for device in found["devices"] if device["kind"] in ("gpu", "igpu")]
    backend = devices[0]["backend"].lower() if devices else "cpu"
    accel = "metal" if backend == "mtl" else backend
    return Engine(
        version=found["version"],
        accel=accel,
        devices=tuple(device["description"] for device in devices),
        integrated_only=accel == "vulkan" and all(device["kind"] == "igpu" for device in devices),
    )


def _death(returncode: int) -> str | None:
    illegal = returncode == -signal.SIGILL or returncode & 0xFFFFFFFF == _ILLEGAL_WINDOWS
    if illegal:
        return "this build uses CPU instructions that this CPU lacks"
    if returncode < 0:
        return f"loading it ended by signal {-returncode}"
    return f"loading it ended with status {returncode & 0xFFFFFFFF:#x}" if returncode > 255 else None


def pip_reason(output: str) -> str:
    """The line of pip's output that says what went wrong: the compiler's own words before pip's summary."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    causes = [line for line in lines if _CAUSE.fullmatch(line) and not line.startswith("error: ")]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    errors = [line for line in errors if line != "Exception:"]  # a traceback follows, its last line is the reason
    return (causes or errors[-1:] or lines[-1:] or ["pip said nothing"])[0]


def _texts(value: object) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else ()


def _last_line(output: str) -> str:
    lines = output.strip().splitlines()
    return lines[-1] if lines else ""
