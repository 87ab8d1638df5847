"""qwq-lite convert as its users meet it: every option, what is printed where, JSON, FILE.sha256."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType as T

from qwq_convert.cli import convert as command
from qwq_convert.cli import sha256
from qwq_convert.pipeline import FinishedConversion, convert, look
from qwq_convert.quantize import memory_bytes
from qwq_lite.cli import commands, console
from qwq_lite.errors import OutputError, PlanError
from qwq_lite.formats import gguf_header
from qwq_lite.formats.tensor_types import FILE_TYPES, file_type
from qwq_lite.plan import planning
from tests.checkpoints import write_random_checkpoint


class Done(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def said(self) -> Any:
        return json.loads(self.out)


class Usage(NamedTuple):
    free: int


Cli = Callable[..., Done]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """The command line in this process."""

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["qwq-lite", "convert", *map(str, arguments)])
        status = 0
        try:
            console.run(commands)
        except SystemExit as end:
            assert isinstance(end.code, int)
            status = end.code
        return Done(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It says of itself that its output is tied, which it is not: a notice."""
    place = tmp_path_factory.mktemp("cli") / "model"
    return write_random_checkpoint(place, overrides={"tie_word_embeddings": True})


def write_imatrix(path: Path, columns: Mapping[str, int]) -> Path:
    """As llama-imatrix does, by gguf's own writer."""
    writer, values = GGUFWriter(path, ""), np.random.default_rng(0)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["wiki.txt"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, n_columns in columns.items():
        writer.add_tensor(f"{name}.in_sum2", values.uniform(0.1, 9, (1, n_columns)).astype(np.float32))
        writer.add_tensor(f"{name}.counts", np.array([[3584]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_option_reaches_the_file(folder: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    threads = []

    def counted(*arguments: Any, n_threads: int, **named: Any) -> FinishedConversion:
        threads.append(n_threads)
        return convert(*arguments, n_threads=n_threads, **named)

    monkeypatch.setattr(command, "convert", counted)
    (plan,) = look(folder, [file_type("F32")]).targets
    matrix = write_imatrix(Path("i.gguf"), {info.name: info.shape[0] for info in plan.infos if len(info.shape) > 1})
    output = tmp_path / "out.gguf"
    output.write_bytes(b"old")
    types = ("--pure", "--output-tensor-type", "q8_0", "--token-embedding-type", "F16")
    rest = ("--report", "--sha256", "--force", "-j", 2, "--quiet", "--json")
    done = cli(folder, "--type", "iq3-xxs", "--output", output, "--imatrix", matrix, *types, *rest)
    assert (done.status, done.err, threads) == (0, "", [2])
    header = gguf_header.read(output)
    chosen = {info.name: info.type for info in header.tensors if len(info.shape) > 1}
    assert (chosen.pop("output.weight"), chosen.pop("token_embd.weight")) == (T.Q8_0, T.F16)
    assert set(chosen.values()) == {T.IQ3_XXS}, "a mixture, where --pure is lost"
    assert header.keys["general.file_type"] == FILE_TYPES["IQ3_XXS"]
    assert header.keys["quantize.imatrix.file"] == "i.gguf"
    (file,) = done.said["files"]
    assert (file["file"], file["type"], file["n_bytes"]) == (str(output), "IQ3_XXS", output.stat().st_size)
    assert file["types"]["IQ3_XXS"]["tensors"] == len(chosen)
    assert file["errors"].keys() == {info.name for info in header.tensors}
    assert file["sha256"] == digest_of(output)
    assert Path("out.gguf.sha256").read_text("utf-8") == f"{digest_of(output)}  out.gguf\n"


def test_a_type_that_needs_importances_is_refused_without(folder: Path, tmp_path: Path, cli: Cli) -> None:
    done = cli(folder, "-q", "IQ2_XXS", "-o", tmp_path / "out.gguf", "--json")
    assert done.status == 2
    assert done.said["outcome"] == "error"
    assert "no --imatrix is given" in done.said["message"]
    assert len(done.err.splitlines()) == 1 and "no --imatrix is given" in done.err
    assert not list(tmp_path.iterdir())


def test_one_json_object_of_several_files(folder: Path, tmp_path: Path, cli: Cli) -> None:
    done = cli(folder, "-q", "Q4_K_M", "-q", "F32", "-o", tmp_path / "both", "--report", "--json")
    assert done.said.keys() == {"files", "notices"}
    (notice,) = done.said["notices"]
    assert "tie_word_embeddings" in notice and notice in done.err
    small, exact = done.said["files"]
    assert [Path(file["file"]).name for file in (small, exact)] == ["model-Q4_K_M.gguf", "model-F32.gguf"]
    assert small["errors"].keys() == exact["errors"].keys()
    assert all(error["rmse"] == 0 and error["cosine"] == 1 for error in exact["errors"].values())
    wide = [error for name, error in small["errors"].items() if name.endswith("ffn_up.weight")]
    assert all(0.9 < error["cosine"] < 1 and error["max"] > error["rmse"] > 0 for error in wide)
    assert small["sha256"] is None


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("-q", "Q9"), 2, "unknown type 'Q9'"),
        (("-q", "Q8_0", "--output-tensor-type", "Q4_K_M"), 2, "Q4_K_M"),
        (("-q", "Q8_0", "--imatrix", "gone.gguf"), 1, "gone.gguf: is not a file"),
        (("-q", "Q8_0", "--dry-run", "-o", "old.gguf", "--token-embedding-type", "x"), 2, "'x'"),
        (("-q", "Q8_0", "-o", "old.gguf"), 1, "old.gguf: exists"),
    ],
)
def test_an_error_is_an_object_too(
    folder: Path,
    tmp_path: Path,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    status: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.gguf").write_bytes(b"old")
    plain, done = cli(folder, *arguments), cli(folder, *arguments, "--json")
    assert done.said.keys() == {"outcome", "message"}
    assert done.said["outcome"] == "error" and words in done.said["message"]
    assert (done.status, done.err) == (plain.status, plain.err) == (status, plain.err)
    assert not plain.out and words in plain.err
    assert [path.name for path in tmp_path.iterdir()] == ["old.gguf"]


def test_a_dry_run_says_what_the_file_would_be_and_writes_nothing(folder: Path, tmp_path: Path, cli: Cli) -> None:
    output = tmp_path / "out.gguf"
    done = cli(folder, "-q", "Q3_K_M", "-o", output, "--dry-run", "--json")
    assert not list(tmp_path.iterdir())
    assert done.said.keys() == {"files", "notices", "needs", "cannot_run"}
    (file,) = done.said["files"]
    convert(folder, file_type("Q3_K_M"), output)
    header = gguf_header.read(output)
    assert file["n_bytes"] == done.said["needs"]["disk_bytes"] == output.stat().st_size
    assert [(one["name"], one["type"], one["n_bytes"]) for one in file["tensors"]] == [
        (info.name, info.type.name, info.n_bytes) for info in header.tensors
    ]
    assert len(done.said["notices"]) == 1 and done.said["cannot_run"] == []
    told = cli(folder, "-q", "Q3_K_M", "-o", output, "--dry-run")
    assert all(info.name in told.out for info in header.tensors)
    assert "bits per weight" in told.out and "Nothing was written" in told.out
    quiet = cli(folder, "-q", "Q3_K_M", "-o", output, "--dry-run", "--quiet")
    assert re.sub(r"[\d.]+ \wB are free", "", quiet.out) == re.sub(r"[\d.]+ \wB are free", "", told.out)
    assert "tie_word_embeddings" in told.err and not quiet.err


def test_what_a_dry_run_says_is_needed(folder: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(7 if path == tmp_path else 8))
    arguments = ("-q", "Q8_0", "-q", "F16", "-o", tmp_path / "new", "-j", 3, "--dry-run", "--json")
    needs = cli(folder, *arguments).said["needs"]
    sizes = [target.n_bytes for target in look(folder, [file_type("Q8_0"), file_type("F16")]).targets]
    assert needs == {"disk_bytes": sum(sizes), "free_bytes": 7, "memory_bytes": memory_bytes(3, 2, False)}
    assert cli(folder, *arguments, "--report").said["needs"]["memory_bytes"] == memory_bytes(3, 2, True)
    far = cli(folder, "-q", "Q8_0", "-o", tmp_path / "no" / "no" / "out.gguf", "--dry-run", "--json")
    assert far.said["needs"]["free_bytes"] is None


def test_a_result_that_this_machine_cannot_run_is_said_and_made(
    folder: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: str, quant: str) -> None:
        error = PlanError("it needs 40 GiB, there are 8")
        error.smaller = "deepseek-r1-distill-qwen-14b"
        raise error

    monkeypatch.setattr(command, "_MUCH", 0)
    monkeypatch.setattr(planning, "find_plan", refuse)
    output = tmp_path / "out.gguf"
    words = "this machine cannot run it: it needs 40 GiB, there are 8; what would: deepseek-r1-distill-qwen-14b"
    dry = cli(folder, "-q", "Q8_0", "-o", output, "--dry-run", "--quiet", "--json")
    assert dry.said["cannot_run"] == [{"file": str(output), "message": words}]
    assert f"{output}: {words}" in cli(folder, "-q", "Q8_0", "-o", output).err
    assert output.exists()


def test_a_report_names_the_worst(folder: Path, tmp_path: Path, cli: Cli) -> None:
    assert "Furthest from the checkpoint" in cli(folder, "-q", "Q4_K_M", "-o", tmp_path / "one.gguf", "--report").out


def test_a_report_that_nobody_would_see_is_refused(folder: Path, tmp_path: Path, cli: Cli) -> None:
    arguments = (folder, "-q", "Q8_0", "-o", tmp_path / "out.gguf", "--report", "--quiet")
    done = cli(*arguments)
    assert (done.status, done.out) == (2, "") and "--report with --quiet" in done.err
    assert not list(tmp_path.iterdir())
    assert cli(*arguments, "--json").said["files"][0]["errors"]


def test_names_do_not_reach_the_terminal_as_they_are(tmp_path: Path, cli: Cli) -> None:
    if sys.platform == "win32":
        pytest.skip("no such names there")
    hostile = write_random_checkpoint(tmp_path / "model\x1b[31m\u202e", overrides={"tie_word_embeddings": True})
    output = tmp_path / "out\x1b]0;owned\x07.gguf"
    for arguments in (("--dry-run",), ("--report", "--sha256"), ("--force",), ()):
        done = cli(hostile, "-q", "Q8_0", "-o", output, *arguments)
        assert not set("\x1b\x07\u202e") & set(done.out + done.err)
        assert "\\x1b" in done.err
    assert done.status == 1, "it exists"


def take(path: Path, what: str) -> None:
    """Something under this name."""
    if what == "a file":
        path.write_text("old")
    elif what == "a folder":
        path.mkdir()
    elif what == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("gone")


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes with a name, and links ask for a right")
@pytest.mark.parametrize("what", ["a file", "a folder", "a pipe", "a link to nothing"])
def test_a_digest_whose_name_is_taken_is_refused_before_the_work(
    what: str, folder: Path, tmp_path: Path, cli: Cli
) -> None:
    output, beside = tmp_path / "out.gguf", tmp_path / "out.gguf.sha256"
    take(beside, what)
    before = beside.lstat()
    done = cli(folder, "-q", "Q8_0", "-o", output, "--sha256")
    assert (done.status, done.out) == (1, "")
    assert str(beside) in done.err and "leave out --sha256" in done.err
    assert list(tmp_path.iterdir()) == [beside] and beside.lstat() == before
    done = cli(folder, "-q", "Q8_0", "-o", output, "--sha256", "--force")
    if what in ("a file", "a link to nothing"):
        assert done.status == 0
        assert beside.read_text("utf-8") == f"{digest_of(output)}  out.gguf\n" and not beside.is_symlink()
    else:
        assert done.status == 1 and "is no regular file" in done.err
        assert list(tmp_path.iterdir()) == [beside]


def test_a_digest_does_not_take_the_place_of_a_source(folder: Path, tmp_path: Path, cli: Cli) -> None:
    os.link(folder / "config.json", tmp_path / "out.gguf.sha256")
    done = cli(folder, "-q", "Q8_0", "-o", tmp_path / "out.gguf", "--sha256", "--force")
    assert done.status == 1 and "config.json, which the conversion reads" in done.err
    assert not (tmp_path / "out.gguf").exists()


def test_the_digest_of_a_file_that_was_replaced_is_removed(folder: Path, tmp_path: Path, cli: Cli) -> None:
    output, beside = tmp_path / "out.gguf", tmp_path / "out.gguf.sha256"
    beside.write_text("of one that somebody will fetch")
    assert cli(folder, "-q", "Q8_0", "-o", output, "--quiet").status == 0
    assert beside.exists(), "nothing was replaced"
    done = cli(folder, "-q", "F16", "-o", output, "--force")
    assert f"{beside}: removed" in done.err and not beside.exists()
    done = cli(folder, "-q", "F16", "-o", output, "--force")
    assert "removed" not in done.err


def test_a_conversion_that_fails_leaves_the_old_file_and_its_digest(tmp_path: Path, cli: Cli) -> None:
    broken = write_random_checkpoint(tmp_path / "model", shards=1)
    output, beside = tmp_path / "out.gguf", tmp_path / "out.gguf.sha256"
    assert cli(broken, "-q", "Q8_0", "-o", output, "--sha256").status == 0
    before = output.read_bytes(), beside.read_bytes()
    with (broken / "model.safetensors").open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\xff\x7f")  # NaN
    for options in ((), ("--sha256",)):
        done = cli(broken, "-q", "Q8_0", "-o", output, "--force", *options)
        assert done.status == 1 and "nan" in done.err
        assert (output.read_bytes(), beside.read_bytes()) == before


def test_the_summary_does_not_wait_for_the_digest(
    folder: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: Path, force: bool, on_progress: object) -> str:
        raise OutputError(f"{file}.sha256: the disk is full")

    monkeypatch.setattr(sha256, "write", fail)
    done = cli(folder, "-q", "Q8_0", "-o", tmp_path / "out.gguf", "--sha256")
    assert done.status == 1 and "the disk is full" in done.err
    assert "Talk to it: qwq-lite chat" in done.out


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum")
@pytest.mark.parametrize("name", [b"out.gguf", b"a b.gguf", b"back\\slash.gguf", b"new\nline.gguf", b"\xff.gguf"])
def test_sha256sum_reads_the_digest(name: bytes, folder: Path, tmp_path: Path, cli: Cli) -> None:
    if sys.platform != "linux" and name != b"out.gguf":
        pytest.skip("no such names there")
    output = tmp_path / os.fsdecode(name)
    done = cli(folder, "-q", "Q8_0", "-o", output, "--sha256", "--quiet")
    assert done == (0, "", "")
    (beside,) = tmp_path.glob("*.sha256")
    check = ["sha256sum", "--check", "--strict", "--status", str(beside)]
    assert subprocess.run(check, cwd=tmp_path, check=False).returncode == 0
    with output.open("r+b") as file:
        file.write(b"g")
    assert subprocess.run(check, cwd=tmp_path, check=False).returncode == 1


@pytest.mark.parametrize("ending", sorted({"/", "/.", os.sep}))
def test_a_name_with_a_separator_at_its_end_is_a_folders(ending: str, folder: Path, tmp_path: Path, cli: Cli) -> None:
    assert cli(folder, "-q", "Q8_0", "-o", f"{tmp_path / 'sub'}{ending}").status == 0
    assert [path.name for path in (tmp_path / "sub").iterdir()] == [f"{folder.name}-Q8_0.gguf"]
    again = cli(folder, "-q", "Q8_0", "-o", f"{tmp_path / 'sub'}{ending}")
    assert again.status == 1 and "--force" in again.err


def test_a_folder_is_made_below_one_that_is_there_and_of_no_file(folder: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    for name in ("no/no/", "file/"):
        done = cli(folder, "-q", "Q8_0", "-o", f"{tmp_path}/{name}")
        assert done.status == 1 and "the folder" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_dry_run_into_a_folder_makes_none(folder: Path, tmp_path: Path, cli: Cli) -> None:
    done = cli(folder, "-q", "Q8_0", "-o", f"{tmp_path}/sub/", "--dry-run", "--json")
    assert [file["file"] for file in done.said["files"]] == [str(tmp_path / "sub" / f"{folder.name}-Q8_0.gguf")]
    assert not list(tmp_path.iterdir())


def test_several_types_and_one_files_name(folder: Path, tmp_path: Path, cli: Cli) -> None:
    for name in ("one.gguf", "one.GGUF"):
        done = cli(folder, "-q", "Q8_0", "-q", "F16", "-o", tmp_path / name)
        assert done.status == 2 and name in done.err and "2 types" in done.err
    assert not list(tmp_path.iterdir())
    assert cli(folder, "-q", "Q8_0", "-q", "F16", "-o", f"{tmp_path}/one.gguf/").status == 0, "named as a folder"
    assert len(list((tmp_path / "one.gguf").iterdir())) == 2
    assert cli(folder, "-q", "Q8_0", "-q", "F16", "-o", tmp_path / "one.gguf", "--force").status == 0, "it is one"


def test_one_type_named_twice_is_one_file(folder: Path, tmp_path: Path, cli: Cli) -> None:
    assert cli(folder, "-q", "Q8_0", "-q", "q8", "-o", tmp_path / "one.gguf").status == 0
    assert (tmp_path / "one.gguf").is_file()
