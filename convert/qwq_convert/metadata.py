"""GGUF's keys for a checkpoint: general, model and tokenizer, in llama.cpp's order. Knows no weights.

gguf's own Metadata reads the model card and the generation settings; our checks stand before it.
Source: llama.cpp conversion/base.py (set_gguf_parameters, prepare_metadata, _set_vocab_gpt2)
"""

from __future__ import annotations

import logging

from gguf import GGUFWriter, Metadata
from gguf.constants import GGML_QUANT_VERSION, GGUFValueType, Keys, LlamaFileType
from gguf.utility import size_label

from qwq_lite import normalization
from qwq_lite.errors import CheckpointError
from qwq_lite.gguf_header import Value
from qwq_lite.shape import ModelShape

from .source import Checkpoint
from .vocab import Vocab

GgufKeys = dict[str, tuple[Value, GGUFValueType]]

_SAMPLING_REPEAT_KEY = "general.sampling.penalty_repeat"
# generation_config.json's name -> whether it is whole, and its range
_GENERATION = {
    "temperature": (False, 0, 1000),
    "top_k": (True, -1, 1 << 30),
    "top_p": (False, 0, 1),
    "min_p": (False, 0, 1),
    "repetition_penalty": (False, 0, 1000),
}
_ADD_EOS_KEY = "tokenizer.ggml.add_eos_token"


def keys(checkpoint: Checkpoint, shape: ModelShape, vocab: Vocab, kind: LlamaFileType, n_params: int) -> GgufKeys:
    """Every key of the output but general.architecture, which the header writer sets.

    Raises: CheckpointError when the model card or generation_config.json cannot be read.
    """
    writer = GGUFWriter(None, shape.arch)  # a recorder: it has no file
    writer.add_type("model")
    _general(writer, checkpoint, n_params)
    _model(writer, shape, kind)
    _tokenizer(writer, vocab)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    recorded = {key: (entry.value, entry.type) for key, entry in writer.kv_data[0].items()}
    recorded.pop(Keys.General.ARCHITECTURE)
    return recorded


def _general(writer: GGUFWriter, checkpoint: Checkpoint, n_params: int) -> None:
    logging.getLogger("gguf").setLevel(logging.ERROR)  # its hints are for people who call it by hand
    repeat = _checked_generation(checkpoint)
    try:
        metadata = Metadata.load(None, checkpoint.folder, checkpoint.name, n_params)
    except Exception as error:  # a model card is prose with YAML on top: anything can be in it
        raise CheckpointError(
            f"{checkpoint.folder}: README.md or generation_config.json cannot be read: {error}"
        ) from error
    metadata.name = metadata.name or checkpoint.name
    metadata.size_label = metadata.size_label or size_label(n_params, n_params, 0, 0)
    metadata.set_gguf_meta_model(writer)
    if repeat is not None:
        writer.add_float32(_SAMPLING_REPEAT_KEY, repeat)


def _checked_generation(checkpoint: Checkpoint) -> float | None:
    """Check the settings that gguf's Metadata is going to take over as they are; returns the repetition penalty."""
    settings = checkpoint.json("generation_config.json") or {}
    for name, (whole, low, high) in _GENERATION.items():
        value = settings.get(name)
        right = isinstance(value, int) if whole else isinstance(value, int | float)
        if value is not None and (isinstance(value, bool) or not right or not low <= value <= high):
            raise CheckpointError(
                f"{checkpoint.folder / 'generation_config.json'}: {name} is {value!r},"
                f" {'an integer' if whole else 'a number'} from {low} to {high} is expected"
            )
    repeat = settings.get("repetition_penalty")
    return None if repeat is None else float(repeat)


def _model(writer: GGUFWriter, shape: ModelShape, kind: LlamaFileType) -> None:
    writer.add_block_count(shape.n_layer)
    writer.add_context_length(shape.n_ctx_train)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    if (scaling := shape.rope_scaling) is not None:
        writer.add_string(Keys.Rope.SCALING_TYPE.format(arch=shape.arch), scaling.type)
        writer.add_rope_scaling_factor(scaling.factor)
        if scaling.original_context_length is not None:
            writer.add_rope_scaling_orig_ctx_len(scaling.original_context_length)
        for name, value in (scaling.yarn or {}).items():
            writer.add_float32(f"{shape.arch}.rope.scaling.{name}", value)
    writer.add_rope_freq_base(shape.rope_freq_base)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    if shape.n_embd_head * shape.n_head != shape.n_embd:
        writer.add_key_length(shape.n_embd_head)
        writer.add_value_length(shape.n_embd_head)
    writer.add_file_type(kind)


def _tokenizer(writer: GGUFWriter, vocab: Vocab) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_list(vocab.tokens)
    writer.add_token_types(vocab.types)
    writer.add_token_merges(vocab.merges)
    adders = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unknown": writer.add_unk_token_id,
        "padding": writer.add_pad_token_id,
    }
    for name, number in vocab.special_ids.items():
        adders[name](number)
    writer.add_add_bos_token(vocab.add_bos)
    writer.add_bool(_ADD_EOS_KEY, vocab.add_eos)
    if vocab.chat_template is not None:
        writer.add_chat_template(vocab.chat_template)
    writer.add_string(normalization.KEY, vocab.normalizer)
