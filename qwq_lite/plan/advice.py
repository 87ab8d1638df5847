"""Other plans than the one that was found: models that fit or are faster, a weight type that fits the GPU, a raised limit.

Each function makes searches of its own, by formula, when it is called. None changes the plan.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from qwq_lite.errors import PlanError
from qwq_lite.formats import header_only
from qwq_lite.formats.tensor_types import file_type
from qwq_lite.plan.buffer_counts import formula_count
from qwq_lite.plan.candidates import DEFAULT_TYPE, conversions
from qwq_lite.plan.run_plan import Candidate, Room, RunPlan, Wishes
from qwq_lite.plan.search import search
from qwq_lite.store import catalog


def largest_model(room: Room, wishes: Wishes) -> str | None:
    """The largest model of the catalogue, at Q4_K_M, that a room can run."""
    return next((name for name, _ in _catalog_plans(room, wishes)), None)


def faster_model(plan: RunPlan) -> str | None:
    """For a slow plan the largest model of the catalogue that is not slow, or else the fastest; None where none is faster."""
    if not plan.slow:
        return None
    plans = _catalog_plans(plan.room, plan.wishes)
    faster = [(name, other) for name, other in plans if other.decode_tok_s > plan.decode_tok_s]
    quick = [name for name, other in faster if not other.slow]
    names = quick or [name for name, _ in reversed(faster)]
    return names[0] if names else None


def raised_limit(plan: RunPlan) -> str | None:
    """The command that raises a Mac's limit of GPU memory until its next start, where a better plan comes of it."""
    room = plan.room
    if not room.unified or room.gpus[0].n_bytes >= room.unified:
        return None
    more = replace(room, gpus=(replace(room.gpus[0], n_bytes=room.unified),))
    with contextlib.suppress(PlanError):
        better = search([plan.candidate], more, plan.wishes, formula_count(more)).choice
        before = search([plan.candidate], room, plan.wishes, formula_count(room)).choice
        if better != before:
            return f"sudo sysctl iogpu.wired_limit_mb={room.unified >> 20}"
    return None


def gpu_weight_type(plan: RunPlan) -> str | None:
    """A line about the largest weight type that would be all on the GPU, for a conversion whose plan is not."""
    if not plan.room.gpus or plan.wishes.n_gpu_layers is not None or not plan.footprint.host.kv:
        return None
    _, tied = plan.candidate.embedding
    for candidate in conversions(plan.candidate.shape, tied, plan.candidate.label)[1:]:
        with contextlib.suppress(PlanError):
            other = search([candidate], plan.room, plan.wishes, formula_count(plan.room))
            if not other.footprint.host.kv:
                return f"{candidate.label} (-q {candidate.label}) would be all on the GPU: {other.line()}"
    return None


def _catalog_plans(room: Room, wishes: Wishes) -> Iterator[tuple[str, RunPlan]]:
    """Models of the catalogue that fit, the largest first, and their plans."""
    by_size = sorted(catalog.GEOMETRIES.values(), key=lambda pair: -pair[1].n_layer * pair[1].n_embd)
    for known, shape in by_size:
        candidate = Candidate(DEFAULT_TYPE, shape, header_only.tensors(shape, file_type(DEFAULT_TYPE)))
        with contextlib.suppress(PlanError):
            yield known.name, search([candidate], room, wishes, formula_count(room))
