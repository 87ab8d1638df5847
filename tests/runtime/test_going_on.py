"""A reply whose engine died goes on in another: what was shown stands, and the fault of one request is that request's."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import random
import signal
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import qwq_lite
from qwq_lite.engine.local import LocalModel
from qwq_lite.events import Answer, Done, Event, Notice, Progress, Thinking
from qwq_lite.loading import load
from qwq_lite.prompt.question import read_question
from qwq_lite.reply.commands import LogEntry, ReplyLog
from qwq_lite.reply.policies import closing
from qwq_lite.reply.stream import Stream
from qwq_lite.worker import crashed_request, protocol, remote
from qwq_lite.worker.crashed_request import CrashCause
from qwq_lite.worker.process import Retired
from qwq_lite.worker.remote import RemoteModel
from qwq_lite.worker.resumable_feed import ResumableFeed
from tests.attacks.test_engine_deaths import rewritten
from tests.deaths import POISON_SEED, POISON_TEXT, interpreter
from tests.samples import times

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals, and a script in the place of Python")
SEED = 5
QUESTION = [{"role": "user", "content": "Tell me a long story about the sea."}]


@pytest.fixture(scope="module")
def engine(tiny_gguf: Path) -> Iterator[LocalModel]:
    with load(tiny_gguf, n_ctx=2048, isolated=False) as loaded:
        assert isinstance(loaded, LocalModel)
        yield loaded


def shown(events: list[Event]) -> tuple[str, str]:
    """Thought and answer as a reader has them, who heeds the notices."""
    thought = answer = ""
    for event in events:
        if isinstance(event, Thinking):
            thought += event.text
        elif isinstance(event, Answer):
            answer += event.text
        elif isinstance(event, Notice) and event.n_lost:
            if event.kind == "restarted":
                answer = answer[: -event.n_lost]
            else:
                thought = thought[: -event.n_lost]
    return thought, answer


def begun(events: list[Event]) -> list[Event]:
    return [event for event in events if isinstance(event, Thinking | Answer | Notice)]


def followed(
    stream: Stream, until: int | None, orders: dict[int, Callable[[Stream], None]]
) -> tuple[list[Event], list[LogEntry]]:
    """The events until so many came that are not progress, and what was done to the reply by then, as a worker sends it."""
    events: list[Event] = []
    entries: list[LogEntry] = []
    for event in stream:
        events.append(event)
        done = stream.feed.done
        while done:
            entries.append(done.popleft())
        n_begun = len(begun(events))
        if n_begun == until:
            break
        if n_begun in orders:
            orders.pop(n_begun)(stream)
    return events, entries


CASES: dict[str, tuple[dict[str, Any], dict[int, Callable[[Stream], None]]]] = {
    "a thought and its answer": ({"max_tokens": 120}, {}),
    "a thought that is ended by its budget": (
        {"thought_style": "undivided", "thinking_budget": 40, "max_tokens": 220},
        {},
    ),
    "one that goes round in circles": ({"thought_style": "undivided", "temperature": 0.0, "max_tokens": 500}, {}),
    "an answer that does": ({"thought_style": "none", "temperature": 0.0, "max_tokens": 500}, {}),
    "a hint and a wish for the answer": (
        {"thought_style": "undivided", "max_tokens": 300},
        {9: lambda stream: stream.steer("Wait, there is more.", "sentence"), 25: Stream.conclude},
    ),
    "orders that come too late": (
        {"thought_style": "none", "max_tokens": 60},
        {5: lambda stream: stream.steer("Wait."), 10: Stream.conclude},
    ),
    "a tag that is taken early": (
        {"thinking_budget": 20, "max_tokens": 200},
        {30: lambda stream: stream.steer("Well.\n")},
    ),
    "a deadline": ({"thought_style": "undivided", "within": 2.0, "max_tokens": 400}, {}),
    "letters of one script": ({"answer_script": "latin", "stop": ["zq"], "max_tokens": 120}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_was_shown_stands_wherever_the_engine_ends(
    engine: LocalModel, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closing, "MARGIN", math.inf)
    options, orders = CASES[name]
    whole, _ = followed(engine.go_on(read_question(QUESTION), ReplyLog(SEED), **options), None, dict(orders))
    rng = random.Random(SEED)
    n_most = len(begun(whole))
    for cut in sorted({1, 2, *(rng.randint(1, n_most) for _ in range(5))}):
        first, entries = followed(engine.go_on(read_question(QUESTION), ReplyLog(SEED), **options), cut, dict(orders))
        if isinstance(first[-1], Done):
            continue
        elapsed_s = max((entry[1] for entry in entries if isinstance(entry, tuple)), default=0.0)
        course = protocol.log_from_json([SEED, elapsed_s, [*map(protocol.entry_to_json, entries)], len(begun(first))])
        second, more = followed(engine.go_on(read_question(QUESTION), course, **options), None, {})
        done = second[-1]
        assert isinstance(done, Done)
        thought, answer = shown([*first, *second])
        reply = done.reply
        if reply.undivided and reply.stats.thought_end:  # white space before the forced heading belongs to neither
            assert (thought.rstrip() + answer).strip() == (reply.thinking + reply.answer).strip()
        elif reply.undivided:
            assert (thought + answer).strip() == (reply.thinking + reply.answer).strip()
        elif reply.answer:
            assert (thought.strip(), answer.strip()) == (reply.thinking.strip(), reply.answer.strip())
        n_tokens = sum(isinstance(entry, tuple) for entry in (*entries, *more))
        assert reply.stats.n_generated == n_tokens
        assert reply.stats.n_reused + reply.stats.n_prefilled == reply.stats.n_prompt
        progress = [event for event in second if isinstance(event, Progress) and event.stage == "prefill"]
        assert all(event.done <= event.total for event in progress)


def test_a_course_that_means_something_else_is_an_error(engine: LocalModel) -> None:
    for entries in ((None,), ((5, 0.1), None)):
        with pytest.raises(qwq_lite.EngineError, match="cannot go on in another engine"):
            list(engine.go_on(read_question(QUESTION), ReplyLog(SEED, 0.0, entries), max_tokens=5))
    assert list(engine.generate("a", max_tokens=2))


def test_a_cancelled_reply_keeps_its_text(engine: LocalModel) -> None:
    first, entries = followed(
        engine.go_on(read_question(QUESTION), ReplyLog(SEED), max_tokens=100, thought_style="none"), 10, {}
    )
    course = ReplyLog(SEED, 0.0, tuple(entries), len(begun(first)))
    stream = engine.go_on(read_question(QUESTION), course, max_tokens=100, thought_style="none")
    stream.cancel()
    done = list(stream)[-1]
    assert isinstance(done, Done)
    assert done.reply.finish_reason == "cancelled"
    assert done.reply.answer.startswith(shown(first)[1].rstrip())


@pytest.mark.parametrize(
    "bad", [[1, 0.0, [[1]], 0], [1, 0.0, [["Dance"]], 0], [1, 0.0, 3, 0], [1], ["a", 0.0, [], 0], 7]
)
def test_what_is_no_course_is_refused(bad: Any) -> None:
    with pytest.raises(qwq_lite.EngineError, match="the host sent no"):
        protocol.log_from_json(bad)


@pytest.fixture
def fragile(tiny_gguf: Path) -> Iterator[RemoteModel]:
    with load(tiny_gguf, n_ctx=2048) as model:
        assert isinstance(model, RemoteModel)
        yield model


def pid_of(model: RemoteModel) -> int:
    assert model.pid is not None
    return model.pid


def outcomes(asks: Sequence[Callable[[], list[Event]]]) -> list[list[Event] | qwq_lite.QwqError]:
    """What each call comes to, all at once."""
    found: list[Any] = [None] * len(asks)

    def run(place: int) -> None:
        try:
            found[place] = asks[place]()
        except qwq_lite.QwqError as error:
            found[place] = error

    threads = [threading.Thread(target=run, args=(place,), daemon=True) for place in range(len(asks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return found


POISONS: dict[str, tuple[str, int]] = {
    "prompt": (f"a {POISON_TEXT}", SEED),
    "token": ("a story", POISON_SEED),
    "stack": ("a" * 400_000, SEED),
}


@posix
@pytest.mark.sampled
@pytest.mark.parametrize("kind", POISONS)
def test_one_of_eight_callers_ends_the_engine(tiny_gguf: Path, tmp_path: Path, kind: str) -> None:
    file = rewritten(tiny_gguf, tmp_path / "gpt-4o.gguf", {"tokenizer.ggml.pre": "gpt-4o"})
    with load(file, n_ctx=2048, python=str(interpreter(tmp_path, kind))) as model:

        def ask(text: str, seed: int) -> list[Event]:
            messages = [{"role": "user", "content": text}]
            return list(model.generate(messages, seed=seed, max_tokens=60, thought_style="none"))

        for run in range(times(5)):
            place = random.Random(run).randrange(8)
            asked = [(f"question {n}", n) for n in range(7)]
            asked.insert(place, POISONS[kind])
            found = outcomes([functools.partial(ask, *words) for words in asked])
            culprit = found.pop(place)
            assert isinstance(culprit, qwq_lite.EngineCrashed)
            assert culprit.signal == "SIGSEGV"
            # A reply that was the last in line was alone, and then one death is enough.
            assert kind == "token" or isinstance(culprit, qwq_lite.RequestCrashed)
            assert not isinstance(culprit, qwq_lite.RequestCrashed) or "not tried again" in str(culprit)
            for events in found:
                assert isinstance(events, list), events
                done = events[-1]
                assert isinstance(done, Done)
                assert done.reply.finish_reason in ("stop", "length")
                assert shown(events)[1].strip() == done.reply.answer.strip()
        assert model.ask("Hi", max_tokens=2).stats.n_generated  # no refusal: each of these deaths had a culprit


@posix
def test_a_text_that_ends_the_tokenizer_is_its_callers(tiny_gguf: Path, tmp_path: Path) -> None:
    with load(tiny_gguf, n_ctx=1024, python=str(interpreter(tmp_path, "prompt"))) as model:
        for _ in range(remote._CRASHES + 1):
            with pytest.raises(qwq_lite.RequestCrashed, match="made this prompt into tokens"):
                model.tokenize(f"a {POISON_TEXT}")
            assert model.tokenize("a remedy")
        running = model.generate("abc", max_tokens=400)
        with pytest.raises(qwq_lite.EngineCrashed):
            model.tokenize(f"a {POISON_TEXT}")
        assert isinstance(list(running)[-1], Done)


@posix
def test_a_kill_from_outside_is_outlived_by_all_who_are_not_alone(fragile: RemoteModel) -> None:
    streams = [
        fragile.generate(QUESTION, seed=n, max_tokens=300, temperature=1.0, thought_style="none") for n in range(4)
    ]
    reader = iter(streams[0])
    first = [next(reader) for _ in range(30)]
    os.kill(pid_of(fragile), signal.SIGKILL)
    ends = [[*first, *reader], *map(list, streams[1:])]
    for events in ends:
        done = events[-1]
        assert isinstance(done, Done)
        assert shown(events)[1].strip() == done.reply.answer.strip()
    assert [event.kind for event in ends[0] if isinstance(event, Notice)].count(
        "resumed"
    ) <= 1  # none if it was done already


@posix
def test_orders_and_cancels_reach_the_engine_that_goes_on(fragile: RemoteModel) -> None:
    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {"max_tokens": 1500, "thought_style": "undivided", "seed": 3}
        steered, cancelled, last = (stack.enter_context(fragile.generate(QUESTION, **options)) for _ in range(3))
        reader = iter(steered)
        first = [next(reader) for _ in range(20)]
        os.kill(pid_of(fragile), signal.SIGSTOP)  # it hears nothing more
        steered.conclude()
        cancelled.cancel()
        os.kill(pid_of(fragile), signal.SIGKILL)
        events = [*first, *reader]
        done = events[-1]
        assert isinstance(done, Done)
        assert done.reply.stats.thought_end == "asked"
        (ended,) = [event for event in cancelled if isinstance(event, Done)]
        assert ended.reply.finish_reason == "cancelled"
        last.cancel()


@posix
def test_a_model_that_is_unloaded_meanwhile_tells_so(fragile: RemoteModel) -> None:
    streams = [fragile.generate(QUESTION, max_tokens=1500) for _ in range(3)]
    os.kill(pid_of(fragile), signal.SIGKILL)
    fragile.unload()
    for stream in streams:
        with pytest.raises((qwq_lite.EngineClosed, qwq_lite.EngineCrashed)):
            list(stream)


@pytest.mark.parametrize("dies", [False, True])
def test_replies_are_handed_over_in_their_order(dies: bool) -> None:
    """The next one only once the prompt of the one before is made, in whichever worker: else it may begin first, unread."""
    handed: list[ResumableFeed] = []

    class Worker:
        gone = False

        def tell(self, message: dict[str, Any]) -> None: ...

        def go_on(self, feed: ResumableFeed) -> None:
            if self.gone:
                raise Retired
            assert all(other.has_prompt for other in handed)
            handed.append(feed)
            self.gone = dies  # the prompt is made after that, in the next one
            threading.Timer(0.05, setattr, (feed, "has_prompt", True)).start()

    class Owner:
        _closed, n_ctx = False, 0

        @contextlib.contextmanager
        def _alive(self, _: object) -> Iterator[Worker]:
            yield Worker() if dies else worker

    worker, owner, feeds = Worker(), Owner(), [ResumableFeed({}) for _ in range(4)]
    remote._go_on(weakref.ref(owner), deque(feeds), CRASH)  # type: ignore[arg-type] # what it needs of a model
    assert handed == feeds


@posix
def test_a_context_of_another_size_cannot_go_on(fragile: RemoteModel) -> None:
    running, waiting = (fragile.generate(QUESTION, max_tokens=1500, thought_style="none") for _ in range(2))
    reader = iter(running)
    for _ in range(20):
        next(reader)
    fragile._options = replace(fragile._options, n_ctx=1024)  # as where less memory is free now
    os.kill(pid_of(fragile), signal.SIGKILL)
    with pytest.raises(qwq_lite.EngineCrashed) as caught:
        list(reader)
    assert caught.value.partial
    assert isinstance(list(waiting)[-1], Done)  # nothing of it was shown


@posix
def test_a_template_that_does_not_end_is_its_requests_fault(
    fragile: RemoteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = fragile.generate("abc", max_tokens=200)
    worker = fragile._held[0]
    monkeypatch.setattr("qwq_lite.worker.remote._BEGIN_S", 0.0)
    found = outcomes([lambda: list(fragile.generate([{"role": "user", "content": "x " * 200_000}], max_tokens=2))])
    if worker.gone:  # it took longer than nothing
        assert isinstance(found[0], qwq_lite.TemplateError)
    assert isinstance(list(running)[-1], Done)


CRASH = qwq_lite.EngineCrashed(
    "model.gguf: the engine's process is gone: it was ended by SIGSEGV" + crashed_request.ANOTHER
)


def feeds_of(*, begun: tuple[int, ...], others: tuple[int, ...]) -> dict[int, ResumableFeed]:
    feeds = {number: ResumableFeed({}) for number in (*begun, *others)}
    for number, feed in feeds.items():
        feed.number = number
    for number in begun:
        feeds[number].take(Progress("prefill", 0, 1), [])
    return feeds


def judged(tokenizing: int | None, feeds: dict[int, ResumableFeed], waiting: tuple[int, ...] = ()) -> CrashCause:
    return crashed_request.find_cause(CRASH, tokenizing, False, waiting, feeds)


def test_a_prompt_and_a_reply_are_told_apart_by_a_death_of_their_own() -> None:
    feeds = feeds_of(begun=(1,), others=(2, 3))
    first = judged(2, feeds, (2,))
    assert (first.culprit, first.known) == (None, True)
    assert feeds[2].after is feeds[1]  # so they are not there together again
    # The prompt, once the reply is done; the reply, while others wait.
    assert judged(2, {2: feeds[2], 3: feeds[3]}).culprit == 2
    assert [judged(None, feeds).culprit for _ in range(2)] == [None, 1]


def test_a_reply_is_not_blamed_for_the_prompts_beside_it() -> None:
    """Several prompts that end the engine, each while the same reply is being made."""
    feeds = feeds_of(begun=(1,), others=(2, 3, 4, 5))
    for prompt in (2, 3, 4):
        assert judged(prompt, feeds, (prompt,)).culprit is None
        assert feeds[prompt].after is feeds[1]
    assert judged(None, feeds).culprit is None  # its first death of its own
    assert judged(4, {4: feeds[4], 5: feeds[5]}).culprit == 4


def test_a_reply_is_not_tried_again_for_ever() -> None:
    feeds = feeds_of(begun=(1,), others=tuple(range(2, 40)))
    found = [judged(prompt, feeds, (prompt,)) for prompt in range(2, 40)]
    given_up = next(verdict for verdict in found if verdict.culprit is not None)
    assert given_up.culprit == 1
    assert not isinstance(given_up.error, qwq_lite.RequestCrashed)  # nothing says that it was the cause


def test_whose_death_it_was() -> None:
    assert judged(None, {}).known is False
    assert judged(None, feeds_of(begun=(), others=(1, 2))).known is False  # their prompts are not made yet
    early = feeds_of(begun=(), others=(1,))
    early[1].has_prompt = True
    assert judged(None, early).culprit == 1  # a death before the first event
    first = feeds_of(begun=(), others=(1, 2))
    first[1].has_prompt = True
    assert [judged(None, first).culprit for _ in range(2)] == [None, 1]
    for is_templated, kind in ((True, qwq_lite.TemplateError), (False, qwq_lite.RequestCrashed)):
        late = crashed_request.find_cause(CRASH, 3, True, (), {3: ResumableFeed({}, is_templated=is_templated)})
        assert (late.culprit, type(late.error)) == (3, kind)
    assert judged(7, feeds_of(begun=(), others=(1,)), (7,)).culprit == 7
    assert judged(None, feeds_of(begun=(1,), others=())).culprit == 1
    assert judged(None, feeds_of(begun=(1,), others=(2,))).culprit is None
    assert judged(None, feeds_of(begun=(1,), others=()), (9,)).culprit is None
    asked = judged(
        7, feeds_of(begun=(1,), others=()), (7,)
    )  # a call for tokens beside a reply: told, and nobody is blamed
    assert asked.culprit == 7
    assert not isinstance(asked.error, qwq_lite.RequestCrashed)
