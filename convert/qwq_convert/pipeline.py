"""The stages of a conversion: headers first, then every byte's place is known, then weights in one pass."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gguf.constants import GGMLQuantizationType, LlamaFileType

from qwq_lite import gguf_header
from qwq_lite.errors import UsageError
from qwq_lite.files import written_behind
from qwq_lite.gguf_header import TensorInfo
from qwq_lite.output import output_file
from qwq_lite.recipe import Choice, file_type_name, importance_needed, tensor_types
from qwq_lite.shape import ModelShape, from_config

from . import destination, digests, family, metadata, quantize, vocab
from .imatrix import Imatrix
from .roundtrip import RoundTrip
from .source import Checkpoint
from .tensors import TensorPair, pair

NO_CHOICE = Choice()


@dataclass(frozen=True)
class Target:
    """One file that will be written. infos: in the file's order, offsets from the start of the data section."""

    output: Path
    kind: LlamaFileType
    header: bytes  # without digests
    infos: tuple[TensorInfo, ...]

    @property
    def n_bytes(self) -> int:
        return len(self.header) + sum(gguf_header.padded(info.n_bytes) for info in self.infos)

    @property
    def bits_per_weight(self) -> float:
        n_params = sum(info.n_params for info in self.infos)
        return 8 * sum(info.n_bytes for info in self.infos) / n_params

    @property
    def bytes_by_type(self) -> Mapping[GGMLQuantizationType, tuple[int, int]]:
        """Type -> (tensors, bytes), largest first."""
        found: dict[GGMLQuantizationType, tuple[int, int]] = {}
        for info in self.infos:
            count, size = found.get(info.type, (0, 0))
            found[info.type] = (count + 1, size + info.n_bytes)
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))


@dataclass(frozen=True)
class Conversion:
    """What will be written, decided from headers alone. notices: a line each for what the user should know of the source."""

    shape: ModelShape
    pairs: tuple[TensorPair, ...]
    targets: tuple[Target, ...]
    notices: tuple[str, ...] = ()

    @property
    def source_bytes(self) -> int:
        return sum(entry.source.n_bytes for entry in self.pairs)


@dataclass(frozen=True)
class Progress:
    """After a window: the tensor it belongs to, bytes of source that it held, and bytes of source in all."""

    tensor: str
    n_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Written:
    """A conversion that is done. errors: for each target the round-trip error of each tensor by name, where it was asked for."""

    conversion: Conversion
    errors: tuple[Mapping[str, RoundTrip], ...] = ()

    @property
    def outputs(self) -> tuple[Path, ...]:
        return tuple(target.output for target in self.conversion.targets)


def prepare(
    checkpoint: Checkpoint,
    kinds: Sequence[LlamaFileType],
    output: Path | None = None,
    choice: Choice = NO_CHOICE,
    imatrix: Imatrix | None = None,
) -> Conversion:
    """Decide the whole conversion. Writes nothing.

    Args:
        output: the file to write, the folder for the files of several kinds; default ./NAME-TYPE.gguf.

    Raises: CheckpointError when the checkpoint cannot be converted; UsageError for a choice that cannot be meant.
    """
    family.check(checkpoint)
    shape = from_config(checkpoint.config, checkpoint.folder / "config.json")
    pairs = pair(checkpoint, shape)
    words = vocab.load(checkpoint, shape.n_vocab)
    outputs = destination.outputs(checkpoint.name, kinds, output)
    choice = replace(choice, has_imatrix=imatrix is not None)
    targets = []
    for kind, path in zip(kinds, outputs, strict=True):
        types = tensor_types({entry.name: entry.shape for entry in pairs}, kind, shape.n_layer, choice)
        _check_importances(kind, types, imatrix)
        infos = gguf_header.layout((entry.name, entry.shape, types[entry.name]) for entry in pairs)
        keys = metadata.keys(checkpoint, shape, words, kind, sum(info.n_params for info in infos))
        keys |= imatrix.keys() if imatrix is not None else {}
        keys[digests.KEY] = digests.placeholder(len(infos))
        targets.append(Target(path, kind, gguf_header.encode(shape.arch, keys, infos), tuple(infos)))
    return Conversion(shape, tuple(pairs), tuple(targets), tuple(checkpoint.notices))


def look(
    folder: Path,
    kinds: Sequence[LlamaFileType],
    output: Path | None = None,
    *,
    choice: Choice = NO_CHOICE,
    imatrix: Imatrix | None = None,
) -> Conversion:
    """What `convert` would write, tensor by tensor. Writes nothing, and does not mind what stands there."""
    with Checkpoint(folder) as checkpoint:
        return prepare(checkpoint, kinds, output, choice, imatrix)


def convert(
    folder: Path,
    kinds: LlamaFileType | Sequence[LlamaFileType],
    output: Path | None = None,
    *,
    choice: Choice = NO_CHOICE,
    imatrix: Imatrix | None = None,
    report: bool = False,
    force: bool = False,
    n_threads: int | None = None,
    on_prepared: Callable[[Conversion], None] = lambda conversion: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Written:
    """Convert a checkpoint folder to GGUF, one file of each kind, in one pass over its weights.

    Args:
        folder: config.json, tokenizer files and safetensors shards of a Qwen2ForCausalLM.
        kinds: the file types, as `recipe.file_type` gives them.
        output: the file to write, the folder for the files of several kinds; default ./NAME-TYPE.gguf.
        report: measure what rounding does to each tensor.
        force: replace existing files.
        n_threads: threads of the kernels; default all cores.
        on_prepared: called before anything is written.
        on_progress: called from worker threads.

    Raises: CheckpointError, OutputError, UsageError.

    Example:
        convert(Path("QwQ-32B-Preview"), file_type("Q4_K_M"))
    """
    wanted = [kinds] if isinstance(kinds, LlamaFileType) else list(dict.fromkeys(kinds))
    with Checkpoint(folder) as checkpoint:
        destination.check(destination.outputs(checkpoint.name, wanted, output), checkpoint, force)
        plan = prepare(checkpoint, wanted, output, choice, imatrix)
        destination.check_room([(target.output, target.n_bytes) for target in plan.targets])
        on_prepared(plan)
        threads = n_threads or os.cpu_count() or 1
        return Written(plan, _run(plan, checkpoint, imatrix, report, threads, on_progress))


def _run(
    plan: Conversion,
    checkpoint: Checkpoint,
    imatrix: Imatrix | None,
    report: bool,
    n_threads: int,
    on_progress: Callable[[Progress], None],
) -> tuple[Mapping[str, RoundTrip], ...]:
    total = plan.source_bytes
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(output_file(target.output, target.n_bytes)) for target in plan.targets]
        for file in files:
            stack.enter_context(written_behind(file))
        jobs = list(_jobs(plan, [file.write_from for file in files], imatrix, report))
        made = quantize.run(
            jobs, checkpoint, n_threads, lambda name, n_bytes: on_progress(Progress(name, n_bytes, total))
        )
        errors = []
        for target, file in zip(plan.targets, files, strict=True):
            mine = {info.name: _of_type(made[info.name], info.type) for info in target.infos}
            header = digests.sealed(target.header, [one.digest.hexdigest() for one in mine.values()])
            file.write_from(memoryview(header), 0)
            errors.append({name: one.error for name, one in mine.items() if one.error is not None})
    return tuple(errors)


def _jobs(
    plan: Conversion, writers: Sequence[quantize.Write], imatrix: Imatrix | None, report: bool
) -> list[quantize.Job]:
    """A tensor that several files have as one type is converted once."""
    jobs = []
    for number, entry in enumerate(plan.pairs):
        places = defaultdict(list)
        for target, write in zip(plan.targets, writers, strict=True):
            info = target.infos[number]
            places[info.type].append((write, len(target.header) + info.offset))
        importances = imatrix.row(entry.name, entry.shape[0]) if imatrix is not None else None
        made = tuple(
            quantize.Made(kind, tuple(where), importances, RoundTrip() if report else None)
            for kind, where in places.items()
        )
        jobs.append(quantize.Job(entry, made))
    return jobs


def _of_type(made: Sequence[quantize.Made], kind: GGMLQuantizationType) -> quantize.Made:
    return next(one for one in made if one.type == kind)


def _check_importances(kind: LlamaFileType, types: Mapping[str, GGMLQuantizationType], imatrix: Imatrix | None) -> None:
    """Some types round by importances alone."""
    for tensor, wanted in types.items():
        if importance_needed(wanted, tensor, kind) and (imatrix is None or tensor not in imatrix):
            found = "no --imatrix is given" if imatrix is None else f"{imatrix.path} has none for it"
            raise UsageError(
                f"{file_type_name(kind)}: {tensor} becomes {wanted.name}, which needs importances, and {found}; give a matrix"
                " of this model (llama.cpp's llama-imatrix makes it), or choose a type that does without, for example Q2_K"
            )
