"""What a machine has free for a plan: this one, asked of its devices and limits, or a known one of the table. Knows no models."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from qwq_lite.backend import devices
from qwq_lite.backend.footprint import AMX
from qwq_lite.backend.hardware import Device, EngineReport
from qwq_lite.errors import EngineError
from qwq_lite.plan import machines, speed
from qwq_lite.plan.run_plan import Gpu, Room
from qwq_lite.system import process_limits


def room_here(report: EngineReport, memory_bytes: int | None = None) -> Room:
    """What the devices of a loaded engine have free now. memory_bytes: a budget, of the GPU where there is one."""
    room = replace(_room_of(report.gpus)[0], amx=AMX in report.extra_buffers)
    return limit_room(room, memory_bytes, 0)


def measure_room(n_threads: int) -> tuple[Room, str]:
    """What this machine has free, its memory's bandwidth too, and where the figures come from."""
    with ThreadPoolExecutor(1) as beside:  # the child takes a third of a second, and so does the measurement
        bandwidth = beside.submit(speed.host_bandwidth, n_threads)
        gpus: tuple[Device, ...] = ()
        amx = False
        with contextlib.suppress(EngineError):  # `doctor` says what is wrong with it; a plan by formula is still one
            report = devices.report_from_child()
            gpus, amx = report.gpus, AMX in report.extra_buffers
        room, source = _room_of(gpus)
        return replace(room, host_bandwidth=bandwidth.result(), amx=amx), source


def _room_of(gpus: tuple[Device, ...]) -> tuple[Room, str]:
    host = process_limits.available_memory_bytes()
    if not gpus:
        return Room(host), "this machine, what is free now"
    # llama.cpp takes integrated GPUs only where there is no other. Source: llama_model_load_from_file_impl
    gpus = tuple(gpu for gpu in gpus if gpu.kind == "gpu") or gpus
    unified = 0
    if machines.overhead_of(gpus[0].name) is machines.OVERHEADS["metal"]:
        # Its free figure lacks only this process's own buffers, and macOS lives in the rest.
        unified = max(0, host - machines.apple_reserve_bytes(process_limits.total_memory_bytes()))
    found = tuple(
        Gpu(
            gpu.name,
            min(gpu.free_bytes, unified) if unified else max(0, gpu.free_bytes - _reserve_bytes(gpu)),
            machines.overhead_of(gpu.name).later_bytes,
            _bandwidth_of(gpu.description),
        )
        for gpu in gpus
    )
    names = ", ".join(f"{gpu.name} ({gpu.description})" for gpu in gpus)
    return Room(host, found, unified), f"this machine, what is free now on {names}"


def _reserve_bytes(gpu: Device) -> int:
    """Bytes of a card that stay free: Windows spills in silence when it is full, and a desktop on it grows."""
    if sys.platform == "win32":
        return machines.WINDOWS_RESERVE_BYTES
    return machines.DISPLAY_RESERVE_BYTES if any(name in gpu.description for name in _with_a_display()) else 0


def _with_a_display() -> Iterator[str]:
    """Makers of the cards that a screen hangs on; of several of one maker each counts. Source: Linux, /sys/class/drm"""
    makers = {"nvidia": "NVIDIA", "nouveau": "NVIDIA", "amdgpu": "AMD", "radeon": "AMD", "i915": "Intel", "xe": "Intel"}
    for enabled in Path("/sys/class/drm").glob("card*-*/enabled"):
        with contextlib.suppress(OSError):
            if enabled.read_text().strip() == "enabled":
                driver = (enabled.parent / "device" / "device" / "driver").resolve().name
                yield from [makers[driver]] if driver in makers else []


def _bandwidth_of(description: str) -> float:
    """The table's bandwidth of a device that llama.cpp describes so, the least where it knows several; 0 where none."""
    chip = description.partition(" (")[0].lower()
    alike = [known for known in machines.MACHINES if known.gpus]
    found = [known.bandwidth_bytes_s for known in alike if known.gpus[0].description.partition(" (")[0].lower() == chip]
    return min(found, default=0.0)


def known_room(name: str) -> tuple[Room, str]:
    """What a machine of the table has, and its description. Raises: UsageError for a name that is not there."""
    known = machines.find(name)
    host = known.host_bytes - machines.apple_reserve_bytes(known.host_bytes)
    label = f"{known.description}, by table"
    gpus = tuple(
        Gpu(gpu.name, known.budget_bytes, known.overhead.total_bytes, known.bandwidth_bytes_s) for gpu in known.gpus
    )
    return Room(host, gpus, host if known.unified and gpus else 0, known.host_bandwidth_bytes_s), label


def limit_room(room: Room, memory_bytes: int | None, reserve_bytes: int) -> Room:
    """The room within a budget, of the GPUs together where there are any, less what is to stay free on each."""
    if not room.gpus:
        return replace(room, host=(room.host if memory_bytes is None else memory_bytes) - reserve_bytes)
    if room.unified:  # one memory: a budget and a reserve hold for both sides of it, and Metal's limit stays
        (gpu,) = room.gpus
        shared = min(room.unified, room.unified if memory_bytes is None else memory_bytes) - reserve_bytes
        return replace(
            room,
            unified=shared,
            host=min(room.host, shared),
            gpus=(replace(gpu, n_bytes=min(gpu.n_bytes - reserve_bytes, shared)),),
        )
    if memory_bytes is None:
        return replace(room, gpus=tuple(replace(gpu, n_bytes=gpu.n_bytes - reserve_bytes) for gpu in room.gpus))
    free = sum(gpu.n_bytes for gpu in room.gpus) or 1
    return replace(
        room,
        gpus=tuple(
            replace(
                gpu,
                n_bytes=memory_bytes * gpu.n_bytes // free - reserve_bytes,
                # A budget that is given is a total: opening the device comes out of it too.
                overhead=machines.overhead_of(gpu.name).total_bytes,
            )
            for gpu in room.gpus
        ),
    )
