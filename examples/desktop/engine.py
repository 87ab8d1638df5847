"""The model on a thread of its own, and a queue of what happens there. Knows no window."""

from __future__ import annotations

import queue
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path

import qwq_lite

_CLOSE_S = 10.0


@dataclass(frozen=True)
class Loaded:
    """The model is there. line: what it runs with."""

    line: str
    notices: tuple[str, ...]


@dataclass(frozen=True)
class Failed:
    """Something ended in an error. loaded: a question can follow; otherwise the model must be loaded again."""

    text: str
    loaded: bool


class _Closing(Exception):
    """Raised out of the load progress when the window closes meanwhile."""


class Engine:
    """Loads the model, then answers one question after the other. Every method returns at once, but `close`."""

    def __init__(self, file: Path) -> None:
        self.happened: queue.SimpleQueue[qwq_lite.Event | Loaded | Failed] = queue.SimpleQueue()
        self._file = file
        self._questions: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._chat: qwq_lite.Chat | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def ask(self, question: str) -> None:
        self._questions.put(question)

    def load_again(self) -> None:
        """After a load that failed."""
        self._questions.put("")

    def stop(self) -> None:
        """End the reply in hand; what was written stays."""
        if self._chat is not None:
            self._chat.cancel()

    def close(self) -> None:
        """Stop and free everything. What does not end in time ends with the program."""
        self._closing = True
        self._questions.put(None)
        self.stop()
        self._thread.join(_CLOSE_S)

    def _work(self) -> None:
        while not self._closing:
            try:
                with qwq_lite.load(self._file, on_progress=self._progress) as model:
                    self._chat = chat = model.chat()
                    self.happened.put(Loaded(model.plan.line(), model.notices))
                    while (question := self._questions.get()) is not None:
                        self._answer(chat, question)
                return
            except qwq_lite.QwqError as error:
                self.happened.put(Failed(str(error), loaded=False))
            except _Closing:
                return
            except Exception as error:  # a window that waits for a thread that is gone says nothing
                self.happened.put(Failed(f"{type(error).__name__}: {error}", loaded=False))
                traceback.print_exc()
            self._questions.get()  # until `load_again` or `close`

    def _answer(self, chat: qwq_lite.Chat, question: str) -> None:
        try:
            for event in chat.stream(question):
                self.happened.put(event)
                if self._closing:
                    return
        except qwq_lite.EngineCrashed as error:
            how = error.assertion or error.signal or "without a word"
            self.happened.put(
                Failed(
                    f"The engine has ended ({how}). What it wrote stays here and is no part of the conversation.\n{error}",
                    loaded=True,
                )
            )
        except qwq_lite.QwqError as error:
            self.happened.put(Failed(str(error), loaded=True))

    def _progress(self, event: qwq_lite.Progress) -> None:
        if self._closing:
            raise _Closing
        self.happened.put(event)
