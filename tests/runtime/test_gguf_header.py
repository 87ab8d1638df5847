"""gguf_header: what is written is read again, and whatever else the bytes are, FormatError is all that happens."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

import pytest
from gguf.constants import GGMLQuantizationType, GGUFValueType
from hypothesis import example, given
from hypothesis import strategies as st

from qwq_lite.errors import FormatError
from qwq_lite.formats import gguf_header, gguf_writer
from qwq_lite.formats.gguf_header import Header, TensorInfo, Value

F32, Q8_0 = GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0
KEYS: dict[str, tuple[Value, GGUFValueType]] = {
    "general.name": ("人工智能 😀", GGUFValueType.STRING),
    "test.u8": (255, GGUFValueType.UINT8),
    "test.i64": (-(1 << 62), GGUFValueType.INT64),
    "test.f64": (0.1, GGUFValueType.FLOAT64),
    "test.yes": (True, GGUFValueType.BOOL),
    "test.texts": (["a", "", "é"], GGUFValueType.ARRAY),
    "test.numbers": ([1, -2, 3], GGUFValueType.ARRAY),
}
TENSORS = gguf_writer.layout([("norm.weight", (5,), F32), ("block.weight", (64, 3), Q8_0)])
DATA_BYTES = TENSORS[-1].offset + TENSORS[-1].n_bytes
HEADER = gguf_writer.encode("qwen2", KEYS, TENSORS)
FILE = HEADER + bytes(DATA_BYTES)


def read_bytes(data: bytes, folder: Path) -> Header:
    path = folder / "model.gguf"
    path.write_bytes(data)
    return gguf_header.read(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for a whole property: hypothesis runs many examples in one test."""
    return tmp_path_factory.mktemp("gguf")


def string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file(
    keys: list[bytes],
    tensors: list[bytes],
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] = (0, 0),
) -> bytes:
    """A file of hand-made parts, with 256 bytes of data. counts: what is added to the true numbers of tensors and keys."""
    head = magic + struct.pack("<IQQ", version, len(tensors) + counts[0], len(keys) + counts[1])
    head += b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(256)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    header = read_bytes(FILE, tmp_path)
    assert header.keys == {"general.architecture": "qwen2"} | {name: value for name, (value, _) in KEYS.items()}
    assert header.tensors == tuple(TENSORS)
    assert header.data_offset == len(HEADER)
    assert header.file_bytes == len(FILE)


def test_a_file_of_hand_made_parts_is_read(tmp_path: Path) -> None:
    """The other tests of this file change one thing about such a file."""
    header = read_bytes(file([key("a", 0, b"\7")], [tensor("x"), tensor("y", (4, 2), offset=32)]), tmp_path)
    assert header.keys == {"a": 7}
    assert header.tensors == (TensorInfo("x", (8,), F32, 0), TensorInfo("y", (4, 2), F32, 32))


def test_version_2_is_read(tmp_path: Path) -> None:
    assert read_bytes(file([], [tensor("x")], version=2), tmp_path).tensors[0].name == "x"


def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    for n_bytes in range(len(FILE)):
        with pytest.raises(FormatError, match=r"model\.gguf"):
            read_bytes(FILE[:n_bytes], tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(file([], [], magic=b"GGML"), "starts with b'GGML'", id="magic"),
        pytest.param(file([], [], magic=b"FUGG"), "starts with b'FUGG'", id="magic of the other byte order"),
        pytest.param(file([], [], version=0), "version 0", id="version 0"),
        pytest.param(file([], [], version=1), "version 1", id="version 1"),
        pytest.param(file([], [], version=4), "version 4", id="version 4"),
        pytest.param(file([], [], version=3 << 24), "is a big-endian GGUF", id="big-endian version"),
        pytest.param(file([key("a", 0, b"\1")] * 2, []), "key a occurs twice", id="duplicate key"),
        pytest.param(file([], [tensor("x"), tensor("x", offset=32)]), "tensor x occurs twice", id="duplicate tensor"),
        pytest.param(file([], [tensor("x", (16,)), tensor("y", offset=32)]), "overlaps x", id="overlap"),
        pytest.param(file([], [tensor("x"), tensor("y")]), "overlaps x", id="same place"),
        pytest.param(file([], [tensor("x", offset=16)]), "a multiple of 32", id="misaligned offset"),
        pytest.param(file([], [tensor("x", offset=256)]), "of 256 bytes of data", id="data beyond the end"),
        pytest.param(file([], [tensor("x", offset=1 << 63)]), "of 256 bytes of data", id="data far beyond the end"),
        pytest.param(file([], [], counts=((1 << 64) - 1, 0)), "number of tensors", id="absurd number of tensors"),
        pytest.param(file([], [], counts=(0, (1 << 64) - 1)), "number of keys", id="absurd number of keys"),
        pytest.param(file([struct.pack("<Q", (1 << 64) - 1)], []), "length of a key", id="absurd length of a key"),
        pytest.param(file([key("a", 8, struct.pack("<Q", 1 << 63))], []), "length of a", id="absurd length of a text"),
        pytest.param(file([key("a", 9, struct.pack("<IQ", 10, 1 << 61))], []), "length of a", id="absurd array"),
        pytest.param(
            file([key("a", 9, struct.pack("<IQ", 8, 1 << 61))], []), "length of a", id="absurd array of texts"
        ),
        pytest.param(file([key("a", 9, struct.pack("<IQ", 9, 1))], []), "array of arrays", id="array of arrays"),
        pytest.param(file([key("a", 99, b"")], []), "value type 99", id="value type"),
        pytest.param(file([key("a", 9, struct.pack("<IQ", 99, 1))], []), "value type 99", id="element type"),
        pytest.param(file([], [tensor("x", ())]), "0 dimensions", id="no dimension"),
        pytest.param(file([], [tensor("x", (1,) * 5)]), "5 dimensions", id="five dimensions"),
        pytest.param(file([], [tensor("x", (0,))]), "shape", id="empty tensor"),
        pytest.param(file([], [tensor("x", (1 << 40, 1 << 40))]), "shape", id="absurd shape"),
        pytest.param(file([], [tensor("x", (33,), kind=8)]), "blocks of 32", id="half a block"),
        pytest.param(file([], [tensor("x", kind=9999)]), "9999", id="tensor type"),
        pytest.param(file([], [tensor("x" * 64)]), "63 are allowed", id="long tensor name"),
        pytest.param(
            file([key("general.alignment", 4, struct.pack("<I", 48))], []), "power of two", id="alignment not a power"
        ),
        pytest.param(file([key("general.alignment", 4, bytes(4))], []), "power of two", id="alignment 0"),
        pytest.param(file([key("general.alignment", 8, string("32"))], []), "power of two", id="alignment a text"),
    ],
)
def test_a_file_that_breaks_the_format_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=message):
        read_bytes(data, tmp_path)


@pytest.mark.parametrize("kind", list(GGMLQuantizationType), ids=lambda kind: kind.name)
def test_every_tensor_type_has_a_size(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    header = read_bytes(file([], [tensor("x", (256,), int(kind))]) + bytes(4096), tmp_path)
    assert header.tensors[0].type == kind
    assert 0 < header.tensors[0].n_bytes <= 256 * 8


def test_a_key_of_another_type_is_no_text(tmp_path: Path) -> None:
    header = read_bytes(file([key("a", 0, b"\7")], []), tmp_path)
    assert header.text("missing") is None
    with pytest.raises(FormatError, match="a is int, a string is expected"):
        header.text("a")


def test_a_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is not a file"):
        gguf_header.read(tmp_path)


def test_a_path_where_nothing_is_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is not a file"):
        gguf_header.read(tmp_path / "absent.gguf")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no FIFO in the file system")
def test_a_fifo_without_a_writer_is_refused_at_once(tmp_path: Path) -> None:
    if sys.platform != "win32":
        os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(FormatError, match="is not a file"):
        gguf_header.read(tmp_path / "pipe.gguf")


def read_or_refuse(data: bytes, folder: Path) -> Header | None:
    """Anything but a header or FormatError fails the test by itself."""
    try:
        return read_bytes(data, folder)
    except FormatError:
        return None


@given(st.lists(st.tuples(st.integers(0, len(FILE) - 1), st.integers(0, 255)), min_size=1, max_size=8))
@example([(4, 2)])
def test_changed_bytes_give_a_header_within_the_file_or_a_format_error(
    folder: Path, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(FILE)
    for place, byte in changes:
        data[place] = byte
    header = read_or_refuse(bytes(data), folder)
    if header is not None:
        assert all(header.data_offset + info.offset + info.n_bytes <= len(data) for info in header.tensors)


@given(st.binary(max_size=200))
def test_any_bytes_after_the_magic_give_a_header_within_the_file_or_a_format_error(folder: Path, tail: bytes) -> None:
    header = read_or_refuse(b"GGUF\3\0\0\0" + tail, folder)
    if header is not None:
        assert all(header.data_offset + info.offset + info.n_bytes <= 8 + len(tail) for info in header.tensors)
