"""Whole files, key by key and byte by byte, against llama.cpp's converter from the engine's own source package.

Both write the source's own type, so that nothing is quantized and every byte has to be the same: of each key its place, type
and value, of each tensor its shape, type and data. Three things differ: our own keys, `qwq_lite.*`; `tokenizer.ggml.pre` where
llama.cpp has another name for the same regular expression; and the tensors' order, which there is the shards', while ours is
that of llama_model_quantize.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from qwq_convert.pipeline import convert
from qwq_lite.formats.tensor_types import file_type
from scripts.checkpoint_files import added_tokens, tokenizer_config, write_json, write_safetensors
from tests import oracle
from tests.checkpoints import Dtype, Layout, random_tensors, write_random_checkpoint
from tests.parity.reference_converter import convert_as_reference
from tests.parity.templates import FAMILIES

PRE = "tokenizer.ggml.pre"
SIZE = {"hidden": 64, "ffn": 64, "kv": 32, "vocab": 151_936}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32_768}
CARD = """\
---
license: apache-2.0
license_link: https://example.org/LICENSE
language:
- en
- no
base_model: Qwen/Qwen2.5-32B-Instruct
base_model_relation: finetune
datasets:
- open-r1/OpenR1-Math-220k
tags:
- chat
- reasoning
pipeline_tag: text-generation
library_name: transformers
---

# A model
"""
SAMPLING = {
    "do_sample": True,
    "repetition_penalty": 1.05,
    "temperature": 1,
    "top_p": 0.8,
    "top_k": 20,
    "min_p": 0.05,
    "eos_token_id": [151_645, 151_643],
}


@dataclass(frozen=True)
class Case:
    """A checkpoint: the folder's name, from which much follows, and what is special about it."""

    name: str
    family: str = "QwQ-32B"
    layout: Layout = "transformers4"
    dtype: Dtype = "bf16"
    tied: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Path], object] = lambda folder: None
    pre: str = "qwen2"  # llama.cpp's


def card_and_settings(folder: Path) -> None:
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    write_json(folder / "generation_config.json", SAMPLING)


def change_json(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        data = json.loads((folder / name).read_text(encoding="utf-8"))
        change(data)
        write_json(folder / name, data)

    return changed


def begin_with_bos(tokenizer: dict[str, Any]) -> None:
    """The post-processor that transformers 4 wrote for a Llama tokenizer with add_bos_token."""
    bos = {"id": FAMILIES["R1-Distill-Qwen"].bos, "type_id": 0}
    first, second = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": bos}, first],
        "pair": [{"SpecialToken": bos}, first, {"SpecialToken": bos | {"type_id": 1}}, second],
        "special_tokens": {bos["id"]: {"id": bos["id"], "ids": [151_646], "tokens": [bos["id"]]}},
    }


def odd_tokens(folder: Path) -> None:
    """A token that only tokenizer_config.json has, one that no file numbers, roles for ordinary tokens, two templates."""

    def change(settings: dict[str, Any]) -> None:
        extra = {"content": "<extra>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        settings["added_tokens_decoder"]["151669"] = extra | {"special": False}
        settings |= {
            "pad_token": "[PAD]",
            "additional_special_tokens": ["<think>", "<|im_start|>"],
            "mask_token": "<pad>",
        }
        settings["chat_template"] = [
            {"name": "default", "template": settings["chat_template"]},
            {"name": "tool use", "template": "{{ messages }}"},
        ]

    change_json("tokenizer_config.json", change)(folder)


def own_head(folder: Path) -> None:
    """An lm_head beside a flag that says there is none."""
    change_json("config.json", lambda config: config.update(tie_word_embeddings=True))(folder)


def mixed_types(folder: Path) -> None:
    tensors = random_tensors(SIZE, 1, False, "bf16", seed=3)
    mixed = [replace(tensor, dtype="F32") if number % 3 == 0 else tensor for number, tensor in enumerate(tensors)]
    write_safetensors(folder / "model.safetensors", mixed)


CASES = [
    Case("QwQ-32B-Preview", "QwQ-32B-Preview", change=card_and_settings),
    Case("QwQ-32B", layout="transformers5", change=card_and_settings),
    Case("Qwen2.5-0.5B-Instruct", "QwQ-32B-Preview", tied=True),
    Case("Qwen2.5-Coder-1.5B", "QwQ-32B-Preview", layout="transformers5", tied=True, dtype="f16"),
    Case("DeepSeek-R1-Distill-Qwen-7B", "R1-Distill-Qwen"),
    Case(
        "DeepSeek-R1-Distill-Qwen-1.5B",
        "R1-Distill-Qwen",
        change=change_json("tokenizer.json", begin_with_bos),
        pre="deepseek-r1-qwen",
    ),
    Case("Qwen2.5-32B-Instruct-128k", config={"rope_scaling": {"type": "yarn", **YARN}}),
    Case(
        "my own QwQ",
        layout="transformers5",
        config={
            "rope_parameters": {
                "rope_theta": 1e6,
                "rope_type": "yarn",
                "factor": 2.5,
                "attention_factor": 1.1,
                "beta_fast": 32,
                "beta_slow": 1,
            }
        },
    ),
    Case("linear-v2", config={"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "sliding_window": None}),
    Case("own-head", dtype="f16", change=own_head),
    Case(
        "odd",
        dtype="f32",
        config={"head_dim": 16, "use_sliding_window": True, "num_key_value_heads": 2},
        change=odd_tokens,
    ),
    Case("mixed", config={"_name_or_path": "someone/QwQ-32B-abliterated-v1.1"}, change=mixed_types),
]


def write_case(case: Case, folder: Path) -> Path:
    """A tiny random model with the real vocabulary: llama.cpp knows a pre-tokenizer by the ids of a sample."""
    family = FAMILIES[case.family]
    sizes: dict[str, Any] = {
        "n_layer": 1, "hidden": SIZE["hidden"], "ffn": SIZE["ffn"], "n_vocab": SIZE["vocab"], "shards": 1,
    }  # fmt: skip
    ends = {"bos_token_id": 151_643, "eos_token_id": 151_645, "pad_token_id": ...}
    write_random_checkpoint(
        folder, **sizes, tied=case.tied, dtype=case.dtype, layout=case.layout, overrides={**ends, **case.config}
    )
    tokenizer = json.loads(oracle.qwen_tokenizer_json().read_text(encoding="utf-8"))
    added = added_tokens(family.control, family.ordinary)
    tokenizer["added_tokens"] = [{"id": key, **token} for key, token in added.items()]
    settings = tokenizer_config(family.control, family.ordinary, template=family.template(), n_ctx=32_768)
    settings |= {"bos_token": family.bos, "eos_token": family.eos, "pad_token": family.eos}
    settings |= {"add_bos_token": family.bos is not None, "additional_special_tokens": []}
    if family.bos is not None:
        settings |= {"tokenizer_class": "LlamaTokenizerFast", "legacy": True, "add_eos_token": False}
        del settings["added_tokens_decoder"]
    if case.layout == "transformers5":
        tokenizer["model"]["merges"] = [merge.split(" ") for merge in tokenizer["model"]["merges"]]
        del settings["added_tokens_decoder"]
        (folder / "chat_template.jinja").write_bytes(settings.pop("chat_template").encode())
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", settings)
    case.change(folder)
    return folder


@dataclass(frozen=True)
class Parts:
    """A GGUF file in pieces. keys: the bytes of each one's type and value; tensors: of each shape and type, and its data."""

    keys: dict[str, bytes]
    tensors: dict[str, tuple[bytes, bytes]]


class Cuts:
    """Where the pieces of a file lie. A reader that decodes them would hide the types."""

    WIDTHS: ClassVar = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    STRING, ARRAY, INFO_TAIL = 8, 9, 4 + 8

    def __init__(self, whole: bytes) -> None:
        self.whole = whole

    def number(self, form: str, at: int) -> int:
        return int(struct.unpack_from(f"<{form}", self.whole, at)[0])

    def text(self, at: int) -> tuple[str, int]:
        """A string and where it ends."""
        end = at + 8 + self.number("Q", at)
        return self.whole[at + 8 : end].decode(), end

    def value_end(self, kind: int, at: int) -> int:
        if kind == self.STRING:
            return at + 8 + self.number("Q", at)
        if kind != self.ARRAY:
            return at + self.WIDTHS[kind]
        inner, n_values, at = self.number("I", at), self.number("Q", at + 4), at + 12
        for _ in range(n_values):
            at = self.value_end(inner, at)
        return at


def parts(path: Path) -> Parts:
    """Cut a file into its keys and tensors. Source: ggml/docs/gguf.md"""
    cuts, at = Cuts(path.read_bytes()), 24
    keys, infos = {}, []
    for _ in range(cuts.number("Q", 16)):
        name, start = cuts.text(at)
        at = cuts.value_end(cuts.number("I", start), start + 4)
        assert name not in keys
        keys[name] = cuts.whole[start:at]
    for _ in range(cuts.number("Q", 8)):
        name, start = cuts.text(at)
        at = start + 4 + 8 * cuts.number("I", start) + Cuts.INFO_TAIL
        infos.append((cuts.number("Q", at - 8), name, cuts.whole[start : at - 8]))
    data = cuts.whole[-(-at // 32) * 32 :]
    infos.sort()
    ends = [*(offset for offset, _, _ in infos[1:]), len(data)]
    return Parts(keys, {name: (info, data[offset:end]) for (offset, name, info), end in zip(infos, ends, strict=True)})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Case -> our file and llama.cpp's."""
    room = tmp_path_factory.mktemp("metadata")
    calls, found = [], {}
    for case in CASES:
        folder = write_case(case, room / case.name)
        ours, theirs = room / f"{case.name}.ours.gguf", room / f"{case.name}.theirs.gguf"
        convert(folder, file_type(case.dtype), ours)
        calls.append((folder, theirs, case.dtype))
        found[case.name] = ours, theirs
    convert_as_reference(calls)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_byte_is_llama_cpps(case: Case, files: dict[str, tuple[Path, Path]]) -> None:
    ours, theirs = (parts(path) for path in files[case.name])
    own = {name for name in ours.keys if name.startswith("qwq_lite.")}
    assert [name for name in ours.keys if name not in own] == list(theirs.keys)
    differ = {name for name in theirs.keys if ours.keys[name] != theirs.keys[name]}
    assert differ == ({PRE} if case.pre != "qwen2" else set()), {name: ours.keys[name][:200] for name in differ}
    assert theirs.keys[PRE].endswith(case.pre.encode())
    assert ours.keys[PRE].endswith(b"qwen2")
    assert {name: info for name, (info, _) in ours.tensors.items()} == {
        name: info for name, (info, _) in theirs.tensors.items()
    }
    assert not [name for name in theirs.tensors if ours.tensors[name] != theirs.tensors[name]]


def test_a_snapshot_in_the_hubs_cache_is_named_for_its_repository(tmp_path: Path) -> None:
    """llama.cpp takes a folder's name, here a revision; ours has what it derives where config.json names the repository."""
    case = replace(CASES[0], config={"_name_or_path": "Qwen/QwQ-32B-Preview"})
    theirs = write_case(case, tmp_path / "5a1e2f")
    snapshot = tmp_path / "models--Qwen--QwQ-32B-Preview" / "snapshots" / "5a1e2f"
    shutil.copytree(theirs, snapshot)
    change_json("config.json", lambda config: config.pop("_name_or_path"))(snapshot)
    convert(snapshot, file_type("bf16"), tmp_path / "ours.gguf")
    convert_as_reference([(theirs, tmp_path / "theirs.gguf", "bf16")])
    found, expected = parts(tmp_path / "ours.gguf").keys, parts(tmp_path / "theirs.gguf").keys
    assert found["general.organization"].endswith(b"Qwen")
    assert found["general.name"].endswith(b"QwQ 32B Preview")
    assert {name: value for name, value in found.items() if name in expected} == expected
