"""Tokens of a text that continues with given words, as tokenizing the whole text would give them. Pure.

Tokens are not letters: a "." that a newline follows is one token with it. Words that are merely put behind what a model wrote
make sequences that no tokenizer makes and no model was trained on. So the last line is tokenized again together with them, and
what differs is rewound. A line's start is a place that every pre-tokenizer of this family parts at, if no white space follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qwq_lite.reply.fold import utf8
from qwq_lite.reply.policy import Rewrite
from qwq_lite.text import breaks, fences

MOST_BACK = 96  # tokens that are taken back for a better place to end
Tokenize = Callable[[str], list[int]]


def retokenize(
    tokens: Sequence[int], piece: Callable[[int], bytes], rewrite: Rewrite, tokenize: Tokenize
) -> tuple[int, tuple[int, ...]]:
    """How many of the tokens stand, and the tokens that come next.

    tokens: of the phase, from its first one on; the first words lose newlines at their start where nothing stands before.
    """
    n_drop = _n_after_break(tokens, piece) if rewrite.n_drop is None else rewrite.n_drop
    start, line = _last_line(tokens, piece, n_drop)
    if rewrite.outside_code:
        whole = text_of(tokens, piece)
        fence = fences.open_fence(whole[: max(0, len(whole) - n_drop)].rstrip())
        line += f"\n{fence}" if fence else ""
    new: list[int] = []
    text = line
    for word in rewrite.words:
        if isinstance(word, int):
            new += [*tokenize(text), word] if text else [word]
            text = ""
        else:
            text += word if text or new else word.lstrip("\n")
    new += tokenize(text) if text else []
    n_same = n_common_tokens(tokens[start:], new[:-1])  # one at least is left to come
    return start + n_same, tuple(new[n_same:])


def n_common_tokens(one: Sequence[object], other: Sequence[object]) -> int:
    """How many items two sequences begin with that are the same."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def text_of(tokens: Sequence[int], piece: Callable[[int], bytes]) -> str:
    """The characters that tokens completed, as the reply's text is made of them."""
    return utf8(b"", b"".join(map(piece, tokens)))[0]


def _n_after_break(tokens: Sequence[int], piece: Callable[[int], bytes]) -> int:
    """Characters after the last break; nothing where it lies too far back, all of a text that is so short."""
    text = text_of(tokens[-MOST_BACK:], piece)
    n_after = breaks.n_after_last(text)
    if n_after is None:
        return len(text) if len(tokens) <= MOST_BACK else 0
    return n_after


def _last_line(tokens: Sequence[int], piece: Callable[[int], bytes], n_drop: int) -> tuple[int, str]:
    """Where the last line that keeps any text begins, and that text, without white space at its end."""
    parts: list[bytes] = []  # from the last token backwards
    n_chars = 0  # at most: bytes that continue a character do not begin one
    for place in range(len(tokens) - 1, -1, -1):
        part = piece(tokens[place])
        parts.append(part)
        n_chars += sum(byte & 0xC0 != 0x80 for byte in part)
        if n_chars <= n_drop or (place and not _begins_line(piece(tokens[place - 1]), part)):
            continue
        text = utf8(b"", b"".join(reversed(parts)))[0]
        kept = text[: max(0, len(text) - n_drop)].rstrip()
        if kept:
            return place, kept
    return 0, ""


def _begins_line(before: bytes, part: bytes) -> bool:
    return before.endswith(b"\n") and part[:1].strip() != b""
