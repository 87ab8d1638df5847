"""The stages of a conversion: headers first, then every byte's place is known, then weights in one pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from qwq_convert import destination, digests, metadata, quantize
from qwq_convert.checkpoint import family, tokenizer
from qwq_convert.checkpoint.files import Checkpoint
from qwq_convert.checkpoint.tensors import TensorPair, pair
from qwq_convert.imatrix import Imatrix
from qwq_convert.roundtrip import RoundTrip
from qwq_lite.backend.kernels import Floats
from qwq_lite.errors import CheckpointError, UsageError
from qwq_lite.formats import gguf_header, gguf_writer
from qwq_lite.formats.gguf_header import TensorInfo
from qwq_lite.formats.shape import ModelShape, from_config
from qwq_lite.formats.tensor_types import QuantizeOptions, default_type, file_type_name, importance_needed, tensor_types
from qwq_lite.system import process_limits
from qwq_lite.system.files import RandomAccessFile
from qwq_lite.system.output import output_files

NO_CHOICE = QuantizeOptions()


@dataclass(frozen=True)
class Target:
    """One file that will be written."""

    output: Path
    kind: LlamaFileType
    header: bytes  # without digests
    infos: tuple[TensorInfo, ...]  # in the file's order, offsets from the start of the data section

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
    """What will be written, decided from headers alone."""

    shape: ModelShape
    pairs: tuple[TensorPair, ...]
    targets: tuple[Target, ...]
    importances: Mapping[str, Floats]  # a row for each tensor that has some
    notices: tuple[str, ...] = ()  # what the user should know of the source, a line each

    @property
    def source_bytes(self) -> int:
        return sum(entry.source.n_bytes for entry in self.pairs)


@dataclass(frozen=True)
class ConversionProgress:
    """The state after a window of rows."""

    tensor: str  # that the window belongs to
    n_bytes: int  # of source that the window held
    total_bytes: int  # of source in all


@dataclass(frozen=True)
class FinishedConversion:
    """A conversion that is done."""

    conversion: Conversion
    # for each target the round-trip error of each tensor by name, where it was asked for
    errors: tuple[Mapping[str, RoundTrip], ...] = ()

    @property
    def outputs(self) -> tuple[Path, ...]:
        return tuple(target.output for target in self.conversion.targets)


def prepare(
    checkpoint: Checkpoint,
    kinds: Sequence[LlamaFileType],
    output: str | Path | None = None,
    choice: QuantizeOptions = NO_CHOICE,
    imatrix: Imatrix | None = None,
) -> Conversion:
    """Decide the whole conversion. Writes nothing.

    Args:
        output: the file to write; the folder, where several kinds are wanted or a text ends in a separator; default
            ./NAME-TYPE.gguf.

    Raises: CheckpointError when the checkpoint cannot be converted; UsageError for a choice that cannot be meant.
    """
    family.check(checkpoint)
    shape = from_config(checkpoint.config, checkpoint.folder / "config.json")
    pairs = pair(checkpoint, shape)
    words = tokenizer.load(checkpoint, shape.n_vocab)
    importances = _importances(checkpoint, pairs, imatrix) if imatrix is not None else {}
    choice = replace(choice, has_imatrix=imatrix is not None)
    targets = []
    for kind, path in destination.outputs(checkpoint.name, kinds, output).items():
        types = tensor_types({entry.name: entry.shape for entry in pairs}, kind, shape.n_layer, choice)
        _check_importances(kind, types, importances, imatrix)
        _note_fallbacks(checkpoint, kind, types, pairs)
        infos = gguf_writer.layout((entry.name, entry.shape, types[entry.name]) for entry in pairs)
        keys = metadata.keys(checkpoint, shape, words, kind, sum(info.n_params for info in infos))
        keys |= imatrix.keys() if imatrix is not None else {}
        keys[digests.KEY] = digests.placeholder(len(infos))
        targets.append(Target(path, kind, gguf_writer.encode(shape.arch, keys, infos), tuple(infos)))
    return Conversion(shape, tuple(pairs), tuple(targets), importances, tuple(checkpoint.notices))


def look(
    folder: Path,
    kinds: Sequence[LlamaFileType],
    output: str | Path | None = None,
    *,
    choice: QuantizeOptions = NO_CHOICE,
    imatrix: Imatrix | None = None,
) -> Conversion:
    """What `convert` would write, tensor by tensor. Writes nothing, and does not mind what stands there."""
    with Checkpoint(folder) as checkpoint:
        return prepare(checkpoint, kinds, output, choice, imatrix)


def convert(
    folder: Path,
    kinds: LlamaFileType | Sequence[LlamaFileType],
    output: str | Path | None = None,
    *,
    choice: QuantizeOptions = NO_CHOICE,
    imatrix: Imatrix | None = None,
    report: bool = False,
    force: bool = False,
    n_threads: int | None = None,
    on_prepared: Callable[[Conversion], None] = lambda conversion: None,
    on_progress: Callable[[ConversionProgress], None] = lambda progress: None,
) -> FinishedConversion:
    """Convert a checkpoint folder to GGUF, one file of each kind, in one pass over its weights.

    Args:
        folder: config.json, tokenizer files and safetensors shards of a Qwen2ForCausalLM.
        kinds: the file types, as `tensor_types.file_type` gives them.
        output: the file to write; the folder, where several kinds are wanted or a text ends in a separator; default
            ./NAME-TYPE.gguf.
        report: measure what rounding does to each tensor.
        force: replace existing files.
        n_threads: threads of the kernels; default all CPUs that the process may use.
        on_prepared: called before anything is written.
        on_progress: called from worker threads.

    Raises: CheckpointError, OutputError, UsageError.

    Example:
        convert(Path("QwQ-32B-Preview"), file_type("Q4_K_M"))
    """
    wanted = [kinds] if isinstance(kinds, LlamaFileType) else kinds
    with Checkpoint(folder) as checkpoint:
        finals = list(destination.outputs(checkpoint.name, wanted, output).values())
        make = len(finals) > 1 or destination.names_folder(output)
        destination.check(finals, checkpoint, force, [imatrix.path] if imatrix is not None else [], make)
        plan = prepare(checkpoint, wanted, output, choice, imatrix)
        files = [(target.output, target.n_bytes) for target in plan.targets]
        destination.check_room(files)
        on_prepared(plan)
        destination.make_folder(finals[0].parent)
        with output_files(files, fresh=not force) as opened:
            errors = _run(plan, checkpoint, opened, report, n_threads or process_limits.usable_cpus(), on_progress)
            checkpoint.check_unchanged()
    return FinishedConversion(plan, errors)


def _run(
    plan: Conversion,
    checkpoint: Checkpoint,
    files: Sequence[RandomAccessFile],
    report: bool,
    n_threads: int,
    on_progress: Callable[[ConversionProgress], None],
) -> tuple[Mapping[str, RoundTrip], ...]:
    """Weights first; the headers need their digests."""
    total = plan.source_bytes
    jobs = _jobs(plan, [file.write_from for file in files], report)
    made = quantize.run(jobs, checkpoint, n_threads, lambda name, n: on_progress(ConversionProgress(name, n, total)))
    errors = []
    for target, file in zip(plan.targets, files, strict=True):
        mine = {info.name: _of_type(made[info.name], info.type) for info in target.infos}
        header = digests.write_digests(target.header, [one.digest.hexdigest() for one in mine.values()])
        file.write_from(memoryview(header), 0)
        errors.append({name: one.error for name, one in mine.items() if one.error is not None})
    return tuple(errors)


def _jobs(plan: Conversion, writers: Sequence[quantize.Write], report: bool) -> list[quantize.Job]:
    """A tensor that several files have as one type is converted once."""
    jobs = []
    for number, entry in enumerate(plan.pairs):
        places = defaultdict(list)
        for target, write in zip(plan.targets, writers, strict=True):
            info = target.infos[number]
            places[info.type].append((write, len(target.header) + info.offset))
        importances = plan.importances.get(entry.name)
        made = tuple(
            quantize.Made(kind, tuple(where), importances, RoundTrip() if report else None)
            for kind, where in places.items()
        )
        jobs.append(quantize.Job(entry, made))
    return jobs


def _of_type(made: Sequence[quantize.Made], kind: GGMLQuantizationType) -> quantize.Made:
    return next(one for one in made if one.type == kind)


def _importances(checkpoint: Checkpoint, pairs: Sequence[TensorPair], imatrix: Imatrix) -> dict[str, Floats]:
    """Rows of the matrix by tensor. Raises: CheckpointError where they are another model's."""
    rows = {entry.name: imatrix.row(entry.name, entry.shape[0]) for entry in pairs}
    found = {name: row for name, row in rows.items() if row is not None}
    n_wanted = sum(len(entry.shape) > 1 for entry in pairs)
    if not found:
        raise CheckpointError(
            f"{imatrix.path}: none of its {len(imatrix.rows)} entries is a tensor of {checkpoint.folder};"
            " give the importance matrix of this model"
        )
    # llama.cpp measures none of the embedding, and of the output only when it is asked to.
    missing = [entry.name for entry in pairs if len(entry.shape) > 1 and entry.name.startswith("blk.")]
    missing = [name for name in missing if name not in found]
    if missing:
        checkpoint.notice(
            f"{imatrix.path} has importances for {len(found)} of {n_wanted} tensors; the first without is {missing[0]}"
        )
    return found


def _check_importances(
    kind: LlamaFileType,
    types: Mapping[str, GGMLQuantizationType],
    importances: Mapping[str, Floats],
    imatrix: Imatrix | None,
) -> None:
    """Some types round by importances alone."""
    for tensor, wanted in types.items():
        if importance_needed(wanted, tensor, kind) and tensor not in importances:
            found = "no --imatrix is given" if imatrix is None else f"{imatrix.path} has none for {tensor}"
            raise UsageError(
                f"{file_type_name(kind)} needs importances, and {found}; give a matrix of this model (llama.cpp's llama-imatrix"
                " makes it), or choose a type that does without: Q2_K, IQ3_S and all larger ones"
            )


def _note_fallbacks(
    checkpoint: Checkpoint,
    kind: LlamaFileType,
    types: Mapping[str, GGMLQuantizationType],
    pairs: Sequence[TensorPair],
) -> None:
    """Blocks that do not divide a tensor's columns give way to smaller ones, as in llama.cpp: the file is larger then."""
    block = GGML_QUANT_SIZES[default_type(kind)][0]
    narrow = [entry for entry in pairs if types[entry.name] != GGMLQuantizationType.F32 and entry.shape[0] % block]
    if narrow:
        taken = sorted({types[entry.name].name for entry in narrow})
        checkpoint.notice(
            f"{file_type_name(kind)}: {len(narrow)} tensors have rows that blocks of {block} do not divide, the first is"
            f" {narrow[0].name} with {narrow[0].shape[0]} columns; they become {', '.join(taken)}, as in llama.cpp"
        )
