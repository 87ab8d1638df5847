"""What a converted file would say of a checkpoint, without its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gguf.constants import LlamaFileType

from qwq_convert import metadata
from qwq_convert.checkpoint import family, tokenizer
from qwq_convert.checkpoint.files import Checkpoint
from qwq_convert.checkpoint.tensors import pair
from qwq_lite.formats.shape import from_config
from scripts.checkpoint_files import write_json


def read(folder: Path, n_params: int = 32_760_000_000) -> tuple[metadata.GgufKeys, list[str]]:
    """The keys of a Q4_K_M of QwQ's size, and what the user is told."""
    with Checkpoint(folder) as checkpoint:
        family.check(checkpoint)
        shape = from_config(checkpoint.config, folder / "config.json")
        pair(checkpoint, shape)
        words = tokenizer.load(checkpoint, shape.n_vocab)
        keys = metadata.keys(checkpoint, shape, words, LlamaFileType.MOSTLY_Q4_K_M, n_params)
        return keys, checkpoint.notices


def values(folder: Path, prefix: str = "", n_params: int = 32_760_000_000) -> dict[str, Any]:
    """Values of the keys with a prefix, by what stands behind it."""
    found = read(folder, n_params)[0]
    return {key.removeprefix(prefix): value for key, (value, _) in found.items() if key.startswith(prefix)}


def change_json(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> Path:
    data = json.loads((folder / name).read_text(encoding="utf-8"))
    change(data)
    write_json(folder / name, data)
    return folder
