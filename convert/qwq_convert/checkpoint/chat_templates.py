"""A checkpoint's chat templates, from any of the places where they stand. Knows no vocabulary; what they say is not read.

Source: llama.cpp gguf-py/gguf/vocab.py (SpecialVocab), gguf_writer.py (add_chat_template)
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

from qwq_convert.checkpoint.files import Checkpoint
from qwq_convert.checkpoint.text_files import is_unicode, quote
from qwq_lite.errors import CheckpointError

_FILES = ("chat_template.jinja", "chat_template.json")
_MORE = "additional_chat_templates"
_LETTERS = frozenset(string.ascii_letters + string.digits)


def templates(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> tuple[str | None, dict[str, str]]:
    """The chat template, and templates with another name than default.

    It stands in tokenizer_config.json or in a file of its own, as a text or as a list of named ones.
    """
    where, given = "tokenizer_config.json", settings.get("chat_template")
    file, apart = _template_file(checkpoint)
    if given is None:
        where, given = file, apart
    elif apart is not None and apart != given:
        checkpoint.notice(
            f"{checkpoint.folder}: chat_template in tokenizer_config.json and {file} differ: the first is kept, as llama.cpp"
            " keeps it, and transformers would use the other"
        )
    listed = given if isinstance(given, list) else [] if given is None else [{"name": "default", "template": given}]
    found: dict[str, str] = {}
    for entry in listed:
        name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, entry)
        if not isinstance(name, str) or not name or not isinstance(text, str) or not is_unicode(text):
            kind = type(text).__name__
            raise CheckpointError(
                f"{checkpoint.folder / where}: chat_template {quote(name)} is {kind}, a string of Unicode is expected"
            )
        found["".join(letter if letter in _LETTERS else "_" for letter in name)] = text
    return found.pop("default", None), found


def _template_file(checkpoint: Checkpoint) -> tuple[str, Any]:
    """A template file's name and what it holds: a text or a list of named ones; None where there is no file."""
    jinja, as_json = _FILES
    text = checkpoint.text(jinja)
    if text is None:
        return as_json, (checkpoint.json(as_json) or {}).get("chat_template")
    more = sorted(name for name in checkpoint.names(_MORE) if name.endswith(".jinja"))
    if not more:
        return jinja, text
    named = {"default": text} | {name.removesuffix(".jinja"): checkpoint.text(f"{_MORE}/{name}") for name in more}
    return jinja, [{"name": name, "template": template} for name, template in named.items()]
