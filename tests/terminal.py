"""qwq-lite chat as a process: one that ends, or one whose standard input is a pseudo-terminal."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil
import pytest

COMMAND = [sys.executable, "-c", "from qwq_lite.cli import main; main()", "chat"]
WAIT_S = 120

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and pseudo-terminals are POSIX")


def chat(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        timeout=WAIT_S,
        check=False,
    )


class Conversation:
    """A running chat whose standard input is a pseudo-terminal."""

    def __init__(self, process: subprocess.Popen[bytes], terminal: int) -> None:
        self.process, self._terminal = process, terminal
        self._events: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.said = {"out": "", "err": ""}
        for name, pipe in (("out", process.stdout), ("err", process.stderr)):
            assert pipe is not None
            threading.Thread(target=self._read, args=(name, pipe), daemon=True).start()

    def _read(self, name: str, pipe: IO[bytes]) -> None:
        while data := os.read(pipe.fileno(), 4096):
            self.said[name] += data.decode("utf-8", "replace")
            self._events.put(None)

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Raises: queue.Empty when the program falls silent before the condition holds."""
        while not condition():
            self._events.get(timeout=WAIT_S)

    def interrupt_at_prompt(self) -> None:
        """Ctrl-C while a line is read. The sign is written before: a signal between the two would wait for the next key."""
        asleep = 0
        while asleep < 5:
            asleep = asleep + 1 if psutil.Process(self.process.pid).status() == psutil.STATUS_SLEEPING else 0
            time.sleep(0.01)
        self.process.send_signal(signal.SIGINT)


@contextmanager
def conversation(model: Path, *arguments: str) -> Iterator[Conversation]:
    import pty

    terminal, other = pty.openpty()
    try:
        with subprocess.Popen(
            [*COMMAND, str(model), *arguments], stdin=other, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            try:
                yield Conversation(process, terminal)
            finally:
                process.kill()
    finally:
        os.close(terminal)
        os.close(other)
