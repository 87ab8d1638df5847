"""Does the demo model get out of its loops?

    python bench/leaving_loops.py [--prompts 200] [--end-tokens respected|ignored] [--temperature T] [--show]

A small model that is greedy loops in most of what it writes. First it writes a reply to each prompt without the rule, with its
end tokens respected or ignored, until brute force (measure/repeats.py) labels a loop that can be judged: found in time, late, or
missed. Then the same reply is given to it again, with the rule, up to the place where that fires, and it goes on from there. The
loop was recovered when no other one comes within 512 tokens, exact or near, by the rule or by brute force; replies that came to
their end before are counted among these, and apart. Of the others it is counted whether the thought was ended and the answer came
to its end, or was stopped for it looped again.

Replies without the rule are kept in build/bench/ and written once. Two runs, one of either kind of end tokens, may go side by
side: a model has one thread. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "convert")]

from bench.loops import Fired, fired, what  # noqa: E402
from bench.measure.repeats import EIGHT, LEAST, Repeat, loops  # noqa: E402
from bench.measure.thinker import N_CTX, PROMPTS, KeepsThinking, Made, Thinker  # noqa: E402
from qwq_lite.chat.options import Options  # noqa: E402
from qwq_lite.engine import reply_rules  # noqa: E402
from qwq_lite.engine.reply_rules import PieceTokenizer  # noqa: E402
from qwq_lite.engine.request import Request  # noqa: E402
from qwq_lite.events import Done, Notice  # noqa: E402
from qwq_lite.prompt.question import read_question  # noqa: E402
from qwq_lite.reply.policies.loops import Loops, LoopState  # noqa: E402
from qwq_lite.reply.policy import (  # noqa: E402
    Begin,
    Policy,
    Rewind,
    Stop,
    Taken,
    Verdict,
)
from qwq_lite.sampling import Sampling  # noqa: E402

DEMO = ROOT / "build" / "demo" / "SmolLM2-135M-Instruct-Q4_K_M.gguf"
KEPT = ROOT / "build" / "bench"
AGAIN = 512  # tokens within which another loop means that the first was not recovered
MORE = 128  # tokens by which brute force sees loops that began before that and that the rule had not seen yet
N_GREEDY = 1024  # tokens of a reply without the rule
N_MORE = 1536  # tokens of a reply after its first loop
END_OF_TEXT = -1  # no token of any vocabulary


@dataclass(frozen=True)
class Labelled(Policy):
    """Ends a reply that has a labelled loop that can be judged: no later token makes another first one. State: its tokens."""

    name: ClassVar[str] = "labelled"

    def start(self, begin: Begin) -> tuple[int, ...]:
        return ()

    def observe(self, tokens: tuple[int, ...], taken: Taken) -> Verdict:
        tokens = (*tokens, taken.token)
        if len(tokens) % 32 == 0:
            for loop in loops(tokens):
                if loop.n_copies >= EIGHT and loop.end - loop.start >= 1.25 * max(4 * loop.period, LEAST):
                    return Verdict(tokens, Stop("length"))
        return Verdict(tokens)


@dataclass(frozen=True)
class Watched(Loops):
    """Loops that writes down what it did: the reply's length then, where the reply goes on from, and what it was.

    The reply ends where the first loop is recovered: nothing more is asked of it.
    """

    seen: list[tuple[int, int, str]] = field(default_factory=list)

    def observe(self, seen: LoopState, taken: Taken) -> Verdict:
        verdict = super().observe(seen, taken)
        if len(self.seen) == 1 and taken.n_tokens > self.seen[0][1] + AGAIN + MORE:
            return Verdict(verdict.state, Stop("length"))
        if verdict.action is not None or verdict.end is not None:
            place = verdict.action.n_tokens if isinstance(verdict.action, Rewind) else taken.n_tokens
            word = (taken.n_tokens, place, "closed" if verdict.end else what(verdict.action))
            if word not in self.seen:
                self.seen.append(word)
        return verdict


class Greedy(Thinker):
    """The demo model, undivided. keeps: its end tokens are ignored while it thinks."""

    def write(
        self, question: str, n_most: int, rule: Policy, begun: Sequence[int] = (), sampling: Sampling | None = None
    ) -> Made:
        """A reply that begins with these tokens, by this rule for loops; greedy unless another sampling is given."""
        messages = [{"role": "user", "content": question}]
        tokens = self._template.encode(self.vocab, messages, self._form)
        rules = reply_rules.make_rules(
            Options(max_tokens=n_most), self._thoughts, read_question(messages), tokens, N_CTX,
            PieceTokenizer(self.vocab.end_tokens, self.vocab.piece, self.tokenize),
        )  # fmt: skip
        policies = tuple(rule if isinstance(policy, Loops) else policy for policy in rules.policies)
        keeps = (KeepsThinking(self.vocab.end_tokens),) if self._keeps else ()
        begin = replace(rules.begin, rewinds=(Rewind(0, forced=tuple(begun)),) if begun else ())
        request = Request(
            tokens, (*policies, *keeps), sampling or Sampling(temperature=0), 0, begin, ("loops", question),
            thinking_limit=rules.thinking_limit, n_words=rules.n_words,
        )  # fmt: skip
        events = list(self.scheduler.submit(request))
        done = events[-1]
        assert isinstance(done, Done)
        held, _ = self.scheduler.call(lambda sequences: sequences.held(("loops", question)))
        self.scheduler.release(("loops", question))
        notices = [event for event in events if isinstance(event, Notice)]
        return Made(done, notices, held[len(tokens) :], len(tokens), None)


def replies(model: Greedy, prompts: Sequence[str], way: str) -> Iterator[tuple[str, list[int], bool]]:
    """Each prompt, the tokens of its reply without the rule, and whether that ended by itself."""
    KEPT.mkdir(parents=True, exist_ok=True)
    path = KEPT / f"greedy-{way}.json"
    kept = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for question in prompts:
        if question not in kept:
            made = model.write(question, N_GREEDY, Labelled())
            kept[question] = made.tokens, made.done.reply.finish_reason == "stop"
            part = path.with_suffix(".part")
            part.write_text(json.dumps(kept), "utf-8")
            part.replace(path)
        tokens, by_itself = kept[question]
        yield question, tokens, by_itself


def measured(prompts: Sequence[str], way: str, sampling: Sampling, show: bool) -> dict[str, Any]:
    """Loops of replies: labelled, found, late; and what became of those that the rule saw itself."""
    model = Greedy(DEMO, "undivided", n_threads=1, keeps=way == "ignored")
    counts: Counter[str] = Counter()
    delays: list[float] = []
    for n, (question, tokens, by_itself) in enumerate(replies(model, prompts, way), 1):
        if show:
            print(n - 1, dict(sorted(counts.items())), flush=True)
        counts["prompts"] = n
        # What ended by itself does not reach the end of its text: one more token stands for the end token.
        labelled = loops(tokens + [END_OF_TEXT] * by_itself)
        found = fired(Loops(), tokens, [model.vocab.piece(token) for token in tokens], "thinking")
        counts.update(judged(labelled, found))
        if labelled and found:
            first = labelled[0]
            delays.append((found.n_tokens - first.start) / max(4 * first.period, 64))
        if found is None:
            continue
        watched = Watched()
        made = model.write(question, found.n_tokens + N_MORE, watched, tokens[: found.n_tokens], sampling)
        counts.update(became(watched.seen, made))
        if show:
            print(f"{question!r}: {labelled[:2]} {found} {watched.seen} {made.done.reply.finish_reason}", flush=True)
    model.close()
    delay = statistics.median(delays) if delays else None
    return {"end_tokens": way, **dict(sorted(counts.items())), "median_delay_of_limit": delay}


def questions(n_prompts: int) -> list[str]:
    """The prompts of a thinker, and each once more with other words, for which a greedy model writes another text."""
    more = [f"{question} Begin with the most important part." for question in PROMPTS]
    return [*PROMPTS, *more][:n_prompts]


def judged(labelled: list[Repeat], found: Fired | None) -> list[str]:
    """In time: within four periods or 64 tokens and a quarter more."""
    if not labelled:
        return ["fired_unlabelled"] if found else []
    first = min(labelled, key=lambda loop: loop.start + max(4 * loop.period, 64))
    words = ["labelled"]
    if found is None:
        return [*words, "missed", *(["missed_8_periods"] if any(loop.n_copies >= 8 for loop in labelled) else [])]
    in_time = found.n_tokens <= first.start + 1.25 * max(4 * first.period, 64)
    return [*words, f"found_{found.what}", "in_time" if in_time else "late"]


def became(seen: list[tuple[int, int, str]], made: Made) -> list[str]:
    """Of the first loop: recovered, or again within AGAIN tokens; then whether the answer came to its end or was stopped."""
    place, kind = seen[0][1], seen[0][2]
    ended = made.done.reply.finish_reason == "stop"
    again = any(n <= place + AGAIN for n, _, _ in seen[1:])
    unseen = loops(made.tokens[place:] + [END_OF_TEXT] * ended) if len(seen) == 1 else []
    words = [f"{kind}_left"]
    if not again and not any(loop.start <= AGAIN for loop in unseen):
        return [*words, f"{kind}_recovered", *(["ended_before"] if len(made.tokens) < place + AGAIN else [])]
    if not again:
        words.append("again_unseen")
    elif made.done.reply.finish_reason == "loop":
        words.append("stopped")
    elif "closed" in made.done.reply.stats.loops:
        words.append("concluded" if made.done.reply.answer.strip() else "concluded_without_answer")
    return words


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--skip", type=int, default=0, help="so many of them")
    parser.add_argument("--end-tokens", choices=("respected", "ignored"), help="only so")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="asked for after a loop; it is at least 0.6 then"
    )
    parser.add_argument("--show", action="store_true", help="name what was found")
    arguments = parser.parse_args()
    prompts = questions(arguments.prompts)[arguments.skip :]
    result: dict[str, Any] = {"bench": "leaving_loops", "temperature": arguments.temperature, "greedy": []}
    for way in ("respected", "ignored"):
        if arguments.end_tokens in (None, way):
            sampling = Sampling(temperature=arguments.temperature)
            result["greedy"].append(measured(prompts, way, sampling, arguments.show))
            print(result["greedy"][-1], flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
