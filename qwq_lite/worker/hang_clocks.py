"""Whether a worker process hangs: it is silent, or its work makes no step, or a prompt or a cancelled reply does not end.

Pure: all times are the host's monotonic clock, given by the caller. They count only while the host itself is awake.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from qwq_lite.worker.resumable_feed import ResumableFeed

ASLEEP_S = 1.0  # a look so long after the last: the host itself was stopped or the laptop slept
SILENT_S = 1.5  # without a beat, from a process that the system has stopped; a beat comes every half second
_STUCK_S = 30.0  # the same for a process that the system does run: a machine may be very busy
_LEAST_HUNG_S, _HUNG_TIMES = 600.0, 20  # no step of the work for so long, or so many times the longest step so far
# From a cancel to the end of its reply, or so many times the longest step: a batch on a GPU is not cut.
_OBEY_S, _OBEY_TIMES = 60.0, 3
_TOKENIZE_S = 60.0  # for a call for tokens; other calls wait for it, and a million characters take a second


class HangClocks:
    """When a worker last showed that it works. One thread reports messages, another looks."""

    def __init__(self, now: float) -> None:
        self.looked = now  # the last look
        self.tokenizing: int | None = None  # the request whose prompt is being made into tokens
        self.overdue = False  # a prompt took too long
        self._seen = now  # the last message
        self._stepped = now  # the last step of its work
        self._answered = now  # the last answer to a call
        self._began = math.inf  # when the prompt was begun
        self._n_steps, self._longest_s = 0, 0.0

    def message_came(self, now: float) -> None:
        self._seen = now

    def beat_came(self, n_steps: int, *, busy: bool) -> None:
        """n_steps: steps of its work so far. busy: whether there is a call or a reply to work on."""
        if n_steps == self._n_steps and busy:
            return
        if busy and self._seen - self.looked < ASLEEP_S:  # else it may have slept in between
            self._longest_s = max(self._longest_s, self._seen - self._stepped)
        self._n_steps, self._stepped = n_steps, self._seen

    def prompt_began(self, number: int) -> None:
        self.tokenizing, self._began = number, self._seen

    def prompt_ended(self, number: int) -> None:
        if self.tokenizing == number:
            self.tokenizing = None

    def answer_came(self) -> None:
        self._answered = self._seen  # what was asked before may have been waiting for this

    def look(self, now: float, *, waits: bool) -> None:
        """waits: whether the worker waits for the disk, or for a reader: no step is expected then."""
        if now - self.looked > ASLEEP_S:
            self._seen = self._stepped = self._answered = self._began = now
        self.looked = now
        if waits:
            self._stepped = self._answered = now

    def find_hang(
        self, now: float, feeds: Mapping[int, ResumableFeed], *, busy: bool, is_stopped: Callable[[], bool]
    ) -> str | None:
        """What the process is to be ended for, None where it does not hang.

        Args:
            feeds: all replies that are not done.
            is_stopped: whether the system has stopped the process; asked only of one that is silent.
        """
        silent, idle = now - self._seen, now - self._stepped
        if silent > _STUCK_S or (silent > SILENT_S and is_stopped()):
            return f"it did not answer for {silent:.0f} s"
        if busy and idle > max(_LEAST_HUNG_S, _HUNG_TIMES * self._longest_s):
            return f"its work made no step for {idle:.0f} s"
        if self._is_overdue(now, feeds):
            self.overdue = True
            took = f"{now - self._began:.0f} s"
            return f"its chat template (tokenizer.chat_template) or its tokenizer did not end within {took}"
        if self._disobeys(now, feeds):
            return "it did not stop when it was asked to"
        return None

    def _is_overdue(self, now: float, feeds: Mapping[int, ResumableFeed]) -> bool:
        """Whether a prompt is being made for too long: only the end of the process ends that."""
        number = self.tokenizing
        if number is None:
            return False
        feed = feeds.get(number)
        return now - self._began > (_TOKENIZE_S if feed is None else feed.begin_s)

    def _disobeys(self, now: float, feeds: Mapping[int, ResumableFeed]) -> bool:
        """Whether a reply that has begun goes on long after it was cancelled."""
        limit = max(_OBEY_S, _OBEY_TIMES * self._longest_s)
        begun = [feed for feed in feeds.values() if feed.begun]
        return any(now - max(feed.cancelled_at, self._answered) > limit for feed in begun)
