"""The library in this process: threads, cancelling, unloading, and what must never be lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import qwq_lite
from qwq_lite.backend.context import Context, ContextSettings
from qwq_lite.backend.model import LoadedModel
from qwq_lite.engine.request import Request
from qwq_lite.engine.scheduler import Scheduler
from qwq_lite.reply.policies.stops import Stops
from qwq_lite.sampling import Sampling
from tests.samples import times

PROMPT = "Tell me a long story about the sea."


@pytest.fixture(scope="module")
def model(demo_gguf: Path) -> Iterator[qwq_lite.Model]:
    with qwq_lite.load(demo_gguf, n_ctx=1024, isolated=False) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def letters(letters_gguf: Path) -> Iterator[qwq_lite.Model]:
    """Its replies do not end by themselves."""
    with qwq_lite.load(letters_gguf, n_ctx=4096, isolated=False) as loaded:
        yield loaded


def test_the_second_turn_prefills_only_what_is_new(model: qwq_lite.Model) -> None:
    chat = model.chat()
    first = chat.ask("What is the capital of France?", seed=1, max_tokens=16)
    second = chat.ask("And of Germany?", seed=1, max_tokens=8)
    assert second.stats.n_reused >= first.stats.n_prompt
    assert second.stats.n_prefilled == second.stats.n_prompt - second.stats.n_reused < first.stats.n_prompt


def test_the_same_seed_gives_the_same_answer_whatever_was_cached(model: qwq_lite.Model) -> None:
    first = model.ask(PROMPT, seed=5, max_tokens=24, temperature=1.0)
    model.ask("Something else.", max_tokens=4)
    assert model.ask(PROMPT, seed=5, max_tokens=24, temperature=1.0).answer == first.answer
    assert model.ask(PROMPT, seed=6, max_tokens=24, temperature=1.0).answer != first.answer


def test_cancel_from_another_thread_ends_with_the_text_so_far(letters: qwq_lite.Model) -> None:
    for _ in range(10):
        chat = letters.chat()
        events = chat.stream(PROMPT, seed=1)
        shown = []
        for event in events:
            if isinstance(event, qwq_lite.Answer):
                shown.append(event.text)
                thread = threading.Thread(target=chat.cancel)
                thread.start()
                thread.join()
            if isinstance(event, qwq_lite.Done):
                assert event.reply.finish_reason == "cancelled"
                assert event.reply.answer == "".join(shown).rstrip()
    assert letters.ask("Hi", max_tokens=3, seed=1).stats.n_generated == 3


def test_leaving_the_stream_cancels_and_the_model_goes_on(letters: qwq_lite.Model) -> None:
    for _ in letters.chat().stream(PROMPT):
        break
    assert letters.ask("Hi", max_tokens=3, seed=1).stats.n_generated == 3


def test_a_stream_that_has_ended_is_empty(model: qwq_lite.Model) -> None:
    stream = model.generate([{"role": "user", "content": "Hi"}], max_tokens=2)
    assert isinstance(list(stream)[-1], qwq_lite.Done)
    assert list(stream) == []


def test_a_full_context_is_said(model: qwq_lite.Model) -> None:
    with pytest.raises(qwq_lite.ContextFull, match="1024"):
        model.ask("word " * 2000)


def test_a_conversation_that_outgrows_its_context_goes_on_without_its_oldest_turns(letters_gguf: Path) -> None:
    """Each turn takes about 110 tokens."""
    with qwq_lite.load(letters_gguf, n_ctx=1024, isolated=False) as loaded:
        chat = loaded.chat("Answer in one word.")
        dropped, notices = [], []
        for number in range(12):
            for event in chat.stream(f"Question {number}: " + "what comes next? " * 3, seed=1, max_tokens=20):
                if isinstance(event, qwq_lite.Notice):
                    notices.append(event.text)
                elif isinstance(event, qwq_lite.Done):
                    dropped.append(event.reply.stats.n_dropped)
                    assert event.reply.finish_reason == "length"
                    assert event.reply.stats.n_prompt + 20 <= 1024
        assert len(chat.messages) == 25, "the conversation itself keeps all of its messages"
        assert len(notices) == sum(n > 0 for n in dropped) >= 1
        assert all("left out" in notice for notice in notices)
        assert all(n % 2 == 0 for n in dropped), "whole turns"
        assert not (dropped[-1] and dropped[-2]), "once turns go, several more fit before others must"
        with pytest.raises(qwq_lite.ContextFull, match="--ctx"):
            chat.ask("And now? " * 200, when_full="error")


def test_a_reply_that_meets_the_contexts_end_says_so(demo_gguf: Path) -> None:
    weights = LoadedModel(demo_gguf)
    scheduler = Scheduler(weights, Context(weights, ContextSettings(n_ctx=256, n_threads=1)))
    never_ends = Stops(end_tokens=frozenset())
    events = list(scheduler.submit(Request([44] * 250, (never_ends,), Sampling(), seed=1)))
    scheduler.close()
    done = events[-1]
    assert isinstance(done, qwq_lite.Done)
    assert done.reply.finish_reason == "context"
    assert done.reply.stats.n_generated == 7, "256 positions, and one token that was sampled and has none"
    assert any(isinstance(event, qwq_lite.Notice) and "--ctx" in event.text for event in events)


def test_threads_on_one_model_take_turns(model: qwq_lite.Model) -> None:
    alone = {seed: model.ask(PROMPT, seed=seed, max_tokens=12).answer for seed in range(4)}
    found: dict[int, str] = {}
    threads = [
        threading.Thread(
            target=lambda seed=seed: found.__setitem__(seed, model.ask(PROMPT, seed=seed, max_tokens=12).answer)
        )
        for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == alone


def ask_until_closed(loaded: qwq_lite.Model, failures: list[type[BaseException]]) -> None:
    try:
        while True:
            loaded.tokenize("some text")
            loaded.ask("Hi", max_tokens=2)
    except qwq_lite.QwqError as error:
        failures.append(type(error))


@pytest.mark.sampled
@pytest.mark.parametrize("isolated", [True, False])
def test_unloading_beside_callers_raises_and_nothing_crashes(demo_gguf: Path, isolated: bool) -> None:
    for _ in range(times(5)):
        loaded = qwq_lite.load(demo_gguf, n_ctx=512, isolated=isolated)
        failures: list[type[BaseException]] = []
        threads = [threading.Thread(target=ask_until_closed, args=(loaded, failures)) for _ in range(3)]
        for thread in threads:
            thread.start()
        loaded.ask("Hi", max_tokens=2)
        loaded.unload()
        for thread in threads:
            thread.join(120)
        assert failures == [qwq_lite.EngineClosed] * 3


@pytest.mark.parametrize("isolated", [True, False])
def test_an_exception_in_on_progress_comes_out_of_load(demo_gguf: Path, isolated: bool) -> None:
    def interrupt(_: qwq_lite.Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qwq_lite.load(demo_gguf, on_progress=interrupt, isolated=isolated)
