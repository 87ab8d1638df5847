"""Thought and answer of a model with thinking tags, by its tags' ids. Without tags all is the phase it began with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qwq_lite.generation import Begin, Draw, Taken, Turn, Verdict


@dataclass(frozen=True)
class Phases:
    """think_open, think_close: ids of `<think>` and `</think>`, None where the model has none.

    The closing tag ends the thought wherever it stands. The opening one begins a thought only where nothing was written
    yet; later it is text, for an answer may speak of it.
    State: whether something was written.
    """

    think_open: int | None = None
    think_close: int | None = None
    name: ClassVar[str] = "phases"
    constrains: ClassVar[bool] = False

    def start(self, begin: Begin) -> bool:
        return False

    def constrain(self, written: bool, draw: Draw) -> Draw:
        return draw

    def observe(self, written: bool, taken: Taken) -> Verdict:
        if taken.token == self.think_close:
            return Verdict(True, turn=Turn("answer", mute=True))
        if taken.token == self.think_open and not written:
            return Verdict(False, turn=Turn("thinking", mute=True))
        return _WRITTEN if written or taken.text.strip("\n") else _NOTHING_YET


_WRITTEN, _NOTHING_YET = Verdict(True), Verdict(False)  # made once: they are the word on nearly every token
