"""What a model in this process runs on: header, plan, weights and context, opened together. Knows no requests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qwq_lite.backend import devices
from qwq_lite.backend.context import Context, ContextSettings
from qwq_lite.backend.hardware import EngineReport
from qwq_lite.backend.model import LoadedModel
from qwq_lite.engine.load_options import LoadOptions
from qwq_lite.errors import EngineError
from qwq_lite.events import Progress
from qwq_lite.formats import gguf_header
from qwq_lite.plan import free_memory, planning, speed
from qwq_lite.plan.run_plan import Room, RunPlan
from qwq_lite.selftest import kept_result
from qwq_lite.system import running_engines


@dataclass(frozen=True)
class LoadedEngine:
    """Weights and context that are open, and what is known of them."""

    header: gguf_header.Header
    weights: LoadedModel
    context: Context
    plan: RunPlan  # what it runs with
    report: EngineReport  # llama.cpp and its devices
    notices: tuple[str, ...]  # what the user should know of the plan, one line each
    leave: Callable[[], None]  # tells other programs that its memory is free again


@contextlib.contextmanager
def open_engine(
    file: Path, options: LoadOptions, on_progress: Callable[[Progress], None] | None = None
) -> Iterator[LoadedEngine]:
    """A model's engine. It stays open, unless the body of the `with` raises: then all is closed.

    Raises: FormatError, PlanError, EngineError.
    """
    header = gguf_header.read(file)
    # Before llama.cpp is loaded here: a broken one may end this process.
    complaint = kept_result.complaint(kept_result.check_once())
    report = devices.report()
    room = free_memory.room_here(report, options.memory)
    plan, notice = _find_plan(header, room, options, avoid_repacking=bool(complaint))
    leave = running_engines.register(file, plan.footprint.total)  # before it is loaded: two programs may start together
    try:
        with contextlib.ExitStack() as opened:
            opened.callback(leave)
            notices = (
                *(line for line in (complaint, notice) if line),
                *planning.list_notices(plan.candidate.shape, room, plan.wishes),
                *planning.list_memory_holders(plan),
            )
            weights = LoadedModel(
                file, plan.choice, token_types=_token_types(header), on_progress=_share_reporter(on_progress)
            )
            opened.callback(weights.close)
            n_threads = speed.default_threads() if options.n_threads is None else options.n_threads
            context = Context(weights, ContextSettings.of(plan.choice, n_threads))
            opened.callback(context.close)
            yield LoadedEngine(header, weights, context, plan, report, notices, leave)
            opened.pop_all()
    except EngineError as error:  # what was free a moment ago may be gone
        error.args = ("; ".join([f"{error}; the plan was {plan.line()}", *planning.list_memory_holders()]),)
        raise


def _find_plan(
    header: gguf_header.Header, room: Room, options: LoadOptions, *, avoid_repacking: bool
) -> tuple[RunPlan, str | None]:
    """The plan that was given, adapted to what is free, or a new one; and a notice where it is another."""
    plan, notice = options.plan, None
    if plan is not None:
        plan, notice = planning.adapt_plan(plan, header, room)
    if plan is None or (avoid_repacking and plan.choice.repack):
        wishes = options.wishes if plan is None else plan.wishes
        plan = planning.plan_header(header, room, planning.without_repacking(wishes) if avoid_repacking else wishes)
    return plan, notice


def _token_types(header: gguf_header.Header) -> list[int] | None:
    types = header.keys.get("tokenizer.ggml.token_type")
    return [kind for kind in types if isinstance(kind, int)] if isinstance(types, list) else None


def _share_reporter(on_progress: Callable[[Progress], None] | None) -> Callable[[float], None]:
    def report(share: float) -> None:
        if on_progress is not None:
            on_progress(Progress("load", share, 1.0))

    return report
