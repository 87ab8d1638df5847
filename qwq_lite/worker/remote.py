"""A model whose engine runs in a process of its own: the same `Model`, and no crash of llama.cpp reaches the host.

The child is `worker`, watched by threads of the host. When it dies or hangs, calls in flight raise EngineCrashed, and the next
call starts another. Conversations go on: what was cached of them is computed again.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any

from qwq_lite.backend.hardware import report_from_json
from qwq_lite.chat.engine import check_running
from qwq_lite.chat.model import Model
from qwq_lite.chat.options import parse_options
from qwq_lite.engine.load_options import LoadOptions
from qwq_lite.errors import EngineClosed, EngineCrashed, EngineError, QwqError
from qwq_lite.events import Done, Notice, Progress, Reply, Stats
from qwq_lite.formats import gguf_header
from qwq_lite.prompt.question import Prompt, check_text, read_question
from qwq_lite.reply.stream import Stream, in_thread
from qwq_lite.worker import protocol
from qwq_lite.worker.crashed_request import ANOTHER, with_partial
from qwq_lite.worker.process import Retired, WorkerProcess
from qwq_lite.worker.resumable_feed import ResumableFeed

_BEGIN_S = 60.0  # for messages to become a prompt; a template has 2 s by its own clock
_SOON_S = 0.02
_CRASHES, _WITHIN_S = 3, 60.0  # in a row, each so soon after its load


class RemoteModel(Model):
    """A model in a worker process. Made by `loading.load`.

    plan: what it runs with. notices: what the user should know of that, one line each.
    """

    def __init__(
        self,
        file: Path,
        options: LoadOptions,
        *,
        python: str | None = None,
        idle_s: float = math.inf,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self._file, self._options, self._python, self._idle_s = file, options, python, idle_s
        self._on_progress = on_progress
        self._changing = threading.RLock()
        self._closed = False
        self._owner = os.getpid()
        self._n_crashes, self._loaded_at = 0, math.inf
        self._counted: WorkerProcess | None = None  # the last whose crash was counted
        # The worker at hand, apart from self: the finalizer that ends it must not hold self.
        self._held: list[WorkerProcess] = []
        weakref.finalize(self, _drop, self._held, self._owner)
        self._header: gguf_header.Header | None = None
        self._start(on_progress).let_go()

    @property
    def pid(self) -> int | None:
        """The worker's process, None while there is none."""
        worker = self._held[0]
        return None if worker.gone or worker.retired else worker.process.pid

    def generate(self, prompt: Prompt, *, session: Hashable = None, **options: Any) -> Stream:
        """As `LocalModel.generate`. Raises besides: EngineCrashed, here or while the stream is read."""
        check_running(self._file)
        checked = parse_options(options)  # refused here, before anything is sent
        question = read_question(prompt)
        request: dict[str, Any] = {
            "prompt": question.prompt,
            "session": _name(session),
            "options": {name: _plain(getattr(checked, name)) for name in options},
        }
        feed = ResumableFeed(request, _BEGIN_S, is_templated=question.is_templated)
        while True:
            feed.wait()
            with contextlib.suppress(Retired), self._alive() as worker:
                feed.n_ctx = self.n_ctx
                worker.ask("generate", feed=feed)
                return Stream(feed)

    async def agenerate(self, prompt: Prompt, *, session: Hashable = None, **options: Any) -> Stream:
        """As `generate`, without holding up the event loop."""
        return await in_thread(functools.partial(self.generate, prompt, session=session, **options))

    def tokenize(self, text: str) -> list[int]:
        check_text(text)
        found: list[int] = self._call("tokenize", text)
        return found

    def save_session(self, session: Hashable, path: str | os.PathLike[str], extra: dict[str, Any]) -> None:
        self._call("save", _name(session), str(Path(path).absolute()), extra)

    def restore_session(self, session: Hashable, path: str | os.PathLike[str]) -> dict[str, Any]:
        found: dict[str, Any] = self._call("restore", _name(session), str(Path(path).absolute()))
        return found

    def fork_session(self, session: Hashable, twin: Hashable) -> None:
        self._call("fork", _name(session), _name(twin))

    def release_session(self, session: Hashable) -> None:
        """Never raises and waits for nothing: a finalizer calls it."""
        if os.getpid() == self._owner:
            self._held[0].tell({"id": 0, "do": "release", "args": [_name(session)]})

    def unload(self) -> None:
        """Stop what runs and end the worker. Further calls raise EngineClosed; unloading again does nothing."""
        if os.getpid() != self._owner:
            return
        self._closed = True  # without the lock, which a load under way holds: a signal handler may come through here
        self._held[0].end()

    def _call(self, verb: str, *arguments: Any) -> Any:
        check_running(self._file)
        while True:
            with contextlib.suppress(Retired), self._alive() as worker:
                return worker.ask(verb, args=list(arguments))

    @contextlib.contextmanager
    def _alive(self, on_progress: Callable[[Progress], None] | None = None) -> Iterator[WorkerProcess]:
        """The worker, which does not retire meanwhile; a new one where the last has died or retired, whose load on_progress is
        told of."""
        if os.getpid() != self._owner:
            raise EngineError("the model was loaded in another process, of which this one is a copy; load it here")
        with self._changing:
            if self._closed:
                raise EngineClosed(f"{self._file}: the model is unloaded; load it again")
            worker = self._held[0]
            if worker.crash is not None:
                self._count(worker, worker.crash)
            if not worker.hold():
                worker.wait()  # never two models at once
                worker = self._start(self._on_progress if on_progress is None else on_progress)
        try:
            yield worker
        finally:
            worker.let_go()

    def _count(self, worker: WorkerProcess, crash: EngineCrashed) -> None:
        """Raises: EngineCrashed after too many, until a minute has passed."""
        if worker is not self._counted:
            self._counted = worker
            if worker.blamed:  # not the engine's own fault, so far as is known
                return
            soon = worker.gone_at - min(self._loaded_at, worker.gone_at) < _WITHIN_S
            self._n_crashes = self._n_crashes + 1 if soon else 1
        if self._n_crashes >= _CRASHES:
            if time.monotonic() - worker.gone_at >= _WITHIN_S:
                self._n_crashes = 0
                return
            error = copy.copy(crash)
            error.args = (
                f"{self._file}: the engine crashed {_CRASHES} times, each within {_WITHIN_S:.0f} s of its load, the last time:"
                f" {str(crash).removesuffix(ANOTHER)}; wait a minute, or run: qwq-lite doctor",
            )
            raise error

    def _start(self, on_progress: Callable[[Progress], None] | None) -> WorkerProcess:
        """A worker that has loaded the model; the caller holds it."""
        try:
            worker = WorkerProcess(
                self._file, self._python, self._idle_s, functools.partial(_rescue, weakref.ref(self))
            )
        except (OSError, RuntimeError) as error:  # no such interpreter, no memory, too many processes
            raise EngineError(f"{self._file}: the engine's process cannot be started: {error}") from error
        self._held[:], self._loaded_at = [worker], math.inf
        if self._closed:  # meanwhile, by another thread, which ended the one before
            worker.kill()
            raise EngineClosed(f"{self._file}: the model is unloaded; load it again")

        def show() -> None:
            """Load progress, on the thread that loads."""
            for share in worker.progress():
                if on_progress is not None:
                    on_progress(Progress("load", share, 1.0))

        try:
            if self._header is None:  # while the child starts
                self._header = gguf_header.read(self._file)
            given = self._options.plan
            found = worker.ask(
                "load",
                meanwhile=show,
                model=str(self._file),
                options=self._options.without_plan(),
                plan=None if given is None else protocol.plan_to_json(given),
            )
        except BaseException:
            worker.kill()
            raise
        self.n_ctx, self.notices = int(found["n_ctx"]), tuple(found["notices"])
        self.plan = protocol.plan_from_json(found["plan"], self._header)
        self.engine = report_from_json(found["engine"])
        self._loaded_at = time.monotonic()
        return worker


def _drop(held: list[WorkerProcess], owner: int) -> None:
    if held and os.getpid() == owner:  # not from a forked copy of the host
        held[0].kill()


def _rescue(model: weakref.ref[RemoteModel], orphans: list[ResumableFeed], crash: EngineCrashed) -> None:
    """Let replies go on in another worker, on a thread of its own: their callers only read."""
    work = threading.Thread(target=_go_on, args=(model, deque(orphans), crash), name="qwq-lite rescue", daemon=True)
    try:
        work.start()
    except RuntimeError:  # the interpreter is ending, or the system has no thread more
        _tell(orphans, crash)


def _go_on(model: weakref.ref[RemoteModel], orphans: deque[ResumableFeed], crash: EngineCrashed) -> None:
    """Each in its turn, those last who wait for another. The first error is told to all who are left."""
    orphans, told = deque(sorted(orphans, key=lambda feed: feed.after is not None)), list[ResumableFeed]()
    try:
        while orphans:
            owner = model()
            if owner is None or owner._closed:
                raise EngineClosed("the model was unloaded before the reply was done; load it again")
            with contextlib.suppress(Retired), owner._alive(_no_progress) as worker:  # this one may be gone too
                while orphans:
                    feed = orphans[0]
                    feed.wait()
                    if feed.is_shown and feed.n_ctx != owner.n_ctx:  # its rules were made for the other
                        feed.put(with_partial(crash, feed))
                    elif feed.cancelled and not feed.is_shown:
                        feed.put(Done(Reply("", "", "cancelled", Stats())))
                    else:
                        # Before what the other engine adds to it.
                        if (feed.n_deaths or feed.n_shared) and feed not in told:
                            words = str(crash).removesuffix(ANOTHER)
                            feed.put(Notice(f"{words}; another goes on with this reply", "resumed"))
                            told.append(feed)
                        worker.go_on(feed)
                    orphans.popleft()
                    # The worker makes prompts in any order and replies in the order of their prompts. A reader may read them in
                    # the order in which they were asked for, and a reply that is not read lets no other begin. Where this
                    # worker dies too, the prompt is made in another one, or the reply ends with an error.
                    while not (feed.has_prompt or feed.is_over(_SOON_S)):
                        pass
            del owner  # a model that is dropped ends
    except Exception as error:
        _tell(orphans, error if isinstance(error, QwqError) else EngineError(f"{type(error).__name__}: {error}"))


def _tell(orphans: Iterable[ResumableFeed], error: QwqError) -> None:
    for feed in orphans:
        feed.put(with_partial(error, feed) if isinstance(error, EngineCrashed) else copy.copy(error))


def _no_progress(_progress: Progress) -> None:
    """on_progress is called on threads of the caller only."""


def _name(session: Hashable) -> str | None:
    """A session's name for the other side, where it only must be told from others."""
    return None if session is None else repr(session)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
