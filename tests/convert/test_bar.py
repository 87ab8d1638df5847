"""The bar on a pseudo-terminal: what it says while it is there, and that nothing of it stays."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from qwq_lite.formats import gguf_header
from tests.checkpoints import write_random_checkpoint

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals there")


class Screen:
    """As much of a terminal as a bar needs. seen: every state of every line."""

    _PIECES = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)|(.)", re.DOTALL)

    def __init__(self, output: str) -> None:
        self.lines: dict[int, str] = {}
        self.row = self.column = 0
        self.cursor = True
        self.seen: list[str] = []
        for number, name, control, text, rest in self._PIECES.findall(output):
            assert not rest, f"an escape sequence that this terminal does not know: {output!r}"
            if text:
                line = self.lines.get(self.row, "").ljust(self.column)
                self.lines[self.row] = line[: self.column] + text + line[self.column + len(text) :]
                self.column += len(text)
                self.seen.append(self.lines[self.row])
            elif control:
                self.column, self.row = 0 if control == "\r" else self.column, self.row + (control == "\n")
            else:
                self._obey(number, name)

    def _obey(self, number: str, name: str) -> None:
        if name == "A":
            self.row -= int(number or 1)
        elif name == "K":
            assert number == "2"
            self.lines[self.row] = ""
        elif name in "hl":
            assert number == "?25"
            self.cursor = name == "h"
        else:
            assert name == "m", name


def on_a_terminal(*arguments: object) -> tuple[int, str, str]:
    """The command with a terminal of 80 columns as stderr: exit status, stdout, what the terminal got."""
    import fcntl
    import pty
    import termios

    code = f"import sys; sys.path[:0] = {sys.path!r}; from qwq_lite.cli import main; main()"
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    terminal, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    got = b""
    with subprocess.Popen(
        [sys.executable, "-c", code, "convert", *map(str, arguments)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=other, env={**kept, "TERM": "xterm-256color"},
    ) as process:  # fmt: skip
        os.close(other)
        try:
            while data := os.read(terminal, 1 << 16):
                got += data
        except OSError:  # how Linux says that the other side is closed
            pass
        finally:
            os.close(terminal)
        out, _ = process.communicate()
    return process.returncode, out.decode("utf-8"), got.decode("utf-8")


def test_the_bar_says_rate_time_left_and_tensor_and_goes(tmp_path: Path) -> None:
    folder, output = write_random_checkpoint(tmp_path / "model", n_vocab=9000), tmp_path / "out.gguf"
    status, out, got = on_a_terminal(folder, "-q", "Q8_0", "-o", output, "--sha256")
    assert status == 0 and "Talk to it" in out
    screen = Screen(got)
    names = "|".join(re.escape(info.name) for info in gguf_header.read(output).tensors)
    full = re.compile(rf"(?P<name>{names}) .* [\d.]+/[\d.]+ MB +[\d.]+ [kMG]?B/s +\d+:\d\d:\d\d\s*")
    assert any(full.fullmatch(line) for line in screen.seen), screen.seen
    assert any(line.startswith("out.gguf ") for line in screen.seen), "the digest has a bar too"
    assert all(len(line) <= 80 for line in screen.seen)
    assert not "".join(screen.lines.values()).strip()
    assert (screen.row, screen.column, screen.cursor) == (0, 0, True)
    assert on_a_terminal(folder, "-q", "Q8_0", "-o", output, "--sha256", "--force", "--quiet") == (0, "", "")


def test_an_error_stands_alone_where_the_bar_was(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model", shards=1)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\xff\x7f")  # NaN
    status, out, got = on_a_terminal(folder, "-q", "Q8_0", "-o", tmp_path / "out.gguf")
    assert (status, out) == (1, "")
    left = [line for line in Screen(got).lines.values() if line.strip()]
    assert len(left) == 1 and left[0].startswith("qwq-lite: ")
    assert len(Screen(got).seen) > 1, "there was a bar"
