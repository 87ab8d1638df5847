"""What would `--answer-script auto` have refused in real answers, how many mix scripts all the same, and what does it cost?

    python bench/answer_scripts.py [FOLDER] [--show]

FOLDER holds *.jsonl, a line a reply: model, lang, prompt, response, answer_start (None where there is no answer). Each is
replayed in the pieces of Qwen's tokenizer: what is decided of its prompt; where the policies would have begun the answer, from
the text as it came; each token of the answer, as it is labelled, against the row of its place. A reply whose prompt is not known
counts as one that calls for no other script. What a model had written instead is not known.

A mixed answer holds a letter of a masked script outside fenced code. It is mended where each such letter is in a heading that is
forced anew, or in a token that is refused; it is left where "auto" masks nothing, or where the letter comes before anything tells
that the answer has begun. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "convert")]

from qwq_lite.prompt.script_intent import scripts_to_mask  # noqa: E402
from qwq_lite.reply import fold  # noqa: E402
from qwq_lite.reply.fold import State  # noqa: E402
from qwq_lite.reply.policies.headings import Headings  # noqa: E402
from qwq_lite.reply.policies.order import arrange  # noqa: E402
from qwq_lite.reply.policies.phases import Phases  # noqa: E402
from qwq_lite.reply.policies.script import Script  # noqa: E402
from qwq_lite.reply.policy import Begin, Rewrite  # noqa: E402
from qwq_lite.reply.script_masks import ScriptMasks  # noqa: E402
from qwq_lite.sampling import Sampling  # noqa: E402
from qwq_lite.text import final_answer, unicode_scripts  # noqa: E402
from qwq_lite.text.fences import outside_code  # noqa: E402
from tests.oracle import qwen_ranks, qwen_tokenizer_json  # noqa: E402

N_VOCAB = 152_064  # rows of QwQ's output; those past the tokens have no text
_WORDS = ("\n\n**Final Answer**\n\n",)
_ROUNDS = 5


class Found(NamedTuple):
    """Of one reply. refused: texts of tokens that the rows mask in the labelled answer, in its heading and elsewhere; mixed: the
    answer has letters of a masked script; left: so many of them would still have come. begins: where the policies begin the
    answer; rewritten: the heading was."""

    refused_heading: list[str]
    refused_else: list[str]
    mixed: bool
    left: int
    why: str
    begins: int | None
    rewritten: bool


class Replay:
    def __init__(self) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(qwen_tokenizer_json()))
        ranks = qwen_ranks()
        self.pieces = sorted(ranks, key=ranks.__getitem__)
        self.pieces += [b""] * (N_VOCAB - len(self.pieces))
        self.masks = ScriptMasks(self.pieces, unicode_scripts.MASKABLE)

    def tokens(self, text: str) -> list[int]:
        """The tokenizer's, of a text that may hold what looks like a control token."""
        made: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return made

    def find(self, row: dict[str, Any]) -> Found:
        text, label = row["response"], row["answer_start"]
        answer = "" if label is None else text[label:]
        free = not scripts_to_mask("auto", [row["prompt"] or ""])
        n_letters = _n_letters(answer)
        start, rewritten = self._begins(row, text)
        if free:
            return Found([], [], n_letters > 0, n_letters, "auto masks nothing" if n_letters else "", None, False)
        heading, other = self._refused(answer)
        if label is None or not n_letters:
            return Found(heading, other, False, 0, "", start, rewritten)
        late = len(text) if start is None else start
        left = _n_letters(text[label:late]) if late > label else 0
        why = "before anything tells that the answer has begun" if left else ""
        return Found(heading, other, True, left, why, start, rewritten)

    def _begins(self, row: dict[str, Any], text: str) -> tuple[int | None, bool]:
        """Where the policies begin the answer in the text as it comes, and whether they force another heading there."""
        undivided = row["model"].endswith("Preview")
        first = Headings() if undivided else Phases()
        policies = arrange([first, Script(self.masks, None, _WORDS if undivided else ())])
        begin = Begin("answer" if text.startswith("<think>") else "thinking", undivided=undivided)
        state, n_chars, shown = fold.start(policies, begin), 0, 0
        for token in self.tokens(text):
            step = fold.advance(policies, state, token, self.pieces[token])
            n_chars += len(fold.utf8(state.pending, self.pieces[token])[0])
            if isinstance(step.action, Rewrite):
                assert step.action.n_drop is not None
                return n_chars - step.action.n_drop, True
            if state.phase == "thinking" and step.state.phase == "answer":
                shown = n_chars - len(step.state.held) - step.state.n_shown
            state = step.state
        return (shown if state.phase == "answer" else None), False

    def _refused(self, answer: str) -> tuple[list[str], list[str]]:
        """Texts of the tokens of an answer that its rows mask: those in the line that announces it, and the others."""
        policy = Script(self.masks)
        state = fold.start((policy,), Begin("answer"))
        line = answer.lstrip().partition("\n")[0]
        n_heading = answer.find(line) + len(line) if _announces(line) else 0
        n_chars = 0
        heading: list[str] = []
        other: list[str] = []
        for token in self.tokens(answer):
            draw = fold.constrain((policy,), state, Sampling())
            piece = self.pieces[token]
            if draw.allowed is not None and draw.allowed[token] < 0:
                (heading if n_chars < n_heading else other).append(piece.decode("utf-8", "backslashreplace"))
            n_chars += len(fold.utf8(state.pending, piece)[0])
            state = fold.advance((policy,), state, token, piece).state
        return heading, other


def _announces(line: str) -> bool:
    """Whether a line does nothing but say that the answer follows: a heading, or words before a colon."""
    return final_answer.is_heading(line) or line.rstrip()[-1:] in (":", "：")


def _n_letters(text: str) -> int:
    """Letters of scripts that can be masked, outside fenced code."""
    letters = unicode_scripts.characters(unicode_scripts.MASKABLE)
    return sum(len(letters.findall(line)) for line in outside_code(text))


def cost(replay: Replay, texts: list[str]) -> dict[str, float]:
    """Seconds to build the first row; microseconds a token of an answer; of a row that is new; of a second draw's mask."""
    builds = []
    for _ in range(_ROUNDS):
        before = time.perf_counter()
        masks = ScriptMasks(replay.pieces, unicode_scripts.MASKABLE)
        masks.row()
        builds.append(time.perf_counter() - before)
    policy = (Script(masks),)
    times: list[float] = []
    news: list[float] = []
    bare: list[float] = []
    for policies, found in ((policy, times), ((), bare)) * _ROUNDS:
        for text in texts:
            state: State = fold.start(policies, Begin("answer"))
            for token in replay.tokens(text):
                before_ns = time.perf_counter_ns()
                fold.constrain(policies, state, Sampling())
                state = fold.advance(policies, state, token, replay.pieces[token]).state
                found.append((time.perf_counter_ns() - before_ns) / 1000)
    for pending in (bytes([0xE2, 0x80 + n]) for n in range(64)):
        before_ns = time.perf_counter_ns()
        masks.row(pending)
        news.append((time.perf_counter_ns() - before_ns) / 1000)
    most = masks.n_bytes
    import numpy as np

    row = np.random.default_rng(1).random(N_VOCAB, np.float32)
    again = []
    for _ in range(200):
        before_ns = time.perf_counter_ns()
        row += masks.row()
        again.append((time.perf_counter_ns() - before_ns) / 1000)
    first = statistics.median(bare)
    return {
        "build_s": round(statistics.median(builds), 3),
        "token_us": round(statistics.median(times) - first, 2),
        "token_p99_us": round(_p99(times) - _p99(bare), 2),
        "new_row_us": round(statistics.median(news), 1),
        "new_row_max_us": round(max(news), 1),
        "mask_us": round(statistics.median(again), 1),
        "row_mb": round(masks.row().nbytes / 1e6, 2),
        "rows_most_mb": round(most / 1e6, 1),
    }


def _p99(times: list[float]) -> float:
    return sorted(times)[int(0.99 * len(times))]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="without it only the cost is measured")
    parser.add_argument("--show", action="store_true", help="name the replies that have refused tokens or are mixed")
    arguments = parser.parse_args()
    replay = Replay()
    replay.masks.row()
    counts: Counter[str] = Counter()
    texts = [
        "The answer is **42**, for 6 · 7 = 42; see the naïve proof – it's “short”. ✔️ \\[ x^2 \\le \\frac{1}{2} \\]\n\n"
    ] * 8
    for path in sorted(arguments.folder.glob("*.jsonl")) if arguments.folder else []:
        for row in map(json.loads, path.read_text("utf-8").splitlines()):
            found = replay.find(row)
            counts["replies"] += 1
            counts["answers"] += row["answer_start"] is not None
            counts["auto_masks"] += bool(scripts_to_mask("auto", [row["prompt"] or ""]))
            counts["refused_heading"] += len(found.refused_heading)
            counts["refused_elsewhere"] += len(found.refused_else)
            if not found.mixed or row["lang"] == "zh":
                counts["refused_in_answers_of_one_script"] += len(found.refused_heading) + len(found.refused_else)
            if row["lang"] != "zh":
                counts["mixed"] += found.mixed
                counts["mixed_left"] += found.mixed and found.left > 0
                counts["headings_rewritten"] += found.rewritten and found.begins == row["answer_start"]
            counts["rewritten_elsewhere"] += found.rewritten and found.begins != row["answer_start"]
            if arguments.show and (found.refused_heading or found.refused_else or found.mixed or found.rewritten):
                print(f"{path.name} {row['id']} ({row['lang']}): {found}")
    result = {"bench": "answer_scripts", **counts, **cost(replay, texts)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
