"""Does the host survive every death of its engine? Kills at random moments of prefill, decode and saving a conversation.

    python bench/kills.py [--model FILE] [--kills 60]

SIGKILL, SIGSEGV, SIGABRT and SIGSTOP by chance. Each must end in EngineCrashed, the next call must work, and no process and no
descriptor may be left. Not on Windows. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "convert")]

from qwq_lite import remote  # noqa: E402
from qwq_lite.errors import EngineCrashed  # noqa: E402
from qwq_lite.loading import load  # noqa: E402
from qwq_lite.remote import RemoteModel  # noqa: E402

SIGNALS = ("SIGKILL", "SIGSEGV", "SIGABRT", "SIGSTOP")
SEED = 11


def talk(model: RemoteModel, rng: random.Random) -> None:
    """Ask and save until something ends it."""
    while True:
        chat = model.chat()
        chat.ask("Tell me a story about " + "the sea " * rng.randrange(60), max_tokens=30)
        with tempfile.TemporaryDirectory() as folder:
            chat.save(Path(folder) / "chat")


def struck(model: RemoteModel, rng: random.Random) -> float:
    """Seconds from a signal to the exception. Raises: what is no EngineCrashed."""
    pid, at = model.pid, [0.0]
    assert pid is not None

    def strike() -> None:
        at[0] = time.monotonic()
        os.kill(pid, getattr(signal, rng.choice(SIGNALS)))

    threading.Timer(rng.random() * 0.8, strike).start()
    try:
        talk(model, rng)
    except EngineCrashed:
        seconds = time.monotonic() - at[0]
    if not model.ask("Hi", max_tokens=2).stats.n_generated or psutil.pid_exists(pid):
        raise RuntimeError("the next call did not work, or the process is still there")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "build/demo/SmolLM2-135M-Instruct-Q4_K_M.gguf")
    parser.add_argument("--kills", type=int, default=60)
    arguments = parser.parse_args()
    remote._WITHIN_S = 0.0  # so many deaths are not given up here
    rng, process = random.Random(SEED), psutil.Process()
    with load(arguments.model, n_ctx=1024) as model:
        assert isinstance(model, RemoteModel)
        before = process.num_fds(), len(process.children())
        times = sorted(struck(model, rng) for _ in range(arguments.kills))
        after = process.num_fds(), len(process.children())
    result = {
        "bench": "kills",
        "kills": arguments.kills,
        "survived": len(times),
        "exception_s_median": round(times[len(times) // 2], 3),
        "exception_s_worst": round(times[-1], 3),
        "descriptors_left": after[0] - before[0],
        "processes_left": after[1] - before[1],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
