"""llama.cpp's way from a checkpoint to a quantized file: convert_hf_to_gguf.py to BF16, then llama_model_quantize.

The first runs under a Python that has torch and transformers, from llama.cpp's source folder; the second is the loaded library's
own function in a child, so that it has our kernels. Neither syncs what it writes. Knows no converter of ours.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.measure import watched
from qwq_lite.backend import native
from qwq_lite.formats.tensor_types import file_type

CONVERTER = "convert_hf_to_gguf.py"


@dataclass(frozen=True)
class TwoPrograms:
    """Both programs together; of the first alone; and the bytes of the file between them."""

    wall_s: float
    cpu_s: float
    first_wall_s: float
    first_cpu_s: float
    between_bytes: int


def measured(checkpoint: Path, kind: str, n_threads: int, folder: Path, llama_cpp: Path, python: Path) -> TwoPrograms:
    """Run both, into an empty folder. Raises: watched.CommandFailed."""
    between, last = folder / "between.gguf", folder / "theirs.gguf"
    convert = [str(python), str(llama_cpp / CONVERTER), str(checkpoint), "--outtype", "bf16", "--outfile", str(between)]
    code = f"import sys; sys.path[:] = {sys.path!r}; from bench.measure.two_programs import answer; answer()"
    question = json.dumps([str(between), str(last), kind, n_threads])
    first = watched.run(convert, folder, {"HF_HUB_OFFLINE": "1"})
    second = watched.run([sys.executable, "-c", code, question], folder)
    return TwoPrograms(
        first.wall_s + second.wall_s,
        first.cpu_s + second.cpu_s,
        first.wall_s,
        first.cpu_s,
        between.stat().st_size,
    )


def answer() -> None:
    """The child: what to read and write, type and threads, as JSON in its argument."""
    source, target, kind, n_threads = json.loads(sys.argv[1])
    api = native.engine()
    params = api.llama_model_quantize_default_params()
    params.ftype, params.nthread = int(file_type(kind)), n_threads
    if api.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)):
        raise SystemExit(native.last_lines())
