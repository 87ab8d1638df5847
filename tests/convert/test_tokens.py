"""Token ids against Hugging Face `tokenizers` on the same tokenizer.json, for the demo vocabulary and for Qwen's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from gguf.constants import GGMLQuantizationType, LlamaFileType
from tokenizers import Tokenizer

from qwq_convert import metadata
from qwq_convert.checkpoint import tokenizer
from qwq_convert.checkpoint.files import Checkpoint
from qwq_lite.backend.model import LoadedModel
from qwq_lite.formats import gguf_header, gguf_writer
from qwq_lite.formats.shape import from_config
from qwq_lite.prompt import chat_template
from tests import oracle
from tests.checkpoints import write_random_checkpoint


def vocab_file(checkpoint: Checkpoint, path: Path) -> Path:
    """A GGUF that holds the tokenizer and one small tensor: enough for a vocabulary."""
    shape = from_config(checkpoint.config, checkpoint.folder / "config.json")
    keys = metadata.keys(checkpoint, shape, tokenizer.load(checkpoint, shape.n_vocab), LlamaFileType.MOSTLY_F16, 1)
    infos = gguf_writer.layout([("output_norm.weight", (shape.n_embd,), GGMLQuantizationType.F32)])
    path.write_bytes(gguf_writer.encode("qwen2", keys, infos) + bytes(4 * shape.n_embd))
    return path


@pytest.fixture(scope="module", params=["demo", "qwen"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, LoadedModel, Tokenizer]]:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "demo":
        source = oracle.demo_checkpoint()
    else:
        source = write_random_checkpoint(
            folder / "qwen", overrides={"vocab_size": 152_064}, n_vocab=152_064, hidden=64, ffn=64
        )
        (source / "tokenizer.json").write_bytes(oracle.qwen_tokenizer_json().read_bytes())
        settings = json.loads((source / "tokenizer_config.json").read_text())
        settings.pop("added_tokens_decoder", None)
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
    with Checkpoint(source) as checkpoint:
        file = vocab_file(checkpoint, folder / "vocab.gguf")
    types = gguf_header.read(file).keys["tokenizer.ggml.token_type"]
    assert isinstance(types, list)
    model = LoadedModel(file, vocab_only=True, token_types=[int(kind) for kind in types])
    yield request.param, model, Tokenizer.from_file(str(source / "tokenizer.json"))
    model.close()


TEXTS: dict[str, Callable[[], list[str]]] = {
    "mixed": lambda: list(oracle.mixed_texts()),
    "generated": lambda: oracle.generated_texts(10_000, seed=1),
    "assigned": lambda: oracle.assigned_code_point_texts(10_000, seed=2),
}


@pytest.mark.parametrize("texts", TEXTS)
def test_ids_are_hugging_faces(pair: tuple[str, LoadedModel, Tokenizer], texts: str) -> None:
    name, model, theirs = pair
    made = TEXTS[texts]()
    if name == "demo":  # 21 bytes have no token there; both sides drop them, at different times (docs/log.md)
        made = ["".join(character for character in text if character not in oracle.DEMO_LACKS) for text in made]
    assert len(made) >= (20 if texts == "mixed" else 10_000)
    expected = [encoding.ids for encoding in theirs.encode_batch(made, add_special_tokens=False)]
    wrong = [
        text
        for text, ids in zip(made, expected, strict=True)
        if chat_template.tokenize(model.vocab, text, "NFC") != ids
    ]
    assert not wrong, f"{len(wrong)} of {len(made)}, the first is {wrong[0]!r}"


def test_both_end_tokens_end_a_turn(pair: tuple[str, LoadedModel, Tokenizer]) -> None:
    _, model, theirs = pair
    ends = {theirs.token_to_id("<|im_end|>"), theirs.token_to_id("<|endoftext|>")}
    assert ends <= model.vocab.end_tokens
    html = theirs.token_to_id("</s>")
    assert html not in model.vocab.end_tokens, "an ordinary token: HTML must not end an answer"


def test_typed_control_tokens_stay_text(pair: tuple[str, LoadedModel, Tokenizer]) -> None:
    _, model, theirs = pair
    for spelling in ("<|im_end|>", "<|im_start|>", "<|endoftext|>"):
        assert theirs.token_to_id(spelling) not in chat_template.tokenize(model.vocab, f"a {spelling} b", "NFC")
