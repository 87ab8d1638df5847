"""Does the converter cost more than its kernels, and less than llama.cpp's two programs?

What is at stake. Quantizing is arithmetic: a thread turns 13 to 30 million weights a second into Q4_K or Q6_K, while a disk or
the page cache brings far more. So a converter can be no faster than the kernels, and has no reason to be slower: reading,
checking, hashing and writing should hide behind them, on as many threads as there are. Q8_0 and BF16 are the other way round:
their kernels are faster than a disk, and the bound is whichever of reading, kernels, and writing with its sync takes longest.
Memory is what the threads hold, so layers should not show in it. The usual way, through a file of BF16, runs the same kernels
and moves each weight's two bytes twice more.

What is measured, in parts, on a checkpoint of QwQ's geometry with few layers (`measure/qwq_checkpoint.py`), in a warm page cache:
    speed    `qwq-lite convert` as a command; its bare kernels on as many threads (`measure/bare_kernels.py`); writing and syncing
             as many bytes; and, where a source folder of llama.cpp and a Python with torch are given, llama.cpp's way
             (`measure/two_programs.py`)
    types    Q8_0 and BF16: the command; reading the source once; writing and syncing as many bytes; the kernels
    threads  the command with one thread and with two
    memory   the command's most anonymous memory with 2 and with 16 threads, whatever the number of cores, and with 2 and --deep
             layers of a quarter of the width; Linux, elsewhere unmeasured

Contestants take turns; ratios are of one round, and a figure is the median of the rounds. In every run of the command its folders
are watched: nothing but the output may appear there. Everything written is deleted, except the checkpoint.

    python bench/convert.py [--parts speed,types,threads,memory] [--rounds 5] [--llama-cpp FOLDER --torch-python FILE]
                            [--save FILE] [--minutes 14] [--layers 2] [--rows 152064] [--narrow 1]

Prints a table, a line for each bound, and one JSON line; exit status 1 where a bound is missed. A part starts no round that would
end after --minutes; with --save the next call goes on where this one ended. --narrow 4 tries the bench; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "convert")]

from bench.measure import bare_kernels, qwq_checkpoint, two_programs, watched  # noqa: E402
from bench.measure.figures import Report, alternate, ratios  # noqa: E402
from qwq_lite.backend import devices  # noqa: E402
from qwq_lite.formats import gguf_header  # noqa: E402
from qwq_lite.system.files import RandomAccessFile  # noqa: E402
from qwq_lite.system.output import temporary_name  # noqa: E402

BUILD = ROOT / "build" / "bench"
TYPES = ("Q8_0", "BF16")
MANY_THREADS = 16
COMPARED_ROWS, COMPARED_NARROW = 4096, 4  # of the two checkpoints that differ in depth
PIECE_BYTES = 8 << 20
COMMAND = [sys.executable, "-m", "qwq_lite", "convert"]
HERE = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "convert")))}

Values = dict[str, Any]  # what a contestant found; names as in `watched.Run`
Contestants = Mapping[str, Callable[[], Values]]
Rounds = Sequence[Mapping[str, Values]]


@dataclass(frozen=True)
class Setting:
    """What is converted, how, and where: `room` is empty before and after each contestant."""

    checkpoint: Path
    kind: str
    n_threads: int
    deep: int
    llama_cpp: Path | None
    python: Path | None
    room: Path


def command(setting: Setting, checkpoint: Path, kind: str, n_threads: int) -> Values:
    """`qwq-lite convert` in a child.

    Raises: watched.CommandFailed; SystemExit when the file has other tensors than the kernels are timed on.
    """
    read(checkpoint)
    with tempfile.TemporaryDirectory(dir=setting.room) as name:
        folder = Path(name)
        made = folder / "made.gguf"
        options = ["-q", kind, "-o", str(made), "-j", str(n_threads), *quiet()]
        run = watched.run([*COMMAND, str(checkpoint), *options], folder, HERE)
        expected = {(info.name, info.shape, info.type) for info in bare_kernels.tensors(checkpoint, kind)}
        if {(info.name, info.shape, info.type) for info in gguf_header.read(made).tensors} != expected:
            raise SystemExit(
                f"{checkpoint}, {kind}: the converter's tensors are not those that the kernels are timed on"
            )
        return {
            "wall_s": run.wall_s,
            "cpu_s": run.cpu_s,
            "anonymous_mb": run.anonymous_mb,
            "start_s": run.start_s,
            "output_bytes": made.stat().st_size,
            "other_files": sorted(run.files - {made.name, temporary_name(made).name}),
        }


def quiet() -> list[str]:
    """--quiet, where the command has it."""
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True, env={**os.environ, **HERE})
    return ["--quiet"] if "--quiet" in done.stdout else []


def kernels(setting: Setting, kind: str) -> Values:
    return vars(bare_kernels.measured(setting.checkpoint, kind, setting.n_threads))


def theirs(setting: Setting, llama_cpp: Path, python: Path) -> Values:
    read(setting.checkpoint)
    with tempfile.TemporaryDirectory(dir=setting.room) as name:
        ways = (Path(name), llama_cpp, python)
        return vars(two_programs.measured(setting.checkpoint, setting.kind, setting.n_threads, *ways))


def read(checkpoint: Path) -> Values:
    """Read every shard once; the next reader finds it in memory."""
    buffer, begin = bytearray(PIECE_BYTES), time.perf_counter()
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return {"wall_s": time.perf_counter() - begin}


def write(setting: Setting, kind: str) -> Values:
    """Write as many bytes as the conversion does, from memory, and sync them, by the converter's own calls."""
    n_bytes = sum(gguf_header.padded(info.n_bytes) for info in bare_kernels.tensors(setting.checkpoint, kind))
    pool = bare_kernels.pool(setting.checkpoint).data
    with tempfile.TemporaryDirectory(dir=setting.room) as name:
        begin = time.perf_counter()
        with RandomAccessFile(Path(name) / "written", "r+") as file:
            for offset in range(0, n_bytes, PIECE_BYTES):
                at = offset % (len(pool) - PIECE_BYTES) if len(pool) > PIECE_BYTES else 0
                file.write_from(pool[at : at + min(PIECE_BYTES, n_bytes - offset)], offset)
            file.sync()
        return {"wall_s": time.perf_counter() - begin, "bytes": n_bytes}


def speed(setting: Setting) -> Contestants:
    found: dict[str, Callable[[], Values]] = {
        "command": partial(command, setting, setting.checkpoint, setting.kind, setting.n_threads),
        "kernels": partial(kernels, setting, setting.kind),
        "write": partial(write, setting, setting.kind),
    }
    if setting.llama_cpp and setting.python:
        found["llama_cpp"] = partial(theirs, setting, setting.llama_cpp, setting.python)
    return found


def types(setting: Setting) -> Contestants:
    found: dict[str, Callable[[], Values]] = {"read": partial(read, setting.checkpoint)}
    for kind in TYPES:
        found |= {
            f"{kind.lower()}_command": partial(command, setting, setting.checkpoint, kind, setting.n_threads),
            f"{kind.lower()}_write": partial(write, setting, kind),
            f"{kind.lower()}_kernels": partial(kernels, setting, kind),
        }
    return found


def threads(setting: Setting) -> Contestants:
    names = {"one_thread": 1, "two_threads": 2}
    return {name: partial(command, setting, setting.checkpoint, setting.kind, n) for name, n in names.items()}


def memory(setting: Setting) -> Contestants:
    names = {"two_threads": 2, "many_threads": MANY_THREADS}
    found: dict[str, Callable[[], Values]] = {
        name: partial(command, setting, setting.checkpoint, setting.kind, n) for name, n in names.items()
    }
    if setting.deep:
        found |= {"shallow": partial(of_depth, setting, 2), "deep": partial(of_depth, setting, setting.deep)}
    return found


def of_depth(setting: Setting, n_layer: int) -> Values:
    """The command on a narrow checkpoint with few rows, which is written for it and deleted."""
    with tempfile.TemporaryDirectory(dir=setting.room) as name:
        folder = Path(name) / "compared"
        qwq_checkpoint.make(folder, qwq_checkpoint.geometry(n_layer, COMPARED_ROWS, COMPARED_NARROW))
        return command(setting, folder, setting.kind, 2)


def column(rounds: Rounds, contestant: str, name: str = "wall_s") -> list[float]:
    return [one[contestant][name] for one in rounds]


def report_speed(report: Report, rounds: Rounds) -> None:
    ours, theirs = "command", "llama_cpp"
    for name in ("command", "kernels", "llama_cpp"):
        if name in rounds[0]:
            report.add(f"{name}_wall_s", column(rounds, name))
            report.add(f"{name}_cpu_s", column(rounds, name, "cpu_s"))
    report.add("command_start_s", column(rounds, ours, "start_s"))
    report.add("write_s", column(rounds, "write"))
    report.add("kernels_wall_ratio", ratios(column(rounds, ours), column(rounds, "kernels")))
    report.require("kernels_wall_ratio", at_most=1.05)
    report.add("kernels_cpu_ratio", ratios(column(rounds, ours, "cpu_s"), column(rounds, "kernels", "cpu_s")))
    report_memory(report, rounds, {ours: math.inf})
    if theirs in rounds[0]:
        report.add("llama_cpp_first_wall_s", column(rounds, theirs, "first_wall_s"))
        report.add("llama_cpp_first_cpu_s", column(rounds, theirs, "first_cpu_s"))
        report.add("llama_cpp_between_gb", [value / 1e9 for value in column(rounds, theirs, "between_bytes")])
        report.add("llama_cpp_wall_ratio", ratios(column(rounds, ours), column(rounds, theirs)))
        report.add("llama_cpp_cpu_ratio", ratios(column(rounds, ours, "cpu_s"), column(rounds, theirs, "cpu_s")))
        report.require("llama_cpp_cpu_ratio", at_most=0.85)


def report_types(report: Report, rounds: Rounds) -> None:
    report.add("read_s", column(rounds, "read"))
    for kind in map(str.lower, TYPES):
        ours, steps = column(rounds, f"{kind}_command"), ("write", "kernels")
        report.add(f"{kind}_command_wall_s", ours)
        report.add(f"{kind}_command_start_s", column(rounds, f"{kind}_command", "start_s"))
        for step in steps:
            report.add(f"{kind}_{step}_s", column(rounds, f"{kind}_{step}"))
        parts = [column(rounds, "read"), *(column(rounds, f"{kind}_{step}") for step in steps)]
        report.add(f"{kind}_bound_ratio", ratios(ours, [max(values) for values in zip(*parts, strict=True)]))
        report.require(f"{kind}_bound_ratio", at_most=1.1)


def report_threads(report: Report, rounds: Rounds) -> None:
    for name in ("one_thread", "two_threads"):
        report.add(f"{name}_wall_s", column(rounds, name))
    report.add("two_threads_ratio", ratios(column(rounds, "one_thread"), column(rounds, "two_threads")))
    report.require("two_threads_ratio", at_least=1.8)


def report_memory(report: Report, rounds: Rounds, bounds: Mapping[str, float]) -> None:
    """The most anonymous memory of each contestant against its bound in MB, where the system tells it."""
    for name, bound in bounds.items():
        values = column(rounds, name, "anonymous_mb")
        if None in values:
            report.verdicts.append(f"UNMEASURED  {name}_anonymous_mb: only Linux tells a process's anonymous memory")
            continue
        report.add(f"{name}_anonymous_mb", values)
        if math.isfinite(bound):
            report.require(f"{name}_anonymous_mb", at_most=bound)


def report_depth(report: Report, rounds: Rounds) -> None:
    endless = {name: math.inf for name in ("shallow", "deep") if name in rounds[0]}
    report_memory(report, rounds, {"two_threads": 300.0, "many_threads": 1000.0, **endless})
    if "deep_anonymous_mb" in report.figures:
        deep, shallow = (column(rounds, name, "anonymous_mb") for name in ("deep", "shallow"))
        report.add("deep_memory_ratio", ratios(deep, shallow))
        report.require("deep_memory_ratio", at_most=1.1)


PARTS: Mapping[str, tuple[Callable[[Setting], Contestants], Callable[[Report, Rounds], None]]] = {
    "speed": (speed, report_speed),
    "types": (types, report_types),
    "threads": (threads, report_threads),
    "memory": (memory, report_depth),
}


def measured(
    name: str, setting: Setting, contestants: Contestants, rounds: int, limit_s: float, save: Path | None
) -> Rounds:
    """Rounds of a part, those of the same setting that a file holds already among them. A call's first is always begun."""
    kept: dict[str, list[Mapping[str, Values]]] = json.loads(save.read_text("utf-8")) if save and save.exists() else {}
    key = f"{name}, {setting.checkpoint.name}, {setting.kind}, {setting.n_threads} threads, {setting.deep} deep"
    found, begin, longest = kept.setdefault(key, []), time.perf_counter(), 0.0
    if found and set(found[0]) != set(contestants):
        raise SystemExit(f"{save}: holds rounds of {', '.join(found[0])}, asked are {', '.join(contestants)}")
    while len(found) < rounds and (not longest or time.perf_counter() - begin + longest < limit_s):
        start = time.perf_counter()
        print(f"measuring: {name}, round {len(found) + 1} of {rounds}", file=sys.stderr, flush=True)
        found.append({key: values[0] for key, values in alternate(contestants, 1, len(found)).items()})
        longest = max(longest, time.perf_counter() - start)
        if save:
            save.write_text(json.dumps(kept, indent=1), "utf-8")
    return found


def facts(setting: Setting, options: argparse.Namespace) -> Values:
    """What the figures were measured on."""
    found = devices.report()
    packages = ("llama-cpp-python", "numpy", "qwq-lite")
    return {
        "bench": "convert",
        "type": setting.kind,
        "checkpoint": {
            "layers": options.layers,
            "rows": options.rows,
            "narrow": options.narrow,
            "bytes": qwq_checkpoint.weight_bytes(setting.checkpoint),
        },
        "machine": {
            "cpu": next((device.description for device in found.devices if device.kind == "cpu"), platform.machine()),
            "cores": psutil.cpu_count(logical=False),
            "cpus": os.cpu_count(),
            "threads": setting.n_threads,
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        },
        "versions": {
            "python": platform.python_version(),
            "llama.cpp": found.version,
            **{name: importlib.metadata.version(name) for name in packages},
        },
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="of each part, but one of memory; default 5")
    parser.add_argument(
        "--minutes", type=float, default=14.0, help="a part starts no round that would end later; default 14"
    )
    parser.add_argument(
        "--save", type=Path, metavar="FILE", help="keep rounds here, and go on from those of the same converter"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument("--type", default="Q4_K_M", help="of the parts speed, threads and memory; default Q4_K_M")
    parser.add_argument("--llama-cpp", type=Path, metavar="FOLDER", help=f"the folder of {two_programs.CONVERTER}")
    parser.add_argument("--torch-python", type=Path, metavar="FILE", help="a Python that has torch and transformers")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=qwq_checkpoint.QWQ.n_vocab)
    parser.add_argument("--narrow", type=int, default=1, help="divide columns and heads; for trying the bench")
    parser.add_argument("--deep", type=int, default=64, help="layers of the deeper checkpoint of memory; 0: none")
    options = parser.parse_args()
    options.parts = options.parts.split(",")
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"no part is called {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return options


def llama_cpp_is_missing(options: argparse.Namespace) -> str | None:
    """Why llama.cpp's way is left out, or None."""
    if options.llama_cpp is None or options.torch_python is None:
        return "--llama-cpp and --torch-python are not both given"
    if not (options.llama_cpp / two_programs.CONVERTER).is_file():
        return f"{options.llama_cpp} holds no {two_programs.CONVERTER}"
    if options.rows < qwq_checkpoint.QWQ.n_vocab:
        return "its converter knows a vocabulary by a hash, and that of fewer rows has none"
    return None


def main() -> int:
    options, report = arguments(), Report()
    BUILD.mkdir(parents=True, exist_ok=True)
    shape = qwq_checkpoint.geometry(options.layers, options.rows, options.narrow)
    checkpoint = BUILD / f"QwQ-{shape.n_layer}-layers-{shape.n_embd}x{shape.n_vocab}"
    qwq_checkpoint.make(checkpoint, shape)
    missing = llama_cpp_is_missing(options)
    if missing and "speed" in options.parts:
        report.verdicts.append(f"LEFT OUT  llama.cpp's two programs: {missing}")
    llama_cpp = None if missing else options.llama_cpp.resolve()
    python = (
        None if missing else options.torch_python.absolute()
    )  # not resolved: a virtual environment is known by its link
    counts, other_files = {}, set[str]()
    with tempfile.TemporaryDirectory(dir=BUILD, prefix="room-") as room:
        setting = Setting(checkpoint, options.type, options.threads, options.deep, llama_cpp, python, Path(room))
        about = facts(setting, options)
        for name in options.parts:
            contestants, add_figures = PARTS[name]
            wanted = 1 if name == "memory" else options.rounds
            rounds = measured(name, setting, contestants(setting), wanted, 60 * options.minutes, options.save)
            add_figures(report, rounds)
            counts[name] = len(rounds)
            other_files |= {file for one in rounds for values in one.values() for file in values.get("other_files", ())}
    report.passed["no_other_file"] = not other_files
    report.verdicts.append(
        f"{'FAIL' if other_files else 'PASS'}  files besides the output: {sorted(other_files) or 'none'}"
    )
    report.show({**about, "rounds": counts, "other_files": sorted(other_files)})
    return 0 if all(report.passed.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
