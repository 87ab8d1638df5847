"""Limits of one rendering of a chat template: steps, bytes, seconds. Knows no template.

A budget is charged before work is done or a value is made, from lengths alone. Counts come first, so that the same
template ends at the same place on every machine; the clock ends what the counts misjudge.
"""

from __future__ import annotations

import re
import time
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from contextvars import ContextVar
from typing import Any

from jinja2 import Undefined
from markupsafe import Markup

from qwq_lite.errors import TemplateError

FIELD = "tokenizer.chat_template"
MAX_STEPS = 500_000  # about a microsecond each, so that a slow machine comes to a count before the clock
MAX_BYTES = 96 << 20  # made in one rendering, all together
MAX_VALUE = 24 << 20  # bytes of one value, as foreseen
MAX_DEPTH = 64  # of lists in lists; hash() of a deep tuple would overflow C's stack
MAX_UNIQUE = 4_000  # a set takes the square where hashes collide
MAX_INT = 1 << 60  # below the modulus of Python's hash: no two whole numbers collide, and arithmetic stays cheap
MAX_DIGITS = 1_000  # that int and float read, in quadratic time
TIME_LIMIT_S = 2.0

OBJECT_BYTES = 64  # bytes of a small object and the reference to it
PART_BYTES = 32  # bytes a character at most, where a text is cut into words or lines
ESCAPED_BYTES = 24  # bytes a character at most, as \u0000 beside a wide character
SCALARS = (int, float, str, type(None), Undefined)
_ESCAPED = re.compile(r"\\(?:\\|ufd[de][0-9a-f])")  # as Python writes a backslash, or a noncharacter, in a list
_LISTS = (
    list,
    tuple,
    range,
    KeysView,
    ValuesView,
    ItemsView,
    dict,
    Mapping,
)  # the frequent and the quick to tell first


class Budget:
    """What one rendering may still spend. Each method raises TemplateError when it is spent."""

    def __init__(self, time_limit_s: float) -> None:
        self._time_limit_s = time_limit_s
        self._deadline = time.monotonic() + time_limit_s
        self._steps = MAX_STEPS
        self._bytes = MAX_BYTES

    def step(self, count: int = 1) -> None:
        """Work done or about to be done."""
        self._steps -= count
        if self._steps < 0:
            raise limit_error(f"more than {MAX_STEPS:,} steps of work")
        if time.monotonic() > self._deadline:
            raise limit_error(f"more time than {self._time_limit_s:g} s")

    def check(self, size: int) -> None:
        """A value of `size` bytes is about to be made."""
        if size > MAX_VALUE:
            raise limit_error(f"a value of {size:,} bytes, more than {MAX_VALUE:,}")
        if size > self._bytes:
            raise limit_error(f"more than {MAX_BYTES:,} bytes of text and lists")

    def grow(self, size: int) -> None:
        """`size` bytes are made."""
        self.check(size)
        self._bytes -= size + OBJECT_BYTES

    def scan(self, text: str, *needles: str, letters: bool = False) -> None:
        """A text is read through or searched. Python's searches can take the product of the lengths, and stripping does,
        where each letter is looked up in the needle (`letters`).
        """
        pairs = sum((len(text) if letters else max(len(text) - len(needle), 0)) * len(needle) for needle in needles)
        self.step(1 + (len(text) >> 8) + (pairs >> 10))

    def each(self, values: Iterable[Any]) -> Iterator[Any]:
        """The values, a step and a reference charged for each."""
        for value in values:
            self.step(2)
            self.grow(0)
            yield value

    def weigh(self, value: Any, times: int = 1) -> int:
        """Charges every element in `value`, as often as it is reached, and returns the bytes its text takes at most."""
        size, steps, open_lists = 0, 0, [iter((value,))]
        while open_lists:
            if steps > 1000:
                self.step(steps)
                steps = 0
            for item in open_lists[-1]:
                size += OBJECT_BYTES + 16 * len(open_lists)
                steps += times
                if isinstance(item, str):
                    steps += times * (len(item) >> 8)
                    size += ESCAPED_BYTES * len(item)
                elif not isinstance(item, SCALARS):
                    open_lists.append(self._opened(item, len(open_lists)))
                    break
                if steps > 1000:
                    break
            else:
                open_lists.pop()
        self.step(steps)
        return size

    def _opened(self, value: Any, depth: int) -> Iterator[Any]:
        if not isinstance(value, _LISTS):
            raise limit_error(f"a {type(value).__name__} where only text, numbers, lists and mappings may stand")
        if depth > MAX_DEPTH:
            raise limit_error(f"lists nested more than {MAX_DEPTH} deep")
        return iter(value if isinstance(value, _LISTS[:-2]) else value.items())


CURRENT: ContextVar[Budget] = ContextVar("budget")  # a thread's own: the environment is shared


def budget_now() -> Budget:
    """The budget of the rendering that goes on in this thread."""
    return CURRENT.get()


def limit_error(found: str) -> TemplateError:
    return TemplateError(f"{FIELD} asks for {found}; it is broken or hostile, use another template")


def width_of(text: str) -> int:
    """Bytes a character at most. What is joined to a text that is marked safe may be escaped: five for one."""
    return (1 if text.isascii() else 4) * (5 if isinstance(text, Markup) else 1)


def cost(*texts: str) -> int:
    """Bytes of the texts as one, or more: the widest character decides for all."""
    return sum(map(len, texts)) * max(map(width_of, texts))


def charge_text(text: str) -> str:
    budget_now().grow(cost(text))
    return text


def text_of(value: Any) -> str:
    """A value as text. The noncharacters stay as they are: prompt marks texts by them."""
    if isinstance(value, str):
        return value
    budget = budget_now()
    budget.check(budget.weigh(value))
    if isinstance(value, SCALARS):
        return charge_text(str(value))
    return charge_text(
        _ESCAPED.sub(lambda found: chr(int(found[0][2:], 16)) if found[0][1] == "u" else found[0], str(value))
    )


def check_key(value: Any) -> Any:
    """A key of a mapping. A tuple's hash would walk all that it holds."""
    if not isinstance(value, SCALARS):
        raise TypeError(f"a key is text or a number, not a {type(value).__name__}")
    if isinstance(value, str):
        budget_now().check(ESCAPED_BYTES * len(value))  # a message about a missing key spells it
    return value
