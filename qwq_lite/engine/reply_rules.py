"""The policies of one reply, by what the user asks for: where its thought begins, ends, and must end. Pure; knows no engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qwq_lite.chat.options import Options, ThoughtStyle
from qwq_lite.prompt.question import Question
from qwq_lite.reply.policies.closing import Closing, Window
from qwq_lite.reply.policies.deadline import Deadline
from qwq_lite.reply.policies.headings import Headings
from qwq_lite.reply.policies.loops import Loops
from qwq_lite.reply.policies.order import arrange
from qwq_lite.reply.policies.phases import CLOSINGS, OPENING, Phases
from qwq_lite.reply.policies.reserve import Reserve
from qwq_lite.reply.policies.script import Script
from qwq_lite.reply.policies.stops import Stops
from qwq_lite.reply.policy import Begin, Phase, Policy, Rewind, Rewrite
from qwq_lite.reply.retokenize import retokenize
from qwq_lite.reply.script_masks import ScriptMasks
from qwq_lite.text import final_answer

ANSWER_RESERVE = 1024  # tokens; the longest natural answers of 72 real outputs had 732 and 856
# Nine of ten natural answers are shorter: 340 tokens of QwQ-32B, 660 of Preview.
_ANSWER_TOKENS: Mapping[ThoughtStyle, int] = {"tags": 340, "undivided": 660, "none": 0}
_HEADINGS = ("**Final Answer**", "**最终答案**")
_SPARE = 6  # tokens by which a last line may grow when it is spelled with what ends the thought, or code is closed
_N_TAIL = 12  # tokens of a prompt among which the template's tags are


@dataclass(frozen=True)
class Thoughts:
    """How a model's thoughts are told from its answers."""

    style: ThoughtStyle
    opened: int | None = None  # id of the opening tag; None without a token for it
    closed: int | None = None  # of the closing tag


@dataclass(frozen=True)
class PieceTokenizer:
    """What rules need of a vocabulary."""

    end_tokens: frozenset[int]  # each ends a turn
    piece: Callable[[int], bytes]  # as `ReplyBuilder` has it
    tokenize: Callable[[str], list[int]]  # a text that other tokens precede


@dataclass(frozen=True)
class Rules:
    """What holds for a reply, and where it begins."""

    policies: tuple[Policy, ...]  # in the order in which they are asked
    begin: Begin
    thinking_limit: int | None = None  # most tokens of its thought; None where the model does not think
    n_words: int = 0  # those of them that are kept for what ends it


def find_thoughts(
    asked: ThoughtStyle | None, known: ThoughtStyle | None, special: Mapping[str, int], template: str | None
) -> Thoughts:
    """The user's word; else tags where the model has tokens for them; else what is known of it; else its template's."""
    opened, closed = special.get(OPENING), special.get(CLOSINGS[0])
    style = asked or ("tags" if closed is not None else known)
    if style is None:
        style = "tags" if template is not None and CLOSINGS[0] in template else "none"
    return Thoughts(style, opened, closed) if style == "tags" else Thoughts(style)


def make_rules(
    options: Options,
    model: Thoughts,
    question: Question,
    prompt: Sequence[int],
    n_ctx: int,
    tokenizer: PieceTokenizer,
    scripts: tuple[ScriptMasks | None, ScriptMasks | None] = (None, None),
) -> Rules:
    """The policies of a reply, and where it begins.

    Args:
        question: what is asked. A chat template makes its messages into a prompt, and may have opened the thought.
        prompt: its tokens.
        scripts: what is masked in the answer and in the thought.
    """
    undivided = model.style == "undivided"
    room = n_ctx - len(prompt)
    reserve = min(ANSWER_RESERVE if options.answer_reserve is None else options.answer_reserve, max(1, room // 2))
    words = closing_words(model, question.text, scripts[0])
    policies: list[Policy] = [Stops(tokenizer.end_tokens, tuple(options.stop or ()), options.max_tokens, undivided)]
    policies.append(Loops(question.may_repeat, undivided))
    if options.within is not None:
        policies.append(Deadline(options.within, min(_ANSWER_TOKENS[model.style], reserve), len(prompt)))
    if scripts != (None, None):
        policies.append(Script(*scripts, words if undivided else ()))
    if model.style == "none":
        return Rules(arrange(policies), Begin())
    begin = _begin(options, model, question, prompt, words, tokenizer)
    windows = _windows(options.budget, begin.phase, room - reserve)
    n_words = _SPARE + sum(1 if isinstance(word, int) else len(tokenizer.tokenize(word)) for word in words)
    policies.append(Closing(windows, words, n_words, model.closed, outside_code=undivided))
    policies.append(Headings() if undivided else Phases(model.opened, model.closed))
    policies.append(Reserve(reserve, tokenizer.end_tokens))
    limit = min(options.max_tokens or room, *(window.closes for window in windows))
    return Rules(arrange(policies), begin, limit, n_words)


def _begin(
    options: Options,
    model: Thoughts,
    question: Question,
    prompt: Sequence[int],
    words: tuple[str | int, ...],
    tokenizer: PieceTokenizer,
) -> Begin:
    """Where the reply of a model that thinks begins; with a budget of nothing, after the words that end the thought."""
    begin = Begin("thinking", undivided=True)
    if model.style != "undivided":
        is_open = question.is_templated and _is_open(prompt, model, tokenizer.piece)
        begin = Begin("thinking" if is_open else "answer")
    if options.budget == 0 and begin.phase == "thinking":
        _, forced = retokenize((), tokenizer.piece, Rewrite(0, words), tokenizer.tokenize)
        begin = dataclasses.replace(begin, rewinds=(Rewind(0, forced=forced, ends="budget"),))
    return begin


def _windows(budget: int | None, phase: Phase, n_most: int) -> tuple[Window, ...]:
    """Where a thought ends at the latest. n_most: tokens that it has room for."""
    windows = [Window.ending(max(1, n_most), "context")]
    if budget == 0 and phase == "answer":  # the model may open a thought itself
        windows.append(Window(0, 0, "budget"))
    elif budget is not None:
        windows.append(Window.of_budget(budget))
    return tuple(sorted(windows))


def closing_words(model: Thoughts, question: str, masks: ScriptMasks | None = None) -> tuple[str | int, ...]:
    """What ends a thought: the tag after one newline, as in real closings; a heading in the language of the question, in letters
    that the answer may have."""
    if model.style == "undivided":
        heading = _HEADINGS[final_answer.is_chinese(question)]
        if masks is not None and masks.holds_letter(heading):
            heading = _HEADINGS[False]
        return (f"\n\n{heading}\n\n",)
    if model.closed is None:
        return (f"\n{CLOSINGS[0]}\n\n",)
    return ("\n", model.closed, "\n\n")


def _is_open(prompt: Sequence[int], model: Thoughts, piece: Callable[[int], bytes]) -> bool:
    """Whether the template left a thought open: its opening tag is there, and no closing one after it."""
    tail = prompt[-_N_TAIL:]
    if model.opened is not None:
        tags = [token for token in tail if token in (model.opened, model.closed)]
        return tags[-1:] == [model.opened]
    text = b"".join(map(piece, tail)).decode("utf-8", "ignore").rstrip()
    return text.endswith(OPENING)
