"""Follows the lines of a text that grows: the beginning of the current one, and whether it is code. Pure."""

from __future__ import annotations

from typing import NamedTuple

from qwq_lite.text.fences import fence_after, opens
from qwq_lite.text.final_answer import LONGEST_HEADING, may_announce

_BLANK = " \t"


class Line(NamedTuple):
    """The line that is being written."""

    text: str | None = ""  # what it begins with, while it may be a fence, a heading or a boxed result; None after that
    fence: str = ""  # what opened the block of code that it stands in, empty outside of one
    set_apart: bool = False  # it is indented as code is, or a table's row


class LinePiece(NamedTuple):
    """A line as far as a piece of text takes it."""

    text: str | None  # all of it; None for one that was known before to be nothing
    n_left: int  # characters from its start to the end of the text
    in_code: bool  # it stands in a block of code, or opens or closes one
    ended: bool  # a newline follows


def follow(line: Line, text: str) -> tuple[Line, tuple[LinePiece, ...]]:
    """The line after more text, and every line that the text is of, the unfinished one last."""
    known, fence, set_apart = line
    *whole, last = text.split("\n")
    n_left = len(text)
    ended: list[LinePiece] = []
    for part in whole:
        before, row = fence, None if known is None else known + part
        if row is not None:
            fence = fence_after(fence, row)
        ended.append(LinePiece(row, n_left + len(known or ""), bool(before or fence), True))
        known, n_left = "", n_left - len(part) - 1
    if known is None:
        return Line(None, fence, set_apart), (*ended, LinePiece(None, n_left, bool(fence), False))
    row = known + last
    piece = LinePiece(row, len(row), bool(fence or opens(row)), False)
    return Line(_kept(row, fence), fence, _is_set_apart(row)), (*ended, piece)


def _kept(row: str, fence: str) -> str | None:
    """What is to be known of a line that goes on; of a fence its marks, and one character more if there are any."""
    bare = row.lstrip(_BLANK)
    if not bare:
        return row[:LONGEST_HEADING]  # a longer indentation says no more
    mark = bare[:1]
    if mark in "`~" and (not fence or fence[0] == mark):
        rest = bare.lstrip(mark)
        fenced = row[: len(row) - len(rest)]
        if not rest.strip(_BLANK + "\r") or (not fence and opens(row)):
            return fenced + rest[:1]
        return None
    return row if not fence and may_announce(row) else None


def _is_set_apart(row: str) -> bool:
    bare = row.lstrip(_BLANK)
    indent = row[: len(row) - len(bare)]
    return bare.startswith("|") or "\t" in indent or len(indent) >= 4
