"""Bytes of a loaded model's buffers on each device, and where the figures come from. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Source = Literal["measured", "formula", "table"]
AMX = "AMX"  # ggml's name of the buffer type for AMX kernels


@dataclass(frozen=True)
class Buffers:
    """Bytes on one device."""

    weights: int = 0
    kv: int = 0
    compute: int = 0
    mapped: int = 0  # part of `weights` that is pages of the file
    reclaimable: int = 0  # pages of the file that are read once, for repacking

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.compute

    @property
    def anonymous(self) -> int:
        """What the system cannot take back: all but the file's pages."""
        return self.total - self.mapped


@dataclass(frozen=True)
class Footprint:
    """Buffers of a model on all devices."""

    devices: dict[str, Buffers]  # by llama.cpp's name, "CPU" for the host
    source: Source
    n_splits: int | None = None  # parts of the graph, more where an operation leaves its device; None where unknown

    @property
    def host(self) -> Buffers:
        return self.devices.get("CPU", Buffers())

    @property
    def total(self) -> int:
        return sum(buffers.total for buffers in self.devices.values())


def footprint_from_json(data: dict[str, Any]) -> Footprint:
    """What `dataclasses.asdict` made of a footprint. Raises: KeyError, TypeError for what is none."""
    return Footprint(**{**data, "devices": {name: Buffers(**row) for name, row in data["devices"].items()}})
