"""What a process really takes, against the plan's rows: each load mode, with and without repacking, the context filled.

    python bench/process.py [--model FILE] [--ctx 4096]

Every buffer is touched: the cache is filled to its end, in micro-batches whose rows of logits are all asked for. Anonymous memory
is the growth of RssAnon from the loaded engine on; mapped are the file's pages in memory after all were given back and some
tokens decoded. Linux. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "convert")]

from qwq_lite.backend import native  # noqa: E402
from qwq_lite.backend.context import Context, ContextSettings, Entry  # noqa: E402
from qwq_lite.backend.measure import measure  # noqa: E402
from qwq_lite.backend.model import LoadedModel  # noqa: E402
from qwq_lite.backend.settings import EngineSettings, settings_from_json  # noqa: E402
from qwq_lite.formats import gguf_header, shape  # noqa: E402
from qwq_lite.plan.memory import host_overhead_bytes, vocab_bytes  # noqa: E402
from qwq_lite.plan.run_plan import HOST_WEIGHTS  # noqa: E402

MIB = 1 << 20
N_OUTPUTS = 512  # of each micro-batch, all
MADV_PAGEOUT = 21


def anonymous_bytes() -> int:
    """Source: Linux /proc/self/status"""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) << 10


def mapped_bytes(name: str) -> int:
    """Pages of a mapped file that are in memory. Source: Linux /proc/self/smaps"""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split()[0].endswith(":"):
            inside = line.endswith(name)
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) << 10
    return found


def page_out(name: str) -> None:
    """Give back every page of a mapped file; what is used comes again. Source: Linux madvise(2)"""
    libc = ctypes.CDLL(None, use_errno=True)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(name):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_PAGEOUT):
                raise OSError(ctypes.get_errno(), f"madvise of {name}")


def taken() -> None:
    """The child: load, fill, look."""
    question = json.loads(sys.stdin.read())
    path, choice = Path(question["path"]), settings_from_json(question["choice"])
    native.engine()
    before = anonymous_bytes()
    model = LoadedModel(path, choice)
    context = Context(model, ContextSettings.of(choice, 1))
    for start in range(0, choice.n_ctx - 4, N_OUTPUTS):
        end = min(start + N_OUTPUTS, choice.n_ctx - 4)
        context.decode([Entry(n % 1000, n, 0, True) for n in range(start, end)])
    anonymous = anonymous_bytes() - before
    read = mapped_bytes(path.name)
    page_out(path.name)
    for n in range(choice.n_ctx - 4, choice.n_ctx):
        context.decode([Entry(n % 1000, n, 0, True)])
    print(json.dumps({"anonymous": anonymous, "mapped_read": read, "mapped": mapped_bytes(path.name)}))
    context.close()
    model.close()


def compared(path: Path, choice: EngineSettings) -> dict[str, Any]:
    """Bytes of the plan's rows and of a process, in MiB."""
    counted = measure(path, [choice])
    if counted is None:
        raise SystemExit("this build of llama.cpp cannot be asked for its count")
    question = json.dumps({"path": str(path), "choice": asdict(choice)})
    command = [sys.executable, __file__, "--child"]
    done = subprocess.run(command, input=question, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    host, header = counted[0].host, gguf_header.read(path)
    model = shape.from_header(header)
    vocabulary, pages = vocab_bytes(model), host_overhead_bytes(model, header.tensors, host) - vocab_bytes(model)
    return {
        "host_weights": f"{choice.load_mode}, {'repack' if choice.repack else 'no repack'}",
        "anonymous": round(found["anonymous"] / MIB, 1),
        "anonymous_planned": round((host.anonymous + vocabulary) / MIB, 1),
        "mapped": round(found["mapped"] / MIB, 1),
        "mapped_planned": round((host.mapped + pages) / MIB, 1),
        "mapped_read": round(found["mapped_read"] / MIB, 1),
        "reclaimable_planned": round(host.reclaimable / MIB, 1),
    }


def rows(path: Path, n_ctx: int) -> list[dict[str, Any]]:
    modes = [*HOST_WEIGHTS.values()]
    return [compared(path, EngineSettings(n_ctx, n_outputs_max=N_OUTPUTS, **mode)) for mode in modes]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "build/demo/SmolLM2-135M-Instruct-Q4_K_M.gguf")
    parser.add_argument("--ctx", type=int, default=4096)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        taken()
        return
    found = rows(arguments.model, arguments.ctx)
    names = list(found[0])
    print("| " + " | ".join(names))
    print("|---" * len(names))
    for row in found:
        print("| " + " | ".join(str(value) for value in row.values()))
    print(json.dumps({"bench": "process", "model": arguments.model.name, "n_ctx": arguments.ctx, "rows": found}))


if __name__ == "__main__":
    main()
