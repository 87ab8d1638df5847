"""A model in this process: its engine and the thread of it, behind the `Model` protocol."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwq_lite.chat.engine import check_running
from qwq_lite.chat.model import Model
from qwq_lite.chat.options import parse_options
from qwq_lite.engine import saved_state
from qwq_lite.engine.load_options import LoadOptions
from qwq_lite.engine.loaded_engine import LoadedEngine, open_engine
from qwq_lite.engine.reply_setup import ReplySetup
from qwq_lite.engine.scheduler import PREFILL_CHUNK, Scheduler
from qwq_lite.errors import EngineClosed, UsageError
from qwq_lite.events import Progress
from qwq_lite.plan import speed
from qwq_lite.prompt.prompt_encoder import PromptEncoder
from qwq_lite.prompt.question import Prompt, Question, check_text, read_question
from qwq_lite.reply.commands import ReplyLog
from qwq_lite.reply.stream import Stream, in_thread

_ENDLESS = (
    "the vocabulary has no token that ends a turn (tokenizer.ggml.eos_token_id): a reply ends at max_tokens (-n), at a text of"
    " stop (--stop) or when the context is full; convert the model again, with a tokenizer that names one"
)
_GPU_PREFILL_CHUNK = 512  # a GPU is slow on small batches; it takes tenths of a second for this one


def load(
    model: str | os.PathLike[str],
    options: LoadOptions | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> LocalModel:
    """`loading.load` in this process.

    Raises: FormatError, PlanError, EngineError, TemplateError.
    """
    options = options or LoadOptions()
    with open_engine(Path(model), options, on_progress) as engine:
        return LocalModel(engine, options.template)


class LocalModel(Model):
    """A loaded model. Made by `load`; used as a context manager, or freed with `unload`.

    plan: what it runs with. engine: llama.cpp and its devices. notices: what the user should know of that, one line each.
    """

    def __init__(self, engine: LoadedEngine, template: Sequence[str] | None = None) -> None:
        """template: as in `LoadOptions`."""
        header, vocab, context = engine.header, engine.weights.vocab, engine.context
        self._path, self.n_ctx, self.plan, self.engine = header.path, context.n_ctx, engine.plan, engine.report
        self._encoder = PromptEncoder(header, vocab, context.n_ctx, template)
        self.notices = (*engine.notices, *(() if vocab.ends_turns else (_ENDLESS,)), *self._encoder.notices)
        self._setup = ReplySetup(header, vocab, self._encoder, context.n_ctx)
        self._fingerprint = saved_state.fingerprint(header, context.settings)
        on_gpu = any(name != "CPU" for name in engine.plan.footprint.devices)
        self._scheduler = Scheduler(
            engine.weights,
            context,
            prefill_chunk=_GPU_PREFILL_CHUNK if on_gpu else PREFILL_CHUNK,
            remark=speed.SpeedCheck(engine.plan, context.settings.n_threads),
            tokenize=self._encoder.continue_text,
        )
        self._callers: list[int] = []  # threads that are inside, for nobody may tokenize while the model is freed
        self._changed = threading.Condition()
        self._unloaded = False
        # A model that is dropped without `unload` is freed too, by its engine's thread.
        weakref.finalize(self, self._scheduler.close, wait=False).atexit = False
        self._leave = weakref.finalize(self, engine.leave)

    def generate(self, prompt: Prompt, *, session: Hashable = None, **options: Any) -> Stream:
        """A reply as a stream of events.

        Args:
            prompt: messages, which the model's template turns into tokens; or a text to go on with, in which no spelling
                becomes a control token; or tokens.
            session: whose place in the cache it goes on; None shares one with all others without a session.
            options: as in `chat.options.Options`.

        Raises: UsageError, TemplateError, EngineError, ContextFull, EngineClosed.
        """
        with self._inside():
            try:
                return self._submit(read_question(prompt), session, options)
            except RecursionError as error:
                raise UsageError("messages or tools are nested too deeply; give them with fewer levels") from error

    async def agenerate(self, prompt: Prompt, *, session: Hashable = None, **options: Any) -> Stream:
        """As `generate`; the prompt is made on another thread, and the stream is read with `async for`."""
        return await in_thread(functools.partial(self.generate, prompt, session=session, **options))

    def go_on(self, question: Question, course: ReplyLog, *, session: Hashable = None, **options: Any) -> Stream:
        """As `generate`, for a host that keeps what was done to the reply: from where another engine left it."""
        with self._inside():
            return self._submit(question, session, options, course)

    def _submit(
        self, question: Question, session: Hashable, options: Mapping[str, Any], course: ReplyLog | None = None
    ) -> Stream:
        return self._scheduler.submit(self._setup.request(question, parse_options(options), session, course))

    def save_session(self, session: Hashable, path: str | os.PathLike[str], extra: dict[str, Any]) -> None:
        """Write a session's tokens and what the cache holds of it, and `extra`, JSON of the caller's own.

        Raises: OutputError, UsageError for what is no JSON, EngineError, EngineClosed.
        """
        with self._inside():
            saved_state.save(self._scheduler.call, session, Path(path), self._fingerprint, extra)

    def restore_session(self, session: Hashable, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Bring back what `save_session` wrote, under a session's name, and return its `extra`.

        Raises: FormatError for a damaged file or another model's; EngineError, EngineClosed.
        """
        with self._inside():
            return saved_state.restore(self._scheduler.call, session, Path(path), self._fingerprint)

    def fork_session(self, session: Hashable, twin: Hashable) -> None:
        """Let the session `twin` begin with what the session holds in the cache; nothing is computed."""
        with self._inside():
            self._scheduler.call(lambda sequences: sequences.fork(session, twin))

    def release_session(self, session: Hashable) -> None:
        """The session is over: its place in the cache is free. Never raises, also not after `unload`."""
        self._scheduler.release(session)

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text as plain text, normalised as the model's tokenizer does it."""
        check_text(text)
        with self._inside():
            return self._encoder.tokenize(text)

    def unload(self) -> None:
        """Stop what runs and free the model's memory. Further calls raise EngineClosed; unloading again does nothing.

        From a signal handler that interrupts a call of this model the memory is freed when that call returns.
        """
        with self._changed:
            self._unloaded = True
            if threading.get_ident() in self._callers:
                return
            self._changed.wait_for(lambda: not self._callers)
        self._close()

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        check_running(self._path)
        with self._changed:
            self._callers.append(threading.get_ident())
        try:
            if self._unloaded:  # asked after the entry, so that an unload in between has seen it
                raise EngineClosed(f"{self._path}: the model is unloaded; load it again")
            yield
        finally:
            with self._changed:
                self._callers.remove(threading.get_ident())
                self._changed.notify_all()
                last = self._unloaded and not self._callers
            if last:
                self._close()

    def _close(self) -> None:
        self._scheduler.close()
        self._leave()
