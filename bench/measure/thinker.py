"""A model that thinks until it is told to answer: the demo model, whose end tokens are banned while it thinks, and 100 prompts.

A small model has no thoughts of its own, but its text has paragraphs, lists and sentences, and that is what closes a thought.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from qwq_lite.backend.context import Context, ContextSettings
from qwq_lite.backend.model import LoadedModel
from qwq_lite.chat.options import Options, ThoughtStyle
from qwq_lite.engine import reply_rules
from qwq_lite.engine.reply_rules import PieceTokenizer
from qwq_lite.engine.request import Request
from qwq_lite.engine.scheduler import Scheduler
from qwq_lite.events import Done, Event, Notice
from qwq_lite.formats import gguf_header
from qwq_lite.plan import speed
from qwq_lite.prompt import chat_template as prompts
from qwq_lite.prompt.question import read_question
from qwq_lite.reply.policies.closing import Closing
from qwq_lite.reply.policies.loops import Loops
from qwq_lite.reply.policy import Begin, Draw, Policy, Rewrite, Taken, Verdict
from qwq_lite.sampling import Sampling
from qwq_lite.text import normalization

N_CTX = 4096
_SUBJECTS = (
    "the moon", "a river", "bread", "the violin", "a lighthouse", "honey bees", "the printing press", "chess", "rain",
    "a bicycle", "the Roman roads", "glass", "a wolf", "tea", "the compass", "a market town", "snow", "whales",
    "a clock maker", "the desert", "salt", "a windmill", "paper", "the olive tree", "a harbour",
)  # fmt: skip
_TASKS = (
    "Explain {} to a child, step by step, with many details.",
    "Write a long story about {}.",
    "List ten facts about {} and say why each matters.",
    "What do people get wrong about {}? Think about it from several sides.",
)
_CHINESE = "请写一篇关于{}的长文。"
_CHINESE_SUBJECTS = (
    "月亮", "河流", "面包", "小提琴", "灯塔", "蜜蜂", "印刷术", "象棋", "下雨", "自行车",
    "玻璃", "狼", "茶", "指南针", "集市", "雪", "鲸鱼", "钟表匠", "沙漠", "森林",
)  # fmt: skip
PROMPTS = [task.format(subject) for subject, task in itertools.product(_SUBJECTS, _TASKS)]  # 100
# 20 more, apart: in Chinese this model writes no sentences, but loops of characters that take three tokens each.
CHINESE_PROMPTS = [_CHINESE.format(subject) for subject in _CHINESE_SUBJECTS]


@dataclass(frozen=True)
class KeepsThinking(Policy):
    """No end token while the model thinks. State: whether it does."""

    end_tokens: frozenset[int]
    name: ClassVar[str] = "keeps thinking"
    constrains: ClassVar[bool] = True

    def start(self, begin: Begin) -> bool:
        return begin.phase == "thinking"

    def constrain(self, thinking: bool, draw: Draw) -> Draw:
        return draw._replace(banned=draw.banned | self.end_tokens) if thinking else draw

    def observe(self, thinking: bool, taken: Taken) -> Verdict:
        return Verdict(taken.phase == "thinking")


@dataclass(frozen=True)
class Recorded(Closing):
    """Closing that writes down how it closed: the Rewrite, and the thought's text up to it. Not where the tag came early."""

    seen: list[tuple[Rewrite, str]] = None  # type: ignore[assignment] # always given
    texts: list[str] = None  # type: ignore[assignment]

    def observe(self, state: object, taken: Taken) -> Verdict:
        verdict = super().observe(state, taken)  # type: ignore[arg-type]
        if taken.phase == "thinking" and not taken.forced:
            self.texts.append(taken.text)
        if isinstance(verdict.action, Rewrite) and not self.seen:
            self.seen.append((verdict.action, "".join(self.texts[-200:])))
        return verdict


@dataclass(frozen=True)
class Made:
    """A reply: its last event, all its notices, its tokens, and how its thought was closed, None where it was not."""

    done: Done
    notices: list[Notice]
    tokens: list[int]
    n_prompt: int
    closed: tuple[Rewrite, str] | None


class Thinker:
    """The scheduler of one model. keeps: whether it may end its turn only after its thought."""

    def __init__(self, path: Path, style: ThoughtStyle, *, n_threads: int | None = None, keeps: bool = True) -> None:
        header = gguf_header.read(path)
        self.weights = LoadedModel(path)
        settings = ContextSettings(n_ctx=N_CTX, n_threads=n_threads or speed.default_threads(), n_seq_max=2)
        self.scheduler = Scheduler(self.weights, Context(self.weights, settings))
        self.vocab, self._keeps = self.weights.vocab, keeps
        source = header.text("tokenizer.chat_template")
        assert source is not None
        self._form, self._template = normalization.normal_form(header.keys), prompts.ChatTemplate(source)
        self._thoughts = reply_rules.find_thoughts(style, None, self.vocab.special, source)

    def tokenize(self, text: str) -> list[int]:
        return self.vocab.tokenize(text, parse_special=False)

    def words(self, question: str) -> tuple[str | int, ...]:
        return reply_rules.closing_words(self._thoughts, question)

    def ask(self, question: str, seed: int, lead: str = "", **options: object) -> Made:
        """lead: a text before the words that end the thought."""
        asked = Options(**options)  # type: ignore[arg-type]
        messages = [{"role": "user", "content": question}]
        tokens = self._template.encode(self.vocab, messages, self._form)
        rules = reply_rules.make_rules(
            asked, self._thoughts, read_question(messages), tokens, N_CTX,
            PieceTokenizer(self.vocab.end_tokens, self.vocab.piece, self.tokenize),
        )  # fmt: skip
        seen: list[tuple[Rewrite, str]] = []
        policies = []
        for policy in rules.policies:
            if isinstance(policy, Loops):  # a small model loops; bench/loops.py sees to that
                continue
            if isinstance(policy, Closing):
                words, n_more = _led(policy.words, lead), len(self.tokenize(lead))
                policy = Recorded(  # noqa: PLW2901
                    policy.windows, words, policy.n_words + n_more, policy.eager, policy.outside_code, seen, []
                )
            policies.append(policy)
        keeps = (KeepsThinking(self.vocab.end_tokens),) if self._keeps else ()
        request = Request(
            tokens, (*policies, *keeps), Sampling(), seed, rules.begin, ("bench", seed), within_s=asked.within,
            thinking_budget=asked.budget, thinking_limit=rules.thinking_limit, n_words=rules.n_words,
        )  # fmt: skip
        events: list[Event] = list(self.scheduler.submit(request))
        done = events[-1]
        assert isinstance(done, Done)
        held, _ = self.scheduler.call(lambda sequences: sequences.held(("bench", seed)))
        self.scheduler.release(("bench", seed))
        notices = [event for event in events if isinstance(event, Notice)]
        return Made(done, notices, held[len(tokens) :], len(tokens), seen[0] if seen else None)

    def close(self) -> None:
        self.scheduler.close()


def _led(words: tuple[str | int, ...], lead: str) -> tuple[str | int, ...]:
    first = words[0]
    return (f"{lead}{first}", *words[1:]) if lead and isinstance(first, str) else words
