"""A model in this process: header, weights, context and engine thread, behind the `Model` protocol."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwq_lite import arguments, sampling
from qwq_lite.backend import devices
from qwq_lite.backend.context import Context, ContextSettings
from qwq_lite.backend.hardware import EngineReport
from qwq_lite.backend.model import LoadedModel
from qwq_lite.chat.engine import Prompt, check_running, check_text, plain_prompt
from qwq_lite.chat.model import Model
from qwq_lite.chat.options import Options, ThoughtStyle
from qwq_lite.chat.options import parse_options as model_options
from qwq_lite.engine import reply_setup, saved_state
from qwq_lite.engine.request import Request
from qwq_lite.engine.scheduler import PREFILL_CHUNK, Scheduler
from qwq_lite.errors import EngineClosed, EngineError, TemplateError, UsageError
from qwq_lite.events import Notice, Progress
from qwq_lite.formats import gguf_header
from qwq_lite.plan import free_memory, planning, speed
from qwq_lite.plan.run_plan import RunPlan, Wishes
from qwq_lite.prompt import chat_template, history, script_intent
from qwq_lite.prompt.chat_template import ChatTemplate, Message
from qwq_lite.reply.commands import ReplyLog
from qwq_lite.reply.script_masks import MaskSets, ScriptMasks
from qwq_lite.reply.stream import Stream, in_thread
from qwq_lite.selftest import kept_result
from qwq_lite.store import catalog
from qwq_lite.system import running_engines
from qwq_lite.text import normalization
from qwq_lite.text.tags import THINK_TAGS

_ENDLESS = (
    "the vocabulary has no token that ends a turn (tokenizer.ggml.eos_token_id): a reply ends at max_tokens (-n), at a text of"
    " stop (--stop) or when the context is full; convert the model again, with a tokenizer that names one"
)
_GPU_PREFILL_CHUNK = 512  # a GPU is slow on small batches; it takes tenths of a second for this one


def load(
    model: str | os.PathLike[str],
    *,
    n_ctx: int | None = None,
    type_k: str | None = None,
    type_v: str | None = None,
    n_gpu_layers: int | None = None,
    plan: RunPlan | None = None,
    memory: int | None = None,
    host_weights: str | None = None,
    n_threads: int | None = None,
    template: Sequence[str] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> LocalModel:
    """`loading.load` in this process. template: the text of one in place of the file's own, and what its errors begin with.

    Raises: FormatError, PlanError, EngineError, TemplateError, UsageError.
    """
    file = Path(model)
    wishes = Wishes(n_ctx, type_k and type_k.lower(), type_v and type_v.lower(), n_gpu_layers, host_weights)
    n_threads = speed.default_threads() if n_threads is None else n_threads
    threads = arguments.check_whole("n_threads", n_threads, 1, speed.MOST_THREADS)
    if plan is not None and not isinstance(plan, RunPlan):
        raise UsageError(
            f"plan is a {type(plan).__name__}, a RunPlan is expected: the `plan` of what plan_model returns"
        )
    if memory is not None:
        memory = arguments.check_whole("memory", memory, 1, 1 << 60)
    if plan is not None and wishes != Wishes():
        raise UsageError(
            "a plan is given, and n_ctx, type_k, type_v, n_gpu_layers or host_weights too; give one of the two"
        )
    header, notice = gguf_header.read(file), None
    # Before llama.cpp is loaded here: a broken one may end this process.
    complaint = kept_result.complaint(kept_result.check_once())
    engine = devices.report()
    room = free_memory.room_here(engine, memory)
    if plan is not None:
        plan, notice = planning.adapt_plan(plan, header, room)
    if plan is None or (complaint and plan.choice.repack):
        wishes = wishes if plan is None else plan.wishes
        plan = planning.plan_header(header, room, planning.without_repacking(wishes) if complaint else wishes)
    leave = running_engines.register(file, plan.footprint.total)  # before it is loaded: two programs may start together
    notices = [
        *(line for line in (complaint, notice) if line),
        *planning.check_wishes(plan.candidate.shape, room, plan.wishes),
        *planning.list_memory_holders(plan),
    ]

    def report(share: float) -> None:
        if on_progress is not None:
            on_progress(Progress("load", share, 1.0))

    types = header.keys.get("tokenizer.ggml.token_type")
    weights = context = None
    try:
        weights = LoadedModel(
            file,
            plan.choice,
            token_types=[kind for kind in types if isinstance(kind, int)] if isinstance(types, list) else None,
            on_progress=report,
        )
        context = Context(weights, ContextSettings.of(plan.choice, threads))
        return LocalModel(header, weights, context, plan, engine, tuple(notices), leave, template)
    except BaseException as error:
        for part in (context, weights):
            if part is not None:
                part.close()
        leave()
        if isinstance(error, EngineError):  # what was free a moment ago may be gone
            error.args = ("; ".join([f"{error}; the plan was {plan.line()}", *planning.list_memory_holders()]),)
        raise


class LocalModel(Model):
    """A loaded model. Made by `load`; used as a context manager, or freed with `unload`.

    plan: what it runs with. engine: llama.cpp and its devices. notices: what the user should know of that, one line each.
    """

    def __init__(
        self,
        header: gguf_header.Header,
        weights: LoadedModel,
        context: Context,
        plan: RunPlan,
        engine: EngineReport,
        notices: tuple[str, ...] = (),
        leave: Callable[[], None] = lambda: None,
        template: Sequence[str] | None = None,
    ) -> None:
        self._header, self._weights = header, weights
        self._vocab = weights.vocab
        self.plan, self.engine = plan, engine
        self.notices = notices if self._vocab.ends_turns else (*notices, _ENDLESS)
        self._template = self._chat_template(template)
        self._form = normalization.normal_form(header.keys)
        self._plain = functools.partial(chat_template.tokenize, self._vocab, form=self._form)
        self._more = functools.partial(self._plain, follows=True)
        self._known = catalog.find(header.text("general.name"), header.text("general.basename"), header.path.name)
        self.n_ctx = context.n_ctx
        self._fingerprint = _fingerprint(header, context.settings)
        on_gpu = any(name != "CPU" for name in plan.footprint.devices)
        self._scheduler = Scheduler(
            weights,
            context,
            prefill_chunk=_GPU_PREFILL_CHUNK if on_gpu else PREFILL_CHUNK,
            remark=speed.SpeedCheck(plan, context.settings.n_threads),
            tokenize=self._more,
        )
        self._callers: list[int] = []  # threads that are inside, for nobody may tokenize while the model is freed
        self._changed = threading.Condition()
        self._unloaded = False
        self._masks = MaskSets(self._vocab.piece, self._vocab.n_tokens)
        # A model that is dropped without `unload` is freed too, by its engine's thread.
        weakref.finalize(self, self._scheduler.close, wait=False).atexit = False
        self._leave = weakref.finalize(self, leave)

    def generate(self, prompt: Prompt, *, session: Hashable = None, **options: Any) -> Stream:
        """A reply as a stream of events.

        Args:
            prompt: messages, which the model's template turns into tokens; or a text to go on with, in which no spelling
                becomes a control token; or tokens.
            session: whose place in the cache it goes on; None shares one with all others without a session.
            options: as in `model.Options`.

        Raises: UsageError, TemplateError, EngineError, ContextFull, EngineClosed.
        """
        with self._inside():
            try:
                return self._submit(plain_prompt(prompt), session, model_options(options))
            except RecursionError as error:
                raise UsageError("messages or tools are nested too deeply; give them with fewer levels") from error

    async def agenerate(self, prompt: Prompt, *, session: Hashable = None, **options: Any) -> Stream:
        """As `generate`; the prompt is made on another thread, and the stream is read with `async for`."""
        return await in_thread(functools.partial(self.generate, prompt, session=session, **options))

    def go_on(self, prompt: Prompt, course: ReplyLog, *, session: Hashable = None, **options: Any) -> Stream:
        """As `generate`, for a host that keeps what was done to the reply: from where another engine left it."""
        with self._inside():
            return self._submit(prompt, session, model_options(options), course)

    def _submit(self, given: Prompt, session: Hashable, options: Options, course: ReplyLog | None = None) -> Stream:
        asked = time.monotonic() - (course.elapsed_s if course else 0.0)
        drawn = secrets.randbits(32) if course is None else course.seed
        tokens, n_dropped, templated = self._tokens(given, options)
        answered = any(isinstance(part, Mapping) and part.get("role") == "assistant" for part in given)
        thoughts = self._thoughts(options)
        rules = reply_setup.rules(
            options,
            thoughts,
            tokens,
            reply_setup.last_question(given),
            self.n_ctx,
            self._vocab.end_tokens,
            self._vocab.piece,
            self._more,
            templated=templated,
            scripts=self._scripts(given, options, thoughts),
        )
        thought_sampling, answer_sampling = self._sampling(options)
        return self._scheduler.submit(
            Request(
                tokens,
                rules.policies,
                thought_sampling,
                drawn if options.seed is None else options.seed,
                rules.begin,
                session,
                n_dropped=n_dropped,
                alone=options.seed is not None and not answered,
                answer_sampling=answer_sampling,
                thinking_budget=options.budget,
                thinking_limit=rules.thinking_limit,
                n_words=rules.n_words,
                within_s=options.within,
                asked=asked,
                notices=self._ignored(given, options, thoughts.style, templated=templated),
                course=course,
            )
        )

    def _thoughts(self, options: Options) -> reply_setup.Thoughts:
        undivided = self._known is not None and self._known.undivided
        return reply_setup.thoughts(
            options.thought_style,
            "undivided" if undivided else None,
            self._vocab.special,
            self._template.source if self._template else None,
        )

    def _scripts(
        self, given: Prompt, options: Options, thoughts: reply_setup.Thoughts
    ) -> tuple[ScriptMasks | None, ScriptMasks | None]:
        """What is masked in the answer and in the thought."""
        asked = options.answer_script or "auto", options.think_script or "any"
        texts = None
        if "auto" in asked:
            tag = None if thoughts.style == "undivided" else THINK_TAGS[1]
            texts = script_intent.texts_asked(given, tag=tag)
            texts = None if texts is None else [*texts, *script_intent.flatten_texts(options.tools or ())]
        answer, thought = (self._masks.of(script_intent.scripts_to_mask(word, texts)) for word in asked)
        return answer, thought

    def _tokens(self, given: Prompt, options: Options) -> tuple[list[int], int, bool]:
        """A prompt's tokens, how many messages it goes without, and whether a template made it."""
        if isinstance(given, str):
            return self._plain(given), 0, False
        if all(isinstance(part, int) for part in given):
            return [arguments.check_whole("token", part, 0, self._vocab.n_tokens - 1) for part in given], 0, False
        if self._template is None:
            raise TemplateError(
                f"{self._header.path}: has no chat template (tokenizer.chat_template); give one with --chat-template"
                " (chat_template in Python): a file, or chatml"
            )
        template, extra = self._template, {"tools": list(options.tools)} if options.tools else {}

        def encode(messages: Sequence[Message]) -> list[int]:
            messages = template.without_empty_system(self._vocab, messages, **extra)
            return template.encode(self._vocab, messages, self._form, **extra)

        messages: Sequence[Message] = given  # type: ignore[assignment] # what is left of the union
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise UsageError(f"a message is {message!r}; a dict with a role and a content is expected")
        return (
            *history.fit_messages(messages, encode, self.n_ctx, options.max_tokens, options.when_full or "drop"),
            True,
        )

    def _ignored(self, given: Prompt, options: Options, style: ThoughtStyle, *, templated: bool) -> tuple[Notice, ...]:
        """What was asked for and has nothing to act on in this reply, with the reason."""
        notices = [*reply_setup.ignored(options, style, templated=templated)]
        if templated and not self._shows_system(given):
            words = (
                "the system prompt is ignored: the model's chat template has no place for it; put it into the question"
            )
            notices.append(Notice(words, "ignored"))
        if templated and options.tools and not self._shows_tools(given, options.tools):
            notices.append(
                reply_setup.notice_of(
                    ["tools"], "the model's chat template has no place for them; describe them in a message"
                )
            )
        return tuple(notices)

    def _shows_system(self, messages: Any) -> bool:
        first = messages[0] if messages else {}
        text = first.get("content") if first.get("role") == "system" else None
        return (
            self._template is None
            or not isinstance(text, str)
            or not text
            or self._template.shows_system(self._vocab, text)
        )

    def _shows_tools(self, messages: Any, tools: Sequence[Mapping[str, Any]]) -> bool:
        return self._template is None or self._template.shows(self._vocab, messages, tools=list(tools))

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
            return self._plain(text)

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
        check_running(self._header.path)
        with self._changed:
            self._callers.append(threading.get_ident())
        try:
            if self._unloaded:  # asked after the entry, so that an unload in between has seen it
                raise EngineClosed(f"{self._header.path}: the model is unloaded; load it again")
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

    def _sampling(self, options: Options) -> tuple[sampling.Sampling, sampling.Sampling]:
        """Of the thought and of the answer. Neither files nor the catalogue know settings of a phase."""
        catalogue = self._known.sampling if self._known else catalog.DEFAULT_SAMPLING
        user = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        answer = {"temperature": options.answer_temperature, "top_p": options.answer_top_p}
        both = user, {**user, **{name: value for name, value in answer.items() if value is not None}}
        thought, answered = (sampling.resolve(settings, self._header.keys, catalogue) for settings in both)
        return thought, answered

    def _chat_template(self, given: Sequence[str] | None) -> ChatTemplate | None:
        """The one that was given, else the file's own, else ChatML where the vocabulary has its tokens."""
        has_chatml = "<|im_start|>" in self._vocab.special
        if given is not None:
            source, origin = given
            if source == chat_template.CHATML and not has_chatml:
                words = "has no <|im_start|> in its vocabulary, so ChatML's marks are plain text to it"
                self.notices = (*self.notices, f"{self._header.path}: {words}; a reply may not end by itself")
            return ChatTemplate(source, origin, given=True)
        own = self._header.text("tokenizer.chat_template") or (chat_template.CHATML if has_chatml else None)
        return None if own is None else ChatTemplate(own, str(self._header.path))


def _fingerprint(header: gguf_header.Header, settings: ContextSettings) -> str:
    """What a saved state depends on: the headers and the size of the model's files, and the types of the cache."""
    digest = hashlib.blake2b(digest_size=16)
    for part in header.files:
        with part.path.open("rb") as file:
            digest.update(file.read(part.data_offset))
    digest.update(f"{header.file_bytes}:{settings.type_k}:{settings.type_v}".encode())
    return digest.hexdigest()
