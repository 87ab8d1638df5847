"""Bytes of every buffer as llama.cpp counts them, without allocating one: asked in a child process, which may crash.

Loads a file, or a header without weights, with `no_alloc`; only metadata is read. The rows come from
`llama_get_memory_breakdown`, which the library exports as a C++ symbol that returns a std::map by value. Its nodes are read
where the standard library is known (libstdc++ on Linux), and their sum must be llama_model_size; elsewhere there is no
measurement, and formulas stand in.
Source: llama.cpp src/llama-ext.h, src/llama-context.cpp (memory_breakdown); libstdc++ bits/stl_tree.h
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qwq_lite.backend import native
from qwq_lite.backend.context import ContextSettings
from qwq_lite.backend.footprint import AMX, Footprint, footprint_from_json
from qwq_lite.backend.model import model_params
from qwq_lite.backend.settings import EngineSettings, settings_from_json
from qwq_lite.errors import EngineError, PlanError
from qwq_lite.system import child

_BREAKDOWN = "_Z26llama_get_memory_breakdownPK13llama_context"
_REFUSED = 1  # the child's exit status: llama.cpp said why, and it is not the file's fault alone
_COPIES = ("CPU_REPACK", AMX)  # not of the file's pages
_AMX_GROWTH = 0.12  # at most, of Q8_0: 4 bytes more for each block of 34
_NOT_HERE = 3  # the child's exit status: this build cannot be asked, and nothing is wrong


def measure(path: Path, choices: Sequence[EngineSettings]) -> list[Footprint] | None:
    """Buffers of each choice as llama.cpp counts them on this machine's devices; None where this build cannot be asked.

    Raises: PlanError with the engine's last lines when it ends over the question.
    """
    if not sys.platform.startswith("linux"):  # the breakdown's layout is known there only
        return None
    question = json.dumps({"path": str(path), "choices": [asdict(choice) for choice in choices]})
    try:
        done = child.ask(__name__, _answer.__name__, question)
    except subprocess.TimeoutExpired as error:
        raise PlanError(f"{path}: llama.cpp did not say within {child.TIMEOUT_S} s what it takes") from error
    if done.returncode == _NOT_HERE:
        return None
    if done.returncode in child.ILLEGAL_INSTRUCTION:
        raise PlanError(f"{path}: llama.cpp ended with an illegal instruction; run: qwq-lite doctor")
    if done.returncode:
        said = " | ".join((done.stdout or done.stderr).strip().splitlines()[-3:]) or "it said nothing"
        if done.returncode == _REFUSED:
            raise PlanError(f"{path}: llama.cpp does not take it: {said}")
        raise PlanError(
            f"{path}: llama.cpp ended over it ({done.returncode}): {said}; the file may be damaged, or the context too long"
        )
    try:
        return [footprint_from_json(row) for row in json.loads(done.stdout)]
    except (ValueError, KeyError, TypeError) as error:
        raise PlanError(f"{path}: llama.cpp's count cannot be read: {error!r}") from error


def _answer() -> None:
    """The child: a question on stdin, one text of JSON as its result."""
    question = json.loads(sys.stdin.read())
    lines: list[str] = []
    api = native.engine()
    callback = api.llama_log_callback(
        lambda _level, text, _user: lines.append((text or b"").decode("utf-8", "replace"))
    )
    api.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        found = list(
            _count(api, question["path"], [settings_from_json(choice) for choice in question["choices"]], lines)
        )
    except _NotHere:
        sys.exit(_NOT_HERE)
    except EngineError as error:
        child.send(f"{error} {''.join(lines[-8:])}")
        sys.exit(_REFUSED)
    child.send(json.dumps(found))


def _count(api: Any, path: str, choices: list[EngineSettings], lines: list[str]) -> Iterator[dict[str, Any]]:
    model, loaded = None, None
    for choice in choices:
        key = (choice.n_gpu_layers, choice.repack, choice.no_host, choice.tensor_split)
        if key != loaded:
            if model:
                api.llama_model_free(model)
            params = model_params(api, replace(choice, load_mode="none"))  # any other aborts
            params.no_alloc = True
            model, loaded = api.llama_model_load_from_file(os.fsencode(path), params), key
        if not model:
            raise EngineError("it cannot be loaded: ")
        lines.clear()
        context = api.llama_init_from_model(model, ContextSettings.of(choice, 1).params(api))
        if not context:
            raise EngineError(f"no context of {choice.n_ctx} tokens: ")
        rows = _breakdown(context)
        amx = sum(weights for name, weights, _, _ in rows if name == AMX)
        grown = sum(weights for _, weights, _, _ in rows) - api.llama_model_size(model)
        if not 0 <= grown <= amx * _AMX_GROWTH:
            raise _NotHere
        n_splits = _number(lines, r"splits = (\d+)")
        yield {"devices": _by_device(rows, lines, choice), "source": "measured", "n_splits": n_splits}
        api.llama_free(context)


def _by_device(
    rows: list[tuple[str, int, int, int]], lines: list[str], choice: EngineSettings
) -> dict[str, dict[str, int]]:
    """Buffer types joined by where they lie: CPU, CPU_REPACK, AMX and a GPU's pinned host memory are all the host's."""
    devices: dict[str, dict[str, int]] = {}
    for name, weights, kv, compute in rows:
        host = name.startswith("CPU") or name.endswith("_Host") or name == AMX
        found = devices.setdefault(
            "CPU" if host else name, {"weights": 0, "kv": 0, "compute": 0, "mapped": 0, "reclaimable": 0}
        )
        found["weights"] += weights
        found["kv"] += kv
        found["compute"] += compute
        if host and choice.load_mode == "mmap":
            found["reclaimable" if name in _COPIES else "mapped"] += weights
    # The rows of logits are in none of the breakdown's columns, only in the log, and there as many as sequences: the rest comes
    # when it is first asked for.
    outputs = re.findall(r"(\S+)\s+output buffer size =\s+([\d.]+) MiB", "".join(lines))
    if outputs and "CPU" in devices:
        logged = sum(float(size) * (1 << 20) for _, size in outputs)
        devices["CPU"]["compute"] += round(logged * choice.n_outputs_max / choice.n_seq_max)
    return devices


def _number(lines: list[str], pattern: str) -> int | None:
    found = re.findall(pattern, "".join(lines))
    return int(found[-1]) if found else None


class _NotHere(Exception):
    """This build's breakdown cannot be read."""


def _breakdown(context: Any) -> list[tuple[str, int, int, int]]:
    """(buffer type, weights, KV, compute) in bytes.

    std::map in libstdc++: 8 bytes of comparator, then the header node (colour, parent = root, left, right) and the count. A node:
    colour, parent, left, right, then the pair: the key, a pointer, and three size_t.
    """
    try:
        call = native.symbol(_BREAKDOWN, ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p])
        name = native.symbol("ggml_backend_buft_name", ctypes.c_char_p, [ctypes.c_void_p])
    except EngineError as error:
        raise _NotHere from error
    result = (ctypes.c_uint64 * 8)()
    call(ctypes.addressof(result), context)
    root, count = result[2], result[5]
    rows: list[tuple[str, int, int, int]] = []

    def walk(address: int) -> None:
        if address and len(rows) <= count:
            node = (ctypes.c_uint64 * 8).from_address(address)
            walk(node[2])
            rows.append((name(node[4]).decode(), node[5], node[6], node[7]))
            walk(node[3])

    if not 0 < count < 100:
        raise _NotHere
    walk(root)
    if len(rows) != count:
        raise _NotHere
    return rows
