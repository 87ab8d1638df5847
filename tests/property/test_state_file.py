"""state_file: what is written is read again; a file that was cut or changed anywhere is FormatError; it is there whole or not."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import socket
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwq_lite.errors import FormatError, OutputError, UsageError
from qwq_lite.store import state_file
from qwq_lite.store.state_file import SavedState
from qwq_lite.system import files, output
from tests.samples import examples

SAVED = SavedState("f1", [1, 22, 10999], {"messages": [{"role": "user", "content": "é"}], "n": 0})
PAYLOAD = bytes(range(100))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for a whole property: hypothesis runs many examples in one test."""
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module", autouse=True)
def _in_memory() -> Iterator[None]:
    """Nobody pulls the plug of these tests, and to wait for the disk would take most of their time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


def write(path: Path, saved: SavedState = SAVED, payload: bytes = PAYLOAD) -> Path:
    def fill(view: memoryview) -> None:
        assert len(view) == len(payload)
        view[:] = payload

    state_file.write(path, saved, len(payload), fill)
    return path


def read(path: Path) -> tuple[SavedState, bytes]:
    with state_file.read(path) as (saved, payload):
        return saved, bytes(payload)


def digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()


def read_bytes(data: bytes, folder: Path) -> tuple[SavedState, bytes]:
    path = folder / "changed"
    path.write_bytes(data)
    return read(path)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=8,
)


@examples(60)
@given(
    st.text(),
    st.lists(st.integers(0, 1 << 31)),
    st.dictionaries(st.text(), JSON, max_size=4),
    st.one_of(st.binary(max_size=300), st.integers(0, 70_000).map(bytes)),
)
@example("", [], {}, b"")
@example("f", [], {}, bytes(1 << 20))
@example("\ud800", [0], {"\ud800": "\ud800"}, b"x")
def test_what_is_written_is_read_again(
    folder: Path, fingerprint: str, tokens: list[int], extra: dict[str, Any], payload: bytes
) -> None:
    saved = SavedState(fingerprint, tokens, extra)
    path = write(folder / "state", saved, payload)
    assert read(path) == (saved, payload)
    assert [child.name for child in folder.iterdir() if child.name.startswith(".")] == []


def test_the_payload_begins_at_a_multiple_of_64(tmp_path: Path) -> None:
    """Whatever the length of the JSON: so a mapping of the payload is aligned for whoever reads it."""
    for n in range(65):
        data = write(tmp_path / "state", SavedState("x" * n, [], {}), b"payload").read_bytes()
        assert (len(data) - len(b"payload")) % 64 == 0


@pytest.mark.parametrize("payload", [b"", PAYLOAD])
def test_a_file_that_was_cut_anywhere_is_refused(payload: bytes, tmp_path: Path) -> None:
    data = write(tmp_path / "state", payload=payload).read_bytes()
    for n in range(len(data)):
        with pytest.raises(FormatError):
            read_bytes(data[:n], tmp_path)
    assert read_bytes(data, tmp_path) == (SAVED, payload)


@pytest.mark.parametrize("payload", [b"", PAYLOAD])
@pytest.mark.parametrize("more", [b"\0", b"more", bytes(64)])
def test_a_file_with_more_behind_it_is_refused(payload: bytes, more: bytes, tmp_path: Path) -> None:
    data = write(tmp_path / "state", payload=payload).read_bytes()
    with pytest.raises(FormatError):
        read_bytes(data + more, tmp_path)


CHANGES = [0x01, 0x20, 0xFF]  # another digit; a letter's other case, a space for a zero byte; no text at all


@pytest.mark.parametrize("change", [1 << bit for bit in range(8)])
def test_a_bit_that_changed_in_magic_or_payload_is_refused(change: int, tmp_path: Path) -> None:
    data = write(tmp_path / "state").read_bytes()
    for place in [*range(16), *range(len(data) - len(PAYLOAD), len(data))]:
        changed = bytearray(data)
        changed[place] ^= change
        with pytest.raises(FormatError):
            read_bytes(bytes(changed), tmp_path)


def test_a_byte_that_changed_anywhere_is_refused(tmp_path: Path) -> None:
    """Tokens and K and V belong together: one other token, and the model goes on from a text that nobody wrote."""
    data = write(tmp_path / "state").read_bytes()
    for place, change in itertools.product(range(len(data)), CHANGES):
        changed = bytearray(data)
        changed[place] ^= change
        with pytest.raises(FormatError, match=re.escape(str(tmp_path / "changed"))):
            read_bytes(bytes(changed), tmp_path)


@given(st.binary(max_size=200))
@example(b"")
@example(b"QWQSTAT1")
@example(b"QWQSTAT1" + (2).to_bytes(8, "little") + b"{}")
@example(b"QWQSTAT1" + (2).to_bytes(8, "little") + b"[]" + bytes(46))
@example(b"QWQSTAT1" + (9).to_bytes(8, "little") + b"[" * 9)
@example(b"QWQSTAT1" + (1 << 63).to_bytes(8, "little") + b"{}")
def test_other_bytes_are_refused(folder: Path, data: bytes) -> None:
    with pytest.raises(FormatError):
        read_bytes(data, folder)


EMPTY = {"fingerprint": "f", "tokens": [], "extra": {}, "payload_bytes": 0, "digest": digest(b"").hex()}


def sealed(data: object, payload: bytes = b"") -> bytes:
    """A file around any JSON, with the digest that belongs to it: as another program might write one."""
    text = data if isinstance(data, bytes) else json.dumps(data).encode()
    whole = b"QWQSTAT1" + len(text).to_bytes(8, "little") + digest(text) + text
    return whole.ljust(-(-len(whole) // 64) * 64, b"\0") + payload


def test_a_file_of_another_program_that_follows_the_format_is_read(tmp_path: Path) -> None:
    data = {**EMPTY, "tokens": [7], "payload_bytes": 3, "digest": digest(b"abc").hex(), "more": None}
    assert read_bytes(sealed(EMPTY), tmp_path) == (SavedState("f", [], {}), b"")
    assert read_bytes(sealed(data, b"abc"), tmp_path) == (SavedState("f", [7], {}), b"abc")


@pytest.mark.parametrize("name", EMPTY)
def test_a_description_that_lacks_something_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=f"the description of its state is damaged: KeyError.*{name}"):
        read_bytes(sealed({key: value for key, value in EMPTY.items() if key != name}), tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param([], id="no object"),
        pytest.param({**EMPTY, "tokens": ["x"]}, id="text for a token"),
        pytest.param({**EMPTY, "tokens": 1}, id="number for tokens"),
        pytest.param({**EMPTY, "extra": 1}, id="number for extra"),
        pytest.param({**EMPTY, "payload_bytes": None}, id="no size"),
        pytest.param({**EMPTY, "payload_bytes": -64}, id="negative size"),
        pytest.param({**EMPTY, "payload_bytes": float("inf")}, id="infinite size"),
        pytest.param(
            json.dumps({**EMPTY, "tokens": [10999]}).encode().replace(b"10999", b"1e999"), id="infinite token"
        ),
        pytest.param({**EMPTY, "digest": "no digits"}, id="no hexadecimal digest"),
        pytest.param({**EMPTY, "digest": 1}, id="number for a digest"),
        pytest.param({**EMPTY, "digest": ""}, id="short digest"),
        pytest.param(b"[" * 100_000, id="nested too deep"),
        pytest.param(b"9" * 10_000, id="number too long"),
        pytest.param(b"\xff\xfe{", id="other encoding"),
    ],
)
def test_a_description_that_is_no_description_is_refused(data: object, tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        read_bytes(sealed(data), tmp_path)


def test_a_file_that_is_not_there_or_is_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read as a saved state"):
        read(tmp_path / "nothing")
    with pytest.raises(FormatError, match="cannot be read as a saved state"):
        read(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes with a name, no /dev")
@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_is_no_regular_file_is_refused_at_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's name must be short
    path = Path("state")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    found: list[BaseException] = []

    def ask() -> None:
        for call in (read, write):
            try:
                call(path)
            except (FormatError, OutputError) as error:
                found.append(error)

    thread = threading.Thread(target=ask, daemon=True)  # one that waits would wait for ever
    before = path.lstat()
    thread.start()
    thread.join(60)
    assert [type(error) for error in found] == [FormatError, OutputError]
    assert all(str(error).startswith("state: ") and "a pipe or a socket" in str(error) for error in found)
    assert list(tmp_path.iterdir()) == [tmp_path / "state"]
    assert path.lstat() == before, "nothing was put in its place"


@pytest.mark.parametrize("kind", [ValueError, OSError])
def test_an_error_of_whoever_reads_is_his_own(kind: type[Exception], tmp_path: Path) -> None:
    path = write(tmp_path / "state")

    def use() -> None:
        with state_file.read(path):
            raise kind("mine")

    with pytest.raises(kind, match="mine"):
        use()


def test_the_file_is_free_again_after_reading(tmp_path: Path) -> None:
    path = write(tmp_path / "state")
    read(path)
    with pytest.raises(RuntimeError, match="mine"), state_file.read(path):
        raise RuntimeError("mine")
    path.unlink()


class Refusal(Exception):
    """What a `fill` in these tests raises."""


def fail(view: memoryview) -> None:
    view[0] = 1
    raise Refusal("no")


@pytest.mark.parametrize("before", [True, False])
def test_a_fill_that_fails_leaves_everything_as_it_was(before: bool, tmp_path: Path) -> None:
    path = tmp_path / "state"
    if before:
        write(path)
    with pytest.raises(Refusal, match="no"):
        state_file.write(path, SavedState("other", [], {}), 1000, fail)
    assert [child.name for child in tmp_path.iterdir()] == (["state"] if before else [])
    assert not before or read(path) == (SAVED, PAYLOAD)


def test_a_fill_that_fails_with_a_part_of_the_payload_in_hand_is_heard(tmp_path: Path) -> None:
    def fill(view: memoryview) -> None:
        part = view[:1]
        raise Refusal(f"no {len(part)}")

    with pytest.raises(Refusal, match="no 1"):
        state_file.write(tmp_path / "state", SAVED, 1000, fill)
    assert list(tmp_path.iterdir()) == []


def test_a_fill_that_is_interrupted_leaves_no_file(tmp_path: Path) -> None:
    def fill(view: memoryview) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        state_file.write(tmp_path / "state", SAVED, 8, fill)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "state", SavedState("old", [9] * 500, {}), bytes(5000))
    assert read(write(path)) == (SAVED, PAYLOAD)


def test_what_an_ended_program_left_behind_does_not_stand_in_the_way(tmp_path: Path) -> None:
    (tmp_path / ".state.part").write_bytes(b"half" * 5000)
    assert read(write(tmp_path / "state")) == (SAVED, PAYLOAD)
    assert [child.name for child in tmp_path.iterdir()] == ["state"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes")
@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_only_its_owner_may_read_it(mask: int, tmp_path: Path) -> None:
    """A conversation is private, and its K and V tell what it was."""
    path = tmp_path / "state"
    path.touch(mode=0o666)
    modes: list[int] = []

    def fill(view: memoryview) -> None:
        modes.extend(stat.S_IMODE(child.stat().st_mode) for child in tmp_path.glob(".*"))

    before = os.umask(mask)
    try:
        state_file.write(path, SAVED, 8, fill)
    finally:
        os.umask(before)
    assert (stat.S_IMODE(path.stat().st_mode), modes) == (0o600, [0o600])


@pytest.mark.parametrize("what", [object(), {1, 2}, b"bytes", 1j], ids=lambda what: type(what).__name__)
def test_extra_that_is_no_json_is_a_mistake_of_the_call(what: object, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a saved state takes JSON only"):
        write(tmp_path / "state", SavedState("f", [], {"messages": [what]}))
    assert list(tmp_path.iterdir()) == []


def test_extra_that_contains_itself_is_a_mistake_of_the_call(tmp_path: Path) -> None:
    circle: dict[str, Any] = {}
    circle["again"] = circle
    with pytest.raises(UsageError):
        write(tmp_path / "state", SavedState("f", [], circle))


@pytest.mark.parametrize("kind", ["nan", "infinity", "nested too deep"])
def test_extra_that_would_not_come_back_as_it_was_is_a_mistake_of_the_call(kind: str, tmp_path: Path) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    extra: Any = {"nan": float("nan"), "infinity": float("inf"), "nested too deep": deep}
    with pytest.raises(UsageError):
        write(tmp_path / "state", SavedState("f", [], {"x": extra[kind]}))


def test_a_folder_that_does_not_take_it_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="choose another place"):
        write(tmp_path / "nothing" / "state")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match="choose another place"):
        write(tmp_path / "taken")
    assert [child.name for child in tmp_path.iterdir()] == ["taken"]


def test_a_disk_that_is_full_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: files.RandomAccessFile, size_bytes: int, *, claim: bool) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.RandomAccessFile, "allocate", full)
    with pytest.raises(OutputError, match="the disk is full"):
        write(tmp_path / "state")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="its C library claims")
def test_a_full_disk_is_heard_before_the_mapping_is_filled_where_the_system_cannot_claim_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write into a mapped page that finds no room ends the process."""
    room, really = 3 << 20, os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if offset + len(data) > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return really(fd, data, offset)

    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.setattr(files, "_allocate_on_macos", lambda fd, size_bytes: False)
    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OutputError, match="the disk is full"):
        state_file.write(tmp_path / "state", SAVED, 4 << 20, lambda payload: pytest.fail("was filled"))
    assert list(tmp_path.iterdir()) == []
    assert read(write(tmp_path / "state", payload=bytes(2 << 20))) == (SAVED, bytes(2 << 20))


def test_of_two_who_write_at_once_the_second_is_refused_and_the_first_one_ends_well(tmp_path: Path) -> None:
    path, refusals = tmp_path / "state", []

    def fill(view: memoryview) -> None:
        view[:] = PAYLOAD
        with pytest.raises(OutputError, match="another program is writing") as refusal:
            write(path, SavedState("second", [], {}))
        refusals.append(refusal)

    state_file.write(path, SAVED, len(PAYLOAD), fill)
    assert len(refusals) == 1
    assert read(path) == (SAVED, PAYLOAD)
    assert [child.name for child in tmp_path.iterdir()] == ["state"]


def test_a_second_writer_never_writes_into_the_finished_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one is about to rename when a second one begins, and the second one fails after that."""
    path, began, renamed = tmp_path / "state", threading.Event(), threading.Event()
    rename, errors = files.replace, []

    def second() -> None:
        def fill(view: memoryview) -> None:
            began.set()
            renamed.wait(60)
            raise Refusal("no")

        try:
            state_file.write(path, SavedState("second", [], {}), 1000, fill)
        except (Refusal, OutputError) as error:
            errors.append(error)
        began.set()

    thread = threading.Thread(target=second)

    def slow(temporary: Path, final: Path) -> None:
        thread.start()
        began.wait(60)
        rename(temporary, final)
        renamed.set()

    monkeypatch.setattr(output, "replace", slow)
    write(path)
    thread.join(60)
    assert len(errors) == 1
    assert read(path) == (SAVED, PAYLOAD)
