"""A reply whose engine died goes on in another: what was shown stands, and the fault of one request is that request's."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import qwq_lite
from qwq_lite import wire
from qwq_lite.events import Answer, Done, Event, Notice, Progress, Thinking
from qwq_lite.loading import load
from qwq_lite.local import LocalModel
from qwq_lite.orders import Course, Entry
from qwq_lite.remote import RemoteModel
from qwq_lite.stream import Stream
from tests.attacks.test_engine_deaths import rewritten

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
) -> tuple[list[Event], list[Entry]]:
    """The events until so many came that are not progress, and what was done to the reply by then, as a worker sends it."""
    events: list[Event] = []
    entries: list[Entry] = []
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
    "a deadline": ({"thought_style": "undivided", "within": 2.0, "max_tokens": 400}, {}),
    "letters of one script": ({"answer_script": "latin", "stop": ["zq"], "max_tokens": 120}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_was_shown_stands_wherever_the_engine_ends(engine: LocalModel, name: str) -> None:
    options, orders = CASES[name]
    whole, _ = followed(engine.go_on(QUESTION, Course(SEED), **options), None, dict(orders))
    rng = random.Random(SEED)
    n_most = len(begun(whole))
    for cut in sorted({1, 2, *(rng.randint(1, n_most) for _ in range(5))}):
        first, entries = followed(engine.go_on(QUESTION, Course(SEED), **options), cut, dict(orders))
        if isinstance(first[-1], Done):
            continue
        elapsed_s = max((entry[1] for entry in entries if isinstance(entry, tuple)), default=0.0)
        course = Course(SEED, elapsed_s, tuple(entries), len(begun(first)))
        course = wire.course_from_json(wire.course_to_json(course))
        second, more = followed(engine.go_on(QUESTION, course, **options), None, {})
        done = second[-1]
        assert isinstance(done, Done)
        thought, answer = shown([*first, *second])
        reply = done.reply
        if reply.undivided:
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
            list(engine.go_on(QUESTION, Course(SEED, 0.0, entries), max_tokens=5))
    assert list(engine.generate("a", max_tokens=2))


def test_a_cancelled_reply_keeps_its_text(engine: LocalModel) -> None:
    first, entries = followed(engine.go_on(QUESTION, Course(SEED), max_tokens=100, thought_style="none"), 10, {})
    course = Course(SEED, 0.0, tuple(entries), len(begun(first)))
    stream = engine.go_on(QUESTION, course, max_tokens=100, thought_style="none")
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
        wire.course_from_json(bad)


# A worker that dies of one request: while a text with "poison" in it is made into tokens, or at a reply's tenth token.
DEADLY = """#!{python}
import sys

def plant():
    import signal
    from qwq_lite.active_reply import ActiveReply
    from qwq_lite.backend.vocab import Vocab
    tokenize, take = Vocab.tokenize, ActiveReply.take

    def deadly_tokenize(vocab, text, parse_special):
        if "poison" in text:
            signal.raise_signal({signal})
        return tokenize(vocab, text, parse_special)

    def deadly_take(reply, token, time_s=None):
        if reply.request.seed == 666 and len(reply.track.tokens) == 10:
            signal.raise_signal({signal})
        return take(reply, token, time_s)

    Vocab.tokenize, ActiveReply.take = deadly_tokenize, deadly_take

code = sys.argv[2].split("; ", 2)
exec("; ".join(code[:2]))
plant()
exec(code[2])
"""


@pytest.fixture
def deadly(tiny_gguf: Path, tmp_path: Path) -> Iterator[RemoteModel]:
    python = tmp_path / "python"
    python.write_text(DEADLY.format(python=sys.executable, signal=int(signal.SIGSEGV)))
    python.chmod(0o755)
    with load(tiny_gguf, n_ctx=2048, python=str(python)) as model:
        assert isinstance(model, RemoteModel)
        yield model


def outcomes(asks: list[Callable[[], list[Event]]]) -> list[list[Event] | qwq_lite.QwqError]:
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


POISONS: dict[str, tuple[str, int]] = {"in its prompt": ("a poison", SEED), "at its tenth token": ("a story", 666)}


@posix
@pytest.mark.parametrize("name", POISONS)
def test_one_of_eight_callers_ends_the_engine(deadly: RemoteModel, name: str) -> None:
    def ask(text: str, seed: int) -> list[Event]:
        return list(
            deadly.generate([{"role": "user", "content": text}], seed=seed, max_tokens=60, thought_style="none")
        )

    for run in range(3):
        place = random.Random(run).randrange(8)
        asks = [lambda n=n: ask(f"question {n}", n) for n in range(7)]
        asks.insert(place, lambda: ask(*POISONS[name]))
        for n, found in enumerate(outcomes(asks)):
            if n == place:
                assert isinstance(found, qwq_lite.RequestCrashed)
                assert found.signal == "SIGSEGV"
                assert "not tried again" in str(found)
                continue
            assert isinstance(found, list), found
            done = found[-1]
            assert isinstance(done, Done)
            assert done.reply.finish_reason in ("stop", "length")
            assert shown(found)[1].strip() == done.reply.answer.strip()
    assert deadly.ask("Hi", max_tokens=2).stats.n_generated  # no refusal: none of these deaths was without a culprit


@posix
def test_a_text_that_ends_the_tokenizer_is_its_callers(deadly: RemoteModel) -> None:
    with pytest.raises(qwq_lite.RequestCrashed, match="made this prompt into tokens"):
        deadly.tokenize("a poison")
    assert deadly.tokenize("a remedy")


@posix
def test_a_stack_that_a_tokenizer_overflows_is_one_requests_fault(tiny_gguf: Path, tmp_path: Path) -> None:
    """The real death, where nothing of what prevents it is in force."""
    python = tmp_path / "python"
    bare = DEADLY.replace(
        "Vocab.tokenize, ActiveReply.take = deadly_tokenize, deadly_take",
        "from qwq_lite.backend import pretokenizer; pretokenizer.call = lambda work, text, pre, bounded: work()",
    )
    python.write_text(bare.format(python=sys.executable, signal=0))
    python.chmod(0o755)
    file = rewritten(tiny_gguf, tmp_path / "gpt-4o.gguf", {"tokenizer.ggml.pre": "gpt-4o"})
    with load(file, n_ctx=1024, python=str(python)) as model:
        waiting = model.generate("abc", max_tokens=400)
        with pytest.raises(qwq_lite.RequestCrashed, match="made this prompt into tokens"):
            model.generate("a" * 400_000)
        assert isinstance(list(waiting)[-1], Done)


@posix
def test_a_kill_from_outside_is_outlived_by_all_who_are_not_alone(deadly: RemoteModel) -> None:
    streams = [
        deadly.generate(QUESTION, seed=n, max_tokens=300, temperature=1.0, thought_style="none") for n in range(4)
    ]
    reader = iter(streams[0])
    first = [next(reader) for _ in range(30)]
    assert deadly.pid is not None
    os.kill(deadly.pid, signal.SIGKILL)
    ends = [[*first, *reader], *map(list, streams[1:])]
    for events in ends:
        done = events[-1]
        assert isinstance(done, Done)
        assert shown(events)[1].strip() == done.reply.answer.strip()
    assert [event.kind for event in ends[0] if isinstance(event, Notice)].count(
        "resumed"
    ) <= 1  # none if it was done already


@posix
def test_orders_and_cancels_reach_the_engine_that_goes_on(deadly: RemoteModel) -> None:
    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {"max_tokens": 1500, "thought_style": "undivided", "seed": 3}
        steered, cancelled, last = (stack.enter_context(deadly.generate(QUESTION, **options)) for _ in range(3))
        reader = iter(steered)
        first = [next(reader) for _ in range(20)]
        assert deadly.pid is not None
        os.kill(deadly.pid, signal.SIGSTOP)  # it hears nothing more
        steered.conclude()
        cancelled.cancel()
        os.kill(deadly.pid, signal.SIGKILL)
        events = [*first, *reader]
        done = events[-1]
        assert isinstance(done, Done)
        assert done.reply.stats.thought_end == "asked"
        (ended,) = [event for event in cancelled if isinstance(event, Done)]
        assert ended.reply.finish_reason == "cancelled"
        last.cancel()


@posix
def test_a_model_that_is_unloaded_meanwhile_tells_so(deadly: RemoteModel) -> None:
    streams = [deadly.generate(QUESTION, max_tokens=1500) for _ in range(3)]
    assert deadly.pid is not None
    os.kill(deadly.pid, signal.SIGKILL)
    deadly.unload()
    for stream in streams:
        with pytest.raises((qwq_lite.EngineClosed, qwq_lite.EngineCrashed)):
            list(stream)


@posix
def test_a_context_of_another_size_cannot_go_on(deadly: RemoteModel) -> None:
    running, waiting = (deadly.generate(QUESTION, max_tokens=1500, thought_style="none") for _ in range(2))
    reader = iter(running)
    for _ in range(20):
        next(reader)
    deadly._options["n_ctx"] = 1024  # as where less memory is free now
    assert deadly.pid is not None
    os.kill(deadly.pid, signal.SIGKILL)
    with pytest.raises(qwq_lite.EngineCrashed) as caught:
        list(reader)
    assert caught.value.partial
    assert isinstance(list(waiting)[-1], Done)  # nothing of it was shown


@posix
def test_a_template_that_does_not_end_is_its_requests_fault(
    deadly: RemoteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = deadly.generate("abc", max_tokens=200)
    worker = deadly._held[0]
    assert deadly.pid is not None
    monkeypatch.setattr("qwq_lite.remote._BEGIN_S", 0.0)
    found = outcomes([lambda: list(deadly.generate([{"role": "user", "content": "x " * 200_000}], max_tokens=2))])
    if worker.gone:  # it took longer than nothing
        assert isinstance(found[0], qwq_lite.TemplateError)
    assert isinstance(list(running)[-1], Done)
