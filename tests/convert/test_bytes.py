"""Our tensors against llama_model_quantize of the same loaded library, byte for byte."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Literal

import pytest
from gguf.constants import LlamaFileType

from qwq_convert.pipeline import convert
from qwq_lite import gguf_header
from qwq_lite.backend import native
from qwq_lite.recipe import file_type
from tests.checkpoints import write_random_checkpoint

LOSSLESS = {"bf16": "BF16", "f16": "F16"}


def reference(source: Path, target: Path, kind: LlamaFileType) -> None:
    """llama.cpp's own quantization of a lossless GGUF."""
    api = native.engine()
    params = api.llama_model_quantize_default_params()
    params.ftype, params.nthread = int(kind), 2
    assert api.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)) == 0, (
        native.last_lines()
    )


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


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q6_K", "Q8_0"])
def test_every_tensor_of_the_demo_model_is_llama_cpps(demo_folder: Path, kind: str, tmp_path: Path) -> None:
    convert(demo_folder, file_type("BF16"), tmp_path / "lossless.gguf")
    convert(demo_folder, file_type(kind), tmp_path / "ours.gguf")
    reference(tmp_path / "lossless.gguf", tmp_path / "theirs.gguf", file_type(kind))
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
    reference(tmp_path / "lossless.gguf", tmp_path / "theirs.gguf", file_type(kind))
    assert_equal_tensors(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")
    names = {info.type.name for info in gguf_header.read(tmp_path / "ours.gguf").tensors}
    assert kind != "Q4_K_M" or names == {"F32", "Q4_K", "Q6_K"}, "the rule for more bits is exercised"
    assert kind != "Q6_K" or names == {"F32", "Q6_K"}, "no other type where blocks of 256 fit"


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
    assert keys["qwen2.rope.freq_base"] == result.shape.rope_freq_base != 10_000.0
    assert keys["tokenizer.chat_template"]
