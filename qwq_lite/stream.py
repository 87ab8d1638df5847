"""The events of one reply on their way from the engine's thread to whoever reads them, with `for` or with `async for`."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator

from qwq_lite.errors import QwqError
from qwq_lite.events import Done, Event

_WAIT_S = 0.25  # Windows does not wake a waiting main thread for Ctrl-C


class Stream:
    """Events in order, the last one `Done`. Leaving the iteration early cancels the reply.

    on_cancel: called once `cancelled` is set, on the thread that cancels.
    Raises, while it is iterated: the QwqError that ended the reply.
    """

    def __init__(self, on_cancel: Callable[[Stream], None]) -> None:
        self.cancelled = threading.Event()
        self._on_cancel = on_cancel
        self._events: queue.SimpleQueue[Event | QwqError] = queue.SimpleQueue()
        self._wake: Callable[[], None] = _nobody_waits
        self._finished = False

    @property
    def finished(self) -> bool:
        """Whether the last event was read."""
        return self._finished

    def put(self, event: Event | QwqError) -> None:
        self._events.put(event)
        self._wake()

    def cancel(self) -> None:
        """Stop after the token, or within the graph node, in hand. Any thread; more than once does no harm."""
        self.cancelled.set()
        self._on_cancel(self)

    def __iter__(self) -> Iterator[Event]:
        try:
            while not self._finished:
                try:
                    event = self._events.get(timeout=_WAIT_S)
                except queue.Empty:
                    continue
                yield self._checked(event)
        finally:
            if not self._finished:
                self.cancel()

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads on
                loop.call_soon_threadsafe(ready.set)

        self._wake = wake
        try:
            while not self._finished:
                ready.clear()
                try:
                    event = self._events.get_nowait()
                except queue.Empty:
                    await ready.wait()
                    continue
                yield self._checked(event)
        finally:
            if self._wake is wake:  # another reader may have come since
                self._wake = _nobody_waits
            if not self._finished:
                self.cancel()

    def _checked(self, event: Event | QwqError) -> Event:
        self._finished = isinstance(event, QwqError | Done)
        if isinstance(event, QwqError):
            raise event
        return event


async def in_thread(make: Callable[[], Stream]) -> Stream:
    """The stream that `make` returns, made on another thread. A task that is cancelled meanwhile cancels the stream."""
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
