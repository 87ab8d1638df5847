"""From what a user names to a plan: the model's geometry, this machine's room, llama.cpp's own count. `plan` decides.

MODEL is a GGUF file, a checkpoint folder (its config.json and index only), or a name of the catalogue. No weight is read.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from qwq_lite import arguments
from qwq_lite.backend.footprint import Footprint, Source
from qwq_lite.backend.measure import measure
from qwq_lite.backend.settings import EngineSettings
from qwq_lite.errors import CheckpointError, EngineError, FormatError, PlanError, UsageError
from qwq_lite.formats import gguf_header, header_only, not_a_model, shape
from qwq_lite.formats.gguf_header import TensorInfo
from qwq_lite.formats.shape import ModelShape
from qwq_lite.formats.tensor_types import file_type, file_type_name
from qwq_lite.plan import free_memory, memory, speed
from qwq_lite.plan.run_plan import Candidate, Room, RunPlan, Wishes
from qwq_lite.plan.search import search
from qwq_lite.selftest import kept_result
from qwq_lite.store import catalog
from qwq_lite.system import running_engines

DEFAULT_TYPE = "Q4_K_M"
_PROPOSED = ("Q4_K_M", "Q6_K", "Q8_0", "F16", "BF16")  # what may be planned without being asked for
_ARCHITECTURE = "Qwen2ForCausalLM"
_SPARE = 0.9  # of a device: below it a formula that is off by a few percent does no harm


@dataclass(frozen=True)
class Planned:
    """A plan and what it is for.

    file: the GGUF that exists, None where a conversion would make it. room_name, room_source: whose room it is, and where its
    figures come from. faster: a model of the catalogue that is, where a typical answer of this one is a long wait.
    raise_limit: the command that would let a Mac's GPU have more, where a better plan comes of it. notices: one line each.
    """

    plan: RunPlan
    model: str
    file: Path | None
    room_name: str
    room_source: Source | Literal["given"]
    faster: str | None = None
    raise_limit: str | None = None
    notices: tuple[str, ...] = ()


def plan_model(
    model: str,
    *,
    quant: str | None = None,
    memory_bytes: int | None = None,
    machine: str | None = None,
    reserve_bytes: int = 0,
    n_threads: int | None = None,
    wishes: Wishes = Wishes(),  # noqa: B008 - frozen
) -> Planned:
    """Choose context, KV type and offload for a model on this machine, or on a known one.

    Args:
        quant: weight type of a file that does not exist yet; default Q4_K_M.
        memory_bytes: the budget, of the GPU where there is one, else of the host; default what is free.
        machine: a name of `machines`, instead of this one.
        reserve_bytes: kept free beside.
        n_threads: for the estimate of speed; default as `load` has it.

    Raises: UsageError, FormatError, CheckpointError; PlanError when nothing fits, whose `smaller` names what does.
    """
    if memory_bytes is not None:
        memory_bytes = arguments.check_whole("memory_bytes", memory_bytes, 0, 1 << 60)
    reserve_bytes = arguments.check_whole("reserve_bytes", reserve_bytes, 0, 1 << 60)
    candidates, file = _candidates(model, quant)
    known = machine is not None
    wishes, complaint = (wishes, None) if known else _granted(wishes)
    room, source = (
        free_memory.known_room(machine)
        if machine is not None
        else free_memory.measure_room(n_threads or speed.default_threads())
    )
    room = free_memory.limit_room(room, memory_bytes, reserve_bytes)
    notices = [*([complaint] if complaint else []), *check_wishes(candidates[0].shape, room, wishes)]
    if known and n_threads is not None:
        notices.append(
            "n_threads (--threads) is ignored: the speed of a known machine is estimated by its memory alone"
        )
    count = _formula(room) if known else _measured(file, room, notices)
    try:
        plan = search(candidates, room, wishes, count)
    except PlanError as error:
        error.smaller = what_fits(room, wishes)
        if not known:
            error.args = ("; ".join([str(error), *list_memory_holders()]),)
        raise
    notices += _other_types(plan, candidates)
    notices += () if known else list_memory_holders(plan)
    return Planned(
        plan,
        model,
        file,
        source,
        "given" if memory_bytes is not None else "table" if known else "measured",
        _faster(plan) if plan.slow else None,
        raised_limit(plan),
        tuple(notices),
    )


def plan_header(header: gguf_header.Header, room: Room, wishes: Wishes) -> RunPlan:
    """A plan for a file that is about to be loaded. Formulas decide where there is room; llama.cpp is asked where it is tight.

    Raises: PlanError when nothing fits, with a command for what does.
    """
    candidate = Candidate(header.path.name, shape.from_header(header), header.tensors)
    with contextlib.suppress(PlanError):
        plan = search([candidate], room, wishes, _formula(room))
        if all(buffers.total + backend <= limit * _SPARE for _, buffers, backend, limit in plan.rows()):
            return plan
    try:
        return search([candidate], room, wishes, _measured(header.path, room, []))
    except PlanError as error:
        error.smaller = what_fits(room, wishes)
        smaller = [f"what fits: qwq-lite plan {error.smaller}"] if error.smaller else []
        error.args = ("; ".join([str(error), *list_memory_holders(), *smaller]),)
        raise


def adapt_plan(plan: RunPlan, header: gguf_header.Header, room: Room) -> tuple[RunPlan, str | None]:
    """A plan made before, in the room that there is now; another one, and a line about it, where that is too small.

    Raises: UsageError for another model's plan; PlanError when nothing fits any more.
    """
    if _sizes(plan.candidate.tensors) != _sizes(header.tensors):
        raise UsageError(
            f"{header.path}: the plan is for another file, {plan.candidate.label}; plan this one, or leave it out"
        )
    now = replace(plan, room=room)
    same_devices = plan.room.gpu_names == room.gpu_names
    if same_devices and not now.shortages():
        return now, None
    other = plan_header(header, room, plan.wishes)
    why = now.line() if same_devices else f"it is for {plan.room.gpu_names}, there are {room.gpu_names or 'no GPUs'}"
    return other, f"the plan does not fit what is here now ({why}); this is used instead: {other.line()}"


def _granted(wishes: Wishes) -> tuple[Wishes, str | None]:
    """Wishes as `load` would have them by what is known of the engine, and a line about it; nothing is checked here."""
    report = kept_result.read()
    try:
        complaint = kept_result.complaint(report) if report else None
    except EngineError as error:  # a plan is still one
        return wishes, str(error)
    return (without_repacking(wishes) if complaint else wishes), complaint


def without_repacking(wishes: Wishes) -> Wishes:
    """Wishes for an engine whose kernels for other layouts fail: the next place for weights that needs none."""
    host_weights = {None: "no-repack", "mmap": "no-repack", "repacked": "pinned"}.get(wishes.host_weights)
    return replace(wishes, host_weights=host_weights or wishes.host_weights)


def _sizes(tensors: Sequence[TensorInfo]) -> dict[str, int]:
    return {info.name: info.n_bytes for info in tensors}


def _other_types(plan: RunPlan, candidates: Sequence[Candidate]) -> Iterator[str]:
    """That another weight type was taken than was asked for; or that one would be all on the GPU where this one is not."""
    label, wanted = plan.candidate.label, candidates[0].label
    if label != wanted:
        yield f"{wanted} does not fit; this is {label}"
    if plan.room.gpus and plan.wishes.n_gpu_layers is None and plan.footprint.host.kv:
        for candidate in candidates[candidates.index(plan.candidate) + 1 :]:
            with contextlib.suppress(PlanError):
                other = search([candidate], plan.room, plan.wishes, _formula(plan.room))
                if not other.footprint.host.kv:
                    yield f"{candidate.label} (-q {candidate.label}) would be all on the GPU: {other.line()}"
                    return


def check_wishes(model: ModelShape, room: Room, wishes: Wishes) -> Iterator[str]:
    """What the user should know of wishes that are granted all the same, one line each."""
    if wishes.n_ctx and wishes.n_ctx > model.n_ctx_train and model.rope_scaling is None:
        yield (
            f"{wishes.n_ctx:,} tokens are more than the {model.n_ctx_train:,} that the model was trained for and its file has no"
            " rope scaling: answers get worse beyond them"
        )
    if wishes.n_gpu_layers and not room.gpus:
        yield "there is no GPU here: layers for it (--gpu-layers) are ignored"
    type_k = wishes.type_k or wishes.type_v or "f16"
    if (wishes.type_v or type_k) != type_k and any(name.startswith("CUDA") for name in room.gpu_names):
        yield "CUDA builds compute attention over unequal K and V (--type-k, --type-v) on the CPU, many times slower"


def list_memory_holders(plan: RunPlan | None = None) -> list[str]:
    """Who holds memory on this machine, one line each; with a plan only where that makes it shorter, or both use the same pages.

    What an engine has mapped counts as free for all others, until it reads its weights again.
    """
    others = [other for other in running_engines.running() if other.pid != os.getpid()]
    if plan is not None and not plan.refused:
        host = plan.footprint.host.total + sum(other.n_bytes for other in others)
        if host <= plan.room.host or plan.room.gpus:
            return []
    return [other.line() for other in others]


def raised_limit(plan: RunPlan) -> str | None:
    """The command that raises a Mac's limit of GPU memory until its next start, where a better plan comes of it; by formula."""
    room = plan.room
    if not room.unified or room.gpus[0].n_bytes >= room.unified:
        return None
    more = replace(room, gpus=(replace(room.gpus[0], n_bytes=room.unified),))
    with contextlib.suppress(PlanError):
        better = search([plan.candidate], more, plan.wishes, _formula(more)).choice
        before = search([plan.candidate], room, plan.wishes, _formula(room)).choice
        if better != before:
            return f"sudo sysctl iogpu.wired_limit_mb={room.unified >> 20}"
    return None


def what_fits(room: Room, wishes: Wishes) -> str | None:
    """The largest model of the catalogue, at Q4_K_M, that a room can run; by formula."""
    return next((name for name, _ in _fitting(room, wishes)), None)


def _faster(plan: RunPlan) -> str | None:
    """The largest model of the catalogue that is no long wait, or else the fastest; None where none is faster than the plan."""
    fitting = [
        (name, other) for name, other in _fitting(plan.room, plan.wishes) if other.decode_tok_s > plan.decode_tok_s
    ]
    quick = [name for name, other in fitting if not other.slow]
    names = quick or [name for name, _ in reversed(fitting)]
    return names[0] if names else None


def _fitting(room: Room, wishes: Wishes) -> Iterator[tuple[str, RunPlan]]:
    """Models of the catalogue, the largest first, and their plans."""
    by_size = sorted(catalog.GEOMETRIES.values(), key=lambda pair: -pair[1].n_layer * pair[1].n_embd)
    for known, geometry in by_size:
        candidate = Candidate(DEFAULT_TYPE, geometry, header_only.tensors(geometry, file_type(DEFAULT_TYPE)))
        with contextlib.suppress(PlanError):
            yield known.name, search([candidate], room, wishes, _formula(room))


def _candidates(model: str, quant: str | None) -> tuple[list[Candidate], Path | None]:
    path = Path(model)
    if not path.exists() and (path.suffix.lower() == ".gguf" or path.is_absolute()):
        raise FormatError(f"{path}: there is no such file")
    if path.is_file():
        if quant is not None:
            raise UsageError(f"{path} is a file, its weight type is what it is; leave -q out")
        header = gguf_header.read(path)
        return [Candidate(path.name, shape.from_header(header), header.tensors)], path
    if path.is_dir():
        geometry, tied = _of_checkpoint(path)
    else:
        geometry, tied = catalog.geometry(model)[1], False
    first = file_type_name(file_type(DEFAULT_TYPE if quant is None else quant))
    made = {name: header_only.tensors(geometry, file_type(name), tied) for name in dict.fromkeys((*_PROPOSED, first))}
    size = {name: sum(info.n_bytes for info in infos) for name, infos in made.items()}
    smaller = sorted((name for name in made if size[name] < size[first]), key=lambda name: -size[name])
    return [Candidate(name, geometry, made[name]) for name in [first, *smaller]], None


def _of_checkpoint(folder: Path) -> tuple[ModelShape, bool]:
    config_path = folder / "config.json"
    if not config_path.is_file():
        inside = not_a_model.find_snapshot(folder)
        models = not_a_model.find_gguf_files(inside or folder)
        if models:
            raise CheckpointError(f"{folder}: is no checkpoint but a folder; name the file in it: {models[0]}")
        if inside is not None:
            raise CheckpointError(f"{folder}: is a folder of the Hub's cache; name the one with the files: {inside}")
        raise CheckpointError(
            f"{folder}: has no config.json, which a checkpoint has; name a GGUF file, or a folder with one"
        )
    index = folder / "model.safetensors.index.json"
    config = _read_json(config_path)
    listed = _read_json(index) if index.is_file() else None
    if listed is not None and not (isinstance(listed, dict) and "weight_map" in listed):
        raise CheckpointError(f"{index}: has no weight_map, which an index has; fetch it again")
    names = None if listed is None else listed["weight_map"]
    if not isinstance(config, dict) or config.get("architectures") != [_ARCHITECTURE]:
        found = config.get("architectures") if isinstance(config, dict) else config
        raise CheckpointError(f"{config_path}: architectures is {found!r}; {_ARCHITECTURE} can be planned")
    if names is not None and not isinstance(names, dict):
        raise CheckpointError(f"{index}: weight_map is {names!r}, an object is expected")
    tied = "lm_head.weight" not in names if names is not None else bool(config.get("tie_word_embeddings", False))
    return shape.from_config(config, config_path), tied


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except RecursionError as error:
        raise CheckpointError(f"{path}: is nested too deeply; fetch it again") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}; fetch it again") from error


def _formula(room: Room) -> Callable[[Candidate, Sequence[EngineSettings]], list[Footprint]]:
    return lambda candidate, choices: [
        memory.footprint(candidate.shape, candidate.tensors, choice, room.gpu_names, amx=room.amx) for choice in choices
    ]


def _measured(
    file: Path | None, room: Room, notices: list[str]
) -> Callable[[Candidate, Sequence[EngineSettings]], list[Footprint]]:
    """llama.cpp's count of the file, or of a ghost of it; formulas where this build cannot be asked."""

    def count(candidate: Candidate, choices: Sequence[EngineSettings]) -> list[Footprint]:
        found = None
        if file is not None:
            found = measure(file, choices)
        else:
            with tempfile.TemporaryDirectory(prefix="qwq-lite-") as folder:
                path = Path(folder) / "ghost.gguf"
                header_only.write(path, candidate.shape, list(candidate.tensors))
                found = measure(path, choices)
        if found is None:
            notice = "this build of llama.cpp cannot be asked for its own count; the numbers are by formula"
            if notice not in notices:
                notices.append(notice)
            return _formula(room)(candidate, choices)
        return found

    return count
