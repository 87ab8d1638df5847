"""One reading for several files, what is asked before and after, digests, threads."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import random
import shutil
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as T
from hypothesis import given
from hypothesis import strategies as st

from qwq_convert import destination, digests, quantize, verify
from qwq_convert.imatrix import Imatrix
from qwq_convert.pipeline import convert, look
from qwq_lite.errors import CheckpointError, OutputError, UsageError
from qwq_lite.formats import gguf_header
from qwq_lite.formats.tensor_types import QuantizeOptions, file_type
from qwq_lite.system import files
from tests.checkpoints import write_random_checkpoint

KINDS = ("Q4_K_M", "Q6_K", "Q8_0", "F16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("pipeline") / "model", n_vocab=5000)


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


def test_types_of_two_tensors_and_pure(folder: Path) -> None:
    choice = QuantizeOptions(output_tensor_type=T.Q8_0, token_embedding_type=T.F16, pure=True)
    (target,) = look(folder, [file_type("Q4_K_M")], choice=choice).targets
    types = {info.name: info.type for info in target.infos if len(info.shape) == 2}
    assert types.pop("output.weight") == T.Q8_0 and types.pop("token_embd.weight") == T.F16
    assert set(types.values()) == {T.Q4_K}


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


@pytest.mark.parametrize("n_threads", [1, 2, 8])
def test_a_caller_that_fails_ends_the_work_and_nothing_is_left(folder: Path, tmp_path: Path, n_threads: int) -> None:
    calls, ended = itertools.count(), threading.Event()

    def fail(_: object) -> None:
        if next(calls) == 2:
            raise ZeroDivisionError

    def work() -> None:
        with pytest.raises(ZeroDivisionError):
            convert(folder, file_type("Q4_K_M"), tmp_path / "out.gguf", n_threads=n_threads, on_progress=fail)
        ended.set()

    thread = threading.Thread(target=work, daemon=True)  # one that hangs must not hold up the other tests
    thread.start()
    thread.join(60)
    assert ended.is_set()
    assert not list(tmp_path.iterdir())
    assert not [other.name for other in threading.enumerate() if other.name.startswith("quantize")]


def test_a_folder_that_is_there_takes_one_file_too(folder: Path, tmp_path: Path) -> None:
    done = convert(folder, file_type("Q8_0"), tmp_path)
    assert done.outputs == (tmp_path / "model-Q8_0.gguf",)
    assert list(tmp_path.iterdir()) == [*done.outputs]


def test_a_folder_for_several_is_made_only_for_what_can_be_converted(tmp_path: Path) -> None:
    broken = write_random_checkpoint(tmp_path / "model")
    (broken / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError):
        convert(broken, [file_type("Q8_0"), file_type("F16")], tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_source_that_changes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    source = write_random_checkpoint(tmp_path / "model", shards=1)
    shard = source / "model.safetensors"

    def touch(_: object) -> None:
        with shard.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(bytes(4))

    def replace(_: object) -> None:
        other = shard.with_suffix(".other")
        other.write_bytes(shard.read_bytes())
        other.replace(shard)

    for change in (touch, replace):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: was changed or replaced while it was read"):
            convert(source, file_type("Q8_0"), tmp_path / "out.gguf", on_prepared=change)
        assert not (tmp_path / "out.gguf").exists()


def test_several_files_take_their_names_when_all_are_on_the_disk(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []

    def fail_at_the_second(self: files.RandomAccessFile) -> None:
        synced.append(1)
        if len(synced) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.RandomAccessFile, "sync", fail_at_the_second)
    with pytest.raises(OutputError, match="disk is full"):
        convert(folder, [file_type(kind) for kind in KINDS], tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_came_under_the_name_meanwhile_stays(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"

    def come(_: object) -> None:
        output.write_bytes(b"theirs")

    with pytest.raises(OutputError, match="made it meanwhile"):
        convert(folder, file_type("Q8_0"), output, on_prepared=come)
    assert output.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [output]
    convert(folder, file_type("Q8_0"), output, force=True)
    assert verify.verify(gguf_header.read(output)).outcome == "OK"


def test_importances_of_another_model(folder: Path, tmp_path: Path) -> None:
    (target,) = look(folder, [file_type("Q4_K_M")]).targets
    rows = {info.name: np.ones(info.shape[0], np.float32) for info in target.infos if info.name.startswith("blk.1.ffn")}
    some = Imatrix(tmp_path / "some.gguf", rows, (), 1)
    assert (
        look(folder, [file_type("Q4_K_M")], imatrix=some)
        .notices[-1]
        .endswith("the first without is blk.0.attn_k.weight")
    )
    none = Imatrix(tmp_path / "none.gguf", {"blk.99.ffn_up.weight": np.ones(256, np.float32)}, (), 1)
    with pytest.raises(CheckpointError, match=r"none of its 1 entries is a tensor of"):
        look(folder, [file_type("Q4_K_M")], imatrix=none)
    with pytest.raises(
        UsageError, match=r"IQ2_S needs importances, and .*some\.gguf has none for blk\.0\.attn_k\.weight"
    ):
        look(folder, [file_type("IQ2_S")], imatrix=some)
