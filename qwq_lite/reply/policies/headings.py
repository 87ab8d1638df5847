"""Thought and answer of a model without thinking tags, such as QwQ-32B-Preview, while the text is still coming.

A line that announces the answer, once it is closed, or a boxed result on display begins the answer. What else may is decided
when the text has ended: `boundary`, whose `causal_start` this equals for every way of splitting a text into tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from qwq_lite.reply.policies.unconstrained import Unconstrained
from qwq_lite.reply.policy import Begin, Taken, Turn, Verdict
from qwq_lite.text import final_answer


class Line(NamedTuple):
    """The line so far, as long as it may mean something; None when it cannot. in_code: within a fenced block."""

    text: str | None = ""
    in_code: bool = False


@dataclass(frozen=True)
class Headings(Unconstrained):
    """State: Line."""

    name: ClassVar[str] = "headings"

    def start(self, begin: Begin) -> Line:
        return Line()

    def observe(self, line: Line, taken: Taken) -> Verdict:
        text = taken.text
        if taken.phase != "thinking" or (line.text is None and "\n" not in text):
            return _IN_CODE if line.in_code else _ELSEWHERE
        # A line that cannot be a heading goes on as any other such line would.
        rows = final_answer.lines(("-" if line.text is None else line.text) + text, in_code=line.in_code)
        in_code, n_left = line.in_code, sum(map(len, rows))
        for number, row in enumerate(rows, 1):
            last = number == len(rows)
            if final_answer.is_fence(row):
                if last:
                    return Verdict(Line(row, in_code))
                in_code = not in_code
            elif not in_code and (
                final_answer.is_boxed(row) or (not last and final_answer.is_heading(row.rstrip("\r\n")))
            ):
                return Verdict(Line(None), turn=Turn("answer", n_left))
            n_left -= len(row)
        row = rows[-1]
        if not in_code and final_answer.may_announce(row):
            return Verdict(Line(row, in_code), hold=len(row))
        return Verdict(Line(row if _may_be_fence(row) else None, in_code))


def _may_be_fence(line: str) -> bool:
    return line.strip(" \t") in ("", "`", "``") and len(line) < final_answer.LONGEST_HEADING


_ELSEWHERE, _IN_CODE = Verdict(Line(None)), Verdict(Line(None, True))
