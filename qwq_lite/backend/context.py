"""One llama.cpp context: a KV cache shared by several sequences, decoding, logits. Knows no text.

All calls but `abort` come from the one thread that owns it. Every number is checked here before llama.cpp sees it, since a
wrong one ends the process there.
Source: llama.cpp include/llama.h, src/llama-context.cpp
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from qwq_lite.backend import native
from qwq_lite.backend.model import LoadedModel
from qwq_lite.backend.settings import KV_TYPES, EngineSettings
from qwq_lite.errors import EngineError

if TYPE_CHECKING:  # numpy is imported while the weights are read, and not before
    import numpy as np
    import numpy.typing as npt

Row: TypeAlias = "npt.NDArray[np.float32]"

_ABORTED, _FULL = 2, 1
_ROWS_KEPT = 64


@dataclass(frozen=True)
class ContextSettings:
    """Sizes of a context, in llama.cpp's words."""

    n_ctx: int  # tokens of KV cache, shared by all sequences
    n_threads: int
    n_batch: int = 512  # most tokens of one decode call
    n_ubatch: int = 512  # most tokens of one graph
    n_seq_max: int = 1  # sequences
    type_k: str = "f16"  # a name in KV_TYPES
    type_v: str = "f16"
    n_outputs_max: int = 1  # rows of logits that one call can ask for; never below n_seq_max

    @staticmethod
    def of(choice: EngineSettings, n_threads: int) -> ContextSettings:
        """Settings of a plan's choice."""
        return ContextSettings(
            choice.n_ctx,
            n_threads,
            max(choice.n_ubatch, ContextSettings.n_batch),
            choice.n_ubatch,
            choice.n_seq_max,
            choice.type_k,
            choice.type_v,
            choice.n_outputs_max,
        )

    def params(self, api: Any) -> Any:
        """llama_context_params; all that decides over memory is here, for `measure` asks with the same."""
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = self.n_ctx, self.n_batch, self.n_ubatch
        params.n_seq_max, params.n_outputs_max = self.n_seq_max, max(self.n_seq_max, self.n_outputs_max)
        params.n_threads = params.n_threads_batch = self.n_threads
        params.type_k, params.type_v = int(KV_TYPES[self.type_k]), int(KV_TYPES[self.type_v])
        params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_AUTO
        params.kv_unified = True
        params.no_perf = True
        return params


class Entry(NamedTuple):
    """One token of a batch."""

    token: int
    position: int  # in its sequence
    sequence: int = 0
    output: bool = False  # its row of logits is wanted


class CacheFull(EngineError):
    """No room in the KV cache for these tokens."""


class Aborted(Exception):
    """A decode call was stopped by `abort`; micro-batches that were finished stay in the cache."""


class Context:
    """Raises: EngineError when llama.cpp cannot make the context, with its last lines."""

    def __init__(self, model: LoadedModel, settings: ContextSettings) -> None:
        self._api = api = native.engine()
        self.settings = settings
        self.n_vocab = model.vocab.n_tokens
        params = settings.params(api)
        self._stop = ctypes.create_string_buffer(2)
        self._abort_callback = _native_flag_test(api)
        params.abort_callback = self._abort_callback
        params.abort_callback_data = ctypes.addressof(self._stop)
        self.pointer: Any = api.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise EngineError(
                f"{model.path}: no context of {settings.n_ctx} tokens: {native.last_lines() or 'out of memory'};"
                " ask for a smaller one with --ctx"
            )
        self._memory = api.llama_get_memory(self.pointer)
        # A recurrent state stands for all its tokens: no prefix of it can be kept.
        self.can_cut = not (api.llama_model_is_recurrent(model.pointer) or api.llama_model_is_hybrid(model.pointer))
        self.n_batch: int = api.llama_n_batch(self.pointer)  # no more than the context that was asked for
        self._batch = _Batch(api, self.n_batch)
        self._logits = native.symbol("llama_get_logits_ith", ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int32])
        self._rows: dict[int, Row] = {}

    @property
    def n_ctx(self) -> int:
        value: int = self._api.llama_n_ctx(self.pointer)
        return value

    def decode(self, entries: Sequence[Entry]) -> None:
        """Run the model over a batch; the rows of its output entries can then be read by their index in it.

        Raises: Aborted; CacheFull; EngineError when llama.cpp fails.
        """
        if not 0 < len(entries) <= self.n_batch:
            raise EngineError(f"a batch of {len(entries)} tokens, 1 to {self.n_batch} are allowed")
        n_vocab, n_seq_max = self.n_vocab, self.settings.n_seq_max
        for token, _, sequence, _ in entries:
            if not 0 <= token < n_vocab or not 0 <= sequence < n_seq_max:
                raise EngineError(f"token {token} of sequence {sequence} is out of range")
        code = self._api.llama_decode(self.pointer, self._batch.filled(entries))
        if code == _ABORTED:
            raise Aborted
        if code == _FULL:
            raise CacheFull(f"the context of {self.n_ctx} tokens is full")
        if code != 0:
            raise EngineError(f"llama_decode returned {code}: {native.last_lines()}")

    def row(self, index: int) -> Row:
        """Logits of the batch's entry `index`. Shape (n_vocab,): a view that the next decode overwrites."""
        address = self._logits(self.pointer, index)
        if not address:
            raise EngineError(f"entry {index} of the last batch has no logits")
        row = self._rows.get(address)
        if row is None:  # the buffer seldom moves, and an array over it costs more than a draw's bookkeeping
            if len(self._rows) > _ROWS_KEPT:
                self._rows.clear()
            import numpy as np

            row = self._rows[address] = np.ctypeslib.as_array((ctypes.c_float * self.n_vocab).from_address(address))
        return row

    def remove(self, sequence: int, start: int) -> bool:
        """Forget a sequence from position `start` on. False where the cache cannot: a recurrent state is forgotten whole."""
        return bool(self._api.llama_memory_seq_rm(self._memory, sequence, start, -1))

    def copy(self, source: int, target: int, end: int) -> None:
        """Let `target` share the first `end` positions of `source`; nothing is computed again."""
        self._api.llama_memory_seq_rm(self._memory, target, -1, -1)
        self._api.llama_memory_seq_cp(self._memory, source, target, 0, end)

    def state_bytes(self, sequence: int) -> int:
        """Bytes that `state_into` needs for a sequence."""
        size: int = self._api.llama_state_seq_get_size(self.pointer, sequence)
        return size

    def state_into(self, sequence: int, buffer: memoryview) -> int:
        """Write a sequence's K and V into `buffer`, a mapping best of all, and return how many bytes it took.

        llama.cpp fills it directly: of QwQ's 4.25 GiB at 32,768 tokens nothing passes through Python's memory.
        Raises: EngineError when the buffer is too short.
        """
        written: int = self._api.llama_state_seq_get_data(self.pointer, _array_over(buffer), len(buffer), sequence)
        if written == 0:
            raise EngineError(f"the state of sequence {sequence} does not fit {len(buffer)} bytes")
        return written

    def state_from(self, sequence: int, buffer: memoryview) -> None:
        """Give a sequence the state that `state_into` wrote, from a buffer that is known to be whole.

        llama.cpp checks no lengths there: the caller has checked a digest.
        Raises: EngineError when llama.cpp refuses it: no room, another model or KV type.
        """
        read = self._api.llama_state_seq_set_data(self.pointer, _array_over(buffer), len(buffer), sequence)
        if read != len(buffer):
            self._api.llama_memory_seq_rm(self._memory, sequence, -1, -1)
            raise EngineError(
                f"llama.cpp does not take the saved state: {native.last_lines() or 'no room in the cache'}"
            )

    def n_positions(self, sequence: int) -> int:
        """How many positions of a sequence the cache holds, from 0 on."""
        last: int = self._api.llama_memory_seq_pos_max(self._memory, sequence)
        return last + 1

    def abort(self, stop: bool) -> None:
        """From any thread: let a running decode end within a graph node (CPU), or lift that again."""
        self._stop[0] = b"\1" if stop else b"\0"

    def close(self) -> None:
        if self.pointer:
            self._api.llama_free(self.pointer)
            self.pointer = None


class _Batch:
    """A llama_batch over arrays of our own, filled anew for each call."""

    def __init__(self, api: Any, n_batch: int) -> None:
        self._token, self._pos = (ctypes.c_int32 * n_batch)(), (ctypes.c_int32 * n_batch)()
        self._seq, self._output = (ctypes.c_int32 * n_batch)(), (ctypes.c_int8 * n_batch)()
        self._n_seq = (ctypes.c_int32 * n_batch)(*([1] * n_batch))
        places = [ctypes.addressof(self._seq) + 4 * i for i in range(n_batch)]
        self._seq_pointers = (ctypes.POINTER(ctypes.c_int32) * n_batch)(
            *(ctypes.cast(place, ctypes.POINTER(ctypes.c_int32)) for place in places)
        )
        self._struct = api.llama_batch(0, self._token, None, self._pos, self._n_seq, self._seq_pointers, self._output)

    def filled(self, entries: Sequence[Entry]) -> Any:
        for i, (token, position, sequence, output) in enumerate(entries):
            self._token[i], self._pos[i], self._seq[i], self._output[i] = token, position, sequence, output
        self._struct.n_tokens = len(entries)
        return self._struct


def _array_over(buffer: memoryview) -> Any:
    """A C array that is the buffer. Not through ctypes.cast, whose result keeps it alive in a cycle."""
    return (ctypes.c_uint8 * len(buffer)).from_buffer(buffer)


def _native_flag_test(api: Any) -> Any:
    """A C function that says whether a byte is set: libc's strlen over a one-byte flag.

    llama.cpp calls it after every graph node, 600 times a token; a Python callback there would cost more than the sampling.
    """
    libc = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)
    return ctypes.cast(libc.strlen, api.ggml_abort_callback)
