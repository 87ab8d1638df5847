"""Prompts, read once: what is a text, what messages and what tokens."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from qwq_lite.errors import UsageError
from qwq_lite.prompt.question import Question, read_question

USER: dict[str, Any] = {"role": "user", "content": "How many?"}
REPLY: dict[str, Any] = {"role": "assistant", "content": "Three."}
SYSTEM: dict[str, Any] = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("", Question("text", "")),
        ("So", Question("text", "So")),
        ((USER,), Question("messages", [USER])),
        ([SYSTEM, USER], Question("messages", [SYSTEM, USER])),
        ([], Question("tokens", [])),
        (np.arange(3), Question("tokens", [0, 1, 2])),
        ([True, 2], Question("tokens", [True, 2])),  # the vocabulary refuses it by name
    ],
)
def test_a_prompt_is_a_text_messages_or_tokens(prompt: Any, question: Question) -> None:
    found = read_question(prompt)
    assert found == question
    assert found.is_templated == (question.kind == "messages")
    assert read_question(json.loads(json.dumps(found.prompt))) == found


@pytest.mark.parametrize("prompt", [[1, "x"], [USER, 3], [{"content": "Hi"}], [{"role": 1}], [None], [1.5]])
def test_what_is_no_message_is_named(prompt: Any) -> None:
    with pytest.raises(UsageError, match=r"a message is .*; a dict with a role and a content is expected"):
        read_question(prompt)


@pytest.mark.parametrize(
    ("prompt", "is_first", "system"),
    [
        ("So", True, ""),
        ([1, 2], True, ""),
        ([USER], True, ""),
        ([SYSTEM, USER], True, "Be brief."),
        ([SYSTEM, USER, REPLY, USER], False, "Be brief."),
        ([USER, SYSTEM], True, ""),  # it is the first message, or none
        ([{"role": "system", "content": None}, USER], True, ""),
    ],
)
def test_what_precedes_a_question(prompt: Any, is_first: bool, system: str) -> None:
    question = read_question(prompt)
    assert (question.is_first, question.system) == (is_first, system)


def test_a_long_history_is_read_only_when_it_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def asks(text: str) -> bool:
        asked.append(text)
        return False

    monkeypatch.setattr("qwq_lite.prompt.question.asks_for_repetition", asks)
    question = read_question([SYSTEM, USER, REPLY, USER])
    assert asked == []
    assert not question.may_repeat
    assert not question.may_repeat
    assert asked == ["Be brief.", "How many?", "How many?"]
