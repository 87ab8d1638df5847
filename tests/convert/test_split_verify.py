"""inspect and verify over the parts of a split model."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path

import pytest

from qwq_convert import digests
from qwq_convert.checkpoint.files import Checkpoint
from qwq_convert.inspection import inspect
from qwq_convert.pipeline import convert
from qwq_convert.verify import compare, read_header, verify
from qwq_lite.errors import FormatError
from qwq_lite.formats import gguf_header
from qwq_lite.formats.tensor_types import file_type
from tests.checkpoints import write_random_checkpoint
from tests.convert.commands import run
from tests.splits import write_split

N_FLIPS = 100  # of each model


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    convert(write_random_checkpoint(folder / "Tiny"), file_type("Q4_K_M"), folder / "Tiny.gguf")
    return folder / "Tiny.gguf"


@pytest.fixture(params=[(2, True), (2, False), (5, True), (5, False)], ids=["2", "2 empty", "5", "5 empty"])
def parts(request: pytest.FixtureRequest, whole: Path, tmp_path: Path) -> list[Path]:
    n_parts, tensors_first = request.param
    return write_split(whole, tmp_path, n_parts, tensors_first=tensors_first)


def test_the_header_before_the_split_comes_back(whole: Path, parts: list[Path]) -> None:
    header, before = read_header(parts[0]), gguf_header.read(whole)
    first = parts[0].read_bytes()[: header.data_offset]
    assert digests.without_split(first, header.tensors, 32) == whole.read_bytes()[: before.data_offset]
    same = whole.read_bytes()[: before.data_offset]
    assert digests.without_split(same, before.tensors, 32) is same


def test_a_split_model_is_ok(parts: list[Path]) -> None:
    seen: dict[str, int] = {}

    def count(name: str, n_bytes: int) -> None:
        seen[name] = seen.get(name, 0) + n_bytes

    header = read_header(parts[0])
    found = verify(header, 2, count)
    assert (found.outcome, found.sealed, found.faults) == ("OK", True, ())
    assert seen == {info.name: gguf_header.padded(info.n_bytes) for info in header.tensors}


def test_a_model_that_was_merged_again_is_ok(whole: Path, tmp_path: Path) -> None:
    """llama-gguf-split --merge leaves its keys, with a count of 0."""
    (path,) = write_split(whole, tmp_path, 1)
    raw = bytearray(path.read_bytes())
    end = gguf_header.key_places(bytes(raw))["split.count"].end
    raw[end - 2 : end] = bytes(2)
    path.write_bytes(raw)
    assert verify(read_header(path)).outcome == "OK"


def test_every_flipped_bit_in_any_part_is_found(parts: list[Path]) -> None:
    source = random.Random(len(parts))
    for _ in range(N_FLIPS):
        part = source.choice(parts)
        raw = part.read_bytes()
        headers = {header.path: header.data_offset for header in read_header(parts[0]).files}
        limit = headers[part] if source.random() < 0.5 else len(raw)
        place, bit = source.randrange(limit), 1 << source.randrange(8)
        part.write_bytes(raw[:place] + bytes([raw[place] ^ bit]) + raw[place + 1 :])
        with contextlib.suppress(FormatError):  # the header is read no more
            assert verify(read_header(parts[0]), 1).outcome == "damaged", (part.name, place, bit)
        part.write_bytes(raw)
    assert verify(read_header(parts[0]), 1).outcome == "OK"


def test_a_tensor_of_a_later_part_is_compared_with_the_checkpoints(whole: Path, parts: list[Path]) -> None:
    with Checkpoint(whole.parent / "Tiny") as checkpoint:
        found, expected = compare(read_header(parts[0]), checkpoint, 2), compare(read_header(whole), checkpoint, 2)
    assert {name: error.cosine for name, error in found.items()} == {
        name: error.cosine for name, error in expected.items()
    }


def test_bytes_behind_a_part_are_named_with_it(parts: list[Path]) -> None:
    with parts[-1].open("ab") as file:
        file.write(bytes(32))
    (fault,) = verify(read_header(parts[0])).faults
    assert (fault.place, fault.message) == ("the end", f"32 bytes follow the last tensor in {parts[-1].name}")


def test_inspect_counts_the_tensors_of_all_parts(
    whole: Path, parts: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found, expected = inspect(parts[0]), inspect(whole)
    assert (found.types, found.shape, found.tied, found.digests) == (
        expected.types,
        expected.shape,
        expected.tied,
        expected.digests,
    )
    assert found.n_bytes == sum(path.stat().st_size for path in parts) and not found.notices
    assert run(monkeypatch, "inspect", parts[0]) == 0
    assert f"GGUF in {len(parts)} files" in capsys.readouterr().out


def test_the_command_says_what_is_damaged(
    parts: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "verify", parts[0]) == 0
    assert capsys.readouterr().out.startswith(f"{parts[0]}: OK: 27 tensors")
    part = read_header(parts[0]).files[-1]
    info, raw = part.tensors[-1], bytearray(part.path.read_bytes())
    raw[part.data_offset + info.offset] ^= 1
    part.path.write_bytes(raw)
    assert run(monkeypatch, "verify", parts[0], "--json") == 1
    said = json.loads(capsys.readouterr().out)
    assert said["faults"] == [{"place": info.name, "message": "differs from its digest"}]
