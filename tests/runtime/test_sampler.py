"""backend.sampler: few chains are kept, and which ones changes no draw."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from qwq_lite.backend import native
from qwq_lite.backend.sampler import Sampler
from qwq_lite.sampling import Sampling

N_VOCAB = 1000
ROW = np.random.default_rng(1).normal(size=N_VOCAB).astype(np.float32)
KEPT = 8


class Counted:
    """llama.cpp's calls, with the chains that are alive."""

    def __init__(self, api: Any) -> None:
        self._api, self.alive, self.made = api, set[int](), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._api, name)

    def llama_sampler_chain_init(self, params: Any) -> Any:
        chain = self._api.llama_sampler_chain_init(params)
        self.alive.add(ctypes.addressof(chain.contents))
        self.made += 1
        return chain

    def llama_sampler_free(self, sampler: Any) -> None:
        self.alive.discard(ctypes.addressof(sampler.contents))
        self._api.llama_sampler_free(sampler)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    api = Counted(native.engine())
    monkeypatch.setattr(native, "engine", lambda: api)
    yield api
    assert not api.alive, "chains are freed at the end"


def settings(n: int) -> Sampling:
    return Sampling(temperature=0.5 + n / 100, top_k=0)


def test_the_chains_of_many_settings_are_freed(counted: Counted) -> None:
    sampler = Sampler(N_VOCAB)
    for n in range(100):
        sampler.sample(ROW, settings(n), n)
        assert len(counted.alive) == min(n + 1, KEPT)
    sampler.close()


def test_the_chain_that_was_longest_out_of_use_goes(counted: Counted) -> None:
    sampler = Sampler(N_VOCAB)
    for n in [*range(KEPT), 0]:
        sampler.sample(ROW, settings(n), 1)
    assert counted.made == KEPT
    sampler.sample(ROW, settings(KEPT), 1)  # takes the place of 1, not of 0
    sampler.sample(ROW, settings(0), 1)
    assert counted.made == KEPT + 1
    sampler.sample(ROW, settings(1), 1)
    assert counted.made == KEPT + 2
    sampler.close()


def test_a_draw_does_not_depend_on_the_chains_that_are_kept() -> None:
    sampler, draws = Sampler(N_VOCAB), [(settings(n), seed) for n in range(3 * KEPT) for seed in (1, 2)]
    first = [sampler.sample(ROW, *draw) for draw in draws]
    assert first == [sampler.sample(ROW, *draw) for draw in draws]
    assert first[::-1] == [sampler.sample(ROW, *draw) for draw in draws[::-1]]
    assert len(set(first)) > KEPT
    sampler.close()
