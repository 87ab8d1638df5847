"""Finds the answer of a model without thinking tags, such as QwQ-32B-Preview, while its text still comes.

A line that announces the answer, once it is closed, or a boxed result on display begins the answer. What else may is decided
when the text has ended: `text.final_answer`, whose `causal_start` this equals for every way of splitting a text into tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qwq_lite.reply.policy import Begin, Policy, Taken, Turn, Verdict
from qwq_lite.text import final_answer


@dataclass(frozen=True)
class Headings(Policy):
    """State: the line before, where it opens a display that a boxed result may follow; "" elsewhere."""

    name: ClassVar[str] = "headings"

    def start(self, begin: Begin) -> str:
        return ""

    def observe(self, opener: str, taken: Taken) -> Verdict:
        if taken.phase != "thinking" or not taken.rows:  # nearly always
            return _NOTHING
        for row in taken.rows:
            line = row.text
            if line is None or row.in_code:
                opener = ""
                continue
            whole = opener + line if opener and final_answer.may_be_box(line, ended=row.ended) else line
            if final_answer.is_boxed(whole) or (row.ended and final_answer.is_heading(line.rstrip("\r"))):
                return Verdict("", turn=Turn("answer", row.n_left + len(whole) - len(line)))
            if row.ended:
                opener = f"{line}\n" if whole == line and final_answer.is_opener(line) else ""
            elif final_answer.may_announce(whole):
                return Verdict(opener if whole != line else "", hold=len(whole))
        return _NOTHING


_NOTHING = Verdict("")
