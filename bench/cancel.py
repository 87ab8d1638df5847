"""How long a cancel takes: from `Stream.cancel()` on another thread to the end of the stream.

llama.cpp asks after each node of its graph whether to stop, so on a CPU a cancel waits for the node in hand, and for nothing
more; a chunk of a prompt or a token has hundreds of them. What is measured beside is therefore a whole chunk and a whole
token: a cancel that had to wait for those would on average take half of it.

    python bench/cancel.py [MODEL.gguf] [--rounds 100]

Prints a table and ends with one JSON line; times are in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

from qwq_lite.backend.context import Context, ContextSettings
from qwq_lite.backend.model import LoadedModel
from qwq_lite.engine.request import Request
from qwq_lite.engine.scheduler import Scheduler
from qwq_lite.events import Answer, Done, Progress
from qwq_lite.reply.policies.stops import Stops
from qwq_lite.sampling import Sampling

DEMO = Path(__file__).resolve().parents[1] / "build" / "demo" / "SmolLM2-135M-Instruct-Q4_K_M.gguf"
CHUNK = 512
ENDLESS = Stops(frozenset())


def cancelled_ms(scheduler: Scheduler, request: Request, kind: type, wait_s: float) -> float:
    """Cancel `wait_s` seconds after the first event of a kind; milliseconds until the stream has ended."""
    stream = scheduler.submit(request)
    events = iter(stream)
    while not isinstance(next(events), kind):
        pass
    time.sleep(wait_s)
    start = time.perf_counter()
    stream.cancel()
    reason = [event.reply.finish_reason for event in events if isinstance(event, Done)]
    assert reason == ["cancelled"]
    return 1e3 * (time.perf_counter() - start)


def chunk_s(scheduler: Scheduler, prompt: list[int]) -> float:
    """Seconds of a whole chunk of a prompt."""
    times = [
        time.perf_counter()
        for event in scheduler.submit(Request(prompt, (Stops(frozenset(), max_tokens=1),), Sampling(), 1, alone=True))
        if isinstance(event, Progress)
    ]
    return times[1] - times[0]


def token_s(scheduler: Scheduler) -> float:
    """Seconds of a token."""
    request = Request([1, 2, 3], (Stops(frozenset(), max_tokens=40),), Sampling(), 1, alone=True)
    (done,) = [event for event in scheduler.submit(request) if isinstance(event, Done)]
    return done.reply.stats.decode_s / 40


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=DEMO)
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    weights = LoadedModel(arguments.model)
    context = Context(weights, ContextSettings(n_ctx=4096, n_threads=1, n_seq_max=2))
    scheduler = Scheduler(weights, context, prefill_chunk=CHUNK)
    moments = random.Random(1)
    prompt = [moments.randrange(weights.vocab.n_tokens) for _ in range(2 * CHUNK)]
    whole = {"prefill": chunk_s(scheduler, prompt), "decode": token_s(scheduler)}
    found: dict[str, list[float]] = {"prefill": [], "decode": []}
    for number in range(arguments.rounds):
        for name, tokens, kind in (("prefill", prompt, Progress), ("decode", prompt[:8], Answer)):
            request = Request(tokens, (ENDLESS,), Sampling(), number, alone=True)
            found[name].append(cancelled_ms(scheduler, request, kind, moments.random() * 0.9 * whole[name]))
    scheduler.close()
    result: dict[str, float | int | str] = {
        "bench": "cancel",
        "model": arguments.model.name,
        "rounds": arguments.rounds,
    }
    print(f"{'':8} {'median':>8} {'99 %':>8} {'longest':>8}   a whole {'call':>8}   (ms)")
    for name, times in found.items():
        ordered = sorted(times)
        figures = (statistics.median(times), ordered[int(0.99 * (len(ordered) - 1))], ordered[-1], 1e3 * whole[name])
        print(f"{name:8} {figures[0]:8.2f} {figures[1]:8.2f} {figures[2]:8.2f}           {figures[3]:8.1f}")
        for word, value in zip(("median_ms", "p99_ms", "longest_ms", "whole_call_ms"), figures, strict=True):
            result[f"{name}_{word}"] = round(value, 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
