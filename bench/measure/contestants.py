"""Three ways to the same tokens: our whole engine, a bare loop of llama.cpp's calls, llama-cpp-python's class `Llama`.

Each starts a prompt with an empty cache. `prefill` says how long it takes to the first row of logits. `turns` generates
tokens and says how long each turn took; between two turns it does nothing, so that others can have theirs. A turn of n
tokens is n draws and n decode calls. No end token ends a reply. Settings are the same as far as each has a word for them.
"""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

from qwq_lite.backend import native
from qwq_lite.backend.context import Context, ContextSettings
from qwq_lite.backend.model import ALL_LAYERS, LoadedModel
from qwq_lite.backend.settings import KV_TYPES
from qwq_lite.engine.request import Request
from qwq_lite.engine.scheduler import Scheduler
from qwq_lite.events import Done
from qwq_lite.reply.policies.order import arrange
from qwq_lite.reply.policies.phases import Phases
from qwq_lite.reply.policies.stops import Stops
from qwq_lite.reply.policy import Begin, Draw, Taken, Verdict
from qwq_lite.reply.stream import Stream
from qwq_lite.sampling import Sampling

SAMPLING = Sampling(temperature=0.6, top_k=40, top_p=0.95, min_p=0.0)
STOP_TEXTS = ("⟦end of answer⟧", "⟦stop⟧")  # looked for, and never found
SEED = 1
_SEEDS_TRIED = 20
_PATIENCE_S = 120.0  # an engine that failed makes no further row


@dataclass(frozen=True)
class Stamp:
    """A moment, or with `since` a span. Units: seconds by the wall clock; CPU seconds of this process, all threads."""

    wall_s: float
    cpu_s: float

    def since(self, start: Stamp) -> Stamp:
        return Stamp(self.wall_s - start.wall_s, self.cpu_s - start.cpu_s)


def now() -> Stamp:
    return Stamp(time.perf_counter(), time.process_time())


class Contestant(Protocol):
    """What takes part in the rounds. n_last: so many tokens of the prompt in a call of their own; only `Bare` has a choice."""

    def prefill(self, prompt: Sequence[int], n_last: int = 0) -> Stamp: ...
    def turns(self, prompt: Sequence[int], n_turns: int, turn: int) -> Iterator[Stamp]: ...
    def close(self) -> None: ...


class Clock:
    """A policy that lets everything pass and notes when it is asked: a row of logits has just been read.

    turn: after so many rows it holds the engine's thread until `go` is released, n_turns times; what that takes is not
    counted.
    """

    name: ClassVar[str] = "clock"
    constrains: ClassVar[bool] = False

    def __init__(self, n_turns: int = 0, turn: int = 1) -> None:
        self.rows: list[Stamp] = []
        self.go = threading.Semaphore(0)
        self.turns: queue.SimpleQueue[Stamp] = queue.SimpleQueue()  # the span of each turn; the first is no turn yet
        self._n_turns, self._turn, self._left = n_turns, turn, now()

    def start(self, begin: Begin) -> None:
        return None

    def constrain(self, state: None, draw: Draw) -> Draw:
        self.rows.append(now())
        n_done, within = divmod(len(self.rows) - 1, self._turn)
        if not within and n_done <= self._n_turns:
            self.turns.put(self.rows[-1].since(self._left))
            if n_done < self._n_turns:
                self.go.acquire()
                self._left = now()
        return draw

    def observe(self, state: None, taken: Taken) -> Verdict:
        return Verdict(None)


class Lent:
    """A model that several schedulers use, and that none of them frees."""

    def __init__(self, model: LoadedModel) -> None:
        self.vocab = model.vocab

    def close(self) -> None:
        """Whoever loaded the model frees it."""


class Engine:
    """Ours, as `local.load` builds it: thread, sequences, policies, events that are read on this thread."""

    def __init__(self, model: LoadedModel, settings: ContextSettings, prefill_chunk: int) -> None:
        lent = cast(LoadedModel, Lent(model))
        self._scheduler = Scheduler(lent, Context(model, settings), prefill_chunk=prefill_chunk)

    def prefill(self, prompt: Sequence[int], n_last: int = 0) -> Stamp:
        """From the request to the row that the first token is drawn from."""
        clock, start = Clock(), now()
        for _ in self._submit(prompt, 1, clock):
            pass
        return clock.rows[0].since(start)

    def turns(self, prompt: Sequence[int], n_turns: int, turn: int) -> Iterator[Stamp]:
        clock = Clock(n_turns, turn)
        stream = self._submit(prompt, n_turns * turn + 1, clock)
        threading.Thread(target=lambda: list(stream), daemon=True).start()
        clock.turns.get(timeout=_PATIENCE_S)
        for _ in range(n_turns):
            clock.go.release()
            yield clock.turns.get(timeout=_PATIENCE_S)

    def token_ms(self, prompt: Sequence[int], n_tokens: int, limit_s: float) -> list[float]:
        """Milliseconds from row to row without a hold; a reply that takes longer than limit_s is cancelled."""
        clock, start = Clock(), now()
        stream = self._submit(prompt, n_tokens, clock)
        for event in stream:
            if not isinstance(event, Done) and now().since(start).wall_s > limit_s:
                stream.cancel()
        return [1e3 * b.since(a).wall_s for a, b in zip(clock.rows, clock.rows[1:], strict=False)]

    def _submit(self, prompt: Sequence[int], n_tokens: int, clock: Clock) -> Stream:
        policies = arrange([Phases(), Stops(frozenset(), STOP_TEXTS, n_tokens)])
        return self._scheduler.submit(Request(list(prompt), (*policies, clock), SAMPLING, SEED, alone=True))

    def close(self) -> None:
        self._scheduler.close()


class Bare:
    """llama_decode and a sampler chain in a loop: the least that anyone does, and no text is made of the tokens."""

    def __init__(self, model: LoadedModel, settings: ContextSettings) -> None:
        self._api = api = native.engine()
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = settings.n_ctx, settings.n_batch, settings.n_ubatch
        params.n_threads = params.n_threads_batch = settings.n_threads
        params.type_k, params.type_v = int(KV_TYPES[settings.type_k]), int(KV_TYPES[settings.type_v])
        params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_AUTO
        params.no_perf = True
        self._context: Any = api.llama_init_from_model(model.pointer, params)
        if not self._context:
            raise RuntimeError(f"no context for the bare loop: {native.last_lines()}")
        self._chain = chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        api.llama_sampler_chain_add(chain, api.llama_sampler_init_top_k(SAMPLING.top_k))
        api.llama_sampler_chain_add(chain, api.llama_sampler_init_top_p(SAMPLING.top_p, 1))
        api.llama_sampler_chain_add(chain, api.llama_sampler_init_temp(SAMPLING.temperature))
        api.llama_sampler_chain_add(chain, api.llama_sampler_init_dist(SEED))

    def prefill(self, prompt: Sequence[int], n_last: int = 0) -> Stamp:
        """The prompt in one call; with n_last its last tokens in a call of their own."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), False)
        start, place = now(), len(prompt) - n_last
        self._decode(prompt[:place], output=not n_last)
        if n_last:
            self._decode(prompt[place:], output=True)
        return now().since(start)

    def turns(self, prompt: Sequence[int], n_turns: int, turn: int) -> Iterator[Stamp]:
        self.prefill(prompt)
        for _ in range(n_turns):
            start = now()
            for _ in range(turn):
                self._decode([self._api.llama_sampler_sample(self._chain, self._context, -1)], output=True)
            yield now().since(start)

    def _decode(self, tokens: Sequence[int], output: bool) -> None:
        n = len(tokens)
        ids = (ctypes.c_int32 * n)(*tokens)  # the batch only points to it
        batch = self._api.llama_batch_get_one(ids, n)
        batch.logits = (ctypes.c_int8 * n)(*([0] * (n - 1)), output)
        code = self._api.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}: {native.last_lines()}")
        if output:  # waits for a GPU
            self._api.llama_get_logits_ith(self._context, -1)

    def close(self) -> None:
        self._api.llama_sampler_free(self._chain)
        self._api.llama_free(self._context)


class HighLevel:
    """`llama_cpp.Llama`, streaming. It loads the file a second time. A row counts as there when its text is."""

    def __init__(self, path: Path, settings: ContextSettings) -> None:
        import llama_cpp

        self._llama: Any = llama_cpp.Llama(
            str(path),
            n_gpu_layers=ALL_LAYERS,
            n_ctx=settings.n_ctx,
            n_batch=settings.n_batch,
            n_ubatch=settings.n_ubatch,
            n_threads=settings.n_threads,
            n_threads_batch=settings.n_threads,
            flash_attn=True,
            no_perf=True,
            verbose=False,
        )
        self._seed = SEED

    def prefill(self, prompt: Sequence[int], n_last: int = 0) -> Stamp:
        """To the first token's text: one draw more than the others are charged with."""
        start = now()
        next(self._chunks(prompt, 1))
        return now().since(start)

    def turns(self, prompt: Sequence[int], n_turns: int, turn: int) -> Iterator[Stamp]:
        """Raises: RuntimeError when every seed's reply meets an end token: the class has no switch for that."""
        n_tokens = n_turns * turn + 1
        while sum(1 for _ in self._chunks(prompt, n_tokens)) < n_tokens:
            self._seed += 1
            if self._seed > _SEEDS_TRIED:
                raise RuntimeError(f"Llama made no {n_tokens} tokens with any of {_SEEDS_TRIED} seeds")
        chunks = self._chunks(prompt, n_tokens)
        next(chunks)
        for _ in range(n_turns):
            start = now()
            for _ in range(turn):
                next(chunks)
            yield now().since(start)

    def _chunks(self, prompt: Sequence[int], n_tokens: int) -> Iterator[Any]:
        """One chunk for each token, as long as tokens are whole characters."""
        self._llama.reset()  # else it goes on from the prefix that it has
        chunks: Iterator[Any] = self._llama.create_completion(
            list(prompt),
            max_tokens=n_tokens,
            temperature=SAMPLING.temperature,
            top_k=SAMPLING.top_k,
            top_p=SAMPLING.top_p,
            min_p=SAMPLING.min_p,
            seed=self._seed,
            stop=list(STOP_TEXTS),
            stream=True,
        )
        return chunks

    def close(self) -> None:
        self._llama.close()
