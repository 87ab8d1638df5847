"""Bytes of weights, KV cache and compute buffers, by formula. Pure; knows no devices.

Formulas bound the planner's search and stand in for devices that are not there; where llama.cpp can be asked, `backend.measure`
has its own count.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from gguf.constants import GGMLQuantizationType

from qwq_lite.gguf_header import TensorInfo, tensor_bytes
from qwq_lite.shape import ModelShape

Source = Literal["measured", "formula", "table"]

KV_TYPES = {
    "f16": GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
    "q4_0": GGMLQuantizationType.Q4_0,
}
_CTX_STEP = 256  # llama.cpp rounds a context up to a multiple of this


@dataclass(frozen=True)
class Choice:
    """What a plan chooses, in llama.cpp's words.

    n_gpu_layers: the last so many layers, the output counts as one. repack: weights of CPU layers are copied into a layout
    that its kernels like better.
    """

    n_ctx: int
    type_k: str = "f16"
    type_v: str = "f16"
    n_ubatch: int = 512
    n_gpu_layers: int = 0
    n_seq_max: int = 4
    n_outputs_max: int = 4
    repack: bool = True


@dataclass(frozen=True)
class Buffers:
    """Bytes on one device. mapped: part of `weights` that is pages of the file; reclaimable: pages read once, for repacking."""

    weights: int = 0
    kv: int = 0
    compute: int = 0
    mapped: int = 0
    reclaimable: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.compute


@dataclass(frozen=True)
class Footprint:
    """Buffers by device, "CPU" for the host. n_splits: parts of the graph, more where an operation leaves its device."""

    devices: dict[str, Buffers]
    source: Source
    n_splits: int | None = None

    @property
    def host(self) -> Buffers:
        return self.devices.get("CPU", Buffers())

    @property
    def total(self) -> int:
        return sum(buffers.total for buffers in self.devices.values())


def padded_ctx(n_ctx: int) -> int:
    return -(-n_ctx // _CTX_STEP) * _CTX_STEP


def kv_cache_bytes(shape: ModelShape, n_ctx: int, type_k: str, type_v: str) -> int:
    """Bytes the K and V caches take when the context is full.

    Shapes: K, V (n_layer, n_ctx, n_head_kv, head_dim). Raises: KeyError for an unknown type.
    Source: llama.cpp src/llama-kv-cache.cpp
    """
    row = shape.n_head_kv * shape.n_embd_head
    return sum(tensor_bytes((row, padded_ctx(n_ctx)), KV_TYPES[name]) * shape.n_layer for name in (type_k, type_v))


def output_bytes(shape: ModelShape, n_outputs: int) -> int:
    """Rows of logits that the context keeps on the host. Source: llama_context::output_reserve"""
    return n_outputs * shape.n_vocab * 4


def compute_bytes(shape: ModelShape, choice: Choice) -> int:
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


def flash_pool_bytes(shape: ModelShape, choice: Choice) -> int:
    """What CUDA's flash attention takes beside llama.cpp's count: quantized K and V of one layer as F16, 128 MiB at 32,768.

    Source: computed; ggml-cuda converts a layer's K and V before the kernel
    """
    n_converted = sum(name.startswith("q") for name in (choice.type_k, choice.type_v))
    return n_converted * padded_ctx(choice.n_ctx) * shape.n_head_kv * shape.n_embd_head * 2


def footprint(shape: ModelShape, tensors: Iterable[TensorInfo], choice: Choice, gpu: str | None = None) -> Footprint:
    """All buffers by formula. gpu: the device that takes layers; None keeps all on the host.

    token_embd stays on the host even when every layer is on the GPU: only its rows are looked up.
    """
    n_gpu = min(choice.n_gpu_layers, shape.n_layer + 1) if gpu else 0
    if choice.n_gpu_layers < 0 and gpu:
        n_gpu = shape.n_layer + 1
    on_gpu = on_host = 0
    for info in tensors:
        if _on_gpu(info.name, shape.n_layer, n_gpu):
            on_gpu += info.n_bytes
        else:
            on_host += info.n_bytes
    layers_on_gpu = max(0, n_gpu - 1)  # the output is the first that goes there
    kv = kv_cache_bytes(shape, choice.n_ctx, choice.type_k, choice.type_v)
    kv_gpu = kv * layers_on_gpu // shape.n_layer
    compute = compute_bytes(shape, choice)
    output = output_bytes(shape, choice.n_outputs_max)
    if gpu is None or not n_gpu:
        return Footprint({"CPU": Buffers(on_host, kv, compute + output, mapped=on_host)}, "formula")
    host_compute = compute if layers_on_gpu < shape.n_layer else choice.n_ubatch * shape.n_embd * 4
    return Footprint(
        {
            gpu: Buffers(on_gpu, kv_gpu, compute),
            "CPU": Buffers(on_host, kv - kv_gpu, host_compute + output, mapped=on_host),
        },
        "formula",
    )


def _on_gpu(name: str, n_layer: int, n_gpu: int) -> bool:
    """llama.cpp gives the GPU the last layers, and the output as one more. Source: llama_model::load_tensors"""
    match = re.match(r"blk\.(\d+)\.", name)
    if match:
        return int(match[1]) >= n_layer + 1 - n_gpu
    return n_gpu > 0 and name.startswith("output")
