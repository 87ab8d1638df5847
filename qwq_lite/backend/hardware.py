"""What a machine has, as data. Knows no llama.cpp: `backend.devices` fills it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

DeviceKind = Literal["cpu", "gpu", "igpu", "accel"]


@dataclass(frozen=True)
class Device:
    """One device that llama.cpp can use. free_bytes as llama.cpp reports it; for the CPU that is the total."""

    name: str
    description: str
    kind: DeviceKind
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class EngineReport:
    """What an installed llama.cpp says of itself once it is loaded."""

    version: str
    offload: bool  # it can put layers on a GPU
    devices: tuple[Device, ...]
    features: tuple[str, ...]  # CPU features it was built with ("AVX2", …), as llama_print_system_info names them
    extra_buffers: tuple[str, ...] = ()  # the CPU's buffer types for weights in another layout ("CPU_REPACK", "AMX")

    @property
    def gpus(self) -> tuple[Device, ...]:
        return tuple(device for device in self.devices if device.kind in ("gpu", "igpu"))


def report_from_json(data: dict[str, Any]) -> EngineReport:
    """A report that came from another process as JSON. Raises: KeyError, TypeError for what is none."""
    devices = tuple(Device(**device) for device in data["devices"])
    return EngineReport(
        data["version"], data["offload"], devices, tuple(data["features"]), tuple(data["extra_buffers"])
    )
