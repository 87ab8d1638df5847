"""Ends a reply: at the model's end tokens, at stop texts, at max_tokens."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from qwq_lite.reply.policy import Begin, Policy, Stop, Taken, Verdict


class StopState(NamedTuple):
    """End of the text, as far as a stop text may begin in it; empty until its first character that is shown."""

    tail: str = ""
    at_start: bool = True


@dataclass(frozen=True)
class Stops(Policy):
    """Ends a reply.

    A text that may still become a stop text is held back, so nothing that was shown is taken away.
    """

    end_tokens: frozenset[int]  # every id that ends a turn
    texts: tuple[str, ...] = ()  # end the reply where one begins, and are not part of it
    max_tokens: int | None = None  # thought and answer together
    undivided: bool = False  # thought and answer are one text, in all of which a stop text counts; else in the answer
    name: ClassVar[str] = "stops"

    def start(self, begin: Begin) -> StopState:
        return _NOTHING_SEEN

    def observe(self, seen: StopState, taken: Taken) -> Verdict:
        if taken.token in self.end_tokens:
            return Verdict(seen, Stop("stop", mute=True))
        hold = 0
        # Forced tokens are no text of the model's.
        if taken.forced or (taken.phase == "thinking" and not self.undivided):
            seen = _NOTHING_SEEN
        elif self.texts:
            seen, found = self._look(seen, taken)
            if found:
                return Verdict(seen, Stop("stop", drop=found))
            hold = self._unfinished(seen.tail)
        if self.max_tokens is not None and taken.n_tokens >= self.max_tokens:
            return Verdict(seen, Stop("length"))
        return Verdict(seen, hold=hold) if hold or seen is not _NOTHING_SEEN else _NOTHING

    def _look(self, seen: StopState, taken: Taken) -> tuple[StopState, int]:
        """The text's new end, and how many characters from its end on a stop text began; 0 where none did."""
        if taken.turned and not self.undivided:
            seen = StopState()
        tail = seen.tail + (taken.added if self.undivided else taken.text)
        if seen.at_start:
            tail = tail.lstrip("\n")
        # As if characters came one by one: what is complete first ends the answer, the longer of two that end together.
        found = [(place + len(text), place) for text in self.texts if (place := tail.find(text)) >= 0]
        kept = StopState(tail[-self._longest :], seen.at_start and not tail)
        return kept, len(tail) - min(found)[1] if found else 0

    @functools.cached_property
    def _beginnings(self) -> frozenset[str]:
        return frozenset(text[:n] for text in self.texts for n in range(1, len(text)))

    @functools.cached_property
    def _longest(self) -> int:
        return max(map(len, self.texts))

    def _unfinished(self, tail: str) -> int:
        """Length of the longest end of `tail` that begins a stop text."""
        for n in range(min(len(tail), self._longest - 1), 0, -1):
            if tail[-n:] in self._beginnings:
                return n
        return 0


_NOTHING_SEEN = StopState()
_NOTHING = Verdict(_NOTHING_SEEN)
