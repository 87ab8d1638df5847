"""A checkpoint's files: JSON, shard headers, windows of rows. Knows no GGUF; nothing downstream knows where it lies.

Shard headers are validated by the safetensors library (overlaps, gaps, sizes, trailing data); the weights are read by
offset, because its numpy interface cannot hold BF16.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from gguf.constants import GGMLQuantizationType

from qwq_convert.checkpoint.text_files import (
    explain_unreadable,
    is_listed,
    printable,
    quote,
    read_json_object,
    read_text,
    refuse_stand_in,
    reject_duplicate_keys,
)
from qwq_convert.checkpoint.unsupported_files import explain_folder, explain_tensor, is_skipped
from qwq_lite.errors import CheckpointError
from qwq_lite.formats.gguf_header import tensor_bytes
from qwq_lite.store import catalog
from qwq_lite.system.files import RandomAccessFile

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 16 << 20  # a shard with all tensors of 512 layers has a header of 1 MB

_ORIGINAL = "take the checkpoint as it was before it was quantized"
_NUMBERED = re.compile(r"model-\d{5}-of-(\d{5})\.safetensors")
_DTYPES = {"F32": GGMLQuantizationType.F32, "F16": GGMLQuantizationType.F16, "BF16": GGMLQuantizationType.BF16}


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of a shard."""

    name: str
    shape: tuple[int, ...]  # in Hugging Face's order: rows, columns
    type: GGMLQuantizationType
    file: str
    offset: int  # bytes from the start of the file

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
            advice = catalog.how_to_get(str(folder))
            if advice is not None:
                raise CheckpointError(f"{folder}: {advice}")
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

    def has(self, name: str) -> bool:
        """Whether the folder lists the name, whatever stands under it."""
        return is_listed(self.folder / name)

    def has_weights(self) -> bool:
        """Whether the folder lists shards or an index, sound or not."""
        return self.has(INDEX) or any(name.endswith(".safetensors") for name in self.names())

    def json(self, name: str) -> dict[str, Any] | None:
        """One of the folder's JSON objects, or None when the folder does not list it."""
        return read_json_object(self.folder / name) if self.has(name) else None

    def text(self, name: str) -> str | None:
        """One of the folder's text files, or None when the folder does not list it."""
        return read_text(self.folder / name) if self.has(name) else None

    def names(self, name: str = "") -> list[str]:
        """What the folder lists, or one of its own folders; nothing when it does not list that one."""
        if not self.has(name):
            return []
        try:
            return [path.name for path in (self.folder / name).iterdir()]
        except OSError as error:
            raise CheckpointError(
                f"{self.folder / name}: cannot be read as a folder: {error.strerror or error}; mend or remove it"
            ) from error

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
            hint = explain_folder(self.folder) or "this is not a checkpoint folder"
            raise CheckpointError(f"{self.folder}: config.json is missing; {hint}")
        return config

    def _read_headers(self) -> dict[str, SourceTensor]:
        index = self.json(INDEX)
        if index is None:
            return self._read_without_index()
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
                        f"{self.folder / file}: tensor {printable(name)}: {INDEX} {says}; fetch the index again"
                    )
                found[name] = tensor
        missing = next((name for name in listed if name not in found and not is_skipped(name)), None)
        if missing:
            raise CheckpointError(
                f"{self.folder / listed[missing]}: tensor {printable(missing)} is missing, {INDEX} places it there;"
                " fetch the shard again"
            )
        return found

    def _read_without_index(self) -> dict[str, SourceTensor]:
        """One file, or shards whose names say how many they are: an index would add nothing."""
        files = [SINGLE] if self.has(SINGLE) else self._numbered_shards()
        if not files:
            hint = explain_folder(self.folder) or "fetch the weights (*.safetensors) and their index into this folder"
            raise CheckpointError(f"{self.folder}: neither {INDEX} nor {SINGLE} is there; {hint}")
        found: dict[str, SourceTensor] = {}
        for file in files:
            self._open(file, f"{self.folder / file}: the shard is missing; fetch it again")
            for name, tensor in self._shard(file).items():
                if name in found:
                    raise CheckpointError(
                        f"{self.folder / file}: tensor {printable(name)} is in {found[name].file} too, and no {INDEX} says which"
                        " counts; fetch the index"
                    )
                found[name] = tensor
        return found

    def _numbered_shards(self) -> list[str]:
        """Shards named model-00001-of-0000N.safetensors, all N of them. Raises: CheckpointError when one is missing."""
        listed = [match for name in self.names() if (match := _NUMBERED.fullmatch(name))]
        counts = sorted({int(match[1]) for match in listed})
        if len(counts) > 1:
            raise CheckpointError(
                f"{self.folder}: shards of {counts[0]} and of {counts[1]} lie beside each other, and no {INDEX} says which"
                " count; keep one set, or fetch the index"
            )
        there = {match[0] for match in listed}
        wanted = [f"model-{n + 1:05}-of-{count:05}.safetensors" for count in counts for n in range(count)]
        if odd := min(there.symmetric_difference(wanted), default=None):
            says = "is missing" if odd in wanted else f"is none of {counts[0]}"
            raise CheckpointError(
                f"{self.folder / odd}: the shard {says}, and there is no {INDEX}; fetch the shards again"
            )
        return wanted

    def _open(self, file: str, message: str) -> None:
        path = self.folder / file
        if not self.has(file):
            raise CheckpointError(message)
        try:
            self._files[file] = RandomAccessFile(path)
            self._states[file] = _state(os.fstat(self._files[file].fileno()))
        except OSError as error:
            raise CheckpointError(f"{path}: {explain_unreadable(path, error)}") from error

    def _shard(self, file: str) -> dict[str, SourceTensor]:
        path = self.folder / file
        header, data_start = _shard_header(path)
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__" or is_skipped(name):
                continue
            kind = _DTYPES.get(entry["dtype"])
            if kind is None:
                if trace := next((other for other in (name, *header) if explain_tensor(other)), None):
                    raise CheckpointError(f"{path}: tensor {printable(trace)} {explain_tensor(trace)}")
                advice = "save it as one of them first" if entry["dtype"] == "F64" else _ORIGINAL
                raise CheckpointError(
                    f"{path}: tensor {printable(name)} has dtype {entry['dtype']};"
                    f" {', '.join(_DTYPES)} can be converted: {advice}"
                )
            tensors[name] = SourceTensor(name, tuple(entry["shape"]), kind, file, data_start + entry["data_offsets"][0])
        return tensors


def _state(status: os.stat_result) -> tuple[int, ...]:
    """What is another for another file under the same name, and for one that was written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _weight_map(index: Mapping[str, Any], path: Path) -> dict[str, str]:
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise CheckpointError(
            f"{path}: weight_map is missing or not an object of tensor names and file names; fetch the index again"
        )
    for name, file in listed.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: weight_map places {printable(name)} in {quote(file)}; a .safetensors file of this folder is"
                " expected, other kinds are not read"
            )
    return listed


def _shard_header(path: Path) -> tuple[dict[str, Any], int]:
    """A shard's header and where its data starts. Its own length is checked before that much is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as stream:
            start = stream.read(64)
            refuse_stand_in(path, start)
            length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else None
            held = path.stat().st_size - 8
            if length is None or length > min(held, MAX_HEADER_BYTES):
                says = "has no header" if length is None else f"says that its header has {length} bytes"
                raise CheckpointError(
                    f"{path}: is no complete safetensors file: it holds {held + 8} bytes and {says}; fetch it again"
                )
            stream.seek(8)
            header = json.loads(stream.read(length), object_pairs_hook=reject_duplicate_keys)
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: is no complete safetensors file ({printable(str(error))}); fetch it again"
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is a {type(header).__name__}, an object is expected; fetch it again")
    return header, 8 + length
