"""Checks of numbers: those that a caller gives, and those that a file or a message holds.

A caller's number becomes Python's own: numpy's, for example, is neither an `int` nor JSON, and would be refused late.
"""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any, TypeGuard

from qwq_lite.errors import UsageError


def check_whole(name: str, value: Any, low: int, high: int) -> int:
    """Raises: UsageError for what is no whole number from low to high; True and False are none."""
    if not isinstance(value, bool):
        try:
            number = operator.index(value)
        except TypeError:
            pass
        else:
            if low <= number <= high:
                return number
    raise UsageError(f"{name} is {value!r}, a whole number from {low} to {high} is allowed")


def check_real(name: str, value: Any) -> float:
    """Raises: UsageError for what is no number; True and False are none."""
    if not is_real(value):
        raise UsageError(f"{name} is {value!r}, a number is allowed")
    return value if isinstance(value, int) else float(value)


def is_whole(value: Any, low: float = -math.inf, high: float = math.inf) -> TypeGuard[int]:
    """Whether a value is a whole number of any library, from low to high; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and low <= int(value) <= high


def is_real(value: Any) -> TypeGuard[float]:
    """Whether a value is a number of any library; True and False are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
