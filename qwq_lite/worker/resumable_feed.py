"""The host's side of a worker's reply, with the log from which another worker resumes it. Knows no processes."""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from qwq_lite.errors import QwqError
from qwq_lite.events import Answer, Done, Event, Thinking
from qwq_lite.reply.commands import Command
from qwq_lite.reply.stream import MOST_UNREAD, Feed, follows_from_reply
from qwq_lite.worker import protocol

_ACK_EVERY = 64
_LOOK_S = 0.1


class Worker(Protocol):
    """What a feed needs of its worker."""

    def tell(self, message: dict[str, Any]) -> None: ...


class ResumableFeed(Feed):
    """Keeps the request, the reply's text, and what was done to it; tells the worker how much was read.

    request: the fields of its message.
    """

    def __init__(self, request: dict[str, Any], begin_s: float = math.inf, *, is_templated: bool = False) -> None:
        super().__init__(lambda _: self._tell({"do": "cancel"}))
        self.n_ctx = 0  # tokens of the context that its prompt was made for
        self.begin_s = begin_s  # most seconds until its prompt is there
        self.is_templated = is_templated  # a chat template makes its prompt
        self.number = 0  # of the request, with its worker
        self.texts: list[str] = []
        self.has_prompt = False  # its worker has made the prompt into tokens
        self.begun_at = math.inf  # when its worker sent the first event: then it is being made
        self.cancelled_at = math.inf
        self.n_deaths = 0  # of workers that were making it, and no prompt beside it
        self.n_shared = 0  # of workers that were making it and a prompt
        self.after: ResumableFeed | None = None  # that is to be done before this one's prompt is made again
        self._over = threading.Event()
        self._request, self._asked = request, time.monotonic()
        self._seed = secrets.randbits(32)
        self._entries: list[Any] = []  # as the worker sent them
        self._n_shown, self._n_taken = 0, 0
        self._ordered: list[Command] = []
        self._ordering = threading.RLock()  # a signal handler may come through
        self._worker: Worker | None = None

    @property
    def begun(self) -> bool:
        """Whether its worker is making it, or has made it and not yet sent all."""
        return self.begun_at < math.inf

    @property
    def is_shown(self) -> bool:
        """Whether something was done to it that must stand."""
        return bool(self._entries)

    def message(self) -> dict[str, Any]:
        """What a worker is asked: the request, and the reply's course so far."""
        course = [self._seed, time.monotonic() - self._asked, self._entries, self._n_shown]
        return {**self._request, "course": course}

    def bind(self, number: int, worker: Worker) -> None:
        """It is with a worker now, under a number."""
        self.number, self._worker, self.has_prompt, self.begun_at = number, worker, False, math.inf

    def hand_over(self, send: Callable[[], object]) -> None:
        """Let `send` give it to a worker, and tell that worker what the one before was told and did not do.

        An order that comes meanwhile is told after that, once.
        """
        with self._ordering:
            send()
            n_done = sum(isinstance(entry, list) and isinstance(entry[0], str) for entry in self._entries)
            for order in self._ordered[n_done:]:
                self._tell({"do": "order", "order": protocol.command_to_json(order)})
            if self.cancelled:
                self._tell({"do": "cancel"})

    def wait(self) -> None:
        """Wait until the reply is done that it is to come after, or rests because it is not read; not once it is cancelled."""
        other, self.after = self.after, None
        while other is not None and not self.cancelled and not other._over.wait(_LOOK_S) and not other.unread:
            continue

    def is_over(self, within_s: float) -> bool:
        """Whether its last event came; waits for that at most so many seconds."""
        return self._over.wait(within_s)

    def cancel(self) -> None:
        self.cancelled_at = min(self.cancelled_at, time.monotonic())
        super().cancel()

    def order(self, order: Command) -> None:
        with self._ordering:
            self._ordered.append(order)
            self._tell({"do": "order", "order": protocol.command_to_json(order)})

    @property
    def unread(self) -> bool:
        """Whether its reader is so far behind that the engine waits."""
        return self.events.qsize() > MOST_UNREAD - _ACK_EVERY

    def take(self, event: Event, entries: list[Any]) -> None:
        """An event of the worker's, and what was done to the reply until then."""
        self.begun_at = min(self.begun_at, time.monotonic())
        self._entries += entries
        self._n_shown += follows_from_reply(event)
        if isinstance(event, Thinking | Answer):
            self.texts.append(event.text)
        self.put(event)

    def put(self, event: Event | QwqError) -> None:
        super().put(event)
        if isinstance(event, Done | QwqError):
            self._over.set()

    def taken(self) -> None:
        self._n_taken += 1
        if self._n_taken == _ACK_EVERY:
            self._tell({"do": "read", "n": self._n_taken})
            self._n_taken = 0

    def _tell(self, message: dict[str, Any]) -> None:
        if self._worker is not None:
            self._worker.tell({"id": self.number, **message})
