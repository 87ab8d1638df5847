"""One bar for every command that goes through a large file. Nothing where stderr is no terminal."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from qwq_lite.cli.console import escaped


@contextlib.contextmanager
def bar(total_bytes: int, quiet: bool) -> Iterator[Callable[[str, int], None]]:
    """Bytes, rate, time left and tensor, on stderr, until the block ends. Any thread may report (tensor, bytes)."""
    columns = (
        TextColumn("{task.description:28}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    hidden = quiet or not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as shown:
        task, lock, done = shown.add_task("", total=total_bytes), threading.Lock(), 0

        def report(name: str, n_bytes: int) -> None:
            nonlocal done
            with lock:
                done += n_bytes
                shown.update(task, completed=min(done, total_bytes), description=escape(escaped(name)))

        yield report
