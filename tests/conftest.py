"""What several tests need: the demo checkpoint and its conversion, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from qwq_convert.pipeline import convert
from qwq_lite.formats.tensor_types import file_type
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


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The demo checkpoint, the one that `make demo` makes."""
    return demo_checkpoint()


@pytest.fixture(scope="session")
def demo_gguf(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as Q4_K_M."""
    path = tmp_path_factory.mktemp("demo") / "SmolLM2-135M-Instruct-Q4_K_M.gguf"
    convert(demo_folder, file_type("Q4_K_M"), path)
    return path


@pytest.fixture(scope="session")
def tagged_gguf(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with thinking tags, as Q4_K_M."""
    folder = write_tagged_checkpoint(demo_folder, tmp_path_factory.mktemp("tagged") / "Tagged")
    path = folder.parent / "Tagged-Q4_K_M.gguf"
    convert(folder, file_type("Q4_K_M"), path)
    return path


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random layers with thinking tags, F16: an engine that takes no time, and whose replies never end by themselves."""
    return in_f16(write_random_checkpoint(tmp_path_factory.mktemp("tiny") / "Tiny", ends=False))


@pytest.fixture(scope="session")
def letters_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes letters without end, each token an event of its own."""
    return in_f16(write_scripted_checkpoint(tmp_path_factory.mktemp("letters") / "Letters", letters))


@pytest.fixture(scope="session")
def sentences_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes sentences without end."""
    return in_f16(write_scripted_checkpoint(tmp_path_factory.mktemp("sentences") / "Sentences", sentences))


@pytest.fixture(scope="session")
def thinking_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thinks in sentences without end, in tags: it ends neither its thought nor its answer."""
    return in_f16(write_scripted_checkpoint(tmp_path_factory.mktemp("thinking") / "Thinking", sentences, thinks=True))
