"""A checkpoint of QwQ-32B-Preview's geometry with few layers and random weights: what a converter is timed on.

Every size but the number of layers is QwQ's: 2 layers with all rows are 5.06 GB of BF16. `narrow` divides columns and heads by
2 or 4, for trying a bench. The vocabulary is Qwen's own; with fewer rows it is its beginning, which is whole in itself
because a merge makes a token of higher rank than its two parts, and which llama.cpp's converter does not know.

Weights are Gaussian × 0.02, norms lie near 1. All come from one block of 67 million values, in which each tensor begins at
another place: kernels see no difference, and the writing takes no more memory than the block. Knows no converter.

    python bench/measure/qwq_checkpoint.py FOLDER [--layers 2] [--rows 152064] [--narrow 1]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "convert")]

from qwq_lite.formats.shape import ModelShape  # noqa: E402
from qwq_lite.store import catalog  # noqa: E402
from scripts.checkpoint_files import (  # noqa: E402
    INDEX,
    is_complete,
    round_to_bf16,
    tokenizer_config,
    tokenizer_json,
    write_json,
)
from tests.oracle import QWEN_CONTROL, QWEN_TEMPLATE, qwen_tokenizer_json  # noqa: E402

Bits = npt.NDArray[np.uint16]

QWQ = catalog.geometry("qwq-32b-preview")[1]
BLOCK_VALUES = 67_108_859  # the largest prime below 2 ** 26: rows of a tensor that is longer do not repeat in step
_DRAWN_AT_ONCE = 1 << 20
_SCALE = 0.02


@dataclass(frozen=True)
class Weight:
    """A tensor of the checkpoint, HF [out, in]."""

    name: str
    shape: tuple[int, ...]

    @property
    def n_values(self) -> int:
        return math.prod(self.shape)


def geometry(n_layer: int = 2, n_rows: int = QWQ.n_vocab, narrow: int = 1) -> ModelShape:
    """QwQ's shape with another depth, number of rows and width.

    Raises: ValueError for a width that is no whole number of heads, or rows that do not hold the byte symbols.
    """
    if narrow not in (1, 2, 4) or n_layer < 1 or not 512 <= n_rows <= QWQ.n_vocab:
        raise ValueError(f"narrow is 1, 2 or 4, layers at least 1, rows 512 to {QWQ.n_vocab}")
    sizes = {name: getattr(QWQ, name) // narrow for name in ("n_embd", "n_ff", "n_head", "n_head_kv")}
    return replace(QWQ, n_layer=n_layer, n_vocab=n_rows, **sizes)


def shards(shape: ModelShape) -> list[list[Weight]]:
    """The tensors in the network's order: the embedding, each layer, and the head have a shard of their own."""
    hidden, q, kv = shape.n_embd, shape.n_head * shape.n_embd_head, shape.n_head_kv * shape.n_embd_head
    parts: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.q_proj.bias": (q,),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.weight": (hidden, q),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (shape.n_ff, hidden),
        "mlp.up_proj.weight": (shape.n_ff, hidden),
        "mlp.down_proj.weight": (hidden, shape.n_ff),
    }
    layers = [[Weight(f"model.layers.{n}.{part}", size) for part, size in parts.items()] for n in range(shape.n_layer)]
    rows = (shape.n_vocab, hidden)
    last = [Weight("model.norm.weight", (hidden,)), Weight("lm_head.weight", rows)]
    return [[Weight("model.embed_tokens.weight", rows)], *layers, last]


def gaussian_block(n_values: int = BLOCK_VALUES, seed: int = 0) -> Bits:
    """BF16 bits of Gaussian values × 0.02."""
    source, block = np.random.default_rng(seed), np.empty(n_values, "<u2")
    for start in range(0, n_values, _DRAWN_AT_ONCE):
        piece = block[start : start + _DRAWN_AT_ONCE]
        piece[:] = round_to_bf16(_SCALE * source.standard_normal(piece.size, dtype=np.float32))
    return block


def pieces(weight: Weight, block: Bits, number: int) -> Iterator[Bits]:
    """The tensor's values, in order, as views of the block. number: the tensor's own, from which its place follows."""
    if "norm" in weight.name:
        near_one = 1 + _SCALE * np.random.default_rng(number).standard_normal(weight.n_values, dtype=np.float32)
        yield round_to_bf16(near_one)
        return
    at, left = number * 1_000_003 % block.size, weight.n_values
    while left:
        piece = block[at : at + left]
        yield piece
        at, left = 0, left - piece.size


def write_shard(path: Path, weights: Sequence[Weight], block: Bits, first_number: int) -> None:
    """One safetensors file: u64 length of the header, header in JSON, data without gaps.

    Written here because `scripts.checkpoint_files` holds a whole tensor as F32. Layout: safetensors' README, "Format".
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for weight in weights:
        begin, end = end, end + 2 * weight.n_values
        header[weight.name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, weight in enumerate(weights, start=first_number):
            for piece in pieces(weight, block, number):
                file.write(piece.data)
        file.flush()
        os.fsync(file.fileno())  # or the disk would be at work while the first round is measured


def write_weights(folder: Path, shape: ModelShape) -> None:
    """model-0000i-of-0000n.safetensors and their index."""
    block, planned, number = gaussian_block(), shards(shape), 0
    weight_map: dict[str, str] = {}
    for i, weights in enumerate(planned, start=1):
        name = f"model-{i:05}-of-{len(planned):05}.safetensors"
        write_shard(folder / name, weights, block, number)
        number += len(weights)
        weight_map |= {weight.name: name for weight in weights}
    total = sum(2 * weight.n_values for weights in planned for weight in weights)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def config(shape: ModelShape, n_tokens: int) -> dict[str, object]:
    """config.json as QwQ-32B-Preview has it."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": n_tokens - 3,
        "eos_token_id": n_tokens - 1,
        "hidden_act": "silu",
        "hidden_size": shape.n_embd,
        "initializer_range": _SCALE,
        "intermediate_size": shape.n_ff,
        "max_position_embeddings": shape.n_ctx_train,
        "max_window_layers": 64,
        "model_type": "qwen2",
        "num_attention_heads": shape.n_head,
        "num_hidden_layers": shape.n_layer,
        "num_key_value_heads": shape.n_head_kv,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_freq_base,
        "sliding_window": shape.n_ctx_train,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.n_vocab,
    }


def write_tokenizer(folder: Path, shape: ModelShape) -> int:
    """Qwen's tokenizer, or as much of its beginning as the rows hold, and the three control tokens; returns how many tokens."""
    whole = json.loads(qwen_tokenizer_json().read_text("utf-8"))["model"]
    n_plain = min(len(whole["vocab"]), shape.n_vocab - len(QWEN_CONTROL))
    tokens = [token for token, number in sorted(whole["vocab"].items(), key=lambda item: item[1]) if number < n_plain]
    control = {n_plain + n: text for n, text in enumerate(QWEN_CONTROL.values())}
    merges = whole["merges"][: n_plain - 256]  # the first 256 tokens are the bytes
    write_json(folder / "tokenizer.json", tokenizer_json(tokens, merges, control))
    words = tokenizer_config(control, template=QWEN_TEMPLATE, n_ctx=shape.n_ctx_train)
    write_json(folder / "tokenizer_config.json", words)
    return n_plain + len(control)


def make(folder: Path, shape: ModelShape) -> bool:
    """Write the checkpoint unless it is there, the index last; whether there was anything to do.

    Raises: OSError. Where Qwen's vocabulary cannot be had, what tests.oracle raises.
    """
    if is_complete(folder):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    n_tokens = write_tokenizer(folder, shape)
    write_json(folder / "config.json", config(shape, n_tokens))
    end = {"bos_token_id": n_tokens - 3, "eos_token_id": [n_tokens - 1, n_tokens - 3], "pad_token_id": n_tokens - 3}
    write_json(folder / "generation_config.json", {**end, "do_sample": True, "temperature": 0.7, "top_k": 20})
    write_weights(folder, shape)
    return True


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=QWQ.n_vocab, help="of the embedding and of the head")
    parser.add_argument("--narrow", type=int, default=1, help="divide columns and heads by 1, 2 or 4")
    options = parser.parse_args()
    made = make(options.folder, geometry(options.layers, options.rows, options.narrow))
    note = "written" if made else "complete already"
    print(f"{options.folder}: {weight_bytes(options.folder) / 1e9:.2f} GB, {note}")


if __name__ == "__main__":
    main()
