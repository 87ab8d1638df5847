"""Known machines, for a plan without the device: memory, bandwidth and what a backend takes, each figure with its source.

What is installed in a machine is nominal: nothing here knows what other programs take, whether a display hangs on the
card, or what a driver of another year reports. Where the device is present, `backend.devices` asks it instead.

A source says "from memory, unconfirmed" where the vendor's page could not be read; the bandwidths of cards follow from bus
width and data rate, which is given beside them so that the product can be checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwq_lite.backend.hardware import Device
from qwq_lite.errors import UsageError
from qwq_lite.system.units import GIB, MIB

GB_S = 1_000_000_000  # bandwidths are decimal on every data sheet

Backend = Literal["cuda", "vulkan", "metal", "cpu"]

# A card that drives a display gives the compositor and the browser some of its memory, and Windows does not fail when the
# card is full: it spills to system memory in silence, about ten times slower. Both grow while a chat runs.
DISPLAY_RESERVE_BYTES = 1 * GIB
WINDOWS_RESERVE_BYTES = 1 * GIB

# Metal's working set is a limit and no free memory: macOS and its programs live in what remains. 10 GiB are a desktop with a
# browser; a quarter is the most, or a Mac of 16 GB could run nothing. The working sets below leave as much by themselves, so
# the rule binds only where that limit was raised (iogpu.wired_limit_mb) or a later macOS sets it higher.
APPLE_RESERVE_BYTES = 10 * GIB
APPLE_RESERVE_SHARE = 0.25

# CUDA on Linux was seen to give less than nvidia-smi shows: a total of 23.52 GiB (24,084 MiB) of 24,564 MiB on an RTX 4090
# (pytorch/torchchat issue tracker, Ubuntu, driver 560). Elsewhere all is there (llama.cpp's breakdown in an ollama pull
# request: 32,606 of 32,607 MiB on an RTX 5090, system not said). The smaller share is planned with.
CUDA_HELD_BACK_SHARE = 0.02


@dataclass(frozen=True)
class Overhead:
    """What a backend takes of a device beside the buffers that llama.cpp counts."""

    # Taken when the device is opened. A free figure that this process read already lacks it; count it when the budget is a
    # total, as it is for every machine of this module.
    context_bytes: int
    # Taken at the first decodes: kernels that are loaded when they are first called, cuBLAS' workspace. A free figure read
    # before them still contains it.
    later_bytes: int
    source: str

    @property
    def total_bytes(self) -> int:
        return self.context_bytes + self.later_bytes


OVERHEADS: dict[Backend, Overhead] = {
    "cuda": Overhead(GIB // 2, GIB // 4, "context: 0.3-0.6 GiB reported; later: an allowance of ours, not measured"),
    "vulkan": Overhead(GIB // 5, 0, "an allowance of ours for pipelines and staging buffers, not measured"),
    "metal": Overhead(GIB // 5, 0, "an allowance of ours for pipelines and command buffers, not measured"),
    "cpu": Overhead(0, 0, "no device: what the process itself needs is the host's"),
}


def overhead_of(device: str) -> Overhead:
    """The overhead of the backend that a device of llama.cpp's belongs to, by its name ("CUDA0", "Vulkan1", "MTL0").

    A backend that this table lacks counts as CUDA, the one that takes most.
    """
    prefixes: dict[str, Backend] = {"vulkan": "vulkan", "mtl": "metal", "metal": "metal", "cpu": "cpu"}
    return OVERHEADS[prefixes.get(device.lower().rstrip("0123456789"), "cuda")]


@dataclass(frozen=True)
class Machine:
    """One machine as its owner names it."""

    name: str
    description: str
    backend: Backend
    # As llama.cpp would list them, the one that computes first and the CPU last. total_bytes of a card is what the driver's
    # tool shows, of a Mac's GPU the working set that Metal recommends; free_bytes is what a program can get of an idle device
    # before it has opened it.
    devices: tuple[Device, ...]
    host_bytes: int  # installed main memory
    unified: bool  # the first device's memory is part of the host's, and must not be counted twice
    bandwidth_bytes_s: int  # of a GPU, of which several are alike
    host_bandwidth_bytes_s: int  # of main memory, for layers that stay there
    memory_source: str
    bandwidth_source: str

    @property
    def gpus(self) -> tuple[Device, ...]:
        return tuple(device for device in self.devices if device.kind in ("gpu", "igpu"))

    @property
    def overhead(self) -> Overhead:
        return OVERHEADS[self.backend]

    @property
    def budget_bytes(self) -> int:
        """What a program may plan with on each GPU, overhead included: macOS has its share already, no display has."""
        free = self.devices[0].free_bytes
        return min(free, self.host_bytes - apple_reserve_bytes(self.host_bytes)) if self.backend == "metal" else free


def metal_working_set_bytes(memory_bytes: int) -> int:
    """Working set that Metal recommends to one process on a Mac of so much memory; llama.cpp reports it as the total.

    Two thirds up to 32 GiB, three quarters above. Some systems of later versions give more (107.5 of 128 GiB was seen); the
    smaller figure cannot promise memory that is not there.
    Source: llama.cpp's logs in public reports, to the byte: 16 GB 10,922.67 MiB and 11,453.25 MB, 32 GB 21,845.34 MiB, 36 GB
    28,991 MB, 96 GB 73,728 MiB; 64 GB about 48 GB
    """
    numerator, denominator = (2, 3) if memory_bytes <= 32 * GIB else (3, 4)
    return memory_bytes * numerator // denominator


def apple_reserve_bytes(memory_bytes: int) -> int:
    """Memory to leave to macOS and its programs, of so much installed."""
    return min(APPLE_RESERVE_BYTES, int(memory_bytes * APPLE_RESERVE_SHARE))


# What a desktop with a card is assumed to have. Two channels of 8 bytes at the rate of common modules: rate x 16 bytes.
HOST_BYTES = 32 * GIB
HOST_BANDWIDTH_BYTES_S = 5200 * 16 * 1_000_000  # DDR5-5200: 83.2 GB/s
_CPU_SOURCE = "{rate} MT/s x 16 bytes (two channels, or a bus of 128 bits); the nominal rate of the memory named"
_NVIDIA_SMI = "nvidia-smi in public reports"
_NVIDIA_UNREAD = "nvidia-smi, from memory, unconfirmed"
_DATA_SHEET = "vendor data sheet, from memory, unconfirmed"


def _cpu(total_bytes: int) -> Device:
    return Device("CPU", "CPU", "cpu", total_bytes, total_bytes)


def _cuda(
    name: str,
    card: str,
    total_mib: int,
    bandwidth_gb_s: float,
    memory_source: str,
    bandwidth_source: str,
    n_cards: int = 1,
) -> Machine:
    total = total_mib * MIB
    gpus = [
        Device(f"CUDA{n}", f"NVIDIA {card}", "gpu", total, total - int(total * CUDA_HELD_BACK_SHARE))
        for n in range(n_cards)
    ]
    return Machine(
        name,
        f"{f'{n_cards} x ' if n_cards > 1 else ''}{card}, desktop with {HOST_BYTES // GIB} GiB, no screen on the card",
        "cuda",
        (*gpus, _cpu(HOST_BYTES)),
        HOST_BYTES,
        False,
        int(bandwidth_gb_s * GB_S),
        HOST_BANDWIDTH_BYTES_S,
        f"{total_mib:,} MiB: {memory_source}",
        bandwidth_source,
    )


def _apple(name: str, chip: str, memory_gib: int, bandwidth_gb_s: float, bandwidth_source: str) -> Machine:
    memory, bandwidth = memory_gib * GIB, int(bandwidth_gb_s * GB_S)
    working_set = metal_working_set_bytes(memory)
    return Machine(
        name,
        f"Apple {chip}, {memory_gib} GB",
        "metal",
        (Device("MTL0", f"Apple {chip}", "gpu", working_set, working_set), _cpu(memory)),
        memory,
        True,
        bandwidth,
        bandwidth,
        "metal_working_set_bytes",
        bandwidth_source,
    )


def _host(name: str, description: str, memory_gib: int, rate_mt_s: int) -> Machine:
    memory, bandwidth = memory_gib * GIB, rate_mt_s * 16 * 1_000_000
    return Machine(
        name,
        description,
        "cpu",
        (_cpu(memory),),
        memory,
        True,
        bandwidth,
        bandwidth,
        "installed memory; a system reports up to 1 GiB less where firmware or graphics take some",
        _CPU_SOURCE.format(rate=rate_mt_s),
    )


_M4_TABLE = "goodnewsapodcast.com, M4, M4 Pro and M4 Max compared to past generations"

MACHINES: tuple[Machine, ...] = (
    _cuda(
        "rtx-3060-12gb", "GeForce RTX 3060", 12_288, 360, _NVIDIA_UNREAD,
        "192 bits x 15 Gbit/s; cpu-gpu.alldbin.com",
    ),
    _cuda(
        "rtx-3090", "GeForce RTX 3090", 24_576, 936, _NVIDIA_SMI,
        "384 bits x 19.5 Gbit/s; fudzilla.com, NVIDIA RTX 30 series specifications",
    ),
    _cuda(
        "2x-rtx-3060-12gb", "GeForce RTX 3060", 12_288, 360, _NVIDIA_UNREAD,
        "192 bits x 15 Gbit/s; cpu-gpu.alldbin.com", 2,
    ),
    _cuda(
        "2x-rtx-3090", "GeForce RTX 3090", 24_576, 936, _NVIDIA_SMI,
        "384 bits x 19.5 Gbit/s; fudzilla.com, NVIDIA RTX 30 series specifications", 2,
    ),
    _cuda(
        "rtx-4060-ti-16gb", "GeForce RTX 4060 Ti", 16_380, 288, _NVIDIA_UNREAD,
        f"128 bits x 18 Gbit/s; {_DATA_SHEET}",
    ),
    _cuda(
        "rtx-4070-ti-super-16gb", "GeForce RTX 4070 Ti SUPER", 16_376, 672, _NVIDIA_UNREAD,
        f"256 bits x 21 Gbit/s; {_DATA_SHEET}",
    ),
    _cuda(
        "rtx-4080-16gb", "GeForce RTX 4080", 16_376, 716.8, _NVIDIA_UNREAD,
        f"256 bits x 22.4 Gbit/s; {_DATA_SHEET}",
    ),
    _cuda(
        "rtx-4090", "GeForce RTX 4090", 24_564, 1008,
        "nvidia-smi, from memory; a public parser's test has the same figure, simulated",
        "384 bits x 21 Gbit/s; cpu-gpu.alldbin.com",
    ),
    _cuda(
        "rtx-5090-32gb", "GeForce RTX 5090", 32_607, 1792, _NVIDIA_SMI,
        f"512 bits x 28 Gbit/s; {_DATA_SHEET}",
    ),
    _cuda(
        "a100-80gb", "A100 80GB PCIe", 81_920, 1935, _NVIDIA_UNREAD,
        f"5,120 bits x 3.024 Gbit/s, the SXM board has 2,039 GB/s; {_DATA_SHEET}",
    ),
    Machine(
        "rx-7900-xtx",
        f"Radeon RX 7900 XTX, desktop with {HOST_BYTES // GIB} GiB, no screen on the card",
        "vulkan",
        (Device("Vulkan0", "AMD Radeon RX 7900 XTX", "gpu", 24_560 * MIB, 24_524 * MIB), _cpu(HOST_BYTES)),
        HOST_BYTES,
        False,
        960 * GB_S,
        HOST_BANDWIDTH_BYTES_S,
        "24,560 MiB: from memory, unconfirmed; 24,524 MiB free: llama.cpp issue tracker (ROCm, not Vulkan)",
        f"384 bits x 20 Gbit/s; {_DATA_SHEET}",
    ),
    _apple("m1-16gb", "M1", 16, 68.25, f"128 bits x 4,266 MT/s; {_DATA_SHEET}"),
    _apple("m2-pro-32gb", "M2 Pro", 32, 200, f"{_DATA_SHEET}; 204.8 in {_M4_TABLE}"),
    _apple("m3-max-36gb", "M3 Max (30-core GPU)", 36, 300, f"{_DATA_SHEET}; the 40-core part has 400"),
    _apple("m4-pro-48gb", "M4 Pro", 48, 273, _M4_TABLE),
    _apple(
        "m4-max-64gb", "M4 Max (40-core GPU)", 64, 546,
        f"{_M4_TABLE}; 410 for the 32-core part, which has 36 GB (from memory)",
    ),
    _apple("m3-ultra-96gb", "M3 Ultra", 96, 819, _DATA_SHEET),
    _host("laptop-16gb", "laptop, 16 GB of DDR5-4800, no GPU", 16, 4800),
    _host("laptop-32gb", "laptop, 32 GB of LPDDR5-6400, no GPU", 32, 6400),
    _host("desktop-64gb", "desktop, 64 GB of DDR5-5200, no GPU", 64, 5200),
)  # fmt: skip


def find(name: str) -> Machine:
    """The machine of that name; case does not count.

    Raises: UsageError with the names that there are.
    """
    for machine in MACHINES:
        if machine.name == name.lower():
            return machine
    known = ", ".join(machine.name for machine in MACHINES)
    raise UsageError(f"no machine is known as {name!r}; known are {known}")
