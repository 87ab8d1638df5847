"""The example window as its user has it: a real window, typed into; its engine killed under it. From source and frozen."""

from __future__ import annotations

import ctypes.util
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
FROZEN = ROOT / "build" / "desktop" / "QwQ" / "QwQ"
LONG = "Write a very long story about the sea."
WAIT_S = 60
ENGINE = ("libggml", "libllama", "libmtmd")
TOOLS = ("Xvfb", "xdotool", "xclip")

# Qt's plugin for X cannot be loaded without it, and a program ends then.
QT_NEEDS = "xcb-cursor"

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, TOOLS)) or ctypes.util.find_library(QT_NEEDS) is None,
    reason=f"{', '.join(TOOLS)} and lib{QT_NEEDS} are needed; Debian's packages: xvfb, xdotool, xclip, lib{QT_NEEDS}0",
)


@pytest.fixture(scope="module")
def display() -> Iterator[str]:
    read, write = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(write), "-noreset", "-screen", "0", "1000x760x24"],
        pass_fds=[write],
        stderr=subprocess.DEVNULL,
    )
    os.close(write)
    with os.fdopen(read) as told:
        number = told.readline().strip()
    yield f":{number}"
    server.terminate()
    server.wait()


class User:
    """Someone before the window."""

    def __init__(self, command: list[str], display: str, folder: Path) -> None:
        self._environment = {"PATH": os.environ["PATH"], "DISPLAY": display, "LANG": "C.UTF-8"}
        # No Python is at hand for the program: a frozen one has its own, and the other is named by its path.
        bare = {**self._environment, "PATH": str(folder), "HOME": str(folder)}
        self.program = subprocess.Popen(command, cwd=folder, env=bare, stderr=subprocess.PIPE)

    def focus_window(self) -> None:
        found = self.until(lambda: self._run("xdotool", "search", "--onlyvisible", "--name", "QwQ desktop"), bool)
        self.window = found.split()[-1]
        self._run("xdotool", "windowfocus", "--sync", self.window)

    def _run(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self._environment, capture_output=True, text=True, timeout=WAIT_S, check=False
        )
        return done.stdout

    def type(self, text: str) -> None:
        self._run("xdotool", "type", "--delay", "3", text)

    def press(self, key: str) -> None:
        self._run("xdotool", "key", key)

    def ask(self, text: str) -> None:
        self.type(text)
        self.press("Return")

    def transcript(self) -> str:
        self.press("ctrl+shift+c")
        time.sleep(0.1)
        return self._run("timeout", "5", "xclip", "-selection", "clipboard", "-o")

    def until(self, look: Callable[[], T], enough: Callable[[T], bool]) -> T:
        deadline = time.monotonic() + WAIT_S
        while not enough(found := look()):
            assert time.monotonic() < deadline, found
            assert self.program.poll() is None, (self.program.stderr and self.program.stderr.read(), found)
            time.sleep(0.1)
        return found

    def sees(self, enough: Callable[[str], bool]) -> str:
        return self.until(self.transcript, enough)

    def send(self) -> None:
        """Press Enter until there is an answer: what is sent while the model loads stays in the field."""

        def once() -> str:
            self.press("Return")
            return self.transcript()

        self.until(once, lambda text: bool(answer(text)))

    def engine(self) -> psutil.Process:
        return self.until(lambda: psutil.Process(self.program.pid).children(recursive=True), bool)[-1]


@pytest.fixture(params=["source", "frozen"])
def user(request: pytest.FixtureRequest, display: str, demo_gguf: Path, tmp_path: Path) -> Iterator[User]:
    if request.param == "frozen" and not FROZEN.exists():
        pytest.skip("`make desktop` freezes it")
    if request.param == "source":
        pytest.importorskip("PySide6")
    (tmp_path / "numpy.py").write_text("raise SystemExit('the wrong numpy')")
    source = [sys.executable, str(ROOT / "examples" / "desktop" / "main.py")]
    someone = User([*(source if request.param == "source" else [str(FROZEN)]), str(demo_gguf)], display, tmp_path)
    try:
        someone.focus_window()
        yield someone
    finally:
        someone.program.kill()
        someone.program.wait()
        assert someone.program.stderr
        someone.program.stderr.close()


def answer(text: str) -> str:
    return text.rpartition("Answer\n")[2] if "Answer\n" in text else ""


def test_a_question_is_answered_and_a_reply_stopped(user: User) -> None:
    user.type("What is the capital of France?")
    user.send()
    user.press("Escape")
    user.sees(lambda text: text.startswith("You\nWhat is the capital of France?"))
    user.ask(LONG)
    user.sees(lambda text: text.count("Answer\n") == 2 and len(answer(text)) > 20)
    user.type("typed meanwhile")
    user.press("Escape")
    stopped = user.sees(lambda text: text.endswith("Stopped."))
    assert len(answer(stopped)) < 4000
    user.press("Return")
    user.sees(lambda text: "You\ntyped meanwhile" in text)


def test_the_window_survives_its_engine(user: User) -> None:
    user.type(LONG)
    user.send()
    before = user.engine()
    before.send_signal(signal.SIGKILL)
    crashed = user.sees(lambda text: "The engine has ended (SIGKILL)" in text)
    assert answer(crashed).partition("The engine has ended")[0].strip()
    user.ask("Hi")
    user.sees(lambda text: text.count("Answer\n") == 2 and bool(answer(text)))
    assert user.engine().pid != before.pid


@pytest.mark.parametrize("how", ["closed", "closed while loading", "killed"])
def test_nothing_is_left_of_it(user: User, how: str) -> None:
    if how != "closed while loading":
        user.type(LONG)
        user.send()
    engine = user.engine()
    if how == "killed":
        user.program.kill()
    else:
        user.press("ctrl+q")
    user.program.wait(WAIT_S)
    engine.wait(WAIT_S)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_engine_maps_its_libraries_once_and_the_window_none(user: User) -> None:
    user.type("Hi")
    user.send()
    engine, window = mapped(user.engine().pid), mapped(user.program.pid)
    libraries = [path.name.split(".")[0] for path in engine if path.name.startswith(ENGINE)]
    assert len(libraries) == len(set(libraries)) >= 3
    # QtCore is no sign of ours: PyInstaller's own start imports it before the main script.
    assert not [path for path in engine if path.name.startswith(("libQt6Gui", "libQt6Widgets"))]
    assert not [path for path in window if path.name.startswith(ENGINE)]


def mapped(pid: int) -> set[Path]:
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {Path(line.split(maxsplit=5)[5]) for line in lines if "/" in line}


def test_a_frozen_application_has_each_library_once() -> None:
    if not FROZEN.exists():
        pytest.skip("`make desktop` freezes it")
    real = [path for path in FROZEN.parent.rglob("*") if path.is_file() and not path.is_symlink()]
    engine = [path for path in real if path.name.startswith(ENGINE)]
    assert len({path.name.split(".")[0] for path in engine}) == len(engine) >= 3
    assert len({hashlib.sha256(path.read_bytes()).digest() for path in engine}) == len(engine)


ADD = """
import os, sys
from PySide6.QtWidgets import QApplication
from window import _TEXT, Transcript
application = QApplication([])
transcript = Transcript()
before = sys.getrefcount(None)
for _ in range(500):
    transcript.add("word ", _TEXT, "Answer")
print(before - sys.getrefcount(None), flush=True)
os._exit(0)
"""


def test_a_long_reply_uses_up_nothing() -> None:
    """PySide6 6.12.0 drops a reference to None at each call; Python before 3.12 ends when none is left, here in a minute."""
    pytest.importorskip("PySide6")
    folders = os.pathsep.join([str(ROOT), str(ROOT / "examples" / "desktop")])
    environment = {**os.environ, "QT_QPA_PLATFORM": "offscreen", "PYTHONPATH": folders}
    done = subprocess.run([sys.executable, "-c", ADD], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    assert int(done.stdout) < 100
