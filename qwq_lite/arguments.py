"""Numbers that a caller gives: checked against what is allowed, and made Python's own, numpy's for instance.

A number of another library is neither an `int` nor JSON, and would be refused late and in other words.
"""

from __future__ import annotations

import numbers
import operator
from typing import Any

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
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise UsageError(f"{name} is {value!r}, a number is allowed")
    return value if isinstance(value, int) else float(value)


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number of any library."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
