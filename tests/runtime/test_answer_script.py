"""The letters of an answer, with the demo model: what is masked is drawn again, and what was not asked for is not masked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qwq_lite
from qwq_lite import scripts
from qwq_lite.chat import Model
from qwq_lite.events import Done, Reply

CHINESE = "从前有一座山，山上有一座庙，庙里有一个老和尚，老和尚对小和尚说：从前有一座山，"


@pytest.fixture(scope="module", params=[False, True], ids=["here", "worker"])
def model(request: pytest.FixtureRequest, demo_gguf: Path) -> Iterator[Model]:
    with qwq_lite.load(demo_gguf, n_ctx=1024, isolated=request.param) as loaded:
        yield loaded


def continued(model: Model, **options: Any) -> Reply:
    """How the model goes on with a Chinese text, in Chinese if it may."""
    *_, done = model.generate(CHINESE, max_tokens=60, **options)
    assert isinstance(done, Done)
    return done.reply


def is_free(text: str) -> bool:
    return scripts.characters(frozenset({"han"})).search(text) is None


def test_an_answer_in_latin_letters_has_no_other(model: Model) -> None:
    free, kept = continued(model, seed=1, answer_script="any"), continued(model, seed=1, answer_script="latin")
    assert not is_free(free.answer)
    assert free.stats.n_refused == 0
    assert kept.answer.strip()
    assert is_free(kept.answer)
    assert kept.stats.n_refused > 0


def test_a_draw_in_another_ones_place_is_a_function_of_the_seed(model: Model) -> None:
    first, second, other = (continued(model, seed=seed, answer_script="latin").answer for seed in (7, 7, 8))
    assert first == second != other


def test_a_text_in_another_script_is_masked_by_nobody(model: Model) -> None:
    assert not is_free(continued(model, seed=1).answer)
