"""The planner without an engine: laws of any plan over buffers by formula, and the answers for machines that people own."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from qwq_lite import catalog, ghost, machines, memory, planning
from qwq_lite.errors import PlanError
from qwq_lite.gguf_header import TensorInfo
from qwq_lite.memory import KV_TYPES, Buffers, Choice, Footprint
from qwq_lite.plan import GIB, LEAST_CTX, MOST_CTX, Candidate, Count, Room, RunPlan, Wishes, search
from qwq_lite.recipe import file_type
from qwq_lite.shape import ModelShape

MIB = 1 << 20
QWQ = catalog.geometry("qwq-32b-preview")[1]
DEVICES = (None, "CUDA0", "Vulkan0", "MTL0")
SMALLER_FIRST = ("q4_0", "q8_0", "f16")  # K and V by bytes an element
SHORTAGE = re.compile(r"(\d+\.\d) GiB too much for (the host|the memory that host and GPU share|CUDA0|Vulkan0|MTL0)")

# Small enough to be counted in a moment; columns of 256 so that 4-bit types apply. n_ctx_train is often no multiple of 256.
shapes = st.builds(
    lambda n_layer, blocks, n_ff, heads, n_vocab, n_ctx: ModelShape(
        "qwen2",
        n_layer,
        256 * blocks,
        256 * n_ff,
        4 * heads,
        heads,
        64 * blocks // heads,
        64 * n_vocab,
        n_ctx,
        1e-5,
        1e6,
    ),
    n_layer=st.integers(1, 5),
    blocks=st.integers(1, 4),
    n_ff=st.integers(1, 12),
    heads=st.sampled_from((1, 2)),
    n_vocab=st.integers(1, 600),
    n_ctx=st.one_of(st.sampled_from((4_096, 32_768, 40_960, 131_072)), st.integers(256, 50_000)),
)
choices = st.builds(
    Choice,
    n_ctx=st.integers(1, 40_000),
    type_k=st.sampled_from(SMALLER_FIRST),
    type_v=st.sampled_from(SMALLER_FIRST),
    n_ubatch=st.sampled_from((64, 128, 256, 512)),
    n_gpu_layers=st.integers(-1, 8),
    n_outputs_max=st.integers(1, 512),
)
wished = st.builds(
    Wishes,
    n_ctx=st.none() | st.integers(256, 60_000),
    type_k=st.none() | st.sampled_from(tuple(KV_TYPES)),
    type_v=st.none() | st.sampled_from(tuple(KV_TYPES)),
    n_gpu_layers=st.none() | st.integers(-1, 8),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """What a search is given, and the bytes that the first candidate takes with nothing given up: rooms are near it."""

    candidates: tuple[Candidate, ...]
    room: Room
    wishes: Wishes
    need: int

    def plan(self, room: Room | None = None, wishes: Wishes | None = None) -> RunPlan | None:
        room = room or self.room
        try:
            return search(self.candidates, room, wishes or self.wishes, by_formula(room))
        except PlanError:
            return None

    def refused(self, choice: Choice) -> bool:
        """Whether the first candidate with this choice is too much for the room."""
        (footprint,) = by_formula(self.room)(self.candidates[0], [choice])
        return RunPlan(self.candidates[0], choice, footprint, self.room).shortages() != []


def by_formula(room: Room) -> Count:
    def count(candidate: Candidate, asked: Sequence[Choice]) -> list[Footprint]:
        return [memory.footprint(candidate.shape, candidate.tensors, choice, room.gpu) for choice in asked]

    return count


def as_candidate(shape: ModelShape, label: str = "Q4_K_M", tied: bool = False) -> Candidate:
    return Candidate(label, shape, ghost.tensors(shape, file_type(label), tied))


@st.composite
def cases(draw: st.DrawFn, wishes: st.SearchStrategy[Wishes] = wished) -> Case:
    shape, tied = draw(shapes), draw(st.booleans())
    labels = draw(st.sampled_from((("Q4_K_M",), ("F16", "Q8_0", "Q4_K_M"))))
    candidates = tuple(as_candidate(shape, label, tied) for label in labels)
    asked, gpu = draw(wishes), draw(st.sampled_from(DEVICES))
    widest = Choice(asked.n_ctx or min(shape.n_ctx_train, MOST_CTX))
    need = memory.footprint(shape, candidates[0].tensors, widest).total
    share = st.integers(0, 130).map(lambda percent: need * percent // 100)
    if gpu is None:
        return Case(candidates, Room(draw(share)), asked, need)
    host, unified = draw(share), draw(share) if gpu == "MTL0" else 0
    overhead = draw(st.sampled_from((0, need // 20)))
    return Case(candidates, Room(host, gpu, draw(share), overhead, unified), asked, need)


unasked = cases(st.just(Wishes()))

# A context trained for no multiple of 256, on a card whose conversion pool makes the first estimate too long.
_ODD = ModelShape("qwen2", 1, 256, 256, 4, 1, 64, 64, 17_153, 1e-5, 1e6)
ODD_CONTEXT = Case((as_candidate(_ODD),), Room(1 << 30, "CUDA0", 10_500_000), Wishes(), 0)
# Half of the layers on the GPU, and so half of what a token takes.
SOME_LAYERS = Case((as_candidate(QWQ),), planning.room_of("rtx-3060-12gb", None, 0), Wishes(), 0)


@given(cases())
def test_a_plan_is_never_over_its_budget(case: Case) -> None:
    plan = case.plan()
    assume(plan)
    assert plan
    room, used = case.room, 0
    for name, buffers in plan.footprint.devices.items():
        assert name in ("CPU", room.gpu)
        takes = buffers.weights + buffers.kv + buffers.compute
        if name != "CPU":
            pool = memory.flash_pool_bytes(plan.candidate.shape, plan.choice) if name == "CUDA0" else 0
            takes += room.gpu_overhead + pool
        assert 0 <= takes <= (room.host if name == "CPU" else room.gpu_bytes)
        used += takes
    if room.unified:
        share = 0.9 if plan.choice.type_k == "f16" else 1
        assert used <= room.unified * share + 1


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
            other.candidate.shape, other.candidate.tensors, other.choice, case.room.gpu
        )


@given(cases(), st.data())
def test_more_memory_never_gives_less(case: Case, data: st.DataObject) -> None:
    """Less, in the order of the search: a smaller weight type, then fewer layers on the GPU, then a shorter context."""
    more = st.integers(0, case.need // 2)
    room = case.room
    larger = dataclasses.replace(
        room,
        host=room.host + data.draw(more),
        gpu_bytes=room.gpu_bytes + data.draw(more) if room.gpu else 0,
        unified=room.unified + data.draw(more) if room.unified else 0,
    )

    def rank(plan: RunPlan | None) -> tuple[int, int, int]:
        if plan is None:
            return (-len(case.candidates), 0, 0)
        return (-case.candidates.index(plan.candidate), plan.choice.n_gpu_layers, plan.choice.n_ctx)

    assert rank(case.plan(larger)) >= rank(case.plan())


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
        if case.room.gpu and wishes.n_gpu_layers is not None:
            assert choice.n_gpu_layers == (layers if wishes.n_gpu_layers < 0 else wishes.n_gpu_layers)


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
    first = Choice(n_ctx, n_gpu_layers=shape.n_layer + 1 if case.room.gpu else 0)
    if case.refused(first):
        assert plan is None or plan.candidate is not case.candidates[0] or plan.choice.type_k == "q8_0"
    else:
        assert plan is not None
        assert (plan.candidate, plan.choice, plan.refused) == (case.candidates[0], first, ())


@given(unasked)
def test_micro_batches_shrink_before_the_context_and_the_context_before_layers(case: Case) -> None:
    plan = case.plan()
    assume(plan and plan.candidate is case.candidates[0])
    assert plan
    shape, choice = plan.candidate.shape, plan.choice
    n_ctx, layers = min(shape.n_ctx_train, MOST_CTX), shape.n_layer + 1 if case.room.gpu else 0
    if choice.n_ctx < n_ctx:
        assert all(case.refused(Choice(n_ctx, "q8_0", "q8_0", n, layers)) for n in (512, 256, 128))
    if choice.n_gpu_layers < layers:
        assert case.refused(Choice(min(n_ctx, LEAST_CTX), "q8_0", "q8_0", 128, layers))


@given(unasked)
@example(ODD_CONTEXT)
def test_a_context_is_a_multiple_of_256_or_all_that_was_trained(case: Case) -> None:
    plan = case.plan()
    assume(plan)
    assert plan
    n_ctx, trained = plan.choice.n_ctx, case.candidates[0].shape.n_ctx_train
    assert n_ctx % 256 == 0 or n_ctx == trained
    assert min(trained, LEAST_CTX) <= n_ctx <= min(trained, MOST_CTX)


@given(unasked)
@example(SOME_LAYERS)
def test_a_context_is_the_largest_that_fits(case: Case) -> None:
    plan = case.plan()
    assume(plan and plan.candidate is case.candidates[0])
    assert plan
    n_ctx = memory.padded_ctx(plan.choice.n_ctx + 1)
    if n_ctx <= min(plan.candidate.shape.n_ctx_train, MOST_CTX):
        assert case.refused(dataclasses.replace(plan.choice, n_ctx=n_ctx))


@given(cases())
def test_a_refusal_names_what_is_short_and_by_how_much(case: Case) -> None:
    try:
        plan = search(case.candidates, case.room, case.wishes, by_formula(case.room))
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
    least = memory.footprint(QWQ, qwq.tensors, Choice(LEAST_CTX, "q8_0", "q8_0", 128))
    room = Room(least.total - 3 * GIB)
    with pytest.raises(PlanError) as caught:
        search([qwq], room, Wishes(), by_formula(room))
    assert SHORTAGE.findall(str(caught.value)) == [("3.0", "the host")]


def test_a_small_shortage_is_not_called_nothing() -> None:
    qwq = as_candidate(QWQ)
    room = Room(memory.footprint(QWQ, qwq.tensors, Choice(LEAST_CTX, "q8_0", "q8_0", 128)).total - 10 * MIB)
    with pytest.raises(PlanError) as caught:
        search([qwq], room, Wishes(), by_formula(room))
    assert " 0.0 GiB too much" not in str(caught.value)


@pytest.mark.parametrize("room", [planning.room_of("m1-16gb", None, 0), Room(10 * GIB, "CUDA0", GIB)])
def test_who_frees_what_is_said_to_be_short_gets_a_plan(room: Room) -> None:
    qwq = as_candidate(QWQ)
    with pytest.raises(PlanError) as caught:
        search([qwq], room, Wishes(), by_formula(room))
    fields = {"the host": "host", "the memory that host and GPU share": "unified"}
    for amount, place in SHORTAGE.findall(str(caught.value)):
        name = fields.get(place, "gpu_bytes")
        larger: dict[str, Any] = {name: getattr(room, name) + int((float(amount) + 0.1) * GIB)}
        room = dataclasses.replace(room, **larger)
    assert search([qwq], room, Wishes(), by_formula(room)).choice.n_ctx >= LEAST_CTX


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_an_asked_16_bit_cache_leaves_macos_a_tenth_too(name: str) -> None:
    qwq, room = as_candidate(QWQ), Room(27 * GIB, "MTL0", 27 * GIB, unified=27 * GIB)
    with pytest.raises(PlanError, match="share"):
        search([qwq], room, Wishes(MOST_CTX, name), by_formula(room))


def test_an_f16_cache_leaves_macos_a_tenth() -> None:
    """At 32,768 tokens f16 fits the working set of a Mac with 36 GB, and then nothing else does."""
    qwq, room = as_candidate(QWQ), Room(27 * GIB, "MTL0", 27 * GIB, unified=27 * GIB)
    assert memory.footprint(QWQ, qwq.tensors, Choice(MOST_CTX, n_gpu_layers=65), "MTL0").total < room.unified
    assert search([qwq], room, Wishes(), by_formula(room)).choice.type_k == "q8_0"


# Buffers


def total(shape: ModelShape, tensors: Sequence[TensorInfo], choice: Choice, gpu: str | None) -> int:
    return memory.footprint(shape, tensors, choice, gpu).total


@given(
    shapes, choices, st.sampled_from(DEVICES), st.integers(1, 5_000), st.sampled_from((1, 2, 4)), st.integers(1, 512)
)
def test_totals_grow_with_every_knob(
    shape: ModelShape, choice: Choice, gpu: str | None, tokens: int, times: int, outputs: int
) -> None:
    infos = as_candidate(shape).tensors
    least = total(shape, infos, choice, gpu)
    knobs: tuple[dict[str, Any], ...] = (
        {"n_ctx": choice.n_ctx + tokens},
        {"n_ubatch": choice.n_ubatch * times},
        {"n_outputs_max": choice.n_outputs_max + outputs},
        *({"type_k": name} for name in SMALLER_FIRST[SMALLER_FIRST.index(choice.type_k) :]),
        *({"type_v": name} for name in SMALLER_FIRST[SMALLER_FIRST.index(choice.type_v) :]),
    )
    for larger in knobs:
        assert total(shape, infos, dataclasses.replace(choice, **larger), gpu) >= least


@given(shapes, choices, st.sampled_from(DEVICES[1:]), st.booleans())
def test_a_layer_more_moves_its_bytes_from_the_host_to_the_gpu(
    shape: ModelShape, choice: Choice, gpu: str, tied: bool
) -> None:
    infos = as_candidate(shape, tied=tied).tensors
    steps = [
        memory.footprint(shape, infos, dataclasses.replace(choice, n_gpu_layers=n), gpu)
        for n in range(shape.n_layer + 2)
    ]
    size = sum(info.n_bytes for info in infos)
    kv = memory.kv_cache_bytes(shape, choice.n_ctx, choice.type_k, choice.type_v)
    nothing = Buffers()
    for step in steps:
        assert sum(buffers.weights for buffers in step.devices.values()) == size
        assert sum(buffers.kv for buffers in step.devices.values()) == kv
    for fewer, more in itertools.pairwise(steps):
        before, after = fewer.devices.get(gpu, nothing), more.devices.get(gpu, nothing)
        assert (before.weights, before.kv) <= (after.weights, after.kv)
        assert before.weights < after.weights or tied  # of a tied model the output is nothing but a norm
        assert fewer.host.weights >= more.host.weights
        assert fewer.host.kv >= more.host.kv
    assert gpu not in steps[0].devices
    assert steps[-1].host.kv == 0
    assert steps[-1].host.weights == next(info.n_bytes for info in infos if info.name == "token_embd.weight")


@given(shapes, choices)
def test_any_negative_number_and_any_large_one_are_all_layers(shape: ModelShape, choice: Choice) -> None:
    infos = as_candidate(shape).tensors
    everything = dataclasses.replace(choice, n_gpu_layers=shape.n_layer + 1)
    for n in (-1, shape.n_layer + 2, 1_000):
        asked = dataclasses.replace(choice, n_gpu_layers=n)
        assert memory.footprint(shape, infos, asked, "CUDA0") == memory.footprint(shape, infos, everything, "CUDA0")


@given(shapes, choices)
def test_without_a_gpu_all_is_on_the_host(shape: ModelShape, choice: Choice) -> None:
    found = memory.footprint(shape, as_candidate(shape).tensors, choice)
    assert found.devices.keys() == {"CPU"}
    assert found.total == found.host.total


@pytest.mark.parametrize(
    ("name", "kib_a_token", "gib"), [("f16", 256, 8.0), ("bf16", 256, 8.0), ("q8_0", 136, 4.25), ("q4_0", 72, 2.25)]
)
def test_qwqs_cache_takes_the_published_bytes(name: str, kib_a_token: int, gib: float) -> None:
    assert memory.kv_cache_bytes(QWQ, 256, name, name) == 256 * kib_a_token * 1024
    assert memory.kv_cache_bytes(QWQ, 32_768, name, name) == gib * GIB


@given(st.integers(1, 200_000), st.sampled_from(tuple(KV_TYPES)), st.sampled_from(tuple(KV_TYPES)))
def test_a_cache_is_a_sum_of_k_and_v_in_steps_of_256_tokens(n_ctx: int, type_k: str, type_v: str) -> None:
    found = memory.kv_cache_bytes(QWQ, n_ctx, type_k, type_v)
    assert found == memory.kv_cache_bytes(QWQ, -(-n_ctx // 256) * 256, type_k, type_v)
    assert 2 * found == sum(memory.kv_cache_bytes(QWQ, n_ctx, name, name) for name in (type_k, type_v))


def test_qwqs_compute_buffer_and_flash_pool_are_what_was_counted() -> None:
    choice = Choice(32_768, "q8_0", "q8_0", 512, 65)
    assert memory.compute_bytes(QWQ, choice) == pytest.approx(224 * MIB, rel=0.01)
    assert memory.flash_pool_bytes(QWQ, choice) == 128 * MIB
    assert memory.flash_pool_bytes(QWQ, Choice(32_768, n_gpu_layers=65)) == 0


def test_qwqs_weights_are_those_of_the_published_file() -> None:
    sizes = {
        label: sum(info.n_bytes for info in as_candidate(QWQ, label).tensors) for label in ("Q4_K_M", "Q8_0", "F16")
    }
    assert sizes["Q4_K_M"] / GIB == pytest.approx(18.48, abs=0.01)
    assert sizes["Q8_0"] / GIB == pytest.approx(32.4, abs=0.05)
    assert sizes["F16"] == pytest.approx(65.5e9, rel=0.002)


@pytest.mark.parametrize(("gpu", "pool"), [("CUDA0", 128 * MIB), ("Vulkan0", 0), ("MTL0", 0)])
def test_a_backend_takes_its_overhead_where_layers_are_on_it(gpu: str, pool: int) -> None:
    qwq, room = as_candidate(QWQ), Room(64 * GIB, gpu, 64 * GIB, 300 * MIB)
    for layers, expected in ((65, 300 * MIB + pool), (0, 0)):
        choice = Choice(32_768, "q8_0", "q8_0", 512, layers)
        plan = RunPlan(qwq, choice, memory.footprint(QWQ, qwq.tensors, choice, gpu), room)
        assert plan.backend_bytes == expected


@given(cases())
def test_an_estimate_of_speed_needs_both_bandwidths_and_is_bounded_by_them(case: Case) -> None:
    plan = case.plan()
    assume(plan)
    assert plan
    assert plan.decode_tok_s == 0
    fast, slow = 2e9, 1e9
    fed = dataclasses.replace(plan, room=dataclasses.replace(plan.room, host_bandwidth=slow, gpu_bandwidth=fast))
    read = sum(buffers.weights + buffers.kv for buffers in plan.footprint.devices.values())
    assert fed.decode_tok_s >= slow / read


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
    assert plan.footprint.total + plan.backend_bytes <= machines.metal_working_set_bytes(36 * GIB)


def test_a_laptop_of_16_gb_is_too_small_for_qwq_and_is_told_what_is_not() -> None:
    with pytest.raises(PlanError) as caught:
        planning.plan_model("qwq-32b", machine="laptop-16gb")
    assert SHORTAGE.search(str(caught.value))
    smaller = planning.what_fits(planning.room_of("laptop-16gb", None, 0), Wishes())
    assert smaller is not None
    assert planning.plan_model(smaller, machine="laptop-16gb").plan.choice.n_ctx >= LEAST_CTX


@pytest.mark.parametrize("machine", [machine.name for machine in machines.MACHINES])
@pytest.mark.parametrize("model", catalog.GEOMETRIES)
def test_every_machine_gets_a_plan_within_its_room_or_the_largest_model_that_has_one(model: str, machine: str) -> None:
    room = planning.room_of(machine, None, 0)
    try:
        plan = planning.plan_model(model, machine=machine).plan
    except PlanError as error:
        assert SHORTAGE.search(str(error))
        smaller = planning.what_fits(room, Wishes())
        assert smaller != model
        if smaller:
            assert planning.plan_model(smaller, machine=machine).plan.candidate.label == "Q4_K_M"
        return
    assert plan.room == room
    assert plan.footprint.host.total <= room.host <= machines.find(machine).host_bytes
    if room.gpu:
        on_gpu = plan.footprint.devices.get(room.gpu, Buffers()).total + plan.backend_bytes
        assert on_gpu <= room.gpu_bytes <= machines.find(machine).devices[0].free_bytes
        if room.unified:
            assert plan.footprint.host.total + on_gpu <= room.unified <= machines.find(machine).host_bytes


@pytest.mark.parametrize("machine", [machine.name for machine in machines.MACHINES])
def test_a_reserve_and_a_budget_leave_less(machine: str) -> None:
    room, kept, given_room = (planning.room_of(machine, *rest) for rest in ((None, 0), (None, GIB), (8 * GIB, GIB)))
    if room.gpu:
        assert (room.gpu_bytes - kept.gpu_bytes, given_room.gpu_bytes) == (GIB, 7 * GIB)
    else:
        assert (room.host - kept.host, given_room.host) == (GIB, 7 * GIB)


def test_nothing_fits_a_room_without_memory() -> None:
    assert planning.what_fits(Room(0), Wishes()) is None
    assert planning.what_fits(Room(0, "CUDA0", 0), Wishes()) is None
