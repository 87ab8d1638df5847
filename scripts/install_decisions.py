"""From facts to what is tried, in which order, and what is said first: `decide`, a pure function.

Upstream's wheels: Linux and Windows on x86-64 for CUDA and Vulkan, arm64 macOS for Metal, and a plain one for the CPU.
They are built without AVX2, FMA and F16C, and for compute capability 6.0 to 9.0 (CUDA 13: 7.5 on); newer cards
translate the PTX in them at the first start. Compiled builds use everything the CPU has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from scripts.install_facts import Facts
from scripts.install_flags import AMX, breaks_amx

ACCELERATORS = ("auto", "cpu", "cuda", "metal", "vulkan")
NEEDED_PYTHON = (3, 10)

# Each name in upstream's index. Not every release has every one; Windows has fewer.
_CUDA_NAMES = ((11, 8), (12, 1), (12, 2), (12, 3), (12, 4), (12, 5), (13, 0), (13, 2))
_CUDA_NAMES_WINDOWS = ((11, 8), (12, 4), (12, 5), (13, 0), (13, 2))
_OLDEST_CARD = (6, 0)
_OLDEST_CARD_CUDA13 = (7, 5)
# The first CUDA whose nvcc knows a card, newest card first. Source: the CUDA toolkit's release notes.
_FIRST_NVCC = (((10, 0), (12, 8)), ((8, 9), (11, 8)), ((8, 6), (11, 1)), ((8, 0), (11, 0)), ((7, 5), (10, 0)))

_DURATIONS = {
    "cpu": "about 8 minutes on 2 cores",
    "metal": "about 8 minutes on 2 cores",
    "vulkan": "10 minutes and more",
    "cuda": "20 to 40 minutes",
}
_TITLES = {"cpu": "the CPU", "cuda": "CUDA", "metal": "Metal", "vulkan": "Vulkan"}

_COMPILER_COMMANDS = {
    "apt": "sudo apt install build-essential",
    "dnf": "sudo dnf install gcc-c++",
    "pacman": "sudo pacman -S base-devel",
    "zypper": "sudo zypper install gcc-c++",
    "apk": "sudo apk add build-base",
    "darwin": "xcode-select --install",
    "win32": "winget install Microsoft.VisualStudio.2022.BuildTools --override "
    '"--wait --passive --add Microsoft.VisualStudio.Workload.VCTools --includeRecommended"',
}
_LONG_PATHS_COMMAND = (
    r"reg add HKLM\SYSTEM\CurrentControlSet\Control\FileSystem /v LongPathsEnabled /t REG_DWORD /d 1 /f"
)


@dataclass(frozen=True)
class Attempt:
    """One way to get an engine: a wheel from upstream's index, or pip compiling the source."""

    accel: str
    how: str  # wheel, compile
    name: str | None = None  # of the index, for a wheel
    extra: str | None = None  # of pyproject.toml: NVIDIA's runtime libraries
    cmake_args: str = ""
    without: tuple[str, ...] = ()  # what it is compiled without
    cached: bool = True  # pip's wheel cache may serve it

    @property
    def label(self) -> str:
        return f"{self.how} {self.name or self.accel}" + without_words(self.without)

    @property
    def family(self) -> tuple[str, str, str]:
        """What fails together: builds for one CUDA major load the same libraries and need the same driver."""
        return self.accel, self.how, (self.name or "")[:4]

    @property
    def duration(self) -> str:
        return _DURATIONS[self.accel] if self.how == "compile" else ""


@dataclass(frozen=True)
class Decision:
    """What will be done. With `keep` nothing is, with `fatal` nothing can be."""

    attempts: tuple[Attempt, ...] = ()
    warnings: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()  # why something is not among the attempts; said when all of them fail
    fatal: str | None = None
    keep: str | None = None


@dataclass(frozen=True)
class _Routes:
    """The attempts for one accelerator, and the reasons for those that are missing."""

    attempts: tuple[Attempt, ...] = ()
    reasons: tuple[str, ...] = ()


def title(accel: str) -> str:
    return _TITLES.get(accel, accel)


def without_words(left_out: tuple[str, ...]) -> str:
    return " without " + " and ".join(left_out) if left_out else ""


def decide(facts: Facts, accel: str, compile_only: bool = False) -> Decision:
    """The order of attempts for this machine.

    `auto` goes on from accelerator to accelerator down to the CPU; one that was asked for by name is used or refused.
    """
    fatal = _impossible(facts)
    if fatal:
        return Decision(fatal=fatal)
    wanted = _wanted(facts) if accel == "auto" else (accel,)
    routes = {each: _ROUTES[each](facts, compile_only) for each in wanted}
    attempts = tuple(_fit_compiler(facts, attempt) for route in routes.values() for attempt in route.attempts)
    reasons = tuple(dict.fromkeys(reason for route in routes.values() for reason in route.reasons))
    keep = _kept(facts, accel, attempts, compile_only)
    if keep:
        return Decision(attempts=attempts, keep=keep, warnings=_about_machine(facts))
    if not attempts:
        return Decision(fatal="; ".join(reasons) or f"there is no build for {title(accel)} on this machine")
    warnings = [*_about_machine(facts)]
    for each in wanted[: wanted.index(attempts[0].accel)]:
        unused = "; ".join(routes[each].reasons)
        warnings.append(f"ATTENTION: {title(each)} cannot be used on this machine: {unused}")
    warnings += _about_attempt(facts, attempts[0], routes[attempts[0].accel].reasons)
    return Decision(attempts=attempts, warnings=tuple(warnings), left_out=reasons)


def satisfies(version: str, requirement: str) -> bool:
    """Whether an engine's version meets pyproject's specifier. What this does not understand, pip will judge.

    A wheel's local part (0.3.36+cu124) does not count.
    """
    operator, wanted = requirement[:2], requirement[2:]
    if "," in wanted:
        return True
    have, need = _numbers(version.partition("+")[0]), _numbers(wanted)
    if operator == "~=":
        return have >= need and have[: len(need) - 1] == need[:-1]
    if operator in ("==", ">="):
        return have == need if operator == "==" else have >= need
    return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _impossible(facts: Facts) -> str | None:
    if facts.python < NEEDED_PYTHON:
        version = "{}.{}".format(*facts.python)
        if facts.venv_exists:
            return f"the Python in {facts.venv} is {version}, 3.10 is needed: delete that folder and run this again"
        return f"qwq-lite needs Python 3.10 or newer, this is {version}: run this with a newer one"
    if not facts.venv_exists and not facts.can_make_venv:
        apt = "sudo apt install python{}.{}-venv".format(*facts.python)
        remedy = f"run: {apt}" if facts.manager == "apt" else "install its venv and ensurepip modules"
        return f"this Python cannot make a virtual environment, {remedy}"
    return None


def _wanted(facts: Facts) -> tuple[str, ...]:
    if facts.system == "darwin":
        return ("metal", "cpu") if facts.machine == "arm64" else ("cpu",)
    if facts.driver:
        return ("cuda", "vulkan", "cpu")
    return ("vulkan", "cpu") if facts.vulkan_loader else ("cpu",)


def _cannot_compile(facts: Facts) -> str | None:
    if facts.compiler is None:
        command = _COMPILER_COMMANDS.get(facts.manager if facts.system == "linux" and facts.manager else facts.system)
        return "compiling needs a C++ compiler" + (f", run: {command}" if command else " (g++ or clang++)")
    if not facts.long_paths:
        return (
            "compiling needs paths of about 280 characters and Windows' long paths are off, "
            f"run as administrator: {_LONG_PATHS_COMMAND}"
        )
    return None


def _ordered(wheels: tuple[Attempt, ...], compiled: Attempt, cannot: str | None, compile_only: bool) -> _Routes:
    """Wheels first, then the compiler: right wherever the compiler takes long or the CPU has little to do."""
    wheels = () if compile_only else wheels
    return _Routes(wheels, (cannot,)) if cannot else _Routes((*wheels, compiled))


def _fit_compiler(facts: Facts, attempt: Attempt) -> Attempt:
    if attempt.how == "compile" and facts.amx and breaks_amx(facts.gcc):
        return replace(attempt, without=(AMX,), cached=False)
    return attempt


def _cpu(facts: Facts, compile_only: bool) -> _Routes:
    # llama.cpp builds Metal in on macOS unless it is told not to, and pip's cache would then not be for the CPU.
    args = "-DGGML_METAL=off" if facts.system == "darwin" else ""
    compiled = Attempt("cpu", "compile", cmake_args=args, cached=not args)
    wheel = Attempt("cpu", "wheel", "cpu")
    cannot = _cannot_compile(facts)
    if compile_only or cannot or not _compiling_pays(facts):
        return _ordered((wheel,), compiled, cannot, compile_only)
    # The CPU computes every layer here, and upstream's wheel leaves AVX2, FMA and F16C unused. Compiling costs minutes
    # once: pip keeps the result in its cache, and the next virtual environment has it in seconds.
    return _Routes((compiled, wheel))


def _compiling_pays(facts: Facts) -> bool:
    return facts.avx2 or facts.machine != "x86_64"


def _metal(facts: Facts, compile_only: bool) -> _Routes:
    if facts.system != "darwin":
        return _Routes(reasons=("Metal is macOS only",))
    if facts.rosetta:
        return _Routes(reasons=("this is an x86 Python under Rosetta and Metal needs an arm64 one",))
    wheels = (Attempt("metal", "wheel", "metal"),) if facts.machine == "arm64" else ()
    compiled = Attempt("metal", "compile", cmake_args="-DGGML_METAL=on", cached=False)
    return _ordered(wheels, compiled, _cannot_compile(facts), compile_only)


def _vulkan(facts: Facts, compile_only: bool) -> _Routes:
    if facts.system == "darwin":
        return _Routes(reasons=("Vulkan is for Linux and Windows",))
    if not facts.vulkan_loader:
        return _Routes(reasons=("Vulkan's loader is not there (libvulkan.so.1 or vulkan-1.dll)",))
    cannot = _cannot_compile(facts)
    if cannot is None and not facts.vulkan_sdk:
        cannot = "compiling for Vulkan needs its SDK (glslc and headers)"
    wheels = (Attempt("vulkan", "wheel", "vulkan"),) if facts.machine == "x86_64" else ()
    compiled = Attempt("vulkan", "compile", cmake_args="-DGGML_VULKAN=on", cached=False)
    return _ordered(wheels, compiled, cannot, compile_only)


def _cuda(facts: Facts, compile_only: bool) -> _Routes:
    if facts.system == "darwin":
        return _Routes(reasons=("CUDA is for Linux and Windows",))
    if facts.driver is None:
        return _Routes(reasons=("no NVIDIA driver answers (nvidia-smi)",))
    names = _cuda_names(facts)
    wheels = tuple(_cuda_wheel(facts, name) for name in names)
    compiled = Attempt("cuda", "compile", cmake_args="-DGGML_CUDA=on", cached=False)
    cannot = _nvcc_fails(facts) or _cannot_compile(facts)
    routes = _ordered(wheels, compiled, cannot, compile_only)
    missing = () if names or compile_only else (_no_cuda_wheel(facts),)
    return replace(routes, reasons=(*missing, *routes.reasons))


def _cuda_wheel(facts: Facts, version: tuple[int, int]) -> Attempt:
    # A toolkit that the loader finds serves as well as NVIDIA's wheels and saves their download.
    extra = None if version[0] in facts.cuda_runtimes else f"cuda{version[0]}"
    return Attempt("cuda", "wheel", "cu{}{}".format(*version), extra)


def _usable_cards(facts: Facts) -> tuple[tuple[int, int], ...]:
    return tuple(card for card in facts.capabilities if card >= _OLDEST_CARD)


def _cuda_names(facts: Facts) -> tuple[tuple[int, int], ...]:
    """Names the driver can run, newest first; older ones stand in where a release lacks the newest."""
    cards = _usable_cards(facts)
    if facts.driver_cuda is None or facts.machine != "x86_64" or (facts.capabilities and not cards):
        return ()
    names = [name for name in _names_of(facts) if name <= facts.driver_cuda]
    if not cards or min(cards) < _OLDEST_CARD_CUDA13:
        names = [name for name in names if name[0] < 13]
    # CUDA 11's libraries are in no extra of ours: its wheel only serves where a toolkit 11 is.
    newer = [name for name in names if name[0] > 11]
    return tuple(sorted(newer or (names if 11 in facts.cuda_runtimes else []), reverse=True))


def _names_of(facts: Facts) -> tuple[tuple[int, int], ...]:
    return _CUDA_NAMES_WINDOWS if facts.system == "win32" else _CUDA_NAMES


def _no_cuda_wheel(facts: Facts) -> str:
    if facts.machine != "x86_64":
        return f"upstream has no CUDA wheel for {facts.machine}"
    if facts.driver_cuda is None:
        return "nvidia-smi does not say which CUDA its driver runs"
    if facts.capabilities and not _usable_cards(facts):
        return f"upstream's CUDA wheels need compute capability 6.0, this card has {_dotted(max(facts.capabilities))}"
    oldest = min(name for name in _names_of(facts) if name[0] > 11)
    return (
        f"driver {facts.driver} runs CUDA {_dotted(facts.driver_cuda)}, upstream's wheels need {_dotted(oldest)}: "
        "a newer driver mends it"
    )


def _nvcc_fails(facts: Facts) -> str | None:
    """Why this toolkit cannot build for these cards, before 20 minutes are spent."""
    nvcc = facts.nvcc
    if nvcc is None:
        return "compiling for CUDA needs NVIDIA's toolkit (nvcc)"
    if facts.driver_cuda and nvcc[0] > facts.driver_cuda[0]:
        return f"nvcc {_dotted(nvcc)} builds for newer drivers than this one (CUDA {_dotted(facts.driver_cuda)})"
    card = max(facts.capabilities, default=None)
    if card is None:
        return None
    needed = next((first for oldest, first in _FIRST_NVCC if card >= oldest), None)
    if needed and nvcc < needed:
        return f"nvcc {_dotted(nvcc)} is too old for this card ({_dotted(card)}), which needs CUDA {_dotted(needed)}"
    if nvcc[0] >= 13 and card < _OLDEST_CARD_CUDA13:
        return f"nvcc {_dotted(nvcc)} no longer knows this card ({_dotted(card)}), use a toolkit of CUDA 12"
    return None


def _dotted(version: tuple[int, int]) -> str:
    return "{}.{}".format(*version)


_ROUTES = {"cpu": _cpu, "metal": _metal, "vulkan": _vulkan, "cuda": _cuda}


def _kept(facts: Facts, accel: str, attempts: tuple[Attempt, ...], compile_only: bool) -> str | None:
    """One line when the engine that is there is the one wanted, and nothing need be built.

    `auto` also keeps an accelerator that was once asked for by name, one that was reached by the same attempts (every
    run would otherwise go again through what failed at the first), and one that this installer does not know (ROCm).
    """
    engine = facts.engine
    if engine is None or not satisfies(engine.version, facts.requirement) or (compile_only and engine.how != "compile"):
        return None
    if accel == "auto":
        first = attempts[0].accel if attempts else None
        same = engine.accel == first or engine.asked not in (None, "auto") or engine.accel not in ACCELERATORS
        same = same or engine.tried == tuple(attempt.label for attempt in attempts)
    else:
        same = engine.accel == accel
    if not same:
        return None
    return f"keeping llama-cpp-python {engine.version} for {title(engine.accel)}: it is there and works"


def _about_machine(facts: Facts) -> tuple[str, ...]:
    if not facts.rosetta:
        return ()
    return (
        "ATTENTION: this is an x86 Python that Rosetta translates: slow, and without Metal. Install an arm64 Python "
        "(python.org, or arch -arm64 brew install python), delete the virtual environment and run this again",
    )


def _about_attempt(facts: Facts, first: Attempt, reasons: tuple[str, ...]) -> list[str]:
    said = []
    if AMX in first.without and facts.gcc:
        said.append(
            f"this CPU's AMX stays unused: g++ {_dotted(facts.gcc)} is known to build it wrongly. g++ 12.4, 13.3, 14 and "
            "clang++ are not: where one is there, set CC and CXX to it"
        )
    if first.how == "wheel" and first.accel == "cpu" and _compiling_pays(facts):
        why = f": {reasons[-1]}" if reasons else ""
        said.append(f"upstream's CPU wheel does without this CPU's AVX2 and is slow{why}")
    if first.how == "wheel" and first.accel == "cuda":
        if not _nvcc_fails(facts) and not _cannot_compile(facts):
            said.append(
                "the wheel is slow for layers left on the CPU; --compile builds one that is not, in 20 to 40 minutes"
            )
        if max(facts.capabilities, default=(0, 0)) >= (10, 0):
            said.append("this card is newer than the wheel: its first start translates the kernels, for minutes, once")
        if len(_usable_cards(facts)) < len(facts.capabilities):
            said.append("a card of compute capability under 6.0 stays unused")
    return said
