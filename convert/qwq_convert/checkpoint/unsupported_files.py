"""What a folder holds in place of a model's own files and tensors, or beside them, and what to do with that. Knows no weights.

Source: llama.cpp conversion/base.py (prepare_tensors); PEFT, TRL, bitsandbytes and torch.compile for the names
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from qwq_convert.checkpoint.text_files import is_listed, printable, read_json_object
from qwq_lite.formats import not_a_model

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Buffers that old checkpoints carry, in any type; what they hold follows from config.json. llama.cpp's converter skips them too.
_BUFFERS = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")
_ORIGINAL = "the weights are quantized already: take the checkpoint that it was made from"
# Names of tensors that no model of the family has -> what they are, and what to do. llama.cpp's converter refuses them too.
_TRACES = {
    r"(.*\.)?(v_head|value_head)\..*": (
        "belongs to the value head of a training by TRL, which writes no text: save the model without it"
        " (trl: model.pretrained_model.save_pretrained) and convert the result"
    ),
    r"(score|classifier)\..*": (
        "belongs to a head that rates texts and writes none: take the model that it was trained from"
    ),
    r"(.*\.)?(base_layer|lora_\w+|modules_to_save|original_module)\..*|base_model\.model\..*": (
        "belongs to a model with an adapter that is not merged (PEFT): merge it first"
        " (peft: merge_and_unload, save_pretrained) and convert the result"
    ),
    r"(.*\.)?_orig_mod\..*": (
        "has its name from torch.compile: save the model that was compiled (model._orig_mod.save_pretrained) and convert"
        " the result"
    ),
    r"(module|_fsdp_wrapped_module|_forward_module)\..*": (
        "has its name from a wrapper for training on several devices: save the model inside it"
        " (model.module.save_pretrained) and convert the result"
    ),
    r".*\.(SCB|weight_format)|.*\.weight\.(nested_)?(absmax|quant_map|quant_state.*)": f"is made by bitsandbytes: {_ORIGINAL}",
    r".*\.(qweight|qzeros|g_idx|scales)": f"is made by GPTQ or AWQ: {_ORIGINAL}",
    r".*\.(weight_scale(_inv|_2)?|input_scale|weight_packed|weight_shape|weight_zero_point)": f"holds scales: {_ORIGINAL}",
}


def is_skipped(name: str) -> bool:
    """Whether a tensor is left out, as in llama.cpp's converter."""
    return name.endswith(_BUFFERS)


def explain_tensor(name: str) -> str | None:
    """What a tensor of this name is and what to do, as the end of a sentence; None for a name that tells nothing."""
    return next((said for pattern, said in _TRACES.items() if re.fullmatch(pattern, name, re.DOTALL)), None)


def explain_folder(folder: Path) -> str | None:
    """What a folder without a checkpoint's files holds, and what to do with that; None when nothing is recognised."""
    if (found := explain_adapter(folder)) is not None:
        return found
    if (snapshot := not_a_model.find_snapshot(folder)) is not None:
        return f"it is a folder of the Hub's cache; name the one with the files: {snapshot}"
    if gguf := not_a_model.find_gguf_files(folder):
        return f"it holds GGUF files, which run as they are: qwq-lite chat {shlex.quote(str(gguf[0]))}"
    pickles = [path for suffix in ("bin", "pt", "pth", "ckpt") for path in folder.glob(f"*.{suffix}")]
    if pickles:
        return (
            f"{min(pickles).name} is a pickle, which can run code and is never opened: take a version of the model"
            " with *.safetensors"
        )
    return None


def explain_adapter(folder: Path) -> str | None:
    """What to do with a folder that holds an adapter (LoRA), or None when it holds none."""
    name = next((name for name in (ADAPTER_CONFIG, *ADAPTER_WEIGHTS) if is_listed(folder / name)), None)
    if name is None:
        return None
    base = None
    if is_listed(folder / ADAPTER_CONFIG):
        base = read_json_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    onto = printable(base) if isinstance(base, str) and base else "its base model"
    return (
        f"{name} belongs to an adapter, which is only the change to a model: merge it into {onto} first"
        " (peft: merge_and_unload, save_pretrained) and convert the result"
    )


def has_adapter_weights(folder: Path) -> bool:
    """Whether the folder holds the weights of an adapter, not only its settings."""
    return any(is_listed(folder / name) for name in ADAPTER_WEIGHTS)
