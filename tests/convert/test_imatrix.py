"""Importance matrices: what llama-quantize would hand to the kernels, and files that are none."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFWriter
from gguf.constants import GGUFValueType

from qwq_convert import imatrix
from qwq_lite.errors import CheckpointError

Floats = npt.NDArray[np.float32]
TEXT, U32 = GGUFValueType.STRING, GGUFValueType.UINT32
UP, DOWN = "blk.0.ffn_up.weight", "blk.0.ffn_down.weight"
KEYS: Mapping[str, object] = {"imatrix.datasets": ["wiki.txt"], "imatrix.chunk_count": 7, "imatrix.chunk_size": 512}


def write(path: Path, tensors: Mapping[str, npt.NDArray[np.generic]], keys: Mapping[str, object] = KEYS) -> Path:
    """As llama-imatrix does, by gguf's own writer. Shapes: (rows, columns)."""
    writer = GGUFWriter(path, "")
    writer.add_type("imatrix")
    for key, value in keys.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            assert isinstance(value, int)
            writer.add_uint32(key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def entry(name: str, sums: Floats, count: float = 3584.0) -> dict[str, npt.NDArray[np.generic]]:
    return {f"{name}.in_sum2": sums[None], f"{name}.counts": np.array([[count]], np.float32)}


def sums(columns: int, seed: int = 0) -> Floats:
    return (10.0 ** np.random.default_rng(seed).uniform(-6, 8, columns)).astype(np.float32)


def test_a_row_is_the_mean_of_squares_in_single_precision(tmp_path: Path) -> None:
    one, other = sums(256), sums(512, 1)
    found = imatrix.read(write(tmp_path / "i.gguf", {**entry(UP, one, 3.0), **entry(DOWN, other)}))
    row = found.row(UP, 256)
    assert row is not None
    assert row.dtype == np.float32
    by_hand = [np.float32(value) / np.float32(3) for value in one]
    assert row.tobytes() == np.array(by_hand, np.float32).tobytes()
    assert UP in found
    assert DOWN in found
    assert "output.weight" not in found
    assert found.row("output.weight", 256) is None


def test_counts_are_rounded_and_none_weighs_all_alike(tmp_path: Path) -> None:
    """As std::lround rounds; a tensor that met no token counts 1 everywhere."""
    values = np.array([10.0, 20.0], np.float32)
    found = imatrix.read(write(tmp_path / "i.gguf", {**entry(UP, values, 2.5), **entry(DOWN, values, 0.4)}))
    for name, expected in ((UP, values / np.float32(3)), (DOWN, np.ones(2, np.float32))):
        row = found.row(name, 2)
        assert row is not None
        assert row.tobytes() == expected.tobytes()


def test_a_row_of_another_length_is_an_error_but_for_the_embedding(tmp_path: Path) -> None:
    found = imatrix.read(write(tmp_path / "i.gguf", {**entry(UP, sums(256)), **entry("token_embd.weight", sums(256))}))
    with pytest.raises(CheckpointError, match=r"i\.gguf: blk.0.ffn_up.weight.in_sum2 has 256 values, .* 512 columns"):
        found.row(UP, 512)
    assert found.row("token_embd.weight", 512) is None


def test_experts_do_not_pass_for_columns(tmp_path: Path) -> None:
    tensors = {f"{UP}.in_sum2": np.ones((2, 256), np.float32), f"{UP}.counts": np.ones((2, 1), np.float32)}
    with pytest.raises(CheckpointError, match="has 512 values, the tensor has 256 columns"):
        imatrix.read(write(tmp_path / "i.gguf", tensors)).row(UP, 256)


def test_the_keys_that_llama_quantize_writes(tmp_path: Path) -> None:
    path = write(tmp_path / "i.gguf", {**entry(UP, sums(256)), **entry(DOWN, sums(512))})
    assert imatrix.read(path).keys() == {
        "quantize.imatrix.file": (str(path)[:127], TEXT),
        "quantize.imatrix.dataset": ("wiki.txt", TEXT),
        "quantize.imatrix.entries_count": (2, U32),
        "quantize.imatrix.chunks_count": (7, U32),
    }


def test_keys_are_cut_and_left_out_as_llama_quantize_does(tmp_path: Path) -> None:
    long = "ä" * 100  # 200 bytes; it keeps 127, which is 63 characters and a half
    path = write(
        tmp_path / "i.gguf", entry(UP, sums(8)), {**KEYS, "imatrix.datasets": [long], "imatrix.chunk_count": 0}
    )
    keys = imatrix.read(path).keys()
    assert keys["quantize.imatrix.dataset"] == ("ä" * 63, TEXT)
    assert "quantize.imatrix.chunks_count" not in keys


def test_the_older_form_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    path = tmp_path / "old.dat"
    name = UP.encode()
    path.write_bytes(struct.pack(f"<ii{len(name)}sii2f", 1, len(name), name, 7, 2, 1.0, 2.0))
    with pytest.raises(CheckpointError, match=r"llama-imatrix --in-file old\.dat -o old\.gguf"):
        imatrix.read(path)


BAD: dict[str, tuple[dict[str, npt.NDArray[np.generic]], Mapping[str, object], str]] = {
    "no importances": ({"token_embd.weight": np.ones((1, 8), np.float32)}, KEYS, r"no tensor ends in \.in_sum2"),
    "no counts": ({f"{UP}.in_sum2": np.ones((1, 8), np.float32)}, KEYS, f"{UP}.counts is missing"),
    "no sums": ({f"{UP}.counts": np.ones((1, 1), np.float32)}, KEYS, f"{UP}.in_sum2 is missing"),
    "F16": ({**entry(UP, sums(8)), f"{UP}.in_sum2": np.ones((1, 8), np.float16)}, KEYS, "is F16, F32 is expected"),
    "three counts": ({**entry(UP, sums(8)), f"{UP}.counts": np.ones((3, 1), np.float32)}, KEYS, "8 sums and 3 counts"),
    "NaN": (entry(UP, np.array([1, np.nan], np.float32)), KEYS, f"{UP}.in_sum2 is nan at 1"),
    "infinite": (entry(UP, np.array([np.inf, 1], np.float32)), KEYS, f"{UP}.in_sum2 is inf at 0"),
    "below 0": (entry(UP, np.array([1, -1], np.float32)), KEYS, f"{UP}.in_sum2 is -1.0 at 1"),
    "a count of NaN": (entry(UP, sums(8), float("nan")), KEYS, f"{UP}.counts is nan"),
    "a count below 0": (entry(UP, sums(8), -2.0), KEYS, f"{UP}.counts is -2.0"),
    "what overflows": (entry(UP, np.array([1e30], np.float32), 1.0), KEYS, "is 1e\\+30, up to 1e\\+15 is expected"),
    "no chunk size": (
        entry(UP, sums(8)),
        {key: it for key, it in KEYS.items() if "size" not in key},
        "chunk_size is missing",
    ),
    "chunks in words": (entry(UP, sums(8)), {**KEYS, "imatrix.chunk_count": "7"}, "chunk_count is '7'"),
}


@pytest.mark.parametrize(("tensors", "keys", "message"), BAD.values(), ids=BAD)
def test_bad_files_are_refused_by_name_and_field(
    tmp_path: Path, tensors: dict[str, npt.NDArray[np.generic]], keys: Mapping[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"i\.gguf: .*{message}"):
        imatrix.read(write(tmp_path / "i.gguf", tensors, keys))


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.gguf", entry(UP, sums(8))).read_bytes()
    path = tmp_path / "i.gguf"
    end = len(whole.rstrip(b"\0"))  # what follows is padding
    for length in range(end):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"i\.gguf: "):
            imatrix.read(path)


@pytest.mark.parametrize("name", ["missing.gguf", "."])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="is not a file"):
        imatrix.read(tmp_path / name)


def test_more_than_any_model_has_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "i.gguf", entry(UP, sums(256)))
    monkeypatch.setattr(imatrix, "MAX_BYTES", 1024)
    with pytest.raises(CheckpointError, match="its tensors have 1028 bytes, 1024 are allowed"):
        imatrix.read(path)
