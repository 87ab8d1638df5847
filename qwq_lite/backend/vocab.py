"""A loaded vocabulary: text to tokens, tokens to bytes, which tokens end a turn. Knows no templates.

Source: llama.cpp src/llama-vocab.cpp, include/llama.h
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

from gguf.constants import TokenType

from qwq_lite.backend import native, pretokenizer
from qwq_lite.errors import EngineError
from qwq_lite.text import tags

_CONTROL, _USER_DEFINED = 1 << 3, 1 << 4  # LLAMA_TOKEN_ATTR_…
_ANCHOR = "\x01"  # no vocabulary merges it with a letter


class Vocab:
    """The vocabulary of a loaded model. Any thread may call; nothing here changes it.

    declared_types: the file's tokenizer.ggml.token_type. llama.cpp overrides some of them: it makes the ordinary token
    `</s>` of Qwen's vocabulary an end of generation, and HTML would stop an answer. The file's word counts here.
    """

    def __init__(self, model: Any, declared_types: Sequence[int] | None = None) -> None:
        self._api = native.engine()
        self._model = model  # keeps the pointer's owner in sight; the caller frees it
        self._vocab = self._api.llama_model_get_vocab(model)
        self.n_tokens: int = self._api.llama_vocab_n_tokens(self._vocab)
        self._declared = declared_types if declared_types is not None and len(declared_types) == self.n_tokens else None
        self.eos: int = self._api.llama_vocab_eos(self._vocab)
        self.adds_bos = bool(self._api.llama_vocab_get_add_bos(self._vocab))
        self.bos: int = self._api.llama_vocab_bos(self._vocab)
        self._names_eos = self._is_named(self.eos)
        self.end_tokens = frozenset(token for token in range(self.n_tokens) if self._ends(token))
        # Whether a model has any way to say that its turn is over; what parts files in code completion is none.
        self.ends_turns = not self.end_tokens <= {
            self._api.llama_vocab_fim_pad(self._vocab),
            self._api.llama_vocab_fim_rep(self._vocab),
            self._api.llama_vocab_fim_sep(self._vocab),
        }
        self._pieces: list[bytes | None] = [None] * self.n_tokens  # None until it is asked for
        self._pre = self._text_of_key("tokenizer.ggml.pre")
        self._recurses = pretokenizer.recurses(self._text_of_key("tokenizer.ggml.model"), self._pre)

    def _ends(self, token: int) -> bool:
        if not self._api.llama_vocab_is_eog(self._vocab, token):
            return False
        named = token == self.eos and self._names_eos
        return named or self._declared is None or self._declared[token] == TokenType.CONTROL

    def _is_named(self, eos: int) -> bool:
        """Whether the file itself says that this is the end token: where it says nothing, llama.cpp takes 11 or 2."""
        value = ctypes.create_string_buffer(16)
        count = self._api.llama_model_meta_val_str(self._model, b"tokenizer.ggml.eos_token_id", value, len(value))
        return count > 0 and value.value == str(eos).encode()

    @functools.cached_property
    def special(self) -> dict[str, int]:
        """Spelling -> id of every token that a user must not be able to write: control tokens, and user-defined tags.

        What the file declares ordinary is ordinary: marking `</s>` would part its `>` from a newline that merges with it.
        """
        control, defined = self._spelled
        ends = {spelling: token for spelling, token in defined.items() if token in (self.bos, self.eos)}
        return control | ends | {spelling: defined[spelling] for spelling in self.tags}

    @functools.cached_property
    def tags(self) -> tuple[str, ...]:
        """Spellings of user-defined tags. llama.cpp makes tokens of them even with parse_special off."""
        control, defined = self._spelled
        return tuple(tags.find_tags(defined, control))

    @functools.cached_property
    def _spelled(self) -> tuple[dict[str, int], dict[str, int]]:
        """Spelling -> id of control tokens, and of user-defined ones."""
        api = self._api
        control, defined = dict[str, int](), dict[str, int]()
        for token in range(self.n_tokens):
            if self._declared is not None and self._declared[token] == TokenType.NORMAL:
                continue
            attributes = api.llama_vocab_get_attr(self._vocab, token)
            if attributes & (_CONTROL | _USER_DEFINED):
                spelling = api.llama_vocab_get_text(self._vocab, token).decode("utf-8", "surrogateescape")
                if spelling:
                    (control if attributes & _CONTROL else defined)[spelling] = token
        return control, defined

    def tokenize(self, text: str, parse_special: bool, follows: bool = False) -> list[int]:
        """Ids of `text`, nothing added before or after. With parse_special, spellings of control tokens become those.

        follows: the text goes on after other text. A vocabulary in SentencePiece's manner puts a space before a text, which
        would be one in the middle of it.
        Raises: EngineError for a text that no token list can hold; UsageError for one with a run of characters for which the
        model's tokenizer has no room.
        """
        if follows and self._n_anchor:
            return self._ids(_ANCHOR + text, parse_special)[self._n_anchor :]
        return self._ids(text, parse_special)

    @functools.cached_property
    def _n_anchor(self) -> int:
        """Tokens of a sign that text can follow without a space; 0 where this vocabulary adds none before a text."""
        adds_space = b"".join(map(self.piece, self._ids("a", False))) == b" a"
        return len(self._ids(_ANCHOR, False)) if adds_space else 0

    def _ids(self, text: str, parse_special: bool) -> list[int]:
        raw = text.encode("utf-8", "surrogatepass" if _has_surrogates(text) else "strict")
        ids = functools.partial(self._ids_of, raw, parse_special)
        return pretokenizer.call(ids, text, self._pre, bounded=self._recurses)

    def _ids_of(self, raw: bytes, parse_special: bool) -> list[int]:
        room = len(raw) + 8
        ids = (ctypes.c_int32 * room)()
        count = self._api.llama_tokenize(self._vocab, raw, len(raw), ids, room, False, parse_special)
        if count < 0:
            raise EngineError(f"a text of {len(raw)} bytes cannot be tokenized: llama_tokenize returned {count}")
        return list(ids[:count])

    def _text_of_key(self, key: str) -> str:
        buffer = ctypes.create_string_buffer(256)
        count = self._api.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if count >= 0 else ""

    def piece(self, token: int) -> bytes:
        """The bytes that a token adds to a text; none for control tokens, which are not text."""
        if not 0 <= token < self.n_tokens:  # llama.cpp would end the process
            raise EngineError(f"token {token} is not one of the vocabulary's {self.n_tokens}")
        piece = self._pieces[token]
        if piece is None:  # two threads may both ask llama.cpp: they get the same
            piece = self._pieces[token] = self._read_piece(token)
        return piece

    def _read_piece(self, token: int) -> bytes:
        if self._is_control(token):
            return b""
        buffer = ctypes.create_string_buffer(256)
        count = self._api.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
        if count < 0:
            buffer = ctypes.create_string_buffer(-count)
            count = self._api.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[:count]

    def _is_control(self, token: int) -> bool:
        if self._declared is not None:
            return self._declared[token] in (TokenType.CONTROL, TokenType.UNUSED)
        return bool(self._api.llama_vocab_is_control(self._vocab, token))


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)
