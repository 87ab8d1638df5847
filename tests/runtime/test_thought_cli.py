"""qwq-lite chat and the thought of its model: what is shown of it, what ends it, what a program is told of that."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from tests.checkpoints import END_OF_TURN, in_f16, write_scripted_checkpoint
from tests.terminal import WAIT_S, chat, conversation, posix

LONG = "Write a very long story about a sailor and his dog, with many chapters."
UNDIVIDED = ("--thought-style", "undivided", "--seed", "1")


@pytest.mark.parametrize("no_thinking", [(), ("--no-thinking",)])
def test_a_thought_with_tags_that_used_the_room_is_told_and_has_a_status(
    thinking_gguf: Path, no_thinking: tuple[str, ...]
) -> None:
    done = chat(thinking_gguf, "-p", LONG, "-n", "20", "--seed", "1", *no_thinking)
    assert (done.returncode, done.stdout.strip()) == (3, "")
    assert "the thought used the room of 20 tokens" in done.stderr


def test_a_conversation_of_a_pipe_has_the_status_of_a_question_without_an_answer(tmp_path: Path) -> None:
    """The prompt ends with the question's last letter: after one the model thinks for ever, after the other it ends its turn."""

    def script(last: int) -> dict[int, float]:
        return {{ord("b"): ord("c"), ord("c"): END_OF_TURN}.get(last, ord("a")): 0.0}

    template = "{{ '<think>' + messages[-1].content[-1] }}"
    folder = write_scripted_checkpoint(tmp_path / "Thinking", script, thinks=True, template=template)
    done = chat(in_f16(folder), "-n", "20", stdin="a\nb\n")
    assert done.returncode == 3
    assert done.stderr.count("the thought used the room of 20 tokens") == 1  # the second question has its answer
    assert "c" in done.stdout


def test_what_a_script_reads_is_the_answer_alone(sentences_gguf: Path) -> None:
    done = chat(sentences_gguf, "-p", LONG, *UNDIVIDED, "--think-budget", "64", "--answer-reserve", "30")
    assert done.returncode == 0
    assert done.stdout.startswith("**Final Answer**\n\n")
    thought, word, summary = done.stderr.partition("the thought was ended by its budget")
    assert word
    assert "**Final Answer**" not in thought
    assert "ended by its budget; answer" in summary


def test_without_its_thought_a_text_that_names_no_answer_is_printed_once_and_whole(sentences_gguf: Path) -> None:
    quiet = chat(sentences_gguf, "-p", LONG, *UNDIVIDED, "-n", "30", "--no-thinking")
    plain = chat(sentences_gguf, "-p", LONG, "--seed", "1", "-n", "30")
    assert (quiet.returncode, quiet.stdout.strip()) == (0, plain.stdout.strip())
    assert plain.stdout.strip() not in quiet.stderr


def test_the_summary_begins_on_a_line_of_its_own(sentences_gguf: Path) -> None:
    done = chat(sentences_gguf, "-p", LONG, *UNDIVIDED, "-n", "30")
    assert "\nstopped at its limit, 30 tokens" in done.stderr


@posix
def test_ctrl_backslash_ends_the_thought_and_the_answer_follows(sentences_gguf: Path) -> None:
    with conversation(sentences_gguf, *UNDIVIDED, "--answer-reserve", "40") as talk:
        talk.wait_for(lambda: "ends its thought" in talk.said["err"])
        talk.process.send_signal(signal.SIGQUIT)  # without a thought nothing happens
        talk.type(f"{LONG}\n")
        n_before = len(talk.said["err"])
        talk.wait_for(lambda: len(talk.said["err"]) > n_before + 50)
        talk.process.send_signal(signal.SIGQUIT)
        talk.wait_for(lambda: "tok/s" in talk.said["err"])
        talk.type("\x04")
        assert talk.process.wait(WAIT_S) == 0
    assert "**Final Answer**" in talk.said["out"]
    assert "ended for the answer; answer" in talk.said["err"]


@posix
def test_a_cancelled_thought_is_no_answer(sentences_gguf: Path) -> None:
    with conversation(sentences_gguf, *UNDIVIDED, "--no-thinking") as talk:
        talk.wait_for(lambda: "Ctrl-D" in talk.said["err"])
        talk.type(f"{LONG}\n")
        with pytest.raises(subprocess.TimeoutExpired):
            talk.process.wait(1.5)
        talk.process.send_signal(signal.SIGINT)
        talk.wait_for(lambda: "stopped, " in talk.said["err"])
        talk.type("\x04")
        assert talk.process.wait(WAIT_S) == 0
    assert talk.said["out"].strip() == ""


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--think-budget", "9", "--effort", "low"), "give one of the two"),
        (("--within", "soon"), "no length of time"),
        (("--within", "0s"), "no length of time"),
        (("--within", "1h30"), "no length of time"),
        (("--answer-temperature", "nan"), "answer_temperature is nan"),
        (("--answer-top-p", "0"), "--answer-top-p"),
    ],
)
def test_an_option_that_cannot_be_meant_is_usage_before_the_model_is_loaded(
    options: tuple[str, ...], word: str, demo_gguf: Path
) -> None:
    done = chat(demo_gguf, "-p", "Hi", *options)
    assert done.returncode == 2
    assert word in done.stderr
    assert "running on" not in done.stderr
