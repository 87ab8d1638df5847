"""Finds places where a text may end: paragraphs, lines and sentences, English and Chinese. Pure.

Everything here is said of a text that still grows, from its end. An English sentence has ended when white space follows its
stop, for "3." may become "3.14"; a Chinese one has ended with its stop.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

Kind = Literal["paragraph", "line", "sentence"]
TAIL = 24  # characters before a new piece that decide what the piece ends

_BREAK = re.compile(
    r"(?P<paragraph>\n[ \t]*\n\s*)|(?P<line>\n)"
    r"|(?P<sentence>[.!?][\"'”’)\]*_`]*(?=\s)|[。！？…][\"'”’」』）)*]*)"
)
# All that may be in a break; the last character that counts as white space is U+3000.
_SIGNS = frozenset(".!?。！？…\"'”’)]*_`」』）") | frozenset(filter(str.isspace, map(chr, range(0x3001))))
# A stop after these ends no sentence: the number of an item, and abbreviations.
_NO_END = re.compile(
    r"(?:(?:^|\n)[ \t]*\(?\d{1,3}\)?|\b(?:[eE]\.g|[iI]\.e|vs|cf|Dr|Mrs?|Ms|Prof|St|No|Fig|Eq|approx))\Z"
)


class Break(NamedTuple):
    """A place where a text may end. n_after: so many characters follow it; those of white space before them are its own."""

    kind: Kind
    n_after: int


def last(tail: str, text: str) -> Break | None:
    """The last break of `tail` + `text` that `text` completes; None where it completes none.

    tail: what came before, of which the last TAIL characters are enough.
    """
    if not text or is_plain(tail, text):
        return None
    whole = tail[-TAIL:] + text
    old = len(whole) - len(text)
    found = None
    for match in _breaks(whole):
        # An English sentence is complete with the white space after its stop, so its end may lie in the tail.
        end = match.end()
        if end > old or (
            end == old and match.lastgroup == "sentence" and text[0].isspace() and whole[match.start()] in ".!?"
        ):
            found = match
    if found is None:
        return None
    kind: Kind = found.lastgroup  # type: ignore[assignment] # the groups have the kinds' names
    return Break(kind, len(whole) - found.end())


def is_plain(tail: str, text: str) -> bool:
    """Whether no break can be in a piece of text, as in nearly all: a quick look at its characters."""
    return _SIGNS.isdisjoint(text if text[:1] != " " or tail[-1:] in _SIGNS else text[1:])


def n_after_end(tail: str, text: str, *, has_text: bool = False) -> int | None:
    """Characters after the last break that `text` completes, if there is any text before it; None where the text goes on.

    tail: as in `last`. has_text: there was some before the tail.
    """
    found = last(tail, text)
    if found is None or not (has_text or (tail + text)[: -found.n_after or None].strip()):
        return None
    return found.n_after


def n_after_last(text: str) -> int | None:
    """Characters after the last break of a text; None where there is none."""
    ends = [match.end() for match in _breaks(text)]
    return len(text) - ends[-1] if ends else None


def n_unfinished(text: str, kind: Literal["paragraph", "sentence"]) -> int:
    """Characters of the last paragraph or sentence of a text, the white space at its end with it."""
    body = text.rstrip()
    start = 0
    for match in _breaks(body):
        if match.end() < len(body) and (match.lastgroup == "paragraph" or kind == "sentence"):
            start = match.end()
    return len(text) - start


def _breaks(text: str) -> Iterator[re.Match[str]]:
    for match in _BREAK.finditer(text):
        start = match.start()
        if match[0][0] != "." or not _NO_END.search(text, max(0, start - TAIL), start):
            yield match
