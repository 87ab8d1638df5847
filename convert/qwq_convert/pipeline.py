"""The stages of a conversion: headers first, then every byte's place is known, then weights in one pass."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import GGMLQuantizationType, LlamaFileType

from qwq_lite import gguf_header
from qwq_lite.errors import CheckpointError, OutputError
from qwq_lite.gguf_header import TensorInfo
from qwq_lite.output import output_file
from qwq_lite.recipe import file_type_name, tensor_types
from qwq_lite.shape import ModelShape, from_config

from . import metadata, quantize, vocab
from .source import Checkpoint
from .tensors import TensorPair, pair

ARCHITECTURE = "Qwen2ForCausalLM"


@dataclass(frozen=True)
class Conversion:
    """What will be written, decided from headers alone."""

    output: Path
    kind: LlamaFileType
    shape: ModelShape
    keys: metadata.GgufKeys
    pairs: list[TensorPair]
    infos: list[TensorInfo]

    @property
    def source_bytes(self) -> int:
        return sum(entry.source.n_bytes for entry in self.pairs)

    @property
    def bytes_by_type(self) -> Mapping[GGMLQuantizationType, tuple[int, int]]:
        """Type -> (tensors, bytes), largest first."""
        found: dict[GGMLQuantizationType, tuple[int, int]] = {}
        for info in self.infos:
            count, size = found.get(info.type, (0, 0))
            found[info.type] = (count + 1, size + info.n_bytes)
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))


@dataclass(frozen=True)
class Progress:
    """After a window: the tensor it belongs to, bytes of source that it held, and bytes of source in all."""

    tensor: str
    n_bytes: int
    total_bytes: int


def default_output(checkpoint: Checkpoint, kind: LlamaFileType) -> Path:
    return Path(f"{checkpoint.name}-{file_type_name(kind)}.gguf")


def prepare(checkpoint: Checkpoint, kind: LlamaFileType, output: Path | None = None) -> Conversion:
    """Decide the whole conversion. Writes nothing.

    Raises: CheckpointError when the checkpoint cannot be converted.
    """
    _check_architecture(checkpoint)
    shape = from_config(checkpoint.config, checkpoint.folder / "config.json")
    pairs = pair(checkpoint, shape)
    types = tensor_types({entry.name: entry.shape for entry in pairs}, kind, shape.n_layer)
    infos = gguf_header.layout((entry.name, entry.shape, types[entry.name]) for entry in pairs)
    n_params = sum(
        entry.source.n_bytes // (2 if entry.source.type != GGMLQuantizationType.F32 else 4) for entry in pairs
    )
    keys = metadata.keys(checkpoint, shape, vocab.load(checkpoint, shape.n_vocab), kind, n_params)
    return Conversion(output or default_output(checkpoint, kind), kind, shape, keys, pairs, infos)


def convert(
    folder: Path,
    kind: LlamaFileType,
    output: Path | None = None,
    *,
    force: bool = False,
    n_threads: int | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Conversion:
    """Convert a checkpoint folder to one GGUF file, in one pass over its weights.

    Args:
        folder: config.json, tokenizer files and safetensors shards of a Qwen2ForCausalLM.
        kind: the file type, as `recipe.file_type` gives it.
        output: the file to write; default ./NAME-TYPE.gguf.
        force: replace an existing file.
        n_threads: threads of the kernels; default all cores.
        on_progress: called from worker threads.

    Returns: what was written. Raises: CheckpointError, OutputError.

    Example:
        convert(Path("QwQ-32B-Preview"), file_type("Q4_K_M"))
    """
    with Checkpoint(folder) as checkpoint:
        if output is not None:
            _check_not_source(output, checkpoint)
        _check_destination(output or default_output(checkpoint, kind), force)
        plan = prepare(checkpoint, kind, output)
        _run(plan, checkpoint, n_threads or os.cpu_count() or 1, on_progress)
    return plan


def _run(plan: Conversion, checkpoint: Checkpoint, n_threads: int, on_progress: Callable[[Progress], None]) -> None:
    header = gguf_header.encode(plan.shape.arch, plan.keys, plan.infos)
    data_bytes = sum(gguf_header.padded(info.n_bytes) for info in plan.infos)
    total = plan.source_bytes
    jobs = [
        quantize.Job(entry, info.type, len(header) + info.offset)
        for entry, info in zip(plan.pairs, plan.infos, strict=True)
    ]
    with output_file(plan.output, len(header) + data_bytes) as file:
        file.write_from(memoryview(header), 0)
        quantize.run(
            jobs,
            checkpoint,
            file.write_from,
            n_threads,
            lambda name, n_bytes: on_progress(Progress(name, n_bytes, total)),
        )


def _check_destination(final: Path, force: bool) -> None:
    """Everything about the output's name that can be known before work starts. Raises: OutputError."""
    folder = final.parent
    if not folder.is_dir():
        raise OutputError(f"{final}: the folder {folder} is not there; make it first, or choose another -o")
    if final.is_dir():
        raise OutputError(f"{final}: is a folder; name a file with -o, for example {final / 'model.gguf'}")
    if final.exists() and not final.is_file():
        raise OutputError(f"{final}: is no regular file and will not be replaced; choose another -o")
    if final.exists() and not force:
        raise OutputError(f"{final}: exists; replace it with --force, or choose another -o")


def _check_architecture(checkpoint: Checkpoint) -> None:
    found = checkpoint.config.get("architectures")
    path = checkpoint.folder / "config.json"
    if found != [ARCHITECTURE]:
        raise CheckpointError(
            f"{path}: architectures is {found!r}, [{ARCHITECTURE!r}] can be converted (QwQ, Qwen2.5, DeepSeek-R1-Distill-Qwen);"
            " for other models use llama.cpp's convert_hf_to_gguf.py"
        )
    if "quantization_config" in checkpoint.config:
        raise CheckpointError(
            f"{path}: quantization_config is set: these weights are quantized already; take the original checkpoint"
        )


def _check_not_source(output: Path, checkpoint: Checkpoint) -> None:
    """The output must not be a file of the checkpoint, whatever name or link leads to it."""
    if output.exists() and not output.is_dir():
        for file in checkpoint.folder.iterdir():
            if file.is_file() and file.samefile(output):
                raise OutputError(f"{output}: is {file}, a file of the checkpoint itself; choose another -o")
    elif output.is_dir() and output.samefile(checkpoint.folder):
        raise OutputError(f"{output}: is the checkpoint folder itself; name a file with -o")
