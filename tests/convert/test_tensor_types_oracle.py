"""recipe.tensor_types against llama.cpp's own choice, for geometries that are too large to convert in a test.

llama_model_quantize with dry_run prints each tensor's type and size and reads no weights, so that a header over a
sparse file is enough: 140 GB of data section take no room on the disk.

Every file type meets every geometry here, tied with importances and untied without. What a user chooses touches two tensors
and the mixture as a whole, so that models of one layer stand for it.
"""

from __future__ import annotations

import collections
import itertools
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, LlamaFileType

from qwq_lite.backend import native
from qwq_lite.errors import UsageError
from qwq_lite.formats import gguf_header, gguf_writer, tensor_types
from qwq_lite.formats.tensor_types import FILE_TYPES, TENSOR_TYPES, QuantizeOptions, file_type
from tests.quantizer import Log, dry_run

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a file that grows by truncate is not sparse there")

T = GGMLQuantizationType
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
    "demo": Geometry(30, 576, 1536, 9, 3, 49_152),  # three heads to one of K and V
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
N_LAYERS = (2, 3, 8, 9, 15, 16, 17, 23, 31, 33)
OF_LAYERS = (
    "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_XS", "Q3_K_M", "Q3_K_S", "Q2_K", "Q2_K_S", "IQ3_M", "IQ3_XS", "IQ3_XXS",
    "IQ2_M", "IQ2_XXS",
)  # fmt: skip
BARE, WEIGHTED = QuantizeOptions(), QuantizeOptions(has_imatrix=True)


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
    infos = gguf_writer.layout(
        (name, it, T.F32 if tensor_types.stays_f32(name, it) else T.F16) for name, it in found.items()
    )
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
    header = gguf_writer.encode("qwen2", keys, infos)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + infos[-1].offset + gguf_header.padded(infos[-1].n_bytes))
    return found


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """Every line of llama.cpp: what the library keeps for itself are the last ones."""
    native.engine()
    lines: Log = collections.deque()
    monkeypatch.setattr(native.LOG, "last", lines)
    return lines


def assert_types_are_llama_cpps(
    folder: Path, size: Geometry, tied: bool, wanted: Iterable[tuple[LlamaFileType, QuantizeOptions]], log: Log
) -> None:
    source = folder / "ghost.gguf"
    found = write_ghost(source, size, tied)
    for kind, choice in wanted:
        theirs = dry_run(source, kind, choice, log)
        ours = tensor_types.tensor_types(found, kind, size.n_layer, choice)
        assert set(theirs.types) == set(found), "every line of the log was understood"
        different = {
            tensor: (kind.name, theirs.types[tensor])
            for tensor, kind in ours.items()
            if kind.name != theirs.types[tensor]
        }
        assert not different, (kind, choice, "ours, theirs")
        n_bytes = sum(gguf_header.tensor_bytes(found[tensor], kind) for tensor, kind in ours.items())
        assert theirs.mib == f"{n_bytes / MIB:.2f}", (kind, choice)
        inner = {
            tensor: kind
            for tensor, kind in ours.items()
            if tensor not in (tensor_types.OUTPUT, tensor_types.TOKEN_EMBD)
        }
        needed = any(tensor_types.importance_needed(it, tensor, kind) for tensor, it in inner.items())
        assert theirs.needs_imatrix == (needed and not choice.has_imatrix), (kind, choice)
    source.unlink()


@pytest.mark.parametrize(("tied", "choice"), [(True, WEIGHTED), (False, BARE)], ids=["tied", "untied"])
@pytest.mark.parametrize("size", GEOMETRIES.values(), ids=GEOMETRIES)
def test_every_file_type_of_a_geometry(
    tmp_path: Path, size: Geometry, tied: bool, choice: QuantizeOptions, log: Log
) -> None:
    assert_types_are_llama_cpps(tmp_path, size, tied, ((kind, choice) for kind in FILE_TYPES.values()), log)


@pytest.mark.parametrize("n_layer", N_LAYERS)
def test_a_mixture_for_any_number_of_layers(tmp_path: Path, n_layer: int, log: Log) -> None:
    """The layers with more bits follow from the number of layers alone."""
    size = Geometry(n_layer, 256, 512, 4, 1, 1000)
    wanted = itertools.product(map(file_type, OF_LAYERS), (BARE, WEIGHTED))
    assert_types_are_llama_cpps(tmp_path, size, False, wanted, log)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("n_embd", [256, 896, 1040])
def test_types_that_are_chosen(tmp_path: Path, n_embd: int, tied: bool, log: Log) -> None:
    """For every type of output and of embedding, with and without a mixture; a tied model takes the first as far as it fits."""
    fitting = [kind for kind in TENSOR_TYPES.values() if n_embd % GGML_QUANT_SIZES[kind][0] == 0]
    outputs = list(TENSOR_TYPES.values()) if tied else fitting
    pairs = [
        *((it, None) for it in outputs),
        *((None, it) for it in fitting),
        *((T.Q8_0, it) for it in fitting if T.Q8_0 in outputs),
    ]
    wanted = (
        (file_type(name), QuantizeOptions(output, embedding, pure, has_imatrix))
        for name, has_imatrix in (("Q4_K_M", False), ("F16", False), ("IQ2_M", True))
        for output, embedding in pairs
        for pure in (False, True)
    )
    size = Geometry(1, n_embd, 512, n_embd // 16, 1, 1000)
    assert_types_are_llama_cpps(tmp_path, size, tied, wanted, log)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("n_embd", [256, 896, 1040])
def test_pure_files(tmp_path: Path, n_embd: int, tied: bool, log: Log) -> None:
    size = Geometry(2, n_embd, 512, n_embd // 16, 1, 1000)
    wanted = itertools.product(
        FILE_TYPES.values(), (QuantizeOptions(pure=True), QuantizeOptions(pure=True, has_imatrix=True))
    )
    assert_types_are_llama_cpps(tmp_path, size, tied, wanted, log)


def test_the_file_types_that_need_an_imatrix(tmp_path: Path, log: Log) -> None:
    source = tmp_path / "ghost.gguf"
    write_ghost(source, GEOMETRIES["one layer"], tied=False)
    refused = {name for name, kind in FILE_TYPES.items() if dry_run(source, kind, BARE, log).needs_imatrix}
    assert refused == {name for name, kind in FILE_TYPES.items() if tensor_types.needs_imatrix(kind)}


def test_a_chosen_type_that_does_not_fit_is_refused_where_llama_cpp_fails(tmp_path: Path) -> None:
    """It says so in the middle of the work, or ends the process."""
    source = tmp_path / "ghost.gguf"
    found = write_ghost(source, Geometry(1, 896, 512, 14, 1, 1000), tied=False)
    choice = QuantizeOptions(token_embedding_type=T.Q6_K)
    with pytest.raises(UsageError, match=r"token_embd.weight has 896 columns.*Q6_K's blocks of 256; .*Q8_0"):
        tensor_types.tensor_types(found, file_type("Q4_K_M"), 1, choice)
    script = (
        "import sys; from pathlib import Path; from gguf.constants import GGMLQuantizationType as T;"
        "from qwq_lite.formats.tensor_types import QuantizeOptions, file_type; from tests.quantizer import quantize;"
        f"quantize(Path(sys.argv[1]), Path(sys.argv[1] + '.out'), file_type('Q4_K_M'), {choice!r})"
    ).replace(repr(T.Q6_K), "T.Q6_K")
    failed = subprocess.run([sys.executable, "-c", script, source], capture_output=True, text=True, check=False)
    assert failed.returncode != 0
    assert "quantized data validation failed" in failed.stderr or "GGML_ASSERT" in failed.stderr


def test_the_oracle_notices_a_wrong_type(tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_types, "more_bits", lambda i_layer, n_layer: False)
    with pytest.raises(AssertionError, match="Q4_K"):
        assert_types_are_llama_cpps(tmp_path, GEOMETRIES["14B"], False, [(file_type("Q4_K_M"), BARE)], log)
