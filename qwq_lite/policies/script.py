"""Keeps the letters of scripts that were not asked for out of the answer, and out of the thought where that was asked for too.

Eight of 72 real outputs mix scripts in the answer; in six the foreign part is the heading or the words that open it. Within a
fenced block of code nothing is masked. The thought is free: to force one language on it costs 5.6 points of MATH-500 (arXiv
2507.15849). So in a text without tags the heading is written as part of the thought, and one in a masked script is taken back and
forced anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from qwq_lite import boundary
from qwq_lite.generation import Begin, Draw, Rewrite, Taken, Verdict
from qwq_lite.script_masks import ScriptMasks

_WHY = "the heading of the answer was in another script"
_FENCE = "```"


class Place(NamedTuple):
    """Where in its phase a text is. line: its last line as far as it can be a fence, None once it cannot. in_code: after a fence
    that opens a block."""

    in_answer: bool = False
    line: str | None = ""
    in_code: bool = False


@dataclass(frozen=True)
class Script:
    """answer, thought: what is masked there, None for nothing. words: in place of a heading in a masked script, as in Rewrite;
    empty for a model that has tags.

    State: Place.
    """

    answer: ScriptMasks | None
    thought: ScriptMasks | None = None
    words: tuple[str | int, ...] = ()
    name: ClassVar[str] = "script"
    constrains: ClassVar[bool] = True

    def start(self, begin: Begin) -> Place:
        return Place(begin.phase == "answer")

    def constrain(self, place: Place, draw: Draw) -> Draw:
        masks = self.answer if place.in_answer else self.thought
        if masks is None or (place.in_code and not (place.line or "").lstrip(" \t").startswith(_FENCE)):
            return draw
        return draw._replace(allowed=masks.row(draw.pending))

    def observe(self, place: Place, taken: Taken) -> Verdict:
        text, in_answer = taken.text, taken.phase == "answer"
        if taken.turned:
            place = Place(in_answer)
            if in_answer and self.words and not taken.forced and self._is_foreign(text.partition("\n")[0]):
                return Verdict(place, Rewrite(len(text), self.words, _WHY, outside_code=True))
        elif place.line is None and "\n" not in text:  # nearly always
            return _ELSEWHERE[in_answer, place.in_code]
        # A line that can be no fence goes on as any other such line would.
        *rows, line = (("-" if place.line is None else place.line) + text).split("\n")
        in_code = place.in_code
        for row in rows:
            in_code ^= _is_fence(row, in_code)
        kept = _kept(line, in_code)
        return Verdict(Place(in_answer, kept, in_code)) if kept is not None else _ELSEWHERE[in_answer, in_code]

    def _is_foreign(self, line: str) -> bool:
        return self.answer is not None and boundary.is_heading(line.rstrip("\r")) and self.answer.holds_letter(line)


def _is_fence(line: str, in_code: bool) -> bool:
    """Whether a whole line opens a block, with a word on its language, or closes one. Source: CommonMark 0.31, 4.5"""
    bare = line.strip(" \t\r")
    return bare.startswith(_FENCE) and ("`" not in bare.lstrip("`") if not in_code else not bare.strip("`"))


def _kept(line: str, in_code: bool) -> str | None:
    """What is to be known of a line that goes on; None where it cannot be a fence."""
    bare = line.lstrip(" \t")
    if _FENCE.startswith(bare):
        return bare
    return _FENCE + bare.lstrip("`")[:1] if _is_fence(line, in_code) else None


_ELSEWHERE = {(a, c): Verdict(Place(a, None, c)) for a in (False, True) for c in (False, True)}
