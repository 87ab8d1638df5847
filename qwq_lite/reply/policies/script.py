"""Keeps the letters of scripts that were not asked for out of the answer, and out of the thought where that was asked for too.

Eight of 72 real outputs mix scripts in the answer; in six the foreign part is the heading or the words that open it. Within a
fenced block of code nothing is masked. The thought is free: to force one language on it costs 5.6 points of MATH-500 (arXiv
2507.15849). So in a text without tags the heading is written as part of the thought, and one in a masked script is taken back and
forced anew: one on a line of its own, and one that is closed with a colon and goes on with the answer, at once. After such a one
that may stand the text is masked, though it counts with the thought until it has ended. Where nothing announces the answer before
it comes, nothing is masked: in a third of the texts of QwQ-32B-Preview.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from qwq_lite.reply.policy import Begin, Draw, Rewrite, Taken, Verdict
from qwq_lite.reply.script_masks import ScriptMasks
from qwq_lite.text import final_answer

_WHY = "the heading of the answer was in another script"
_FENCE = "```"


class ScriptState(NamedTuple):
    """Where in its phase a text is. in_answer: or after words that announced one. line: its last line as far as it can be a fence
    or announce an answer, None once it cannot. in_code: after a fence that opens a block."""

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

    def start(self, begin: Begin) -> ScriptState:
        return ScriptState(begin.phase == "answer")

    def constrain(self, place: ScriptState, draw: Draw) -> Draw:
        masks = self.answer if place.in_answer else self.thought
        if masks is None or (place.in_code and not (place.line or "").lstrip(" \t").startswith(_FENCE)):
            return draw
        return draw._replace(allowed=masks.row(draw.pending))

    def observe(self, place: ScriptState, taken: Taken) -> Verdict:
        text, turned = taken.text, taken.turned and taken.phase == "answer"
        if taken.turned:
            place = ScriptState()
        in_answer = taken.phase == "answer" or place.in_answer
        if turned and self.words and not taken.forced and self._is_foreign(text.partition("\n")[0]):
            return Verdict(ScriptState(True), self._anew(len(text)))
        if not taken.turned and place.line is None and "\n" not in text:  # nearly always
            return _ELSEWHERE[in_answer, place.in_code]
        # A line that means nothing goes on as any other such line would.
        rows = (("-" if place.line is None else place.line) + text).split("\n")
        n_left, in_code = sum(map(len, rows)) + len(rows) - 1, place.in_code
        for row in rows:
            if not in_answer and not in_code and self.words and self.answer is not None and _announces(row):
                in_answer = True
                if not taken.forced and self.answer.holds_letter(row):
                    return Verdict(place, self._anew(n_left))
            if n_left > len(row):  # it is not the last
                in_code ^= _is_fence(row, in_code)
            n_left -= len(row) + 1
        kept = _kept(rows[-1], in_code, bool(self.words) and not in_answer)
        return Verdict(ScriptState(in_answer, kept, in_code)) if kept is not None else _ELSEWHERE[in_answer, in_code]

    def _anew(self, n_drop: int) -> Rewrite:
        return Rewrite(n_drop, self.words, _WHY, outside_code=True)

    def _is_foreign(self, line: str) -> bool:
        return self.answer is not None and final_answer.is_heading(line.rstrip("\r")) and self.answer.holds_letter(line)


def _is_fence(line: str, in_code: bool) -> bool:
    """Whether a whole line opens a block, with a word on its language, or closes one. Source: CommonMark 0.31, 4.5"""
    bare = line.strip(" \t\r")
    return bare.startswith(_FENCE) and ("`" not in bare.lstrip("`") if not in_code else not bare.strip("`"))


def _announces(line: str) -> bool:
    """Whether a line begins with a heading that is closed and bears a colon: whatever follows is the answer."""
    return "**" in line and final_answer.final_start(f"{line.rstrip()}-", ended=False) == 0


def _kept(line: str, in_code: bool, may_announce: bool) -> str | None:
    """What is to be known of a line that goes on; None where it means nothing."""
    bare = line.lstrip(" \t")
    if _FENCE.startswith(bare) or (may_announce and bare[0] in "#*" and len(bare) <= final_answer.LONGEST_HEADING):
        return bare
    return _FENCE + bare.lstrip("`")[:1] if _is_fence(line, in_code) else None


_ELSEWHERE = {(a, c): Verdict(ScriptState(a, None, c)) for a in (False, True) for c in (False, True)}
