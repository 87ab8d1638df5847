"""Ends a thought so that the answer is complete by a deadline, and ends the answer at a sentence if it is not.

A token's cost grows with the cache: a mean is wrong by four times between an empty one and one of 4,096 tokens. So a + b * fill
is fitted to the last tokens, and what nine of ten stay below is added.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import mul
from typing import ClassVar, NamedTuple

from qwq_lite.reply.policy import WINDOW, Begin, Policy, Stop, Taken, Verdict
from qwq_lite.text import breaks

_RECENT = 128  # tokens that the fit looks at
_LEAST = 8  # fewer say nothing; a deadline that is over is obeyed all the same
_REFIT = 64
_LEAST_SLOPED = 64  # with fewer, a tenth of noise would be a slope that doubles the cost within some hundred tokens
_SENTENCE = 36  # tokens: of real sentences 19 in 20 have no more
_OVERTIME = 96  # tokens after which an answer without any break ends where it is


class TokenCost(NamedTuple):
    """Seconds of one token: base + slope * tokens in the cache."""

    base: float
    slope: float

    def seconds(self, n_tokens: int, fill: int) -> float:
        """Of so many tokens, from a cache that holds `fill`."""
        return n_tokens * (self.base + self.slope * (fill + n_tokens / 2))


class DeadlineState(NamedTuple):
    """What is known of the time of a token."""

    last_s: float | None = None  # when the last token came
    fresh: tuple[tuple[int, float], ...] = ()  # (tokens in the cache, seconds) of tokens since the last fit
    recent: tuple[tuple[int, float], ...] = ()  # of those before
    cost: TokenCost | None = None  # the last fit
    tail: str = ""  # the answer's last characters
    over_at: int | None = None  # the reply's length when the deadline passed


@dataclass(frozen=True)
class Deadline(Policy):
    """State: DeadlineState."""

    within_s: float  # seconds from the request to the end of the answer
    n_answer: int  # tokens that an answer is expected to have
    n_prompt: int  # tokens in the cache before the reply
    name: ClassVar[str] = "deadline"

    def start(self, begin: Begin) -> DeadlineState:
        return DeadlineState()

    def observe(self, clock: DeadlineState, taken: Taken) -> Verdict:
        last_s, fresh, recent, cost, tail, over_at = clock
        now_s, fill = taken.time_s, self.n_prompt + taken.n_tokens
        if last_s is not None and not taken.forced:  # forced ones come many at a time, the first one after the prompt
            fresh += ((fill, now_s - last_s),)
            if len(fresh) == _REFIT or (cost is None and len(fresh) == _LEAST):
                both = (recent + fresh)[-_RECENT:]
                cost = fit_cost(both)
                if len(fresh) == _REFIT:
                    fresh, recent = (), both
        clock = DeadlineState(now_s, fresh, recent, cost, tail, over_at)
        left_s = self.within_s - now_s
        if taken.phase != "thinking":
            return self._answer(clock, taken, left_s, fill)
        if left_s > 0 and (cost is None or left_s > cost.seconds(self.n_answer + WINDOW, fill)):
            return Verdict(clock)
        if cost is None or left_s <= 0:
            return Verdict(clock, end=("deadline", 0))
        spare_s = left_s - cost.seconds(self.n_answer, fill)
        return Verdict(clock, end=("deadline", max(0, int(spare_s / cost.seconds(1, fill)))))

    def _answer(self, clock: DeadlineState, taken: Taken, left_s: float, fill: int) -> Verdict:
        tail = "" if taken.turned else clock.tail
        soon = left_s <= 0 or (clock.cost is not None and left_s < clock.cost.seconds(_SENTENCE, fill))
        if soon and not taken.forced:
            n_after = breaks.n_after_end(tail, taken.text)
            if n_after is not None:
                return Verdict(clock, Stop("deadline", drop=n_after))
        over_at = clock.over_at
        if left_s <= 0:
            over_at = taken.n_tokens if over_at is None else over_at
            if taken.n_tokens >= over_at + _OVERTIME:
                return Verdict(clock, Stop("deadline"))
        tail = "" if taken.forced else (tail + taken.text)[-breaks.TAIL :]
        return Verdict(DeadlineState(clock.last_s, clock.fresh, clock.recent, clock.cost, tail, over_at))


def fit_cost(samples: tuple[tuple[int, float], ...]) -> TokenCost:
    """The line through (fill, seconds), by least squares, moved up until nine of ten samples lie below. It never falls."""
    n, origin, slope = len(samples), samples[0][0], 0.0
    if n >= _LEAST_SLOPED:
        xs, ys = [fill - origin for fill, _ in samples], [s for _, s in samples]
        sum_x, sum_y = sum(xs), sum(ys)
        spread = n * sum(map(mul, xs, xs)) - sum_x * sum_x
        slope = max(0.0, (n * sum(map(mul, xs, ys)) - sum_x * sum_y) / spread) if spread else 0.0
    above = sorted(s - slope * fill for fill, s in samples)
    return TokenCost(above[min(n - 1, int(0.9 * n))], slope)
