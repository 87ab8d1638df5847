"""A chat template that a user gives: in place of the model's own, or where it has none; errors name where it came from."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

import qwq_lite
from qwq_lite.cli import chat
from qwq_lite.errors import TemplateError, UsageError
from tests.attacks.test_engine_deaths import rewritten
from tests.other_models import transformer, write_model

SHORT = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
QUESTION = [{"role": "user", "content": "One?"}]


@pytest.fixture(scope="module")
def bare(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with neither a template nor ChatML's tokens."""
    plain = rewritten_tokens(tiny_gguf, tmp_path_factory.mktemp("bare") / "other.gguf")
    return write_model(plain.parent / "bare.gguf", plain, transformer("llama", 32), template=False)


def rewritten_tokens(source: Path, target: Path) -> Path:
    raw = source.read_bytes()
    target.write_bytes(raw.replace(b"<|im_start|>", b"<|im_begin|>"))
    return target


def n_prompt(path: Path, template: str | os.PathLike[str] | None, isolated: bool = False) -> int:
    with qwq_lite.load(path, n_ctx=512, n_threads=1, chat_template=template, isolated=isolated) as model:
        return model.chat().ask("One?", max_tokens=1, seed=1).stats.n_prompt


def test_a_model_without_a_template_says_what_to_give(bare: Path) -> None:
    with pytest.raises(
        TemplateError, match=r"bare\.gguf: has no chat template .*; give one with --chat-template .*chatml"
    ):
        n_prompt(bare, None)


@pytest.mark.parametrize("isolated", [False, True], ids=["here", "worker"])
def test_a_template_of_a_file_is_used(bare: Path, tiny_gguf: Path, tmp_path: Path, isolated: bool) -> None:
    path = tmp_path / "short.jinja"
    path.write_text(SHORT, "utf-8")
    assert n_prompt(bare, path, isolated) == n_prompt(tiny_gguf, str(path)) == len("One?") + 1
    assert n_prompt(tiny_gguf, None) > len("One?") + 1, "its own is longer"


def test_chatml_has_a_name(tiny_gguf: Path, bare: Path) -> None:
    assert n_prompt(tiny_gguf, "chatml") == n_prompt(tiny_gguf, "ChatML") < n_prompt(tiny_gguf, None)
    with qwq_lite.load(bare, n_ctx=512, n_threads=1, chat_template="chatml", isolated=False) as model:
        assert any("no <|im_start|> in its vocabulary" in notice for notice in model.notices)
        assert model.ask("One?", max_tokens=1, seed=1).stats.n_prompt > 1


def missing(path: Path) -> None:
    pass


def latin(path: Path) -> None:
    path.write_bytes("{{ 'ö' }}".encode("latin-1"))


def empty(path: Path) -> None:
    path.write_bytes(b"\n")


def pipe(path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes with a name here")
    os.mkfifo(path)


BAD: dict[Callable[[Path], object], str] = {
    missing: "cannot be read",
    Path.mkdir: "cannot be read",
    pipe: "cannot be read",
    latin: "is no UTF-8 text",
    empty: "is an empty file",
}


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_a_file_that_is_no_template_is_refused_before_anything_is_loaded(
    make: Callable[[Path], object], tmp_path: Path
) -> None:
    path = tmp_path / "t.jinja"
    make(path)
    with pytest.raises(UsageError, match=rf"t\.jinja: chat_template \(--chat-template\) {BAD[make]}"):
        qwq_lite.load(tmp_path / "absent.gguf", chat_template=path)


@pytest.mark.parametrize("given", ["", 7])
def test_nothing_is_no_template(given: str) -> None:
    with pytest.raises(UsageError, match=r"chat_template \(--chat-template\) is .*; give a file"):
        qwq_lite.load("absent.gguf", chat_template=given)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("\n{% for %}", r"t\.jinja: the template of --chat-template, line 2: .*; give another one"),
        ("{{ raise_exception('no') }}", r"t\.jinja: the template of --chat-template refuses these messages: no"),
        ("{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}", r"t\.jinja: .*asks for"),
        ("x" * 70_000, r"t\.jinja: the template of --chat-template has 70,000 characters"),
    ],
)
def test_an_error_names_the_file_that_was_given(source: str, expected: str, tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(source, "utf-8")
    with pytest.raises(TemplateError, match=expected):
        n_prompt(tiny_gguf, path)


def test_an_error_of_the_models_own_names_its_file(tiny_gguf: Path, tmp_path: Path) -> None:
    path = rewritten(tiny_gguf, tmp_path / "own.gguf", {"tokenizer.chat_template": "{{ raise_exception('no') }}"})
    with pytest.raises(TemplateError, match=r"own\.gguf: tokenizer\.chat_template refuses these messages: no"):
        n_prompt(path, None)
    assert n_prompt(path, "chatml") > 0


def test_the_command_takes_one(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text("{{ raise_exception('not this') }}", "utf-8")
    arguments = [str(tiny_gguf), "-p", "One?", "--ctx", "512", "--chat-template", str(path)]
    done = CliRunner().invoke(chat.command, arguments)
    assert isinstance(done.exception, TemplateError)
    assert str(done.exception) == f"{path}: the template of --chat-template refuses these messages: not this"
