"""Which type each tensor gets in a file of a given type: llama.cpp's rules as pure functions. Knows no weights.

Each rule names the function of llama.cpp's src/llama-quant.cpp that it follows; in llama_tensor_get_type_impl a rule is the
branch of one kind of tensor. What stays F32 is decided in conversion/base.py (prepare_tensors). Only the rules that a dense
qwen2 model can meet are here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from qwq_lite.errors import UsageError

T = GGMLQuantizationType
FT = LlamaFileType

# name -> file type, and the type that its tensors have where no rule says otherwise (llama_ftype_get_default_type)
_KINDS = {
    "F32": (FT.ALL_F32, T.F32),
    "F16": (FT.MOSTLY_F16, T.F16),
    "BF16": (FT.MOSTLY_BF16, T.BF16),
    "Q8_0": (FT.MOSTLY_Q8_0, T.Q8_0),
    "Q6_K": (FT.MOSTLY_Q6_K, T.Q6_K),
    "Q5_K_M": (FT.MOSTLY_Q5_K_M, T.Q5_K),
    "Q5_K_S": (FT.MOSTLY_Q5_K_S, T.Q5_K),
    "Q5_0": (FT.MOSTLY_Q5_0, T.Q5_0),
    "Q5_1": (FT.MOSTLY_Q5_1, T.Q5_1),
    "Q4_K_M": (FT.MOSTLY_Q4_K_M, T.Q4_K),
    "Q4_K_S": (FT.MOSTLY_Q4_K_S, T.Q4_K),
    "Q4_0": (FT.MOSTLY_Q4_0, T.Q4_0),
    "Q4_1": (FT.MOSTLY_Q4_1, T.Q4_1),
    "IQ4_XS": (FT.MOSTLY_IQ4_XS, T.IQ4_XS),
    "IQ4_NL": (FT.MOSTLY_IQ4_NL, T.IQ4_NL),
    "Q3_K_L": (FT.MOSTLY_Q3_K_L, T.Q3_K),
    "Q3_K_M": (FT.MOSTLY_Q3_K_M, T.Q3_K),
    "Q3_K_S": (FT.MOSTLY_Q3_K_S, T.Q3_K),
    "Q2_K": (FT.MOSTLY_Q2_K, T.Q2_K),
    "IQ3_M": (FT.MOSTLY_IQ3_M, T.IQ3_S),
    "IQ3_S": (FT.MOSTLY_IQ3_S, T.IQ3_S),
    "Q2_K_S": (FT.MOSTLY_Q2_K_S, T.Q2_K),
    "IQ3_XS": (FT.MOSTLY_IQ3_XS, T.IQ3_S),
    "IQ3_XXS": (FT.MOSTLY_IQ3_XXS, T.IQ3_XXS),
    "IQ2_M": (FT.MOSTLY_IQ2_M, T.IQ2_S),
    "IQ2_S": (FT.MOSTLY_IQ2_S, T.IQ2_XS),
    "IQ2_XS": (FT.MOSTLY_IQ2_XS, T.IQ2_XS),
    "IQ2_XXS": (FT.MOSTLY_IQ2_XXS, T.IQ2_XXS),
}
FILE_TYPES: Mapping[str, LlamaFileType] = {name: kind for name, (kind, _) in _KINDS.items()}
_DEFAULT = dict(_KINDS.values())
# The first three are llama-quantize's own (QUANT_OPTIONS); the others are what people write.
_ALIASES = {
    "Q3_K": "Q3_K_M",
    "Q4_K": "Q4_K_M",
    "Q5_K": "Q5_K_M",
    "Q8": "Q8_0",
    "Q6": "Q6_K",
    "Q4KM": "Q4_K_M",
    "FP16": "F16",
    "FP32": "F32",
}
TENSOR_TYPES: Mapping[str, GGMLQuantizationType] = {kind.name: kind for kind in _DEFAULT.values()}

_IQ2 = {FT.MOSTLY_IQ2_XXS, FT.MOSTLY_IQ2_XS, FT.MOSTLY_IQ2_S, FT.MOSTLY_IQ2_M}  # rules of their own
_IQ2_FINER = {FT.MOSTLY_IQ2_S, FT.MOSTLY_IQ2_M}

OUTPUT, TOKEN_EMBD = "output.weight", "token_embd.weight"
_SHARED_V = 4  # heads to one of K and V, from which on it is cheap to give V more bits
_70B_LAYERS = 80  # llama.cpp calls a qwen2 model of 80 layers 70B, and gives its narrow attn_v more bits


@dataclass(frozen=True)
class QuantizeOptions:
    """What a user may want of types beside the file type, as llama-quantize has it."""

    # of output.weight; where that is tied, of token_embd.weight, as far as its columns allow
    output_tensor_type: GGMLQuantizationType | None = None
    token_embedding_type: GGMLQuantizationType | None = None  # of token_embd.weight
    pure: bool = False  # no mixture: every tensor gets the file type's own type
    has_imatrix: bool = False  # importances are there, which changes some rules


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


def tensor_type(name: str) -> GGMLQuantizationType:
    """A tensor's type for a name in any case. Raises: UsageError with the names that are known."""
    found = TENSOR_TYPES.get(name.upper().replace("-", "_"))
    if found is None:
        is_files = name.upper().replace("-", "_") in {*FILE_TYPES, *_ALIASES}
        wrong = f"{name} is a type of whole files, no tensor has it" if is_files else f"unknown tensor type {name!r}"
        raise UsageError(f"{wrong}; known are {', '.join(TENSOR_TYPES)}")
    return found


def default_type(kind: LlamaFileType) -> GGMLQuantizationType:
    """The type of tensors that no rule has another one for, where its blocks divide their columns."""
    return _DEFAULT[kind]


def needs_imatrix(kind: LlamaFileType) -> bool:
    """Whether llama.cpp refuses a file of this type without importances, for a model whose columns divide by 256.

    It decides by tensor: a pure file, or fallbacks of a narrow model, may do without; `importance_needed` is exact.
    """
    return kind in _IQ2 or kind in {FT.MOSTLY_Q2_K_S, FT.MOSTLY_IQ3_XS, FT.MOSTLY_IQ3_XXS}


def importance_needed(type: GGMLQuantizationType, name: str | None = None, kind: LlamaFileType | None = None) -> bool:
    """Whether a tensor of this type cannot be made without importances.

    Args: name, the tensor's; of token_embd and output llama.cpp asks only what the kernel cannot do without. kind, the
    file's; in a Q2_K_S file Q2_K needs them too.
    Source: tensor_requires_imatrix, and ggml_quantize_requires_imatrix of ggml/src/ggml.c
    """
    if name in (OUTPUT, TOKEN_EMBD):
        return type in (T.IQ2_XXS, T.IQ2_XS)
    if type == T.Q2_K:
        return kind in {FT.MOSTLY_Q2_K_S}
    return type in (T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS)


@dataclass(frozen=True)
class _Model:
    """What the rules ask of the model and of the user."""

    kind: LlamaFileType
    n_layer: int
    n_gqa: int  # heads to one of K and V
    tied: bool
    choice: QuantizeOptions

    @property
    def default(self) -> GGMLQuantizationType:
        return _DEFAULT[self.kind]

    @property
    def shares_v(self) -> bool:
        return self.n_gqa >= _SHARED_V


def tensor_types(
    shapes: Mapping[str, tuple[int, ...]],
    kind: LlamaFileType,
    n_layer: int,
    choice: QuantizeOptions = QuantizeOptions(),
) -> dict[str, GGMLQuantizationType]:
    """Type of every tensor of a qwen2 model.

    Shapes: GGUF name -> ggml's order (columns, rows). Pure: the same arguments give the same types on every machine.
    Raises: UsageError where a type that was chosen for a tensor has blocks that do not divide its columns.
    """
    model = _Model(kind, n_layer, _n_gqa(shapes), OUTPUT not in shapes, choice)
    return {name: _tensor_type(name, shape, model) for name, shape in shapes.items()}


def _n_gqa(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Heads to one of K and V: their widths say it. Source: llama_hparams::n_gqa"""
    q, k = shapes.get("blk.0.attn_q.weight"), shapes.get("blk.0.attn_k.weight")
    return q[1] // k[1] if q and k else 1


def stays_f32(name: str, shape: tuple[int, ...]) -> bool:
    """Norms, biases and everything with one dimension: small, and the kernels want them in F32."""
    return len(shape) < 2 or name.endswith("_norm.weight") or not name.endswith(".weight")


def _tensor_type(name: str, shape: tuple[int, ...], model: _Model) -> GGMLQuantizationType:
    """llama_tensor_get_type: what the user chose, else the mixture, made to fit."""
    if stays_f32(name, shape):
        return T.F32
    chosen = _chosen(name, shape[0], model.choice)
    if chosen is not None:
        return chosen
    if GGML_QUANT_SIZES[model.default][0] == 1:  # F32, F16, BF16: no mixture
        return model.default
    return _fit(model.default if model.choice.pure else _mixture(name, shape[0], model), shape[0])


def _chosen(name: str, columns: int, choice: QuantizeOptions) -> GGMLQuantizationType | None:
    """llama_tensor_get_type: the user's type for this tensor. No fallback: llama.cpp fails on it."""
    wanted = {OUTPUT: choice.output_tensor_type, TOKEN_EMBD: choice.token_embedding_type}.get(name)
    if wanted is not None and columns % (block := GGML_QUANT_SIZES[wanted][0]):
        fitting = [kind.name for kind in TENSOR_TYPES.values() if columns % GGML_QUANT_SIZES[kind][0] == 0]
        raise UsageError(
            f"{name} has {columns} columns, which do not divide into {wanted.name}'s blocks of {block};"
            f" {', '.join(fitting)} can be chosen"
        )
    return wanted


def _fit(wanted: GGMLQuantizationType, columns: int) -> GGMLQuantizationType:
    """tensor_type_fallback: the wanted type if its blocks divide the columns, else its kin of 32, else F16."""
    if columns % GGML_QUANT_SIZES[wanted][0] == 0:
        return wanted
    kin = {T.Q2_K: T.Q4_0, T.Q3_K: T.Q4_0, T.Q4_K: T.Q5_0, T.Q5_K: T.Q5_1, T.Q6_K: T.Q8_0}
    of_256 = GGML_QUANT_SIZES[wanted][0] > 32
    smaller = kin.get(wanted, T.IQ4_NL if of_256 else wanted)
    return smaller if columns % GGML_QUANT_SIZES[smaller][0] == 0 else T.F16


def _mixture(name: str, columns: int, model: _Model) -> GGMLQuantizationType:
    """llama_tensor_get_type_impl: which rule a tensor meets."""
    if name == OUTPUT or (model.tied and name == TOKEN_EMBD):
        return _output(columns, model)
    if name == TOKEN_EMBD:
        return _token_embd(model)
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    rule = (_IQ2_RULES if model.kind in _IQ2 else _RULES).get(match[2]) if match else None
    return rule(int(match[1]), model) if match and rule else model.default


def _output(columns: int, model: _Model) -> GGMLQuantizationType:
    """llama_tensor_get_type_impl, OUTPUT: the output projection decides over every token and is not made coarse."""
    if model.choice.output_tensor_type is not None:  # of a tied model; an untied one's was taken before
        return model.choice.output_tensor_type
    if model.default == T.Q8_0 or columns % GGML_QUANT_SIZES[model.default][0]:
        return T.Q8_0
    return T.Q5_K if model.kind in _IQ2 or model.kind == FT.MOSTLY_IQ3_XXS else T.Q6_K


def _token_embd(model: _Model) -> GGMLQuantizationType:
    """llama_tensor_get_type_impl, TOKEN_EMBD, where it is not the output projection too."""
    finer = {
        FT.MOSTLY_IQ2_XXS: T.Q2_K,
        FT.MOSTLY_IQ2_XS: T.Q2_K,
        FT.MOSTLY_IQ2_S: T.IQ3_S,
        FT.MOSTLY_IQ2_M: T.IQ3_S,
        FT.MOSTLY_IQ3_XXS: T.IQ3_S,
    }
    return finer.get(model.kind, model.default)


def _attn_v(i_layer: int, model: _Model) -> GGMLQuantizationType:
    """llama_tensor_get_type_impl, attn_v: small where heads share it, and its errors reach every one of them."""
    wanted = _attn_v_of_kind(i_layer, model)
    if model.n_layer == _70B_LAYERS and wanted in (T.Q3_K, T.Q4_K):
        return T.Q5_K
    return wanted


def _attn_v_of_kind(i_layer: int, model: _Model) -> GGMLQuantizationType:
    kind, default = model.kind, model.default
    always = {FT.MOSTLY_Q2_K: T.Q3_K, FT.MOSTLY_Q3_K_L: T.Q5_K, FT.MOSTLY_IQ3_M: T.Q4_K}
    shared = {
        FT.MOSTLY_Q2_K: T.Q4_K,
        FT.MOSTLY_Q2_K_S: T.Q4_K,
        FT.MOSTLY_IQ3_XXS: T.Q4_K,
        FT.MOSTLY_IQ3_XS: T.Q4_K,
        FT.MOSTLY_IQ3_S: T.Q4_K,
        FT.MOSTLY_IQ4_NL: T.Q5_K,
        FT.MOSTLY_IQ4_XS: T.Q5_K,
    }
    if kind in (FT.MOSTLY_Q4_K_M, FT.MOSTLY_Q5_K_M):
        return T.Q6_K if more_bits(i_layer, model.n_layer) else default
    if kind == FT.MOSTLY_Q4_K_S:
        return T.Q5_K if i_layer < 4 else default
    if kind == FT.MOSTLY_Q3_K_M:
        return T.Q5_K if i_layer < 2 else T.Q4_K
    if model.shares_v and kind in shared:
        return shared[kind]
    if kind == FT.MOSTLY_IQ3_XXS and not model.choice.has_imatrix:
        return T.IQ3_S
    return always.get(kind, default)


def _attn_q_k(i_layer: int, model: _Model) -> GGMLQuantizationType:
    """llama_tensor_get_type_impl, ATTENTION_Q and ATTENTION_K."""
    coarser = {FT.MOSTLY_IQ3_XS: T.IQ3_XXS, FT.MOSTLY_IQ3_XXS: T.IQ2_S}
    return coarser.get(model.kind, model.default)


def _attn_output(i_layer: int, model: _Model) -> GGMLQuantizationType:
    """llama_tensor_get_type_impl, ATTENTION_OUTPUT."""
    finer = {
        FT.MOSTLY_Q2_K: T.Q3_K,
        FT.MOSTLY_IQ3_XXS: T.IQ3_S,
        FT.MOSTLY_Q3_K_M: T.Q4_K,
        FT.MOSTLY_Q3_K_L: T.Q5_K,
        FT.MOSTLY_IQ3_M: T.Q4_K,
    }
    return finer.get(model.kind, model.default)


def _ffn_down(i_layer: int, model: _Model) -> GGMLQuantizationType:
    """llama_tensor_get_type_impl, FFN_DOWN: the widest range of values, and most of all in the first layers."""
    kind, weighted = model.kind, model.choice.has_imatrix
    if kind in (FT.MOSTLY_Q4_K_M, FT.MOSTLY_Q5_K_M):
        return T.Q6_K if more_bits(i_layer, model.n_layer) else model.default
    if kind == FT.MOSTLY_Q3_K_M:
        return T.Q5_K if i_layer < model.n_layer // 16 else T.Q4_K
    first = {FT.MOSTLY_Q2_K_S: T.Q4_K, FT.MOSTLY_IQ3_M: T.Q4_K, FT.MOSTLY_Q4_K_S: T.Q5_K}
    if weighted:
        first |= {FT.MOSTLY_Q4_0: T.Q4_1, FT.MOSTLY_Q5_0: T.Q5_1}
    else:
        first |= {FT.MOSTLY_IQ3_XXS: T.Q4_K, FT.MOSTLY_IQ4_NL: T.Q5_K, FT.MOSTLY_IQ4_XS: T.Q5_K}
    if i_layer < model.n_layer // 8 and kind in first:
        return first[kind]
    if kind == FT.MOSTLY_IQ3_XXS and not weighted:
        return T.Q3_K
    return {FT.MOSTLY_Q2_K: T.Q3_K, FT.MOSTLY_Q3_K_L: T.Q5_K}.get(kind, model.default)


def _ffn_gate_up(i_layer: int, model: _Model) -> GGMLQuantizationType:
    """llama_tensor_get_type_impl, FFN_GATE and FFN_UP: coarser between the first and the last eighth."""
    between = model.n_layer // 8 <= i_layer < 7 * model.n_layer // 8
    return T.IQ3_XXS if model.kind == FT.MOSTLY_IQ3_XS and between else model.default


def _iq2_attn_v(i_layer: int, model: _Model) -> GGMLQuantizationType:
    """llama_tensor_get_type_impl, attn_v of the 2-bit types; these know no 70B."""
    return T.Q4_K if model.shares_v else _iq2_finer(model)


def _iq2_attn_output(i_layer: int, model: _Model) -> GGMLQuantizationType:
    """llama_tensor_get_type_impl, ATTENTION_OUTPUT of the 2-bit types."""
    return T.IQ3_S if model.kind in _IQ2_FINER else model.default


def _iq2_ffn_down(i_layer: int, model: _Model) -> GGMLQuantizationType:
    """llama_tensor_get_type_impl, FFN_DOWN of the 2-bit types."""
    return _iq2_finer(model) if i_layer < model.n_layer // 8 else model.default


def _iq2_finer(model: _Model) -> GGMLQuantizationType:
    return T.IQ3_S if model.kind in _IQ2_FINER else T.Q2_K


_Rule = Callable[[int, _Model], GGMLQuantizationType]
_RULES: Mapping[str, _Rule] = {
    "attn_v": _attn_v,
    "attn_q": _attn_q_k,
    "attn_k": _attn_q_k,
    "attn_output": _attn_output,
    "ffn_down": _ffn_down,
    "ffn_gate": _ffn_gate_up,
    "ffn_up": _ffn_gate_up,
}
_IQ2_RULES: Mapping[str, _Rule] = {"attn_v": _iq2_attn_v, "attn_output": _iq2_attn_output, "ffn_down": _iq2_ffn_down}


def more_bits(i_layer: int, n_layer: int) -> bool:
    """llama_tensor_get_type_impl, use_more_bits: the first and last eighth of the layers, and every third between."""
    eighth = n_layer // 8
    return i_layer < eighth or i_layer >= 7 * n_layer // 8 or (i_layer - eighth) % 3 == 2
