"""The engine's thread: one model, one context, replies on its sequences. It decodes and samples, and decides nothing.

What a token means is the policies' word (`generation`, `track`). Everything that touches llama.cpp happens on this thread;
callers hand over requests and read events, and any thread may cancel.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from qwq_lite.backend.context import Aborted, Context
from qwq_lite.backend.model import LoadedModel
from qwq_lite.backend.sampler import Sampler
from qwq_lite.errors import ContextFull, EngineClosed, EngineError, QwqError
from qwq_lite.events import Done, FinishReason, Notice, Progress, Reply, Stats
from qwq_lite.generation import Begin, Policy, Rewind
from qwq_lite.sampling import Sampling, draw_seed
from qwq_lite.sequences import Part, Sequence, Sequences
from qwq_lite.stream import Stream
from qwq_lite.track import Track

PREFILL_CHUNK = 128  # tokens of a decode call in prefill: progress is shown, and a GPU can be cancelled, between two
N_ACTIVE = 1  # replies decoded together; more share each read of the weights, and then bits depend on who is beside

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """One reply to make: the prompt's tokens and what holds for the reply.

    session: whose sequence it goes on; None is the one that all requests without a session share.
    n_dropped: messages that were left out of the prompt, for Stats. alone: as in `Sequences.place`.
    """

    prompt: list[int]
    policies: tuple[Policy, ...]
    sampling: Sampling
    seed: int
    begin: Begin = field(default_factory=Begin)
    session: Hashable = None
    n_dropped: int = 0
    alone: bool = False


class Scheduler:
    """Owns model and context from `start` on; `close` frees both and ends the thread."""

    def __init__(
        self, model: LoadedModel, context: Context, *, prefill_chunk: int = PREFILL_CHUNK, n_active: int = N_ACTIVE
    ) -> None:
        self._model, self._context, self._n_ctx = model, context, context.n_ctx
        self._prefill_chunk, self._n_active = prefill_chunk, n_active
        self._sequences = Sequences(context)
        self._sampler = Sampler(model.vocab.n_tokens)
        self._inbox: queue.SimpleQueue[tuple[Stream, Request] | Callable[[], None] | None] = queue.SimpleQueue()
        self._active: list[_Reply] = []
        self._lock = threading.RLock()  # a signal handler may cancel while this thread submits
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="qwq-lite engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Stream:
        """Queue a request. Raises: EngineClosed; EngineError for an empty prompt; ContextFull for one that does not fit."""
        if not request.prompt:
            raise EngineError("the prompt is empty")
        if len(request.prompt) >= self._n_ctx:
            raise ContextFull(
                f"the prompt has {len(request.prompt)} tokens, the context {self._n_ctx};"
                " shorten it, start a new chat, or choose a larger context (--ctx)"
            )
        stream = Stream(self._interrupt)
        self._send((stream, request))
        return stream

    def call(self, job: Callable[[Sequences], T]) -> T:
        """Run a job on the engine's thread, between two tokens, and return what it returns. Raises what it raises."""
        future: Future[T] = Future()

        def run() -> None:
            if self._closed:
                future.set_exception(EngineClosed("the model was unloaded"))
                return
            try:
                future.set_result(job(self._sequences))
            except BaseException as error:
                future.set_exception(error)

        self._send(run)
        return future.result()

    def release(self, session: Hashable) -> None:
        """The session is over; its sequence may be overwritten. Any thread, at any time: it waits for nothing."""
        self._inbox.put(lambda: self._sequences.release(session))

    def close(self) -> None:
        """Cancel what runs, free context and model, end the thread."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._context.abort(True)
        self._inbox.put(None)
        self._thread.join()

    def _send(self, item: tuple[Stream, Request] | Callable[[], None]) -> None:
        with self._lock:
            if self._closed:
                raise EngineClosed("the model is unloaded; load it again")
            self._inbox.put(item)

    def _interrupt(self, stream: Stream) -> None:
        with self._lock:
            if any(reply.stream is stream for reply in self._active):
                self._context.abort(True)

    def _work(self) -> None:
        waiting: deque[tuple[Stream, Request]] = deque()
        while self._receive(waiting):
            for item in [item for item in waiting if item[0].cancelled.is_set()]:
                waiting.remove(item)
                item[0].put(Done(Reply("", "", "cancelled", Stats(n_prompt=len(item[1].prompt)))))
            while waiting and len(self._active) < self._n_active:
                self._admit(*waiting.popleft())
            self._round()
        for reply in list(self._active):
            self._finish(reply, "cancelled")
        for stream, _ in waiting:
            stream.put(EngineClosed("the model was unloaded before the request began"))
        self._sampler.close()
        self._context.close()
        self._model.close()

    def _receive(self, waiting: deque[tuple[Stream, Request]]) -> bool:
        """Take in what was sent, waiting for it only when there is nothing to do. False once the model is closed."""
        while True:
            try:
                item = self._inbox.get(block=not waiting and not self._active)
            except queue.Empty:
                return True
            if item is None:
                return False
            if callable(item):
                item()
            else:
                waiting.append(item)

    def _admit(self, stream: Stream, request: Request) -> None:
        try:
            sequence = self._sequences.place(request.session, request.prompt, request.alone)
        except QwqError as error:
            stream.put(error)
            return
        reply = _Reply(stream, request, sequence, self._model.vocab.piece)
        with self._lock:
            self._active.append(reply)
        if request.n_dropped:
            stream.put(
                Notice(
                    f"the oldest {request.n_dropped} messages no longer fit the context of {self._n_ctx} tokens and were"
                    " left out; --ctx sets a larger one"
                )
            )
        stream.put(Progress("prefill", reply.n_reused, len(request.prompt)))

    def _round(self) -> None:
        """One chunk of a prompt, and one token of every reply whose prompt is done."""
        for reply in [reply for reply in self._active if reply.stream.cancelled.is_set()]:
            self._finish(reply, "cancelled")
        filling = [reply for reply in self._active if reply.left or reply.pending is None]
        if filling:
            self._guarded(self._fill, filling[:1])
        decoding = [reply for reply in self._active if reply.pending is not None]
        if decoding and not any(reply.stream.cancelled.is_set() for reply in decoding):
            self._guarded(self._decode, decoding)

    def _guarded(self, work: Callable[[list[_Reply]], None], replies: list[_Reply]) -> None:
        try:
            work(replies)
        except Aborted:  # whoever cancelled is seen in the next round; the others go on where they were
            with self._lock:
                if not self._closed:
                    self._context.abort(False)
        except QwqError as error:
            self._fail(replies, error)
        except Exception as error:
            self._fail(replies, EngineError(f"{type(error).__name__}: {error}"))

    def _fill(self, replies: list[_Reply]) -> None:
        """Decode the next chunk of a prompt, its last token in a batch of its own: bits depend on the batch's shape.

        What a rewind leaves to decode again comes this way too.
        """
        (reply,) = replies
        if reply.left:
            chunk = reply.left[: min(self._prefill_chunk, max(1, len(reply.left) - 1))]
            self._sequences.decode([Part(reply.sequence, chunk, output=len(chunk) == len(reply.left))])
            reply.left = reply.left[len(chunk) :]
            if reply.prefilled is None:
                reply.n_prefilled += len(chunk)
                reply.stream.put(Progress("prefill", reply.n_reused + reply.n_prefilled, len(reply.request.prompt)))
        if not reply.left:
            if reply.prefilled is None:
                reply.prefilled = time.monotonic()
                self._sequences.mark(reply.sequence)
            self._choose(replies)

    def _decode(self, replies: list[_Reply]) -> None:
        self._sequences.decode([Part(reply.sequence, [reply.token()]) for reply in replies])
        for reply in replies:
            reply.pending = None
        self._choose(replies)

    def _choose(self, replies: list[_Reply]) -> None:
        """Draw each reply's next token from its row and take it in. After a rewind the next round draws again."""
        for reply in replies:
            events, action = reply.track.take(self._draw(reply))
            for event in events:
                reply.stream.put(event)
            if isinstance(action, Rewind):
                reply.left = self._sequences.rewind(reply.sequence, len(reply.request.prompt) + action.n_tokens)
            elif action is not None:
                self._finish(reply, action.reason)
            elif len(reply.sequence.tokens) >= self._n_ctx:
                self._finish(reply, "context")
            else:
                reply.pending = reply.track.tokens[-1]

    def _draw(self, reply: _Reply) -> int:
        draw = reply.track.constrain(reply.request.sampling)
        if draw.forced is not None:
            return draw.forced
        row = reply.sequence.row
        assert row is not None, "a row is drawn from once, right after its decode"
        for mask in draw.masks:
            np.add(row, mask, out=row)
        if draw.banned:
            row[list(draw.banned)] = -np.inf
        if (draw.masks or draw.banned) and row.max() == -np.inf:
            raise EngineError("the masks of this reply leave no token to sample")
        position = len(reply.sequence.tokens)
        return self._sampler.sample(row, draw.sampling, draw_seed(reply.request.seed, reply.track.attempt, position))

    def _finish(self, reply: _Reply, reason: FinishReason) -> None:
        if reason in ("context", "cancelled"):
            for event in reply.track.flush():
                reply.stream.put(event)
        if reason == "context":
            reply.stream.put(
                Notice(f"the context of {self._n_ctx} tokens is full, the answer ends here; --ctx sets a larger one")
            )
        self._retire(reply)
        reply.stream.put(Done(Reply(reply.track.answer, reply.track.thinking, reason, reply.stats())))

    def _fail(self, replies: list[_Reply], error: QwqError) -> None:
        for reply in [reply for reply in replies if reply in self._active]:
            self._retire(reply)
            reply.stream.put(error)

    def _retire(self, reply: _Reply) -> None:
        with self._lock:
            self._active.remove(reply)
        self._sequences.done(reply.sequence)


class _Reply:
    """A request under way. left: tokens to decode before the next draw; pending: the token drawn and not yet decoded."""

    def __init__(self, stream: Stream, request: Request, sequence: Sequence, piece: Callable[[int], bytes]) -> None:
        self.stream, self.request, self.sequence = stream, request, sequence
        self.track = Track(request.policies, request.begin, piece)
        self.n_reused, self.n_prefilled = len(sequence.tokens), 0
        self.left = request.prompt[self.n_reused :]
        self.pending: int | None = None
        self.started = time.monotonic()
        self.prefilled: float | None = None

    def token(self) -> int:
        assert self.pending is not None
        return self.pending

    def stats(self) -> Stats:
        now = time.monotonic()
        prefilled = now if self.prefilled is None else self.prefilled
        return Stats(
            n_prompt=len(self.request.prompt),
            n_reused=self.n_reused,
            n_prefilled=self.n_prefilled,
            n_generated=self.track.n_taken,
            n_dropped=self.request.n_dropped,
            prefill_s=prefilled - self.started,
            decode_s=now - prefilled,
        )
