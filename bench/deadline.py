"""Is the answer there by the deadline?

    python bench/deadline.py [--prompts 100] [--seconds 1.5 3 4.5] [--busy]

The demo model as one without tags, whose end tokens are banned while it thinks, answers each prompt by each deadline. Complete is
an answer, more than the heading that was forced, which the model ended, or a limit at the end of a sentence or of a line that
does not announce another, and which was there in time. --busy: a second program keeps every core busy meanwhile. Ends with one
JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "convert")]

from bench.measure.thinker import PROMPTS, Thinker  # noqa: E402

DEMO = ROOT / "build" / "demo" / "SmolLM2-135M-Instruct-Q4_K_M.gguf"
RESERVE = 64
_SPIN = "while True: pass"
_SENTENCE = re.compile(r"[.!?。！？…][\"'”’」』）)\]*_`]*\Z")


@contextlib.contextmanager
def busy(on: bool) -> Iterator[None]:
    """Every core is wanted by another program."""
    spinning = [subprocess.Popen([sys.executable, "-c", _SPIN]) for _ in range(os.cpu_count() or 1)] if on else []
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def measured(thinker: Thinker, seconds: float, n_prompts: int) -> dict[str, Any]:
    n_complete = n_empty = n_by_itself = n_sentence = 0
    over: list[float] = []
    left: list[float] = []
    thoughts: list[int] = []
    answers: list[int] = []
    for number, question in enumerate(PROMPTS[:n_prompts]):
        before = time.monotonic()
        made = thinker.ask(question, number, within=seconds, answer_reserve=RESERVE)
        took = time.monotonic() - before
        reply = made.done.reply
        heading = str(thinker.words(question)[0]).strip()
        text = reply.answer.removeprefix(heading).strip()
        at_break = reply.finish_reason == "stop" or reply.stats.n_answer < RESERVE  # else the limit itself
        ended = _SENTENCE.search(text) is not None or (at_break and not text.endswith((":", "：")))
        n_empty += not text
        n_by_itself += reply.finish_reason == "stop"
        n_sentence += _SENTENCE.search(text) is not None
        n_complete += bool(text) and ended and took <= seconds
        (over if took > seconds else left).append(abs(took - seconds))
        thoughts.append(reply.stats.n_thinking)
        answers.append(reply.stats.n_answer)
    return {
        "seconds": seconds,
        "runs": n_prompts,
        "complete_in_time": n_complete,
        "without_answer": n_empty,
        "ended_by_the_model": n_by_itself,
        "ended_at_a_sentence": n_sentence,
        "late": len(over),
        "late_median_s": round(statistics.median(over or [0]), 3),
        "late_worst_s": round(max(over, default=0.0), 3),
        "left_median_s": round(statistics.median(left or [0]), 3),
        "thought_median": statistics.median(thoughts or [0]),
        "answer_median": statistics.median(answers or [0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--seconds", type=float, nargs="+", default=[1.5, 3.0, 4.5])
    parser.add_argument("--busy", action="store_true")
    arguments = parser.parse_args()
    thinker = Thinker(DEMO, "undivided")
    rows = []
    with busy(arguments.busy):
        for seconds in arguments.seconds:
            rows.append(measured(thinker, seconds, arguments.prompts))
            print(rows[-1], flush=True)
    thinker.close()
    print(json.dumps({"bench": "deadline", "busy": arguments.busy, "rows": rows}))


if __name__ == "__main__":
    main()
