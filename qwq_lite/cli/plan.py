"""qwq-lite plan: what a model takes on this machine, or on a known one, before anything is downloaded."""

from __future__ import annotations

import functools
import importlib
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from qwq_lite.cli import console
from qwq_lite.cli.load_options import add_load_options
from qwq_lite.errors import PlanError, UsageError
from qwq_lite.plan import planning
from qwq_lite.plan.planning import Planned
from qwq_lite.plan.run_plan import LONG_TOKENS, TYPICAL_TOKENS, RunPlan, Wishes
from qwq_lite.store import catalog
from qwq_lite.system.units import GIB

_UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}
_COLUMNS = ("weights", "kv", "compute", "backend", "total", "limit", "free")


@click.command(cls=console.Command)
@click.argument("model")
@click.option("-q", "--quant", help="Weight type of a file that does not exist yet.  [default: Q4_K_M]")
@click.option("--memory", help="Use so much: of the GPU where there is one, else of main memory. 24GiB, 22.5GiB, 24GB.")
@click.option("--machine", help="Plan for a known machine instead of this one: rtx-3090, m3-max-36gb, laptop-16gb, …")
@add_load_options(default_ctx="the model's", most_threads=512)
@click.option("--reserve", default="0", help="Keep so much free beside.  [default: 0]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def command(
    model: str,
    quant: str | None,
    memory: str | None,
    machine: str | None,
    reserve: str,
    n_threads: int | None,
    as_json: bool,
    **wanted: Any,
) -> None:
    """Say what MODEL takes, and choose context, KV type and offload for it.

    \b
    MODEL is a GGUF file, a checkpoint folder, or a name: qwq-32b-preview, qwq-32b,
    deepseek-r1-distill-qwen-1.5b, -7b, -14b, -32b. Nothing is downloaded, no weight is read.

    Example: qwq-lite plan qwq-32b-preview --machine rtx-3090
    """
    wanted = {name: value.lower() if isinstance(value, str) else value for name, value in wanted.items()}
    wishes = Wishes(**wanted)
    given = {
        "threads": n_threads,
        "machine": machine,
        "memory": memory,
        "reserve": None if reserve == "0" else reserve,
        **wanted,
    }
    again = functools.partial(_again, given)
    memory_bytes, reserve_bytes = None if memory is None else _bytes("--memory", memory), _bytes("--reserve", reserve)
    try:
        with console.signals_raise():  # it makes a temporary file
            planned = planning.plan_model(
                model,
                quant=quant,
                memory_bytes=memory_bytes,
                machine=machine,
                reserve_bytes=reserve_bytes,
                n_threads=n_threads,
                wishes=wishes,
            )
    except PlanError as error:
        advice = f"; what fits: {again(error.smaller)}" if error.smaller else ""
        raise PlanError(f"{error}{advice}") from error
    planned = replace(planned, notices=(*planned.notices, *_refusal(Path(model))))
    for notice in planned.notices:
        console.note(console.escaped(notice))
    if as_json:
        click.echo(json.dumps(_as_dict(planned), indent=2))
    else:
        _show(planned, again)


def _refusal(model: Path) -> Iterator[str]:
    """A notice where `convert` would refuse the folder that is planned for."""
    if not model.is_dir():
        return
    inspection = importlib.import_module("qwq_convert.inspection")  # by its name: the runtime knows no checkpoints
    first, *more = inspection.faults(model) or (None,)
    if first is not None:
        others = f", and {len(more)} more: qwq-lite inspect {shlex.quote(str(model))}" if more else ""
        yield f"convert will refuse this folder: {first}{others}"


def _again(given: dict[str, Any], model: str) -> str:
    """This command for another model."""
    words = [
        f"--{name.removeprefix('n_').replace('_', '-')} {shlex.quote(str(value))}"
        for name, value in given.items()
        if value is not None
    ]
    return " ".join(["qwq-lite plan", model, *words])


def _bytes(name: str, text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)b?|0", text.strip(), re.IGNORECASE)
    if match is not None and match[0] == "0":
        return 0
    if match is None:
        raise UsageError(f"{name} is {text!r}; a number with a unit is expected, for example 24GiB")
    n_bytes = float(match[1]) * _UNITS[match[2].upper()]
    if n_bytes >= 1 << 60:
        raise UsageError(f"{name} is {text!r}; less than 1024 PiB is expected, for example 24GiB")
    return round(n_bytes)


def _show(planned: Planned, again: Callable[[str], str]) -> None:
    from rich.console import Console
    from rich.table import Table

    plan, host = planned.plan, planned.plan.footprint.host
    terminal = sys.stdout.isatty()
    out = Console(file=sys.stdout, width=None if terminal else 120)

    def say(text: str, style: str | None = None) -> None:  # words stay whole on a terminal, lines in a pipe
        out.print(text, style=style, markup=False, highlight=False, soft_wrap=not terminal)

    if plan.slow:
        say(f"Slow: {_speed(plan)}", "bold yellow")
        say(f"Faster: {again(planned.faster) if planned.faster else 'a machine with a GPU'}", "yellow")
    label = "" if planned.file else f", {plan.candidate.label}"
    say(f"{planned.model}{label}, on {planned.room_name}")
    say(plan.line(), "bold")
    table = Table("GiB", *_COLUMNS)
    for name, row in _rows(plan):
        table.add_row(name, *(f"{value / GIB:.2f}" for value in row.values()))
    table.add_section()
    table.add_row("source", *(_sources(planned)[column] for column in _COLUMNS), style="dim")
    out.print(table)
    if host.mapped:
        copied = f"; {host.reclaimable / GIB:.2f} GiB more are read once and copied" if host.reclaimable else ""
        say(
            f"Of the host's, {host.mapped / GIB:.2f} GiB are pages of the file, which the system may take back{copied}."
        )
    for other in plan.next_best:
        say(f"Also fits: {other.line()}")
    for reason in plan.refused:
        say(f"Refused: {reason}")
    if planned.raise_limit:
        say(f"More for the GPU, until the next start: {planned.raise_limit}")
    if plan.decode_tok_s and not plan.slow:
        say(f"Estimate: {_speed(plan)}")
    for lead, command in zip(("Next:", "then:", "then:"), _next(planned), strict=False):
        click.echo(f"{lead} {command}")


def _rows(plan: RunPlan) -> Iterator[tuple[str, dict[str, int]]]:
    """Bytes by column, of each device. backend: what it takes beside the buffers; on the host, the vocabulary."""
    for name, buffers, backend, limit in plan.rows():
        total = buffers.total + backend
        row = [buffers.weights, buffers.kv, buffers.compute, backend, total, limit, limit - total]
        yield name, dict(zip(_COLUMNS, row, strict=True))


def _sources(planned: Planned) -> dict[str, str]:
    counted, limit = planned.plan.footprint.source, planned.room_source
    backend = "table" if len(planned.plan.footprint.devices) > 1 else "formula"
    return dict(zip(_COLUMNS, [counted, counted, counted, backend, "sum", limit, "rest"], strict=True))


def _speed(plan: RunPlan) -> str:
    typical, long = (f"{n / plan.decode_tok_s / 60:,.1f} minutes" for n in (TYPICAL_TOKENS, LONG_TOKENS))
    answers = f"a typical answer ({TYPICAL_TOKENS:,} tokens) takes {typical}, a long one ({LONG_TOKENS:,}) {long}"
    return f"about {plan.decode_tok_s:.1f} tok/s by the memory's bandwidth; {answers}"


def _next(planned: Planned) -> list[str]:
    """Commands from here to an answer, one after the other."""
    plan = planned.plan
    choice = plan.choice
    commands, file = [], str(planned.file)
    if planned.file is None:
        folder = planned.model
        if not Path(folder).is_dir():
            repository = catalog.geometry(folder)[0].repository
            folder = repository.rpartition("/")[2]
            commands.append(f"hf download {repository} --local-dir {folder}")
        commands.append(f"qwq-lite convert {shlex.quote(folder)} -q {plan.candidate.label}")
        name = Path(folder).name
        if name in ("", ".."):
            name = Path(folder).resolve().name
        file = f"{name}-{plan.candidate.label}.gguf"
    words = ["qwq-lite", "chat", shlex.quote(file), "--ctx", str(choice.n_ctx)]
    words += ["--type-k", choice.type_k, "--type-v", choice.type_v]
    if plan.room.gpus:
        words += ["--gpu-layers", str(choice.n_gpu_layers)]
    if plan.host_weights not in (None, "mmap"):
        words += ["--host-weights", plan.host_weights]
    return [*commands, " ".join(words)]


def _as_dict(planned: Planned) -> dict[str, Any]:
    from dataclasses import asdict

    plan = planned.plan
    return {
        "model": planned.model,
        "weight_type": None if planned.file else plan.candidate.label,
        "on": planned.room_name,
        "choice": asdict(plan.choice),
        "sources": _sources(planned),
        "devices": dict(_rows(plan)),
        "mapped": plan.footprint.host.mapped,
        "reclaimable": plan.footprint.host.reclaimable,
        "decode_tok_s_estimate": round(plan.decode_tok_s, 2),
        "notices": list(planned.notices),
        "refused": list(plan.refused),
        "next_best": [other.line() for other in plan.next_best],
        "faster": planned.faster,
        "raise_limit": planned.raise_limit,
        "next": _next(planned),
    }
