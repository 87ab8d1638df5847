"""Is one request's fault that request's? Eight callers at once, of whom one ends the engine.

    python bench/poison.py [--model FILE] [--runs 50] [--seed 3]

Each caller reads its reply as it comes. The engine's process dies in turn of a long run of letters that overflows the stack of
gpt-4o's pre-tokenizer (the thread that has enough of it, and the refusal, are switched off), while it makes a certain prompt
into tokens, and at the tenth token of a certain reply. Seven replies must be whole and be what was shown, one must be an error
that says so, and no call may be refused. One model for all runs of a kind: its deaths follow each other within seconds. Not on
Windows. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "convert")]

from qwq_lite.errors import EngineCrashed, QwqError, RequestCrashed  # noqa: E402
from qwq_lite.events import Answer, Done, Notice  # noqa: E402
from qwq_lite.loading import load  # noqa: E402
from qwq_lite.worker.remote import RemoteModel  # noqa: E402
from tests.attacks.test_engine_deaths import rewritten  # noqa: E402
from tests.deaths import PLANTS, POISON_SEED, POISON_TEXT, interpreter  # noqa: E402

N_CALLERS, N_TOKENS = 8, 24
POISONS = {"stack": ("a" * 200_000, 1), "prompt": (f"a {POISON_TEXT}", 1), "token": ("Tell me a story.", POISON_SEED)}


def outcome(model: RemoteModel, text: str, seed: int) -> str:
    """What becomes of one call: "whole", "culprit", or what it should not be."""
    shown = ""
    resumed = False
    try:
        for event in model.generate([{"role": "user", "content": text}], seed=seed, max_tokens=N_TOKENS):
            if isinstance(event, Answer):
                shown += event.text
            elif isinstance(event, Notice):
                resumed = resumed or event.kind == "resumed"
            elif isinstance(event, Done):
                if event.reply.finish_reason not in ("stop", "length"):
                    return f"ended by {event.reply.finish_reason}"
                if event.reply.answer.strip() != shown.strip():
                    return "not what was shown"
                return "whole, gone on with" if resumed else "whole"
    except RequestCrashed:
        return "culprit"
    except EngineCrashed as error:
        return "culprit, alone by then" if "SIGSEGV" in str(error) else str(error)
    except QwqError as error:
        return f"{type(error).__name__}: {error}"
    return "no end"


def run(model: RemoteModel, kind: str, rng: random.Random) -> Counter[str]:
    """Eight calls at once, one of them of this kind at a random place."""
    calls = [(f"What is {n} + {n}?", n) for n in range(N_CALLERS - 1)]
    calls.insert(rng.randrange(N_CALLERS), POISONS[kind])
    found: Counter[str] = Counter()

    def call(text: str, seed: int) -> None:
        what = outcome(model, text, seed)
        found[f"{'poison' if (text, seed) == POISONS[kind] else 'other'}: {what}"] += 1

    threads = [threading.Thread(target=call, args=words) for words in calls]
    for thread in threads:
        thread.start()
        time.sleep(rng.random() * 0.05)
    for thread in threads:
        thread.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "build/demo/SmolLM2-135M-Instruct-Q4_K_M.gguf")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=3)
    arguments = parser.parse_args()
    rng, total, times = random.Random(arguments.seed), Counter[str](), list[float]()
    kinds = list(PLANTS)
    folder = Path(tempfile.mkdtemp())
    try:
        file = rewritten(arguments.model, folder / "gpt-4o.gguf", {"tokenizer.ggml.pre": "gpt-4o"})
        for place, kind in enumerate(kinds):
            with load(file, n_ctx=2048, python=str(interpreter(folder, kind))) as model:
                assert isinstance(model, RemoteModel)
                for _ in range(place, arguments.runs, len(kinds)):
                    start = time.monotonic()
                    total += run(model, kind, rng)
                    times.append(time.monotonic() - start)
    finally:
        shutil.rmtree(folder)
    n_whole = sum(n for what, n in total.items() if what.startswith("other: whole"))
    result = {
        "bench": "poison",
        "runs": arguments.runs,
        "seed": arguments.seed,
        "whole": n_whole,
        "of": arguments.runs * (N_CALLERS - 1),
        "culprits": total["poison: culprit"] + total["poison: culprit, alone by then"],
        "found": dict(total),
        "run_s_median": round(sorted(times)[len(times) // 2], 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
