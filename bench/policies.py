"""What do the policies cost? Microseconds a token of each and of all together, and of folding a long reply again.

    python bench/policies.py [--tokens 32768]

Pure: no engine. Each policy alone, and all that a reply can have, take the same tokens of an English and a Chinese thought in
turn; a token's time is that of `constrain` and `advance` less that of the loop without policies, which is called "none". Loops
has texts of its own: words of which four in ten come in the order of before, and what costs most: stretches within a block of
code, which would be loops outside of it. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "convert")]

from qwq_lite.reply import fold  # noqa: E402
from qwq_lite.reply.policies.closing import Closing, Window  # noqa: E402
from qwq_lite.reply.policies.deadline import Deadline  # noqa: E402
from qwq_lite.reply.policies.headings import Headings  # noqa: E402
from qwq_lite.reply.policies.loops import Loops  # noqa: E402
from qwq_lite.reply.policies.order import arrange  # noqa: E402
from qwq_lite.reply.policies.phases import Phases  # noqa: E402
from qwq_lite.reply.policies.reserve import Reserve  # noqa: E402
from qwq_lite.reply.policies.script import Script  # noqa: E402
from qwq_lite.reply.policies.stops import Stops  # noqa: E402
from qwq_lite.reply.policy import Begin, Policy, Rewind  # noqa: E402
from qwq_lite.reply.script_masks import ScriptMasks  # noqa: E402
from qwq_lite.sampling import Sampling  # noqa: E402
from qwq_lite.text.unicode_scripts import MASKABLE  # noqa: E402

_TEXT = (
    "Okay, let me think about this. If n is 3.5, then 2 * n is 7, so the first case holds.\n\n**Case 2**: suppose that"
    " `x < y`; then (x, y) can't be a pair of twins. Hmm, wait.\n所以我们需要先看第一种情况，再看第二种。\n\n"
)
_PAUSE_S = 0.01  # between two tokens, as the deadline sees it
Tokens = list[tuple[int, bytes, float]]


def pieces(n_tokens: int) -> Tokens:
    """Words with the space before them, as a tokenizer would part them; Chinese characters one by one.

    The text comes again and again, the tokens do not: nothing loops.
    """
    parts = re.findall(r" ?[A-Za-z]+|\n+|.", _TEXT)
    return [(10 + n, parts[n % len(parts)].encode(), n * _PAUSE_S) for n in range(n_tokens)]


def looped(n_tokens: int) -> dict[str, tuple[Begin, Tokens]]:
    """What Loops alone is timed on: in real thoughts four to six tokens in ten end eight that were there before."""
    source, words = random.Random(1), pieces(n_tokens)
    ids: list[int] = []
    while len(ids) < n_tokens:
        old = source.randrange(max(1, len(ids) - 40))
        ids += ids[old : old + 24] + [10 + source.randrange(30_000) for _ in range(24)]
    real = [(token, piece, time_s) for token, (_, piece, time_s) in zip(ids, words, strict=False)]
    stretch = [(10 + n % 90, piece, time_s) for n, (_, piece, time_s) in enumerate(words)]
    for n in range(1000, n_tokens, 2000):  # each time it is long enough outside of code, and never within it
        stretch[n : n + 1] = [(5 + n, b"\nx\n", stretch[n][2])]
    return {
        "real thought": (Begin("thinking"), real),
        "real answer": (Begin("answer"), real),
        "stretch in code": (Begin("answer"), [(4, b"```\n", 0.0), *stretch]),
    }


def sets(n_tokens: int) -> dict[str, tuple[Begin, tuple[Policy, ...]]]:
    """What costs most: a window that is open all the time, whose action nobody carries out, and a deadline that is not near.

    "in an answer": after a thought that was ended before its first token; "before the window": as nine of ten tokens are.
    """
    never, words = 4 * n_tokens, ("\n", 3, "\n\n")
    masks = ScriptMasks([bytes([n]) for n in range(256)], MASKABLE)
    deadline = Deadline(n_tokens * _PAUSE_S * 10, 340, 100)
    each: dict[str, Policy] = {
        "phases": Phases(2, 3),
        "headings": Headings(),
        "stops": Stops(frozenset({1}), ("STOP", "\nUser:"), 2 * never),
        "script": Script(masks, masks, ("\n\n**Final Answer**\n\n",)),
        "deadline": deadline,
        "loops": Loops(),
        "closing": Closing((Window(0, 2 * never, "budget"),), words, 3, 3),
        "reserve": Reserve(never, frozenset({1})),
    }
    thinking, ended = Begin("thinking"), Begin("answer", (Rewind(0, forced=(3,), ends="budget"),))
    early = Closing((Window(never, 2 * never, "budget"),), words, 3, 3)
    tags = arrange(each[name] for name in each if name != "headings")
    return {
        **{name: (ended if name == "reserve" else thinking, (policy,)) for name, policy in each.items()},
        "all, tags": (thinking, tags),
        "all, undivided": (thinking, arrange(each[name] for name in each if name != "phases")),
        "all, in an answer": (ended, tags),
        "all, before the window": (thinking, arrange([*(p for p in tags if p.name != "closing"), early])),
    }


def microseconds(begin: Begin, policies: tuple[Policy, ...], tokens: Sequence[tuple[int, bytes, float]]) -> list[float]:
    """Of each token."""
    sampling, state = Sampling(), fold.start(policies, begin)
    found = []
    for token, piece, time_s in tokens:
        before = time.perf_counter_ns()
        fold.constrain(policies, state, sampling)
        step = fold.advance(policies, state, token, piece, time_s)
        found.append((time.perf_counter_ns() - before) / 1000)
        state = step.state
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    tokens = pieces(arguments.tokens)
    result: dict[str, object] = {"bench": "policies", "tokens": len(tokens)}
    bare_set: tuple[Begin, tuple[Policy, ...]] = (Begin("thinking"), ())
    cases = {name: (*asked, tokens) for name, asked in {"none": bare_set, **sets(len(tokens))}.items()}
    for name, (begin, text) in looped(len(tokens)).items():
        cases[f"loops, {name}"] = (begin, (Loops(),), text)
    for name, (begin, policies, text) in cases.items():
        medians, ends = [], []
        for _ in range(arguments.rounds):  # in turn: machines are noisy
            bare = statistics.median(microseconds(*bare_set, text[:8192]))
            times = sorted(microseconds(begin, policies, text[:8192]))
            medians.append(times[len(times) // 2] - bare * bool(policies))
            ends.append(times[int(len(times) * 0.99)] - bare * bool(policies))
        median, p99 = statistics.median(medians), statistics.median(ends)
        folds = []
        for _ in range(arguments.rounds):
            before = time.perf_counter()
            fold.fold(policies, begin, text)
            folds.append((time.perf_counter() - before) * 1000)
        fold_ms = statistics.median(folds)
        print(f"{name:22} median {median:5.2f} us, 99 % {p99:5.2f} us, folding {len(text)} tokens {fold_ms:.0f} ms")
        result[name] = {"median_us": round(median, 2), "p99_us": round(p99, 2), "fold_ms": round(fold_ms, 1)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
