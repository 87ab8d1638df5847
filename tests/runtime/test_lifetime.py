"""What must hold when callers do what they should not: signals, forks, streams and models that nobody holds any more."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qwq_lite
from qwq_lite.engine.sequences import Sequences
from qwq_lite.reply.stream import MOST_UNREAD

QUESTION = "Tell me a long story about the sea."


@pytest.fixture
def model(thinking_gguf: Path) -> Iterator[qwq_lite.Model]:
    """Of what it thinks each token is an event: a reply of more than MOST_UNREAD tokens waits for its reader."""
    with qwq_lite.load(thinking_gguf, n_ctx=4096, n_threads=1, isolated=False) as loaded:
        yield loaded


def test_a_stream_that_nobody_reads_does_not_hold_up_the_next_reply(model: qwq_lite.Model) -> None:
    model.generate([{"role": "user", "content": QUESTION}], seed=1)
    gc.collect()
    reply = model.ask("Hi", max_tokens=2)
    assert reply.stats.n_generated == 2


def test_a_model_that_nobody_holds_frees_its_memory_and_ends_its_thread(tiny_gguf: Path) -> None:
    def engines() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "qwq-lite engine"]

    before = set(engines())
    model = qwq_lite.load(tiny_gguf, n_ctx=256, isolated=False)
    (engine,) = set(engines()) - before
    model.ask("Hi", max_tokens=1)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    engine.join(60)
    assert not engine.is_alive()


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals there")
def test_unloading_in_a_signal_handler_waits_for_the_call_that_it_interrupts(tiny_gguf: Path) -> None:
    code = f"""
import os, signal, sys, threading
sys.path[:0] = {sys.path!r}
import qwq_lite
model = qwq_lite.load({str(tiny_gguf)!r}, n_ctx=256, isolated=False)
signal.signal(signal.SIGUSR1, lambda *_: model.unload())
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
try:
    while True:
        model.tokenize("some text " * 20_000)
except qwq_lite.EngineClosed:
    print("closed")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "closed\n"), done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork there")
def test_a_forked_copy_of_the_process_is_told_so(tiny_gguf: Path) -> None:
    code = f"""
import os, sys
sys.path[:0] = {sys.path!r}
import qwq_lite
model = qwq_lite.load({str(tiny_gguf)!r}, n_ctx=256)
child = os.fork()
if child == 0:
    try:
        model.ask("Hi")
    except qwq_lite.EngineError as error:
        print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
print(model.ask("Hi", max_tokens=1).stats.n_generated)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.splitlines()[-1] == "1", done.stderr
    assert "in another process" in done.stdout


def test_a_job_that_fails_leaves_the_engine_running(model: Any) -> None:
    class Odd:
        def __eq__(self, other: object) -> bool:
            raise ZeroDivisionError

        def __hash__(self) -> int:
            return 1

    with pytest.raises(qwq_lite.EngineError, match="ZeroDivisionError"):
        list(model.generate("Hi", session=Odd(), max_tokens=1))
    model.release_session(Odd())
    assert model.ask("Hi", max_tokens=1).stats.n_generated == 1


def test_a_defect_in_the_engines_own_loop_ends_every_call_with_an_error(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Sequences, *_: object) -> None:
        raise SystemExit("a defect")

    monkeypatch.setattr(Sequences, "done", broken)
    streams = [model.generate("Hi", max_tokens=2 * MOST_UNREAD) for _ in range(3)]  # the first is not done unread
    for stream in streams:
        with pytest.raises(qwq_lite.EngineError, match=r"ended by SystemExit|unloaded"):
            list(stream)
    with pytest.raises(qwq_lite.EngineError):
        model.ask("Hi")


def test_a_seed_gives_the_same_reply_whatever_became_of_the_question_before(demo_gguf: Path) -> None:
    with qwq_lite.load(demo_gguf, n_ctx=1024, n_threads=1) as model:
        expected = model.ask(QUESTION, seed=3, max_tokens=24, temperature=1.0).answer
        chat = model.chat()
        for event in chat.stream("Tell me a long story about the mountains and the snow on them, please.", seed=1):
            if isinstance(event, qwq_lite.Answer):
                break
        assert chat.ask(QUESTION, seed=3, max_tokens=24, temperature=1.0).answer == expected
        again = list(chat.retry(seed=3, max_tokens=24, temperature=1.0))[-1]
        assert isinstance(again, qwq_lite.Done)
        assert (again.reply.answer, again.reply.stats.n_prefilled) == (expected, 0)


def test_another_question_cancels_the_reply_in_hand(model: qwq_lite.Model) -> None:
    chat = model.chat()
    first = chat.stream(QUESTION, max_tokens=2 * MOST_UNREAD)
    assert chat.ask("Hi", max_tokens=2).finish_reason == "length"
    assert [event.reply.finish_reason for event in first if isinstance(event, qwq_lite.Done)] == ["cancelled"]
    assert [message["content"] for message in chat.messages if message["role"] == "user"] == ["Hi"]


def test_a_question_after_one_that_was_left_is_answered(model: qwq_lite.Model) -> None:
    async def leave_and_ask() -> qwq_lite.Reply:
        async for event in chat.astream(QUESTION):
            if not isinstance(event, qwq_lite.Progress):
                break
        return await chat.aask("Hi", max_tokens=2)

    chat = model.chat()
    for event in (named := chat.stream(QUESTION)):
        if not isinstance(event, qwq_lite.Progress):
            break
    assert chat.ask("Hi", max_tokens=2).stats.n_generated
    assert named.cancelled
    assert asyncio.run(leave_and_ask()).stats.n_generated
    assert len(chat.messages) == 4


def test_a_stop_before_the_first_event_is_not_lost(model: qwq_lite.Model) -> None:
    chat = model.chat()
    stream = chat.stream(QUESTION)
    chat.cancel()
    (done,) = [event for event in stream if isinstance(event, qwq_lite.Done)]
    assert done.reply.finish_reason == "cancelled"


def test_a_chat_goes_on_from_messages_that_were_kept_elsewhere(model: qwq_lite.Model) -> None:
    past = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    chat = model.chat("Be brief.", messages=past)
    chat.ask("And?", max_tokens=1)
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "user", "assistant"]


@pytest.mark.parametrize("text", [None, b"Hi", ["Hi"]])
def test_a_question_that_is_no_text_is_a_usage_error(model: qwq_lite.Model, text: Any) -> None:
    with pytest.raises(qwq_lite.UsageError, match="a text is expected"):
        model.ask(text)


def test_the_smallest_context_takes_prompts_up_to_its_end(tiny_gguf: Path) -> None:
    with pytest.raises(qwq_lite.UsageError, match="n_ctx"):
        qwq_lite.load(tiny_gguf, n_ctx=100)
    with qwq_lite.load(tiny_gguf, n_ctx=256, n_threads=1, isolated=False) as loaded:
        tokens = loaded.tokenize("x" * 250)
        (done,) = [e for e in loaded.generate(tokens, max_tokens=3) if isinstance(e, qwq_lite.Done)]
        assert done.reply.stats.n_prefilled == 250


def test_a_reply_that_is_cancelled_before_its_answer_is_not_kept(model: qwq_lite.Model) -> None:
    chat = model.chat()
    events = chat.stream(QUESTION)  # thinks first: the template opens the tag
    for event in events:
        if isinstance(event, qwq_lite.Thinking):
            chat.cancel()
    assert chat.messages == ()
    chat.ask("Hi", max_tokens=1)
    assert len(chat.messages) == 2, "one that ended by itself is, empty or not"


def test_retry_keeps_the_old_reply_until_the_new_one_is_there(model: qwq_lite.Model) -> None:
    chat = model.chat()
    with pytest.raises(qwq_lite.UsageError, match="no question"):
        chat.retry()
    chat.ask("Hi", seed=1, max_tokens=8)
    before = chat.messages
    events = chat.retry(seed=2, max_tokens=2 * MOST_UNREAD)
    assert chat.messages == before
    assert chat.fork().messages == before
    chat.cancel()
    list(events)
    assert chat.messages == before, "one that is cancelled replaces nothing"
    list(chat.retry(seed=3, max_tokens=8))
    assert len(chat.messages) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"seed": "x"}, {"seed": 1.5}, {"seed": -1}, {"max_tokens": 0}, {"max_tokens": "5"}, {"temperature": "hot"},
        {"temperature": -1}, {"top_k": 2.5}, {"top_p": 0}, {"min_p": 2}, {"stop": "text"}, {"stop": [""]},
        {"when_full": "Error"}, {"no_such": 1},
    ],
)  # fmt: skip
def test_an_option_that_cannot_be_meant_is_a_usage_error(model: qwq_lite.Model, options: dict[str, Any]) -> None:
    with pytest.raises(qwq_lite.UsageError, match=next(iter(options))):
        model.chat().ask("Hi", **options)


def test_an_empty_prompt_is_a_usage_error(model: qwq_lite.Model) -> None:
    with pytest.raises(qwq_lite.UsageError, match="empty"):
        model.generate("")


def test_signals_are_as_they_were(model: qwq_lite.Model) -> None:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
