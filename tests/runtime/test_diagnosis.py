"""diagnosis: every thing that is wrong is found, and comes with the command that mends it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from qwq_lite.backend import devices
from qwq_lite.backend.hardware import Device, EngineReport
from qwq_lite.cli import diagnosis
from qwq_lite.cli.diagnosis import HostHardware, findings
from qwq_lite.errors import EngineError

CPU = Device("CPU", "a processor", "cpu", 32 << 30, 32 << 30)
GPU = Device("CUDA0", "NVIDIA GeForce", "gpu", 24 << 30, 23 << 30)
ENGINE = EngineReport("b1", True, (GPU, CPU), ("AVX2", "FMA", "F16C"))
CPU_ENGINE = EngineReport("b1", False, (CPU,), ("AVX2", "FMA", "F16C"))
MACHINE = HostHardware(("NVIDIA",), frozenset({"avx2", "fma", "f16c"}), 100_000_000_000)
NO_GPU = dataclasses.replace(MACHINE, gpus=())
FORCE = "python scripts/install.py --force"


def without_avx2(engine: EngineReport) -> EngineReport:
    return dataclasses.replace(engine, features=("SSE3",))


@pytest.mark.parametrize(("machine", "engine"), [(MACHINE, ENGINE), (NO_GPU, CPU_ENGINE), (NO_GPU, ENGINE)])
def test_a_sound_installation_has_no_findings(machine: HostHardware, engine: EngineReport) -> None:
    assert findings(machine, engine) == []


@pytest.mark.parametrize(
    ("machine", "engine", "level", "text", "command"),
    [
        pytest.param(
            MACHINE, CPU_ENGINE, "error", "built without GPU support", "--accel cuda --force", id="NVIDIA, a CPU build"
        ),
        pytest.param(
            MACHINE,
            dataclasses.replace(CPU_ENGINE, offload=True),
            "error",
            "driver or runtime is missing",
            "--accel cuda --force",
            id="NVIDIA, no driver",
        ),
        pytest.param(
            dataclasses.replace(MACHINE, gpus=("AMD",)),
            CPU_ENGINE,
            "error",
            "the AMD GPU of this machine is NOT used",
            "--accel vulkan --force",
            id="AMD, a CPU build",
        ),
        pytest.param(
            dataclasses.replace(MACHINE, gpus=("Apple",)),
            CPU_ENGINE,
            "error",
            "the Apple GPU of this machine is NOT used",
            "--accel metal --force",
            id="Apple, a CPU build",
        ),
        pytest.param(
            MACHINE,
            without_avx2(ENGINE),
            "warning",
            "without AVX2, FMA, F16C",
            "--accel cuda --compile --force",
            id="a CUDA wheel without AVX2",
        ),
        pytest.param(
            NO_GPU,
            without_avx2(CPU_ENGINE),
            "warning",
            "without AVX2, FMA, F16C",
            "--accel cpu --compile --force",
            id="a CPU wheel without AVX2",
        ),
        pytest.param(
            dataclasses.replace(MACHINE, free_disk_bytes=3_500_000_000),
            ENGINE,
            "warning",
            "3.5 GB are free",
            "larger disk",
            id="little disk",
        ),
        pytest.param(
            dataclasses.replace(NO_GPU, rosetta=True), CPU_ENGINE, "error", "Rosetta", "arch -arm64", id="Rosetta"
        ),
    ],
)
def test_one_thing_wrong_is_one_finding_with_its_command(
    machine: HostHardware, engine: EngineReport, level: str, text: str, command: str
) -> None:
    (finding,) = findings(machine, engine)
    assert finding.level == level
    assert text in finding.text
    assert command in finding.command


def test_a_processor_without_avx2_misses_nothing() -> None:
    assert findings(dataclasses.replace(NO_GPU, cpu_features=frozenset()), without_avx2(CPU_ENGINE)) == []


def test_errors_come_before_warnings() -> None:
    machine = dataclasses.replace(MACHINE, rosetta=True, free_disk_bytes=0)
    levels = [finding.level for finding in findings(machine, without_avx2(CPU_ENGINE))]
    assert levels == ["error", "error", "warning", "warning"]


@pytest.mark.parametrize(
    ("failure", "text", "command"),
    [
        (
            "llama-cpp-python is not installed; run: python scripts/install.py",
            "llama-cpp-python is not installed",
            "python scripts/install.py",
        ),
        ("llama.cpp does not load: no reason", "llama.cpp does not load: no reason", FORCE),
        (
            'llama.cpp does not load: libcudart.so.12; NVIDIA\'s runtime libraries are missing, run: pip install "x[y]"',
            "llama.cpp does not load: libcudart.so.12; NVIDIA's runtime libraries are missing",
            'pip install "x[y]"',
        ),
    ],
)
def test_an_engine_that_does_not_load_is_the_one_error(failure: str, text: str, command: str) -> None:
    (finding,) = findings(MACHINE, None, failure)
    assert (finding.level, finding.text, finding.command) == ("error", text, command)


posix = pytest.mark.skipif(sys.platform == "win32", reason="stands in for Python with a shell script")


def interpreter(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `script` stand for Python in the child that asks llama.cpp for its devices."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


@posix
@pytest.mark.parametrize(
    ("script", "text", "command"),
    [
        ("kill -ILL $$", "illegal instruction", "python scripts/install.py --accel cpu --compile --force"),
        ("kill -SEGV $$", "signal 11", FORCE),
        ("echo broken >&2; exit 1", "exit status 1): broken", FORCE),
        ("exit 127", "it said nothing", FORCE),
        (
            "echo noise; echo 'it is missing; run: mend it' >/dev/fd/$QWQ_LITE_RESULTS; exit 3",
            "it is missing",
            "mend it",
        ),
    ],
)
def test_an_engine_that_dies_is_an_error_with_its_command(
    script: str, text: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter(script, tmp_path, monkeypatch)
    with pytest.raises(EngineError) as caught:
        devices.report_from_child()
    (finding,) = findings(MACHINE, None, str(caught.value))
    assert text in finding.text
    assert finding.command == command


def test_the_machine_at_hand_can_be_looked_at(tmp_path: Path) -> None:
    machine = diagnosis.look(tmp_path)
    assert machine.free_disk_bytes > 0
    assert set(machine.gpus) <= {"NVIDIA", "AMD", "Apple"}


def test_the_installed_engine_has_a_processor() -> None:
    assert any(device.kind == "cpu" and device.total_bytes > 0 for device in devices.report_from_child().devices)
