"""Ends a thought at a good place before its limit: of a budget, a deadline, a request, a loop or the context.

A budget that cuts in mid-sentence worsens the answer, so a thought closes in a window: at the end of a paragraph in its first
half, of a line or a sentence as well in the second; where none comes, the thought is taken back to the last one that did. For a
model with tags, the tag itself when it is nearly the likeliest token: in all of 16 real closings it follows one newline. A loop
goes before: an answer that reads its copies makes more of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from qwq_lite.events import ThoughtEnd
from qwq_lite.reply.policy import WINDOW, Begin, Draw, Rewrite, Taken, Verdict
from qwq_lite.text import breaks

MARGIN = 1.4  # below the highest logit: a quarter of its chance
_WHY: dict[ThoughtEnd, str] = {
    "budget": "the thought was ended by its budget",
    "deadline": "the thought was ended by the deadline",
    "asked": "the thought was ended for the answer",
    "context": "the thought was ended, for the context is nearly full",
    "loop": "the thought was ended, for it repeated itself again",
}


class Window(NamedTuple):
    """Where a thought ends, in tokens of the reply."""

    opens: int  # it may end from here on
    closes: int  # it has no more tokens than this
    cause: ThoughtEnd

    @classmethod
    def of_budget(cls, n_tokens: int) -> Window:
        """That of a budget: a tenth of it, and WINDOW at least, after its end."""
        return cls(n_tokens, n_tokens + max(n_tokens // 10, WINDOW), "budget")

    @classmethod
    def ending(cls, n_tokens: int, cause: ThoughtEnd) -> Window:
        """The window of WINDOW tokens that ends there."""
        return cls(max(0, n_tokens - WINDOW), n_tokens, cause)


class OpenWindow(NamedTuple):
    """A window that is open."""

    window: Window
    tail: str = ""  # the thought's last characters
    until: int = 0  # nothing else is due before the reply has this many tokens


@dataclass(frozen=True)
class Closing:
    """State: None until a window opens."""

    windows: tuple[Window, ...]  # in the order in which they open
    words: tuple[str | int, ...]  # that end the thought, as in Rewrite
    n_words: int  # tokens of the words
    eager: int | None = None  # the tag that may be taken early
    outside_code: bool = False  # as in Rewrite
    name: ClassVar[str] = "closing"

    @property
    def constrains(self) -> bool:
        return self.eager is not None

    def start(self, begin: Begin) -> OpenWindow | None:
        return None

    def constrain(self, state: OpenWindow | None, draw: Draw) -> Draw:
        if state is None or self.eager is None or not state.tail.endswith("\n"):
            return draw
        return draw._replace(eager=(self.eager, MARGIN, self._end(0, state.window.cause)))

    def observe(self, state: OpenWindow | None, taken: Taken) -> Verdict:
        if taken.phase != "thinking":
            return _NOTHING
        if state is not None and taken.n_tokens < state.until and taken.end is None:  # nearly always
            tail = state.tail
            if breaks.is_plain(tail, taken.text) and len(tail) < _LONG:
                after = _new(OpenWindow, (state.window, tail + taken.text, state.until))
                return _new(Verdict, (after, None, 0, None, None))
        if taken.end is not None and taken.end[1] < 0:
            return Verdict(state, self._end(None, taken.end[0], -taken.end[1]))
        window = self._window(state, taken)
        if window is None:
            return _NOTHING
        tail = "" if state is None else state.tail
        if not taken.forced:
            found = breaks.last(tail, taken.text)
            late = 2 * taken.n_tokens >= window.opens + window.closes
            in_time = taken.n_tokens + self.n_words < window.closes
            if (found and (late or found.kind == "paragraph")) or not in_time:
                return Verdict(state, self._end(found.n_after if found else None, window.cause))
        later = (other.opens for other in self.windows if other.opens > taken.n_tokens)
        until = min([window.closes - self.n_words, *later]) if taken.end is None else 0
        return Verdict(OpenWindow(window, (tail + taken.text)[-breaks.TAIL :], until))

    def _end(self, n_drop: int | None, cause: ThoughtEnd, n_back: int = 0) -> Rewrite:
        return Rewrite(n_drop, self.words, _WHY[cause], cause, self.outside_code, n_back)

    def _window(self, state: OpenWindow | None, taken: Taken) -> Window | None:
        """Of those that are open the one that closes first."""
        found = None if state is None else state.window
        for window in self.windows:
            if taken.n_tokens >= window.opens and (found is None or window.closes < found.closes):
                found = window
        if taken.end is not None:
            cause, n_left = taken.end
            if found is None or taken.n_tokens + n_left < found.closes:
                opens = taken.n_tokens if found is None else min(found.opens, taken.n_tokens)
                found = Window(opens, taken.n_tokens + n_left, cause)
        return found


_NOTHING = Verdict(None)
_LONG = 16 * breaks.TAIL  # characters; a tail is cut when it has grown so long
_new = tuple.__new__
