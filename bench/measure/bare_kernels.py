"""A conversion's kernels and nothing else: the same calls on windows of the same size that are in memory already.

For each window of each tensor: BF16 to float, then to the tensor's own type; where both types are the same there is no kernel.
The windows' bytes are the checkpoint's own, from 134 MB of it, which no cache of a core holds. Neither reading, checking, hashing
nor writing is here, so no converter with these kernels is faster.

`measured` runs it in a child, which has nothing else in memory; the child's own clock counts from the first window to the last.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from qwq_convert.quantize import WINDOW_VALUES
from qwq_lite.backend import kernels
from qwq_lite.formats import header_only, shape
from qwq_lite.formats.gguf_header import TensorInfo
from qwq_lite.formats.tensor_types import file_type

T = GGMLQuantizationType
_POOL_VALUES = 1 << 26


@dataclass(frozen=True)
class Work:
    """Rows of a tensor: the type they become, their columns and their values."""

    type: GGMLQuantizationType
    columns: int
    n_values: int


@dataclass(frozen=True)
class Kernels:
    """Seconds of wall time and of all threads' CPU, and what was converted: values by type."""

    wall_s: float
    cpu_s: float
    values: dict[str, int]


def tensors(folder: Path, kind: str) -> list[TensorInfo]:
    """The tensors of the checkpoint's conversion. Raises: CheckpointError for a config.json that is not understood."""
    path = folder / "config.json"
    found = shape.from_config(json.loads(path.read_text("utf-8")), path)
    return header_only.tensors(found, file_type(kind))


def windows(infos: Iterable[TensorInfo]) -> Iterator[Work]:
    """The tensors cut as the converter cuts them: whole rows, about WINDOW_VALUES values."""
    for info in infos:
        columns, n_values = info.shape[0], int(np.prod(info.shape, dtype=np.int64))
        step = max(1, WINDOW_VALUES // columns) * columns
        for first in range(0, n_values, step):
            yield Work(info.type, columns, min(step, n_values - first))


def pool(folder: Path) -> npt.NDArray[np.uint8]:
    """The first weights of the largest shard, as bytes of BF16; again and again where they are less than two windows."""
    shard = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    with shard.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    n_values = min(_POOL_VALUES, (shard.stat().st_size - start) // 2)
    found = np.fromfile(shard, np.uint8, 2 * n_values, offset=start)
    return np.resize(found, max(found.size, 4 * WINDOW_VALUES))


def convert(work: Work, source: npt.NDArray[np.uint8], floats: kernels.Floats, rows: kernels.Bytes) -> None:
    """The kernels of one window. Shapes: source, BF16 of the window's values as bytes; floats, rows: room for the largest."""
    if work.type != T.BF16:
        values = kernels.to_float(source, T.BF16, floats)
        kernels.from_float(values, work.type, work.columns, rows)


def run(folder: Path, kind: str, n_threads: int) -> Kernels:
    """All windows of a conversion, on this process's threads."""
    infos, source = tensors(folder, kind), pool(folder)
    for one in {info.type for info in infos}:
        kernels.prepare(one)
    todo, places, lock = windows(infos), itertools.count(), threading.Lock()
    largest = max(WINDOW_VALUES, *(info.shape[0] for info in infos))

    def thread() -> None:
        floats, rows = np.ones(largest, np.float32), np.ones(4 * largest, np.uint8)
        while True:
            with lock:
                work, place = next(todo, None), next(places)
            if work is None:
                return
            at = 2 * largest * place % (source.size - 2 * largest)
            convert(work, source[at : at + 2 * work.n_values], floats, rows)

    with ThreadPoolExecutor(n_threads) as threads:
        begin, cpu = time.perf_counter(), time.process_time()
        for done in [threads.submit(thread) for _ in range(n_threads)]:
            done.result()
        wall_s, cpu_s = time.perf_counter() - begin, time.process_time() - cpu
    counts: dict[str, int] = {}
    for info in infos:
        counts[info.type.name] = counts.get(info.type.name, 0) + int(np.prod(info.shape, dtype=np.int64))
    return Kernels(wall_s, cpu_s, counts)


def measured(folder: Path, kind: str, n_threads: int) -> Kernels:
    """The same in a child. Raises: RuntimeError with the child's last lines."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from bench.measure.bare_kernels import answer; answer()"
    question = json.dumps([str(folder), kind, n_threads])
    done = subprocess.run([sys.executable, "-c", code, question], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"bare kernels: the child ended with {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return Kernels(**found)


def answer() -> None:
    """The child: folder, type and threads as JSON in its argument, one line of JSON on stdout."""
    folder, kind, n_threads = json.loads(sys.argv[1])
    print(json.dumps(vars(run(Path(folder), kind, n_threads))))
