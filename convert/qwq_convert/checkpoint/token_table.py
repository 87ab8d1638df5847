"""Which token has which row of the embedding, and of what kind it is. Every error names the file that its value came from.

Source: llama.cpp conversion/base.py (get_vocab_base); transformers tokenization_utils_base.py; tokenizers added_vocabulary.rs
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import TokenType

from qwq_convert.checkpoint.files import Checkpoint
from qwq_convert.checkpoint.text_files import is_unicode, quote
from qwq_lite import arguments
from qwq_lite.errors import CheckpointError

_LOOK_SPECIAL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")


@dataclass(frozen=True)
class AddedToken:
    """A token outside the base vocabulary."""

    id: int
    text: str
    special: bool  # the file marks it as such
    path: Path  # the file that numbers it


def added_tokens(
    checkpoint: Checkpoint, listed: Any, settings: Mapping[str, Any], path: Path
) -> tuple[list[AddedToken], list[AddedToken]]:
    """tokenizer.json's added tokens, and then those of the other files, which may know more of them and whose word counts.

    listed: `added_tokens` of the file `path`. settings: tokenizer_config.json. Older folders have added_tokens.json instead of a
    table there. Raises: CheckpointError naming the file.
    """
    entries = listed or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(f"{path}: added_tokens is no list of objects; fetch the file again")
    first = list(_read(((entry.get("id"), entry) for entry in entries), "added_tokens", path))
    table, name, where = settings.get("added_tokens_decoder"), "added_tokens_decoder", "tokenizer_config.json"
    if table is None:
        known, where = {token.text for token in first}, "added_tokens.json"
        name, older = "an object of texts and ids", checkpoint.json(where) or {}
        more = [(number, {"content": text}) for text, number in older.items() if text not in known]
    elif isinstance(table, dict) and all(isinstance(entry, dict) for entry in table.values()):
        more = [(_number(key), entry) for key, entry in table.items()]
    else:
        raise CheckpointError(
            f"{checkpoint.folder / where}: {name} is no object of ids and tokens; fetch the file again"
        )
    return first, list(_read(more, name, checkpoint.folder / where))


def _number(key: str) -> int | str:
    return int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else key


def _read(entries: Any, name: str, path: Path) -> Iterator[AddedToken]:
    for number, entry in entries:
        text = entry.get("content")
        if not arguments.is_whole(number) or not isinstance(text, str) or not text:
            raise CheckpointError(
                f"{path}: {name} has an entry without id or content: {quote(number)}: {quote(entry)}; fetch the file again"
            )
        yield AddedToken(number, text, bool(entry.get("special")), path)


def rows(
    checkpoint: Checkpoint,
    vocab: tuple[Mapping[str, Any], Path],
    added: Sequence[AddedToken],
    special: tuple[Sequence[str], Path],
    n_rows: int,
) -> tuple[list[str], list[int]]:
    """Text and type for each row. vocab, special: tokens and the file they come from.

    special: tokens that have a role, which makes them control tokens wherever they stand.
    Raises: CheckpointError for an id without a row, an id or a text that occurs twice.
    """
    table, (base, path) = _Table(n_rows), vocab
    for token, number in base.items():
        table.put(number, token, TokenType.NORMAL, path)
    for entry in added:
        control = entry.special or _looks_special(entry.text)
        table.put(entry.id, entry.text, TokenType.CONTROL if control else TokenType.USER_DEFINED, entry.path)
    _note_gap(checkpoint, base, added)
    for token in special[0]:  # one that no file numbers comes after the others, as transformers adds it
        number = table.ids.get(token)
        if number is None:
            number = max([len(base), *(entry.id + 1 for entry in added)])
            while number in table.tokens:
                number += 1
        table.put(number, token, TokenType.CONTROL, special[1])
    tokens = [table.tokens.get(number) or table.unused_name(number) for number in range(n_rows)]
    return tokens, [table.types.get(number, int(TokenType.UNUSED)) for number in range(n_rows)]


class _Table:
    """Tokens by id, while they are collected: every id and every text once, and a row for each."""

    def __init__(self, n_rows: int) -> None:
        self._n_rows = n_rows
        self.tokens: dict[int, str] = {}
        self.types: dict[int, int] = {}
        self.ids: dict[str, int] = {}

    def put(self, number: object, token: str, kind: TokenType, path: Path) -> None:
        """path: the file that says so."""
        if not arguments.is_whole(number, 0, self._n_rows - 1):
            raise CheckpointError(
                f"{path}: token {quote(token)} has id {quote(number)}; ids from 0 to {self._n_rows - 1} have a row in the"
                " embedding"
            )
        if not is_unicode(token):
            raise CheckpointError(f"{path}: token {token!r} is no Unicode text; fetch the file again")
        if (other := self.tokens.get(number, token)) != token:
            raise CheckpointError(
                f"{path}: id {number} belongs to {quote(other)} and to {quote(token)}; fetch the tokenizer's files again"
            )
        if (first := self.ids.setdefault(token, number)) != number:
            raise CheckpointError(
                f"{path}: token {quote(token)} has the ids {first} and {number}; llama.cpp needs every token once, fetch the"
                " tokenizer's files again"
            )
        self.tokens[number], self.types[number] = token, int(kind)

    def unused_name(self, number: int) -> str:
        """llama.cpp's name for a row without a token, or a longer one where a token is called that: it needs every text once."""
        name = f"[PAD{number}]"
        while name in self.ids:
            name += "_"
        return name


def _note_gap(checkpoint: Checkpoint, base: Mapping[str, Any], added: Sequence[AddedToken]) -> None:
    """Say where the tokenizers library would number an added token otherwise: it gives them ids without a gap."""
    expected = len(base)
    for entry in sorted(added, key=lambda token: token.id):
        if entry.id < expected or entry.text in base:
            continue
        if entry.id > expected:
            checkpoint.notice(
                f"{entry.path}: token {quote(entry.text)} has id {entry.id}, and no token has id {expected}: it keeps its id;"
                f" transformers, which numbers added tokens without gaps, may give it {expected}"
            )
            return
        expected += 1


def _looks_special(token: str) -> bool:
    """Some models do not mark their control tokens as special; llama.cpp's converter goes by their look."""
    ends = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return token in _LOOK_SPECIAL or any(token.startswith(left) and token.endswith(right) for left, right in ends)
