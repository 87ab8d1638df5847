"""Laws of the formulas for buffers, and the figures that are known."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from qwq_lite.backend.footprint import Buffers
from qwq_lite.backend.hardware import EngineReport
from qwq_lite.backend.settings import KV_TYPES, EngineSettings
from qwq_lite.formats import header_only
from qwq_lite.formats.gguf_header import TensorInfo
from qwq_lite.formats.shape import ModelShape
from qwq_lite.formats.tensor_types import file_type
from qwq_lite.plan import free_memory, memory, planning
from qwq_lite.plan.buffer_counts import formula_count
from qwq_lite.plan.run_plan import HOST_WEIGHTS, Gpu, Room, Wishes
from qwq_lite.plan.search import LEAST_CTX, search, split
from qwq_lite.store import catalog
from qwq_lite.system.units import GIB, MIB
from tests.planner import (
    DEVICES,
    ONE_GPU,
    QWQ,
    SEVERAL_GPUS,
    SMALLER_FIRST,
    TWO_CARDS,
    Case,
    as_candidate,
    cases,
    choices,
    host_overhead,
    planned,
    shapes,
    split_evenly,
)


def total(shape: ModelShape, tensors: Sequence[TensorInfo], choice: EngineSettings, gpus: Sequence[str]) -> int:
    """With the layers on GPUs shared out evenly."""
    n_layers = min(choice.n_gpu_layers, shape.n_layer + 1) if choice.n_gpu_layers >= 0 else shape.n_layer + 1
    shares = split_evenly(n_layers, len(gpus)) if len(gpus) > 1 else ()
    return memory.footprint(shape, tensors, dataclasses.replace(choice, tensor_split=shares), gpus).total


@given(
    shapes, choices, st.sampled_from(DEVICES), st.integers(1, 5_000), st.sampled_from((1, 2, 4)), st.integers(1, 512)
)
def test_totals_grow_with_every_knob(
    shape: ModelShape, choice: EngineSettings, gpus: tuple[str, ...], tokens: int, times: int, outputs: int
) -> None:
    infos = as_candidate(shape).tensors
    least = total(shape, infos, choice, gpus)
    knobs: tuple[dict[str, Any], ...] = (
        {"n_ctx": choice.n_ctx + tokens},
        {"n_ubatch": choice.n_ubatch * times},
        {"n_outputs_max": choice.n_outputs_max + outputs},
        *({"type_k": name} for name in SMALLER_FIRST[SMALLER_FIRST.index(choice.type_k) :]),
        *({"type_v": name} for name in SMALLER_FIRST[SMALLER_FIRST.index(choice.type_v) :]),
    )
    for larger in knobs:
        assert total(shape, infos, dataclasses.replace(choice, **larger), gpus) >= least


@given(shapes, choices, st.sampled_from([name for (name,) in ONE_GPU]), st.booleans())
def test_a_layer_more_moves_its_bytes_from_the_host_to_the_gpu(
    shape: ModelShape, choice: EngineSettings, gpu: str, tied: bool
) -> None:
    infos = as_candidate(shape, tied=tied).tensors
    steps = [
        memory.footprint(shape, infos, dataclasses.replace(choice, n_gpu_layers=n), [gpu])
        for n in range(shape.n_layer + 2)
    ]
    size = sum(info.n_bytes for info in infos)
    kv = memory.kv_cache_bytes(shape, choice.n_ctx, choice.type_k, choice.type_v)
    embedding = next(info.n_bytes for info in infos if info.name == "token_embd.weight")
    nothing = Buffers()
    for n, step in enumerate(steps):
        assert sum(buffers.weights for buffers in step.devices.values()) == size + embedding * (tied and n > 0)
        assert sum(buffers.kv for buffers in step.devices.values()) == kv
    for fewer, more in itertools.pairwise(steps):
        before, after = fewer.devices.get(gpu, nothing), more.devices.get(gpu, nothing)
        assert (before.weights, before.kv) <= (after.weights, after.kv)
        assert before.weights < after.weights
        assert fewer.host.weights >= more.host.weights
        assert fewer.host.kv >= more.host.kv
    assert gpu not in steps[0].devices
    assert steps[-1].host.kv == 0
    assert steps[-1].host.weights == embedding


@given(shapes, choices)
def test_any_negative_number_and_any_large_one_are_all_layers(shape: ModelShape, choice: EngineSettings) -> None:
    infos = as_candidate(shape).tensors
    everything = dataclasses.replace(choice, n_gpu_layers=shape.n_layer + 1)
    for n in (-1, shape.n_layer + 2, 1_000):
        asked = dataclasses.replace(choice, n_gpu_layers=n)
        assert memory.footprint(shape, infos, asked, ["CUDA0"]) == memory.footprint(shape, infos, everything, ["CUDA0"])


@given(shapes, choices, st.booleans(), st.lists(st.integers(0, 4), min_size=2, max_size=4))
def test_a_split_conserves_weights_and_cache(
    shape: ModelShape, choice: EngineSettings, tied: bool, shares: list[int]
) -> None:
    """Whatever each GPU gets: only a tied model's embedding is there twice, once its output is on a GPU."""
    n_all = shape.n_layer + 1
    shares = [min(n, n_all - sum(shares[:at])) if sum(shares[:at]) < n_all else 0 for at, n in enumerate(shares)]
    names = [f"CUDA{at}" for at in range(len(shares))]
    choice = dataclasses.replace(choice, n_gpu_layers=sum(shares), tensor_split=tuple(shares))
    infos = as_candidate(shape, tied=tied).tensors
    found = memory.footprint(shape, infos, choice, names)
    embedding = next(info.n_bytes for info in infos if info.name == "token_embd.weight")
    size = sum(info.n_bytes for info in infos) + embedding * (tied and sum(shares) > 0)
    assert sum(buffers.weights for buffers in found.devices.values()) == size
    kv = memory.kv_cache_bytes(shape, choice.n_ctx, choice.type_k, choice.type_v)
    assert sum(buffers.kv for buffers in found.devices.values()) == kv
    assert found.devices.keys() == {"CPU", *(name for name, n in zip(names, shares, strict=True) if n)}
    last = max((at for at, n in enumerate(shares) if n), default=-1)
    for at, (name, n) in enumerate(zip(names, shares, strict=True)):
        if n:  # the output has no cache
            assert found.devices[name].kv == kv // shape.n_layer * (n - (at == last))
    one = memory.footprint(shape, infos, dataclasses.replace(choice, tensor_split=()), names[:1])
    assert (found.host.weights, found.host.kv) == (one.host.weights, one.host.kv)


@given(cases(devices=SEVERAL_GPUS))
@example(TWO_CARDS)
def test_a_split_shares_out_all_layers_on_gpus(case: Case) -> None:
    plan = case.plan()
    assume(plan)
    assert plan
    layers = plan.candidate.shape.n_layer + 1
    for choice in (plan.choice, *(other.choice for other in plan.next_best)):
        n_layers = min(choice.n_gpu_layers, layers)
        assert sum(choice.tensor_split) == n_layers
        assert len(choice.tensor_split) == (len(case.room.gpus) if n_layers else 0)
        assert all(n >= 0 for n in choice.tensor_split)
        places = memory.layer_places(layers - 1, choice, case.room.gpu_names)
        assert len(places) == layers
        assert places[: layers - n_layers] == ["CPU"] * (layers - n_layers)


@given(cases(devices=((), *ONE_GPU)), choices)
def test_nothing_is_split_for_one_gpu_or_none(case: Case, choice: EngineSettings) -> None:
    assert split(case.candidates[0], choice, case.room) == choice


@given(cases(devices=SEVERAL_GPUS), choices)
def test_a_gpu_without_room_gets_no_layers(case: Case, choice: EngineSettings) -> None:
    """Any choice, not only one that fits; where no GPU has room there is nothing to share out by."""
    full, *others = case.room.gpus
    room = dataclasses.replace(
        case.room,
        gpus=(dataclasses.replace(full, n_bytes=0), *(dataclasses.replace(gpu, n_bytes=GIB) for gpu in others)),
    )
    shares = split(case.candidates[0], choice, room).tensor_split
    assert not shares or shares[0] == 0
    backwards = dataclasses.replace(room, gpus=room.gpus[::-1])
    shares = split(case.candidates[0], choice, backwards).tensor_split
    assert not shares or shares[-1] == 0


@pytest.mark.parametrize("machine", ["2x-rtx-3090", "2x-rtx-3060-12gb"])
def test_two_equal_cards_get_half_each(machine: str) -> None:
    choice = planning.plan_model("qwq-32b-preview", machine=machine).plan.choice
    first, second = choice.tensor_split
    assert first + second == choice.n_gpu_layers == 65
    assert abs(first - second) <= 2


@pytest.mark.parametrize("tied", [False, True])
def test_two_cards_that_one_split_fits_get_it(tied: bool) -> None:
    """A tied model's output is as large as an untied one's: the copy of the embedding counts when layers are shared out."""
    candidate = as_candidate(catalog.geometry("deepseek-r1-distill-qwen-1.5b")[1], tied=tied)
    room = Room(GIB, (Gpu("CUDA0", 560 * MIB), Gpu("CUDA1", 560 * MIB)))
    plan = search([candidate], room, Wishes(4096, "f16", n_gpu_layers=-1), formula_count(room))
    assert plan.shortages() == []


@given(shapes, choices)
def test_without_a_gpu_all_is_on_the_host(shape: ModelShape, choice: EngineSettings) -> None:
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
    choice = EngineSettings(32_768, "q8_0", "q8_0", 512, 65)
    assert memory.compute_bytes(QWQ, choice) == pytest.approx(224 * MIB, rel=0.01)
    assert memory.flash_pool_bytes(QWQ, choice) == 128 * MIB
    assert memory.flash_pool_bytes(QWQ, EngineSettings(32_768, n_gpu_layers=65)) == 0


def test_qwqs_weights_are_those_of_the_published_file() -> None:
    sizes = {
        label: sum(info.n_bytes for info in as_candidate(QWQ, label).tensors) for label in ("Q4_K_M", "Q8_0", "F16")
    }
    assert sizes["Q4_K_M"] / GIB == pytest.approx(18.48, abs=0.01)
    assert sizes["Q8_0"] / GIB == pytest.approx(32.4, abs=0.05)
    assert sizes["F16"] == pytest.approx(65.5e9, rel=0.002)


@pytest.mark.parametrize(("gpu", "pool"), [("CUDA0", 128 * MIB), ("Vulkan0", 0), ("MTL0", 0)])
def test_a_backend_takes_its_overhead_where_layers_are_on_it(gpu: str, pool: int) -> None:
    room = Room(64 * GIB, (Gpu(gpu, 64 * GIB, 300 * MIB),))
    vocab = ("CPU", memory.vocab_bytes(QWQ))
    for layers, expected in ((65, [(gpu, 300 * MIB + pool), vocab]), (0, [vocab])):
        plan = planned(as_candidate(QWQ), EngineSettings(32_768, "q8_0", "q8_0", 512, layers), room)
        assert [(name, backend) for name, _, backend, _ in plan.rows()] == expected


@pytest.mark.parametrize("name", HOST_WEIGHTS)
def test_the_vocabulary_counts_against_the_host_and_so_do_pages_that_are_read_for_repacking(name: str) -> None:
    qwq, choice = as_candidate(QWQ), EngineSettings(LEAST_CTX, **HOST_WEIGHTS[name])
    host = planned(qwq, choice, Room(0)).footprint.host
    overhead = host_overhead(qwq, host)
    assert overhead > memory.vocab_bytes(QWQ) if host.reclaimable else overhead == memory.vocab_bytes(QWQ)
    assert planned(qwq, choice, Room(host.total + overhead)).shortages() == []
    assert planned(qwq, choice, Room(host.total + overhead - 1)).shortages() == [("the host", 1)]


# Values in a block, and the bytes that it grows by. Source: ggml-cpu/amx/amx.cpp, supports_op; mmq.cpp, get_row_size
IN_AMX = {
    "F16": (1, 0),
    "Q4_0": (32, 0),
    "Q4_1": (32, 0),
    "Q8_0": (32, 4),
    "Q4_K": (256, 4),
    "Q5_K": (256, 4),
    "Q6_K": (256, 0),
    "IQ4_XS": (256, 2),
}


@pytest.mark.parametrize("weight_type", ["Q8_0", "Q4_0", "Q4_1", "Q4_K_M", "Q5_K_S", "IQ4_XS", "F16", "BF16", "IQ4_NL"])
def test_the_buffer_for_amx_holds_every_matrix_of_its_types(weight_type: str) -> None:
    infos = header_only.tensors(QWQ, file_type(weight_type))
    host, plain = (memory.footprint(QWQ, infos, EngineSettings(LEAST_CTX), amx=amx).host for amx in (True, False))
    matrices = [info for info in infos if len(info.shape) == 2 and info.name != "token_embd.weight"]
    held = [(info, *IN_AMX[info.type.name]) for info in matrices if info.type.name in IN_AMX]
    grown = sum(math.prod(info.shape) // block * more for info, block, more in held)
    repacked = [info for info in matrices if info.type.name == "IQ4_NL"]  # as without AMX
    assert host.weights == plain.weights + grown == sum(info.n_bytes for info in infos) + grown
    assert host.reclaimable == sum(info.n_bytes for info in [*(info for info, _, _ in held), *repacked])
    assert host.mapped + host.reclaimable == plain.weights
    assert (host.kv, host.compute) == (plain.kv, plain.compute)


def test_a_tied_output_is_a_second_copy_in_the_buffer_for_amx() -> None:
    infos = header_only.tensors(QWQ, file_type("Q8_0"), True)
    (embedding,) = [info for info in infos if info.name == "token_embd.weight"]
    copy = embedding.n_bytes * 38 // 34
    for choice, expected in ((EngineSettings(LEAST_CTX), copy), (EngineSettings(LEAST_CTX, repack=False), 0)):
        host = memory.footprint(QWQ, infos, choice, amx=True).host
        rest = sum(info.n_bytes for info in infos if info.type == embedding.type) - embedding.n_bytes
        grown = rest * 4 // 34 if choice.repack else 0
        assert host.weights == sum(info.n_bytes for info in infos) + grown + expected


@pytest.mark.parametrize("gpus", [(), ("CUDA0",)])
@pytest.mark.parametrize("name", HOST_WEIGHTS)
def test_amx_counts_where_weights_are_copied_for_the_cpu(name: str, gpus: tuple[str, ...]) -> None:
    choice = EngineSettings(LEAST_CTX, n_gpu_layers=3 if gpus else 0, **HOST_WEIGHTS[name])
    infos = as_candidate(QWQ).tensors
    with_amx, without = (memory.footprint(QWQ, infos, choice, gpus, amx=amx) for amx in (True, False))
    copies = name == "repacked" or (name == "mmap" and not gpus)
    assert (with_amx.host.weights > without.host.weights) is copies
    assert with_amx.host.anonymous >= without.host.anonymous
    plan = planned(as_candidate(QWQ), choice, Room(0, tuple(Gpu(gpu, 0) for gpu in gpus), amx=True))
    assert copies or plan.footprint == without


def test_a_plan_knows_of_amx_by_the_engine() -> None:
    report = EngineReport("b1", False, (), (), ("AMX", "CPU_REPACK"))
    assert free_memory.room_here(report).amx
    assert not free_memory.room_here(dataclasses.replace(report, extra_buffers=("CPU_REPACK",))).amx


@given(cases())
def test_an_estimate_of_speed_needs_both_bandwidths_and_is_bounded_by_them(case: Case) -> None:
    plan = case.plan()
    assume(plan)
    assert plan
    assert plan.decode_tok_s == 0
    fast, slow = 2e9, 1e9
    gpus = tuple(dataclasses.replace(gpu, bandwidth=fast) for gpu in case.room.gpus)
    fed = dataclasses.replace(plan, room=dataclasses.replace(plan.room, host_bandwidth=slow, gpus=gpus))
    read = sum(buffers.weights + buffers.kv for buffers in plan.footprint.devices.values())
    assert fed.decode_tok_s >= slow / read


@pytest.mark.parametrize("tied", [False, True])
def test_with_all_layers_on_a_gpu_the_estimate_needs_no_bandwidth_of_the_host(tied: bool) -> None:
    """Only rows of the embedding are looked up there, a tied model's output reads the copy on the GPU."""
    _, geometry = catalog.geometry("deepseek-r1-distill-qwen-1.5b")
    candidate = as_candidate(geometry, tied=tied)
    room = Room(8 * GIB, (Gpu("CUDA0", 8 * GIB, bandwidth=1e11),))
    plan = planned(candidate, EngineSettings(4096, n_gpu_layers=geometry.n_layer + 1), room)
    on_gpu = plan.footprint.devices["CUDA0"]
    assert plan.decode_tok_s == pytest.approx(1e11 / (on_gpu.weights + on_gpu.kv // 2))


@given(shapes, choices, st.booleans())
def test_half_of_the_layers_on_each_of_two_gpus_take_as_long_as_all_on_one(
    shape: ModelShape, choice: EngineSettings, tied: bool
) -> None:
    """They work one after the other, so that a second card gives room and no speed."""
    candidate = as_candidate(shape, tied=tied)
    n_all = shape.n_layer + 1
    choice = dataclasses.replace(choice, n_gpu_layers=n_all)
    one = Room(GIB, (Gpu("CUDA0", GIB, 0, 1e9),), host_bandwidth=1e9)
    two = dataclasses.replace(one, gpus=(*one.gpus, Gpu("CUDA1", GIB, 0, 1e9)))
    shared = dataclasses.replace(choice, tensor_split=split_evenly(n_all, 2))
    speeds = [planned(candidate, choice, one).decode_tok_s, planned(candidate, shared, two).decode_tok_s]
    assert speeds[0] == pytest.approx(speeds[1], rel=1e-6)
