"""Threads over ggml's kernels: windows of rows in, windows of rows out. Knows no files' formats.

Each thread takes the next window, reads it from the source, checks it, converts it to each type that is wanted, checks it again
and writes it to its places; nothing is queued between, so memory is bounded by the number of threads. The kernels release the
GIL. A tensor's digest wants its windows in their order, so no thread runs far ahead of the slowest one.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from gguf.constants import GGMLQuantizationType

from qwq_convert.checkpoint.files import Checkpoint
from qwq_convert.checkpoint.tensors import TensorPair
from qwq_convert.roundtrip import RoundTrip
from qwq_lite.backend import kernels
from qwq_lite.errors import CheckpointError

WINDOW_VALUES = 1 << 20  # 4 MiB as F32: fits a core's share of the last cache level, hides the cost of a Python step
_AHEAD = 4  # windows a thread; what is done before its turn waits in memory for the digest

_AT_REST = 150 << 20  # bytes of the process before and beside the threads: numpy, the tokenizer, the header

T = GGMLQuantizationType
Write = Callable[[memoryview, int], None]
_FLOATS = (T.F32, T.F16, T.BF16)
# Squares of larger values overflow in the kernels of blocks, some of which then write zeros without a word.
_LARGEST = 1e15


def memory_bytes(n_threads: int, n_types: int = 1, report: bool = False) -> int:
    """What a conversion takes at most: buffers of a window for each thread, and windows of each type that wait their turn."""
    return _AT_REST + n_threads * (3 + report + _AHEAD * n_types) * 4 * WINDOW_VALUES


class OrderedDigest:
    """SHA-256 of bytes that come in windows, from several threads and in any order. Early ones are kept until their turn.

    No thread waits for another: the one whose window is next hashes what has come after it, too.
    """

    def __init__(self) -> None:
        self._hash, self._n_bytes = hashlib.sha256(), 0
        self._early: dict[int, bytes] = {}
        self._lock, self._is_hashing = threading.Lock(), False

    def add(self, data: memoryview, offset: int) -> None:
        with self._lock:
            if self._is_hashing or offset != self._n_bytes:
                self._early[offset] = bytes(data)
                return
            self._is_hashing = True
        part: memoryview | bytes | None = data
        while part is not None:
            self._hash.update(part)
            with self._lock:
                self._n_bytes += len(part)
                part = self._early.pop(self._n_bytes, None)
                self._is_hashing = part is not None

    def hexdigest(self) -> str:
        assert not self._early, f"bytes from {self._n_bytes} on never came"
        return self._hash.hexdigest()


@dataclass(frozen=True)
class Made:
    """A tensor as one type."""

    type: GGMLQuantizationType
    # a writer for each file that has it so, and the offset of its first byte there
    places: tuple[tuple[Write, int], ...]
    importances: kernels.Floats | None = None  # shape (columns,), or None
    error: RoundTrip | None = None  # what rounding did to it, where that is asked for
    digest: OrderedDigest = field(default_factory=OrderedDigest)  # of all its bytes


@dataclass(frozen=True)
class Job:
    """A tensor and the types it becomes."""

    pair: TensorPair
    made: tuple[Made, ...]

    @property
    def columns(self) -> int:
        return self.pair.shape[0]

    @property
    def rows(self) -> int:
        return math.prod(self.pair.shape[1:])


@dataclass(frozen=True)
class RowWindow:
    """Some rows of a job."""

    job: Job
    first_row: int
    rows: int


def cut(columns: int, n_rows: int) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each window: at most WINDOW_VALUES values, but at least one row."""
    step = max(1, WINDOW_VALUES // columns)
    for first in range(0, n_rows, step):
        yield first, min(step, n_rows - first)


def windows(jobs: Iterable[Job]) -> Iterator[RowWindow]:
    for job in jobs:
        for first, n_rows in cut(job.columns, job.rows):
            yield RowWindow(job, first, n_rows)


class _RowConverter:
    """One thread's buffers, and the way of a window through them."""

    def __init__(self, checkpoint: Checkpoint, n_values: int) -> None:
        self._checkpoint = checkpoint
        self._source = np.empty(4 * n_values, np.uint8)
        self._floats = np.empty(n_values, np.float32)
        self._rows = np.empty(4 * n_values, np.uint8)
        self._again = np.empty(0, np.float32)

    def convert(self, window: RowWindow) -> int:
        """Returns the bytes of source that were read. Raises: CheckpointError naming tensor, row and value."""
        source, columns = window.job.pair.source, window.job.columns
        row_in = kernels.row_bytes(source.type, columns)
        raw = self._source[: window.rows * row_in]
        self._checkpoint.read_into(source, raw.data, window.first_row * row_in)
        values = kernels.to_float(raw, source.type, self._floats)
        # NaN is both the least and the greatest where there is one. ggml's own check of floats is this one, and prints to stderr.
        largest = max(-float(values.min()), float(values.max()))
        if not math.isfinite(largest):
            raise self._bad_value(window, values)
        for made in window.job.made:
            too_large = largest > _LARGEST and made.type not in _FLOATS
            if too_large or kernels.overflows(values, made.type):
                raise self._overflow(window, values, made.type)
            done = raw if source.type == made.type else self._converted(window, values, made)
            offset = window.first_row * kernels.row_bytes(made.type, columns)
            made.digest.add(done.data, offset)
            for write, place in made.places:
                write(done.data, place + offset)
            if made.error is not None:
                self._compare(window, values, done, made.type, made.error)
        return raw.nbytes

    def _converted(self, window: RowWindow, values: kernels.Floats, made: Made) -> kernels.Bytes:
        done = kernels.from_float(values, made.type, window.job.columns, self._rows, made.importances)
        # An overflow in F16 is an infinity, and ggml's check would name its block on stderr.
        valid = np.isfinite(done.view(np.float16)).all() if made.type == T.F16 else kernels.is_valid(done, made.type)
        if not valid:
            raise self._overflow(window, values, made.type)
        return done

    def _compare(
        self,
        window: RowWindow,
        values: kernels.Floats,
        done: kernels.Bytes,
        kind: GGMLQuantizationType,
        error: RoundTrip,
    ) -> None:
        if self._again.size < values.size:
            self._again = np.empty(values.size, np.float32)
        error.add(window.first_row, values, kernels.to_float(done, kind, self._again))

    def _bad_value(self, window: RowWindow, values: kernels.Floats) -> CheckpointError:
        bad = int(np.argmin(np.isfinite(values)))
        return self._error(window, bad, f"is {values[bad]}, a finite number is expected; fetch the file again")

    def _overflow(self, window: RowWindow, values: kernels.Floats, kind: GGMLQuantizationType) -> CheckpointError:
        bad = int(np.argmax(np.abs(values)))
        return self._error(
            window, bad, f"is {values[bad]:g}, which {kind.name} cannot hold; BF16 can: convert with -q BF16"
        )

    def _error(self, window: RowWindow, index: int, message: str) -> CheckpointError:
        source, columns = window.job.pair.source, window.job.columns
        row, column = window.first_row + index // columns, index % columns
        return CheckpointError(
            f"{self._checkpoint.folder / source.file}: tensor {source.name}, row {row}, column {column} {message}"
        )


class _Queue:
    """Windows in their order, one to each thread that asks; none while the oldest that is not done is too far behind."""

    def __init__(self, todo: Iterator[RowWindow], n_ahead: int) -> None:
        self._todo, self._n_ahead = todo, n_ahead
        self._n_taken, self._running = 0, set[int]()
        self._changed, self.stopped = threading.Condition(), False

    @contextmanager
    def next(self) -> Iterator[RowWindow | None]:
        """The window to work on until the block ends; None at the end, or after `stop`."""
        with self._changed:
            self._changed.wait_for(
                lambda: self.stopped or not self._running or self._n_taken - min(self._running) < self._n_ahead
            )
            window = None if self.stopped else next(self._todo, None)
            number, self._n_taken = self._n_taken, self._n_taken + 1
            self._running.add(number)
        try:
            yield window
        finally:
            with self._changed:
                self._running.discard(number)
                self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self.stopped = True
            self._changed.notify_all()


def run(
    jobs: list[Job], checkpoint: Checkpoint, n_threads: int, on_progress: Callable[[str, int], None]
) -> Mapping[str, tuple[Made, ...]]:
    """Convert every job; returns what was made, by name. Writers may be called from any thread, in any order.

    `on_progress(tensor name, bytes of source)` is called after each window, from the worker threads.
    Raises: what a window raised first; the other threads stop at their next window. KeyboardInterrupt likewise.
    """
    for kind in {made.type for job in jobs for made in job.made}:
        kernels.prepare(kind)
    n_values = max((max(WINDOW_VALUES, job.columns) for job in jobs), default=1)
    queue = _Queue(windows(jobs), _AHEAD * n_threads)

    def work() -> None:
        worker = _RowConverter(checkpoint, n_values)
        try:
            while True:
                with queue.next() as window:
                    if window is None:
                        return
                    n_bytes = worker.convert(window)
                on_progress(window.job.pair.name, n_bytes)
        except BaseException:
            queue.stop()
            raise

    with ThreadPoolExecutor(n_threads, "quantize") as pool:
        futures: list[Future[None]] = [pool.submit(work) for _ in range(n_threads)]
        try:
            while wait(futures, 0.2, FIRST_EXCEPTION).not_done and not queue.stopped:
                pass  # Windows hears of Ctrl-C between two waits only
        finally:
            queue.stop()
    for future in futures:
        future.result()
    return {job.pair.name: job.made for job in jobs}
