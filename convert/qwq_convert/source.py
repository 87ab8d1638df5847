"""A checkpoint's files: JSON, shard headers, windows of rows. Knows no GGUF; nothing downstream knows where it lies.

Shard headers are validated by the safetensors library (overlaps, gaps, sizes, trailing data); the weights are read by
offset, because its numpy interface cannot hold BF16.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import reprlib
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from gguf.constants import GGMLQuantizationType

from qwq_lite import mistaken
from qwq_lite.errors import CheckpointError
from qwq_lite.files import RandomAccessFile
from qwq_lite.gguf_header import tensor_bytes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
MAX_TEXT_BYTES = 64 << 20  # a tokenizer.json of 150,000 tokens is 7 to 11 MB
MAX_HEADER_BYTES = 16 << 20  # a shard with all tensors of 512 layers has a header of 1 MB

_DTYPES = {"F32": GGMLQuantizationType.F32, "F16": GGMLQuantizationType.F16, "BF16": GGMLQuantizationType.BF16}


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of a shard. shape: Hugging Face's order (rows, columns); offset: bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    file: str
    offset: int

    @property
    def n_bytes(self) -> int:
        return tensor_bytes(reversed(self.shape), self.type)


class Checkpoint:
    """A folder with config.json, tokenizer files and safetensors shards.

    Opening it reads config.json, `tensors` reads the shards' headers when it is first asked for.
    notices: a line each for what the user should know, collected by those who read the checkpoint.
    Raises: CheckpointError for everything that is missing, damaged or not understood.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.exists():
            raise CheckpointError(
                f"{folder}: no such folder; give the folder that holds config.json and *.safetensors,"
                f" or fetch one: hf download ORGANIZATION/{folder.name} --local-dir {folder.name}"
            )
        if not folder.is_dir():
            if folder.suffix.lower() == ".gguf":
                raise CheckpointError(f"{folder}: is a GGUF file, which runs as it is: qwq-lite chat {folder}")
            raise CheckpointError(f"{folder}: is a file; give the folder that holds config.json and *.safetensors")
        self.config = self._config()
        self.notices: list[str] = []
        self._files: dict[str, RandomAccessFile] = {}
        self._states: dict[str, tuple[int, ...]] = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    @cached_property
    def tensors(self) -> dict[str, SourceTensor]:
        """Every tensor of every shard by its name, from the headers alone."""
        try:
            return self._read_headers()
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """The model's name: the folder's, or the repository's when the folder is a snapshot in the Hub's cache."""
        return self._repository[1]

    @property
    def organization(self) -> str | None:
        """Who the repository belongs to, when the folder is a snapshot in the Hub's cache."""
        return self._repository[0]

    @cached_property
    def _repository(self) -> tuple[str | None, str]:
        """The cache has models--ORG--NAME/snapshots/REVISION, and models--NAME/… for repositories without an owner."""
        folder = self.folder.absolute()
        if folder.name in ("", ".."):
            folder = folder.resolve()
        cache = folder.parent.parent.name
        if folder.parent.name == "snapshots" and cache.startswith("models--"):
            _, *owner, name = cache.split("--")
            return (owner[0] if owner else None), name
        return None, folder.name

    def notice(self, text: str) -> None:
        """Keep a line for the user; the same one is kept once."""
        if text not in self.notices:
            self.notices.append(text)

    def json(self, name: str) -> dict[str, Any] | None:
        """One of the folder's JSON objects, or None when there is no such file."""
        path = self.folder / name
        return read_json_object(path) if path.is_file() else None

    def text(self, name: str) -> str | None:
        """One of the folder's text files, or None when there is no such file."""
        path = self.folder / name
        return _read_text(path) if path.is_file() else None

    def check_unchanged(self) -> None:
        """Whether the shards are still those that were opened, and nobody has written to them. Raises: CheckpointError."""
        for file, state in self._states.items():
            path = self.folder / file
            if not path.is_file() or _state(path.stat()) != state:
                raise CheckpointError(
                    f"{path}: was changed or replaced while it was read; start again when it is whole"
                )

    def read_into(self, tensor: SourceTensor, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the tensor's bytes from `offset` on. Any thread may call.

        Raises: CheckpointError when the shard has become shorter than its header says, or cannot be read.
        """
        try:
            self._files[tensor.file].read_into(buffer, tensor.offset + offset)
        except (OSError, EOFError) as error:
            raise CheckpointError(
                f"{self.folder / tensor.file}: tensor {tensor.name}: {error}; fetch the file again"
            ) from error

    def _config(self) -> dict[str, Any]:
        config = self.json("config.json")
        if config is None:
            hint = instead(self.folder) or "this is not a checkpoint folder"
            raise CheckpointError(f"{self.folder}: config.json is missing; {hint}")
        return config

    def _read_headers(self) -> dict[str, SourceTensor]:
        index = self.json(INDEX)
        if index is None:
            hint = instead(self.folder) or "fetch the weights (*.safetensors) and their index into this folder"
            self._open(SINGLE, f"{self.folder}: neither {INDEX} nor {SINGLE} is there; {hint}")
            return self._shard(SINGLE)
        listed = _weight_map(index, self.folder / INDEX)
        found: dict[str, SourceTensor] = {}
        for file in sorted(set(listed.values())):
            self._open(
                file, f"{self.folder / file}: the shard is missing, {INDEX} (weight_map) names it; fetch it again"
            )
            for name, tensor in self._shard(file).items():
                if listed.get(name) != file:
                    says = f"places it in {listed[name]}" if name in listed else "does not list it"
                    raise CheckpointError(
                        f"{self.folder / file}: tensor {shown(name)}: {INDEX} {says}; fetch the index again"
                    )
                found[name] = tensor
        missing = next((name for name in listed if name not in found), None)
        if missing:
            raise CheckpointError(
                f"{self.folder / listed[missing]}: tensor {shown(missing)} is missing, {INDEX} places it there;"
                " fetch the shard again"
            )
        return found

    def _open(self, file: str, message: str) -> None:
        path = self.folder / file
        if not path.is_file():
            raise CheckpointError(message)
        try:
            self._files[file] = RandomAccessFile(path)
            self._states[file] = _state(os.fstat(self._files[file].fileno()))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error}") from error

    def _shard(self, file: str) -> dict[str, SourceTensor]:
        path = self.folder / file
        header, data_start = _shard_header(path)
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            kind = _DTYPES.get(entry["dtype"])
            if kind is None:
                raise CheckpointError(
                    f"{path}: tensor {shown(name)} has dtype {entry['dtype']}; {', '.join(_DTYPES)} can be converted:"
                    " take the checkpoint as it was before it was quantized"
                )
            tensors[name] = SourceTensor(name, tuple(entry["shape"]), kind, file, data_start + entry["data_offsets"][0])
        return tensors


def _state(status: os.stat_result) -> tuple[int, ...]:
    """What is another for another file under the same name, and for one that was written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def shown(name: str) -> str:
    """A name from a stranger's file as a message can hold it: as it is, or quoted when it is long or cannot be printed."""
    return name if len(name) <= 200 and name.isprintable() else quoted(name)


def quoted(value: object) -> str:
    """A value from a stranger's file as a message can hold it: in Python's spelling, shortened in the middle."""
    return _SHORT.repr(value)


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it; JSON can spell lone surrogates, which it cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def instead(folder: Path) -> str | None:
    """What a folder without a checkpoint's files holds, and what to do with that; None when nothing is recognised."""
    if (found := adapter(folder)) is not None:
        return found
    if (snapshot := mistaken.snapshot(folder)) is not None:
        return f"it is a folder of the Hub's cache; name the one with the files: {snapshot}"
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
    name = next((name for name in ADAPTER_FILES if (folder / name).exists()), None)
    if name is None:
        return None
    base = None
    if (folder / ADAPTER_FILES[0]).is_file():
        base = read_json_object(folder / ADAPTER_FILES[0]).get("base_model_name_or_path")
    onto = shown(base) if isinstance(base, str) and base else "its base model"
    return (
        f"{name} belongs to an adapter, which is only the change to a model: merge it into {onto} first"
        " (peft: merge_and_unload, save_pretrained) and convert the result"
    )


def _weight_map(index: Mapping[str, Any], path: Path) -> dict[str, str]:
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise CheckpointError(
            f"{path}: weight_map is missing or not an object of tensor names and file names; fetch the index again"
        )
    for name, file in listed.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: weight_map places {shown(name)} in {quoted(file)}; a .safetensors file of this folder is"
                " expected, other kinds are not read"
            )
    return listed


def _shard_header(path: Path) -> tuple[dict[str, Any], int]:
    """A shard's header and where its data starts. Its own length is checked before that much is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as stream:
            start = stream.read(64)
            _refuse_stand_in(path, start)
            length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else None
            held = path.stat().st_size - 8
            if length is None or length > min(held, MAX_HEADER_BYTES):
                says = "has no header" if length is None else f"says that its header has {length} bytes"
                raise CheckpointError(
                    f"{path}: is no complete safetensors file: it holds {held + 8} bytes and {says}; fetch it again"
                )
            stream.seek(8)
            header = json.loads(stream.read(length), object_pairs_hook=_once)
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: is no complete safetensors file ({shown(str(error))}); fetch it again"
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is a {type(header).__name__}, an object is expected; fetch it again")
    return header, 8 + length


def _refuse_stand_in(path: Path, start: bytes) -> None:
    """What is found where weights or JSON should be when a download went wrong, told by its first bytes."""
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: is a Git LFS pointer and not the file; run `git lfs pull` in the folder")
    if start.lstrip()[:1] == b"<":
        raise CheckpointError(f"{path}: is a web page and not the file; fetch it again")
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        raise CheckpointError(
            f"{path}: is a pickle under another name, which can run code and is never opened: take *.safetensors"
        )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys occur once: of two values under one name nobody knows which is meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {shown(twice)} occurs twice")
    return found


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises: CheckpointError naming the file, for everything that is not one."""
    text = _read_text(path)
    _refuse_stand_in(path, text[:64].encode(errors="replace"))
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, a JSON object is expected; fetch it again")
    return value


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise CheckpointError(
                f"{path}: is larger than {MAX_TEXT_BYTES >> 20} MiB, which no such file is; fetch it again"
            )
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as UTF-8 text: {error}") from error
