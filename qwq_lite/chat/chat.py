"""A conversation over any model: its messages, and replies that become part of it. Knows no terminal and no process."""

from __future__ import annotations

import contextlib
import itertools
import os
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from qwq_lite.chat.engine import Engine
from qwq_lite.errors import FormatError, UsageError
from qwq_lite.events import Done, Event, Reply
from qwq_lite.prompt.chat_template import Message
from qwq_lite.prompt.history import History, n_leading
from qwq_lite.reply.commands import Drop, Steer
from qwq_lite.reply.stream import Stream

_SESSIONS = itertools.count(1)


class Chat:
    """Messages of one conversation. A reply's thought is not sent back: only its answer becomes a message. Of a model that
    marks no thought the whole reply does, or its answer by choice (`history`).

    What the model computed for it stays in the cache while there is room, so the next turn prefills only what is new. One
    reply at a time: another question cancels the reply in hand, which then is no part of the conversation.
    """

    def __init__(self, model: Engine, system: str | None = None, *, messages: Sequence[Message] = ()) -> None:
        """system: the system prompt; None leaves it to the model's template, "" asks for none, not the template's own either."""
        self._model = model
        self._session = ("chat", next(_SESSIONS))
        self._messages: list[Message] = [
            *([{"role": "system", "content": system}] if system is not None else []),
            *messages,
        ]
        self._n_left_out = 0  # messages after the system prompt that no longer fit; they go on not being sent
        self._asked: tuple[list[Message], str] | None = None  # what the last question followed, and the question
        self._running: Callable[[], Stream | None] = lambda: None  # weakly, so that a stream that is dropped is left
        # While the prompt of a question is being made: what is asked of its reply meanwhile.
        self._beginning: deque[Callable[[Stream], None]] | None = None
        weakref.finalize(self, model.release_session, self._session).atexit = False

    @property
    def messages(self) -> tuple[Message, ...]:
        """All of them, those that no longer fit the context too."""
        return tuple(self._messages)

    def stream(self, text: str, **options: Any) -> Stream:
        """Events of the reply to `text`, the last one Done. It begins at once; leaving the iteration cancels it.

        Question and answer become part of the conversation when Done is read: not of one that was left, that failed, or
        that was cancelled before its answer began.
        Options as in `chat.options.Options`. Raises: QwqError, here or while it is iterated.
        """
        return self._reply(self._messages, text, options)

    async def astream(self, text: str, **options: Any) -> AsyncIterator[Event]:
        """As `stream`, for `async for`; a task that is cancelled cancels the reply."""
        past = list(self._messages)
        with self._begin(text) as beginning:
            made = await self._model.agenerate(self._sent(past, text), session=self._session, **options)
        running = self._begun(beginning, made, past, text, options.get("history"))
        try:
            async for event in running:
                yield event
        finally:  # an asynchronous iterator that is left ends late: this is sooner
            if not running.finished:
                running.cancel()

    def ask(self, text: str, **options: Any) -> Reply:
        """The whole reply to `text`. Options as in `chat.options.Options`. Raises: QwqError."""
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

    def retry(self, **options: Any) -> Stream:
        """Another reply to the last question, in the place of one that is there. Decodes nothing of the prompt again.

        The question that was asked last, also where its reply was left. The old reply stands until the new one is done, and
        stays when that is cancelled.
        Raises: UsageError when nothing was asked yet; QwqError.
        """
        if self._asked is None:
            raise UsageError("there is no question to retry; ask something first")
        return self._reply(*self._asked, options)

    def fork(self) -> Chat:
        """A second conversation with the same past. Nothing is computed again: the past is shared in the cache."""
        twin = Chat(self._model, messages=self._messages)
        twin._n_left_out, twin._asked = self._n_left_out, self._asked
        self._model.fork_session(self._session, twin._session)
        return twin

    def cancel(self) -> None:
        """Stop the reply in hand; its events end with Done and the text so far. Any thread may call, a signal handler too."""
        self._beginning = None
        running = self._running()
        if running is not None:
            running.cancel()

    def conclude(self) -> bool:
        """Answer now: the thought in hand ends soon, as `Stream.conclude` says. Any thread may call, a signal handler too.

        False where no reply is being made.
        """
        return self._order(Stream.conclude)

    def steer(self, hint: str, drop: Drop | None = None) -> bool:
        """Give the thought in hand a hint in the model's own voice, in place of its last "paragraph" or "sentence".

        As `Stream.steer`; any thread may call, and it waits for nothing. False where no reply is being made.
        Raises: UsageError for an empty hint, or another drop.
        """
        Steer(hint, drop)  # refused here
        return self._order(lambda stream: stream.steer(hint, drop))

    def _order(self, give: Callable[[Stream], None]) -> bool:
        early = self._beginning  # before the running one is looked at: that is set first
        if early is not None:
            early.append(give)
            if self._beginning is early:
                return True
        running = self._running()
        if running is None or running.finished:
            return False
        _hand_over(early if early is not None else deque([give]), running)
        return True

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write messages and what is cached of them to a file that only its owner may read.

        Raises: OutputError; UsageError for messages that are not JSON; EngineError.
        """
        self._model.save_session(self._session, path, {"messages": self._messages, "n_left_out": self._n_left_out})

    @classmethod
    def restore(cls, model: Engine, path: str | os.PathLike[str]) -> Chat:
        """The conversation that `save` wrote, by the same model, ready to go on without prefilling its past.

        The file is checked against damage, not against malice: restore only what you saved.
        Raises: FormatError for a damaged file or another model's; EngineError.
        """
        chat = cls(model)
        extra = model.restore_session(chat._session, path)
        try:
            chat._messages = [dict(message) for message in extra["messages"]]
            chat._n_left_out = int(extra["n_left_out"])
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{os.fspath(path)}: holds no conversation: {error!r}") from error
        last = next((i for i in reversed(range(len(chat._messages))) if chat._messages[i].get("role") == "user"), None)
        if last is not None:
            chat._asked = chat._messages[:last], chat._messages[last]["content"]
        return chat

    def _reply(self, past: list[Message], text: str, options: dict[str, Any]) -> Stream:
        past = list(past)
        with self._begin(text) as beginning:
            made = self._model.generate(self._sent(past, text), session=self._session, **options)
        return self._begun(beginning, made, past, text, options.get("history"))

    @contextlib.contextmanager
    def _begin(self, text: str) -> Iterator[deque[Callable[[Stream], None]]]:
        """While the prompt of a question is being made."""
        if not isinstance(text, str):
            raise UsageError(f"the question is {text!r}, a text is expected; for messages there is Model.generate")
        self.cancel()
        beginning: deque[Callable[[Stream], None]] = deque()
        self._beginning = beginning
        try:
            yield beginning
        except BaseException:
            if self._beginning is beginning:
                self._beginning = None
            raise

    def _begun(
        self,
        beginning: deque[Callable[[Stream], None]],
        running: Stream,
        past: list[Message],
        text: str,
        history: History | None,
    ) -> Stream:
        self._running = latest = weakref.ref(running)
        self._asked = past, text
        if self._beginning is beginning:
            self._beginning = None
            _hand_over(beginning, running)
        else:  # cancelled while the prompt was being made
            running.cancel()

        def seen(event: Event) -> None:
            if isinstance(event, Done) and self._running is latest:
                self._keep(past, text, event.reply, history)

        return running.watch(seen)

    def _sent(self, past: list[Message], text: str) -> list[Message]:
        lead = n_leading(past)
        return [*past[:lead], *past[lead + self._n_left_out :], {"role": "user", "content": text}]

    def _keep(self, past: list[Message], text: str, reply: Reply, history: History | None) -> None:
        if reply.finish_reason == "cancelled" and (not reply.answer or len(self._messages) > len(past)):
            return
        self._n_left_out += reply.stats.n_dropped
        whole = reply.undivided and history != "answer"
        self._messages = [
            *past,
            {"role": "user", "content": text},
            {"role": "assistant", "content": reply.thinking + reply.answer if whole else reply.answer},
        ]


def _hand_over(orders: deque[Callable[[Stream], None]], running: Stream) -> None:
    """Each once, whoever else does the same at this time."""
    with contextlib.suppress(IndexError):
        while True:
            orders.popleft()(running)
