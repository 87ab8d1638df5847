"""llama_model_quantize of the loaded library, the oracle for types and bytes. What it does not expect may end the process."""

from __future__ import annotations

import collections
import ctypes
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf.constants import LlamaFileType

from qwq_lite.backend import native
from qwq_lite.formats.tensor_types import QuantizeOptions

Floats = npt.NDArray[np.float32]
Log = collections.deque[tuple[int, str]]


@dataclass(frozen=True)
class DryRun:
    """What llama.cpp says it would write. types: by tensor. mib: the total, as printed. needs_imatrix: that it would refuse."""

    types: dict[str, str]
    mib: str
    needs_imatrix: bool


def quantize(
    source: Path,
    target: Path,
    kind: LlamaFileType,
    choice: QuantizeOptions = QuantizeOptions(),  # noqa: B008 - frozen
    importances: Mapping[str, Floats] | None = None,
    dry_run: bool = False,
) -> None:
    """llama.cpp's own quantization of a lossless GGUF. `choice.has_imatrix` alone stands for importances of some other tensor."""
    api = native.engine()
    params = api.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.dry_run, params.pure = int(kind), 1 if dry_run else 2, dry_run, choice.pure
    if choice.output_tensor_type is not None:
        params.output_tensor_type = int(choice.output_tensor_type)
    if choice.token_embedding_type is not None:
        params.token_embedding_type = int(choice.token_embedding_type)
    rows = importances or ({"another.weight": np.ones(1, np.float32)} if choice.has_imatrix else {})
    entries = (api.llama_model_imatrix_data * (len(rows) + 1))()
    for entry, (name, row) in zip(entries, rows.items(), strict=False):  # the last one stays empty: the end
        pointer = row.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.name, entry.data, entry.size = name.encode(), pointer, row.size
    if rows:
        params.imatrix = entries
    assert api.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)) == 0, (
        native.last_lines()
    )


def dry_run(source: Path, kind: LlamaFileType, choice: QuantizeOptions, log: Log) -> DryRun:
    """The types llama.cpp chooses, from its log; no weight is read. log: what takes every line, of `every_line`."""
    log.clear()
    target = source.with_suffix(".unwritten")
    quantize(source, target, kind, choice, dry_run=True)
    assert not target.exists()
    text = "".join(line for _, line in log)
    # [   3/ 339]  blk.0.attn_k.weight  - [ 896, 128, 1, 1], type =    f16, size =  0.22 MiB ->  0.15 MiB (q5_0)
    lines = re.findall(
        r"^\[ *\d+/ *\d+\] +(\S+) +- \[.*\], type = +(\w+), size = .*?(?:\((\w+)\))?$", text, re.MULTILINE
    )
    total = re.search(r"quant size += +(\S+) MiB", text)
    assert total is not None, text[-1000:]
    types = {tensor: (new or old).upper() for tensor, old, new in lines}
    return DryRun(types, total[1], "will require an imatrix" in text)
