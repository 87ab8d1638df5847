"""What the processor can do, as its operating system says it."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

# Features that decide speed on x86, as llama_print_system_info and /proc/cpuinfo spell them.
SPEED_FEATURES = {"AVX2": "avx2", "FMA": "fma", "F16C": "f16c"}


def cpu_features() -> frozenset[str]:
    """What the first processor can do, as Linux names it; of Windows only what decides speed."""
    if sys.platform == "win32":
        import ctypes

        avx2 = ctypes.windll.kernel32.IsProcessorFeaturePresent(
            40
        )  # PF_AVX2_INSTRUCTIONS_AVAILABLE; FMA and F16C came before it
        return frozenset(SPEED_FEATURES.values()) if avx2 else frozenset()
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:  # long where there are many
            line = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return frozenset()  # macOS: arm64 builds have what they need
    return frozenset(line.partition(":")[2].split())


def translated_by_rosetta() -> bool:
    """Whether this Python is an x86 one on an Apple processor."""
    if sys.platform != "darwin" or platform.machine() != "x86_64":
        return False
    import ctypes

    value, size = ctypes.c_int(0), ctypes.c_size_t(4)
    libc = ctypes.CDLL(None)
    return (
        libc.sysctlbyname(b"sysctl.proc_translated", ctypes.byref(value), ctypes.byref(size), None, 0) == 0
        and value.value == 1
    )
