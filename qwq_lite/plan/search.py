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

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from qwq_lite.backend.footprint import Footprint
from qwq_lite.backend.settings import EngineSettings
from qwq_lite.errors import PlanError, UsageError
from qwq_lite.plan.memory import (
    gpu_compute_bytes,
    kv_type_objection,
    layer_bytes,
    layer_places,
)
from qwq_lite.plan.run_plan import HOST_WEIGHTS, UBATCHES, Candidate, Room, RunPlan, Wishes, backend_bytes
from qwq_lite.system.units import GIB

MOST_CTX = 32_768  # what QwQ was trained for without rope scaling; longer contexts are asked for
LEAST_CTX = 8_192
_STEP = 256
_OTHERS = 2
_ANY = "GPU"
_HALVINGS = 16
_MOST_REASONS = 4  # in a row, of choices that differ in one number


Count = Callable[[Candidate, Sequence[EngineSettings]], Sequence[Footprint]]


def search(candidates: Sequence[Candidate], room: Room, wishes: Wishes, count: Count) -> RunPlan:
    """The first choice in the order above that fits.

    Args:
        candidates: the file, or the weight types to offer, the wanted one first.
        count: what choices take, in their order; asked a few times with many choices at once.

    Raises: PlanError when nothing fits, with what is short and by how much; UsageError for a cache the model cannot have.
    """
    refused: list[str] = []
    nearest: list[RunPlan] = []
    for candidate in candidates:
        caches = _caches(wishes, candidate)
        stages = _stages(candidate, room, wishes, caches)
        for choices in stages:
            plans = _plans(candidate, choices, room, count)
            found = [plan for plan in plans if _objection(plan, plans[0]) is None]
            before = plans[: plans.index(found[0])] if found else plans
            refused += _shorten([f"{plan.line()}: {_objection(plan, plans[0])}" for plan in before], candidate.label)
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
                return replace(best, wishes=wishes, refused=tuple(refused), next_best=tuple(others[:_OTHERS]))
    last = f"the nearest was {nearest[0].candidate.label}, {nearest[0].line()}: " if nearest else ""
    raise PlanError(f"nothing fits; {last}{_objection(nearest[0], nearest[0]) if nearest else refused[-1]}")


def split(candidate: Candidate, choice: EngineSettings, room: Room) -> EngineSettings:
    """The choice with its layers shared out among several GPUs: the fewest that hold them, each filled to the same degree.

    Explicit, since llama.cpp would share them out by what happens to be free at each load; the fewest, since every one more
    costs buffers and copies, and decodes no faster.
    """
    if len(room.gpus) < 2 or choice.n_gpu_layers == 0:
        return choice
    shape = candidate.shape
    places = layer_places(shape.n_layer, replace(choice, tensor_split=()), [_ANY])
    sizes = layer_bytes(shape, candidate.tensors, choice)[places.index(_ANY) :]
    by_room = sorted(room.gpus, key=lambda gpu: gpu.overhead - gpu.n_bytes)
    counts: list[int] = []
    for n_used in range(1, len(room.gpus) + 1):
        beside = gpu_compute_bytes(shape, choice, pipelined=n_used > 1 and "CPU" not in places)
        capacities = [
            max(0, gpu.n_bytes - backend_bytes(gpu, shape, choice) - beside) if gpu in by_room[:n_used] else 0
            for gpu in room.gpus
        ]
        counts = _fill(sizes, capacities)
        if sum(counts) == len(sizes):
            break
    counts[-1] += len(sizes) - sum(counts)  # what no device holds is refused where it is counted
    return replace(choice, tensor_split=tuple(counts))


def _fill(sizes: Sequence[int], capacities: Sequence[int]) -> list[int]:
    """How many of the sizes, in their order, each capacity gets, all filled to the least degree that holds them."""

    def at(degree: float) -> list[int]:
        counts, index = [], 0
        for capacity in capacities:
            start, left = index, capacity * degree
            while index < len(sizes) and sizes[index] <= left:
                left -= sizes[index]
                index += 1
            counts.append(index - start)
        return counts

    low, high = 0.0, 1.0
    if sum(at(high)) < len(sizes):
        return at(high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(at(middle)) == len(sizes) else (middle, high)
    return at(high)


def _plans(candidate: Candidate, choices: Sequence[EngineSettings], room: Room, count: Count) -> list[RunPlan]:
    choices = [split(candidate, choice, room) for choice in choices]
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


def _shorten(reasons: list[str], label: str) -> list[str]:
    if len(reasons) > _MOST_REASONS:
        reasons = [reasons[0], f"{len(reasons) - 2} more in between", reasons[-1]]
    return [f"{label}, {reason}" for reason in reasons]


def _leaves_its_device(plan: RunPlan, reference: RunPlan) -> bool:
    """Whether llama.cpp would cut the graph into more parts than with f16 K and V: an operation runs elsewhere, in silence."""
    own, other = plan.footprint.n_splits, reference.footprint.n_splits
    if plan.choice.type_k == "f16" or reference.choice.type_k != "f16" or own is None or other is None:
        return False
    return own > other


def _stages(
    candidate: Candidate, room: Room, wishes: Wishes, caches: list[tuple[str, str]]
) -> Iterator[list[EngineSettings]]:
    """Choices in the order of the search, in groups that are counted at once. `caches` may lose one between two groups."""
    shape = candidate.shape
    n_ctx = wishes.n_ctx or min(shape.n_ctx_train, MOST_CTX)
    all_layers = shape.n_layer + 1
    layers = 0 if not room.gpus else all_layers if wishes.n_gpu_layers is None else wishes.n_gpu_layers
    layers = all_layers if not 0 <= layers <= all_layers else layers
    base = EngineSettings(n_ctx, n_gpu_layers=layers, **HOST_WEIGHTS[wishes.host_weights or "mmap"])
    least_ctx = n_ctx if wishes.n_ctx else min(n_ctx, LEAST_CTX)

    def given_up(cache: tuple[str, str]) -> list[EngineSettings]:
        """Micro-batches, then context."""
        choice = _with_cache(base, cache)
        smaller = [replace(choice, n_ubatch=n) for n in UBATCHES[1:]]
        return smaller + ([replace(smaller[-1], n_ctx=least_ctx)] if least_ctx < n_ctx else [])

    last = caches[-1]
    yield [*(_with_cache(base, cache) for cache in caches), *given_up(last)]
    if caches[-1] != last:  # quantized K and V are no choice on this device
        yield given_up(caches[-1])
    least = replace(_with_cache(base, caches[-1]), n_ctx=least_ctx)
    if room.gpus and wishes.n_gpu_layers is None:
        yield [replace(least, n_gpu_layers=n) for n in range(all_layers - 1, -1, -1)]


def _with_cache(choice: EngineSettings, cache: tuple[str, str]) -> EngineSettings:
    return replace(choice, type_k=cache[0], type_v=cache[1])


def _caches(wishes: Wishes, candidate: Candidate) -> list[tuple[str, str]]:
    """Types of K and V to try. Raises: UsageError for those that are asked for and that this model's heads cannot have."""
    if wishes.type_k or wishes.type_v:
        type_k = wishes.type_k or wishes.type_v or "f16"
        type_v = wishes.type_v or type_k
        if objection := kv_type_objection(candidate.shape, type_k, type_v):
            raise UsageError(f"{candidate.label}: {objection}")
        return [(type_k, type_v)]
    return [(name, name) for name in ("f16", "q8_0") if kv_type_objection(candidate.shape, name, name) is None]


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
        (found,) = _plans(candidate, [replace(choice, n_ctx=n_ctx)], room, count)
        if not found.shortages():
            return found
        n_ctx = (n_ctx - 1) // _STEP * _STEP
    return plan
