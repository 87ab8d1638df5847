"""Does the host survive every death of its engine, and no engine outlive its host? Kills at random moments.

    python bench/kills.py [--model FILE] [--kills 100] [--hosts 50] [--n-ctx 93184]

Engines: SIGKILL, SIGSEGV, SIGABRT and SIGSTOP by chance, while it loads, reads a prompt, decodes or saves a conversation. Each
must end in EngineCrashed, or, where it hit before a prompt was begun, in a call that is asked again; the next call must work, and
no process and no descriptor may be left. The default context is 2 GiB of the demo model's memory, which a core dump or a
debugger would take seconds to go through. Hosts: SIGKILL, half of them with a forked copy alive. Not on Windows. Ends with one
JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "convert")]

from qwq_lite.errors import EngineCrashed  # noqa: E402
from qwq_lite.loading import load  # noqa: E402
from qwq_lite.worker import remote  # noqa: E402
from qwq_lite.worker.remote import RemoteModel  # noqa: E402

SIGNALS = ("SIGKILL", "SIGSEGV", "SIGABRT", "SIGSTOP")
WORKS = ("load", "prefill", "decode", "save")
SEED = 11
MOST_S = 60.0
HOST = """
import os, sys, threading, time
import qwq_lite
models = []
thread = threading.Thread(target=lambda: models.append(qwq_lite.load(sys.argv[1], n_ctx=512)))
thread.start()
thread.join()
if sys.argv[2] == "fork" and os.fork() == 0:
    time.sleep(120)
    os._exit(0)
models[0].ask("Tell me a story about the sea.", max_tokens=100000)
"""


def work(model: RemoteModel, kind: str, rng: random.Random, is_alive: Callable[[], bool]) -> None:
    """One thing after the other of one kind, until something ends it, or the engine is another."""
    chat = model.chat()
    if kind == "save":
        chat.ask("the sea " * 100, max_tokens=1)
    with tempfile.TemporaryDirectory() as folder:
        while is_alive():
            if kind == "save":
                chat.save(Path(folder) / "chat")
            elif kind == "prefill":
                model.ask("".join(rng.choices("abcdefgh \n", k=600)), max_tokens=1)
            else:
                model.ask("Tell me a long story.", max_tokens=100)


def child() -> int:
    """The engine's process, as soon as there is one."""
    deadline = time.monotonic() + MOST_S
    while time.monotonic() < deadline:
        found = psutil.Process().children()
        if found:
            return int(found[0].pid)
        time.sleep(0.001)
    raise RuntimeError("no engine was started")


def struck(model: RemoteModel, kind: str, rng: random.Random) -> float:
    """Seconds from a signal to the exception. Raises: what is no EngineCrashed."""
    if kind == "load":
        os.kill(child(), signal.SIGKILL)
        while model.pid is not None:
            time.sleep(0.001)
    at, pid, name, after_s = [0.0], [0], rng.choice(SIGNALS), rng.random() * 0.8

    def strike() -> None:
        pid[0] = child()
        time.sleep(after_s)
        at[0] = time.monotonic()
        os.kill(pid[0], getattr(signal, name))

    striker = threading.Thread(target=strike)
    striker.start()
    with contextlib.suppress(EngineCrashed):
        work(model, kind, rng, lambda: not at[0] or psutil.pid_exists(pid[0]))
    seconds = time.monotonic() - at[0]
    striker.join()
    if not model.ask("Hi", max_tokens=2).stats.n_generated or psutil.pid_exists(pid[0]):
        raise RuntimeError("the next call did not work, or the process is still there")
    return seconds


def outlived(file: Path, rng: random.Random, *, fork: bool) -> tuple[str, float]:
    """Kill a host at a random moment: what it was doing, and seconds until its engine is gone."""
    command = [sys.executable, "-c", HOST, str(file), "fork" if fork else "alone"]
    host = subprocess.Popen(command, start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    time.sleep(0.15 + rng.random() * 2)
    engines = [
        process
        for process in psutil.Process(host.pid).children()
        if "qwq_lite.worker.main" in " ".join(process.cmdline())
    ]
    n_threads = sum(process.num_threads() for process in engines)
    host.kill()
    host.wait()
    start = time.monotonic()
    _, left = psutil.wait_procs(engines, MOST_S)
    seconds = time.monotonic() - start
    with contextlib.suppress(ProcessLookupError):
        os.killpg(host.pid, signal.SIGKILL)  # the forked copy; and an engine that is left
    if left:
        raise RuntimeError("an engine outlived its host")
    return "no engine yet" if not engines else "loading" if n_threads < 4 else "at work", seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "build/demo/SmolLM2-135M-Instruct-Q4_K_M.gguf")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--hosts", type=int, default=50)
    parser.add_argument("--n-ctx", type=int, default=93_184)
    arguments = parser.parse_args()
    remote._WITHIN_S = 0.0  # so many deaths are not given up here
    rng, process = random.Random(SEED), psutil.Process()
    with load(arguments.model, n_ctx=arguments.n_ctx, type_k="f16") as model:
        assert isinstance(model, RemoteModel)
        anonymous = psutil.Process(model.pid).memory_info().rss - psutil.Process(model.pid).memory_info().shared
        before = process.num_fds(), len(process.children())
        kinds = [WORKS[n % len(WORKS)] for n in range(arguments.kills)]
        times = sorted(struck(model, kind, rng) for kind in kinds)
        after = process.num_fds(), len(process.children())
    hosts = [outlived(arguments.model, rng, fork=bool(n % 2)) for n in range(arguments.hosts)]
    result = {
        "bench": "kills",
        "kills": arguments.kills,
        "survived": len(times),
        "exception_s_median": round(times[len(times) // 2], 3),
        "exception_s_worst": round(times[-1], 3),
        "descriptors_left": after[0] - before[0],
        "processes_left": after[1] - before[1],
        "anonymous_gib": round(anonymous / (1 << 30), 2),
        "gdb": shutil.which("gdb") is not None,
        "hosts": len(hosts),
        "hosts_doing": dict(Counter(doing for doing, _ in hosts)),
        "engine_gone_s_worst": round(max((seconds for _, seconds in hosts), default=0.0), 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
