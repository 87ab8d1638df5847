"""qwq-lite convert: the options, the bar and the summary of a conversion."""

from __future__ import annotations

import shlex
import subprocess
import sys
import threading
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from qwq_lite.recipe import FILE_TYPES, file_type

from qwq_convert.pipeline import Conversion, Progress, convert


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-q", "--type", "kind", required=True, metavar="TYPE", help=f"{', '.join(FILE_TYPES)}, in any case.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write.  [default: ./NAME-TYPE.gguf]")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("-j", "--threads", type=click.IntRange(1, 512), help="Threads of the kernels.  [default: all cores]")
def command(checkpoint: Path, kind: str, output: Path | None, force: bool, threads: int | None) -> None:
    """Turn CHECKPOINT, a Hugging Face folder of the qwen2 family, into one GGUF file.

    One pass over the weights, no 16-bit file between. The result appears under its name only when it is complete.

    Example: qwq-lite convert QwQ-32B-Preview -q Q4_K_M
    """
    wanted = file_type(kind)
    with _bar() as bar:
        task, lock = bar.add_task("reading headers", total=None), threading.Lock()
        done = 0

        def report(progress: Progress) -> None:
            nonlocal done
            with lock:
                done += progress.n_bytes
                bar.update(task, completed=done, total=progress.total_bytes, description=progress.tensor)

        result = convert(checkpoint, wanted, output, force=force, n_threads=threads, on_progress=report)
    _summary(result)


def _bar() -> Bar:
    """Bytes of the source, rate and time left, on stderr; nothing when that is no terminal."""
    columns = (
        TextColumn("{task.description:28}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Bar(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def _summary(result: Conversion) -> None:
    """Sizes by tensor type and the command to type next, on stdout."""
    table = Table("type", "tensors", "size", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, (count, n_bytes) in result.bytes_by_type.items():
        table.add_row(kind.name, str(count), _size(n_bytes))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(f"{result.output}: {_size(result.output.stat().st_size)}", markup=False)
    path = str(result.output)
    quoted = subprocess.list2cmdline([path]) if sys.platform == "win32" else shlex.quote(path)
    console.print(f"Talk to it: qwq-lite chat {quoted}", markup=False)


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
