"""Checks a GGUF model, in one file or split: structure, digests, and how far its weights are from a checkpoint's.

The structure is that of `gguf_header.read`, and what llama.cpp asks beyond it: tensors follow each other without a gap, in
the order of their table. Every byte is read once, in windows, by threads that each take a tensor; memory is bounded by the
number of threads. Knows no terminals, and does not know who made a file: see `digests`.
Source: llama.cpp ggml/src/gguf.cpp (gguf_init_from_reader)
"""

from __future__ import annotations

import hashlib
import itertools
import math
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from gguf.constants import GGUF_DEFAULT_ALIGNMENT

from qwq_convert import digests
from qwq_convert.checkpoint.files import Checkpoint
from qwq_convert.checkpoint.tensors import TensorPair, pair
from qwq_convert.quantize import WINDOW_VALUES, cut
from qwq_convert.roundtrip import RoundTrip
from qwq_lite.backend import kernels
from qwq_lite.errors import CheckpointError, FormatError
from qwq_lite.formats import gguf_header
from qwq_lite.formats.gguf_header import Header, TensorInfo, padded
from qwq_lite.formats.shape import from_config
from qwq_lite.system import process_limits
from qwq_lite.system.files import RandomAccessFile

WINDOW_BYTES = 4 << 20
_TICK_S = 0.25  # a wait without an end is not interrupted by Ctrl-C on Windows

Outcome = Literal["OK", "damaged", "cannot be verified"]
OnProgress = Callable[[str, int], None]
_Item = TypeVar("_Item")
_Steps = Iterator[tuple[str, int]]  # what was read since the last step, as OnProgress takes it


def _say_nothing(name: str, n_bytes: int) -> None:
    pass


@dataclass(frozen=True)
class Mismatch:
    """Something that is not as it was."""

    place: str  # a tensor's name, "the header" or "the end"
    message: str


@dataclass(frozen=True)
class Verification:
    """What was found."""

    header: Header
    faults: tuple[Mismatch, ...]  # in the order of the file
    sealed: bool  # the file holds digests

    @property
    def outcome(self) -> Outcome:
        if self.faults:
            return "damaged"
        return "OK" if self.sealed else "cannot be verified"


def verify(header: Header, n_threads: int | None = None, on_progress: OnProgress = _say_nothing) -> Verification:
    """Read the whole model and compare it with its digests; of a model without, look at the structure alone.

    Args:
        header: as `read_header` gives it.
        n_threads: default all CPUs that the process may use.
        on_progress: called with a tensor's name and the bytes read after each window, from the worker threads.

    Raises: FormatError when a file cannot be read to its end.

    Example:
        verify(read_header(Path("QwQ-32B-Q4_K_M.gguf"))).outcome
    """
    faults = [
        fault for part in header.files for fault in _misplaced(part, f" in {part.path.name}" if header.parts else "")
    ]
    with _open_parts(header) as files:
        texts = [_text(file, part) for file, part in zip(files, header.files, strict=True)]
        whole = digests.without_split(texts[0], header.tensors, _alignment(header))
        said = digests.read_digests(whole, len(header.tensors))
        if said is not None and said.found_header != said.header:
            faults.append(Mismatch("the header", "differs from its digest: keys or the table of tensors were changed"))
        if whole is not texts[0]:  # then the digest covers less than these bytes
            faults += _rest_of_headers(header, texts)
        found = _tensor_faults(files, header, said, n_threads, on_progress)
    return Verification(header, (*faults, *found), said is not None)


def read_header(path: Path) -> Header:
    """The header of a model, in one file or split.

    Raises: FormatError for a file that cannot be read or has no valid header, and for parts that are missing.
    """
    header = gguf_header.read(path)
    for part in header.files:
        if part.data_offset > gguf_header.MAX_HEADER_BYTES:
            raise FormatError(
                f"{part.path}: the data begins at byte {part.data_offset} (general.alignment), {gguf_header.MAX_HEADER_BYTES}"
                " are allowed; the file is damaged or no GGUF model, fetch or convert it again"
            )
    return header


def _text(file: RandomAccessFile, part: Header) -> bytes:
    """Everything before the data."""
    raw = np.empty(min(part.data_offset, part.file_bytes), np.uint8)
    _read(file, raw.data, 0)
    return raw.tobytes()


def _rest_of_headers(header: Header, texts: Sequence[bytes]) -> Iterator[Mismatch]:
    """What no digest covers in the headers of a split model: versions, and the padding behind the tables."""
    for part, text in zip(header.files, texts, strict=True):
        if text[:8] != texts[0][:8]:
            yield Mismatch("the header", f"{part.path.name} has another version of GGUF than {header.path.name}")
        if any(digests.padding(text, part.tensors)):
            yield Mismatch("the header", f"{part.path.name} has padding that is not zero")


def _alignment(header: Header) -> int:
    found = header.keys.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    assert isinstance(found, int), "gguf_header accepts no other"
    return found


def _misplaced(header: Header, where: str) -> list[Mismatch]:
    """Tensors that do not stand right behind each other, and an end that is too early or too late."""
    faults, end, last, alignment = [], 0, 0, _alignment(header)
    for info in header.tensors:
        if info.offset != end:
            faults.append(Mismatch(info.name, f"starts at byte {info.offset} of the data, {end} is expected"))
        end = info.offset + padded(info.n_bytes, alignment)
        last = max(last, end)
    expected = header.data_offset + last
    if header.tensors and header.file_bytes != expected:
        what = "bytes follow the last tensor" if header.file_bytes > expected else "bytes of padding are missing"
        faults.append(Mismatch("the end", f"{abs(header.file_bytes - expected)} {what}{where}"))
    return faults


@dataclass(frozen=True)
class _Stretch:
    """A tensor with the padding behind it."""

    number: int
    info: TensorInfo
    file: RandomAccessFile
    start: int  # of the tensor in its file
    end: int  # of the padding


def _stretches(header: Header, files: Sequence[RandomAccessFile]) -> Iterator[_Stretch]:
    number = itertools.count()
    for part, file in zip(header.files, files, strict=True):
        for info in part.tensors:
            start = part.data_offset + info.offset
            end = min(start + padded(info.n_bytes, _alignment(part)), part.file_bytes)
            yield _Stretch(next(number), info, file, start, end)


def _tensor_faults(
    files: Sequence[RandomAccessFile],
    header: Header,
    said: digests.Digests | None,
    n_threads: int | None,
    on_progress: OnProgress,
) -> list[Mismatch]:
    found: dict[int, list[Mismatch]] = {}

    def worker() -> Callable[[_Stretch], _Steps]:
        window = np.empty(WINDOW_BYTES, np.uint8)

        def check(stretch: _Stretch) -> _Steps:
            expected = None if said is None else said.tensors[stretch.number]
            found[stretch.number] = yield from _check(stretch, expected, window)

        return check

    _spread(_stretches(header, files), worker, n_threads, on_progress)
    return [fault for number in sorted(found) for fault in found[number]]


def _check(
    stretch: _Stretch, expected: str | None, window: kernels.Bytes
) -> Generator[tuple[str, int], None, list[Mismatch]]:
    """Hash one tensor, where there is something to compare with, and see that the padding behind it is zero."""
    info, hashed, padding = stretch.info, hashlib.sha256(), False
    end = stretch.start + info.n_bytes
    for start in range(end if expected is None else stretch.start, stretch.end, window.size):
        piece = window[: min(window.size, stretch.end - start)]
        _read(stretch.file, piece.data, start)
        inside = max(0, min(piece.size, end - start))
        hashed.update(piece[:inside].data)
        padding = padding or bool(piece[inside:].any())
        yield info.name, piece.size
    faults = []
    if expected is not None and hashed.hexdigest() != expected:
        faults.append(Mismatch(info.name, "differs from its digest"))
    if padding:
        faults.append(Mismatch(info.name, "is followed by padding that is not zero"))
    return faults


def compare(
    header: Header, checkpoint: Checkpoint, n_threads: int | None = None, on_progress: OnProgress = _say_nothing
) -> dict[str, RoundTrip]:
    """How far each tensor of a file is from the checkpoint's, in the file's order.

    Args: as of `verify`; bytes of the checkpoint are not counted.
    Raises: CheckpointError when the two do not hold the same tensors; FormatError when the file cannot be read.
    """
    shape = from_config(checkpoint.config, checkpoint.folder / "config.json")
    pairs = {entry.name: entry for entry in pair(checkpoint, shape)}
    _check_same(header, checkpoint, pairs)
    results = {info.name: RoundTrip() for info in header.tensors}
    n_values = max((max(WINDOW_VALUES, info.shape[0]) for info in header.tensors), default=0)

    def worker() -> Callable[[_Rows], _Steps]:
        raw, floats = np.empty((2, 4 * n_values), np.uint8), np.empty((2, n_values), np.float32)

        def measure(rows: _Rows) -> _Steps:
            info, source = rows.info, pairs[rows.info.name].source
            one, other = kernels.row_bytes(info.type, info.shape[0]), kernels.row_bytes(source.type, info.shape[0])
            ours, theirs = raw[0, : rows.n * one], raw[1, : rows.n * other]
            _read(rows.file, ours.data, rows.start + rows.first * one)
            checkpoint.read_into(source, theirs.data, rows.first * other)
            before = kernels.to_float(theirs, source.type, floats[1])
            results[info.name].add(rows.first, before, kernels.to_float(ours, info.type, floats[0]))
            yield info.name, ours.size

        return measure

    with _open_parts(header) as files:
        _spread(_rows(header, files), worker, n_threads, on_progress)
    return results


@dataclass(frozen=True)
class _Rows:
    """A window of rows of a tensor."""

    info: TensorInfo
    file: RandomAccessFile
    start: int  # of the tensor in its file
    first: int  # row of the window
    n: int  # rows


def _rows(header: Header, files: Sequence[RandomAccessFile]) -> Iterator[_Rows]:
    for stretch in _stretches(header, files):
        info = stretch.info
        for first, n_rows in cut(info.shape[0], math.prod(info.shape[1:])):
            yield _Rows(info, stretch.file, stretch.start, first, n_rows)


def _check_same(header: Header, checkpoint: Checkpoint, pairs: dict[str, TensorPair]) -> None:
    ours = {info.name: info.shape for info in header.tensors}
    theirs = {name: entry.shape for name, entry in pairs.items()}
    different = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if different:
        name = different[0]
        raise CheckpointError(
            f"{checkpoint.folder}: {name} is {_describe(theirs.get(name))} here and {_describe(ours.get(name))} in {header.path}"
            f" ({len(different)} tensors differ); give the checkpoint that the file was made from"
        )


def _describe(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else " × ".join(map(str, shape))


@contextmanager
def _open_parts(header: Header) -> Iterator[list[RandomAccessFile]]:
    """The model's files, in their order."""
    with ExitStack() as stack:
        files = []
        for part in header.files:
            try:
                files.append(stack.enter_context(RandomAccessFile(part.path)))
            except OSError as error:
                raise FormatError(f"{part.path}: cannot be read: {error.strerror or error}") from error
        yield files


def _read(file: RandomAccessFile, buffer: memoryview, offset: int) -> None:
    try:
        file.read_into(buffer, offset)
    except (OSError, EOFError) as error:
        raise FormatError(
            f"{file.path}: cannot be read at byte {offset}: {error}; fetch or convert it again"
        ) from error


def _spread(
    items: Iterable[_Item],
    worker: Callable[[], Callable[[_Item], _Steps]],
    n_threads: int | None,
    on_progress: OnProgress,
) -> None:
    """Work on items in their order, in threads that each have a worker of their own, with its buffers.

    Raises: what a worker raised first; the other threads stop at their next step. KeyboardInterrupt likewise.
    """
    todo, lock, stop = iter(items), threading.Lock(), threading.Event()

    def work() -> None:
        do = worker()
        while True:
            with lock:
                item = next(todo, None)
            if item is None:
                return
            for name, n_bytes in do(item):
                if stop.is_set():
                    return
                on_progress(name, n_bytes)

    threads = n_threads or process_limits.usable_cpus()
    with ThreadPoolExecutor(threads, "verify") as pool:
        futures: list[Future[None]] = [pool.submit(work) for _ in range(threads)]
        try:
            done, running = wait(futures, _TICK_S, FIRST_EXCEPTION)
            while running and all(future.exception() is None for future in done):
                done, running = wait(futures, _TICK_S, FIRST_EXCEPTION)
        finally:
            stop.set()
    for future in futures:
        future.result()
