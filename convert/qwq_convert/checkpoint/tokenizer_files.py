"""A tokenizer's parts: from tokenizer.json, or from vocab.json and merges.txt as transformers builds one. Knows no rows.

Source: transformers convert_slow_tokenizer.py (Qwen2Converter), models/qwen2/tokenization_qwen2.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwq_convert.checkpoint.files import Checkpoint
from qwq_convert.checkpoint.text_files import quote
from qwq_lite.errors import CheckpointError

QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WHOLE, _VOCAB, _MERGES = "tokenizer.json", "vocab.json", "merges.txt"
_CLASSES = (
    None,
    "Qwen2Tokenizer",
    "Qwen2TokenizerFast",
)  # of tokenizer_config.json; None: config.json's family decides
_END_OF_TEXT = "<|endoftext|>"  # the special token of these classes where no file names one


@dataclass(frozen=True)
class TokenizerFiles:
    """The parts of a tokenizer and where they stand."""

    parts: Mapping[str, Any]  # as tokenizer.json holds them
    whole: Path | None  # tokenizer.json, where the folder has it
    vocab: Path  # the file that holds the vocabulary
    merges: Path


def read(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> TokenizerFiles:
    """The tokenizer of a checkpoint. settings: tokenizer_config.json. Raises: CheckpointError naming the file."""
    path = checkpoint.folder / _WHOLE
    parts = checkpoint.json(_WHOLE)
    if parts is not None:
        return TokenizerFiles(parts, path, path, path)
    there = [name for name in (_VOCAB, _MERGES) if checkpoint.has(name)]
    if not there:
        raise CheckpointError(f"{path}: is missing; fetch it from the model's repository")
    vocab, merges = checkpoint.json(_VOCAB), checkpoint.text(_MERGES)
    if vocab is None or merges is None:
        lacks = _MERGES if vocab is not None else _VOCAB
        raise CheckpointError(
            f"{checkpoint.folder / lacks}: is missing, and {there[0]} alone is no tokenizer; fetch it, or {_WHOLE}, from the"
            " model's repository"
        )
    if (found := settings.get("tokenizer_class")) not in _CLASSES:
        raise CheckpointError(
            f"{checkpoint.folder / 'tokenizer_config.json'}: tokenizer_class is {quote(found)}; without {_WHOLE} only"
            f" {_CLASSES[1]} is known: fetch {_WHOLE} from the model's repository"
        )
    parts = _as_whole(vocab, merges)
    numbered = settings.get("added_tokens_decoder") is not None or checkpoint.has("added_tokens.json")
    if not numbered and _END_OF_TEXT not in vocab:
        parts["added_tokens"] = [{"id": len(vocab), "content": _END_OF_TEXT, "special": True}]
    return TokenizerFiles(parts, None, checkpoint.folder / _VOCAB, checkpoint.folder / _MERGES)


def _as_whole(vocab: dict[str, Any], merges: str) -> dict[str, Any]:
    """What tokenizer.json holds of the same tokenizer. merges: a version, then two pieces a line."""
    lines = [line.strip() for line in merges.split("\n")]
    if lines[0].startswith("#version"):
        del lines[0]
    split = {"type": "Split", "pattern": {"Regex": QWEN2_REGEX}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "model": {"type": "BPE", "vocab": vocab, "merges": [line for line in lines if line]},
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,  # tokenizer_config.json says which ends are put
        "added_tokens": [],
    }
