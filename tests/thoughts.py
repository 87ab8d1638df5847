"""Thoughts and answers that go on for ever, in an invented vocabulary, made by the real policies without an engine."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle

from hypothesis import strategies as st

from qwq_lite.chat.options import Options
from qwq_lite.engine import reply_rules
from qwq_lite.engine.reply_rules import PieceTokenizer, Rules, Thoughts
from qwq_lite.events import Event
from qwq_lite.prompt.question import read_question
from qwq_lite.reply.builder import ReplyBuilder
from qwq_lite.reply.policies.closing import MARGIN
from qwq_lite.reply.policy import Rewind, Stop
from qwq_lite.reply.script_masks import ScriptMasks
from qwq_lite.sampling import Sampling

END, OPEN, CLOSE = range(3)
QUESTION = read_question([{"role": "user", "content": "How many?"}])
TAGS, UNDIVIDED = Thoughts("tags", OPEN, CLOSE), Thoughts("undivided")
_TOKEN = re.compile(r"[.!?…。！？:*]+\n*| ?\w{1,6}| *\n+|.", re.DOTALL)


class Words:
    """An invented vocabulary: words and signs, a stop as one token with the newlines after it. Ids as they come up."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._pieces: list[bytes] = [b"", b"", b""]

    def tokenize(self, text: str) -> list[int]:
        for word in (words := _TOKEN.findall(text)):
            if word not in self._ids:
                self._ids[word] = len(self._pieces)
                self._pieces.append(word.encode())
        return [self._ids[word] for word in words]

    def __len__(self) -> int:
        return len(self._pieces)

    def piece(self, token: int) -> bytes:
        return self._pieces[token]

    def text(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self.piece, tokens)).decode()


@dataclass
class Run:
    """A reply that was made. thought: all that the model wrote until the thought was ended, before anything was taken back;
    rewind: what ended it; n_at: tokens that there were then; eager: the reply's length at draws that had a tag to take early.
    """

    track: ReplyBuilder
    thought: list[int]
    rewind: Rewind | None = None
    stop: Stop | None = None
    events: list[Event] = field(default_factory=list)
    eager: list[int] = field(default_factory=list)
    closed_s: float = 0.0
    end_s: float = 0.0

    @property
    def n_answer(self) -> int:
        """Tokens that the model wrote after the forced ones."""
        assert self.rewind is not None
        return len(self.track.tokens) - self.rewind.n_tokens - len(self.rewind.forced)


def rules_of(
    words: Words,
    options: Options,
    model: Thoughts = TAGS,
    n_ctx: int = 100_000,
    n_prompt: int = 1,
    *,
    opened: bool = True,
    loops: bool = False,
    scripts: tuple[ScriptMasks | None, ScriptMasks | None] = (None, None),
) -> Rules:
    """opened: the template began the thought of a model with tags. loops: they are looked for; most thoughts in tests repeat a
    text, and are about other rules. scripts: what is masked in the answer and in the thought."""
    prompt = [*words.tokenize(" so") * n_prompt][: n_prompt - opened] + [OPEN] * opened
    end = frozenset({END})
    rules = reply_rules.make_rules(
        options, model, QUESTION if model is TAGS else read_question("How many?"), prompt, n_ctx,
        PieceTokenizer(end, words.piece, words.tokenize), scripts,
    )  # fmt: skip
    kept = tuple(policy for policy in rules.policies if loops or policy.name != "loops")
    return dataclasses.replace(rules, policies=kept)


def run(
    words: Words, rules: Rules, thought: Iterator[int], answer: Iterator[int], *, n_most: int = 20_000,
    asked_at: int | None = None, cost: Callable[[int], float] = lambda n: 0.0, takes_tag: bool = False,
) -> Run:  # fmt: skip
    """Let a model write: `thought` as long as it thinks, then `answer`. cost: seconds of the n-th token of the reply.

    takes_tag: the tag is nearly the likeliest token wherever it may be taken early.
    """
    track = ReplyBuilder(rules.policies, rules.begin, words.piece, words.tokenize)
    found, now = Run(track, []), 0.0
    for rewind in rules.begin.rewinds:
        found.rewind = rewind
    while track.n_taken < n_most and found.stop is None:
        if asked_at == len(track.tokens) and found.rewind is None:
            assert track.conclude()
        draw, n = track.constrain(Sampling()), len(track.tokens)
        thinks = track.state.phase == "thinking"
        if draw.eager is not None:
            assert thinks
            assert draw.eager[:2] == (CLOSE, MARGIN)
            found.eager.append(n)
            if takes_tag:
                events, found.rewind = track.rewrite(draw.eager[2])
                found.events += events
                continue
        token = draw.forced if draw.forced is not None else next(thought if thinks else answer, END)
        if token in draw.banned:
            token = words.tokenize("so")[0]
        now += cost(n)
        if thinks and draw.forced is None:
            found.thought.append(token)
        events, action = track.take(token, now)
        found.events += events
        if isinstance(action, Rewind):
            assert found.rewind is None, "a thought is ended once"
            found.rewind, found.closed_s = action, now
        elif isinstance(action, Stop):
            found.stop, found.end_s = action, now
    return found


def endless(words: Words, text: str, n: int = 400) -> Iterator[int]:
    """A text again and again, in the tokens of the whole for n of them at least."""
    return cycle(words.tokenize(text * (1 + 4 * n // len(words.tokenize(text)))))


def sentence(n: int, stop: str, word: str) -> str:
    return " ".join([word.capitalize(), *[word] * n]) + stop


SENTENCES = st.builds(sentence, st.integers(0, 50), st.sampled_from([". ", "? ", "!", "... ", ",", ""]), st.just("so"))
CHINESE = st.builds(
    lambda n, stop: "好" * n + stop, st.integers(1, 60), st.sampled_from(["。", "？", "，", "……", "。”"])
)
GAPS = st.sampled_from(["\n", "\n\n", " ", " ", "", "\n\n1. ", "\n- ", " 3.14 ", " e.g. "])
TEXTS = st.lists(st.one_of(SENTENCES, CHINESE, GAPS), min_size=1, max_size=12).map("".join).filter(str.strip)
MODELS = st.sampled_from([TAGS, UNDIVIDED])
PLAIN = "Then so it is. "


def ends_well(kept: str, after: str) -> bool:
    """Whether a text ends with a line or a sentence, by what the model wrote after it."""
    return (
        re.search(r"[.!?。！？…][\"'”’」』）)\]*_`]*\Z", kept) is not None
        or "\n" in after[: len(after) - len(after.lstrip())]
    )


def answer_of(words: Words, found: Run) -> tuple[str, str]:
    """The answer that counts, less a heading, and what the model wrote after it."""
    written = words.text(found.track.tokens[-found.n_answer :]).lstrip("\n")
    shown = found.track.texts("length")[1].removeprefix("**Final Answer**").lstrip("\n")
    assert written.startswith(shown)
    return shown, written[len(shown) :]
