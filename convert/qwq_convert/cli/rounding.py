"""What rounding did to the weights, on the terminal and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import click
from gguf.constants import GGMLQuantizationType

from qwq_convert.roundtrip import RoundTrip
from qwq_lite.cli.console import escaped

_WORST = 8  # tensors shown of a comparison


def show(errors: Mapping[str, RoundTrip], types: Mapping[str, GGMLQuantizationType]) -> None:
    """The tensors that are furthest from the checkpoint, on stdout."""
    worst = sorted(errors, key=lambda name: _rank(errors[name]), reverse=True)[:_WORST]
    width = max(len(escaped(name)) for name in worst)
    click.echo(f"Furthest from the checkpoint, {len(worst)} of {len(errors)} tensors:")
    click.echo(f"{'tensor':{width}}  {'type':>7}  {'RMSE':>9}  {'of RMS':>8}  {'max':>9}  {'cosine':>9}")
    for name in worst:
        error = errors[name]
        figures = f"{error.rmse:9.3g}  {error.relative:8.3%}  {error.max_error:9.3g}  {error.cosine:9.6f}"
        click.echo(f"{escaped(name):{width}}  {types[name].name:>7}  {figures}")


def as_dict(errors: Mapping[str, RoundTrip]) -> dict[str, Any]:
    """By tensor. What is not finite is null, for JSON has no word for it."""
    return {
        name: {
            "rmse": _number(error.rmse),
            "relative": _number(error.relative),
            "max": _number(error.max_error),
            "cosine": _number(error.cosine),
        }
        for name, error in errors.items()
    }


def _rank(error: RoundTrip) -> float:
    return math.inf if math.isnan(error.relative) else error.relative


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
