"""Models whose cache cannot be cut, recurrent and hybrid ones: all that takes tokens back decodes again, and says so once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qwq_lite
from qwq_lite.backend.context import Context, ContextSettings
from qwq_lite.backend.model import LoadedModel
from qwq_lite.chat.chat import Chat
from qwq_lite.chat.model import Model
from qwq_lite.engine.request import Request
from qwq_lite.engine.scheduler import Scheduler
from qwq_lite.engine.sequences import Part, Sequences
from qwq_lite.events import Answer, Done, Event, Notice, Progress, Reply, Thinking
from qwq_lite.reply.policies.stops import Stops
from qwq_lite.reply.policy import Begin, Policy, Rewind, Taken, Verdict
from qwq_lite.sampling import Sampling
from tests.other_models import LFM2, MAMBA, MAMBA2, Architecture, write_model

MODELS = (MAMBA, MAMBA2, LFM2)
GREEDY: dict[str, Any] = {"temperature": 0.0, "seed": 1}
PROMPT = [5 + 7 * n % 200 for n in range(40)]


@pytest.fixture(scope="module", params=MODELS, ids=lambda made: made.name)
def file(request: pytest.FixtureRequest, tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Architecture = request.param
    return write_model(tmp_path_factory.mktemp("uncut") / f"{made.name}.gguf", tiny_gguf, made)


@pytest.fixture(scope="module")
def model(file: Path) -> Iterator[Model]:
    with qwq_lite.load(file, n_ctx=2048, isolated=False, n_threads=1) as loaded:
        yield loaded


@pytest.fixture
def context(file: Path) -> Iterator[Context]:
    weights = LoadedModel(file)
    made = Context(weights, ContextSettings(n_ctx=512, n_threads=1, n_seq_max=3))
    yield made
    made.close()
    weights.close()


def reply(events: list[Event]) -> Reply:
    done = events[-1]
    assert isinstance(done, Done)
    return done.reply


def told(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Notice) and event.kind == "recomputed"]


class GoesBack(Policy):
    """At some lengths of the reply, each once, lets fewer tokens stand; with forced ones after them or without."""

    name = "goes back"

    def __init__(self, places: dict[int, int], forced: tuple[int, ...] = ()) -> None:
        self._places, self._forced = dict(places), forced

    def start(self, begin: Any) -> None:
        return None

    def observe(self, state: None, taken: Taken) -> Verdict:
        n_kept = self._places.pop(taken.n_tokens, None)
        return Verdict(None, None if n_kept is None else Rewind(n_kept, forced=self._forced))


def test_what_stands_is_decoded_again_and_gives_the_rows_of_a_reply_that_was_never_rewound(context: Context) -> None:
    all_of_them = Sequences(context)
    assert not context.can_cut
    sequence = all_of_them.place("chat", PROMPT)
    all_of_them.decode([Part(sequence, PROMPT)])
    all_of_them.mark(sequence)
    rows = []
    for token in (11, 12, 13, 14):
        all_of_them.decode([Part(sequence, [token])])
        assert sequence.row is not None
        rows.append(sequence.row.copy())
    for n_tokens in (len(PROMPT) + 2, len(PROMPT), 3):
        left = all_of_them.rewind(sequence, n_tokens)
        assert left == [*PROMPT, 11, 12, 13, 14][:n_tokens]
        all_of_them.decode([Part(sequence, left)])
        all_of_them.decode([Part(sequence, [*PROMPT, 11, 12, 13][n_tokens:])] if n_tokens < len(PROMPT) + 3 else [])
        assert sequence.row is not None
        assert np.abs(sequence.row - rows[2]).max() < 1e-2, "other batches, so nearly the same"
    all_of_them.keep(sequence, 5)
    assert sequence.tokens == []


def test_a_prompt_that_goes_on_is_not_decoded_again_and_another_is(context: Context) -> None:
    all_of_them = Sequences(context)
    sequence = all_of_them.place("chat", PROMPT)
    all_of_them.decode([Part(sequence, PROMPT)])
    all_of_them.done(sequence)
    assert all_of_them.place("chat", [*PROMPT, 9, 9]) is sequence
    assert sequence.tokens == PROMPT
    all_of_them.done(sequence)
    other = all_of_them.place("other", [*PROMPT[:20], 7, 7])
    assert other.tokens == []
    assert sequence.tokens == PROMPT, "what another session could not share stays with its own"
    all_of_them.done(other)
    assert all_of_them.place("chat", PROMPT[:20]).tokens == []


@pytest.mark.parametrize("forced", [(), (21, 22, 23)], ids=["drawn", "forced"])
def test_rewinds_of_a_reply_end_in_no_error_and_one_notice(file: Path, forced: tuple[int, ...]) -> None:
    weights = LoadedModel(file)
    scheduler = Scheduler(weights, Context(weights, ContextSettings(n_ctx=512, n_threads=1)), prefill_chunk=16)
    policies = GoesBack({10: 4, 12: 0, 14: 12}, forced), Stops(frozenset(), max_tokens=24)
    events = list(scheduler.submit(Request(PROMPT, policies, Sampling(temperature=0.0), 1, Begin("thinking"))))
    scheduler.close()
    made = reply(events)
    assert made.finish_reason == "length"
    assert made.stats.n_thinking == 24
    assert len(told(events)) == 1
    after = events[next(n for n, event in enumerate(events) if isinstance(event, Notice)) :]
    assert any(isinstance(event, Progress) and event.stage == "prefill" for event in after), "it says how far it is"


def test_a_budget_ends_a_thought(model: Model) -> None:
    chat = model.chat()
    for question in ("One?", "Two?"):
        events = list(chat.stream(question, thinking_budget=24, max_tokens=400, **GREEDY))
        assert reply(events).stats.thought_end == "budget"
        assert reply(events).stats.n_answer > 0
        assert len(told(events)) <= 1


def test_a_hint_is_taken(model: Model) -> None:
    stream = model.chat().stream("One?", thinking_budget=1200, max_tokens=1500, temperature=2.0, seed=1)
    events: list[Event] = []
    for event in stream:
        events.append(event)
        if isinstance(event, Thinking) and not any(isinstance(e, Thinking) for e in events[:-1]):
            stream.steer("Wait, this is wrong.", None)
    assert reply(events).finish_reason in ("length", "stop", "loop")
    assert "Wait, this is wrong." in reply(events).thinking
    assert len(told(events)) == 1


def test_a_thought_that_repeats_itself_is_left_and_ended(tiny_gguf: Path, tmp_path: Path, file: Path) -> None:
    made = next(made for made in MODELS if made.name == file.stem)
    path = write_model(tmp_path / "echo.gguf", tiny_gguf, made, echo=True)
    with qwq_lite.load(path, n_ctx=2048, isolated=False, n_threads=1) as model:
        events = list(model.chat().stream("Again?", max_tokens=1500, **GREEDY))
    assert reply(events).stats.loops[:2] == ("rewound", "closed")
    assert reply(events).stats.thought_end == "loop"
    assert len(told(events)) == 1


def test_retry_fork_save_and_restore(model: Model, tmp_path: Path) -> None:
    options = {"thinking_budget": 0, "max_tokens": 20, **GREEDY}
    chat = model.chat()
    assert chat.ask("One?", **options).finish_reason == "length"
    assert reply(list(chat.retry(**options))).finish_reason == "length"
    twin = chat.fork()
    assert twin.ask("Two?", **options).finish_reason == "length"
    assert chat.ask("Two?", **options).finish_reason == "length"
    chat.save(tmp_path / "chat.state")
    back = Chat.restore(model, tmp_path / "chat.state")
    assert back.messages == chat.messages
    assert back.ask("Three?", **options).finish_reason == "length"


def test_an_isolated_engine_does_the_same(file: Path) -> None:
    with qwq_lite.load(file, n_ctx=1024, n_threads=1) as model:
        events = list(model.chat().stream("One?", thinking_budget=24, max_tokens=400, **GREEDY))
        assert reply(events).stats.thought_end == "budget"
        assert any(isinstance(event, Answer) for event in events)
