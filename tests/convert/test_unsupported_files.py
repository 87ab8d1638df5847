"""What training and downloading leave in a folder: named for what it is, and skipped where llama.cpp's converter skips it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from qwq_convert.pipeline import convert
from qwq_lite.errors import CheckpointError
from qwq_lite.formats.tensor_types import file_type
from tests.checkpoints import write_random_checkpoint
from tests.convert.broken import FIRST, HEAD, INDEX, SHARD, both, change_header, remove, rename, write
from tests.convert.keys import read

Change = Callable[[Path], None]
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def add_tensor(name: str, dtype: str) -> Change:
    """One more tensor in a shard of its own, listed in the index."""

    def change(folder: Path) -> None:
        save_file({name: np.zeros(32, dtype)}, folder / "extra.safetensors")
        index = json.loads((folder / INDEX).read_text("utf-8"))
        index["weight_map"][name] = "extra.safetensors"
        (folder / INDEX).write_text(json.dumps(index), "utf-8")

    return change


def prefix(word: str) -> Change:
    """Every name of SHARD with a prefix, and no index, as a state that was saved by hand has it."""

    def put(entries: dict[str, object]) -> None:
        for name in [name for name in entries if name != "__metadata__"]:
            entries[word + name] = entries.pop(name)

    return both(change_header(put), remove(INDEX))


def adapter_settings(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/QwQ-32B"}', "utf-8")


NAMED: dict[str, tuple[Change, str, str]] = {
    "TRL's value head": (add_tensor("v_head.summary.weight", "float32"), "v_head.summary.weight", "pretrained_model"),
    "a rating head": (add_tensor("score.weight", "float32"), "score.weight", "rates texts"),
    "PEFT's base layer": (rename(HEAD, "lm_head.base_layer.weight"), "lm_head.base_layer.weight", "merge_and_unload"),
    "PEFT's matrices": (
        add_tensor(Q_PROJ.replace("weight", "lora_A.default.weight"), "float32"), "lora_A.default.weight", "merge_and_unload",
    ),
    "PEFT's own names": (prefix("base_model.model."), "base_model.model.", "merge_and_unload"),
    "torch.compile": (prefix("_orig_mod."), "_orig_mod.", "torch.compile"),
    "several devices": (prefix("module."), "module.", "model.module.save_pretrained"),
    "8-bit scales": (add_tensor(Q_PROJ.replace("weight", "SCB"), "float32"), "q_proj.SCB", "bitsandbytes"),
    "8-bit weights": (
        both(
            rename(HEAD, "lm_head.SCB"),
            change_header(lambda entries: entries["model.norm.weight"].update(dtype="I16")),
        ),
        "lm_head.SCB", "bitsandbytes",
    ),
    "4-bit blocks": (add_tensor(Q_PROJ + ".absmax", "float32"), "weight.absmax", "bitsandbytes"),
    "GPTQ's integers": (add_tensor(Q_PROJ.replace("weight", "qzeros"), "int32"), "q_proj.qzeros", "GPTQ"),
    "FP8's scales": (add_tensor(Q_PROJ + "_scale_inv", "float32"), "weight_scale_inv", "quantized already"),
    "an adapter's weights beside the model": (
        both(adapter_settings, write("adapter_model.safetensors", b"")), "adapter_config.json", "merge it into Qwen/QwQ-32B",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMED)
def test_what_training_leaves_is_named(case: str, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "m")
    change, name, words = NAMED[case]
    change(folder)
    with pytest.raises(CheckpointError) as refused:
        read(folder)
    assert name in str(refused.value) and words in str(refused.value)


SKIPPED: dict[str, Change] = {
    "F64 frequencies of a layer": add_tensor("model.layers.0.self_attn.rotary_emb.inv_freq", "float64"),
    "F64 frequencies of the model": add_tensor("model.rotary_emb.inv_freq", "float64"),
    "F32 frequencies": add_tensor("model.layers.0.self_attn.rotary_emb.inv_freq", "float32"),
    "a mask of truth values": add_tensor("model.layers.0.attention.bias", "bool"),
    "the mask's value": add_tensor("model.layers.0.attention.masked_bias", "float64"),
    "settings of a merged adapter": adapter_settings,
}


@pytest.mark.parametrize("case", SKIPPED)
def test_what_llama_cpp_skips_changes_no_byte(case: str, tmp_path: Path) -> None:
    folder, kind = write_random_checkpoint(tmp_path / "m"), file_type("Q8_0")
    expected = convert(folder, kind, tmp_path / "before.gguf")
    SKIPPED[case](folder)
    done = convert(folder, kind, tmp_path / "after.gguf")
    assert (tmp_path / "after.gguf").read_bytes() == (tmp_path / "before.gguf").read_bytes()
    new = set(done.conversion.notices) - set(expected.conversion.notices)
    assert [str(folder / "adapter_config.json") in notice for notice in new] == [True] * (
        case == "settings of a merged adapter"
    )


@pytest.mark.parametrize("shards", [2, 5])
def test_shards_without_an_index_are_the_same_checkpoint(shards: int, tmp_path: Path) -> None:
    folder, kind = write_random_checkpoint(tmp_path / "m", shards=shards), file_type("Q8_0")
    convert(folder, kind, tmp_path / "before.gguf")
    (folder / INDEX).unlink()
    convert(folder, kind, tmp_path / "after.gguf")
    assert (tmp_path / "after.gguf").read_bytes() == (tmp_path / "before.gguf").read_bytes()


def test_one_numbered_shard_is_a_whole_model(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "m", shards=1)
    expected = read(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    assert read(folder) == expected


def copy_shard(old: str, new: str) -> Change:
    def change(folder: Path) -> None:
        shutil.copy(folder / old, folder / new)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (remove(SHARD), f"{SHARD}: the shard is missing"),
        (remove(FIRST), f"{FIRST}: the shard is missing"),
        (copy_shard(SHARD, "model-00003-of-00002.safetensors"), "model-00003-of-00002.safetensors: .* is none of 2"),
        (copy_shard(SHARD, "model-00001-of-00003.safetensors"), "shards of 2 and of 3 lie beside each other"),
        (copy_shard(FIRST, SHARD), "is in model-00001-of-00002.safetensors too"),
    ],
)
def test_shards_without_an_index_must_be_all_of_one_model(change: Change, words: str, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "m")
    (folder / INDEX).unlink()
    change(folder)
    with pytest.raises(CheckpointError, match=words):
        read(folder)


def test_a_repository_in_the_hubs_cache_names_its_snapshot(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "models--Qwen--QwQ-32B" / "snapshots" / "abc")
    with pytest.raises(CheckpointError, match=r"Hub's cache.*snapshots.abc"):
        read(folder.parent.parent)


def test_a_tensor_that_is_skipped_is_not_looked_at(tmp_path: Path) -> None:
    """The index may lack it, and it may be there without a shard's knowing."""
    folder = write_random_checkpoint(tmp_path / "m")
    expected = read(folder)
    index = json.loads((folder / INDEX).read_text("utf-8"))
    index["weight_map"]["model.rotary_emb.inv_freq"] = SHARD
    (folder / INDEX).write_text(json.dumps(index), "utf-8")
    with safe_open(folder / SHARD, framework="numpy") as shard:
        assert "model.rotary_emb.inv_freq" not in shard.keys()  # noqa: SIM118 - no mapping
    assert read(folder) == expected
