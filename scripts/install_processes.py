"""Start a process and wait for its end: quietly and with a time limit, or with its output in a log.

Everything that the installer starts goes through one `Runner`, which tests replace.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

from qwq_lite.selftest.engine_check import Ended, run_child

CHECK_TIMEOUT_S = 180  # a CUDA driver can take its time at the first start
_SHOWN = re.compile(r"\s*(Downloading \S+ \(\S+ [MG]B|Building wheel.*(started|still running)|Using cached llama)")


class Runner(Protocol):
    def __call__(self, command: Sequence[str], *, env: Mapping[str, str], log: Path | None) -> Ended: ...


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_process(command: Sequence[str], *, env: Mapping[str, str], log: Path | None) -> Ended:
    """Run to the end. With `log`, everything goes there and the lines that show progress to the terminal too.

    Without it nothing is shown, and the process is ended after three minutes. With it, `output` of the result holds
    both streams, in their order.
    """
    if log is None:
        return run_child(command, CHECK_TIMEOUT_S, env)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        with subprocess.Popen(
            command, env=dict(env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process:
            assert process.stdout is not None
            output = _follow(process.stdout, file)
    return Ended(process.returncode, output)


def _follow(lines: IO[str], log: IO[str]) -> str:
    kept = []
    for line in lines:
        log.write(line)
        log.flush()
        kept.append(line)
        if _SHOWN.match(line):
            say(f"  {line.strip()}")
    return "".join(kept)
