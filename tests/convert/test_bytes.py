"""Our tensors against llama_model_quantize of the same loaded library, byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from qwq_convert.imatrix import Imatrix
from qwq_convert.pipeline import convert
from qwq_lite.backend import kernels
from qwq_lite.errors import EngineError
from qwq_lite.formats import gguf_header
from qwq_lite.formats.tensor_types import QuantizeOptions, file_type
from tests.checkpoints import write_random_checkpoint
from tests.quantizer import quantize
from tests.rows import CASES, Case, compared, importances, stored
from tests.samples import sample

T = GGMLQuantizationType
LOSSLESS = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
FEWER_ROWS = {"IQ2": 2, "IQ3": 2, "IQ4": 8}  # those are slow; bench/rows.py has 64 of each


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_of_a_type(tmp_path: Path, case: Case) -> None:
    if case.impossible:
        with pytest.raises(EngineError, match="without importances"):
            kernels.from_float(np.zeros(256, np.float32), case.kind, 256, np.empty(256, np.uint8))
        return
    found = compared(tmp_path, case, FEWER_ROWS.get(case.kind.name[:3], 64))
    assert all(found.values()), found
    assert case.kind in {info.type for info in found}


def test_importances_of_another_length_are_refused() -> None:
    values, out = np.zeros(512, np.float32), np.empty(2048, np.uint8)
    for wrong in (np.ones(512, np.float32), np.ones((2, 128), np.float32)):
        with pytest.raises(EngineError, match=r"\(256,\) float32 are needed"):
            kernels.from_float(values, T.Q4_K, 256, out, wrong)


def test_a_value_that_ends_the_process_is_refused() -> None:
    """Some kernels look for a neighbour on a grid and give up where fourth powers overflow."""
    values = np.full(256, 2e6, np.float32)
    assert kernels.overflows(values, T.IQ3_S)
    assert kernels.overflows(-values, T.IQ2_XXS)
    assert kernels.overflows(np.full(256, np.nan, np.float32), T.IQ2_S)
    assert not kernels.overflows(values, T.Q4_K)
    with pytest.raises(EngineError, match="IQ3_S cannot hold"):
        kernels.from_float(values, T.IQ3_S, 256, np.empty(1024, np.uint8))


def tensors(path: Path) -> dict[str, tuple[tuple[int, ...], str, bytes]]:
    header = gguf_header.read(path)
    data = path.read_bytes()[header.data_offset :]
    return {
        info.name: (info.shape, info.type.name, data[info.offset : info.offset + info.n_bytes])
        for info in header.tensors
    }


def assert_equal_tensors(ours: Path, theirs: Path) -> None:
    a, b = tensors(ours), tensors(theirs)
    assert list(a) == list(b), "names and their order"
    different = [f"{name}: {a[name][:2]} for {b[name][:2]}" for name in a if a[name] != b[name]]
    assert not different


@pytest.mark.parametrize("kind", sample(["Q4_K_M", "Q6_K", "Q8_0"], 1))
def test_every_tensor_of_the_demo_model_is_llama_cpps(demo_folder: Path, kind: str, tmp_path: Path) -> None:
    convert(demo_folder, file_type("BF16"), tmp_path / "lossless.gguf")
    convert(demo_folder, file_type(kind), tmp_path / "ours.gguf")
    quantize(tmp_path / "lossless.gguf", tmp_path / "theirs.gguf", file_type(kind))
    assert_equal_tensors(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")
    names = {info.type.name for info in gguf_header.read(tmp_path / "ours.gguf").tensors}
    assert kind != "Q6_K" or names == {"F32", "Q6_K", "Q8_0"}, "the fallback for rows of 576 is exercised"


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q6_K", "Q8_0", "F16", "BF16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_eight_layers_whose_rows_divide_by_256(
    tmp_path: Path, kind: str, tied: bool, dtype: Literal["bf16", "f16"]
) -> None:
    folder = write_random_checkpoint(
        tmp_path / "checkpoint", n_layer=8, hidden=256, ffn=512, n_head=4, n_head_kv=2, tied=tied, dtype=dtype
    )
    convert(folder, file_type(LOSSLESS[dtype]), tmp_path / "lossless.gguf")
    convert(folder, file_type(kind), tmp_path / "ours.gguf")
    quantize(tmp_path / "lossless.gguf", tmp_path / "theirs.gguf", file_type(kind))
    assert_equal_tensors(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")
    names = {info.type.name for info in gguf_header.read(tmp_path / "ours.gguf").tensors}
    assert kind != "Q4_K_M" or names == {"F32", "Q4_K", "Q6_K"}, "the rule for more bits is exercised"
    assert kind != "Q6_K" or names == {"F32", "Q6_K"}, "no other type where blocks of 256 fit"


@pytest.mark.parametrize(
    ("kind", "dtype", "hidden", "choice"),
    [
        ("Q5_K_M", "f32", 256, QuantizeOptions()),
        ("Q3_K_M", "bf16", 256, QuantizeOptions(output_tensor_type=T.Q8_0, token_embedding_type=T.F16)),
        ("IQ4_XS", "bf16", 256, QuantizeOptions(pure=True)),
        ("Q4_0", "f16", 96, QuantizeOptions(has_imatrix=True)),
        ("IQ2_M", "bf16", 256, QuantizeOptions(has_imatrix=True)),
    ],
    ids=lambda it: it if isinstance(it, str) else None,
)
def test_a_model_as_the_user_wants_it(
    tmp_path: Path, kind: str, dtype: Literal["bf16", "f16", "f32"], hidden: int, choice: QuantizeOptions
) -> None:
    folder = write_random_checkpoint(tmp_path / "model", n_layer=8, hidden=hidden, ffn=256, n_head=4, dtype=dtype)
    convert(folder, file_type(LOSSLESS[dtype]), tmp_path / "lossless.gguf")
    rows = {info.name: importances(info.shape[0]) for info, _ in stored(tmp_path / "lossless.gguf")}
    del rows["output.weight"], rows["token_embd.weight"]  # what llama-imatrix leaves out by itself
    imatrix = Imatrix(Path("of.gguf"), rows, (), 1) if choice.has_imatrix else None
    convert(folder, file_type(kind), tmp_path / "ours.gguf", choice=choice, imatrix=imatrix)
    quantize(tmp_path / "lossless.gguf", tmp_path / "theirs.gguf", file_type(kind), choice, rows if imatrix else None)
    assert_equal_tensors(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


def test_the_same_input_gives_the_same_file_for_any_threads_and_shards(tmp_path: Path) -> None:
    one = write_random_checkpoint(tmp_path / "a" / "model", shards=1)
    many = write_random_checkpoint(tmp_path / "b" / "model", shards=3)
    convert(one, file_type("Q4_K_M"), tmp_path / "one.gguf", n_threads=1)
    convert(many, file_type("Q4_K_M"), tmp_path / "many.gguf", n_threads=4)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "many.gguf").read_bytes()


@pytest.mark.parametrize("layout", ["transformers4", "transformers5"])
def test_both_checkpoint_layouts_keep_the_rope_base(
    tmp_path: Path, layout: Literal["transformers4", "transformers5"]
) -> None:
    folder = write_random_checkpoint(tmp_path / "model", layout=layout)
    result = convert(folder, file_type("Q8_0"), tmp_path / "out.gguf")
    keys = gguf_header.read(tmp_path / "out.gguf").keys
    assert keys["qwen2.rope.freq_base"] == result.conversion.shape.rope_freq_base != 10_000.0
    assert keys["tokenizer.chat_template"]
