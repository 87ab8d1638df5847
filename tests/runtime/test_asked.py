"""What was asked is done or said: an empty text, an option without an effect, a text beside the question."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import qwq_lite
from qwq_lite.cli import commands, console, standard_input
from qwq_lite.errors import EngineCrashed, QwqError, UsageError
from qwq_lite.events import Notice
from tests.terminal import COMMAND, WAIT_S, chat, posix

CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
# Each command with what it must have, so that the option under test is all that is wrong.
LEAST = {"convert": ["-q", "Q4_K_M"]}


@pytest.fixture(scope="module")
def model(demo_gguf: Path) -> Iterator[qwq_lite.Model]:
    with qwq_lite.load(demo_gguf, n_ctx=1024) as loaded:
        yield loaded


def texts() -> Iterator[tuple[str, click.Parameter]]:
    """Every parameter of every command that takes a text or a path."""
    context = click.Context(commands)
    for name in commands.list_commands(context):
        command = commands.get_command(context, name)
        assert isinstance(command, console.Command), f"{name} must refuse empty texts"
        for parameter in command.params:
            if isinstance(parameter.type, click.types.StringParamType | click.Path) and parameter.name != "system":
                yield name, parameter


@pytest.mark.parametrize(
    ("name", "parameter"), [pytest.param(*pair, id=f"{pair[0]} {pair[1].name}") for pair in texts()]
)
def test_an_empty_text_is_an_error_that_names_the_option(
    name: str, parameter: click.Parameter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [parameter.opts[-1], ""] if isinstance(parameter, click.Option) else [""]
    arguments = [*LEAST.get(name, []), *(["here"] if isinstance(parameter, click.Option) else []), *given]
    monkeypatch.setattr(sys, "argv", ["qwq-lite", name, *arguments])
    with pytest.raises(SystemExit) as end:
        console.run(commands)
    said = capsys.readouterr()
    assert (end.value.code, said.out) == (2, "")
    assert len(said.err.splitlines()) == 1
    assert f"{parameter.opts[-1] if given[1:] else parameter.human_readable_name} is empty" in said.err


def n_prompt(model: qwq_lite.Model, system: str | None) -> int:
    return model.ask("Hi", system, max_tokens=1, seed=1).stats.n_prompt


def test_an_empty_system_prompt_is_not_the_templates_own(model: qwq_lite.Model) -> None:
    """The demo's template says who the model is when nobody does."""
    assert n_prompt(model, "") < n_prompt(model, "x") < n_prompt(model, None)
    assert model.chat("").messages == ({"role": "system", "content": ""},)
    assert model.chat().messages == ()


def test_an_empty_system_prompt_on_the_command_line_is_none(demo_gguf: Path) -> None:
    asked = ("-p", "Hi", "-n", "1", "--seed", "1")
    empty, default = chat(demo_gguf, *asked, "-s", ""), chat(demo_gguf, *asked)
    assert (empty.returncode, default.returncode) == (0, 0)
    assert n_new(empty) < n_new(default)


def n_new(done: subprocess.CompletedProcess[str]) -> int:
    """Tokens of the prompt, of which none were in the cache."""
    return int(done.stderr.rpartition("; prompt ")[2].partition(" new")[0])


def ignored(stream: qwq_lite.Stream) -> list[str]:
    return [event.text for event in stream if isinstance(event, qwq_lite.Notice) and event.kind == "ignored"]


def test_tools_that_the_template_ignores_are_said(model: qwq_lite.Model) -> None:
    (text,) = ignored(model.chat().stream("Hi", tools=[CLOCK], max_tokens=1))
    assert text.startswith("tools is ignored: the model's chat template has no place for them")


def test_tools_and_a_prompt_of_text_or_tokens(model: qwq_lite.Model) -> None:
    for prompt in ("Hi", model.tokenize("Hi")):
        (text,) = ignored(model.generate(prompt, tools=[CLOCK], max_tokens=1))
        assert text.startswith("tools is ignored: the prompt is no list of messages")


def test_a_budget_of_a_model_that_does_not_think_is_said_in_every_reply(model: qwq_lite.Model) -> None:
    talk = model.chat()
    for _ in range(2):
        (text,) = ignored(talk.stream("Hi", effort="low", max_tokens=1))
        assert text.startswith("effort (--effort) is ignored: this model does not think")
    assert ignored(talk.stream("Hi", max_tokens=1)) == []


def test_the_command_line_says_it_once_a_conversation(demo_gguf: Path) -> None:
    done = chat(demo_gguf, "-n", "1", "--think-budget", "64", stdin="Hello\nHello again\n")
    assert done.returncode == 0
    assert done.stderr.count("tok/s") == 2
    assert done.stderr.count("thinking_budget (--think-budget) is ignored") == 1


def test_what_is_piped_in_follows_the_question(demo_gguf: Path) -> None:
    asked = ("-n", "4", "--seed", "1", "--temperature", "0")
    joined = chat(demo_gguf, *asked, "-p", "Say it again:", stdin="The cat sat.\n")
    whole = chat(demo_gguf, *asked, "-p", "-", stdin="Say it again:\n\nThe cat sat.\n")
    alone = chat(demo_gguf, *asked, "-p", "Say it again:")
    assert (joined.stdout, n_new(joined)) == (whole.stdout, n_new(whole))
    assert n_new(joined) > n_new(alone)


def test_an_open_pipe_that_says_nothing_holds_up_no_answer(demo_gguf: Path) -> None:
    arguments = [*COMMAND, str(demo_gguf), "-p", "Hi", "-n", "1"]
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stderr is not None
        said = process.stderr.read().decode()  # standard input stays open until it has ended
        assert process.wait(WAIT_S) == 0
    assert "standard input is an open pipe that said nothing" in said
    assert "tok/s" in said


def test_a_file_is_read_from_its_start(demo_gguf: Path, tmp_path: Path) -> None:
    """And left to whoever reads it where it was begun: `while read line; do qwq-lite chat …; done <file`."""
    path = tmp_path / "text"
    path.write_text("The cat sat.\nThe dog ran.\n", "utf-8")
    found = []
    for place in (0, 5, path.stat().st_size):
        with path.open("rb") as file:
            os.lseek(file.fileno(), place, os.SEEK_SET)
            done = subprocess.run(
                [*COMMAND, str(demo_gguf), "-p", "Hi", "-n", "1"],
                stdin=file, capture_output=True, encoding="utf-8", timeout=WAIT_S, check=True,
            )  # fmt: skip
            assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == (place or path.stat().st_size)
            found.append((n_new(done), "is ignored from byte 5" in done.stderr))
    assert found[0][0] > found[1][0] == found[2][0]
    assert [said for _, said in found] == [False, True, False]


@posix
@pytest.mark.parametrize("arguments", [("-p", "-"), (), ("-p", "Hi")])
def test_a_text_without_an_end_is_an_error_within_a_bound(arguments: tuple[str, ...], demo_gguf: Path) -> None:
    with Path("/dev/zero").open("rb") as zeros, subprocess.Popen(
        [*COMMAND, str(demo_gguf), *arguments], stdin=zeros, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:  # fmt: skip
        assert process.stderr is not None
        said = process.stderr.read().decode()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 2
    assert "has more than 64 MiB, which no context holds" in said.splitlines()[-1]
    unit = 1 if sys.platform == "darwin" else 1024
    assert used.ru_maxrss * unit < 1 << 30


def test_texts_are_read_up_to_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr(standard_input, "MOST", 8)
    monkeypatch.setattr(sys, "stdin", io.StringIO("12345678\n1234567\n"))
    with pytest.raises(UsageError):
        standard_input.read_line()
    monkeypatch.setattr(sys, "stdin", io.StringIO("1234567\n12"))
    assert [standard_input.read_line(), standard_input.read_line()] == ["1234567", "12"]
    with pytest.raises(EOFError):
        standard_input.read_line()
    monkeypatch.setattr(sys, "stdin", io.StringIO("12345678"))
    assert standard_input.read_all() == "12345678"


@pytest.mark.parametrize("depth", [100, 400, 900, 970, 2_000, 100_000])
def test_what_is_nested_too_deeply_is_an_error_and_the_engine_lives(depth: int, model: qwq_lite.Model) -> None:
    """Some of these are not yet too deep for this Python; which, is not promised."""
    pid = model.pid  # type: ignore[attr-defined] # of a RemoteModel
    nested: list[object] = []
    for _ in range(depth):
        nested = [nested]
    for messages, tools in (
        ([{"role": "user", "content": "Hi"}], [{"name": nested}]),
        ([{"role": "user", "content": nested}], None),
    ):
        try:
            list(model.generate(messages, tools=tools, max_tokens=1))
        except QwqError as error:
            assert not isinstance(error, EngineCrashed)
        else:
            assert depth < 2_000
    assert model.ask("Hi", max_tokens=1).stats.n_generated == 1
    assert model.pid == pid  # type: ignore[attr-defined]


def test_an_empty_text_is_an_error_in_the_library_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="model is empty"):
        qwq_lite.load("")
    for empty in ({"machine": ""}, {"quant": ""}):
        with pytest.raises(UsageError, match="known are"):
            qwq_lite.plan_model("qwq-32b", **empty)  # type: ignore[arg-type] # each its own
    with pytest.raises(UsageError, match=r"type_k \(--type-k\) is ''"):
        qwq_lite.load(tmp_path, isolated=False, type_k="")


def test_an_interpreter_for_no_process_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="python is given, and isolated is False"):
        qwq_lite.load(tmp_path, isolated=False, python=sys.executable)


@posix
@pytest.mark.parametrize("arguments", [["-p", "-"], ["-p", "Hi"]])
def test_input_that_is_no_text_is_refused(letters_gguf: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "qwq_lite", "chat", str(letters_gguf), "--ctx", "256", "-n", "2", *arguments]
    done = subprocess.run(command, input=b"caf\xe9", capture_output=True, check=False)
    assert done.returncode == 2
    assert b"standard input is no UTF-8 text (byte 3 is 0xe9)" in done.stderr
    whole = subprocess.run(command, input="café".encode(), capture_output=True, check=False)
    assert whole.returncode == 0, whole.stderr


def test_a_system_prompt_that_the_template_ignores_is_said(letters_gguf: Path) -> None:
    users_only = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    template = letters_gguf.with_name("users.jinja")
    template.write_text(users_only)
    for given, n_notices in ((str(template), 1), ("chatml", 0)):
        with qwq_lite.load(letters_gguf, n_ctx=256, chat_template=given, isolated=False) as model:
            events = list(model.chat("Be brief.").stream("Hi", max_tokens=2))
            found = [event.text for event in events if isinstance(event, Notice) and event.kind == "ignored"]
            assert len(found) == n_notices
            assert all(text.startswith("the system prompt is ignored") for text in found)


@pytest.mark.parametrize("given", [None, 3])
def test_what_is_no_path_no_prompt_and_no_text(letters_gguf: Path, given: Any) -> None:
    with pytest.raises(UsageError, match=f"model is {given}"):
        qwq_lite.load(given)
    with qwq_lite.load(letters_gguf, n_ctx=256, isolated=False) as model:
        with pytest.raises(UsageError, match=f"the prompt is {given}"):
            model.generate(given)
        with pytest.raises(UsageError, match=f"the text is {given}"):
            model.tokenize(given)
