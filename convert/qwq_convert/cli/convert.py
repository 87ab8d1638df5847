"""qwq-lite convert: the options, the bar and the summary of a conversion."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from qwq_convert import imatrix as importances
from qwq_convert.cli import errors
from qwq_convert.cli.bar import bar
from qwq_convert.pipeline import Conversion, Target, convert, look
from qwq_convert.quantize import memory_bytes
from qwq_convert.roundtrip import RoundTrip
from qwq_lite.cli import console
from qwq_lite.errors import PlanError, QwqError
from qwq_lite.output import output_file
from qwq_lite.recipe import FILE_TYPES, Choice, file_type, file_type_name, tensor_type

_CHUNK = 8 << 20  # bytes
_MUCH = 0.25  # of this machine's memory: a smaller result needs no plan


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "-q", "--type", "kinds", required=True, multiple=True, metavar="TYPE",
    help=f"{', '.join(FILE_TYPES)}, in any case. Several are made from one reading of the weights.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(path_type=Path),
    help="File to write; of several types, the folder.  [default: ./NAME-TYPE.gguf]",
)  # fmt: skip
@click.option(
    "--imatrix", type=click.Path(path_type=Path), metavar="FILE", help="llama.cpp's importance matrix (GGUF)."
)
@click.option("--output-tensor-type", metavar="TYPE", help="Type of the output projection.")
@click.option("--token-embedding-type", metavar="TYPE", help="Type of the token embedding.")
@click.option("--pure", is_flag=True, help="All tensors of one type, no mixture.")
@click.option("--dry-run", is_flag=True, help="Say what would be written, tensor by tensor, and write nothing.")
@click.option("--report", is_flag=True, help="Measure what rounding does to each tensor, and name the worst.")
@click.option("--sha256", is_flag=True, help="Write each file's SHA-256 beside it, FILE.sha256.")
@click.option("--force", is_flag=True, help="Replace existing files.")
@click.option("-j", "--threads", type=click.IntRange(1, 512), help="Threads of the kernels.  [default: all cores]")
@click.option("--quiet", is_flag=True, help="No bar, notices or summary.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def command(
    checkpoint: Path,
    kinds: tuple[str, ...],
    output: Path | None,
    imatrix: Path | None,
    output_tensor_type: str | None,
    token_embedding_type: str | None,
    pure: bool,
    dry_run: bool,
    report: bool,
    sha256: bool,
    force: bool,
    threads: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Turn CHECKPOINT, a Hugging Face folder of the qwen2 family, into GGUF.

    One pass over the weights, no 16-bit file between. A result appears under its name only when it is complete.

    Example: qwq-lite convert QwQ-32B-Preview -q Q4_K_M
    """
    wanted = list(dict.fromkeys(map(file_type, kinds)))
    matrix = importances.read(imatrix) if imatrix is not None else None
    choice = Choice(
        tensor_type(output_tensor_type) if output_tensor_type else None,
        tensor_type(token_embedding_type) if token_embedding_type else None,
        pure,
    )
    if dry_run:
        plan = look(checkpoint, wanted, output, choice=choice, imatrix=matrix)
        if not quiet:
            _say(plan, checkpoint)
        if as_json:
            click.echo(json.dumps([_tensors_as_dict(target) for target in plan.targets], indent=2))
        else:
            _show_plan(plan, threads or os.cpu_count() or 1)
        return
    with contextlib.ExitStack() as stack:
        advance: Callable[[str, int], None] = lambda name, n_bytes: None  # noqa: E731

        def prepared(plan: Conversion) -> None:
            nonlocal advance
            if not quiet:
                _say(plan, checkpoint)
            advance = stack.enter_context(bar(plan.source_bytes, quiet))

        done = convert(
            checkpoint, wanted, output, choice=choice, imatrix=matrix, report=report, force=force, n_threads=threads,
            on_prepared=prepared, on_progress=lambda one: advance(one.tensor, one.n_bytes),
        )  # fmt: skip
    digests = [_write_digest(path) if sha256 else None for path in done.outputs]
    results = list(zip(done.conversion.targets, done.errors, digests, strict=True))
    if as_json:
        click.echo(json.dumps([_as_dict(*result) for result in results], indent=2))
    elif not quiet:
        for target, found, _ in results:
            _summary(target)
            if found:
                errors.show(found, {info.name: info.type for info in target.infos})
            _next_step(target.output)


def _say(plan: Conversion, checkpoint: Path) -> None:
    """What the user should know before the work starts: of the source, and of running the result here."""
    for notice in plan.notices:
        console.note(notice)
    for target in plan.targets:
        if (word := _does_not_run(target, checkpoint)) is not None:
            console.warn(word)


def _does_not_run(target: Target, checkpoint: Path) -> str | None:
    """A word on a result that this machine cannot run, with what it could; None where it can, or nobody can tell."""
    import psutil

    if target.n_bytes < _MUCH * psutil.virtual_memory().total:
        return None
    from qwq_lite import planning  # it asks a child for devices, which takes a second

    name = file_type_name(target.kind)
    try:
        planned = planning.plan_model(str(checkpoint), quant=name).plan
    except PlanError as error:
        advice = f"; what would: {error.smaller}" if error.smaller else ""
        return f"{target.output}: this machine cannot run it: {error}{advice}"
    except QwqError:
        return None
    if planned.candidate.label == name:
        return None
    return f"{target.output}: this machine cannot run it; it could run -q {planned.candidate.label}: {planned.line()}"


def _show_plan(plan: Conversion, n_threads: int) -> None:
    """Each tensor's type and size, and what the conversion takes, on stdout."""
    for target in plan.targets:
        table = _table("tensor", "shape", "type", "size")
        for info in target.infos:
            table.add_row(info.name, " x ".join(map(str, info.shape)), info.type.name, _size(info.n_bytes))
        _print(table)
        _summary(target)
    folder, needed = plan.targets[0].output.parent, sum(target.n_bytes for target in plan.targets)
    room = f", {_size(shutil.disk_usage(folder).free)} are free" if folder.is_dir() else ""
    memory = _size(memory_bytes(n_threads))
    click.echo(f"Needs {_size(needed)} of disk in {folder.absolute()}{room}, and at most {memory} of memory.")
    click.echo("Nothing was written.")


def _summary(target: Target) -> None:
    """Sizes by tensor type, and the whole, on stdout."""
    table = _table("type", "tensors", "size")
    for kind, (count, n_bytes) in target.bytes_by_type.items():
        table.add_row(kind.name, str(count), _size(n_bytes))
    _print(table)
    click.echo(f"{target.output}: {_size(target.n_bytes)}, {target.bits_per_weight:.2f} bits per weight")


def _next_step(output: Path) -> None:
    path = str(output)
    quoted = subprocess.list2cmdline([path]) if sys.platform == "win32" else shlex.quote(path)
    click.echo(f"Talk to it: qwq-lite chat {quoted}")


def _table(*names: str) -> Table:
    table = Table(*names, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _print(table: Table) -> None:
    Console(highlight=False, soft_wrap=True).print(table)


def _write_digest(path: Path) -> str:
    """The SHA-256 of a whole file, and FILE.sha256 beside it, as sha256sum reads it."""
    whole = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            whole.update(chunk)
    digest = whole.hexdigest()
    line = f"{digest}  {path.name}\n".encode()
    with output_file(path.with_name(f"{path.name}.sha256"), len(line)) as beside:
        beside.write_from(memoryview(line), 0)
    return digest


def _tensors_as_dict(target: Target) -> dict[str, Any]:
    tensors = [
        {"name": info.name, "shape": info.shape, "type": info.type.name, "n_bytes": info.n_bytes}
        for info in target.infos
    ]
    return {**_target_as_dict(target), "tensors": tensors}


def _as_dict(target: Target, found: Mapping[str, RoundTrip], digest: str | None) -> dict[str, Any]:
    return {**_target_as_dict(target), "sha256": digest, "errors": errors.as_dict(found)}


def _target_as_dict(target: Target) -> dict[str, Any]:
    return {
        "file": str(target.output),
        "type": file_type_name(target.kind),
        "n_bytes": target.n_bytes,
        "bits_per_weight": target.bits_per_weight,
        "types": {kind.name: {"tensors": n, "bytes": size} for kind, (n, size) in target.bytes_by_type.items()},
    }


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
