"""QwQ's full geometry on this machine: plan for a budget, load 64 layers, decode, and hold the process against its plan.

    python scripts/full_geometry.py [--memory 22GiB] [--ctx 8192] [--tokens 4] [--no-repack]

The file is a ghost, sparse and all zeros: it takes no disk, its pages are memory all the same, and zeros are valid weights. Needs
as much free memory as the budget. Ends with one JSON line, in GiB: what the plan says and what the process took.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qwq_lite import catalog, ghost  # noqa: E402
from qwq_lite.backend import native  # noqa: E402
from qwq_lite.backend.context import Context, ContextSettings, Entry  # noqa: E402
from qwq_lite.backend.measure import measure  # noqa: E402
from qwq_lite.backend.model import LoadedModel  # noqa: E402
from qwq_lite.memory import Choice, Footprint, footprint  # noqa: E402
from qwq_lite.plan import Candidate, Room, Wishes, search  # noqa: E402
from qwq_lite.recipe import file_type  # noqa: E402

GIB = 1 << 30


def process_gib() -> dict[str, float]:
    """Anonymous and mapped memory of this process. Source: Linux /proc/self/status"""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) / (1 << 20) for name in ("RssAnon", "RssFile")}


def planned(path: Path, budget: int, n_ctx: int, repack: bool) -> tuple[Choice, Footprint]:
    """The planner's choice for the file, with or without repacking, as llama.cpp counts it."""
    shape = catalog.geometry("qwq-32b-preview")[1]
    candidate = Candidate("Q4_K_M", shape, ghost.tensors(shape, file_type("Q4_K_M")))
    plan = search(
        [candidate],
        Room(budget),
        Wishes(n_ctx=n_ctx, type_k="q8_0"),
        lambda one, choices: measure(path, choices) or [footprint(one.shape, one.tensors, c) for c in choices],
    )
    print(plan.line(), f"({plan.footprint.source})")
    choice = Choice(**{**vars(plan.choice), "repack": repack})
    (counted,) = measure(path, [choice]) or [plan.footprint]
    return choice, counted


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--memory", type=float, default=22.0, help="GiB")
    parser.add_argument("--ctx", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--no-repack", action="store_true")
    arguments = parser.parse_args()
    shape = catalog.geometry("qwq-32b-preview")[1]
    with tempfile.TemporaryDirectory(prefix="qwq-lite-") as folder:
        path = Path(folder) / "full.gguf"
        ghost.write(path, shape, ghost.tensors(shape, file_type("Q4_K_M")))
        repack = not arguments.no_repack
        choice, counted = planned(path, int(arguments.memory * GIB), arguments.ctx, repack)
        before = process_gib()
        native.engine()
        weights = LoadedModel(path, repack=repack)
        settings = ContextSettings(
            choice.n_ctx, 2, 512, choice.n_ubatch, choice.n_seq_max, choice.type_k, choice.type_v
        )
        context = Context(weights, settings)
        prompt = [Entry(n % 1000, n, 0, n == 127) for n in range(128)]
        context.decode(prompt)
        start = time.monotonic()
        for n in range(arguments.tokens):
            context.decode([Entry(5, 128 + n, 0, True)])
        seconds = (time.monotonic() - start) / arguments.tokens
        after = process_gib()
        context.close()
        weights.close()
    host = counted.host
    result = {
        "script": "full_geometry",
        "repack": repack,
        "n_ctx": choice.n_ctx,
        "n_ubatch": choice.n_ubatch,
        "planned_total_gib": round(host.total / GIB, 2),
        "planned_anonymous_gib": round((host.total - (host.mapped if repack else host.weights)) / GIB, 2),
        "planned_mapped_gib": round((host.mapped if repack else host.weights) / GIB, 2),
        "planned_reclaimable_gib": round(host.reclaimable / GIB, 2),
        "anonymous_gib": round(after["RssAnon"] - before["RssAnon"], 2),
        "mapped_gib": round(after["RssFile"] - before["RssFile"], 2),
        "s_per_token": round(seconds, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
