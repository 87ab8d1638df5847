"""What was named as a model and is none: each command says in one line what it is, and what to type."""

from __future__ import annotations

import os
import shlex
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf.constants import GGUFValueType

import qwq_lite
from qwq_lite.cli import commands, console
from qwq_lite.errors import FormatError, QwqError, UsageError
from qwq_lite.formats import gguf_header, gguf_writer

HEADER = struct.pack("<Q", 2) + b"{}"
MB = 1 << 20


def run(*arguments: str | Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["qwq-lite", *map(str, arguments)])
    try:
        console.run(commands)
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    return 0


def written(path: Path, data: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def gguf_of(path: Path, **general: str) -> Path:
    """A GGUF file that says this of itself."""
    keys = {
        f"general.{name}": (value, GGUFValueType.STRING) for name, value in general.items() if name != "architecture"
    }
    return written(path, gguf_writer.encode(general.get("architecture", "qwen2"), keys, []))


def big_endian(path: Path) -> Path:
    return written(path, b"GGUF" + struct.pack(">IQQ", 3, 0, 0))


Make = Callable[[Path], Path]
# What is made in an empty folder, and what is said of it.
FILES: dict[str, tuple[Make, str]] = {
    "an empty file": (lambda room: written(room / "model.gguf"), "is empty; fetch or convert it again"),
    "a big-endian file": (
        lambda room: big_endian(room / "model.gguf"),
        "is a big-endian GGUF, for other processors; convert it: gguf-convert-endian {path} little",
    ),
    "safetensors": (
        lambda room: written(room / "model.safetensors", HEADER),
        "holds weights of a checkpoint (safetensors); convert its folder: qwq-lite convert {room} -q Q4_K_M",
    ),
    "a pickle": (lambda room: written(room / "pytorch_model.bin", b"PK\3\4" + bytes(99)), "is a pickle of PyTorch"),
    "an LFS pointer": (
        lambda room: written(room / "model.gguf", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "is a Git LFS pointer in place of the file; in its folder, type: git lfs pull",
    ),
    "a web page": (lambda room: written(room / "model.gguf", b"\n<!DOCTYPE html><html>"), "is a web page in place of"),
    "an old format": (lambda room: written(room / "model.bin", b"tjgg" + bytes(99)), "before GGUF"),
    "nothing": (lambda room: room / "gone.gguf", "there is n"),  # "nothing of that name", "no such file"
}
MODELS: dict[str, tuple[Make, str]] = {
    "an adapter": (lambda room: gguf_of(room / "lora.gguf", type="adapter"), "is a LoRA adapter"),
    "a projector": (lambda room: gguf_of(room / "mmproj.gguf", type="mmproj", architecture="clip"), "reads images"),
    "an old projector": (lambda room: gguf_of(room / "clip.gguf", architecture="clip"), "name the model's own file"),
    "an importance matrix": (lambda room: gguf_of(room / "imatrix.gguf", type="imatrix"), "qwq-lite convert --imatrix"),
}


def hub(room: Path, *files: str, main: str | None = "b1") -> Path:
    """A repository in the Hub's cache, with two snapshots."""
    root = room / "models--Qwen--QwQ-32B"
    for revision in ("a0", "b1"):
        for name in files:
            written(root / "snapshots" / revision / name, b"{}")
        (root / "snapshots" / revision).mkdir(parents=True, exist_ok=True)
        os.utime(root / "snapshots" / revision, (1, 1 if revision == "a0" else 2))
    if main:
        written(root / "refs" / "main", main.encode())
    return root


def checkpoint(room: Path) -> Path:
    written(room / "QwQ" / "config.json", b"{}")
    return room / "QwQ"


FOLDERS: dict[str, tuple[Make, str]] = {
    "a folder with models": (
        lambda room: written(written(room / "QwQ" / "Q4.gguf").parent / "mmproj-F16.gguf").parent,
        "is not a file but a folder; name the file in it: {path}/Q4.gguf",
    ),
    "a folder with folders of models": (
        lambda room: written(room / "QwQ" / "Q4" / "m-00001-of-00002.gguf").parent.parent,
        "is not a file but a folder; name the file in it: {path}/Q4/m-00001-of-00002.gguf",
    ),
    "an empty folder": (lambda room: room, "a folder without a .gguf file"),
    "a checkpoint": (
        checkpoint,
        "is not a file but a checkpoint, which must be converted first: qwq-lite convert {path} -q Q4_K_M",
    ),
    "a model of the Hub's cache": (
        lambda room: hub(room, "Q8_0.gguf", main="a0"),
        "is not a file but a folder of the Hub's cache; name the file in it: {path}/snapshots/a0/Q8_0.gguf",
    ),
    "a checkpoint of the Hub's cache": (
        lambda room: hub(room, "config.json", main=None),
        "a checkpoint in the Hub's cache, which must be converted first: qwq-lite convert {path}/snapshots/b1 -q Q4_K_M",
    ),
}


def words_for(words: str, path: Path, room: Path) -> str:
    """The words with the paths as they are typed."""
    return words.format(path=shlex.quote(str(path)), room=shlex.quote(str(room)))


@pytest.mark.parametrize("what", [*FILES, *MODELS, *FOLDERS])
@pytest.mark.parametrize("isolated", [True, False])
def test_load_says_what_it_is(what: str, isolated: bool, tmp_path: Path) -> None:
    make, words = (FILES | MODELS | FOLDERS)[what]
    path = make(tmp_path)
    with pytest.raises(FormatError) as caught:
        qwq_lite.load(path, isolated=isolated)
    assert str(caught.value).startswith(f"{path}: ")
    assert words_for(words, path, tmp_path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("what", [*FILES, *MODELS])
@pytest.mark.parametrize("command", ["chat", "plan", "inspect", "verify"])
def test_a_command_says_what_the_file_is(
    command: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "verify" and what in MODELS:
        return  # a whole file all the same
    make, words = (FILES | MODELS)[what]
    path = make(tmp_path)
    status = run(command, path, *(["-p", "Hi"] if command == "chat" else []), monkeypatch=monkeypatch)
    said = capsys.readouterr()
    assert words_for(words, path, tmp_path) in said.err
    assert "Traceback" not in said.err
    if command == "inspect" and what in MODELS:  # it shows what is there
        assert f"note: {path}" in said.err
    else:
        assert (status, said.out, len(said.err.splitlines())) == (1, "", 1)


@pytest.mark.parametrize("command", ["plan", "inspect", "convert"])
@pytest.mark.parametrize(
    "what", ["a folder with models", "a model of the Hub's cache", "a checkpoint of the Hub's cache"]
)
def test_what_takes_a_checkpoint_names_the_folder_or_the_file(
    command: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = FOLDERS[what][0](tmp_path)
    status = run(command, path, *(["-q", "Q4_K_M"] if command == "convert" else []), monkeypatch=monkeypatch)
    said = capsys.readouterr()
    assert (status, said.out, len(said.err.splitlines())) == (1, "", 1)
    place = {"a folder with models": path / "Q4.gguf", "a model of the Hub's cache": path / "snapshots" / "a0"}
    assert str(place.get(what, path / "snapshots" / "b1")) in said.err


@pytest.mark.parametrize("name", ["qwq-32b-preview", "QwQ-32B", "Qwen/QwQ-32B", "deepseek-r1-distill-qwen-7b"])
@pytest.mark.parametrize("isolated", [True, False])
def test_a_name_of_the_catalogue_is_no_file_yet(
    name: str, isolated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UsageError, match=rf"^{name}: is the name of a model.*hf download .*qwq-lite convert \S+ -q Q4_K_M$"
    ):
        qwq_lite.load(name, isolated=isolated)


def test_a_file_under_a_name_of_the_catalogue_is_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "qwq-32b")
    with pytest.raises(FormatError, match="qwq-32b: is empty"):
        qwq_lite.load("qwq-32b", isolated=False)


def test_a_dangling_link_names_its_target(tmp_path: Path) -> None:
    """As in a Hub's cache from which the blobs were removed."""
    link = tmp_path / "model.gguf"
    try:
        link.symlink_to(tmp_path / "blobs" / "0")
    except OSError:
        pytest.skip("no symbolic links here")
    with pytest.raises(FormatError, match=r"is a link to .*blobs.*, where nothing is"):
        gguf_header.read(link)


DEEP = b"[" * 100_000


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("command", ["plan", "inspect", "convert"])
def test_json_that_is_nested_too_deeply_is_one_line(
    command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path / "config.json", b'{"architectures": ["Qwen2ForCausalLM"]}')
    written(tmp_path / name, DEEP)
    status = run(command, tmp_path, *(["-q", "Q4_K_M"] if command == "convert" else []), monkeypatch=monkeypatch)
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    about = [line for line in said.err.splitlines() if f"{tmp_path / name}: is nested too deeply" in line]
    assert status == 1
    if (command, name) == (
        "convert",
        "model.safetensors.index.json",
    ):  # config.json is at fault too, and is read before
        assert len(said.err.splitlines()) == 1
    else:
        assert len(about) == 1
        assert command == "inspect" or about == said.err.splitlines()  # `inspect` names the other faults too


def test_a_template_of_brackets_is_a_template_error() -> None:
    from qwq_lite.prompt.chat_template import ChatTemplate

    for n in (60_000, 100_000):
        with pytest.raises(QwqError):
            ChatTemplate("{{ " + "[" * n)
