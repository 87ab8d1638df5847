"""A word, once, when decoding is far below what a plan's bandwidth allows."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qwq_lite.backend.settings import EngineSettings
from qwq_lite.events import Stats
from qwq_lite.formats import header_only
from qwq_lite.formats.tensor_types import file_type
from qwq_lite.plan import memory
from qwq_lite.plan.run_plan import Candidate, Gpu, Room, RunPlan
from qwq_lite.plan.speed import SpeedCheck, default_threads, host_bandwidth
from qwq_lite.store import catalog
from qwq_lite.system.units import GIB

_, SMALL = catalog.geometry("deepseek-r1-distill-qwen-1.5b")
ALL_LAYERS = SMALL.n_layer + 1
ENOUGH = 48  # tokens of a reply that says something about speed


class Measured:
    """A bandwidth of the host, and the threads that it was asked for with."""

    def __init__(self, bandwidth: float) -> None:
        self.bandwidth = bandwidth
        self.asked: list[int] = []

    def __call__(self, n_threads: int) -> float:
        self.asked.append(n_threads)
        return self.bandwidth


def make_plan(n_gpu_layers: int = 0, host_bandwidth: float = 1e10) -> RunPlan:
    candidate = Candidate("Q4_K_M", SMALL, header_only.tensors(SMALL, file_type("Q4_K_M")))
    gpus = (Gpu("CUDA0", 8 * GIB, bandwidth=1e11),) if n_gpu_layers else ()
    room = Room(8 * GIB, gpus, host_bandwidth=host_bandwidth)
    choice = EngineSettings(4096, n_gpu_layers=n_gpu_layers)
    footprint = memory.footprint(SMALL, candidate.tensors, choice, room.gpu_names)
    return RunPlan(candidate, choice, footprint, room)


def reply(tok_s: float, n_generated: int = ENOUGH) -> Stats:
    stats = Stats(n_generated=n_generated, decode_s=(n_generated - 1) / tok_s)
    assert stats.decode_tok_s == pytest.approx(tok_s)
    return stats


@pytest.fixture
def never() -> Callable[[int], float]:
    def measure(n_threads: int) -> float:
        raise AssertionError(f"measured with {n_threads} threads")

    return measure


def test_a_slow_reply_is_spoken_of_with_both_speeds(never: Callable[[int], float]) -> None:
    plan = make_plan()
    notice = SpeedCheck(plan, 2, never)(reply(0.5))
    assert notice is not None
    assert notice.kind == "slow"
    assert "0.5 tok/s" in notice.text
    assert f"{plan.decode_tok_s:.1f}" in notice.text
    assert "\n" not in notice.text


@pytest.mark.parametrize("n_generated", [2, 10, ENOUGH - 1])
def test_a_short_reply_says_nothing_and_the_next_long_one_does(n_generated: int, never: Callable[[int], float]) -> None:
    pace = SpeedCheck(make_plan(), 2, never)
    assert pace(reply(0.5, n_generated)) is None
    assert pace(Stats()) is None
    assert pace(reply(0.5)) is not None


@pytest.mark.parametrize(
    ("share", "speaks"), [(1.2, False), (0.8, False), (0.34, False), (0.33, True), (0.1, True), (0.01, True)]
)
@pytest.mark.parametrize("n_gpu_layers", [0, 10, ALL_LAYERS])
def test_a_third_of_what_bandwidth_allows_is_the_limit(
    share: float, speaks: bool, n_gpu_layers: int, never: Callable[[int], float]
) -> None:
    plan = make_plan(n_gpu_layers)
    assert plan.decode_tok_s > 1
    assert (SpeedCheck(plan, 2, never)(reply(plan.decode_tok_s * share)) is not None) == speaks


def test_it_speaks_once(never: Callable[[int], float]) -> None:
    pace = SpeedCheck(make_plan(), 2, never)
    said = [pace(reply(0.5)) for _ in range(4)]
    assert [notice is not None for notice in said] == [True, False, False, False]


def test_the_hosts_bandwidth_is_measured_where_the_plan_has_none() -> None:
    known, measured = make_plan(), Measured(1e10)
    notice = SpeedCheck(make_plan(host_bandwidth=0.0), 3, measured)(reply(0.5))
    assert measured.asked == [3]
    assert notice == SpeedCheck(known, 3, measured)(reply(0.5))
    assert measured.asked == [3]


def test_the_hosts_bandwidth_is_measured_once_and_not_before_a_reply_is_long_enough() -> None:
    for tok_s in (0.5, 1e6):
        measured = Measured(1e10)
        pace = SpeedCheck(make_plan(host_bandwidth=0.0), 2, measured)
        assert pace(reply(tok_s, ENOUGH - 1)) is None
        assert measured.asked == []
        for _ in range(3):
            pace(reply(tok_s))
        assert measured.asked == [2]


@pytest.mark.parametrize("n_gpu_layers", [1, 10, ALL_LAYERS - 1])
def test_the_hosts_bandwidth_is_measured_for_a_layer_on_the_host(n_gpu_layers: int) -> None:
    measured = Measured(1e10)
    assert SpeedCheck(make_plan(n_gpu_layers, host_bandwidth=0.0), 3, measured)(reply(0.5)) is not None
    assert measured.asked == [3]


def test_the_hosts_bandwidth_is_not_measured_where_every_layer_is_on_the_gpu(never: Callable[[int], float]) -> None:
    plan = make_plan(ALL_LAYERS, host_bandwidth=0.0)
    assert plan.footprint.host.kv == 0
    notice = SpeedCheck(plan, 2, never)(reply(0.5))
    assert notice is not None
    assert f"allows {plan.decode_tok_s:.1f}" in notice.text
    assert SpeedCheck(plan, 2, never)(reply(plan.decode_tok_s * 0.8)) is None


def test_a_bandwidth_that_is_not_known_is_no_reason_to_speak() -> None:
    assert SpeedCheck(make_plan(host_bandwidth=0.0), 2, Measured(0.0))(reply(1e-3)) is None


@pytest.mark.parametrize("n_gpu_layers", [0, 10, ALL_LAYERS])
def test_the_reason_is_the_cards_memory_where_there_is_a_card(n_gpu_layers: int, never: Callable[[int], float]) -> None:
    notice = SpeedCheck(make_plan(n_gpu_layers), 2, never)(reply(0.1))
    assert notice is not None
    assert ("the card's memory" in notice.text) == ("--ctx" in notice.text) == (n_gpu_layers > 0)
    assert ("smaller context" in notice.text) == (n_gpu_layers > 0)
    assert "--reserve" not in notice.text
    assert ("keep the processor" in notice.text) == (n_gpu_layers == 0)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_bandwidth_is_read_from_memory(n_threads: int) -> None:
    assert 1e8 < host_bandwidth(n_threads) < 1e13


def test_a_thread_is_left_to_the_desktop() -> None:
    assert default_threads() >= 1


def test_a_later_reply_is_judged_too(never: Callable[[int], float]) -> None:
    """A card that spills while a chat runs was fast at first."""
    pace = SpeedCheck(make_plan(), 2, never)
    assert [pace(reply(1e6)) for _ in range(3)] == [None] * 3
    assert pace(reply(0.1)) is not None
    assert pace(reply(0.1)) is None
