"""The geometry of a model, from a GGUF header or from a checkpoint's config.json. Knows no bytes.

config.json comes in two layouts: transformers 4 has `rope_theta` and `rope_scaling` at the top, transformers 5 has both
in `rope_parameters`. Reading the old places only would give llama.cpp's default base of 10,000: garbage without an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwq_lite.errors import CheckpointError, FormatError, QwqError
from qwq_lite.gguf_header import Header

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_DIM = 1 << 24  # far above any model, far below what overflows a product of two


@dataclass(frozen=True)
class RopeScaling:
    """How positions past the trained length are mapped: "yarn" or "linear", with llama.cpp's names for the factors."""

    type: str
    factor: float
    original_context_length: int | None = None
    yarn: Mapping[str, float] | None = None  # yarn_ext_factor, yarn_attn_factor, yarn_beta_fast, yarn_beta_slow


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder, in llama.cpp's words.

    n_embd: columns of the hidden state. n_ff: columns of the feed-forward. n_vocab: rows of the embedding, padding included.
    n_head, n_head_kv: query heads and key/value heads of n_embd_head columns each.
    """

    arch: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_embd_head: int
    n_vocab: int
    n_ctx_train: int
    rms_norm_eps: float
    rope_freq_base: float
    rope_scaling: RopeScaling | None = None


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
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
            raise self.fail(name, f"is {value!r}, an integer from 1 to {high} is expected")
        return value

    def real(self, name: str, low: float, high: float, default: float | None = None) -> float:
        value = self._data.get(name, default)
        if value is None:
            raise self.fail(name, f"is missing, a number from {low:g} to {high:g} is expected")
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
            or not math.isfinite(value)
        ):
            raise self.fail(name, f"is {value!r}, a number from {low:g} to {high:g} is expected")
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
    if head % 2:
        raise fields.fail("head_dim", f"is {head}, rotary positions need an even number")
    if config.get("hidden_act", "silu") != "silu":
        raise fields.fail(
            "hidden_act", f"is {config['hidden_act']!r}, 'silu' is expected: this is not a Qwen2 feed-forward"
        )
    rope = _rope_parameters(config, path)
    return ModelShape(
        arch="qwen2",
        n_layer=fields.integer("num_hidden_layers", high=MAX_LAYERS),
        n_embd=n_embd,
        n_ff=fields.integer("intermediate_size"),
        n_head=n_head,
        n_head_kv=n_head_kv,
        n_embd_head=head,
        n_vocab=fields.integer("vocab_size"),
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
            raise CheckpointError(f"{path}: {name} is {value!r}, an object or null is expected")
        found.update(value or {})
    full = found.get("full_attention", found)
    if not isinstance(full, Mapping):
        raise CheckpointError(f"{path}: rope_parameters.full_attention is {full!r}, an object is expected")
    found = dict(full)
    found.setdefault("rope_type", found.get("type", "default"))
    if "rope_theta" not in found:
        if "rope_theta" not in config:
            raise CheckpointError(
                f"{path}: rope_theta is missing, here and in rope_parameters; take config.json from the model's repository"
            )
        found["rope_theta"] = config["rope_theta"]
    found.setdefault("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    return found


def _rope_scaling(rope: Mapping[str, Any], path: Path) -> RopeScaling | None:
    kind = rope["rope_type"]
    if kind in ("default", None):
        return None
    if kind not in ("yarn", "linear"):
        raise CheckpointError(f"{path}: rope_type is {kind!r}; default, linear and yarn can be converted")
    fields = _Fields(rope, str(path), CheckpointError)
    factor = fields.real("factor", 1.0, 1024.0)
    if kind == "linear":
        return RopeScaling(kind, factor)
    names = {
        "extrapolation_factor": "yarn_ext_factor",
        "attention_factor": "yarn_attn_factor",
        "attn_factor": "yarn_attn_factor",
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
    }
    yarn = {ours: fields.real(name, 0.0, 1e6) for name, ours in names.items() if rope.get(name) is not None}
    return RopeScaling(kind, factor, fields.integer("original_max_position_embeddings", high=1 << 30), yarn)


def from_header(header: Header) -> ModelShape:
    """Shape of a text model in GGUF, any architecture with the usual keys.

    Raises: FormatError naming file and key.
    """
    arch = header.text("general.architecture")
    if arch is None:
        raise FormatError(f"{header.path}: general.architecture is missing; this is no model file")
    prefix = f"{arch}."
    short = {key.removeprefix(prefix): value for key, value in header.keys.items() if key.startswith(prefix)}
    fields = _Fields(short, f"{header.path} ({arch}.*)", FormatError)
    n_embd = fields.integer("embedding_length")
    n_head = _first(short, "attention.head_count") or n_embd
    tokens = header.keys.get("tokenizer.ggml.tokens")
    embedding = next((tensor for tensor in header.tensors if tensor.name == "token_embd.weight"), None)
    rows = embedding.shape[-1] if embedding else len(tokens) if isinstance(tokens, list) else 0
    return ModelShape(
        arch=arch,
        n_layer=fields.integer("block_count", high=MAX_LAYERS),
        n_embd=n_embd,
        n_ff=_first(short, "feed_forward_length") or 0,
        n_head=n_head,
        n_head_kv=_first(short, "attention.head_count_kv") or n_head,
        n_embd_head=fields.integer("attention.key_length", default=max(1, n_embd // n_head), high=1 << 16),
        n_vocab=rows,
        n_ctx_train=fields.integer("context_length", high=1 << 30),
        rms_norm_eps=fields.real("attention.layer_norm_rms_epsilon", 1e-12, 1.0, default=1e-5),
        rope_freq_base=fields.real("rope.freq_base", 1.0, 1e12, default=10_000.0),
    )


def _first(short: Mapping[str, Any], name: str) -> int | None:
    """A per-model number, or the largest of a per-layer list."""
    value = short.get(name)
    if isinstance(value, list):
        value = max(value, default=None)
    return value if isinstance(value, int) and value > 0 else None
