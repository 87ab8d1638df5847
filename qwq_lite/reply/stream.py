"""Carries the events of one reply from the engine's thread to its reader, for `for` and `async for`, and commands back.

The engine holds a `Feed`, the reader a `Stream`: when nobody holds the stream any more, the reply is cancelled.
"""

from __future__ import annotations

import contextlib
import queue
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from qwq_lite.errors import QwqError
from qwq_lite.events import Answer, Done, Event, Notice, Thinking
from qwq_lite.reply.commands import Command, Conclude, Drop, LogEntry, Steer

if TYPE_CHECKING:
    import asyncio

MOST_UNREAD = 512  # events that wait for a reader; the engine then waits too
_WAIT_S = 0.25  # Windows does not wake a waiting main thread for Ctrl-C


def follows_from_reply(event: object) -> bool:
    """Whether another engine makes the same event when it does the same to a reply.

    Progress, and what a cache cannot do, are an engine's own.
    """
    if isinstance(event, Notice):
        return event.kind != "recomputed"
    return isinstance(event, Thinking | Answer)


class Feed:
    """The engine's end. on_cancel: called once `cancelled` is set, on the thread that cancels, a signal handler's too.

    done: what was done to the reply and not yet fetched, each before its events; None where no host keeps it. n_seen: the
    next so many texts and notices are not put, for the reader has them from another engine.
    """

    def __init__(self, on_cancel: Callable[[Feed], None]) -> None:
        self.cancelled = False
        self.events: queue.SimpleQueue[Event | QwqError] = queue.SimpleQueue()
        self.orders: deque[Command] = deque()  # of the reader, for the engine to carry out between two tokens
        self.done: deque[LogEntry] | None = None
        self.n_seen = 0
        self.wake: Callable[[], None] = _nobody_waits
        self._on_cancel = on_cancel

    def put(self, event: Event | QwqError) -> None:
        if self.n_seen and follows_from_reply(event):
            self.n_seen -= 1
            return
        self.events.put(event)
        self.wake()

    def cancel(self) -> None:
        self.cancelled = True
        self._on_cancel(self)

    def order(self, order: Command) -> None:
        self.orders.append(order)

    @property
    def full(self) -> bool:
        """Whether the reader is so far behind that the engine should wait for it."""
        return self.events.qsize() >= MOST_UNREAD and not self.cancelled

    def taken(self) -> None:
        """The reader has one event more."""


class Stream:
    """Events in order, the last one `Done`. Leaving the iteration, the `with` block, or the stream itself cancels the reply.

    The reply is under way from the start, whether it is read or not.
    Raises, while it is iterated: the QwqError that ended the reply. feed: the engine's end.
    """

    def __init__(self, feed: Feed) -> None:
        self.feed = feed
        self._finished = False
        self._watch: Callable[[Event], None] | None = None

    def watch(self, seen: Callable[[Event], None]) -> Stream:
        """Let `seen` have each event before the reader has it, on the reader's thread."""
        self._watch = seen
        return self

    @property
    def finished(self) -> bool:
        """Whether the last event was read."""
        return self._finished

    @property
    def cancelled(self) -> bool:
        return self.feed.cancelled

    def cancel(self) -> None:
        """Stop after the token, or within the graph node, in hand. Any thread; more than once does no harm."""
        self.feed.cancel()

    def conclude(self) -> None:
        """Answer now: the thought ends within 96 tokens, at a paragraph's end, later at a line's or a sentence's.

        Any thread, a signal handler too; waits for nothing. A Notice of kind "late" tells that there was no thought any more.
        """
        self.feed.order(Conclude())

    def steer(self, hint: str, drop: Drop | None = None) -> None:
        """Take back the end of the thought and go on from a hint, in the model's own voice; only the hint is computed.

        Between two tokens, soon; waits for nothing. A Notice tells what no longer counts, or that it came too late.
        Args:
            hint: such as "Wait, n could be 0." A newline at its end parts it from what the model writes.
            drop: "paragraph" or "sentence", the last one of the thought so far; None drops nothing: the hint follows where
                the thought stands, be it in the middle of a sentence.

        Raises: UsageError for an empty hint, or another drop.
        """
        self.feed.order(Steer(hint, drop))

    def __iter__(self) -> Iterator[Event]:
        try:
            while not self._finished:
                try:
                    event = self.feed.events.get(timeout=_WAIT_S)
                except queue.Empty:
                    continue
                yield self._checked(event)
        finally:
            self._leave()

    async def __aiter__(self) -> AsyncIterator[Event]:
        import asyncio  # 20 ms that a worker's start does without

        loop, ready = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads on
                loop.call_soon_threadsafe(ready.set)

        self.feed.wake = wake
        try:
            while not self._finished:
                ready.clear()
                try:
                    event = self.feed.events.get_nowait()
                except queue.Empty:
                    await ready.wait()
                    continue
                yield self._checked(event)
        finally:
            if self.feed.wake is wake:  # another reader may have come since
                self.feed.wake = _nobody_waits
            self._leave()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def __del__(self) -> None:
        self._leave()

    def _leave(self) -> None:
        if not self._finished:
            self.feed.cancel()

    def _checked(self, event: Event | QwqError) -> Event:
        self._finished = isinstance(event, QwqError | Done)
        self.feed.taken()
        if isinstance(event, QwqError):
            raise event
        if self._watch is not None:
            self._watch(event)
        return event


async def in_thread(make: Callable[[], Stream]) -> Stream:
    """The stream that `make` returns, made on another thread. A task that is cancelled meanwhile cancels the stream."""
    import asyncio

    made = asyncio.get_running_loop().run_in_executor(None, make)
    try:
        return await asyncio.shield(made)
    except asyncio.CancelledError:
        made.add_done_callback(_cancel_made)
        raise


def _cancel_made(made: asyncio.Future[Stream]) -> None:
    if not made.cancelled() and made.exception() is None:
        made.result().cancel()


def _nobody_waits() -> None:
    """A reader with `for` waits in the queue itself."""
