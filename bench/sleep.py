"""Does an engine survive that its host is stopped? A minute of SIGSTOP for both, as a laptop's lid does it; Ctrl-Z and fg.

    python bench/sleep.py [--model FILE] [--seconds 60]

Not on Windows. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
HOST = """
import sys
sys.path.insert(0, {root!r})
import qwq_lite
with qwq_lite.load({file!r}, n_ctx=4096) as model:
    before = model.pid
    print("loaded", before, flush=True)
    reply = model.ask("Tell me a long story.", max_tokens=1500, temperature=0.0)
    print("ended", reply.finish_reason, model.pid == before, flush=True)
"""


def by_signal(script: Path, seconds: float) -> str:
    """What the host says after it and its engine were stopped for so long, in the middle of a reply."""
    host = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert host.stdout
    pid = int(host.stdout.readline().split()[1])
    time.sleep(0.5)
    os.killpg(host.pid, signal.SIGSTOP)
    time.sleep(seconds)
    assert psutil.Process(pid).status() == psutil.STATUS_STOPPED, "the reply was over before"
    os.killpg(host.pid, signal.SIGCONT)
    return host.stdout.read().strip()


def by_shell(script: Path, seconds: float) -> str:
    """The same in a terminal with a shell, by its own keys."""

    def tmux(*words: str) -> str:
        return subprocess.run(["tmux", "-L", "qwq-sleep", *words], capture_output=True, text=True, check=True).stdout

    def seen(text: str) -> str:
        deadline = time.monotonic() + 120
        while text not in (screen := tmux("capture-pane", "-p", "-t", "a")):
            assert time.monotonic() < deadline, screen
            time.sleep(0.05)
        return screen

    tmux("new-session", "-d", "-s", "a", "-x", "150", "bash --norc -i")
    try:
        tmux("send-keys", "-t", "a", f"{sys.executable} {script}", "Enter")
        seen("loaded")
        time.sleep(0.5)
        tmux("send-keys", "-t", "a", "C-z")
        seen("Stopped")
        time.sleep(seconds)
        tmux("send-keys", "-t", "a", "fg", "Enter")
        return next(line for line in seen("ended ").splitlines() if line.startswith("ended "))
    finally:
        tmux("kill-server")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "build/demo/SmolLM2-135M-Instruct-Q4_K_M.gguf")
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    script = ROOT / "build" / "sleep.py"
    script.write_text(HOST.format(root=str(ROOT), file=str(arguments.model.absolute())))
    result = {
        "bench": "sleep",
        "seconds": arguments.seconds,
        "after_signal": by_signal(script, arguments.seconds),
        "after_fg": by_shell(script, arguments.seconds) if shutil.which("tmux") else "no tmux here",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
