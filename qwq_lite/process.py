"""One child process with an engine: its calls, its clocks, its death. What it is asked is `remote`'s business.

Four threads: one reads what it says, one writes, one keeps its last lines, one watches two clocks.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any

import psutil

from qwq_lite import child, engines, process_limits, wire
from qwq_lite.errors import EngineClosed, EngineCrashed, QwqError
from qwq_lite.events import Answer, Done, Thinking
from qwq_lite.orders import Order
from qwq_lite.plan import GIB
from qwq_lite.stream import MOST_UNREAD, Feed
from qwq_lite.wire import Pipe

_LINES_KEPT = 20
_ACK_EVERY = 64
_TICK_S = 0.1
_LOOK_S = 0.1
_ASLEEP_S = 1.0  # a tick that takes so long: the host itself was stopped or the laptop slept
_SILENT_S = 1.5  # without a beat, from a process that the system has stopped; a beat comes every half second
_STUCK_S = 30.0  # the same for a process that the system does run: a machine may be very busy
_LEAST_HUNG_S, _HUNG_TIMES = 600.0, 20  # no step of the work for so long, or so many times the longest step so far
_GOODBYE_S = 5.0
# From a cancel to the end of its reply, or so many times the longest step: a batch on a GPU is not cut.
_OBEY_S, _OBEY_TIMES = 60.0, 3
_ON_DISK = ("save", "restore")  # as long as the disk takes, and without a step
_REAP_S = 2.0


class WorkerProcess:
    """One child process, the calls that wait for it, and what it died of.

    It is held by who starts it: until the last holder lets go it does not retire, however long a call takes to be sent.
    """

    def __init__(self, file: Path, python: str | None, idle_s: float = math.inf) -> None:
        self._file, self._idle_s = file, idle_s
        self._progress: queue.SimpleQueue[float] = queue.SimpleQueue()
        self.gone: EngineCrashed | None = None
        self.retired = False  # gone, or going: nobody asked anything for idle_s
        self._numbers = itertools.count(1)
        self._waiting: dict[int, Future[Any]] = {}
        self._feeds: dict[int, RemoteFeed] = {}
        self._lock = threading.Lock()
        self._lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._lines_read = threading.Event()
        self._assertion, self._reason, self._closing = "", "", False
        # When it last said anything; when its work last made a step; when it was last asked; when it last answered a call; when
        # the watch last looked.
        self._seen = self._stepped = self._used = self._answered = self._looked = time.monotonic()
        self._n_steps, self._longest_s, self._n_on_disk = 0, 0.0, 0
        self._n_holders = 1
        self.gone_at = math.inf
        self._n_killed_before = _n_killed_for_memory()
        started = child.start("qwq_lite.worker:main", python)
        self.process, self._results = started.process, started.results
        assert self.process.stdin
        self._pipe = Pipe(self._results, self.process.stdin.fileno())
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=target, name=f"qwq-lite {name}", daemon=True)
            for name, target in (
                ("reader", self._read),
                ("writer", self._write),
                ("lines", self._read_lines),
                ("watch", self._watch),
            )
        ]
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:  # no memory for one: nobody would watch it
            self.process.kill()
            self.process.wait()
            raise

    def hold(self) -> bool:
        """Keep it from retiring until `let_go`. False where it is gone, or going, already."""
        with self._lock:
            found = not self.retired and self.gone is None
            self._n_holders += found
        return found

    def let_go(self) -> None:
        with self._lock:
            self._n_holders -= 1
            self._used = time.monotonic()

    def ask(
        self,
        verb: str,
        *,
        feed: RemoteFeed | None = None,
        timeout_s: float = math.inf,
        meanwhile: Callable[[], None] = lambda: None,
        **fields: Any,
    ) -> Any:
        """Send a request and wait for its answer. The caller holds the worker. meanwhile: called on this thread again and again.

        Raises: what the worker raised; UsageError for what is no JSON; EngineCrashed; FutureTimeout.
        """
        future: Future[Any] = Future()
        number = next(self._numbers)
        data = wire.encoded({"id": number, "do": verb, **fields})
        with self._lock:
            if self.gone is not None:
                raise self._epitaph("")
            self._waiting[number] = future
            self._used = time.monotonic()
            self._n_on_disk += verb in _ON_DISK
            if feed is not None:
                feed.number = number
                self._feeds[number] = feed
        self._outbox.put(data)
        try:
            return _result(future, time.monotonic() + timeout_s, meanwhile)
        except BaseException:
            with self._lock:
                left = self._feeds.pop(number, None)
            if left is not None:
                left.cancel()
            raise
        finally:
            with self._lock:
                self._n_on_disk -= verb in _ON_DISK

    def progress(self) -> Iterator[float]:
        """Shares of the load that were said since the last call."""
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._progress.get_nowait()

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message, without waiting: a signal handler or a finalizer may be the caller."""
        self._outbox.put(wire.encoded(message))

    def end(self) -> None:
        """Ask the worker to free the model and go; kill it where it does not."""
        self._closing = True
        self.tell({"id": 0, "do": "unload", "args": []})
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_GOODBYE_S)
        self.kill()

    def kill(self, reason: str = "") -> None:
        """End the process, and wait until it is gone; without a reason because nobody wants it any more."""
        if self.gone is None:
            self._reason = self._reason or reason
            self._closing = self._closing or not reason
        with contextlib.suppress(OSError):
            self.process.kill()
        self.wait()

    def wait(self) -> None:
        """Wait until the process is reaped and all who waited were told."""
        if threading.current_thread() not in self._threads:
            for thread in self._threads:
                thread.join()

    @property
    def crash(self) -> EngineCrashed | None:
        """What it died of, None while it lives and where it was ended by its owner."""
        return None if self._closing or self.retired else self.gone

    def _write(self) -> None:
        while (data := self._outbox.get()) is not None:
            with contextlib.suppress(OSError):  # it is dead: the reader says so to all who wait
                self._pipe.write(data)

    def _read(self) -> None:
        try:
            while (message := self._pipe.receive()) is not None:
                self._seen = time.monotonic()
                self._take(message)
        except Exception as error:  # its memory may be spoilt: nothing that it says counts any more
            self.kill(f"it sent what cannot be read ({error!r})")
        self._bury()

    def _take(self, message: dict[str, Any]) -> None:
        if "beat" in message:
            if message["beat"] != self._n_steps or not self._busy():
                if self._busy() and self._seen - self._looked < _ASLEEP_S:  # else it may have slept in between
                    self._longest_s = max(self._longest_s, self._seen - self._stepped)
                self._n_steps, self._stepped = message["beat"], self._seen
        elif "load" in message:
            self._progress.put(float(message["load"]))
        elif "abort" in message:
            self._assertion = str(message["abort"]).strip()
        elif "event" in message:
            event = wire.event_from_json(message["event"])
            feed = self._feeds.get(message["id"])
            if feed is not None:
                if isinstance(event, Done):
                    with self._lock:
                        self._feeds.pop(message["id"], None)
                feed.put(event)
        else:
            self._settle(message)

    def _settle(self, message: dict[str, Any]) -> None:
        with self._lock:
            future = self._waiting.pop(message["id"], None)
            feed = self._feeds.pop(message["id"], None) if "error" in message else None
        if future is not None:
            self._answered = self._seen  # what was asked before may have been waiting for this
            if "error" in message:
                future.set_exception(wire.error_from_json(message["error"]))
            else:
                future.set_result(message["result"])
        elif feed is not None:
            feed.put(wire.error_from_json(message["error"]))

    def _busy(self) -> bool:
        return bool(self._waiting or self._feeds)

    def _read_lines(self) -> None:
        assert self.process.stdout
        for line in iter(self.process.stdout.readline, b""):
            self._lines.append(line.decode("utf-8", "replace").rstrip())
        self._lines_read.set()

    def _watch(self) -> None:
        """Two clocks, which count only while this process itself is awake: silence, and work that makes no step."""
        before = time.monotonic()
        while self.gone is None:
            time.sleep(_TICK_S)
            now = time.monotonic()
            if now - before > _ASLEEP_S:
                self._seen = self._stepped = self._answered = now
            before = self._looked = now
            if self._n_on_disk or any(feed.unread for feed in list(self._feeds.values())):
                self._stepped = self._answered = now  # it waits for the disk, or for a reader
            silent, idle = now - self._seen, now - self._stepped
            if silent > _STUCK_S or (silent > _SILENT_S and self._is_stopped()):
                self.kill(f"it did not answer for {silent:.0f} s")
            elif self._busy() and idle > max(_LEAST_HUNG_S, _HUNG_TIMES * self._longest_s):
                self.kill(f"its work made no step for {idle:.0f} s")
            elif self._disobeys(now):
                self.kill("it did not stop when it was asked to")
            elif self._is_idle(now):
                self.end()

    def _disobeys(self, now: float) -> bool:
        """Whether a reply that has begun goes on long after it was cancelled."""
        limit = max(_OBEY_S, _OBEY_TIMES * self._longest_s)
        begun = [feed for feed in list(self._feeds.values()) if feed.begun]
        return any(now - max(feed.cancelled_at, self._answered) > limit for feed in begun)

    def _is_idle(self, now: float) -> bool:
        """Whether nobody asked anything for so long that the memory is given back. Then nobody can any more."""
        with self._lock:
            if self._busy() or self._n_holders:
                self._used = now
            self.retired = self.retired or now - self._used > self._idle_s
            return self.retired

    def _is_stopped(self) -> bool:
        try:
            return bool(psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED)
        except psutil.Error:
            return False

    def _bury(self) -> None:
        """The pipe has ended: reap the process, and tell all who wait."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_REAP_S)
        self.process.kill()
        code = self.process.wait()
        self._lines_read.wait(_REAP_S)
        with self._lock:
            self.gone, self.gone_at = self._post_mortem(code), time.monotonic()
            waiting, feeds = list(self._waiting.values()), list(self._feeds.values())
            self._waiting.clear()
            self._feeds.clear()
        for future in waiting:
            future.set_exception(self._epitaph(""))
        for feed in feeds:
            feed.put(self._epitaph("".join(feed.texts)))
        self._outbox.put(None)
        self._threads[1].join()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        os.close(self._results)

    def _post_mortem(self, code: int) -> EngineCrashed:
        name = ""
        if code < 0:
            with contextlib.suppress(ValueError):
                name = signal.Signals(-code).name
        ended = self._reason or (
            f"it was killed ({name or -code})" if code < 0 else f"it ended with exit status {code}"
        )
        lost = engines.forget(self.process.pid)
        if name == "SIGKILL" and not self._reason and _n_killed_for_memory() > self._n_killed_before:
            ended += ", out of memory"
            if lost is not None:
                free = process_limits.available_memory_bytes()
                ended += f" (it needs {lost.n_bytes / GIB:.1f} GiB, {free / GIB:.1f} are free without it)"
        said = self._assertion or next((line for line in reversed(self._lines) if line), "")
        # Another would die of it too: its kernels were built for another CPU, or wrongly.
        advice = "run: qwq-lite doctor" if code in child.ILLEGAL_INSTRUCTION else "the next call starts another"
        crash = EngineCrashed(
            f"{self._file}: the engine's process is gone: {ended}{f': {said}' if said else ''}; {advice}"
        )
        crash.signal, crash.assertion, crash.lines = name, self._assertion, tuple(self._lines)
        return crash

    def _epitaph(self, partial: str) -> QwqError:
        crash = self.gone
        if self._closing or crash is None:
            return EngineClosed(f"{self._file}: the model is unloaded; load it again")
        error = copy.copy(crash)  # each caller's own: a traceback is added to it
        error.partial = partial
        return error


class RemoteFeed(Feed):
    """The host's end of a reply: keeps its text for a crash, and tells the worker how much was read."""

    def __init__(self, worker: WorkerProcess) -> None:
        super().__init__(lambda feed: worker.tell({"id": self.number, "do": "cancel"}))
        self.number = 0
        self.texts: list[str] = []
        self.begun = False
        self.cancelled_at = math.inf
        self._worker, self._n_taken = worker, 0

    def cancel(self) -> None:
        self.cancelled_at = min(self.cancelled_at, time.monotonic())
        super().cancel()

    def order(self, order: Order) -> None:
        self._worker.tell({"id": self.number, "do": "order", "order": wire.order_to_json(order)})

    @property
    def unread(self) -> bool:
        """Whether its reader is so far behind that the engine waits."""
        return self.events.qsize() > MOST_UNREAD - _ACK_EVERY

    def put(self, event: Any) -> None:
        self.begun = True
        if isinstance(event, Thinking | Answer):
            self.texts.append(event.text)
        super().put(event)

    def taken(self) -> None:
        self._n_taken += 1
        if self._n_taken == _ACK_EVERY:
            self._worker.tell({"id": self.number, "do": "read", "n": self._n_taken})
            self._n_taken = 0


def _n_killed_for_memory(counters: Path = Path("/proc/vmstat")) -> int:
    """Processes that the kernel has killed for lack of memory since it started, containers' too; 0 where it does not count.

    Source: Linux, mm/oom_kill.c (OOM_KILL), from 4.13 on
    """
    with contextlib.suppress(OSError, ValueError):
        for line in counters.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _result(future: Future[Any], deadline: float, meanwhile: Callable[[], None]) -> Any:
    """A future's result. In short waits, for on Windows a long one cannot be interrupted; a sleep of the host does not count."""
    while True:
        meanwhile()
        before = time.monotonic()
        wait([future], max(0.0, min(_LOOK_S, deadline - before)))
        if future.done():
            meanwhile()  # what came before the result, and after the last look
            return future.result()
        now = time.monotonic()
        if now - before > _ASLEEP_S:
            deadline += now - before
        elif now >= deadline:
            raise FutureTimeout
