"""A conversation over any model: its messages, and replies that become part of it. Knows no terminal and no process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qwq_lite.events import Done, Event, Reply
from qwq_lite.model import EventStream, Model, Options
from qwq_lite.prompt import Message


class Chat:
    """Messages of one conversation. A reply's thought is not sent back: only its answer becomes a message."""

    def __init__(self, model: Model, system: str | None = None) -> None:
        self._model = model
        self._running: EventStream | None = None
        self._cancelled = False
        self._messages: list[Message] = [{"role": "system", "content": system}] if system else []

    @property
    def messages(self) -> tuple[Message, ...]:
        return tuple(self._messages)

    def stream(self, text: str, **options: Any) -> Iterator[Event]:
        """Events of the reply to `text`, the last one Done. Leaving the iteration cancels.

        Both become part of the conversation when the reply is done; one that was left or failed does not.
        Options as in `model.Options`. Raises: QwqError.
        """
        question: Message = {"role": "user", "content": text}
        self._cancelled = False
        self._running = running = self._model.generate([*self._messages, question], Options(**options))
        if self._cancelled:  # while the prompt was being made
            running.cancel()
        try:
            for event in running:
                if isinstance(event, Done):
                    self._messages += [question, {"role": "assistant", "content": event.reply.answer}]
                yield event
        finally:
            self._running = None

    def cancel(self) -> None:
        """Stop the reply in hand; its events end with Done and the text so far. Any thread may call."""
        self._cancelled = True
        running = self._running
        if running is not None:
            running.cancel()

    def ask(self, text: str, **options: Any) -> Reply:
        """The whole reply to `text`. Options as in `model.Options`. Raises: QwqError."""
        for event in self.stream(text, **options):
            if isinstance(event, Done):
                return event.reply
        raise AssertionError("a stream ends with Done")
