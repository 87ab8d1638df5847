"""Rules of a reply, each a small pure class, and the one order in which they are asked. They know no engine."""

from __future__ import annotations

from collections.abc import Iterable

from qwq_lite.reply.policy import Policy

# Who comes first decides: a phase before what depends on it, an end before anything that would go on, who asks for the end of a
# thought before who ends it, and of two the one that asks for it at once last.
ORDER = ("phases", "headings", "stops", "script", "deadline", "loops", "closing", "reserve")


def arrange(policies: Iterable[Policy]) -> tuple[Policy, ...]:
    """The policies in ORDER. Raises: ValueError for one that has no place there, or one that is there twice."""
    given = tuple(policies)
    found = {policy.name: policy for policy in given}
    if len(found) < len(given) or not found.keys() <= set(ORDER):
        raise ValueError(f"policies {[policy.name for policy in given]}, each of {ORDER} may be there once")
    return tuple(found[name] for name in ORDER if name in found)
