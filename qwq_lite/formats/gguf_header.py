"""The header of a GGUF file, read and validated. Knows no weights and no llama.cpp; `gguf_writer` writes one.

Layout (little-endian), https://github.com/ggml-org/ggml/blob/master/docs/gguf.md:

    magic "GGUF" · version u32 · n_tensors u64 · n_keys u64
    n_keys    × key string · value type u32 · value          (an array is: element type u32 · length u64 · elements)
    n_tensors × name string · n_dims u32 · dims u64… · ggml type u32 · offset u64
    padding to general.alignment · data

A split model is several such files, NAME-00001-of-0000N.gguf and so on: the first has all keys, each has some of the tensors.

A string is its length (u64) and that many bytes of UTF-8. Dimensions stand in ggml's order: columns first.
gguf.GGUFReader maps the whole file and takes seconds for a vocabulary of 150,000 tokens; this takes tenths.
"""

from __future__ import annotations

import io
import math
import os
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple, Union

from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from qwq_lite.errors import FormatError
from qwq_lite.formats import not_a_model

Value = Union[bool, int, float, str, "list[bool]", "list[int]", "list[float]", "list[str]"]

MAX_DIMS = 4
MAX_NAME_BYTES = 63  # GGML_MAX_NAME less its terminator
MAX_KEY_BYTES = 65_535

# Room for any model known, and a bound on memory: a changed byte in a length must not read a file of 20 GB as one text.
MAX_HEADER_BYTES = 1 << 28
MAX_ELEMENTS = (
    1 << 22
)  # of all arrays together; the largest vocabularies have 1.4 million with merges, scores and types
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17

# Source: llama.cpp src/llama-model-loader.cpp; a part whose number has another type ends the process there.
SPLIT_KEYS = SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS_COUNT = "split.no", "split.count", "split.tensors.count"
_SPLIT_TYPES = {
    SPLIT_NO: GGUFValueType.UINT16,
    SPLIT_COUNT: GGUFValueType.UINT16,
    SPLIT_TENSORS_COUNT: GGUFValueType.INT32,
}
_PART_NAME = re.compile(r"(.+)-\d{5}-of-\d{5}\.gguf")

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's place in a file."""

    name: str
    shape: tuple[int, ...]  # in ggml's order: columns, rows, …
    type: GGMLQuantizationType
    offset: int  # bytes from the start of the data section

    @property
    def n_bytes(self) -> int:
        return tensor_bytes(self.shape, self.type)

    @property
    def n_params(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its data; of a split model, what all its files say."""

    path: Path  # of the file, or of the first part
    keys: Mapping[str, Value]  # of the first part: it has all but split.no
    tensors: tuple[TensorInfo, ...]  # of all parts, each with its offset in its own file
    data_offset: int  # where the data begins, in the first part
    file_bytes: int  # of all parts together
    parts: tuple[Header, ...] = ()  # of a split model: each file as if it were alone

    @property
    def files(self) -> tuple[Header, ...]:
        """Each file that the model lies in, the first part first."""
        return self.parts or (self,)

    def text(self, key: str) -> str | None:
        """The value of a string key. Raises: FormatError when the key holds something else."""
        value = self.keys.get(key)
        if value is not None and not isinstance(value, str):
            raise FormatError(f"{self.path}: {key} is {type(value).__name__}, a string is expected")
        return value


def tensor_bytes(shape: Iterable[int], kind: GGMLQuantizationType) -> int:
    """Bytes of one tensor. Raises: ValueError when the columns do not divide into the type's blocks."""
    columns, *rest = shape
    block: int
    block_bytes: int
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if columns % block:
        raise ValueError(f"{columns} columns do not divide into blocks of {block} ({kind.name})")
    return columns // block * block_bytes * math.prod(rest)


def padded(n_bytes: int, alignment: int = GGUF_DEFAULT_ALIGNMENT) -> int:
    return -(-n_bytes // alignment) * alignment


class _Cursor:
    """Typed reads that end in a FormatError that names file and place, never in a short read."""

    def __init__(self, file: BinaryIO, path: Path, file_bytes: int) -> None:
        self._file, self._path, self._left = file, path, min(file_bytes, MAX_HEADER_BYTES)
        self._elements_left = MAX_ELEMENTS

    def error(self, message: str) -> FormatError:
        shown = message if len(message) <= 500 else f"{message[:500]}…"  # a key may have 65,535 bytes
        return FormatError(f"{self._path}: {shown}; the file is damaged or no GGUF model, fetch or convert it again")

    def take(self, n_bytes: int, what: str) -> bytes:
        if n_bytes > self._left:
            raise self.error(f"{what} needs {n_bytes} bytes, the header has room for {self._left}")
        self._left -= n_bytes
        data = self._file.read(n_bytes)
        if len(data) != n_bytes:
            raise self.error(f"{what} ends early")
        return data

    def number(self, code: str, what: str) -> int:
        value: int = struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]
        return value

    def count(self, unit_bytes: int, what: str, limit: int | None = None) -> int:
        """A length whose elements, at `unit_bytes` each at least, must still fit in the file."""
        value = self.number("Q", what)
        if value * unit_bytes > self._left:
            raise self.error(f"{what} is {value}, more than the header can hold")
        if limit is not None and value > limit:
            raise self.error(f"{what} is {value}, {limit} are allowed")
        return value

    def elements(self, unit_bytes: int, key: str) -> int:
        """The length of an array."""
        value = self.count(unit_bytes, f"length of {key}", self._elements_left)
        self._elements_left -= value
        return value

    def string(self, what: str, limit: int | None = None) -> str:
        length = self.count(1, f"length of {what}")
        if limit is not None and length > limit:
            raise self.error(f"{what} is {length} bytes long, {limit} are allowed")
        return self.take(length, what).decode("utf-8", "surrogateescape")

    def value(self, key: str) -> Value:
        kind = self._value_type(key)
        if kind != (expected := _SPLIT_TYPES.get(key, kind)):
            raise self.error(f"{key} has value type {kind.name}, {expected.name} is expected")
        if kind == GGUFValueType.STRING:
            return self.string(key)
        if kind != GGUFValueType.ARRAY:
            return self._scalars(kind, 1, key)[0]
        element = self._value_type(key)
        if element == GGUFValueType.ARRAY:
            raise self.error(f"{key} is an array of arrays, which GGUF readers do not accept")
        if element == GGUFValueType.STRING:
            return [self.string(key) for _ in range(self.elements(8, key))]
        width = struct.calcsize(_SCALARS[element])
        return list(self._scalars(element, self.elements(width, key), key))

    def _value_type(self, key: str) -> GGUFValueType:
        raw = self.number("I", f"type of {key}")
        try:
            return GGUFValueType(raw)
        except ValueError as error:
            raise self.error(f"{key} has value type {raw}, 0 to {max(GGUFValueType)} are known") from error

    def _scalars(self, kind: GGUFValueType, n: int, key: str) -> tuple[int, ...]:
        layout = struct.Struct(f"<{n}{_SCALARS[kind]}")
        return layout.unpack(self.take(layout.size, key))


def read(path: Path) -> Header:
    """Read and validate the header of a model, of a split one those of all its parts.

    Args:
        path: the file, or the first part of a split model; llama.cpp finds the others by name, beside it.

    Raises: FormatError when the bytes do not follow the format, a file cannot be read, or parts are missing or do not belong
        together.
    """
    first = _read_file(path)
    count = first.keys.get(SPLIT_COUNT, 0)
    return _join_parts(first, count) if isinstance(count, int) and count > 1 else first


def _join_parts(first: Header, count: int) -> Header:
    """The header of a split model. Source: llama_model_loader::llama_model_loader"""
    paths, n_tensors = _part_paths(first, count), first.keys.get(SPLIT_TENSORS_COUNT)
    if n_tensors is None:
        raise FormatError(f"{first.path}: {SPLIT_TENSORS_COUNT} is missing; fetch it again")
    parts, owners = [first], dict.fromkeys((info.name for info in first.tensors), first.path)
    for number, path in enumerate(paths[1:], 1):
        if not path.is_file():
            raise FormatError(
                f"{path}: is missing: part {number + 1} of {count} of the split model {first.path}; fetch it into the same folder"
            )
        part = _read_file(path)
        for key, expected in ((SPLIT_NO, number), (SPLIT_COUNT, count), (SPLIT_TENSORS_COUNT, n_tensors)):
            found = part.keys.get(key, "missing")
            if found != expected:
                raise FormatError(
                    f"{path}: {key} is {found}, {expected} is expected in part {number + 1} of {first.path}; fetch it again"
                )
        for info in part.tensors:
            if owners.setdefault(info.name, path) is not path:
                raise FormatError(
                    f"{path}: tensor {info.name} is in {owners[info.name]} too: parts of different models; fetch all again"
                )
        parts.append(part)
    if len(owners) != n_tensors:
        raise FormatError(
            f"{first.path}: its {count} parts hold {len(owners)} tensors, {SPLIT_TENSORS_COUNT} is {n_tensors}; fetch all again"
        )
    tensors = tuple(info for part in parts for info in part.tensors)
    return replace(first, tensors=tensors, file_bytes=sum(part.file_bytes for part in parts), parts=tuple(parts))


def _part_paths(first: Header, count: int) -> list[Path]:
    """Where llama.cpp looks for the parts. Source: llama_split_prefix, llama_split_path"""
    path, number = first.path, first.keys.get(SPLIT_NO, 0)
    name = _PART_NAME.fullmatch(path.name)
    stem = name[1] if name else "NAME"
    paths = [path.with_name(f"{stem}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    if isinstance(number, int) and number and path != paths[0]:
        raise FormatError(f"{path}: is part {number + 1} of {count} of a split model; give its first part: {paths[0]}")
    if path != paths[0]:
        raise FormatError(
            f"{path}: is the first of {count} parts of a split model, which are found by their names; call it {paths[0].name},"
            " and keep the others beside it"
        )
    if first.keys.get(SPLIT_NO, "missing") != 0:
        raise FormatError(
            f"{path}: {SPLIT_NO} is {first.keys.get(SPLIT_NO, 'missing')}, 0 is expected by its name; fetch it again"
        )
    return paths


def _read_file(path: Path) -> Header:
    """The header of one file."""
    try:
        return _read(path)
    except OSError as error:
        raise FormatError(
            f"{path}: cannot be read: {error.strerror or error}; give the path of a .gguf file"
        ) from error


def _read(path: Path) -> Header:
    if not path.is_file():  # a folder, a FIFO, nothing: opening those would fail late or never return
        raise FormatError(f"{path}: {not_a_model.describe_missing_file(path)}")
    with path.open("rb") as file:
        found = not_a_model.describe_other_format(path, file.read(not_a_model.FIRST_BYTES))
        if found is not None:
            raise FormatError(f"{path}: {found}")
        file.seek(0)
        file_bytes = os.fstat(file.fileno()).st_size
        cursor = _Cursor(file, path, file_bytes)
        n_tensors, n_keys = _read_counts(cursor)
        keys = _read_keys(cursor, n_keys)
        infos = _read_tensor_infos(cursor, n_tensors)
        end = file.tell()
    alignment = keys.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment is {alignment!r}, a power of two is expected")
    data_offset = padded(end, alignment)
    _check_places(cursor, infos, alignment, file_bytes - data_offset)
    return Header(path, keys, infos, data_offset, file_bytes)


class KeyPlace(NamedTuple):
    """Where a key begins in a header's bytes, where its value does (its type first), and where that ends."""

    key: int
    value: int
    end: int


def key_places(header: bytes) -> dict[str, KeyPlace]:
    """The place of each key, in their order. Raises: FormatError when the keys do not follow the format."""
    memory = io.BytesIO(header)
    cursor = _Cursor(memory, Path("header"), len(header))
    _, n_keys = _read_counts(cursor)
    places = {}
    for _ in range(n_keys):
        start = memory.tell()
        name, value = cursor.string("a key", MAX_KEY_BYTES), memory.tell()
        cursor.value(name)
        places[name] = KeyPlace(start, value, memory.tell())
    return places


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    """What stands before the keys: how many tensors there are, and how many keys."""
    magic = cursor.take(4, "the magic number")
    if magic != b"GGUF":
        raise cursor.error(f"starts with {magic!r} where b'GGUF' is expected")
    version = cursor.number("I", "the version")
    if version not in (2, 3):
        raise cursor.error(f"version {version}, 2 and 3 are known")
    n_tensors = cursor.count(8 + 4 + 8 + 4 + 8, "the number of tensors", MAX_TENSORS)
    return n_tensors, cursor.count(8 + 4 + 1, "the number of keys", MAX_KEYS)


def _read_keys(cursor: _Cursor, n_keys: int) -> dict[str, Value]:
    keys: dict[str, Value] = {}
    for _ in range(n_keys):
        key = cursor.string("a key", MAX_KEY_BYTES)
        if key in keys:
            raise cursor.error(f"key {key} occurs twice")
        keys[key] = cursor.value(key)
    return keys


def _read_tensor_infos(cursor: _Cursor, n_tensors: int) -> tuple[TensorInfo, ...]:
    infos: dict[str, TensorInfo] = {}
    for _ in range(n_tensors):
        name = cursor.string("a tensor name", MAX_NAME_BYTES)
        n_dims = cursor.number("I", f"dimensions of {name}")
        if not 1 <= n_dims <= MAX_DIMS:
            raise cursor.error(f"tensor {name} has {n_dims} dimensions, 1 to {MAX_DIMS} are allowed")
        shape = tuple(cursor.number("Q", f"shape of {name}") for _ in range(n_dims))
        if min(shape) < 1 or math.prod(shape) >= 1 << 62:
            raise cursor.error(f"tensor {name} has the shape {shape}")
        raw, offset = cursor.number("I", f"type of {name}"), cursor.number("Q", f"offset of {name}")
        if name in infos:
            raise cursor.error(f"tensor {name} occurs twice")
        try:
            info = TensorInfo(name, shape, GGMLQuantizationType(raw), offset)
            _ = info.n_bytes
        except ValueError as error:
            raise cursor.error(f"tensor {name}: {error}") from error
        infos[name] = info
    return tuple(infos.values())


def _check_places(cursor: _Cursor, infos: Iterable[TensorInfo], alignment: int, data_bytes: int) -> None:
    end, last = 0, "the start of the data"
    for info in sorted(infos, key=lambda info: info.offset):
        if info.offset % alignment:
            raise cursor.error(f"tensor {info.name} starts at {info.offset}, a multiple of {alignment} is expected")
        if info.offset < end:
            raise cursor.error(f"tensor {info.name} starts at {info.offset} and overlaps {last}")
        end, last = info.offset + info.n_bytes, info.name
        if end > data_bytes:
            raise cursor.error(f"tensor {info.name} ends at byte {end} of {data_bytes} bytes of data")
