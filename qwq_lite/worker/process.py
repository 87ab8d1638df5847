"""One child process with an engine: its start, the calls that wait for it, and its death. `remote` knows what it is asked.

Four threads: one reads its messages, one writes, one keeps its last lines, one looks whether it hangs.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
import queue
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import psutil

from qwq_lite.errors import EngineClosed, EngineCrashed, QwqError
from qwq_lite.events import Done
from qwq_lite.system import child, process_limits
from qwq_lite.worker import protocol
from qwq_lite.worker.crashed_request import CrashCause, find_cause
from qwq_lite.worker.hang_clocks import HangClocks
from qwq_lite.worker.process_exit import crash_error
from qwq_lite.worker.protocol import Pipe
from qwq_lite.worker.resumable_feed import ResumableFeed

_LINES_KEPT = 20
_TICK_S = 0.1
_LOOK_S = 0.1
_GOODBYE_S = 5.0
_ON_DISK = ("save", "restore")  # as long as the disk takes, and without a step
_AGAIN = ("generate", "tokenize")  # what another worker can be asked for where one died of something else
_REAP_S = 2.0
_BURY_S = 30.0  # a large process may take seconds to give its memory back
_KILLS_S = 10.0  # between two looks how many processes the kernel has killed for lack of memory


class Retired(Exception):
    """The worker is gone, and not because of this call: another request ended it. Another worker must be started."""


class WorkerProcess:
    """One child process, the calls that wait for it, and what it died of.

    It is held by who starts it: until the last holder lets go it does not retire, however long a call takes to be sent.

    on_orphans: called with the replies that were not to blame for its death, in their order; another worker is to go on with
    them.
    """

    def __init__(
        self,
        file: Path,
        python: str | None,
        idle_s: float,
        on_orphans: Callable[[list[ResumableFeed], EngineCrashed], None],
    ) -> None:
        self._file, self._idle_s, self._on_orphans = file, idle_s, on_orphans
        self._progress: queue.SimpleQueue[float] = queue.SimpleQueue()
        self.gone: EngineCrashed | None = None
        self.retired = False  # gone, or going: no call came for idle_s
        self._numbers = itertools.count(1)
        self._waiting: dict[int, tuple[Future[Any], str]] = {}  # and what was asked for
        self.blamed = False  # it died while it made a prompt or a reply
        self._feeds: dict[int, ResumableFeed] = {}
        self._lock = threading.Lock()
        self._lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._lines_read = threading.Event()
        self._assertion, self._reason, self._closing = "", "", False
        self._used = time.monotonic()  # when it was last asked
        self._clocks = HangClocks(self._used)
        self._n_on_disk = 0  # calls that wait for the disk
        self._n_holders = 1
        self.gone_at = math.inf
        self._n_killed = (process_limits.n_killed_for_memory(),) * 2  # one to two looks ago, and at the last look
        self._counted_at = time.monotonic()
        started = child.start("qwq_lite.worker.main:main", python)
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
        self._start_threads()

    def _start_threads(self) -> None:
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:  # no memory for a thread: without all four it is of no use
            self.process.kill()
            self.process.wait()
            if self._threads[0].ident is None:  # else the reader closes them
                self._close_streams()
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
        feed: ResumableFeed | None = None,
        meanwhile: Callable[[], None] = lambda: None,
        **fields: Any,
    ) -> Any:
        """Send a request and wait for its answer. The caller holds the worker. meanwhile: called on this thread again and again.

        Raises: what the worker raised; UsageError for what is no JSON; EngineCrashed; Retired.
        """
        future: Future[Any] = Future()
        number = self._request(verb, feed, future, fields)
        try:
            return _result(future, meanwhile)
        except BaseException:
            with self._lock:
                left = self._feeds.pop(number, None)
            if left is not None:
                left.cancel()
            raise
        finally:
            with self._lock:
                self._n_on_disk -= verb in _ON_DISK

    def go_on(self, feed: ResumableFeed) -> None:
        """Go on with a reply that another worker had. What becomes of it is told to its reader. Raises: Retired."""
        feed.hand_over(lambda: self._request("generate", feed, None, {}))

    def _request(
        self, verb: str, feed: ResumableFeed | None, future: Future[Any] | None, fields: dict[str, Any]
    ) -> int:
        number = next(self._numbers)
        data = protocol.encode({"id": number, "do": verb, **fields, **(feed.message() if feed else {})})
        with self._lock:
            if self.gone is not None:
                raise self._epitaph() if self._closing or verb not in _AGAIN else Retired
            self._used = time.monotonic()
            self._n_on_disk += verb in _ON_DISK
            if future is not None:
                self._waiting[number] = future, verb
            if feed is not None:
                feed.bind(number, self)
                self._feeds[number] = feed
        self._outbox.put(data)
        return number

    def progress(self) -> Iterator[float]:
        """Shares of the load that were said since the last call."""
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._progress.get_nowait()

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message, without waiting: a signal handler or a finalizer may be the caller."""
        self._outbox.put(protocol.encode(message))

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
        """Wait until the process is reaped and all who waited were told.

        Not without end: a signal handler may have interrupted a call on this thread that holds the lock.
        """
        end = time.monotonic() + _BURY_S
        if threading.current_thread() not in self._threads:
            for thread in self._threads:
                thread.join(max(0.0, end - time.monotonic()))

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
                self._clocks.message_came(time.monotonic())
                self._take(message)
        except Exception as error:  # its memory may be spoilt: nothing that it says counts any more
            self.kill(f"it sent what cannot be read ({error!r})")
        self._bury()

    def _take(self, message: dict[str, Any]) -> None:
        if "beat" in message:
            self._clocks.beat_came(message["beat"], busy=self._busy())
        elif "load" in message:
            self._progress.put(float(message["load"]))
        elif "abort" in message:
            self._assertion = str(message["abort"]).strip()
        elif "began" in message:
            self._clocks.prompt_began(int(message["id"]))
        elif "event" in message:
            event = protocol.event_from_json(message["event"])
            feed = self._feeds.get(message["id"])
            if feed is not None:
                if isinstance(event, Done):
                    with self._lock:
                        self._feeds.pop(message["id"], None)
                feed.take(event, message["entries"])
        else:
            self._settle(message)

    def _settle(self, message: dict[str, Any]) -> None:
        self._clocks.prompt_ended(message["id"])
        with self._lock:
            future, _ = self._waiting.pop(message["id"], (None, ""))
            feed = self._feeds.get(message["id"])
            if feed is not None and "error" in message:
                del self._feeds[message["id"]]
            elif feed is not None:
                feed.has_prompt, feed = True, None
        if future is not None:
            self._clocks.answer_came()
            if "error" in message:
                future.set_exception(protocol.error_from_json(message["error"]))
            else:
                future.set_result(message["result"])
        elif feed is not None:
            feed.put(protocol.error_from_json(message["error"]))

    def _busy(self) -> bool:
        return bool(self._waiting or self._feeds)

    def _read_lines(self) -> None:
        assert self.process.stdout
        for line in iter(self.process.stdout.readline, b""):
            self._lines.append(line.decode("utf-8", "replace").rstrip())
        self._lines_read.set()

    def _watch(self) -> None:
        """Look again and again whether it hangs, or was idle for long enough."""
        while self.gone is None:
            time.sleep(_TICK_S)
            now = time.monotonic()
            if now - self._counted_at > _KILLS_S:
                self._n_killed, self._counted_at = (self._n_killed[1], process_limits.n_killed_for_memory()), now
            feeds = dict(self._feeds)
            self._clocks.look(now, waits=bool(self._n_on_disk) or any(feed.unread for feed in feeds.values()))
            why = self._clocks.find_hang(now, feeds, busy=self._busy(), is_stopped=self._is_stopped)
            if why is not None:
                self.kill(why)
            elif self._is_idle(now):
                self.end()

    def _is_idle(self, now: float) -> bool:
        """Whether no call came for so long that the memory is given back. After that none is taken."""
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
            crash, found = self._crash(code), None
            waiting, feeds = dict(self._waiting), dict(self._feeds)
            if not self._closing:
                found = find_cause(crash, self._clocks.tokenizing, self._clocks.overdue, waiting.keys(), feeds)
                self.blamed = found.known  # before it is known to be gone: then it is asked for
            self.gone, self.gone_at = crash, time.monotonic()
            self._waiting.clear()
            self._feeds.clear()
        orphans = self._tell_all(found, waiting, feeds)
        self._outbox.put(None)
        if self._threads[1].ident is not None:
            self._threads[1].join()
        self._close_streams()
        if orphans:
            self._on_orphans(orphans, crash)

    def _close_streams(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        os.close(self._results)

    def _tell_all(
        self,
        found: CrashCause | None,
        waiting: Mapping[int, tuple[Future[Any], str]],
        feeds: Mapping[int, ResumableFeed],
    ) -> list[ResumableFeed]:
        """Tell those who waited what happened. The replies that another worker is to go on with, in their order."""
        culprit = found.culprit if found else None
        for number, (future, verb) in waiting.items():
            if found and number == culprit:
                future.set_exception(found.error)
            else:
                future.set_exception(Retired() if found and verb in _AGAIN else self._epitaph())
        orphans = []
        for number, feed in feeds.items():
            if found is None or number == culprit:
                feed.put(found.error if found else self._epitaph())
            elif number not in waiting:  # else its caller asks again
                orphans.append(feed)
        return orphans

    def _crash(self, code: int) -> EngineCrashed:
        n_killed = process_limits.n_killed_for_memory() - self._n_killed[0]
        said = self._assertion or next((line for line in reversed(self._lines) if line), "")
        crash = crash_error(self._file, self.process.pid, code, self._reason, said, ran_out_of_memory=n_killed > 0)
        crash.assertion, crash.lines = self._assertion, tuple(self._lines)
        return crash

    def _epitaph(self) -> QwqError:
        if self._closing or self.gone is None:
            return EngineClosed(f"{self._file}: the model is unloaded; load it again")
        return copy.copy(self.gone)  # each caller's own: a traceback is added to it


def _result(future: Future[Any], meanwhile: Callable[[], None]) -> Any:
    """A future's result. In short waits, for on Windows a long one cannot be interrupted."""
    while not future.done():
        meanwhile()
        wait([future], _LOOK_S)
    meanwhile()  # what came before the result, and after the last look
    return future.result()
