"""A checkpoint's files: JSON, shard headers, windows of rows. Knows no GGUF; nothing downstream knows where it lies.

Shard headers are validated by the safetensors library (overlaps, gaps, sizes, trailing data); the weights are read by
offset, because its numpy interface cannot hold BF16.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from gguf.constants import GGMLQuantizationType

from qwq_lite.errors import CheckpointError
from qwq_lite.files import RandomAccessFile
from qwq_lite.gguf_header import tensor_bytes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_JSON_BYTES = 256 << 20  # a tokenizer.json of 150,000 tokens is 7 MB

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

    Opening it reads headers only. Raises: CheckpointError for everything that is missing, damaged or not understood.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.exists():
            raise CheckpointError(f"{folder}: no such folder; give the folder that holds config.json and *.safetensors")
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: is a file; give the folder that holds config.json and *.safetensors")
        self.config = self._config()
        self._files: dict[str, RandomAccessFile] = {}
        try:
            self.tensors = self._read_headers()
        except BaseException:
            self.close()
            raise

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

    @property
    def name(self) -> str:
        """The model's name: the folder's, or the repository's when the folder is a snapshot in the Hub's cache."""
        folder = self.folder.resolve()
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            return folder.parent.parent.name.split("--")[-1]
        return folder.name

    def json(self, name: str) -> dict[str, Any] | None:
        """One of the folder's JSON objects, or None when there is no such file."""
        path = self.folder / name
        return read_json_object(path) if path.is_file() else None

    def text(self, name: str) -> str | None:
        """One of the folder's text files, or None when there is no such file."""
        path = self.folder / name
        return _read_text(path) if path.is_file() else None

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
        if config is not None:
            return config
        if any(self.folder.glob("*.gguf")):
            raise CheckpointError(
                f"{self.folder}: holds GGUF files and no config.json; these run as they are: qwq-lite chat FILE"
            )
        raise CheckpointError(f"{self.folder}: config.json is missing; this is not a checkpoint folder")

    def _read_headers(self) -> dict[str, SourceTensor]:
        index = self.json(INDEX)
        if index is None:
            self._open(SINGLE, f"{self.folder}: neither {INDEX} nor {SINGLE} is there{self._pickle_hint()}")
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
                    raise CheckpointError(f"{self.folder / file}: tensor {name}: {INDEX} {says}; fetch the index again")
                found[name] = tensor
        missing = next((name for name in listed if name not in found), None)
        if missing:
            raise CheckpointError(
                f"{self.folder / listed[missing]}: tensor {missing} is missing, {INDEX} places it there; fetch the shard again"
            )
        return found

    def _pickle_hint(self) -> str:
        if any(self.folder.glob("*.bin")):
            return "; its .bin files are pickles, which can run code and are never opened: take a safetensors version"
        return "; fetch the weights (*.safetensors) into this folder"

    def _open(self, file: str, message: str) -> None:
        path = self.folder / file
        if not path.is_file():
            raise CheckpointError(message)
        try:
            self._files[file] = RandomAccessFile(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error}") from error

    def _shard(self, file: str) -> dict[str, SourceTensor]:
        path = self.folder / file
        _validate_shard(path)
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            kind = _DTYPES.get(entry["dtype"])
            if kind is None:
                raise CheckpointError(
                    f"{path}: tensor {name} has dtype {entry['dtype']}; {', '.join(_DTYPES)} can be converted:"
                    " take the unquantized checkpoint"
                )
            tensors[name] = SourceTensor(name, tuple(entry["shape"]), kind, file, 8 + length + entry["data_offsets"][0])
        return tensors


def _weight_map(index: Mapping[str, Any], path: Path) -> dict[str, str]:
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise CheckpointError(
            f"{path}: weight_map is missing or not an object of tensor names and file names; fetch the index again"
        )
    for name, file in listed.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: weight_map places {name} in {file!r}; a .safetensors file of this folder is expected"
            )
    return listed


def _validate_shard(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as stream:
        start = stream.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: is a Git LFS pointer and not the weights; run `git lfs pull` in the folder")
    if start.lstrip()[:1] == b"<":
        raise CheckpointError(f"{path}: is a web page and not the weights; fetch the file again")
    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is no complete safetensors file ({error}); fetch it again") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises: CheckpointError naming the file, for everything that is not one."""
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, a JSON object is expected; fetch it again")
    return value


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path}: is larger than {MAX_JSON_BYTES >> 20} MiB, which no such file is; fetch it again"
            )
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as UTF-8 text: {error}") from error
