"""Runs of characters that overflow the stack of a tokenizer's regular expression: tokenized where they fit, refused elsewhere."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

import qwq_lite
from qwq_lite.backend import pretokenizer
from tests.attacks.test_engine_deaths import rewritten
from tests.samples import sample

MOST = pretokenizer.STACKS[0][1]
RECURSIVE = ["gpt-4o", "tekken", "deepseek-v3", "exaone-moe"]


def with_pre(tiny_gguf: Path, folder: Path, pre: str) -> Path:
    return rewritten(tiny_gguf, folder / f"{pre}.gguf", {pretokenizer.FIELD: pre})


@pytest.mark.parametrize("pre", sample(RECURSIVE, 1))
def test_long_runs_are_taken_and_longer_ones_refused(tiny_gguf: Path, tmp_path: Path, pre: str) -> None:
    with qwq_lite.load(with_pre(tiny_gguf, tmp_path, pre), n_ctx=512) as model:
        before = model.pid  # type: ignore[attr-defined]
        for letter in ("a", "漢", " "):
            assert model.tokenize(letter * MOST)
            with pytest.raises(qwq_lite.UsageError, match=f"{MOST + 1:,} characters.*{pre}.*{MOST:,} at most"):
                model.tokenize(letter * (MOST + 1))
        assert model.tokenize("=" * MOST + "\n" * MOST)  # one match takes both runs
        assert len(model.tokenize(("a" * MOST + "\n") * 2)) >= 2
        for ask in (model.generate, model.ask):
            with pytest.raises(qwq_lite.UsageError, match=rf"{2 * MOST:,} characters"):
                ask("b" * 2 * MOST)
        assert model.pid == before  # type: ignore[attr-defined]


@pytest.mark.parametrize("pre", sample(["qwen2", "llama-bpe", "gpt-2"], 1))
def test_expressions_with_code_of_their_own_take_any_run(tiny_gguf: Path, tmp_path: Path, pre: str) -> None:
    with qwq_lite.load(with_pre(tiny_gguf, tmp_path, pre), n_ctx=512) as model:
        for letter in ("a", "=", " "):
            assert model.tokenize(letter * 3 * MOST)


IN_THIS_PROCESS = """
import sys, threading
import qwq_lite
model = qwq_lite.load(sys.argv[1], n_ctx=512, isolated=False)
threading.stack_size(512 << 10)
for n in (500, 501, 50_000):  # the size is asked for by setting it: it is what it was
    thread = threading.Thread(target=lambda: print(len(model.tokenize("a" * n)) > 0, flush=True))
    thread.start()
    thread.join()
    assert threading.stack_size(512 << 10) == 512 << 10
model.unload()
"""


def test_a_caller_on_a_small_stack_in_the_same_process(tiny_gguf: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", IN_THIS_PROCESS, str(with_pre(tiny_gguf, tmp_path, "gpt-4o"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"] * 3


@pytest.mark.parametrize("n_refused", range(len(pretokenizer.STACKS) + 1))
def test_a_smaller_stack_takes_a_shorter_run(monkeypatch: pytest.MonkeyPatch, n_refused: int) -> None:
    """A system that refuses large stacks: the next smaller one is taken, at last the caller's own."""
    start, refused = threading.Thread.start, list[threading.Thread]()

    def refusing(thread: threading.Thread) -> None:
        if len(refused) < n_refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refusing)
    limits = [most for _, most in pretokenizer.STACKS]
    most = [*limits, 750][n_refused]
    words = ("a" * most + " ") * 3  # longer than the bound for texts that are taken as they are
    assert pretokenizer.call(lambda: 5, words, "gpt-4o", bounded=True) == 5
    assert threading.stack_size(0) == 0  # nothing is left changed
    assert len(refused) == n_refused
    refused.clear()
    text = "a" * (most + 1)
    with pytest.raises(qwq_lite.UsageError, match=f"{most:,} at most"):
        pretokenizer.call(lambda: 0, text, "gpt-4o", bounded=True)
    refused.clear()
    assert pretokenizer.call(lambda: 7, text, "qwen2", bounded=False) == 7


def test_runs_are_not_hidden_by_rare_white_space() -> None:
    assert pretokenizer.longest_run("a\x1fb\u00a0c d", "gpt-4o") == 5
    assert pretokenizer.longest_run(" \u00a0" * 10, "gpt-4o") == 20
    assert pretokenizer.longest_run("a b c\nd", "exaone-moe") == 5
    assert pretokenizer.longest_run("", "gpt-4o") == 0


def test_what_the_work_raises_comes_to_its_caller() -> None:
    def fails() -> int:
        raise ValueError("no")

    for text in ("short", "long " * 1000):
        with pytest.raises(ValueError, match="no"):
            pretokenizer.call(fails, text, "gpt-4o", bounded=True)
