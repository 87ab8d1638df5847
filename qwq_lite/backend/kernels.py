"""ggml's own row kernels: to float, quantize, validate. Knows no files and no models.

The same functions that llama_model_quantize calls, so the same library gives the same bytes. They release the GIL.
Source: ggml/include/ggml.h, ggml/src/ggml-quants.c
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from qwq_lite.backend import native
from qwq_lite.errors import EngineError
from qwq_lite.gguf_header import tensor_bytes

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_TO_FLOAT = {GGMLQuantizationType.BF16: "ggml_bf16_to_fp32_row", GGMLQuantizationType.F16: "ggml_fp16_to_fp32_row"}


@functools.cache
def _row_function(name: str) -> Callable[..., None]:
    return native.symbol(name, None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64])


@functools.cache
def _quantize_chunk() -> Callable[..., int]:
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    arguments = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer]
    return native.symbol("ggml_quantize_chunk", ctypes.c_size_t, arguments)


@functools.cache
def _validate() -> Callable[..., bool]:
    return native.symbol("ggml_validate_row_data", ctypes.c_bool, [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t])


@functools.cache
def prepare(kind: GGMLQuantizationType) -> None:
    """Build a type's lookup tables. Once per type, before any thread quantizes to it."""
    native.symbol("ggml_quantize_init", None, [ctypes.c_int])(int(kind))
    _quantize_chunk(), _validate()


def row_bytes(kind: GGMLQuantizationType, n: int) -> int:
    """Bytes of `n` values. `n` must be a multiple of the type's block."""
    return tensor_bytes((n,), kind)


def to_float(source: Bytes, kind: GGMLQuantizationType, out: Floats) -> Floats:
    """Values of `source` as F32, exactly. Shapes: source (n values of `kind`) -> a view of out, (n,)."""
    if kind == GGMLQuantizationType.F32:
        return source.view(np.float32)
    n = source.nbytes // 2
    _row_function(_TO_FLOAT[kind])(source.ctypes.data, out.ctypes.data, n)
    return out[:n]


def from_float(values: Floats, kind: GGMLQuantizationType, n_per_row: int, out: Bytes) -> Bytes:
    """Rows of F32 as `kind`. Shapes: values (rows × n_per_row,) -> a view of out, (bytes,).

    Raises: EngineError when the kernel writes another number of bytes than the type's size says.
    """
    n_bytes = row_bytes(kind, values.size)
    if kind == GGMLQuantizationType.F32:
        return values.view(np.uint8)
    rows = values.size // n_per_row
    written = _quantize_chunk()(int(kind), values.ctypes.data, out.ctypes.data, 0, rows, n_per_row, None)
    if written != n_bytes:
        raise EngineError(f"ggml_quantize_chunk wrote {written} bytes of {kind.name} where {n_bytes} were expected")
    return out[:n_bytes]


def is_valid(rows: Bytes, kind: GGMLQuantizationType) -> bool:
    """Whether ggml accepts the rows: no NaN or infinity in floats and block scales.

    A valid quantized block does not prove a valid source (most types hide a NaN): check both sides.
    """
    return bool(_validate()(int(kind), rows.ctypes.data, rows.nbytes))
