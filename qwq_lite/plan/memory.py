"""Bytes of weights, KV cache and compute buffers, by formula. Pure; knows no devices.

Formulas bound the planner's search and stand in for devices that are not there; where llama.cpp can be asked, `backend.measure`
has its own count.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from qwq_lite.backend.footprint import Buffers, Footprint
from qwq_lite.backend.settings import KV_TYPES, EngineSettings
from qwq_lite.formats.gguf_header import TensorInfo, tensor_bytes
from qwq_lite.formats.shape import WITHOUT_HEADS, ModelShape

_CTX_STEP = 256  # llama.cpp rounds a context up to a multiple of this
_VOCAB_ENTRY_BYTES = 512  # texts, scores, merges and their maps; measured
_PAGES_AROUND = 128 << 10  # Linux maps 64 KiB around a page that is read, on both sides of a gap; measured
_PIPELINE_COPIES = 4  # GGML_SCHED_MAX_COPIES: inputs of a graph that several GPUs work on at once
_EMBEDDING = "token_embd.weight"
_BLOCK = re.compile(r"blk\.(\d+)\.")
# What the CPU's kernels want in another layout, on x86 with AVX2; which ones is decided for each processor.
# Source: ggml-cpu/repack.cpp
_REPACKED = (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_K, GGMLQuantizationType.IQ4_NL)
# What the kernels for AMX take before those, in a buffer of their own: columns that a row must be a multiple of, and the bytes
# that a block grows by there. Source: ggml-cpu/amx/amx.cpp (supports_op), ggml-cpu/amx/mmq.cpp (get_row_size)
_AMX = {
    GGMLQuantizationType.F16: (16, 0),
    GGMLQuantizationType.Q4_0: (32, 0),
    GGMLQuantizationType.Q4_1: (32, 0),
    GGMLQuantizationType.Q8_0: (32, 4),
    GGMLQuantizationType.Q4_K: (256, 4),
    GGMLQuantizationType.Q5_K: (256, 4),
    GGMLQuantizationType.Q6_K: (256, 0),
    GGMLQuantizationType.IQ4_XS: (256, 2),
}
_AMX_ROWS = 32  # that the rows of a matrix must be a multiple of


def padded_ctx(n_ctx: int) -> int:
    return -(-n_ctx // _CTX_STEP) * _CTX_STEP


def kv_cache_bytes(shape: ModelShape, n_ctx: int, type_k: str, type_v: str) -> int:
    """Bytes the K and V caches take when the context is full.

    Shapes: K, V (n_layer, n_ctx, n_head_kv, head_dim). Raises: KeyError for an unknown type.
    Source: llama.cpp src/llama-kv-cache.cpp
    """
    rows = (type_k, shape.n_head_kv * shape.n_embd_head), (type_v, shape.n_head_kv * shape.value_length)
    return sum(tensor_bytes((row, padded_ctx(n_ctx)), KV_TYPES[name]) * shape.n_layer for name, row in rows)


def kv_type_objection(shape: ModelShape, type_k: str, type_v: str) -> str | None:
    """Why llama.cpp makes no cache of these types for a model, None where it does: blocks must divide a head.

    Source: llama.cpp src/llama-context.cpp (llama_init_from_model)
    """
    if shape.arch in WITHOUT_HEADS:
        return None
    for letter, name, length in (("k", type_k, shape.n_embd_head), ("v", type_v, shape.value_length)):
        block = GGML_QUANT_SIZES[KV_TYPES[name]][0]
        if length % block:
            why = f"whose blocks of {block} do not divide this model's heads of {length}"
            return f"type_{letter} (--type-{letter}) is {name}, {why}; f16 and bf16 are allowed"
    return None


def output_bytes(shape: ModelShape, n_outputs: int) -> int:
    """Rows of logits that the context keeps on the host. Source: llama_context::output_reserve"""
    return n_outputs * shape.n_vocab * 4


def compute_bytes(shape: ModelShape, choice: EngineSettings) -> int:
    """Bytes of temporary buffers with flash attention: the feed-forward of one micro-batch, and the mask.

    Fitted to llama.cpp's own count for QwQ's geometry: 3 FFN + 3 hidden rows of F32 for quantized V, 4 hidden for f16.
    Source: llama_context::graph_reserve, measured
    """
    n = choice.n_ubatch
    hidden = 3 if choice.type_v.startswith("q") else 4
    activations = (3 * shape.n_ff + hidden * shape.n_embd) * n * 4
    logits = choice.n_outputs_max * shape.n_vocab * 4
    mask = padded_ctx(choice.n_ctx) * n * 2
    return max(activations, logits) + mask


def gpu_compute_bytes(shape: ModelShape, choice: EngineSettings, *, pipelined: bool) -> int:
    """The same on a GPU. pipelined: several share all layers, and each keeps copies of a graph's inputs, mask among them.

    Source: llama_context::llama_context (pipeline_parallel), ggml_backend_sched_new; not measured
    """
    return compute_bytes(shape, choice) + (input_bytes(shape, choice) * (_PIPELINE_COPIES - 1) if pipelined else 0)


def input_bytes(shape: ModelShape, choice: EngineSettings) -> int:
    """A graph's inputs: the mask and the embeddings of one micro-batch."""
    return choice.n_ubatch * (padded_ctx(choice.n_ctx) * 2 + shape.n_embd * 4)


def flash_pool_bytes(shape: ModelShape, choice: EngineSettings) -> int:
    """What CUDA's flash attention takes beside llama.cpp's count: quantized K and V of one layer as F16, 128 MiB at 32,768.

    Source: computed; ggml-cuda converts a layer's K and V before the kernel
    """
    lengths = (choice.type_k, shape.n_embd_head), (choice.type_v, shape.value_length)
    n_converted = sum(length for name, length in lengths if name.startswith("q"))
    return n_converted * padded_ctx(choice.n_ctx) * shape.n_head_kv * 2


def footprint(
    shape: ModelShape,
    tensors: Iterable[TensorInfo],
    choice: EngineSettings,
    gpus: Sequence[str] = (),
    *,
    amx: bool = False,
) -> Footprint:
    """All buffers by formula. gpus: the devices that take layers, in llama.cpp's order; without any, all is on the host.

    amx: whether the CPU's device has a buffer type for AMX, which is used in place of CPU_REPACK. token_embd stays on the host
    even when every layer is on a GPU: only its rows are looked up. A tied model's output is a second copy of it there, and in
    the buffer for AMX.
    """
    infos = list(tensors)
    places = layer_places(shape.n_layer, choice, gpus)
    copies = choice.repack and (not gpus or choice.no_host)
    weights, mapped, repacked = _place_weights(infos, shape.n_layer, places, copies=copies, amx=amx)
    kv = kv_cache_bytes(shape, choice.n_ctx, choice.type_k, choice.type_v)
    used = [name for name in gpus if name in places]
    pipelined = len(used) > 1 and "CPU" not in places
    compute = gpu_compute_bytes(shape, choice, pipelined=pipelined)
    inputs = input_bytes(shape, choice)
    host_compute = compute if "CPU" in places[:-1] or not used else inputs * (_PIPELINE_COPIES if pipelined else 1)
    devices = {name: Buffers(weights[name], kv * places[:-1].count(name) // shape.n_layer, compute) for name in used}
    devices["CPU"] = Buffers(
        weights["CPU"],
        kv - sum(buffers.kv for buffers in devices.values()),
        host_compute + output_bytes(shape, choice.n_outputs_max),
        *((0, 0) if choice.load_mode == "none" else (mapped, repacked)),
    )
    return Footprint(devices, "formula")


def _place_weights(
    infos: Sequence[TensorInfo], n_layer: int, places: Sequence[str], *, copies: bool, amx: bool
) -> tuple[Counter[str], int, int]:
    """Bytes of weights by device; of the host's, those of the file's pages, and those that are read once and copied.

    copies: whether the host's weights are copied to the layout that the CPU's kernels want.
    """
    tied = all(info.name != "output.weight" for info in infos)
    weights: Counter[str] = Counter()
    mapped = repacked = 0
    for info in infos:
        place = places[_layer(info.name, n_layer)] if info.name != _EMBEDDING else "CPU"
        weights[place] += info.n_bytes
        if place == "CPU" and copies and _is_repacked(info, amx):
            repacked += info.n_bytes
            weights["CPU"] += _growth(info, amx)
        elif place == "CPU":
            mapped += info.n_bytes
        if info.name == _EMBEDDING and tied:
            if places[-1] != "CPU":
                weights[places[-1]] += info.n_bytes
            elif copies and amx and _fits_amx(info):
                weights["CPU"] += info.n_bytes + _growth(info, amx)
    return weights, mapped, repacked


def layer_bytes(shape: ModelShape, tensors: Iterable[TensorInfo], choice: EngineSettings) -> list[int]:
    """Weights and cache of each layer, where a GPU has them; the last is the output's, of a tied model the embedding again."""
    kv = kv_cache_bytes(shape, choice.n_ctx, choice.type_k, choice.type_v) // shape.n_layer
    sizes = [kv] * shape.n_layer + [0]
    infos = list(tensors)
    tied = all(info.name != "output.weight" for info in infos)
    for info in infos:
        if info.name != _EMBEDDING or tied:
            sizes[_layer(info.name, shape.n_layer)] += info.n_bytes
    return sizes


def vocab_bytes(shape: ModelShape) -> int:
    """The vocabulary's tables beside the buffers, on the host."""
    return shape.n_vocab * _VOCAB_ENTRY_BYTES


def host_overhead_bytes(shape: ModelShape, tensors: Iterable[TensorInfo], host: Buffers, *, amx: bool = False) -> int:
    """What the host takes beside the buffers: the vocabulary, and pages of repacked tensors that their neighbours bring in."""
    n_repacked = sum(_is_repacked(info, amx) for info in tensors) if host.reclaimable else 0
    return vocab_bytes(shape) + n_repacked * _PAGES_AROUND


def layer_places(n_layer: int, choice: EngineSettings, gpus: Sequence[str]) -> list[str]:
    """Where each layer lies, the output last: the host keeps the first. Source: llama_model::load_tensors"""
    n_all = n_layer + 1
    if not gpus:
        return ["CPU"] * n_all
    n_gpu = n_all if choice.n_gpu_layers < 0 else min(choice.n_gpu_layers, n_all)
    split = choice.tensor_split or (n_gpu,)
    return ["CPU"] * (n_all - n_gpu) + [name for name, n in zip(gpus, split, strict=False) for _ in range(n)]


def _is_repacked(info: TensorInfo, amx: bool) -> bool:
    if amx and _fits_amx(info) and info.name != _EMBEDDING:
        return True
    return info.type in _REPACKED and _BLOCK.match(info.name) is not None


def _fits_amx(info: TensorInfo) -> bool:
    columns, _ = _AMX.get(info.type, (0, 0))
    return bool(columns) and len(info.shape) == 2 and not info.shape[0] % columns and not info.shape[1] % _AMX_ROWS


def _growth(info: TensorInfo, amx: bool) -> int:
    """Bytes that a tensor takes more in the buffer for AMX than in the file."""
    if not (amx and _fits_amx(info)):
        return 0
    block = int(GGML_QUANT_SIZES[info.type][0])
    return math.prod(info.shape) // block * _AMX[info.type][1]


def _layer(name: str, n_layer: int) -> int:
    match = _BLOCK.match(name)
    return int(match[1]) if match else n_layer
