"""Names and shapes: what a Qwen2ForCausalLM checkpoint must hold, and what each tensor is called in GGUF.

Layout: HF weight [out, in] -> ggml {in, out}; the bytes are the same, rows stay rows. qwen2 needs no permutation: both
sides keep the two halves of a rotary head apart.
Source: llama.cpp gguf-py/gguf/tensor_mapping.py, src/models/qwen2.cpp
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from qwq_convert.checkpoint.files import Checkpoint, SourceTensor
from qwq_convert.checkpoint.text_files import printable, quote
from qwq_convert.checkpoint.unsupported_files import explain_tensor
from qwq_lite.errors import CheckpointError
from qwq_lite.formats.shape import ModelShape

_LAYER_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_MODEL_PARTS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@dataclass(frozen=True)
class TensorPair:
    """A tensor's source, and its name in GGUF."""

    name: str
    source: SourceTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(reversed(self.source.shape))


def expected_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """GGUF name -> shape in Hugging Face's order, of every tensor but `output.weight`, which may be tied."""
    q, kv = shape.n_head * shape.n_embd_head, shape.n_head_kv * shape.n_embd_head
    per_layer = {
        "attn_norm.weight": (shape.n_embd,),
        "attn_q.weight": (q, shape.n_embd),
        "attn_q.bias": (q,),
        "attn_k.weight": (kv, shape.n_embd),
        "attn_k.bias": (kv,),
        "attn_v.weight": (kv, shape.n_embd),
        "attn_v.bias": (kv,),
        "attn_output.weight": (shape.n_embd, q),
        "ffn_norm.weight": (shape.n_embd,),
        "ffn_gate.weight": (shape.n_ff, shape.n_embd),
        "ffn_up.weight": (shape.n_ff, shape.n_embd),
        "ffn_down.weight": (shape.n_embd, shape.n_ff),
    }
    shapes = {"token_embd.weight": (shape.n_vocab, shape.n_embd), "output_norm.weight": (shape.n_embd,)}
    for i in range(shape.n_layer):
        shapes |= {f"blk.{i}.{name}": value for name, value in per_layer.items()}
    return shapes


def gguf_name(name: str) -> str | None:
    """GGUF's name for a Hugging Face name; None for a tensor that is not part of this family."""
    module, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if module in _MODEL_PARTS:
        return f"{_MODEL_PARTS[module]}.{kind}"
    match = re.fullmatch(r"model\.layers\.(0|[1-9]\d{0,3})\.(.+)", module)
    if match is None or match[2] not in _LAYER_PARTS:
        return None
    return f"blk.{match[1]}.{_LAYER_PARTS[match[2]]}.{kind}"


def pair(checkpoint: Checkpoint, shape: ModelShape) -> list[TensorPair]:
    """Every tensor of the checkpoint with its GGUF name, in llama.cpp's order: by layer, then by name.

    The tensors that are there decide whether the embedding is tied; where the flag in config.json says otherwise there is
    a notice.
    Raises: CheckpointError when a tensor is missing, unknown, or of a shape that config.json does not give it.
    """
    expected = expected_shapes(shape)
    pairs: dict[str, TensorPair] = {}
    for name, tensor in checkpoint.tensors.items():
        ours = gguf_name(name)
        if ours == "output.weight":
            expected[ours] = (shape.n_vocab, shape.n_embd)
        if ours is None and (said := explain_tensor(name)):
            raise CheckpointError(f"{checkpoint.folder / tensor.file}: tensor {printable(name)} {said}")
        if ours is None or ours not in expected:
            raise CheckpointError(
                f"{checkpoint.folder / tensor.file}: tensor {printable(name)} does not belong to a Qwen2ForCausalLM"
                f" of {shape.n_layer} layers; config.json and shards do not match, fetch both again"
            )
        if tensor.shape != expected[ours]:
            raise CheckpointError(
                f"{checkpoint.folder / tensor.file}: tensor {name} has shape {quote(list(tensor.shape))},"
                f" config.json asks for {list(expected[ours])}; fetch both again"
            )
        pairs[ours] = TensorPair(ours, tensor)
    _check_complete(checkpoint, expected, pairs)
    return [pairs[name] for name in sorted(pairs, key=_order)]


def _check_complete(checkpoint: Checkpoint, expected: Mapping[str, object], pairs: Mapping[str, object]) -> None:
    missing = [name for name in expected if name not in pairs]
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder}: {len(missing)} of {len(expected)} tensors are missing, the first is {missing[0]}"
            " (GGUF's name); fetch the shards again"
        )
    _check_tied(checkpoint, "output.weight" not in pairs)


def _check_tied(checkpoint: Checkpoint, tied: bool) -> None:
    path, flag = checkpoint.folder / "config.json", checkpoint.config.get("tie_word_embeddings")
    if flag is not None and not isinstance(flag, bool):
        raise CheckpointError(f"{path}: tie_word_embeddings is {quote(flag)}, true or false is expected")
    if tied and flag is False:
        raise CheckpointError(
            f"{checkpoint.folder}: lm_head.weight is missing, and config.json (tie_word_embeddings: false) needs it;"
            " fetch the shards again"
        )
    if tied and flag is None:
        checkpoint.notice(
            f"{path}: tie_word_embeddings is not there, nor is lm_head.weight: the embedding will be the output layer too"
        )
    if not tied and flag:
        checkpoint.notice(
            f"{path}: tie_word_embeddings is true, but the shards have an lm_head.weight of their own: it is kept, as the"
            " output layer"
        )


def _order(name: str) -> tuple[int, str]:
    match = re.match(r"blk\.(\d+)\.", name)
    return (int(match[1]) if match else -1, name)
