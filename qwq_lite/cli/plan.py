"""qwq-lite plan: what a model takes on this machine, or on a known one, before anything is downloaded."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from typing import Any

import click

from qwq_lite import planning
from qwq_lite.cli import console
from qwq_lite.errors import PlanError, UsageError
from qwq_lite.plan import GIB, LONG_TOKENS, TYPICAL_TOKENS, RunPlan, Wishes
from qwq_lite.planning import Planned

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}
_PATIENCE_MIN = 10
_OPTIONS = {"n_ctx": "ctx", "type_k": "type-k", "type_v": "type-v", "n_gpu_layers": "gpu-layers"}


@click.command()
@click.argument("model")
@click.option("-q", "--quant", help="Weight type of a file that does not exist yet.  [default: Q4_K_M]")
@click.option("--memory", help="Use so much: of the GPU where there is one, else of main memory. 24GiB, 22.5GiB, 24GB.")
@click.option("--machine", help="Plan for a known machine instead of this one: rtx-3090, m3-max-36gb, laptop-16gb, …")
@click.option(
    "--ctx",
    "n_ctx",
    type=click.IntRange(256, 1 << 24),
    help="Context in tokens.  [default: the model's, at most 32768]",
)
@click.option("--type-k", help="Type of the K cache: f16, bf16, q8_0, q4_0.  [default: f16, or q8_0 where it must]")
@click.option("--type-v", help="Type of the V cache.  [default: that of the K cache]")
@click.option(
    "--gpu-layers", "n_gpu_layers", type=click.IntRange(-1), help="Layers on the GPU.  [default: as many as fit]"
)
@click.option("--reserve", default="0", help="Keep so much free beside.  [default: 0]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def command(
    model: str,
    quant: str | None,
    memory: str | None,
    machine: str | None,
    reserve: str,
    as_json: bool,
    **wanted: Any,
) -> None:
    """Say what MODEL takes, and choose context, KV type and offload for it.

    \b
    MODEL is a GGUF file, a checkpoint folder, or a name: qwq-32b-preview, qwq-32b,
    deepseek-r1-distill-qwen-1.5b, -7b, -14b, -32b. Nothing is downloaded, no weight is read.

    Example: qwq-lite plan qwq-32b-preview --machine rtx-3090
    """
    wishes = Wishes(**_checked(wanted))
    memory_bytes, reserve_bytes = None if memory is None else _bytes("--memory", memory), _bytes("--reserve", reserve)
    try:
        planned = planning.plan_model(
            model,
            quant=quant,
            memory_bytes=memory_bytes,
            machine=machine,
            reserve_bytes=reserve_bytes,
            wishes=wishes,
        )
    except PlanError as error:
        room = planning.room_of(machine, memory_bytes, reserve_bytes)
        smaller = planning.what_fits(room, wishes)
        given = {"machine": machine, "memory": memory, "reserve": None if reserve == "0" else reserve, **wanted}
        words = [
            f"--{_OPTIONS.get(name, name)} {shlex.quote(str(value))}"
            for name, value in given.items()
            if value is not None
        ]
        advice = f"; what fits: {' '.join(['qwq-lite plan', smaller, *words])}" if smaller else ""
        raise PlanError(f"{error}{advice}") from error
    for notice in planned.notices:
        console.note(notice)
    if as_json:
        click.echo(json.dumps(_as_dict(planned), indent=2))
    else:
        _show(planned)


def _checked(wanted: dict[str, Any]) -> dict[str, Any]:
    from qwq_lite.memory import KV_TYPES

    for name in ("type_k", "type_v"):
        value = wanted[name]
        if value is not None and value.lower() not in KV_TYPES:
            raise UsageError(f"--{name.replace('_', '-')} is {value!r}; known are {', '.join(KV_TYPES)}")
        wanted[name] = value and value.lower()
    return wanted


def _bytes(name: str, text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?i?)b?", text.strip(), re.IGNORECASE)
    if match is None or match[2].upper() not in _UNITS:
        raise UsageError(f"{name} is {text!r}; a number with a unit is expected, for example 24GiB")
    n_bytes = float(match[1]) * _UNITS[match[2].upper()]
    if n_bytes >= 1 << 60:
        raise UsageError(f"{name} is {text!r}; less than 1024 PiB is expected, for example 24GiB")
    return round(n_bytes)


def _show(planned: Planned) -> None:
    from rich.console import Console
    from rich.table import Table

    plan = planned.plan
    out = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120)
    for line in _too_slow(plan):
        click.secho(line, fg="yellow", bold=True)
    click.echo(f"{planned.model}, {plan.candidate.label}, on {planned.room_source}")
    click.secho(plan.line(), bold=True)
    table = Table("GiB", "weights", "KV", "compute", "backend", "total", "of", "free")
    for name, row in _rows(plan):
        table.add_row(name, *(f"{value / GIB:.2f}" for value in row))
    out.print(table)
    click.echo(f"Buffers: {plan.footprint.source}." + (" Backend: table." if plan.room.gpu else ""))
    host = plan.footprint.host
    if host.reclaimable:
        click.echo(f"Read once for repacking, and reclaimable: {host.reclaimable / GIB:.2f} GiB.")
    for other in plan.next_best:
        click.echo(f"Also fits: {other.line()}")
    for reason in plan.refused:
        click.echo(f"Refused: {reason}")
    if plan.decode_tok_s:
        click.echo(f"Estimate: {plan.decode_tok_s:.1f} tok/s at most; {_minutes(plan)}.")
    click.echo(f"Next: {_next(planned)}")


def _rows(plan: RunPlan) -> Iterator[tuple[str, list[int]]]:
    for name, buffers, backend, limit in plan.rows():
        total = buffers.total + backend
        yield name, [buffers.weights, buffers.kv, buffers.compute, backend, total, limit, limit - total]


def _minutes(plan: RunPlan) -> str:
    typical, long = (n / plan.decode_tok_s / 60 for n in (TYPICAL_TOKENS, LONG_TOKENS))
    return (
        f"a typical answer ({TYPICAL_TOKENS:,} tokens) {typical:.1f} minutes, a long one ({LONG_TOKENS:,}) {long:.0f}"
    )


def _too_slow(plan: RunPlan) -> Iterator[str]:
    if plan.decode_tok_s and TYPICAL_TOKENS / plan.decode_tok_s / 60 > _PATIENCE_MIN:
        yield f"Slow: {plan.decode_tok_s:.1f} tok/s at most, {_minutes(plan)}."
        yield "Faster: a smaller model, qwq-lite plan deepseek-r1-distill-qwen-7b"


def _next(planned: Planned) -> str:
    choice = planned.plan.choice
    if planned.file is None:
        return f"hf download the checkpoint, then qwq-lite convert FOLDER -q {planned.plan.candidate.label}"
    words = ["qwq-lite", "chat", shlex.quote(str(planned.file)), "--ctx", str(choice.n_ctx)]
    words += ["--type-k", choice.type_k, "--type-v", choice.type_v]
    if planned.plan.room.gpu:
        words += ["--gpu-layers", str(choice.n_gpu_layers)]
    return " ".join(words)


def _as_dict(planned: Planned) -> dict[str, Any]:
    from dataclasses import asdict

    plan = planned.plan
    return {
        "model": planned.model,
        "weight_type": plan.candidate.label,
        "on": planned.room_source,
        "choice": asdict(plan.choice),
        "source": plan.footprint.source,
        "devices": {
            name: dict(zip(("weights", "kv", "compute", "backend", "total", "limit", "free"), row, strict=True))
            for name, row in _rows(plan)
        },
        "reclaimable": plan.footprint.host.reclaimable,
        "decode_tok_s_estimate": round(plan.decode_tok_s, 2),
        "refused": list(plan.refused),
        "next_best": [other.line() for other in plan.next_best],
        "next": _next(planned),
    }
