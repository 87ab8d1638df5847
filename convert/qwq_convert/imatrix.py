"""llama.cpp's importance matrix: how much an error in each column of a tensor counts. Knows no models.

A GGUF file of two F32 tensors an entry: NAME.in_sum2 (columns, 1), sums of the squares that met a column, and NAME.counts
(1, 1), how many they were. Their quotient is what a kernel takes.
Source: llama.cpp tools/imatrix/imatrix.cpp (save_imatrix), common/imatrix-loader.cpp, tools/quantize/quantize.cpp (load_imatrix)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType, GGUFValueType

from qwq_lite import arguments
from qwq_lite.errors import CheckpointError, FormatError
from qwq_lite.formats import gguf_header
from qwq_lite.formats.gguf_header import Header, TensorInfo, Value
from qwq_lite.formats.tensor_types import TOKEN_EMBD

Floats = npt.NDArray[np.float32]

MAX_BYTES = 1 << 28  # of all entries; a model of 72B has 26 MB, and all of it is kept in memory
# Squares of activations are far below; with larger ones some kernels overflow and end the process.
MAX_IMPORTANCE = 1e15
MAX_TEXT_BYTES = 127  # what llama-quantize's overrides hold

_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS, _CHUNK_COUNT, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"


@dataclass(frozen=True)
class Imatrix:
    """Importances by tensor, as `read` gives them."""

    path: Path
    rows: Mapping[str, Floats]
    datasets: tuple[str, ...]  # names of the texts that they were measured on
    n_chunks: int  # of these texts

    def __contains__(self, name: object) -> bool:
        return name in self.rows

    def row(self, name: str, columns: int) -> Floats | None:
        """One importance a column of a tensor, (columns,); None where the file has none, and the kernel does without.

        As in llama.cpp, a row of another length is an error, but for token_embd, where it counts as none.
        Raises: CheckpointError.
        """
        found = self.rows.get(name)
        if found is None or found.size == columns:
            return found
        if name == TOKEN_EMBD:
            return None
        raise CheckpointError(
            f"{self.path}: {name}{_SUMS} has {found.size} values, the tensor has {columns} columns;"
            " give the importance matrix of this model"
        )

    def keys(self) -> dict[str, tuple[Value, GGUFValueType]]:
        """What llama-quantize notes of it in the file that it makes."""
        text, whole = GGUFValueType.STRING, GGUFValueType.UINT32
        noted: dict[str, tuple[Value, GGUFValueType]] = {"quantize.imatrix.file": (_short(str(self.path)), text)}
        if self.datasets:
            noted["quantize.imatrix.dataset"] = (_short(self.datasets[0]), text)
        noted["quantize.imatrix.entries_count"] = (len(self.rows), whole)
        if self.n_chunks > 0:
            noted["quantize.imatrix.chunks_count"] = (self.n_chunks, whole)
        return noted


def _short(text: str) -> str:
    """As much of a text as llama-quantize keeps, in whole characters."""
    return text.partition("\0")[0].encode("utf-8", "surrogateescape")[:MAX_TEXT_BYTES].decode("utf-8", "ignore")


def read(path: Path) -> Imatrix:
    """Read and check an importance matrix.

    Raises: CheckpointError when the file is no GGUF file of importances, is damaged, or holds what no measurement gives.
    """
    if not path.is_file():  # a FIFO would never open
        raise CheckpointError(f"{path}: is not a file; give an importance matrix as llama-imatrix writes it")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            if magic and magic != b"GGUF":
                raise CheckpointError(
                    f"{path}: is no GGUF file; llama.cpp's older form (.dat) becomes one with"
                    f" llama-imatrix --in-file {path.name} -o {path.stem}.gguf"
                )
            header = gguf_header.read(path)
            pairs = _pairs(header)
            return Imatrix(path, _rows(header, pairs, file), _datasets(header), _n_chunks(header))
    except FormatError as error:
        raise CheckpointError(f"{error}; an importance matrix is needed, as llama-imatrix writes it") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def _pairs(header: Header) -> dict[str, tuple[TensorInfo, TensorInfo]]:
    """The tensors of each entry, checked before any of them is read."""
    infos = {info.name: info for info in header.tensors if info.name.endswith((_SUMS, _COUNTS))}
    names = sorted({info.name.removesuffix(_SUMS).removesuffix(_COUNTS) for info in infos.values()})
    if not names:
        kind = header.keys.get("general.type", "unknown")
        raise _error(header, f"no tensor ends in {_SUMS} (general.type is {kind!r})")
    for name in names:
        for wanted in (name + _SUMS, name + _COUNTS):
            if wanted not in infos:
                raise _error(header, f"{wanted} is missing")
            if infos[wanted].type != GGMLQuantizationType.F32:
                raise _error(header, f"{wanted} is {infos[wanted].type.name}, F32 is expected")
        sums, counts = math.prod(infos[name + _SUMS].shape), math.prod(infos[name + _COUNTS].shape)
        if sums % counts:
            raise _error(header, f"{name} has {sums} sums and {counts} counts")
    n_bytes = sum(info.n_bytes for info in infos.values())
    if n_bytes > MAX_BYTES:
        raise _error(header, f"its tensors have {n_bytes} bytes, {MAX_BYTES} are allowed")
    return {name: (infos[name + _SUMS], infos[name + _COUNTS]) for name in names}


def _rows(header: Header, pairs: Mapping[str, tuple[TensorInfo, TensorInfo]], file: BinaryIO) -> dict[str, Floats]:
    return {
        name: _quotient(header, name, _values(header, sums, file), _values(header, counts, file))
        for name, (sums, counts) in pairs.items()
    }


def _values(header: Header, info: TensorInfo, file: BinaryIO) -> Floats:
    file.seek(header.data_offset + info.offset)
    data = file.read(info.n_bytes)
    if len(data) != info.n_bytes:
        raise _error(header, f"{info.name} ends early")
    values = np.frombuffer(data, "<f4").astype(np.float32)
    if not (np.isfinite(values) & (values >= 0)).all():
        bad = int(np.argmin(np.isfinite(values) & (values >= 0)))
        raise _error(header, f"{info.name} is {values[bad]} at {bad}, a finite number from 0 on is expected")
    return values


def _quotient(header: Header, name: str, sums: Floats, counts: Floats) -> Floats:
    """Sums by counts, in F32 as llama-quantize has it; what was never met counts the same everywhere.

    Shapes: sums (n × columns,), counts (n,); n is 1 but for experts.
    """
    whole = np.floor(counts.astype(np.float64) + 0.5).astype(np.float32)[:, None]  # lround
    table = sums.reshape(counts.size, -1)
    row: Floats = np.where(whole > 0, table / np.maximum(whole, np.float32(1)), np.float32(1)).reshape(-1)
    if row.max() > MAX_IMPORTANCE:
        raise _error(header, f"{name}{_SUMS} by its count is {row.max():g}, up to {MAX_IMPORTANCE:g} is expected")
    return row


def _datasets(header: Header) -> tuple[str, ...]:
    """Raises: CheckpointError when one of the keys is missing that llama-imatrix always writes."""
    for key in (_DATASETS, _CHUNK_COUNT, _CHUNK_SIZE):
        if key not in header.keys:
            raise _error(header, f"the key {key} is missing")
    found = header.keys[_DATASETS]
    return tuple(it for it in found if isinstance(it, str)) if isinstance(found, list) else ()


def _n_chunks(header: Header) -> int:
    found = header.keys[_CHUNK_COUNT]
    if not arguments.is_whole(found, 0, (1 << 31) - 1):
        raise _error(header, f"{_CHUNK_COUNT} is {found!r}, a whole number from 0 on is expected")
    return found


def _error(header: Header, message: str) -> CheckpointError:
    return CheckpointError(f"{header.path}: {message}; give an importance matrix as llama-imatrix writes it")
