"""The normal form that a model's tokenizer expects, which llama.cpp does not apply. Pure.

Hugging Face's `tokenizers` composes by tables older than Python's: marks that Unicode gained after version 9 are inert to
it, neither reordered nor composed. A model was trained on its ids, so the text is normalised between such marks.
Source: compared over every code point with tokenizers 0.23.3 and Python 3.13 (Unicode 15.1).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

KEY = "qwq_lite.tokenizer.normalizer"
# Pre-tokenizers, in llama.cpp's names, whose tokenizers of Hugging Face compose first: Qwen 2 to 3, Qwen 3.5, and DeepSeek's
# distillations of Qwen 2.5. The architecture says nothing: a qwen3 model has Qwen 2's tokenizer.
_COMPOSED = frozenset({"qwen2", "qwen35", "deepseek-r1-qwen"})

# fmt: off
_NEWER_MARKS = (
    (0x7FD, 0x7FD), (0x898, 0x89F), (0x8CA, 0x8D3), (0x9FE, 0x9FE), (0xC3C, 0xC3C), (0xD3B, 0xD3C), (0xEBA, 0xEBA),
    (0x1715, 0x1715), (0x1ABF, 0x1ACE), (0x1DF6, 0x1DFA), (0xA82C, 0xA82C), (0x10D24, 0x10D27), (0x10EAB, 0x10EAC),
    (0x10EFD, 0x10EFF), (0x10F46, 0x10F50), (0x10F82, 0x10F85), (0x11070, 0x11070), (0x1133B, 0x1133B),
    (0x1145E, 0x1145E), (0x11839, 0x1183A), (0x11938, 0x11938), (0x1193D, 0x1193E), (0x11943, 0x11943),
    (0x119E0, 0x119E0), (0x11A34, 0x11A34), (0x11A47, 0x11A47), (0x11A99, 0x11A99), (0x11D42, 0x11D42),
    (0x11D44, 0x11D45), (0x11D97, 0x11D97), (0x11F41, 0x11F42), (0x16FF0, 0x16FF1), (0x1E08F, 0x1E08F),
    (0x1E130, 0x1E136), (0x1E2AE, 0x1E2AE), (0x1E2EC, 0x1E2EF), (0x1E4EC, 0x1E4EF),
)
# fmt: on
_INERT = re.compile("([" + "".join(f"{chr(first)}-{chr(last)}" for first, last in _NEWER_MARKS) + "])")


def normal_form(keys: Mapping[str, object]) -> str:
    """The form of a model's tokenizer, "NFC" or "none": by its own key, else by its pre-tokenizer."""
    found = keys.get(KEY)
    if isinstance(found, str):
        return found
    return "NFC" if keys.get("tokenizer.ggml.pre") in _COMPOSED else "none"


def normalize(text: str, form: str) -> str:
    """`text` as the tokenizer of a model with `form` would see it."""
    if form != "NFC" or text.isascii():
        return text
    return "".join(unicodedata.normalize("NFC", part) for part in _INERT.split(text))
