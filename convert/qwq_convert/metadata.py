"""GGUF's keys for a checkpoint: general, model and tokenizer, in llama.cpp's order. Knows no weights.

gguf's own Metadata reads the model card and takes names apart; our checks stand around it. What its registry version does
not have yet is written here.
Source: llama.cpp conversion/base.py (set_gguf_parameters, prepare_metadata, _set_vocab_gpt2), gguf-py/gguf/metadata.py
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, Metadata
from gguf.constants import GGML_QUANT_VERSION, GGUFValueType, Keys, LlamaFileType
from gguf.utility import size_label

from qwq_convert.checkpoint.files import Checkpoint
from qwq_convert.checkpoint.text_files import is_unicode, printable, quote
from qwq_convert.checkpoint.tokenizer import TokenizerKeys
from qwq_lite import arguments
from qwq_lite._version import __version__
from qwq_lite.errors import CheckpointError
from qwq_lite.formats.gguf_header import Value
from qwq_lite.formats.shape import ModelShape
from qwq_lite.text import normalization

GgufKeys = dict[str, tuple[Value, GGUFValueType]]

VERSION_KEY = "qwq_lite.version"  # what made the file; llama.cpp has no key for that
_CARD = "README.md"
# GGUF's name -> names in generation_config.json, of which the first that is there counts, and the range
_INT, _FLOAT = GGUFValueType.INT32, GGUFValueType.FLOAT32
_SAMPLING: dict[str, tuple[tuple[str, ...], GGUFValueType, float, float]] = {
    "sequence": (("sequence",), GGUFValueType.STRING, 0, 0),
    "top_k": (("top_k",), _INT, -1, 1 << 30),
    "top_p": (("top_p",), _FLOAT, 0, 1),
    "min_p": (("min_p",), _FLOAT, 0, 1),
    "xtc_probability": (("xtc_probability",), _FLOAT, 0, 1),
    "xtc_threshold": (("xtc_threshold",), _FLOAT, 0, 1),
    "temp": (("temperature",), _FLOAT, 0, 1000),
    "penalty_last_n": (("penalty_last_n",), _INT, -1, 1 << 30),
    "penalty_repeat": (("penalty_repeat", "repetition_penalty"), _FLOAT, 0, 1000),
    "mirostat": (("mirostat",), _INT, 0, 2),
    "mirostat_tau": (("mirostat_tau",), _FLOAT, 0, 1000),
    "mirostat_eta": (("mirostat_eta",), _FLOAT, 0, 1000),
}


def keys(
    checkpoint: Checkpoint, shape: ModelShape, vocab: TokenizerKeys, kind: LlamaFileType, n_params: int
) -> GgufKeys:
    """Every key of the output but general.architecture, which the header writer sets.

    Raises: CheckpointError when the model card or generation_config.json cannot be read.
    """
    writer = GGUFWriter(None, shape.arch)  # a recorder: it has no file
    writer.add_type("model")
    for key, value, value_type in _sampling(checkpoint):
        writer.add_key_value(key, value, value_type)
    _general(writer, checkpoint, n_params)
    _model(writer, checkpoint, shape, kind)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    _tokenizer(writer, vocab)
    writer.add_string(normalization.KEY, vocab.normalizer)
    writer.add_string(VERSION_KEY, __version__)
    recorded = {key: (entry.value, entry.type) for key, entry in writer.kv_data[0].items()}
    recorded.pop(Keys.General.ARCHITECTURE)
    return recorded


def _sampling(checkpoint: Checkpoint) -> Iterator[tuple[str, Value, GGUFValueType]]:
    """The settings of generation_config.json that GGUF has keys for."""
    path, settings = checkpoint.folder / "generation_config.json", checkpoint.json("generation_config.json") or {}
    for short, (names, kind, low, high) in _SAMPLING.items():
        name = next((name for name in names if name in settings), names[0])
        value = settings.get(name)
        if value is None:
            continue
        if kind == GGUFValueType.STRING:
            right, wanted = isinstance(value, str) and is_unicode(value), "a text"
        else:
            is_number = arguments.is_whole if kind == _INT else arguments.is_real
            right = is_number(value) and low <= value <= high
            wanted = f"{'an integer' if kind == _INT else 'a number'} from {low} to {high}"
        if not right:
            raise CheckpointError(f"{path}: {name} is {quote(value)}, {wanted} is expected")
        yield f"general.sampling.{short}", float(value) if kind == _FLOAT else value, kind


def _general(writer: GGUFWriter, checkpoint: Checkpoint, n_params: int) -> None:
    """Names, licence, base models, tags and languages: from the model card, config.json and the folder's name."""
    logging.getLogger("metadata").setLevel(logging.CRITICAL)  # its hints are for people who call it by hand
    checkpoint.text(_CARD)  # refuses what is no text, or too long to be one
    name, origin = _name(checkpoint), _origin(checkpoint)
    try:
        card = Metadata.load_model_card(checkpoint.folder)
        metadata = Metadata.apply_metadata_heuristic(Metadata(), card, origin, Path(name), n_params)
    except Exception as error:  # a model card is prose with YAML on top: anything can be in it
        said = printable(" ".join(str(error).split()))
        raise CheckpointError(
            f"{checkpoint.folder / _CARD}: its header cannot be read ({said}); mend or remove it"
        ) from error
    metadata.name = metadata.name or name
    metadata.size_label = metadata.size_label or size_label(n_params, n_params, 0, 0)
    _check_card(metadata, checkpoint.folder / _CARD)  # names and origin are text already
    metadata.set_gguf_meta_model(writer)


def _name(checkpoint: Checkpoint) -> str:
    """The model's name as text; bytes of the folder's name that are no UTF-8 become replacement characters."""
    name = _as_text(checkpoint.name)
    if name != checkpoint.name:
        checkpoint.notice(
            f"{checkpoint.folder}: the folder's name is no UTF-8, which GGUF needs: the model is called {name}; rename the"
            " folder to give it another name"
        )
    return name


def _as_text(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "replace")


def _origin(checkpoint: Checkpoint) -> dict[str, Any]:
    """The repository a checkpoint came from: config.json's word, else the Hub's cache, whose folder is named for a revision."""
    given = checkpoint.config.get("_name_or_path")
    if isinstance(given, str) and given and given.count("/") <= 1:
        if not is_unicode(given):
            raise CheckpointError(
                f"{checkpoint.folder / 'config.json'}: _name_or_path is {quote(given)}, which is no Unicode text; mend or"
                " remove it"
            )
        return {"_name_or_path": given}
    if checkpoint.organization is not None:
        return {"_name_or_path": _as_text(f"{checkpoint.organization}/{checkpoint.name}")}
    return {}


def _check_card(metadata: Any, path: Path) -> None:
    """What GGUF's header is going to hold is text, lists of text, or lists of objects of text.

    Raises: CheckpointError naming the model card's field.
    """
    for entry in fields(metadata):
        value = getattr(metadata, entry.name)
        if entry.name in ("base_models", "datasets"):
            right = value is None or all(isinstance(part, dict) and all(map(_is_text, part.values())) for part in value)
            wanted = "a name or a list of names"
        elif entry.name in ("tags", "languages", "license"):
            right = value is None or _is_text(value) or (isinstance(value, list) and all(map(_is_text, value)))
            wanted = "a text or a list of texts"
        else:
            right, wanted = value is None or _is_text(value), "a text"
        if not right:
            raise CheckpointError(
                f"{path}: {entry.name} is {quote(value)}, {wanted} is expected: put it in quotes, or remove it"
            )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and is_unicode(value)


def _model(writer: GGUFWriter, checkpoint: Checkpoint, shape: ModelShape, kind: LlamaFileType) -> None:
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
    if checkpoint.config.get("head_dim") is not None:
        writer.add_key_length(shape.n_embd_head)
        writer.add_value_length(shape.n_embd_head)
    writer.add_file_type(kind)


def _tokenizer(writer: GGUFWriter, vocab: TokenizerKeys) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_list(vocab.tokens)
    writer.add_token_types(vocab.types)
    writer.add_token_merges(vocab.merges)
    for name, number in vocab.special_ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    for name, adds in vocab.adds.items():
        writer.add_bool(f"tokenizer.ggml.add_{name}_token", adds)
    for name, template in vocab.named_templates.items():
        writer.add_string(Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name), template)
    if vocab.named_templates:
        writer.add_array(Keys.Tokenizer.CHAT_TEMPLATES, list(vocab.named_templates))
    if vocab.chat_template is not None:
        writer.add_chat_template(vocab.chat_template)
