"""Chat templates of QwQ and its family, and the tokens that each of these models adds to Qwen's vocabulary.

The templates are data of others and are not copied here: llama.cpp keeps them for its own tests.
llama.cpp's copies of the two thinking templates differ from the models' own by a switch, `enable_thinking`.
Tokens: tokenizer_config.json of the three models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tests.engine_source import PACKAGE, kept

FOLDER = "models/templates"
QWEN25, QWQ, R1 = "Qwen-Qwen2.5-7B-Instruct", "Qwen-QwQ-32B", "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B"
FILES = tuple(f"{name}.jinja" for name in (QWEN25, QWQ, R1))
# QwQ-32B-Preview has Qwen2.5's template but for what the model is told when nobody tells it anything.
QWEN25_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
PREVIEW_SYSTEM = (
    "You are a helpful and harmless assistant. You are Qwen developed by Alibaba. You should think step-by-step."
)

SHARED_CONTROL = {  # Qwen2.5's and R1-Distill's
    151_650: "<|quad_start|>",
    151_651: "<|quad_end|>",
    151_652: "<|vision_start|>",
    151_653: "<|vision_end|>",
    151_654: "<|vision_pad|>",
    151_655: "<|image_pad|>",
    151_656: "<|video_pad|>",
}
SHARED_ORDINARY = {  # not marked as special: decoding shows them
    151_657: "<tool_call>",
    151_658: "</tool_call>",
    151_659: "<|fim_prefix|>",
    151_660: "<|fim_middle|>",
    151_661: "<|fim_suffix|>",
    151_662: "<|fim_pad|>",
    151_663: "<|repo_name|>",
    151_664: "<|file_sep|>",
}
QWEN25_CONTROL = {
    151_643: "<|endoftext|>",
    151_644: "<|im_start|>",
    151_645: "<|im_end|>",
    151_646: "<|object_ref_start|>",
    151_647: "<|object_ref_end|>",
    151_648: "<|box_start|>",
    151_649: "<|box_end|>",
    **SHARED_CONTROL,
}
QWQ_ORDINARY = {
    **SHARED_ORDINARY,
    151_665: "<tool_response>",
    151_666: "</tool_response>",
    151_667: "<think>",
    151_668: "</think>",
}
R1_CONTROL = {151_643: "<｜end▁of▁sentence｜>", 151_646: "<｜begin▁of▁sentence｜>", **SHARED_CONTROL}
R1_ORDINARY = {
    151_644: "<｜User｜>",
    151_645: "<｜Assistant｜>",
    151_647: "<|EOT|>",
    151_648: "<think>",
    151_649: "</think>",
    **SHARED_ORDINARY,
}


@dataclass(frozen=True)
class Family:
    """What sets the prompts of one model apart: template, added tokens, the two ends of a text."""

    file: str
    control: Mapping[int, str]
    ordinary: Mapping[int, str]
    eos: str
    bos: str | None = None  # R1's is written by its template, and its tokenizer adds it too
    replaced: Mapping[str, str] = field(default_factory=dict)

    def template(self) -> str:
        """The template's text. Skips the test where pip cannot fetch the package that holds it."""
        text = (templates_folder() / self.file).read_text(encoding="utf-8")
        for old, new in self.replaced.items():
            assert old in text, f"{self.file} no longer has {old!r}"
            text = text.replace(old, new)
        return text


FAMILIES = {
    "QwQ-32B-Preview": Family(
        FILES[0], QWEN25_CONTROL, SHARED_ORDINARY, eos="<|im_end|>", replaced={QWEN25_SYSTEM: PREVIEW_SYSTEM}
    ),
    "QwQ-32B": Family(FILES[1], QWEN25_CONTROL, QWQ_ORDINARY, eos="<|im_end|>"),
    "R1-Distill-Qwen": Family(FILES[2], R1_CONTROL, R1_ORDINARY, eos=R1_CONTROL[151_643], bos=R1_CONTROL[151_646]),
}


@cache
def templates_folder() -> Path:
    """The folder under build/ with the three files, for the version of the engine that is installed."""
    folder = kept("templates", lambda path: path.is_relative_to(FOLDER) and path.name in FILES) / FOLDER
    missing = [name for name in FILES if not (folder / name).exists()]
    assert not missing, f"{PACKAGE} holds no {', '.join(missing)} in {FOLDER}"
    return folder
