"""What a type does to weights: figures against numpy's, types as gguf's own Python reads them, a file against its checkpoint."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, dequantize
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from qwq_convert.checkpoint.files import Checkpoint
from qwq_convert.pipeline import convert
from qwq_convert.roundtrip import Floats, RoundTrip
from qwq_convert.verify import compare, read_header
from qwq_lite.backend import kernels
from qwq_lite.errors import CheckpointError, EngineError
from qwq_lite.formats.tensor_types import file_type
from tests.checkpoints import write_random_checkpoint
from tests.convert.commands import run

T = GGMLQuantizationType
NO_READER = (T.Q8_1, T.Q8_K, T.I8, T.I16, T.I32, T.I64, T.F64)  # types of sums and of counts, none of weights
NO_ORACLE = (T.Q1_0,)  # gguf does not read it


def values(n: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(n, dtype=np.float32)


def figures(trip: RoundTrip) -> tuple[float, ...]:
    return trip.rmse, trip.relative, trip.max_error, trip.cosine


def test_the_figures_are_numpys() -> None:
    before = values(100_000)
    after = before + np.float32(0.01) * values(100_000, 1)
    trip = RoundTrip()
    trip.add(0, before[:70_001], after[:70_001])
    trip.add(7, before[70_001:], after[70_001:])
    a, b = before.astype(np.float64), after.astype(np.float64)
    rmse = math.sqrt(((a - b) ** 2).mean())
    cosine = a @ b / math.sqrt((a @ a) * (b @ b))
    expected = (rmse, rmse / math.sqrt((a**2).mean()), np.abs(a - b).max(), cosine)
    assert figures(trip) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=20)
@given(order=st.permutations(range(12)), n_threads=st.integers(1, 4))
def test_the_order_of_windows_does_not_matter(order: list[int], n_threads: int) -> None:
    before, after = values(12_000), values(12_000, 1)
    whole, trip = RoundTrip(), RoundTrip()
    for i in range(12):
        whole.add(i, before[1000 * i : 1000 * (i + 1)], after[1000 * i : 1000 * (i + 1)])
    with ThreadPoolExecutor(n_threads) as pool:
        done = pool.map(
            lambda i: trip.add(i, before[1000 * i : 1000 * (i + 1)], after[1000 * i : 1000 * (i + 1)]), order
        )
        assert len(list(done)) == 12
    assert figures(trip) == figures(whole), "to the last bit"


def test_the_ends_of_the_scale() -> None:
    some, zeros = values(10), np.zeros(10, np.float32)
    same, opposite, lost, made, nothing = RoundTrip(), RoundTrip(), RoundTrip(), RoundTrip(), RoundTrip()
    same.add(0, some, some)
    opposite.add(0, some, -some)
    lost.add(0, some, zeros)
    made.add(0, zeros, some)
    nothing.add(0, zeros, zeros)
    assert figures(same) == (0, 0, 0, 1)
    assert (opposite.cosine, opposite.relative) == (-1, 2)
    assert (lost.cosine, lost.relative) == (0, 1)
    assert (made.cosine, made.relative) == (0, math.inf)
    assert figures(nothing) == figures(RoundTrip()) == (0, 0, 0, 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_makes_no_figure(bad: float) -> None:
    trip, after = RoundTrip(), values(10)
    after[3] = bad
    trip.add(0, values(10), after)
    trip.add(10, values(10), -after)
    assert all(math.isnan(figure) for figure in figures(trip))


def test_values_of_another_number_are_refused() -> None:
    with pytest.raises(ValueError, match="10 values before, 9 after"):
        RoundTrip().add(0, values(10), values(9))


@pytest.mark.parametrize(
    "kind", [kind for kind in T if kind not in (*NO_READER, *NO_ORACLE)], ids=lambda kind: kind.name
)
def test_each_type_is_read_as_gguf_reads_it(kind: GGMLQuantizationType) -> None:
    """On random bytes, NaN and infinite scales among them, to the bit."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(int(kind)).integers(0, 256, 64 * block_bytes).astype(np.uint8)
    found = kernels.to_float(raw, kind, np.empty(64 * block, np.float32))
    with np.errstate(all="ignore"):
        expected = dequantize(raw, kind).reshape(-1)
    assert found.shape == (64 * block,)
    assert np.array_equal(found, expected, equal_nan=True)


@pytest.mark.parametrize("kind", NO_READER, ids=lambda kind: kind.name)
def test_a_type_that_ggml_does_not_read_is_an_error(kind: GGMLQuantizationType) -> None:
    with pytest.raises(EngineError, match=kind.name):
        kernels.to_float(np.zeros(1024, np.uint8), kind, np.empty(4096, np.float32))


def weights(folder: Path, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A checkpoint's tensor, read without the package's kernels."""
    with Checkpoint(folder) as checkpoint:
        tensor = checkpoint.tensors[name]
        raw = bytearray(tensor.n_bytes)
        checkpoint.read_into(tensor, memoryview(raw), 0)
    if tensor.type == T.BF16:
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.frombuffer(raw, np.float16 if tensor.type == T.F16 else np.float32).astype(np.float64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("source") / "Tiny")


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q8_0", "F16"])
def test_a_file_against_its_checkpoint(folder: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out.gguf"
    convert(folder, file_type(kind), path)
    with Checkpoint(folder) as checkpoint:
        found = compare(read_header(path), checkpoint, 2)
    ours = {"blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight", "output_norm.weight": "model.norm.weight"}
    read = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    assert list(found) == list(read)
    for name, theirs in ours.items():
        before = weights(folder, theirs)
        after = dequantize(read[name].data, read[name].tensor_type).reshape(-1).astype(np.float64)
        assert found[name].rmse == pytest.approx(math.sqrt(((before - after) ** 2).mean()), rel=1e-9, abs=1e-15)
        assert found[name].max_error == np.abs(before - after).max()
    worst = max(trip.relative for trip in found.values())
    assert {"Q4_K_M": 0.05, "Q8_0": 0.001, "F16": 0}[kind] <= worst < {"Q4_K_M": 0.2, "Q8_0": 0.05, "F16": 1e-3}[kind]
    assert all(trip.cosine > 0.98 for trip in found.values())


def test_convert_reports_what_verify_finds(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    written = convert(folder, file_type("Q4_K_M"), path, report=True)
    with Checkpoint(folder) as checkpoint:
        found = compare(read_header(path), checkpoint, 2)
    assert {name: figures(trip) for name, trip in written.errors[0].items()} == {
        name: figures(trip) for name, trip in found.items()
    }


def test_a_checkpoint_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    convert(folder, file_type("Q8_0"), path)
    for name, words, sizes in (
        ("Deeper", r"blk\.2\.\S+ is .+ here and missing in .+ \(12 tensors", {"n_layer": 3}),
        ("Wider", "256 × 640 here and 256 × 512|640 × 256 here and 512 × 256", {"ffn": 640}),
    ):
        other = write_random_checkpoint(tmp_path / name, **sizes)  # type: ignore[arg-type]
        with Checkpoint(other) as checkpoint, pytest.raises(CheckpointError, match=words):
            compare(read_header(path), checkpoint, 2)


def test_the_command_names_the_worst(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.gguf"
    convert(folder, file_type("Q4_K_M"), path)
    assert run(monkeypatch, "verify", path, "--source", folder) == 0
    text = capsys.readouterr().out
    assert run(monkeypatch, "verify", path, "--source", folder, "--json") == 0
    errors = json.loads(capsys.readouterr().out)["errors"]
    worst = sorted(errors, key=lambda name: -errors[name]["relative"])
    assert len(errors) == 27
    assert [line.split()[0] for line in text.splitlines()[2:5]] == worst[:3]
    assert "OK" in text
    assert worst[-1] not in text


def test_another_models_weights_are_an_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.gguf"
    convert(folder, file_type("Q8_0"), path)
    other = write_random_checkpoint(tmp_path / "Other", seed=1)
    assert run(monkeypatch, "verify", path, "--source", other, "--quiet") == 1
    assert "was not made from" in capsys.readouterr().err
    assert run(monkeypatch, "verify", path, "--source", other, "--json") == 1
    assert "blk.0.ffn_up.weight" in json.loads(capsys.readouterr().out)["unlike"]
    assert run(monkeypatch, "verify", path, "--source", tmp_path / "gone") == 1
    assert "no such folder" in capsys.readouterr().err
