"""Threads over ggml's kernels: windows of rows in, windows of rows out. Knows no files' formats.

Each thread takes the next window, reads it from the source, checks it, converts it, checks it again and writes it to its
place; nothing is queued between, so memory is bounded by the number of threads. The kernels release the GIL.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
from gguf.constants import GGMLQuantizationType

from qwq_lite.backend import kernels
from qwq_lite.errors import CheckpointError

from .source import Checkpoint
from .tensors import TensorPair

WINDOW_VALUES = 1 << 20  # 4 MiB as F32: fits a core's share of the last cache level, hides the cost of a Python step

T = GGMLQuantizationType


@dataclass(frozen=True)
class Job:
    """A tensor, the type it becomes, and where its first byte goes in the output file."""

    pair: TensorPair
    type: GGMLQuantizationType
    offset: int

    @property
    def columns(self) -> int:
        return self.pair.shape[0]

    @property
    def rows(self) -> int:
        return int(np.prod(self.pair.shape[1:], dtype=np.int64))


@dataclass(frozen=True)
class Window:
    """Some rows of a job."""

    job: Job
    first_row: int
    rows: int


def windows(jobs: Iterable[Job]) -> Iterator[Window]:
    """The jobs cut into windows of at most WINDOW_VALUES values, but at least one row."""
    for job in jobs:
        step = max(1, WINDOW_VALUES // job.columns)
        for first in range(0, job.rows, step):
            yield Window(job, first, min(step, job.rows - first))


class _Worker:
    """One thread's buffers, and the way of a window through them."""

    def __init__(self, checkpoint: Checkpoint, write: Callable[[memoryview, int], None], n_values: int) -> None:
        self._checkpoint, self._write = checkpoint, write
        self._source = np.empty(4 * n_values, np.uint8)
        self._floats = np.empty(n_values, np.float32)
        self._rows = np.empty(4 * n_values, np.uint8)

    def convert(self, window: Window) -> int:
        """Returns the bytes of source that were read. Raises: CheckpointError naming tensor, row and value."""
        job, source = window.job, window.job.pair.source
        row_in, row_out = kernels.row_bytes(source.type, job.columns), kernels.row_bytes(job.type, job.columns)
        raw = self._source[: window.rows * row_in]
        self._checkpoint.read_into(source, raw.data, window.first_row * row_in)
        values = kernels.to_float(raw, source.type, self._floats)
        if not np.isfinite(values).all():  # ggml's own check of a source prints to stderr
            raise self._bad_value(window, values)
        if source.type == job.type:
            done = raw
        else:
            done = kernels.from_float(values, job.type, job.columns, self._rows)
            if not (
                np.isfinite(done.view(np.float16)).all() if job.type == T.F16 else kernels.is_valid(done, job.type)
            ):
                raise self._overflow(window, values)
        self._write(done.data, job.offset + window.first_row * row_out)
        return raw.nbytes

    def _bad_value(self, window: Window, values: kernels.Floats) -> CheckpointError:
        bad = int(np.argmin(np.isfinite(values)))
        return self._error(window, bad, f"is {values[bad]}, a finite number is expected; fetch the file again")

    def _overflow(self, window: Window, values: kernels.Floats) -> CheckpointError:
        bad = int(np.argmax(np.abs(values)))
        return self._error(
            window, bad, f"is {values[bad]:g}, which {window.job.type.name} cannot hold; BF16 can: convert with -q BF16"
        )

    def _error(self, window: Window, index: int, message: str) -> CheckpointError:
        source, columns = window.job.pair.source, window.job.columns
        row, column = window.first_row + index // columns, index % columns
        return CheckpointError(
            f"{self._checkpoint.folder / source.file}: tensor {source.name}, row {row}, column {column} {message}"
        )


def run(
    jobs: list[Job],
    checkpoint: Checkpoint,
    write: Callable[[memoryview, int], None],
    n_threads: int,
    on_progress: Callable[[str, int], None],
) -> None:
    """Convert every job. `write(bytes, offset)` may be called from any thread, in any order.

    `on_progress(tensor name, bytes of source)` is called after each window, from the worker threads.
    Raises: what a window raised first; the other threads stop at their next window. KeyboardInterrupt likewise.
    """
    for kind in {job.type for job in jobs}:
        kernels.prepare(kind)
    todo, lock, stop = windows(jobs), threading.Lock(), threading.Event()
    n_values = max((max(WINDOW_VALUES, job.columns) for job in jobs), default=1)

    def work() -> None:
        worker = _Worker(checkpoint, write, n_values)
        while not stop.is_set():
            with lock:
                window = next(todo, None)
            if window is None:
                return
            n_bytes = worker.convert(window)
            on_progress(window.job.pair.name, n_bytes)

    with ThreadPoolExecutor(n_threads, "quantize") as pool:
        futures: list[Future[None]] = [pool.submit(work) for _ in range(n_threads)]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
    for future in futures:
        future.result()
