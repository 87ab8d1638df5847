"""Tiny random files of other architectures than QwQ's, F32, with the tokenizer of the tiny model.

    path = write_model(tmp_path / "mamba.gguf", tiny_gguf, MAMBA)

The most likely token never ends the turn or the thought: the rows of these tokens in the output are zero. One that echoes
says its last token again for ever.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter
from gguf.constants import GGUFValueType

from qwq_lite.formats import gguf_header

Number = int | float | list[int]
N_EMBD = 64
N_CTX = 4096


@dataclass(frozen=True)
class Architecture:
    """keys: without the architecture's name before them. layers: the tensors of each layer, their shapes in ggml's order."""

    name: str
    keys: Mapping[str, Number]
    layers: tuple[Mapping[str, tuple[int, ...]], ...]
    norm: str = "output_norm.weight"


def transformer(
    name: str, head_k: int, head_v: int | None = None, n_head: int = 2, **more: tuple[int, ...]
) -> Architecture:
    """Two layers of attention with heads of these sizes."""
    head_v = head_v or head_k
    layer = {
        "attn_norm.weight": (N_EMBD,),
        "attn_q.weight": (N_EMBD, n_head * head_k),
        "attn_k.weight": (N_EMBD, n_head * head_k),
        "attn_v.weight": (N_EMBD, n_head * head_v),
        "attn_output.weight": (n_head * head_v, N_EMBD),
        **_FFN,
        **more,
    }
    keys: dict[str, Number] = {
        "attention.head_count": n_head,
        "attention.key_length": head_k,
        "attention.value_length": head_v,
        "rope.dimension_count": head_k,
    }
    return Architecture(name, keys, (layer, layer))


_FFN: Mapping[str, tuple[int, ...]] = {
    "ffn_norm.weight": (N_EMBD,),
    "ffn_gate.weight": (N_EMBD, 128),
    "ffn_up.weight": (N_EMBD, 128),
    "ffn_down.weight": (128, N_EMBD),
}
_MAMBA: Mapping[str, tuple[int, ...]] = {
    "attn_norm.weight": (N_EMBD,),
    "ssm_in.weight": (N_EMBD, 256),
    "ssm_conv1d.weight": (4, 128),
    "ssm_conv1d.bias": (128,),
    "ssm_x.weight": (128, 4 + 2 * 16),
    "ssm_dt.weight": (4, 128),
    "ssm_dt.bias": (128,),
    "ssm_a": (16, 128),
    "ssm_d": (128,),
    "ssm_out.weight": (128, N_EMBD),
}
_MAMBA2: Mapping[str, tuple[int, ...]] = {
    "attn_norm.weight": (N_EMBD,),
    "ssm_in.weight": (N_EMBD, 2 * 128 + 2 * 16 + 4),
    "ssm_conv1d.weight": (4, 128 + 2 * 16),
    "ssm_conv1d.bias": (128 + 2 * 16,),
    "ssm_dt.bias": (4,),
    "ssm_a": (1, 4),
    "ssm_d": (1, 4),
    "ssm_norm.weight": (128, 1),
    "ssm_out.weight": (128, N_EMBD),
}
_STATE: Mapping[str, Number] = {"ssm.conv_kernel": 4, "ssm.inner_size": 128, "ssm.state_size": 16}
MAMBA = Architecture("mamba", {**_STATE, "ssm.time_step_rank": 4}, (_MAMBA, _MAMBA))
MAMBA2 = Architecture("mamba2", {**_STATE, "ssm.time_step_rank": 4, "ssm.group_count": 1}, (_MAMBA2, _MAMBA2))
LFM2 = Architecture(
    "lfm2",
    {"attention.head_count": 2, "attention.head_count_kv": [0, 1], "shortconv.l_cache": 3},
    (
        {
            "attn_norm.weight": (N_EMBD,),
            "shortconv.conv.weight": (3, N_EMBD),
            "shortconv.in_proj.weight": (N_EMBD, 3 * N_EMBD),
            "shortconv.out_proj.weight": (N_EMBD, N_EMBD),
            **_FFN,
        },
        {
            "attn_norm.weight": (N_EMBD,),
            "attn_q_norm.weight": (32,),
            "attn_k_norm.weight": (32,),
            "attn_q.weight": (N_EMBD, N_EMBD),
            "attn_k.weight": (N_EMBD, 32),
            "attn_v.weight": (N_EMBD, 32),
            "attn_output.weight": (N_EMBD, N_EMBD),
            **_FFN,
        },
    ),
    norm="token_embd_norm.weight",
)


def write_model(path: Path, tokenizer: Path, made: Architecture, *, echo: bool = False, template: bool = True) -> Path:
    """tokenizer: a file whose tokenizer the new one has. Returns path."""
    writer = GGUFWriter(path, made.name)
    general: dict[str, Number] = {
        "block_count": len(made.layers),
        "context_length": N_CTX,
        "embedding_length": N_EMBD,
        "feed_forward_length": 128,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.layer_norm_epsilon": 1e-5,
        "rope.freq_base": 1e4,
    }
    for name, value in {**general, **made.keys}.items():
        key = f"{made.name}.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    keys = gguf_header.read(tokenizer).keys
    for name, words in keys.items():
        if name.startswith("tokenizer.") and (template or "chat_template" not in name):
            _add(writer, name, words)
    tokens = keys["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    silent = [number for number, token in enumerate(tokens) if str(token).startswith(("<|", "<think", "</think"))]
    shapes = {"token_embd.weight": (N_EMBD, len(tokens)), made.norm: (N_EMBD,)}
    for number, layer in enumerate(made.layers):
        shapes |= {f"blk.{number}.{name}": shape for name, shape in layer.items()}
    for name, shape in shapes.items():
        writer.add_tensor(name, _values(name, shape, 1e-3 if echo else 0.125))
    output = _values("token_embd.weight" if echo else "output.weight", (N_EMBD, len(tokens)), 1)
    output[silent] = 0
    writer.add_tensor("output.weight", output)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _values(name: str, shape: tuple[int, ...], scale: float) -> npt.NDArray[np.float32]:
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape[::-1])
    if "norm" in name:
        values = 1 + values / 50
    elif name.endswith("ssm_a"):
        values = -np.abs(values)
    elif not name.startswith("token_embd"):
        values *= scale
    return values.astype(np.float32)


def _add(writer: GGUFWriter, name: str, value: gguf_header.Value) -> None:
    if isinstance(value, list):
        writer.add_array(name, value)
    elif isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    else:
        writer.add_key_value(name, value, GGUFValueType.STRING)
