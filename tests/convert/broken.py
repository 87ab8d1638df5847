"""Ways to break a checkpoint, and the words that a refusal must have: a class of damage a line.

A change takes the folder of a sound checkpoint. Those of the shards are made to SHARD, whose last tensor is HEAD.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"
HEAD, INDEX, SHARD = "lm_head.weight", "model.safetensors.index.json", "model-00002-of-00002.safetensors"
FIRST = "model-00001-of-00002.safetensors"
EXTRA = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
Change = tuple[Callable[[Path], None], list[str]]


def change_json(name: str, **changes: Any) -> Callable[[Path], None]:
    """A change to one of the folder's JSON files; a value of ... removes the field."""

    def change(folder: Path) -> None:
        path = folder / name
        data = json.loads(path.read_text(encoding="utf-8")) | changes
        path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}), encoding="utf-8")

    return change


def write(name: str, data: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return change


def cut(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-10])

    return change


def extend(name: str, data: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes() + data)

    return change


def remove(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def change_header(change_entries: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A change to the JSON header of SHARD; the data behind it stays."""

    def change(folder: Path) -> None:
        whole = (folder / SHARD).read_bytes()
        end = 8 + int.from_bytes(whole[:8], "little")
        entries = json.loads(whole[8:end])
        change_entries(entries)
        write_header(json.dumps(entries))(folder)

    return change


def write_header(text: str) -> Callable[[Path], None]:
    """Another header for SHARD, as it stands here."""

    def change(folder: Path) -> None:
        whole = (folder / SHARD).read_bytes()
        data = whole[8 + int.from_bytes(whole[:8], "little") :]
        header = text.encode()
        header += b" " * (-len(header) % 8)
        (folder / SHARD).write_bytes(len(header).to_bytes(8, "little") + header + data)

    return change


def in_header(**fields: Any) -> Callable[[Path], None]:
    """Other fields for lm_head.weight in the header of SHARD."""
    return change_header(lambda entries: entries[HEAD].update(fields))


def rename(old: str, new: str) -> Callable[[Path], None]:
    """Another name for a tensor, in its shard and in the index."""

    def change(folder: Path) -> None:
        change_header(lambda entries: entries.update({new: entries.pop(old)}))(folder)
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        index["weight_map"][new] = index["weight_map"].pop(old)
        (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")

    return change


def change_tokenizer(change_file: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        change_file(data)
        (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")

    return change


def twice_in_header(folder: Path) -> None:
    """One name with two entries that agree: safetensors' own library sees nothing."""
    whole = (folder / SHARD).read_bytes()
    text = whole[8 : 8 + int.from_bytes(whole[:8], "little")].decode().strip()
    entry = json.dumps(json.loads(text)[HEAD])
    write_header(f'{text[:-1]}, "{HEAD}": {entry}}}')(folder)


def swap_offsets(entries: dict[str, Any]) -> None:
    entries[HEAD]["data_offsets"].reverse()


def overlap(entries: dict[str, Any]) -> None:
    first, second = sorted((entry for name, entry in entries.items() if "layernorm" in name), key=str)[:2]
    second["data_offsets"] = first["data_offsets"]


def leave_gap(entries: dict[str, Any]) -> None:
    del entries[HEAD]


def give_ids(**ids: int) -> Callable[[Path], None]:
    """Other ids for tokens of the base vocabulary."""
    return change_tokenizer(lambda data: data["model"]["vocab"].update(ids))


def hub_page(name: str) -> Callable[[Path], None]:
    return write(name, b"<!doctype html><html>not found</html>")


SHARDS: dict[str, Change] = {
    "missing": (remove(SHARD), [SHARD, "weight_map"]),
    "both missing": (remove(INDEX, FIRST, SHARD), [INDEX, "model.safetensors"]),
    "cut": (cut(SHARD), [SHARD]),
    "empty": (write(SHARD, b""), [SHARD, "0 bytes"]),
    "short": (write(SHARD, b"\x10\0\0"), [SHARD, "3 bytes"]),
    "header of 2**60 bytes": (write(SHARD, (1 << 60).to_bytes(8, "little") + b"{}"), [SHARD, str(1 << 60)]),
    "header of all ones": (write(SHARD, b"\xff" * 64), [SHARD]),
    "header longer than the file": (write(SHARD, b"\x09" + bytes(7) + b"{}"), [SHARD]),
    "header is no JSON": (write_header("{"), [SHARD]),
    "header is a list": (write_header("[]"), [SHARD]),
    "header nested too deep": (write_header("[" * 100_000), [SHARD]),
    "header of no text": (write(SHARD, b"\x02" + bytes(7) + b"\xff\xfe"), [SHARD]),
    "one name twice": (twice_in_header, [SHARD, HEAD, "twice"]),
    "entry is a number": (change_header(lambda entries: entries.update({HEAD: 5})), [SHARD]),
    "reversed offsets": (change_header(swap_offsets), [SHARD]),
    "overlapping": (change_header(overlap), [SHARD]),
    "gap": (change_header(leave_gap), [SHARD]),
    "negative shape": (in_header(shape=[-1, 256]), [SHARD]),
    "shape that is not its bytes": (in_header(shape=[320, 255]), [SHARD]),
    "shape beyond 64 bits": (in_header(shape=[1 << 40, 1 << 40]), [SHARD]),
    "shape turned around": (in_header(shape=[256, 320]), [SHARD, HEAD, "[256, 320]"]),
    "unknown dtype": (in_header(dtype="F7"), [SHARD]),
    "integers": (in_header(dtype="I16"), [SHARD, HEAD, "I16", "BF16"]),
    "doubles": (
        in_header(dtype="F64", shape=[160, 128]),
        [SHARD, HEAD, "F64", "save it as one of them"],
    ),
    "trailing data": (extend(SHARD, b"\0"), [SHARD]),
    "LFS pointer": (write(SHARD, POINTER), [SHARD, "LFS", "git lfs pull"]),
    "web page": (hub_page(SHARD), [SHARD, "web page"]),
    "pickle, zipped": (write(SHARD, b"PK\x03\x04" + bytes(60)), [SHARD, "pickle"]),
    "pickle": (write(SHARD, b"\x80\x02}q\0." + bytes(60)), [SHARD, "pickle"]),
    "tensor named for a path": (rename(HEAD, "../../etc/passwd"), [SHARD, "../../etc/passwd"]),
    "tensor named in two lines": (rename(HEAD, "a\nb" + "c" * 1000), [SHARD, "a\\nb"]),
    "tensor of another model": (rename(HEAD, "model.layers.0.mlp.experts.weight"), [SHARD, "experts"]),
    "tensor of a layer too many": (rename(HEAD, "model.layers.2.mlp.up_proj.weight"), [SHARD, "layers.2."]),
    "index is no JSON": (write(INDEX, b"{"), [INDEX, "JSON"]),
    "index is a pointer": (write(INDEX, POINTER), [INDEX, "LFS"]),
    "index is a page": (hub_page(INDEX), [INDEX, "web page"]),
    "index without a map": (change_json(INDEX, weight_map=...), [INDEX, "weight_map"]),
    "index with an empty map": (change_json(INDEX, weight_map={}), [INDEX, "weight_map"]),
    "index of numbers": (change_json(INDEX, weight_map={HEAD: 5}), [INDEX, "weight_map"]),
    "index with a name twice": (
        write(INDEX, f'{{"weight_map": {{"{HEAD}": "{SHARD}", "{HEAD}": "{FIRST}"}}}}'.encode()),
        [INDEX, HEAD, "twice"],
    ),
    "index out of the folder": (change_json(INDEX, weight_map={HEAD: "../x.safetensors"}), [INDEX, "../x.safetensors"]),
    "index to the root": (change_json(INDEX, weight_map={HEAD: "/x.safetensors"}), [INDEX, "/x.safetensors"]),
    "index to a pickle": (change_json(INDEX, weight_map={HEAD: "x.bin"}), [INDEX, "x.bin"]),
    "index that lacks a tensor": (change_json(INDEX, weight_map={HEAD: SHARD}), [SHARD, INDEX, "does not list"]),
    "shard that lacks a tensor": (rename(HEAD, "x.weight"), [SHARD, "x.weight"]),
}
CONFIG: dict[str, Change] = {
    "no JSON": (write("config.json", b"{"), ["config.json", "JSON"]),
    "a list": (write("config.json", b"[]"), ["config.json", "list"]),
    "a pointer": (write("config.json", POINTER), ["config.json", "LFS"]),
    "no text": (write("config.json", b"\xff\xfe{}"), ["config.json", "UTF-8"]),
    "a key twice": (write("config.json", b'{"hidden_size": 1, "hidden_size": 2}'), ["config.json", "hidden_size"]),
    "nested too deep": (write("config.json", b"[" * 100_000), ["config.json"]),
    "no rope base": (change_json("config.json", rope_theta=...), ["config.json", "rope_theta"]),
    "field missing": (change_json("config.json", hidden_size=...), ["config.json", "hidden_size"]),
    "field of a wrong type": (change_json("config.json", num_hidden_layers="two"), ["num_hidden_layers", "'two'"]),
    "field that is true": (change_json("config.json", num_hidden_layers=True), ["num_hidden_layers", "True"]),
    "field that is no number": (change_json("config.json", rms_norm_eps=float("nan")), ["rms_norm_eps", "nan"]),
    "heads that do not divide": (change_json("config.json", num_key_value_heads=3), ["num_key_value_heads"]),
    "columns that do not divide": (change_json("config.json", hidden_size=255), ["hidden_size", "255"]),
    "heads of another size": (change_json("config.json", head_dim=32), ["head_dim", "64"]),
    "odd heads": (change_json("config.json", hidden_size=12, num_key_value_heads=4), ["head_dim", "even"]),
    "part of a head turned": (change_json("config.json", partial_rotary_factor=0.5), ["partial_rotary_factor"]),
    "a layer that is not there": (change_json("config.json", num_hidden_layers=3), ["blk.2."]),
    "a layer too many": (change_json("config.json", num_hidden_layers=1), [SHARD, "layers.1."]),
    "other columns": (change_json("config.json", intermediate_size=513), ["[512, 256]", "[513, 256]"]),
    "other rows": (change_json("config.json", vocab_size=321), ["[320, 256]", "[321, 256]"]),
    "another activation": (change_json("config.json", hidden_act="gelu"), ["config.json", "hidden_act"]),
    "rope is a word": (change_json("config.json", rope_parameters={"full_attention": "x"}), ["full_attention"]),
    "rope is a list": (change_json("config.json", rope_scaling=[1]), ["config.json", "rope_scaling"]),
    "rope of another kind": (change_json("config.json", rope_scaling={"type": "dynamic"}), ["rope_type", "dynamic"]),
    "yarn without its factor": (change_json("config.json", rope_scaling={"type": "yarn"}), ["factor"]),
    "tied is a word": (change_json("config.json", tie_word_embeddings="no"), ["tie_word_embeddings", "no"]),
    "special id beyond the rows": (change_json("config.json", bos_token_id=400), ["bos_token_id", "400"]),
    "sampling is no JSON": (write("generation_config.json", b"?"), ["generation_config.json", "JSON"]),
    "temperature is a word": (change_json("generation_config.json", temperature="hot"), ["temperature", "'hot'"]),
    "top_k is no integer": (change_json("generation_config.json", top_k=2.5), ["top_k", "2.5", "integer"]),
    "absurd penalty": (change_json("generation_config.json", repetition_penalty=10**400), ["repetition_penalty"]),
    "model card of no text": (write("README.md", b"\xff\xfe"), ["README.md"]),
    "model card of no YAML": (write("README.md", b"---\na: [\n---\n"), ["README.md"]),
    "model card with a number": (write("README.md", b"---\nversion: 1.5\n---\n"), ["README.md", "version", "1.5"]),
    "model card with nested tags": (
        write("README.md", b"---\na: &a [x, x]\nb: &b [*a, *a]\ntags: [*b, *b]\n---\n"),
        ["README.md", "tags"],
    ),
}
TOKENIZER: dict[str, Change] = {
    "missing": (remove("tokenizer.json"), ["tokenizer.json"]),
    "a page": (hub_page("tokenizer.json"), ["tokenizer.json", "web page"]),
    "a token twice": (
        change_tokenizer(lambda data: data["added_tokens"].append({"id": 273, "content": "h", **EXTRA})),
        ["tokenizer.json", "'h'", "273"],
    ),
    "a key twice": (
        write("tokenizer.json", b'{"model": {"vocab": {"a": 0, "a": 1}}}'),
        ["tokenizer.json", "occurs twice"],
    ),
    "an id twice": (give_ids(he=3), ["tokenizer.json", "id 3 "]),
    "an id beyond the rows": (
        change_tokenizer(lambda data: data["added_tokens"].append({"id": 10**6, "content": "<x>", **EXTRA})),
        ["tokenizer.json", "1000000"],
    ),
    "a negative id": (give_ids(he=-1), ["tokenizer.json", "-1"]),
    "an id that is a word": (
        change_tokenizer(lambda data: data["model"]["vocab"].update(he="x")),
        ["tokenizer.json", "'he'", "'x'"],
    ),
    "a merge of unknown pieces": (
        change_tokenizer(lambda data: data["model"]["merges"].append("zz h")),
        ["tokenizer.json", "merges[12]", "zz"],
    ),
    "a merge into nothing": (
        change_tokenizer(lambda data: data["model"]["merges"].append(["z", "h"])),
        ["tokenizer.json", "merges[12]", "zh"],
    ),
    "a merge of three": (
        change_tokenizer(lambda data: data["model"]["merges"].append(["h", "e", "r"])),
        ["tokenizer.json", "merges[12]"],
    ),
    "no merges": (change_tokenizer(lambda data: data["model"].update(merges=[])), ["tokenizer.json", "merges"]),
    "no vocabulary": (change_tokenizer(lambda data: data["model"].update(vocab=[])), ["tokenizer.json", "vocab"]),
    "unknown pre-tokenizer": (change_json("tokenizer.json", pre_tokenizer={"type": "Whitespace"}), ["pre_tokenizer"]),
    "another regex": (
        change_tokenizer(lambda data: data["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="x+")),
        ["pre_tokenizer", "x+", "convert_hf_to_gguf"],
    ),
    "removed instead of split": (
        change_tokenizer(lambda data: data["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed")),
        ["pre_tokenizer"],
    ),
    "split where it does not match": (
        change_tokenizer(lambda data: data["pre_tokenizer"]["pretokenizers"][0].update(invert=True)),
        ["pre_tokenizer"],
    ),
    "GPT-2's regex too": (
        change_tokenizer(lambda data: data["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True)),
        ["pre_tokenizer"],
    ),
    "unknown normalizer": (change_json("tokenizer.json", normalizer={"type": "NFKC"}), ["normalizer", "NFKC"]),
    "normalizer is a word": (change_json("tokenizer.json", normalizer="Lowercase"), ["normalizer", "Lowercase"]),
    "unknown post-processor": (
        change_json("tokenizer.json", post_processor={"type": "BertProcessing"}),
        ["post_processor", "BertProcessing"],
    ),
    "another tokenizer": (change_json("tokenizer.json", model={"type": "Unigram"}), ["model.type", "Unigram"]),
    "bytes that fall back": (
        change_tokenizer(lambda data: data["model"].update(byte_fallback=True)),
        ["model.byte_fallback"],
    ),
    "added tokens are a number": (change_json("tokenizer.json", added_tokens=5), ["tokenizer.json", "added_tokens"]),
    "added token without text": (
        change_json("tokenizer.json", added_tokens=[{"id": 268}]),
        ["tokenizer.json", "added_tokens", "268"],
    ),
    "decoder is a list": (
        change_json("tokenizer_config.json", added_tokens_decoder=[1]),
        ["tokenizer_config.json", "added_tokens_decoder"],
    ),
    "decoder of words": (
        change_json("tokenizer_config.json", added_tokens_decoder={"273": "<x>"}),
        ["tokenizer_config.json", "added_tokens_decoder"],
    ),
    "decoder with an absurd id": (
        change_json("tokenizer_config.json", added_tokens_decoder={"9" * 5000: {"content": "<x>"}}),
        ["tokenizer_config.json", "added_tokens_decoder"],
    ),
    "decoder beyond the rows": (
        change_json("tokenizer_config.json", added_tokens_decoder={"400": {"content": "<x>"}}),
        ["tokenizer_config.json", "<x>", "400"],
    ),
    "decoder with another token's id": (
        change_json("tokenizer_config.json", added_tokens_decoder={"3": {"content": "<x>"}}),
        ["tokenizer_config.json", "id 3 ", "<x>"],
    ),
    "older added tokens beyond the rows": (
        both(
            change_json("tokenizer_config.json", added_tokens_decoder=...),
            write("added_tokens.json", b'{"<x>": 400}'),
        ),
        ["added_tokens.json", "<x>", "400"],
    ),
    "older added tokens of words": (
        both(
            change_json("tokenizer_config.json", added_tokens_decoder=...),
            write("added_tokens.json", b'{"<x>": "y"}'),
        ),
        ["added_tokens.json", "<x>", "'y'"],
    ),
    "a role for no Unicode": (
        change_json("tokenizer_config.json", pad_token="\ud800"),
        ["tokenizer_config.json", "Unicode"],
    ),
    "more roles than rows": (
        change_json("tokenizer_config.json", additional_special_tokens=[f"<{n}>" for n in range(50)]),
        ["tokenizer_config.json", "id 320"],
    ),
    "template with a lone surrogate": (change_json("tokenizer_config.json", chat_template="\ud800"), ["chat_template"]),
    "template that is a number": (change_json("tokenizer_config.json", chat_template=5), ["chat_template", "int"]),
    "named template that is no text": (
        change_json("tokenizer_config.json", chat_template=[{"name": "default", "template": None}]),
        ["chat_template", "default"],
    ),
    "template file of no text": (
        both(change_json("tokenizer_config.json", chat_template=...), write("chat_template.jinja", b"\xff")),
        ["chat_template.jinja", "UTF-8"],
    ),
}
QUANTIZED = {"awq": "AWQ", "gptq": "GPTQ", "fp8": "FP8", "bitsandbytes": "bitsandbytes", "hqq": "hqq"}
NEAR = {
    "LlamaForCausalLM": "DeepSeek-R1-Distill-Llama",
    "Qwen2MoeForCausalLM": "experts",
    "Qwen2VLForConditionalGeneration": "sees",
    "Qwen2_5_VLForConditionalGeneration": "sees",
    "Qwen3ForCausalLM": "Qwen3",
    "GPT2LMHeadModel": "convert_hf_to_gguf",
}
NOT_OURS: dict[str, Change] = {
    **{
        name: (change_json("config.json", architectures=[name]), ["config.json", "architectures", name, word])
        for name, word in NEAR.items()
    },
    "no architecture": (change_json("config.json", architectures=...), ["config.json", "architectures", "None"]),
    "architectures of no list": (change_json("config.json", architectures={"a": 1}), ["config.json", "architectures"]),
    **{
        f"quantized by {method}": (
            both(change_json("config.json", quantization_config={"quant_method": method}), in_header(dtype="I16")),
            ["quantization_config", name, "original checkpoint"],
        )
        for method, name in QUANTIZED.items()
    },
    "quantized by NVIDIA's tool": (
        write("hf_quant_config.json", b'{"quantization": {"quant_algo": "NVFP4"}}'),
        ["hf_quant_config.json", "original checkpoint"],
    ),
    "code of its own": (
        change_json("config.json", auto_map={"AutoModelForCausalLM": "modeling.Mine"}),
        ["config.json", "auto_map", "never run"],
    ),
    "embedding model": (change_json("config.json", is_causal=False), ["is_causal", "embedding"]),
    "sentence transformer": (write("modules.json", b"[]"), ["modules.json", "embedding"]),
    "adapter": (
        both(
            remove("config.json", INDEX, FIRST, SHARD),
            write("adapter_config.json", b'{"base_model_name_or_path": "Qwen/QwQ-32B"}'),
            write("adapter_model.safetensors", b""),
        ),
        ["adapter_config.json", "merge", "Qwen/QwQ-32B"],
    ),
    "adapter beside its model": (write("adapter_model.safetensors", b""), ["adapter_model.safetensors", "merge"]),
    "pickles": (
        both(remove(INDEX, FIRST, SHARD), write("pytorch_model.bin", b"x")),
        ["pytorch_model.bin", "never opened"],
    ),
    "GGUF files": (
        both(remove("config.json", INDEX, FIRST, SHARD), write("a.gguf", b"GGUF")),
        ["GGUF", "qwq-lite chat", "a.gguf"],
    ),
    "GGUF files with a config": (
        both(remove(INDEX, FIRST, SHARD), write("a.gguf", b"GGUF")),
        ["GGUF", "qwq-lite chat", "a.gguf"],
    ),
}
BROKEN = {
    f"{part}: {name}": case
    for part, cases in {"shards": SHARDS, "config": CONFIG, "tokenizer": TOKENIZER, "not ours": NOT_OURS}.items()
    for name, case in cases.items()
}
ABSURD: dict[str, Callable[[Path], None]] = {
    "rows": change_json("config.json", vocab_size=1 << 31),
    "the most rows": change_json("config.json", vocab_size=1 << 21),
    "columns": change_json("config.json", hidden_size=1 << 40),
    "the most columns": change_json("config.json", hidden_size=1 << 24, intermediate_size=1 << 24),
    "layers": change_json("config.json", num_hidden_layers=1 << 40),
    "the most layers": change_json("config.json", num_hidden_layers=512),
    "heads": change_json("config.json", num_attention_heads=1 << 40),
    "an integer of a thousand digits": change_json("config.json", num_hidden_layers=10**1000),
    "a header of 2**60 bytes": write(SHARD, (1 << 60).to_bytes(8, "little") + b"{}"),
    "a header of 100 MB": lambda folder: grow(folder / SHARD, (100_000_000).to_bytes(8, "little"), 101_000_000),
    "a config of 100 MB": lambda folder: grow(folder / "config.json", b"", 100_000_000),
    "a tokenizer of 100 MB": lambda folder: grow(folder / "tokenizer.json", b"", 100_000_000),
    "a model card of 100 MB": lambda folder: grow(folder / "README.md", b"---\n", 100_000_000),
}


def grow(path: Path, start: bytes, n_bytes: int) -> None:
    """A file of zeros behind `start`; on most systems they take no room."""
    path.write_bytes(start)
    os.truncate(path, n_bytes)
