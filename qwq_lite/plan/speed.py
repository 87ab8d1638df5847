"""Memory bandwidth, the default number of threads, and a notice when decoding is far slower than a plan allows."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwq_lite.events import Notice, Stats
from qwq_lite.plan.run_plan import RunPlan
from qwq_lite.system import process_limits

MOST_THREADS = 512  # GGML_MAX_N_THREADS
_BLOCK_BYTES = 1 << 26  # of each thread; together more than any cache
_MOST_READERS = 8  # they saturate the memory of a desktop
_ROUNDS = 3
_LEAST_TOKENS = 48  # fewer say nothing about speed
_TOO_SLOW = 3  # a limit by bandwidth is reached to 80 %; a third of it has another reason


def host_bandwidth(n_threads: int = 1) -> float:
    """Bytes a second that so many threads read from memory here. Takes about a tenth of a second."""
    import numpy as np

    n_threads = min(n_threads, _MOST_READERS)
    blocks = [np.ones(_BLOCK_BYTES // 4, np.float32) for _ in range(n_threads)]
    together = threading.Barrier(n_threads)

    def read(block: Any) -> tuple[float, float]:
        together.wait()
        start = time.perf_counter()
        block.sum()  # numpy lets go of the GIL
        return start, time.perf_counter()

    best = 0.0
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in range(_ROUNDS):
            starts, ends = zip(*pool.map(read, blocks), strict=True)
            best = max(best, n_threads * _BLOCK_BYTES / (max(ends) - min(starts)))
    return best


def default_threads(root: Path = Path("/")) -> int:
    """The cores that this process may use, by its affinity and CPU quota; where these are all, one less for the desktop.

    With all of them, one busy program beside makes decoding 20 times slower. A share of the machine has its own limit: other
    programs have the rest.
    """
    n_cores = process_limits.usable_cores(root)
    n_kept = 1 if n_cores == process_limits.machine_cores() else 0
    return max(1, min(n_cores - n_kept, process_limits.cpu_quota(root) or n_cores, MOST_THREADS))


class SpeedCheck:
    """Says once, after a reply, that decoding is far below what the plan's bandwidth allows."""

    def __init__(self, plan: RunPlan, n_threads: int, measure: Callable[[int], float] = host_bandwidth) -> None:
        self._plan, self._n_threads, self._measure = plan, n_threads, measure
        self._said = False

    def __call__(self, stats: Stats) -> Notice | None:
        if self._said or stats.n_generated < _LEAST_TOKENS:
            return None
        plan = self._plan
        if plan.footprint.host.kv and not plan.room.host_bandwidth:  # a layer on the host, whose speed is not known yet
            room = replace(plan.room, host_bandwidth=self._measure(self._n_threads))
            self._plan = plan = replace(plan, room=room)
        if not stats.decode_tok_s * _TOO_SLOW < plan.decode_tok_s:
            return None
        self._said = True
        on_gpu = any(name != "CPU" for name in plan.footprint.devices)
        why = (
            "the card's memory may have spilled to the host's, or another program uses it; close what does, or take a smaller"
            " context (n_ctx, --ctx)"
            if on_gpu
            else "another program may keep the processor or the memory busy"
        )
        return Notice(
            f"{stats.decode_tok_s:.1f} tok/s, where this machine's bandwidth allows {plan.decode_tok_s:.1f}: {why}",
            "slow",
        )
