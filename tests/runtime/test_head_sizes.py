"""Heads that the blocks of a quantized cache do not divide: no plan takes such a cache, and no file is blamed for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import qwq_lite
from qwq_lite.backend.context import Context, ContextSettings
from qwq_lite.backend.measure import measure
from qwq_lite.backend.model import LoadedModel
from qwq_lite.backend.settings import EngineSettings
from qwq_lite.errors import EngineError, PlanError, UsageError
from qwq_lite.formats import gguf_header, shape
from qwq_lite.plan import memory, planning
from qwq_lite.plan.buffer_counts import formula_count
from qwq_lite.plan.memory import kv_type_objection
from qwq_lite.plan.run_plan import Room, Wishes
from qwq_lite.plan.search import search
from tests.other_models import MAMBA, transformer, write_model
from tests.planner import QWQ, as_candidate

UNEVEN = {  # K and V, by model: which types the cache may have
    "phi-2": (80, 80),
    "phi-3 mini": (96, 96),
    "open-llama 3B": (100, 100),
    "plm": (192, 128),
    "minicpm3": (96, 64),
    "K alone": (80, 64),
    "V alone": (64, 80),
    "MLA": (576, 512),
}


@pytest.fixture(scope="module")
def odd_file(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("odd") / "odd.gguf", tiny_gguf, transformer("llama", 80))


@pytest.mark.parametrize("head", [32, 40, 64, 72, 80, 96, 112, 120])
@pytest.mark.parametrize("name", ["f16", "q8_0", "q4_0"])
def test_a_cache_is_offered_where_llama_cpp_makes_one(head: int, name: str, tiny_gguf: Path, tmp_path: Path) -> None:
    path = write_model(tmp_path / "head.gguf", tiny_gguf, transformer("llama", head))
    objection = kv_type_objection(shape.from_header(gguf_header.read(path)), name, name)
    weights = LoadedModel(path)
    try:
        Context(weights, ContextSettings(256, 1, type_k=name, type_v=name)).close()
        made = True
    except EngineError:
        made = False
    weights.close()
    assert made == (objection is None), objection


@pytest.mark.parametrize("model", UNEVEN)
def test_each_side_of_a_cache_has_heads_of_its_own(model: str) -> None:
    k, v = UNEVEN[model]
    geometry = replace(QWQ, n_embd_head=k, n_embd_head_v=v)
    for type_k, type_v in (("q8_0", "q8_0"), ("q4_0", "f16"), ("f16", "q8_0"), ("f16", "bf16")):
        refused = (type_k[0] == "q" and k % 32 > 0) or (type_v[0] == "q" and v % 32 > 0)
        found = kv_type_objection(geometry, type_k, type_v)
        assert (found is not None) == refused
        if found is not None:
            assert f"heads of {k if type_k[0] == 'q' and k % 32 else v};" in found


def test_bytes_of_k_and_v_are_counted_by_their_own_heads() -> None:
    geometry = replace(QWQ, n_embd_head=96, n_embd_head_v=64)
    both = memory.kv_cache_bytes(geometry, 4096, "f16", "f16")
    assert both == QWQ.n_layer * 4096 * QWQ.n_head_kv * (96 + 64) * 2
    assert memory.flash_pool_bytes(geometry, EngineSettings(4096, "q8_0", "f16")) == 4096 * QWQ.n_head_kv * 96 * 2


def test_a_tight_room_gets_no_quantized_cache() -> None:
    even = as_candidate(QWQ)
    odd = replace(even, shape=replace(QWQ, n_embd_head=80, n_embd_head_v=80))
    whole = memory.footprint(odd.shape, odd.tensors, EngineSettings(32_768)).total
    for share in (0.9, 0.95, 1.0):
        room = Room(int(whole * share))
        try:
            plan = search([odd], room, Wishes(), formula_count(room))
        except PlanError:
            continue
        assert plan.choice.type_k == plan.choice.type_v == "f16"
        assert not any("q8_0" in line for line in plan.refused)


@pytest.mark.parametrize("wishes", [Wishes(type_k="q8_0"), Wishes(type_v="q4_0"), Wishes(type_k="f16", type_v="q8_0")])
def test_a_cache_that_is_asked_for_and_cannot_be_is_an_error_that_says_why(wishes: Wishes, odd_file: Path) -> None:
    with pytest.raises(
        UsageError, match=r"odd\.gguf: type_[kv] \(--type-[kv]\) is q._0, whose blocks of 32 .* heads of 80"
    ):
        planning.plan_model(str(odd_file), wishes=wishes)
    with pytest.raises(UsageError, match=r"heads of 80; f16 and bf16 are allowed"):
        qwq_lite.load(odd_file, type_k=wishes.type_k, type_v=wishes.type_v, isolated=False)


def test_an_odd_model_loads_and_answers(odd_file: Path) -> None:
    with qwq_lite.load(odd_file, n_ctx=512, isolated=False, n_threads=1) as model:
        assert model.plan.choice.type_k == "f16"
        assert model.ask("One?", max_tokens=4, seed=1).finish_reason == "length"


def test_what_llama_cpp_refuses_with_a_reason_is_not_called_damaged(odd_file: Path) -> None:
    try:
        found = measure(odd_file, [EngineSettings(512, "q8_0", "q8_0")])
    except PlanError as error:
        assert "does not divide n_embd_head_k=80" in str(error)
        assert "damaged" not in str(error)
    else:
        assert found is None, "a build that cannot be asked"


def test_a_model_without_heads_may_have_any_cache(tiny_gguf: Path, tmp_path: Path) -> None:
    path = write_model(tmp_path / "mamba.gguf", tiny_gguf, MAMBA)
    with qwq_lite.load(path, n_ctx=512, type_k="q8_0", isolated=False, n_threads=1) as model:
        assert model.ask("One?", max_tokens=4, seed=1).finish_reason == "length"
