"""Who holds memory on this machine: entries of engines that run, and of none that does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qwq_lite
from qwq_lite.system import running_engines
from qwq_lite.system.running_engines import RunningEngine
from qwq_lite.system.units import GIB


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    place = tmp_path / "state" / "engines"
    monkeypatch.setattr(running_engines, "folder", lambda: place)
    yield place


def entry(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_an_engine_is_listed_until_it_leaves(folder: Path) -> None:
    leave = running_engines.register(Path("/models/QwQ.gguf"), 19 * GIB)
    (found,) = running_engines.running()
    assert (found.pid, found.model, found.n_bytes) == (os.getpid(), "QwQ.gguf", 19 * GIB)
    assert found.application
    assert found.line() == f"{found.application} (process {os.getpid()}) holds 19.0 GiB for QwQ.gguf"
    if os.name != "nt":
        assert entry(folder).stat().st_mode & 0o077 == 0
        assert folder.stat().st_mode & 0o077 == 0
    leave()
    leave()
    assert running_engines.running() == []


def test_the_largest_comes_first(folder: Path) -> None:
    for size in (1, 3, 2):
        running_engines.register(Path(f"{size}.gguf"), size * GIB)
    assert [found.model for found in running_engines.running()] == ["3.gguf", "2.gguf", "1.gguf"]


def test_a_process_that_is_gone_holds_nothing(folder: Path) -> None:
    code = f"""
from pathlib import Path
from qwq_lite.system import running_engines
running_engines.folder = lambda: Path({str(folder)!r})
running_engines.register(Path("a.gguf"), 1)
print(len(running_engines.running()), flush=True)
__import__("os")._exit(1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "1\n", done.stderr
    assert len(list(folder.iterdir())) == 1
    assert running_engines.running() == []
    assert list(folder.iterdir()) == []


def test_a_number_that_another_process_has_now_holds_nothing(folder: Path) -> None:
    running_engines.register(Path("a.gguf"), 1)
    data = json.loads(entry(folder).read_text())
    entry(folder).write_text(json.dumps({**data, "started": data["started"] - 100}))
    assert running_engines.running() == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1e999, "started": 0}'])
def test_what_is_no_entry_counts_for_nothing(folder: Path, text: str) -> None:
    running_engines.register(Path("a.gguf"), 1)
    entry(folder).write_text(text)
    assert running_engines.running() == []


def test_a_folder_that_cannot_be_made_does_no_harm(folder: Path) -> None:
    folder.parent.parent.mkdir(exist_ok=True)
    folder.parent.write_text("in the way")
    running_engines.register(Path("a.gguf"), 1)()
    assert running_engines.running() == []
    assert running_engines.forget(os.getpid()) is None


def test_what_died_is_taken_out(folder: Path) -> None:
    running_engines.register(Path("a.gguf"), 5)
    lost = running_engines.forget(os.getpid())
    assert lost is not None
    assert (lost.model, lost.n_bytes) == ("a.gguf", 5)
    assert running_engines.running() == []


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> RunningEngine:
    other = RunningEngine(4711, "notes", "QwQ-32B.gguf", 1 << 50)
    monkeypatch.setattr(running_engines, "running", lambda: [other])
    return other


def test_who_finds_no_memory_hears_who_has_it(demo_gguf: Path, others: RunningEngine) -> None:
    with pytest.raises(qwq_lite.PlanError, match="notes \\(process 4711\\) holds"):
        qwq_lite.load(demo_gguf, memory=1 << 20, isolated=False)
    with pytest.raises(qwq_lite.PlanError, match="notes \\(process 4711\\) holds"):
        qwq_lite.plan_model(str(demo_gguf), memory_bytes=1 << 20)
    assert others.line() in qwq_lite.plan_model(str(demo_gguf)).notices
    with qwq_lite.load(demo_gguf, n_ctx=512, isolated=False) as model:
        assert others.line() in model.notices


def test_another_machine_is_no_matter_of_this_one(others: RunningEngine) -> None:
    assert others.line() not in qwq_lite.plan_model("qwq-32b-preview", machine="rtx-3090").notices


def test_a_worker_is_listed_under_its_application(demo_gguf: Path, tmp_path: Path) -> None:
    code = f"""
import qwq_lite
from qwq_lite.system import running_engines
with qwq_lite.load({str(demo_gguf)!r}, n_ctx=512) as model:
    print([(one.pid == model.pid, one.application, one.model) for one in running_engines.running() if one.pid == model.pid])
print([one for one in running_engines.running() if one.pid == model.pid])
"""
    script = tmp_path / "notes.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str([(True, "notes.py", demo_gguf.name)]), "[]"]
