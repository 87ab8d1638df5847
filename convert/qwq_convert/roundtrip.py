"""How far a tensor moved on its way through a type: root mean square, largest error, cosine. Pure; knows no files.

Sums are taken in float64 over windows, and come together by `math.fsum`, which rounds once: windows may arrive in any order,
from any thread, and the same windows give the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_PIECE = 1 << 15  # values at a time: their float64 copies stay in a core's cache


class _Sums(NamedTuple):
    """Sums over some values."""

    n: float  # how many values
    errors: float  # of squared errors
    products: float  # of values before times after
    before: float  # of squares before
    after: float  # of squares after
    largest: float  # the largest error


class RoundTrip:
    """The error of one tensor. Any number of threads may add windows."""

    def __init__(self) -> None:
        self._windows: dict[int, _Sums] = {}

    def add(self, first_row: int, source: Floats, result: Floats) -> None:
        """Count the window that starts at `first_row`. Shapes: source and result (n,), the same values before and after.

        Raises: ValueError when the shapes differ.
        """
        if source.shape != result.shape:
            raise ValueError(f"{source.size} values before, {result.size} after")
        with np.errstate(all="ignore"):  # what is not finite shows in the figures
            pieces = [
                _measure(source[start : start + _PIECE], result[start : start + _PIECE])
                for start in range(0, source.size, _PIECE)
            ]
        self._windows[first_row] = _join(pieces)

    @property
    def rmse(self) -> float:
        """Root of the mean squared error, in the tensor's own unit; 0 for no values, NaN where a value is not finite."""
        sums = self._sums
        return math.sqrt(sums.errors / sums.n) if sums.n else 0.0

    @property
    def relative(self) -> float:
        """`rmse` over the root mean square of the source, by which tensors of different scales compare."""
        sums = self._sums
        if sums.before == 0:
            return 0.0 if sums.errors == 0 else math.inf
        return math.sqrt(sums.errors / sums.before)

    @property
    def max_error(self) -> float:
        """The largest difference; NaN where a value is not finite."""
        return self._sums.largest

    @property
    def cosine(self) -> float:
        """Cosine of the angle between before and after; 1 where both are all zeros, 0 where one is, NaN as above."""
        sums = self._sums
        if sums.before == 0 or sums.after == 0:
            return float(sums.before == sums.after)
        cosine = sums.products / math.sqrt(sums.before * sums.after)
        return cosine if math.isnan(cosine) else max(-1.0, min(1.0, cosine))

    @property
    def _sums(self) -> _Sums:
        return _join(list(self._windows.values()))


def _join(parts: Sequence[_Sums]) -> _Sums:
    if not all(math.isfinite(value) for part in parts for value in part):  # fsum raises where infinities meet
        nan = math.nan
        return _Sums(math.fsum(part.n for part in parts), nan, nan, nan, nan, nan)
    n, errors, products, before, after = (math.fsum(part[field] for part in parts) for field in range(5))
    return _Sums(n, errors, products, before, after, max((part.largest for part in parts), default=0.0))


def _measure(source: Floats, result: Floats) -> _Sums:
    before, after = source.astype(np.float64), result.astype(np.float64)
    errors = np.abs(before - after)
    largest = float(errors.max())
    # Not np.dot: the BLAS behind it has threads of its own, and sums in the order in which they finish.
    return _Sums(
        source.size,
        float(np.square(errors, out=errors).sum()),
        float((before * after).sum()),
        float(np.square(before, out=before).sum()),
        float(np.square(after, out=after).sum()),
        largest,
    )
