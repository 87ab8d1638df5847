"""backend.vocab: pieces are asked for once, and belong to the vocabulary that was asked."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qwq_lite
from qwq_lite.backend.model import LoadedModel
from qwq_lite.backend.vocab import Vocab
from qwq_lite.engine.local import LocalModel
from qwq_lite.errors import EngineError


@pytest.fixture(scope="module")
def weights(tiny_gguf: Path) -> Iterator[LoadedModel]:
    model = LoadedModel(tiny_gguf)
    yield model
    model.close()


def test_a_vocabulary_ends_with_its_last_user(weights: LoadedModel) -> None:
    vocab = Vocab(weights.pointer)
    assert vocab.special
    for token in range(vocab.n_tokens):
        vocab.piece(token)
    seen = weakref.ref(vocab)
    del vocab
    gc.collect()
    assert seen() is None


def test_each_piece_is_asked_for_once(weights: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab, asked = Vocab(weights.pointer), list[int]()

    class Counted:
        def __getattr__(self, name: str) -> Any:
            return getattr(weights_api, name)

        def llama_token_to_piece(self, vocab: Any, token: int, *rest: Any) -> Any:
            asked.append(token)
            return weights_api.llama_token_to_piece(vocab, token, *rest)

    weights_api = vocab._api
    monkeypatch.setattr(vocab, "_api", Counted())
    first = [vocab.piece(token) for token in range(vocab.n_tokens)]
    assert len(asked) == len(set(asked)) > 0
    n_asked = len(asked)
    assert [vocab.piece(token) for token in range(vocab.n_tokens)] == first
    assert len(asked) == n_asked
    assert first == [weights.vocab.piece(token) for token in range(vocab.n_tokens)]


@pytest.mark.parametrize("token", [-1, 1 << 31])
def test_a_token_that_is_none_is_refused(token: int, weights: LoadedModel) -> None:
    with pytest.raises(EngineError, match="is not one of the vocabulary's"):
        weights.vocab.piece(token)


def renamed(file: Path, copy: Path, *names: tuple[bytes, bytes]) -> Path:
    """The file with texts of its header replaced by others of the same length."""
    data = file.read_bytes()
    for old, new in names:
        assert len(old) == len(new)
        assert old in data
        data = data.replace(old, new)
    copy.write_bytes(data)
    return copy


KEYS = ((b"tokenizer.ggml.eos_token_id", b"tokenizer.ggml.xos_token_id"),)
TOKENS = ((b"<|im_end|>", b"<|im_fin|>"), (b"<|endoftext|>", b"<|finoftext|>"))


def test_a_vocabulary_without_an_end_token_is_said_and_no_ordinary_token_ends_a_reply(
    tiny_gguf: Path, tmp_path: Path
) -> None:
    """llama.cpp takes token 11 for the end where a file names none."""
    with qwq_lite.load(renamed(tiny_gguf, tmp_path / "model.gguf", *KEYS, *TOKENS), isolated=False) as model:
        assert isinstance(model, LocalModel)
        assert model._setup._vocab.eos == 11
        assert model._setup._vocab.end_tokens == frozenset()
        (notice,) = [notice for notice in model.notices if "eos_token_id" in notice]
        assert "no token that ends a turn" in notice
        assert model.ask("Hi", max_tokens=3).finish_reason == "length"


@pytest.mark.parametrize("names", [(), KEYS, TOKENS])
def test_one_end_token_is_enough(names: tuple[tuple[bytes, bytes], ...], tiny_gguf: Path, tmp_path: Path) -> None:
    """Named by its key, or known to llama.cpp by its text."""
    with qwq_lite.load(renamed(tiny_gguf, tmp_path / "model.gguf", *names), isolated=False) as model:
        assert not [notice for notice in model.notices if "eos_token_id" in notice]
