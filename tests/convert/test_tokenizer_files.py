"""Tokenizer files of the family in every form that there is: added tokens, roles, ends, merges, templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf.constants import GGUFValueType, TokenType

from qwq_lite.errors import CheckpointError
from scripts.checkpoint_files import write_json
from tests.checkpoints import MERGES, TEMPLATE, Layout, write_random_checkpoint
from tests.convert.keys import change_json, read, values

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


def added(number: int, text: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": text, **flags, "special": special}


def token(folder: Path, text: str) -> tuple[int, TokenType]:
    found = values(folder, "tokenizer.ggml.")
    number = found["tokens"].index(text)
    return number, TokenType(found["token_type"][number])


def deepseek(folder: Path, post_processor: str) -> Path:
    """DeepSeek-R1-Distill-Qwen's files: a Llama tokenizer by its class, Qwen2's by its regex, other control tokens."""
    write_random_checkpoint(folder, overrides={"bos_token_id": 268, "eos_token_id": 268})
    texts = (EOS, "<｜User｜>", "<｜Assistant｜>", BOS, "<|EOT|>", "<think>", "</think>")

    def change(tokenizer: dict[str, Any]) -> None:
        tokenizer["added_tokens"] = [added(268 + n, text, text in (BOS, EOS)) for n, text in enumerate(texts)]
        first, second = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
        bos = {"SpecialToken": {"id": BOS, "type_id": 0}}
        template = {"type": "TemplateProcessing", "single": [bos, first], "pair": [bos, first, bos, second]}
        byte_level = tokenizer["post_processor"]
        tokenizer["post_processor"] = {
            "bytes": byte_level,
            "template": template,
            "both": {"type": "Sequence", "processors": [byte_level, template]},
            "none": None,
        }[post_processor]

    change_json(folder, "tokenizer.json", change)
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": {"__type": "AddedToken", "content": BOS, "normalized": True},
        "eos_token": {"__type": "AddedToken", "content": EOS, "normalized": True},
        "pad_token": {"__type": "AddedToken", "content": EOS, "normalized": True},
        "unk_token": None,
        "legacy": True,
        "tokenizer_class": "LlamaTokenizerFast",
        "chat_template": TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", settings)
    return folder


@pytest.mark.parametrize(
    ("post_processor", "adds"),
    [
        ("bytes", {"bos": False, "eos": False}),  # the post-processor's word counts in llama.cpp's converter
        ("template", {"bos": True, "sep": False, "eos": False}),
        ("both", {"bos": True, "eos": False, "sep": False}),
        ("none", {"bos": True, "eos": False}),
    ],
)
def test_deepseeks_tokenizer(post_processor: str, adds: dict[str, bool], tmp_path: Path) -> None:
    found = values(deepseek(tmp_path / "m", post_processor), "tokenizer.ggml.")
    assert found["pre"] == "qwen2"
    assert {name: found[f"{name}_token_id"] for name in ("bos", "eos", "padding")} == {
        "bos": 271,
        "eos": 268,
        "padding": 268,
    }
    assert [(name, found[f"add_{name}_token"]) for name in adds] == list(adds.items())
    assert sum(name.startswith("add_") for name in found) == len(adds)
    assert found["token_type"][268:275] == [TokenType.CONTROL] * 5 + [TokenType.USER_DEFINED] * 2


def test_a_post_processor_that_ggufs_words_cannot_tell(tmp_path: Path) -> None:
    folder = deepseek(tmp_path / "m", "template")
    change_json(folder, "tokenizer_config.json", lambda settings: settings.update(bos_token="<think>"))
    with pytest.raises(CheckpointError, match="post_processor"):
        read(folder)
    change_json(folder, "tokenizer_config.json", lambda settings: settings.update(bos_token=None))
    assert values(folder, "tokenizer.ggml.")["bos_token_id"] == 271, "the template names it"


def test_added_tokens_in_either_file(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "m")
    change_json(
        folder,
        "tokenizer_config.json",
        lambda settings: settings["added_tokens_decoder"].update({"273": added(273, "<x>", False)}),
    )
    assert token(folder, "<x>") == (273, TokenType.USER_DEFINED)
    change_json(folder, "tokenizer.json", lambda tokenizer: tokenizer.update(added_tokens=[]))
    assert token(folder, "<think>") == (271, TokenType.USER_DEFINED)
    assert token(folder, "<|im_end|>") == (270, TokenType.CONTROL)
    change_json(
        folder, "tokenizer_config.json", lambda settings: settings["added_tokens_decoder"]["271"].update(special=True)
    )
    assert token(folder, "<think>") == (271, TokenType.CONTROL)


def test_added_tokens_in_the_older_file(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "m")
    change_json(folder, "tokenizer_config.json", lambda settings: settings.pop("added_tokens_decoder"))
    write_json(folder / "added_tokens.json", {"<think>": 271, "<x>": 273, "<|y|>": 274})
    assert token(folder, "<x>") == (273, TokenType.USER_DEFINED)
    assert token(folder, "<|y|>") == (274, TokenType.CONTROL), "by its look"


def test_tokens_with_a_role_are_control_tokens(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "m")

    def change(settings: dict[str, Any]) -> None:
        settings |= {"pad_token": "[PAD]", "additional_special_tokens": ["<think>", {"content": "Ġthe"}]}
        settings["extra_special_tokens"] = {"image_token": "<image>"}

    change_json(folder, "tokenizer_config.json", change)
    assert token(folder, "<think>") == (271, TokenType.CONTROL)
    assert token(folder, "Ġthe")[1] == TokenType.CONTROL
    assert token(folder, "[PAD]") == (273, TokenType.CONTROL), "no file numbers it: it comes after the others"
    assert token(folder, "<image>") == (274, TokenType.CONTROL)


@pytest.mark.parametrize("layout", ["transformers4", "transformers5"])
def test_merges_are_the_same_as_strings_and_as_pairs(layout: Layout, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "m", layout=layout)
    assert isinstance(json.loads((folder / "tokenizer.json").read_text())["model"]["merges"][0], str) == (
        layout == "transformers4"
    )
    assert values(folder, "tokenizer.ggml.")["merges"] == list(MERGES)


def test_the_template_in_each_of_its_places(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "m")

    def set_template(value: object) -> None:
        change_json(folder, "tokenizer_config.json", lambda settings: settings.update(chat_template=value))

    def found() -> dict[str, Any]:
        return values(folder, "tokenizer.chat_template")

    set_template([{"name": "default", "template": "a"}, {"name": "tool use", "template": "b"}])
    assert found() == {"": "a", ".tool_use": "b", "s": ["tool_use"]}
    set_template([{"name": "rag", "template": "c"}])
    assert found() == {".rag": "c", "s": ["rag"]}
    set_template(None)
    assert not found()
    write_json(folder / "chat_template.json", {"chat_template": "d"})
    assert found() == {"": "d"}
    (folder / "chat_template.jinja").write_text("e", encoding="utf-8")
    assert found() == {"": "e"}
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("f", encoding="utf-8")
    assert found() == {"": "e", ".rag": "f", "s": ["rag"]}


def test_of_two_templates_llama_cpps_is_kept_and_that_is_said(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "m")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    assert not read(folder)[1]
    (folder / "chat_template.jinja").write_text("another", encoding="utf-8")
    keys, notices = read(folder)
    assert keys["tokenizer.chat_template"] == (TEMPLATE, GGUFValueType.STRING)
    assert len(notices) == 1 and "chat_template.jinja" in notices[0]
