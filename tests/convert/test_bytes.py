"""Our tensors against llama_model_quantize of the same loaded library, byte for byte."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType, GGUFValueType

from qwq_convert.imatrix import Imatrix
from qwq_convert.pipeline import convert
from qwq_lite import gguf_header
from qwq_lite.backend import kernels
from qwq_lite.errors import EngineError
from qwq_lite.gguf_header import TensorInfo
from qwq_lite.recipe import FILE_TYPES, TENSOR_TYPES, Choice, file_type, importance_needed, tensor_types
from tests.checkpoints import write_random_checkpoint
from tests.quantizer import Floats, quantize

T = GGMLQuantizationType
U32, REAL, TEXT = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING
LOSSLESS = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
COLUMNS = (5120, 27_648, 896, 4864)  # of 896, blocks of 256 do not fit
N_ROWS = {kind: 2 if kind.name.startswith(("IQ2", "IQ3")) else 6 for kind in TENSOR_TYPES.values()}  # those are slow
# A pure file of this type holds each type of tensors.
PURE = {
    kind: next(
        of
        for of in FILE_TYPES.values()
        if tensor_types({"output.weight": (256, 1)}, of, 1, Choice(pure=True))["output.weight"] == kind
    )
    for kind in TENSOR_TYPES.values()
}


def write_tensors(path: Path, tensors: dict[str, Floats], kind: GGMLQuantizationType) -> None:
    """A GGUF of a qwen2 model that has these tensors and no others, (rows, columns) each, without loss where F32 holds none."""
    infos = gguf_header.layout((name, values.shape[::-1], kind) for name, values in tensors.items())
    keys: dict[str, tuple[gguf_header.Value, GGUFValueType]] = {
        "qwen2.block_count": (2, U32),
        "qwen2.context_length": (64, U32),
        "qwen2.embedding_length": (256, U32),
        "qwen2.feed_forward_length": (256, U32),
        "qwen2.attention.head_count": (1, U32),
        "qwen2.attention.head_count_kv": (1, U32),
        "qwen2.attention.layer_norm_rms_epsilon": (1e-5, REAL),
        "qwen2.vocab_size": (64, U32),
        "tokenizer.ggml.model": ("no_vocab", TEXT),
    }
    with path.open("wb") as file:
        file.write(gguf_header.encode("qwen2", keys, infos))
        for info, values in zip(infos, tensors.values(), strict=True):
            out = np.empty(info.n_bytes, np.uint8)
            data = kernels.from_float(values.reshape(-1), kind, info.shape[0], out).tobytes()
            file.write(data + bytes(gguf_header.padded(len(data)) - len(data)))


def stored(path: Path) -> Iterator[tuple[TensorInfo, kernels.Bytes]]:
    header, data = gguf_header.read(path), np.fromfile(path, np.uint8)
    for info in header.tensors:
        begin = header.data_offset + info.offset
        yield info, data[begin : begin + info.n_bytes].copy()


def weights(n_rows: int, columns: int) -> Floats:
    """Gaussian, with an outlier here and there and two blocks of zeros."""
    source = np.random.default_rng([n_rows, columns])
    values = 0.02 * source.standard_normal((n_rows, columns), dtype=np.float32)
    values[source.random(values.shape) < 1e-3] *= 30
    values[-1, columns // 2 : columns // 2 + 512] = 0
    return values


def importances(columns: int) -> Floats:
    """Over eight orders of magnitude, and 0 for columns that never mattered."""
    source = np.random.default_rng(columns)
    row = (10.0 ** source.uniform(-4, 4, columns)).astype(np.float32)
    row[source.random(columns) < 1e-2] = 0
    return row


# Each type from one of the three kinds of source, with and without importances from another one.
SOURCES = itertools.cycle((T.F32, T.F16, T.BF16, T.F16, T.BF16, T.F32, T.BF16, T.F32, T.F16))
ROWS = [
    pytest.param(kind, weighted, next(SOURCES), id=f"{name}-{'weighted' if weighted else 'bare'}")
    for name, kind in TENSOR_TYPES.items()
    for weighted in (False, True)
]


@pytest.mark.parametrize(("kind", "weighted", "source"), ROWS)
def test_rows_of_a_type(
    tmp_path: Path, kind: GGMLQuantizationType, weighted: bool, source: GGMLQuantizationType
) -> None:
    names = ["blk.0.ffn_up.weight", "blk.0.ffn_down.weight", "blk.1.ffn_up.weight", "blk.1.ffn_down.weight"]
    if importance_needed(kind) and not weighted:
        if importance_needed(kind, "output.weight"):
            with pytest.raises(EngineError, match="without importances"):
                kernels.from_float(np.zeros(256, np.float32), kind, 256, np.empty(256, np.uint8))
            return
        names = ["output.weight", "token_embd.weight"]  # llama.cpp asks for none there
    tensors = {name: weights(N_ROWS[kind], columns) for name, columns in zip(names, COLUMNS, strict=False)}
    rows = {name: importances(values.shape[1]) for name, values in tensors.items()} if weighted else {}
    write_tensors(tmp_path / "lossless.gguf", tensors, source)
    quantize(tmp_path / "lossless.gguf", tmp_path / "theirs.gguf", PURE[kind], Choice(pure=True), rows)
    lossless = {info.name: raw for info, raw in stored(tmp_path / "lossless.gguf")}
    made = set()
    for info, theirs in stored(tmp_path / "theirs.gguf"):  # in another order: by layer, then by name
        columns, n = info.shape[0], info.shape[0] * info.shape[1]
        values = kernels.to_float(lossless.pop(info.name), source, np.empty(n, np.float32))
        kernels.prepare(info.type)
        ours = kernels.from_float(values, info.type, columns, np.empty(4 * n, np.uint8), rows.get(info.name))
        assert ours.tobytes() == theirs.tobytes(), info
        made.add(info.type)
    assert not lossless
    assert kind in made


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


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q6_K", "Q8_0"])
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
        ("Q5_K_M", "f32", 256, Choice()),
        ("Q3_K_M", "bf16", 256, Choice(output_tensor_type=T.Q8_0, token_embedding_type=T.F16)),
        ("IQ4_XS", "bf16", 256, Choice(pure=True)),
        ("Q4_0", "f16", 96, Choice(has_imatrix=True)),
        ("IQ2_M", "bf16", 256, Choice(has_imatrix=True)),
    ],
    ids=lambda it: it if isinstance(it, str) else None,
)
def test_a_model_as_the_user_wants_it(
    tmp_path: Path, kind: str, dtype: Literal["bf16", "f16", "f32"], hidden: int, choice: Choice
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
