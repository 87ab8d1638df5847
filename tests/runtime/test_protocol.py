"""Messages between a host and its worker: what goes in comes out, and nothing that comes in does harm."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwq_lite.backend.settings import EngineSettings
from qwq_lite.errors import ContextFull, EngineError, PlanError, QwqError, UsageError
from qwq_lite.events import Answer, Done, Event, Notice, Progress, Reply, Stats, Thinking
from qwq_lite.formats import gguf_header, header_only
from qwq_lite.formats.tensor_types import file_type
from qwq_lite.plan import memory
from qwq_lite.plan.run_plan import Candidate, Gpu, Room, RunPlan, Wishes
from qwq_lite.worker import protocol
from qwq_lite.worker.protocol import Pipe
from tests.planner import QWQ

EVENTS: list[Event] = [
    Progress("prefill", 3, 10),
    Thinking("海 \ud83d"),
    Answer("a\n\x00\u2028"),
    Notice("one line", "slow"),
    Notice("one line", "warmed"),
    Done(Reply("answer", "thought", "stop", Stats(1, 2, 3, 4, 5, 0.5, 1.5))),
    Done(Reply("answer", "thought", "loop", Stats(n_refused=3, loops=("rewound", "closed", "stopped")))),
]


@pytest.fixture
def pipe() -> Iterator[tuple[Pipe, int]]:
    """The reading end, and the descriptor to write to."""
    read, write = os.pipe()
    yield Pipe(read, write), write
    for end in (read, write):
        try:
            os.close(end)
        except OSError:
            continue


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_comes_out_as_it_went_in(event: Event, pipe: tuple[Pipe, int]) -> None:
    pipe[0].send({"event": protocol.event_to_json(event)})
    message = pipe[0].receive()
    assert message is not None
    assert protocol.event_from_json(message["event"]) == event


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(values)
def test_no_json_is_an_event_but_events_are(value: object) -> None:
    try:
        protocol.event_from_json(value)  # type: ignore[arg-type]
    except EngineError:
        return
    assert isinstance(value, list)


@given(st.dictionaries(st.text(), values, max_size=4))
def test_a_message_comes_out_as_it_went_in(message: dict[str, object]) -> None:
    read, write = os.pipe()
    ends = Pipe(read, write)
    try:
        ends.send(message)
        assert ends.receive() == message
    finally:
        ends.close()


def test_a_cut_message_is_the_end() -> None:
    data = protocol.encode({"event": ["Answer", "text"]})
    for length in range(len(data)):
        read, write = os.pipe()
        os.write(write, data[:length])
        os.close(write)
        assert Pipe(read, read).receive() is None
        os.close(read)


@pytest.mark.parametrize(
    "data", [b"\xff\xff\xff\xff", b"\x05\0\0\0hello", b"\x02\0\0\0[]", b"\x01\0\0\0\xff", b"\x04\0\0\0null"]
)
def test_what_is_no_message_is_the_end(data: bytes, pipe: tuple[Pipe, int]) -> None:
    os.write(pipe[1], data)
    assert pipe[0].receive() is None


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes"])
def test_what_is_no_json_is_refused_before_it_is_sent(value: object) -> None:
    with pytest.raises(UsageError):
        protocol.encode({"options": value})


def test_errors_keep_their_kind_and_strangers_become_the_engines() -> None:
    for error in (ContextFull("full"), PlanError("short"), UsageError("no")):
        found = protocol.error_from_json(json.loads(json.dumps(protocol.error_to_json(error))))
        assert (type(found), str(found)) == (type(error), str(error))
    assert type(protocol.error_from_json(protocol.error_to_json(ValueError("x")))) is EngineError
    for name in ("annotations", "object", "__doc__"):
        found = protocol.error_from_json([name, "text"])
        assert isinstance(found, QwqError)


def test_a_plan_comes_out_as_it_went_in(tmp_path: Path) -> None:
    tensors = tuple(header_only.tensors(QWQ, file_type("Q4_K_M")))
    candidate = Candidate("x.gguf", QWQ, tensors)
    choice = EngineSettings(8192, "q8_0", "q8_0", n_gpu_layers=65, tensor_split=(33, 32))
    room = Room(1 << 35, (Gpu("CUDA0", 1 << 34, 5, 1e12), Gpu("CUDA1", 1 << 34)), 0, 2e10)
    footprint = memory.footprint(QWQ, tensors, choice, room.gpu_names)
    plan = RunPlan(candidate, choice, footprint, room, Wishes(8192, "q8_0"), ("because",))
    data = json.loads(json.dumps(protocol.plan_to_json(plan)))
    header_only.write(tmp_path / "x.gguf", QWQ, list(tensors))
    header = gguf_header.read(tmp_path / "x.gguf")
    found = protocol.plan_from_json(data, header)
    assert (found.choice, found.footprint, found.room) == (choice, footprint, room)
    assert (found.wishes, found.refused, found.candidate.shape.n_layer) == (plan.wishes, plan.refused, QWQ.n_layer)
    for broken in ({}, {**data, "choice": {}}, {**data, "room": None}):
        with pytest.raises(EngineError):
            protocol.plan_from_json(broken, header)
