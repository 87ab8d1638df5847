"""A name that a checkpoint's folder lists is read, or named in an error; it is never taken for absent."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qwq_lite.errors import CheckpointError
from scripts.checkpoint_files import write_json
from tests.checkpoints import TEMPLATE, write_random_checkpoint
from tests.convert.broken import INDEX, SHARD
from tests.convert.keys import change_json, read, values

OPTIONAL = (
    "chat_template.jinja", "chat_template.json", "generation_config.json", "tokenizer_config.json", "README.md",
    "hf_quant_config.json", "adapter_config.json",
)  # fmt: skip
NEEDED = ("config.json", "tokenizer.json", INDEX, SHARD)


def make_pipe(path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes with a name")
    os.mkfifo(path)


def link_to_device(path: Path) -> None:
    if not Path("/dev/zero").exists():
        pytest.skip("no such device")
    path.symlink_to("/dev/zero")


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link that leads nowhere": (lambda path: path.symlink_to("gone"), "is a link to gone, which is not there"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "cannot be read"),
    "a pipe": (make_pipe, "no file"),
    "a device": (link_to_device, "no file"),
    "a folder": (lambda path: path.mkdir(), "no file"),
}


@pytest.mark.parametrize("name", [*OPTIONAL, *NEEDED])
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_listed_and_no_file_is_named(kind: str, name: str, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "m")
    make, words = NO_FILES[kind]
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(CheckpointError) as refused:
        read(folder)
    assert str(folder / name) in str(refused.value) and words in str(refused.value)


def test_older_added_tokens_too(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "m")
    change_json(folder, "tokenizer_config.json", lambda settings: settings.pop("added_tokens_decoder"))
    (folder / "added_tokens.json").symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"added_tokens\.json: is a link to gone"):
        read(folder)


@pytest.mark.parametrize("kind", ["a link that leads nowhere", "a pipe", "a file"])
def test_a_folder_of_templates_that_is_none(kind: str, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "m")
    (folder / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    more = folder / "additional_chat_templates"
    more.write_bytes(b"") if kind == "a file" else NO_FILES[kind][0](more)
    with pytest.raises(CheckpointError, match="additional_chat_templates: cannot be read as a folder"):
        read(folder)


def test_a_link_that_leads_to_a_file_is_that_file(tmp_path: Path) -> None:
    """As in the Hub's cache, where every name is a link."""
    folder = write_random_checkpoint(tmp_path / "m")
    expected = values(folder)
    (tmp_path / "blobs").mkdir()
    for path in folder.iterdir():
        blob = path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(blob)
    assert values(folder) == expected


def test_lines_end_as_they_did(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "m")
    change_json(folder, "tokenizer_config.json", lambda settings: settings.pop("chat_template"))
    write_json(folder / "chat_template.json", {"chat_template": "another"})
    (folder / "chat_template.jinja").write_bytes(b"a\r\nb\rc\n")
    assert values(folder)["tokenizer.chat_template"] == "a\nb\nc\n"
