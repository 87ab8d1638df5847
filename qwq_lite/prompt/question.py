"""A prompt as it was given, read once: a text, messages or tokens, and what is asked in them. Pure; knows no model.

What a long conversation would have to be searched for is found when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from qwq_lite import arguments
from qwq_lite.errors import UsageError
from qwq_lite.prompt.chat_template import Message
from qwq_lite.prompt.repetition_intent import asks_for_repetition
from qwq_lite.text import final_answer, unicode_scripts
from qwq_lite.text.fences import outside_code

Prompt = Sequence[Message] | str | Sequence[int]


@dataclass(frozen=True)
class Question:
    """A prompt that was read. Made by `read_question`."""

    kind: Literal["text", "messages", "tokens"]
    prompt: str | list[Any]  # the text, a list of messages, or a list of token ids that are Python's own: plain JSON

    @property
    def is_templated(self) -> bool:
        """Whether the model's chat template makes its tokens."""
        return self.kind == "messages"

    @property
    def messages(self) -> list[Message]:
        """Empty for a text and for tokens."""
        return self.prompt if isinstance(self.prompt, list) and self.kind == "messages" else []

    @property
    def system(self) -> str:
        """The system prompt that messages begin with; empty where it is no text, or there is none."""
        first: Message = next(iter(self.messages), {})
        text = first.get("content") if first.get("role") == "system" else None
        return text if isinstance(text, str) else ""

    @property
    def is_first(self) -> bool:
        """Whether no reply of the model precedes it."""
        return all(message.get("role") != "assistant" for message in self.messages)

    @cached_property
    def text(self) -> str:
        """The user's last words; empty for tokens."""
        if isinstance(self.prompt, str):
            return self.prompt
        last = next((message for message in reversed(self.messages) if message.get("role") == "user"), None)
        return "\n".join([] if last is None else _texts(last.get("content")))

    @cached_property
    def may_repeat(self) -> bool:
        """Whether a right answer may say the same again and again; of tokens that cannot be known, and it may.

        It is read from all that the user and the system prompt say: "Continue." asks for what was asked before.
        """
        if isinstance(self.prompt, str):
            return asks_for_repetition(self.prompt)
        if self.kind == "tokens":
            return bool(self.prompt)
        said = (message for message in self.messages if message.get("role") in ("user", "system"))
        return any(asks_for_repetition(text) for message in said for text in _texts(message.get("content")))

    def list_texts(self, *, tag: str | None) -> list[str] | None:
        """What was written in it, files in its messages and what tools answered among it; None for one of tokens.

        Of the model's earlier replies only letters count, those of scripts that can be masked, in the answer and outside
        fenced code: thoughts mix languages on their own, and code was let alone.

        Args:
            tag: what ends a thought in their text; None for a model that marks none: then there may be no telling where the
                answer began, and nothing counts.
        """
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.kind == "tokens" and self.prompt:
            return None
        texts: list[str] = []
        for message in self.messages:
            if message.get("role") == "assistant":
                texts += filter(None, (_letters(text, tag) for text in flatten_texts(message.get("content"))))
            else:
                texts += flatten_texts(message)
        return texts


def read_question(prompt: Prompt) -> Question:
    """The question of a prompt, with numbers that are Python's own, of whatever library they were.

    Raises: UsageError for what is no text, no messages and no tokens. Whether the vocabulary has a token is not known here.
    """
    if isinstance(prompt, str):
        return Question("text", prompt)
    if not isinstance(prompt, Iterable) or isinstance(prompt, bytes | bytearray | Mapping | Set):
        raise UsageError(f"the prompt is {prompt!r}; a text, messages or tokens are expected")
    parts: list[Any] = list(prompt)
    if all(map(arguments.is_whole, parts)):
        return Question("tokens", [int(part) for part in parts])
    if all(isinstance(part, int) for part in parts):  # True among them; who knows the vocabulary refuses it
        return Question("tokens", parts)
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("role"), str):
            raise UsageError(f"a message is {part!r}; a dict with a role and a content is expected")
    return Question("messages", parts)


def check_text(text: str) -> None:
    """Raises: UsageError for what is no text."""
    if not isinstance(text, str):
        raise UsageError(f"the text is {text!r}; a text is expected")


def flatten_texts(value: Any) -> Iterable[str]:
    """Every text in messages or tools, however they are nested, but for the keys and the role."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key != "role":
                yield from flatten_texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from flatten_texts(item)


def _texts(content: Any) -> list[str]:
    """What a message says; of one in parts, the texts of its parts."""
    parts = content if isinstance(content, list | tuple) else [content]
    texts = (part.get("text", part) if isinstance(part, Mapping) else part for part in parts)
    return [*flatten_texts([*texts])]


def _letters(reply: str, tag: str | None) -> str:
    """Letters that can be masked, of a reply's answer."""
    if tag is not None:
        answer = reply.rpartition(tag)[2]
    else:
        start = final_answer.final_start(reply)
        answer = "" if start is None else reply[start:]
    letters = unicode_scripts.characters(unicode_scripts.MASKABLE)
    return "".join("".join(letters.findall(line)) for line in outside_code(answer))
