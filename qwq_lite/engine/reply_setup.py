"""From what the user asks for to the rules of one reply: where its thought begins, ends, and must end. Pure; knows no engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from qwq_lite.chat.options import Options, ThoughtStyle
from qwq_lite.events import Notice
from qwq_lite.prompt.repetition_intent import asks_for_repetition
from qwq_lite.prompt.script_intent import flatten_texts
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
_OF_A_THOUGHT = ("thinking_budget", "effort", "answer_reserve", "answer_temperature", "answer_top_p", "think_script")
_OF_MESSAGES = ("tools", "when_full")
_FLAGS = {
    "thinking_budget": "--think-budget",
    "tools": "",
}  # where the command line's name is another, or there is none
_SPARE = 6  # tokens by which a last line may grow when it is spelled with what ends the thought, or code is closed
_N_TAIL = 12  # tokens of a prompt among which the template's tags are


@dataclass(frozen=True)
class Thoughts:
    """How a model's thoughts are told from its answers. opened, closed: ids of its tags, None without tokens for them."""

    style: ThoughtStyle
    opened: int | None = None
    closed: int | None = None


class Question(NamedTuple):
    """What a prompt asks. text: the user's last words, for the language of what ends the thought. may_repeat: a right answer may
    say the same again and again, or nobody knows."""

    text: str
    may_repeat: bool


@dataclass(frozen=True)
class Rules:
    """policies and begin of a reply. thinking_limit: most tokens of its thought, of which n_words are kept for what ends it; None
    where the model does not think."""

    policies: tuple[Policy, ...]
    begin: Begin
    thinking_limit: int | None = None
    n_words: int = 0


def thoughts(
    asked: ThoughtStyle | None, known: ThoughtStyle | None, special: Mapping[str, int], template: str | None
) -> Thoughts:
    """The user's word; else tags where the model has tokens for them; else what is known of it; else its template's."""
    opened, closed = special.get(OPENING), special.get(CLOSINGS[0])
    style = asked or ("tags" if closed is not None else known)
    if style is None:
        style = "tags" if template is not None and CLOSINGS[0] in template else "none"
    return Thoughts(style, opened, closed) if style == "tags" else Thoughts(style)


def rules(
    options: Options,
    model: Thoughts,
    prompt: Sequence[int],
    question: Question | str,
    n_ctx: int,
    end_tokens: frozenset[int],
    piece: Callable[[int], bytes],
    tokenize: Callable[[str], list[int]],
    *,
    templated: bool,
    scripts: tuple[ScriptMasks | None, ScriptMasks | None] = (None, None),
) -> Rules:
    """The policies of a reply, and where it begins.

    Args:
        prompt: its tokens. question: what it asks, as `last_question` says; a text is all that is asked.
        templated: the prompt is a template's, which may have opened the thought.
        piece, tokenize: as `Track` has them. scripts: what is masked in the answer and in the thought.
    """
    asked = last_question(question) if isinstance(question, str) else question
    undivided = model.style == "undivided"
    room = n_ctx - len(prompt)
    reserve = min(ANSWER_RESERVE if options.answer_reserve is None else options.answer_reserve, max(1, room // 2))
    words = closing_words(model, asked.text, scripts[0])
    policies: list[Policy] = [Stops(end_tokens, tuple(options.stop or ()), options.max_tokens, undivided)]
    policies.append(Loops(asked.may_repeat, undivided))
    if options.within is not None:
        policies.append(Deadline(options.within, min(_ANSWER_TOKENS[model.style], reserve), len(prompt)))
    if scripts != (None, None):
        policies.append(Script(*scripts, words if undivided else ()))
    if model.style == "none":
        return Rules(arrange(policies), Begin())
    begin = Begin("thinking", undivided=True)
    if not undivided:
        begin = Begin("thinking" if templated and _is_open(prompt, model, piece) else "answer")
    if options.budget == 0 and begin.phase == "thinking":
        _, forced = retokenize((), piece, Rewrite(0, words), tokenize)
        begin = dataclasses.replace(begin, rewinds=(Rewind(0, forced=forced, ends="budget"),))
    windows = _windows(options.budget, begin.phase, room - reserve)
    n_words = _SPARE + sum(1 if isinstance(word, int) else len(tokenize(word)) for word in words)
    policies.append(Closing(windows, words, n_words, model.closed, outside_code=undivided))
    policies += [Headings() if undivided else Phases(model.opened, model.closed), Reserve(reserve, end_tokens)]
    limit = min(options.max_tokens or room, *(window.closes for window in windows))
    return Rules(arrange(policies), begin, limit, n_words)


def ignored(options: Options, style: ThoughtStyle, *, templated: bool) -> Iterator[Notice]:
    """Options that were given and have nothing to act on in this reply, a notice a reason.

    One that asks for what happens without it (no thought of a model that does not think) is done, not ignored.
    """
    given = {name for name in _OF_MESSAGES if getattr(options, name)}
    if given and not templated:
        yield notice_of(given, "the prompt is no list of messages, so no chat template makes it")
    if style == "tags" and options.history == "all":
        yield notice_of(["history"], "this model marks its thought with tags, and such a thought is never sent back")
    if style != "none":
        return
    given = {name for name in _OF_A_THOUGHT if getattr(options, name) not in (None, 0, "any")}
    if given:
        yield notice_of(given, "this model does not think; if it does, thought_style (--thought-style) says how")


def notice_of(names: Iterable[str], why: str) -> Notice:
    """That these options are ignored, and why."""
    named = [f"{name} ({_FLAGS.get(name, '--' + name.replace('_', '-'))})" for name in sorted(names)]
    named = [name.removesuffix(" ()") for name in named]
    return Notice(f"{', '.join(named)} {'is' if len(named) == 1 else 'are'} ignored: {why}", "ignored")


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


def last_question(prompt: Any) -> Question:
    """What a prompt asks, which is a text, messages, or tokens. Of tokens nothing is known: their answer may repeat itself.

    Whether it may is read from all that the user and the system prompt say: "Continue." asks for what was asked before.
    """
    if isinstance(prompt, str):
        return Question(prompt, asks_for_repetition(prompt))
    if not all(isinstance(message, Mapping) for message in prompt):
        return Question("", True)
    said = [(message.get("role"), _texts(message.get("content"))) for message in prompt]
    last: list[str] = next((texts for role, texts in reversed(said) if role == "user"), [])
    asks = (asks_for_repetition(text) for role, texts in said if role in ("user", "system") for text in texts)
    return Question("\n".join(last), any(asks))


def _texts(content: Any) -> list[str]:
    """What a message says; of one in parts, the texts of its parts."""
    parts = content if isinstance(content, list | tuple) else [content]
    texts = (part.get("text", part) if isinstance(part, Mapping) else part for part in parts)
    return [*flatten_texts([*texts])]


def _is_open(prompt: Sequence[int], model: Thoughts, piece: Callable[[int], bytes]) -> bool:
    """Whether the template left a thought open: its opening tag is there, and no closing one after it."""
    tail = prompt[-_N_TAIL:]
    if model.opened is not None:
        tags = [token for token in tail if token in (model.opened, model.closed)]
        return tags[-1:] == [model.opened]
    text = b"".join(map(piece, tail)).decode("utf-8", "ignore").rstrip()
    return text.endswith(OPENING)
