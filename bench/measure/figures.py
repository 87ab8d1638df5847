"""Figures of a measurement on a machine that others use too: alternated rounds, spreads, verdicts, a table, one JSON line.

Knows no engine. A figure's name ends with its unit: `_tok_s`, `_ms`, `_us`, `_ratio`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """What is said of a list of values, all in the unit of the figure's name."""

    median: float
    mean: float
    min: float
    q1: float
    q3: float
    n: int


def spread(values: Sequence[float]) -> Spread:
    """Median, mean, least value and quartiles. Raises: StatisticsError for no values."""
    q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Spread(statistics.median(values), statistics.fmean(values), min(values), q1, q3, len(values))


def alternate(contestants: Mapping[str, Callable[[], T]], rounds: int, first: int = 0) -> dict[str, list[T]]:
    """Each contestant once a round, the first of a round being another one each time: a slow minute hits them all."""
    results: dict[str, list[T]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(first, first + rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            results[name].append(contestants[name]())
    return results


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """One ratio a round: both values of a round were measured side by side."""
    return [a / b for a, b in zip(above, below, strict=True)]


@dataclass
class Report:
    """Figures in the order in which they came, and what was asked of them."""

    figures: dict[str, Spread] = field(default_factory=dict)
    passed: dict[str, bool] = field(default_factory=dict)
    verdicts: list[str] = field(default_factory=list)

    def add(self, name: str, values: Sequence[float]) -> None:
        self.figures[name] = spread(values)

    def require(self, name: str, *, at_least: float | None = None, at_most: float | None = None) -> None:
        """A must: the figure's median against a bound."""
        found = self.figures[name]
        value = found.median
        good = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
        bound = f"at least {at_least:g}" if at_least is not None else f"at most {at_most:g}"
        self.passed[name] = good
        quartiles = f"quartiles {found.q1:.4g} and {found.q3:.4g}"
        self.verdicts.append(f"{'PASS' if good else 'FAIL'}  {name}: {value:.4g}, {quartiles}; asked: {bound}")

    def show(self, facts: Mapping[str, Any]) -> None:
        """The table, a line for each must, and the JSON line, on stdout."""
        table = Table(*("figure", "median", "min", "quartile 1", "quartile 3", "mean", "n"))
        for column in table.columns[1:]:
            column.justify = "right"
        for name, s in self.figures.items():
            values = (s.median, s.min, s.q1, s.q3, s.mean)
            table.add_row(name, *(f"{value:.4g}" for value in values), str(s.n))
        Console(width=110, highlight=False).print(table)
        for verdict in self.verdicts:
            print(verdict)
        figures = {name: {key: round(value, 5) for key, value in vars(s).items()} for name, s in self.figures.items()}
        print(json.dumps({**facts, "figures": figures, "passed": self.passed}))
