"""deadline: the answer is there in time, and an answer that is late ends at its next sentence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwq_lite.chat.options import Options
from qwq_lite.engine import reply_rules
from qwq_lite.engine.reply_rules import Thoughts
from qwq_lite.reply.policies.deadline import fit_cost
from qwq_lite.reply.policy import Stop
from tests.thoughts import (
    MODELS,
    PLAIN,
    TAGS,
    TEXTS,
    UNDIVIDED,
    Words,
    answer_of,
    endless,
    ends_well,
    rules_of,
    run,
    sentence,
)

COSTS = {"constant": (0.1, 0.0), "growing": (0.1, 0.3 / 4096), "steep": (0.02, 0.0005)}


@pytest.mark.parametrize("how", COSTS)
@settings(max_examples=12)
@given(text=TEXTS, longer=st.floats(1, 3), model=MODELS)
@example(text="so ", longer=1.5, model=TAGS)
@example(text=PLAIN, longer=2, model=UNDIVIDED)
def test_a_thought_ends_in_time_for_the_answer(how: str, text: str, longer: float, model: Thoughts) -> None:
    """Where there is time for 160 tokens of it, what the answer is expected to take is left, forced words and all."""
    base, slope = COSTS[how]
    words, n_prompt = Words(), 50

    def seconds(n: int) -> float:
        return base + slope * (n_prompt + n)

    n_answer = reply_rules._ANSWER_TOKENS[model.style]
    within = longer * sum(map(seconds, range(160 + n_answer)))
    rules = rules_of(words, Options(within=within), model, n_prompt=n_prompt)
    answer = words.tokenize(sentence(n_answer - 3, ".", "so"))
    assert len(answer) == n_answer - 1  # and an end token
    found = run(words, rules, endless(words, text, 4000), iter(answer), cost=seconds, n_most=9000)
    assert found.track.thought_end == "deadline"
    assert found.stop == Stop("stop", mute=True)
    assert found.end_s <= within + 3 * seconds(found.track.n_taken)  # of several hundred tokens
    assert within - found.end_s <= 110 * seconds(found.track.n_taken)


@pytest.mark.parametrize("within", [1e-9, 1.0])
@settings(max_examples=40)
@given(text=TEXTS, model=MODELS, answer=TEXTS)
@example(text="so ", model=TAGS, answer="so ")
@example(text="so ", model=UNDIVIDED, answer=PLAIN)
@example(text="so ", model=TAGS, answer=" So. ")
@example(text="so ", model=UNDIVIDED, answer="\nSo. ")
@example(text="so ", model=TAGS, answer="\n\n So. ")
def test_an_answer_begins_even_after_the_deadline_and_ends_at_its_next_sentence(
    within: float, text: str, model: Thoughts, answer: str
) -> None:
    words = Words()
    rules = rules_of(words, Options(within=within), model)
    found = run(words, rules, endless(words, text), endless(words, answer), cost=lambda n: 1.0, n_most=500)
    assert (found.track.state.phase, found.track.thought_end) == ("answer", "deadline")
    assert found.stop is not None
    assert found.stop.reason == "deadline"
    shown, after = answer_of(words, found)
    assert shown.strip()
    assert 1 <= found.n_answer <= 97
    if found.n_answer < 90:
        assert ends_well(shown.rstrip(), shown[len(shown.rstrip()) :] + after)


@given(
    st.floats(0.01, 1),
    st.floats(0, 0.001),
    st.integers(64, 128),
    st.lists(st.floats(0, 0.1), min_size=128, max_size=128),
)
def test_the_cost_is_a_known_line_and_what_nine_of_ten_stay_below(
    base: float, slope: float, n: int, noise: list[float]
) -> None:
    line = tuple((100 + i, base + slope * (100 + i)) for i in range(n))
    assert fit_cost(line) == pytest.approx((base, slope), rel=1e-4, abs=1e-7)
    samples = tuple((fill, seconds + more) for (fill, seconds), more in zip(line, noise, strict=False))
    fills, times = np.array(samples).T
    expected = max(0.0, float(np.polyfit(fills, times, 1)[0]))
    cost = fit_cost(samples)
    assert cost.slope == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert cost.base == pytest.approx(np.sort(times - cost.slope * fills)[int(0.9 * n)], abs=1e-9)
    below = sum(seconds <= cost.base + cost.slope * fill + 1e-12 for fill, seconds in samples)
    assert below >= 0.9 * n


@pytest.mark.parametrize("n", [8, 16, 63])
def test_few_tokens_give_no_slope(n: int) -> None:
    assert fit_cost(tuple((i, 1.0 + i) for i in range(n))) == (1.0 + int(0.9 * n), 0.0)
