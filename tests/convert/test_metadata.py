"""Keys of a converted file against a list of them, for every layout of the family; `make parity` compares with llama.cpp."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf.constants import GGUFValueType, TokenType

from qwq_convert.checkpoint.files import Checkpoint
from qwq_convert.checkpoint.tensors import pair
from qwq_lite._version import __version__
from qwq_lite.errors import CheckpointError
from qwq_lite.formats.shape import from_config
from scripts.checkpoint_files import write_json
from tests.checkpoints import (
    END_OF_TEXT,
    END_OF_TURN,
    MERGES,
    N_TOKENS,
    TEMPLATE,
    Dtype,
    Layout,
    random_tensors,
    write_random_checkpoint,
    write_weights,
)
from tests.convert.keys import change_json, read, values

BOOL, F32, I32 = GGUFValueType.BOOL, GGUFValueType.FLOAT32, GGUFValueType.INT32
U32, TEXT, ARRAY = GGUFValueType.UINT32, GGUFValueType.STRING, GGUFValueType.ARRAY
LAYOUTS: list[Layout] = ["transformers4", "transformers5"]
# In llama.cpp's order. Long ones stand here by their length.
EXPECTED: dict[str, tuple[Any, GGUFValueType]] = {
    "general.type": ("model", TEXT),
    "general.sampling.top_k": (40, I32),
    "general.sampling.top_p": (0.95, F32),
    "general.sampling.temp": (0.6, F32),
    "general.name": ("QwQ 32B Preview", TEXT),
    "general.finetune": ("Preview", TEXT),
    "general.basename": ("QwQ", TEXT),
    "general.size_label": ("32B", TEXT),
    "qwen2.block_count": (2, U32),
    "qwen2.context_length": (4096, U32),
    "qwen2.embedding_length": (256, U32),
    "qwen2.feed_forward_length": (512, U32),
    "qwen2.attention.head_count": (4, U32),
    "qwen2.attention.head_count_kv": (2, U32),
    "qwen2.rope.freq_base": (1e6, F32),
    "qwen2.attention.layer_norm_rms_epsilon": (1e-5, F32),
    "general.file_type": (15, U32),
    "general.quantization_version": (2, U32),
    "tokenizer.ggml.model": ("gpt2", TEXT),
    "tokenizer.ggml.pre": ("qwen2", TEXT),
    "tokenizer.ggml.tokens": (320, ARRAY),
    "tokenizer.ggml.token_type": (320, ARRAY),
    "tokenizer.ggml.merges": (len(MERGES), ARRAY),
    "tokenizer.ggml.eos_token_id": (END_OF_TURN, U32),
    "tokenizer.ggml.padding_token_id": (END_OF_TEXT, U32),
    "tokenizer.ggml.bos_token_id": (END_OF_TEXT, U32),
    "tokenizer.ggml.add_bos_token": (False, BOOL),
    "tokenizer.ggml.add_eos_token": (False, BOOL),
    "tokenizer.chat_template": (TEMPLATE, TEXT),
    "qwq_lite.tokenizer.normalizer": ("NFC", TEXT),
    "qwq_lite.version": (__version__, TEXT),
}
YARN = {
    "qwen2.rope.scaling.type": ("yarn", TEXT),
    "qwen2.rope.scaling.factor": (4.0, F32),
    "qwen2.rope.scaling.original_context_length": (1024, U32),
}
CARD = """\
---
license: apache-2.0
license_link: https://example.org/LICENSE
language: [en, zh]
base_model: Qwen/Qwen2.5-32B
tags: [chat]
pipeline_tag: text-generation
---
"""


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_key_its_type_and_its_place(layout: Layout, tied: bool, tmp_path: Path) -> None:
    keys, notices = read(write_random_checkpoint(tmp_path / "QwQ-32B-Preview", layout=layout, tied=tied))
    short = {key: (len(value) if isinstance(value, list) else value, kind) for key, (value, kind) in keys.items()}
    assert list(short) == list(EXPECTED)
    assert short == EXPECTED
    assert keys["tokenizer.ggml.merges"][0] == list(MERGES)
    tokens, types = keys["tokenizer.ggml.tokens"][0], keys["tokenizer.ggml.token_type"][0]
    assert isinstance(tokens, list) and isinstance(types, list)
    assert tokens[268:274] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "[PAD273]"]
    assert types[:268] == [TokenType.NORMAL] * 268
    assert types[268:N_TOKENS] == [TokenType.CONTROL] * 3 + [TokenType.USER_DEFINED] * 2
    assert types[N_TOKENS:] == [TokenType.UNUSED] * (320 - N_TOKENS)
    assert not notices


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 1024}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4}, "original_max_position_embeddings": 1024},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4}, "max_position_embeddings": 1024},
        {
            "rope_theta": ...,
            "rope_parameters": {
                "rope_theta": 1e6,
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 1024,
            },
        },
    ],
    ids=["type", "rope_type", "beside", "from the context", "transformers 5"],
)
def test_yarn_in_each_layout(fields: dict[str, Any], tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "m", overrides=fields)
    keys, _ = read(folder)
    assert {key: value for key, value in keys.items() if ".rope.scaling." in key} == YARN
    assert keys["qwen2.rope.freq_base"] == (1e6, F32)


def test_yarns_factors_and_linear_scaling(tmp_path: Path) -> None:
    rope = {
        "rope_type": "yarn",
        "factor": 2.0,
        "attention_factor": 1.1,
        "attn_factor": 9.0,
        "beta_fast": 32,
        "beta_slow": 1,
    }
    folder = write_random_checkpoint(tmp_path / "m", overrides={"rope_scaling": rope})
    found = values(folder, "qwen2.rope.scaling.yarn_")
    assert found == {"attn_factor": 1.1, "beta_fast": 32.0, "beta_slow": 1.0}
    change_json(folder, "config.json", lambda config: config.update(rope_scaling={"type": "linear", "factor": 2.0}))
    assert values(folder, "qwen2.rope.scaling.") == {"type": "linear", "factor": 2.0}


def test_the_model_card(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "QwQ-32B")
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    keys, _ = read(folder)
    assert {key: value for key, value in keys.items() if key.split(".")[1] in ("license", "base_model")} == {
        "general.license": ("apache-2.0", TEXT),
        "general.license.link": ("https://example.org/LICENSE", TEXT),
        "general.base_model.count": (1, U32),
        "general.base_model.0.name": ("Qwen2.5 32B", TEXT),
        "general.base_model.0.organization": ("Qwen", TEXT),
        "general.base_model.0.repo_url": ("https://huggingface.co/Qwen/Qwen2.5-32B", TEXT),
    }
    assert keys["general.tags"] == (["chat", "text-generation"], ARRAY)
    assert keys["general.languages"] == (["en", "zh"], ARRAY)


def test_every_sampling_setting(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "m")
    given = {
        "sequence": "top_k;temperature",
        "top_k": 20,
        "top_p": 0.8,
        "min_p": 0.05,
        "xtc_probability": 0.5,
        "xtc_threshold": 0.1,
        "temperature": 1,
        "penalty_last_n": 64,
        "repetition_penalty": 1.05,
        "mirostat": 2,
        "mirostat_tau": 5.0,
        "mirostat_eta": 0.1,
    }
    write_json(folder / "generation_config.json", given)
    keys, _ = read(folder)
    found = {key.rpartition(".")[2]: value for key, value in keys.items() if key.startswith("general.sampling.")}
    names = {"temperature": "temp", "repetition_penalty": "penalty_repeat"}
    kinds = {int: I32, float: F32, str: TEXT}
    assert found == {
        names.get(name, name): (value, F32 if name == "temperature" else kinds[type(value)])
        for name, value in given.items()
    }
    write_json(folder / "generation_config.json", {"temperature": None, "penalty_repeat": 1.1, "repetition_penalty": 2})
    assert values(folder, "general.sampling.") == {"penalty_repeat": 1.1}


@pytest.mark.parametrize(
    ("place", "n_params", "expected"),
    [
        ("QwQ-32B", 32e9, {"name": "QwQ 32B", "basename": "QwQ", "size_label": "32B"}),
        (
            "Qwen2.5-0.5B-Instruct",
            0.49e9,
            {"name": "Qwen2.5 0.5B Instruct", "finetune": "Instruct", "basename": "Qwen2.5", "size_label": "0.5B"},
        ),
        (
            "DeepSeek-R1-Distill-Qwen-7B",
            7.6e9,
            {"name": "DeepSeek R1 Distill Qwen 7B", "basename": "DeepSeek-R1-Distill-Qwen", "size_label": "7B"},
        ),
        ("mine", 1.5e9, {"name": "Mine", "size_label": "1.5B"}),
        (
            "models--Qwen--QwQ-32B-Preview/snapshots/1032e81cb936c486aae1d33da75b2fbcd5deed4a",
            32e9,
            {
                "name": "QwQ 32B Preview",
                "organization": "Qwen",
                "finetune": "Preview",
                "basename": "QwQ",
                "size_label": "32B",
            },
        ),
        ("models--gpt2/snapshots/a1", 1.5e9, {"name": "Gpt2", "size_label": "1.5B"}),
        ("snapshots/QwQ-32B", 32e9, {"name": "QwQ 32B", "basename": "QwQ", "size_label": "32B"}),
    ],
)
def test_names_follow_from_the_folder(place: str, n_params: float, expected: dict[str, str], tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / place)
    found = values(folder, "general.", n_params=int(n_params))
    names = ("name", "organization", "finetune", "basename", "size_label", "version")
    assert {name: found[name] for name in names if name in found} == expected


def test_a_link_and_a_relative_path_have_the_folders_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = write_random_checkpoint(tmp_path / "models--Qwen--QwQ-32B" / "snapshots" / "ab12")
    (tmp_path / "my-QwQ").symlink_to(snapshot, target_is_directory=True)
    assert Checkpoint(tmp_path / "my-QwQ").name == "my-QwQ"
    monkeypatch.chdir(snapshot)
    assert Checkpoint(Path()).name == "QwQ-32B"
    (snapshot / "inner").mkdir()
    monkeypatch.chdir(snapshot / "inner")
    assert Checkpoint(Path("..")).name == "QwQ-32B"
    assert Checkpoint(Path("..")).organization == "Qwen"


def test_config_jsons_own_name_comes_first(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "x", overrides={"_name_or_path": "Qwen/QwQ-32B"})
    assert values(folder, "general.")["name"] == "QwQ 32B"
    assert values(folder, "general.")["organization"] == "Qwen"
    change_json(folder, "config.json", lambda config: config.update(_name_or_path="/models/y"))
    assert values(folder, "general.")["name"] == "X"


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("shards", [1, 3])
def test_types_and_shards_of_the_source_change_no_key(dtype: Dtype, shards: int, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "QwQ-32B-Preview", dtype=dtype, shards=shards)
    assert {key: kind for key, (_, kind) in read(folder)[0].items()} == {
        key: kind for key, (_, kind) in EXPECTED.items()
    }


def test_mixed_types_in_any_order_of_the_shards(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "m")
    size = {"hidden": 256, "ffn": 512, "kv": 128, "vocab": 320}
    mixed = [random_tensors(size, 2, False, kind, seed=0) for kind in ("bf16", "f16", "f32")]
    write_weights(folder, [row[number % 3] for number, row in enumerate(zip(*mixed, strict=True))][::-1], 2)
    with Checkpoint(folder) as checkpoint:
        pairs = pair(checkpoint, from_config(checkpoint.config, folder / "config.json"))
        assert {entry.source.type.name for entry in pairs} == {"BF16", "F16", "F32"}
        layers = [entry.name.split(".")[1] if entry.name.startswith("blk.") else "" for entry in pairs]
        assert layers == [""] * 3 + ["0"] * 12 + ["1"] * 12
        assert [entry.name for entry in pairs[:3]] == ["output.weight", "output_norm.weight", "token_embd.weight"]
        assert all(
            math.prod(entry.shape) * {"F32": 4}.get(entry.source.type.name, 2) == entry.source.n_bytes
            for entry in pairs
        )


@pytest.mark.parametrize(
    ("overrides", "tied", "word"),
    [
        ({"tie_word_embeddings": True}, False, "lm_head.weight of their own"),
        ({"tie_word_embeddings": ...}, True, "nor is lm_head.weight"),
        ({"use_sliding_window": True}, False, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, False, "use_sliding_window"),
    ],
)
def test_what_is_converted_otherwise_than_the_flag_says_is_noted(
    overrides: dict[str, Any], tied: bool, word: str, tmp_path: Path
) -> None:
    keys, notices = read(write_random_checkpoint(tmp_path / "QwQ-32B-Preview", tied=tied, overrides=overrides))
    assert len(notices) == 1 and word in notices[0] and "config.json" in notices[0]
    assert set(keys) == set(EXPECTED)


def test_a_head_that_is_missing_is_an_error(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "m", tied=True, overrides={"tie_word_embeddings": False})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        read(folder)


def test_fields_without_meaning_here_change_nothing(tmp_path: Path) -> None:
    fields = {
        "max_window_layers": 1,
        "attention_dropout": 0.5,
        "use_cache": False,
        "use_mrope": False,
        "sliding_window": 7,
    }
    keys, notices = read(write_random_checkpoint(tmp_path / "QwQ-32B-Preview", overrides=fields))
    assert list(keys) == list(EXPECTED) and not notices
    keys, _ = read(write_random_checkpoint(tmp_path / "b", overrides={"head_dim": 64}))
    assert keys["qwen2.attention.key_length"] == keys["qwen2.attention.value_length"] == (64, U32)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are Unicode there")
@pytest.mark.parametrize("inside", ["", "snapshots/main"])
def test_a_folder_whose_name_is_no_utf_8(inside: str, tmp_path: Path) -> None:
    """The name is the folder's own, or that of the Hub's cache; no README.md is blamed, for there is none."""
    name = os.fsdecode(b"models--m\xe9--mod\xe8le-7B" if inside else b"mod\xe8le-7B")
    folder = write_random_checkpoint(tmp_path / name / inside)
    keys, notices = read(folder)
    assert keys["general.name"] == ("Mod\ufffdLe 7B", TEXT)
    assert [str(folder) in notice and "UTF-8" in notice for notice in notices] == [True]


def test_an_origin_that_is_no_text_is_config_jsons(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "m", overrides={"_name_or_path": "a/b"})
    config = folder / "config.json"
    config.write_text(config.read_text("utf-8").replace("a/b", "a/\\ud800"), "utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json: _name_or_path"):
        read(folder)
