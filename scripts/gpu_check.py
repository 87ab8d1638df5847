"""What scripts/gpu_check.sh measures: the plan of QwQ's full geometry against a real card. Untried.

python scripts/gpu_check.py --memory 24 [--fill 32768]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qwq_lite.backend import devices, native  # noqa: E402
from qwq_lite.backend.context import Context, ContextSettings, Entry  # noqa: E402
from qwq_lite.backend.model import LoadedModel  # noqa: E402
from qwq_lite.formats import gguf_header, header_only  # noqa: E402
from qwq_lite.formats.tensor_types import file_type  # noqa: E402
from qwq_lite.plan import free_memory, planning  # noqa: E402
from qwq_lite.plan.run_plan import Wishes  # noqa: E402
from qwq_lite.store import catalog  # noqa: E402
from qwq_lite.system.units import GIB  # noqa: E402

CHUNK = 512


def used_gib() -> float:
    """Memory of the first card that is in use, by all processes."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]) / 1024


def ballast(free_bytes: int, budget: int) -> int:
    """Take what is above the budget from the first device with its own allocator; the buffer is kept until the end."""
    get = native.symbol("ggml_backend_dev_get", ctypes.c_void_p, [ctypes.c_size_t])
    kind = native.symbol("ggml_backend_dev_buffer_type", ctypes.c_void_p, [ctypes.c_void_p])
    allocate = native.symbol("ggml_backend_buft_alloc_buffer", ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t])
    extra = free_bytes - budget
    if extra > 0 and not allocate(kind(get(0)), extra):
        raise SystemExit(f"a ballast of {extra / GIB:.1f} GiB cannot be taken")
    return max(0, extra)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--memory", type=float, default=24.0, help="GiB to leave free")
    parser.add_argument("--fill", type=int, default=32_768, help="tokens to fill")
    arguments = parser.parse_args()
    report = devices.report()
    if not report.gpus:
        raise SystemExit("llama.cpp sees no GPU here; run: qwq-lite doctor")
    taken = ballast(report.gpus[0].free_bytes, int(arguments.memory * GIB))
    shape = catalog.geometry("qwq-32b-preview")[1]
    with tempfile.TemporaryDirectory(prefix="qwq-lite-") as folder:
        path = Path(folder) / "full.gguf"
        header_only.write(path, shape, header_only.tensors(shape, file_type("Q4_K_M")))
        plan = planning.plan_header(gguf_header.read(path), free_memory.room_here(devices.report()), Wishes())
        print(plan.line())
        before, choice = used_gib(), plan.choice
        weights = LoadedModel(path, choice)
        context = Context(weights, ContextSettings.of(choice, 8))
        n_fill = min(arguments.fill, choice.n_ctx) - 64
        start = time.monotonic()
        for place in range(0, n_fill, CHUNK):
            context.decode([Entry(n % 1000, n) for n in range(place, min(place + CHUNK, n_fill))])
        filled = time.monotonic()
        for n in range(32):
            context.decode([Entry(5, n_fill + n, 0, True)])
            context.row(0)
        ended = time.monotonic()
        peak = used_gib()
        context.close()
        weights.close()
    planned = next(buffers.total + backend for name, buffers, backend, _ in plan.rows() if name == report.gpus[0].name)
    result = {
        "script": "gpu_check",
        "card": report.gpus[0].description,
        "ballast_gib": round(taken / GIB, 2),
        "plan": plan.line(),
        "planned_gib": round(planned / GIB, 2),
        "taken_gib": round(peak - before, 2),
        "prefill_tok_s": round(n_fill / (filled - start), 1),
        "decode_tok_s": round(32 / (ended - filled), 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
