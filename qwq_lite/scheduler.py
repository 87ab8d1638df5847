"""The engine's thread: one model, one context, requests one after the other. It decodes and samples, and decides nothing.

What a token means is `generation`'s word. Everything that touches llama.cpp happens on this thread; callers hand over
requests and read events, and any thread may cancel.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from qwq_lite import generation
from qwq_lite.backend.context import Aborted, Context, Entry
from qwq_lite.backend.model import LoadedModel
from qwq_lite.backend.sampler import Sampler
from qwq_lite.errors import EngineClosed, EngineError, QwqError
from qwq_lite.events import Answer, Done, Event, FinishReason, Notice, Progress, Reply, Stats, Thinking
from qwq_lite.sampling import Sampling, draw_seed

PREFILL_CHUNK = (
    128  # tokens of a decode call in prefill: small enough to cancel between on a GPU, which cannot be interrupted
)
_WAIT_S = 0.25  # Windows does not wake a waiting main thread for Ctrl-C


@dataclass(frozen=True)
class Request:
    """One reply to make: the prompt's tokens and what holds for the answer."""

    prompt: list[int]
    rules: generation.Rules
    sampling: Sampling
    seed: int
    start: generation.State = field(default_factory=generation.State)


class Stream:
    """The events of one request, in order, the last one `Done`. Leaving the iteration early cancels the request."""

    def __init__(self, scheduler: Scheduler, request: Request) -> None:
        self.request = request
        self._scheduler = scheduler
        self._events: queue.SimpleQueue[Event | QwqError] = queue.SimpleQueue()
        self.cancelled = threading.Event()
        self._finished = False

    def __iter__(self) -> Iterator[Event]:
        try:
            while not self._finished:
                try:
                    event = self._events.get(timeout=_WAIT_S)
                except queue.Empty:
                    continue
                self._finished = isinstance(event, QwqError | Done)
                if isinstance(event, QwqError):
                    raise event
                yield event
        finally:
            if not self._finished:
                self.cancel()

    def put(self, event: Event | QwqError) -> None:
        self._events.put(event)

    def cancel(self) -> None:
        """Stop after the token, or within the graph node, in hand. Any thread; more than once does no harm."""
        self.cancelled.set()
        self._scheduler.interrupt(self)


class Scheduler:
    """Owns model and context from `start` on; `close` frees both and ends the thread."""

    def __init__(self, model: LoadedModel, context: Context) -> None:
        self._model, self._context, self._n_ctx = model, context, context.n_ctx
        self._sampler = Sampler(model.vocab.n_tokens)
        self._cached: list[int] = []  # tokens whose KV the context holds, for sequence 0
        self._todo: queue.SimpleQueue[Stream | None] = queue.SimpleQueue()
        self._running: Stream | None = None
        self._lock = threading.RLock()  # a signal handler may cancel while this thread submits
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="qwq-lite engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Stream:
        """Queue a request. Raises: EngineClosed; EngineError for a prompt that is empty or does not fit."""
        if not request.prompt:
            raise EngineError("the prompt is empty")
        if len(request.prompt) >= self._n_ctx:
            raise EngineError(
                f"the prompt has {len(request.prompt)} tokens, the context {self._n_ctx};"
                " shorten it, start a new chat, or choose a larger context (--ctx)"
            )
        stream = Stream(self, request)
        with self._lock:
            if self._closed:
                raise EngineClosed("the model is unloaded; load it again")
            self._todo.put(stream)
        return stream

    def interrupt(self, stream: Stream) -> None:
        with self._lock:
            if self._running is stream:
                self._context.abort(True)

    def close(self) -> None:
        """Cancel what runs, free context and model, end the thread."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            running = self._running
        if running is not None:
            running.cancel()
        self._todo.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (stream := self._todo.get()) is not None:
            with self._lock:
                self._running = stream
                self._context.abort(False)
            try:
                if self._closed:
                    raise EngineClosed("the model was unloaded before the request began")
                self._run(stream)
            except QwqError as error:
                stream.put(error)
            except Exception as error:
                stream.put(EngineError(f"{type(error).__name__}: {error}"))
            finally:
                with self._lock:
                    self._running = None
        self._sampler.close()
        self._context.close()
        self._model.close()

    def _run(self, stream: Stream) -> None:
        reply = _Reply(stream)
        started = time.monotonic()
        try:
            n_reused = self._prefill(stream)
        except Aborted:
            stream.put(Done(reply.finished("cancelled", Stats(n_prompt=len(stream.request.prompt)))))
            return
        prefilled = time.monotonic()
        finish = self._decode(stream, reply)
        n_prompt = len(stream.request.prompt)
        stats = Stats(
            n_prompt=n_prompt,
            n_reused=n_reused,
            n_prefilled=n_prompt - n_reused,
            n_generated=reply.state.n_tokens,
            prefill_s=prefilled - started,
            decode_s=time.monotonic() - prefilled,
        )
        if finish == "context":
            stream.put(
                Notice(
                    f"the context of {self._context.n_ctx} tokens is full, the answer ends here; --ctx sets a larger one"
                )
            )
        stream.put(Done(reply.finished(finish, stats)))

    def _prefill(self, stream: Stream) -> int:
        """Bring the cache to the prompt, its last token decoded alone, and return how many tokens were there already.

        The last token's row is always computed in a batch of one: bits depend on the batch's shape.
        """
        prompt, total = stream.request.prompt, len(stream.request.prompt)
        reused = _common_prefix(self._cached, prompt[:-1])
        try:
            self._forget(reused)
        except EngineError:  # a recurrent model's cache can be dropped whole, and not cut
            reused = 0
            self._forget(0)
        stream.put(Progress("prefill", reused, total))
        for start in range(reused, total - 1, PREFILL_CHUNK):
            chunk = prompt[start : min(start + PREFILL_CHUNK, total - 1)]
            self._decode_tokens(stream, chunk, output=False)
            stream.put(Progress("prefill", start + len(chunk), total))
        self._decode_tokens(stream, prompt[-1:], output=True)
        stream.put(Progress("prefill", total, total))
        return reused

    def _decode(self, stream: Stream, reply: _Reply) -> FinishReason:
        request = stream.request
        while True:
            position = len(self._cached)
            seed = draw_seed(request.seed, 0, position)
            token = self._sampler.sample(self._context.row(0), request.sampling, seed)
            finish = reply.take(token, self._model.vocab.piece(token))
            if finish is not None:
                return finish
            if position >= self._context.n_ctx:
                reply.flush()
                return "context"
            try:
                self._decode_tokens(stream, [token], output=True)
            except Aborted:
                reply.flush()
                return "cancelled"

    def _decode_tokens(self, stream: Stream, tokens: list[int], output: bool) -> None:
        if stream.cancelled.is_set():
            raise Aborted
        start, last = len(self._cached), len(tokens) - 1
        entries = [Entry(token, start + i, 0, output and i == last) for i, token in enumerate(tokens)]
        try:
            self._context.decode(entries)
        except (Aborted, EngineError):
            self._context.abort(False)
            self._forget(start)
            raise
        self._cached += tokens

    def _forget(self, start: int) -> None:
        self._context.remove(0, start)
        del self._cached[start:]


class _Reply:
    """Text and state of the reply in hand; hands every event on."""

    def __init__(self, stream: Stream) -> None:
        self.state = stream.request.start
        self._stream = stream
        self._thinking: list[str] = []
        self._answer: list[str] = []

    def take(self, token: int, piece: bytes) -> FinishReason | None:
        step = generation.advance(self._stream.request.rules, self.state, token, piece)
        self.state = step.state
        self._show(step.events)
        return step.finish

    def flush(self) -> None:
        self._show(generation.close(self.state))

    def _show(self, events: tuple[Event, ...]) -> None:
        for event in events:
            if isinstance(event, Thinking):
                self._thinking.append(event.text)
            elif isinstance(event, Answer):
                self._answer.append(event.text)
            self._stream.put(event)

    def finished(self, reason: FinishReason, stats: Stats) -> Reply:
        return Reply("".join(self._answer).rstrip(), "".join(self._thinking).strip(), reason, stats)


def _common_prefix(left: list[int], right: list[int]) -> int:
    n = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        n += 1
    return n
