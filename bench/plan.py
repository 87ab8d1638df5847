"""Is a plan's memory the memory that llama.cpp then takes?

What is at stake. A plan is made before anything is loaded, and it promises that the load will fit. Weights and the cache
follow from tensor shapes, so there every byte must agree. The compute buffer is laid out by llama.cpp's graph allocator, which a
formula can only follow; llama.cpp, asked without allocating (`backend.measure`), runs the same allocator and should say
the same. What could still differ is a context that grows after it was made: a fork, a rewind, more rows of logits than
planned. llama.cpp itself says at WARN, when a context is freed, that a compute buffer "does not match" its reservation.

What is compared, for each file, context length and KV type:
    measured  llama.cpp's count of a file or a ghost, nothing allocated
    real      a child that loads the same file for real, makes the engine's own context and works in it: a prompt, a token,
              three forks that decode together, a rewind. Bytes are read from the breakdown before and after, and from the
              log's lines; a ghost's zeros are valid weights
    formula   `memory.footprint` alone
The demo model reads a prompt that fills a micro-batch, the large geometries only a few tokens: on a CPU more takes minutes.

    python bench/plan.py [--quick] [--limit-gib 8]

Prints one row for each setting and ends with one JSON line. `resident` is the whole process, and less than the total where
parts of a buffer were never touched. Exit status 1 where a bound is missed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qwq_convert.pipeline import convert  # noqa: E402
from qwq_lite.backend import native  # noqa: E402
from qwq_lite.backend.context import Context, ContextSettings, Entry  # noqa: E402
from qwq_lite.backend.footprint import Footprint  # noqa: E402
from qwq_lite.backend.measure import _breakdown, measure  # noqa: E402
from qwq_lite.backend.model import LoadedModel, model_params  # noqa: E402
from qwq_lite.backend.settings import EngineSettings, settings_from_json  # noqa: E402
from qwq_lite.formats import (  # noqa: E402
    gguf_header,
    header_only,
    shape,
)
from qwq_lite.formats.shape import ModelShape  # noqa: E402
from qwq_lite.formats.tensor_types import FILE_TYPES, file_type  # noqa: E402
from qwq_lite.plan import memory, speed  # noqa: E402

MIB, GIB = 1 << 20, 1 << 30
DEMO = ROOT / "build" / "demo" / "SmolLM2-135M-Instruct"
TYPES = [name for name in ("Q4_K_M", "Q6_K", "Q8_0") if name in FILE_TYPES]
CONTEXTS, CACHES = (4096, 8192, 16384, 32768), ("f16", "q8_0")
N_SEQ = 4
BOUNDS = {"weights_mib": 0.0, "kv_mib": 0.0, "compute_percent": 1.0, "total_percent": 0.5, "formula_percent": 2.0}


@dataclass(frozen=True)
class Allocated:
    """Bytes of a real context, by llama.cpp's breakdown (output rows of logits from the log), and what its log said.

    logged: bytes of the lines "model", "KV", "compute" and "output buffer size", which have two decimals of a MiB.
    resident: the process's memory in use before the context was freed. faults: lines that should not be there.
    """

    weights: int
    kv: int
    compute: int
    logged: dict[str, int]
    resident: int
    faults: list[str]

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.compute


def allocated(path: Path, choices: Sequence[EngineSettings], n_prompt: int = 8) -> list[Allocated]:
    """Load a file for real in a child, and make, use and free a context for each choice, one after the other.

    Raises: RuntimeError with the child's last lines.
    """
    question = json.dumps({"path": str(path), "n_prompt": n_prompt, "choices": [asdict(choice) for choice in choices]})
    code = f"import sys; sys.path[:] = {sys.path!r}; from bench.plan import answer; answer()"
    done = subprocess.run(
        [sys.executable, "-c", code], input=question, capture_output=True, text=True, check=False, cwd=ROOT
    )
    if done.returncode:
        raise RuntimeError(f"{path}: the child ended with {done.returncode}: {done.stderr[-2000:]}")
    return [Allocated(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def answer() -> None:
    """The child: a question on stdin, one line of JSON on stdout."""
    question = json.loads(sys.stdin.read())
    choices = [settings_from_json(choice) for choice in question["choices"]]
    api = native.engine()
    native.LOG.last = collections.deque()  # the engine keeps the last lines only; here each one counts
    # With a mapping, llama.cpp's line is the file's span and not what is used.
    params = model_params(api, replace(choices[0], load_mode="none"))
    path = Path(question["path"])
    pointer = api.llama_model_load_from_file(str(path).encode(), params)
    if not pointer:
        raise RuntimeError(native.last_lines())
    # A ghost has no vocabulary to wrap; the context asks for no more than these.
    n_vocab = shape.from_header(gguf_header.read(path)).n_vocab
    model = cast(LoadedModel, SimpleNamespace(pointer=pointer, path=path, vocab=SimpleNamespace(n_tokens=n_vocab)))
    weights = logged("model")
    print(json.dumps([asdict(used(model, choice, question["n_prompt"], weights)) for choice in choices]))
    api.llama_model_free(pointer)


def used(model: LoadedModel, choice: EngineSettings, n_prompt: int, model_bytes: int) -> Allocated:
    """One context, made by the engine's own class, used and freed."""
    native.LOG.last.clear()
    # All cores would wait for each other on a busy machine.
    context = Context(model, ContextSettings.of(choice, speed.default_threads()))
    before = _breakdown(context.pointer)
    lines = {"model": model_bytes} | {name: logged(name) for name in ("KV", "compute", "output")}
    work(context, n_prompt)
    faults = [] if _breakdown(context.pointer) == before else ["the breakdown changed while the context was used"]
    resident = psutil.Process().memory_info().rss
    context.close()
    faults += [line for _, line in native.LOG.last if "does not match" in line or "reallocating" in line]
    if not any("matches expectation" in line for _, line in native.LOG.last):
        faults.append("llama_free compared nothing")  # without this line, silence would prove nothing
    weights, kv, compute = (sum(column) for column in list(zip(*before, strict=True))[1:])
    return Allocated(weights, kv, compute + lines["output"], lines, resident, faults)


def work(context: Context, n_prompt: int) -> None:
    """What a session does to a cache: a prompt, its last token alone, forks that decode together, a rewind."""
    context.decode([Entry(i % 1000, i) for i in range(n_prompt)])
    context.decode([Entry(7, n_prompt, 0, True)])
    for sequence in range(1, N_SEQ):
        context.copy(0, sequence, n_prompt + 1)
    context.decode([Entry(11 + sequence, n_prompt + 1, sequence, True) for sequence in range(N_SEQ)])
    context.remove(0, n_prompt)
    context.decode([Entry(9, n_prompt, 0, True)])


def logged(name: str) -> int:
    """Bytes of the log's lines of one kind of buffer, all devices together."""
    text = "".join(line for _, line in native.LOG.last)
    return sum(round(float(size) * MIB) for size in re.findall(rf"{name} buffer size =\s+([\d.]+) MiB", text))


def qwq(n_layer: int, n_vocab: int = 152_064) -> ModelShape:
    """QwQ's geometry with fewer layers."""
    return ModelShape("qwen2", n_layer, 5120, 27_648, 40, 8, 128, n_vocab, 32_768, 1e-5, 1e6)


def files(folder: Path, quick: bool) -> Generator[tuple[str, Path, int], None, None]:
    """(name, file, tokens of its prompt); a file is there until the next one is asked for."""
    if not DEMO.is_dir():
        print(f"{DEMO}: is not there, left out; it is made by: make demo", file=sys.stderr)
    for kind in TYPES:
        path = folder / "model.gguf"
        if DEMO.is_dir():
            convert(DEMO, file_type(kind), path, force=True)
            yield f"demo {kind}", path, 512
        for n_layer in (2,) if quick else (2, 8):
            header_only.write(path, qwq(n_layer), header_only.tensors(qwq(n_layer), file_type(kind)))
            yield f"QwQ, {n_layer} layers {kind}", path, 8


def deviations(measured: Footprint, real: Allocated, formula: Footprint) -> dict[str, float]:
    """How far the plan is off what was allocated, in the units of BOUNDS."""
    planned = list(measured.devices.values())
    weights, kv, compute = (sum(getattr(b, name) for b in planned) for name in ("weights", "kv", "compute"))
    log = real.logged
    return {
        "weights_mib": max(off_mib(weights, real.weights), off_mib(weights, log["model"])),
        "kv_mib": max(off_mib(kv, real.kv), off_mib(kv, log["KV"])),
        "compute_percent": max(percent(compute, real.compute), percent(compute, log["compute"] + log["output"])),
        "total_percent": max(percent(measured.total, real.total), percent(measured.total, sum(log.values()))),
        "formula_percent": percent(formula.total, real.total),
    }


def off_mib(planned: int, found: int) -> float:
    """The difference in whole MiB: the log's lines have hundredths."""
    return float(round(abs(planned - found) / MIB))


def percent(planned: int, found: int) -> float:
    return 100 * abs(planned - found) / found


class Table:
    """Rows of a Markdown table as they come, and the worst of each column."""

    def __init__(self) -> None:
        self.worst: dict[str, float] = dict.fromkeys(BOUNDS, 0.0)
        self.faults: list[str] = []
        self.n_rows = 0
        print(
            "| file | n_ctx | KV | weights MiB | KV MiB | compute MiB: measured | real | total MiB: measured | real | formula"
            " | resident |"
        )
        print("|" + "---|" * 11)

    def add(self, name: str, choice: EngineSettings, measured: Footprint, real: Allocated, formula: Footprint) -> None:
        compute = sum(buffers.compute for buffers in measured.devices.values())
        numbers = (
            real.weights,
            real.kv,
            compute,
            real.compute,
            measured.total,
            real.total,
            formula.total,
            real.resident,
        )
        row = " | ".join(f"{number / MIB:.2f}" for number in numbers)
        print(f"| {name} | {choice.n_ctx} | {choice.type_k} | {row} |", flush=True)
        for key, value in deviations(measured, real, formula).items():
            self.worst[key] = max(self.worst[key], value)
        self.faults += [f"{name}, {choice.n_ctx} tokens, {choice.type_k}: {fault.strip()}" for fault in real.faults]
        self.n_rows += 1


def children_peak_mib() -> float | None:
    """The largest of all children so far; not on Windows."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return peak / (MIB if sys.platform == "darwin" else 1024)


def question(path: Path, choices: Sequence[EngineSettings], figures: dict[str, Any]) -> list[Footprint]:
    """`measure`, with its seconds and the child's memory noted where no larger child came before."""
    start = time.perf_counter()
    found = measure(path, choices)
    figures["measure_s"] = max(figures.get("measure_s", 0.0), round(time.perf_counter() - start, 2))
    if found is None:
        raise SystemExit("this build of llama.cpp cannot be asked for its own count: there is nothing to compare")
    return found


def whole_model(folder: Path, figures: dict[str, Any]) -> None:
    """What asking takes for all of QwQ, the first child of this process: its peak is then its own."""
    path = folder / "whole.gguf"
    header_only.write(path, qwq(64), header_only.tensors(qwq(64), file_type("Q4_K_M")))
    question(path, [EngineSettings(n_ctx, cache, cache) for n_ctx in CONTEXTS for cache in CACHES], figures)
    figures["measure_peak_mib"] = children_peak_mib()
    figures["ghost_bytes"] = getattr(path.stat(), "st_blocks", 0) * 512


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="without the 8-layer files")
    parser.add_argument("--limit-gib", type=float, default=8.0, help="leave out what takes more; default 8")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    left_out: list[str] = []
    limit = min(options.limit_gib * GIB, psutil.virtual_memory().available - GIB)
    start = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(prefix="qwq-lite-") as name,
        contextlib.closing(files(Path(name), options.quick)) as made,
    ):
        whole_model(Path(name), figures)
        table = Table()
        for label, path, n_prompt in made:
            header = gguf_header.read(path)
            geometry = shape.from_header(header)
            choices = [EngineSettings(n_ctx, cache, cache, n_seq_max=N_SEQ) for n_ctx in CONTEXTS for cache in CACHES]
            pairs = list(zip(choices, question(path, choices, figures), strict=True))
            fits = [(choice, found) for choice, found in pairs if found.total < limit]
            left_out += [
                f"{label}, {choice.n_ctx}, {choice.type_k}" for choice, found in pairs if (choice, found) not in fits
            ]
            reals = allocated(path, [choice for choice, _ in fits], n_prompt) if fits else []
            for (choice, found), real in zip(fits, reals, strict=True):
                table.add(label, choice, found, real, memory.footprint(geometry, header.tensors, choice))
    passed = {key: value <= BOUNDS[key] for key, value in table.worst.items()} | {"no_faults": not table.faults}
    for line in table.faults + [f"left out, above the limit: {line}" for line in left_out]:
        print(line)
    worst = {key: round(value, 4) for key, value in table.worst.items()}
    facts = {"bench": "plan", "rows": table.n_rows, "worst": worst, "passed": passed, "left_out": len(left_out)}
    print(json.dumps({**facts, **figures, "wall_s": round(time.perf_counter() - start)}))
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
