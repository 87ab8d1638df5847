"""Finds repetition: rewinds a thought out of its first loop, ends it at the second, and ends an answer that loops.

QwQ repeats itself without end, word by word or nearly so, and a seed alone leads out of it only where sampling is not greedy. A
thought goes back to the end of the first copy, and on without the token that began the second one, at the model's own
temperature: on the demo model's loops 0.6 led out of two in nine, 1.0 out of nine in ten. That is done once; the next loop ends
the thought. A penalty would break QwQ.
An answer may repeat itself rightly, a matrix of zeros above all: it needs many more copies, and none count where they were
asked for. Nor are four copies enough in a thought about such a question. Code and tables repeat themselves nearly all the time:
what is fenced, indented or begins with a bar is no near repetition, which cut false alarms on files from 26 to 3 in a million.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

from qwq_lite.reply.policy import Begin, Draw, Phase, Rewind, Stop, Taken, Verdict
from qwq_lite.reply.repetition import BLOCK, NEVER, NO_LOOPS, Limit, Loop, TokenHistory, complete, due_at
from qwq_lite.sampling import Sampling
from qwq_lite.text.lines import Line

_TEMPERATURE = 1.0
_TOP_K = 20  # the least that QwQ's authors name

IN_THOUGHT, IN_ANSWER = Limit(4, 64, 64), Limit(16, 512, 2048)


class LoopState(NamedTuple):
    """A phase so far."""

    written: TokenHistory  # its tokens, of which the first `n` count
    n: int = 0
    origin: int = 0  # the reply's length where the phase began
    phase: Phase = "answer"
    limit: Limit | None = None  # what is a loop here, None where nothing is any more
    loops: tuple[Loop | None, ...] = NO_LOOPS  # stretches that are under way
    next_look: int = NEVER  # the length at which the next of them becomes a loop
    line: Line = Line()  # the line that is being written
    left_one: bool = False  # a loop was left before, and the next one ends the thought


@dataclass(frozen=True)
class Loops:
    """State: LoopState."""

    asked: bool = False  # the user asked for repetition, as `repetition_intent.asks_for_repetition` says
    undivided: bool = False  # what is taken for the thought may be the answer
    name: ClassVar[str] = "loops"
    constrains: ClassVar[bool] = True

    def start(self, begin: Begin) -> LoopState:
        return self._phase_begins(begin.phase, 0, any(rewind.loop for rewind in begin.rewinds))

    def constrain(self, seen: LoopState, draw: Draw) -> Draw:
        if seen.left_one and seen.phase == "thinking":
            return draw._replace(sampling=warm_sampling(draw.sampling))
        return draw

    def observe(self, seen: LoopState, taken: Taken) -> Verdict:
        written, n, origin, phase, limit, loops, next_look, line, left_one = seen
        if taken.phase != phase:
            return Verdict(self._phase_begins(taken.phase, taken.n_tokens, left_one)._replace(line=taken.line))
        if limit is None:
            return Verdict(seen)
        _, fence, set_apart = line
        is_old = written.add(n, taken.token, not (fence or set_apart))
        n += 1
        if taken.line is not line:
            line = taken.line
            if line.fence != fence:
                fence = line.fence
                next_look = due_at(loops, limit, n, fence != "")
        in_code = fence != ""
        found: Loop | None = None
        if not n % BLOCK:
            loops = written.loops(n, loops)
            next_look = due_at(loops, limit, n, in_code)
        if n >= next_look:
            loops, found = complete(written, loops, limit, n, in_code)
            next_look = due_at(loops, limit, n + 1, in_code)
        seen = _new(LoopState, (written, n, origin, phase, limit, loops, next_look, line, left_one))
        circling = found is not None or (is_old and not in_code and written.circles(n))
        if not circling or taken.forced:  # what nobody drew, as a hint, is no fault of the model's
            return _new(Verdict, (seen, None, 0, None, None))
        return self._leaves(seen, found)

    def _leaves(self, seen: LoopState, found: Loop | None) -> Verdict:
        """found: the stretch; None where the text goes round in circles."""
        over = seen._replace(limit=None)
        if seen.phase == "answer":
            return Verdict(over, Stop("loop"))
        place = found.start + found.period if found is not None else seen.written.circles_from(seen.n)
        if seen.left_one:
            return Verdict(over, end=("loop", place - seen.n))
        why = "it repeated itself" if found is not None else "it went round in circles"
        banned = frozenset({seen.written.token(place)})
        return Verdict(over, Rewind(seen.origin + place, banned, why, loop=True))

    def _phase_begins(self, phase: Phase, origin: int, left_one: bool) -> LoopState:
        thinks = phase == "thinking"
        limit: Limit | None = IN_THOUGHT if thinks else IN_ANSWER
        if self.asked:
            limit = IN_ANSWER if thinks and not self.undivided else None
        return LoopState(TokenHistory(thinks and not self.asked), 0, origin, phase, limit, left_one=left_one)


@lru_cache
def warm_sampling(sampling: Sampling) -> Sampling:
    """These settings, or what a loop is left by where they are nearly greedy."""
    top_k = sampling.top_k and max(sampling.top_k, _TOP_K)
    return Sampling(
        max(sampling.temperature, _TEMPERATURE), top_k, max(sampling.top_p, 0.95), min(sampling.min_p, 0.05)
    )


_new = tuple.__new__
