"""Are loops found in real outputs, and is anything else taken for one?

    python bench/loops.py [FOLDER] [--texts DIR ...] [--tokens 500000] [--show]

FOLDER holds *.jsonl of real outputs (a line a reply: response, loops true, false or null for an arguable one). Each is folded as
one thought, for some are thoughts without tags and some answers that still think, and once more by its own phases.

Ordinary text: every kind of file below the --texts folders, and below Python's own, as replies of 8,192 tokens at most, so many
tokens a kind; as a thought, as an answer, and within a block of code. Requested repetitions: 40 questions with their right
answers, in the answer and in a block of code. False alarms are replies in which something was done.

Everything by Qwen's vocabulary; the demo model's own loops are bench/leaving_loops.py's. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "convert")]

from tokenizers import Tokenizer  # noqa: E402

from bench.budget import token_bytes  # noqa: E402
from bench.measure.requested import REQUESTED  # noqa: E402
from qwq_lite.prompt.repetition_intent import asks_for_repetition  # noqa: E402
from qwq_lite.reply import fold  # noqa: E402
from qwq_lite.reply.fold import utf8  # noqa: E402
from qwq_lite.reply.policies.loops import Loops  # noqa: E402
from qwq_lite.reply.policies.phases import Phases  # noqa: E402
from qwq_lite.reply.policy import Begin, Phase, Rewind, Stop, Taken  # noqa: E402
from qwq_lite.text.lines import Line, follow  # noqa: E402
from tests.oracle import qwen_tokenizer_json  # noqa: E402

LONGEST = 8192  # tokens of an ordinary text
_KINDS = {"prose": (".md", ".rst", ".txt", ".pod"), "code": (".py",), "tables": (".csv", ".tsv"), "json": (".json",)}
_SUFFIXES = {suffix for suffixes in _KINDS.values() for suffix in suffixes}
_ROW = re.compile(r"(?:^\|.*\|[ ]*\n){4,}|(?:^\+[-+=]+\+\n(?:^[|+].*\n)+)", re.MULTILINE)
_VERSE = re.compile(r"(?:^[ ]{0,8}[A-Z][A-Za-z ,;:.!?'-]{12,54}\n){4,}", re.MULTILINE)
_FORMULA = re.compile(r"\\(?:frac|sum|int|sqrt|alpha|begin)|\.\. math::")
_BLOCK = "```\n"


class Fired(NamedTuple):
    """Where in a reply something was done, and what of it: "exact", "near" or "stop"."""

    n_tokens: int
    what: str


class Texts:
    """Qwen's vocabulary."""

    def __init__(self) -> None:
        self._tokenizer = Tokenizer.from_file(str(qwen_tokenizer_json()))
        self.close = self._tokenizer.get_vocab_size()

    def tokens(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def pieces(self, tokens: list[int]) -> list[bytes]:
        return token_bytes(self._tokenizer, tokens)


def fired(policy: Loops, tokens: Sequence[int], pieces: Sequence[bytes], phase: Phase) -> Fired | None:
    """The first thing that is done about a text that is all of one phase."""
    state, pending, line = policy.start(Begin(phase)), b"", Line()
    for n, (token, piece) in enumerate(zip(tokens, pieces, strict=True), 1):
        text, pending = utf8(pending, piece)
        line, _ = follow(line, text)
        verdict = policy.observe(state, Taken(token, text, phase, n, line=line))
        if verdict.action is not None:
            return Fired(n, what(verdict.action))
        state = verdict.state
    return None


def what(action: object) -> str:
    if isinstance(action, Rewind):
        return "exact" if action.why == "it repeated itself" else "near"
    assert isinstance(action, Stop)
    return "stop"


# Real outputs


def transcripts(folder: Path, texts: Texts, show: bool) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.jsonl")):
        counts: Counter[str] = Counter()
        for row in (json.loads(line) for line in path.read_text("utf-8").splitlines()):
            kind = {True: "loops", False: "others", None: "arguable"}[row["loops"]]
            whole = row["response"].replace("<think>", "").replace("</think>", "")
            tokens = texts.tokens(whole)
            found = fired(Loops(), tokens, texts.pieces(tokens), "thinking")
            phased = by_phases(row, texts)
            asked = asks_for_repetition(str(row["prompt"]))
            counts.update([kind, *([f"{kind}_{found.what}"] if found else [])])
            counts.update([f"{kind}_by_phases"] * bool(phased) + [f"{kind}_asks"] * asked)
            if show and (found or kind != "others"):
                print(f"{row['id']} ({kind}, asks {asked}): {found} of {len(tokens)} tokens, by its phases {phased}")
        yield {"file": path.name, **dict(sorted(counts.items()))}


def by_phases(row: dict[str, Any], texts: Texts) -> Fired | None:
    """The same by the rules of the reply's own phases: tags, or none, in which case all of it is the thought."""
    tagged = row["model"] == "QwQ-32B" and "</think>" in row["response"]
    parts = row["response"].removeprefix("<think>").split("</think>") if tagged else [row["response"]]
    tokens: list[int] = []
    pieces: list[bytes] = []
    for part in parts:
        more = texts.tokens(part)
        tokens += [texts.close] * bool(pieces) + more
        pieces += [b""] * bool(pieces) + texts.pieces(more)
    policies = (Phases(texts.close + 1, texts.close), Loops(undivided=not tagged))
    state = fold.start(policies, Begin("thinking"))
    for n, (token, piece) in enumerate(zip(tokens, pieces, strict=True), 1):
        step = fold.advance(policies, state, token, piece)
        if step.action is not None:
            return Fired(n, what(step.action))
        state = step.state
    return None


# Ordinary texts


def ordinary(folders: Sequence[Path], n_most: int, texts: Texts, show: bool) -> Iterator[dict[str, Any]]:
    """For each kind of text the replies in which something is done, as a thought, as an answer, and in a block of code."""
    for kind, source in sources(folders).items():
        counts: Counter[str] = Counter()
        for path, text in source:
            if counts["tokens"] >= n_most:
                break
            tokens = texts.tokens(text[: 8 * LONGEST])[:LONGEST]
            pieces = texts.pieces(tokens)
            counts.update({"tokens": len(tokens), "texts": 1})
            ways: list[tuple[str, str, Phase]] = [("thought", "", "thinking"), ("answer", "", "answer")]
            for way, opening, phase in (*ways, ("thought_code", _BLOCK, "thinking"), ("answer_code", _BLOCK, "answer")):
                more = texts.tokens(opening)
                found = fired(Loops(), more + tokens, texts.pieces(more) + pieces, phase)
                if found:
                    counts[f"{way}_{found.what}"] += 1
                    if show:
                        around = b"".join(pieces[max(0, found.n_tokens - 30) : found.n_tokens]).decode(
                            "utf-8", "replace"
                        )
                        print(f"{kind} {way} {found} {path}: {around!r}")
        yield {"kind": kind, **counts}


def sources(folders: Sequence[Path]) -> dict[str, Iterator[tuple[Path, str]]]:
    """Texts of each kind, in an order that does not depend on the system; none comes twice."""
    paths = sorted({path for folder in folders for path in folder.rglob("*") if path.suffix in _SUFFIXES})
    random.Random(0).shuffle(paths)
    found = {kind: _read(paths, suffixes, None) for kind, suffixes in _KINDS.items()}
    found["tables"] = itertools.chain(found["tables"], _read(paths, (*_KINDS["prose"], ".py"), _ROW))
    found["verse"] = _read(paths, _KINDS["prose"], _VERSE)
    found["mathematics"] = _read(paths, (*_KINDS["prose"], ".py"), _FORMULA)
    return found


def _read(
    paths: Sequence[Path], suffixes: Sequence[str], what_counts: re.Pattern[str] | None
) -> Iterator[tuple[Path, str]]:
    """what_counts: the text must have it three times; of tables and verse nothing else is taken."""
    seen = set()
    for path in paths:
        if path.suffix not in suffixes:
            continue
        try:
            text = path.read_text("utf-8")[: 1 << 20]
        except (OSError, UnicodeDecodeError):
            continue
        if what_counts is not None:
            parts = [match[0] for match in what_counts.finditer(text)]
            if len(parts) < 3:
                continue
            text = text if what_counts is _FORMULA else "\n".join(parts)
        if len(text) >= 400 and hash(text[:4000]) not in seen:
            seen.add(hash(text[:4000]))
            yield path, text


# Repetition that was asked for


def requested(texts: Texts, show: bool) -> dict[str, Any]:
    """Right answers, plain and in a block of code: how many the rule would end, and how many if the question were not read."""
    counts: Counter[str] = Counter(questions=len(REQUESTED))
    for question, answer in REQUESTED:
        asked = asks_for_repetition(question)
        counts["recognised"] += asked
        for way, opening in (("plain", ""), ("code", _BLOCK)):
            tokens = texts.tokens(opening + answer)
            pieces = texts.pieces(tokens)
            ended = fired(Loops(asked), tokens, pieces, "answer")
            unread = fired(Loops(), tokens, pieces, "answer")
            thought = fired(Loops(asked), tokens, pieces, "thinking")
            counts[f"ended_{way}"] += ended is not None
            counts[f"unread_{way}"] += unread is not None
            counts[f"thought_{way}"] += thought is not None
            if show and (ended or not asked):
                print(f"{question!r}: recognised {asked}, {way} {ended}, unread {unread}")
    return dict(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="real outputs; without it none are looked at")
    parser.add_argument(
        "--texts", type=Path, nargs="*", default=[], help="folders with ordinary texts, beside Python's own"
    )
    parser.add_argument("--tokens", type=int, default=100_000, help="of ordinary text, a kind; 0 for none")
    parser.add_argument("--show", action="store_true", help="name what was found")
    arguments = parser.parse_args()
    texts, show = Texts(), arguments.show
    result: dict[str, Any] = {"bench": "loops", "transcripts": [], "ordinary": []}
    if arguments.folder is not None:
        for row in transcripts(arguments.folder, texts, show):
            result["transcripts"].append(row)
            print(row, flush=True)
    if arguments.tokens:
        folders = [Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib")), *arguments.texts]
        for row in ordinary(folders, arguments.tokens, texts, show):
            result["ordinary"].append(row)
            print(row, flush=True)
    result["requested"] = requested(texts, show)
    print(result["requested"], flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
