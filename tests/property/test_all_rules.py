"""All rules of a reply together, as `reply_rules` makes them: what each promises holds whatever the others do.

The model here circles word by word and nearly so, in blocks of code and out of them, changes its script, and never ends its turn.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwq_lite.chat.options import Options
from qwq_lite.engine.reply_rules import Thoughts
from qwq_lite.events import Answer, Event, Notice, Thinking
from qwq_lite.reply.builder import ReplyBuilder
from qwq_lite.reply.commands import Drop, Steer
from qwq_lite.reply.policies.order import ORDER
from qwq_lite.reply.policy import Draw, Rewind, Stop
from qwq_lite.reply.script_masks import ScriptMasks
from qwq_lite.sampling import Sampling
from qwq_lite.text.unicode_scripts import MASKABLE
from tests.samples import examples
from tests.thoughts import CLOSE, MODELS, TAGS, UNDIVIDED, Words, rules_of

HINT = "Think of it so"
HEADING = "**Final Answer**"
_MOST = 60_000  # tokens in which every reply here has an end; few need more than 12,000


@dataclass
class Writer:
    """Draws a token: never a banned one, and where one is refused, another one."""

    words: Words
    random: random.Random
    tokens: Iterator[int] = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = self._text()

    def draw(self, draw: Draw) -> int:
        if draw.forced is not None:
            return draw.forced
        while True:
            token = next(self.tokens)
            if token not in draw.banned and (draw.allowed is None or draw.allowed[token] == 0):
                return token

    def _text(self) -> Iterator[int]:
        tokenize, source = self.words.tokenize, self.random
        while True:
            kind = source.randrange(5)
            if kind == 0:
                yield from tokenize(
                    "".join(f" w{source.randrange(5000)}" for _ in range(source.randrange(80))) + ".\n\n"
                )
            elif kind == 1:
                n_words, end = source.choice([1, 2, 7, 30, 120]), source.choice(["", ". ", ".\n", "\n\n"])
                period = tokenize(" ".join(f"q{source.randrange(50)}" for _ in range(n_words)) + end)
                for _ in range(source.randrange(2, 40)):
                    yield from period
            elif kind == 2:
                yield from tokenize("\n```\n" if source.random() < 0.3 else ". ")
            elif kind == 3:
                blocks = [" ".join(f"z{source.randrange(90)}" for _ in range(60)) + ".\n" for _ in range(2)]
                for n in range(source.randrange(30)):
                    yield from tokenize(f" h{n}\n{blocks[n % 2]}")
            else:
                yield from tokenize(source.choice(["好", "好的。\n", "\n\n**最终答案**\n\n"]))


def vocabulary() -> Words:
    """All the words that may come, so that masks know them."""
    words = Words()
    for letter, n in (("w", 5000), ("q", 50), ("z", 90), ("h", 30)):
        for number in range(n):
            words.tokenize(f"{letter}{number}")
            words.tokenize(f" {letter}{number}")
    for end in (
        ". ",
        ".\n",
        ".\n\n",
        "\n",
        "\n\n",
        "\n```\n",
        " ",
        "好",
        "好的。\n",
        f" {HINT}.",
        f"\n\n{HEADING}\n\n**最终答案**",
    ):
        words.tokenize(end)
    return words


WORDS = vocabulary()
MASKS = ScriptMasks([WORDS.piece(token) for token in range(len(WORDS))], MASKABLE)


@examples(80)
@given(
    st.integers(0, 1 << 32),
    MODELS,
    st.sampled_from([None, 0, 50, 200, 600, 2000]),
    st.sampled_from([800, 3000, 100_000]),
    st.sampled_from([None, 0.001, 3.0, 40.0]),
    st.sampled_from([None, 100, 700]),
    st.sampled_from([None, 150, 900]),
    st.sampled_from([None, "sentence", "paragraph"]),
    st.booleans(),
)
def test_what_each_rule_promises_holds_with_all_the_others(
    seed: int, model: Thoughts, budget: int | None, n_ctx: int, within: float | None, asked_at: int | None,
    steered_at: int | None, drop: Drop | None, masked: bool,
) -> None:  # fmt: skip
    source = random.Random(seed)
    options = Options(thinking_budget=budget, within=within)
    masks = (MASKS, None) if masked else (None, None)
    rules = rules_of(WORDS, options, model, n_ctx, loops=True, scripts=masks)
    track = ReplyBuilder(rules.policies, rules.begin, WORDS.piece, WORDS.tokenize)
    writer, events, actions, now_s = Writer(WORDS, source), list[Event](), [*rules.begin.rewinds], 0.0
    stop: Stop | None = None
    while stop is None:
        assert track.n_taken < _MOST
        if asked_at is not None and len(track.tokens) >= asked_at:
            track.conclude()
            asked_at = None
        if steered_at is not None and len(track.tokens) >= steered_at and not track.state.forced:
            steered_at, hint = None, track.steer(Steer(HINT, drop))
            if hint is not None and hint.n_tokens + len(hint.forced) + rules.n_words < (rules.thinking_limit or 0):
                events += track.rewind(hint)
        draw = track.constrain(Sampling(temperature=0))
        if draw.eager is not None and source.random() < 0.05:
            more, rewind = track.rewrite(draw.eager[2])
            events, actions = [*events, *more], [*actions, rewind]
            continue
        now_s += 0.01
        more, action = track.take(writer.draw(draw), now_s)
        events += more
        if isinstance(action, Rewind):
            actions.append(action)
        stop = action if isinstance(action, Stop) else None
        assert rules.thinking_limit is not None
        if track.state.phase == "thinking":
            assert len(track.tokens) <= rules.thinking_limit
        elif len(track.tokens) > n_ctx:
            break
    events += track.flush() if stop is None else ()
    check(track, model, actions, events, stop.drop if stop is not None else 0)


def check(track: ReplyBuilder, model: Thoughts, rewinds: list[Rewind], events: list[Event], n_dropped: int) -> None:
    assert sum(rewind.loop for rewind in rewinds) <= 1
    ends = [rewind for rewind in rewinds if rewind.ends]
    assert len(ends) <= 1
    if model is TAGS:
        assert track.tokens.count(CLOSE) == len(ends)
    elif ends:
        assert WORDS.text(track.tokens).count(HEADING) == 1
    shown, answer = "", ""
    for event in events:
        if isinstance(event, Thinking):
            assert not answer
            shown += event.text
        elif isinstance(event, Answer):
            answer += event.text
        elif isinstance(event, Notice) and event.n_lost:
            assert event.kind in ("rewound", "closed")
            shown = shown[: -event.n_lost]
    place = track.tokens.index(CLOSE) if CLOSE in track.tokens else len(track.tokens)
    parts = [WORDS.text(tokens).lstrip("\n") for tokens in (track.tokens[:place], track.tokens[place:])]
    whole = "".join(parts)
    assert shown + answer == whole[: len(whole) - n_dropped]
    assert model is UNDIVIDED or shown == parts[0][: len(shown + answer)]
    told = [event for event in events if isinstance(event, Notice)]
    assert sum(event.kind == "closed" for event in told) == len([rewind for rewind in ends if rewind.why])
    assert sum("repeated" in event.text or "circles" in event.text for event in told if event.kind == "rewound") == sum(
        rewind.loop for rewind in rewinds
    )


@pytest.mark.parametrize("model", [TAGS, UNDIVIDED])
def test_all_rules_are_there(model: Thoughts) -> None:
    """Only one of the first two can be."""
    rules = rules_of(WORDS, Options(thinking_budget=50, within=3.0), model, loops=True, scripts=(MASKS, None))
    other = "headings" if model is TAGS else "phases"
    assert [policy.name for policy in rules.policies] == [name for name in ORDER if name != other]
