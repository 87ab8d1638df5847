"""Which request the engine's process died of, and what its caller is told. Pure; knows no processes."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import NamedTuple

from qwq_lite.errors import EngineCrashed, QwqError, RequestCrashed, TemplateError
from qwq_lite.remote_feed import RemoteFeed

ANOTHER = "; the next call starts another"  # how a crash ends


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
    """Whose death it was: the prompt's that was being made; else the reply's, where it was alone or has ended a process before.

    Replies are made one at a time. One that was not alone is tried again, and the others wait behind it as they did; no more
    than two processes die of it.

    Args:
        tokenizing: the request whose prompt was being made; overdue: it took too long, and was ended for that.
        waiting: calls that wait for an answer, a generate's until its prompt is there. feeds: all replies that are not done.
    """
    if tokenizing is not None and (tokenizing in feeds or tokenizing in waiting):
        return Verdict(
            tokenizing, _late(crash) if overdue else _blamed(crash, "while it made this prompt into tokens"), True
        )
    begun = [number for number, feed in feeds.items() if feed.begun]
    if not begun:
        return Verdict(None, crash, False)
    active = max(begun, key=lambda number: feeds[number].begun_at)
    feed = feeds[active]
    feed.n_deaths += 1
    if feed.n_deaths > 1:
        return Verdict(active, with_partial(_blamed(crash, "a second time while it made this reply"), feed), True)
    alone = {*waiting, *feeds} == {active}
    return Verdict(active if alone else None, with_partial(crash, feed), True)


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
