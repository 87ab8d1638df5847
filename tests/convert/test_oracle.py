"""The oracles must be right before anything is compared with them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from scripts.checkpoint_files import byte_symbols
from tests import oracle


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_file(str(oracle.qwen_tokenizer_json(tmp_path_factory.mktemp("qwen"))))


def encode_by_ranks(tokenizer: Tokenizer, text: str) -> Iterator[int]:
    """Ids as tiktoken finds them: it never sees a merge, only the ranks of byte strings."""
    ranks = oracle.qwen_ranks()
    byte_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    assert tokenizer.pre_tokenizer is not None
    for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(unicodedata.normalize("NFC", text)):
        raw = bytes(byte_of[symbol] for symbol in piece)
        yield from (ranks[part] for part in oracle.merge_by_rank(raw, ranks, len(ranks)))


def test_ranks_and_merges_give_the_same_ids(tokenizer: Tokenizer) -> None:
    texts = [*oracle.mixed_texts(), *oracle.generated_texts(1000, seed=1), *oracle.assigned_code_point_texts(500)]
    for text in texts:
        assert tokenizer.encode(text).ids == list(encode_by_ranks(tokenizer, text))


def test_the_qwen_vocabulary_is_whole(tokenizer: Tokenizer) -> None:
    ranks = oracle.qwen_ranks()
    assert sorted(ranks.values()) == list(range(151_643))
    assert all(bytes([byte]) in ranks for byte in range(256))
    assert tokenizer.get_vocab_size() == 151_646
    assert {i: tokenizer.id_to_token(i) for i in oracle.QWEN_CONTROL} == oracle.QWEN_CONTROL


def test_known_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("Hello, world!").ids == [9707, 11, 1879, 0]
    assert tokenizer.encode("<|im_start|>user\n").ids == [151_644, 872, 198]


def test_qwen_files_are_made_once(tmp_path: Path) -> None:
    path = oracle.qwen_tokenizer_json(tmp_path)
    before = path.stat().st_mtime_ns
    assert oracle.qwen_tokenizer_json(tmp_path) == path
    assert path.stat().st_mtime_ns == before
    assert {p.name for p in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}


def test_each_assigned_code_point_occurs() -> None:
    texts = oracle.assigned_code_point_texts(n=1000, seed=3)
    assert len(texts) == 1000
    assert set("".join(texts)) == set(oracle.assigned_characters())
    assert len(oracle.assigned_characters()) > 280_000


def test_texts_are_reproducible_and_hold_no_control_token() -> None:
    for make in (oracle.generated_texts, oracle.assigned_code_point_texts):
        texts = make(2000, seed=5)
        assert make(2000, seed=5) == texts
        assert make(2000, seed=6) != texts
    spellings = (*oracle.QWEN_CONTROL.values(), "<think>", "</think>", "<tool_response>", "<repo_name>", "<filename>")
    for text in [*oracle.mixed_texts(), *oracle.generated_texts(), *oracle.assigned_code_point_texts()]:
        assert not any(spelling in text for spelling in spellings)


def test_texts_are_mixed_enough() -> None:
    texts = oracle.generated_texts()
    changed = sum(unicodedata.normalize("NFC", text) != text for text in texts)
    assert 2000 < changed < 8000
    hand_picked = "".join(oracle.mixed_texts())
    assert set(oracle.SPACES) - {"\x1c", "\x1f", "\u2000", "\u2009", "\u200a", "\u205f"} <= set(hand_picked)
    assert {"\u200d", "\ufe0f", "\u0301", "\u1161", "\ufa0c"} <= set(hand_picked)
