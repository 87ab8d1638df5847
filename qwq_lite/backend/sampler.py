"""llama.cpp's own sampler chain over one row of logits, seeded anew for each draw.

Order: top_k, top_p, min_p, temperature, then the draw, as QwQ's authors ask for. `dist` keeps a random state that cannot
be saved, only cloned; a fresh one per draw costs 7 µs and makes every draw a function of its seed.
Source: llama.cpp src/llama-sampler.cpp
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from qwq_lite.backend import native
from qwq_lite.sampling import Sampling

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Row: TypeAlias = "npt.NDArray[np.float32]"

_CHAINS_KEPT = 8  # without top_k a chain comes to hold 1.8 MB at QwQ's vocabulary
_CANDIDATE = [("id", "i4"), ("logit", "f4"), ("p", "f4")]  # llama_token_data


class Sampler:
    """Chains for the settings used last, and the array of candidates they work on. One thread's own."""

    def __init__(self, n_vocab: int) -> None:
        import numpy as np

        self._api = native.engine()
        self._chains: dict[Sampling, Any] = {}  # the one that was longest out of use first
        self._ids = np.arange(n_vocab, dtype=np.int32)
        self._candidates = np.empty(n_vocab, _CANDIDATE)
        self._data = ctypes.cast(self._candidates.ctypes.data, ctypes.POINTER(self._api.llama_token_data))

    def sample(self, row: Row, settings: Sampling, seed: int) -> int:
        """One token. Shapes: row (n_vocab,), left as it is. The same arguments give the same token."""
        api, candidates = self._api, self._candidates
        if settings.temperature <= 0:
            return int(row.argmax())
        candidates["id"], candidates["logit"] = self._ids, row
        array = api.llama_token_data_array(self._data, len(candidates), -1, False)
        pointer = ctypes.byref(array)
        api.llama_sampler_apply(self._chain(settings), pointer)
        draw = api.llama_sampler_init_dist(seed & 0xFFFFFFFF)
        api.llama_sampler_apply(draw, pointer)
        token: int = array.data[array.selected].id
        api.llama_sampler_free(draw)
        return token

    def _chain(self, settings: Sampling) -> Any:
        chain = self._chains.pop(settings, None)
        if chain is None:
            chain = self._made(settings)
            if len(self._chains) >= _CHAINS_KEPT:
                self._api.llama_sampler_free(self._chains.pop(next(iter(self._chains))))
        self._chains[settings] = chain
        return chain

    def _made(self, settings: Sampling) -> Any:
        api = self._api
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        stages: list[tuple[bool, Callable[[], Any]]] = [
            (settings.top_k > 0, lambda: api.llama_sampler_init_top_k(settings.top_k)),
            (settings.top_p < 1, lambda: api.llama_sampler_init_top_p(settings.top_p, 1)),
            (settings.min_p > 0, lambda: api.llama_sampler_init_min_p(settings.min_p, 1)),
            (settings.temperature != 1, lambda: api.llama_sampler_init_temp(settings.temperature)),
        ]
        for wanted, make in stages:
            if wanted:
                api.llama_sampler_chain_add(chain, make())
        return chain

    def close(self) -> None:
        for chain in self._chains.values():
            self._api.llama_sampler_free(chain)
        self._chains.clear()
