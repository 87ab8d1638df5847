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

from bench.process import anonymous_bytes, mapped_bytes, page_out  # noqa: E402
from qwq_lite.backend import native  # noqa: E402
from qwq_lite.backend.context import Context, ContextSettings, Entry  # noqa: E402
from qwq_lite.backend.measure import measure  # noqa: E402
from qwq_lite.backend.model import LoadedModel  # noqa: E402
from qwq_lite.formats import header_only  # noqa: E402
from qwq_lite.formats.tensor_types import file_type  # noqa: E402
from qwq_lite.plan.memory import footprint  # noqa: E402
from qwq_lite.plan.run_plan import Candidate, Room, RunPlan, Wishes  # noqa: E402
from qwq_lite.plan.search import search  # noqa: E402
from qwq_lite.store import catalog  # noqa: E402
from qwq_lite.system.units import GIB  # noqa: E402


def planned(path: Path, budget: int, wishes: Wishes) -> RunPlan:
    """The planner's choice for the file, as llama.cpp counts it."""
    shape = catalog.geometry("qwq-32b-preview")[1]
    candidate = Candidate("Q4_K_M", shape, header_only.tensors(shape, file_type("Q4_K_M")))
    return search(
        [candidate],
        Room(budget),
        wishes,
        lambda one, choices: measure(path, choices) or [footprint(one.shape, one.tensors, c) for c in choices],
    )


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
        header_only.write(path, shape, header_only.tensors(shape, file_type("Q4_K_M")))
        repack = not arguments.no_repack
        wishes = Wishes(arguments.ctx, "q8_0", host_weights="mmap" if repack else "no-repack")
        plan = planned(path, int(arguments.memory * GIB), wishes)
        print(plan.line(), f"({plan.footprint.source})")
        choice = plan.choice
        native.engine()
        before = anonymous_bytes()
        weights = LoadedModel(path, choice)
        context = Context(weights, ContextSettings.of(choice, 2))
        prompt = [Entry(n % 1000, n, 0, n == 127) for n in range(128)]
        context.decode(prompt)
        start = time.monotonic()
        for n in range(arguments.tokens):
            context.decode([Entry(5, 128 + n, 0, True)])
        seconds = (time.monotonic() - start) / arguments.tokens
        anonymous, read = anonymous_bytes() - before, mapped_bytes(path.name)
        page_out(path.name)
        for n in range(3):
            context.decode([Entry(5, 128 + arguments.tokens + n, 0, True)])
        in_use = mapped_bytes(path.name)
        context.close()
        weights.close()
    host = plan.footprint.host
    result = {
        "script": "full_geometry",
        "repack": repack,
        "n_ctx": choice.n_ctx,
        "n_ubatch": choice.n_ubatch,
        "planned_total_gib": round(host.total / GIB, 2),
        "planned_anonymous_gib": round(host.anonymous / GIB, 2),
        "planned_mapped_gib": round(host.mapped / GIB, 2),
        "planned_reclaimable_gib": round(host.reclaimable / GIB, 2),
        "anonymous_gib": round(anonymous / GIB, 2),
        "mapped_gib": round(read / GIB, 2),
        "mapped_in_use_gib": round(in_use / GIB, 2),
        "s_per_token": round(seconds, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
