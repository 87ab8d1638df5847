"""A conversation over any model: its messages, and replies that become part of it. Knows no terminal and no process."""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Any, Protocol

from qwq_lite.errors import FormatError, UsageError
from qwq_lite.events import Done, Event, Reply
from qwq_lite.model import Engine
from qwq_lite.prompt import Message
from qwq_lite.stream import Stream

_SESSIONS = itertools.count(1)


class Chat:
    """Messages of one conversation. A reply's thought is not sent back: only its answer becomes a message.

    What the model computed for it stays in the cache while there is room, so the next turn prefills only what is new. One
    reply at a time: asking again before it has ended queues behind it.
    """

    def __init__(self, model: Engine, system: str | None = None, *, messages: tuple[Message, ...] = ()) -> None:
        self._model = model
        self._session = next(_SESSIONS)
        self._messages: list[Message] = [{"role": "system", "content": system}] if system else list(messages)
        self._n_left_out = 0  # messages after the system prompt that no longer fit; they go on not being sent
        self._running: Stream | None = None
        self._cancelled = False
        weakref.finalize(self, model.release_session, self._session).atexit = False

    @property
    def messages(self) -> tuple[Message, ...]:
        """All of them, those that no longer fit the context too."""
        return tuple(self._messages)

    def stream(self, text: str, **options: Any) -> Iterator[Event]:
        """Events of the reply to `text`, the last one Done. Leaving the iteration cancels.

        Both become part of the conversation when the reply is done; one that was left or failed does not.
        Options as in `model.Options`. Raises: QwqError.
        """
        question: Message = {"role": "user", "content": text}
        self._cancelled = False
        running = self._begun(self._model.generate(self._sent(question), session=self._session, **options))
        try:
            for event in running:
                self._keep(question, event)
                yield event
        finally:
            self._running = None

    async def astream(self, text: str, **options: Any) -> AsyncIterator[Event]:
        """As `stream`, for `async for`; a task that is cancelled cancels the reply."""
        question: Message = {"role": "user", "content": text}
        self._cancelled = False
        running = self._begun(await self._model.agenerate(self._sent(question), session=self._session, **options))
        try:
            async for event in running:
                self._keep(question, event)
                yield event
        finally:
            self._running = None
            if not running.finished:  # an asynchronous generator that is left ends only when the loop gets to it
                running.cancel()

    def ask(self, text: str, **options: Any) -> Reply:
        """The whole reply to `text`. Options as in `model.Options`. Raises: QwqError."""
        for event in self.stream(text, **options):
            if isinstance(event, Done):
                return event.reply
        raise AssertionError("a stream ends with Done")

    async def aask(self, text: str, **options: Any) -> Reply:
        """As `ask`, without holding up the event loop."""
        async for event in self.astream(text, **options):
            if isinstance(event, Done):
                return event.reply
        raise AssertionError("a stream ends with Done")

    def retry(self, **options: Any) -> Iterator[Event]:
        """Another reply to the last question, in place of the one that is there. Decodes nothing of the prompt again.

        Raises: UsageError when nothing was asked yet; QwqError. After an error the first reply stands.
        """
        if len(self._messages) < 2 or self._messages[-1]["role"] != "assistant":
            raise UsageError("there is no reply to retry; ask something first")
        before = self._messages
        self._messages = before[:-2]
        done = False
        try:
            for event in self.stream(before[-2]["content"], **options):
                done = done or isinstance(event, Done)
                yield event
        finally:
            if not done:
                self._messages = before

    def fork(self) -> Chat:
        """A second conversation with the same past. Nothing is computed again: the past is shared in the cache."""
        twin = Chat(self._model, messages=self.messages)
        twin._n_left_out = self._n_left_out
        self._model.fork_session(self._session, twin._session)
        return twin

    def cancel(self) -> None:
        """Stop the reply in hand; its events end with Done and the text so far. Any thread may call."""
        self._cancelled = True
        running = self._running
        if running is not None:
            running.cancel()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write messages and what is cached of them to a file that only its owner may read.

        Raises: OutputError; UsageError for messages that are not JSON.
        """
        self._model.save_session(self._session, path, {"messages": self._messages, "n_left_out": self._n_left_out})

    @classmethod
    def restore(cls, model: Engine, path: str | os.PathLike[str]) -> Chat:
        """The conversation that `save` wrote, by the same model, ready to go on without prefilling its past.

        Raises: FormatError for a damaged file or another model's.
        """
        chat = cls(model)
        extra = model.restore_session(chat._session, path)
        try:
            chat._messages = [dict(message) for message in extra["messages"]]
            chat._n_left_out = int(extra["n_left_out"])
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{os.fspath(path)}: holds no conversation: {error!r}") from error
        return chat

    def _sent(self, question: Message) -> list[Message]:
        lead = 1 if self._messages and self._messages[0]["role"] == "system" else 0
        return [*self._messages[:lead], *self._messages[lead + self._n_left_out :], question]

    def _begun(self, running: Stream) -> Stream:
        self._running = running
        if self._cancelled:  # while the prompt was being made
            running.cancel()
        return running

    def _keep(self, question: Message, event: Event) -> None:
        if isinstance(event, Done):
            self._n_left_out += event.reply.stats.n_dropped
            self._messages += [question, {"role": "assistant", "content": event.reply.answer}]


class Model(Engine, Protocol):
    """A loaded model. As a context manager it is unloaded at the end."""

    n_ctx: int

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unload()

    def chat(self, system: str | None = None) -> Chat:
        """A conversation, empty but for the system prompt."""
        return Chat(self, system)

    def ask(self, text: str, system: str | None = None, **options: Any) -> Reply:
        """One answer to one question. Options as in `model.Options`."""
        return self.chat(system).ask(text, **options)

    async def aask(self, text: str, system: str | None = None, **options: Any) -> Reply:
        """As `ask`, without holding up the event loop."""
        return await self.chat(system).aask(text, **options)
