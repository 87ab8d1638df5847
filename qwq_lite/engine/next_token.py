"""Draws a reply's next token from its row of logits, with what the policies mask, ban and force."""

from __future__ import annotations

import math

from qwq_lite.backend.sampler import Sampler
from qwq_lite.engine.request import ActiveReply
from qwq_lite.errors import EngineError
from qwq_lite.reply.policy import Rewrite
from qwq_lite.sampling import draw_seed


def draw(sampler: Sampler, reply: ActiveReply) -> int | Rewrite:
    """The token, or what is to be written instead. The reply's row is used up.

    Raises: EngineError when nothing is left to sample.
    """
    asked = reply.track.constrain(reply.sampling)
    if asked.forced is not None:
        return asked.forced
    row = reply.sequence.row
    assert row is not None, "a row is drawn from once, right after its decode"
    for mask in asked.masks:
        row += mask
    if asked.banned:
        row[list(asked.banned)] = -math.inf
    if (asked.masks or asked.banned) and row.max() == -math.inf:
        raise _nothing_left()
    if asked.eager is not None:
        token, margin, rewrite = asked.eager
        if row.max() - row[token] <= margin:
            return rewrite
    seed, attempt, position = reply.request.seed, reply.track.attempt, len(reply.sequence.tokens)
    token = sampler.sample(row, asked.sampling, draw_seed(seed, attempt, position))
    if asked.allowed is None or asked.allowed[token] == 0:  # nearly always
        return token
    reply.n_refused += 1
    row += asked.allowed
    if row.max() == -math.inf:
        raise _nothing_left()
    # A draw of its own: the first one's number is known to lie where the token was that is refused.
    return sampler.sample(row, asked.sampling, draw_seed(seed, attempt, -1 - position))


def _nothing_left() -> EngineError:
    return EngineError("the masks of this reply leave no token to sample")
