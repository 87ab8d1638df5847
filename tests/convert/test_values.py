"""What no type can hold is refused by name, for every file type, whatever the source's type; what BF16 can hold stays."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest

from qwq_convert.imatrix import Imatrix
from qwq_convert.pipeline import convert, look
from qwq_lite.errors import CheckpointError
from qwq_lite.formats.tensor_types import FILE_TYPES, file_type, needs_imatrix
from tests.checkpoints import write_random_checkpoint

SHARD = "model.safetensors"
TENSOR, ROW, COLUMN = "model.layers.0.mlp.down_proj.weight", 3, 17
HOLDS_ALL = ("F32", "BF16")


def put(folder: Path, value: float) -> None:
    """Write a value into the F32 checkpoint, at ROW and COLUMN of TENSOR."""
    path = folder / SHARD
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack_from("<Q", data)
    entry = json.loads(data[8 : 8 + length])[TENSOR]
    place = 8 + length + entry["data_offsets"][0] + 4 * (ROW * entry["shape"][1] + COLUMN)
    data[place : place + 4] = struct.pack("<f", value)
    path.write_bytes(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("values") / "model", n_layer=1, dtype="f32", shards=1)


@pytest.fixture(scope="module")
def ones(folder: Path) -> Imatrix:
    """Importances that are all the same."""
    (target,) = look(folder, [file_type("BF16")]).targets
    rows = {info.name: np.ones(info.shape[0], np.float32) for info in target.infos if len(info.shape) == 2}
    return Imatrix(Path("ones.gguf"), rows, (), 1)


@pytest.mark.parametrize("name", FILE_TYPES)
def test_no_number_and_no_place_for_a_number_is_an_error(
    name: str, folder: Path, ones: Imatrix, tmp_path: Path
) -> None:
    kind, output = file_type(name), tmp_path / "out.gguf"
    matrix = ones if needs_imatrix(kind) else None
    for value in (math.nan, math.inf, -math.inf, 1e38):
        put(folder, value)
        if math.isfinite(value) and name in HOLDS_ALL:
            convert(folder, kind, output, imatrix=matrix)
            output.unlink()
            continue
        with pytest.raises(CheckpointError, match=rf"{SHARD}: tensor {TENSOR}, row {ROW}, column {COLUMN} is -?\w"):
            convert(folder, kind, output, imatrix=matrix)
        assert not list(tmp_path.iterdir())


def test_what_f16_cannot_hold_names_bf16(folder: Path, tmp_path: Path) -> None:
    put(folder, 70_000)
    with pytest.raises(CheckpointError, match=r"is 70000, which F16 cannot hold; BF16 can: convert with -q BF16"):
        convert(folder, file_type("F16"), tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())
    convert(folder, [file_type("BF16"), file_type("Q8_0")], tmp_path / "both")
    assert len(list((tmp_path / "both").iterdir())) == 2
