"""The letters of an answer, by an engine: what is masked is drawn again, and what was asked for is not masked.

The model draws evenly from letters and the two halves of a Chinese character: that one half is drawn in 300 tokens is as good as
certain, and so is the whole character where nothing is masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qwq_lite
from qwq_lite.chat.model import Model
from qwq_lite.events import Done, Reply
from qwq_lite.text import unicode_scripts
from tests.checkpoints import LETTERS, TOKENS, in_f16, write_scripted_checkpoint

CHINESE = "从前有一座山，山上有一座庙，庙里有一个老和尚，老和尚对小和尚说：从前有一座山，"
HALVES = (TOKENS.index("ä½"), 0xA0)  # the first two bytes of a character, and the third


@pytest.fixture(scope="module")
def mixed_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    row = dict.fromkeys([*LETTERS[:6], *HALVES], 0.0)
    return in_f16(write_scripted_checkpoint(tmp_path_factory.mktemp("mixed") / "Mixed", lambda _: row))


@pytest.fixture(scope="module", params=[False, True], ids=["here", "worker"])
def model(request: pytest.FixtureRequest, mixed_gguf: Path) -> Iterator[Model]:
    with qwq_lite.load(mixed_gguf, n_ctx=1024, isolated=request.param) as loaded:
        yield loaded


def continued(model: Model, **options: Any) -> Reply:
    """How the model goes on with a Chinese text."""
    *_, done = model.generate(CHINESE, max_tokens=300, **options)
    assert isinstance(done, Done)
    return done.reply


def is_free(text: str) -> bool:
    return unicode_scripts.characters(frozenset({"han"})).search(text) is None


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


LETTER = unicode_scripts.characters(unicode_scripts.MASKABLE)
in_worker = pytest.mark.parametrize("model", [True], ids=["worker"], indirect=True)  # to it and in it is the whole way


def answered(model: Model, prompt: Any, **options: Any) -> Reply:
    *_, done = model.generate(prompt, max_tokens=300, seed=3, **options)
    assert isinstance(done, Done)
    return done.reply


def asked(*texts: str) -> list[dict[str, str]]:
    """A conversation, the user's word first."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def tools(description: str) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "find", "description": description}}]}


PLAIN: dict[str, tuple[Any, dict[str, Any]]] = {
    "messages": (asked("How many?"), {}),
    "auto": (asked("How many?"), {"answer_script": "auto"}),
    "text": ("How many?", {}),
    "earlier words of the model": (asked("How many?", "The Chinese word for it is a translation.", "And now?"), {}),
    "tools": (asked("How many?"), tools("Find a number.")),
}
CALLING: dict[str, tuple[Any, dict[str, Any]]] = {
    "any": (asked("How many?"), {"answer_script": "any"}),
    "a language": (asked("Reply in Chinese and English."), {}),
    "text": ("Reply in Chinese and English.", {}),
    "earlier words of the user": (asked("In Chinese?", "No.", "And now?"), {}),
    "tools": (asked("How many?"), tools("Translate a number.")),
    "tokens": ([40, 41], {}),
}


@in_worker
@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_question_is_answered_in_latin_letters(model: Model, name: str) -> None:
    prompt, options = PLAIN[name]
    reply = answered(model, prompt, **options)
    assert not LETTER.search(reply.answer)
    assert reply.stats.n_refused > 0


@in_worker
@pytest.mark.parametrize("name", CALLING)
def test_where_other_letters_are_called_for_nothing_is_refused(model: Model, name: str) -> None:
    prompt, options = CALLING[name]
    assert answered(model, prompt, **options).stats.n_refused == 0


@in_worker
@pytest.mark.parametrize(
    ("options", "is_masked"),
    [
        ({}, False),
        ({"answer_script": "latin"}, False),
        ({"answer_script": "any", "think_script": "latin"}, True),
        ({"think_script": "auto"}, True),
    ],
)
def test_the_thought_is_free_unless_its_script_is_given(model: Model, options: dict[str, Any], is_masked: bool) -> None:
    """Of a model that announces no answer all is thought while it comes."""
    reply = answered(model, asked("How many?"), thought_style="undivided", **options)
    assert reply.stats.n_generated > 0
    assert (reply.stats.n_refused > 0) == is_masked
