"""Notices about options that have no effect on a reply. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qwq_lite.chat.options import Options, ThoughtStyle
from qwq_lite.events import Notice

_OF_A_THOUGHT = ("thinking_budget", "effort", "answer_reserve", "answer_temperature", "answer_top_p", "think_script")
_OF_MESSAGES = ("tools", "when_full")
# Where the command line's name is another, or there is none.
_FLAGS = {"thinking_budget": "--think-budget", "tools": ""}


def list_ignored(options: Options, style: ThoughtStyle, *, templated: bool) -> Iterator[Notice]:
    """What is ignored because of the kind of model or prompt. templated: the prompt is made of messages.

    One that asks for what happens without it (no thought of a model that does not think) is done, not ignored.
    """
    given = {name for name in _OF_MESSAGES if getattr(options, name)}
    if given and not templated:
        yield _notice_of(given, "the prompt is no list of messages, so no chat template makes it")
    if style == "tags" and options.history == "all":
        yield _notice_of(["history"], "this model marks its thought with tags, and such a thought is never sent back")
    if style != "none":
        return
    given = {name for name in _OF_A_THOUGHT if getattr(options, name) not in (None, 0, "any")}
    if given:
        yield _notice_of(given, "this model does not think; if it does, thought_style (--thought-style) says how")


def ignored_system() -> Notice:
    """That the template writes no system prompt."""
    return Notice(
        "the system prompt is ignored: the model's chat template has no place for it; put it into the question",
        "ignored",
    )


def ignored_tools() -> Notice:
    """That the template writes no tools."""
    return _notice_of(["tools"], "the model's chat template has no place for them; describe them in a message")


def _notice_of(names: Iterable[str], why: str) -> Notice:
    named = [f"{name} ({_FLAGS.get(name, '--' + name.replace('_', '-'))})" for name in sorted(names)]
    named = [name.removesuffix(" ()") for name in named]
    return Notice(f"{', '.join(named)} {'is' if len(named) == 1 else 'are'} ignored: {why}", "ignored")
