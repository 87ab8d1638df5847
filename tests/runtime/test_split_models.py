"""A split model is all its files: planned, loaded and refused as a whole."""

from __future__ import annotations

import itertools
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

import qwq_lite
from qwq_convert.pipeline import convert
from qwq_lite.backend.measure import measure
from qwq_lite.backend.settings import EngineSettings
from qwq_lite.engine import local
from qwq_lite.engine.load_options import LoadOptions
from qwq_lite.errors import FormatError
from qwq_lite.formats import gguf_header
from qwq_lite.formats.tensor_types import file_type
from qwq_lite.plan import planning
from qwq_lite.plan.run_plan import HOST_WEIGHTS, Room, Wishes
from qwq_lite.reply.stream import Stream
from tests.checkpoints import write_random_checkpoint
from tests.convert.commands import run
from tests.splits import part_paths, write_split

MB = 1_000_000
CASES = list(itertools.product((2, 5), (True, False)))


@dataclass(frozen=True)
class Models:
    """One model as Q4_K_M and as Q8_0, and the folder of both; `split` writes the parts of one."""

    whole: Path
    other: Path
    folder: Path

    def split(self, n_parts: int, tensors_first: bool = True, source: Path | None = None) -> list[Path]:
        source = source or self.whole
        folder = self.folder / f"{source.stem}-{n_parts}-{tensors_first}"
        if folder.is_dir():
            return part_paths(folder, "M", n_parts)
        folder.mkdir()
        return write_split(source, folder, n_parts, tensors_first=tensors_first, name="M")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("split")
    checkpoint = write_random_checkpoint(folder / "Tiny")
    paths = [folder / f"{kind}.gguf" for kind in ("Q4_K_M", "Q8_0")]
    for path in paths:
        convert(checkpoint, file_type(path.stem), path)
    return Models(paths[0], paths[1], folder)


@pytest.fixture
def parts(models: Models, tmp_path: Path) -> list[Path]:
    """Three parts, to be spoilt."""
    return [Path(shutil.copy(path, tmp_path / path.name)) for path in models.split(3)]


# The plan, and what runs by it


@pytest.mark.parametrize(("n_parts", "tensors_first"), CASES)
def test_the_header_is_that_of_the_whole_file(models: Models, n_parts: int, tensors_first: bool) -> None:
    paths = models.split(n_parts, tensors_first)
    whole, found = gguf_header.read(models.whole), gguf_header.read(paths[0])
    assert [(info.name, info.shape, info.type) for info in found.tensors] == [
        (info.name, info.shape, info.type) for info in whole.tensors
    ]
    assert {key: value for key, value in found.keys.items() if key not in gguf_header.SPLIT_KEYS} == whole.keys
    assert found.file_bytes == sum(path.stat().st_size for path in paths)
    assert [part.path for part in found.files] == paths and whole.files == (whole,)
    assert (found.files[0].tensors != ()) == tensors_first


@pytest.mark.parametrize(("n_parts", "tensors_first"), CASES)
def test_the_plan_is_that_of_the_whole_file_to_the_byte(models: Models, n_parts: int, tensors_first: bool) -> None:
    first = models.split(n_parts, tensors_first)[0]
    limit = 64 * MB
    for source in ("formula", "measured"):  # llama.cpp is asked where it is tight
        plan, other = (
            planning.plan_header(gguf_header.read(path), Room(limit), Wishes(n_ctx=1024))
            for path in (first, models.whole)
        )
        assert plan.footprint.source == source or not sys.platform.startswith("linux")
        assert plan.choice == other.choice and plan.footprint == other.footprint
        assert [*plan.rows()] == [*other.rows()] and plan.footprint.host.weights > 0
        limit = sum(buffers.total + backend for _, buffers, backend, _ in plan.rows())


def test_llama_cpp_counts_the_same_of_both(models: Models) -> None:
    choices = [EngineSettings(1024, **mode) for mode in HOST_WEIGHTS.values()]
    expected = measure(models.whole, choices)
    for n_parts, tensors_first in CASES:
        assert measure(models.split(n_parts, tensors_first)[0], choices) == expected


@pytest.mark.parametrize(("n_parts", "tensors_first"), CASES)
def test_a_split_model_answers_as_the_whole_one(models: Models, n_parts: int, tensors_first: bool) -> None:
    """No bits of a build: both are computed here, by the same kernels on one thread."""
    answers = []
    for path in (models.whole, models.split(n_parts, tensors_first)[0]):
        with qwq_lite.load(path, n_ctx=256, n_threads=1, isolated=False) as model:
            answers.append(done(model.generate(list(range(1, 40)), seed=3, max_tokens=16, temperature=1.0)))
    assert answers[0].answer == answers[1].answer and answers[0].stats.n_generated > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what is resident is counted otherwise")
def test_a_split_model_takes_no_more_than_it_was_allowed(models: Models, demo_gguf: Path, tmp_path: Path) -> None:
    """All weights lie in the second part. Planned without them, its process took 292 MB more than at rest."""
    first, limit = write_split(demo_gguf, tmp_path, 2, tensors_first=False)[0], 268 * MB
    with qwq_lite.load(models.whole, n_ctx=256, n_threads=1) as model:
        at_rest = resident_bytes(model)
    with qwq_lite.load(first, memory=limit, n_threads=1) as model:
        assert model.plan.footprint.host.weights == sum(info.n_bytes for info in gguf_header.read(demo_gguf).tensors)
        taken = resident_bytes(model) - at_rest
    assert model.plan.footprint.host.weights < taken <= limit


def done(stream: Stream) -> qwq_lite.Reply:
    return next(event.reply for event in stream if isinstance(event, qwq_lite.Done))


def resident_bytes(model: qwq_lite.Model) -> int:
    """Of the worker, once all weights were read and the cache, which is cleared when it is made."""
    done(model.generate([1, 2, 3], max_tokens=2))
    rss: int = psutil.Process(model.pid).memory_info().rss  # type: ignore[attr-defined] # a RemoteModel
    return rss


def test_a_saved_session_is_of_all_parts(models: Models, tmp_path: Path) -> None:
    """Part 1 has no tensors and is the same in both: only later parts tell the models apart."""
    own, other = models.split(2, False), models.split(2, False, models.other)
    for name, rest in (("a", own), ("b", other)):
        (tmp_path / name).mkdir()
        shutil.copy(own[0], tmp_path / name)
        shutil.copy(rest[1], tmp_path / name)
    state = tmp_path / "state"
    for name in ("a", "b"):
        with qwq_lite.load(tmp_path / name / own[0].name, n_ctx=256, n_threads=1, isolated=False) as model:
            if name == "a":
                done(model.generate([1, 2, 3], session="x", max_tokens=2))
                model.save_session("x", state, {"kept": 1})
                assert model.restore_session("y", state) == {"kept": 1}
            else:
                with pytest.raises(FormatError):
                    model.restore_session("y", state)


# What is refused: one line that names the file and what to do


def patched(path: Path, key: str, value: bytes) -> None:
    raw = bytearray(path.read_bytes())
    place = gguf_header.key_places(bytes(raw))[key]
    raw[place.end - len(value) : place.end] = value
    path.write_bytes(raw)


def without_a_part(parts: list[Path]) -> None:
    parts[1].unlink()


def a_folder_for_a_part(parts: list[Path]) -> None:
    parts[1].unlink()
    parts[1].mkdir()


def two_parts_swapped(parts: list[Path]) -> None:
    parts[1].rename(parts[1].with_suffix(".x"))
    parts[2].rename(parts[1])
    parts[1].with_suffix(".x").rename(parts[2])


def another_count(parts: list[Path]) -> None:
    patched(parts[1], "split.count", struct.pack("<H", 4))


def another_models_part(parts: list[Path]) -> None:
    patched(parts[1], "split.tensors.count", struct.pack("<i", 579))


def a_number_of_another_type(parts: list[Path]) -> None:
    """llama.cpp asserts the type of a later part's number, and the process ends."""
    patched(parts[1], "split.no", struct.pack("<IH", 3, 1))


def no_number(parts: list[Path]) -> None:
    parts[1].write_bytes(parts[1].read_bytes().replace(b"split.no", b"split.on"))


def a_whole_file_for_a_part(parts: list[Path]) -> None:
    raw = parts[1].read_bytes()
    for key in gguf_header.SPLIT_KEYS:
        raw = raw.replace(key.encode(), key.replace("split", "spilt").encode())
    parts[1].write_bytes(raw)


def a_damaged_part(parts: list[Path]) -> None:
    parts[1].write_bytes(b"<html>" + parts[1].read_bytes()[6:])


def a_part_cut_short(parts: list[Path]) -> None:
    parts[1].write_bytes(parts[1].read_bytes()[:-4096])


def a_tensor_twice(parts: list[Path]) -> None:
    """A name of the first part in place of one of the second that is as long."""
    ours, theirs = ({info.name for info in part.tensors} for part in gguf_header.read(parts[0]).files[:2])
    name, other = next((a.encode(), b.encode()) for a in sorted(ours) for b in sorted(theirs) if len(a) == len(b))
    parts[1].write_bytes(parts[1].read_bytes().replace(other, name, 1))


def too_few_tensors(parts: list[Path]) -> None:
    for part in parts:
        patched(part, "split.tensors.count", struct.pack("<i", 28))


def no_count_of_tensors(parts: list[Path]) -> None:
    parts[0].write_bytes(parts[0].read_bytes().replace(b"split.tensors.count", b"split.tensors.tnuoc"))


REFUSED: dict[str, tuple[Callable[[list[Path]], None], int, str]] = {
    "a part is missing": (without_a_part, 1, "part 2 of 3 .* fetch it into the same folder"),
    "a folder under its name": (a_folder_for_a_part, 1, "is missing"),
    "two parts swapped": (two_parts_swapped, 1, r"split\.no is 2, 1 is expected"),
    "of a model of four": (another_count, 1, r"split\.count is 4, 3 is expected"),
    "of another model": (another_models_part, 1, r"split\.tensors\.count is 579, 27 is expected"),
    "a number of another type": (a_number_of_another_type, 1, r"split\.no has value type .* UINT16 is expected"),
    "no number": (no_number, 1, r"split\.no is missing, 1 is expected"),
    "no part of a model": (a_whole_file_for_a_part, 1, r"split\.no is missing"),
    "no GGUF": (a_damaged_part, 1, "is a web page"),
    "cut short": (a_part_cut_short, 1, "ends at byte"),
    "a tensor twice": (a_tensor_twice, 1, "is in .*-00001-of-00003.gguf too"),
    "no count of tensors": (no_count_of_tensors, 0, r"split\.tensors\.count is missing"),
    "a tensor too few": (too_few_tensors, 0, r"hold 27 tensors, split\.tensors\.count is 28"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_parts_that_do_not_belong_together_are_refused(what: str, parts: list[Path]) -> None:
    spoil, index, words = REFUSED[what]
    spoil(parts)
    with pytest.raises(FormatError, match=words) as caught:
        gguf_header.read(parts[0])
    assert str(caught.value).startswith(f"{parts[index]}: ")
    assert "fetch" in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_later_part_names_the_first(parts: list[Path]) -> None:
    for number in (2, 3):
        with pytest.raises(FormatError, match=f"is part {number} of 3") as caught:
            gguf_header.read(parts[number - 1])
        assert str(caught.value).endswith(f"give its first part: {parts[0]}")


def test_a_first_part_under_another_name_says_which_it_needs(parts: list[Path]) -> None:
    """As a file of the Hub's cache, named by its digest."""
    for name in ("model.gguf", "M-00001-of-00002.gguf", "M-1-of-3.gguf", "M-00001-of-00003.GGUF"):
        with pytest.raises(FormatError, match=r"the first of 3 parts .* call it \S+-00001-of-00003\.gguf"):
            gguf_header.read(parts[0].rename(parts[0].with_name(name)))
        parts[0].with_name(name).rename(parts[0])


def test_a_later_part_under_the_first_ones_name(parts: list[Path]) -> None:
    parts[1].rename(parts[0])
    with pytest.raises(FormatError, match=r"split\.no is 1, 0 is expected by its name"):
        gguf_header.read(parts[0])


def test_links_to_parts_are_followed_by_their_own_names(models: Models, tmp_path: Path) -> None:
    """As the Hub's cache has them: each name is a link to a file named by its digest."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(models.split(2)):
        (tmp_path / path.name).symlink_to(shutil.copy(path, blobs / f"{number:064x}"))
    assert len(gguf_header.read(tmp_path / "M-00001-of-00002.gguf").tensors) == 27


@pytest.mark.parametrize("count", [0, 1])
def test_a_model_of_one_part_is_a_whole_file(models: Models, tmp_path: Path, count: int) -> None:
    """What llama-gguf-split --merge writes has a count of 0."""
    (path,) = write_split(models.whole, tmp_path, 1, name="any name")
    patched(path, "split.count", struct.pack("<H", count))
    assert gguf_header.read(path.rename(tmp_path / "merged.gguf")).parts == ()


def read_by(reader: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """An exit status, also of the library's `load`."""
    if reader != "load":
        return run(monkeypatch, reader, path)
    try:
        local.load(path, LoadOptions(n_ctx=256))
    except FormatError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


@pytest.mark.parametrize("reader", ["plan", "inspect", "verify", "load"])
def test_all_read_the_same_model(
    reader: str, parts: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts[1].unlink()
    for given, named in ((parts[0], parts[1]), (parts[2], parts[0])):
        assert read_by(reader, given, monkeypatch) == 1
        err = capsys.readouterr().err
        assert str(named) in err and len(err.splitlines()) == 1
