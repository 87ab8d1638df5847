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


def test_a_token_in_the_rows_for_padding_keeps_its_id(tmp_path: Path) -> None:
    """280 has a row, and the rows below it that no token has stay unused, as in llama.cpp's files."""
    folder = write_random_checkpoint(tmp_path / "m")
    change_json(folder, "tokenizer.json", lambda data: data["added_tokens"].append(added(280, "<x>", True)))
    change_json(folder, "tokenizer_config.json", lambda settings: settings.update(pad_token="<pad>"))
    found, notices = values(folder, "tokenizer.ggml."), read(folder)[1]
    assert token(folder, "<x>") == (280, TokenType.CONTROL)
    assert (found["tokens"][273], found["token_type"][273]) == ("[PAD273]", TokenType.UNUSED)
    assert token(folder, "<pad>") == (281, TokenType.CONTROL), "no file numbers it: it comes after the others"
    assert [str(folder / "tokenizer.json") in notice and "280" in notice and "273" in notice for notice in notices] == [
        True
    ]


def test_a_token_of_the_base_vocabulary_too(tmp_path: Path) -> None:
    """Its id is the one that transformers gives it; the row that it leaves is unused."""
    folder = write_random_checkpoint(tmp_path / "m")
    change_json(folder, "tokenizer.json", lambda data: data["model"]["vocab"].update(he=300))
    assert token(folder, "he") == (300, TokenType.NORMAL)
    assert token(folder, "[PAD257]") == (257, TokenType.UNUSED)
    assert not read(folder)[1]


def test_the_last_row_can_be_a_tokens(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "m")
    change_json(
        folder,
        "tokenizer_config.json",
        lambda settings: settings["added_tokens_decoder"].update({"319": added(319, "<x>", False)}),
    )
    assert token(folder, "<x>") == (319, TokenType.USER_DEFINED)


def test_a_token_with_the_name_of_an_unused_row(tmp_path: Path) -> None:
    """llama.cpp refuses a file in which a text stands twice."""
    folder = write_random_checkpoint(tmp_path / "m")
    change_json(folder, "tokenizer.json", lambda data: data["added_tokens"].append(added(273, "[PAD300]", True)))
    assert token(folder, "[PAD300]") == (273, TokenType.CONTROL)
    tokens = values(folder, "tokenizer.ggml.")["tokens"]
    assert len(set(tokens)) == len(tokens) == 320
    assert tokens[300] == "[PAD300]_"


@pytest.mark.parametrize("name", ["bos", "eos"])
def test_ends_that_two_files_tell_differently(name: str, tmp_path: Path) -> None:
    """llama.cpp's converter takes the post-processor's word, and warns."""
    folder = write_random_checkpoint(tmp_path / "m")
    key = f"add_{name}_token"
    change_json(folder, "tokenizer_config.json", lambda settings: settings.update({key: True}))
    assert values(folder, "tokenizer.ggml.")[key] is False
    assert [f"{key} is true" in notice and "tokenizer_config.json" in notice for notice in read(folder)[1]] == [True]
    change_json(folder, "tokenizer.json", lambda data: data.update(post_processor=None))
    assert values(folder, "tokenizer.ggml.")[key] is True, "nothing says otherwise"
    assert not read(folder)[1]


def test_an_end_that_is_put_and_said_not_to_be(tmp_path: Path) -> None:
    folder = deepseek(tmp_path / "m", "template")
    change_json(folder, "tokenizer_config.json", lambda settings: settings.update(add_bos_token=False))
    assert values(folder, "tokenizer.ggml.")["add_bos_token"] is True
    assert [notice.count("add_bos_token is false") for notice in read(folder)[1]] == [1]


def into_two_files(folder: Path) -> Path:
    """The same tokenizer as vocab.json and merges.txt, as the older of transformers' two classes writes it."""
    whole = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    write_json(folder / "vocab.json", whole["model"]["vocab"])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in whole["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    (folder / "tokenizer.json").unlink()
    return folder


@pytest.mark.parametrize("table", ["added_tokens_decoder", "added_tokens.json"])
def test_vocab_and_merges_are_the_same_tokenizer(table: str, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "m")
    expected = read(folder)
    if table == "added_tokens.json":
        change_json(folder, "tokenizer_config.json", lambda settings: settings.pop("added_tokens_decoder"))
        names = {
            entry["content"]: entry["id"]
            for entry in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        }
        write_json(folder / "added_tokens.json", names)
    found = read(into_two_files(folder))
    assert (list(found[0].items()), found[1]) == (list(expected[0].items()), expected[1]), "in the same order, too"


@pytest.mark.parametrize(
    ("said", "adds"),
    [
        ({}, {"bos": False, "eos": False}),
        ({"bos": True}, {"bos": True, "eos": False}),
        ({"eos": True}, {"bos": False, "eos": True}),
    ],
)
def test_ends_that_no_post_processor_tells(said: dict[str, bool], adds: dict[str, bool], tmp_path: Path) -> None:
    folder = into_two_files(write_random_checkpoint(tmp_path / "m"))

    def change(settings: dict[str, Any]) -> None:
        settings.pop("add_bos_token", None)
        settings.update({f"add_{name}_token": value for name, value in said.items()})

    change_json(folder, "tokenizer_config.json", change)
    found = values(folder, "tokenizer.ggml.add_")
    assert found == {f"{name}_token": value for name, value in adds.items()}
    assert not read(folder)[1]


def test_of_two_forms_of_a_tokenizer_tokenizer_json_counts(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "m")
    expected = values(folder)
    write_json(folder / "vocab.json", {"a": 0})
    (folder / "merges.txt").write_text("no merges", "utf-8")
    assert values(folder) == expected


def test_without_a_table_the_classes_own_token_ends_a_text(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "m")
    (folder / "tokenizer_config.json").unlink()
    into_two_files(folder)
    assert token(folder, "<|endoftext|>") == (268, TokenType.CONTROL)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("merges.txt", None, "merges.txt: is missing"),
        ("vocab.json", None, "vocab.json: is missing"),
        ("merges.txt", "#version: 0.2\nh e r\n", "merges.txt: merges\\[0\\]"),
        ("merges.txt", "h e\nz q\n", "merges.txt: merges\\[1\\] needs 'zq'"),
        ("merges.txt", "#version: 0.2\n", "merges.txt: merges is missing"),
        ("vocab.json", '{"a": 999}', "vocab.json: token 'a' has id 999"),
        ("vocab.json", "[]", "vocab.json"),
        ("tokenizer_config.json", '{"tokenizer_class": "GPT2Tokenizer"}', "tokenizer_config.json: tokenizer_class"),
    ],
)
def test_two_files_are_blamed_by_their_names(name: str, content: str | None, words: str, tmp_path: Path) -> None:
    folder = into_two_files(write_random_checkpoint(tmp_path / "m"))
    (folder / name).unlink() if content is None else (folder / name).write_text(content, "utf-8")
    with pytest.raises(CheckpointError, match=words):
        read(folder)


def test_a_tokenizer_without_an_end_is_told_of(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "m", overrides={"eos_token_id": ...})
    names = {"<|endoftext|>": "<|a|>", "<|im_end|>": "<|b|>"}

    def change(tokenizer: dict[str, Any]) -> None:
        for entry in tokenizer["added_tokens"]:
            entry["content"] = names.get(entry["content"], entry["content"])

    change_json(folder, "tokenizer.json", change)
    write_json(folder / "tokenizer_config.json", {"chat_template": TEMPLATE})
    assert ["no token ends an answer" in notice for notice in read(folder)[1]] == [True]
    change_json(folder, "tokenizer_config.json", lambda settings: settings.update(eos_token="<|b|>"))
    assert not read(folder)[1]
