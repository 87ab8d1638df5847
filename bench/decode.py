"""Is our engine as fast as llama.cpp itself?

The physics. Decoding one token reads every weight once, so a token takes at least the bytes of the weights by the
memory's bandwidth: 20 ms for a model of 1 GB at 50 GB/s, half a second for QwQ's 19.85 GB there, 21 ms on a card with 936
GB/s. Nothing that is done around `llama_decode` can make this faster; it can only add to it. What we add to each token is
Python on the engine's thread (text, policies, events, the sampler's seed): it must stay far below the shortest token that
this engine will meet. Prefill reads each weight once for a whole batch, so there arithmetic is the limit, and small
batches use it badly: that is what the chunk costs. The prompt's last token is decoded alone, always, because logits
depend on the shape of the batch; this costs one token's decode per prompt, and is shown apart.

What is compared, with the same model, threads, context, KV type, flash attention and sampler chain:
    ours   the Scheduler with its thread, sequences, policies, and events that another thread reads
    bare   a loop of llama_decode and llama_sampler_sample
    llama  the class llama_cpp.Llama, streaming

The machine may be shared, so the contestants take turns, of 8 tokens in decoding and of a whole prompt in prefill, and a
ratio is the median of the turns' ratios. `cpu_ms` is CPU time of the whole process: with one thread it is blind to who
else runs, though not to what they do to the caches.

    python bench/decode.py [MODEL.gguf] [--rounds 7] [--quick]

The last line of stdout is JSON. Exit status 0 whatever the figures say; 1 when there is no model to measure.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.measure.contestants import SAMPLING, STOP_TEXTS, Bare, Contestant, Engine, HighLevel, Stamp  # noqa: E402
from bench.measure.fakes import N_VOCAB, EmptyContext, StubSampler, empty_model, logits  # noqa: E402
from bench.measure.figures import Report, alternate, ratios  # noqa: E402
from qwq_lite.backend import devices  # noqa: E402
from qwq_lite.backend.context import ContextSettings  # noqa: E402
from qwq_lite.backend.model import LoadedModel  # noqa: E402
from qwq_lite.backend.sampler import Row, Sampler  # noqa: E402
from qwq_lite.engine.request import Request  # noqa: E402
from qwq_lite.engine.scheduler import PREFILL_CHUNK, Scheduler  # noqa: E402
from qwq_lite.errors import QwqError  # noqa: E402
from qwq_lite.formats import gguf_header  # noqa: E402
from qwq_lite.plan import speed  # noqa: E402
from qwq_lite.reply.policies.order import arrange  # noqa: E402
from qwq_lite.reply.policies.phases import Phases  # noqa: E402
from qwq_lite.reply.policies.stops import Stops  # noqa: E402
from qwq_lite.sampling import Sampling  # noqa: E402

DEMO = ROOT / "build" / "demo" / "SmolLM2-135M-Instruct-Q4_K_M.gguf"
TEXT = (
    "A river begins where the rain of a hill finds its first common way down. It is narrow there and loud, and takes with"
    " it sand, leaves and small stones. Further down it is slower and carries boats. "
)
N_PROMPT, N_SHORT = 512, 32  # tokens of the prompt: for prefill, and before decoding
CHUNKS = (128, 256, 512)
N_CTX, N_SEQ_MAX = 1024, 4
N_TURN = 8  # tokens that a contestant decodes before the next one has its turn
N_FAKE = 2000  # tokens without a model
SWEEP_BYTES = 100_000_000  # read between two tokens, as weights are: Python that was out of the caches is slower
BUSY_LIMIT_S = 15.0  # with all cores and a busy machine a token may take seconds


def main() -> int:
    options = parsed()
    if not options.model.exists():
        print(f"{options.model}: is not there; the demo model is made by: make demo", file=sys.stderr)
        return 1
    try:
        gguf_header.read(options.model)
        model = LoadedModel(options.model)
    except QwqError as error:
        print(error, file=sys.stderr)
        return 1
    report = Report()
    measure_own_work(report)
    measure_sampler(report)
    settings = ContextSettings(n_ctx=N_CTX, n_threads=speed.default_threads(), n_seq_max=N_SEQ_MAX)
    with contextlib.closing(model):
        measure_engines(report, model, settings, options)
        measure_beside_busy(report, model, options)
    report.show(facts(options.model, settings, options.rounds))
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare the engine's speed with llama.cpp's own.")
    parser.add_argument("model", nargs="?", type=Path, default=DEMO, help="a GGUF file; default the demo model")
    parser.add_argument("--rounds", type=int, default=None, help="rounds of each comparison; default 7, quick 2")
    parser.add_argument("--quick", action="store_true", help="few rounds and short replies: a smoke test, no figures")
    options = parser.parse_args()
    options.rounds = max(1, options.rounds or (2 if options.quick else 7))
    options.n_tokens, options.n_busy = (32, 16) if options.quick else (128, 48)
    return options


def measure_own_work(report: Report) -> None:
    """CPU time of the engine's thread a token, over a model that computes nothing; `cold` as it is between real decodes."""
    greedy = Sampling(temperature=0)
    contestants = {
        "engine_without_sampler_us": partial(own_us, SAMPLING, stub=True),
        "engine_with_argmax_us": partial(own_us, greedy, stub=False),
        "engine_with_chain_us": partial(own_us, SAMPLING, stub=False),
        "engine_without_sampler_cold_us": partial(own_us, SAMPLING, stub=True, n_tokens=200, sweep_bytes=SWEEP_BYTES),
        "engine_with_chain_cold_us": partial(own_us, SAMPLING, stub=False, n_tokens=200, sweep_bytes=SWEEP_BYTES),
    }
    note("the engine's own work")
    for name, values in alternate(contestants, 5).items():
        report.add(name, values)
    report.require("engine_without_sampler_us", at_most=150)


def own_us(sampling: Sampling, *, stub: bool, n_tokens: int = N_FAKE, sweep_bytes: int = 0) -> float:
    """Microseconds of the engine's thread a token, with every policy at work; what the sweep takes is taken off."""
    context = EmptyContext(ContextSettings(n_ctx=2 * n_tokens, n_threads=1), sweep_bytes)
    scheduler = Scheduler(empty_model(), context)
    if stub:
        scheduler._sampler = cast(Sampler, StubSampler())
    policies = arrange([Phases(N_VOCAB - 2, N_VOCAB - 1), Stops(frozenset({N_VOCAB - 3}), STOP_TEXTS, n_tokens)])
    with contextlib.closing(scheduler):
        before = scheduler.call(lambda _: time.thread_time())
        for _ in scheduler.submit(Request([1, 2, 3], policies, sampling, seed=1)):
            pass
        seconds = scheduler.call(lambda _: time.thread_time()) - before - context.swept_s
    return 1e6 * seconds / n_tokens


def measure_sampler(report: Report) -> None:
    """One draw from a row of QwQ's size. The rows take turns, so that none lies in the nearest cache."""
    note("one draw")
    rows, flat = [logits(seed) for seed in range(8)], [logits(seed, n_likely=0) for seed in range(8)]
    mask = np.zeros(N_VOCAB, np.float32)
    mask[np.random.default_rng(0).choice(N_VOCAB, 40_000, replace=False)] = -np.inf
    sampler = Sampler(N_VOCAB)

    def draw_ms(number: int, rows: list[Row], settings: Sampling, mask: Row | None = None) -> float:
        row = rows[number % len(rows)]
        start = time.perf_counter()
        if mask is not None:
            np.add(row, mask, out=row)
        sampler.sample(row, settings, number)
        return 1e3 * (time.perf_counter() - start)

    no_top_k, masked = Sampling(top_k=0), [row.copy() for row in rows]
    report.add("sample_chain_ms", [draw_ms(number, rows, SAMPLING) for number in range(200)])
    report.add("sample_chain_mask_40000_ms", [draw_ms(number, masked, SAMPLING, mask) for number in range(200)])
    report.add("sample_no_top_k_ms", [draw_ms(number, rows, no_top_k) for number in range(200)])
    report.add("sample_no_top_k_flat_row_ms", [draw_ms(number, flat, no_top_k) for number in range(50)])
    sampler.close()
    report.require("sample_chain_ms", at_most=0.5)


def measure_engines(report: Report, model: LoadedModel, settings: ContextSettings, options: Any) -> None:
    """Decode and prefill of ours, the bare loop and the class Llama, with new contexts for each round.

    Where its memory comes to lie makes one context up to 6 % slower than its twin, for as long as it lives; so each round
    makes them in another order.
    """
    tokens = model.vocab.tokenize(TEXT * 40, False)
    long, short = tokens[:N_PROMPT], tokens[:N_SHORT]
    decode: dict[str, list[Stamp]] = {}
    prefill: dict[str, list[Stamp]] = {}
    for number in range(options.rounds):
        note(f"decode and prefill, round {number + 1} of {options.rounds}")
        with contextlib.ExitStack() as stack:
            made = contestants(stack, number, model, settings, options.model)
            ours, bare, llama = {chunk: made[f"ours_chunk_{chunk}"] for chunk in CHUNKS}, made["bare"], made["llama"]
            replies = {"ours": ours[PREFILL_CHUNK], "bare": bare, "llama": llama}
            n_turns = options.n_tokens // N_TURN
            steps = {name: partial(next, it.turns(short, n_turns, N_TURN)) for name, it in replies.items()}
            extend(decode, alternate(steps, n_turns, first=number))
            whole: dict[str, Callable[[], Stamp]] = {
                "bare_512": partial(bare.prefill, long),
                "bare_511_1": partial(bare.prefill, long, 1),
                **{f"ours_chunk_{chunk}": partial(ours[chunk].prefill, long) for chunk in CHUNKS},
                "llama": partial(llama.prefill, long),
            }
            extend(prefill, alternate(whole, 1, first=number))
    report_decode(report, decode)
    report_prefill(report, prefill)


def contestants(
    stack: contextlib.ExitStack, number: int, model: LoadedModel, settings: ContextSettings, path: Path
) -> dict[str, Contestant]:
    """All of them, made in an order of this round's own, and closed by the stack."""
    makers: dict[str, Callable[[], Contestant]] = {
        **{f"ours_chunk_{chunk}": partial(Engine, model, settings, chunk) for chunk in CHUNKS},
        "bare": partial(Bare, model, settings),
        "llama": partial(HighLevel, path, settings),
    }
    names = list(makers)
    random.Random(number).shuffle(names)
    return {name: stack.enter_context(contextlib.closing(makers[name]())) for name in names}


def extend(found: dict[str, list[Stamp]], more: dict[str, list[Stamp]]) -> None:
    for name, spans in more.items():
        found.setdefault(name, []).extend(spans)


def report_decode(report: Report, turns: dict[str, list[Stamp]]) -> None:
    """Ratios of speeds, turn by turn: above 1 is faster than the bare loop."""
    seconds = {name: [span.wall_s for span in spans] for name, spans in turns.items()}
    cpu = {name: [span.cpu_s for span in spans] for name, spans in turns.items()}
    for name in turns:
        report.add(f"decode_{name}_tok_s", [N_TURN / value for value in seconds[name]])
        report.add(f"decode_{name}_cpu_ms", [1e3 * value / N_TURN for value in cpu[name]])
    for name in ("ours", "llama"):
        report.add(f"decode_{name}_to_bare_ratio", ratios(seconds["bare"], seconds[name]))
        report.add(f"decode_{name}_to_bare_cpu_ratio", ratios(cpu["bare"], cpu[name]))
    report.require("decode_ours_to_bare_ratio", at_least=0.97)


def report_prefill(report: Report, runs: dict[str, list[Stamp]]) -> None:
    """Ratios of speeds, as above, once by the clock and once by CPU time."""
    for kind, read in (("", attrgetter("wall_s")), ("cpu_", attrgetter("cpu_s"))):
        times: dict[str, list[float]] = {name: [1e3 * read(span) for span in found] for name, found in runs.items()}
        for name, values in times.items():
            report.add(f"prefill_{name}_{kind}ms", values)
        whole, split = times["bare_512"], times["bare_511_1"]
        report.add(f"prefill_extra_pass_{kind}ms", [b - a for a, b in zip(whole, split, strict=True)])
        report.add(f"prefill_bare_511_1_to_bare_512_{kind}ratio", ratios(whole, split))
        for name in [f"ours_chunk_{chunk}" for chunk in CHUNKS]:
            report.add(f"prefill_{name}_to_bare_511_1_{kind}ratio", ratios(split, times[name]))
            report.add(f"prefill_{name}_to_bare_512_{kind}ratio", ratios(whole, times[name]))
        report.add(f"prefill_llama_to_bare_512_{kind}ratio", ratios(whole, times["llama"]))
    report.require(f"prefill_ours_chunk_{PREFILL_CHUNK}_to_bare_511_1_ratio", at_least=0.97)


def measure_beside_busy(report: Report, model: LoadedModel, options: Any) -> None:
    """Milliseconds a token of ours while one other process keeps a core busy."""
    note("beside a busy process")
    counts = {"default_threads": speed.default_threads(), "all_cores": psutil.cpu_count(logical=False) or 2}
    prompt = model.vocab.tokenize(TEXT, False)[:N_SHORT]
    with contextlib.ExitStack() as stack:
        contestants: dict[str, Callable[[], list[float]]] = {}
        for name, n_threads in counts.items():
            settings = ContextSettings(n_ctx=N_CTX, n_threads=n_threads, n_seq_max=N_SEQ_MAX)
            engine = stack.enter_context(contextlib.closing(Engine(model, settings, PREFILL_CHUNK)))
            contestants[name] = partial(engine.token_ms, prompt, options.n_busy, BUSY_LIMIT_S)
        stack.enter_context(busy_process())
        for name, runs in alternate(contestants, min(3, options.rounds)).items():
            report.add(f"busy_{name}_token_ms", [value for run in runs for value in run])


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    """A child that counts as fast as it can."""
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        child.kill()
        child.wait()


def facts(model: Path, settings: ContextSettings, rounds: int) -> dict[str, Any]:
    """What the figures were measured on."""
    found = devices.report()
    packages = ("llama-cpp-python", "numpy", "qwq-lite")
    return {
        "bench": "decode",
        "model": model.name,
        "machine": {
            "cpu": next((device.description for device in found.devices if device.kind == "cpu"), platform.machine()),
            "gpus": [device.description for device in found.gpus],
            "cores": psutil.cpu_count(logical=False),
            "threads": settings.n_threads,
        },
        "versions": {
            "python": platform.python_version(),
            "llama.cpp": found.version,
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "n_ctx": settings.n_ctx,
        "rounds": rounds,
    }


def note(text: str) -> None:
    print(f"measuring: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
