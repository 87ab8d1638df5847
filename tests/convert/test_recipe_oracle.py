"""recipe.tensor_types against llama.cpp's own choice, for geometries that are too large to convert in a test.

llama_model_quantize with dry_run prints each tensor's type and size and reads no weights, so that a header over a
sparse file is enough: 140 GB of data section take no room on the disk.
"""

from __future__ import annotations

import collections
import ctypes
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from gguf.constants import GGMLQuantizationType, GGUFValueType

from qwq_lite import gguf_header, recipe
from qwq_lite.backend import native

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a file that grows by truncate is not sparse there")

F16, F32 = GGMLQuantizationType.F16, GGMLQuantizationType.F32
U32, REAL, TEXT = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING
MIB = 1024 * 1024


@dataclass(frozen=True)
class Geometry:
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_vocab: int


GEOMETRIES = {
    "0.5B": Geometry(24, 896, 4864, 14, 2, 151_936),  # 896 columns do not divide into blocks of 256
    "1.5B": Geometry(28, 1536, 8960, 12, 2, 151_936),
    "3B": Geometry(36, 2048, 11_008, 16, 2, 151_936),
    "7B": Geometry(28, 3584, 18_944, 28, 4, 152_064),
    "14B": Geometry(48, 5120, 13_824, 40, 8, 152_064),
    "32B": Geometry(64, 5120, 27_648, 40, 8, 152_064),
    "72B": Geometry(80, 8192, 29_568, 64, 8, 152_064),  # 80 layers: attn_v has a rule of its own
    "one layer": Geometry(1, 256, 512, 4, 2, 1000),
    "seven layers": Geometry(7, 256, 512, 4, 2, 1000),  # an eighth of them is none
    "rows of 1040": Geometry(16, 1040, 2000, 13, 13, 1000),  # not even blocks of 32
}
LAYERS = (24, 28, 48, 64)
UNUSUAL_LAYERS = (2, 3, 8, 9, 15, 17, 23, 31, 63, 65, 79, 81)


def shapes(size: Geometry, tied: bool) -> dict[str, tuple[int, ...]]:
    """GGUF name -> ggml's order, columns first."""
    n_embd, n_ff, kv = size.n_embd, size.n_ff, size.n_embd // size.n_head * size.n_head_kv
    found: dict[str, tuple[int, ...]] = {} if tied else {"output.weight": (n_embd, size.n_vocab)}
    found |= {"output_norm.weight": (n_embd,), "token_embd.weight": (n_embd, size.n_vocab)}
    for layer in range(size.n_layer):
        block: dict[str, tuple[int, ...]] = {"attn_norm.weight": (n_embd,), "ffn_norm.weight": (n_embd,)}
        for part, rows in (("q", n_embd), ("k", kv), ("v", kv)):
            block |= {f"attn_{part}.weight": (n_embd, rows), f"attn_{part}.bias": (rows,)}
        block |= {"attn_output.weight": (n_embd, n_embd), "ffn_down.weight": (n_ff, n_embd)}
        block |= {"ffn_gate.weight": (n_embd, n_ff), "ffn_up.weight": (n_embd, n_ff)}
        found |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return found


def write_ghost(path: Path, size: Geometry, tied: bool) -> dict[str, tuple[int, ...]]:
    """A header of F16 tensors over a data section of holes. Returns its shapes."""
    found = shapes(size, tied)
    infos = gguf_header.layout((name, it, F32 if recipe.stays_f32(name, it) else F16) for name, it in found.items())
    keys: dict[str, tuple[gguf_header.Value, GGUFValueType]] = {
        "qwen2.block_count": (size.n_layer, U32),
        "qwen2.context_length": (32_768, U32),
        "qwen2.embedding_length": (size.n_embd, U32),
        "qwen2.feed_forward_length": (size.n_ff, U32),
        "qwen2.attention.head_count": (size.n_head, U32),
        "qwen2.attention.head_count_kv": (size.n_head_kv, U32),
        "qwen2.rope.freq_base": (1e6, REAL),
        "qwen2.attention.layer_norm_rms_epsilon": (1e-5, REAL),
        "qwen2.vocab_size": (size.n_vocab, U32),
        "tokenizer.ggml.model": ("no_vocab", TEXT),
    }
    header = gguf_header.encode("qwen2", keys, infos)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + infos[-1].offset + gguf_header.padded(infos[-1].n_bytes))
    return found


@dataclass(frozen=True)
class DryRun:
    """What llama.cpp says it would write. types: by tensor. mib: the total, as printed."""

    types: dict[str, str]
    mib: str


def dry_run(source: Path, name: str, log: collections.deque[tuple[int, str]]) -> DryRun:
    api = native.engine()
    params = api.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.dry_run = int(recipe.file_type(name)), 1, True
    log.clear()
    target = source.with_suffix(".unwritten")
    assert api.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)) == 0
    assert not target.exists()
    text = "".join(line for _, line in log)
    # [   3/ 339]  blk.0.attn_k.weight  - [ 896, 128, 1, 1], type =    f16, size =  0.22 MiB ->  0.15 MiB (q5_0)
    lines = re.findall(
        r"^\[ *\d+/ *\d+\] +(\S+) +- \[.*\], type = +(\w+), size = .*?(?:\((\w+)\))?$", text, re.MULTILINE
    )
    total = re.search(r"quant size += +(\S+) MiB", text)
    assert total is not None, text[-1000:]
    return DryRun({tensor: (new or old).upper() for tensor, old, new in lines}, total[1])


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> collections.deque[tuple[int, str]]:
    """Every line of llama.cpp: what the library keeps for itself are the last ones."""
    native.engine()
    lines: collections.deque[tuple[int, str]] = collections.deque()
    monkeypatch.setattr(native.LOG, "last", lines)
    return lines


def assert_types_are_llama_cpps(
    folder: Path, size: Geometry, tied: bool, names: list[str], log: collections.deque[tuple[int, str]]
) -> None:
    source = folder / "ghost.gguf"
    found = write_ghost(source, size, tied)
    for name in names:
        theirs = dry_run(source, name, log)
        ours = recipe.tensor_types(found, recipe.file_type(name), size.n_layer)
        assert set(theirs.types) == set(found), "every line of the log was understood"
        different = {
            tensor: (kind.name, theirs.types[tensor])
            for tensor, kind in ours.items()
            if kind.name != theirs.types[tensor]
        }
        assert not different, (name, "ours, theirs")
        n_bytes = sum(gguf_header.tensor_bytes(found[tensor], kind) for tensor, kind in ours.items())
        assert theirs.mib == f"{n_bytes / MIB:.2f}", name
    source.unlink()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("size", GEOMETRIES.values(), ids=GEOMETRIES)
def test_every_file_type_of_a_geometry(
    tmp_path: Path, size: Geometry, tied: bool, log: collections.deque[tuple[int, str]]
) -> None:
    assert_types_are_llama_cpps(tmp_path, size, tied, list(recipe.FILE_TYPES), log)


@pytest.mark.parametrize("n_layer", [*LAYERS, *UNUSUAL_LAYERS])
@pytest.mark.parametrize("n_embd", [896, 5120])
def test_a_mixture_for_any_number_of_layers(
    tmp_path: Path, n_layer: int, n_embd: int, log: collections.deque[tuple[int, str]]
) -> None:
    """The layers with more bits follow from the number of layers alone; Q6_K has none of them."""
    n_head = n_embd // 128
    size = Geometry(n_layer, n_embd, 4864, n_head, 1, 151_936)
    for tied in (True, False):
        assert_types_are_llama_cpps(tmp_path, size, tied, ["Q4_K_M", "Q6_K"], log)


def test_the_oracle_notices_a_wrong_type(
    tmp_path: Path, log: collections.deque[tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "more_bits", lambda i_layer, n_layer: False)
    with pytest.raises(AssertionError, match="Q4_K"):
        assert_types_are_llama_cpps(tmp_path, GEOMETRIES["14B"], False, ["Q4_K_M"], log)
