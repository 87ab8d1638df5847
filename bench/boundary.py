"""Is the answer found in real outputs? Held against labels that were set by reading.

    python bench/boundary.py [FOLDER] [--show]

FOLDER holds *.jsonl, a line a reply: model, response, complete, answer_start (None where there is none). Spans are equal up to
white space; "from the first character" and "none" are the same: no boundary. Texts of QwQ-32B, which has tags, go through the
policies of a thought that the template opened, character by character; what the template opened is not in the text. Ends with one
JSON line for each file and model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "convert")]

from qwq_lite.reply.builder import ReplyBuilder  # noqa: E402
from qwq_lite.reply.policies.phases import OPENING, Phases  # noqa: E402
from qwq_lite.reply.policy import Begin  # noqa: E402
from qwq_lite.text import final_answer  # noqa: E402


def span(text: str, start: int | None) -> str:
    return "".join(text[start or 0 :].split())


def preview(row: dict[str, Any]) -> tuple[bool, str]:
    """Whether the final span is right, and what a reader of the stream had: right, late, never, false, or rightly none."""
    text, label = row["response"], row["answer_start"]
    final = final_answer.final_start(text, ended=bool(row["complete"]))
    causal = final_answer.causal_start(text)
    if not label:
        return not final, "none" if causal is None else "false"
    word = "never" if causal is None else "right" if span(text, causal) == span(text, label) else "other"
    if word == "other":
        word = "late" if causal is not None and causal > label else "false"
    return span(text, final) == span(text, label), word


def tagged(row: dict[str, Any]) -> tuple[bool, str]:
    """The same for a text with tags, in which the stream and the end find the same: right, false, never, or rightly none."""
    text, label = row["response"], row["answer_start"]
    pieces = [character.encode() for character in text]
    begin = Begin("answer" if text.startswith(OPENING) else "thinking")
    track = ReplyBuilder((Phases(),), begin, pieces.__getitem__, lambda _text: [])
    for token in range(len(pieces)):
        track.take(token)
    turned = track.thought_end is not None
    if not label:
        return not turned, "false" if turned else "none"
    right = span(track.texts("stop")[1], 0) == span(text, label)
    return right, "right" if right else "false" if turned else "never"


MODELS = {"QwQ-32B-Preview": preview, "QwQ-32B": tagged}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="without it nothing is measured")
    parser.add_argument("--show", action="store_true", help="name those that are wrong")
    arguments = parser.parse_args()
    if arguments.folder is None:
        print(json.dumps({"bench": "boundary", "texts": 0}))
        return
    for path, (model, judge) in itertools.product(sorted(arguments.folder.glob("*.jsonl")), MODELS.items()):
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        rows = [row for row in rows if row["model"] == model]
        found = [judge(row) for row in rows]
        words = [word for _, word in found]
        for row, (right, word) in zip(rows, found, strict=True):
            if arguments.show and (not right or word not in ("right", "none")):
                print(f"{row['id']}: final {'right' if right else 'WRONG'}, causally {word}")
        counts = {word: words.count(word) for word in ("right", "late", "never", "false", "none")}
        result = {"bench": "boundary", "file": path.name, "model": model, "texts": len(rows)}
        print(json.dumps({**result, "final_right": sum(right for right, _ in found), **counts}))


if __name__ == "__main__":
    main()
