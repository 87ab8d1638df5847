"""What tests of the planner share: small models, rooms near what they need, counts by formula."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from hypothesis import strategies as st

from qwq_lite.backend.footprint import Buffers
from qwq_lite.backend.settings import KV_TYPES, EngineSettings
from qwq_lite.errors import PlanError
from qwq_lite.formats import header_only
from qwq_lite.formats.shape import ModelShape
from qwq_lite.formats.tensor_types import file_type
from qwq_lite.plan import free_memory, memory
from qwq_lite.plan.buffer_counts import formula_count
from qwq_lite.plan.run_plan import HOST_WEIGHTS, Candidate, Gpu, Room, RunPlan, Wishes
from qwq_lite.plan.search import MOST_CTX, search, split
from qwq_lite.store import catalog

QWQ = catalog.geometry("qwq-32b-preview")[1]
ONE_GPU = (("CUDA0",), ("Vulkan0",), ("MTL0",))
SEVERAL_GPUS = (("CUDA0", "CUDA1"), ("Vulkan0", "Vulkan1"), ("CUDA0", "Vulkan1"), ("CUDA0", "CUDA1", "CUDA2"))
DEVICES = ((), *ONE_GPU, *SEVERAL_GPUS)
SMALLER_FIRST = ("q4_0", "q8_0", "f16")  # K and V by bytes an element
SHORTAGE = re.compile(r"(\d+\.\d) GiB too much for (the host|the memory that host and GPU share|(?:CUDA|Vulkan|MTL)\d)")

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
    EngineSettings,
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
    host_weights=st.none() | st.sampled_from(tuple(HOST_WEIGHTS)),
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
            return search(self.candidates, room, wishes or self.wishes, formula_count(room))
        except PlanError:
            return None

    def refused(self, choice: EngineSettings) -> bool:
        """Whether the first candidate with this choice is too much for the room."""
        return planned(self.candidates[0], split(self.candidates[0], choice, self.room), self.room).shortages() != []


def room_of(machine: str, memory_bytes: int | None = None, reserve_bytes: int = 0) -> Room:
    """The room of a known machine."""
    return free_memory.limit_room(free_memory.known_room(machine)[0], memory_bytes, reserve_bytes)


def host_overhead(candidate: Candidate, host: Buffers) -> int:
    return memory.host_overhead_bytes(candidate.shape, candidate.tensors, host)


def planned(candidate: Candidate, choice: EngineSettings, room: Room) -> RunPlan:
    """The plan of a choice, whether it fits or not."""
    (footprint,) = formula_count(room)(candidate, [choice])
    return RunPlan(candidate, choice, footprint, room)


def as_candidate(shape: ModelShape, label: str = "Q4_K_M", tied: bool = False) -> Candidate:
    return Candidate(label, shape, header_only.tensors(shape, file_type(label), tied))


def split_evenly(n: int, parts: int) -> tuple[int, ...]:
    return tuple(n // parts + (index < n % parts) for index in range(parts))


@st.composite
def cases(
    draw: st.DrawFn,
    wishes: st.SearchStrategy[Wishes] = wished,
    devices: Sequence[tuple[str, ...]] = DEVICES,
) -> Case:
    shape, tied = draw(shapes), draw(st.booleans())
    labels = draw(st.sampled_from((("Q4_K_M",), ("F16", "Q8_0", "Q4_K_M"))))
    candidates = tuple(as_candidate(shape, label, tied) for label in labels)
    asked, names = draw(wishes), draw(st.sampled_from(devices))
    widest = EngineSettings(asked.n_ctx or min(shape.n_ctx_train, MOST_CTX))
    whole = memory.footprint(shape, candidates[0].tensors, widest).host
    need = whole.total + host_overhead(candidates[0], whole)
    share = st.integers(0, 130).map(lambda percent: need * percent // 100)
    host, unified = draw(share), draw(share) if names == ("MTL0",) else 0
    overhead = draw(st.sampled_from((0, need // 20)))
    gpus = tuple(Gpu(name, draw(share), overhead) for name in names)
    return Case(candidates, Room(host, gpus, unified), asked, need)


unasked = cases(st.just(Wishes()))
up_to_one_gpu = cases(st.just(Wishes()), ((), *ONE_GPU))

# A context trained for no multiple of 256, on a card whose conversion pool makes the first estimate too long.
_ODD = ModelShape("qwen2", 1, 256, 256, 4, 1, 64, 64, 17_153, 1e-5, 1e6)
ODD_CONTEXT = Case((as_candidate(_ODD),), Room(1 << 30, (Gpu("CUDA0", 10_500_000),)), Wishes(), 0)
# Half of the layers on the GPU, and so half of what a token takes.
SOME_LAYERS = Case((as_candidate(QWQ),), room_of("rtx-3060-12gb"), Wishes(), 0)
TWO_CARDS = Case((as_candidate(QWQ),), room_of("2x-rtx-3060-12gb"), Wishes(), 0)
