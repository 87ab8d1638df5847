"""Drops the oldest turns of a conversation that no longer fits the context. Pure."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Literal

from qwq_lite.errors import ContextFull
from qwq_lite.prompt.chat_template import Message

WhenFull = Literal["drop", "error"]
History = Literal["all", "answer"]


def fit_messages(
    messages: Sequence[Message],
    encode: Callable[[Sequence[Message]], list[int]],
    n_ctx: int,
    max_tokens: int | None,
    when_full: WhenFull,
) -> tuple[list[int], int]:
    """Tokens of a prompt that leaves room for its reply, and how many messages it goes without.

    Room is max_tokens, a quarter of the context at most. Once it is short, turns go until the prompt takes no more than half:
    what remains is then the prefix of the prompts that follow, and is prefilled once for several turns instead of at each.
    A turn is a user's message with all that answers it; system messages that lead, and the last turn, always stay.

    Args:
        encode: tokens of messages, by the model's template.
        when_full: "error" drops nothing.
    Raises: ContextFull when what must stay does not fit; whatever `encode` raises.
    """
    tokens = encode(messages)
    room = max(1, min(n_ctx // 4 if max_tokens is None else max_tokens, n_ctx // 4))
    if len(tokens) + room <= n_ctx:
        return tokens, 0
    lead, turns = _turns(messages)
    if when_full == "error" or len(turns) < 2:
        if len(tokens) >= n_ctx or (when_full == "error" and len(turns) > 1):
            raise ContextFull(_too_long(len(tokens), n_ctx, room))
        return tokens, 0

    def without(n_turns: int) -> list[int]:
        return encode([*messages[:lead], *messages[turns[n_turns] :]])

    # Fewer turns are never more tokens, so the first number that suffices is found by halving.
    n_turns = bisect.bisect_left(range(len(turns) - 1), True, lo=1, key=lambda n: len(without(n)) <= n_ctx // 2)
    tokens = without(n_turns)
    if len(tokens) >= n_ctx:
        raise ContextFull(_too_long(len(tokens), n_ctx, room))
    return tokens, turns[n_turns] - lead


def n_leading(messages: Sequence[Message]) -> int:
    """How many system messages a conversation begins with."""
    return next((i for i, message in enumerate(messages) if message.get("role") != "system"), len(messages))


def _turns(messages: Sequence[Message]) -> tuple[int, list[int]]:
    """How many system messages lead, and where each turn begins."""
    lead = n_leading(messages)
    starts = [i for i, message in enumerate(messages) if i > lead and message.get("role") == "user"]
    return lead, [lead, *starts]


def _too_long(n_prompt: int, n_ctx: int, room: int) -> str:
    return (
        f"the prompt has {n_prompt} tokens, the context {n_ctx}, of which {room} are kept for the reply;"
        " shorten it, start a new chat, or choose a larger n_ctx (--ctx)"
    )
