"""qwq-lite verify: a converted file is OK wherever it lies, and anything done to it is found and named.

sealed_file     an ordinary conversion, with digests
found_in        what `verify` names of a file with some bytes changed, which are put back afterwards
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
import sys
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from gguf import GGUFReader
from gguf.constants import GGMLQuantizationType, GGUFValueType

from qwq_convert import digests
from qwq_convert.pipeline import convert
from qwq_convert.verify import Mismatch, Verification, read_header, verify
from qwq_lite.errors import FormatError
from qwq_lite.formats import gguf_header, gguf_writer
from qwq_lite.formats.tensor_types import file_type
from tests.checkpoints import write_random_checkpoint
from tests.convert.commands import run
from tests.samples import times

N_FLIPS = {"anywhere": times(1000), "header": times(150), "digests": times(100)}
V, T = GGUFValueType, GGMLQuantizationType
Keys = dict[str, tuple[gguf_header.Value, GGUFValueType]]


def sealed_file(folder: Path, kind: str, **checkpoint: int) -> Path:
    """A file with digests; its checkpoint lies beside it, in `Tiny`."""
    path = folder / f"Tiny-{kind}.gguf"
    convert(write_random_checkpoint(folder / "Tiny", **checkpoint), file_type(kind), path)  # type: ignore[arg-type]
    return path


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sealed_file(tmp_path_factory.mktemp("sealed"), "Q4_K_M")


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose biases do not fill the alignment."""
    return sealed_file(tmp_path_factory.mktemp("padded"), "F16", hidden=40, ffn=72)


def checked(path: Path) -> Verification:
    return verify(read_header(path), 2)


def places(result: Verification) -> list[str]:
    return [fault.place for fault in result.faults]


@contextmanager
def changed(path: Path, offset: int, data: bytes) -> Iterator[None]:
    with path.open("r+b") as file:
        file.seek(offset)
        before = file.read(len(data))
        file.seek(offset)
        file.write(data)
    try:
        yield
    finally:
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(before)


def found_in(path: Path, offset: int, data: bytes) -> list[str] | str:
    """The places that are named, or the message of the header's reader, or the outcome where nothing is named."""
    with changed(path, offset, data):
        try:
            result = checked(path)
        except FormatError as error:
            return str(error)
        return places(result) or result.outcome


def test_the_digests_are_those_of_the_bytes(sealed: Path) -> None:
    header, raw = gguf_header.read(sealed), sealed.read_bytes()
    said = header.keys[digests.KEY]
    assert isinstance(said, list)
    own = [hashlib.sha256(tensor.data.tobytes()).hexdigest() for tensor in GGUFReader(sealed).tensors]
    text = raw[: header.data_offset]
    for digest in said:
        text = text.replace(str(digest).encode(), b"0" * 64)
    assert said == [*own, hashlib.sha256(text).hexdigest()]
    assert checked(sealed).outcome == "OK"


def test_name_and_place_do_not_matter(sealed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "other name"
    copy.write_bytes(sealed.read_bytes())
    assert checked(copy).outcome == "OK"
    link = tmp_path / "link.gguf"
    link.symlink_to(copy)
    assert checked(link).outcome == "OK"


def test_threads_and_progress(sealed: Path) -> None:
    header = read_header(sealed)
    for n_threads in (1, 3, None):
        seen: dict[str, int] = {}

        def count(name: str, n_bytes: int, seen: dict[str, int] = seen) -> None:
            seen[name] = seen.get(name, 0) + n_bytes

        assert verify(header, n_threads, count).outcome == "OK"
        assert seen == {info.name: gguf_header.padded(info.n_bytes) for info in header.tensors}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_a_thread_raises_ends_it(sealed: Path, error: type[BaseException]) -> None:
    calls = []

    def fail(name: str, n_bytes: int) -> None:
        calls.append(name)
        raise error("enough")

    with pytest.raises(error, match="enough"):
        verify(read_header(sealed), 2, fail)
    assert len(calls) <= 2, "each thread stops at its next step"


def digests_region(path: Path, header: gguf_header.Header) -> tuple[int, int]:
    """Where the key and its array lie in the file."""
    start = path.read_bytes().index(digests.KEY.encode())
    return start, start + len(digests.KEY) + 16 + 72 * (len(header.tensors) + 1)


@pytest.mark.sampled
@pytest.mark.parametrize("region", N_FLIPS)
def test_a_flipped_bit_is_found_wherever_it_is(sealed: Path, region: str) -> None:
    header, raw, source = gguf_header.read(sealed), sealed.read_bytes(), random.Random(region)
    start, end = {
        "anywhere": (0, len(raw)),
        "header": (0, header.data_offset),
        "digests": digests_region(sealed, header),
    }[region]
    missed = []
    for _ in range(N_FLIPS[region]):
        offset, bit = source.randrange(start, end), 1 << source.randrange(8)
        found = found_in(sealed, offset, bytes([raw[offset] ^ bit]))
        struck = [i.name for i in header.tensors if 0 <= offset - header.data_offset - i.offset < i.n_bytes]
        if found == "OK" or (struck and found != struck):
            missed.append((offset, bit, found))
    assert not missed
    assert checked(sealed).outcome == "OK", "every change was put back"


def test_two_tensors_that_changed_places_are_both_named(sealed: Path) -> None:
    header, raw = gguf_header.read(sealed), sealed.read_bytes()
    one, other = (next(i for i in header.tensors if i.name == f"blk.{n}.ffn_up.weight") for n in (0, 1))
    assert one.n_bytes == other.n_bytes
    starts = [header.data_offset + info.offset for info in (one, other)]
    pieces = [raw[start : start + one.n_bytes] for start in starts]
    with changed(sealed, starts[0], pieces[1]), changed(sealed, starts[1], pieces[0]):
        assert places(checked(sealed)) == [one.name, other.name]


def test_two_names_that_changed_places_are_found(sealed: Path) -> None:
    raw = sealed.read_bytes()
    one, other = b"blk.0.ffn_up.weight", b"blk.1.ffn_up.weight"
    with changed(sealed, raw.index(one), other), changed(sealed, raw.index(other), one):
        assert places(checked(sealed)) == ["the header"], "the weights themselves are whole"


def test_padding_between_tensors_is_zero(padded: Path) -> None:
    header = gguf_header.read(padded)
    info = next(info for info in header.tensors if info.n_bytes % 32)
    end = header.data_offset + info.offset + info.n_bytes
    assert checked(padded).outcome == "OK"
    with changed(padded, end, b"\x01"):
        assert checked(padded).faults == (Mismatch(info.name, "is followed by padding that is not zero"),)
    assert found_in(padded, end - 1, bytes([padded.read_bytes()[end - 1] ^ 0x80])) == [info.name]


def test_every_length_but_the_right_one_is_found(sealed: Path, tmp_path: Path) -> None:
    header, raw = gguf_header.read(sealed), sealed.read_bytes()
    copy = tmp_path / "copy.gguf"
    source = random.Random(0)
    boundaries = [header.data_offset + info.offset for info in header.tensors]
    for length in [0, 3, 100, *boundaries, *(source.randrange(len(raw)) for _ in range(30)), len(raw) - 1]:
        copy.write_bytes(raw[:length])
        with pytest.raises(FormatError, match="fetch or convert it again"):
            checked(copy)
    for extra in (b"\0", bytes(32), raw):
        copy.write_bytes(raw + extra)
        assert checked(copy).faults == (Mismatch("the end", f"{len(extra)} bytes follow the last tensor"),)


def test_padding_that_is_missing_at_the_end_is_found(tmp_path: Path) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(written({}, [("a", (5,), T.F32)]) + bytes(20))
    assert checked(path).faults == (Mismatch("the end", "12 bytes of padding are missing"),)


def written(keys: Keys, tensors: Sequence[tuple[str, tuple[int, ...], GGMLQuantizationType]]) -> bytes:
    """A header's bytes."""
    return gguf_writer.encode("qwen2", keys, gguf_writer.layout(tensors))


@pytest.mark.parametrize(
    ("offsets", "found"),
    [((0, 64), []), ((0, 96), ["b"]), ((64, 0), ["a", "b"])],
    ids=["in order", "a gap", "out of order"],
)
def test_tensors_follow_each_other_as_llama_cpp_wants_it(
    tmp_path: Path, offsets: tuple[int, int], found: list[str]
) -> None:
    path, header = tmp_path / "some.gguf", bytearray(written({}, [("a", (16,), T.F32), ("b", (16,), T.F32)]))
    for name, offset in zip(("a", "b"), offsets, strict=True):
        entry = struct.pack(
            "<Q1sIQI", 1, name.encode(), 1, 16, T.F32
        )  # name, dimensions, shape, type; its offset follows
        place = header.index(entry) + len(entry)
        header[place : place + 8] = struct.pack("<Q", offset)
    path.write_bytes(header + bytes(max(offsets) + 64))
    result = checked(path)
    assert places(result) == found
    assert result.outcome == ("damaged" if found else "cannot be verified")


def test_a_file_without_valid_digests_is_never_ok(sealed: Path, tmp_path: Path) -> None:
    raw, header = sealed.read_bytes(), gguf_header.read(sealed)
    assert found_in(sealed, raw.index(b"qwq_lite.sha256"), b"qwq_lite.sha512") == "cannot be verified"
    start, end = digests_region(sealed, header)
    array = start + len(digests.KEY) + 16
    unknown = raw[array:end]
    for digest in set(header.keys[digests.KEY]):  # type: ignore[arg-type]
        unknown = unknown.replace(str(digest).encode(), b"0" * 64)
    assert found_in(sealed, array, unknown) == "cannot be verified"
    path = tmp_path / "fewer.gguf"
    path.write_bytes(written({digests.KEY: digests.placeholder(0)}, [("a", (8,), T.F32)]) + bytes(32))
    assert checked(path).outcome == "cannot be verified"


def test_digests_in_capitals_or_of_another_length_are_not_valid(tmp_path: Path) -> None:
    path, tensors, data = tmp_path / "a.gguf", [("a", (8,), T.F32)], bytes(range(32))
    right = hashlib.sha256(data).hexdigest()
    path.write_bytes(digests.write_digests(written({digests.KEY: digests.placeholder(1)}, tensors), [right]) + data)
    assert checked(path).outcome == "OK"
    path.write_bytes(
        digests.write_digests(written({digests.KEY: digests.placeholder(1)}, tensors), [right.upper()]) + data
    )
    assert places(checked(path)) == ["a"]
    path.write_bytes(written({digests.KEY: (["0" * 64, "0" * 63], V.ARRAY)}, tensors) + data)
    assert checked(path).outcome == "cannot be verified"


def test_a_text_that_looks_like_the_digests_is_not_taken_for_them() -> None:
    key = {digests.KEY: digests.placeholder(1)}
    tensors = [("a", (8,), T.F32)]
    bare = written(key, tensors)
    lure = bare[bare.index(digests.KEY.encode()) - 8 :][: 8 + len(digests.KEY) + 16 + 72].decode("ascii")
    header = written({"a.lure": (lure, V.STRING), **key, "z.lure": (lure, V.STRING)}, tensors)
    assert header.count(lure.encode()) == 3
    filled = digests.write_digests(header, ["ab" * 32])
    assert len(filled) == len(header)
    first, second = (filled.index(b"ab" * 32), filled.rindex(b"ab" * 32))
    assert first == second
    assert filled.index(lure.encode()) < first < filled.rindex(lure.encode())
    own = hashlib.sha256(header).hexdigest()
    assert digests.read_digests(filled, 1) == digests.Digests(("ab" * 32,), own, own)


@pytest.mark.parametrize("n_tensors", [0, 2], ids=["too few", "too many"])
def test_a_header_without_room_for_the_digests_is_not_sealed(n_tensors: int) -> None:
    header = written({digests.KEY: digests.placeholder(n_tensors)}, [("a", (8,), T.F32)])
    with pytest.raises(ValueError, match=r"qwq_lite\.sha256"):
        digests.write_digests(header, ["ab" * 32])
    with pytest.raises(ValueError, match=r"qwq_lite\.sha256"):
        digests.write_digests(written({}, []), [])


@pytest.mark.skipif(sys.platform == "win32", reason="a file that grows by truncate is not sparse there")
def test_memory_does_not_grow_with_a_tensor(tmp_path: Path) -> None:
    path, size = tmp_path / "large.gguf", 64 << 20
    header = written({digests.KEY: digests.placeholder(1)}, [("a", (1024, size >> 12), T.F32)])
    path.write_bytes(digests.write_digests(header, [hashlib.sha256(bytes(size)).hexdigest()]))
    os.truncate(path, len(header) + size)
    found = read_header(path)
    tracemalloc.start()
    try:
        assert verify(found, 1).outcome == "OK"
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_the_command_says_ok(sealed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "verify", sealed) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{sealed}: OK: 27 tensors") and not err
    assert run(monkeypatch, "verify", sealed, "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    assert run(monkeypatch, "verify", sealed, "--json", "-j", "1") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["outcome"], said["n_tensors"], said["faults"]) == ("OK", 27, [])


def test_the_command_names_what_is_damaged(
    sealed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    header = gguf_header.read(sealed)
    info = header.tensors[5]
    with changed(sealed, header.data_offset + info.offset, b"\xff\xff\xff"):
        assert run(monkeypatch, "verify", sealed, "--quiet") == 1
        out, err = capsys.readouterr()
        assert out == f"{info.name} ({info.type.name}): differs from its digest\n"
        assert (
            err == f"qwq-lite: {sealed}: is damaged: 1 of 27 tensors; fetch it again, or convert the checkpoint again\n"
        )
        assert run(monkeypatch, "verify", sealed, "--json") == 1
        said = json.loads(capsys.readouterr().out)
    assert said["outcome"] == "damaged"
    assert said["faults"] == [{"place": info.name, "message": "differs from its digest"}]


def split_file(folder: Path) -> Path:
    path = folder / "part.gguf"
    keys: Keys = {"split.no": (1, V.UINT16), "split.count": (3, V.UINT16)}
    path.write_bytes(written(keys, [("a", (8,), T.F32)]) + bytes(32))
    return path


def header_only(folder: Path) -> Path:
    path = folder / "ghost.gguf"
    path.write_bytes(written({}, [("a", (8,), T.F32)]))
    return path


def bare(folder: Path) -> Path:
    path = folder / "no-digests.gguf"
    path.write_bytes(written({}, [("a", (8,), T.F32)]) + bytes(32))
    return path


def far_data(folder: Path) -> Path:
    path, alignment = folder / "far.gguf", 1 << 30
    path.write_bytes(written({"general.alignment": (alignment, V.UINT32)}, [("a", (8,), T.F32)]))
    os.truncate(path, alignment + 32)
    return path


def no_gguf(folder: Path) -> Path:
    (folder / "x.gguf").write_bytes(b"<html>\x1b[2Jnot found</html>")
    return folder / "x.gguf"


def dangling(folder: Path) -> Path:
    (folder / "link.gguf").symlink_to(folder / "gone.gguf")
    return folder / "link.gguf"


REFUSED = {
    "a part of several": (split_file, "is part 2 of 3"),
    "a header alone": (header_only, "ends at byte 32 of 0"),
    "no digests": (bare, "cannot be verified"),
    "data far away": (far_data, "general.alignment"),
    "no GGUF": (no_gguf, "is a web page"),
    "a folder": (lambda folder: folder, "is not a file"),
    "nothing": (lambda folder: folder / "gone.gguf", "is not a file"),
    "a link to nothing": (dangling, "is not a file"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_the_command_refuses_in_one_line(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, words = REFUSED[what]
    path = make(tmp_path)
    assert run(monkeypatch, "verify", path, "--quiet") == 1
    out, err = capsys.readouterr()
    assert not out
    assert len(err.splitlines()) == 1
    assert str(path) in err and words in err
    assert "\x1b" not in err
    assert run(monkeypatch, "verify", path, "--json") == 1
    assert json.loads(capsys.readouterr().out)["outcome"] in ("error", "cannot be verified")


def test_a_tensor_name_does_not_reach_the_terminal_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "evil.gguf"
    path.write_bytes(written({}, [("[red]a\x1b[31m\r\u202e", (5,), T.F32)]) + bytes(20) + b"padding!!!!!")
    assert run(monkeypatch, "verify", path) == 1
    out, _ = capsys.readouterr()
    assert out.splitlines() == ["[red]a\\x1b[31m\\r\\u202e (F32): is followed by padding that is not zero"]
