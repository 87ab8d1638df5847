"""The parameters of a model and its context that a plan chooses, in llama.cpp's words. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

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

    load_mode, repack and no_host say where the weights of host layers lie.
    """

    n_ctx: int  # tokens of context, shared by n_seq_max sequences
    type_k: str = "f16"  # a name of KV_TYPES
    type_v: str = "f16"
    n_ubatch: int = 512
    n_gpu_layers: int = 0  # the last so many layers, the output counts as one; negative for all
    n_seq_max: int = 4
    n_outputs_max: int = 4  # rows of logits that one decode can ask for, never below n_seq_max
    # "mmap": pages of the file, which the system may take back. "none": memory of their own, which a GPU's driver pins
    # unless no_host.
    load_mode: LoadMode = "mmap"
    repack: bool = True  # copy weights into the layout of the CPU's kernels; only where no pinned memory is used
    no_host: bool = False
    tensor_split: tuple[int, ...] = ()  # how many of the layers each GPU gets, empty where there is one


def settings_from_json(data: dict[str, Any]) -> EngineSettings:
    """What `dataclasses.asdict` made of settings. Raises: KeyError, TypeError for what is none."""
    return EngineSettings(**{**data, "tensor_split": tuple(data["tensor_split"])})
