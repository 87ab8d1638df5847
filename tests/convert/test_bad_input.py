"""Bad input to `qwq-lite convert`: one line that names file and field, the right exit status, nothing under the output name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from random import Random

import pytest

from qwq_convert.checkpoint import family
from qwq_convert.checkpoint.files import Checkpoint
from qwq_convert.checkpoint.tensors import pair
from qwq_convert.pipeline import convert, prepare
from qwq_lite.cli import main
from qwq_lite.errors import CheckpointError
from qwq_lite.formats.shape import from_config
from qwq_lite.formats.tensor_types import file_type
from tests.checkpoints import write_random_checkpoint
from tests.convert.broken import ABSURD, BROKEN, SHARD, cut


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


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("sound") / "model")


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_line(
    case: str, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(sound, tmp_path / "model")
    change, words = BROKEN[case]
    change(folder)
    output = tmp_path / "out.gguf"
    monkeypatch.setattr("sys.argv", ["qwq-lite", "convert", str(folder), "-q", "Q4_K_M", "-o", str(output)])
    with pytest.raises(SystemExit) as ended:
        main()
    stdout, stderr = capfd.readouterr()
    done = subprocess.CompletedProcess([], int(ended.value.code or 0), stdout, stderr)
    assert_refused(done, 1, *words)
    assert len(stderr) < 1000, "a line that can be read"
    assert_nothing_at(output)


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("QwQ-32B-AWQ", "QwQ-32B"),
        ("Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen2.5-7B-Instruct"),
        ("DeepSeek-R1-Distill-Qwen-7B-unsloth-bnb-4bit", "DeepSeek-R1-Distill-Qwen-7B"),
        ("QwQ-32B-FP8-dynamic", "QwQ-32B"),
        ("mine", "the checkpoint that it was made from"),
    ],
)
def test_a_quantized_checkpoint_names_the_one_to_take(name: str, original: str, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / name, overrides={"quantization_config": {"quant_method": "awq"}})
    with Checkpoint(folder) as checkpoint, pytest.raises(CheckpointError, match=f"original checkpoint: {original}$"):
        family.check(checkpoint)


def test_a_shard_that_is_cut_while_it_is_read(sound: Path, tmp_path: Path) -> None:
    folder, output = shutil.copytree(sound, tmp_path / "model"), tmp_path / "out.gguf"
    with pytest.raises(CheckpointError, match=f"{SHARD}.*tensor.*fetch"):
        convert(folder, file_type("BF16"), output, on_prepared=lambda plan: os.truncate(folder / SHARD, 1000))
    assert_nothing_at(output)


def test_any_bytes_in_a_shards_header_are_read_or_refused(sound: Path, tmp_path: Path) -> None:
    """A few bytes changed, put in or left out, at random places; nothing but CheckpointError may come of it."""
    folder, source, refused = shutil.copytree(sound, tmp_path / "model"), Random(7), 0
    whole = (folder / SHARD).read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(300):
        changed = bytearray(whole)
        for _ in range(source.choice((1, 1, 3))):
            at, byte = source.randrange(end), source.choice(b'0123456789"{}[],:-\0\xff')
            changed[at : at + source.choice((0, 1, 1))] = bytes([byte] * source.choice((0, 1, 1)))
        (folder / SHARD).write_bytes(changed)
        try:
            with Checkpoint(folder) as checkpoint:
                pair(checkpoint, from_config(checkpoint.config, folder / "config.json"))
        except CheckpointError as error:
            refused += 1
            assert SHARD in str(error)
    assert refused > 250


@pytest.mark.parametrize("case", ABSURD)
def test_absurd_sizes_are_refused_before_anything_is_allocated(case: str, sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "model")
    ABSURD[case](folder)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError), Checkpoint(folder) as checkpoint:
            prepare(checkpoint, [file_type("Q4_K_M")])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 12_000_000, f"{peak} bytes"


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
        tmp_path / "no" / "no" / "out.gguf": ["no", "folder"],
        folder / SHARD: [SHARD, "which the conversion reads"],
        tmp_path / "link.gguf": ["which the conversion reads"],
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
