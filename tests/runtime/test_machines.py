"""Machines and geometries for a plan without device or file: ranges, names, and figures published elsewhere."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwq_lite.errors import UsageError
from qwq_lite.formats.shape import ModelShape
from qwq_lite.plan import machines
from qwq_lite.plan.machines import GB_S, MACHINES, OVERHEADS, Machine
from qwq_lite.store import catalog
from qwq_lite.system.units import GIB, MIB

ROOT = Path(__file__).resolve().parents[2]
by_machine = pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)

# llama.cpp's "model params" for each, and the count on the Hub's page
PARAMETERS = {
    "qwq-32b-preview": 32.76e9,
    "qwq-32b": 32.76e9,
    "deepseek-r1-distill-qwen-1.5b": 1.78e9,
    "deepseek-r1-distill-qwen-7b": 7.62e9,
    "deepseek-r1-distill-qwen-14b": 14.77e9,
    "deepseek-r1-distill-qwen-32b": 32.76e9,
}


def n_params(shape: ModelShape, tied: bool) -> int:
    """Parameters of a qwen2 model: a bias on q, k and v only, two norms a layer and one at the end."""
    q, kv = shape.n_head * shape.n_embd_head, shape.n_head_kv * shape.n_embd_head
    attention = (shape.n_embd + 1) * (q + 2 * kv) + q * shape.n_embd
    layer = attention + 3 * shape.n_embd * shape.n_ff + 2 * shape.n_embd
    return shape.n_layer * layer + shape.n_embd + (1 if tied else 2) * shape.n_vocab * shape.n_embd


def test_names_are_unique_and_are_found() -> None:
    names = [machine.name for machine in MACHINES]
    assert len(names) == len(set(names))
    assert [machines.find(name.upper()).name for name in names] == names


@by_machine
def test_memory_is_in_range(machine: Machine) -> None:
    assert 8 * GIB <= machine.host_bytes <= 512 * GIB
    for device in machine.devices:
        assert 10 * GIB <= device.total_bytes <= 128 * GIB
        assert 0.95 * device.total_bytes <= device.free_bytes <= device.total_bytes
    assert machine.devices[-1].kind == "cpu"
    assert machine.devices[-1].total_bytes == machine.host_bytes


@by_machine
def test_bandwidth_is_in_range(machine: Machine) -> None:
    low, high = (200, 2100) if machine.backend in ("cuda", "vulkan") else (60, 900)
    assert low * GB_S <= machine.bandwidth_bytes_s <= high * GB_S
    assert 60 * GB_S <= machine.host_bandwidth_bytes_s <= machine.bandwidth_bytes_s


@by_machine
def test_the_first_device_is_the_backends(machine: Machine) -> None:
    prefix = {"cuda": "CUDA0", "vulkan": "Vulkan0", "metal": "MTL0", "cpu": "CPU"}[machine.backend]
    assert machine.devices[0].name == prefix
    n_gpus = 2 if machine.name.startswith("2x-") else 1
    assert len(machine.gpus) == n_gpus * (machine.backend != "cpu")
    assert machine.overhead is OVERHEADS[machine.backend] is machines.overhead_of(machine.devices[0].name)


@by_machine
def test_several_gpus_are_alike_and_counted_from_0(machine: Machine) -> None:
    """`bandwidth_bytes_s` and `budget_bytes` are those of each."""
    assert machine.devices == (*machine.gpus, machine.devices[-1])
    first = machine.gpus[0] if machine.gpus else machine.devices[-1]
    numbered = [replace(first, name=f"{first.name[:-1]}{n}") for n in range(len(machine.gpus))]
    assert list(machine.gpus) == numbered
    if len(machine.gpus) > 1:
        assert machine.description.startswith(f"{len(machine.gpus)} x ")


@pytest.mark.parametrize("name", ["rtx-3060-12gb", "rtx-3090"])
def test_two_cards_are_twice_one_card_in_the_same_desktop(name: str) -> None:
    machine, one = machines.find(f"2x-{name}"), machines.find(name)
    assert len(machine.gpus) == 2 * len(one.gpus)
    assert machine.gpus[0] == one.gpus[0]
    assert machine.devices[-1] == one.devices[-1]
    assert machine.description.removeprefix("2 x ") == one.description
    assert (machine.bandwidth_bytes_s, machine.budget_bytes) == (one.bandwidth_bytes_s, one.budget_bytes)


def test_a_device_of_an_unknown_backend_counts_with_the_largest_overhead() -> None:
    assert machines.overhead_of("ROCm0") is machines.overhead_of("CUDA1") is machines.OVERHEADS["cuda"]
    assert machines.overhead_of("ROCm0").total_bytes == max(overhead.total_bytes for overhead in OVERHEADS.values())


@by_machine
def test_a_budget_leaves_macos_its_reserve(machine: Machine) -> None:
    assert 0 < machine.budget_bytes <= machine.devices[0].free_bytes
    if machine.backend == "metal":
        assert machine.host_bytes - machine.budget_bytes >= machines.apple_reserve_bytes(machine.host_bytes)


@by_machine
def test_unified_memory_is_part_of_the_hosts(machine: Machine) -> None:
    assert machine.unified == (machine.backend in ("metal", "cpu"))
    if machine.unified:
        assert machine.devices[0].total_bytes <= machine.host_bytes
        assert machine.bandwidth_bytes_s == machine.host_bandwidth_bytes_s


@by_machine
def test_a_name_with_a_size_tells_it(machine: Machine) -> None:
    last = machine.name.rsplit("-", maxsplit=1)[-1]
    if last.endswith("gb"):
        memory = machine.host_bytes if machine.unified else machine.devices[0].total_bytes
        assert memory == pytest.approx(int(last[:-2]) * GIB, rel=0.01)


@by_machine
def test_every_figure_has_a_source(machine: Machine) -> None:
    assert machine.description
    assert machine.memory_source
    assert machine.bandwidth_source


@pytest.mark.parametrize("backend", OVERHEADS)
def test_a_backends_overhead_is_below_a_gibibyte(backend: machines.Backend) -> None:
    overhead = OVERHEADS[backend]
    assert 0 <= overhead.context_bytes <= overhead.total_bytes < GIB
    assert (overhead.total_bytes == 0) == (backend == "cpu")
    assert overhead.source


@pytest.mark.parametrize(
    ("memory_gib", "reported_bytes"),
    [
        (16, 11_453.25e6),
        (16, 10_922.67 * MIB),
        (32, 21_845.34 * MIB),
        (36, 28_991e6),
        (64, 48 * GIB),
        (96, 73_728 * MIB),
    ],
)
def test_metals_working_set_is_what_llama_cpp_logged(memory_gib: int, reported_bytes: float) -> None:
    assert machines.metal_working_set_bytes(memory_gib * GIB) == pytest.approx(reported_bytes, abs=MIB)


@given(st.integers(8 * GIB, 1 << 42))
def test_macos_keeps_a_quarter_and_ten_gibibytes_at_most(memory_bytes: int) -> None:
    reserve = machines.apple_reserve_bytes(memory_bytes)
    assert reserve <= memory_bytes / 4
    assert reserve == 10 * GIB if memory_bytes >= 40 * GIB else reserve >= memory_bytes / 4 - 1


def test_an_unknown_machine_is_refused_with_the_names() -> None:
    with pytest.raises(UsageError, match="'rtx-9999'") as caught:
        machines.find("rtx-9999")
    assert all(machine.name in str(caught.value) for machine in MACHINES)


def test_an_unknown_model_is_refused_with_the_names() -> None:
    with pytest.raises(UsageError, match="'deepseek-r1-distill-qwen'") as caught:
        catalog.geometry("deepseek-r1-distill-qwen")
    assert all(name in str(caught.value) for name in PARAMETERS)


def test_geometries_are_those_with_a_published_count() -> None:
    assert catalog.GEOMETRIES.keys() == PARAMETERS.keys()
    assert len({model.repository for model, _ in catalog.GEOMETRIES.values()}) == len(PARAMETERS)


def test_geometries_run_from_the_largest_to_the_smallest() -> None:
    counts = [PARAMETERS[name] for name in catalog.GEOMETRIES]
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_geometry_has_the_published_number_of_parameters(name: str) -> None:
    model, shape = catalog.geometry(name.upper())
    assert model.name == name
    assert n_params(shape, model.tied) == pytest.approx(PARAMETERS[name], rel=0.005)
    assert shape.n_embd_head == 128
    assert shape.n_head % shape.n_head_kv == 0


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_model_with_a_geometry_is_recognised_and_sampled_as_its_family(name: str) -> None:
    model, _ = catalog.geometry(name)
    found = catalog.find(model.repository)
    assert found is not None
    assert model.name.startswith(found.name)
    assert model.sampling == found.sampling


def test_neither_module_loads_llama_cpp() -> None:
    code = (
        f"import sys; sys.path[:0] = {[str(ROOT)]!r}; from qwq_lite.plan import machines; from qwq_lite.store import catalog; "
        "print('llama_cpp' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
