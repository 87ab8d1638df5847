"""Reserves tokens for the answer after a forced end of thinking, and keeps it from ending before it began.

Such an answer often goes on thinking, and would do so until the context is full; so it ends at a sentence. And it may end
before it began, where the model did not mean to answer yet; so it may not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from qwq_lite.reply.policy import Begin, Draw, Stop, Taken, Verdict
from qwq_lite.text import breaks

_WINDOW = 96  # tokens before the limit in which it ends where a text may end; half of a smaller limit


class AnswerLimit(NamedTuple):
    """The limit of an answer that follows a forced end of thinking."""

    most: int  # tokens of the whole reply
    tail: str = ""  # the answer's last characters
    has_text: bool = False  # it has text other than white space


@dataclass(frozen=True)
class Reserve:
    """State: None where no thought was ended; True where one was, until its answer begins."""

    n_tokens: int  # the answer's limit
    end_tokens: frozenset[int]  # every id that ends a turn
    name: ClassVar[str] = "reserve"
    constrains: ClassVar[bool] = True

    def start(self, begin: Begin) -> AnswerLimit | bool | None:
        return any(rewind.ends for rewind in begin.rewinds) or None

    def constrain(self, state: AnswerLimit | bool | None, draw: Draw) -> Draw:
        if state is None or (isinstance(state, AnswerLimit) and state.has_text):
            return draw
        return draw._replace(banned=draw.banned | self.end_tokens)

    def observe(self, state: AnswerLimit | bool | None, taken: Taken) -> Verdict:
        if state is None:
            return _NOT_ENDED
        if taken.phase == "thinking":
            return Verdict(state)
        if taken.forced:  # forced words are not the answer's
            return Verdict(AnswerLimit(taken.n_tokens + self.n_tokens))
        if not isinstance(state, AnswerLimit):
            state = AnswerLimit(taken.n_tokens - 1 + self.n_tokens)
        elif taken.turned:  # it began anew, in the room that is left
            state = AnswerLimit(state.most)
        n_left = state.most - taken.n_tokens
        if n_left < min(_WINDOW, self.n_tokens // 2):
            n_after = breaks.n_after_end(state.tail, taken.text, has_text=state.has_text)
            if n_after is not None:
                return Verdict(state, Stop("length", drop=n_after))
        if n_left <= 0:
            return Verdict(state, Stop("length"))
        has_text = state.has_text or bool(taken.text.strip())
        return Verdict(AnswerLimit(state.most, (state.tail + taken.text)[-breaks.TAIL :], has_text))


_NOT_ENDED = Verdict(None)
