"""A model in this process: header, weights, context and engine thread, behind the `Model` protocol."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from qwq_lite import catalog, gguf_header, normalization, prompt, sampling, shape
from qwq_lite.backend.context import KV_TYPES, Context, ContextSettings
from qwq_lite.backend.model import ALL_LAYERS, LoadedModel
from qwq_lite.chat import Chat
from qwq_lite.errors import EngineClosed, TemplateError, UsageError
from qwq_lite.events import Progress, Reply
from qwq_lite.generation import Rules, State
from qwq_lite.model import Options
from qwq_lite.prompt import ChatTemplate, Message
from qwq_lite.scheduler import Request, Scheduler, Stream

DEFAULT_N_CTX = 8192


def load(
    path: str | os.PathLike[str],
    *,
    n_ctx: int | None = None,
    type_k: str = "f16",
    type_v: str = "f16",
    n_gpu_layers: int = ALL_LAYERS,
    n_threads: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> LocalModel:
    """Load a GGUF file, any text model that llama.cpp runs.

    Args:
        path: the file.
        n_ctx: tokens of context; default the model's own, at most 8,192.
        type_k, type_v: type of the KV cache: f16, bf16, q8_0, q4_0. q8_0 halves its size.
        n_gpu_layers: layers on the GPU where there is one; default all.
        n_threads: default one core less than there are, which stays with the desktop.
        on_progress: called with load progress, on this thread.

    Raises: FormatError for a file that is no GGUF model; EngineError when llama.cpp cannot load it; UsageError.

    Example:
        with qwq_lite.load("QwQ-32B-Preview-Q4_K_M.gguf") as model:
            print(model.ask("What is 2+3?").answer)
    """
    file = Path(path)
    header = gguf_header.read(file)
    geometry = shape.from_header(header)
    settings = ContextSettings(
        n_ctx=_checked("n_ctx", min(geometry.n_ctx_train, DEFAULT_N_CTX) if n_ctx is None else n_ctx, 1, 1 << 24),
        n_threads=_checked("n_threads", default_threads() if n_threads is None else n_threads, 1, 512),
        type_k=_kv_type("type_k", type_k),
        type_v=_kv_type("type_v", type_v),
    )
    _checked("n_gpu_layers", n_gpu_layers, ALL_LAYERS, 1 << 20)

    def report(share: float) -> None:
        if on_progress is not None:
            on_progress(Progress("load", share, 1.0))

    types = header.keys.get("tokenizer.ggml.token_type")
    weights = LoadedModel(
        file,
        n_gpu_layers=n_gpu_layers,
        token_types=[kind for kind in types if isinstance(kind, int)] if isinstance(types, list) else None,
        on_progress=report,
    )
    context = None
    try:
        context = Context(weights, settings)
        return LocalModel(header, weights, context)
    except BaseException:
        if context is not None:
            context.close()
        weights.close()
        raise


def default_threads() -> int:
    """Cores less one for the desktop: with all of them, one busy program beside makes decoding 20 times slower."""
    import psutil

    return max(1, (psutil.cpu_count(logical=False) or os.cpu_count() or 2) - 1)


class LocalModel:
    """A loaded model. Made by `load`; used as a context manager, or closed with `close`."""

    def __init__(self, header: gguf_header.Header, weights: LoadedModel, context: Context) -> None:
        self._header, self._weights, self._context = header, weights, context
        self._vocab = weights.vocab
        source = header.text("tokenizer.chat_template") or self._fallback_template()
        self._template = ChatTemplate(source) if source is not None else None
        self._form = normalization.normalizer(header.keys)
        self._known = catalog.find(header.text("general.name"), header.text("general.basename"), header.path.name)
        self.n_ctx = context.n_ctx
        self._using = threading.RLock()  # nobody tokenizes while the model is freed
        self._scheduler: Scheduler | None = Scheduler(weights, context)

    def __enter__(self) -> LocalModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def chat(self, system: str | None = None) -> Chat:
        """A conversation, empty but for the system prompt."""
        return Chat(self, system)

    def ask(self, text: str, system: str | None = None, **options: Any) -> Reply:
        """One answer to one question. Options as in `model.Options`."""
        return self.chat(system).ask(text, **options)

    def generate(self, messages: Sequence[Message], options: Options = Options()) -> Stream:  # noqa: B008 - frozen
        """A reply to messages as a stream of events. Raises: TemplateError, EngineError, EngineClosed."""
        with self._using:
            return self._submit(self._open(), messages, options)

    def _submit(self, scheduler: Scheduler, messages: Sequence[Message], options: Options) -> Stream:
        if self._template is None:
            raise TemplateError(
                f"{self._header.path}: has no chat template (tokenizer.chat_template), so it is no chat model"
            )
        tokens = self._template.encode(self._vocab, messages, self._form)
        special = self._vocab.special
        opened, closed = (special.get(tag) for tag in prompt.THINK_TAGS)
        rules = Rules(
            self._vocab.end_tokens,
            None if options.max_tokens is None else _checked("max_tokens", options.max_tokens, 1, 1 << 31),
            think_open=opened,
            think_close=closed,
        )
        thinking = opened is not None and opened in tokens[-3:]  # the template ended the prompt with <think>\n
        start = State(phase="thinking" if thinking else "answer")
        return scheduler.submit(Request(tokens, rules, self._sampling(options), self._seed(options), start))

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text as plain text, normalised as the model's tokenizer does it."""
        with self._using:
            self._open()
            return prompt.tokenize(self._vocab, text, self._form)

    def close(self) -> None:
        """Stop what runs and free the model's memory. Further calls raise EngineClosed; closing again does nothing."""
        with self._using:
            scheduler, self._scheduler = self._scheduler, None
        if scheduler is not None:
            scheduler.close()

    def _open(self) -> Scheduler:
        if self._scheduler is None:
            raise EngineClosed(f"{self._header.path}: the model is unloaded; load it again")
        return self._scheduler

    def _sampling(self, options: Options) -> sampling.Sampling:
        user = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        return sampling.resolve(
            user, self._header.keys, self._known.sampling if self._known else catalog.DEFAULT_SAMPLING
        )

    def _seed(self, options: Options) -> int:
        return secrets.randbits(32) if options.seed is None else options.seed

    def _fallback_template(self) -> str | None:
        return prompt.CHATML if "<|im_start|>" in self._vocab.special else None


def _checked(name: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise UsageError(f"{name} is {value}, a number from {low} to {high} is allowed")
    return value


def _kv_type(name: str, value: str) -> str:
    if value.lower() not in KV_TYPES:
        raise UsageError(f"{name} is {value!r}; known are {', '.join(KV_TYPES)}")
    return value.lower()
