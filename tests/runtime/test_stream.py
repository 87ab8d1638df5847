"""stream: events in order with `for` and with `async for`; whoever leaves cancels; the engine's thread never waits."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import pytest

from qwq_lite.errors import EngineError, QwqError
from qwq_lite.events import Answer, Done, Event, Notice, Reply, Thinking
from qwq_lite.reply.stream import Feed, Stream, in_thread

WAIT_S = 60  # nothing here takes as long; a test that would hang fails instead
DONE = Done(Reply("a", "t", "stop"))
EVENTS: list[Event] = [Thinking("t"), Notice("n", "full"), Answer("a"), DONE]

T = TypeVar("T")


class Cancels:
    """Streams of which it is known who cancelled them, and on which thread."""

    def __init__(self) -> None:
        self.feeds: list[Feed] = []
        self.threads: list[int] = []

    def stream(self, *events: Event | QwqError) -> Stream:
        feed = Feed(self._note)
        for event in events:
            feed.put(event)
        return Stream(feed)

    def _note(self, feed: Feed) -> None:
        assert feed.cancelled, "whoever is told must find it set"
        self.feeds.append(feed)
        self.threads.append(threading.get_ident())


def feed_of(stream: Stream) -> Feed:
    """The engine's end of a stream."""
    return stream.feed


@pytest.fixture
def cancels() -> Cancels:
    return Cancels()


def run(main: Callable[[], Awaitable[T]]) -> T:
    async def limited() -> T:
        return await asyncio.wait_for(main(), WAIT_S)

    return asyncio.run(limited())


@contextlib.contextmanager
def thread(work: Callable[[], None]) -> Iterator[None]:
    """Work beside the block; the thread has ended when the block has."""
    worker = threading.Thread(target=work)
    worker.start()
    try:
        yield
    finally:
        worker.join(WAIT_S)
    assert not worker.is_alive()


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop do what is due: what happens in a few of its rounds needs no clock."""
    for _ in range(100):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("the loop had nothing more to do, and it has not happened")


async def read(stream: Stream) -> list[Event]:
    return [event async for event in stream]


# with `for`


def test_for_reads_the_events_in_order_and_ends_with_done(cancels: Cancels) -> None:
    stream = cancels.stream(*EVENTS)
    assert not stream.finished
    assert list(stream) == EVENTS
    assert stream.finished
    assert not cancels.feeds


def test_for_waits_for_events_of_another_thread(cancels: Cancels) -> None:
    """Longer than the reader sleeps at a time, so that it looks more than once."""
    stream, asked = cancels.stream(), threading.Event()

    def engine() -> None:
        asked.wait(WAIT_S)
        threading.Event().wait(0.4)
        for event in EVENTS:
            feed_of(stream).put(event)

    with thread(engine):
        asked.set()
        assert list(stream) == EVENTS


def test_many_events_of_another_thread_keep_their_order(cancels: Cancels) -> None:
    stream = cancels.stream()
    events: list[Event] = [*(Answer(str(i)) for i in range(2000)), DONE]

    def engine() -> None:
        for event in events:
            feed_of(stream).put(event)

    with thread(engine):
        assert list(stream) == events


def test_for_raises_the_error_that_ended_the_reply_after_what_came_before(cancels: Cancels) -> None:
    stream = cancels.stream(Answer("a"), EngineError("the device is gone"))
    events = iter(stream)
    assert next(events) == Answer("a")
    with pytest.raises(EngineError, match="the device is gone"):
        next(events)
    assert stream.finished
    assert not cancels.feeds


@pytest.mark.parametrize("last", [DONE, EngineError("no")])
def test_a_stream_that_has_ended_has_no_more_events(last: Done | EngineError, cancels: Cancels) -> None:
    stream = cancels.stream(last)
    with contextlib.suppress(EngineError):
        list(stream)
    assert list(stream) == []
    assert run(lambda: read(stream)) == []
    assert not cancels.feeds


def test_leaving_a_for_cancels(cancels: Cancels) -> None:
    stream = cancels.stream(*EVENTS)
    for _ in stream:
        break
    assert stream.cancelled
    assert (cancels.feeds, cancels.threads) == ([feed_of(stream)], [threading.get_ident()])


def test_an_error_in_the_body_of_a_for_cancels(cancels: Cancels) -> None:
    stream = cancels.stream(*EVENTS)
    with pytest.raises(ZeroDivisionError):
        for _ in stream:
            raise ZeroDivisionError
    assert cancels.feeds == [feed_of(stream)]


def test_leaving_a_for_at_its_last_event_does_not_cancel(cancels: Cancels) -> None:
    for event in cancels.stream(*EVENTS):
        if isinstance(event, Done):
            break
    assert not cancels.feeds


def test_a_reply_that_was_left_can_be_read_to_its_end(cancels: Cancels) -> None:
    stream = cancels.stream(*EVENTS)
    for _ in stream:
        break
    assert list(stream) == EVENTS[1:]


def test_cancelling_more_than_once_from_any_thread_does_no_harm(cancels: Cancels) -> None:
    stream = cancels.stream(*EVENTS)
    stream.cancel()
    with thread(stream.cancel):
        pass
    assert len(set(cancels.threads)) == 2
    assert list(stream) == EVENTS


# with `async for`


def test_async_for_reads_the_events_in_order_and_ends_with_done(cancels: Cancels) -> None:
    stream = cancels.stream(*EVENTS)
    assert run(lambda: read(stream)) == EVENTS
    assert stream.finished
    assert not cancels.feeds


def test_async_for_raises_the_error_that_ended_the_reply_after_what_came_before(cancels: Cancels) -> None:
    stream, seen = cancels.stream(Answer("a"), EngineError("the device is gone")), []

    async def main() -> None:
        async for event in stream:
            seen.append(event)

    with pytest.raises(EngineError, match="the device is gone"):
        run(main)
    assert seen == [Answer("a")]
    assert not cancels.feeds


def test_each_event_wakes_a_reader_that_waits(cancels: Cancels) -> None:
    """The next one is put only after the one before was read: the reader waits each time."""
    stream, turns = cancels.stream(), threading.Semaphore(0)

    def engine() -> None:
        for event in EVENTS:
            assert turns.acquire(timeout=WAIT_S)
            feed_of(stream).put(event)

    async def main() -> list[Event]:
        seen: list[Event] = []
        reading = aiter(stream)
        while not stream.finished:
            coming = asyncio.ensure_future(anext(reading))
            for _ in range(5):  # enough rounds to come to where it waits
                await asyncio.sleep(0)
            assert not coming.done()
            turns.release()
            seen.append(await coming)
        return seen

    with thread(engine):
        assert run(main) == EVENTS


def test_events_from_before_while_and_after_the_reader_waits_keep_their_order(cancels: Cancels) -> None:
    stream = cancels.stream(Answer("before"))
    events: list[Event] = [*(Answer(str(i)) for i in range(2000)), DONE]

    def engine() -> None:
        for event in events:
            feed_of(stream).put(event)

    async def main() -> list[Event]:
        reading = aiter(stream)
        seen = [await anext(reading)]
        with thread(engine):
            seen += [event async for event in reading]
        return seen

    assert run(main) == [Answer("before"), *events]


def test_two_streams_are_read_side_by_side_in_one_loop(cancels: Cancels) -> None:
    """Neither holds up the other, nor the loop."""
    first, second = cancels.stream(), cancels.stream()

    async def main() -> list[list[Event]]:
        readers = [asyncio.ensure_future(read(stream)) for stream in (first, second)]
        await asyncio.sleep(0)
        for event in EVENTS:
            feed_of(second).put(event)
        await readers[1]
        for event in EVENTS:
            feed_of(first).put(event)
        return [await reader for reader in readers]

    assert run(main) == [EVENTS, EVENTS]


def test_leaving_an_async_for_cancels_as_soon_as_the_loop_gets_to_it(cancels: Cancels) -> None:
    stream = cancels.stream(*EVENTS)

    async def main() -> None:
        async for _ in stream:
            break
        await until(lambda: stream.cancelled)

    run(main)
    assert cancels.feeds == [feed_of(stream)]


def test_leaving_an_async_for_cancels_also_when_the_loop_ends_with_it(cancels: Cancels) -> None:
    stream = cancels.stream(*EVENTS)

    async def main() -> None:
        async for _ in stream:
            break

    run(main)
    assert cancels.feeds == [feed_of(stream)]


def test_an_error_in_the_body_of_an_async_for_cancels(cancels: Cancels) -> None:
    stream = cancels.stream(*EVENTS)

    async def main() -> None:
        async for _ in stream:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(main)
    gc.collect()  # the error's traceback held the iterator
    assert cancels.feeds == [feed_of(stream)]


def test_leaving_an_async_for_at_its_last_event_does_not_cancel(cancels: Cancels) -> None:
    stream = cancels.stream(*EVENTS)

    async def main() -> None:
        async for event in stream:
            if isinstance(event, Done):
                break

    run(main)
    assert not cancels.feeds


def test_cancelling_a_task_that_waits_for_an_event_cancels_before_it_ends(cancels: Cancels) -> None:
    stream = cancels.stream(Answer("a"))

    async def main() -> None:
        reader = asyncio.ensure_future(read(stream))
        await asyncio.sleep(0)
        assert not reader.done()
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert cancels.feeds == [feed_of(stream)]

    run(main)


def test_cancelling_a_task_that_is_busy_with_an_event_cancels(cancels: Cancels) -> None:
    stream = cancels.stream(*EVENTS)

    async def busy() -> None:
        async for _ in stream:
            await asyncio.Event().wait()

    async def main() -> None:
        reader = asyncio.ensure_future(busy())
        await asyncio.sleep(0)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        del reader
        await until(lambda: stream.cancelled)

    run(main)
    assert cancels.feeds == [feed_of(stream)]


def test_cancelling_one_task_leaves_another_ones_stream_alone(cancels: Cancels) -> None:
    first, second = cancels.stream(), cancels.stream()

    async def main() -> list[Event]:
        readers = [asyncio.ensure_future(read(stream)) for stream in (first, second)]
        await asyncio.sleep(0)
        readers[0].cancel()
        await asyncio.sleep(0)
        for event in EVENTS:
            feed_of(second).put(event)
        return await readers[1]

    assert run(main) == EVENTS
    assert cancels.feeds == [feed_of(first)]


def test_a_reply_that_was_left_can_be_read_on_in_the_same_loop(cancels: Cancels) -> None:
    """Its end says how much there is: so who leaves may go on to read until Done."""
    stream = cancels.stream(Answer("a"), Answer("b"))

    async def main() -> list[Event]:
        async for _ in stream:
            break
        reader = asyncio.ensure_future(read(stream))
        await until(lambda: stream.cancelled)
        for _ in range(5):
            await asyncio.sleep(0)
        feed_of(stream).put(DONE)
        await until(reader.done)
        return reader.result()

    assert run(main) == [Answer("b"), DONE]


def test_a_stream_that_one_loop_left_is_read_in_another(cancels: Cancels) -> None:
    stream = cancels.stream(*EVENTS)

    async def first() -> Event:
        async for event in stream:
            return event
        raise AssertionError

    assert run(first) == EVENTS[0]
    assert run(lambda: read(stream)) == EVENTS[1:]


def test_a_loop_that_was_closed_does_not_stop_the_engine(cancels: Cancels) -> None:
    """The engine's thread may put its events when nobody reads them any more; they are there for whoever comes."""
    stream = cancels.stream(Answer("a"))
    loop = asyncio.new_event_loop()
    reading = aiter(stream)
    try:
        assert loop.run_until_complete(anext(reading)) == Answer("a")
    finally:
        loop.close()
    with thread(lambda: feed_of(stream).put(DONE)):
        pass
    assert list(stream) == [DONE]


def test_nobody_needs_to_read(cancels: Cancels) -> None:
    stream = cancels.stream()
    for event in EVENTS:
        feed_of(stream).put(event)
    assert not stream.finished
    assert not cancels.feeds


# a stream that is made on another thread


def test_in_thread_gives_the_stream_that_was_made_elsewhere(cancels: Cancels) -> None:
    threads: list[int] = []

    def make() -> Stream:
        threads.append(threading.get_ident())
        return cancels.stream(*EVENTS)

    async def main() -> list[Event]:
        return await read(await in_thread(make))

    assert run(main) == EVENTS
    assert threads != [threading.get_ident()]
    assert not cancels.feeds


def test_in_thread_raises_what_making_raised() -> None:
    def make() -> Stream:
        raise EngineError("the prompt is empty")

    with pytest.raises(EngineError, match="the prompt is empty"):
        run(lambda: in_thread(make))


class Slow:
    """Makes a stream when it is told to; `started` is set on its thread."""

    def __init__(self, stream: Stream | QwqError) -> None:
        self.started, self.go = threading.Event(), threading.Event()
        self._stream = stream

    def __call__(self) -> Stream:
        self.started.set()
        self.go.wait(WAIT_S)
        if isinstance(self._stream, QwqError):
            raise self._stream
        return self._stream

    async def begun(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.started.wait, WAIT_S)


def test_a_task_that_is_cancelled_while_its_stream_is_made_cancels_that_stream(cancels: Cancels) -> None:
    """The task ends at once; nobody would ever read the stream, and it would hold up those behind it."""
    make = Slow(cancels.stream())

    async def main() -> None:
        asking = asyncio.ensure_future(in_thread(make))
        await make.begun()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert not cancels.feeds
        make.go.set()
        while not cancels.feeds:
            await asyncio.sleep(0.001)

    run(main)


def test_a_loop_that_ends_while_a_stream_is_made_cancels_that_stream(cancels: Cancels) -> None:
    """asyncio.run waits for its threads, and for what they leave to do in the loop."""
    make = Slow(cancels.stream())

    async def main() -> None:
        asking = asyncio.ensure_future(in_thread(make))
        await make.begun()
        asking.cancel()
        make.go.set()

    run(main)
    assert len(cancels.feeds) == 1


@pytest.mark.parametrize("n_rounds", range(5))
def test_a_task_that_is_cancelled_about_when_its_stream_is_there_has_it_or_cancels_it(
    n_rounds: int, cancels: Cancels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some rounds of the loop lie between the thread's result and the task's next step; in none does a stream get lost."""
    stream = cancels.stream()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        made: asyncio.Future[Stream] = loop.create_future()
        monkeypatch.setattr(loop, "run_in_executor", lambda *work: made)
        asking = asyncio.ensure_future(in_thread(lambda: stream))
        await asyncio.sleep(0)
        made.set_result(stream)
        for _ in range(n_rounds):
            await asyncio.sleep(0)
        if asking.cancel():
            with pytest.raises(asyncio.CancelledError):
                await asking
            await until(lambda: stream.cancelled)
        else:
            assert await asking is stream
            assert not cancels.feeds

    run(main)


def test_an_error_that_comes_after_the_task_was_cancelled_is_nobodys() -> None:
    """No stream was made, and an exception that nobody asked for would be logged when it is collected."""
    make = Slow(EngineError("no"))
    complaints: list[dict[str, object]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        asking = asyncio.ensure_future(in_thread(make))
        await make.begun()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        make.go.set()

    run(main)
    gc.collect()
    assert complaints == []


def test_a_stream_that_nobody_holds_any_more_is_cancelled(cancels: Cancels) -> None:
    stream = cancels.stream(Answer("a"))
    feed = feed_of(stream)
    del stream
    gc.collect()
    assert cancels.feeds == [feed]


def test_a_with_block_that_is_left_cancels_and_one_that_read_all_does_not(cancels: Cancels) -> None:
    with cancels.stream(Answer("a"), DONE) as stream:
        assert list(stream) == [Answer("a"), DONE]
    assert not cancels.feeds
    with pytest.raises(ZeroDivisionError), cancels.stream(Answer("a")) as left:
        raise ZeroDivisionError
    assert cancels.feeds[-1] is feed_of(left)
