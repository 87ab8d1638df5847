"""What is done about a loop: a thought leaves the first one, the second ends the thought, one in the answer ends the reply."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwq_lite.chat.options import Options
from qwq_lite.engine.reply_rules import Thoughts
from qwq_lite.events import Event, Notice, Thinking
from qwq_lite.reply import fold
from qwq_lite.reply.builder import ReplyBuilder
from qwq_lite.reply.policies.loops import Loops, warm_sampling
from qwq_lite.reply.policy import Begin, Draw, Rewind, Stop, Taken
from qwq_lite.sampling import Sampling
from tests.thoughts import CLOSE, END, MODELS, TAGS, UNDIVIDED, Words, rules_of

LOOPED = Rewind(0, loop=True)


@given(st.floats(0, 3), st.integers(0, 100), st.floats(0.001, 1), st.floats(0, 1))
def test_after_a_loop_the_rest_of_the_thought_is_not_greedy(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    asked = Sampling(temperature, top_k, top_p, min_p)
    policy = Loops()
    draw = policy.constrain(policy.start(Begin("thinking", (LOOPED,))), Draw(asked))
    now = draw.sampling
    assert now == warm_sampling(asked) == warm_sampling(now)
    assert now.temperature == max(1.0, temperature)
    assert now.top_p == max(0.95, top_p)
    assert now.top_k == (0 if top_k == 0 else max(20, top_k))
    assert now.min_p == min(0.05, min_p)
    for begin in (Begin("thinking"), Begin("thinking", (Rewind(3),)), Begin("answer", (LOOPED,))):
        assert policy.constrain(policy.start(begin), Draw(asked)) == Draw(asked)


def test_settings_that_are_warm_enough_stay() -> None:
    for asked in (Sampling(1.0), Sampling(1.0, 0, 1.0, 0.0), Sampling(1.3, 20, 0.95, 0.05)):
        assert warm_sampling(asked) == asked


class Model:
    """Writes one text for ever; where its next token is banned, it writes a few sentences of its own first, and then again."""

    def __init__(self, words: Words, loop: str, answer: str) -> None:
        self.words, self._loop, self._answer = words, loop, answer
        self.n_others = 0
        self._tokens: Iterator[int] = itertools.cycle(words.tokenize(loop * 50))
        self.draws: list[Draw] = []
        self.concludes_at = -1

    def run(self, track: ReplyBuilder, n_most: int = 20_000) -> tuple[list[Rewind], Stop | None, list[Event]]:
        rewinds: list[Rewind] = []
        events: list[Event] = []
        answer = itertools.cycle(self.words.tokenize(self._answer * 50))
        for _ in range(n_most):
            if len(track.tokens) == self.concludes_at:
                track.conclude()
            draw = track.constrain(Sampling(temperature=0))
            self.draws.append(draw)
            token = draw.forced
            if token is None:
                token = next(self._tokens if track.state.phase == "thinking" else answer)
            if token in draw.banned and draw.forced is None:
                self.n_others += 1
                other = self.words.tokenize(f" But then{self.n_others} it is otherwise.")
                self._tokens = itertools.chain(other, itertools.cycle(self.words.tokenize(self._loop * 50)))
                token = next(self._tokens)
            more, action = track.take(token)
            events += more
            if isinstance(action, Rewind):
                rewinds.append(action)
                self._tokens = itertools.cycle(self.words.tokenize(self._loop * 50))
            elif action is not None:
                return rewinds, action, events
        return rewinds, None, events


LOOP = " So one is two, and two is three."


@settings(max_examples=20)
@given(MODELS, st.integers(0, 30))
def test_the_first_loop_is_left_the_second_ends_the_thought_the_third_the_reply(model: Thoughts, n_before: int) -> None:
    words = Words()
    rules = rules_of(words, Options(), model, loops=True)
    track = ReplyBuilder(rules.policies, rules.begin, words.piece, words.tokenize)
    before = words.tokenize(" ".join(f"w{n}" for n in range(n_before)) + "!")
    for token in before:
        track.take(token)
    writer = Model(words, LOOP, " It is five.")
    rewinds, stop, events = writer.run(track)
    copy = words.tokenize(LOOP)
    assert [(rewind.loop, rewind.ends) for rewind in rewinds] == [(True, None), (False, "loop")]
    assert rewinds[0] == Rewind(len(before) + len(copy), frozenset({copy[0]}), "it repeated itself", loop=True)
    assert stop == Stop("loop")
    ended = track.ended("loop")
    assert ended.end == "loop"
    assert track.loops("loop") == ("rewound", "closed", "stopped")
    assert words.text(track.tokens).count("otherwise") == 1
    kinds = [event.kind for event in events if isinstance(event, Notice)]
    assert kinds == ["rewound", "closed"]
    answer = ended.answer.removeprefix("**Final Answer**").lstrip("\n")
    assert (" It is five." * 200).startswith(answer)
    assert answer.count("five") == 128


@given(MODELS)
@settings(max_examples=2)
def test_a_loop_that_was_left_changes_the_sampling_of_the_thought_and_not_of_the_answer(model: Thoughts) -> None:
    words = Words()
    rules = rules_of(words, Options(), model, loops=True)
    track = ReplyBuilder(rules.policies, rules.begin, words.piece, words.tokenize)
    writer = Model(words, LOOP, " It is five.")
    writer.run(track)
    temperatures = [key for key, _ in itertools.groupby(writer.draws, lambda draw: draw.sampling.temperature)]
    assert temperatures[:2] == [0, 1.0]
    assert temperatures[-1] == 0
    assert any(draw.banned for draw in writer.draws)


def test_folding_again_says_the_same_and_stops_nothing() -> None:
    """A thought that a loop has ended, its copies among the tokens: they stand, and are history."""
    words = Words()
    rules = rules_of(words, Options(), TAGS, loops=True)
    track = ReplyBuilder(rules.policies, rules.begin, words.piece, words.tokenize)
    rewinds, _, _ = Model(words, LOOP, " It is five.").run(track)
    begin = Begin("thinking", tuple(rewinds))
    timed = [(token, words.piece(token), 0.0) for token in track.tokens]
    state, events = fold.fold(rules.policies, begin, timed[: len(timed) // 2])
    for token, piece, time_s in timed[len(timed) // 2 :]:
        step = fold.advance(rules.policies, state, token, piece, time_s)
        state = step.state
        events += step.events
    whole, all_events = fold.fold(rules.policies, begin, timed)
    place = [policy.name for policy in rules.policies].index("loops")  # its text is each fold's own
    for one, other in ((state, whole), (whole, state)):
        own = one.policies[place]._replace(written=other.policies[place].written)
        assert one._replace(policies=(*one.policies[:place], own, *one.policies[place + 1 :])) == other
    assert events == all_events


@pytest.mark.parametrize("rewinds", [(LOOPED,), (LOOPED, Rewind(9, forced=(CLOSE,), ends="loop"))])
def test_after_the_first_loop_a_thought_is_only_ended(rewinds: tuple[Rewind, ...]) -> None:
    policy, begin = Loops(), Begin("thinking", rewinds)
    path: Any = policy.start(begin)
    for n in range(1, 65):
        verdict = policy.observe(path, Taken(7, "x", "thinking", n))
        path = verdict.state
    assert (verdict.action, verdict.end) == (None, ("loop", 1 - 64)), "the first copy stands"


PERIODS = st.builds(
    lambda n, joint, end: joint.join(f" a{number}" for number in range(n)) + end,
    st.integers(1, 150),
    st.sampled_from(["", ",", "\n"]),
    st.sampled_from(["", ".", ".\n", "\n\n", "。"]),
)


@settings(max_examples=40)
@given(MODELS, PERIODS, st.sampled_from(["", "So it is.\n\n", "So:\n```\n", "So:\n```\nx = 1\n```\n"]), st.booleans())
def test_the_copies_of_a_second_loop_are_no_part_of_what_the_answer_follows(
    model: Thoughts, period: str, before: str, is_asked: bool
) -> None:
    """Whatever else would end the thought at the same time; and the reader is told of all that was taken back."""
    words = Words()
    rules = rules_of(words, Options(), model, loops=True)
    track = ReplyBuilder(rules.policies, rules.begin, words.piece, words.tokenize)
    first = words.tokenize(before)
    events = [event for token in first for event in track.take(token)[0]]
    writer = Model(words, period, " It is five.")
    if is_asked:
        writer.concludes_at = len(first) + len(words.tokenize(period)) + 30
    rewinds, _, more = writer.run(track)
    left, ended = rewinds[0], rewinds[-1]
    text, other = track.ended("loop").thinking, " But then1 it is otherwise."
    if left.loop and ended.ends == "loop":
        assert len(rewinds) == 2
        copy = len(words.tokenize(period))
        assert ended.n_tokens <= len(first) + 2 * copy + len(words.tokenize(other))
        assert text.count("a0") <= (2 if copy > 1 else 3)
        assert track.ended("loop").end == "loop"
        assert "otherwise" in text or len(text) < len(before + period + other)
    shown = ""
    for event in [*events, *more]:
        if isinstance(event, Thinking):
            shown += event.text
        elif isinstance(event, Notice) and event.n_lost:
            shown = shown[: -event.n_lost]
    assert shown.strip() == text.strip()
    if model is UNDIVIDED and ended.ends:
        assert text.count("```") % 2 == 0, "what ends the thought stands outside of code"
        assert track.ended("loop").answer.startswith("**Final Answer**")


def test_a_second_loop_ends_where_a_text_may_end() -> None:
    """Not in the midst of the sentence that came again."""
    words = Words()
    rules = rules_of(words, Options(), TAGS, loops=True)
    track = ReplyBuilder(rules.policies, rules.begin, words.piece, words.tokenize)
    loop = " and two is three. So one is two,"
    Model(words, loop, " It is five.").run(track)
    assert track.ended("loop").thinking.rstrip().endswith(".")


def test_a_loop_that_nobody_saw_is_told_too() -> None:
    """Tokens without text, as control tokens are."""
    track = ReplyBuilder((Loops(),), Begin("thinking"), lambda _token: b"", lambda _text: [])
    events = [event for _ in range(64) for event in track.take(7)[0]]
    assert events == [Notice("the thought goes on from an earlier place: it repeated itself", "rewound")]
    assert track.loops("length") == ("rewound",)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Sampling(0.0, 40, 0.95, 0.0), "temperature is 1 and not 0:"),
        (Sampling(1.0, 1, 0.95, 0.0), "top_k is 20 and not 1:"),
        (Sampling(1.0, 40, 0.95, 0.5), "min_p is 0.05 and not 0.5:"),
        (Sampling(0.0, 0, 0.5, 0.0), "temperature is 1 and not 0, top_p is 0.95 and not 0.5:"),
        (Sampling(1.0), None),
        (Sampling(0.0, 40, 0.949999988, 0.0), "temperature is 1 and not 0:"),
        (Sampling(1.0, 40, 0.949999988, 0.0), None),
    ],
)
def test_the_reader_hears_which_settings_a_loop_has_changed(asked: Sampling, words: str | None) -> None:
    track = ReplyBuilder((Loops(),), Begin("thinking"), lambda _token: b"x", lambda _text: [])
    assert track.resampled(asked) is None
    for _ in range(64):
        track.take(7)
    notice = track.resampled(asked)
    assert (notice is None) == (words is None)
    if notice is not None and words is not None:
        assert (notice.kind, notice.n_lost) == ("warmed", 0)
        assert f"for the rest of the thought, {words}" in notice.text


def test_a_reply_without_loops_ends_as_it_always_did() -> None:
    words = Words()
    rules = rules_of(words, Options(), TAGS, loops=True)
    track = ReplyBuilder(rules.policies, rules.begin, words.piece, words.tokenize)
    for token in (CLOSE, *words.tokenize(" It is five."), END):
        _, action = track.take(token)
    assert action == Stop("stop", mute=True)
    assert track.loops("stop") == ()


def test_what_nobody_drew_is_no_loop_until_the_model_goes_on_with_it() -> None:
    policy, tokens = Loops(), [1, 2, 3] * 40
    actions = []
    for drawn in (1, 9):
        state = policy.start(Begin("thinking"))
        for n, token in enumerate(tokens, 1):
            verdict = policy.observe(state, Taken(token, "x", "thinking", n, forced=True))
            assert verdict.action is None and verdict.end is None
            state = verdict.state
        actions.append(policy.observe(state, Taken(drawn, "x", "thinking", len(tokens) + 1)).action)
    assert actions == [Rewind(3, frozenset({1}), "it repeated itself", loop=True), None]
