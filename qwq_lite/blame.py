"""Which request the engine's process died of, and what its caller is told. Pure; knows no processes."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import NamedTuple

from qwq_lite.errors import EngineCrashed, QwqError, RequestCrashed, TemplateError
from qwq_lite.remote_feed import RemoteFeed

ANOTHER = "; the next call starts another"  # how a crash ends
_TOKENIZING, _REPLYING = "while it made this prompt into tokens", "a second time while it made this reply"


class Verdict(NamedTuple):
    """culprit: a request's number, None where it is not known. error: for its caller. known: whether a request was under way."""

    culprit: int | None
    error: QwqError
    known: bool


def verdict(
    crash: EngineCrashed,
    tokenizing: int | None,
    overdue: bool,
    waiting: Collection[int],
    feeds: Mapping[int, RemoteFeed],
) -> Verdict:
    """Whose death it was: the prompt's that was being made, or the reply's.

    One prompt and one reply are made at a time. Where there were both, both are suspected and tried again, the prompt once the
    reply is done; so the guilty one is there a second time, beside another. A reply with others in line is tried again too, and
    they wait behind it as they did; one that was alone is not.

    Args:
        tokenizing: the request whose prompt was being made; overdue: it took too long, and was ended for that.
        waiting: calls that wait for an answer, a generate's until its prompt is there. feeds: all replies that are not done.
    """
    begun = [feed for feed in feeds.values() if feed.begun]
    reply = max(begun, key=lambda feed: feed.begun_at) if begun else None
    if tokenizing is not None and (tokenizing in feeds or tokenizing in waiting):
        prompt = feeds.get(tokenizing)
        if overdue and prompt is not None and prompt.is_templated:
            return Verdict(tokenizing, _late(crash), True)
        if overdue or reply is None:
            return Verdict(tokenizing, _blamed(crash, _TOKENIZING), True)
        if prompt is None:  # a call for tokens, which is not tried again
            return Verdict(tokenizing, copy.copy(crash), True)
        return _of_two(crash, prompt, reply)
    if reply is None:
        return Verdict(None, crash, False)
    reply.n_deaths += 1
    if reply.n_deaths > 1:
        return _guilty(crash, reply, _REPLYING)
    alone = {*waiting, *feeds} == {reply.number}
    return Verdict(reply.number if alone else None, with_partial(crash, reply), True)


def _of_two(crash: EngineCrashed, prompt: RemoteFeed, reply: RemoteFeed) -> Verdict:
    prompt.n_deaths += 1
    reply.n_deaths += 1
    if prompt.n_deaths > reply.n_deaths:
        return _guilty(crash, prompt, _TOKENIZING)
    if reply.n_deaths > prompt.n_deaths:
        return _guilty(crash, reply, _REPLYING)
    prompt.rival, reply.rival, prompt.after = reply, prompt, reply
    return Verdict(None, crash, True)


def _guilty(crash: EngineCrashed, feed: RemoteFeed, when: str) -> Verdict:
    if feed.rival is not None:  # was suspected for nothing
        feed.rival.n_deaths -= 1
    return Verdict(feed.number, with_partial(_blamed(crash, when), feed), True)


def with_partial(error: EngineCrashed, feed: RemoteFeed) -> EngineCrashed:
    """A reader's own copy, for a traceback is added to it, with the text that the reader has."""
    own = copy.copy(error)
    own.partial = "".join(feed.texts)
    return own


def _blamed(crash: EngineCrashed, when: str) -> RequestCrashed:
    error = RequestCrashed(f"{str(crash).removesuffix(ANOTHER)}, {when}; it is not tried again: change the request")
    error.signal, error.assertion, error.lines = crash.signal, crash.assertion, crash.lines
    return error


def _late(crash: EngineCrashed) -> TemplateError:
    return TemplateError(f"{str(crash).removesuffix(ANOTHER)}; the next call starts the engine anew")
