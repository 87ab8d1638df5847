"""Check that an installed llama.cpp computes: one matrix product for each device, buffer type and weight type.

A library that loads may still die, or give wrong numbers, at its first product. `engine_products` runs each in a child process,
and names it before it runs, so that a death is located; the check goes on in a new child, without what was done.

Only the standard library, for the installer imports this file too, by path and on a Python that has neither numpy nor llama.cpp.

    CHILD: the file of a child, `python -I CHILD *arguments`, with the environment's Python; this file by path does the same.
    check(run, gpu=False, timeout_s=120.0) -> Report
        run(arguments, timeout_s) -> Ended: start CHILD with these arguments; `run_child` is such a start, by subprocess.
    Report: .faults, .buffers, .could_not_run, .fails, .extra_buffers_only, .text(), .on_host(), .to_json(),
        Report.from_json(data)

Does not know which command mends an engine.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

CHILD = Path(__file__).with_name("engine_products.py")
MOST_ERROR = 0.01  # of |w| |x|; right kernels stay below 0.0022
TIMEOUT_S = 120.0  # of a child; its work takes a second, a GPU's driver may compile kernels first
_MOST_DEATHS = 2  # in one buffer, before the rest of that buffer is left out
# What a process dies of by its own doing. Any other end, SIGKILL of the out-of-memory killer first, says nothing of the engine.
_OWN_SIGNALS = ("SIGILL", "SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE", "SIGTRAP", "SIGSYS")
_WINDOWS = {0xC000001D: "STATUS_ILLEGAL_INSTRUCTION", 0xC0000005: "STATUS_ACCESS_VIOLATION"}
_CTRL_C = 0xC000013A
_SAID = {"running", "result", "done", "error"}


class Ended(NamedTuple):
    """A child that ended."""

    returncode: int | None  # None: it was ended after its time limit
    output: str
    errors: str = ""


Run = Callable[[Sequence[str], float], Ended]
Kind = Literal["wrong", "died", "hung"]


@dataclass(frozen=True)
class Fault:
    """Products that fail."""

    device: str  # ggml's name, "CPU"; "" where llama.cpp died while it was loaded
    buffer: str  # the buffer type of the weights, "CPU", "CPU_REPACK", "AMX", "CUDA0"
    type: str  # of the weights, "Q4_K"
    rows: int  # of the input
    kind: Kind
    what: str  # "wrong numbers (error 0.12, 0.01 is allowed)", "died by SIGILL", "no result within 120 s"
    extra: bool = False  # whether the buffer type is one that llama.cpp can go without (use_extra_bufts)
    signal: str = ""  # that it died by
    gpu: bool = False

    @property
    def counts(self) -> bool:
        """Whether it is the engine's fault: a plain product without a result in time may be a busy machine's."""
        return self.kind != "hung" or self.extra


@dataclass(frozen=True)
class Report:
    """What a check found."""

    faults: tuple[Fault, ...] = ()
    buffers: tuple[str, ...] = ()  # buffer types in which all products were right
    could_not_run: str = ""  # why nothing, or not all, could be checked; says nothing against the engine

    @property
    def fails(self) -> bool:
        """Whether a load should act on it: something was wrong, died, or hung in a buffer that llama.cpp can go without."""
        return any(fault.counts for fault in self.faults)

    @property
    def extra_buffers_only(self) -> bool:
        """Whether all that fails is in buffer types that llama.cpp can go without."""
        return self.fails and all(fault.extra for fault in self.faults if fault.counts)

    def on_host(self) -> Report:
        """What concerns the CPU."""
        return replace(self, faults=tuple(fault for fault in self.faults if not fault.gpu))

    def text(self) -> str:
        """The faults in one line: each buffer, what happens there and with which types."""
        groups: dict[tuple[str, str], list[str]] = {}
        for fault in self.faults:
            what = fault.what.split(" (")[0] if fault.kind == "wrong" else fault.what
            where = f"{fault.buffer} of {fault.device}" if fault.buffer else ""
            types = groups.setdefault((where, what), [])
            if fault.type not in types:
                types.append(fault.type)
        parts = [
            f"{what} in buffer {where}: {', '.join(types)}" if where else f"{what} while it was loaded"
            for (where, what), types in groups.items()
        ]
        return "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Report:
        """Raises: KeyError, TypeError for what is no report."""
        faults = tuple(Fault(**fault) for fault in data["faults"])
        return Report(faults, tuple(map(str, data["buffers"])), str(data["could_not_run"]))


def run_child(
    command: Sequence[str], timeout_s: float, env: Mapping[str, str] | None = None, creationflags: int = 0
) -> Ended:
    """Run a command to its end, or to its time limit."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        env=env,
        creationflags=creationflags,
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout_s)
            return Ended(process.returncode, output, errors)
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = process.communicate()
            return Ended(None, output, errors)
        except BaseException:
            process.kill()
            raise


def check(run: Run, *, gpu: bool = False, timeout_s: float = TIMEOUT_S) -> Report:
    """Check every product in children that `run` starts, a new one after each death. gpu: GPUs too, not only the CPU.

    Never raises for what a child does; what `run` raises goes through.
    """
    faults: list[Fault] = []
    done: dict[tuple[str, str, str], bool] = {}  # (device, buffer, type) that ran: whether right
    reason = ""
    while True:
        skipped = [f"--skip={':'.join(key)}" for key in [*done, *_given_up(faults)]]
        ended = run([*(["--gpu"] if gpu else []), *skipped], timeout_s)
        running, lines = None, list(_messages(ended.output))
        for line in lines:
            if "running" in line:
                running = line["running"]
            elif "result" in line:
                running, fault = None, _wrong(line["result"])
                key = _key(line["result"])
                done[key] = done.get(key, True) and fault is None
                faults += [fault] if fault else []
        last = lines[-1] if lines else {}
        if "done" in last or "error" in last:
            reason = str(last.get("error", ""))
            break
        fault = _death(ended, running, timeout_s)
        if fault is None:
            reason = _end(ended)
            break
        faults.append(fault)
        if running is None:
            break
        done[_key(running)] = False
    right = {key[1] for key, is_right in done.items() if is_right} - {fault.buffer for fault in faults}
    return Report(tuple(faults), tuple(sorted(right)), reason)


def _messages(output: str) -> Iterator[dict[str, Any]]:
    """What the child said. Other lines may be a `sitecustomize`'s, or the half of one at a death."""
    for line in output.splitlines():
        with contextlib.suppress(ValueError):
            message = json.loads(line)
            if isinstance(message, dict) and message.keys() & _SAID:
                yield message


def _key(product: Mapping[str, Any]) -> tuple[str, str, str]:
    return str(product["device"]), str(product["buffer"]), str(product["type"])


def _given_up(faults: Sequence[Fault]) -> list[tuple[str, str, str]]:
    ends = [(fault.device, fault.buffer) for fault in faults if fault.kind != "wrong"]
    return [(*place, "*") for place in dict.fromkeys(ends) if ends.count(place) >= _MOST_DEATHS]


def _wrong(result: Mapping[str, Any]) -> Fault | None:
    error = result["error"]
    if error is not None and error <= MOST_ERROR:
        return None
    found = "no number" if error is None else f"error {error:.2g}"
    return _fault(result, "wrong", f"wrong numbers ({found}, {MOST_ERROR} of |w| |x| is allowed)")


def _death(ended: Ended, running: Mapping[str, Any] | None, timeout_s: float) -> Fault | None:
    """The fault of the product that ran when the child ended; None where the end says nothing of the engine."""
    if ended.returncode is None:
        return None if running is None else _fault(running, "hung", f"no result within {timeout_s:g} s")
    code = ended.returncode & 0xFFFFFFFF
    name = _signal(ended.returncode) if ended.returncode < 0 else _WINDOWS.get(code, "")
    if name in _OWN_SIGNALS or (code >> 30 == 3 and ended.returncode > 0 and code != _CTRL_C):
        name = name or f"status {code:#x}"
        return _fault(running or {}, "died", f"died by {name}", name)
    return None


def _end(ended: Ended) -> str:
    """Why a check did not come to its end, where that is no fault of the engine."""
    if ended.returncode is None:
        return "it did not load in time"
    ended_by = f"by {_signal(ended.returncode)}" if ended.returncode < 0 else f"with status {ended.returncode}"
    said = ended.errors.strip().splitlines()
    return f"the check ended {ended_by}" + (f": {said[-1]}" if said else "")


def _signal(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _fault(product: Mapping[str, Any], kind: Kind, what: str, by: str = "") -> Fault:
    device, buffer, type = _key({"device": "", "buffer": "", "type": "", **product})
    extra, gpu = (bool(product.get(name, False)) for name in ("extra", "gpu"))
    return Fault(device, buffer, type, int(product.get("rows", 0)), kind, what, extra, by, gpu)


if __name__ == "__main__":
    import runpy

    runpy.run_path(str(CHILD), run_name="__main__")
