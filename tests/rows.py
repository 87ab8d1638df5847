"""Rows of each type of tensors, made by our kernels and by llama_model_quantize of the loaded library. Knows no checkpoints."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType, GGUFValueType

from qwq_lite.backend import kernels
from qwq_lite.formats import gguf_header, gguf_writer
from qwq_lite.formats.gguf_header import TensorInfo
from qwq_lite.formats.tensor_types import FILE_TYPES, TENSOR_TYPES, QuantizeOptions, importance_needed, tensor_types
from tests.quantizer import Floats, quantize

T = GGMLQuantizationType
U32, REAL, TEXT = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING
# Widths of QwQ's geometry and of 0.5B's; blocks of 256 do not fit into rows of 896.
COLUMNS = {
    "blk.0.ffn_up.weight": 5120,
    "blk.0.ffn_down.weight": 27_648,
    "blk.1.ffn_up.weight": 896,
    "blk.1.ffn_down.weight": 4864,
}
WITHOUT_IMPORTANCES = {"output.weight": 5120, "token_embd.weight": 27_648}  # of these llama.cpp asks for none
# A pure file of this type holds each type of tensors.
PURE = {
    kind: next(
        of
        for of in FILE_TYPES.values()
        if tensor_types({"output.weight": (256, 1)}, of, 1, QuantizeOptions(pure=True))["output.weight"] == kind
    )
    for kind in TENSOR_TYPES.values()
}


@dataclass(frozen=True)
class Case:
    """A type of tensors, the type that its source has, and whether there are importances."""

    kind: GGMLQuantizationType
    source: GGMLQuantizationType
    weighted: bool

    def __str__(self) -> str:
        return f"{self.kind.name}-{'weighted' if self.weighted else 'bare'}"

    @property
    def impossible(self) -> bool:
        """Whether the kernel cannot do without the importances that are not there."""
        return not self.weighted and importance_needed(self.kind, "output.weight")


# Each type from one of the three kinds of source, with and without importances from another one.
_SOURCES = itertools.cycle((T.F32, T.F16, T.BF16, T.F16, T.BF16, T.F32, T.BF16, T.F32, T.F16))
CASES = [Case(kind, next(_SOURCES), weighted) for kind in TENSOR_TYPES.values() for weighted in (False, True)]


def compared(folder: Path, case: Case, n_rows: int) -> dict[TensorInfo, bool]:
    """Tensors of so many rows of each width, and whether ours are theirs, byte for byte. Writes two files into the folder."""
    columns = WITHOUT_IMPORTANCES if importance_needed(case.kind) and not case.weighted else COLUMNS
    tensors = {name: weights(n_rows, width) for name, width in columns.items()}
    rows = {name: importances(width) for name, width in columns.items()} if case.weighted else {}
    write_tensors(folder / "lossless.gguf", tensors, case.source)
    quantize(folder / "lossless.gguf", folder / "theirs.gguf", PURE[case.kind], QuantizeOptions(pure=True), rows)
    lossless = {info.name: raw for info, raw in stored(folder / "lossless.gguf")}
    found = {}
    for info, theirs in stored(folder / "theirs.gguf"):  # in another order: by layer, then by name
        width, n = info.shape[0], info.shape[0] * info.shape[1]
        values = kernels.to_float(lossless.pop(info.name), case.source, np.empty(n, np.float32))
        kernels.prepare(info.type)
        ours = kernels.from_float(values, info.type, width, np.empty(4 * n, np.uint8), rows.get(info.name))
        found[info] = ours.tobytes() == theirs.tobytes()
    assert not lossless
    return found


def write_tensors(path: Path, tensors: dict[str, Floats], kind: GGMLQuantizationType) -> None:
    """A GGUF of a qwen2 model that has these tensors and no others, (rows, columns) each, without loss where F32 holds none."""
    infos = gguf_writer.layout((name, values.shape[::-1], kind) for name, values in tensors.items())
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
        file.write(gguf_writer.encode("qwen2", keys, infos))
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
