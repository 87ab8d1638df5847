"""Finds thought and answer by thinking tags: by their tokens, or by their spelling where a model writes them as text.

The closing tag ends the thought wherever it stands, in code too; "**Final Answer**" does not: it stood inside the thought of 7 of
15 real outputs. A second closing tag lets the answer begin anew. The opening one begins a thought only where nothing was written
yet; later it is text, for an answer may speak of it. Without tags all is the phase that the reply began with.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from qwq_lite.reply.policy import Begin, Policy, Taken, Turn, Verdict
from qwq_lite.text.tags import THINK_TAGS

OPENING, _CLOSING = THINK_TAGS
# Real outputs have tags that the model translated; the one that opens the answer counts at a line's start alone.
CLOSINGS = (_CLOSING, "</思考>", "‹/思考>", "‹/思考›")
ANSWERS = ("<答案>", "‹答案>", "‹答案›")
_LINE_START = r"(?:(?<=\n)|\A)"
_IN_THOUGHT = re.compile("|".join([*CLOSINGS, *(_LINE_START + tag for tag in ANSWERS)]))
_IN_ANSWER = re.compile("|".join(_LINE_START + tag for tag in CLOSINGS))
_LONGEST = max(map(len, (*CLOSINGS, *ANSWERS)))
_BEGINNINGS = frozenset(tag[:n] for tag in (*CLOSINGS, *ANSWERS) for n in range(1, len(tag)))
_FIRST = re.compile("[<‹]")


class TagState(NamedTuple):
    """How far a phase's text may be a tag."""

    written: bool = False  # something was written in the reply
    before: str = ""  # the phase's last character that is no part of a tag, empty at its start
    held: str = ""  # characters after it that may become a tag


@dataclass(frozen=True)
class Phases(Policy):
    """State: TagState. Where a model has no token for a tag, its spelling counts in its place."""

    think_open: int | None = None  # the id of `<think>`
    think_close: int | None = None  # the id of `</think>`
    name: ClassVar[str] = "phases"

    def start(self, begin: Begin) -> TagState:
        return TagState()

    def observe(self, seen: TagState, taken: Taken) -> Verdict:
        if taken.token == self.think_close:
            return Verdict(_WRITTEN, turn=Turn("answer", mute=True))
        if taken.token == self.think_open and not seen.written:
            return Verdict(_NOTHING_YET, turn=Turn("thinking", mute=True))
        text = taken.text
        if not text:
            return Verdict(seen, hold=len(seen.held))
        if not seen.written and self.think_open is None and taken.phase == "answer":
            opened = _opened(seen, text)
            if opened is not None:
                return opened
        if seen.held or _FIRST.search(text):
            if taken.phase == "thinking":
                return _looked(_IN_THOUGHT, seen, text)
            if self.think_close is None:
                return _looked(_IN_ANSWER, seen, text)
        if not seen.written and not text.strip("\n"):
            return _NOTHING
        return _PLAIN if text[-1] != "\n" else _AFTER_NEWLINE


def _looked(tags: re.Pattern[str], seen: TagState, text: str) -> Verdict:
    """A tag in the text; what may become one is held back."""
    whole = seen.before + seen.held + text
    found = tags.search(whole)
    if found is None:
        after = _held(whole)
        return Verdict(after, hold=len(after.held))
    rest = whole[found.end() :]
    after = _held(rest)
    return Verdict(after, hold=len(after.held), turn=Turn("answer", len(rest), n_tag=len(found[0])))


def _held(text: str) -> TagState:
    n_held = next((n for n in range(min(len(text), _LONGEST - 1), 0, -1) if text[-n:] in _BEGINNINGS), 0)
    place = len(text) - n_held
    return TagState(True, text[max(0, place - 1) : place], text[place:])


def _opened(seen: TagState, text: str) -> Verdict | None:
    """A thought that is opened by a spelling, at the reply's very start; None where none is."""
    whole = (seen.held + text).lstrip("\n")
    if whole.startswith(OPENING):
        after = _held(whole[len(OPENING) :])
        return Verdict(
            after, hold=len(after.held), turn=Turn("thinking", len(whole) - len(OPENING), n_tag=len(OPENING))
        )
    if OPENING.startswith(whole):
        return Verdict(TagState(held=whole), hold=len(whole))
    return None


_NOTHING_YET, _WRITTEN = TagState(), TagState(True)
# Made once: they are the word on nearly every token.
_NOTHING, _PLAIN, _AFTER_NEWLINE = (
    Verdict(TagState(before="\n")),
    Verdict(TagState(True, "x")),
    Verdict(TagState(True, "\n")),
)
