"""The engine's thread: one model, one context, replies on its sequences. It decodes and samples, and decides nothing.

The policies decide what a token means (`reply.fold`, `reply.builder`). Everything that touches llama.cpp happens on this thread;
callers hand over requests and read events, and any thread may cancel.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

from qwq_lite.backend.context import Aborted, Context
from qwq_lite.backend.model import LoadedModel
from qwq_lite.backend.sampler import Sampler
from qwq_lite.engine.next_token import draw
from qwq_lite.engine.request import ActiveReply, Request
from qwq_lite.engine.sequences import Part, Sequences
from qwq_lite.errors import ContextFull, EngineClosed, EngineError, QwqError, UsageError
from qwq_lite.events import Done, FinishReason, Notice, Progress, Reply, Stats
from qwq_lite.reply.policy import Rewind, Rewrite
from qwq_lite.reply.retokenize import Tokenize
from qwq_lite.reply.stream import Feed, Stream

PREFILL_CHUNK = 128  # tokens of a decode call in prefill: progress is shown, and a GPU can be cancelled, between two
_PAUSE_S = 0.05  # between two looks whether a reader that is far behind has read on
N_ACTIVE = 1  # replies decoded together; more share each read of the weights, and then bits depend on who is beside

T = TypeVar("T")


class Scheduler:
    """Owns model and context from `start` on; `close` frees both and ends the thread.

    remark: asked after each reply for a word to its reader. tokenize: ids of a text, nothing added; default as llama.cpp does it.
    """

    def __init__(
        self,
        model: LoadedModel,
        context: Context,
        *,
        prefill_chunk: int = PREFILL_CHUNK,
        n_active: int = N_ACTIVE,
        remark: Callable[[Stats], Notice | None] = lambda _: None,
        tokenize: Tokenize | None = None,
    ) -> None:
        self._model, self._context, self._n_ctx = model, context, context.n_ctx
        self._prefill_chunk, self._n_active = min(prefill_chunk, context.n_batch), n_active
        self._remark = remark
        self._tokenize = tokenize or functools.partial(model.vocab.tokenize, parse_special=False)
        self._sequences = Sequences(context)
        self._sampler = Sampler(model.vocab.n_tokens)
        self._inbox: queue.SimpleQueue[_Waiting | _Job | None] = queue.SimpleQueue()
        self._waiting: deque[_Waiting] = deque()
        self._active: list[ActiveReply] = []
        self._sending = threading.Lock()  # what is put into the inbox comes before the None that ends it
        self._closed = False
        self._failure: QwqError | None = None
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._work, name="qwq-lite engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Stream:
        """Queue a request. Raises: UsageError for an empty prompt; ContextFull for one that does not fit; EngineClosed."""
        if not request.prompt:
            raise UsageError("the prompt is empty")
        if len(request.prompt) >= self._n_ctx:
            raise ContextFull(
                f"the prompt has {len(request.prompt)} tokens, the context {self._n_ctx};"
                " shorten it, start a new chat, or choose a larger n_ctx (--ctx)"
            )
        feed = Feed(self._interrupt)
        if request.course is not None:
            feed.done, feed.n_seen = deque(), request.course.n_seen
        self._send(_Waiting(feed, request))
        return Stream(feed)

    def call(self, job: Callable[[Sequences], T]) -> T:
        """Run a job on the engine's thread, between two tokens, and return what it returns. Raises what it raises."""
        future: Future[T] = Future()
        self._send(_Job(job, future))
        return future.result()

    def release(self, session: Hashable) -> None:
        """The session is over; its sequence may be overwritten. Any thread, a finalizer's too: it waits for nothing."""
        self._inbox.put(_Job(lambda sequences: sequences.release(session), Future()))

    def close(self, wait: bool = True) -> None:
        """Cancel what runs, free context and model, end the thread. Without `wait` that is left to the thread."""
        with self._sending:
            closed, self._closed = self._closed, True
        if not closed:
            self._context.abort(True)
            self._inbox.put(None)
        if wait:
            self._thread.join()

    def _send(self, item: _Waiting | _Job) -> None:
        if os.getpid() != self._process:
            raise EngineError("the model was loaded in another process, of which this one is a copy; load it here")
        with self._sending:
            if self._closed or self._failure:
                raise self._failure or EngineClosed("the model is unloaded; load it again")
            self._inbox.put(item)

    def _interrupt(self, feed: Feed) -> None:
        # Without a lock, for a signal handler may come through here: an abort that hits another reply is only repeated work.
        if any(reply.feed is feed for reply in self._active):
            self._context.abort(True)
        else:  # it waits, and so may the engine, in the midst of another reply
            self._inbox.put(_Job(lambda _sequences: None, Future()))

    def _work(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # a defect, or no memory: nobody may wait for ever
            self._failure = EngineError(
                f"the engine has ended by {type(error).__name__}: {error}; load the model again"
            )
            self._refuse(*[reply.feed for reply in self._active], *[item.feed for item in self._waiting])
            while (item := self._inbox.get()) is not None:  # the model is freed when its owner says so
                self._refuse(item)
        self._sampler.close()
        self._context.close()
        self._model.close()

    def _serve(self) -> None:
        while self._receive():
            for item in [item for item in self._waiting if item.feed.cancelled and not item.is_begun]:
                self._waiting.remove(item)
                item.feed.put(Done(Reply("", "", "cancelled", Stats(n_prompt=len(item.request.prompt)))))
            while self._waiting and len(self._active) < self._n_active:
                self._admit(self._waiting.popleft())
            self._round()
        for reply in list(self._active):
            self._finish(reply, "cancelled")
        for item in self._waiting:
            item.feed.put(EngineClosed("the model was unloaded before the request began"))

    def _refuse(self, *items: Feed | _Waiting | _Job) -> None:
        error = self._failure or EngineClosed("the model was unloaded")
        for item in items:
            if isinstance(item, _Job):
                item.future.set_exception(error)
            else:
                (item.feed if isinstance(item, _Waiting) else item).put(error)

    def _receive(self) -> bool:
        """Take in what was sent, waiting for it only when there is nothing to do. False once the model is closed."""
        while True:
            paused = bool(self._active) and all(reply.feed.full for reply in self._active)
            if self._inbox.empty() and (self._waiting or self._active) and not paused:
                return True
            try:
                item = self._inbox.get(timeout=_PAUSE_S if paused else None)
            except queue.Empty:
                return True
            if item is None:
                return False
            if isinstance(item, _Waiting):
                self._waiting.append(item)
            else:
                item.run(self._sequences)

    def _admit(self, item: _Waiting) -> None:
        feed, request = item
        try:
            sequence = self._sequences.place(request.session, request.prompt, request.alone)
        except QwqError as error:
            feed.put(error)
            return
        except Exception as error:
            feed.put(_unexpected(error))
            return
        reply = ActiveReply(feed, request, sequence, self._model.vocab.piece, self._tokenize)
        self._active.append(reply)
        for notice in request.notices:
            feed.put(notice)
        if request.n_dropped:
            feed.put(
                Notice(
                    f"the oldest {request.n_dropped} messages no longer fit the context of {self._n_ctx} tokens and were"
                    " left out; a larger n_ctx (--ctx) keeps more",
                    "left-out",
                )
            )
        feed.put(Progress("prefill", reply.n_reused, len(request.prompt)))
        if item.is_begun:
            self._guarded(self._catch_up, [reply])

    def _catch_up(self, replies: list[ActiveReply]) -> None:
        """Go on where another engine ended: its tokens are decoded once the prompt is."""
        (reply,) = replies
        reason = reply.catch_up()
        if reason is None and len(reply.request.prompt) + len(reply.track.tokens) > self._n_ctx:
            reason = "context"
        if reason is not None:
            self._finish(reply, reason)

    def _round(self) -> None:
        """One chunk of a prompt, and one token of every reply whose prompt is done."""
        for reply in list(self._active):
            if reply.feed.cancelled:
                self._finish(reply, "cancelled")
            while reply.feed.orders and reply.can_obey and reply in self._active:
                self._guarded(self._obey, [reply])
        active = [reply for reply in self._active if not reply.feed.full]
        filling = [reply for reply in active if reply.left or reply.pending is None]
        if filling:
            self._guarded(self._fill, filling[:1])
        decoding = [reply for reply in active if reply in self._active and reply.pending is not None]
        if decoding and not any(reply.feed.cancelled for reply in decoding):
            self._guarded(self._decode, decoding)

    def _guarded(self, work: Callable[[list[ActiveReply]], None], replies: list[ActiveReply]) -> None:
        try:
            work(replies)
        except Aborted:  # whoever cancelled is seen in the next round; the others go on from what the cache holds
            self._lift_abort()
            for reply in replies:
                reply.go_back()
        except QwqError as error:
            self._fail(replies, error)
        except Exception as error:
            self._fail(replies, _unexpected(error))

    def _lift_abort(self) -> None:
        self._context.abort(False)
        if self._closed:  # it may have been set in between
            self._context.abort(True)

    def _fill(self, replies: list[ActiveReply]) -> None:
        """Decode the next chunk of a prompt, its last token in a batch of its own: bits depend on the batch's shape.

        What a rewind leaves to decode again comes this way too.
        """
        (reply,) = replies
        if reply.left:
            chunk = reply.left[: min(self._prefill_chunk, max(1, len(reply.left) - 1))]
            self._sequences.decode([Part(reply.sequence, chunk, output=len(chunk) == len(reply.left))])
            reply.left = reply.left[len(chunk) :]
            reply.tell_progress(len(chunk))
        if not reply.left:
            if reply.prefilled is None:
                reply.prefilled = time.monotonic()
                self._sequences.mark(reply.sequence)
                reply.left = list(reply.track.tokens)  # of another engine
            if not reply.left:
                self._choose(replies)

    def _decode(self, replies: list[ActiveReply]) -> None:
        """A token of each; as long as nothing else is to be done, the next one at once."""
        while True:
            self._sequences.decode([Part(reply.sequence, [reply.token()]) for reply in replies])
            for reply in replies:
                reply.pending = None
            self._choose(replies)
            if replies != self._active or not self._inbox.empty():
                return
            if any(reply.pending is None or reply.must_pause for reply in replies):
                return

    def _choose(self, replies: list[ActiveReply]) -> None:
        """Draw each reply's next token from its row and take it in."""
        for reply in replies:
            drawn = draw(self._sampler, reply)
            if isinstance(drawn, Rewrite):
                self._go_back(reply, reply.rewrite(drawn))
            else:
                self._take(reply, drawn)

    def _take(self, reply: ActiveReply, token: int) -> None:
        """Take in a token and those that are forced after it: they are decoded together, as a prompt is."""
        track = reply.track
        while True:
            action = reply.take(token)
            if isinstance(action, Rewind):
                self._go_back(reply, action)
                return
            if action is not None:
                self._finish(reply, action.reason)
                return
            if not track.state.forced:
                break
            token = track.state.forced[0]
        reply.meter()
        n_left = reply.n_tokens - len(reply.sequence.tokens)
        if reply.n_tokens > self._n_ctx:
            self._finish(reply, "context")
        elif n_left == 1:
            reply.pending = token
        else:
            reply.go_back()

    def _go_back(self, reply: ActiveReply, rewind: Rewind) -> None:
        """Do in the cache what was done to the reply's tokens. Without forced tokens the next round draws again."""
        n_kept, forced = len(reply.request.prompt) + rewind.n_tokens, reply.track.state.forced
        if forced:
            self._sequences.keep(reply.sequence, n_kept)
        else:
            reply.left, reply.pending = self._sequences.rewind(reply.sequence, n_kept), None
        if n_kept > 1 and not reply.sequence.tokens:
            reply.begin_anew()
        if forced:
            self._take(reply, forced[0])

    def _obey(self, replies: list[ActiveReply]) -> None:
        """Carry out what the reader asked for next."""
        (reply,) = replies
        rewind = reply.obey(reply.feed.orders.popleft())
        if rewind is not None:
            self._go_back(reply, rewind)

    def _finish(self, reply: ActiveReply, reason: FinishReason) -> None:
        if reason in ("context", "cancelled"):
            for event in reply.track.flush():
                reply.feed.put(event)
        if reason == "context":
            reply.feed.put(
                Notice(
                    f"the context of {self._n_ctx} tokens is full, the answer ends here; n_ctx (--ctx) sets a larger one",
                    "full",
                )
            )
        if reason == "loop":
            reply.feed.put(Notice("the answer repeated itself and ends here", "loop"))
        ended = reply.track.ended(reason)
        stats = reply.stats(self._n_ctx, ended, reason)
        self._retire(reply)
        with contextlib.suppress(Exception):  # a remark is worth no reply
            notice = None if reason == "cancelled" else self._remark(stats)
            if notice is not None:
                reply.feed.put(notice)
        undivided = reply.request.begin.undivided
        reply.feed.put(Done(Reply(ended.answer, ended.thinking, reason, stats, undivided)))

    def _fail(self, replies: list[ActiveReply], error: QwqError) -> None:
        for reply in [reply for reply in replies if reply in self._active]:
            self._retire(reply)
            reply.feed.put(error)

    def _retire(self, reply: ActiveReply) -> None:
        self._sequences.done(reply.sequence)
        self._active.remove(reply)
        self._lift_abort()


class _Waiting(NamedTuple):
    feed: Feed
    request: Request

    @property
    def is_begun(self) -> bool:
        """Whether another engine began it."""
        return self.request.course is not None and bool(self.request.course.entries)


class _Job:
    """Work for the engine's thread, and the future of whoever asked for it."""

    def __init__(self, work: Callable[[Sequences], Any], future: Future[Any]) -> None:
        self._work, self.future = work, future

    def run(self, sequences: Sequences) -> None:
        try:
            self.future.set_result(self._work(sequences))
        except BaseException as error:
            self.future.set_exception(error)


def _unexpected(error: Exception) -> EngineError:
    return EngineError(f"{type(error).__name__}: {error}")
