"""Many callers on one model, in every order: no deadlock, right answers, nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest

import qwq_lite
from qwq_lite.events import Done
from qwq_lite.system.units import MIB
from tests.samples import times

QUESTIONS = ("a", "What is 2+3?", "\n\n你好", "x" * 200)
N_SEEDS = 5
N_TOKENS = 6


@pytest.fixture(scope="module")
def model(tiny_gguf: Path) -> Iterator[qwq_lite.Model]:
    with qwq_lite.load(tiny_gguf, n_ctx=1024, n_threads=1, isolated=False) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def alone(model: qwq_lite.Model) -> dict[tuple[str, int], str]:
    """What each question and seed is answered with when nobody else asks."""
    return {(text, seed): text_of(model.ask(text, **options(seed))) for text in QUESTIONS for seed in range(N_SEEDS)}


def options(seed: int) -> dict[str, Any]:
    return {"seed": seed, "max_tokens": N_TOKENS, "temperature": 1.0}


def text_of(reply: qwq_lite.Reply) -> str:
    return f"{reply.thinking}|{reply.answer}"


class Caller:
    """One thread's random doings on a shared model; `wrong` gathers what came back wrong."""

    def __init__(self, model: qwq_lite.Model, alone: dict[tuple[str, int], str], seed: int) -> None:
        self.model, self.alone, self.random = model, alone, Random(seed)
        self.wrong: list[str] = []
        self.doings: list[Callable[[], None]] = [
            self.ask, self.ask, self.ask_async, self.leave, self.cancel, self.tokenize, self.fork, self.stream_two,
        ]  # fmt: skip

    def run(self) -> None:
        for _ in range(3):
            doing = self.random.choice(self.doings)
            try:
                doing()
            except BaseException as error:
                self.wrong.append(f"{doing.__name__}: {error!r}")

    def picked(self) -> tuple[str, int]:
        return self.random.choice(QUESTIONS), self.random.randrange(N_SEEDS)

    def check(self, text: str, seed: int, reply: qwq_lite.Reply) -> None:
        if text_of(reply) != self.alone[text, seed]:
            self.wrong.append(f"{text!r}, seed {seed}: {text_of(reply)!r} and not {self.alone[text, seed]!r}")

    def ask(self) -> None:
        text, seed = self.picked()
        self.check(text, seed, self.model.ask(text, **options(seed)))

    def ask_async(self) -> None:
        text, seed = self.picked()
        self.check(text, seed, asyncio.run(self.model.aask(text, **options(seed))))

    def leave(self) -> None:
        for event in self.model.chat().stream("Tell me a story.", max_tokens=400):
            if not isinstance(event, qwq_lite.Progress):
                break

    def cancel(self) -> None:
        chat = self.model.chat()
        timer = threading.Timer(self.random.random() / 100, chat.cancel)
        timer.start()
        reply = chat.ask("Tell me a story.", max_tokens=400)
        timer.join()
        if reply.finish_reason not in ("cancelled", "length", "stop"):
            self.wrong.append(f"cancelled, and it ended with {reply.finish_reason}")

    def tokenize(self) -> None:
        if self.model.tokenize("ab") != self.model.tokenize("a") + self.model.tokenize("b"):
            self.wrong.append("tokenize")

    def fork(self) -> None:
        chat = self.model.chat()
        text, seed = self.picked()
        self.check(text, seed, chat.ask(text, **options(seed)))
        twin = chat.fork()
        if len(twin.messages) != 2 or twin.ask("and?", max_tokens=3).stats.n_generated == 0:
            self.wrong.append("fork")

    def stream_two(self) -> None:
        (text, seed), (other, other_seed) = self.picked(), self.picked()
        first = iter(self.model.chat().stream(text, **options(seed)))
        second = iter(self.model.chat().stream(other, **options(other_seed)))
        next(first), next(second)
        for events, key in ((second, (other, other_seed)), (first, (text, seed))):
            for event in events:
                if isinstance(event, Done):
                    self.check(*key, event.reply)


@pytest.mark.sampled
def test_200_random_interleavings_of_threads_give_right_answers(
    model: qwq_lite.Model, alone: dict[tuple[str, int], str]
) -> None:
    for number in range(times(200)):
        callers = [Caller(model, alone, 1000 * number + n) for n in range(3)]
        threads = [threading.Thread(target=caller.run, daemon=True) for caller in callers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads), f"interleaving {number} hangs"
        assert [caller.wrong for caller in callers] == [[], [], []], f"interleaving {number}"


@pytest.mark.sampled
def test_10_000_short_requests_leave_memory_and_descriptors_as_they_were(model: qwq_lite.Model) -> None:
    process = psutil.Process()
    kept = []
    n_requests = times(10_000)
    for number in range(n_requests):
        chat = model.chat()
        reply = chat.ask(f"question {number}", max_tokens=1 + number % 2, stop=["never"])
        assert reply.stats.n_generated
        if number in (n_requests // 5, n_requests - 1):
            gc.collect()
            kept.append((process.memory_info().rss, process.num_fds() if hasattr(process, "num_fds") else 0))
    (rss, descriptors), (rss_end, descriptors_end) = kept
    assert rss_end - rss <= 5 * MIB, f"{(rss_end - rss) / MIB:.1f} MiB more after {n_requests * 4 // 5} requests"
    assert descriptors_end == descriptors
