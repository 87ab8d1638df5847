"""Finds repetition in a growing sequence of tokens: exact, with a period of 1 to 1,024 tokens, and near. Pure.

Exact. At every B/2 tokens, for B = 32, 64, ... 1,024, the last B are looked for at most B back. Where that is within a stretch of
a period P <= B, the nearest place is P back: a nearer one would be a period of P tokens too (Fine and Wilf). With B < 2 P that
is known before the fourth copy is complete. From then on it is known at which length the stretch has so many copies, and that
length alone is looked at. So every stretch is found, at the token that is asked for, and a token costs nothing but its place.

Near. A token that ends an 8-gram which was there before is an old one; of the last 512 the share of old ones is counted. Of 38
real outputs those that circle reach 91 to 100 %, all others stay below 65 %; code and tables do not, and their tokens are none.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

BLOCK = 16  # tokens between two looks
_LOWEST = 32
_WIDTHS = tuple(_LOWEST << n for n in range(6))
_GRAM = 8
_TOKEN_BITS = 20  # no vocabulary has a million tokens
_GRAM_MASK = (1 << _TOKEN_BITS * _GRAM) - 1
WINDOW = 512  # tokens of which most are old where a text circles
_OLD = 410  # 80 % of them
NEVER = 1 << 60  # tokens that no text has
NO_LOOPS: tuple[Loop | None, ...] = (None,) * len(_WIDTHS)


class Loop(NamedTuple):
    """From `start` on tokens equal those `period` before them, at least up to `until`; no longer stretch begins earlier."""

    start: int
    period: int
    until: int


class Limit(NamedTuple):
    """From when on a stretch is a loop: so many copies, and tokens, and within a block of code so many tokens."""

    n_copies: int
    n_tokens: int
    n_in_code: int


class TokenHistory:
    """Tokens in their order, and what is known of each from those before it. It only grows, and what it says of its first n
    tokens never changes: so the states of one reply are lengths of it, and share it. What goes another way begins with a new one.

    near: whether old tokens are counted.
    """

    def __init__(self, near: bool) -> None:
        self._near = near
        self._tokens, self._n_old = array("I"), array("I", [0])
        self._blocks: list[str] = []  # a character a token, BLOCK of them each: text is searched in C
        self._gram, self._grams = 0, set[int]()

    def add(self, n: int, token: int, counted: bool = True) -> bool:
        """Put this token after the n that there are. Returns whether it is an old one.

        counted: False for a token that is never old, as those of code and tables.
        """
        tokens = self._tokens
        assert len(tokens) == n, "a reply that goes another way is folded again, with a text of its own"
        tokens.append(token)
        if not self._near:
            return False
        gram = self._gram = (self._gram << _TOKEN_BITS | token) & _GRAM_MASK
        grams = self._grams
        is_old = counted and gram in grams
        if n >= _GRAM - 1 and not is_old:
            grams.add(gram)
        self._n_old.append(self._n_old[-1] + is_old)
        return is_old

    def token(self, place: int) -> int:
        return self._tokens[place]

    def loops(self, n: int, known: tuple[Loop | None, ...]) -> tuple[Loop | None, ...]:
        """After n tokens, a multiple of BLOCK, the stretches that reach so far, by width; known: those of BLOCK tokens ago."""
        found = list(known)
        for place, width in enumerate(_WIDTHS):
            if n % (width // 2) or n <= width:
                continue
            text = self._last(n, 2 * width)
            at = text.rfind(text[-width:], 0, -1)
            period = len(text) - width - at
            if at < 0 or (2 * period <= width and width > _LOWEST):  # none, or one for a smaller width
                found[place] = None
                continue
            before = found[place]
            if before is not None and before.period == period and before.until >= n - width:
                found[place] = Loop(before.start, period, n)
            else:
                found[place] = Loop(self._start(n - width - period, period), period, n)
        return tuple(found)

    def holds(self, loop: Loop, n: int) -> bool:
        """Whether the stretch goes on up to n tokens."""
        tokens, period = self._tokens, loop.period
        return tokens[loop.until : n] == tokens[loop.until - period : n - period]

    def circles(self, n: int) -> bool:
        """Whether most of the last tokens are old."""
        return n >= WINDOW and self._n_old[n] - self._n_old[n - WINDOW] >= _OLD

    def circles_from(self, n: int) -> int:
        """The place from which on a text that circles brings again what was there: where old tokens begin to outnumber others.

        The first token of the first old 8-gram.
        """
        n_old, best, place = self._n_old, 0, n
        for first in range(n - 1, _GRAM - 2, -1):
            excess = 2 * (n_old[n] - n_old[first]) - (n - first)
            if excess >= best:
                best, place = excess, first
        return max(0, place - (_GRAM - 1))

    def _start(self, place: int, period: int) -> int:
        tokens = self._tokens
        while place > 0 and tokens[place - 1] == tokens[place - 1 + period]:
            place -= 1
        return place

    def _last(self, n: int, n_chars: int) -> str:
        """The last tokens of the first n, as characters; both are multiples of BLOCK."""
        blocks = self._blocks
        while len(blocks) * BLOCK < n:
            place = len(blocks) * BLOCK
            blocks.append("".join(map(chr, self._tokens[place : place + BLOCK])))
        return "".join(blocks[max(0, n - n_chars) // BLOCK : n // BLOCK])


def _at(loop: Loop, limit: Limit, in_code: bool) -> int:
    """The phase's length at which a stretch becomes a loop, if it goes on."""
    n_tokens = max(limit.n_copies * loop.period, limit.n_in_code if in_code else limit.n_tokens)
    return loop.start + n_tokens


def due_at(loops: tuple[Loop | None, ...], limit: Limit, n: int, in_code: bool) -> int:
    """When one of them is to be looked at again, not before n; to be asked anew where a block of code begins or ends."""
    return min((max(n, _at(loop, limit, in_code)) for loop in loops if loop is not None), default=NEVER)


def complete(
    written: TokenHistory, loops: tuple[Loop | None, ...], limit: Limit, n: int, in_code: bool
) -> tuple[tuple[Loop | None, ...], Loop | None]:
    """Those that still go on, and of those that are loops now the one with the shortest period."""
    going: list[Loop | None] = []
    found: Loop | None = None
    for loop in loops:
        if loop is None or _at(loop, limit, in_code) > n:
            going.append(loop)
        elif not written.holds(loop, n):
            going.append(None)
        else:
            going.append(loop._replace(until=n))
            found = found or loop
    return tuple(going), found
