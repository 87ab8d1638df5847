"""Leaves a thought that goes round in circles, and ends an answer that does.

QwQ repeats itself without end, word by word or nearly so, and a seed alone leads out of it only where sampling is not greedy. Of
eight ways that were tried on real loops this one led out of two in three: back to the end of the first copy, without the token
that began the second one, and no longer greedy. That is done once; the next loop ends the thought. A penalty would break QwQ.
An answer may repeat itself rightly, a matrix of zeros above all: it needs many more copies, and none count where they were
asked for. Nor are four copies enough in a thought about such a question. Code and tables repeat themselves nearly all the time:
what is fenced, indented or begins with a bar is no near repetition, which cut false alarms on files from 26 to 3 in a million.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

from qwq_lite import boundary
from qwq_lite.generation import Begin, Draw, Phase, Rewind, Stop, Taken, Verdict
from qwq_lite.repetition import BLOCK, NEVER, NO_LOOPS, Limit, Loop, Written, complete, due_at
from qwq_lite.sampling import Sampling

_FENCE, _INDENT = "```", "    "
_TOP_K = 20  # the least that QwQ's authors name

IN_THOUGHT, IN_ANSWER = Limit(4, 64, 64), Limit(16, 512, 2048)


class Seen(NamedTuple):
    """A phase so far: its first `n` tokens in `written`, after the reply's first `origin`.

    loops: stretches that are under way; due: the length at which the next one becomes a loop. line: the beginning of the line
    while it may open or close a block of code, None after that. apart: the line is indented as code is, or a table's. warm: a
    loop was left before; over: another was found.
    """

    written: Written
    n: int = 0
    origin: int = 0
    phase: Phase = "answer"
    loops: tuple[Loop | None, ...] = NO_LOOPS
    due: int = NEVER
    line: str | None = ""
    in_code: bool = False
    apart: bool = False
    warm: bool = False
    over: bool = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Seen) and self[1:] == other[1:] and self.written.same(other.written, self.n)

    def __hash__(self) -> int:
        return hash(self[1:])


@dataclass(frozen=True)
class Loops:
    """asked: the user asked for repetition, as `wishes.asks_for_repetition` says. undivided: what is taken for the thought may
    be the answer."""

    asked: bool = False
    undivided: bool = False
    name: ClassVar[str] = "loops"
    constrains: ClassVar[bool] = True

    def start(self, begin: Begin) -> Seen:
        return self._begun(begin.phase, 0, any(rewind.loop for rewind in begin.rewinds))

    def constrain(self, seen: Seen, draw: Draw) -> Draw:
        if seen.warm and seen.phase == "thinking":
            return draw._replace(sampling=warmed(draw.sampling))
        return draw

    def observe(self, seen: Seen, taken: Taken) -> Verdict:
        written, n, origin, phase, loops, due, line, in_code, apart, warm, over = seen
        if taken.phase != phase:
            return Verdict(self._begun(taken.phase, taken.n_tokens, warm))
        limit = self._limit(phase)
        if over or limit is None:
            return Verdict(seen)
        written = written.then(n, taken.token, not (in_code or apart))
        n += 1
        if line is not None or "\n" in taken.text:
            line, in_code, apart = _line(line, in_code, taken.text)
        found: Loop | None = None
        if not n % BLOCK:
            loops = written.loops(n, loops)
            due = due_at(loops, limit, n)
        if n >= due:
            loops, found = complete(written, loops, limit, n, in_code)
            due = due_at(loops, limit, n + 1)
        fields = (written, n, origin, phase, loops, due, line, in_code, apart, warm, over)
        circling = found is not None or not (phase == "answer" or self.asked or in_code) and written.circles(n)
        if not circling or taken.forced:  # what nobody drew, as a hint, is no fault of the model's
            return _new(Verdict, (_new(Seen, fields), None, 0, None, None))
        seen = Seen(*fields)._replace(over=True)
        if phase == "answer":
            return Verdict(seen, Stop("loop"))
        if warm:
            return Verdict(seen, end=("loop", 0))
        place = found.start + found.period if found is not None else written.circles_from(n)
        why = "it repeated itself" if found is not None else "it went round in circles"
        return Verdict(seen, Rewind(origin + place, frozenset({written.token(place)}), why, loop=True))

    def _begun(self, phase: Phase, origin: int, warm: bool) -> Seen:
        near = phase == "thinking" and not self.asked
        return Seen(Written(near), origin=origin, phase=phase, warm=warm)

    def _limit(self, phase: Phase) -> Limit | None:
        if not self.asked:
            return IN_ANSWER if phase == "answer" else IN_THOUGHT
        return None if phase == "answer" or self.undivided else IN_ANSWER


@lru_cache
def warmed(sampling: Sampling) -> Sampling:
    """These settings, or what a loop is left by where they are nearly greedy."""
    top_k = sampling.top_k and max(sampling.top_k, _TOP_K)
    return Sampling(max(sampling.temperature, 0.6), top_k, max(sampling.top_p, 0.95), min(sampling.min_p, 0.05))


def _line(line: str | None, in_code: bool, text: str) -> tuple[str | None, bool, bool]:
    """The line with more text, whether what follows is in a block of code, and whether this line is set apart itself."""
    *whole, last = (("-" if line is None else line) + text).split("\n")
    in_code ^= sum(map(boundary.is_fence, whole)) % 2 == 1
    bare = last.lstrip(" \t")
    begun = last[: len(last) - len(bare)][-len(_INDENT) :] + bare[: len(_FENCE)]
    apart = begun.startswith((_INDENT, "\t", "|"))
    return (begun if _FENCE.startswith(bare[: len(_FENCE)]) else None), in_code, apart


_new = tuple.__new__
