"""From what a user names to a plan: the model's geometry, this machine's room, llama.cpp's own count. `plan` decides.

MODEL is a GGUF file, a checkpoint folder (its config.json and index only), or a name of the catalogue. No weight is read.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwq_lite import catalog, gguf_header, ghost, machines, memory, shape
from qwq_lite.backend import devices
from qwq_lite.backend.measure import measure
from qwq_lite.errors import CheckpointError, EngineError, PlanError, UsageError
from qwq_lite.hardware import Device, EngineReport
from qwq_lite.memory import Choice, Footprint
from qwq_lite.plan import Candidate, Room, RunPlan, Wishes, search
from qwq_lite.recipe import FILE_TYPES, file_type
from qwq_lite.shape import ModelShape

DEFAULT_TYPE = "Q4_K_M"
_ARCHITECTURE = "Qwen2ForCausalLM"
_SPARE = 0.9  # of a device: below it a formula that is off by a few percent does no harm


@dataclass(frozen=True)
class Planned:
    """A plan and what it is for. file: the GGUF that exists, None where a conversion would make it; notices: one line each."""

    plan: RunPlan
    model: str
    file: Path | None
    room_source: str
    notices: tuple[str, ...] = ()


def plan_model(
    model: str,
    *,
    quant: str | None = None,
    memory_bytes: int | None = None,
    machine: str | None = None,
    reserve_bytes: int = 0,
    wishes: Wishes = Wishes(),  # noqa: B008 - frozen
) -> Planned:
    """Choose context, KV type and offload for a model on this machine, or on a known one.

    Args:
        quant: weight type of a file that does not exist yet; default Q4_K_M.
        memory_bytes: the budget, of the GPU where there is one, else of the host; default what is free.
        machine: a name of `machines`, instead of this one.
        reserve_bytes: kept free beside.

    Raises: UsageError, FormatError, CheckpointError; PlanError when nothing fits.
    """
    candidates, file = _candidates(model, quant)
    room, source = _known_room(machine) if machine else _this_room()
    room = _limited(room, memory_bytes, reserve_bytes)
    notices: list[str] = []
    count = _formula(room) if machine else _measured(file, room, notices)
    return Planned(search(candidates, room, wishes, count), model, file, source, tuple(notices))


def plan_header(header: gguf_header.Header, room: Room, wishes: Wishes) -> RunPlan:
    """A plan for a file that is about to be loaded. Formulas decide where there is room; llama.cpp is asked where it is tight.

    Raises: PlanError when nothing fits.
    """
    candidate = Candidate(header.path.name, shape.from_header(header), header.tensors)
    with contextlib.suppress(PlanError):
        plan = search([candidate], room, wishes, _formula(room))
        if all(buffers.total + backend <= limit * _SPARE for _, buffers, backend, limit in plan.rows()):
            return plan
    return search([candidate], room, wishes, _measured(header.path, room, []))


def room_here(report: EngineReport, memory_bytes: int | None = None) -> Room:
    """What the devices of a loaded engine have free now. memory_bytes: a budget, of the GPU where there is one."""
    return _limited(_room_of(report.gpus)[0], memory_bytes, 0)


def what_fits(room: Room, wishes: Wishes) -> str | None:
    """The largest model of the catalogue, at Q4_K_M, that a room can run; by formula."""
    by_size = sorted(catalog.GEOMETRIES.values(), key=lambda pair: -pair[1].n_layer * pair[1].n_embd)
    for known, geometry in by_size:
        candidate = Candidate(DEFAULT_TYPE, geometry, ghost.tensors(geometry, file_type(DEFAULT_TYPE)))
        try:
            search([candidate], room, wishes, _formula(room))
        except PlanError:
            continue
        return known.name
    return None


def room_of(machine: str | None, memory_bytes: int | None, reserve_bytes: int) -> Room:
    """The room that `plan_model` would use."""
    return _limited((_known_room(machine) if machine else _this_room())[0], memory_bytes, reserve_bytes)


def _candidates(model: str, quant: str | None) -> tuple[list[Candidate], Path | None]:
    path = Path(model)
    if path.is_file():
        if quant is not None:
            raise UsageError(f"{path} is a file, its weight type is what it is; leave -q out")
        header = gguf_header.read(path)
        return [Candidate(path.name, shape.from_header(header), header.tensors)], path
    if path.is_dir():
        geometry, tied = _of_checkpoint(path)
    else:
        geometry, tied = catalog.geometry(model)[1], False
    wanted = file_type(quant or DEFAULT_TYPE)
    made = {name: ghost.tensors(geometry, kind, tied) for name, kind in FILE_TYPES.items()}
    size = {name: sum(info.n_bytes for info in infos) for name, infos in made.items()}
    first = next(name for name, kind in FILE_TYPES.items() if kind == wanted)
    smaller = sorted((name for name in made if size[name] < size[first]), key=lambda name: -size[name])
    return [Candidate(name, geometry, made[name]) for name in [first, *smaller]], None


def _of_checkpoint(folder: Path) -> tuple[ModelShape, bool]:
    config_path = folder / "config.json"
    try:
        config = json.loads(config_path.read_text("utf-8"))
        index = folder / "model.safetensors.index.json"
        names = json.loads(index.read_text("utf-8"))["weight_map"] if index.is_file() else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: no checkpoint that can be read: {error!r}") from error
    if not isinstance(config, dict) or config.get("architectures") != [_ARCHITECTURE]:
        found = config.get("architectures") if isinstance(config, dict) else config
        raise CheckpointError(f"{config_path}: architectures is {found!r}; {_ARCHITECTURE} can be planned")
    if names is not None and not isinstance(names, dict):
        raise CheckpointError(f"{index}: weight_map is {names!r}, an object is expected")
    tied = "lm_head.weight" not in names if names is not None else bool(config.get("tie_word_embeddings", False))
    return shape.from_config(config, config_path), tied


def _this_room() -> tuple[Room, str]:
    try:
        gpus = devices.report_from_child().gpus
    except EngineError:  # `doctor` says what is wrong with it; a plan by formula is still one
        gpus = ()
    room, source = _room_of(gpus)
    return replace(room, host_bandwidth=_bandwidth()), source


def _room_of(gpus: tuple[Device, ...]) -> tuple[Room, str]:
    import psutil

    host = min([psutil.virtual_memory().available, *_cgroup_left()])
    if not gpus:
        return Room(host), "this machine, what is free now"
    gpu = gpus[0]
    overhead = machines.overhead_of(gpu.name)
    free, unified = gpu.free_bytes, 0
    if (
        overhead is machines.OVERHEADS["metal"]
    ):  # its free figure lacks only this process's own buffers, and macOS lives in the rest
        unified = max(0, host - machines.apple_reserve_bytes(psutil.virtual_memory().total))
        free = min(free, unified)
    if sys.platform == "win32":
        free -= machines.WINDOWS_RESERVE_BYTES
    room = Room(host, gpu.name, free, overhead.later_bytes, unified, 0.0, _bandwidth_of(gpu.description))
    return room, f"this machine, what is free now on {gpu.name} ({gpu.description})"


def _bandwidth_of(description: str) -> float:
    """The table's bandwidth of a device that llama.cpp describes so; 0 where it is not known."""
    for known in machines.MACHINES:
        if known.gpus and known.description.split(",")[0].lower() in description.lower():
            return known.bandwidth_bytes_s
    return 0.0


def _known_room(name: str) -> tuple[Room, str]:
    known = machines.find(name)
    host = known.host_bytes - machines.apple_reserve_bytes(known.host_bytes)
    label = f"{known.description}, by table"
    if not known.gpus:
        return Room(host, host_bandwidth=known.host_bandwidth_bytes_s), label
    gpu = known.gpus[0]
    return Room(
        host,
        gpu.name,
        known.budget_bytes,
        known.overhead.total_bytes,
        host if known.unified else 0,
        known.host_bandwidth_bytes_s,
        known.bandwidth_bytes_s,
    ), label


def _limited(room: Room, memory_bytes: int | None, reserve_bytes: int) -> Room:
    if room.gpu is None:
        return replace(room, host=(room.host if memory_bytes is None else memory_bytes) - reserve_bytes)
    if memory_bytes is None:
        return replace(room, gpu_bytes=room.gpu_bytes - reserve_bytes)
    # A budget that is given is a total: opening the device comes out of it too.
    overhead = machines.overhead_of(room.gpu).total_bytes
    if room.unified:  # one memory: the budget holds for both sides of it
        room = replace(room, unified=min(room.unified, memory_bytes - reserve_bytes))
    return replace(room, gpu_bytes=memory_bytes - reserve_bytes, gpu_overhead=overhead)


def _formula(room: Room) -> Callable[[Candidate, Sequence[Choice]], list[Footprint]]:
    return lambda candidate, choices: [
        memory.footprint(candidate.shape, candidate.tensors, choice, room.gpu) for choice in choices
    ]


def _measured(
    file: Path | None, room: Room, notices: list[str]
) -> Callable[[Candidate, Sequence[Choice]], list[Footprint]]:
    """llama.cpp's count of the file, or of a ghost of it; formulas where this build cannot be asked."""

    def count(candidate: Candidate, choices: Sequence[Choice]) -> list[Footprint]:
        found = None
        if file is not None:
            found = measure(file, choices)
        else:
            with tempfile.TemporaryDirectory(prefix="qwq-lite-") as folder:
                path = Path(folder) / "ghost.gguf"
                ghost.write(path, candidate.shape, list(candidate.tensors))
                found = measure(path, choices)
        if found is None:
            notice = "this build of llama.cpp cannot be asked for its own count; the numbers are by formula"
            if notice not in notices:
                notices.append(notice)
            return _formula(room)(candidate, choices)
        return found

    return count


def _cgroup_left() -> list[int]:
    """Bytes that a container may still take. Source: Linux, cgroup v2 and v1 interface files."""
    found = []
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            found.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue
    return [left for left in found if left > 0]


def _bandwidth() -> float:
    """Bytes a second that one thread reads from memory here. A few tenths of a second."""
    import time

    import numpy as np

    block = np.ones(1 << 25, np.float32)  # 128 MiB, more than any cache
    block.sum()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - start)
    return block.nbytes / min(times)
