"""The data of a plan: memory that it may use, what the user gives, what was chosen, and the bytes this takes. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qwq_lite import arguments
from qwq_lite.backend.footprint import Buffers, Footprint
from qwq_lite.backend.settings import KV_TYPES, EngineSettings
from qwq_lite.errors import UsageError
from qwq_lite.formats.gguf_header import TensorInfo
from qwq_lite.formats.shape import ModelShape
from qwq_lite.plan.memory import (
    flash_pool_bytes,
    host_overhead_bytes,
    layer_places,
)
from qwq_lite.system.units import GIB

LEAST_ASKED, MOST_ASKED = 256, 1 << 24
MOST_BYTES = 1 << 60  # of memory that a caller may name

UBATCHES = (512, 256, 128)

TYPICAL_TOKENS, LONG_TOKENS = 1_700, 4_400  # of 72 real outputs: the median, and what 90 % stay below

PATIENCE_S = 600  # a longer wait for a typical answer is said first


# Where weights of host layers lie. "mmap", the default: pages of the file, which the system may take back and which programs
# share; without a GPU also copies of what the CPU's kernels want in another layout, "no-repack" goes without these. "pinned":
# memory of their own, which a GPU reads directly when prefill sends the weights there. "repacked": memory of their own in the
# layout of the CPU's kernels, which no GPU reads.
HOST_WEIGHTS: dict[str, dict[str, Any]] = {
    "mmap": {},
    "no-repack": {"repack": False},
    "pinned": {"load_mode": "none", "repack": False},
    "repacked": {"load_mode": "none", "no_host": True},
}


@dataclass(frozen=True)
class Gpu:
    """A device that takes layers."""

    name: str  # llama.cpp's
    n_bytes: int  # that a plan may use
    overhead: int = 0  # bytes of these that its backend takes
    bandwidth: float = 0.0  # bytes a second, 0 where unknown


@dataclass(frozen=True)
class Room:
    """Bytes that a plan may use."""

    host: int  # of main memory
    gpus: tuple[Gpu, ...] = ()  # in llama.cpp's order
    unified: int = 0  # the most for host and GPU together where they share one memory, 0 where they do not
    host_bandwidth: float = 0.0  # bytes a second, 0 where unknown
    amx: bool = False  # the engine has a buffer type for the CPU's AMX

    @property
    def gpu_names(self) -> list[str]:
        return [gpu.name for gpu in self.gpus]


@dataclass(frozen=True)
class Wishes:
    """What the user gives; None leaves it to the search.

    Raises: UsageError for a value that is not allowed.
    """

    n_ctx: int | None = None  # tokens of context, for all conversations together
    type_k: str | None = None  # of the K cache, a name of KV_TYPES
    type_v: str | None = None  # of the V cache
    n_gpu_layers: int | None = None  # -1 for all
    host_weights: str | None = None  # where weights of host layers lie, a name of HOST_WEIGHTS

    def __post_init__(self) -> None:
        for name, low, high in (("n_ctx", LEAST_ASKED, MOST_ASKED), ("n_gpu_layers", -1, 1 << 20)):
            value = getattr(self, name)
            if value is not None:
                option = name.removeprefix("n_").replace("_", "-")
                object.__setattr__(self, name, arguments.check_whole(f"{name} (--{option})", value, low, high))
        for name, known in (("type_k", KV_TYPES), ("type_v", KV_TYPES), ("host_weights", HOST_WEIGHTS)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value in known):
                raise UsageError(f"{name} (--{name.replace('_', '-')}) is {value!r}; known are {', '.join(known)}")


@dataclass(frozen=True)
class Candidate:
    """A file that exists, or that a conversion would make."""

    label: str  # the file's name, or the weight type of a conversion
    shape: ModelShape
    tensors: Sequence[TensorInfo]

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.n_bytes for info in self.tensors)

    @property
    def embedding(self) -> tuple[int, bool]:
        """Bytes of the embedding, and whether it is the output's matrix too."""
        sizes = {info.name: info.n_bytes for info in self.tensors}
        return sizes.get("token_embd.weight", 0), "output.weight" not in sizes


@dataclass(frozen=True)
class RunPlan:
    """What to run and what it takes."""

    candidate: Candidate  # the file
    choice: EngineSettings  # what to load it with
    footprint: Footprint  # the buffers that this takes
    room: Room  # what it was planned for
    wishes: Wishes = Wishes()  # what the user gave
    refused: tuple[str, ...] = ()  # why nothing better: a line for each choice that came before it
    next_best: tuple[RunPlan, ...] = field(default=(), compare=False)  # other choices that fit, the best first

    @property
    def decode_tok_s(self) -> float:
        """Tokens a second by bandwidth alone: a limit that 80 % of is reached in practice. 0 where a bandwidth is unknown.

        Every token reads all weights but the embedding's, and on average half of the cache.
        """
        bandwidths = {gpu.name: gpu.bandwidth for gpu in self.room.gpus} | {"CPU": self.room.host_bandwidth}
        read = {name: buffers.weights + buffers.kv // 2 for name, buffers in self.footprint.devices.items()}
        embedding, tied = self.candidate.embedding
        output_place = layer_places(self.candidate.shape.n_layer, self.choice, self.room.gpu_names)[-1]
        if not (tied and output_place == "CPU"):
            read["CPU"] -= embedding
        if any(n_bytes > 0 and not bandwidths[name] for name, n_bytes in read.items()):
            return 0.0
        seconds = sum(n_bytes / bandwidths[name] for name, n_bytes in read.items() if n_bytes > 0)
        return 1 / seconds if seconds else 0.0

    @property
    def slow(self) -> bool:
        """Whether a typical answer is a long wait, as far as is known."""
        return 0 < self.decode_tok_s * PATIENCE_S < TYPICAL_TOKENS

    @property
    def host_weights(self) -> str | None:
        """The name in HOST_WEIGHTS of what was chosen, None for a choice that has none."""
        plain: dict[str, Any] = {"load_mode": "mmap", "repack": True, "no_host": False}
        names = (
            name for name, fields in HOST_WEIGHTS.items() if replace(self.choice, **(plain | fields)) == self.choice
        )
        return next(names, None)

    def rows(self) -> Iterator[tuple[str, Buffers, int, int]]:
        """Each device: its name, buffers, the backend's bytes beside them, and the bytes that it has."""
        shape = self.candidate.shape
        for gpu in self.room.gpus:
            if gpu.name in self.footprint.devices:
                yield gpu.name, self.footprint.devices[gpu.name], backend_bytes(gpu, shape, self.choice), gpu.n_bytes
        host = self.footprint.host
        overhead = host_overhead_bytes(shape, self.candidate.tensors, host, amx=self.room.amx)
        yield "CPU", host, overhead, self.room.host

    def shortages(self) -> list[tuple[str, int]]:
        """Each memory that the plan is too much for, and by how many bytes."""
        rows = list(self.rows())
        used = {name: buffers.total + backend for name, buffers, backend, _ in rows}
        found = [
            ("the host" if name == "CPU" else name, used[name] - limit)
            for name, _, _, limit in rows
            if used[name] > limit
        ]
        # A 16-bit cache that fills a Mac's memory starves macOS; it must leave a tenth.
        spare = self.room.unified // 10 if {self.choice.type_k, self.choice.type_v} & {"f16", "bf16"} else 0
        if self.room.unified and sum(used.values()) > self.room.unified - spare:
            tenth = ", of which a 16-bit cache must leave a tenth" if spare else ""
            found.append((f"the memory that host and GPU share{tenth}", sum(used.values()) - self.room.unified + spare))
        return found

    def line(self) -> str:
        choice, layers = self.choice, self.candidate.shape.n_layer + 1
        kv = choice.type_k if choice.type_k == choice.type_v else f"{choice.type_k}/{choice.type_v}"
        parts = [f"{choice.n_ctx:,} tokens", f"{kv} KV"]
        if choice.n_ubatch != UBATCHES[0]:
            parts.append(f"micro-batches of {choice.n_ubatch}")
        held = layer_places(layers - 1, choice, self.room.gpu_names)
        for name, buffers, backend, limit in self.rows():
            if name != "CPU":
                parts.append(f"{held.count(name)}/{layers} layers on {name}")
            place = " on the host" if name == "CPU" and len(self.footprint.devices) > 1 else ""
            parts.append(f"{(buffers.total + backend) / GIB:.1f} of {limit / GIB:.1f} GiB{place}")
        return ", ".join(parts)


def backend_bytes(gpu: Gpu, shape: ModelShape, choice: EngineSettings) -> int:
    """What a GPU's backend takes beside the buffers that llama.cpp counts."""
    return gpu.overhead + (flash_pool_bytes(shape, choice) if gpu.name.startswith("CUDA") else 0)
