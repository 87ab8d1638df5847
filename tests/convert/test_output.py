"""The output file: complete under its name, or not there; one writer at a time; the order of its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qwq_convert.pipeline import convert
from qwq_lite.cli import console
from qwq_lite.errors import OutputError
from qwq_lite.formats.tensor_types import file_type
from qwq_lite.system import files, output
from tests.checkpoints import write_random_checkpoint


def test_a_second_writer_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    final = tmp_path / "out.gguf"
    with output.output_file(final, 8) as file:
        with pytest.raises(OutputError, match="another program"), output.output_file(final, 8):
            pass
        file.write_from(memoryview(b"complete"), 0)
    assert final.read_bytes() == b"complete"


def test_a_writer_that_opened_before_another_one_finished_does_not_touch_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "out.gguf"
    really_locked = files.locked

    def finish_first(file: files.RandomAccessFile) -> Any:
        monkeypatch.setattr(output, "locked", really_locked)
        output.temporary_name(final).write_bytes(b"complete")
        output.temporary_name(final).rename(final)
        return really_locked(file)

    monkeypatch.setattr(output, "locked", finish_first)
    with pytest.raises(OutputError, match="just finished"), output.output_file(final, 100):
        pass
    assert final.read_bytes() == b"complete"


def test_data_sync_rename_sync_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def spy(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*arguments: Any, **named: Any) -> Any:
            calls.append(name)
            return real(*arguments, **named)

        return call

    for name in ("pwrite", "fsync", "rename", "replace"):
        monkeypatch.setattr(os, name, spy(name))
    with output.output_file(tmp_path / "out.gguf", 4) as file:
        file.write_from(memoryview(b"data"), 0)
    assert [name for name in calls if name != "rename"] == ["pwrite", "fsync", "replace", "fsync"]


@pytest.mark.parametrize("place", ["final", "temporary"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "link to a folder", "link to a pipe"])
def test_a_name_that_is_no_files_is_refused_and_left_as_it_is(kind: str, place: str, tmp_path: Path) -> None:
    if "pipe" in kind and not hasattr(os, "mkfifo"):
        pytest.skip("no pipes with a name")
    final = tmp_path / "out.gguf"
    name = {"final": final, "temporary": output.temporary_name(final)}[place]
    target = tmp_path / "target" if "link" in kind else name
    if "pipe" in kind:
        os.mkfifo(target)
    else:
        target.mkdir()
    if target != name:
        name.symlink_to(target)
    before = name.lstat().st_ino, sorted(tmp_path.iterdir())
    with pytest.raises(OutputError, match=name.name), output.output_file(final, 8):
        pytest.fail("the block was entered")
    assert (name.lstat().st_ino, sorted(tmp_path.iterdir())) == before


def test_a_failure_leaves_nothing_and_the_old_file(tmp_path: Path) -> None:
    final = tmp_path / "out.gguf"
    final.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), output.output_file(final, 8):
        raise ZeroDivisionError
    assert final.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [final]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_killed_at_any_moment_the_name_holds_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    folder, final = write_random_checkpoint(tmp_path / "model", n_layer=8), tmp_path / "out.gguf"
    convert(folder, file_type("Q8_0"), tmp_path / "whole.gguf")
    whole = (tmp_path / "whole.gguf").read_bytes()
    code = f"import sys; sys.path[:0] = {sys.path!r}; from qwq_lite.cli import main; main()"
    command = [sys.executable, "-c", code, "convert", str(folder), "-q", "Q8_0", "-o", str(final), "--force"]
    seen = set()
    for number in range(12):
        final.write_bytes(b"old")
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            part = output.temporary_name(final)
            while (
                number and process.poll() is None and not part.exists()
            ):  # the first one at once, so that one is too early
                time.sleep(0.001)
            time.sleep(number * 0.002)
            process.send_signal(signal.SIGKILL)
        content = final.read_bytes()
        assert content in (b"old", whole)
        seen.add(content)
    assert b"old" in seen
    assert subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode == 0, "remains are used again"
    assert final.read_bytes() == whole
    assert not output.temporary_name(final).exists()


POSIX = pytest.mark.skipif(sys.platform == "win32", reason="no signal of these that a program can hear there")
SIGNALS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129, "SIGQUIT": 131}


@contextlib.contextmanager
def conversion(out: Path, **handlers: str) -> Iterator[subprocess.Popen[bytes]]:
    """`qwq-lite convert` in a process of its own, into the folder `out`, when it has written its first weights.

    handlers: what each signal does when the process starts; a shell in the background would ignore some.
    """
    folder = write_random_checkpoint(out.parent / "model", n_layer=8, n_vocab=20_000)
    dispositions = (
        {"SIGINT": "default_int_handler"} | dict.fromkeys(("SIGTERM", "SIGHUP", "SIGQUIT"), "SIG_DFL") | handlers
    )
    code = "import signal, sys\n"
    code += "".join(f"signal.signal(signal.{name}, signal.{handler})\n" for name, handler in dispositions.items())
    code += f"sys.path[:0] = {sys.path!r}\nfrom qwq_lite.cli import main\nmain()"
    out.mkdir()
    words = ["convert", str(folder), "-q", "IQ4_XS", "-q", "Q2_K", "-o", str(out), "-j", "2"]
    command = [sys.executable, "-c", code, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not any(path.read_bytes().strip(b"\0") for path in out.iterdir()):
            time.sleep(0.001)
        assert {path.name for path in out.iterdir()} == {".model-IQ4_XS.gguf.part", ".model-Q2_K.gguf.part"}
        yield process


@POSIX
@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_leaves_nothing(name: str, tmp_path: Path) -> None:
    with conversion(tmp_path / "out") as process:
        process.send_signal(getattr(signal, name))
        told = process.communicate()
    assert (process.returncode, told) == (SIGNALS[name], (b"", b""))
    assert not list((tmp_path / "out").iterdir())


@POSIX
def test_a_second_signal_does_not_disturb_the_cleaning_up(tmp_path: Path) -> None:
    """As systemd and some terminals send them, one after the other."""
    with conversion(tmp_path / "out") as process:
        for name in ("SIGTERM", "SIGHUP", "SIGTERM"):
            process.send_signal(getattr(signal, name))
        process.communicate()
    assert process.returncode != 0
    assert not list((tmp_path / "out").iterdir())


@POSIX
def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """As under nohup: the conversion outlives its terminal."""
    with conversion(tmp_path / "out", SIGHUP="SIG_IGN") as process:
        process.send_signal(signal.SIGHUP)
        process.communicate()
    assert process.returncode == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model-IQ4_XS.gguf", "model-Q2_K.gguf"}


def test_handlers_are_those_of_before() -> None:
    """Inside and outside of the main thread, where none can be set."""

    def handlers() -> list[Any]:
        return [signal.getsignal(getattr(signal, name)) for name in SIGNALS if hasattr(signal, name)]

    before, inside = handlers(), []
    with console.signals_raise():
        inside = handlers()
    assert handlers() == before != inside

    def elsewhere() -> None:
        with console.signals_raise():
            inside[:] = handlers()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert inside == before
