"""Masks letters of scripts that were not asked for, in the answer, and in the thought where that was asked for too.

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
from qwq_lite.text.fences import closes
from qwq_lite.text.lines import Line

_WHY = "the heading of the answer was in another script"


class ScriptState(NamedTuple):
    """Where in its phase a text is."""

    in_answer: bool = False  # or after words that announced one
    line: Line = Line()


@dataclass(frozen=True)
class Script:
    """State: ScriptState."""

    answer: ScriptMasks | None  # what is masked in the answer
    thought: ScriptMasks | None = None  # what is masked in the thought
    # In place of a heading in a masked script, as in Rewrite; empty for a model with tags.
    words: tuple[str | int, ...] = ()
    name: ClassVar[str] = "script"
    constrains: ClassVar[bool] = True

    def start(self, begin: Begin) -> ScriptState:
        return ScriptState(begin.phase == "answer")

    def constrain(self, place: ScriptState, draw: Draw) -> Draw:
        masks = self.answer if place.in_answer else self.thought
        line = place.line
        if masks is None or (line.fence and not closes(line.text or "", line.fence)):
            return draw
        return draw._replace(allowed=masks.row(draw.pending))

    def observe(self, place: ScriptState, taken: Taken) -> Verdict:
        in_answer = taken.phase == "answer" or (place.in_answer and not taken.turned)
        line = taken.line
        if not taken.rows:  # nearly always
            return Verdict(
                place if line is place.line and in_answer == place.in_answer else ScriptState(in_answer, line)
            )
        if (
            self.words
            and taken.turned
            and in_answer
            and not taken.forced
            and self._is_foreign(taken.rows[0].text or "")
        ):
            return Verdict(ScriptState(True), self._anew(len(taken.text)))
        if self.words and not in_answer and self.answer is not None:
            for row in taken.rows:
                if row.text is not None and not row.in_code and _announces(row.text):
                    in_answer = True
                    if not taken.forced and self.answer.holds_letter(row.text):
                        return Verdict(place, self._anew(row.n_left))
                    break
        return Verdict(ScriptState(in_answer, line))

    def _anew(self, n_drop: int) -> Rewrite:
        return Rewrite(n_drop, self.words, _WHY, outside_code=True)

    def _is_foreign(self, line: str) -> bool:
        return self.answer is not None and final_answer.is_heading(line.rstrip("\r")) and self.answer.holds_letter(line)


def _announces(line: str) -> bool:
    """Whether a line begins with a heading that is closed and bears a colon: whatever follows is the answer."""
    return "**" in line and final_answer.final_start(f"{line.rstrip()}-", ended=False) == 0
