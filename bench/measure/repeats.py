"""Labels exact repetition in a finished text, by brute force: every period from 1 to 1,024 tokens at every place. Offline.

This is the measure that a detector is held against, so it shares nothing with one: no thresholds, no code, no state. It reads
the whole text, which a detector never has. It does not know phases, code or what a user asked for.

A stretch of period p is as long as every token in it equals the one p before it. It is labelled as a loop when it has LEAST
tokens, and EIGHT repeats wherever it stands, or THREE when it reaches the end of the text. An end token counts as a token: what a
model ended by itself after three copies does not reach the end of a text that is given with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LONGEST = 1024  # tokens of a period
LEAST = 64  # tokens of a loop, its first copy among them
EIGHT, THREE = 8, 3


class Repeat(NamedTuple):
    """Tokens start to end, each of which but the first `period` equals the one `period` before it; no longer stretch does."""

    start: int
    end: int
    period: int

    @property
    def n_copies(self) -> int:
        """Whole copies, the first among them."""
        return (self.end - self.start) // self.period


def stretches(tokens: Sequence[int], least: int = 2) -> list[Repeat]:
    """Every longest stretch with so many copies, by its place; of those that are the same under several periods the shortest."""
    row = np.asarray(tokens, dtype=np.int64)
    found: list[Repeat] = []
    for period in range(1, min(LONGEST, len(row) // least) + 1):
        same = np.concatenate(([False], row[period:] == row[:-period], [False]))
        edges = np.flatnonzero(same[1:] != same[:-1])
        for first, last in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            repeat = Repeat(first, last + period, period)
            if repeat.n_copies >= least and not any(_contains(other, repeat) for other in found):
                found.append(repeat)
    return sorted(found)


def loops(tokens: Sequence[int]) -> list[Repeat]:
    """The stretches that are labelled as loops."""
    return [
        repeat
        for repeat in stretches(tokens, THREE)
        if repeat.end - repeat.start >= LEAST
        and (repeat.n_copies >= EIGHT or (repeat.n_copies >= THREE and repeat.end == len(tokens)))
    ]


def _contains(outer: Repeat, inner: Repeat) -> bool:
    return outer.start <= inner.start and inner.end <= outer.end and inner.period % outer.period == 0
