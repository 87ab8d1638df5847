"""soundness: an engine is checked once for each build and CPU; one that fails is named, and used only where it computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import qwq_lite
from qwq_lite.backend import native
from qwq_lite.errors import UsageError
from qwq_lite.formats import gguf_header
from qwq_lite.plan import planning
from qwq_lite.plan.run_plan import Room, Wishes
from qwq_lite.selftest import kept_result
from qwq_lite.selftest.engine_check import Fault, Report
from qwq_lite.system import child
from tests.bad_engines import RET, UD2, broken_copy, only_x86_linux
from tests.samples import sample

PLAIN, REPACKED = "ggml_vec_dot_q4_K_q8_K", "ggml_gemv_q4_K_8x8_q8_K"
CODES = [pytest.param(RET, id="wrong numbers"), pytest.param(UD2, id="death")]
SOUND = Report(buffers=("CPU",))
EXTRA = Report((Fault("CPU", "AMX", "Q4_K", 1, "died", "died by SIGILL", True, "SIGILL"),), ("CPU",))
Broken = Callable[..., Path]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder of the test's own, also in children on Linux."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    if sys.platform != "linux":
        monkeypatch.setattr(kept_result, "folder", lambda: tmp_path / "state")
    return tmp_path / "state"


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Broken:
    """Let every child of this process use a copy of llama.cpp with a broken function."""

    def use(function: str, code: bytes) -> Path:
        copy = broken_copy(tmp_path, {function: code})
        monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(copy))
        return copy

    return use


class Children:
    """Stands for `child.ask`: counts, and lets a child end with what it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int = 0, output: str = '{"done": true}') -> None:
        self.n, self.code, self.output = 0, code, output
        monkeypatch.setattr(child, "ask", self)

    def __call__(self, *_words: str) -> subprocess.CompletedProcess[str]:
        self.n += 1
        return subprocess.CompletedProcess([], self.code, self.output, "")


# ---- once for each build ----


def test_an_engine_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept_result.read() is None
    report = kept_result.check_once()
    assert not report.fails and "CPU" in report.buffers
    children = Children(monkeypatch)
    assert kept_result.check_once() == kept_result.read() == report
    assert children.n == 0


@pytest.mark.parametrize("change", ["time", "size", "another file", "another CPU", "another place"])
def test_another_build_or_cpu_is_checked_again(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "lib" / "libggml.so"
    library.parent.mkdir()
    library.write_bytes(b"a library")
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(library.parent))
    children = Children(monkeypatch)
    kept_result.check_once()
    kept_result.check_once()
    assert children.n == 1
    if change == "time":
        os.utime(library, ns=(0, 1))
    elif change == "size":
        before = library.stat()
        library.write_bytes(b"a library!")
        os.utime(library, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "another file":
        (library.parent / "libcuda.so").write_bytes(b"")
    elif change == "another CPU":
        monkeypatch.setattr(kept_result, "cpu_features", lambda: frozenset({"amx_tile"}))
    else:
        monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(library.parent.rename(tmp_path / "moved")))
    kept_result.check_once()
    kept_result.check_once()
    assert children.n == 2


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"faults": [3]}', b"\xff", b"null"])
def test_a_damaged_result_is_made_anew(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    children = Children(monkeypatch)
    kept_result.check_once()
    (file,) = kept_result.folder().iterdir()
    file.write_bytes(content)
    assert kept_result.check_once() == Report() and children.n == 2
    assert kept_result.check_once() == Report() and children.n == 2


def test_a_state_folder_that_cannot_be_written_stops_nothing(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state.write_text("a file where the folder should be")
    Children(monkeypatch)
    assert kept_result.check_once() == Report()


@pytest.mark.parametrize(
    ("code", "output"),
    [
        pytest.param(-9, "", id="killed"),
        pytest.param(1, '{"error": "no numpy"}', id="no numpy"),
        pytest.param(0, "what a sitecustomize prints", id="silent"),
    ],
)
def test_a_check_that_cannot_run_stops_no_load_and_is_not_kept(
    code: int, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = Children(monkeypatch, code, output)
    report = kept_result.check_once()
    assert report.could_not_run and kept_result.complaint(report) is None
    kept_result.check_once()
    assert children.n == 2


@pytest.mark.parametrize("error", [UsageError("not yet"), OSError("no processes left")])
def test_a_child_that_cannot_be_started_stops_no_load(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_words: str) -> None:
        raise error

    monkeypatch.setattr(child, "ask", fail)
    assert str(error) in kept_result.check_once().could_not_run


def test_a_child_that_hangs_stops_no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    said = json.dumps({"running": {"device": "CPU", "buffer": "CPU", "type": "Q4_K", "rows": 1}}).encode()
    n_asked = 0

    def hang(*_words: str) -> subprocess.CompletedProcess[str]:
        nonlocal n_asked
        n_asked += 1
        if n_asked == 1:
            raise subprocess.TimeoutExpired([], 1, output=said)
        return subprocess.CompletedProcess([], 0, '{"done": true}', "")

    monkeypatch.setattr(child, "ask", hang)
    report = kept_result.check_once()
    assert report.faults[0].kind == "hung" and kept_result.complaint(report) is None


def test_a_program_that_embeds_python_is_not_started_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    children = Children(monkeypatch)
    monkeypatch.setattr(sys, "executable", "/opt/editor/bin/editor")
    assert "editor" in kept_result.check_once().could_not_run and children.n == 0


# ---- engines with one broken kernel ----


@only_x86_linux
@pytest.mark.parametrize("code", CODES)
def test_load_goes_without_extra_buffers_that_fail(code: bytes, broken: Broken, demo_gguf: Path) -> None:
    broken(REPACKED, code)
    with qwq_lite.load(demo_gguf, n_ctx=512) as model:
        assert not model.plan.choice.repack and model.plan.host_weights == "no-repack"
        assert model.plan.footprint.host.reclaimable == 0
        assert any("CPU_REPACK" in line and "qwq-lite doctor" in line for line in model.notices)
        assert model.ask("Hi", max_tokens=3).stats.n_generated == 3


@only_x86_linux
@pytest.mark.parametrize("host_weights", sample(["mmap", "repacked", "pinned", "no-repack"], 2))
def test_a_plan_with_repacking_is_made_anew(host_weights: str, broken: Broken, demo_gguf: Path) -> None:
    header = gguf_header.read(demo_gguf)
    wishes = Wishes(n_ctx=512, host_weights=host_weights)
    plan = planning.plan_header(header, Room(8 << 30), wishes)
    broken(REPACKED, UD2)
    with qwq_lite.load(demo_gguf, plan=plan) as model:
        expected = {"mmap": "no-repack", "repacked": "pinned"}.get(host_weights, host_weights)
        assert model.plan.host_weights == expected and model.n_ctx == 512
        assert model.ask("Hi", max_tokens=2).stats.n_generated == 2


@only_x86_linux
@pytest.mark.parametrize("function", [PLAIN, REPACKED])
def test_a_plan_is_the_one_that_load_would_make(function: str, broken: Broken, demo_gguf: Path) -> None:
    broken(function, UD2)
    assert planning.plan_model(str(demo_gguf)).plan.host_weights == "mmap"  # nothing is known, and nothing is checked
    report = kept_result.check_once()
    planned = planning.plan_model(str(demo_gguf))
    assert planned.plan.host_weights == ("no-repack" if report.extra_buffers_only else "mmap")
    assert [line for line in planned.notices if line.endswith("run: qwq-lite doctor")]


@only_x86_linux
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("isolated", [True, False])
def test_load_refuses_an_engine_that_does_not_compute(
    code: bytes, isolated: bool, broken: Broken, demo_gguf: Path
) -> None:
    broken(PLAIN, code)
    with pytest.raises(qwq_lite.EngineError) as caught:
        qwq_lite.load(demo_gguf, n_ctx=512, isolated=isolated)
    assert not isinstance(caught.value, qwq_lite.EngineCrashed)
    assert "in buffer CPU of CPU: Q4_K" in str(caught.value) and str(caught.value).endswith("run: qwq-lite doctor")


@only_x86_linux
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(
    ("function", "buffer", "consequence"),
    [(PLAIN, "CPU", "no answer"), (REPACKED, "CPU_REPACK", "without that buffer")],
)
def test_doctor_says_what_fails_and_what_mends_it(
    code: bytes, function: str, buffer: str, consequence: str, broken: Broken
) -> None:
    broken(function, code)
    command = [sys.executable, "-m", "qwq_lite", "doctor"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    found = json.loads(done.stdout)
    (finding,) = [one for one in found["findings"] if "does not compute" in one["text"]]
    assert finding["level"] == "error" and finding["command"] == "python scripts/install.py"
    assert f"buffer {buffer} of CPU: Q4_K" in finding["text"] and consequence in finding["text"]
    assert {fault["type"] for fault in found["check"]["faults"]} == {"Q4_K"}
    text = subprocess.run(command, capture_output=True, text=True, check=False)
    assert text.returncode == 1
    assert finding["text"] in text.stdout and "mend it: python scripts/install.py" in text.stdout


@only_x86_linux
def test_what_doctor_finds_is_what_load_knows(broken: Broken) -> None:
    """A result that was kept holds until the next check, which is doctor's: a fault may come and go with the machine."""
    broken(PLAIN, UD2)
    with pytest.MonkeyPatch.context() as sound:
        Children(sound)
        assert not kept_result.check_once().fails
    subprocess.run([sys.executable, "-m", "qwq_lite", "doctor"], capture_output=True, check=False)
    kept = kept_result.read()
    assert kept is not None and kept.fails


# ---- findings ----


def test_a_gpu_that_fails_stops_no_load_of_the_host() -> None:
    fault = Fault("CUDA0", "CUDA0", "Q4_K", 1, "wrong", "wrong numbers", gpu=True)
    report = Report((fault,), ("CPU",))
    assert report.fails and not report.on_host().fails


@pytest.mark.parametrize(("report", "complains"), [(SOUND, False), (EXTRA, True)])
def test_a_complaint_is_one_line_with_the_remedy(report: Report, complains: bool) -> None:
    complaint = kept_result.complaint(report)
    assert (complaint is not None) is complains
    assert complaint is None or ("AMX" in complaint and complaint.endswith("run: qwq-lite doctor"))


def test_the_libraries_are_found_where_llama_cpp_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = native.library_folder()
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    assert native.library_folder() == tmp_path != installed
