"""Small random checkpoints of QwQ's architecture, for tests that need weights and no answers.

    folder = write_random_checkpoint(tmp_path / "model", n_layer=2, layout="transformers5")

They have what a converter may stumble over: both layouts of Hugging Face's files, unused rows after the last token,
added tokens of both kinds, outliers among the weights. Every value follows from the seed and the tensor's name, so
the same call writes the same bytes. The writer is the demo checkpoint's, `scripts/checkpoint_files.py`.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np

from qwq_convert.pipeline import convert
from qwq_lite.formats.tensor_types import file_type
from scripts.checkpoint_files import (
    Floats,
    Tensor,
    byte_symbols,
    tokenizer_config,
    tokenizer_json,
    write_json,
    write_safetensors,
    write_shards,
)

Layout = Literal["transformers4", "transformers5"]
Dtype = Literal["bf16", "f16", "f32"]
Script = Callable[[int], Mapping[int, float]]

MERGES = ("Ġ t", "h e", "i n", "e r", "a n", "Ġt he", "in g", "r e", "Ġ Ġ", "Ċ Ċ", "o n", "ä ½")
TOKENS = (*byte_symbols(), *(merge.replace(" ", "") for merge in MERGES))
CONTROL = {len(TOKENS) + n: text for n, text in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))}
ORDINARY = {len(TOKENS) + len(CONTROL) + n: text for n, text in enumerate(("<think>", "</think>"))}
N_TOKENS = len(TOKENS) + len(CONTROL) + len(ORDINARY)
END_OF_TEXT, _, END_OF_TURN = CONTROL
N_CTX = 4096
TEMPLATE = """\
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n' }}
{%- endif %}
"""
PLAIN_TEMPLATE = TEMPLATE.replace("<think>\\n", "")
LETTERS = [
    ord(letter) for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
]  # ids of these bytes
BREAK = TOKENS.index("ĊĊ")  # two newlines
OFF = -50.0  # the logit of what is never drawn


def write_random_checkpoint(
    folder: Path,
    *,
    n_layer: int = 2,
    hidden: int = 256,
    ffn: int = 512,
    n_head: int = 4,
    n_head_kv: int = 2,
    n_vocab: int = 320,
    tied: bool = False,
    dtype: Dtype = "bf16",
    layout: Layout = "transformers4",
    shards: int = 2,
    seed: int = 0,
    ends: bool = True,
    overrides: Mapping[str, object] | None = None,
) -> Path:
    """Write a random Qwen2ForCausalLM checkpoint into folder and return folder.

    Args: n_vocab, rows of the embedding, of which the first N_TOKENS belong to tokens; shards, 1 for a single file
    without an index; ends, False for a model that never draws a control token with its own top_k: their logits are 0, and of
    the others half are above that; overrides, keys of config.json to set, or to leave out where the value is `...`.
    """
    assert n_vocab >= N_TOKENS, f"{n_vocab} rows are too few for {N_TOKENS} tokens"
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, object] = {
        **shared_config(tied),
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "max_window_layers": n_layer,
        "num_attention_heads": n_head,
        "num_hidden_layers": n_layer,
        "num_key_value_heads": n_head_kv,
        "vocab_size": n_vocab,
        **layout_config(layout, n_layer, dtype),
        **(overrides or {}),
    }
    write_json(folder / "config.json", {key: value for key, value in sorted(config.items()) if value is not ...})
    write_generation_config(folder)
    write_tokenizer(folder, layout)
    size = {"hidden": hidden, "ffn": ffn, "kv": hidden // n_head * n_head_kv, "vocab": n_vocab}
    tensors = random_tensors(size, n_layer, tied, dtype, seed)
    if not ends:
        assert not tied, "a row of zeros in the embedding would be one in the input"
        tensors[-1] = without_rows(tensors[-1], CONTROL)
    write_weights(folder, tensors, shards)
    return folder


def write_scripted_checkpoint(folder: Path, script: Script, *, thinks: bool = False, template: str = "") -> Path:
    """A model whose logits follow from the last token alone, the same to the bit on any machine and by any build.

    An embedding is zeros and a 1, the layers add nothing to it, so that of each logit's sum only one product is not 0.
    script: the logits by token after each token; OFF for those that it leaves out. thinks: it has thinking tags, and its template
    opens the thought. template: another one.
    """
    n_vocab, hidden = 320, 384
    room = {"max_position_embeddings": 32_768}  # for a text that a person, or another process, is to interrupt
    write_random_checkpoint(folder, n_layer=1, hidden=hidden, n_head=6, n_vocab=n_vocab, shards=1, overrides=room)
    ordinary = ORDINARY if thinks else {}
    write_tokenizer(folder, "transformers4", ordinary, template or (TEMPLATE if thinks else PLAIN_TEMPLATE))

    def values(tensor: Tensor) -> Floats:
        made = np.zeros(tensor.shape, np.float32)
        if "norm" in tensor.name:
            made[:] = 1
        elif "embed" in tensor.name:
            np.fill_diagonal(made, 1)
        elif "lm_head" in tensor.name:
            made[:] = OFF
            for last in range(n_vocab):
                for token, logit in script(last).items():
                    made[token, last] = logit
            made /= hidden**0.5
        return made

    size = {"hidden": hidden, "ffn": 512, "kv": 128, "vocab": n_vocab}
    tensors = random_tensors(size, 1, False, "bf16", 0)
    write_weights(folder, [replace(tensor, values=partial(values, tensor)) for tensor in tensors], 1)
    return folder


def letters(_last: int) -> Mapping[int, float]:
    """Letters and digits without end, each as likely as any other."""
    return dict.fromkeys(LETTERS, 0.0)


def sentences(last: int) -> Mapping[int, float]:
    """Sentences without end, and a paragraph's end after one in four; in tokens that the tokenizer would choose too."""
    if last == ord("."):
        return {ord(" "): 1.0, BREAK: 0.0}
    words = dict.fromkeys(map(ord, "abcdfghijklmopqrsuvwxyz"), 0.0)  # none that MERGES would join
    return words if last in (ord(" "), BREAK) else {**words, ord(" "): 2.0, ord("."): 1.5}


def chain(*pieces: str) -> Script:
    """Each piece, a letter or a token's spelling, after the one before, the first after whatever is none of them."""
    ids = [END_OF_TURN if piece == CONTROL[END_OF_TURN] else ord(piece) for piece in pieces]
    after = dict(itertools.pairwise(ids))
    return lambda last: {after.get(last, ids[0]): 0.0}


def in_f16(folder: Path) -> Path:
    """The checkpoint's conversion, beside it."""
    path = folder.parent / f"{folder.name}-F16.gguf"
    convert(folder, file_type("F16"), path)
    return path


def write_tagged_checkpoint(demo: Path, folder: Path) -> Path:
    """The demo checkpoint with QwQ-32B's thinking tags in the place of two tokens that it never writes.

    It does not know what they mean: it thinks until it is told to answer, or ends its turn within the thought. Its template
    begins the thought with a word, for to a tag alone this model has nothing to say.
    """
    folder.mkdir(parents=True)
    for path in demo.iterdir():
        if path.suffix == ".safetensors":
            (folder / path.name).symlink_to(path)
        elif path.suffix == ".json":
            (folder / path.name).write_text(path.read_text("utf-8"), "utf-8")
    names = dict(zip(("<repo_name>", "<reponame>"), ("<think>", "</think>"), strict=True))
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    for token in tokenizer["added_tokens"]:
        if token["content"] in names:
            token.update(content=names[token["content"]], special=False)
    vocab = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {names.get(text, text): number for text, number in vocab.items()}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    for token in config["added_tokens_decoder"].values():
        if token["content"] in names:
            token.update(content=names[token["content"]], special=False)
    config["additional_special_tokens"] = [t for t in config["additional_special_tokens"] if t not in names]
    config["chat_template"] = config["chat_template"].replace("assistant\n' }}", "assistant\n<think>\nOkay. ' }}")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder


def shared_config(tied: bool) -> dict[str, object]:
    """What config.json holds in either layout and for any size."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": END_OF_TURN,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": N_CTX,
        "model_type": "qwen2",
        "rms_norm_eps": 1e-5,
        "sliding_window": N_CTX,
        "tie_word_embeddings": tied,
        "use_cache": True,
        "use_sliding_window": False,
    }


def layout_config(layout: Layout, n_layer: int, dtype: Dtype) -> dict[str, object]:
    """What the two generations of transformers write in different places."""
    torch_dtype = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}[dtype]
    if layout == "transformers4":
        return {"rope_theta": 1e6, "torch_dtype": torch_dtype, "transformers_version": "4.45.2"}
    return {
        "dtype": torch_dtype,
        "layer_types": ["full_attention"] * n_layer,
        "pad_token_id": END_OF_TEXT,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        "sliding_window": None,
        "transformers_version": "5.3.0",
    }


def write_generation_config(folder: Path) -> None:
    """generation_config.json with QwQ-32B's sampling."""
    generation = {
        "bos_token_id": END_OF_TEXT,
        "do_sample": True,
        "eos_token_id": [END_OF_TURN, END_OF_TEXT],
        "pad_token_id": END_OF_TEXT,
        "temperature": 0.6,
        "top_k": 40,
        "top_p": 0.95,
    }
    write_json(folder / "generation_config.json", generation)


def write_tokenizer(
    folder: Path, layout: Layout, ordinary: Mapping[int, str] = MappingProxyType(ORDINARY), template: str = TEMPLATE
) -> None:
    """Byte-level BPE of 256 symbols and a few merges; newer files spell a merge as a pair and know no decoder table."""
    words = tokenizer_config(CONTROL, ordinary, template=template, n_ctx=N_CTX)
    merges: Sequence[object] = MERGES
    if layout == "transformers5":
        merges = [merge.split(" ") for merge in MERGES]
        del words["added_tokens_decoder"], words["chat_template"]
        words["extra_special_tokens"] = words.pop("additional_special_tokens")
        words["backend"] = "tokenizers"
        (folder / "chat_template.jinja").write_bytes(template.encode())
    write_json(folder / "tokenizer_config.json", words)
    write_json(folder / "tokenizer.json", tokenizer_json(TOKENS, merges, CONTROL, ordinary))


def random_tensors(size: Mapping[str, int], n_layer: int, tied: bool, dtype: Dtype, seed: int) -> list[Tensor]:
    """The tensors in the network's order, HF [out, in]. size: hidden, ffn, kv and vocab, in rows or columns."""
    hidden, ffn = size["hidden"], size["ffn"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size["vocab"], hidden)}
    for layer in range(n_layer):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        for part, rows in (("q", hidden), ("k", size["kv"]), ("v", size["kv"])):
            shapes[f"{prefix}self_attn.{part}_proj.weight"] = (rows, hidden)
            shapes[f"{prefix}self_attn.{part}_proj.bias"] = (rows,)
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes[prefix + "mlp.gate_proj.weight"] = (ffn, hidden)
        shapes[prefix + "mlp.up_proj.weight"] = (ffn, hidden)
        shapes[prefix + "mlp.down_proj.weight"] = (hidden, ffn)
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (size["vocab"], hidden)
    return [random_tensor(name, shape, dtype, seed) for name, shape in shapes.items()]


def random_tensor(name: str, shape: tuple[int, ...], dtype: Dtype, seed: int) -> Tensor:
    """Gaussian × 0.02 with one outlier in about a thousand, 30 times as large; norms lie near 1."""

    def values() -> Floats:
        source = np.random.default_rng([seed, zlib.crc32(name.encode())])
        gaussian = 0.02 * source.standard_normal(shape, dtype=np.float32)
        if "norm" in name:
            return 1 + gaussian
        return np.where(source.random(shape) < 1e-3, 30 * gaussian, gaussian)

    return Tensor(name, shape, dtype.upper(), values)


def without_rows(tensor: Tensor, rows: Iterable[int]) -> Tensor:
    """The same with zeros in some rows."""

    def values() -> Floats:
        made = tensor.values()
        made[[*rows]] = 0
        return made

    return replace(tensor, values=values)


def write_weights(folder: Path, tensors: Sequence[Tensor], shards: int) -> None:
    """Equal numbers of tensors a shard; one shard is a single file without an index."""
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return
    cuts = [len(tensors) * n // shards for n in range(shards + 1)]
    write_shards(folder, [tensors[begin:end] for begin, end in itertools.pairwise(cuts)])
