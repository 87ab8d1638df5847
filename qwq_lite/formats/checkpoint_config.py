"""The shape of a checkpoint that is not converted yet, from config.json and the index of its shards. Reads no tensor.

`convert` reads the same files again, and refuses much more: `qwq_convert.checkpoint`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwq_lite.errors import CheckpointError
from qwq_lite.formats import not_a_model, shape
from qwq_lite.formats.shape import ModelShape

_ARCHITECTURE = "Qwen2ForCausalLM"


def read(folder: Path) -> tuple[ModelShape, bool]:
    """The shape, and whether the output layer is the embedding (tied).

    Raises: CheckpointError for a folder without a config.json, and for one of another model.
    """
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise CheckpointError(f"{folder}: {_explain_missing_config(folder)}")
    config = _read_json(config_path)
    names = _listed_tensors(folder / "model.safetensors.index.json")
    if not isinstance(config, dict) or config.get("architectures") != [_ARCHITECTURE]:
        found = config.get("architectures") if isinstance(config, dict) else config
        raise CheckpointError(f"{config_path}: architectures is {found!r}; {_ARCHITECTURE} can be planned")
    tied = "lm_head.weight" not in names if names is not None else bool(config.get("tie_word_embeddings", False))
    return shape.from_config(config, config_path), tied


def _explain_missing_config(folder: Path) -> str:
    inside = not_a_model.find_snapshot(folder)
    models = not_a_model.find_gguf_files(inside or folder)
    if models:
        return f"is no checkpoint but a folder; name the file in it: {models[0]}"
    if inside is not None:
        return f"is a folder of the Hub's cache; name the one with the files: {inside}"
    return "has no config.json, which a checkpoint has; name a GGUF file, or a folder with one"


def _listed_tensors(index: Path) -> dict[str, Any] | None:
    """The index's names of tensors, None for a checkpoint of one file, which has no index."""
    if not index.is_file():
        return None
    listed = _read_json(index)
    if not (isinstance(listed, dict) and "weight_map" in listed):
        raise CheckpointError(f"{index}: has no weight_map, which an index has; fetch it again")
    names = listed["weight_map"]
    if not isinstance(names, dict):
        raise CheckpointError(f"{index}: weight_map is {names!r}, an object is expected")
    return names


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except RecursionError as error:
        raise CheckpointError(f"{path}: is nested too deeply; fetch it again") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}; fetch it again") from error
