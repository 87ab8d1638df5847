"""Headers that were changed on purpose: ours is the first and the last parser that sees a bad one.

llama.cpp asserts what it needs of a header, and an assertion ends the process. So gguf_header.read and
shape.from_header must refuse what it asserts, in bounded time and memory, with FormatError and nothing else.

    edit        one change to a header taken apart into its fields, or to its bytes; follows from a seed
    accepted    what both of our readers let pass
    loaded      by llama.cpp, weights aside (no_alloc), in a process that may end for it

One long file: the edits, the lists of what is refused and allowed, and the loader speak of the same headers.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import random
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from gguf.constants import GGMLQuantizationType, GGUFValueType

from qwq_lite.errors import FormatError
from qwq_lite.formats import gguf_header, gguf_writer, shape
from tests.samples import times

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a file that grows by truncate is not sparse there")

V = GGUFValueType
CODES = {V.UINT8: "B", V.INT8: "b", V.UINT16: "H", V.INT16: "h", V.UINT32: "I", V.INT32: "i", V.FLOAT32: "f"}
CODES |= {V.BOOL: "?", V.UINT64: "Q", V.INT64: "q", V.FLOAT64: "d"}
INTEGERS = (V.UINT8, V.INT8, V.UINT16, V.INT16, V.UINT32, V.INT32, V.UINT64, V.INT64)
N_EDITS = times(1000)  # of each of the two models
N_LOADED = 60
SLOWEST_S = 5.0  # of the processor: what else the machine does counts for nothing
MOST_DATA_BYTES = 1 << 40  # file systems have a longest file
PEAK_BYTES = 64 << 20


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


@dataclass
class Key:
    """A key's fields. kind: type as written. element: of an array, as written. length: None for the true one."""

    name: str
    kind: int
    value: Any
    element: int = 0
    length: int | None = None

    def fields(self) -> Iterator[bytes]:
        yield text(self.name)
        yield struct.pack("<I", self.kind)
        if self.kind == V.ARRAY and isinstance(self.value, list):
            yield struct.pack("<I", self.element)
            yield struct.pack("<Q", len(self.value) if self.length is None else self.length)
            for item in self.value:
                yield scalar(self.element, item)
        else:
            yield scalar(self.kind, self.value)


def scalar(kind: int, value: Any) -> bytes:
    """A value's bytes, cut to its type; zeros where it has no bytes of that type, and texts as texts."""
    if isinstance(value, str):
        return text(value)
    code = CODES.get(V(kind)) if kind in set(V) else None
    if code is None or isinstance(value, list):
        return bytes(4)
    if code in "fd":
        return struct.pack("<" + code, value)
    if not math.isfinite(value):
        return bytes(struct.calcsize(code))
    if code == "?":
        return struct.pack("<?", bool(value))
    width = struct.calcsize(code)
    return (int(value) & ((1 << 8 * width) - 1)).to_bytes(width, "little")


@dataclass
class Tensor:
    name: str
    shape: list[int]
    kind: int
    offset: int

    def fields(self) -> Iterator[bytes]:
        yield text(self.name)
        yield struct.pack("<I", len(self.shape))
        yield from (struct.pack("<Q", size % (1 << 64)) for size in self.shape)
        yield struct.pack("<I", self.kind)
        yield struct.pack("<Q", self.offset % (1 << 64))


@dataclass
class Parts:
    """A header taken apart. data_bytes: of the section behind it, all holes."""

    keys: list[Key]
    tensors: list[Tensor]
    data_bytes: int

    def fields(self) -> list[bytes]:
        found = [b"GGUF", struct.pack("<I", 3), struct.pack("<Q", len(self.tensors)), struct.pack("<Q", len(self.keys))]
        for key in self.keys:
            found += key.fields()
        for tensor in self.tensors:
            found += tensor.fields()
        return found

    def key(self, name: str) -> Key:
        return next(key for key in self.keys if key.name == name)

    def set(self, name: str, kind: int, value: Any, element: int = 0) -> None:
        self.keys = [key for key in self.keys if key.name != name] + [Key(name, kind, value, element)]

    def lay_out(self) -> None:
        """Offsets for the shapes and types as they are now, where those have a size."""
        offset = 0
        for tensor in self.tensors:
            try:
                n_bytes = gguf_header.tensor_bytes(tensor.shape, GGMLQuantizationType(tensor.kind))
            except ValueError:
                return
            tensor.offset, offset = offset, offset + gguf_header.padded(n_bytes)
        if offset < MOST_DATA_BYTES:
            self.data_bytes = offset

    def write(self, path: Path) -> Path:
        return write(path, b"".join(self.fields()), self.data_bytes)


def write(path: Path, header: bytes, data_bytes: int) -> Path:
    with path.open("wb") as file:
        file.write(header)
        file.truncate(gguf_header.padded(len(header)) + data_bytes)
    return path


def ghost() -> Parts:
    """Four of QwQ-32B's layers and no vocabulary: a gigabyte-sized file in which absurd lengths have room."""
    n_embd, n_ff, n_kv, n_layer = 5120, 27_648, 1024, 4
    wide: dict[str, tuple[int, ...]] = {"token_embd.weight": (n_embd, 152_064), "output.weight": (n_embd, 152_064)}
    narrow: dict[str, tuple[int, ...]] = {"output_norm.weight": (n_embd,)}
    for layer in range(n_layer):
        block = f"blk.{layer}."
        narrow |= {f"{block}attn_norm.weight": (n_embd,), f"{block}ffn_norm.weight": (n_embd,)}
        for part, rows in (("q", n_embd), ("k", n_kv), ("v", n_kv)):
            wide[f"{block}attn_{part}.weight"] = (n_embd, rows)
            narrow[f"{block}attn_{part}.bias"] = (rows,)
        wide |= {f"{block}attn_output.weight": (n_embd, n_embd), f"{block}ffn_down.weight": (n_ff, n_embd)}
        wide |= {f"{block}ffn_gate.weight": (n_embd, n_ff), f"{block}ffn_up.weight": (n_embd, n_ff)}
    infos = gguf_writer.layout(
        (name, size, GGMLQuantizationType.F16 if name in wide else GGMLQuantizationType.F32)
        for name, size in (wide | narrow).items()
    )
    integers = {"block_count": n_layer, "context_length": 32_768, "embedding_length": n_embd, "vocab_size": 152_064}
    integers |= {"feed_forward_length": n_ff, "attention.head_count": 40, "attention.head_count_kv": 8}
    keys = [Key("general.architecture", V.STRING, "qwen2"), Key("tokenizer.ggml.model", V.STRING, "no_vocab")]
    keys += [Key(f"qwen2.{name}", V.UINT32, value) for name, value in integers.items()]
    keys += [Key("qwen2.rope.freq_base", V.FLOAT32, 1e6), Key(RMS_EPS, V.FLOAT32, 1e-5)]
    return Parts(keys, tensor_parts(infos), infos[-1].offset + infos[-1].n_bytes)


RMS_EPS = "qwen2.attention.layer_norm_rms_epsilon"


def tensor_parts(infos: list[gguf_header.TensorInfo] | tuple[gguf_header.TensorInfo, ...]) -> list[Tensor]:
    return [Tensor(info.name, list(info.shape), int(info.type), info.offset) for info in infos]


def taken_apart(path: Path) -> Parts:
    """A real file's header. Types of values come from the format's own reader."""
    header = gguf_header.read(path)
    types = {name: field.types for name, field in GGUFReader(path).fields.items()}
    keys = [
        Key(name, int(types[name][0]), value, int(types[name][-1]) if isinstance(value, list) else 0)
        for name, value in header.keys.items()
    ]
    return Parts(keys, tensor_parts(header.tensors), header.file_bytes - header.data_offset)


@pytest.fixture(scope="session")
def models(tiny_gguf: Path) -> dict[str, Parts]:
    return {"ghost": ghost(), "tiny": taken_apart(tiny_gguf)}


# One edit each. Args: the parts, which it may change, and where its choices come from.

EXTREMES = (0, 1, 2, 3, 5, 7, 9, 31, 255, 4097, 100_000, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 64) - 1)
REALS = (-1.0, 0.0, math.nan, math.inf, -math.inf, 1e-45, 1e30, 0.5)
RARE_INTEGERS = (
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "expert_count",
    "expert_used_count",
    "expert_group_count",
    "nextn_predict_layers",
    "attention.sliding_window",
    "rope.scaling.original_context_length",
    "embedding_length_out",
    "pooling_type",
)
RARE_REALS = ("rope.scaling.factor", "rope.scaling.attn_factor", "attention.layer_norm_epsilon", "rope.scale_linear")
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "padding_token_id", "unknown_token_id", "eot_token_id")


def edit_integer(parts: Parts, choose: random.Random) -> None:
    key = choose.choice([key for key in parts.keys if key.kind in INTEGERS])
    key.value = choose.choice((*EXTREMES, key.value + 1, key.value - 1, key.value * 2, key.value // 2))


def edit_real(parts: Parts, choose: random.Random) -> None:
    choose.choice([key for key in parts.keys if key.kind == V.FLOAT32]).value = choose.choice(REALS)


def add_rare_key(parts: Parts, choose: random.Random) -> None:
    kind = choose.randrange(4)
    if kind == 0:
        parts.set(f"qwen2.{choose.choice(RARE_REALS)}", V.FLOAT32, choose.choice(REALS))
    elif kind == 1:
        name = choose.choice(("none", "linear", "yarn", "longrope", "YARN", "dynamic", ""))
        parts.set("qwen2.rope.scaling.type", V.STRING, name)
    elif kind == 2:
        parts.set(f"tokenizer.ggml.{choose.choice(SPECIAL_IDS)}", V.UINT32, choose.choice(EXTREMES))
    else:
        parts.set(f"qwen2.{choose.choice(RARE_INTEGERS)}", V.UINT32, choose.choice((*EXTREMES, 64, 128, 256)))


def head_counts(parts: Parts, choose: random.Random) -> None:
    for name in choose.sample(("attention.head_count", "attention.head_count_kv"), choose.choice((1, 1, 2))):
        if choose.random() < 0.5:
            parts.set(f"qwen2.{name}", V.UINT32, choose.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 20, 41, 80, 5121)))
        else:
            counts = [choose.choice((0, 1, 2, 3, 4, 8, 40)) for _ in range(choose.choice((0, 1, 2, 4, 513)))]
            parts.set(f"qwen2.{name}", V.ARRAY, counts, V.UINT32)


def swap(parts: Parts, choose: random.Random) -> None:
    rows: list[Any] = choose.choice((list(parts.keys), list(parts.tensors)))
    a, b = choose.sample(rows, 2)
    fields = choose.choice([["name"], [name for name in vars(a) if name != "name"], ["kind"], ["value", "shape"]])
    for name in fields:
        if hasattr(a, name):
            one, other = getattr(a, name), getattr(b, name)
            setattr(a, name, other)
            setattr(b, name, one)


def drop_or_repeat(parts: Parts, choose: random.Random) -> None:
    rows: list[Any] = choose.choice((parts.keys, parts.tensors))
    at = choose.randrange(len(rows))
    if choose.random() < 0.6:
        del rows[at]
    else:
        rows.insert(choose.randrange(len(rows)), copy.deepcopy(rows[at]))


def edit_type(parts: Parts, choose: random.Random) -> None:
    part: Any = choose.choice([*parts.keys, *parts.tensors])
    part.kind = choose.choice((*range(14), 39, 255, 1 << 31, (1 << 32) - 1))


def edit_array(parts: Parts, choose: random.Random) -> None:
    arrays = [key for key in parts.keys if isinstance(key.value, list) and key.value]
    if not arrays:
        parts.set("tokenizer.ggml.tokens", V.ARRAY, ["a", "b", choose.choice("abc")], V.STRING)
        arrays = [parts.keys[-1]]
    key = choose.choice(arrays)
    kind = choose.randrange(4)
    if kind == 0:
        key.length = choose.choice(
            (len(key.value) + 1, len(key.value) - 1, 1 << 20, 1 << 29, 1 << 32, 1 << 61, 1 << 63)
        )
    elif kind == 1:
        key.element = choose.choice((*range(14), 255, 1 << 31))
    elif kind == 2:
        del key.value[choose.randrange(len(key.value)) :]
    else:
        at = choose.randrange(len(key.value))
        key.value[at] = choose.choice((key.value[0], "", "a b", "\0x")) if isinstance(key.value[at], str) else -1


def edit_tensor(parts: Parts, choose: random.Random) -> None:
    tensor = choose.choice(parts.tensors)
    kind = choose.randrange(4)
    if kind == 0:
        at = choose.randrange(len(tensor.shape))
        tensor.shape[at] = choose.choice((*EXTREMES, tensor.shape[at] + 1, tensor.shape[at] // 2))
    elif kind == 1:
        tensor.shape = choose.choice((tensor.shape[::-1], [*tensor.shape, 1], [1] * 5, [], tensor.shape[:1]))
    elif kind == 2:
        tensor.offset = choose.choice((0, 1, 32, tensor.offset + 32, 1 << 40, (1 << 64) - 32))
    else:
        tensor.name = choose.choice(("", "x" * 63, "x" * 64, "blk.99.attn_q.weight", "\udcff", "rope_freqs.weight"))


def edit_vocabulary(parts: Parts, choose: random.Random) -> None:
    kind = choose.randrange(4)
    if kind == 0:
        model = choose.choice(("gpt2", "llama", "bert", "t5", "rwkv", "plamo2", "no_vocab", "none", "", "new"))
        parts.set("tokenizer.ggml.model", V.STRING, model)
    elif kind == 1:
        parts.set("tokenizer.ggml.pre", V.STRING, choose.choice(("qwen2", "default", "llama3", "", "new")))
    elif kind == 2:
        parts.set(f"tokenizer.ggml.add_{choose.choice(('bos_token', 'eos_token', 'space_prefix'))}", V.BOOL, True)
    else:
        merges = choose.choice((["a"], [""], ["a b c"], ["a b"] * 3, [" "], ["\0 \0"]))
        parts.set("tokenizer.ggml.merges", V.ARRAY, merges, V.STRING)


def edit_architecture(parts: Parts, choose: random.Random) -> None:
    """Another architecture with the same keys and tensors."""
    arch = choose.choice(("llama", "qwen3", "qwen2moe", "mistral3", "gemma3", "phi3", "olmo2", "mamba", "clip", "new"))
    for key in parts.keys:
        key.name = key.name.replace("qwen2.", f"{arch}.", 1)
        if key.name == "general.architecture":
            key.value = arch


def several(parts: Parts, choose: random.Random) -> None:
    for edit in choose.choices(EDITS[:-1], k=choose.choice((2, 3))):
        edit(parts, choose)


EDITS: tuple[Callable[[Parts, random.Random], None], ...] = (
    edit_integer,
    edit_real,
    add_rare_key,
    head_counts,
    swap,
    drop_or_repeat,
    edit_type,
    edit_array,
    edit_tensor,
    edit_vocabulary,
    edit_architecture,
    several,
)


def edit_bytes(header: bytes, choose: random.Random) -> bytes:
    data = bytearray(header)
    if choose.random() < 0.5:
        for _ in range(choose.randint(1, 8)):
            data[choose.randrange(len(data))] = choose.randrange(256)
    else:
        at = choose.randrange(len(data) - 8)
        data[at : at + 8] = struct.pack("<Q", choose.choice(EXTREMES))
    return bytes(data)


def edited(parts: Parts, seed: int, path: Path) -> Path:
    """The file of one seed: a quarter are changed bytes, the others changed fields."""
    choose = random.Random(seed)
    if seed % 4 == 0:
        return write(path, edit_bytes(b"".join(parts.fields()), choose), parts.data_bytes)
    changed = copy.deepcopy(parts)
    choose.choice(EDITS)(changed, choose)
    if choose.random() < 0.5:
        changed.lay_out()
    return changed.write(path)


def accepted(path: Path) -> bool:
    """Whether both readers let it pass. Anything but FormatError ends the test by itself."""
    try:
        shape.from_header(gguf_header.read(path))
    except FormatError as error:
        assert str(path) in str(error)
        return False
    return True


def test_the_models_are_accepted_before_they_are_edited(models: dict[str, Parts], tmp_path: Path) -> None:
    for name, parts in models.items():
        assert accepted(parts.write(tmp_path / f"{name}.gguf"))


@pytest.mark.sampled
@pytest.mark.parametrize("model", ["ghost", "tiny"])
def test_an_edited_header_gives_a_shape_or_a_format_error(models: dict[str, Parts], model: str, tmp_path: Path) -> None:
    """Both outcomes are common: edits that are all refused at the first byte would show nothing."""
    n_accepted = 0
    for seed in range(N_EDITS):
        path = edited(models[model], seed, tmp_path / "edited.gguf")
        with bounded():
            n_accepted += accepted(path)
    assert N_EDITS // 5 < n_accepted < N_EDITS * 4 // 5


@contextmanager
def bounded() -> Iterator[None]:
    """The time and the memory that a header may take, whatever it says."""
    tracemalloc.start()
    begin = time.thread_time()
    try:
        yield
        assert time.thread_time() - begin < SLOWEST_S
        assert tracemalloc.get_traced_memory()[1] < PEAK_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("model", ["ghost", "tiny"])
@pytest.mark.parametrize("rest", ["nothing", "holes"])
def test_a_header_cut_after_any_field_is_refused(
    models: dict[str, Parts], model: str, rest: str, tmp_path: Path
) -> None:
    """Holes are what a download that reserves its place leaves behind the part that came."""
    fields = models[model].fields()
    ends = list(itertools.accumulate(len(field) for field in fields))
    path = models[model].write(tmp_path / "cut.gguf")
    n_bytes = path.stat().st_size
    for end in ends[-2::-1]:
        os.truncate(path, end)
        if rest == "holes":
            os.truncate(path, n_bytes)
        assert not accepted(path), end


HUGE = {
    "a text": Key("general.name", V.STRING, 0),
    "an array of bytes": Key("general.bytes", V.ARRAY, [], V.UINT8, 3 << 30),
    "an array of numbers": Key("general.numbers", V.ARRAY, [], V.FLOAT64, 1 << 28),
    "an array of texts": Key("tokenizer.ggml.tokens", V.ARRAY, [], V.STRING, 1 << 27),
}


@pytest.mark.parametrize("what", HUGE)
def test_a_length_that_the_file_has_room_for_does_not_fill_memory(
    models: dict[str, Parts], what: str, tmp_path: Path
) -> None:
    """7 GB of data behind the header: one changed byte in a length would read them all."""
    parts = copy.deepcopy(models["ghost"])
    fields = [b"GGUF", struct.pack("<IQQ", 3, 0, 1), *HUGE[what].fields()]
    if what == "a text":
        fields[-1] = struct.pack("<Q", 4 << 30)
    path = write(tmp_path / "huge.gguf", b"".join(fields), parts.data_bytes)
    with bounded(), pytest.raises(FormatError, match="length of"):
        gguf_header.read(path)


@pytest.mark.parametrize("counts", [(1 << 27, 0), (0, 1 << 28)], ids=["tensors", "keys"])
def test_a_number_that_the_file_has_room_for_does_not_fill_memory(counts: tuple[int, int], tmp_path: Path) -> None:
    path = write(tmp_path / "huge.gguf", b"GGUF" + struct.pack("<IQQ", 3, *counts), 7 << 30)
    with bounded(), pytest.raises(FormatError, match="the number of"):
        gguf_header.read(path)


def test_many_arrays_share_one_allowance(tmp_path: Path) -> None:
    keys = [Key(f"a{n}", V.ARRAY, [], V.UINT8, gguf_header.MAX_ELEMENTS // 4) for n in range(5)]
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, len(keys))
    for key in keys:
        header += b"".join(key.fields()) + bytes(gguf_header.MAX_ELEMENTS // 4)
    with pytest.raises(FormatError, match=r"length of a4 is \d+, 0 are allowed"):
        gguf_header.read(write(tmp_path / "many.gguf", header, 0))


def test_a_long_key_does_not_make_a_long_message(tmp_path: Path) -> None:
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k" * 60_000) + struct.pack("<I", 99)
    path = write(tmp_path / "long.gguf", header, 0)
    with pytest.raises(FormatError) as caught:
        gguf_header.read(path)
    assert len(str(caught.value)) < 1000


# What llama.cpp asserts. Key without its architecture -> type and value; a value of None is left out.
Values = dict[str, tuple[GGUFValueType, Any]]

REFUSED: dict[str, tuple[Values, str]] = {
    "no layer": ({"block_count": (V.UINT32, 0)}, "block_count is 0, an integer from 1 to 512"),
    "100,000 layers": ({"block_count": (V.UINT32, 100_000)}, "block_count is 100000, an integer from 1 to 512"),
    "rotary size": ({"rope.dimension_count": (V.UINT32, 32)}, r"rope\.dimension_count is 32, \d+ is expected"),
    "no rotary size": ({"rope.dimension_count": (V.UINT32, 0)}, r"rope\.dimension_count is 0"),
    "key size": ({"attention.key_length": (V.UINT32, 32)}, r"key_length is 32, \d+ is expected"),
    "value size": ({"attention.value_length": (V.UINT32, 32)}, r"value_length is 32, \d+ is expected"),
    "negative epsilon": ({"attention.layer_norm_rms_epsilon": (V.FLOAT32, -1.0)}, r"rms_epsilon is -1\.0"),
    "epsilon no number": ({"attention.layer_norm_rms_epsilon": (V.FLOAT32, math.nan)}, "rms_epsilon is nan"),
    "other epsilon": ({"attention.layer_norm_epsilon": (V.FLOAT32, -1.0)}, r"layer_norm_epsilon is -1\.0"),
    "rope scaling": ({"rope.scaling.type": (V.STRING, "dynamic")}, r"rope\.scaling\.type is 'dynamic'; known are none"),
    "no rope scaling": ({"rope.scaling.type": (V.STRING, "")}, r"rope\.scaling\.type is ''"),
    **{
        f"{name} {value}": ({name: (V.FLOAT32, value)}, rf"{name} is {value}, a finite number is expected")
        for name in (
            "rope.scaling.factor",
            "rope.scale_linear",
            "rope.scaling.attn_factor",
            "rope.scaling.yarn_ext_factor",
            "rope.freq_base",
            "rope.freq_base_swa",
            "attention.scale",
            "logit_scale",
            "final_logit_softcapping",
        )
        for value in (math.nan, math.inf, -math.inf)
    },
    "negative scaling": ({"rope.scaling.factor": (V.FLOAT32, -1.0)}, r"scaling\.factor is -1\.0, a number from 0\.001"),
    "vanishing scaling": (
        {"rope.scaling.factor": (V.FLOAT32, 1e-45)},
        r"scaling\.factor is 1\.\S+, a number from 0\.001",
    ),
    "boundless scaling": (
        {"rope.scaling.factor": (V.FLOAT32, 1e30)},
        r"scaling\.factor is 1\.\S+, a number from 0\.001",
    ),
    "negative old scaling": ({"rope.scale_linear": (V.FLOAT32, -1.0)}, r"scale_linear is -1\.0"),
    "no base": ({"rope.freq_base": (V.FLOAT32, 0.0)}, r"freq_base is 0\.0, a number from 1"),
    "no base of windows": ({"rope.freq_base_swa": (V.FLOAT32, -1.0)}, r"freq_base_swa is -1\.0, a number from 1"),
    "an adapter": ({"general.type": (V.STRING, "adapter")}, "is a LoRA adapter"),
    "a projector": ({"general.type": (V.STRING, "mmproj")}, "reads images"),
    "an importance matrix": ({"general.type": (V.STRING, "imatrix")}, "is an importance matrix"),
    "no heads": ({"attention.head_count": (V.UINT32, 0)}, r"attention\.head_count is 0"),
    "heads missing": ({"attention.head_count": (V.UINT32, None)}, r"attention\.head_count is missing"),
    "heads do not divide": (
        {"attention.head_count": (V.UINT32, 7)},
        r"attention\.head_count is 7, which does not divide",
    ),
    "columns do not divide": (
        {"attention.head_count": (V.UINT32, 48), "attention.head_count_kv": (V.UINT32, 8)},
        r"embedding_length is \d+, which does not divide by head_count 48",
    ),
    "no key heads": ({"attention.head_count_kv": (V.UINT32, 0)}, r"head_count_kv is 0"),
    "heads of two numbers": ({"attention.head_count": (V.ARRAY, [4, 8])}, r"head_count is \[4, 8\], one number"),
    "experts": ({"expert_count": (V.UINT32, 2000)}, "expert_count is 2000, at most 1024"),
    "no expert used": ({"expert_count": (V.UINT32, 8)}, "expert_used_count is 0 of 8"),
    "experts used": ({"expert_used_count": (V.UINT32, 8)}, "expert_used_count is 8 of 0"),
    "groups": ({"expert_group_count": (V.UINT32, 2)}, "expert_group_count is 2, fewer"),
    "groups do not divide": (
        {
            name: (V.UINT32, n)
            for name, n in {"expert_count": 8, "expert_used_count": 2, "expert_group_count": 3}.items()
        },
        "expert_group_count is 3, of which 0 are used, for 8",
    ),
    "extra layers": ({"nextn_predict_layers": (V.UINT32, 5)}, "nextn_predict_layers is 5, at most block_count"),
    "odd heads": ({"attention.head_count": (V.UINT32, 5120), "embedding_length": (V.UINT32, 5120)}, "even number"),
    "token twice": ({"tokenizer.ggml.tokens": (V.ARRAY, ["a", "b", "a"])}, "'a' twice, as tokens 0 and 2"),
    "token twice up to NUL": ({"tokenizer.ggml.tokens": (V.ARRAY, ["a", "a\0b"])}, "'a' twice, as tokens 0 and 1"),
    "token named as an empty one": ({"tokenizer.ggml.tokens": (V.ARRAY, ["[EMPTY_1]", ""])}, r"'\[EMPTY_1\]' twice"),
}
ALLOWED: dict[str, tuple[str, Values]] = {
    "the sizes said aloud": (
        "qwen2",
        {
            f"{name}": (V.UINT32, 128)
            for name in ("attention.key_length", "attention.value_length", "rope.dimension_count")
        },
    ),
    "the heads of each layer": (
        "qwen2",
        {"attention.head_count": (V.ARRAY, [40] * 4), "attention.head_count_kv": (V.ARRAY, [8] * 4)},
    ),
    "heads wider than their columns": (
        "llama",
        {
            f"{name}": (V.UINT32, 160)
            for name in ("attention.key_length", "attention.value_length", "rope.dimension_count")
        },
    ),
    "heads that do not divide the columns": (
        "qwen3",
        {
            "attention.head_count": (V.UINT32, 48),
            **dict.fromkeys(("attention.key_length", "attention.value_length"), (V.UINT32, 128)),
        },
    ),
    "keys of another size than values": (
        "deepseek2",
        {"attention.key_length": (V.UINT32, 192), "attention.value_length": (V.UINT32, 128)},
    ),
    "a part that is rotated": ("phi3", {"rope.dimension_count": (V.UINT32, 96)}),
    "layers without heads": ("lfm2", {"attention.head_count_kv": (V.ARRAY, [0, 0, 8, 0])}),
    "no heads at all": ("mamba", {"attention.head_count": (V.UINT32, 0)}),
    "experts": ("qwen3moe", {"expert_count": (V.UINT32, 128), "expert_used_count": (V.UINT32, 8)}),
    "one expert of a dense model": ("hunyuan-dense", {"expert_count": (V.UINT32, 1)}),
    "empty tokens": ("qwen2", {"tokenizer.ggml.tokens": (V.ARRAY, ["a", "", ""])}),
    "no scaling, as llama.cpp has it": ("qwen2", {"rope.scaling.factor": (V.FLOAT32, 0.0)}),
    "yarn": ("qwen2", {"rope.scaling.type": (V.STRING, "yarn"), "rope.scaling.factor": (V.FLOAT32, 4.0)}),
}


def with_values(parts: Parts, values: Values, arch: str = "qwen2") -> Parts:
    changed = copy.deepcopy(parts)
    for short, (kind, value) in values.items():
        name = short if short.startswith(("tokenizer.", "general.")) else f"qwen2.{short}"
        if value is None:
            changed.keys = [key for key in changed.keys if key.name != name]
        else:
            changed.set(name, kind, value, V.STRING if "tokens" in name else V.UINT32)
    for key in changed.keys:
        key.name = key.name.replace("qwen2.", f"{arch}.", 1)
    changed.set("general.architecture", V.STRING, arch)
    return changed


@pytest.mark.parametrize("model", ["ghost", "tiny"])
@pytest.mark.parametrize("what", REFUSED)
def test_what_llama_cpp_asserts_is_refused_with_file_and_key(
    models: dict[str, Parts], model: str, what: str, tmp_path: Path
) -> None:
    values, message = REFUSED[what]
    path = with_values(models[model], values).write(tmp_path / "model.gguf")
    header = gguf_header.read(path)
    with pytest.raises(FormatError, match=message) as caught:
        shape.from_header(header)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("what", ALLOWED)
def test_what_other_models_do_lawfully_is_accepted(models: dict[str, Parts], what: str, tmp_path: Path) -> None:
    arch, values = ALLOWED[what]
    assert accepted(with_values(models["ghost"], values, arch).write(tmp_path / "model.gguf"))


LOADER = """
import os, sys
from qwq_lite.backend import native
api = native.engine()
for path in sys.argv[1:]:
    params = api.llama_model_default_params()
    params.no_alloc, params.load_mode, params.n_gpu_layers = True, api.LLAMA_LOAD_MODE_NONE, 0
    model = api.llama_model_load_from_file(os.fsencode(path), params)
    context = None
    if model:
        settings = api.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = 256
        context = api.llama_init_from_model(model, settings)
        if context:
            api.llama_free(context)
        api.llama_model_free(model)
    print("loaded" if context else "refused", flush=True)
"""


def loaded(paths: list[Path]) -> list[str]:
    """For each file "loaded", "refused", or how the process that loaded it ended; a new one goes on with the next."""
    found: list[str] = []
    while len(found) < len(paths):
        child = subprocess.run(
            [sys.executable, "-c", LOADER, *map(str, paths[len(found) :])],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )
        found += child.stdout.split()
        if child.returncode != 0:
            found.append(f"status {child.returncode}: {child.stderr.strip()[-200:]}")
    return found


def test_what_we_accept_ends_no_process(models: dict[str, Parts], tmp_path: Path) -> None:
    """A sample of the edited headers. Seeds are those of no other test, so that rules are not made for them alone."""
    paths: list[Path] = []
    for seed in itertools.count(N_EDITS):
        path = edited(models["tiny" if seed % 2 else "ghost"], seed, tmp_path / f"{seed}.gguf")
        if accepted(path):
            paths.append(path)
        if len(paths) == N_LOADED:
            break
    outcomes = loaded(paths)
    fatal = [
        (path.stem, outcome) for path, outcome in zip(paths, outcomes, strict=True) if outcome.startswith("status")
    ]
    assert not fatal
    assert N_LOADED // 4 < outcomes.count("loaded") < N_LOADED


def test_what_we_refuse_does_end_a_process(models: dict[str, Parts], tmp_path: Path) -> None:
    """Else the count above would say nothing, and the rules would be too many."""
    names = ("no layer", "rotary size", "rope scaling", "no expert used", "groups", "token twice")
    paths = [with_values(models["tiny"], REFUSED[name][0]).write(tmp_path / f"{name}.gguf") for name in names]
    good = models["tiny"].write(tmp_path / "good.gguf")
    outcomes = loaded([good, *paths, good])
    assert outcomes[0] == outcomes[-1] == "loaded"
    assert all(outcome.startswith("status ") for outcome in outcomes[1:-1]), outcomes
