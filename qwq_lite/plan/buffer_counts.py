"""What a model's buffers take with given engine settings: by formula, or llama.cpp's own count of a file or of a header."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from qwq_lite.backend.footprint import Footprint
from qwq_lite.backend.measure import measure
from qwq_lite.backend.settings import EngineSettings
from qwq_lite.formats import header_only
from qwq_lite.plan import memory
from qwq_lite.plan.run_plan import Candidate, Room
from qwq_lite.plan.search import Count


def formula_count(room: Room) -> Count:
    """A count by formula, for the devices of a room."""

    def count(candidate: Candidate, choices: Sequence[EngineSettings]) -> list[Footprint]:
        return [
            memory.footprint(candidate.shape, candidate.tensors, choice, room.gpu_names, amx=room.amx)
            for choice in choices
        ]

    return count


def engine_count(file: Path | None, room: Room, notices: list[str]) -> Count:
    """llama.cpp's count, of the file or of a header without weights; by formula where this build cannot be asked.

    notices: gets a line, once, where formulas stand in.
    """

    def count(candidate: Candidate, choices: Sequence[EngineSettings]) -> Sequence[Footprint]:
        found = measure(file, choices) if file is not None else _measure_header(candidate, choices)
        if found is not None:
            return found
        notice = "this build of llama.cpp cannot be asked for its own count; the numbers are by formula"
        if notice not in notices:
            notices.append(notice)
        return formula_count(room)(candidate, choices)

    return count


def _measure_header(candidate: Candidate, choices: Sequence[EngineSettings]) -> list[Footprint] | None:
    with tempfile.TemporaryDirectory(prefix="qwq-lite-") as folder:
        path = Path(folder) / "header.gguf"
        header_only.write(path, candidate.shape, list(candidate.tensors))
        return measure(path, choices)
