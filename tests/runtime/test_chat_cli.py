"""qwq-lite chat, as a process over the demo model: what goes where, how it ends, what stops it."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import qwq_lite
from qwq_lite.cli import console
from qwq_lite.errors import EngineClosed
from tests.checkpoints import chain, in_f16, write_scripted_checkpoint
from tests.terminal import COMMAND, WAIT_S, chat, conversation, posix

FRANCE = ["-s", "Answer in one short English sentence.", "-p", "What is the capital of France?", "--seed", "1"]


@pytest.fixture(scope="module")
def paris_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers "Paris" and ends its turn."""
    script = chain(*"Paris", "<|im_end|>")
    return in_f16(write_scripted_checkpoint(tmp_path_factory.mktemp("paris") / "Paris", script))


@pytest.fixture(scope="module")
def both_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers a question that ends with 1 without end, in small letters, and one that ends with 2 with "YES"."""
    yes = chain("2", *"YES", "<|im_end|>")

    def script(last: int) -> Mapping[int, float]:
        return yes(last) if chr(last) in "2YES" else dict.fromkeys(range(ord("a"), ord("z")), 0.0)

    folder = tmp_path_factory.mktemp("both") / "Both"
    return in_f16(write_scripted_checkpoint(folder, script, template="{{ messages[-1].content[-1] }}"))


def test_one_answer_goes_to_stdout_and_all_else_to_stderr(paris_gguf: Path) -> None:
    done = chat(paris_gguf, *FRANCE)
    assert done.returncode == 0
    assert "Paris" in done.stdout
    assert done.stdout.count("\n") == 1
    assert "tok/s" in done.stderr
    assert "Paris" not in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def test_the_same_seed_gives_the_same_answer(letters_gguf: Path) -> None:
    arguments = (letters_gguf, "-p", "Tell me a story.", "-n", "40", "--temperature", "1", "--seed")
    first, second, other = (chat(*arguments, seed) for seed in ("7", "7", "8"))
    assert first.stdout == second.stdout != other.stdout


def test_a_question_is_read_from_standard_input(paris_gguf: Path) -> None:
    asked = chat(paris_gguf, *FRANCE[:2], "-p", "-", *FRANCE[4:], stdin=FRANCE[3])
    assert asked.stdout == chat(paris_gguf, *FRANCE).stdout


def test_every_line_of_a_pipe_is_a_question_of_one_conversation(letters_gguf: Path) -> None:
    done = chat(letters_gguf, "-n", "5", "--seed", "1", stdin="Hello\n\nWhat did I say?\n")
    assert done.returncode == 0
    assert done.stderr.count("tok/s") == 2
    assert " + 0 kept" not in done.stderr.splitlines()[-1]


def test_max_tokens_ends_an_answer(letters_gguf: Path) -> None:
    done = chat(letters_gguf, "-p", "Count from 1 to 100.", "-n", "3", "--seed", "1")
    assert done.returncode == 0
    assert "stopped at its limit, 3 tokens" in done.stderr


@pytest.mark.parametrize("content", [b"", b"PK\3\4" + bytes(1000), b"GGUF", b"GGUF\3\0\0\0" + b"\xff" * 100])
def test_a_file_that_is_no_gguf_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    done = chat(path, "-p", "Hi")
    assert_one_line(done, 1)
    assert str(path) in done.stderr


def test_a_path_that_no_file_can_have_is_one_line() -> None:
    assert_one_line(chat("a" * 5000, "-p", "Hi"), 1)


def test_a_prompt_that_does_not_fit_is_one_line(demo_gguf: Path) -> None:
    done = chat(demo_gguf, "--ctx", "256", "-p", "word " * 1000)
    assert done.returncode == 1
    assert "--ctx" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def assert_one_line(done: subprocess.CompletedProcess[str], status: int) -> None:
    assert done.returncode == status
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("qwq-lite: ")


@pytest.mark.parametrize(
    "option", [("--ctx", "100"), ("--top-p", "0"), ("--temperature", "-1"), ("--type-k", "f17"), ("--seed", "-1")]
)
def test_an_option_out_of_range_is_usage(option: tuple[str, str], demo_gguf: Path) -> None:
    done = chat(demo_gguf, *option, "-p", "Hi")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert option[1] in done.stderr


@posix
def test_a_reader_that_leaves_ends_the_program_quietly(letters_gguf: Path) -> None:
    arguments = [*COMMAND, str(letters_gguf), "-p", "Count from 1 to 100.", "--seed", "1"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(5)
        process.stdout.close()
        said = process.stderr.read().decode()
        assert process.wait(WAIT_S) == 0
    assert "Traceback" not in said
    assert "Error" not in said


@posix
def test_ctrl_c_stops_the_answer_and_the_next_line_is_answered(both_gguf: Path) -> None:
    with conversation(both_gguf, "--seed", "1") as talk:
        talk.wait_for(lambda: "Ctrl-D" in talk.said["err"])
        talk.type("Question 1\n")
        talk.wait_for(lambda: len(talk.said["out"]) > 10)
        talk.process.send_signal(signal.SIGINT)
        talk.wait_for(lambda: "stopped, " in talk.said["err"])
        talk.type("Question 2\n")
        talk.wait_for(lambda: talk.said["err"].count("tok/s") == 2)
        talk.type("\x04")
        assert talk.process.wait(WAIT_S) == 0
    assert "YES" in talk.said["out"]
    assert "Traceback" not in talk.said["err"]


@posix
def test_ctrl_c_at_the_prompt_ends_nothing(letters_gguf: Path) -> None:
    with conversation(letters_gguf, "-n", "5", "--seed", "1") as talk:
        talk.wait_for(lambda: "Ctrl-D" in talk.said["err"])
        talk.type("Hello\n")
        talk.wait_for(lambda: talk.said["err"].count("\n> ") == 2)
        talk.interrupt_at_prompt()
        # What is typed before that would be dropped with the line.
        talk.wait_for(lambda: talk.said["err"].count("\n> ") == 3)
        talk.type("Hello again\n")
        talk.wait_for(lambda: talk.said["err"].count("tok/s") == 2)
        talk.type("\x04")
        assert talk.process.wait(WAIT_S) == 0


@posix
def test_the_prompt_sign_stays_out_of_a_redirected_answer(letters_gguf: Path) -> None:
    with conversation(letters_gguf, "-n", "5", "--seed", "1") as talk:
        talk.wait_for(lambda: "Ctrl-D" in talk.said["err"])
        talk.type("Hello\n")
        talk.wait_for(lambda: "tok/s" in talk.said["err"])
        talk.type("\x04")
        assert talk.process.wait(WAIT_S) == 0
    assert "> " not in talk.said["out"]


HOSTILE = st.text(st.sampled_from("\x1b[]0;\x07m2J\x9b\x90\x9d\x9c\x7f\r\b\x00\n\ta人😀"))


@given(HOSTILE, st.integers(0, 100))
@example("\x1b[2J", 1)
@example("\x9b2J", 1)
@example("\x1b]0;title\x07", 2)
def test_no_control_character_reaches_the_terminal_wherever_a_text_is_cut(text: str, place: int) -> None:
    shown = console.printable(text[:place]) + console.printable(text[place:])
    assert shown == console.printable(text)
    assert all(character in "\t\n" or character.isprintable() for character in shown)
    assert [character for character in shown if character in "[];m人😀\n\t"] == [
        character for character in text if character in "[];m人😀\n\t"
    ]


def test_an_unloaded_model_says_so(demo_gguf: Path) -> None:
    with qwq_lite.load(demo_gguf, n_ctx=256) as model:
        talk = model.chat()
        assert talk.ask("Hi", max_tokens=1).stats.n_generated == 1
    model.unload()
    with pytest.raises(EngineClosed, match="load it again"):
        talk.ask("Hi")
    with pytest.raises(EngineClosed, match="load it again"):
        model.tokenize("Hi")


@pytest.mark.parametrize("typed", ["", " \n"])
def test_nothing_to_ask_is_usage(typed: str, demo_gguf: Path) -> None:
    done = chat(demo_gguf, "-p", typed)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--prompt" in done.stderr


def test_unequal_cache_types_are_warned_of(demo_gguf: Path) -> None:
    done = chat(demo_gguf, "--type-k", "q8_0", "--type-v", "f16", "-p", "Hi", "-n", "2")
    assert done.returncode == 0
    assert "--type-v" in done.stderr
