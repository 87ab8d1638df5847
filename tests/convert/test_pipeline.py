"""One reading for several files, what is said before and after, digests, threads."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import shutil
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner, Result
from gguf.constants import GGMLQuantizationType as T
from hypothesis import given
from hypothesis import strategies as st

from qwq_convert import destination, digests, quantize, verify
from qwq_convert.cli import convert as command
from qwq_convert.pipeline import convert, look
from qwq_lite import gguf_header, planning
from qwq_lite.errors import OutputError, PlanError
from qwq_lite.recipe import Choice, file_type
from tests.checkpoints import write_random_checkpoint

KINDS = ("Q4_K_M", "Q6_K", "Q8_0", "F16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("pipeline") / "model", n_vocab=5000)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command.command, [str(argument) for argument in arguments], catch_exceptions=False)


def test_several_files_of_one_reading_are_those_of_one_each(folder: Path, tmp_path: Path) -> None:
    read = 0

    def count(progress: Any) -> None:
        nonlocal read
        read += progress.n_bytes

    done = convert(folder, [file_type(kind) for kind in KINDS], tmp_path / "all", on_progress=count)
    assert read == done.conversion.source_bytes
    assert [path.name for path in done.outputs] == [f"model-{kind}.gguf" for kind in KINDS]
    for kind, path in zip(KINDS, done.outputs, strict=True):
        convert(folder, file_type(kind), tmp_path / "one.gguf", force=True)
        assert path.read_bytes() == (tmp_path / "one.gguf").read_bytes()


def test_any_number_of_threads_gives_the_same_file_and_it_verifies(folder: Path, tmp_path: Path) -> None:
    paths = [tmp_path / f"{n_threads}.gguf" for n_threads in (1, 2, 7)]
    for path in paths:
        convert(folder, file_type("Q4_K_M"), path, n_threads=int(path.stem))
    assert len({path.read_bytes() for path in paths}) == 1
    header = gguf_header.read(paths[0])
    assert verify.verify(header).outcome == "OK"
    data = paths[0].read_bytes()[header.data_offset :]
    listed = header.keys[digests.KEY]
    assert isinstance(listed, list)
    for info, digest in zip(header.tensors, listed[:-1], strict=True):
        assert hashlib.sha256(data[info.offset : info.offset + info.n_bytes]).hexdigest() == digest


def test_a_dry_run_says_what_the_file_would_be_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    done = run(folder, "-q", "Q3_K_M", "-o", output, "--dry-run", "--json")
    assert not list(tmp_path.iterdir())
    (said,) = json.loads(done.stdout)
    convert(folder, file_type("Q3_K_M"), output)
    header = gguf_header.read(output)
    assert said["n_bytes"] == output.stat().st_size
    assert [(one["name"], one["type"], one["n_bytes"]) for one in said["tensors"]] == [
        (info.name, info.type.name, info.n_bytes) for info in header.tensors
    ]
    told = run(folder, "-q", "Q3_K_M", "-o", output, "--dry-run").stdout
    assert all(info.name in told for info in header.tensors)
    assert "bits per weight" in told and "Nothing was written" in told


def test_types_of_two_tensors_and_pure(folder: Path) -> None:
    choice = Choice(output_tensor_type=T.Q8_0, token_embedding_type=T.F16, pure=True)
    (target,) = look(folder, [file_type("Q4_K_M")], choice=choice).targets
    types = {info.name: info.type for info in target.infos if len(info.shape) == 2}
    assert types.pop("output.weight") == T.Q8_0 and types.pop("token_embd.weight") == T.F16
    assert set(types.values()) == {T.Q4_K}


def test_a_report_measures_each_tensor(folder: Path, tmp_path: Path) -> None:
    done = run(folder, "-q", "Q4_K_M", "-q", "F32", "-o", tmp_path / "both", "--report", "--json")
    small, exact = json.loads(done.stdout)
    assert small["errors"].keys() == exact["errors"].keys()
    assert all(error["rmse"] == 0 and error["cosine"] == 1 for error in exact["errors"].values())
    wide = [error for name, error in small["errors"].items() if name.endswith("ffn_up.weight")]
    assert all(0.9 < error["cosine"] < 1 and error["max"] > error["rmse"] > 0 for error in wide)
    told = run(folder, "-q", "Q4_K_M", "-o", tmp_path / "one.gguf", "--report").stdout
    assert "Furthest from the checkpoint" in told


def test_the_usual_digest_beside_the_file(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    done = run(folder, "-q", "Q8_0", "-o", output, "--sha256", "--quiet")
    assert not done.stdout and not done.stderr
    digest = hashlib.sha256(output.read_bytes()).hexdigest()
    assert (tmp_path / "out.gguf.sha256").read_text("utf-8") == f"{digest}  out.gguf\n"


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_without_room_is_said_in_numbers_before_anything_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 10**6))
    with pytest.raises(
        OutputError, match=r"0\.\d\d GB are needed there, 0\.00 GB are free; make room for 0\.\d\d GB more"
    ):
        convert(folder, file_type("Q8_0"), tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, 10**9))
    convert(folder, file_type("Q8_0"), tmp_path / "out.gguf")


def test_what_a_killed_conversion_left_counts_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "out.gguf"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1000))
    with pytest.raises(OutputError):
        destination.check_room([(final, 1 << 20)])
    (tmp_path / ".out.gguf.part").write_bytes(random.Random(0).randbytes(1 << 20))
    if hasattr((tmp_path / ".out.gguf.part").stat(), "st_blocks"):
        destination.check_room([(final, 1 << 20)])


def test_a_result_that_this_machine_cannot_run_is_said_and_made(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: str, quant: str) -> None:
        error = PlanError("it needs 40 GiB, there are 8")
        error.smaller = "deepseek-r1-distill-qwen-14b"
        raise error

    monkeypatch.setattr(command, "_MUCH", 0)
    monkeypatch.setattr(planning, "plan_model", refuse)
    done = run(folder, "-q", "Q8_0", "-o", tmp_path / "out.gguf")
    assert "cannot run it: it needs 40 GiB" in done.stderr and "deepseek-r1-distill-qwen-14b" in done.stderr
    assert (tmp_path / "out.gguf").exists()


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=8), st.randoms(use_true_random=False))
def test_a_digest_of_windows_in_any_order(data: bytes, cuts: list[int], source: random.Random) -> None:
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    parts = [(data[a:b], a) for a, b in itertools.pairwise(places)]
    source.shuffle(parts)
    digest = quantize.OrderedDigest()
    for part, offset in parts:
        digest.add(memoryview(part), offset)
    assert digest.hexdigest() == hashlib.sha256(data).hexdigest()


def test_no_thread_runs_far_ahead_of_the_slowest() -> None:
    queue: Any = quantize._Queue(iter(range(10)), n_ahead=3)  # type: ignore[arg-type] # any windows will do
    taken: list[int] = []

    def take() -> None:
        with queue.next() as window:
            taken.append(window)

    with queue.next() as slowest:
        assert slowest == 0
        take()
        take()
        waits = threading.Thread(target=take)
        waits.start()
        waits.join(0.1)
        assert waits.is_alive() and taken == [1, 2], "the fourth window waits for the first"
    waits.join()
    assert taken == [1, 2, 3]
    queue.stop()
    take()
    assert taken[-1] is None
