"""Plans for machines that people own, remarks on wishes, and a plan that meets another room."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from qwq_lite.backend import devices
from qwq_lite.engine import loaded_engine, local
from qwq_lite.engine.load_options import LoadOptions
from qwq_lite.errors import PlanError, UsageError
from qwq_lite.formats import gguf_header, header_only
from qwq_lite.formats.gguf_header import Header
from qwq_lite.formats.shape import RopeScaling
from qwq_lite.formats.tensor_types import file_type
from qwq_lite.plan import advice, buffer_counts, free_memory, machines, planning
from qwq_lite.plan.buffer_counts import formula_count
from qwq_lite.plan.run_plan import PATIENCE_S, TYPICAL_TOKENS, Gpu, Room, RunPlan, Wishes
from qwq_lite.plan.search import LEAST_CTX, search
from qwq_lite.store import catalog
from qwq_lite.system.units import GIB, MIB
from tests.planner import QWQ, SHORTAGE, as_candidate, room_of

# Machines


@pytest.mark.parametrize("machine", ["rtx-3090", "rtx-4090"])
def test_a_card_of_24_gb_runs_qwq_with_all_that_it_was_trained_for(machine: str) -> None:
    plan = planning.plan_model("qwq-32b-preview", machine=machine).plan
    choice = plan.choice
    assert plan.candidate.label == "Q4_K_M"
    assert (choice.n_ctx, choice.type_k, choice.type_v, choice.n_gpu_layers) == (32_768, "q8_0", "q8_0", 65)
    assert choice.n_ubatch == 512


def test_a_card_of_12_gb_takes_some_of_qwqs_layers() -> None:
    choice = planning.plan_model("qwq-32b-preview", machine="rtx-3060-12gb").plan.choice
    assert 0 < choice.n_gpu_layers < 65
    assert choice.n_ctx >= LEAST_CTX


def test_a_mac_of_36_gb_runs_qwq_within_its_working_set() -> None:
    plan = planning.plan_model("qwq-32b-preview", machine="m3-max-36gb").plan
    assert (plan.choice.type_k, plan.choice.n_ctx, plan.choice.n_gpu_layers) == ("q8_0", 32_768, 65)
    used = sum(buffers.total + backend for _, buffers, backend, _ in plan.rows())
    assert used <= machines.metal_working_set_bytes(36 * GIB)


def test_a_laptop_of_16_gb_is_too_small_for_qwq_and_is_told_what_is_not() -> None:
    with pytest.raises(PlanError) as caught:
        planning.plan_model("qwq-32b", machine="laptop-16gb")
    assert SHORTAGE.search(str(caught.value))
    smaller = advice.largest_model(room_of("laptop-16gb"), Wishes())
    assert smaller is not None
    assert planning.plan_model(smaller, machine="laptop-16gb").plan.choice.n_ctx >= LEAST_CTX


@pytest.mark.parametrize("machine", [machine.name for machine in machines.MACHINES])
@pytest.mark.parametrize("model", catalog.GEOMETRIES)
def test_every_machine_gets_a_plan_within_its_room_or_the_largest_model_that_has_one(model: str, machine: str) -> None:
    room = room_of(machine)
    try:
        plan = planning.plan_model(model, machine=machine).plan
    except PlanError as error:
        assert SHORTAGE.search(str(error))
        smaller = advice.largest_model(room, Wishes())
        assert smaller != model
        if smaller:
            assert planning.plan_model(smaller, machine=machine).plan.candidate.label == "Q4_K_M"
        return
    assert plan.room == room
    known = machines.find(machine)
    free = {device.name: device.free_bytes for device in known.devices}
    used = {name: buffers.total + backend for name, buffers, backend, _ in plan.rows()}
    for name, _, _, limit in plan.rows():
        assert used[name] <= limit <= free[name]
    assert room.gpu_names == [device.name for device in known.gpus]
    if room.unified:
        assert sum(used.values()) <= room.unified <= known.host_bytes


@pytest.mark.parametrize("machine", [machine.name for machine in machines.MACHINES])
def test_a_reserve_and_a_budget_leave_less(machine: str) -> None:
    room, kept, given_room = (room_of(machine, *rest) for rest in ((None, 0), (None, GIB), (8 * GIB, GIB)))
    if not room.gpus:
        assert (room.host - kept.host, given_room.host) == (GIB, 7 * GIB)
        return
    assert [gpu.n_bytes - less.n_bytes for gpu, less in zip(room.gpus, kept.gpus, strict=True)] == [GIB] * len(
        room.gpus
    )
    # A budget is that of all GPUs together, what stays free is so on each.
    assert sum(gpu.n_bytes for gpu in given_room.gpus) == (8 - len(room.gpus)) * GIB
    assert all(gpu.overhead == machines.find(machine).overhead.total_bytes for gpu in given_room.gpus)


@pytest.mark.parametrize("machine", [machine.name for machine in machines.MACHINES if machine.backend == "metal"])
@pytest.mark.parametrize("reserve_gib", [1, 2, 8])
def test_a_reserve_is_kept_where_host_and_gpu_share_one_memory(machine: str, reserve_gib: int) -> None:
    """Layers that the GPU's budget sends to the host must not take from there what is to stay free."""
    whole, kept = room_of(machine), room_of(machine, None, reserve_gib * GIB)
    wishes = Wishes(n_ctx=LEAST_CTX)
    try:
        plan = search([as_candidate(QWQ)], kept, wishes, formula_count(kept))
    except PlanError:
        return
    used = sum(buffers.total + backend for _, buffers, backend, _ in plan.rows())
    assert used <= whole.unified - reserve_gib * GIB


def test_a_macs_limit_is_not_raised_to_what_it_is_because_of_a_reserve() -> None:
    """Its working set is 27 GiB of 36, and as much is all that macOS can spare."""
    found = planning.plan_model("qwq-32b-preview", machine="m3-max-36gb", reserve_bytes=3 * GIB)
    assert found.raise_limit is None


@pytest.mark.parametrize("model", ["qwq-32b-preview", "qwq-32b"])
@pytest.mark.parametrize("machine", ["rtx-3060-12gb", "m2-pro-32gb", "desktop-64gb"])
def test_a_plan_is_one_search_and_advice_changes_nothing_of_it(
    model: str, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = planning.plan_model(model, quant="Q8_0", machine=machine)
    searches: list[object] = []

    def counted(*arguments: Any) -> RunPlan:
        searches.append(arguments)
        return search(*arguments)

    monkeypatch.setattr(planning, "search", counted)
    monkeypatch.delattr(advice, "search")
    alone = planning.find_plan(model, quant="Q8_0", machine=machine)
    assert len(searches) == 1
    assert (alone.plan, alone.faster, alone.raise_limit) == (asked.plan, None, None)
    assert asked.notices[: len(alone.notices)] == alone.notices


def test_nothing_fits_a_room_without_memory() -> None:
    assert advice.largest_model(Room(0), Wishes()) is None
    assert advice.largest_model(Room(0, (Gpu("CUDA0", 0),)), Wishes()) is None


@pytest.mark.parametrize("machine", ["rtx-3060-12gb", "2x-rtx-3060-12gb", "m1-16gb", "m2-pro-32gb", "desktop-64gb"])
def test_what_fits_is_the_largest(machine: str) -> None:
    room, fitting = room_of(machine), []
    for name, (_, geometry) in catalog.GEOMETRIES.items():  # from the largest to the smallest
        with contextlib.suppress(PlanError):
            search([as_candidate(geometry)], room, Wishes(), formula_count(room))
            fitting.append(name)
    assert advice.largest_model(room, Wishes()) == fitting[0]


def test_a_slow_plan_comes_with_a_faster_model_and_a_fast_one_with_none() -> None:
    assert planning.plan_model("qwq-32b-preview", machine="rtx-3090").faster is None
    slow = planning.plan_model("qwq-32b", quant="Q8_0", machine="desktop-64gb")
    assert slow.faster is not None
    faster = planning.plan_model(slow.faster, machine="desktop-64gb")
    assert faster.plan.decode_tok_s > slow.plan.decode_tok_s
    assert faster.faster is None


@pytest.mark.parametrize("bandwidth", [1e8, 1e9, 1e10, 3e10, 5e10, 7e10, 1e11, 1e12])
@pytest.mark.parametrize("model", ["qwq-32b", "deepseek-r1-distill-qwen-14b", "deepseek-r1-distill-qwen-1.5b"])
def test_the_faster_model_is_the_largest_that_is_no_long_wait_or_else_the_fastest(
    model: str, bandwidth: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = Room(48 * GIB, host_bandwidth=bandwidth)
    monkeypatch.setattr(free_memory, "known_room", lambda _: (room, "a machine"))
    found = planning.plan_model(model, quant="Q8_0", machine="any")
    speeds = {
        name: search([as_candidate(geometry)], room, Wishes(), formula_count(room)).decode_tok_s
        for name, (_, geometry) in catalog.GEOMETRIES.items()  # from the largest to the smallest
    }
    own, enough = found.plan.decode_tok_s, TYPICAL_TOKENS / PATIENCE_S
    assert found.plan.slow == (own < enough)
    faster = {name: speed for name, speed in speeds.items() if speed > own}
    quick = [name for name, speed in faster.items() if speed >= enough]
    if own >= enough:
        assert found.faster is None
    else:
        assert found.faster == (quick[0] if quick else max(faster, key=lambda name: faster[name]))


def test_the_smallest_model_has_no_faster_one(monkeypatch: pytest.MonkeyPatch) -> None:
    room = Room(48 * GIB, host_bandwidth=1e8)
    monkeypatch.setattr(free_memory, "known_room", lambda _: (room, "a machine"))
    found = planning.plan_model(list(catalog.GEOMETRIES)[-1], machine="any")
    assert found.plan.slow
    assert found.faster is None


@pytest.mark.parametrize("wishes", [Wishes(), Wishes(n_ctx=4096, type_k="q8_0", n_gpu_layers=3, host_weights="pinned")])
def test_a_plan_keeps_the_wishes_that_it_was_made_for(wishes: Wishes) -> None:
    assert planning.plan_model("qwq-32b", machine="rtx-3090", wishes=wishes).plan.wishes == wishes


def test_a_faster_model_is_named_though_it_is_slow_too() -> None:
    """Where even the smallest is a long wait, the fastest is better than none; nothing is faster than that."""
    slow = planning.plan_model("qwq-32b", memory_bytes=24 * GIB, machine="laptop-32gb")
    crawling = dataclasses.replace(slow.plan, room=dataclasses.replace(slow.plan.room, host_bandwidth=1e8))
    smallest = list(catalog.GEOMETRIES)[-1]
    assert advice.faster_model(crawling) == smallest
    tiny = planning.plan_model(smallest, machine="laptop-32gb").plan
    assert advice.faster_model(dataclasses.replace(tiny, room=crawling.room)) is None


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ("m2-pro-32gb", "sudo sysctl iogpu.wired_limit_mb=24576"),
        ("m3-max-36gb", None),  # its working set leaves macOS no more than the reserve
        ("rtx-3090", None),
        ("2x-rtx-3060-12gb", None),
        ("laptop-32gb", None),
    ],
)
def test_a_macs_limit_is_raised_where_more_comes_of_it(machine: str, expected: str | None) -> None:
    planned_there = planning.plan_model("qwq-32b-preview", machine=machine)
    assert planned_there.raise_limit == expected
    assert advice.raised_limit(planned_there.plan) == expected


def test_a_macs_limit_is_not_raised_for_what_fits_below_it() -> None:
    wishes = Wishes(n_ctx=LEAST_CTX, type_k="q8_0")
    found = planning.plan_model("qwq-32b-preview", machine="m2-pro-32gb", wishes=wishes)
    assert found.raise_limit is None
    assert advice.raised_limit(found.plan) is None


@pytest.mark.parametrize(
    ("machine", "memory_bytes", "source"), [("rtx-3090", None, "table"), ("rtx-3090", 24 * GIB, "given")]
)
def test_a_plan_names_the_room_and_where_its_figures_come_from(
    machine: str, memory_bytes: int | None, source: str
) -> None:
    found = planning.plan_model("qwq-32b-preview", machine=machine, memory_bytes=memory_bytes)
    assert machines.find(machine).description in found.room_name
    assert found.room_source == source


# Remarks


@pytest.mark.parametrize("n_ctx", [None, 256, 32_768])
def test_a_context_within_the_trained_length_needs_no_remark(n_ctx: int | None) -> None:
    assert list(planning.list_notices(QWQ, Room(GIB), Wishes(n_ctx=n_ctx))) == []


def test_a_context_above_the_trained_length_is_remarked_on_unless_rope_scaling_is_for_that() -> None:
    wishes = Wishes(n_ctx=40_000)
    (line,) = planning.list_notices(QWQ, Room(GIB), wishes)
    assert "40,000 tokens" in line
    assert "32,768" in line
    assert "rope scaling" in line
    assert "\n" not in line
    scaled = dataclasses.replace(QWQ, rope_scaling=RopeScaling("yarn", 4.0, 32_768))
    assert list(planning.list_notices(scaled, Room(GIB), wishes)) == []


@pytest.mark.parametrize(("layers", "n_lines"), [(None, 0), (0, 0), (-1, 1), (1, 1), (64, 1)])
def test_layers_for_a_gpu_that_is_not_there_are_remarked_on(layers: int | None, n_lines: int) -> None:
    lines = list(planning.list_notices(QWQ, Room(GIB), Wishes(n_gpu_layers=layers)))
    assert len(lines) == n_lines
    assert all("no GPU" in line for line in lines)
    assert list(planning.list_notices(QWQ, Room(GIB, (Gpu("CUDA0", GIB),)), Wishes(n_gpu_layers=layers))) == []


@pytest.mark.parametrize(
    ("type_k", "type_v", "unequal"),
    [
        (None, None, False),
        ("q8_0", None, False),
        (None, "q4_0", False),
        ("q8_0", "q8_0", False),
        ("q8_0", "q4_0", True),
        ("f16", "q8_0", True),
    ],
)
@pytest.mark.parametrize("names", [(), ("CUDA0",), ("Vulkan0",), ("MTL0",), ("Vulkan0", "CUDA0")])
def test_unequal_k_and_v_are_remarked_on_for_cuda(
    type_k: str | None, type_v: str | None, unequal: bool, names: tuple[str, ...]
) -> None:
    room = Room(GIB, tuple(Gpu(name, GIB) for name in names))
    lines = list(planning.list_notices(QWQ, room, Wishes(type_k=type_k, type_v=type_v)))
    assert len(lines) == int(unequal and "CUDA0" in names)
    assert all("unequal K and V" in line and "\n" not in line for line in lines)


def test_remarks_come_with_a_plan() -> None:
    found = planning.plan_model("qwq-32b-preview", machine="desktop-64gb", wishes=Wishes(n_ctx=40_960, n_gpu_layers=10))
    assert (found.plan.choice.n_ctx, found.plan.choice.n_gpu_layers) == (40_960, 0)
    assert len(found.notices) == 2


# A plan made before, in another room


@pytest.fixture
def small_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Header:
    """A file of the smallest model of the catalogue; llama.cpp cannot be asked, so that formulas decide."""
    monkeypatch.setattr(buffer_counts, "measure", lambda *_: None)
    _, geometry = catalog.geometry("deepseek-r1-distill-qwen-1.5b")
    path = tmp_path / "small.gguf"
    header_only.write(path, geometry, header_only.tensors(geometry, file_type("Q4_K_M")))
    return gguf_header.read(path)


WIDE = Room(8 * GIB, (Gpu("CUDA0", 8 * GIB),))


def test_a_plan_that_still_fits_is_kept(small_header: Header) -> None:
    plan = planning.plan_header(small_header, WIDE, Wishes(n_ctx=12_345, type_k="q8_0"))
    for room in (WIDE, Room(4 * GIB, (Gpu("CUDA0", 4 * GIB, MIB),))):
        kept, line = planning.adapt_plan(plan, small_header, room)
        assert line is None
        assert (kept.choice, kept.footprint, kept.room) == (plan.choice, plan.footprint, room)


def test_a_plan_that_no_longer_fits_gives_way_to_one_that_does(small_header: Header) -> None:
    plan = planning.plan_header(small_header, WIDE, Wishes())
    room = Room(8 * GIB, (Gpu("CUDA0", int(1.5 * GIB)),))
    other, line = planning.adapt_plan(plan, small_header, room)
    assert other.choice != plan.choice
    assert (other.room, other.shortages()) == (room, [])
    assert line is not None
    assert "does not fit what is here now" in line
    assert other.line() in line
    assert "1.5 GiB" in line  # what there is now
    assert "\n" not in line


@pytest.mark.parametrize("room", [Room(8 * GIB), Room(8 * GIB, (Gpu("Vulkan0", 8 * GIB),))])
def test_a_plan_for_a_device_that_is_gone_gives_way(small_header: Header, room: Room) -> None:
    plan = planning.plan_header(small_header, WIDE, Wishes())
    other, line = planning.adapt_plan(plan, small_header, room)
    assert other.footprint.devices.keys() == {"CPU", *room.gpu_names}
    assert other.shortages() == []
    assert line is not None
    assert "it is for ['CUDA0'" in line
    assert other.line() in line


def test_one_of_two_devices_that_is_gone_is_noticed(small_header: Header) -> None:
    both = dataclasses.replace(WIDE, gpus=(Gpu("CUDA0", int(1.5 * GIB)), Gpu("CUDA1", int(1.5 * GIB))))
    plan = planning.plan_header(small_header, both, Wishes())
    assert len(plan.footprint.devices) == 3
    other, line = planning.adapt_plan(plan, small_header, WIDE)
    assert other.choice.tensor_split == ()
    assert line is not None
    assert "it is for ['CUDA0'" in line


def test_one_device_more_is_noticed(small_header: Header) -> None:
    """llama.cpp would share the layers out over both, which the plan did not count."""
    plan = planning.plan_header(small_header, WIDE, Wishes())
    other, line = planning.adapt_plan(plan, small_header, Room(8 * GIB, (*WIDE.gpus, Gpu("CUDA1", GIB))))
    assert other.choice.tensor_split == (29, 0)
    assert line is not None


@pytest.mark.parametrize("room", [Room(GIB // 4), Room(GIB // 4, (Gpu("CUDA0", GIB // 4),))])
def test_nothing_fits_any_more(small_header: Header, room: Room) -> None:
    plan = planning.plan_header(small_header, WIDE, Wishes())
    with pytest.raises(PlanError) as caught:
        planning.adapt_plan(plan, small_header, room)
    assert SHORTAGE.search(str(caught.value))


def test_a_plan_for_another_file_is_refused(small_header: Header) -> None:
    plan = planning.plan_model("qwq-32b", machine="rtx-3090").plan
    with pytest.raises(UsageError, match="the plan is for another file, Q4_K_M") as caught:
        planning.adapt_plan(plan, small_header, WIDE)
    assert str(small_header.path) in str(caught.value)


@pytest.mark.parametrize(
    ("model", "weight_type"), [("deepseek-r1-distill-qwen-1.5b", "Q8_0"), ("deepseek-r1-distill-qwen-7b", "Q4_K_M")]
)
def test_a_plan_for_another_file_is_refused_both_ways(
    model: str, weight_type: str, small_header: Header, tmp_path: Path
) -> None:
    """Another weight type of the same model is another file too, also where its plan would fit."""
    _, geometry = catalog.geometry(model)
    path = tmp_path / "other.gguf"
    header_only.write(path, geometry, header_only.tensors(geometry, file_type(weight_type)))
    other = gguf_header.read(path)
    for planned, loaded in ((small_header, other), (other, small_header)):
        plan = planning.plan_header(planned, WIDE, Wishes(n_ctx=LEAST_CTX))
        with pytest.raises(UsageError, match=f"the plan is for another file, {planned.path.name}"):
            planning.adapt_plan(plan, loaded, WIDE)


def test_a_plan_made_by_name_is_for_the_file_that_came_of_it(small_header: Header) -> None:
    planned = planning.plan_model("deepseek-r1-distill-qwen-1.5b", machine="rtx-3090")
    kept, line = planning.adapt_plan(planned.plan, small_header, planned.plan.room)
    assert (kept, line) == (planned.plan, None)


def test_wishes_outlive_a_plan_that_no_longer_fits(small_header: Header) -> None:
    plan = planning.plan_header(small_header, WIDE, Wishes(n_ctx=4096, type_k="q4_0"))
    other, line = planning.adapt_plan(plan, small_header, Room(8 * GIB))
    assert line is not None
    assert (other.choice.n_ctx, other.choice.type_k) == (4096, "q4_0")


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments are refused before llama.cpp is asked for anything."""

    def asked(*_: object, **__: object) -> None:
        raise AssertionError("llama.cpp was asked")

    monkeypatch.setattr(devices, "report", asked)
    monkeypatch.setattr(loaded_engine, "LoadedModel", asked)


@pytest.mark.usefixtures("no_engine")
def test_load_takes_a_plan_or_wishes_and_nothing_else(small_header: Header) -> None:
    planned = planning.plan_model("deepseek-r1-distill-qwen-1.5b", machine="rtx-3090")
    with pytest.raises(UsageError, match="plan is a Planned, a RunPlan is expected"):
        local.load(small_header.path, LoadOptions(plan=planned))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="give one of the two"):
        local.load(small_header.path, LoadOptions(plan=planned.plan, n_ctx=4096))
    with pytest.raises(UsageError, match="memory is '2GiB'"):
        local.load(small_header.path, LoadOptions(memory="2GiB"))  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_engine")
@pytest.mark.parametrize(
    "wish", [{"type_k": "q8_0"}, {"type_v": "q8_0"}, {"n_gpu_layers": 0}, {"host_weights": "mmap"}, {"n_ctx": 32_768}]
)
def test_load_takes_no_wish_beside_a_plan_not_even_what_it_has(wish: dict[str, Any], small_header: Header) -> None:
    plan = planning.plan_model("deepseek-r1-distill-qwen-1.5b", machine="rtx-3090").plan
    with pytest.raises(UsageError, match="give one of the two"):
        local.load(small_header.path, LoadOptions(plan=plan, **wish))
