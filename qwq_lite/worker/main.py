"""The engine's own process: loads one model and answers its host over a pipe. The host's side is `remote`.

Started with -c and the host's sys.path, so nothing of the caller is imported. It ends with its host, however that ends: it looks
for the end of the pipe and for another parent all the time.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from qwq_lite.backend import native
from qwq_lite.engine import local
from qwq_lite.engine.load_options import LoadOptions
from qwq_lite.errors import EngineError
from qwq_lite.events import Done, Progress
from qwq_lite.formats import gguf_header
from qwq_lite.prompt.question import read_question
from qwq_lite.reply.commands import Command, LogEntry
from qwq_lite.reply.stream import MOST_UNREAD, Stream
from qwq_lite.system import child
from qwq_lite.worker import protocol
from qwq_lite.worker.protocol import Pipe

BEAT_S = 0.5
_PARENT_S = 1.0
_NICENESS = 5  # the desktop goes first


def main() -> None:
    """The child's whole life."""
    pipe = _own_pipe()
    _settle()
    threading.Thread(target=_end_with_parent, args=(child.PARENT,), daemon=True).start()
    worker = _Worker(pipe)
    threading.Thread(target=worker.beat, daemon=True).start()
    while (message := pipe.receive()) is not None:
        worker.take(message)
    os._exit(0)  # the host is gone, and its engine goes without ceremony


class _Worker:
    """What the host asks for, each request on a thread of its own."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._model: local.LocalModel | None = None
        self._replies: dict[int, _Reply] = {}
        self._n_steps = 0
        self._abort_callback: Any = None
        self._preparing = threading.Lock()

    def beat(self) -> None:
        """Say that this process runs, and how far its work has come."""
        tick = threading.Event()
        while not tick.wait(BEAT_S):
            self._send({"beat": self._n_steps})

    def take(self, message: dict[str, Any]) -> None:
        number, verb = message["id"], message["do"]
        if verb in ("cancel", "read", "order"):
            reply = self._replies.get(number)
            if reply is not None:
                reply.obey(verb, message)
            return
        if verb == "generate":  # known before it begins, so that a cancel finds it
            self._replies[number] = _Reply()
        threading.Thread(target=self._answer, args=(number, verb, message), daemon=True).start()

    def _answer(self, number: int, verb: str, message: dict[str, Any]) -> None:
        try:
            if verb == "generate":
                self._generate(number, message)
                return
            if verb == "tokenize":
                with self._blamed(number):
                    result = self._call(verb, message)
            else:
                result = self._load(message) if verb == "load" else self._call(verb, message)
            self._send({"id": number, "result": result})
        except BaseException as error:
            self._send({"id": number, "error": protocol.error_to_json(error)})
        finally:
            if verb == "unload":  # also where nothing was loaded yet
                os._exit(0)

    def _load(self, message: dict[str, Any]) -> dict[str, Any]:
        self._report_aborts()
        # Reading weights leaves the interpreter free, so what is first needed after them is imported meanwhile.
        threading.Thread(target=importlib.import_module, args=("numpy",), daemon=True).start()
        file, plan = Path(message["model"]), None
        if message["plan"] is not None:
            plan = protocol.plan_from_json(message["plan"], gguf_header.read(file))
        options = LoadOptions(**message["options"], plan=plan)
        self._model = model = local.load(file, options, self._loading)
        return {
            "n_ctx": model.n_ctx,
            "notices": list(model.notices),
            "plan": protocol.plan_to_json(model.plan),
            "engine": asdict(model.engine),
        }

    def _loading(self, event: Progress) -> None:
        self._n_steps += 1
        self._send({"load": event.done})

    def _report_aborts(self) -> None:
        """ggml's last word before it ends the process. Source: ggml_set_abort_callback"""
        kind = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
        self._abort_callback = kind(lambda text: self._send({"abort": (text or b"").decode("utf-8", "replace")}))
        with contextlib.suppress(EngineError):  # an older ggml: then the last lines must do
            native.symbol("ggml_set_abort_callback", ctypes.c_void_p, [kind])(self._abort_callback)

    def _call(self, verb: str, message: dict[str, Any]) -> Any:
        model = self._loaded()
        calls: dict[str, Callable[..., Any]] = {
            "tokenize": model.tokenize,
            "save": model.save_session,
            "restore": model.restore_session,
            "fork": model.fork_session,
            "release": model.release_session,
            "unload": model.unload,
        }
        return calls[verb](*message["args"])

    def _generate(self, number: int, message: dict[str, Any]) -> None:
        reply = self._replies[number]
        try:
            course = protocol.log_from_json(message["course"])
            with self._blamed(number):
                stream = self._loaded().go_on(
                    read_question(message["prompt"]), course, session=message["session"], **message["options"]
                )
                self._send({"id": number, "result": None})
            reply.begin(stream)
            for event in stream:
                self._n_steps += 1
                entries = [protocol.entry_to_json(entry) for entry in _fetch_entries(stream)]
                self._send({"id": number, "event": protocol.event_to_json(event), "entries": entries})
                if not isinstance(event, Done):
                    reply.wait()
        finally:
            del self._replies[number]

    @contextlib.contextmanager
    def _blamed(self, number: int) -> Iterator[None]:
        """While a text is made into tokens, one at a time: a death meanwhile is that request's, until its answer is sent."""
        with self._preparing:
            self._send({"id": number, "began": True})
            yield

    def _loaded(self) -> local.LocalModel:
        if self._model is None:
            raise EngineError("the model is not loaded yet")
        return self._model

    def _send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the host is gone, and so is this process in a moment
            self._pipe.send(message)


def _fetch_entries(stream: Stream) -> Iterator[LogEntry]:
    """What was done to a reply since it was last asked: all that the events read so far follow from, and perhaps more."""
    done = stream.feed.done
    while done:
        yield done.popleft()


class _Reply:
    """A reply on its way: it pauses while the host has not read what was sent, and can be cancelled before it begins."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._stream: Stream | None = None
        self._n_unread = 0
        self._cancelled = False
        self._orders: list[Command] = []  # that came before it began

    def obey(self, verb: str, message: dict[str, Any]) -> None:
        if verb == "cancel":
            self.cancel()
        elif verb == "read":
            self.read(message["n"])
        else:
            self.order(protocol.command_from_json(message["order"]))

    def begin(self, stream: Stream) -> None:
        with self._changed:
            self._stream = stream
        for order in self._orders:
            stream.feed.order(order)
        if self._cancelled:
            stream.cancel()

    def order(self, order: Command) -> None:
        with self._changed:
            stream = self._stream
            if stream is None:
                self._orders.append(order)
        if stream is not None:
            stream.feed.order(order)

    def cancel(self) -> None:
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()
        if self._stream is not None:
            self._stream.cancel()

    def read(self, n_events: int) -> None:
        with self._changed:
            self._n_unread -= n_events
            self._changed.notify_all()

    def wait(self) -> None:
        """One event more was sent; wait until there is room for the next."""
        with self._changed:
            self._n_unread += 1
            self._changed.wait_for(lambda: self._n_unread < MOST_UNREAD or self._cancelled)


def _own_pipe() -> Pipe:
    """The pipe on descriptors of its own: nothing that reads standard input or prints can disturb it."""
    read = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    if sys.platform == "win32":
        import msvcrt

        msvcrt.setmode(read, os.O_BINARY)
    return Pipe(read, child.results())


def _settle() -> None:
    """Ctrl-C is the host's to answer; the desktop goes first; a crash leaves neither core nor dialog."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"):  # they go to the host's whole group; it may want to save
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if sys.platform == "win32":
        ctypes.windll.kernel32.SetErrorMode(0x0001 | 0x0002 | 0x8000)  # no dialogs of any kind
        psutil.Process().nice(psutil.BELOW_NORMAL_PRIORITY_CLASS)
        return
    import resource

    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))  # 0 would not hold where dumps go to a program: core(5)
    with contextlib.suppress(OSError):
        os.nice(_NICENESS)


def _end_with_parent(parent: int) -> None:
    """A host that forked leaves the pipe open in its copy when it dies; another parent tells. Windows has the pipe only."""
    tick = threading.Event()
    while not tick.wait(_PARENT_S):
        if sys.platform != "win32" and os.getppid() != parent:
            os._exit(0)
