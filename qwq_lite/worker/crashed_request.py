"""Which request crashed the engine, and the error that its caller gets. Pure; knows no processes."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import NamedTuple

from qwq_lite.errors import EngineCrashed, QwqError, RequestCrashed, TemplateError
from qwq_lite.worker.resumable_feed import ResumableFeed

ANOTHER = "; the next call starts another"  # how a crash ends
_MOST_SHARED = 8  # deaths of a reply beside a prompt, each time another one
_TOKENIZING, _REPLYING = "while it made this prompt into tokens", "a second time while it made this reply"


class CrashCause(NamedTuple):
    """What an engine's process died of."""

    culprit: int | None  # a request's number, None where it is not known
    error: QwqError  # for the culprit's caller
    known: bool  # whether a request was under way


def find_cause(
    crash: EngineCrashed,
    tokenizing: int | None,
    overdue: bool,
    waiting: Collection[int],
    feeds: Mapping[int, ResumableFeed],
) -> CrashCause:
    """Whose death it was: the prompt's that was being made, or the reply's.

    One prompt and one reply are made at a time. Where there were both, no one is blamed: the reply is tried again at once, the
    prompt once the reply is done, so that each has a death of its own if it is the cause. A reply with others in line is tried
    again too, and they wait behind it as they did; one that was alone is not.

    Args:
        tokenizing: the request whose prompt was being made; overdue: it took too long, and was ended for that.
        waiting: calls that wait for an answer, a generate's until its prompt is there. feeds: all replies that are not done.
    """
    begun = [feed for feed in feeds.values() if feed.begun]
    reply = max(begun, key=lambda feed: feed.begun_at) if begun else None
    if reply is None:  # a death at the first batch may come before the first event: then it is the first in line
        reply = next((feed for feed in feeds.values() if feed.has_prompt), None)
    if tokenizing is not None and (tokenizing in feeds or tokenizing in waiting):
        prompt = feeds.get(tokenizing)
        if overdue and prompt is not None and prompt.is_templated:
            return CrashCause(tokenizing, _template_error(crash), True)
        if overdue or reply is None:
            return CrashCause(tokenizing, _request_error(crash, _TOKENIZING), True)
        if prompt is None:  # a call for tokens, which is not tried again
            return CrashCause(tokenizing, copy.copy(crash), True)
        return _of_two(crash, prompt, reply)
    if reply is None:
        return CrashCause(None, crash, False)
    reply.n_deaths += 1
    if reply.n_deaths > 1:
        return CrashCause(reply.number, with_partial(_request_error(crash, _REPLYING), reply), True)
    alone = {*waiting, *feeds} == {reply.number}
    return CrashCause(reply.number if alone else None, with_partial(crash, reply), True)


def _of_two(crash: EngineCrashed, prompt: ResumableFeed, reply: ResumableFeed) -> CrashCause:
    reply.n_shared += 1
    if reply.n_shared > _MOST_SHARED:  # new prompts come without end, each at the moment of a death
        return CrashCause(reply.number, with_partial(crash, reply), True)
    prompt.after = reply
    return CrashCause(None, crash, True)


def with_partial(error: EngineCrashed, feed: ResumableFeed) -> EngineCrashed:
    """A reader's own copy, for a traceback is added to it, with the text that the reader has."""
    own = copy.copy(error)
    own.partial = "".join(feed.texts)
    return own


def _request_error(crash: EngineCrashed, when: str) -> RequestCrashed:
    # Another program, or the system, kills by SIGKILL: changing the request does not help then.
    advice = "" if crash.signal == "SIGKILL" else ": change the request"
    error = RequestCrashed(f"{str(crash).removesuffix(ANOTHER)}, {when}; it is not tried again{advice}")
    error.signal, error.assertion, error.lines = crash.signal, crash.assertion, crash.lines
    return error


def _template_error(crash: EngineCrashed) -> TemplateError:
    return TemplateError(f"{str(crash).removesuffix(ANOTHER)}; the next call starts the engine anew")
