"""The files of a Hugging Face checkpoint in QwQ's layout: bfloat16 shards, their index, tokenizer files.

What `scripts/demo_checkpoint.py` and `tests/checkpoints.py` write with. Written here because safetensors' numpy
interface has no bfloat16, and apart from `qwq_convert`, which reads these files and is tested with them.
It knows no model: names, shapes and values come from the caller.

Layouts: safetensors' README, "Format"; tokenizer.json and tokenizer_config.json as Qwen publishes them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

INDEX = "model.safetensors.index.json"
JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
END_OF_TURN, END_OF_TEXT = "<|im_end|>", "<|endoftext|>"
NONE: Mapping[int, str] = {}
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Floats = npt.NDArray[np.float32]


def round_to_bf16(values: Floats) -> npt.NDArray[np.uint16]:
    """The bfloat16 bits nearest to each float32, ties to even; NaN stays NaN, made quiet."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    rounded: npt.NDArray[np.uint16] = np.where(np.isnan(values), (bits >> 16) | np.uint32(0x40), nearest).astype("<u2")
    return rounded


ENCODERS: Mapping[str, Callable[[Floats], npt.NDArray[Any]]] = {
    "BF16": round_to_bf16,
    "F16": lambda values: values.astype("<f2"),
    "F32": lambda values: values.astype("<f4"),
}


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint, HF [out, in]; its values are made when its turn to be written comes."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # a key of ENCODERS
    values: Callable[[], Floats]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * (4 if self.dtype == "F32" else 2)


def write_safetensors(path: Path, tensors: Sequence[Tensor]) -> None:
    """Write one file: u64 length of the header, header in JSON padded with spaces to 8 bytes, data without gaps.

    Written here because safetensors' numpy interface has no bfloat16.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.n_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            values = tensor.values()
            assert values.shape == tensor.shape, f"{tensor.name} is {values.shape}, announced as {tensor.shape}"
            file.write(ENCODERS[tensor.dtype](values).tobytes())
        file.flush()
        os.fsync(file.fileno())


def plan_shards(tensors: Iterable[Tensor], shard_bytes: int) -> list[list[Tensor]]:
    """Tensors in their order, cut before the one that would make a shard larger than shard_bytes."""
    shards: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.n_bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.n_bytes
    return shards


def write_shards(folder: Path, shards: Sequence[Sequence[Tensor]]) -> None:
    """Write model-0000i-of-0000n.safetensors and the index that says where each tensor is."""
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, tensors)
        weight_map |= {tensor.name: name for tensor in tensors}
    total = sum(tensor.n_bytes for tensors in shards for tensor in tensors)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def write_json(path: Path, value: object) -> None:
    """Write UTF-8 JSON as the Hub's files have it, with a newline at the end."""
    path.write_bytes((json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode())


def shard_is_complete(path: Path, names: set[str]) -> bool:
    """Whether a shard holds these tensors and is as long as its header says."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            return False
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    end = max(entry["data_offsets"][1] for entry in header.values())
    return set(header) == names and path.stat().st_size == 8 + length + int(end)


def is_complete(folder: Path) -> bool:
    """Whether folder holds a whole checkpoint: each file there, each shard of the size its header asks for.

    Only headers are read: a flipped bit among the weights goes unseen.
    """
    try:
        for name in JSON_FILES:
            json.loads((folder / name).read_bytes())
        shards: dict[str, set[str]] = {}
        for tensor, shard in json.loads((folder / INDEX).read_bytes())["weight_map"].items():
            shards.setdefault(shard, set()).add(tensor)
        return bool(shards) and all(shard_is_complete(folder / name, held) for name, held in shards.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def byte_symbols() -> list[str]:
    """The printable character that stands for each of the 256 bytes. Source: GPT-2 encoder.py `bytes_to_unicode`"""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def tokenizer_json(
    tokens: Sequence[str], merges: Sequence[object], control: Mapping[int, str], ordinary: Mapping[int, str] = NONE
) -> dict[str, Any]:
    """tokenizer.json as Qwen2 has it: NFC, Qwen2's split, byte-level BPE.

    Args: tokens by id, in byte symbols; merges, strongest first, as "left right" or, as newer files have them,
    ["left", "right"]; the added tokens by id, control ones and those that are `"special": false`.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": False}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {token: token_id for token_id, token in enumerate(tokens)},
        "merges": list(merges),
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": key, **token} for key, token in added_tokens(control, ordinary).items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": model,
    }


def added_tokens(control: Mapping[int, str], ordinary: Mapping[int, str] = NONE) -> dict[int, dict[str, Any]]:
    """Added tokens by id, as tokenizer.json and tokenizer_config.json describe them."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    texts = sorted({**control, **ordinary}.items())
    return {token_id: {"content": text, **flags, "special": token_id in control} for token_id, text in texts}


def tokenizer_config(
    control: Mapping[int, str], ordinary: Mapping[int, str] = NONE, *, template: str, n_ctx: int
) -> dict[str, Any]:
    """tokenizer_config.json as QwQ has it; n_ctx in tokens."""
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(key): token for key, token in added_tokens(control, ordinary).items()},
        "additional_special_tokens": ["<|im_start|>", END_OF_TURN],
        "bos_token": None,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TURN,
        "errors": "replace",
        "model_max_length": n_ctx,
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
