"""Fenced blocks of code: which line opens one, and which closes it. Pure.

Source: CommonMark 0.31, 4.5, but for the indentation: a fence may be indented as far as it likes, as in lists.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_BLANK = " \t"
_FENCE = re.compile(r"(`{3,})[^`]*|(~{3,}).*", re.DOTALL)


def opens(line: str) -> str:
    """The fence with which a line opens a block of code, "" where it opens none."""
    found = _FENCE.fullmatch(_strip(line))
    return (found[1] or found[2]) if found else ""


def closes(line: str, fence: str) -> bool:
    """Whether a line closes the block of code that `fence` opened."""
    bare = _strip(line)
    return len(bare) >= len(fence) and not bare.strip(fence[0])


def _strip(line: str) -> str:
    """A line without its indentation, and without blanks and the carriage return at its end."""
    return line.lstrip(_BLANK).rstrip(_BLANK + "\r")


def fence_after(fence: str, line: str) -> str:
    """The fence of the block that goes on after a line, "" outside of one. fence: that of the block which the line stands in."""
    if fence:
        return "" if closes(line, fence) else fence
    return opens(line)


class FencedLine(NamedTuple):
    """A line of a text, and the blocks of code around it."""

    start: int  # its place in the text
    text: str
    before: str  # the fence of the block that it stands in, "" outside of one
    after: str  # the fence of the block that goes on after it

    @property
    def in_code(self) -> bool:
        """Whether it stands in a block, or opens or closes one."""
        return bool(self.before or self.after)


def fenced_lines(text: str) -> Iterator[FencedLine]:
    """The lines of a text, without their newlines; no other character parts two."""
    start, fence = 0, ""
    for line in text.split("\n"):
        after = fence_after(fence, line)
        yield FencedLine(start, line, fence, after)
        start, fence = start + len(line) + 1, after


def open_fence(text: str) -> str:
    """The fence of the block of code that a text ends in, "" outside of one."""
    *_, last = fenced_lines(text)
    return last.after


def unclosed_start(text: str) -> int:
    """Where the block of code begins that nothing closes; beyond the text where there is none."""
    start, after = 0, ""
    for line in fenced_lines(text):
        start, after = (line.start if not line.before else start), line.after
    return start if after else len(text) + 1


def outside_code(text: str) -> Iterator[str]:
    """The lines of a text that stand outside of blocks of code."""
    return (line.text for line in fenced_lines(text) if not line.in_code)
