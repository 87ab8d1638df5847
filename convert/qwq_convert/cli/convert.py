"""qwq-lite convert: the options, the bar and the summary of a conversion."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from gguf.constants import LlamaFileType
from rich.console import Console
from rich.table import Table

from qwq_convert import imatrix as importances
from qwq_convert.cli import rounding, sha256
from qwq_convert.cli.bar import bar
from qwq_convert.imatrix import Imatrix
from qwq_convert.pipeline import Conversion, ConversionProgress, FinishedConversion, Target, convert, look
from qwq_convert.quantize import memory_bytes
from qwq_convert.roundtrip import RoundTrip
from qwq_lite.cli import console
from qwq_lite.cli.console import escaped, size
from qwq_lite.errors import PlanError, QwqError, UsageError
from qwq_lite.formats.tensor_types import FILE_TYPES, QuantizeOptions, file_type, file_type_name, tensor_type
from qwq_lite.system import process_limits

_MUCH = 0.25  # of this machine's memory: a smaller result needs no plan


@dataclass(frozen=True)
class _Asked:
    """The command line, understood."""

    checkpoint: Path
    kinds: Sequence[LlamaFileType]
    output: str | None  # as it was typed: a separator at its end makes it a folder
    choice: QuantizeOptions
    imatrix: Imatrix | None
    report: bool
    sha256: bool
    force: bool
    n_threads: int | None
    quiet: bool
    as_json: bool


@click.command(cls=console.Command)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "-q", "--type", "kinds", required=True, multiple=True, metavar="TYPE",
    help=f"{', '.join(FILE_TYPES)}, in any case. Several are made from one reading of the weights.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(),
    help="File to write, or a folder for it (NAME/); of several types, the folder.  [default: ./NAME-TYPE.gguf]",
)  # fmt: skip
@click.option(
    "--imatrix", type=click.Path(path_type=Path), metavar="FILE", help="llama.cpp's importance matrix (GGUF)."
)
@click.option("--output-tensor-type", metavar="TYPE", help="Type of the output projection.")
@click.option("--token-embedding-type", metavar="TYPE", help="Type of the token embedding.")
@click.option("--pure", is_flag=True, help="All tensors of one type, no mixture.")
@click.option("--dry-run", is_flag=True, help="Say what would be written, tensor by tensor, and write nothing.")
@click.option("--report", is_flag=True, help="Measure what rounding does to each tensor, and name the worst.")
@click.option(
    "--sha256", "with_sha256", is_flag=True,
    help="Write each file's SHA-256 beside it, FILE.sha256; the file is read once more.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace existing files.")
@click.option(
    "-j", "--threads", type=click.IntRange(1, 512), help="Threads of the kernels.  [default: all CPUs it may use]"
)
@click.option("--quiet", is_flag=True, help="No bar, notices or summary; what --dry-run and --json print stays.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def command(
    checkpoint: Path,
    kinds: tuple[str, ...],
    output: str | None,
    imatrix: Path | None,
    output_tensor_type: str | None,
    token_embedding_type: str | None,
    pure: bool,
    dry_run: bool,
    report: bool,
    with_sha256: bool,
    force: bool,
    threads: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Turn CHECKPOINT, a Hugging Face folder of the qwen2 family, into GGUF.

    One pass over the weights, no 16-bit file between. A result appears under its name only when it is complete.

    Example: qwq-lite convert QwQ-32B-Preview -q Q4_K_M
    """
    with _errors_as_json(as_json), console.signals_raise():
        if report and quiet and not (as_json or dry_run):
            raise UsageError("--report with --quiet would measure and print nothing; leave out one, or add --json")
        asked = _Asked(
            checkpoint=checkpoint,
            kinds=list(map(file_type, kinds)),
            output=output,
            choice=QuantizeOptions(
                output_tensor_type=tensor_type(output_tensor_type) if output_tensor_type else None,
                token_embedding_type=tensor_type(token_embedding_type) if token_embedding_type else None,
                pure=pure,
            ),
            imatrix=importances.read(imatrix) if imatrix is not None else None,
            report=report,
            sha256=with_sha256,
            force=force,
            n_threads=threads,
            quiet=quiet,
            as_json=as_json,
        )
        (_dry_run if dry_run else _convert)(asked)


@contextlib.contextmanager
def _errors_as_json(as_json: bool) -> Iterator[None]:
    """With --json an error is an object too, beside the line on stderr."""
    try:
        yield
    except QwqError as error:
        if as_json:
            _echo_json({"outcome": "error", "message": str(error)})
        raise


def _dry_run(asked: _Asked) -> None:
    plan = look(asked.checkpoint, asked.kinds, asked.output, choice=asked.choice, imatrix=asked.imatrix)
    cannot_run = [] if asked.quiet and not asked.as_json else _cannot_run(plan, asked.checkpoint)
    if not asked.quiet:
        _tell(plan, cannot_run)
    needs = _needs(plan, asked)
    if not asked.as_json:
        _show_plan(plan, needs)
        return
    files = [_target_as_dict(target) | {"tensors": _tensors(target)} for target in plan.targets]
    refused = [{"file": str(target.output), "message": message} for target, message in cannot_run]
    _echo_json({"files": files, "notices": plan.notices, "needs": dataclasses.asdict(needs), "cannot_run": refused})


def _convert(asked: _Asked) -> None:
    with contextlib.ExitStack() as stack:
        watch = _Watch(asked, stack)
        done = convert(
            asked.checkpoint, asked.kinds, asked.output, choice=asked.choice, imatrix=asked.imatrix, report=asked.report,
            force=asked.force, n_threads=asked.n_threads, on_prepared=watch.prepared, on_progress=watch.moved,
        )  # fmt: skip
    removed = sha256.remove(watch.outdated)
    if not asked.quiet and not asked.as_json:
        _show_written(done)
    if not asked.quiet and not asked.sha256:
        for path in removed:
            console.note(escaped(f"{path}: removed; it was the digest of the file that was replaced"))
    digests: Sequence[str | None] = _digests(done, asked) if asked.sha256 else [None] * len(done.outputs)
    if asked.as_json:
        results = zip(done.conversion.targets, done.errors, digests, strict=True)
        files = [_target_as_dict(target) | _results(found, digest) for target, found, digest in results]
        _echo_json({"files": files, "notices": done.conversion.notices})


class _Watch:
    """What the command does between headers and weights, and the bar that goes on until the stack is closed.

    outdated: files whose digest beside them will not be theirs any more.
    """

    def __init__(self, asked: _Asked, stack: contextlib.ExitStack) -> None:
        self._asked, self._stack = asked, stack
        self._advance: Callable[[str, int], None] | None = None
        self.outdated: list[Path] = []

    def prepared(self, plan: Conversion) -> None:
        asked, outputs = self._asked, [target.output for target in plan.targets]
        if asked.sha256:
            read = [*asked.checkpoint.iterdir(), *([asked.imatrix.path] if asked.imatrix is not None else [])]
            sha256.check(outputs, read, asked.force)
        self.outdated = [path for path in outputs if asked.sha256 or os.path.lexists(path)]
        if not asked.quiet:
            _tell(plan, _cannot_run(plan, asked.checkpoint))
        self._advance = self._stack.enter_context(bar(plan.source_bytes, asked.quiet))

    def moved(self, progress: ConversionProgress) -> None:
        if self._advance is not None:
            self._advance(progress.tensor, progress.n_bytes)


def _digests(done: FinishedConversion, asked: _Asked) -> list[str]:
    with bar(sum(target.n_bytes for target in done.conversion.targets), asked.quiet) as advance:
        return [sha256.write(path, asked.force, advance) for path in done.outputs]


def _tell(plan: Conversion, cannot_run: Sequence[tuple[Target, str]]) -> None:
    """What the user should know before the work starts: of the source, and of running the result here."""
    for notice in plan.notices:
        console.note(escaped(notice))
    for target, message in cannot_run:
        console.warn(escaped(f"{target.output}: {message}"))


def _cannot_run(plan: Conversion, checkpoint: Path) -> list[tuple[Target, str]]:
    found = [(target, _does_not_run(target, checkpoint)) for target in plan.targets]
    return [(target, message) for target, message in found if message is not None]


def _does_not_run(target: Target, checkpoint: Path) -> str | None:
    """A word on a result that this machine cannot run, with what it could; None where it can, or nobody can tell."""
    if target.n_bytes < _MUCH * process_limits.total_memory_bytes():
        return None
    from qwq_lite.plan import planning  # it asks a child for devices, which takes a second

    name = file_type_name(target.kind)
    try:
        planned = planning.find_plan(str(checkpoint), quant=name).plan
    except PlanError as error:
        advice = f"; what would: {error.smaller}" if error.smaller else ""
        return f"this machine cannot run it: {error}{advice}"
    except QwqError:
        return None
    if planned.candidate.label == name:
        return None
    return f"this machine cannot run it; it could run -q {planned.candidate.label}: {planned.line()}"


@dataclass(frozen=True)
class _Needs:
    """What a conversion takes."""

    disk_bytes: int
    free_bytes: int | None  # of the disk; None where there is no folder yet to ask
    memory_bytes: int


def _needs(plan: Conversion, asked: _Asked) -> _Needs:
    folder = plan.targets[0].output.parent
    there = next((path for path in (folder, folder.parent) if path.is_dir()), None)
    return _Needs(
        disk_bytes=sum(target.n_bytes for target in plan.targets),
        free_bytes=shutil.disk_usage(there).free if there is not None else None,
        memory_bytes=memory_bytes(asked.n_threads or process_limits.usable_cpus(), len(plan.targets), asked.report),
    )


def _show_plan(plan: Conversion, needs: _Needs) -> None:
    """Each tensor's type and size, and what the conversion takes, on stdout."""
    for target in plan.targets:
        table = _table("tensor", "shape", "type", "size")
        for info in target.infos:
            table.add_row(info.name, " x ".join(map(str, info.shape)), info.type.name, size(info.n_bytes))
        _print(table)
        _summary(target)
    folder = escaped(str(plan.targets[0].output.parent.absolute()))
    free = f", {size(needs.free_bytes)} are free" if needs.free_bytes is not None else ""
    memory = size(needs.memory_bytes)
    click.echo(f"Needs {size(needs.disk_bytes)} of disk in {folder}{free}, and at most {memory} of memory.")
    click.echo("Nothing was written.")


def _show_written(done: FinishedConversion) -> None:
    for target, found in zip(done.conversion.targets, done.errors, strict=True):
        _summary(target)
        if found:
            rounding.show(found, {info.name: info.type for info in target.infos})
        _next_step(target.output)


def _summary(target: Target) -> None:
    """Sizes by tensor type, and the whole, on stdout."""
    table = _table("type", "tensors", "size")
    for kind, (count, n_bytes) in target.bytes_by_type.items():
        table.add_row(kind.name, str(count), size(n_bytes))
    _print(table)
    sizes = f"{size(target.n_bytes)}, {target.bits_per_weight:.2f} bits per weight"
    click.echo(escaped(f"{target.output}: {sizes}"))


def _next_step(output: Path) -> None:
    path = str(output)
    quoted = subprocess.list2cmdline([path]) if sys.platform == "win32" else shlex.quote(path)
    click.echo(escaped(f"Talk to it: qwq-lite chat {quoted}"))


def _table(*names: str) -> Table:
    table = Table(*names, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _print(table: Table) -> None:
    Console(highlight=False, soft_wrap=True).print(table)


def _echo_json(answer: Mapping[str, Any]) -> None:
    click.echo(json.dumps(answer, indent=2, allow_nan=False))


def _results(found: Mapping[str, RoundTrip], digest: str | None) -> dict[str, Any]:
    return {"sha256": digest, "errors": rounding.as_dict(found)}


def _tensors(target: Target) -> list[dict[str, Any]]:
    return [
        {"name": info.name, "shape": info.shape, "type": info.type.name, "n_bytes": info.n_bytes}
        for info in target.infos
    ]


def _target_as_dict(target: Target) -> dict[str, Any]:
    return {
        "file": str(target.output),
        "type": file_type_name(target.kind),
        "n_bytes": target.n_bytes,
        "bits_per_weight": target.bits_per_weight,
        "types": {kind.name: {"tensors": n, "bytes": n_bytes} for kind, (n, n_bytes) in target.bytes_by_type.items()},
    }
