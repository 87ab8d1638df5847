"""Look at the engine of a virtual environment, in child processes: whether it loads, finds its devices, and computes.

A build that uses instructions this CPU lacks, or whose libraries are missing, ends such a child and not the installer.
Products are checked by qwq_lite's own file (selftest/engine_check.py), which `doctor` and `load` use as well.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

from qwq_lite.selftest import engine_check
from qwq_lite.selftest.engine_check import Ended, Report
from scripts.install_decisions import title
from scripts.install_facts import Engine
from scripts.install_flags import NATIVE, suspects
from scripts.install_processes import CHECK_TIMEOUT_S, Runner

LOADING = Path(__file__).with_name("install_check.py")
COMPUTING = engine_check.CHILD
_ILLEGAL_WINDOWS = 0xC000001D  # STATUS_ILLEGAL_INSTRUCTION
_ILLEGAL = "this build uses CPU instructions that this CPU lacks"
_ABSENT = "No module named 'llama_cpp'"


@dataclass(frozen=True)
class Examined:
    """What came of looking at an engine."""

    engine: Engine | None = None  # one that loads
    reason: str = ""  # why it is not to be used; empty where nothing speaks against it
    report: Report = field(default_factory=Report)

    @property
    def absent(self) -> bool:
        return _ABSENT in self.reason

    @property
    def limps(self) -> bool:
        """Whether it fails only where llama.cpp can go without: models load, and run slower."""
        return bool(self.reason) and self.report.extra_buffers_only

    @property
    def suspects(self) -> tuple[str, ...]:
        """What a next build should do without."""
        return (NATIVE,) if self.reason == _ILLEGAL else suspects(self.report.faults)

    @property
    def notice(self) -> str:
        """What could not be checked. It says nothing against the engine."""
        unsaid = self.report.could_not_run or ("" if self.report.fails else self.report.text())
        return f"the engine loads, and whether it computes could not be checked: {unsaid}" if unsaid else ""


def examine(python: Path, run: Runner, accel: str | None = None) -> Examined:
    """Load the engine, and let it compute one product for each device, buffer and type.

    accel: what it must find a device for; None where any will do.
    """

    def start(script: Path, *arguments: str) -> Ended:
        return run([str(python), "-I", str(script), *arguments], env=os.environ, log=None)

    engine = read_check(start(LOADING))
    if isinstance(engine, str):
        return Examined(reason=engine)
    if accel is not None and accel not in ("cpu", engine.accel):
        return Examined(engine, f"it loads and finds no device for {title(accel)}")
    report = engine_check.check(
        lambda arguments, _timeout_s: start(COMPUTING, *arguments), gpu=bool(engine.devices), timeout_s=CHECK_TIMEOUT_S
    )
    return Examined(engine, f"it fails its check: {report.text()}" if report.fails else "", report)


def read_check(done: Ended) -> Engine | str:
    """What install_check printed, or how it died, in words."""
    died = _death(done.returncode)
    if died:
        return died
    try:
        found = json.loads(last_line(done.output))
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


def _death(returncode: int | None) -> str | None:
    if returncode is None:
        return f"it did not answer within {CHECK_TIMEOUT_S} s"
    illegal = returncode == -signal.SIGILL or returncode & 0xFFFFFFFF == _ILLEGAL_WINDOWS
    if illegal:
        return _ILLEGAL
    if returncode < 0:
        return f"loading it ended by signal {-returncode}"
    return f"loading it ended with status {returncode & 0xFFFFFFFF:#x}" if returncode > 255 else None


def last_line(output: str) -> str:
    lines = output.strip().splitlines()
    return lines[-1] if lines else ""
