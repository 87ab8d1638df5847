"""Do budgets hold, and what becomes of the answer?

    python bench/budget.py [FOLDER] [--prompts 100] [--style undivided|tags] [--lead]

Real runs: the demo model without tags and with them (made from its checkpoint), whose end tokens are banned while it thinks; 100
English prompts, and 20 Chinese ones apart, in which this model writes no sentences; a budget each of 64 to 1,024 tokens. Counted:
thinking tokens against max(1.1 N, N + 96); whether the thought ended where a text may end, and how often it had to be taken back;
whether the forced words are there once and spelled as the tokenizer spells them; the answer against its reserve, and beside
answers to the same prompts without a thought.

FOLDER holds *.jsonl of real outputs (a line a reply: model, response, answer_start): their thoughts are put through the same
policies, token by token of Qwen's vocabulary, with budgets shorter than they are. --lead measures a closing sentence before the
words. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "convert")]

from tokenizers import Tokenizer  # noqa: E402

from bench.measure.thinker import CHINESE_PROMPTS, PROMPTS, Made, Recorded, Thinker  # noqa: E402
from qwq_convert.pipeline import convert  # noqa: E402
from qwq_lite.chat.options import ThoughtStyle  # noqa: E402
from qwq_lite.engine.reply_rules import closing_words, find_thoughts  # noqa: E402
from qwq_lite.formats.tensor_types import file_type  # noqa: E402
from qwq_lite.reply.builder import ReplyBuilder  # noqa: E402
from qwq_lite.reply.policies.closing import Window  # noqa: E402
from qwq_lite.reply.policies.headings import Headings  # noqa: E402
from qwq_lite.reply.policies.phases import Phases  # noqa: E402
from qwq_lite.reply.policy import Begin, Rewind, Rewrite  # noqa: E402
from qwq_lite.text import breaks  # noqa: E402
from scripts.checkpoint_files import byte_symbols  # noqa: E402
from tests.checkpoints import write_tagged_checkpoint  # noqa: E402
from tests.oracle import demo_checkpoint, qwen_tokenizer_json  # noqa: E402

DEMO = ROOT / "build" / "demo" / "SmolLM2-135M-Instruct-Q4_K_M.gguf"
BUDGETS = (64, 128, 256, 512, 1024)
RESERVE = 128
LEAD = "\n\nI have thought about this for long enough, so here is the answer."
_GOES_ON = re.compile(
    r"\b(?:wait|hmm|let me (?:think|see|check|try)|alternatively|hold on)\b|等等|让我想", re.IGNORECASE
)


def limit(budget: int) -> int:
    return max(budget + budget // 10, budget + 96)


def at_a_break(closed: tuple[Rewrite, str]) -> bool:
    """Whether the thought ended where a text may end: at once, or where it was taken back to."""
    rewrite, text = closed
    return rewrite.n_drop is not None or breaks.n_after_last(text) is not None


def is_canonical(thinker: Thinker, made: Made, words: tuple[str | int, ...]) -> bool:
    """Whether the forced words are in the reply exactly once, spelled as the line that they end is spelled by the tokenizer."""
    text, tokens = words[0], made.tokens
    tag = next((word for word in words if isinstance(word, int)), None)
    if tag is not None:
        places = [n for n, token in enumerate(tokens) if token == tag]
        if len(places) != 1 or tokens[places[0] + 1 : places[0] + 2] != thinker.tokenize("\n\n"):
            return False
        tokens = tokens[: places[0]]
    else:
        bare = str(text).strip()
        ends = [n for n in range(1, len(tokens) + 1) if spelled(thinker, tokens[:n]).endswith(f"{bare}\n\n")]
        if not ends or spelled(thinker, tokens[: ends[0]]).count(bare) != 1:
            return False
        tokens = tokens[: ends[0]]
    whole = spelled(thinker, tokens)
    line = whole.rstrip("\n").rpartition("\n")[2] if tag is not None else whole[whole.rfind("\n", 0, -20) + 1 :]
    tail = line + whole[len(whole.rstrip("\n")) :] if tag is not None else line
    again = thinker.tokenize(tail)
    return tokens[-len(again) :] == again


def spelled(thinker: Thinker, tokens: list[int]) -> str:
    return b"".join(map(thinker.vocab.piece, tokens)).decode("utf-8", "replace")


def real_runs(path: Path, style: ThoughtStyle, prompts: Sequence[str], lead: str) -> dict[str, Any]:
    thinker = Thinker(path, style)
    rows = []
    for number, question in enumerate(prompts):
        budget = BUDGETS[number % len(BUDGETS)]
        made = thinker.ask(question, number, lead, thinking_budget=budget, answer_reserve=RESERVE)
        rows.append((budget, question, made))
    canonical = [is_canonical(thinker, made, thinker.words(question)) for _, question, made in rows if not lead]
    thinker.close()
    unforced = unforced_lengths(path, prompts) if style == "undivided" else []  # the model with tags is the same one
    closed = [(budget, made.closed) for budget, _, made in rows if made.closed is not None]
    answers = [made.done.reply.answer for _, _, made in rows]
    lengths = [made.done.reply.stats.n_answer for _, _, made in rows]
    long_closed = [seen for budget, seen in closed if budget >= 512]
    return {
        "style": style,
        "runs": len(rows),
        "ended_by_budget": sum(made.done.reply.stats.thought_end == "budget" for _, _, made in rows),
        "tag_taken_early": sum(made.done.reply.stats.thought_end == "budget" and not made.closed for *_, made in rows),
        "closed": len(closed),
        "over_limit": sum(made.done.reply.stats.n_thinking > limit(budget) for budget, _, made in rows),
        "at_a_break": sum(at_a_break(seen) for _, seen in closed),
        "taken_back": sum(seen[0].n_drop is None for _, seen in closed),
        "taken_back_512": f"{sum(seen[0].n_drop is None for seen in long_closed)} of {len(long_closed)}",
        "once_and_canonical": f"{sum(canonical)} of {len(canonical)}",
        "longest_answer": max(lengths),
        "answers_over_reserve": sum(n > RESERVE for n in lengths),
        "without_answer": sum(not answer.strip() for answer in answers),
        "answer_median": statistics.median(lengths or [0]),
        "unforced_median": statistics.median(unforced or [0]),
        "goes_on_thinking": sum(
            bool(_GOES_ON.search(answer)) or any(n.kind == "restarted" for n in made.notices)
            for answer, (_, _, made) in zip(answers, rows, strict=True)
        ),
    }


def unforced_lengths(path: Path, prompts: Sequence[str]) -> list[int]:
    """Tokens of answers to the same prompts without a thought, cut at the same limit."""
    plain = Thinker(path, "none", keeps=False)
    found = [plain.ask(text, n, max_tokens=RESERVE).done.reply.stats.n_answer for n, text in enumerate(prompts)]
    plain.close()
    return found


def replays(folder: Path) -> Iterator[dict[str, Any]]:
    """Real thoughts under every budget that is shorter than they are."""
    tokenizer = Tokenizer.from_file(str(qwen_tokenizer_json()))
    close = tokenizer.get_vocab_size()

    def tokenize(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    for path in sorted(folder.glob("*.jsonl")):
        for name in ("QwQ-32B", "QwQ-32B-Preview"):
            rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            style: ThoughtStyle = "tags" if name == "QwQ-32B" else "undivided"
            closed: list[tuple[int, tuple[Rewrite, str], int]] = []
            n_replayed = 0
            for row in (row for row in rows if row["model"] == name):
                text = (
                    row["response"][: row["answer_start"] or None]
                    .removeprefix("<think>")
                    .replace("</think>", "")
                    .strip()
                )
                tokens = tokenize(text)
                for budget in (*BUDGETS, 2048, 4096):
                    if len(tokens) < limit(budget) + 8:
                        continue
                    n_replayed += 1
                    found = replay(text, tokens, style, budget, close, tokenizer, tokenize)
                    if found is not None:
                        closed.append((budget, *found))
            long_closed = [seen for budget, seen, _ in closed if budget >= 512]
            yield {
                "file": path.name,
                "model": name,
                "replays": n_replayed,
                "closed": len(closed),
                "over_limit": sum(n > limit(budget) for budget, _, n in closed),
                "at_a_break": sum(at_a_break(seen) for _, seen, _ in closed),
                "taken_back": sum(seen[0].n_drop is None for _, seen, _ in closed),
                "taken_back_512": f"{sum(seen[0].n_drop is None for seen in long_closed)} of {len(long_closed)}",
            }


def replay(
    text: str, tokens: list[int], style: ThoughtStyle, budget: int, close: int, tokenizer: Tokenizer, tokenize: Any
) -> tuple[tuple[Rewrite, str], int] | None:
    """How the budget closed the thought, and the thought's length then; None where its own text announced an answer before."""
    pieces = dict(zip(tokens, token_bytes(tokenizer, tokens), strict=True))
    pieces[close] = b""
    special = {"<think>": close + 1, "</think>": close} if style == "tags" else {}
    words = closing_words(find_thoughts(style, None, special, None), text)
    seen: list[tuple[Rewrite, str]] = []
    eager, outside_code = (close, False) if style == "tags" else (None, True)
    closing = Recorded((Window.of_budget(budget),), words, 12, eager, outside_code, seen, [])
    phases = Headings() if style == "undivided" else Phases(close + 1, close)
    begin = Begin("thinking", undivided=style == "undivided")

    def piece(token: int) -> bytes:
        if token not in pieces:
            pieces[token] = token_bytes(tokenizer, [token])[0]
        return pieces[token]

    track = ReplyBuilder((phases, closing), begin, piece, tokenize)
    for token in tokens:
        _, action = track.take(token)
        if isinstance(action, Rewind):
            for forced in action.forced:
                track.take(forced)
            return seen[0], track.n_thinking
        if track.state.phase != "thinking":
            return None
    return None


def token_bytes(tokenizer: Tokenizer, tokens: list[int]) -> list[bytes]:
    """Bytes of tokens, from the byte-level alphabet that their spellings are written in."""
    return [bytes(_BYTES[character] for character in str(tokenizer.id_to_token(token))) for token in tokens]


_BYTES = {symbol: byte for byte, symbol in enumerate(byte_symbols())}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="real outputs to replay")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="0 for replays alone")
    parser.add_argument("--style", choices=["undivided", "tags"], help="one of the two models alone")
    parser.add_argument("--lead", action="store_true", help="a closing sentence before what ends the thought")
    arguments = parser.parse_args()
    lead = LEAD if arguments.lead else ""
    result: dict[str, Any] = {"bench": "budget", "lead": bool(lead), "runs": [], "replays": []}
    if arguments.prompts:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = write_tagged_checkpoint(demo_checkpoint(), Path(folder) / "Tagged")
            tagged = Path(folder) / "Tagged-Q4_K_M.gguf"
            convert(checkpoint, file_type("Q4_K_M"), tagged)
            models: tuple[tuple[Path, ThoughtStyle], ...] = ((DEMO, "undivided"), (tagged, "tags"))
            languages = {"English": PROMPTS[: arguments.prompts], "Chinese": CHINESE_PROMPTS[: arguments.prompts // 5]}
            for (path, style), (language, prompts) in itertools.product(models, languages.items()):
                if prompts and arguments.style in (None, style):
                    result["runs"].append({"language": language, **real_runs(path, style, prompts, lead)})
                    print(result["runs"][-1], flush=True)
    if arguments.folder is not None:
        for row in replays(arguments.folder):
            result["replays"].append(row)
            print(row)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
