"""What a plan chooses, in llama.cpp's words: data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gguf.constants import GGMLQuantizationType

KV_TYPES = {
    "f16": GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
    "q4_0": GGMLQuantizationType.Q4_0,
}
LoadMode = Literal["mmap", "none"]


@dataclass(frozen=True)
class EngineSettings:
    """What a plan chooses.

    n_ctx: tokens of context, shared by n_seq_max sequences. n_outputs_max: rows of logits that one decode can ask for, never
    below n_seq_max. n_gpu_layers: the last so many layers, the output counts as one; negative for all. tensor_split: how many
    of them each GPU gets, empty where there is one.
    load_mode, repack, no_host: where the weights of host layers lie. "mmap" keeps pages of the file, which the system may take
    back; "none" reads them into memory of their own, which a GPU's driver pins unless no_host. repack copies what the CPU's
    kernels like in another layout; llama.cpp does it only where no pinned memory is used.
    """

    n_ctx: int
    type_k: str = "f16"
    type_v: str = "f16"
    n_ubatch: int = 512
    n_gpu_layers: int = 0
    n_seq_max: int = 4
    n_outputs_max: int = 4
    load_mode: LoadMode = "mmap"
    repack: bool = True
    no_host: bool = False
    tensor_split: tuple[int, ...] = ()
