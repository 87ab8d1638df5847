"""Bytes of a loaded model on each device, and where the figures come from: data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Source = Literal["measured", "formula", "table"]
AMX = "AMX"  # ggml's name of the buffer type for AMX kernels


@dataclass(frozen=True)
class Buffers:
    """Bytes on one device. mapped: part of `weights` that is pages of the file; reclaimable: pages read once, for repacking."""

    weights: int = 0
    kv: int = 0
    compute: int = 0
    mapped: int = 0
    reclaimable: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.compute

    @property
    def anonymous(self) -> int:
        """What the system cannot take back: all but the file's pages."""
        return self.total - self.mapped


@dataclass(frozen=True)
class Footprint:
    """Buffers by device, "CPU" for the host. n_splits: parts of the graph, more where an operation leaves its device."""

    devices: dict[str, Buffers]
    source: Source
    n_splits: int | None = None

    @property
    def host(self) -> Buffers:
        return self.devices.get("CPU", Buffers())

    @property
    def total(self) -> int:
        return sum(buffers.total for buffers in self.devices.values())
