"""Context, KV type, offload and micro-batch that fit a machine, chosen together. Pure: what they take is asked of `count`.

The order of the search, and why:
  1. the context asked for, else the trained one up to 32,768, with f16 K and V: nothing given up
  2. q8_0 K and V: half the cache at a loss nobody measures (KL 0.001)
  3. smaller micro-batches, 256 and 128 tokens: prefill takes longer, answers stay the same
  4. the largest multiple of 256 tokens that fits, down to 8,192: a thought needs room
  5. fewer layers on the GPU: each one costs speed
  6. the next smaller weight type, where the file does not exist yet: below 4 bits answers get worse
What the user gives is never changed. 4-bit and unequal K and V are taken only when they are asked for: default CUDA builds
compute attention over unequal types on the CPU.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from qwq_lite.errors import PlanError
from qwq_lite.gguf_header import TensorInfo
from qwq_lite.memory import Buffers, Choice, Footprint, flash_pool_bytes
from qwq_lite.shape import ModelShape

MOST_CTX = 32_768  # what QwQ was trained for without rope scaling; longer contexts are asked for
LEAST_CTX = 8_192
_STEP = 256
_UBATCHES = (512, 256, 128)
_OTHERS = 2
_MOST_REASONS = 4  # in a row, of choices that differ in one number
TYPICAL_TOKENS, LONG_TOKENS = 1_700, 4_400  # of 72 real outputs: the median, and what 90 % stay below
GIB = 1 << 30


@dataclass(frozen=True)
class Room:
    """Bytes that a plan may use. gpu: the device's name, None without one; bandwidths in bytes a second, 0 where unknown.

    gpu_overhead: what the backend takes beside llama.cpp's own count. unified: the most that host and GPU may use together where
    they share one memory, 0 where they do not.
    """

    host: int
    gpu: str | None = None
    gpu_bytes: int = 0
    gpu_overhead: int = 0
    unified: int = 0
    host_bandwidth: float = 0.0
    gpu_bandwidth: float = 0.0


@dataclass(frozen=True)
class Wishes:
    """What the user gives; None leaves it to the search."""

    n_ctx: int | None = None
    type_k: str | None = None
    type_v: str | None = None
    n_gpu_layers: int | None = None


@dataclass(frozen=True)
class Candidate:
    """A file that there is, or that a conversion would make. label: its weight type."""

    label: str
    shape: ModelShape
    tensors: Sequence[TensorInfo]


@dataclass(frozen=True)
class RunPlan:
    """What to run, what it takes, and why nothing better: one line for each choice that came before it."""

    candidate: Candidate
    choice: Choice
    footprint: Footprint
    room: Room
    refused: tuple[str, ...] = ()
    next_best: tuple[RunPlan, ...] = field(default=(), compare=False)

    @property
    def decode_tok_s(self) -> float:
        """An estimate: every token reads all weights but the embedding's, and on average half of the cache."""
        return decode_tok_s(self.footprint, self.room, self.candidate)

    @property
    def backend_bytes(self) -> int:
        """What the GPU's backend takes beside the buffers; nothing where no layer is on it."""
        if self.room.gpu is None or self.choice.n_gpu_layers == 0:
            return 0
        pool = flash_pool_bytes(self.candidate.shape, self.choice) if self.room.gpu.startswith("CUDA") else 0
        return self.room.gpu_overhead + pool

    def rows(self) -> Iterator[tuple[str, Buffers, int, int]]:
        """Each device: its name, buffers, the backend's bytes beside them, and the bytes that it has."""
        for name, buffers in self.footprint.devices.items():
            on_host = name == "CPU"
            yield (
                name,
                buffers,
                0 if on_host else self.backend_bytes,
                self.room.host if on_host else self.room.gpu_bytes,
            )

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
        spare = self.room.unified // 10 if self.choice.type_k in ("f16", "bf16") else 0
        if self.room.unified and sum(used.values()) > self.room.unified - spare:
            found.append(("the memory that host and GPU share", sum(used.values()) - self.room.unified + spare))
        return found

    def line(self) -> str:
        choice, layers = self.choice, self.candidate.shape.n_layer + 1
        kv = choice.type_k if choice.type_k == choice.type_v else f"{choice.type_k}/{choice.type_v}"
        parts = [f"{choice.n_ctx:,} tokens", f"{kv} KV"]
        if choice.n_ubatch != _UBATCHES[0]:
            parts.append(f"micro-batches of {choice.n_ubatch}")
        for name, buffers, backend, limit in self.rows():
            if name != "CPU":
                parts.append(f"{min(choice.n_gpu_layers, layers)}/{layers} layers on {name}")
            place = " on the host" if name == "CPU" and len(self.footprint.devices) > 1 else ""
            parts.append(f"{(buffers.total + backend) / GIB:.1f} of {limit / GIB:.1f} GiB{place}")
        return ", ".join(parts)


Count = Callable[[Candidate, Sequence[Choice]], Sequence[Footprint]]


def search(candidates: Sequence[Candidate], room: Room, wishes: Wishes, count: Count) -> RunPlan:
    """The first choice in the order above that fits.

    Args:
        candidates: the file, or the weight types to offer, the wanted one first.
        count: what choices take, in their order; asked a few times with many choices at once.

    Raises: PlanError when nothing fits, with what is short and by how much.
    """
    refused: list[str] = []
    nearest: list[RunPlan] = []
    for candidate in candidates:
        caches = _caches(wishes)
        stages = _stages(candidate, room, wishes, caches)
        for choices in stages:
            plans = _plans(candidate, choices, room, count)
            found = [plan for plan in plans if _objection(plan, plans[0]) is None]
            before = plans[: plans.index(found[0])] if found else plans
            refused += _shortened([f"{plan.line()}: {_objection(plan, plans[0])}" for plan in before], candidate.label)
            if any(_leaves_its_device(plan, plans[0]) for plan in plans):
                caches[:] = caches[:1]
            short = [plan for plan in plans if plan.shortages()]
            nearest = sorted([*nearest, *short], key=lambda plan: sum(n_bytes for _, n_bytes in plan.shortages()))[:1]
            if found:
                best = _widest(found[0], candidate, room, wishes, count)
                others = [plan for plan in found[1:] if plan.choice != best.choice]
                if len(others) < _OTHERS:
                    more = _plans(candidate, next(stages, []), room, count)
                    others += [plan for plan in more if _objection(plan, plans[0]) is None]
                return dataclasses.replace(best, refused=tuple(refused), next_best=tuple(others[:_OTHERS]))
    last = f"the nearest was {nearest[0].candidate.label}, {nearest[0].line()}: " if nearest else ""
    raise PlanError(f"nothing fits; {last}{_objection(nearest[0], nearest[0]) if nearest else refused[-1]}")


def _plans(candidate: Candidate, choices: Sequence[Choice], room: Room, count: Count) -> list[RunPlan]:
    counted = count(candidate, choices) if choices else []
    return [RunPlan(candidate, choice, footprint, room) for choice, footprint in zip(choices, counted, strict=True)]


def _objection(plan: RunPlan, reference: RunPlan) -> str | None:
    """Why a plan cannot be taken, None where it can. reference: the first of its group, with f16 K and V where those are free."""
    short = plan.shortages()
    if short:
        return " and ".join(f"{_upward(n_bytes)} GiB too much for {name}" for name, n_bytes in short)
    if _leaves_its_device(plan, reference):
        parts = f"{plan.footprint.n_splits} parts of the graph, {reference.footprint.n_splits} with f16"
        return f"attention would run on the CPU ({parts})"
    return None


def _upward(n_bytes: int) -> float:
    """GiB to a tenth, never less than there are: who frees so much has enough."""
    return math.ceil(n_bytes / GIB * 10) / 10


def _shortened(reasons: list[str], label: str) -> list[str]:
    if len(reasons) > _MOST_REASONS:
        reasons = [reasons[0], f"{len(reasons) - 2} more in between, for the same reason", reasons[-1]]
    return [f"{label}, {reason}" for reason in reasons]


def _leaves_its_device(plan: RunPlan, reference: RunPlan) -> bool:
    """Whether llama.cpp would cut the graph into more parts than with f16 K and V: an operation runs elsewhere, in silence."""
    own, other = plan.footprint.n_splits, reference.footprint.n_splits
    if plan.choice.type_k == "f16" or reference.choice.type_k != "f16" or own is None or other is None:
        return False
    return own > other


def decode_tok_s(footprint: Footprint, room: Room, candidate: Candidate) -> float:
    """Tokens a second by bandwidth alone: a limit that 80 % of is reached in practice. 0 where a bandwidth is unknown."""
    embedding = sum(info.n_bytes for info in candidate.tensors if info.name == "token_embd.weight")
    tied = all(info.name != "output.weight" for info in candidate.tensors)
    seconds = 0.0
    for name, buffers in footprint.devices.items():
        read = buffers.weights + buffers.kv // 2 - (embedding if name == "CPU" and not tied else 0)
        bandwidth = room.host_bandwidth if name == "CPU" else room.gpu_bandwidth
        if read > 0:
            if not bandwidth:
                return 0.0
            seconds += read / bandwidth
    return 1 / seconds if seconds else 0.0


def _stages(candidate: Candidate, room: Room, wishes: Wishes, caches: list[tuple[str, str]]) -> Iterator[list[Choice]]:
    """Choices in the order of the search, in groups that are counted at once. `caches` may lose one between two groups."""
    shape = candidate.shape
    n_ctx = wishes.n_ctx or min(shape.n_ctx_train, MOST_CTX)
    all_layers = shape.n_layer + 1
    layers = 0 if room.gpu is None else all_layers if wishes.n_gpu_layers is None else wishes.n_gpu_layers
    layers = all_layers if layers < 0 else layers
    full = [Choice(n_ctx, *cache, n_gpu_layers=layers) for cache in caches]
    last = caches[-1]
    yield full + [Choice(n_ctx, *last, n_ubatch=n, n_gpu_layers=layers) for n in _UBATCHES[1:]]
    if caches[-1] != last:  # quantized K and V are no choice on this device
        yield [Choice(n_ctx, *caches[-1], n_ubatch=n, n_gpu_layers=layers) for n in _UBATCHES[1:]]
    least = n_ctx if wishes.n_ctx else min(n_ctx, LEAST_CTX)
    if least < n_ctx:
        yield [Choice(least, *caches[-1], n_ubatch=_UBATCHES[-1], n_gpu_layers=layers)]
    if room.gpu is not None and wishes.n_gpu_layers is None:
        steps = range(all_layers - 1, -1, -1)
        yield [Choice(least, *caches[-1], n_gpu_layers=n) for n in steps]


def _caches(wishes: Wishes) -> list[tuple[str, str]]:
    if wishes.type_k or wishes.type_v:
        type_k = wishes.type_k or wishes.type_v or "f16"
        return [(type_k, wishes.type_v or type_k)]
    return [("f16", "f16"), ("q8_0", "q8_0")]


def _widest(plan: RunPlan, candidate: Candidate, room: Room, wishes: Wishes, count: Count) -> RunPlan:
    """The plan with the largest context that still fits, where the search had to go down to the least."""
    asked = wishes.n_ctx or min(candidate.shape.n_ctx_train, MOST_CTX)
    if plan.choice.n_ctx >= asked:
        return plan
    choice = plan.choice
    # Bytes of a token differ from device to device: each holds the cache of its own layers.
    room_for = [
        int((limit - buffers.total - backend) / (buffers.kv / choice.n_ctx + choice.n_ubatch * 2))
        for _, buffers, backend, limit in plan.rows()
        if buffers.kv
    ]
    n_ctx = choice.n_ctx + min(room_for, default=0)
    n_ctx = asked if n_ctx >= asked else n_ctx // _STEP * _STEP
    while n_ctx > choice.n_ctx:  # the estimate is seldom off, and never by much
        wider = dataclasses.replace(choice, n_ctx=n_ctx)
        (footprint,) = count(candidate, [wider])
        found = dataclasses.replace(plan, choice=wider, footprint=footprint)
        if not found.shortages():
            return found
        n_ctx = (n_ctx - 1) // _STEP * _STEP
    return plan
