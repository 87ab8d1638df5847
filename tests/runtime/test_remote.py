"""The engine in its own process: the same replies, and whatever ends it ends nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import qwq_lite
from qwq_lite.loading import load
from qwq_lite.reply.stream import MOST_UNREAD
from qwq_lite.system import child
from qwq_lite.worker import hang_clocks, process, protocol, remote, resumable_feed
from qwq_lite.worker.remote import RemoteModel
from tests.samples import times

LONG = "Tell me a long story about the sea."
WAIT_S = 60
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals")


@pytest.fixture(scope="module")
def model(letters_gguf: Path) -> Iterator[RemoteModel]:
    """Its replies do not end by themselves, and each token is an event: one of more than MOST_UNREAD waits for its reader."""
    with load(letters_gguf, n_ctx=4096) as loaded:
        assert isinstance(loaded, RemoteModel)
        yield loaded


@pytest.fixture
def fragile(letters_gguf: Path) -> Iterator[RemoteModel]:
    """One of its own for each test that ends it: too many deaths in a row are given up."""
    with load(letters_gguf, n_ctx=4096) as loaded:
        assert isinstance(loaded, RemoteModel)
        yield loaded


class Clock:
    """The host's clock: it stands still, and moves when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = time.monotonic()
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=time.sleep)
        for module in (process, remote):
            monkeypatch.setattr(module, "time", clock)

    def pass_(self, seconds: float, model: RemoteModel) -> None:
        """In steps that are no sleep of the host, each one seen by the engine's watch unless the engine is gone."""
        worker, end = model._held[0], self.now + seconds
        while self.now < end and model.pid is not None:
            self.now = min(end, self.now + 0.9 * hang_clocks.ASLEEP_S)
            wait_until(lambda: worker._clocks.looked == self.now or model.pid is None)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def pid_of(model: RemoteModel) -> int:
    assert model.pid is not None
    return model.pid


def struck(model: RemoteModel, number: int, after: int = 10) -> qwq_lite.EngineCrashed:
    """What a reply raises when its engine gets a signal after so many events."""
    texts: list[str] = []
    with pytest.raises(qwq_lite.EngineCrashed) as caught:
        for n, event in enumerate(model.chat().stream(LONG, seed=1, max_tokens=900)):
            if isinstance(event, qwq_lite.Answer):
                texts.append(event.text)
            if n == after:
                os.kill(pid_of(model), number)
    assert caught.value.partial.startswith("".join(texts))
    return caught.value


def gone(pid: int) -> bool:
    deadline = time.monotonic() + WAIT_S
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.status() == psutil.STATUS_ZOMBIE and process.ppid() != os.getpid():
                return True
        time.sleep(0.05)
    return not psutil.pid_exists(pid)


def test_replies_are_those_of_the_engine_in_this_process(demo_gguf: Path) -> None:
    asked: dict[str, Any] = {"seed": 3, "max_tokens": 40}
    with load(demo_gguf, n_ctx=4096) as model, load(demo_gguf, n_ctx=4096, isolated=False) as here:
        for question in ("What is the capital of France?", "¿Qué es el mar? 海是什么?"):
            assert model.ask(question, **asked).answer == here.ask(question, **asked).answer
        assert model.tokenize(
            "naïve 海 \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")
        ) == here.tokenize("naïve 海 😀")
        assert (model.n_ctx, model.plan.choice, model.notices) == (here.n_ctx, here.plan.choice, here.notices)
        assert model.engine.version == here.engine.version


def test_a_conversation_goes_on_forks_and_is_saved(model: RemoteModel, tmp_path: Path) -> None:
    chat = model.chat("Answer in one short sentence.")
    first = chat.ask("What is the sea?", seed=1, max_tokens=20)
    second = chat.ask("And a lake?", seed=1, max_tokens=20)
    assert second.stats.n_reused > first.stats.n_prompt
    chat.save(tmp_path / "chat")
    twin, back = chat.fork(), qwq_lite.Chat.restore(model, tmp_path / "chat")
    for other in (twin, back):
        assert other.ask("Why?", seed=2, max_tokens=5).stats.n_reused > second.stats.n_prompt


def test_errors_keep_their_kind(model: RemoteModel, tmp_path: Path) -> None:
    with pytest.raises(qwq_lite.UsageError, match="temperature"):
        model.ask("Hi", temperature=-1.0)
    with pytest.raises(qwq_lite.ContextFull):
        model.ask("word " * 5000, when_full="error")
    with pytest.raises(qwq_lite.FormatError):
        qwq_lite.Chat.restore(model, __file__)
    with pytest.raises(qwq_lite.FormatError):
        load(__file__)
    bad = tmp_path / "no.gguf"
    bad.write_bytes(b"GGUF")
    with pytest.raises(qwq_lite.FormatError):
        load(bad)


def test_a_model_that_does_not_fit_leaves_no_process(demo_gguf: Path) -> None:
    before = psutil.Process().children()
    with pytest.raises(qwq_lite.PlanError):
        load(demo_gguf, memory=1 << 20)
    assert psutil.Process().children() == before


def test_a_reply_is_cancelled_from_another_thread(model: RemoteModel) -> None:
    chat = model.chat()
    thread = threading.Thread(target=chat.cancel)
    for event in chat.stream(LONG, max_tokens=3000):
        if isinstance(event, qwq_lite.Answer) and thread.ident is None:
            thread.start()
            thread.join()
    assert isinstance(event, qwq_lite.Done)
    assert event.reply.finish_reason == "cancelled"
    assert 0 < event.reply.stats.n_generated < 2000


def test_it_is_read_by_an_event_loop(model: RemoteModel) -> None:
    async def several() -> list[str]:
        replies = await asyncio.gather(*(model.chat().aask("Hi", seed=1, max_tokens=5) for _ in range(3)))
        return [reply.answer for reply in replies]

    first, *others = asyncio.run(several())
    assert first
    assert others == [first, first]


def test_a_reader_that_does_not_read_stops_the_engine(model: RemoteModel) -> None:
    stream = model.generate(LONG, max_tokens=1500)
    worker = psutil.Process(pid_of(model))
    deadline = time.monotonic() + WAIT_S
    busy = 1.0
    while busy > 0.2 and time.monotonic() < deadline:
        before = sum(worker.cpu_times()[:2])
        time.sleep(0.5)
        busy = (sum(worker.cpu_times()[:2]) - before) / 0.5
    assert busy <= 0.2
    events = list(stream)
    assert len(events) > 2 * MOST_UNREAD + 64  # it waited with more to come, and went on
    assert isinstance(events[-1], qwq_lite.Done)


@posix
@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGABRT"])
def test_a_death_is_an_exception_and_the_next_call_works(fragile: RemoteModel, name: str) -> None:
    before = pid_of(fragile)
    crash = struck(fragile, getattr(signal, name))
    assert crash.signal == name
    assert name in str(crash)
    assert gone(before)
    assert fragile.ask("Hi", seed=1, max_tokens=5).answer
    assert pid_of(fragile) != before


@posix
def test_an_illegal_instruction_names_doctor(fragile: RemoteModel) -> None:
    crash = struck(fragile, signal.SIGILL)
    assert crash.signal == "SIGILL" and str(crash).endswith("run: qwq-lite doctor")


@posix
def test_a_process_that_is_stopped_is_ended(fragile: RemoteModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hang_clocks, "_STUCK_S", math.inf)  # what runs and is silent
    before = pid_of(fragile)
    assert "did not answer" in str(struck(fragile, signal.SIGSTOP))
    assert gone(before)
    assert fragile.ask("Hi", seed=1, max_tokens=5).answer


@posix
def test_a_conversation_survives_its_engine(fragile: RemoteModel) -> None:
    chat = fragile.chat()
    first = chat.ask("What is the sea?", seed=1, max_tokens=10)
    os.kill(pid_of(fragile), signal.SIGKILL)
    wait_until(lambda: fragile.pid is None)
    second = chat.ask("Why?", seed=1, max_tokens=10)
    assert second.stats.n_reused == 0
    assert second.stats.n_prefilled > first.stats.n_prompt
    assert len(chat.messages) == 4


@posix
def test_a_crash_loop_is_given_up(fragile: RemoteModel) -> None:
    for n in range(remote._CRASHES):
        if n:
            assert fragile.ask("Hi", max_tokens=2).stats.n_generated
        os.kill(pid_of(fragile), signal.SIGKILL)  # nobody asks for anything: it is nobody's fault
        deadline = time.monotonic() + WAIT_S
        while fragile.pid is not None and time.monotonic() < deadline:
            time.sleep(0.01)
    with pytest.raises(qwq_lite.EngineCrashed, match=f"{remote._CRASHES} times"):
        fragile.ask("Hi")


@posix
def test_deaths_that_are_a_replys_bar_nobody(fragile: RemoteModel) -> None:
    for _ in range(remote._CRASHES + 1):
        assert not isinstance(struck(fragile, signal.SIGKILL, after=3), qwq_lite.RequestCrashed)
    assert fragile.ask("Hi", max_tokens=2).stats.n_generated


@posix
@pytest.mark.sampled
def test_kills_at_random_moments_leave_nothing(demo_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One between two calls is met by none of them; the next one starts another engine."""
    monkeypatch.setattr(remote, "_WITHIN_S", 0.0)
    rng = random.Random(7)
    process = psutil.Process()
    before = process.children()
    with load(demo_gguf, n_ctx=1024) as model:
        assert isinstance(model, RemoteModel)
        n_descriptors = process.num_fds()
        for _ in range(times(10)):
            pid = pid_of(model)
            threading.Timer(rng.random(), os.kill, (pid, rng.choice((signal.SIGKILL, signal.SIGSEGV)))).start()
            with contextlib.suppress(qwq_lite.EngineCrashed):  # none where it hit before a prompt: that is asked again
                while model.pid == pid:
                    model.ask(LONG, max_tokens=100)
            assert gone(pid)
            assert model.ask("Hi", max_tokens=2).stats.n_generated
        assert process.num_fds() == n_descriptors
    assert process.children() == before


HOST = """
import os, sys, threading, time
import qwq_lite
models = []
thread = threading.Thread(target=lambda: models.append(qwq_lite.load({file!r}, n_ctx=4096)))
thread.start()
thread.join()
model = models[0]
if {fork}:
    if os.fork() == 0:
        time.sleep(600)
        os._exit(0)
print(model.pid, flush=True)
for event in model.chat().stream({question!r}, max_tokens=3000):
    time.sleep(0.1)
"""


@posix
@pytest.mark.parametrize("fork", [False, True])
def test_no_engine_outlives_its_host(letters_gguf: Path, fork: bool) -> None:
    """Also where a forked copy of the host keeps the pipe open; and the thread that loaded it has ended long before."""
    code = HOST.format(file=str(letters_gguf), fork=fork, question=LONG)
    host = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert host.stdout
    try:
        pid = int(host.stdout.readline())
        time.sleep(1.5)
        assert psutil.pid_exists(pid)
        host.kill()
        host.wait()
        assert gone(pid)
    finally:
        os.killpg(host.pid, signal.SIGKILL)
        host.stdout.close()


SLEEPER = """
import qwq_lite
with qwq_lite.load({file!r}, n_ctx=4096) as model:
    print(model.pid, flush=True)
    stream = model.generate({question!r}, max_tokens=3000)
    events = iter(stream)
    print(next(events), flush=True)
    input()
    *_, done = events
    print(done.reply.finish_reason, done.reply.stats.n_generated, flush=True)
"""


@posix
def test_a_host_that_is_stopped_with_its_engine_keeps_it(letters_gguf: Path) -> None:
    """Both stopped and woken together, as Ctrl-Z and fg do it."""
    code = SLEEPER.format(file=str(letters_gguf), question=LONG)
    pipe = subprocess.PIPE
    host = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, start_new_session=True)
    assert host.stdout and host.stdin
    with host:
        pid = int(host.stdout.readline())
        assert host.stdout.readline()
        os.killpg(host.pid, signal.SIGSTOP)
        time.sleep(2 * hang_clocks.SILENT_S)
        assert psutil.Process(pid).status() == psutil.STATUS_STOPPED
        os.killpg(host.pid, signal.SIGCONT)
        assert host.communicate(b"\n", timeout=WAIT_S)[0] == b"length 3000\n"


def test_a_host_that_sleeps_keeps_its_engine(model: RemoteModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a laptop does when its lid is closed: a clock that stood at one time is at another."""
    clock, before = Clock(monkeypatch), model.pid
    for event in model.generate(LONG, max_tokens=2000):
        if isinstance(event, qwq_lite.Answer) and clock.now < 1e6:
            clock.now += 1e6
            wait_until(lambda: model._held[0]._clocks.looked == clock.now)
    assert isinstance(event, qwq_lite.Done)
    assert model.pid == before


@posix
def test_a_forked_copy_of_the_host_is_refused(model: RemoteModel) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            model.ask("Hi")
            os.write(write, b"answered")
        except qwq_lite.EngineError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert b"another process" in os.read(read, 1000)
    os.close(read)
    os.close(write)
    assert model.ask("Hi", max_tokens=2).stats.n_generated


def test_after_unload_nothing_is_left(letters_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_GOODBYE_S", WAIT_S)
    host = psutil.Process()
    before = host.num_fds() if sys.platform != "win32" else 0
    model = load(letters_gguf, n_ctx=4096)
    assert isinstance(model, RemoteModel)
    pid, stream = pid_of(model), model.generate(LONG, max_tokens=3000)
    next(events := iter(stream))
    model.unload()
    model.unload()
    assert model._held[0].process.returncode == 0, "it ended by itself, in the midst of a reply"
    assert gone(pid)
    with contextlib.suppress(qwq_lite.EngineClosed):
        list(events)
    with pytest.raises(qwq_lite.EngineClosed):
        model.ask("Hi")
    if sys.platform != "win32":
        assert host.num_fds() == before


def test_a_worker_starts_no_worker(demo_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(child.MARK, "qwq_lite.worker.main:main")
    with pytest.raises(qwq_lite.UsageError, match="run_worker_if_asked"):
        load(demo_gguf)


def test_progress_comes_on_the_thread_that_loads_and_may_end_it(demo_gguf: Path) -> None:
    seen: list[tuple[int, float]] = []
    before = psutil.Process().children()
    load(demo_gguf, n_ctx=512, on_progress=lambda event: seen.append((threading.get_ident(), event.done))).unload()
    assert {thread for thread, _ in seen} == {threading.get_ident()}
    assert seen[-1][1] == 1.0

    def stop(_event: qwq_lite.Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(demo_gguf, n_ctx=512, on_progress=stop)
    assert psutil.Process().children() == before


def test_what_is_no_json_is_refused(model: RemoteModel) -> None:
    with pytest.raises(qwq_lite.UsageError, match="must be texts, numbers, lists and dicts"):
        model.generate([{"role": "user", "content": object()}])
    assert model.ask("Hi", max_tokens=2).stats.n_generated


@pytest.mark.parametrize("said", [b"\x05\0\0\0hello", b"", b"Traceback"])
def test_a_child_that_speaks_nonsense_is_a_crash(demo_gguf: Path, monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    code = (
        f"import sys, os; os.write(int(os.environ['QWQ_LITE_RESULTS']), {said!r}); print('last words', file=sys.stderr)"
    )
    monkeypatch.setattr(child, "_command", lambda _target, _python: [sys.executable, "-c", code])
    with pytest.raises(qwq_lite.EngineCrashed, match="last words") as caught:
        load(demo_gguf)
    assert caught.value.lines == ("last words",)


def test_an_idle_engine_gives_its_memory_back_and_comes_again(
    letters_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, loads = Clock(monkeypatch), list[float]()
    with load(letters_gguf, n_ctx=4096, idle_unload=3, on_progress=lambda event: loads.append(event.done)) as model:
        assert isinstance(model, RemoteModel)
        chat = model.chat()
        first = chat.ask("What is the sea?", seed=1, max_tokens=10)
        before = psutil.Process(pid_of(model))
        clock.pass_(2.5, model)
        assert pid_of(model) == before.pid
        clock.pass_(1, model)
        before.wait(WAIT_S)
        assert model.pid is None
        loads.clear()
        second = chat.ask("Why?", seed=1, max_tokens=10)
        assert loads[-1] == 1.0
        assert pid_of(model) != before.pid
        assert second.stats.n_prefilled > first.stats.n_prompt
        # A reply that takes longer than that is no idleness, read or not.
        stream = model.generate(LONG, max_tokens=2 * MOST_UNREAD)
        clock.pass_(7, model)
        assert isinstance(list(stream)[-1], qwq_lite.Done)
        clock.pass_(4, model)
        wait_until(lambda: model.pid is None)
    with pytest.raises(qwq_lite.EngineClosed):
        chat.ask("Hi")


def test_calls_that_meet_the_end_of_idleness_are_answered(letters_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked again and again at the moment when the engine goes; and one that is asked all the time does not go."""
    clock = Clock(monkeypatch)
    with load(letters_gguf, n_ctx=512, idle_unload=3) as model:
        assert isinstance(model, RemoteModel)
        first = pid_of(model)
        for _ in range(4):
            assert model.tokenize("Hello")
            clock.pass_(2.5, model)
        assert pid_of(model) == first
        for n in range(8):
            assert model.tokenize("Hello")
            clock.now += 4  # its watch sees that within a tenth of a second
            time.sleep(0.08 + n * 0.005)
        assert model.tokenize("Hello")
        clock.pass_(4, model)
        wait_until(lambda: model.pid is None)
        assert model.tokenize("Hello")
        assert pid_of(model) != first


def test_a_call_that_takes_long_to_be_sent_has_its_engine(letters_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the engine gives its memory back as soon as nobody asks anything."""
    encoded = protocol.encode

    def encoded_late(message: dict[str, Any]) -> bytes:
        if message["do"] in ("load", "generate", "tokenize"):
            time.sleep(0.5)
        return encoded(message)

    monkeypatch.setattr(protocol, "encode", encoded_late)
    with load(letters_gguf, n_ctx=512, idle_unload=1e-6) as model:
        for _ in range(2):
            assert model.tokenize("Hello")
            assert model.ask("Hi", max_tokens=2).stats.n_generated == 2


def test_a_waiting_reply_is_cancelled_beside_one_that_runs(model: RemoteModel) -> None:
    running = model.generate(LONG, max_tokens=2 * MOST_UNREAD)  # before anybody reads it, it does not end
    waiting = model.generate("a b c d", max_tokens=400)
    waiting.cancel()
    (ended,) = list(waiting)
    assert isinstance(ended, qwq_lite.Done)
    assert ended.reply.finish_reason == "cancelled"
    done = list(running)[-1]
    assert isinstance(done, qwq_lite.Done)
    assert done.reply.finish_reason == "length"


def test_a_reader_that_waits_is_no_hang(fragile: RemoteModel, monkeypatch: pytest.MonkeyPatch) -> None:
    hasten_hangs(monkeypatch)
    clock, stream = Clock(monkeypatch), fragile.generate(LONG, max_tokens=2 * MOST_UNREAD)
    wait_until(lambda: stream.feed.unread)  # type: ignore[attr-defined]
    clock.pass_(20, fragile)
    assert isinstance(list(stream)[-1], qwq_lite.Done)


def test_work_without_a_step_is_a_hang(fragile: RemoteModel, monkeypatch: pytest.MonkeyPatch) -> None:
    hasten_hangs(monkeypatch)
    monkeypatch.setattr(resumable_feed.ResumableFeed, "unread", False)  # so that nothing says why it waits
    clock, stream = Clock(monkeypatch), fragile.generate(LONG, max_tokens=2 * MOST_UNREAD)
    wait_until(lambda: stream.feed.events.qsize() >= MOST_UNREAD)
    clock.pass_(20, fragile)
    with pytest.raises(qwq_lite.EngineCrashed, match="made no step"):
        list(stream)


def hasten_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hang_clocks, "_LEAST_HUNG_S", 10.0)
    monkeypatch.setattr(hang_clocks, "_HUNG_TIMES", 0)
    monkeypatch.setattr(hang_clocks, "_STUCK_S", math.inf)  # a beat comes by the real clock


def test_an_engine_that_does_not_stop_is_ended(fragile: RemoteModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hang_clocks, "_OBEY_S", 0.0)
    monkeypatch.setattr(hang_clocks, "_OBEY_TIMES", 0)
    stream = fragile.generate(LONG, max_tokens=2 * MOST_UNREAD)
    next(iter_ := iter(stream))
    monkeypatch.setattr(fragile._held[0], "tell", lambda _message: None)  # a cancel that is not heard
    stream.cancel()
    with pytest.raises(qwq_lite.EngineCrashed, match="did not stop when it was asked to"):
        while True:
            next(iter_)


@posix
def test_a_restart_for_which_there_is_no_memory_is_no_crash(letters_gguf: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(letters_gguf.read_bytes())
    with load(file, n_ctx=512) as model:
        assert isinstance(model, RemoteModel)
        psutil.Process(pid_of(model)).kill()
        wait_until(lambda: model.pid is None)
        file.rename(tmp_path / "away.gguf")
        for _ in range(2 * remote._CRASHES):
            with pytest.raises(qwq_lite.FormatError):
                model.ask("Hi")
        (tmp_path / "away.gguf").rename(file)
        assert model.ask("Hi", max_tokens=2).stats.n_generated


def test_a_frozen_application_must_say_so_first(demo_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    before = psutil.Process().children()
    with pytest.raises(qwq_lite.UsageError, match="run_worker_if_asked"):
        load(demo_gguf)
    assert psutil.Process().children() == before


def test_only_this_package_is_run_for_the_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_ready", False)
    qwq_lite.run_worker_if_asked()
    monkeypatch.setenv(child.MARK, "os:abort")
    with pytest.raises(qwq_lite.UsageError, match="os:abort"):
        qwq_lite.run_worker_if_asked()


@pytest.mark.parametrize("python", ["/no/such/python", __file__])
def test_an_interpreter_that_is_none(demo_gguf: Path, python: str) -> None:
    with pytest.raises(qwq_lite.EngineError, match="cannot be started"):
        load(demo_gguf, python=python)
