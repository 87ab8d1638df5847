"""The engine's thread with a real model: cancelling, rewinding by policies, several replies at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from qwq_lite.backend.context import Context, ContextSettings
from qwq_lite.backend.model import LoadedModel
from qwq_lite.engine.request import Request
from qwq_lite.engine.scheduler import PREFILL_CHUNK, Scheduler
from qwq_lite.events import Answer, Done, Event, Notice, Progress, Reply, Thinking
from qwq_lite.reply.policies.stops import Stops
from qwq_lite.reply.policy import Begin, Draw, Policy, Rewind, Taken, Verdict
from qwq_lite.reply.stream import Stream
from qwq_lite.sampling import Sampling
from tests.samples import times

ENDLESS = Stops(frozenset())
PROMPT = [1000 + 37 * n for n in range(40)]


@pytest.fixture(scope="module")
def scheduler(demo_gguf: Path) -> Iterator[Scheduler]:
    yield from opened(demo_gguf, n_active=1)


@pytest.fixture(scope="module")
def pair_scheduler(demo_gguf: Path) -> Iterator[Scheduler]:
    yield from opened(demo_gguf, n_active=2)


@pytest.fixture(scope="module")
def letters_scheduler(letters_gguf: Path) -> Iterator[Scheduler]:
    yield from opened(letters_gguf, n_active=1)


def opened(path: Path, n_active: int) -> Iterator[Scheduler]:
    weights = LoadedModel(path)
    scheduler = Scheduler(
        weights, Context(weights, ContextSettings(n_ctx=2048, n_threads=1, n_seq_max=4)), n_active=n_active
    )
    yield scheduler
    scheduler.close()


def request(prompt: list[int], *policies: Policy, seed: int = 1, begin: Begin = Begin()) -> Request:  # noqa: B008 - frozen
    return Request(prompt, policies or (Stops(frozenset(), max_tokens=12),), Sampling(), seed, begin, alone=True)


def reply(events: list[Event]) -> Reply:
    done = events[-1]
    assert isinstance(done, Done)
    return done.reply


def cancelled_once(stream: Stream, kind: type[Event], n_before: int) -> tuple[Reply, int]:
    """Read until n_before events of a kind have come and let another thread cancel: the reply, and how many events of the kind
    were made after the cancel, however many were before it was there."""
    put, n_late = stream.feed.put, 0

    def counted(event: Any) -> None:
        nonlocal n_late
        n_late += isinstance(event, kind) and stream.cancelled
        put(event)

    stream.feed.put = counted  # type: ignore[method-assign]
    events = iter(stream)
    for _ in range(n_before):
        while not isinstance(next(events), kind):
            pass
    thread = threading.Thread(target=stream.cancel)
    thread.start()
    thread.join()
    return reply(list(events)), n_late


@pytest.mark.sampled
def test_100_of_100_cancels_in_decode_end_within_one_token(scheduler: Scheduler) -> None:
    late = []
    for number in range(times(100)):
        stream = scheduler.submit(Request(PROMPT, (ENDLESS,), Sampling(), number, session="decode"))
        cancelled, n_late = cancelled_once(stream, Answer, 1 + number % 3)
        assert cancelled.finish_reason == "cancelled"
        late.append(n_late)
    assert max(late) <= 2, late  # one token ends, and what was held back of the text is shown


@pytest.mark.sampled
def test_100_of_100_cancels_in_prefill_end_within_one_chunk(scheduler: Scheduler) -> None:
    for number in range(times(100)):
        prompt = [5 + number, *([600 + number] * (3 * PREFILL_CHUNK))]
        cancelled, n_late = cancelled_once(scheduler.submit(request(prompt, ENDLESS)), Progress, 1 + number % 2)
        assert cancelled.finish_reason == "cancelled"
        assert n_late <= 1


def test_what_was_prefilled_before_a_cancel_is_kept(scheduler: Scheduler) -> None:
    prompt = [900 + n for n in range(5 * PREFILL_CHUNK)]
    going_on = Request(prompt, (ENDLESS,), Sampling(), 1, session="kept")
    stopped, _ = cancelled_once(scheduler.submit(going_on), Progress, 3)  # nothing, a chunk, two chunks
    assert stopped.stats.n_prefilled >= 2 * PREFILL_CHUNK
    short = Request(prompt[: 2 * PREFILL_CHUNK + 1], (Stops(frozenset(), max_tokens=1),), Sampling(), 1, session="kept")
    assert reply(list(scheduler.submit(short))).stats.n_reused >= 2 * PREFILL_CHUNK


def test_a_request_that_is_cancelled_while_it_waits_never_begins(scheduler: Scheduler) -> None:
    first = scheduler.submit(request(PROMPT, ENDLESS))
    waiting = scheduler.submit(request(PROMPT, ENDLESS))
    waiting.cancel()
    done = reply(list(waiting))
    assert (done.finish_reason, done.stats.n_prefilled) == ("cancelled", 0)
    first.cancel()
    assert reply(list(first)).finish_reason == "cancelled"


@dataclass(frozen=True)
class RewindsOnce:
    """Once the reply has `n` tokens only the first `keep` stand, and the one that came next is not allowed there."""

    n: int
    keep: int
    name: str = "rewinds"
    constrains: ClassVar[bool] = True

    def start(self, begin: Begin) -> tuple[bool, tuple[int, ...]]:
        return bool(begin.rewinds), ()

    def constrain(self, state: tuple[bool, tuple[int, ...]], draw: Draw) -> Draw:
        return draw

    def observe(self, state: tuple[bool, tuple[int, ...]], taken: Taken) -> Verdict:
        done, tokens = state
        tokens = (*tokens, taken.token)
        if not done and taken.n_tokens == self.n:
            return Verdict((True, tokens), Rewind(self.keep, frozenset({tokens[self.keep]}), "a test"))
        return Verdict((done, tokens))


@pytest.mark.parametrize("keep", [0, 3])
def test_a_rewind_resamples_without_what_was_banned(letters_scheduler: Scheduler, keep: int) -> None:
    greedy, begin, prompt = Sampling(temperature=0), Begin("thinking"), [7] * 40
    plain = Request(prompt, (Stops(frozenset(), max_tokens=7),), greedy, 1, begin, alone=True)
    rewinding = Request(prompt, (RewindsOnce(8, keep), Stops(frozenset(), max_tokens=12)), greedy, 1, begin, alone=True)
    first, events = (reply(list(letters_scheduler.submit(plain))), list(letters_scheduler.submit(rewinding)))
    second = reply(events)
    shown = "".join(event.text for event in events if isinstance(event, Thinking))
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert len(notices) == 1
    assert notices[0].endswith("no longer count: a test")
    assert second.thinking != first.thinking
    assert shown.lstrip().startswith(first.thinking), "what was shown stays shown; the eighth token went before it was"
    assert len(shown) > len(second.thinking)
    assert second.stats.n_generated == 8 + 12 - keep
    assert second.finish_reason == "length"


@dataclass(frozen=True)
class ForcesAfter:
    n: int
    tokens: tuple[int, ...]
    name: str = "forces"
    constrains: ClassVar[bool] = True

    def start(self, begin: Begin) -> None: ...

    def constrain(self, state: None, draw: Draw) -> Draw:
        return draw

    def observe(self, state: None, taken: Taken) -> Verdict:
        return Verdict(None, Rewind(self.n, forced=self.tokens) if taken.n_tokens == self.n else None)


def test_forced_tokens_come_as_they_are(scheduler: Scheduler, demo_gguf: Path) -> None:
    forced = (500, 501, 502)
    events = list(scheduler.submit(request(PROMPT, ForcesAfter(2, forced), Stops(frozenset(), max_tokens=5))))
    weights = LoadedModel(demo_gguf, vocab_only=True)
    text = b"".join(map(weights.vocab.piece, forced)).decode()
    weights.close()
    assert reply(events).answer.endswith(text.rstrip())


def test_two_replies_at_once_are_the_two_that_come_one_after_the_other(pair_scheduler: Scheduler) -> None:
    prompts = [PROMPT, [2000 + 41 * n for n in range(300)]]
    streams = [pair_scheduler.submit(Request(prompt, (ENDLESS,), Sampling(), 1)) for prompt in prompts]
    first = iter(streams[0])
    while not isinstance(next(first), Answer):
        pass
    for event in streams[1]:  # comes to its answer while the other goes on
        if isinstance(event, Answer):
            break
    streams[0].cancel()
    assert reply(list(first)).finish_reason == "cancelled"


def test_cancelling_one_of_two_leaves_the_other_whole(pair_scheduler: Scheduler) -> None:
    length = Stops(frozenset(), max_tokens=30)
    for number in range(10):
        other = pair_scheduler.submit(Request([7, *PROMPT], (ENDLESS,), Sampling(), number))
        stays = pair_scheduler.submit(Request(PROMPT, (length,), Sampling(), 1))
        events = iter(stays)
        while not isinstance(next(events), Answer):
            pass
        other.cancel()
        done = reply(list(events))
        assert (done.finish_reason, done.stats.n_generated) == ("length", 30)
        assert reply(list(other)).finish_reason == "cancelled"


def test_an_error_in_a_policy_ends_its_reply_alone(scheduler: Scheduler) -> None:
    class Broken(RewindsOnce):
        def observe(self, state: tuple[bool, tuple[int, ...]], taken: Taken) -> Verdict:
            raise RuntimeError("broken")

    stream = scheduler.submit(request(PROMPT, Broken(1, 0)))
    with pytest.raises(Exception, match="RuntimeError: broken"):
        list(stream)
    assert reply(list(scheduler.submit(request(PROMPT)))).finish_reason == "length"
