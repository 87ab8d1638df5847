"""What is exhaustive: a sample of it in `make test`, the rest in `make attack`, and there more of each law and loop.

@pytest.mark.parametrize("place", sample(range(1000), 20))     the other 980 run in `make attack`
@examples(400)                                                 a fifth of a law's examples in `make test`
for _ in range(times(1000)):                                   in a test marked `sampled`
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import pytest
from hypothesis import settings

T = TypeVar("T")
Test = TypeVar("Test", bound=Callable[..., Any])

in_full = False  # set by conftest before any test is read
_SHARE = 5


def sample(values: Iterable[T], n: int) -> list[Any]:
    """Parameters of a test: n of them, spread evenly, in `make test`; the others in `make attack`."""
    found = list(values)
    kept = {i * len(found) // n for i in range(n)}
    return [value if i in kept else _in_attack(value) for i, value in enumerate(found)]


def _in_attack(value: Any) -> Any:
    if type(value).__name__ == "ParameterSet":
        return pytest.param(*value.values, marks=[*value.marks, pytest.mark.attack], id=value.id)
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=pytest.mark.attack)


def times(n: int) -> int:
    """How often a test that is marked `sampled` tries: n times in `make attack`, a fifth of that in `make test`."""
    return n if in_full else max(1, n // _SHARE)


def examples(n: int) -> Callable[[Test], Test]:
    """A law with n examples in `make attack`, and a fifth of that in `make test`."""

    def decorate(test: Test) -> Test:
        return pytest.mark.sampled(settings(max_examples=times(n))(test))  # type: ignore[no-any-return]

    return decorate
