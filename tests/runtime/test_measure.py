"""llama.cpp's own count, against buffers that were really allocated, and against the formulas; and what it may die of."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf.constants import GGUFValueType

from bench.plan import BOUNDS, allocated, deviations, qwq
from qwq_lite.backend import measure as backend
from qwq_lite.backend.context import Context, ContextSettings, Entry
from qwq_lite.backend.measure import measure
from qwq_lite.backend.model import LoadedModel
from qwq_lite.backend.settings import EngineSettings
from qwq_lite.errors import PlanError
from qwq_lite.formats import gguf_header, gguf_writer, header_only, shape
from qwq_lite.formats.shape import ModelShape
from qwq_lite.formats.tensor_types import file_type
from qwq_lite.plan import memory

SHAPE = qwq(2, n_vocab=8192)
TENSORS = header_only.tensors(SHAPE, file_type("Q4_K_M"))
NARROW = replace(SHAPE, n_embd=896, n_ff=4864, n_head=14, n_head_kv=2, n_embd_head=64)  # 256 does not divide 896
WEIGHED = ("Q4_K_M", "Q6_K", "Q8_0", "F16", "BF16", "IQ3_S", "Q2_K")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the breakdown is read with libstdc++ only")


@pytest.fixture(scope="module")
def ghost_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of QwQ's geometry with a small vocabulary, under a name that is not ASCII."""
    path = tmp_path_factory.mktemp("ghost") / "Gespenst 鬼.gguf"
    header_only.write(path, SHAPE, TENSORS)
    return path


@on_linux
@pytest.mark.parametrize("fixture", ["demo_gguf", "ghost_gguf"])
def test_the_count_is_what_a_real_load_takes(fixture: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(fixture)
    header = gguf_header.read(path)
    choices = [EngineSettings(n_ctx, cache, cache) for n_ctx in (4096, 8192) for cache in ("f16", "q8_0")]
    counted = measure(path, choices)
    assert counted is not None
    for choice, found, real in zip(choices, counted, allocated(path, choices), strict=True):
        assert not real.faults
        formula = memory.footprint(shape.from_header(header), header.tensors, choice)
        off = deviations(found, real, formula)
        assert {key: value for key, value in off.items() if value > BOUNDS[key]} == {}, choice
        if list(found.devices) == ["CPU"]:
            assert (found.host.weights, found.host.kv) == (real.weights, real.kv)


@on_linux
def test_the_count_holds_where_the_engine_maps_the_file(demo_gguf: Path) -> None:
    """A load as the engine makes it; what llama.cpp then says of weights is the span of the file."""
    counted = measure(demo_gguf, [EngineSettings(1024, "q8_0", "q8_0")])
    assert counted is not None
    weights = LoadedModel(demo_gguf, EngineSettings(1024))
    context = Context(weights, ContextSettings(1024, 1, n_seq_max=4, type_k="q8_0", type_v="q8_0"))
    context.decode([Entry(n, n, 0, n == 63) for n in range(64)])
    rows = backend._breakdown(context.pointer)
    outputs = memory.output_bytes(shape.from_header(gguf_header.read(demo_gguf)), 4)
    context.close()
    weights.close()
    devices = counted[0].devices.values()
    assert sum(buffers.kv for buffers in devices) == sum(kv for _, _, kv, _ in rows)
    compute = sum(compute for _, _, _, compute in rows)
    assert sum(buffers.compute for buffers in devices) == pytest.approx(compute + outputs, rel=0.01)


@on_linux
def test_a_ghost_of_all_64_layers_is_counted(tmp_path: Path) -> None:
    geometry = qwq(64)
    path, infos = tmp_path / "ghost.gguf", header_only.tensors(geometry, file_type("Q4_K_M"))
    header_only.write(path, geometry, infos)
    assert path.stat().st_blocks * 512 < 1_000_000
    choices = [EngineSettings(32_768, "q8_0", "q8_0"), EngineSettings(8_192, repack=False)]
    counted = measure(path, choices)
    assert counted is not None
    for choice, found in zip(choices, counted, strict=True):
        formula = memory.footprint(geometry, infos, choice).host
        assert (found.host.weights, found.host.kv) == (formula.weights, formula.kv)
        assert found.host.compute == pytest.approx(formula.compute, rel=0.01)


@on_linux
@pytest.mark.parametrize(("type_k", "type_v"), [("bf16", "bf16"), ("q4_0", "q4_0"), ("f16", "q8_0"), ("q8_0", "f16")])
def test_formulas_follow_other_caches_and_micro_batches(ghost_gguf: Path, type_k: str, type_v: str) -> None:
    choices = [EngineSettings(8192, type_k, type_v, n_ubatch=n) for n in (128, 256, 512)]
    counted = measure(ghost_gguf, choices)
    assert counted is not None
    for choice, found in zip(choices, counted, strict=True):
        formula = memory.footprint(SHAPE, TENSORS, choice)
        assert formula.host.kv == found.host.kv
        assert formula.host.compute == pytest.approx(found.host.compute, rel=0.01)


@on_linux
@pytest.mark.parametrize("size", [SHAPE, NARROW], ids=["rows of 5120", "rows of 896"])
@pytest.mark.parametrize(("name", "tied"), [*((name, False) for name in WEIGHED), ("Q4_K_M", True), ("Q6_K", True)])
def test_a_ghost_weighs_what_llama_cpp_loads(tmp_path: Path, name: str, tied: bool, size: ModelShape) -> None:
    """`measure` itself holds the sum of the rows against llama_model_size."""
    path, infos = tmp_path / "ghost.gguf", header_only.tensors(size, file_type(name), tied)
    header_only.write(path, size, infos)
    counted = measure(path, [EngineSettings(256)])
    assert counted is not None
    assert sum(buffers.weights for buffers in counted[0].devices.values()) == sum(info.n_bytes for info in infos)


@on_linux
def test_repacked_weights_are_read_from_the_file_and_copied(ghost_gguf: Path) -> None:
    counted = measure(ghost_gguf, [EngineSettings(256), EngineSettings(256, repack=False)])
    assert counted is not None
    copied, kept = (footprint.host for footprint in counted)
    assert copied.weights == kept.weights == copied.mapped + copied.reclaimable
    assert (kept.mapped, kept.reclaimable) == (kept.weights, 0)


def test_the_buffer_for_amx_is_memory_of_the_host_that_is_no_page_of_the_file() -> None:
    rows = [("CPU", 10, 3, 5), ("AMX", 100, 0, 0), ("CPU_REPACK", 1000, 0, 0)]
    mapped, copied = (backend._by_device(rows, [], EngineSettings(256, load_mode=mode)) for mode in ("mmap", "none"))
    assert mapped == {"CPU": {"weights": 1110, "kv": 3, "compute": 5, "mapped": 10, "reclaimable": 1100}}
    assert copied == {"CPU": {"weights": 1110, "kv": 3, "compute": 5, "mapped": 0, "reclaimable": 0}}


@on_linux
def test_a_ghost_takes_no_room(ghost_gguf: Path) -> None:
    found = ghost_gguf.stat()
    assert found.st_size > sum(info.n_bytes for info in TENSORS)
    assert found.st_blocks * 512 < 1_000_000


def test_a_file_that_llama_cpp_refuses_is_named_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    header_only.write(path, SHAPE, TENSORS)
    os.truncate(path, path.stat().st_size - 100_000)
    with pytest.raises(PlanError, match=r"cut\.gguf: .*not within the file bounds"):
        measure(path, [EngineSettings(256)])


def test_a_file_that_lacks_a_tensor_is_named_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "lacking.gguf"
    header_only.write(path, SHAPE, TENSORS[:-1])
    with pytest.raises(PlanError, match=r"lacking\.gguf: .*blk\.1\.ffn_up\.weight"):
        measure(path, [EngineSettings(256)])


def test_a_question_that_ends_llama_cpp_ends_only_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotary size that the graph asserts: the process aborts, and its reason is the last thing that it says."""
    encode = gguf_writer.encode

    def with_wrong_rotary_size(arch: str, keys: dict[str, Any], infos: Any) -> bytes:
        return encode(arch, {**keys, f"{arch}.rope.dimension_count": (96, GGUFValueType.UINT32)}, infos)

    path = tmp_path / "wrong.gguf"
    with monkeypatch.context() as patch:
        patch.setattr(gguf_writer, "encode", with_wrong_rotary_size)
        header_only.write(path, SHAPE, TENSORS)
    with pytest.raises(PlanError, match=r"wrong\.gguf: .*GGML_ASSERT"):
        measure(path, [EngineSettings(256)])


def test_a_child_that_says_nothing_of_use_is_an_error(ghost_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 0, stdout="", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_options: done)
    with pytest.raises(PlanError, match="count cannot be read"):
        measure(ghost_gguf, [EngineSettings(256)])


@on_linux
def test_an_illegal_instruction_names_doctor(ghost_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], -4, stdout="", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_options: done)
    with pytest.raises(PlanError, match=r"run: qwq-lite doctor$"):
        measure(ghost_gguf, [EngineSettings(256)])


def test_a_build_without_the_symbol_is_no_error(ghost_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = subprocess.run

    def in_a_child_without_it(command: list[str], **options: Any) -> Any:
        *before, code = command
        path, _, serve = code.partition("from qwq_lite.system import child; ")
        assert serve == "child.serve('qwq_lite.backend.measure:_answer')"
        gone = "import qwq_lite.backend.measure as m; m._BREAKDOWN = 'no_such_symbol'; m._answer()"
        return run([*before, path + gone], **options)

    monkeypatch.setattr(subprocess, "run", in_a_child_without_it)
    assert measure(ghost_gguf, [EngineSettings(256)]) is None


def test_no_breakdown_without_symbol_or_known_library(monkeypatch: pytest.MonkeyPatch, ghost_gguf: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(backend, "_BREAKDOWN", "no_such_symbol")
        with pytest.raises(backend._NotHere):
            backend._breakdown(None)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        patch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a child can only say no there"))
        assert measure(ghost_gguf, [EngineSettings(256)]) is None
