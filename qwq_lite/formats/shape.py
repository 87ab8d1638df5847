"""The geometry of a model, from a GGUF header or from a checkpoint's config.json. Knows no bytes.

config.json comes in two layouts: transformers 4 has `rope_theta` and `rope_scaling` at the top, transformers 5 has both
in `rope_parameters`. Reading the old places only would give llama.cpp's default base of 10,000: garbage without an error.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwq_lite import arguments
from qwq_lite.errors import CheckpointError, FormatError, QwqError
from qwq_lite.formats.gguf_header import Header

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
MAX_DIM = 1 << 24  # far above any model, far below what overflows a product of two
MAX_VOCAB = 1 << 21  # eight times the largest vocabulary; each row costs an entry in several lists
ROPE_SCALING_TYPES = ("none", "linear", "yarn", "longrope")

# Architectures whose graph asserts one size for keys, values and rotary positions (src/models/*.cpp). In others, gemma
# or phi for example, the three differ lawfully.
_ONE_HEAD_SIZE = frozenset({"llama", "mistral3", "qwen2", "qwen2moe", "qwen3", "qwen3moe"})
WITHOUT_HEADS = frozenset({"arwkv7", "mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7"})  # llm_arch_is_recurrent
_HEADS_FILL_EMBEDDING = frozenset({"qwen2", "qwen2moe"})  # the query has n_embd rows whatever key_length says


@dataclass(frozen=True)
class RopeScaling:
    """How positions past the trained length are mapped, with llama.cpp's names for the factors."""

    type: str  # "yarn" or "linear"
    factor: float
    original_context_length: int | None = None
    yarn: Mapping[str, float] | None = None  # yarn_ext_factor, yarn_attn_factor, yarn_beta_fast, yarn_beta_slow


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder, in llama.cpp's words."""

    arch: str  # general.architecture
    n_layer: int
    n_embd: int  # columns of the hidden state
    n_ff: int  # columns of the feed-forward
    n_head: int  # query heads
    n_head_kv: int  # key/value heads
    n_embd_head: int  # columns of a head
    n_vocab: int  # rows of the embedding, padding included
    n_ctx_train: int  # positions that it was trained for
    rms_norm_eps: float
    rope_freq_base: float
    rope_scaling: RopeScaling | None = None
    n_embd_head_v: int = 0  # columns of a head's values where they are others; 0 where they are the same

    @property
    def value_length(self) -> int:
        return self.n_embd_head_v or self.n_embd_head


class _Fields:
    """Typed, range-checked access to a mapping; what is missing or wrong is named together with its file."""

    def __init__(self, data: Mapping[str, Any], where: str, error: type[QwqError]) -> None:
        self._data, self._where, self._error = data, where, error

    def fail(self, name: str, message: str) -> QwqError:
        return self._error(f"{self._where}: {name} {message}")

    def integer(self, name: str, default: int | None = None, high: int = MAX_DIM) -> int:
        value = self._data.get(name)
        value = default if value is None else value
        if value is None:
            raise self.fail(name, f"is missing, an integer from 1 to {high} is expected")
        if not arguments.is_whole(value, 1, high):
            raise self.fail(name, f"is {reprlib.repr(value)}, an integer from 1 to {high} is expected")
        return value

    def real(self, name: str, low: float, high: float, default: float | None = None) -> float:
        value = self._data.get(name, default)
        if value is None:
            raise self.fail(name, f"is missing, a number from {low:g} to {high:g} is expected")
        if not (arguments.is_real(value) and low <= value <= high):
            raise self.fail(name, f"is {reprlib.repr(value)}, a number from {low:g} to {high:g} is expected")
        return float(value)


def from_config(config: Mapping[str, Any], path: Path) -> ModelShape:
    """Shape of a Qwen2ForCausalLM checkpoint.

    Raises: CheckpointError naming `path` and the field that is missing, of a wrong type or inconsistent.
    """
    fields = _Fields(config, str(path), CheckpointError)
    n_embd, n_head = fields.integer("hidden_size"), fields.integer("num_attention_heads", high=4096)
    n_head_kv = fields.integer("num_key_value_heads", default=n_head, high=4096)
    if config.get("head_dim") is None and n_embd % n_head:
        raise fields.fail("hidden_size", f"is {n_embd}, which does not divide by num_attention_heads {n_head}")
    if n_head % n_head_kv:
        raise fields.fail(
            "num_attention_heads", f"is {n_head}, which does not divide by num_key_value_heads {n_head_kv}"
        )
    head = fields.integer("head_dim", default=n_embd // n_head, high=4096)
    if head * n_head != n_embd:
        raise fields.fail("head_dim", f"is {head}, {n_embd / n_head:g} is expected: hidden_size / num_attention_heads")
    if head % 2:
        raise fields.fail("head_dim", f"is {head}, rotary positions need an even number")
    if config.get("hidden_act", "silu") != "silu":
        found = reprlib.repr(config["hidden_act"])
        raise fields.fail("hidden_act", f"is {found}, 'silu' is expected: this is not a Qwen2 feed-forward")
    rope = _rope_parameters(config, path)
    return ModelShape(
        arch="qwen2",
        n_layer=fields.integer("num_hidden_layers", high=MAX_LAYERS),
        n_embd=n_embd,
        n_ff=fields.integer("intermediate_size"),
        n_head=n_head,
        n_head_kv=n_head_kv,
        n_embd_head=head,
        n_vocab=fields.integer("vocab_size", high=MAX_VOCAB),
        n_ctx_train=fields.integer("max_position_embeddings", high=1 << 30),
        rms_norm_eps=fields.real("rms_norm_eps", 1e-12, 1.0),
        rope_freq_base=_Fields(rope, str(path), CheckpointError).real("rope_theta", 1.0, 1e12),
        rope_scaling=_rope_scaling(rope, path),
    )


def _rope_parameters(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The rope fields of either layout, as transformers 5 names them."""
    found: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        value = config.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise CheckpointError(f"{path}: {name} is {reprlib.repr(value)}, an object or null is expected")
        found.update(value or {})
    full = found.get("full_attention", found)
    if not isinstance(full, Mapping):
        raise CheckpointError(f"{path}: rope_parameters.full_attention is {reprlib.repr(full)}, an object is expected")
    found = dict(full)
    found.setdefault("rope_type", found.get("type", "default"))
    if "rope_theta" not in found:
        if "rope_theta" not in config:
            raise CheckpointError(
                f"{path}: rope_theta is missing, here and in rope_parameters; take config.json from the model's repository"
            )
        found["rope_theta"] = config["rope_theta"]
    if found.get("original_max_position_embeddings") is None:  # transformers: what the model was trained for, then
        names = ("original_max_position_embeddings", "max_position_embeddings")
        found["original_max_position_embeddings"] = next((config[name] for name in names if config.get(name)), None)
    part = found.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if part not in (None, 1):
        raise CheckpointError(
            f"{path}: partial_rotary_factor is {reprlib.repr(part)}; llama.cpp turns whole heads in this family, 1 is expected"
        )
    return found


def _rope_scaling(rope: Mapping[str, Any], path: Path) -> RopeScaling | None:
    kind = rope["rope_type"]
    if kind in ("default", None):
        return None
    if kind not in ("yarn", "linear"):
        raise CheckpointError(f"{path}: rope_type is {reprlib.repr(kind)}; default, linear and yarn can be converted")
    fields = _Fields(rope, str(path), CheckpointError)
    factor = fields.real("factor", 1.0, 1024.0)
    if kind == "linear":
        return RopeScaling(kind, factor)
    names = {
        "extrapolation_factor": "yarn_ext_factor",
        "attention_factor" if "attention_factor" in rope else "attn_factor": "yarn_attn_factor",
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
    }
    yarn = {ours: fields.real(name, 0.0, 1e6) for name, ours in names.items() if rope.get(name) is not None}
    return RopeScaling(kind, factor, fields.integer("original_max_position_embeddings", high=1 << 30), yarn)


def from_header(header: Header) -> ModelShape:
    """Shape of a text model in GGUF, any architecture with the usual keys.

    What llama.cpp asserts of a header, and would end the process for, is checked here.
    Raises: FormatError naming file and key.
    Source: llama.cpp src/llama-model.cpp (load_hparams), src/llama-vocab.cpp (impl::load), src/models
    """
    arch = header.text("general.architecture")
    _check_kind(header, arch)
    if arch is None:
        raise FormatError(f"{header.path}: general.architecture is missing; this is no model file")
    prefix = f"{arch}."
    short = {key.removeprefix(prefix): value for key, value in header.keys.items() if key.startswith(prefix)}
    fields = _Fields(short, f"{header.path} ({arch}.*)", FormatError)
    n_layer, n_embd = fields.integer("block_count", high=MAX_LAYERS), fields.integer("embedding_length")
    heads = _first(short, "attention.head_count")
    if heads is None and arch not in WITHOUT_HEADS:  # llama.cpp divides by it
        found = reprlib.repr(short["attention.head_count"]) if "attention.head_count" in short else "missing"
        raise fields.fail("attention.head_count", f"is {found}, a number above 0 is expected")
    n_head = heads or n_embd
    n_head_kv = _first(short, "attention.head_count_kv") or n_head
    head = fields.integer("attention.key_length", default=max(1, n_embd // n_head), high=1 << 16)
    value = _first(short, "attention.value_length") or max(1, n_embd // n_head)
    if arch in _ONE_HEAD_SIZE:
        _check_heads(fields, short, arch, n_embd, n_head, n_head_kv, head)
    _check_experts(fields, short, arch, n_layer)
    _check_finite(fields, short)
    _check_rope_and_norm(fields, short)
    tokens = header.keys.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        _check_tokens(tokens, header.path)
    embedding = next((tensor for tensor in header.tensors if tensor.name == "token_embd.weight"), None)
    rows = embedding.shape[-1] if embedding else len(tokens) if isinstance(tokens, list) else 0
    return ModelShape(
        arch=arch,
        n_layer=n_layer,
        n_embd=n_embd,
        n_ff=_first(short, "feed_forward_length") or 0,
        n_head=n_head,
        n_head_kv=n_head_kv,
        n_embd_head=head,
        n_vocab=rows,
        n_ctx_train=fields.integer("context_length", high=1 << 30),
        rms_norm_eps=fields.real("attention.layer_norm_rms_epsilon", 1e-12, 1.0, default=1e-5),
        rope_freq_base=fields.real("rope.freq_base", 1.0, 1e12, default=10_000.0),
        n_embd_head_v=0 if value == head else value,
    )


def _check_kind(header: Header, arch: str | None) -> None:
    """That the file is a model, not a part of one or something beside it."""
    kind = header.text("general.type")
    words = {
        "adapter": "a LoRA adapter, the change to a model and no model; merge it into its base model (peft: merge_and_unload,"
        " save_pretrained) and convert the result",
        "mmproj": "the part of a model that reads images or sound (mmproj), no text model; name the model's own file",
        "imatrix": "an importance matrix, no model; it is an option of a conversion: qwq-lite convert --imatrix",
    }
    if arch == "clip":
        kind = "mmproj"
    if kind in words:
        raise FormatError(f"{header.path}: is {words[kind]}")


def _check_heads(
    fields: _Fields, short: Mapping[str, Any], arch: str, n_embd: int, n_head: int, n_head_kv: int, head: int
) -> None:
    """Heads of one size for keys, values and positions, the same number in every layer."""
    for name in ("attention.head_count", "attention.head_count_kv"):
        value = short.get(name, n_head)
        if isinstance(value, list) and value and min(value) == max(value):
            value = value[0]
        if not arguments.is_whole(value, 1):
            raise fields.fail(name, f"is {reprlib.repr(value)}, one number above 0 is expected for all layers")
    if n_head % n_head_kv:
        raise fields.fail("attention.head_count", f"is {n_head}, which does not divide by head_count_kv {n_head_kv}")
    if n_embd % n_head and ("attention.key_length" not in short or arch in _HEADS_FILL_EMBEDDING):
        raise fields.fail("embedding_length", f"is {n_embd}, which does not divide by head_count {n_head}")
    if arch in _HEADS_FILL_EMBEDDING and head * n_head != n_embd:
        raise fields.fail(
            "attention.key_length", f"is {head}, {n_embd // n_head} is expected ({n_embd} / {n_head} heads)"
        )
    if head % 2:
        raise fields.fail("attention.key_length", f"is {head}, rotary positions need an even number")
    for name, default in (("attention.value_length", n_embd // n_head), ("rope.dimension_count", head)):
        size = fields.integer(name, default=max(1, default))
        if size != head:
            raise fields.fail(name, f"is {size}, {head} is expected: the size of a head's keys")


def _check_finite(fields: _Fields, short: Mapping[str, Any]) -> None:
    """No number of the model is NaN or infinite: llama.cpp would compute with it, and every logit with that."""
    for name, value in short.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise fields.fail(name, f"is {number}, a finite number is expected; convert the model again")


def _check_rope_and_norm(fields: _Fields, short: Mapping[str, Any]) -> None:
    """Rope scaling and bases, and the epsilon of models whose norm is not RMS."""
    for name in ("rope.scaling.factor", "rope.scale_linear"):
        if short.get(name, 0) != 0:  # which is none
            fields.real(name, 1e-3, 1e6)
    fields.real("rope.freq_base_swa", 1.0, 1e12, default=10_000.0)
    scaling = short.get("rope.scaling.type", "linear")
    if scaling not in ROPE_SCALING_TYPES:
        raise fields.fail("rope.scaling.type", f"is {reprlib.repr(scaling)}; known are {', '.join(ROPE_SCALING_TYPES)}")
    fields.real("attention.layer_norm_epsilon", 0.0, 1.0, default=0.0)


def _check_experts(fields: _Fields, short: Mapping[str, Any], arch: str, n_layer: int) -> None:
    """Experts, their groups and the extra prediction layers, in the numbers that llama.cpp asserts for any model."""
    extra = _first(short, "nextn_predict_layers") or 0
    if extra > n_layer:
        raise fields.fail("nextn_predict_layers", f"is {extra}, at most block_count {n_layer} is expected")
    experts, used = _first(short, "expert_count") or 0, _first(short, "expert_used_count") or 0
    groups, groups_used = _first(short, "expert_group_count") or 0, _first(short, "expert_group_used_count") or 0
    if experts <= 1 and arch in ("hunyuan-dense", "hunyuan_vl"):
        experts = used = 0  # as llama.cpp reads them
    if experts > MAX_EXPERTS:
        raise fields.fail("expert_count", f"is {experts}, at most {MAX_EXPERTS} is expected")
    if used > experts or (experts and not used):
        raise fields.fail("expert_used_count", f"is {used} of {experts} experts")
    if groups and groups >= experts:
        raise fields.fail("expert_group_count", f"is {groups}, fewer than expert_count {experts} are expected")
    if groups > 1 and (experts % groups or not 0 < groups_used < groups):
        raise fields.fail("expert_group_count", f"is {groups}, of which {groups_used} are used, for {experts} experts")


def _check_tokens(tokens: list[Any], path: Path) -> None:
    """No two tokens with one text. llama.cpp reads a text up to its first NUL, and names an empty one by its id."""
    ids: dict[str, int] = {}
    for i, token in enumerate(tokens):
        text = (token.partition("\0")[0] if isinstance(token, str) else "") or f"[EMPTY_{i}]"
        first = ids.setdefault(text, i)
        if first != i:
            raise FormatError(
                f"{path}: tokenizer.ggml.tokens holds {reprlib.repr(text)} twice, as tokens {first} and {i}; "
                "each token needs a text of its own: convert the model again"
            )


def _first(short: Mapping[str, Any], name: str) -> int | None:
    """A per-model number, or the largest of a per-layer list."""
    value = short.get(name)
    if isinstance(value, list):
        value = max(value, default=None)
    return value if isinstance(value, int) and value > 0 else None
