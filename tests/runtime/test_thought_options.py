"""The thought under control with a real engine: budget, deadline, conclude, steer; in this process and in a worker.

Its models are scripted (tests/checkpoints.py), so that a thought is there to be ended, and waits for its reader.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import qwq_lite
from qwq_lite.backend.context import Context, ContextSettings, Entry
from qwq_lite.backend.model import LoadedModel
from qwq_lite.chat.chat import Chat
from qwq_lite.chat.model import Model
from qwq_lite.cli import reply as terminal
from qwq_lite.engine import reply_setup, request
from qwq_lite.engine.sequences import Part, Sequences
from qwq_lite.errors import UsageError
from qwq_lite.events import Answer, Done, Event, Notice, Progress, Reply, Stats, Thinking
from qwq_lite.reply.stream import MOST_UNREAD, Stream
from tests.checkpoints import LETTERS, chain, in_f16, write_scripted_checkpoint

LONG = "Write a very long story about a king and his three daughters, with many details."
HEADING = "**Final Answer**"
ALPHABET = LETTERS[:20]


@pytest.fixture(scope="module")
def model(sentences_gguf: Path) -> Iterator[Model]:
    """In this process; as a model that marks no thought where a test says so."""
    with qwq_lite.load(sentences_gguf, n_ctx=4096, isolated=False) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def tagged(thinking_gguf: Path) -> Iterator[Model]:
    with qwq_lite.load(thinking_gguf, n_ctx=4096, isolated=False) as loaded:
        yield loaded


@pytest.fixture(scope="module", params=[False, True], ids=["here", "worker"])
def either(request: pytest.FixtureRequest, thinking_gguf: Path) -> Iterator[Model]:
    with qwq_lite.load(thinking_gguf, n_ctx=4096, isolated=request.param) as loaded:
        yield loaded


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token takes a hundredth of a second or more, on any machine."""
    times = itertools.count(1000.0, 0.01)
    for module in (request, reply_setup):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(times)))


def reply(events: list[Event]) -> Reply:
    done = events[-1]
    assert isinstance(done, Done)
    return done.reply


def told(events: list[Event], kind: str) -> list[str]:
    return [event.text for event in events if isinstance(event, Notice) and event.kind == kind]


def test_a_budget_ends_a_thought_without_tags_with_a_heading(model: Model) -> None:
    events = list(model.chat().stream(LONG, thought_style="undivided", thinking_budget=64, answer_reserve=80, seed=1))
    made = reply(events)
    assert made.answer.startswith(f"{HEADING}\n\n")
    assert len(made.answer) > len(HEADING) + 20
    assert made.thinking.rstrip()[-1] in ".!?"
    assert made.stats.thought_end == "budget"
    assert (made.stats.thinking_budget, made.stats.thinking_limit) == (64, 160)
    assert made.stats.n_thinking <= 160
    assert made.stats.n_answer <= 80
    assert made.stats.n_forced >= len(model.tokenize(HEADING))
    assert len(told(events, "closed")) == 1
    meter = [event for event in events if isinstance(event, Progress) and event.stage == "thinking"]
    assert [event.done for event in meter] == [16 * (n + 1) for n in range(len(meter))]
    assert "".join(event.text for event in events if isinstance(event, Answer)).rstrip() == made.answer


def test_a_budget_ends_a_thought_with_the_tag(tagged: Model) -> None:
    made = tagged.chat().ask(LONG, thinking_budget=64, answer_reserve=80, seed=1)
    assert made.thinking
    assert made.answer
    assert "think>" not in made.thinking + made.answer
    assert made.stats.thought_end == "budget"
    assert made.stats.n_thinking <= 160


def test_a_chinese_question_has_a_chinese_heading(model: Model) -> None:
    made = model.chat().ask(
        "请写一篇关于月亮的文章。", thought_style="undivided", thinking_budget=0, max_tokens=24, seed=1
    )
    assert made.answer.startswith("**最终答案**\n\n")


def test_no_thought_at_all(tagged: Model) -> None:
    made = tagged.chat().ask("What is the capital of France?", thinking_budget=0, max_tokens=24, seed=1)
    assert (made.thinking, bool(made.answer)) == ("", True)


def test_a_thought_that_max_tokens_cuts_leaves_no_answer_and_one_that_ends_its_turn_is_the_answer(
    tagged: Model, tmp_path: Path
) -> None:
    cut = tagged.chat().ask(LONG, max_tokens=20, seed=1)
    assert (cut.answer, cut.finish_reason, bool(cut.thinking)) == ("", "length", True)
    assert cut.stats.thought_end is None
    hello = write_scripted_checkpoint(tmp_path / "Hello", chain("H", "i", "<|im_end|>"), thinks=True)
    with qwq_lite.load(in_f16(hello), n_ctx=512, isolated=False) as loaded:
        ended = loaded.ask("Say hello.")
    assert (ended.finish_reason, ended.thinking, ended.answer) == ("stop", "", "Hi")


def test_the_context_keeps_room_for_an_answer(sentences_gguf: Path) -> None:
    with qwq_lite.load(sentences_gguf, n_ctx=512, isolated=False) as small:
        made = small.ask(LONG, thought_style="undivided", answer_reserve=64, seed=3)
    assert made.stats.thought_end == "context"
    assert HEADING in made.answer


@pytest.mark.usefixtures("clock")
def test_a_deadline_is_kept_with_an_answer(model: Model) -> None:
    made = model.chat().ask(LONG, thought_style="undivided", within=3.0, answer_reserve=64, seed=1)
    assert len(made.answer) > len(HEADING)
    assert made.stats.thought_end == "deadline"
    assert made.stats.time_left_s is not None
    over = model.chat().ask(LONG, thought_style="undivided", within=0.001, answer_reserve=64, seed=1)
    assert over.finish_reason == "deadline"
    assert len(over.answer) > len(HEADING)
    assert over.stats.time_left_s is not None
    assert over.stats.time_left_s < 0


@pytest.mark.usefixtures("clock")
def test_a_plain_model_ends_its_answer_at_a_sentence_after_the_deadline(model: Model) -> None:
    made = model.chat().ask(LONG, within=0.3, seed=1)
    assert made.finish_reason == "deadline"
    assert made.answer[-1] in '.!?"'
    assert made.stats.thought_end is None


def stopped_at(stream: Stream, n_thinking: int) -> tuple[Iterator[Event], list[Event]]:
    """The stream's events, and those that came until the thought had so many pieces."""
    events, seen = iter(stream), list[Event]()
    while sum(isinstance(event, Thinking) for event in seen) < n_thinking:
        seen.append(next(events))
    return events, seen


def in_thread(work: Any) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_answer_now_from_another_thread(either: Model) -> None:
    chat = either.chat()
    events, seen = stopped_at(chat.stream(LONG, seed=1, answer_reserve=64), 10)
    in_thread(chat.conclude)
    seen += events
    made = reply(seen)
    assert made.stats.thought_end == "asked"
    assert made.answer
    assert chat.messages[-1]["content"] == made.answer
    chat.conclude()  # nothing in hand: nothing happens


def test_a_hint_from_another_thread(either: Model) -> None:
    chat, hint = either.chat(), "Wait, the king has only two daughters, and so"
    events, seen = stopped_at(chat.stream(LONG, seed=2, answer_reserve=32), 60)
    in_thread(lambda: chat.steer(hint, drop="sentence"))
    seen += events
    made = reply(seen)
    assert made.thinking.count(f"\n\n{hint}") == 1
    assert not made.thinking.endswith(hint)
    assert len(told(seen, "rewound")) <= 1


def test_what_comes_too_late_is_told(model: Model) -> None:
    chat = model.chat()
    stream = chat.stream("Hello", max_tokens=2 * MOST_UNREAD, seed=1)  # a model that does not think
    chat.steer("Wait,")
    chat.conclude()
    events = list(stream)
    assert len(told(events, "late")) == 2
    assert not chat.steer("Wait,")
    assert not chat.conclude()
    with pytest.raises(UsageError, match="the hint is"):
        chat.steer(" ")
    with pytest.raises(UsageError, match="drop is 'word'"):
        chat.steer("Wait,", drop="word")  # type: ignore[arg-type] # a user's mistake
    with pytest.raises(UsageError, match="surrogate"):
        chat.steer("Wait\ud800")


@pytest.mark.parametrize("drop", ["paragraph", "sentence", None])
def test_of_a_steered_thought_only_the_hint_is_computed(
    sentences_gguf: Path, drop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one batch, its last token apart as with every prompt."""
    batches: list[list[int]] = []
    decode = Context.decode

    def counted(context: Context, entries: list[Entry]) -> None:
        batches.append([entry.token for entry in entries])
        decode(context, entries)

    with qwq_lite.load(sentences_gguf, n_ctx=4096, isolated=False, n_threads=1) as loaded:
        chat, hint = loaded.chat(), "Wait, I forgot the youngest one."
        options = {"thought_style": "undivided", "seed": 1, "max_tokens": 2 * MOST_UNREAD}
        events, seen = stopped_at(chat.stream(LONG, **options), 50)
        monkeypatch.setattr(Context, "decode", counted)
        chat.steer(hint, drop)
        seen += events
        monkeypatch.undo()
        made = reply(seen)
        together = next(batch for batch in batches if len(batch) > 1)
        n_hint = len(loaded.tokenize(f"\n\n{hint}"))
        assert all(len(batch) == 1 for batch in batches if batch is not together)
        assert len(together) + 1 <= n_hint + 2, (
            "the hint, its last token apart; a stop may be spelled anew with the newline"
        )
        assert made.thinking.count(hint) + made.answer.count(hint) == 1


def test_the_row_after_a_hint_is_that_of_a_fresh_context(demo_gguf: Path) -> None:
    weights = LoadedModel(demo_gguf)
    contexts = [Context(weights, ContextSettings(n_ctx=512, n_threads=1, n_seq_max=2)) for _ in range(2)]
    prompt, thought, hint = [list(range(first, first + n)) for first, n in ((1000, 40), (2000, 30), (3000, 9))]
    rows = []
    for context, n_more in zip(contexts, (12, 0), strict=True):
        sequences = Sequences(context)
        sequence = sequences.place("s", prompt)
        for chunk in (prompt[:-1], prompt[-1:], *([token] for token in thought)):
            sequences.decode([Part(sequence, chunk)])
        n_kept = len(sequence.tokens)
        for token in range(4000, 4000 + n_more):  # what the hint replaces
            sequences.decode([Part(sequence, [token])])
        sequences.keep(sequence, n_kept)
        for chunk in (hint[:-1], hint[-1:]):
            sequences.decode([Part(sequence, chunk)])
        assert sequence.row is not None
        rows.append(sequence.row.copy())
    for context in contexts:
        context.close()
    weights.close()
    assert np.array_equal(rows[0], rows[1])


def test_the_history_of_an_undivided_model_is_all_or_the_answer(model: Model) -> None:
    options: dict[str, Any] = {"thought_style": "undivided", "thinking_budget": 64, "answer_reserve": 40, "seed": 1}
    for history in (None, "all", "answer"):
        chat: Chat = model.chat()
        made = chat.ask(LONG, history=history, **options)
        content = chat.messages[-1]["content"]
        assert content == (made.answer if history == "answer" else made.thinking + made.answer)
        assert made.thinking


def test_the_answer_has_its_own_temperature(tagged: Model) -> None:
    """Greedy answers to one thought are the same whatever the seed of their draws."""
    hot = {"temperature": 1.5, "thinking_budget": 0, "max_tokens": 24}
    greedy = {tagged.chat().ask(LONG, seed=seed, answer_temperature=0.0, **hot).answer for seed in range(3)}
    drawn = {tagged.chat().ask(LONG, seed=seed, **hot).answer for seed in range(3)}
    assert (len(greedy), len(drawn)) == (1, 3)


@pytest.fixture(scope="module")
def greedy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """A greedy text of its goes through the alphabet again and again; drawn, any letter follows nearly as likely."""

    def script(last: int) -> dict[int, float]:
        following = ALPHABET[(ALPHABET.index(last) + 1) % len(ALPHABET)] if last in ALPHABET else ALPHABET[0]
        return {**dict.fromkeys(LETTERS, 0.0), following: 1.0}

    folder = write_scripted_checkpoint(tmp_path_factory.mktemp("greedy") / "Greedy", script)
    with qwq_lite.load(in_f16(folder), n_ctx=2048, isolated=False) as loaded:
        yield loaded


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.0, "top_k": 1}])
def test_a_greedy_thought_leaves_its_loop_and_the_reader_hears_of_each_step(
    greedy: Model, settings: dict[str, Any]
) -> None:
    events = list(greedy.generate("La la. " * 20, thought_style="undivided", seed=1, max_tokens=400, **settings))
    assert reply(events).stats.loops == ("rewound",)
    kinds = [event.kind for event in events if isinstance(event, Notice) and event.kind != "slow"]
    assert kinds == ["rewound", "warmed"]
    assert "it repeated itself" in told(events, "rewound")[0]
    name = "top_k is 20 and not 1" if "top_k" in settings else "temperature is 1 and not 0"
    assert told(events, "warmed") == [
        f"for the rest of the thought, {name}: as it was asked for, it would repeat itself again"
    ]


def test_an_answer_that_loops_ends_with_a_word(greedy: Model, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a text; the same as tokens may have asked for it."""
    text, options = "La la. " * 20, {"thought_style": "none", "temperature": 0.0, "seed": 1, "max_tokens": 1000}
    events = list(greedy.generate(text, **options))
    made = reply(events)
    assert (made.finish_reason, made.stats.loops) == ("loop", ("stopped",))
    assert told(events, "loop") == ["the answer repeated itself and ends here"]
    assert 512 <= made.stats.n_answer < 1000
    known = reply(list(greedy.generate(greedy.tokenize(text), **options)))
    assert (known.finish_reason, known.stats.loops) == ("length", ())
    asked = reply(list(greedy.generate(f"Write this 100 times: {text}", **options)))
    assert (asked.finish_reason, asked.stats.loops) == ("length", ())
    terminal.show(events, thinking=False, said=set())
    assert "; loops: stopped;" in capsys.readouterr().err


def test_the_line_below_a_reply_names_what_was_refused_where_anything_was(capsys: pytest.CaptureFixture[str]) -> None:
    for stats, words in ((Stats(n_refused=3), "; 3 tokens of another script refused;"), (Stats(), None)):
        terminal.show([Done(Reply("so", "", "stop", stats))], thinking=False, said=set())
        shown = capsys.readouterr().err
        assert words is None or words in shown
        assert ("refused" in shown, "loops" in shown) == (words is not None, False)
