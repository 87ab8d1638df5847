"""Bad input to `qwq-lite convert`: one line that names file and field, the right exit status, nothing under the output name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import write_random_checkpoint


def run_convert(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path[:0] = {sys.path!r}; from qwq_lite.cli import main; main()"
    command = [sys.executable, "-c", code, "convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False)


def assert_refused(done: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert status == 2 or len(lines) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert not done.stdout


def assert_nothing_at(output: Path) -> None:
    assert not output.exists()
    assert not list(output.parent.glob(f".{output.name}*"))


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


SHARD = "model-00002-of-00002.safetensors"
BROKEN = {
    "another architecture": (
        change_json("config.json", architectures=["LlamaForCausalLM"]),
        ["config.json", "architectures"],
    ),
    "quantized source": (
        change_json("config.json", quantization_config={"quant_method": "awq"}),
        ["quantization_config"],
    ),
    "no rope base": (change_json("config.json", rope_theta=...), ["config.json", "rope_theta"]),
    "field missing": (change_json("config.json", hidden_size=...), ["config.json", "hidden_size"]),
    "field of a wrong type": (change_json("config.json", num_hidden_layers="two"), ["num_hidden_layers", "'two'"]),
    "sizes that do not divide": (change_json("config.json", num_key_value_heads=3), ["num_key_value_heads"]),
    "layers that are not there": (change_json("config.json", num_hidden_layers=3), ["blk.2."]),
    "config is no JSON": (write("config.json", b"{"), ["config.json", "JSON"]),
    "config is a list": (write("config.json", b"[]"), ["config.json", "list"]),
    "missing shard": (lambda folder: (folder / SHARD).unlink(), [SHARD, "weight_map"]),
    "shard cut": (cut(SHARD), [SHARD]),
    "shard empty": (write(SHARD, b""), [SHARD]),
    "shard is an LFS pointer": (write(SHARD, b"version https://git-lfs.github.com/spec/v1\n"), [SHARD, "LFS"]),
    "shard is a web page": (write(SHARD, b"<!doctype html><html>"), [SHARD, "web page"]),
    "absurd header length": (write(SHARD, b"\xff" * 64), [SHARD]),
    "index without a map": (change_json("model.safetensors.index.json", weight_map=...), ["index.json", "weight_map"]),
    "index out of the folder": (
        change_json("model.safetensors.index.json", weight_map={"lm_head.weight": "../x.safetensors"}),
        ["index.json", "../x.safetensors"],
    ),
    "tokenizer missing": (lambda folder: (folder / "tokenizer.json").unlink(), ["tokenizer.json"]),
    "unknown pre-tokenizer": (change_json("tokenizer.json", pre_tokenizer={"type": "Whitespace"}), ["pre_tokenizer"]),
    "unknown normalizer": (change_json("tokenizer.json", normalizer={"type": "NFKC"}), ["normalizer", "NFKC"]),
    "another tokenizer": (change_json("tokenizer.json", model={"type": "Unigram"}), ["model.type", "Unigram"]),
    "added tokens are a number": (change_json("tokenizer.json", added_tokens=5), ["tokenizer.json", "added_tokens"]),
    "decoder is a list": (change_json("tokenizer_config.json", added_tokens_decoder=[1]), ["added_tokens_decoder"]),
    "normalizer is a word": (change_json("tokenizer.json", normalizer="Lowercase"), ["normalizer", "Lowercase"]),
    "lone surrogate": (change_json("tokenizer_config.json", chat_template="\ud800"), ["chat_template"]),
    "another activation": (change_json("config.json", hidden_act="gelu"), ["config.json", "hidden_act"]),
    "rope is a word": (change_json("config.json", rope_parameters={"full_attention": "x"}), ["full_attention"]),
    "temperature is a word": (
        change_json("generation_config.json", temperature="hot"),
        ["generation_config", "temperature"],
    ),
    "absurd penalty": (change_json("generation_config.json", repetition_penalty=10**400), ["repetition_penalty"]),
    "id beyond the rows": (
        change_json("tokenizer.json", added_tokens=[{"id": 10**6, "content": "<x>", "special": True}]),
        ["tokenizer.json", "1000000"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model")
    change, words = BROKEN[case]
    change(folder)
    done = run_convert(folder, "-q", "Q4_K_M", "-o", tmp_path / "out.gguf")
    assert_refused(done, 1, *words)
    assert_nothing_at(tmp_path / "out.gguf")


def test_a_path_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "empty"):
        assert_refused(run_convert(path, "-q", "Q8_0", "-o", tmp_path / "out.gguf"), 1, str(path))
    assert_nothing_at(tmp_path / "out.gguf")


def test_usage_has_status_two(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model")
    assert_refused(run_convert(folder, "-q", "Q9_9", "-o", tmp_path / "out.gguf"), 2, "Q9_9", "Q4_K_M")
    assert_refused(run_convert(folder), 2, "--type")
    assert_refused(run_convert(folder, "-q", "Q8_0", "-j", "0"), 2, "threads")
    assert_nothing_at(tmp_path / "out.gguf")


def test_output_names_that_cannot_be(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    (tmp_path / "link.gguf").symlink_to(folder / SHARD)
    for output, words in {
        tmp_path / "no" / "out.gguf": ["no", "folder"],
        folder: ["checkpoint folder itself"],
        tmp_path: ["is a folder"],
        folder / SHARD: [SHARD, "checkpoint itself"],
        tmp_path / "link.gguf": ["checkpoint itself"],
    }.items():
        assert_refused(run_convert(folder, "-q", "Q8_0", "-o", output, "--force"), 1, *words)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_an_existing_output_needs_force_and_survives_a_failure(tmp_path: Path) -> None:
    folder, output = write_random_checkpoint(tmp_path / "model"), tmp_path / "out.gguf"
    output.write_bytes(b"kept")
    assert_refused(run_convert(folder, "-q", "q8", "-o", output), 1, "--force")
    cut(SHARD)(folder)
    assert_refused(run_convert(folder, "-q", "q8", "-o", output, "--force"), 1, SHARD)
    assert output.read_bytes() == b"kept"


@pytest.mark.parametrize("value", [b"\xc0\x7f", b"\x80\x7f"], ids=["NaN", "infinity"])
def test_a_value_that_is_no_number_is_named(value: bytes, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model")
    shard = folder / SHARD
    shard.write_bytes(shard.read_bytes()[:-2] + value)  # the last bf16 of the last tensor
    for kind in ("Q4_K_M", "Q6_K", "Q8_0", "F16", "BF16"):
        assert_refused(run_convert(folder, "-q", kind, "-o", tmp_path / "out.gguf"), 1, SHARD, "tensor", "row")
    assert_nothing_at(tmp_path / "out.gguf")


@pytest.mark.parametrize(("word", "kind"), [("q4_k_m", "Q4_K_M"), ("q6", "Q6_K")])
def test_the_default_name_and_any_case(tmp_path: Path, word: str, kind: str) -> None:
    folder = write_random_checkpoint(tmp_path / "model")
    path = [str(Path(entry).resolve()) for entry in sys.path]
    code = f"import sys; sys.path[:0] = {path!r}; from qwq_lite.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "convert", str(folder), "-q", word],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / f"model-{kind}.gguf").is_file()
    assert f"qwq-lite chat model-{kind}.gguf" in done.stdout
    assert not done.stderr, "no bar when stderr is no terminal"


def test_a_value_that_f16_cannot_hold_suggests_bf16(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model")
    shard = folder / SHARD
    shard.write_bytes(shard.read_bytes()[:-2] + b"\x89\x47")  # 70,144 as bf16
    assert_refused(run_convert(folder, "-q", "F16", "-o", tmp_path / "out.gguf"), 1, SHARD, "70144", "BF16")
    assert_nothing_at(tmp_path / "out.gguf")
    assert run_convert(folder, "-q", "BF16", "-o", tmp_path / "out.gguf").returncode == 0


@pytest.mark.parametrize("change", [{"behavior": "Removed"}, {"invert": True}])
def test_a_split_that_is_not_qwen2s_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model")
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["pre_tokenizer"]["pretokenizers"][0] |= change
    path.write_text(json.dumps(data), encoding="utf-8")
    assert_refused(run_convert(folder, "-q", "Q4_K_M", "-o", tmp_path / "out.gguf"), 1, "pre_tokenizer")


def test_a_link_under_the_temporary_name_is_not_written_through(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model")
    precious = tmp_path / "precious"
    precious.write_bytes(b"kept")
    (tmp_path / ".out.gguf.part").symlink_to(precious)
    assert_refused(run_convert(folder, "-q", "Q8_0", "-o", tmp_path / "out.gguf"), 1, ".out.gguf.part")
    assert precious.read_bytes() == b"kept"
    (tmp_path / ".out.gguf.part").unlink()
    (tmp_path / ".out.gguf.part").hardlink_to(precious)
    assert_refused(run_convert(folder, "-q", "Q8_0", "-o", tmp_path / "out.gguf"), 1, ".out.gguf.part")
    assert precious.read_bytes() == b"kept"
