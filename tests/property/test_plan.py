"""The planner without an engine: laws of any plan over buffers by formula."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from qwq_lite.backend.settings import KV_TYPES, EngineSettings
from qwq_lite.errors import PlanError, UsageError
from qwq_lite.plan import memory, planning
from qwq_lite.plan.buffer_counts import formula_count
from qwq_lite.plan.run_plan import HOST_WEIGHTS, Gpu, Room, RunPlan, Wishes
from qwq_lite.plan.search import LEAST_CTX, MOST_CTX, search, split
from qwq_lite.system.units import GIB, MIB
from tests.planner import (
    ODD_CONTEXT,
    ONE_GPU,
    QWQ,
    SEVERAL_GPUS,
    SHORTAGE,
    SOME_LAYERS,
    TWO_CARDS,
    Case,
    as_candidate,
    cases,
    host_overhead,
    room_of,
    unasked,
    up_to_one_gpu,
)


@given(cases())
@example(TWO_CARDS)
def test_a_plan_is_never_over_its_budget(case: Case) -> None:
    plan = case.plan()
    assume(plan)
    assert plan
    room, used, gpus = case.room, 0, {gpu.name: gpu for gpu in case.room.gpus}
    assert plan.footprint.devices.keys() <= {"CPU", *gpus}
    for name, buffers in plan.footprint.devices.items():
        takes = buffers.weights + buffers.kv + buffers.compute
        if name == "CPU":
            takes += host_overhead(plan.candidate, buffers)
            assert takes >= buffers.total + memory.vocab_bytes(plan.candidate.shape)
        else:
            pool = memory.flash_pool_bytes(plan.candidate.shape, plan.choice) if name.startswith("CUDA") else 0
            takes += gpus[name].overhead + pool
        assert 0 <= takes <= (room.host if name == "CPU" else gpus[name].n_bytes)
        used += takes
    if room.unified:
        share = 0.9 if plan.choice.type_k in ("f16", "bf16") else 1
        assert used <= room.unified * share + 1


@given(cases())
def test_rows_are_all_devices_with_all_that_they_take(case: Case) -> None:
    plan = case.plan()
    assume(plan)
    assert plan
    limits = {gpu.name: gpu.n_bytes for gpu in case.room.gpus} | {"CPU": case.room.host}
    rows = list(plan.rows())
    assert [name for name, *_ in rows] == [*(n for n in case.room.gpu_names if n in plan.footprint.devices), "CPU"]
    for name, buffers, backend, limit in rows:
        assert (buffers, limit) == (plan.footprint.devices[name], limits[name])
        assert buffers.total + backend <= limit


@given(cases())
def test_other_plans_fit_as_well(case: Case) -> None:
    plan = case.plan()
    assume(plan)
    assert plan
    for other in plan.next_best:
        assert other.shortages() == []
        assert other.choice != plan.choice
        assert other.room == plan.room
        assert other.footprint == memory.footprint(
            other.candidate.shape, other.candidate.tensors, other.choice, case.room.gpu_names
        )


def rank(case: Case, plan: RunPlan | None) -> tuple[int, int, int]:
    """More in the order of the search: a larger weight type, then more layers on GPUs, then a longer context."""
    if plan is None:
        return (-len(case.candidates), 0, 0)
    return (-case.candidates.index(plan.candidate), plan.choice.n_gpu_layers, plan.choice.n_ctx)


@given(cases(devices=((), *ONE_GPU)), st.data())
def test_more_memory_never_gives_less(case: Case, data: st.DataObject) -> None:
    """With several GPUs it may: `split` goes by shares and not by what fits best, and another share may fit less well."""
    more = st.integers(0, case.need // 2)
    room = case.room
    larger = dataclasses.replace(
        room,
        host=room.host + data.draw(more),
        gpus=tuple(dataclasses.replace(gpu, n_bytes=gpu.n_bytes + data.draw(more)) for gpu in room.gpus),
        unified=room.unified + data.draw(more) if room.unified else 0,
    )
    assert rank(case, case.plan(larger)) >= rank(case, case.plan())


@given(cases(devices=SEVERAL_GPUS), st.data())
def test_more_memory_on_the_host_never_gives_less_beside_several_gpus(case: Case, data: st.DataObject) -> None:
    larger = dataclasses.replace(case.room, host=case.room.host + data.draw(st.integers(0, case.need // 2)))
    assert rank(case, case.plan(larger)) >= rank(case, case.plan())


@given(cases())
def test_what_the_user_gives_is_never_changed(case: Case) -> None:
    plan = case.plan()
    assume(plan)
    assert plan
    wishes, layers = case.wishes, case.candidates[0].shape.n_layer + 1
    for choice in (plan.choice, *(other.choice for other in plan.next_best)):
        assert wishes.n_ctx in (None, choice.n_ctx)
        assert wishes.type_k in (None, choice.type_k)
        assert wishes.type_v in (None, choice.type_v)
        assert wishes.host_weights in (None, RunPlan(plan.candidate, choice, plan.footprint, plan.room).host_weights)
        if case.room.gpus and wishes.n_gpu_layers is not None:
            assert choice.n_gpu_layers == (layers if wishes.n_gpu_layers < 0 else min(wishes.n_gpu_layers, layers))


@given(cases())
def test_quantized_and_unequal_caches_are_asked_for(case: Case) -> None:
    """4-bit K or V, and K and V of two types, never come by themselves; one type that is given goes for both."""
    plan = case.plan()
    assume(plan)
    assert plan
    given_types = {case.wishes.type_k, case.wishes.type_v} - {None}
    types = {plan.choice.type_k, plan.choice.type_v}
    assert types == given_types or (not given_types and types in ({"f16"}, {"q8_0"}))


@given(unasked)
def test_f16_comes_first_and_q8_0_only_where_it_does_not_fit(case: Case) -> None:
    plan = case.plan()
    shape = case.candidates[0].shape
    n_ctx = min(shape.n_ctx_train, MOST_CTX)
    first = EngineSettings(n_ctx, n_gpu_layers=shape.n_layer + 1 if case.room.gpus else 0)
    if case.refused(first):
        assert plan is None or plan.candidate is not case.candidates[0] or plan.choice.type_k == "q8_0"
    else:
        assert plan is not None
        first = split(case.candidates[0], first, case.room)
        assert (plan.candidate, plan.choice, plan.refused) == (case.candidates[0], first, ())


@given(unasked)
def test_micro_batches_shrink_before_the_context_and_the_context_before_layers(case: Case) -> None:
    plan = case.plan()
    assume(plan and plan.candidate is case.candidates[0])
    assert plan
    shape, choice = plan.candidate.shape, plan.choice
    n_ctx, layers = min(shape.n_ctx_train, MOST_CTX), shape.n_layer + 1 if case.room.gpus else 0
    if choice.n_ctx < n_ctx:
        assert all(case.refused(EngineSettings(n_ctx, "q8_0", "q8_0", n, layers)) for n in (512, 256, 128))
    if choice.n_gpu_layers < layers:
        assert case.refused(EngineSettings(min(n_ctx, LEAST_CTX), "q8_0", "q8_0", 128, layers))


@given(unasked)
@example(ODD_CONTEXT)
def test_a_context_is_a_multiple_of_256_or_all_that_was_trained(case: Case) -> None:
    plan = case.plan()
    assume(plan)
    assert plan
    n_ctx, trained = plan.choice.n_ctx, case.candidates[0].shape.n_ctx_train
    assert n_ctx % 256 == 0 or n_ctx == trained
    assert min(trained, LEAST_CTX) <= n_ctx <= min(trained, MOST_CTX)


@given(up_to_one_gpu)
@example(SOME_LAYERS)
@example(TWO_CARDS)
def test_a_context_is_the_largest_that_fits(case: Case) -> None:
    """With several GPUs not to the last step: a longer context moves layers, and may then fit again."""
    plan = case.plan()
    assume(plan and plan.candidate is case.candidates[0])
    assert plan
    n_ctx = memory.padded_ctx(plan.choice.n_ctx + 1)
    if n_ctx <= min(plan.candidate.shape.n_ctx_train, MOST_CTX):
        assert case.refused(dataclasses.replace(plan.choice, n_ctx=n_ctx))


@given(cases())
def test_a_refusal_names_what_is_short_and_by_how_much(case: Case) -> None:
    try:
        plan = search(case.candidates, case.room, case.wishes, formula_count(case.room))
    except PlanError as error:
        assert SHORTAGE.search(str(error))
    else:
        assert all(SHORTAGE.search(reason) for reason in plan.refused if "more in between" not in reason)


def test_refusals_by_layer_are_few_lines() -> None:
    plan = planning.plan_model("qwq-32b-preview", machine="rtx-3060-12gb").plan
    assert plan.choice.n_gpu_layers < 60
    assert 1 < len(plan.refused) < 12


def test_the_shortage_of_the_nearest_choice_is_right_to_a_tenth() -> None:
    qwq = as_candidate(QWQ)
    least = memory.footprint(QWQ, qwq.tensors, EngineSettings(LEAST_CTX, "q8_0", "q8_0", 128))
    room = Room(least.total + host_overhead(qwq, least.host) - 3 * GIB)
    with pytest.raises(PlanError) as caught:
        search([qwq], room, Wishes(), formula_count(room))
    assert SHORTAGE.findall(str(caught.value)) == [("3.0", "the host")]


def test_a_small_shortage_is_not_called_nothing() -> None:
    qwq = as_candidate(QWQ)
    least = memory.footprint(QWQ, qwq.tensors, EngineSettings(LEAST_CTX, "q8_0", "q8_0", 128))
    room = Room(least.total + host_overhead(qwq, least.host) - 10 * MIB)
    with pytest.raises(PlanError) as caught:
        search([qwq], room, Wishes(), formula_count(room))
    assert " 0.0 GiB too much" not in str(caught.value)


@pytest.mark.parametrize(
    "room",
    [
        room_of("m1-16gb"),
        Room(10 * GIB, (Gpu("CUDA0", GIB),)),
        Room(8 * GIB, (Gpu("CUDA0", GIB), Gpu("CUDA1", 2 * GIB))),
    ],
)
def test_who_frees_what_is_said_to_be_short_gets_a_plan(room: Room) -> None:
    qwq = as_candidate(QWQ)
    with pytest.raises(PlanError) as caught:
        search([qwq], room, Wishes(), formula_count(room))
    fields = {"the host": "host", "the memory that host and GPU share": "unified"}
    for amount, place in SHORTAGE.findall(str(caught.value)):
        more = int((float(amount) + 0.1) * GIB)
        gpus = tuple(dataclasses.replace(gpu, n_bytes=gpu.n_bytes + more * (gpu.name == place)) for gpu in room.gpus)
        larger: dict[str, Any] = {name: getattr(room, name) + more for name in (fields.get(place),) if name}
        room = dataclasses.replace(room, gpus=gpus, **larger)
    assert search([qwq], room, Wishes(), formula_count(room)).choice.n_ctx >= LEAST_CTX


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_an_asked_16_bit_cache_leaves_macos_a_tenth_too(name: str) -> None:
    qwq, room = as_candidate(QWQ), Room(27 * GIB, (Gpu("MTL0", 27 * GIB),), unified=27 * GIB)
    with pytest.raises(PlanError, match="share"):
        search([qwq], room, Wishes(MOST_CTX, name), formula_count(room))


def test_an_f16_cache_leaves_macos_a_tenth() -> None:
    """At 32,768 tokens f16 fits the working set of a Mac with 36 GB, and then nothing else does."""
    qwq, room = as_candidate(QWQ), Room(27 * GIB, (Gpu("MTL0", 27 * GIB),), unified=27 * GIB)
    assert memory.footprint(QWQ, qwq.tensors, EngineSettings(MOST_CTX, n_gpu_layers=65), ["MTL0"]).total < room.unified
    assert search([qwq], room, Wishes(), formula_count(room)).choice.type_k == "q8_0"


# Wishes


NO_NUMBERS: tuple[Any, ...] = (True, False, 4096.0, "4096", [4096], -2, 1 << 25)
NO_NAMES: tuple[Any, ...] = ("", "f17", "Q8_0", True, 8, 1.5, b"f16", ("f16",), ["f16"], {})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(("n_ctx", "n_gpu_layers"), NO_NUMBERS),
        *itertools.product(("type_k", "type_v", "host_weights"), NO_NAMES),
        ("n_ctx", 0),
        ("n_ctx", 255),
        ("n_ctx", (1 << 24) + 1),
        ("n_gpu_layers", (1 << 20) + 1),
    ],
)
def test_a_wish_that_cannot_be_meant_is_refused_with_what_is_allowed(name: str, value: Any) -> None:
    wish: dict[str, Any] = {name: value}
    with pytest.raises(UsageError) as caught:
        Wishes(**wish)
    assert re.match(rf"{name} \(--[a-z-]+\) is {re.escape(repr(value))}[,;] ", str(caught.value))
    known = {"type_k": KV_TYPES, "type_v": KV_TYPES, "host_weights": HOST_WEIGHTS}.get(name, ("a whole number from",))
    assert all(word in str(caught.value) for word in known)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("n_ctx", (None, 256, 1 << 24)),
        ("n_gpu_layers", (None, -1, 0, 1 << 20)),
        ("type_k", (None, *KV_TYPES)),
        ("type_v", (None, *KV_TYPES)),
        ("host_weights", (None, *HOST_WEIGHTS)),
    ],
)
def test_a_wish_within_its_range_is_taken(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        wish: dict[str, Any] = {name: value}
        assert getattr(Wishes(**wish), name) == value


@pytest.mark.parametrize("machine", ["laptop-32gb", "rtx-3060-12gb"])
@pytest.mark.parametrize("name", HOST_WEIGHTS)
def test_where_host_weights_lie_is_what_was_wished(name: str, machine: str) -> None:
    room = room_of(machine)
    plan = search([as_candidate(QWQ)], room, Wishes(host_weights=name), formula_count(room))
    assert plan.host_weights == name
    assert plan.choice == dataclasses.replace(plan.choice, **HOST_WEIGHTS[name])
    assert all(other.host_weights == name for other in plan.next_best)
    host = plan.footprint.host
    assert (host.mapped == 0) == (name in ("pinned", "repacked"))
    assert (host.reclaimable > 0) == (name == "mmap" and not room.gpus)


def test_host_weights_are_mapped_unless_it_is_wished_otherwise() -> None:
    room = room_of("laptop-32gb")
    assert search([as_candidate(QWQ)], room, Wishes(), formula_count(room)).host_weights == "mmap"
