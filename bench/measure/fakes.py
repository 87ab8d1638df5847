"""A model of 152,064 rows that computes nothing: what is left is the engine's own work.

The context is the real one, with its checks, its batch and its view of the logits; only llama.cpp's calls are replaced.
Not counted therefore: what ctypes takes to enter llama_decode and llama_get_logits_ith, 1 to 2 µs.
"""

from __future__ import annotations

import ctypes
import itertools
import time
from types import SimpleNamespace
from typing import cast

import numpy as np
import numpy.typing as npt

from qwq_lite.backend import native
from qwq_lite.backend.context import Context, ContextSettings, _Batch
from qwq_lite.backend.model import LoadedModel
from qwq_lite.backend.vocab import Vocab
from qwq_lite.sampling import Sampling

N_VOCAB = 152_064  # QwQ's
_PIECES = tuple(piece.encode() for piece in (" the", " answer", " is", ",", " über", "\n", " 12", ".", " 二", " so"))


def logits(seed: int, n_likely: int = 20) -> npt.NDArray[np.float32]:
    """A row of which a few tokens have nearly all the probability, as a model's rows have. Shape (N_VOCAB,).

    n_likely: how many; with 0 the row is as flat as noise, and top_p keeps tens of thousands.
    """
    random = np.random.default_rng(seed)
    row = random.normal(0, 2, N_VOCAB).astype(np.float32)
    row[random.choice(N_VOCAB, n_likely, replace=False)] = random.uniform(12, 20, n_likely)
    return row


class EmptyContext(Context):
    """Every decode succeeds at once and gives the same row.

    sweep_bytes: each decode reads so much memory, as a real one reads weights, and so leaves the caches cold. What that
    takes is in `swept_s`, CPU seconds of the engine's thread.
    """

    def __init__(self, settings: ContextSettings, sweep_bytes: int = 0) -> None:
        self.swept_s = 0.0
        self._row, self._weights = logits(1), np.ones(sweep_bytes // 8)
        self._api = SimpleNamespace(
            llama_decode=lambda context, batch: self._sweep(),
            llama_n_ctx=lambda context: settings.n_ctx,
            llama_memory_seq_rm=lambda memory, sequence, start, end: True,
        )
        self.settings, self.n_vocab, self.can_cut = settings, N_VOCAB, True
        self.pointer = self._memory = None
        self._logits, self._rows = (lambda context, index: self._row.ctypes.data), {}
        self._stop = ctypes.create_string_buffer(2)
        self.n_batch = settings.n_batch
        self._batch = _Batch(native.engine(), settings.n_batch)

    def _sweep(self) -> int:
        start = time.thread_time()
        self._weights.sum()
        self.swept_s += time.thread_time() - start
        return 0


def empty_model() -> LoadedModel:
    """A vocabulary of short pieces and nothing to free."""
    vocab = SimpleNamespace(
        n_tokens=N_VOCAB, piece=lambda token: _PIECES[token % len(_PIECES)], tokenize=lambda text, parse_special: []
    )
    return cast(LoadedModel, SimpleNamespace(vocab=cast(Vocab, vocab), close=lambda: None))


class StubSampler:
    """Token after token, without a look at the row."""

    def __init__(self) -> None:
        self._tokens = itertools.cycle(range(100))

    def sample(self, row: npt.NDArray[np.float32], settings: Sampling, seed: int) -> int:
        return next(self._tokens)

    def close(self) -> None:
        """There is nothing to free."""
