"""Messages between a host and its worker: a length, then JSON. Knows neither engine nor processes.

JSON and nothing that can build objects: what the worker sends comes from a process whose memory llama.cpp may have spoilt.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import threading
from typing import Any

from qwq_lite import errors
from qwq_lite.backend.footprint import footprint_from_json
from qwq_lite.backend.settings import settings_from_json
from qwq_lite.errors import EngineError, QwqError, UsageError
from qwq_lite.events import Answer, Done, Event, Notice, Progress, Reply, Stats, Thinking
from qwq_lite.formats.gguf_header import Header
from qwq_lite.plan.candidates import of_file
from qwq_lite.plan.run_plan import Gpu, Room, RunPlan, Wishes
from qwq_lite.reply.commands import Command, Conclude, LogEntry, ReplyLog, Steer

_LENGTH = struct.Struct("<I")
_MOST_BYTES = 1 << 28  # a prompt of 16 million tokens is half of it
_EVENTS = {kind.__name__: kind for kind in (Progress, Thinking, Answer, Notice)}
_ORDERS = {kind.__name__: kind for kind in (Conclude, Steer)}


class Pipe:
    """One end of a pair of pipes. Any thread sends, one receives."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = read, write
        self._sending = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        """Raises: OSError when the other end is gone; UsageError for what is no JSON."""
        self.write(encode(message))

    def write(self, data: bytes) -> None:
        """Send what `encode` returned. Raises: OSError when the other end is gone."""
        with self._sending:
            view = memoryview(data)
            while view:
                view = view[os.write(self._write, view) :]

    def receive(self) -> dict[str, Any] | None:
        """The next message; None at the end of file, or for what is none."""
        head = self._exactly(_LENGTH.size)
        if head is None:
            return None
        (length,) = _LENGTH.unpack(head)
        data = self._exactly(length) if length <= _MOST_BYTES else None
        if data is None:
            return None
        try:
            message = json.loads(data.decode("utf-8", "surrogatepass"))
        except ValueError:
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        for end in (self._read, self._write):
            try:
                os.close(end)
            except OSError:
                continue

    def _exactly(self, n_bytes: int) -> bytes | None:
        parts = []
        while n_bytes:
            try:
                part = os.read(self._read, min(n_bytes, 1 << 20))
            except OSError:
                return None
            if not part:
                return None
            parts.append(part)
            n_bytes -= len(part)
        return b"".join(parts)


def encode(message: dict[str, Any]) -> bytes:
    """A message as it goes through the pipe. Raises: UsageError for what is no JSON."""
    try:
        data = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"messages and options must be texts, numbers, lists and dicts: {error}") from error
    if len(data) > _MOST_BYTES:
        raise UsageError(f"a prompt of {len(data):,} bytes; {_MOST_BYTES:,} are the most, and no context holds them")
    return _LENGTH.pack(len(data)) + data


def event_to_json(event: Event) -> list[Any]:
    """An event as its name and its fields."""
    if isinstance(event, Done):
        reply = event.reply
        stats = list(dataclasses.astuple(reply.stats))
        return ["Done", reply.answer, reply.thinking, reply.finish_reason, stats, reply.undivided]
    return [type(event).__name__, *dataclasses.astuple(event)]


def event_from_json(data: list[Any]) -> Event:
    """Raises: EngineError for what is no event."""
    try:
        name, *fields = data
        if name == "Done":
            answer, thinking, reason, stats, undivided = fields
            counts = Stats(*stats)
            counts = dataclasses.replace(counts, loops=tuple(counts.loops))
            return Done(Reply(answer, thinking, reason, counts, undivided))
        event: Event = _EVENTS[name](*fields)
        return event
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(f"the engine's process sent no event: {error!r}") from error


def command_to_json(order: Command) -> list[Any]:
    """An order as its name and its fields."""
    return [type(order).__name__, *dataclasses.astuple(order)]


def command_from_json(data: list[Any]) -> Command:
    """Raises: EngineError for what is no order; UsageError."""
    try:
        name, *fields = data
        order: Command = _ORDERS[name](*fields)
        return order
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(f"the host sent no order: {error!r}") from error


def entry_to_json(entry: LogEntry) -> list[Any] | None:
    """A token as its number and time, an order as its name and fields."""
    if entry is None or isinstance(entry, tuple):
        return None if entry is None else [*entry]
    return command_to_json(entry)


def entry_from_json(data: Any) -> LogEntry:
    """Raises: EngineError for what is none."""
    if data is None:
        return None
    if isinstance(data, list) and [*map(type, data)] == [int, float]:
        return data[0], data[1]
    if isinstance(data, list):
        return command_from_json(data)
    raise EngineError(f"the host sent nothing that is done to a reply: {data!r:.100}")


def log_from_json(data: list[Any]) -> ReplyLog:
    """Raises: EngineError for what is no course of a reply."""
    try:
        seed, elapsed_s, entries, n_seen = data
        return ReplyLog(int(seed), float(elapsed_s), tuple(map(entry_from_json, entries)), int(n_seen))
    except (TypeError, ValueError) as error:
        raise EngineError(f"the host sent no course of a reply: {error!r}") from error


def error_to_json(error: BaseException) -> list[str]:
    if isinstance(error, QwqError):
        return [type(error).__name__, str(error)]
    return ["EngineError", f"{type(error).__name__}: {error}"]


def error_from_json(data: list[str]) -> QwqError:
    name, text = data
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, QwqError):
        return kind(text)
    return EngineError(text)


def plan_to_json(plan: RunPlan) -> dict[str, Any]:
    """A plan without its model's tensors, which the other side reads from the file."""
    fields = {name: dataclasses.asdict(getattr(plan, name)) for name in ("choice", "footprint", "room", "wishes")}
    return {**fields, "refused": list(plan.refused)}


def plan_from_json(data: dict[str, Any], header: Header) -> RunPlan:
    """Raises: EngineError for what is no plan."""
    try:
        room = dict(data["room"])
        room["gpus"] = tuple(Gpu(**gpu) for gpu in room["gpus"])
        return RunPlan(
            of_file(header),
            settings_from_json(data["choice"]),
            footprint_from_json(data["footprint"]),
            Room(**room),
            Wishes(**data["wishes"]),
            tuple(data["refused"]),
        )
    except (KeyError, TypeError) as error:
        raise EngineError(f"this is no plan: {error!r}") from error
