"""Messages for a path that is no model: what it holds, and what to type. Reads names and first bytes.

Knows of a GGUF file that it begins with GGUF, and of other formats how they begin. Whatever is not recognised here is left
to the reader of the format.
Source of the Hub's layout: huggingface_hub, docs/source/en/guides/manage-cache.md
"""

from __future__ import annotations

import contextlib
import os
import shlex
import struct
from pathlib import Path

FIRST_BYTES = 512
_HUB, _SNAPSHOTS = "models--", "snapshots"
_MOST_SAFETENSORS_HEADER = 100_000_000  # bytes, of safetensors itself
_OLD_GGML = (b"lmgg", b"fmgg", b"tjgg", b"algg")
_GIVE = "give the path of a .gguf file"


def describe_missing_file(path: Path) -> str:
    """What is there in place of a model's file."""
    if path.is_dir():
        return f"is not a file but {_folder(path)}"
    if path.is_symlink():
        return f"is not a file: it is a link to {path.readlink()}, where nothing is; {_GIVE}"
    if os.path.lexists(path):
        return f"is not a file but a device, a pipe or a socket; {_GIVE}"
    return f"is not a file: there is nothing of that name; {_GIVE}"


def _folder(path: Path) -> str:
    inside = find_snapshot(path) or path
    kind = "a folder" if inside is path else "a folder of the Hub's cache"
    models = find_gguf_files(inside)
    if models:
        return f"{kind}; name the file in it: {models[0]}"
    if (inside / "config.json").exists() or any(inside.glob("*.safetensors")):
        kind = "a checkpoint" if inside is path else "a checkpoint in the Hub's cache"
        return f"{kind}, which must be converted first: {_convert(inside)}"
    return f"{kind} without a .gguf file; {_GIVE}"


def find_snapshot(path: Path) -> Path | None:
    """Of models--ORG--NAME, a repository in the Hub's cache, the folder with its files; None where there is none, or no such."""
    folder = path.absolute()
    if not folder.name.startswith(_HUB) or not (path / _SNAPSHOTS).is_dir():
        return None
    with contextlib.suppress(OSError, ValueError):
        main = path / _SNAPSHOTS / (path / "refs" / "main").read_text("utf-8").strip()
        if main.is_dir() and main.parent == path / _SNAPSHOTS:
            return main
    return max((entry for entry in (path / _SNAPSHOTS).iterdir() if entry.is_dir()), default=None, key=_modified_s)


def _modified_s(path: Path) -> float:
    return path.stat().st_mtime


def find_gguf_files(folder: Path) -> list[Path]:
    """The models in a folder, or else in the folders in it; what reads images is none."""
    for pattern in ("*.gguf", "*/*.gguf"):
        found = sorted(path for path in folder.glob(pattern) if not path.name.lower().startswith("mmproj"))
        if found:
            return found
    return []


def describe_other_format(path: Path, first: bytes) -> str | None:
    """What a file is that begins so; None for one that begins as GGUF does, or as nothing that is known.

    first: its first FIRST_BYTES bytes, fewer where it is shorter.
    """
    if first[:4] == b"GGUF":
        return _another_order(path, first)
    known = (
        (not first, "is empty; fetch or convert it again"),
        (_is_safetensors(first), f"holds weights of a checkpoint (safetensors); convert its folder: {_convert(path.parent)}"),
        (
            first.startswith((b"PK\3\4", b"\x80\x02")),
            "is a pickle of PyTorch, which can run code and is never opened; take a version of the model with *.safetensors",
        ),
        (
            first.startswith(b"version https://git-lfs"),
            "is a Git LFS pointer in place of the file; in its folder, type: git lfs pull",
        ),
        (
            first.lstrip().lower().startswith((b"<!doctype", b"<html")),
            "is a web page in place of the file; fetch the file itself, with: hf download",
        ),
        (first[:4] in _OLD_GGML, "is of a format that came before GGUF and is no longer read; take a GGUF of the model"),
    )  # fmt: skip
    return next((words for found, words in known if found), None)


def _another_order(path: Path, first: bytes) -> str | None:
    """Big-endian: a version that is small only from that side."""
    version = first[4:8]
    if len(version) < 4 or struct.unpack(">I", version)[0] not in (1, 2, 3):
        return None
    return (
        f"is a big-endian GGUF, for other processors; convert it: gguf-convert-endian {shlex.quote(str(path))} little"
    )


def _is_safetensors(first: bytes) -> bool:
    return first[8:9] == b"{" and 2 <= struct.unpack("<Q", first[:8])[0] <= _MOST_SAFETENSORS_HEADER


def _convert(folder: Path) -> str:
    return f"qwq-lite convert {shlex.quote(str(folder))} -q Q4_K_M"
