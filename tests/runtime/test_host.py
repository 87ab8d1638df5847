"""A host program that is not ours: its import path, streams, folder and last moments, and the numbers that it gives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import qwq_lite
from qwq_lite.system import process_limits
from qwq_lite.worker.remote import RemoteModel
from tests.samples import sample

WAIT_S = 300
posix = pytest.mark.skipif(sys.platform == "win32", reason="descriptors and folders of POSIX")
COMMAND = f"{sys.executable} -m qwq_lite"


def host(code: str, *, path: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """A program of somebody's, with this package on its import path."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.path[:0] = {sys.path!r}\n{code}"],
        capture_output=True, text=True, timeout=WAIT_S, check=False, env={**kept, "PYTHONPATH": path}, **options,
    )  # fmt: skip


def ask(file: Path) -> str:
    return (
        "import qwq_lite\n"
        f"model = qwq_lite.load({str(file)!r}, n_ctx=256)\n"
        "print(model.ask('Hi', max_tokens=3).stats.n_generated)\n"
    )


@pytest.mark.parametrize("entry", ["pathlib.Path('/some/folder')", "b'/some/folder'", "None"])
def test_entries_of_the_import_path_that_are_no_texts(tiny_gguf: Path, entry: str) -> None:
    done = host(f"import pathlib\nsys.path.insert(0, {entry})\n{ask(tiny_gguf)}")
    assert (done.returncode, done.stdout.strip()) == (0, "3"), done.stderr


PRINTING = """
import atexit, os, sys
print("a word at the start"); sys.stdout.flush(); os.write(1, b"bytes\\n"); os.write(2, b"bytes\\n")
atexit.register(lambda: (print("{\\"a word\\": \\"at the end\\"}"), sys.stdout.flush()))
"""


def test_a_sitecustomize_that_prints_disturbs_no_child(tiny_gguf: Path, tmp_path: Path) -> None:
    """Neither the engine's own process nor those that list devices and count buffers."""
    (tmp_path / "sitecustomize.py").write_text(PRINTING)
    code = (
        "from pathlib import Path\nfrom qwq_lite.backend import devices, measure\n"
        "from qwq_lite.backend.settings import EngineSettings\n"
        "print(devices.report_from_child().devices[-1].kind)\n"
        f"print(measure.measure(Path({str(tiny_gguf)!r}), [EngineSettings(256)]) != [])\n"
    )
    done = host(ask(tiny_gguf) + code, path=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if "word" not in line] == ["bytes", "3", "cpu", "True"]


@posix
@pytest.mark.parametrize("closed", [(0, 1, 2), (0,), (1, 2)])
def test_a_host_without_standard_streams(tiny_gguf: Path, tmp_path: Path, closed: tuple[int, ...]) -> None:
    """As a daemon: the pipes to a child then get the numbers of the streams that it replaces."""
    answer = tmp_path / "answer"
    code = f"import os\nfor stream in {closed}:\n    os.close(stream)\n{ask(tiny_gguf)}".replace(
        "print(", f"open({str(answer)!r}, 'w').write('%d' % "
    )
    done = host(code)
    assert (done.returncode, answer.read_text()) == (0, "3")


CLOSED = [">&-", "2>&-", "<&-", ">&- 2>&-", ">&- 2>&- <&-"]
FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux'")


def shell(line: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=WAIT_S, check=False)


@posix
@pytest.mark.parametrize("redirection", sample([*CLOSED, pytest.param("2>/dev/full", marks=FULL)], 2))
def test_a_stream_that_is_closed_changes_no_result(demo_gguf: Path, redirection: str) -> None:
    checked = shell(f"{COMMAND} verify '{demo_gguf}' {redirection}")
    asked = shell(f"{COMMAND} chat '{demo_gguf}' --ctx 256 -p 'Say yes.' -n 3 {redirection}")
    assert (checked.returncode, asked.returncode) == (0, 0), checked.stderr + asked.stderr
    if ">&-" not in redirection.replace("2>&-", ""):
        assert ": OK: " in checked.stdout
        assert asked.stdout.strip()
    assert "Traceback" not in checked.stderr + asked.stderr


@posix
@FULL
def test_results_that_cannot_be_written_are_an_error(demo_gguf: Path) -> None:
    done = shell(f"{COMMAND} verify '{demo_gguf}' >/dev/full")
    assert (done.returncode, done.stderr) == (1, "qwq-lite: standard output: No space left on device\n")
    assert shell(f"{COMMAND} verify '{demo_gguf}' >/dev/full 2>/dev/full").returncode == 1


@posix
@pytest.mark.parametrize(
    "arguments", ["verify FILE", "inspect FILE", "plan FILE", "plan qwq-32b", "chat FILE --ctx 256 -p Hi -n 3"]
)
def test_a_current_folder_that_was_deleted(demo_gguf: Path, tmp_path: Path, arguments: str) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f"{COMMAND} {arguments}".replace("FILE", f"'{demo_gguf}'")
    search = os.pathsep.join(place for place in sys.path if place)
    done = shell(f"cd '{gone}' && rmdir '{gone}' && PYTHONPATH='{search}' exec {command}")
    assert done.returncode == 0, done.stderr


@posix
def test_what_needs_a_current_folder_that_was_deleted_says_so(demo_folder: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    search = os.pathsep.join(place for place in sys.path if place)
    done = shell(
        f"cd '{gone}' && rmdir '{gone}' && PYTHONPATH='{search}' exec {COMMAND} convert '{demo_folder}' -q Q8_0 --dry-run"
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("qwq-lite: the current folder no longer exists")


def test_a_relative_path_stays_the_same_file(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program changes its folder, and its engine must load again."""
    monkeypatch.chdir(tiny_gguf.parent)
    with qwq_lite.load(tiny_gguf.name, n_ctx=256) as model:
        assert isinstance(model, RemoteModel)
        monkeypatch.chdir(tmp_path)
        assert model.pid is not None
        worker = psutil.Process(model.pid)
        worker.kill()
        worker.wait(WAIT_S)
        while model.pid is not None:  # until it is seen
            pass
        assert model.ask("Hi", max_tokens=3).stats.n_generated == 3


def test_a_tiny_idle_unload(tiny_gguf: Path) -> None:
    """The engine gives its memory back at once after each call, never between a load and the call that it was made for."""
    with qwq_lite.load(tiny_gguf, n_ctx=256, idle_unload=0.001) as model:
        for _ in range(3):
            assert model.ask("Hi", max_tokens=3).stats.n_generated == 3
            assert model.tokenize("Hi")


LATE = """
def late():
    try:
        print(model.ask('Hi', max_tokens=3).stats.n_generated)
        chat.save({state!r})
        print('saved')
    except BaseException as error:
        print(type(error).__name__)
"""
BEGUN = "chat = model.chat()\nchat.ask('Hi', max_tokens=3)\n"
MOMENTS = {
    "a handler from before the load": ("import atexit\natexit.register(lambda: late())\n", ""),
    "a handler from after the load": ("", "import atexit\natexit.register(late)\n"),
    "a thread that is left": ("", "import threading\nthreading.Thread(target=late).start()\n"),
}


@pytest.mark.parametrize("isolated", [True, False], ids=["worker", "here"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_asking_and_saving_while_the_program_ends(tiny_gguf: Path, tmp_path: Path, moment: str, isolated: bool) -> None:
    before, after = MOMENTS[moment]
    state = tmp_path / "chat.state"
    load = ask(tiny_gguf).replace("n_ctx=256", f"n_ctx=256, isolated={isolated}")
    done = host(before + load + BEGUN + LATE.format(state=str(state)) + after)
    assert (done.returncode, done.stdout.split()) == (0, ["3", "3", "saved"]), done.stderr
    assert state.exists()


@pytest.mark.parametrize("isolated", [True, False], ids=["worker", "here"])
def test_asking_when_the_interpreter_is_gone_is_an_error_at_once(
    tiny_gguf: Path, tmp_path: Path, isolated: bool
) -> None:
    load = ask(tiny_gguf).replace("n_ctx=256", f"n_ctx=256, isolated={isolated}")
    last = "class Last:\n    def __del__(self):\n        late()\nlast = Last()\n"
    done = host(load + BEGUN + LATE.format(state=str(tmp_path / "chat.state")) + last)
    assert (done.returncode, done.stdout.split()) == (0, ["3", "EngineClosed"]), done.stderr


@pytest.fixture(scope="module", params=[True, False], ids=["worker", "here"])
def model(request: pytest.FixtureRequest, tiny_gguf: Path) -> Iterator[qwq_lite.Model]:
    numbers: dict[str, Any] = {"n_ctx": np.int64(256), "n_threads": np.uint8(1), "memory": np.int64(1 << 30)}
    with qwq_lite.load(tiny_gguf, isolated=request.param, **numbers) as loaded:
        assert loaded.plan.choice.n_ctx == 256
        yield loaded


NUMBERS: dict[str, Any] = {
    "max_tokens": np.int64(3), "seed": np.uint32(1), "top_k": np.int32(5), "temperature": np.float32(0.5),
    "top_p": np.float64(0.5), "min_p": np.float16(0.5), "thinking_budget": np.int8(1), "within": np.float32(60),
    "answer_reserve": np.int16(8), "answer_temperature": np.float32(0.5), "answer_top_p": np.float64(0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_numpy_are_numbers(model: qwq_lite.Model, name: str) -> None:
    reply = model.ask("Hi", **{"max_tokens": 3, name: NUMBERS[name]})
    assert 0 < reply.stats.n_generated <= 3


def test_tokens_of_numpy_are_tokens(model: qwq_lite.Model) -> None:
    tokens: Any = np.array(model.tokenize("Hi there"))
    (done,) = [e for e in model.generate(tokens, max_tokens=2) if isinstance(e, qwq_lite.Done)]
    assert done.reply.stats.n_prompt == len(tokens)


@pytest.mark.parametrize(
    "options", [{"max_tokens": np.bool_(True)}, {"temperature": np.bool_(True)}, {"max_tokens": np.float32(3)}]
)
def test_what_is_no_number_with_numpy_either(model: qwq_lite.Model, options: dict[str, Any]) -> None:
    with pytest.raises(qwq_lite.UsageError, match=next(iter(options))):
        model.ask("Hi", **options)


@posix
@pytest.mark.parametrize("n_killed", [0, 1])
def test_out_of_memory_is_said_where_the_kernel_counted_it(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, n_killed: int
) -> None:
    counts = [0]
    monkeypatch.setattr(process_limits, "n_killed_for_memory", lambda: counts[0])
    with qwq_lite.load(tiny_gguf, n_ctx=256) as model:
        assert isinstance(model, RemoteModel)
        assert model.pid is not None
        counts[0] = n_killed
        with pytest.raises(qwq_lite.EngineCrashed, match=r"killed \(SIGKILL\)") as caught:
            for _ in model.generate("Hi", max_tokens=200):
                os.kill(model.pid or 0, signal.SIGKILL)
    assert ("memory" in str(caught.value)) == (n_killed == 1)


def test_the_kernels_count_of_such_kills(tmp_path: Path) -> None:
    counters = tmp_path / "vmstat"
    counters.write_text("nr_free_pages 5\noom_kill 7\ndrop_slab 0\n")
    assert process_limits.n_killed_for_memory(counters) == 7
    assert process_limits.n_killed_for_memory(tmp_path / "none") == 0
    counters.write_text("nr_free_pages 5\n")
    assert process_limits.n_killed_for_memory(counters) == 0
