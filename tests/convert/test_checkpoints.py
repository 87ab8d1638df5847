"""The random checkpoints that other tests convert: valid, reproducible, and different where the layouts differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from scripts.checkpoint_files import INDEX
from tests.checkpoints import CONTROL, N_TOKENS, ORDINARY, Dtype, Layout, write_random_checkpoint


def load_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def load_tensors(folder: Path) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as shard:
            tensors |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 - no mapping
    return tensors


@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_shards_are_valid_and_indexed(tmp_path: Path, dtype: Dtype, shards: int) -> None:
    folder = write_random_checkpoint(tmp_path / "model", dtype=dtype, shards=shards)
    where: dict[str, str] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as shard:
            for name in shard.keys():  # noqa: SIM118 - no mapping
                assert shard.get_slice(name).get_dtype() == dtype.upper()
                where[name] = path.name
    assert len(where) == 2 * 12 + 3
    if shards == 1:
        assert set(where.values()) == {"model.safetensors"}
        assert not (folder / INDEX).exists()
    else:
        assert load_json(folder / INDEX)["weight_map"] == where
        assert len(set(where.values())) == shards


@pytest.mark.parametrize("tied", [False, True])
def test_shapes_follow_the_arguments(tmp_path: Path, tied: bool) -> None:
    size: dict[str, Any] = {"n_layer": 1, "hidden": 64, "ffn": 96, "n_head": 4, "n_head_kv": 1, "n_vocab": 288}
    tensors = load_tensors(write_random_checkpoint(tmp_path / "model", **size, tied=tied, dtype="f32"))
    assert tensors["model.embed_tokens.weight"].shape == (288, 64)
    assert tensors["model.layers.0.self_attn.k_proj.weight"].shape == (16, 64)
    assert tensors["model.layers.0.self_attn.k_proj.bias"].shape == (16,)
    assert tensors["model.layers.0.mlp.down_proj.weight"].shape == (64, 96)
    assert ("lm_head.weight" in tensors) is not tied
    assert len(tensors) == 12 + 2 + (not tied)


def test_values_have_outliers_and_norms_near_one(tmp_path: Path) -> None:
    tensors = load_tensors(write_random_checkpoint(tmp_path / "model", dtype="f32"))
    weight = tensors["model.layers.0.mlp.up_proj.weight"]
    assert 0.015 < np.median(np.abs(weight)) / 0.6745 < 0.025
    assert np.abs(weight).max() > 1
    assert np.allclose(tensors["model.norm.weight"], 1, atol=0.2)


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    def contents(name: str, seed: int) -> dict[str, bytes]:
        folder = write_random_checkpoint(tmp_path / name, seed=seed)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    first = contents("a", 1)
    assert contents("b", 1) == first
    other = contents("c", 2)
    assert {name for name in first if first[name] != other[name]} == {name for name in first if "-of-" in name}


def test_the_two_layouts_keep_the_same_facts_in_different_places(tmp_path: Path) -> None:
    old = write_random_checkpoint(tmp_path / "v4", layout="transformers4")
    new = write_random_checkpoint(tmp_path / "v5", layout="transformers5")
    config4, config5 = load_json(old / "config.json"), load_json(new / "config.json")
    assert config4["rope_theta"] == config5["rope_parameters"]["rope_theta"] == 1e6
    assert config5["rope_parameters"]["rope_type"] == "default"
    assert config4["torch_dtype"] == config5["dtype"] == "bfloat16"
    assert not {"rope_theta", "torch_dtype"} & set(config5)
    assert config5["layer_types"] == ["full_attention"] * 2
    words4, words5 = load_json(old / "tokenizer_config.json"), load_json(new / "tokenizer_config.json")
    assert words4["chat_template"] == (new / "chat_template.jinja").read_text(encoding="utf-8")
    assert not (old / "chat_template.jinja").exists()
    assert not {"chat_template", "added_tokens_decoder"} & set(words5)
    weights = [{path.name: path.read_bytes() for path in folder.glob("*.safetensors")} for folder in (old, new)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("layout", ["transformers4", "transformers5"])
def test_the_tokenizer_loads_and_leaves_rows_unused(tmp_path: Path, layout: Layout) -> None:
    folder = write_random_checkpoint(tmp_path / "model", layout=layout)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == N_TOKENS < load_json(folder / "config.json")["vocab_size"]
    text = "<|im_start|>user\nthe thing, 你好 \x00\x7f🙂<|im_end|>\n<think>"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert [i for i in ids if i in CONTROL or i in ORDINARY] == [
        list(CONTROL)[1],
        list(CONTROL)[2],
        next(iter(ORDINARY)),
    ]
    assert tokenizer.token_to_id("Ġthe") in tokenizer.encode("in the").ids


def test_overrides_set_and_remove(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model", overrides={"rms_norm_eps": 1e-6, "rope_theta": ..., "x": None})
    config = load_json(folder / "config.json")
    assert config["rms_norm_eps"] == 1e-6
    assert "rope_theta" not in config
    assert config["x"] is None
