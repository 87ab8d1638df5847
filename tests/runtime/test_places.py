"""The same few lines from wherever people run Python. A frozen application is in tests/desktop."""

from __future__ import annotations

import asyncio
import multiprocessing
import subprocess
import sys
import threading
from pathlib import Path

import nbclient
import nbformat
import psutil
import pytest

import qwq_lite

WAIT_S = 120


def example(file: Path) -> str:
    return (
        f"import qwq_lite\nmodel = qwq_lite.load({str(file)!r}, n_ctx=512)\n"
        "print(model.ask('Hi', seed=1, max_tokens=3).answer)\n"
    )


def asked(file: str) -> str:
    with qwq_lite.load(file, n_ctx=512) as model:
        return model.ask("Hi", seed=1, max_tokens=3).answer


@pytest.fixture(scope="module")
def expected(letters_gguf: Path) -> str:
    answer = asked(str(letters_gguf))
    assert answer
    return answer


@pytest.mark.parametrize("beside", ["nothing", "numpy.py", "json.py"])
def test_a_script_without_a_main_guard(letters_gguf: Path, tmp_path: Path, beside: str, expected: str) -> None:
    """Files in the current folder are not taken for libraries."""
    if beside != "nothing":
        (tmp_path / beside).write_text("raise SystemExit('the wrong one')")
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "ask.py").write_text(example(letters_gguf))
    done = subprocess.run(
        [sys.executable, folder / "ask.py"], cwd=tmp_path, capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    assert (done.returncode, done.stderr, done.stdout.strip()) == (0, "", expected.strip())


def test_a_thread_that_has_ended(letters_gguf: Path, expected: str) -> None:
    models: list[qwq_lite.Model] = []
    loader = threading.Thread(target=lambda: models.append(qwq_lite.load(letters_gguf, n_ctx=512)))
    loader.start()
    loader.join()
    with models[0] as model:
        assert model.ask("Hi", seed=1, max_tokens=3).answer == expected


def test_an_event_loop_that_goes_on_meanwhile(letters_gguf: Path, expected: str) -> None:
    async def main() -> tuple[list[str], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0)
                ticks += 1

        ticking = asyncio.create_task(tick())
        with await asyncio.to_thread(qwq_lite.load, letters_gguf, n_ctx=1024) as model:
            ticks = 0
            several = await asyncio.gather(*(model.aask("Hi", seed=1, max_tokens=3) for _ in range(3)))
            await model.aask("Tell me a long story.", max_tokens=900)
        ticking.cancel()
        return [reply.answer for reply in several], ticks

    answers, ticks = asyncio.run(main())
    assert answers == [expected] * 3
    assert ticks > 20


def test_a_process_that_was_spawned(letters_gguf: Path, expected: str) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(asked, (str(letters_gguf),)) == expected


@pytest.mark.filterwarnings("default")  # of Jupyter's own
def test_a_notebook(letters_gguf: Path, tmp_path: Path, expected: str) -> None:
    notebook = nbformat.v4.new_notebook(  # type: ignore[no-untyped-call]
        cells=[
            nbformat.v4.new_code_cell(example(letters_gguf)),  # type: ignore[no-untyped-call]
            nbformat.v4.new_code_cell("print(model.pid)\nreply = await model.aask('Hi', max_tokens=3)\nreply.answer"),  # type: ignore[no-untyped-call]
        ]
    )
    client = nbclient.NotebookClient(notebook, timeout=WAIT_S, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    first, second = notebook.cells
    assert first.outputs[0].text.strip() == expected.strip()
    assert second.outputs[1].data["text/plain"]
    worker = int(second.outputs[0].text)
    psutil.wait_procs([process for process in psutil.process_iter() if process.pid == worker], WAIT_S)
    assert not psutil.pid_exists(worker)
