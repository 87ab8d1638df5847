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
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from qwq_lite.backend import native
from qwq_lite.errors import EngineError
from qwq_lite.formats.gguf_header import tensor_bytes

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
T = GGMLQuantizationType

# These look up neighbours on a grid, and end the process where fourth powers of the values overflow. At 1e6 there is room for
# importances up to 1e15.
_GRIDS = frozenset({T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS, T.IQ3_S})
MAX_GRID_VALUE = 1e6

_TO_FLOAT = {GGMLQuantizationType.BF16: "ggml_bf16_to_fp32_row", GGMLQuantizationType.F16: "ggml_fp16_to_fp32_row"}


@functools.cache
def _row_function(name: str) -> Callable[..., None]:
    return native.symbol(name, None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64])


class _TypeTraits(ctypes.Structure):
    """ggml.h, struct ggml_type_traits; from_float_ref follows."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
    )


@functools.cache
def _reader(kind: GGMLQuantizationType) -> Callable[..., None]:
    """The function that turns values of a type into floats. Raises: EngineError when ggml has none that we understand."""
    if kind in _TO_FLOAT:
        return _row_function(_TO_FLOAT[kind])
    traits = _TypeTraits()
    if kind < native.engine().GGML_TYPE_COUNT:  # past it, the call below ends the process
        asked = native.symbol("ggml_get_type_traits", ctypes.POINTER(_TypeTraits), [ctypes.c_int])
        traits = asked(int(kind)).contents
    if (traits.blck_size, traits.type_size) != GGML_QUANT_SIZES[kind] or not traits.to_float:
        raise EngineError(
            f"ggml cannot turn {kind.name} into floats, or describes the type as this package does not know it;"
            " run: python scripts/install.py --force"
        )
    pointer = ctypes.c_void_p
    return ctypes.CFUNCTYPE(None, pointer, pointer, ctypes.c_int64)(traits.to_float)


@functools.cache
def _quantize_chunk() -> Callable[..., int]:
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    arguments = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer]
    return native.symbol("ggml_quantize_chunk", ctypes.c_size_t, arguments)


@functools.cache
def _needs_importances() -> Callable[..., bool]:
    return native.symbol("ggml_quantize_requires_imatrix", ctypes.c_bool, [ctypes.c_int])


@functools.cache
def _validate() -> Callable[..., bool]:
    return native.symbol("ggml_validate_row_data", ctypes.c_bool, [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t])


@functools.cache
def prepare(kind: GGMLQuantizationType) -> None:
    """Build a type's lookup tables. Once per type, before any thread quantizes to it."""
    native.symbol("ggml_quantize_init", None, [ctypes.c_int])(int(kind))
    _quantize_chunk(), _needs_importances(), _validate()


def row_bytes(kind: GGMLQuantizationType, n: int) -> int:
    """Bytes of `n` values. `n` must be a multiple of the type's block."""
    return tensor_bytes((n,), kind)


def to_float(source: Bytes, kind: GGMLQuantizationType, out: Floats) -> Floats:
    """Values of `source` as F32: exactly for floats, for blocks as llama.cpp reads them.

    Shapes: source (n values of `kind`) -> a view of out, (n,). Raises: EngineError for a type that ggml cannot read.
    """
    if kind == GGMLQuantizationType.F32:
        return source.view(np.float32)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    n = source.nbytes // block_bytes * block
    _reader(kind)(source.ctypes.data, out.ctypes.data, n)
    return out[:n]


def overflows(values: Floats, kind: GGMLQuantizationType) -> bool:
    """Whether a value is so large, or no number, that the kernel of this type may end the process."""
    if kind not in _GRIDS:
        return False
    return not (values.min(initial=0) >= -MAX_GRID_VALUE and values.max(initial=0) <= MAX_GRID_VALUE)


def from_float(
    values: Floats, kind: GGMLQuantizationType, n_per_row: int, out: Bytes, importances: Floats | None = None
) -> Bytes:
    """Rows of F32 as `kind`. Shapes: values (rows × n_per_row,), importances (n_per_row,) -> a view of out, (bytes,).

    importances: how much an error in a column counts, the same for every row; finite and not below 0.
    Raises: EngineError when importances are missing that the kernel cannot do without, or are not of one row; when a value
    `overflows`; when the kernel writes another number of bytes than the type's size says.
    """
    rows = values.size // n_per_row
    n_bytes = tensor_bytes((n_per_row, rows), kind)
    if kind == GGMLQuantizationType.F32:
        return values.view(np.uint8)
    weights = None
    if importances is not None:
        if importances.shape != (n_per_row,) or importances.dtype != np.float32:
            raise EngineError(
                f"importances are {importances.shape} {importances.dtype}, ({n_per_row},) float32 are needed"
            )
        importances = np.ascontiguousarray(importances)
        weights = importances.ctypes.data
    elif _needs_importances()(int(kind)):
        raise EngineError(f"{kind.name} cannot be made without importances; give an importance matrix")
    if overflows(values, kind):
        raise EngineError(f"a value is over {MAX_GRID_VALUE:g}, which {kind.name} cannot hold; take a type that can")
    written = _quantize_chunk()(int(kind), values.ctypes.data, out.ctypes.data, 0, rows, n_per_row, weights)
    if written != n_bytes:
        raise EngineError(f"ggml_quantize_chunk wrote {written} bytes of {kind.name} where {n_bytes} were expected")
    return out[:n_bytes]


def is_valid(rows: Bytes, kind: GGMLQuantizationType) -> bool:
    """Whether ggml accepts the rows: no NaN or infinity in floats and block scales.

    A valid quantized block does not prove a valid source (most types hide a NaN): check both sides.
    """
    return bool(_validate()(int(kind), rows.ctypes.data, rows.nbytes))
