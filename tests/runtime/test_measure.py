"""llama.cpp's own count against contexts that are really made, and against formulas; and what ends it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qwq_lite import catalog, gguf_header, ghost, memory, shape
from qwq_lite.backend import measure as measuring
from qwq_lite.backend.context import Context, ContextSettings, Entry
from qwq_lite.backend.measure import measure
from qwq_lite.backend.model import LoadedModel
from qwq_lite.errors import PlanError
from qwq_lite.memory import Choice
from qwq_lite.recipe import file_type

CHOICES = [Choice(n_ctx, kv, kv) for n_ctx in (1024, 4096) for kv in ("f16", "q8_0")]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the breakdown is read with libstdc++ only")
def test_the_count_is_what_a_context_really_takes(demo_gguf: Path) -> None:
    counted = measure(demo_gguf, CHOICES)
    assert counted is not None
    header = gguf_header.read(demo_gguf)
    geometry = shape.from_header(header)
    weights = LoadedModel(demo_gguf)
    for choice, found in zip(CHOICES, counted, strict=True):
        settings = ContextSettings(
            choice.n_ctx, 1, n_seq_max=choice.n_seq_max, type_k=choice.type_k, type_v=choice.type_v
        )
        context = Context(weights, settings)
        context.decode([Entry(n, n, 0, n == 63) for n in range(64)])
        rows = measuring._breakdown(context.pointer)
        context.close()
        outputs = memory.output_bytes(geometry, choice.n_outputs_max)
        assert found.host.kv == sum(kv for _, _, kv, _ in rows)
        assert (
            abs(found.host.compute - outputs - sum(compute for _, _, _, compute in rows)) <= 0.01 * found.host.compute
        )
        assert found.host.weights == sum(info.n_bytes for info in header.tensors)
        formula = memory.footprint(geometry, header.tensors, choice)
        assert abs(formula.total - found.total) <= 0.02 * found.total
    weights.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the breakdown is read with libstdc++ only")
def test_a_ghost_of_64_layers_is_counted_and_takes_no_disk(tmp_path: Path) -> None:
    geometry = catalog.geometry("qwq-32b-preview")[1]
    infos = ghost.tensors(geometry, file_type("Q4_K_M"))
    path = tmp_path / "ghost.gguf"
    ghost.write(path, geometry, infos)
    assert path.stat().st_blocks * 512 < 1 << 20
    choices = [Choice(32_768, "q8_0", "q8_0"), Choice(8_192, repack=False)]
    counted = measure(path, choices)
    assert counted is not None
    for choice, found in zip(choices, counted, strict=True):
        formula = memory.footprint(geometry, infos, choice)
        assert found.host.weights == formula.host.weights
        assert found.host.kv == formula.host.kv
        assert abs(found.host.compute - formula.host.compute) <= 0.02 * formula.host.compute
    assert counted[0].host.reclaimable + counted[0].host.mapped == counted[0].host.weights
    assert counted[1].host.reclaimable == 0


def test_an_engine_that_ends_over_the_question_is_a_plan_error(tmp_path: Path) -> None:
    geometry = catalog.geometry("qwq-32b-preview")[1]
    path = tmp_path / "ghost.gguf"
    ghost.write(path, geometry, ghost.tensors(geometry, file_type("Q8_0"))[:-1])  # a tensor is missing
    with pytest.raises(PlanError, match=r"ghost\.gguf: llama\.cpp ended over it"):
        measure(path, [Choice(1024)])


def test_a_build_that_cannot_be_asked_gives_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_BREAKDOWN", "no_such_symbol")
    with pytest.raises(measuring._NotHere):
        measuring._breakdown(None)
