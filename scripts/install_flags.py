"""What a compiled engine is built without, and the flags that say so. Pure: no process is started here.

Two things ask for it: a compiler that is known to build AMX wrongly, and the buffers in which an engine failed its
check. gcc before 12.4, 13.3 and 14 optimises away the configuration that ggml's AMX code hands to the CPU (gcc bug
114098), and the engine dies at its first product of quantized weights.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping

from qwq_lite.selftest.engine_check import Fault

AMX = "AMX"
REPACK = "repacking"
NATIVE = "features beyond AVX2"

# Flags that name a feature win over -march=native, in gcc and clang alike, wherever they stand.
_NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
_CMAKE = {REPACK: "-DGGML_CPU_REPACK=OFF", NATIVE: "-DGGML_NATIVE=OFF"}
_BUFFERS = {"AMX": AMX, "CPU_REPACK": REPACK}


def breaks_amx(gcc: tuple[int, int] | None) -> bool:
    """Whether this version of gcc is known to build AMX wrongly. None: another compiler, none of which is known to."""
    return gcc is not None and (gcc < (12, 4) or (13, 0) <= gcc < (13, 3))


def suspects(faults: Iterable[Fault]) -> tuple[str, ...]:
    """What a next build should do without, from the products that fail; nothing where one is not the CPU's.

    A fault in the plain buffer, or in one that no option of ggml's turns off, lies in the instructions themselves.
    """
    failed = [fault for fault in faults if fault.kind != "hung"]
    if any(fault.device not in ("CPU", "") for fault in failed):
        return ()
    return tuple(dict.fromkeys(_BUFFERS.get(fault.buffer, NATIVE) for fault in failed))


def build_environment(mine: Mapping[str, str], cmake_args: str, without: Iterable[str]) -> dict[str, str]:
    """The environment for pip's build: what the user set, with our options behind theirs.

    CMake reads CFLAGS and CXXFLAGS, unless CMAKE_ARGS sets the flags: then ours go there too.
    """
    left_out = tuple(without)
    given = [mine.get("CMAKE_ARGS", ""), cmake_args, *(_CMAKE[each] for each in left_out if each in _CMAKE)]
    env = {**mine, "CMAKE_ARGS": " ".join(filter(None, given))}
    if AMX in left_out:
        for name in ("CFLAGS", "CXXFLAGS"):
            env[name] = f"{mine.get(name, '')} {_NO_AMX}".strip()
        words = shlex.split(env["CMAKE_ARGS"])
        changed = [f"{word} {_NO_AMX}" if _SETS_FLAGS.match(word) else word for word in words]
        if changed != words:
            env["CMAKE_ARGS"] = shlex.join(changed)
    return env


_SETS_FLAGS = re.compile(r"(-D)?CMAKE_(C|CXX)_FLAGS(:\w+)?=")
