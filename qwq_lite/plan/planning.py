"""From a model's name to a plan for this machine, or for a known one: one search. Other plans are `advice`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from qwq_lite import arguments
from qwq_lite.backend.footprint import Source
from qwq_lite.errors import EngineError, PlanError, UsageError
from qwq_lite.formats import gguf_header
from qwq_lite.formats.gguf_header import TensorInfo
from qwq_lite.formats.shape import ModelShape
from qwq_lite.plan import advice, free_memory, speed
from qwq_lite.plan.buffer_counts import engine_count, formula_count
from qwq_lite.plan.candidates import find_candidates, of_file
from qwq_lite.plan.run_plan import MOST_BYTES, Room, RunPlan, Wishes
from qwq_lite.plan.search import search
from qwq_lite.selftest import kept_result
from qwq_lite.system import running_engines

_SPARE = 0.9  # of a device: below it a formula that is off by a few percent does no harm


@dataclass(frozen=True)
class Planned:
    """A plan, what it is for, and advice."""

    plan: RunPlan
    model: str  # as it was named
    file: Path | None  # the GGUF that exists, None where a conversion would make it
    room_name: str  # the machine
    room_source: Source | Literal["given"]  # where the figures of its memory come from
    faster: str | None = None  # a model of the catalogue, where a typical answer of this one is a long wait
    raise_limit: str | None = None  # the command that lets a Mac's GPU have more, where a better plan comes of it
    notices: tuple[str, ...] = ()  # one line each


def plan_model(
    model: str,
    *,
    quant: str | None = None,
    memory_bytes: int | None = None,
    machine: str | None = None,
    reserve_bytes: int = 0,
    n_threads: int | None = None,
    wishes: Wishes = Wishes(),  # noqa: B008 - frozen
) -> Planned:
    """Choose context, KV type and offload for a model on this machine, or on a known one.

    Args:
        quant: weight type of a file that does not exist yet; default Q4_K_M.
        memory_bytes: the budget, of the GPU where there is one, else of the host; default what is free.
        machine: a name of `machines`, instead of this one.
        reserve_bytes: kept free beside.
        n_threads: for the estimate of speed; default as `load` has it.

    Raises: UsageError, FormatError, CheckpointError; PlanError when nothing fits, whose `smaller` names what does.
    """
    found = find_plan(
        model,
        quant=quant,
        memory_bytes=memory_bytes,
        machine=machine,
        reserve_bytes=reserve_bytes,
        n_threads=n_threads,
        wishes=wishes,
    )
    weight_type = advice.gpu_weight_type(found.plan) if found.file is None else None
    holders = list_memory_holders(found.plan) if machine is None else []
    return replace(
        found,
        faster=advice.faster_model(found.plan),
        raise_limit=advice.raised_limit(found.plan),
        notices=(*found.notices, *([weight_type] if weight_type else []), *holders),
    )


def find_plan(
    model: str,
    *,
    quant: str | None = None,
    memory_bytes: int | None = None,
    machine: str | None = None,
    reserve_bytes: int = 0,
    n_threads: int | None = None,
    wishes: Wishes = Wishes(),  # noqa: B008 - frozen
) -> Planned:
    """The plan of `plan_model` without its advice: one search."""
    if memory_bytes is not None:
        memory_bytes = arguments.check_whole("memory_bytes", memory_bytes, 0, MOST_BYTES)
    reserve_bytes = arguments.check_whole("reserve_bytes", reserve_bytes, 0, MOST_BYTES)
    candidates, file = find_candidates(model, quant)
    notices: list[str] = []
    if machine is None:
        wishes, complaint = _adapt_wishes(wishes)
        notices += [complaint] if complaint else []
        room, room_name = free_memory.measure_room(n_threads or speed.default_threads())
    else:
        room, room_name = free_memory.known_room(machine)
    room = free_memory.limit_room(room, memory_bytes, reserve_bytes)
    notices += list_notices(candidates[0].shape, room, wishes)
    if machine is not None and n_threads is not None:
        notices.append(
            "n_threads (--threads) is ignored: the speed of a known machine is estimated by its memory alone"
        )
    count = engine_count(file, room, notices) if machine is None else formula_count(room)
    try:
        plan = search(candidates, room, wishes, count)
    except PlanError as error:
        error.smaller = advice.largest_model(room, wishes)
        if machine is None:
            error.args = ("; ".join([str(error), *list_memory_holders()]),)
        raise
    if plan.candidate.label != candidates[0].label:
        notices.append(f"{candidates[0].label} does not fit; this is {plan.candidate.label}")
    source: Source | Literal["given"] = "measured" if machine is None else "table"
    return Planned(plan, model, file, room_name, source if memory_bytes is None else "given", notices=tuple(notices))


def plan_header(header: gguf_header.Header, room: Room, wishes: Wishes) -> RunPlan:
    """A plan for a file that is about to be loaded. Formulas decide where there is room; llama.cpp is asked where it is tight.

    Raises: PlanError when nothing fits, with a command for what does.
    """
    candidate = of_file(header)
    with contextlib.suppress(PlanError):
        plan = search([candidate], room, wishes, formula_count(room))
        if all(buffers.total + backend <= limit * _SPARE for _, buffers, backend, limit in plan.rows()):
            return plan
    try:
        return search([candidate], room, wishes, engine_count(header.path, room, []))
    except PlanError as error:
        error.smaller = advice.largest_model(room, wishes)
        smaller = [f"what fits: qwq-lite plan {error.smaller}"] if error.smaller else []
        error.args = ("; ".join([str(error), *list_memory_holders(), *smaller]),)
        raise


def adapt_plan(plan: RunPlan, header: gguf_header.Header, room: Room) -> tuple[RunPlan, str | None]:
    """A plan made before, in the room that there is now; another one, and a line about it, where that is too small.

    Raises: UsageError for another model's plan; PlanError when nothing fits any more.
    """
    if _sizes(plan.candidate.tensors) != _sizes(header.tensors):
        raise UsageError(
            f"{header.path}: the plan is for another file, {plan.candidate.label}; plan this one, or leave it out"
        )
    now = replace(plan, room=room)
    same_devices = plan.room.gpu_names == room.gpu_names
    if same_devices and not now.shortages():
        return now, None
    other = plan_header(header, room, plan.wishes)
    why = now.line() if same_devices else f"it is for {plan.room.gpu_names}, there are {room.gpu_names or 'no GPUs'}"
    return other, f"the plan does not fit what is here now ({why}); this is used instead: {other.line()}"


def _adapt_wishes(wishes: Wishes) -> tuple[Wishes, str | None]:
    """Wishes as `load` would have them by what is known of the engine, and a line about it; nothing is checked here."""
    report = kept_result.read()
    try:
        complaint = kept_result.complaint(report) if report else None
    except EngineError as error:  # a plan is still one
        return wishes, str(error)
    return (without_repacking(wishes) if complaint else wishes), complaint


def without_repacking(wishes: Wishes) -> Wishes:
    """Wishes for an engine whose kernels for other layouts fail: the next place for weights that needs none."""
    host_weights = {None: "no-repack", "mmap": "no-repack", "repacked": "pinned"}.get(wishes.host_weights)
    return replace(wishes, host_weights=host_weights or wishes.host_weights)


def _sizes(tensors: Sequence[TensorInfo]) -> dict[str, int]:
    return {info.name: info.n_bytes for info in tensors}


def list_notices(model: ModelShape, room: Room, wishes: Wishes) -> Iterator[str]:
    """What the user should know of wishes that are granted all the same, one line each."""
    if wishes.n_ctx and wishes.n_ctx > model.n_ctx_train and model.rope_scaling is None:
        yield (
            f"{wishes.n_ctx:,} tokens are more than the {model.n_ctx_train:,} that the model was trained for and its file has no"
            " rope scaling: answers get worse beyond them"
        )
    if wishes.n_gpu_layers and not room.gpus:
        yield "there is no GPU here: layers for it (--gpu-layers) are ignored"
    type_k = wishes.type_k or wishes.type_v or "f16"
    if (wishes.type_v or type_k) != type_k and any(name.startswith("CUDA") for name in room.gpu_names):
        yield "CUDA builds compute attention over unequal K and V (--type-k, --type-v) on the CPU, many times slower"


def list_memory_holders(plan: RunPlan | None = None) -> list[str]:
    """A line for each other engine on this machine and the memory that it holds.

    With a plan, only where the plan is worse for it, or where both use the same pages: what an engine has mapped counts as free
    for all others, until it reads its weights again.
    """
    others = [other for other in running_engines.running() if other.pid != os.getpid()]
    if plan is not None and not plan.refused:
        host = plan.footprint.host.total + sum(other.n_bytes for other in others)
        if host <= plan.room.host or plan.room.gpus:
            return []
    return [other.line() for other in others]
