"""Whether a checkpoint is one that can be converted, asked of its config.json and its files' names. Knows no weights.

What cannot be converted is refused by its name, with what to take instead: nothing else would tell a user that his
4-bit checkpoint is not the model's own, or that an adapter has to be merged.
"""

from __future__ import annotations

import re

from qwq_convert.checkpoint.files import Checkpoint
from qwq_convert.checkpoint.text_files import printable, quote
from qwq_convert.checkpoint.unsupported_files import ADAPTER_CONFIG, explain_adapter, has_adapter_weights
from qwq_lite.errors import CheckpointError

ARCHITECTURE = "Qwen2ForCausalLM"
_OTHER_PROGRAM = "for other models use llama.cpp's convert_hf_to_gguf.py"
_NEAR = {
    "LlamaForCausalLM": "Llama, as in DeepSeek-R1-Distill-Llama: the Qwen distillations can be converted",
    "Qwen2AudioForConditionalGeneration": "it hears, and its text part alone has another name here",
    "Qwen2ForSequenceClassification": "it rates texts and writes none: take the model it was trained from",
    "Qwen2Model": "it has no output layer: take the checkpoint of the language model, not of the embedding model",
    "Qwen2MoeForCausalLM": "its layers have experts, which are another family",
    "Qwen2VLForConditionalGeneration": "it sees, which is another family: take a Qwen2.5 without VL",
    "Qwen2_5_VLForConditionalGeneration": "it sees, which is another family: take a Qwen2.5 without VL",
    "Qwen3ForCausalLM": "Qwen3 normalizes queries and keys, which is another family",
    "Qwen3MoeForCausalLM": "Qwen3 with experts is another family",
    "QWenLMHeadModel": "the first Qwen is another family: take Qwen2 or later",
}
_QUANTIZED = {"awq": "AWQ", "gptq": "GPTQ", "fp8": "FP8", "fbgemm_fp8": "FP8"}  # others are called what they are
_QUANTIZED_SUFFIX = re.compile(
    r"[-_.](awq|gptq|fp8|int[48]|[48]bit|w[48]a(8|16)|unsloth|bnb|dynamic).*$", re.IGNORECASE
)


def check(checkpoint: Checkpoint) -> None:
    """Refuse what is not a plain Qwen2ForCausalLM, and note what is converted otherwise than config.json says.

    Raises: CheckpointError for adapters, code of its own, quantized weights, embedding models and other architectures.
    """
    config, path = checkpoint.config, checkpoint.folder / "config.json"
    _check_adapter(checkpoint)
    _check_architecture(checkpoint)
    if config.get("auto_map"):
        raise CheckpointError(
            f"{path}: auto_map names code that comes with the model, which is never run: what it computes is not known"
            f" here; take a checkpoint that transformers' own {ARCHITECTURE} loads"
        )
    _check_quantized(checkpoint)
    if config.get("is_causal") is False or checkpoint.has("modules.json"):
        says = "modules.json is there" if config.get("is_causal") is not False else "is_causal is false in config.json"
        raise CheckpointError(
            f"{checkpoint.folder}: {says}: an embedding model, which writes no text; {_OTHER_PROGRAM}"
        )
    windows = config.get("layer_types")
    if config.get("use_sliding_window") is True or (isinstance(windows, list) and "sliding_attention" in windows):
        checkpoint.notice(
            f"{path}: use_sliding_window: llama.cpp knows no window for this family, every layer will see the whole context"
        )


def _check_adapter(checkpoint: Checkpoint) -> None:
    """An adapter's settings may be left beside weights that it was merged into; its weights beside others are not applied."""
    found = explain_adapter(checkpoint.folder)
    if found is None:
        return
    if has_adapter_weights(checkpoint.folder) or not checkpoint.has_weights():
        raise CheckpointError(
            f"{checkpoint.folder}: {found}; where the weights beside it are the result already, move adapter_* to another folder"
        )
    checkpoint.notice(
        f"{checkpoint.folder / ADAPTER_CONFIG}: the settings of an adapter whose weights are not here: the whole weights beside"
        " it are converted as they are, as llama.cpp's converter does"
    )


def _check_architecture(checkpoint: Checkpoint) -> None:
    found, path = checkpoint.config.get("architectures"), checkpoint.folder / "config.json"
    if found == [ARCHITECTURE]:
        return
    word = _NEAR.get(found[0]) if isinstance(found, list) and len(found) == 1 and isinstance(found[0], str) else None
    raise CheckpointError(
        f"{path}: architectures is {quote(found)}{f' ({word})' if word else ''}, [{ARCHITECTURE!r}] can be converted"
        f" (QwQ, Qwen2.5, DeepSeek-R1-Distill-Qwen); {_OTHER_PROGRAM}"
    )


def _check_quantized(checkpoint: Checkpoint) -> None:
    """quantization_config, or the file that NVIDIA's tool writes beside it."""
    settings = checkpoint.config.get("quantization_config")
    where = "config.json"
    if settings is None:
        where = "hf_quant_config.json"
        settings = checkpoint.json(where)
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    name = _QUANTIZED.get(method, method) if isinstance(method, str) else "another method"
    original = _QUANTIZED_SUFFIX.sub("", checkpoint.name)
    take = original if original != checkpoint.name else "the checkpoint that it was made from"
    raise CheckpointError(
        f"{checkpoint.folder / where}: quantization_config: these weights are quantized already ({printable(name)}), and rounding"
        f" them again would add to the loss; take the original checkpoint: {take}"
    )
