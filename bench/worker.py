"""What does a process of its own cost? The engine in a worker against the same engine in this process.

    python bench/worker.py [--model FILE] [--rounds 7] [--tokens 128]

Decode speed by the reader's clock, from the first text to the last, alternating; ratio of medians. Delivery: half of a round trip
of the shortest call while nothing else runs, which is one message each way. Load: from the call to the model; here all libraries
are loaded already, in the worker they are not. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "convert")]

from qwq_lite.chat.model import Model  # noqa: E402
from qwq_lite.events import Answer  # noqa: E402
from qwq_lite.loading import load  # noqa: E402

QUESTION = [{"role": "user", "content": "Tell me a long story about the sea."}]
N_ROUND_TRIPS = 2000


def tok_s(model: Model, n_tokens: int) -> float:
    times = [
        time.perf_counter()
        for event in model.generate(QUESTION, max_tokens=n_tokens, temperature=0.0)
        if isinstance(event, Answer)
    ]
    return (len(times) - 1) / (times[-1] - times[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "build/demo/SmolLM2-135M-Instruct-Q4_K_M.gguf")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    loads: dict[bool, list[float]] = {True: [], False: []}
    speeds: dict[bool, list[float]] = {True: [], False: []}
    trips: list[float] = []
    for n in range(arguments.rounds):  # where a context comes to lie makes it faster or slower for its whole life
        models: dict[bool, Model] = {}
        for isolated in (True, False) if n % 2 else (False, True):
            start = time.perf_counter()
            models[isolated] = load(arguments.model, n_ctx=2048, isolated=isolated)
            loads[isolated].append(time.perf_counter() - start)
        for isolated in (True, False, False, True):
            speeds[isolated].append(tok_s(models[isolated], arguments.tokens))
        for _ in range(N_ROUND_TRIPS // arguments.rounds):
            start = time.perf_counter()
            models[True].tokenize("a")
            trips.append(time.perf_counter() - start)
        for model in models.values():
            model.unload()
    trips.sort()
    ratios = [there / here for there, here in zip(speeds[True], speeds[False], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    result: dict[str, Any] = {
        "bench": "worker",
        "tok_s_worker": round(statistics.median(speeds[True]), 1),
        "tok_s_here": round(statistics.median(speeds[False]), 1),
        "ratio": round(middle, 3),
        "ratio_quartiles": [round(low, 3), round(high, 3)],
        "delivery_ms_median": round(trips[len(trips) // 2] * 500, 3),
        "delivery_ms_p99": round(trips[len(trips) * 99 // 100] * 500, 3),
        "load_later_s": round(statistics.median(loads[True]) - statistics.median(loads[False]), 3),
    }
    for name, value in result.items():
        print(f"{name:20} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
