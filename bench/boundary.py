"""Is the answer found in real outputs? Held against labels that were set by reading.

    python bench/boundary.py [FOLDER] [--show]

FOLDER holds *.jsonl, a line a reply: model, response, complete, answer_start (None where there is none). Spans are equal up to
white space; for a text without tags "from the first character" and "none" are the same. Ends with one JSON line for each file.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "convert")]

from qwq_lite import boundary  # noqa: E402


def span(text: str, start: int | None) -> str:
    return "".join(text[start or 0 :].split())


def preview(row: dict[str, Any]) -> tuple[bool, str]:
    """Whether the final span is right, and what a reader of the stream had: right, late, never, false, or rightly none."""
    text, label = row["response"], row["answer_start"]
    final = boundary.final_start(text, ended=bool(row["complete"]))
    causal = boundary.causal_start(text)
    if not label:
        return not final, "none" if causal is None else "false"
    word = "never" if causal is None else "right" if span(text, causal) == span(text, label) else "other"
    if word == "other":
        word = "late" if causal is not None and causal > label else "false"
    return span(text, final) == span(text, label), word


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="without it nothing is measured")
    parser.add_argument("--show", action="store_true", help="name those that are wrong")
    arguments = parser.parse_args()
    if arguments.folder is None:
        print(json.dumps({"bench": "boundary", "texts": 0}))
        return
    for path in sorted(arguments.folder.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        rows = [row for row in rows if row["model"] == "QwQ-32B-Preview"]
        found = [preview(row) for row in rows]
        words = [word for _, word in found]
        for row, (right, word) in zip(rows, found, strict=True):
            if arguments.show and (not right or word not in ("right", "none")):
                print(f"{row['id']}: final {'right' if right else 'WRONG'}, causally {word}")
        counts = {word: words.count(word) for word in ("right", "late", "never", "false", "none")}
        n_right = sum(right for right, _ in found)
        print(
            json.dumps({"bench": "boundary", "file": path.name, "texts": len(rows), "final_right": n_right, **counts})
        )


if __name__ == "__main__":
    main()
