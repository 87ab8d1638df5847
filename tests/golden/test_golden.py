"""Ids of texts as plain text, against llama.cpp's golden ones for 15 vocabularies, and Hugging Face's where they compose.

`make golden` runs this; pytest without arguments does not look in here. The golden ids are what Hugging Face's tokenizer of
each model gives, and what llama_tokenize must give with parse_special off. They are data of others and fetched.
"""

from __future__ import annotations

import struct
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from gguf.constants import TokenType
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from qwq_lite.backend.model import LoadedModel
from qwq_lite.formats import gguf_header
from qwq_lite.prompt import chat_template
from qwq_lite.text import normalization
from tests import oracle
from tests.engine_source import kept

NAMES = (
    *(
        "bert-bge",
        "command-r",
        "deepseek-coder",
        "deepseek-llm",
        "falcon",
        "gemma-4",
        "gpt-2",
        "llama-bpe",
        "llama-spm",
    ),
    *("mpt", "phi-3", "qwen2", "qwen35", "refact", "starcoder"),
)
SEPARATOR = "\n__ggml_vocab_test__\n"
N_DECOMPOSED = 200
# Source: tokenizer.json of Qwen3.5, as llama.cpp's src/llama-vocab.cpp quotes it
QWEN35_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def folder() -> Path:
    return kept("vocabularies", lambda path: path.name.startswith("ggml-vocab-") and len(path.parts) == 2) / "models"


@dataclass
class Golden:
    """A vocabulary and what llama.cpp's own test expects of it."""

    name: str
    header: gguf_header.Header
    model: LoadedModel

    @property
    def form(self) -> str:
        return normalization.normal_form(self.header.keys)

    def ours(self, text: str) -> list[int]:
        return chat_template.tokenize(self.model.vocab, text, self.form)

    def cases(self) -> list[tuple[str, list[int]]]:
        """Each text, and its golden ids."""
        path = folder() / f"ggml-vocab-{self.name}.gguf"
        texts = path.with_suffix(".gguf.inp").read_bytes().decode("utf-8").removesuffix(SEPARATOR).split(SEPARATOR)
        rows = path.with_suffix(".gguf.out").read_text("utf-8").splitlines()
        return [(text, [int(word) for word in row.split()]) for text, row in zip(texts, rows, strict=True)]

    def spelled(self, kind: TokenType) -> list[str]:
        tokens, types = (self.header.keys[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
        assert isinstance(tokens, list)
        assert isinstance(types, list)
        return [str(token) for token, one in zip(tokens, types, strict=True) if one == kind]


def load(name: str) -> Golden:
    path = folder() / f"ggml-vocab-{name}.gguf"
    header = gguf_header.read(path)
    types: Any = header.keys.get("tokenizer.ggml.token_type")
    return Golden(name, header, LoadedModel(path, vocab_only=True, token_types=types))


@pytest.fixture(params=NAMES)
def golden(request: pytest.FixtureRequest) -> Iterator[Golden]:
    found = load(request.param)
    yield found
    found.model.close()


def test_there_are_no_golden_inputs_but_these() -> None:
    found = {path.name.removeprefix("ggml-vocab-").removesuffix(".gguf.inp") for path in folder().glob("*.inp")}
    assert found == set(NAMES)


def test_the_golden_texts_have_the_golden_ids(golden: Golden) -> None:
    vocab, n_composed = golden.model.vocab, 0
    for text, ids in golden.cases():
        normal = normalization.normalize(text, golden.form)
        assert golden.ours(text) == vocab.tokenize(normal, parse_special=False), text
        if normal == text:
            assert golden.ours(text) == ids, text
        else:
            n_composed += 1
    assert n_composed == (3 if golden.name == "qwen35" else 0), "texts that their tokenizer composes first"


def test_texts_of_a_vocabularys_own_words_are_not_parted(golden: Golden) -> None:
    """White space and letters that have a token of their own, typed by a user, are what llama.cpp makes of them."""
    special = golden.model.vocab.special
    words = [word for word in golden.spelled(TokenType.USER_DEFINED) if word not in special]
    for word in words:
        text = normalization.normalize(f"a{word}b\n{word}{word} {word}", golden.form)
        assert golden.ours(text) == golden.model.vocab.tokenize(text, parse_special=False), repr(word)
    assert all(word.isspace() or word.isalpha() or word in "÷" for word in words)
    assert len(words) == {"mpt": 23, "deepseek-coder": 13, "deepseek-llm": 13}.get(golden.name, 0)


def test_no_typed_spelling_is_a_token(golden: Golden) -> None:
    special, piece = golden.model.vocab.special, golden.model.vocab.piece
    spellings = [*golden.spelled(TokenType.CONTROL), *golden.spelled(TokenType.USER_DEFINED)]
    for spelling in [word for word in spellings if word in special and word != "<unk>"][:300]:
        text = f"a {spelling} b{spelling}{spelling}"
        ids = golden.ours(text)
        assert special[spelling] not in ids, spelling
        if golden.name != "bert-bge":  # which knows small letters only
            assert b"".join(map(piece, ids)).decode().strip() == text, "and what is beside it is as it was"


@pytest.mark.parametrize("name", ["llama-spm", "phi-3", "gemma-4", "qwen2"])
def test_text_that_follows_other_text_gets_no_space_of_its_own(name: str) -> None:
    golden = load(name)
    vocab = golden.model.vocab
    for text in ("Wait, no.", " Wait", "\n\nSo", "日本", "</", "1"):
        follows = vocab.tokenize(text, False, follows=True)
        assert b"".join(map(vocab.piece, follows)).decode() == text
    golden.model.close()


@pytest.mark.parametrize("name", ["gemma-4", "command-r", "deepseek-coder", "qwen35"])
def test_a_typed_tag_is_what_a_vocabulary_without_tags_makes_of_it(name: str, tmp_path: Path) -> None:
    golden, without = load(name), LoadedModel(without_user_defined(name, tmp_path), vocab_only=True)
    tags = golden.model.vocab.tags
    assert len(tags) >= 6
    for tag in tags[:40]:
        for text in (tag, f"a {tag} b", f"x{tag}\n{tag}{tag}", f"({tag}) 日{tag}本"):
            assert golden.ours(text) == without.vocab.tokenize(text, parse_special=False), text
    without.close()
    golden.model.close()


def without_user_defined(name: str, room: Path) -> Path:
    """A copy of a vocabulary whose user-defined tokens are ordinary ones."""
    raw = bytearray((folder() / f"ggml-vocab-{name}.gguf").read_bytes())
    key = b"tokenizer.ggml.token_type"
    at = raw.index(key) + len(key)
    _, _, count = struct.unpack_from("<IIQ", raw, at)  # array, of int32, so many
    types = struct.unpack_from(f"<{count}i", raw, at + 16)
    ordinary = [int(TokenType.NORMAL if kind == TokenType.USER_DEFINED else kind) for kind in types]
    struct.pack_into(f"<{count}i", raw, at + 16, *ordinary)
    path = room / "without.gguf"
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("name", ["qwen2", "qwen35"])
def test_decomposed_texts_have_the_ids_of_hugging_faces_tokenizer(name: str) -> None:
    golden = load(name)
    theirs = as_hugging_face(golden) if name == "qwen35" else Tokenizer.from_file(str(oracle.qwen_tokenizer_json()))
    texts = decomposed_texts()
    assert len(texts) == N_DECOMPOSED
    differing = [text for text in texts if golden.ours(text) != theirs.encode(text, add_special_tokens=False).ids]
    raw = [text for text in texts if golden.model.vocab.tokenize(text, False) != golden.ours(text)]
    golden.model.close()
    assert differing == []
    assert len(raw) > N_DECOMPOSED // 2, "without the normal form most would differ"


def decomposed_texts() -> list[str]:
    texts = (unicodedata.normalize("NFD", text) for text in oracle.generated_texts(seed=27))
    return [text for text in texts if unicodedata.normalize("NFC", text) != text][:N_DECOMPOSED]


def as_hugging_face(golden: Golden) -> Tokenizer:
    """Qwen3.5's tokenizer as its tokenizer.json has it: NFC, its regex, bytes; tokens and merges are the GGUF file's."""
    keys = golden.header.keys
    tokens, merges = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.merges"]
    assert isinstance(tokens, list)
    assert isinstance(merges, list)
    pairs = [(first, second) for first, _, second in (str(merge).partition(" ") for merge in merges)]
    vocabulary = {str(token): number for number, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=False))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN35_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    return made
