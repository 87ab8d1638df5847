"""Logit masks that keep out letters of some scripts: which tokens may complete such a letter. Pure.

A token is bytes, and a character may be spread over several: of Qwen's 151,643 pieces 1,271 end within one, 180 begin within one.
So a row is a function of the bytes that are pending. Nothing pending: a piece that holds such a letter is masked, and one whose
unfinished ending would more likely become one than not: of what Unicode assigns to it no more than half is free. Something
pending: only what continues it, and can still end in a free character. What is no UTF-8 at all is masked.
"""

from __future__ import annotations

import codecs
import math
import threading
import unicodedata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qwq_lite.text import unicode_scripts

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Mask = npt.NDArray[np.float32]

_MOST_ROWS = 64  # 39 MB for QwQ, where 267 beginnings may come that no one answer has; a row is made in about 1 ms
_MOST_SETS = 4  # the default, and three that were asked for
_FIRST = (
    (0xF0, 4, 0x07),
    (0xE0, 3, 0x0F),
    (0xC0, 2, 0x1F),
)  # lowest first byte of a character, its length, bits of that byte


class ScriptMasks:
    """pieces: the bytes of each token, empty for control tokens. masked: of `unicode_scripts.MASKABLE`.

    Rows are built when they are first asked for, on whatever thread; those used last are kept, and the one for nothing pending.
    """

    def __init__(self, pieces: Sequence[bytes], masked: frozenset[str]) -> None:
        self.masked = masked
        self._pieces, self._letters = pieces, unicode_scripts.characters(masked)
        self._continuing = [token for token, piece in enumerate(pieces) if piece and piece[0] & 0xC0 == 0x80]
        self._completions: dict[bytes, tuple[int, int]] = {}
        self._rows: dict[bytes, Mask] = {}  # that used last is the last
        self._lock = threading.Lock()

    def row(self, pending: bytes = b"") -> Mask:
        """Shape (n_vocab,): 0 where the token may come after these bytes of an unfinished character, else minus infinity.

        Where nothing can finish it, no token goes on with it: then it is as if it were not there.
        """
        with self._lock:
            return self._row(pending)

    def _row(self, pending: bytes) -> Mask:
        row = self._rows.pop(pending, None)
        if row is None:
            row = self._made(pending)
            row.setflags(write=False)
            if len(self._rows) >= _MOST_ROWS:
                del self._rows[next(key for key in self._rows if key)]
        self._rows[pending] = row
        return row

    @property
    def n_bytes(self) -> int:
        """What the rows take that were built so far."""
        with self._lock:
            return sum({id(row): row.nbytes for row in self._rows.values()}.values())

    def holds_letter(self, text: str) -> bool:
        """Whether a text has a letter of a masked script."""
        return self._letters.search(text) is not None

    def _made(self, pending: bytes) -> Mask:
        import numpy as np

        if not pending:
            free = [piece.isascii() or self._is_free(b"", piece) for piece in self._pieces]
            row: Mask = np.where(np.array(free, bool), np.float32(0), np.float32(-math.inf))
            return row
        tokens = [token for token in self._continuing if self._is_free(pending, self._pieces[token])]
        if not tokens:
            return self._row(b"")
        row = np.full(len(self._pieces), -math.inf, np.float32)
        row[tokens] = 0
        return row

    def _is_free(self, pending: bytes, piece: bytes) -> bool:
        try:
            text, n_read = codecs.utf_8_decode(pending + piece, "strict", False)
        except UnicodeDecodeError:
            return False
        if self._letters.search(text):
            return False
        rest = (pending + piece)[n_read:]
        if not rest:
            return True
        n_free, n_assigned = self._count(rest)
        return n_free > 0 if pending and not text else 2 * n_free > n_assigned

    def _count(self, beginning: bytes) -> tuple[int, int]:
        """Characters that begin so: the free ones, and all that are assigned, those for private use among them."""
        found = self._completions.get(beginning)
        if found is None:
            characters = [c for c in map(chr, _completions(beginning)) if unicodedata.category(c) not in ("Cn", "Cs")]
            n_masked = sum(1 for _ in self._letters.finditer("".join(characters)))
            found = self._completions[beginning] = len(characters) - n_masked, len(characters)
        return found


class MaskSets:
    """The masks of one vocabulary, by what they mask: a few, those used last. They share the pieces. For any thread.

    piece: the bytes of a token, as for ScriptMasks; n_tokens: how many there are.
    """

    def __init__(self, piece: Callable[[int], bytes], n_tokens: int) -> None:
        self._piece, self._n_tokens = piece, n_tokens
        self._pieces: tuple[bytes, ...] = ()
        self._sets: dict[frozenset[str], ScriptMasks] = {}
        self._lock = threading.Lock()

    def of(self, masked: frozenset[str]) -> ScriptMasks | None:
        """None where nothing is masked. The first row is built here, in a third of a second, and not on the engine's thread."""
        if not masked:
            return None
        with self._lock:
            masks = self._sets.pop(masked, None)
            if masks is None:
                self._pieces = self._pieces or tuple(map(self._piece, range(self._n_tokens)))
                masks = ScriptMasks(self._pieces, masked)
                masks.row()
                if len(self._sets) >= _MOST_SETS:
                    del self._sets[next(iter(self._sets))]
            self._sets[masked] = masks
            return masks


def _completions(beginning: bytes) -> range:
    """Code points whose UTF-8 begins with these bytes, and those that cannot be written in so many.

    Source: RFC 3629
    """
    first = beginning[0]
    length, bits = next((length, bits) for lowest, length, bits in _FIRST if first >= lowest)
    code = first & bits
    for byte in beginning[1:]:
        code = code << 6 | byte & 0x3F
    shift = 6 * (length - len(beginning))
    shortest = {2: 0x80, 3: 0x800, 4: 0x10000}[length]
    return range(max(code << shift, shortest), min((code + 1) << shift, 0x110000))
