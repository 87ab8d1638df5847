"""Finds what is wrong with an installation, and the command that fixes it. Pure but for `look`.

Knows no terminal: `cli.doctor` prints it, and `cli.chat` warns of the part that costs a user hours.
"""

from __future__ import annotations

import platform
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwq_lite.backend.hardware import EngineReport
from qwq_lite.selftest.engine_check import Report
from qwq_lite.system.cpu import SPEED_FEATURES, cpu_features, translated_by_rosetta

Level = Literal["error", "warning"]

_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD"}
_ACCEL = {"NVIDIA": "cuda", "AMD": "vulkan", "Apple": "metal"}
_INSTALL = "python scripts/install.py"
_MIN_DISK_BYTES = 20_000_000_000  # QwQ-32B as Q4_K_M


@dataclass(frozen=True)
class HostHardware:
    """What the machine has, whatever the engine can do with it. gpus: vendors; cpu_features: as /proc/cpuinfo has them."""

    gpus: tuple[str, ...]
    cpu_features: frozenset[str]
    free_disk_bytes: int
    rosetta: bool = False


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. command mends it."""

    level: Level
    text: str
    command: str


def findings(
    machine: HostHardware, engine: EngineReport | None, failure: str = "", check: Report | None = None
) -> list[Finding]:
    """What is wrong, worst first.

    engine: None where it did not load, for the reason in `failure`. check: what became of its matrix products.
    """
    if engine is None:
        text, *command = re.split(r"[;,] (?:or )?run: ", failure, maxsplit=1)
        return [Finding("error", text, command[0] if command else "python scripts/install.py --force")]
    found = [*unusable_gpu(machine, engine), *(_wrong_products(check) if check else ())]
    missing = [
        name for name, flag in SPEED_FEATURES.items() if flag in machine.cpu_features and name not in engine.features
    ]
    if missing:
        text = f"llama.cpp was built without {', '.join(missing)}, which this CPU has: layers on the CPU run several times slower"
        found.append(Finding("warning", text, f"python scripts/install.py --accel {_accel(engine)} --compile --force"))
    if machine.rosetta:
        found.append(
            Finding(
                "error",
                "this Python runs under Rosetta, without the Apple GPU",
                "arch -arm64 python3 scripts/install.py",
            )
        )
    if machine.free_disk_bytes < _MIN_DISK_BYTES:
        text = f"{machine.free_disk_bytes / 1e9:.1f} GB are free here; QwQ-32B as Q4_K_M needs 19.9 GB"
        found.append(Finding("warning", text, "change to a folder on a larger disk"))
    return sorted(found, key=lambda finding: finding.level != "error")


def unusable_gpu(machine: HostHardware, engine: EngineReport) -> Sequence[Finding]:
    """The GPU that is there and does nothing: the most expensive thing to miss."""
    if not machine.gpus or engine.gpus:
        return []
    vendor = machine.gpus[0]
    reason = (
        "llama.cpp was built without GPU support"
        if not engine.offload
        else "llama.cpp finds no GPU: driver or runtime is missing"
    )
    return [
        Finding(
            "error",
            f"the {vendor} GPU of this machine is NOT used: {reason}; answers come 10 to 50 times slower",
            f"python scripts/install.py --accel {_ACCEL.get(vendor, 'vulkan')} --force",
        )
    ]


def _wrong_products(check: Report) -> Iterator[Finding]:
    """An engine that loads and does not compute."""
    if check.faults and not check.fails:
        text = (
            f"no result of a matrix product within its time: {check.text()}; another program may keep this machine busy"
        )
        yield Finding("warning", text, "qwq-lite doctor")
    elif check.faults:
        consequence = (
            "loads go without that buffer, slower" if check.extra_buffers_only else "no answer of it can be trusted"
        )
        yield Finding("error", f"llama.cpp does not compute: {check.text()}; {consequence}", _INSTALL)
    if check.could_not_run:
        yield Finding("warning", f"whether llama.cpp computes could not be checked: {check.could_not_run}", _INSTALL)


def _accel(engine: EngineReport) -> str:
    names = " ".join(device.name.lower() for device in engine.gpus)
    return next((accel for accel in ("cuda", "vulkan", "metal") if accel in names), "cpu")


def look(folder: Path) -> HostHardware:
    """The machine at hand; cheap enough for the start of every chat. No program is run."""
    return HostHardware(_gpus(), cpu_features(), shutil.disk_usage(folder).free, translated_by_rosetta())


def _gpus() -> tuple[str, ...]:
    if sys.platform == "darwin":
        return ("Apple",) if platform.machine() == "arm64" else ()
    if sys.platform == "win32":
        return ("NVIDIA",) if Path(r"C:\Windows\System32\nvcuda.dll").exists() else ()
    found = set()
    for device in Path("/sys/bus/pci/devices").glob("*"):
        try:
            display = (device / "class").read_text().startswith("0x03")
            vendor = (device / "vendor").read_text().strip()
        except OSError:
            continue
        if display and vendor in _VENDORS:
            found.add(_VENDORS[vendor])
    return tuple(sorted(found, reverse=True))  # NVIDIA first: beside it, AMD is most often the processor's own
