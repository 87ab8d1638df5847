"""Which type each tensor gets in a file of a given type: llama.cpp's rules as pure functions. Knows no weights.

Source: llama.cpp src/llama-quant.cpp (llama_tensor_get_type_impl, tensor_type_fallback, llama_ftype_get_default_type),
and conversion/base.py (prepare_tensors) for what stays F32. Only the rules that a dense qwen2 model can meet are here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from qwq_lite.errors import UsageError

T = GGMLQuantizationType
FT = LlamaFileType

FILE_TYPES: Mapping[str, LlamaFileType] = {
    "Q4_K_M": FT.MOSTLY_Q4_K_M,
    "Q6_K": FT.MOSTLY_Q6_K,
    "Q8_0": FT.MOSTLY_Q8_0,
    "F16": FT.MOSTLY_F16,
    "BF16": FT.MOSTLY_BF16,
}
_ALIASES = {"Q8": "Q8_0", "Q6": "Q6_K", "Q4_K": "Q4_K_M", "Q4KM": "Q4_K_M", "FP16": "F16"}

_DEFAULT = {
    FT.MOSTLY_Q4_K_M: T.Q4_K,
    FT.MOSTLY_Q6_K: T.Q6_K,
    FT.MOSTLY_Q8_0: T.Q8_0,
    FT.MOSTLY_F16: T.F16,
    FT.MOSTLY_BF16: T.BF16,
}
_FALLBACK = {T.Q4_K: T.Q5_0, T.Q5_K: T.Q5_1, T.Q6_K: T.Q8_0}  # 256-blocks that do not divide the columns -> 32-blocks
_70B_LAYERS = 80  # llama.cpp calls a qwen2 model of 80 layers 70B, and gives its narrow attn_v more bits


def file_type(name: str) -> LlamaFileType:
    """The file type for a name in any case. Raises: UsageError with the names that are known."""
    upper = name.upper().replace("-", "_")
    found = FILE_TYPES.get(_ALIASES.get(upper, upper))
    if found is None:
        raise UsageError(f"unknown type {name!r}; known are {', '.join(FILE_TYPES)}")
    return found


def file_type_name(kind: LlamaFileType) -> str:
    name: str = kind.name
    return name.removeprefix("MOSTLY_").removeprefix("ALL_")


def tensor_types(
    shapes: Mapping[str, tuple[int, ...]], kind: LlamaFileType, n_layer: int
) -> dict[str, GGMLQuantizationType]:
    """Type of every tensor of a qwen2 model.

    Shapes: GGUF name -> ggml's order (columns, rows). Pure: the same arguments give the same types on every machine.
    """
    tied = "output.weight" not in shapes
    return {name: _tensor_type(name, shape, kind, n_layer, tied) for name, shape in shapes.items()}


def _tensor_type(
    name: str, shape: tuple[int, ...], kind: LlamaFileType, n_layer: int, tied: bool
) -> GGMLQuantizationType:
    if stays_f32(name, shape):
        return T.F32
    default = _DEFAULT[kind]
    if GGML_QUANT_SIZES[default][0] == 1:  # F16, BF16: no mixture
        return default
    return _fit(_mixture(name, shape[0], kind, default, n_layer, tied), shape[0])


def stays_f32(name: str, shape: tuple[int, ...]) -> bool:
    """Norms, biases and everything with one dimension: small, and the kernels want them in F32."""
    return len(shape) < 2 or name.endswith("_norm.weight") or not name.endswith(".weight")


def _mixture(
    name: str, columns: int, kind: LlamaFileType, default: GGMLQuantizationType, n_layer: int, tied: bool
) -> GGMLQuantizationType:
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return _output_type(columns, default)
    if kind == FT.MOSTLY_Q4_K_M:
        return _q4_k_m(name, default, n_layer)
    return default


def _output_type(columns: int, default: GGMLQuantizationType) -> GGMLQuantizationType:
    """The output projection decides over every token: it gets Q6_K, or Q8_0 where blocks of 256 do not fit."""
    if default == T.Q8_0 or columns % GGML_QUANT_SIZES[default][0]:
        return T.Q8_0
    return T.Q6_K


def _q4_k_m(name: str, default: GGMLQuantizationType, n_layer: int) -> GGMLQuantizationType:
    if name.endswith((".attn_v.weight", ".ffn_down.weight")):
        if more_bits(_layer(name), n_layer):
            return T.Q6_K
        if name.endswith(".attn_v.weight") and n_layer == _70B_LAYERS:
            return T.Q5_K
    return default


def more_bits(i_layer: int, n_layer: int) -> bool:
    """The first and last eighth of the layers, and every third between: errors there hurt most."""
    eighth = n_layer // 8
    return i_layer < eighth or i_layer >= 7 * n_layer // 8 or (i_layer - eighth) % 3 == 2


def _layer(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    if match is None:
        raise UsageError(f"tensor {name} has no layer number")
    return int(match[1])


def _fit(wanted: GGMLQuantizationType, columns: int) -> GGMLQuantizationType:
    """A type whose blocks divide the columns: the wanted one, else its kin with blocks of 32, else F16."""
    if columns % GGML_QUANT_SIZES[wanted][0] == 0:
        return wanted
    smaller = _FALLBACK.get(wanted, wanted)
    return smaller if columns % GGML_QUANT_SIZES[smaller][0] == 0 else T.F16
