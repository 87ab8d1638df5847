"""Devices that the installed llama.cpp can use, asked in this process, or in a child process, which may crash.

Source: ggml/include/ggml-backend.h
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json
import re
import subprocess
from collections.abc import Iterator

from qwq_lite.backend import native
from qwq_lite.backend.hardware import Device, DeviceKind, EngineReport, report_from_json
from qwq_lite.errors import EngineError
from qwq_lite.system import child

_MOST_BUFFERS = 64
_KINDS: dict[int, DeviceKind] = {0: "cpu", 1: "gpu", 2: "igpu", 3: "accel"}  # enum ggml_backend_dev_type


def report() -> EngineReport:
    """The engine loaded in this process. Raises: EngineError when it does not load."""
    api = native.engine()
    info: bytes = api.llama_print_system_info()
    return EngineReport(
        version=api.llama_version().decode(),
        offload=bool(api.llama_supports_gpu_offload()),
        devices=tuple(_devices()),
        features=tuple(re.findall(r"(\w+) = 1", info.decode())),
        extra_buffers=tuple(_extra_buffers()),
    )


def _devices() -> list[Device]:
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    count = native.symbol("ggml_backend_dev_count", size, [])
    get = native.symbol("ggml_backend_dev_get", pointer, [size])
    name = native.symbol("ggml_backend_dev_name", ctypes.c_char_p, [pointer])
    description = native.symbol("ggml_backend_dev_description", ctypes.c_char_p, [pointer])
    kind = native.symbol("ggml_backend_dev_type", ctypes.c_int, [pointer])
    memory = native.symbol("ggml_backend_dev_memory", None, [pointer, ctypes.POINTER(size), ctypes.POINTER(size)])
    found = []
    for index in range(count()):
        device, free, total = get(index), size(), size()
        memory(device, ctypes.byref(free), ctypes.byref(total))
        text = (description(device) or b"").decode("utf-8", "replace")
        found.append(Device(name(device).decode(), text, _KINDS.get(kind(device), "accel"), total.value, free.value))
    return found


def _extra_buffers() -> Iterator[str]:
    """Names of the CPU's buffer types for weights in another layout. Source: llama-model.cpp, make_cpu_buft_list"""
    pointer = ctypes.c_void_p
    cpu = native.symbol("ggml_backend_dev_by_type", pointer, [ctypes.c_int])(0)
    registry = native.symbol("ggml_backend_dev_backend_reg", pointer, [pointer])(cpu)
    call = native.symbol("ggml_backend_reg_get_proc_address", pointer, [pointer, ctypes.c_char_p])
    address = call(registry, b"ggml_backend_dev_get_extra_bufts")
    name = native.symbol("ggml_backend_buft_name", ctypes.c_char_p, [pointer])
    if address:
        types = ctypes.CFUNCTYPE(ctypes.POINTER(pointer), pointer)(address)(cpu)
        found = itertools.takewhile(bool, (types[index] for index in range(_MOST_BUFFERS))) if types else ()
        yield from (name(buffer).decode() for buffer in found)


def gpu_pointers() -> list[int]:
    """ggml's devices that take layers, in its order. Integrated ones only where there is no other, as llama.cpp has it.

    Source: llama_prepare_model_devices
    """
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    get = native.symbol("ggml_backend_dev_get", pointer, [size])
    kind = native.symbol("ggml_backend_dev_type", ctypes.c_int, [pointer])
    found = [get(index) for index in range(native.symbol("ggml_backend_dev_count", size, [])())]
    kinds = [_KINDS.get(kind(device)) for device in found]
    wanted = "gpu" if "gpu" in kinds else "igpu"
    return [device for device, is_kind in zip(found, kinds, strict=True) if is_kind == wanted]


def report_from_child() -> EngineReport:
    """The same, from a one-shot child: an engine that crashes takes only the child with it.

    Raises: EngineError with what the child died of and the command that mends it.
    """
    try:
        done = child.ask(__name__, _print_report.__name__)
    except subprocess.TimeoutExpired as error:
        raise EngineError(
            f"llama.cpp did not load within {child.TIMEOUT_S} s; run: python scripts/install.py --force"
        ) from error
    if done.returncode:
        raise EngineError(done.stdout.strip() or _death(done.returncode, done.stderr))
    try:
        return report_from_json(json.loads(done.stdout))
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(
            "llama.cpp loads, but its report cannot be read; run: python scripts/install.py --force"
        ) from error


def _print_report() -> None:
    try:
        child.send(json.dumps(dataclasses.asdict(report())))
    except EngineError as error:
        child.send(str(error))
        raise SystemExit(3) from None


def _death(code: int, stderr: str) -> str:
    lines = stderr.strip().splitlines()
    if code in child.ILLEGAL_INSTRUCTION:
        return (
            "llama.cpp ends with an illegal instruction: it was built for a newer CPU than this one;"
            " run: python scripts/install.py --accel cpu --compile --force"
        )
    reason = f"signal {-code}" if code < 0 else f"exit status {code}"
    said = lines[-1] if lines else "it said nothing"
    return f"llama.cpp cannot be loaded ({reason}): {said}; run: python scripts/install.py --force"
