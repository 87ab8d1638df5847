"""What several tests need: models made once for all lanes, the two lanes, and the sample of what is exhaustive."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

from qwq_convert.pipeline import convert
from qwq_lite.formats.tensor_types import file_type
from tests import samples
from tests.checkpoints import (
    in_f16,
    letters,
    sentences,
    write_random_checkpoint,
    write_scripted_checkpoint,
    write_tagged_checkpoint,
)
from tests.oracle import demo_checkpoint

# No law is judged by the clock: a busy machine, or its slow disk, breaks none of them.
settings.register_profile("laws", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("laws")

# Two engines at a time, each with all cores, are many times slower than one after the other: what starts one is one lane.
ENGINE_MODULES = {
    "test_asked", "test_chat_cli", "test_kept_result", "test_host", "test_places", "test_pretokenizer", "test_running_engines",
    "test_split_models", "test_window",
}  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--attack", action="store_true", help="run what a sample leaves out otherwise, and only that")
    parser.addoption("--fast", action="store_true", help="leave out what starts an engine or takes seconds")


def pytest_configure(config: pytest.Config) -> None:
    samples.in_full = config.getoption("--attack")
    config.addinivalue_line("markers", "attack: runs in `make attack` only")
    config.addinivalue_line("markers", "sampled: a sample of it runs in `make test`, all of it in `make attack`")
    config.addinivalue_line("markers", "slow: takes seconds; not in `make fast`")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if starts_engine(item):
            item.add_marker(pytest.mark.xdist_group("engine"))
    if config.getoption("--attack"):
        chosen = [item for item in items if {"attack", "sampled"} & {mark.name for mark in item.iter_markers()}]
    else:
        chosen = [item for item in items if item.get_closest_marker("attack") is None]
    if config.getoption("--fast"):
        chosen = [item for item in chosen if not starts_engine(item) and item.get_closest_marker("slow") is None]
    if len(chosen) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
        items[:] = chosen


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """pytest-xdist marks the group in a test's id, by an attribute that not every pytest has."""
    if getattr(session.config.option, "loadgroup", False):
        lost = [item.nodeid for item in session.items if starts_engine(item) and not item.nodeid.endswith("@engine")]
        assert not lost, "this pytest and pytest-xdist do not keep engines in one lane; see pyproject.toml"


def starts_engine(item: pytest.Item) -> bool:
    """Whether a test runs llama.cpp on a model, here or in a child."""
    if item.path.parent.name == "convert":  # the converter calls ggml's kernels only
        return False
    fixtures = getattr(item, "fixturenames", ())
    return item.path.stem in ENGINE_MODULES or any(name.endswith("_gguf") for name in fixtures)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What this machine lacks, in one line."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = sorted(
        {report.longrepr[2].removeprefix("Skipped: ") for report in skipped if isinstance(report.longrepr, tuple)}
    )
    if reasons:
        terminalreporter.write_line(f"{len(skipped)} tests were not run: {'; '.join(reasons)}")


Make = Callable[[Path], Path]
Shared = Callable[[str, Make], Path]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """shared(name, make): the path that `make(folder)` returns, made by the first lane that asks for it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def once(name: str, make: Make) -> Path:
        folder, told = root / "shared" / name, root / "shared" / f"{name}.path"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not told.exists():
                told.write_text(str(make(folder)), encoding="utf-8")
        return Path(told.read_text(encoding="utf-8"))

    return once


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The demo checkpoint, the one that `make demo` makes."""
    return demo_checkpoint()


@pytest.fixture(scope="session")
def demo_gguf(demo_folder: Path, shared: Shared) -> Path:
    """The demo model as Q4_K_M."""

    def make(folder: Path) -> Path:
        path = folder / "SmolLM2-135M-Instruct-Q4_K_M.gguf"
        convert(demo_folder, file_type("Q4_K_M"), path)
        return path

    return shared("demo", make)


@pytest.fixture(scope="session")
def tagged_gguf(demo_folder: Path, shared: Shared) -> Path:
    """The demo model with thinking tags, as Q4_K_M."""

    def make(folder: Path) -> Path:
        path = folder / "Tagged-Q4_K_M.gguf"
        convert(write_tagged_checkpoint(demo_folder, folder / "Tagged"), file_type("Q4_K_M"), path)
        return path

    return shared("tagged", make)


@pytest.fixture(scope="session")
def tiny_gguf(shared: Shared) -> Path:
    """Two random layers with thinking tags, F16: an engine that takes no time, and whose replies never end by themselves."""
    return shared("tiny", lambda folder: in_f16(write_random_checkpoint(folder / "Tiny", ends=False)))


@pytest.fixture(scope="session")
def letters_gguf(shared: Shared) -> Path:
    """Writes letters without end, each token an event of its own."""
    return shared("letters", lambda folder: in_f16(write_scripted_checkpoint(folder / "Letters", letters)))


@pytest.fixture(scope="session")
def sentences_gguf(shared: Shared) -> Path:
    """Writes sentences without end."""
    return shared("sentences", lambda folder: in_f16(write_scripted_checkpoint(folder / "Sentences", sentences)))


@pytest.fixture(scope="session")
def thinking_gguf(shared: Shared) -> Path:
    """Thinks in sentences without end, in tags: it ends neither its thought nor its answer."""
    return shared(
        "thinking", lambda folder: in_f16(write_scripted_checkpoint(folder / "Thinking", sentences, thinks=True))
    )
