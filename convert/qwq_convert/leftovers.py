"""What a folder holds in place of a model's own files, or beside them, and what to do with that. Knows no weights."""

from __future__ import annotations

from pathlib import Path

from .text_files import is_listed, read_json_object, shown

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def instead(folder: Path) -> str | None:
    """What a folder without a checkpoint's files holds, and what to do with that; None when nothing is recognised."""
    if (found := adapter(folder)) is not None:
        return found
    if (gguf := min(folder.glob("*.gguf"), default=None)) is not None:
        return f"it holds GGUF files, which run as they are: qwq-lite chat {gguf}"
    pickles = [path for suffix in ("bin", "pt", "pth", "ckpt") for path in folder.glob(f"*.{suffix}")]
    if pickles:
        return (
            f"{min(pickles).name} is a pickle, which can run code and is never opened: take a version of the model"
            " with *.safetensors"
        )
    return None


def adapter(folder: Path) -> str | None:
    """What to do with a folder that holds an adapter (LoRA), or None when it holds none."""
    name = next((name for name in ADAPTER_FILES if is_listed(folder / name)), None)
    if name is None:
        return None
    base = None
    if is_listed(folder / ADAPTER_FILES[0]):
        base = read_json_object(folder / ADAPTER_FILES[0]).get("base_model_name_or_path")
    onto = shown(base) if isinstance(base, str) and base else "its base model"
    return (
        f"{name} belongs to an adapter, which is only the change to a model: merge it into {onto} first"
        " (peft: merge_and_unload, save_pretrained) and convert the result"
    )
