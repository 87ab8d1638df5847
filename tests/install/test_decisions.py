"""decide() as a table: what a machine is, what is asked, what is tried, and what is said first."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.install_decisions import Attempt, decide, satisfies
from scripts.install_facts import Engine, Facts

LINUX = Facts(
    system="linux", machine="x86_64", python=(3, 11), requirement="~=0.3.36", manager="apt", compiler="/usr/bin/c++"
)
WINDOWS = replace(LINUX, system="win32", manager=None, compiler="cl.exe")
MAC = Facts(system="darwin", machine="arm64", python=(3, 12), requirement="~=0.3.36", compiler="clang++", avx2=False)
RTX_3090 = replace(LINUX, driver="550.54", driver_cuda=(12, 4), capabilities=((8, 6),))
RTX_4090 = replace(LINUX, driver="560.1", driver_cuda=(12, 6), capabilities=((8, 9),))
RTX_5090 = replace(LINUX, driver="580.1", driver_cuda=(13, 0), capabilities=((12, 0),), nvcc=None)
GTX_1080 = replace(LINUX, driver="580.1", driver_cuda=(13, 0), capabilities=((6, 1),))
GTX_980 = replace(LINUX, driver="580.1", driver_cuda=(13, 0), capabilities=((5, 2),))
CPU = "compile cpu, wheel cpu"
CUDA12 = "wheel cu125, wheel cu124, wheel cu123, wheel cu122, wheel cu121"


@dataclass(frozen=True)
class Row:
    """`attempts` in their order; `says`, `left_out`, `fatal`: patterns in the warnings, the reasons, the refusal."""

    name: str
    facts: Facts
    attempts: str = ""
    accel: str = "auto"
    compile_only: bool = False
    says: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    fatal: str = ""
    change: dict[str, Any] = field(default_factory=dict)


ROWS = [
    # --- CPU
    Row("Linux with a compiler compiles", LINUX, CPU),
    Row("named like auto", LINUX, CPU, accel="cpu"),
    Row("no AVX2, nothing to gain", LINUX, "wheel cpu, compile cpu", change={"avx2": False}),
    Row(
        "no compiler on Debian",
        LINUX,
        "wheel cpu",
        change={"compiler": None},
        says=("without? this CPU's AVX2.*apt install build-essential",),
        left_out=("C\\+\\+ compiler",),
    ),
    Row(
        "no compiler on Fedora",
        LINUX,
        "wheel cpu",
        change={"compiler": None, "manager": "dnf"},
        says=("dnf install gcc-c",),
    ),
    Row("no compiler on Arch", LINUX, "wheel cpu", change={"compiler": None, "manager": "pacman"}, says=("pacman -S",)),
    Row(
        "no compiler, unknown Linux",
        LINUX,
        "wheel cpu",
        change={"compiler": None, "manager": None},
        says=("clang\\+\\+",),
    ),
    Row("no compiler, no AVX2: not slower", LINUX, "wheel cpu", change={"compiler": None, "avx2": False}),
    Row(
        "compile asked, no compiler",
        LINUX,
        compile_only=True,
        change={"compiler": None},
        fatal="apt install build-essential",
    ),
    Row("compile asked", LINUX, "compile cpu", compile_only=True),
    Row("arm64 Linux compiles", LINUX, CPU, change={"machine": "arm64", "avx2": False}),
    Row("Windows", WINDOWS, CPU),
    Row(
        "Windows, short paths", WINDOWS, "wheel cpu", change={"long_paths": False}, says=("reg add .*LongPathsEnabled",)
    ),
    Row("Windows, no compiler", WINDOWS, "wheel cpu", change={"compiler": None}, says=("winget install .*BuildTools",)),
    Row(
        "Windows, short paths, compile asked",
        WINDOWS,
        compile_only=True,
        change={"long_paths": False},
        fatal="about 280 characters.*reg add",
    ),
    # --- Metal
    Row("Apple silicon", MAC, "wheel metal, compile metal, compile cpu, wheel cpu"),
    Row("Apple silicon, named", MAC, "wheel metal, compile metal", accel="metal"),
    Row(
        "Apple silicon, no tools",
        MAC,
        "wheel metal",
        accel="metal",
        change={"compiler": None},
        left_out=("xcode-select",),
    ),
    Row("Apple silicon, compile", MAC, "compile metal", accel="metal", compile_only=True),
    Row("Intel Mac", MAC, CPU, change={"machine": "x86_64", "avx2": True}),
    Row(
        "Rosetta",
        MAC,
        CPU,
        change={"machine": "x86_64", "rosetta": True, "avx2": True},
        says=("ATTENTION.*arm64 Python",),
    ),
    Row(
        "Rosetta, Metal asked",
        MAC,
        accel="metal",
        change={"machine": "x86_64", "rosetta": True},
        fatal="Rosetta.*arm64",
    ),
    Row("Metal on Linux", LINUX, accel="metal", fatal="macOS only"),
    Row("CUDA on a Mac", MAC, accel="cuda", fatal="Linux and Windows"),
    Row("Vulkan on a Mac", MAC, accel="vulkan", fatal="Linux and Windows"),
    # --- CUDA by wheel
    Row(
        "driver only", RTX_3090, "wheel cu124, wheel cu123, wheel cu122, wheel cu121", accel="cuda", left_out=("nvcc",)
    ),
    Row(
        "driver only, auto ends with the CPU",
        RTX_3090,
        f"wheel cu124, wheel cu123, wheel cu122, wheel cu121, {CPU}",
        left_out=("nvcc", "Vulkan's loader"),
    ),
    Row(
        "driver and Vulkan",
        RTX_3090,
        f"wheel cu124, wheel cu123, wheel cu122, wheel cu121, wheel vulkan, {CPU}",
        change={"vulkan_loader": True},
    ),
    Row("driver newer than any wheel of its major", RTX_4090, CUDA12, accel="cuda"),
    Row("Windows has fewer names", replace(RTX_4090, system="win32"), "wheel cu125, wheel cu124", accel="cuda"),
    Row(
        "CUDA 13 driver, new card",
        RTX_5090,
        f"wheel cu130, {CUDA12}",
        accel="cuda",
        says=("translates the kernels",),
    ),
    Row(
        "newest driver", RTX_5090, f"wheel cu132, wheel cu130, {CUDA12}", accel="cuda", change={"driver_cuda": (13, 3)}
    ),
    Row("CUDA 13 driver, Pascal: CUDA 12", GTX_1080, CUDA12, accel="cuda"),
    Row(
        "Pascal beside a new card: CUDA 12 serves both",
        GTX_1080,
        CUDA12,
        accel="cuda",
        change={"capabilities": ((8, 6), (6, 1))},
    ),
    Row(
        "Maxwell beside a new card",
        RTX_3090,
        "wheel cu124, wheel cu123, wheel cu122, wheel cu121",
        accel="cuda",
        change={"capabilities": ((5, 2), (8, 6))},
        says=("under 6.0 stays unused",),
    ),
    Row("driver does not tell the capability", RTX_4090, CUDA12, accel="cuda", change={"capabilities": ()}),
    Row(
        "with a toolkit the wheel still comes first",
        RTX_4090,
        f"{CUDA12}, compile cuda",
        accel="cuda",
        change={"nvcc": (12, 4)},
        says=("--compile",),
    ),
    # --- CUDA that cannot work
    Row(
        "Maxwell goes to Vulkan",
        GTX_980,
        f"wheel vulkan, {CPU}",
        change={"vulkan_loader": True},
        says=("ATTENTION: CUDA.*5.2",),
    ),
    Row("Maxwell without Vulkan", GTX_980, CPU, says=("ATTENTION: CUDA.*6.0", "ATTENTION: Vulkan.*loader")),
    Row("Maxwell, CUDA asked", GTX_980, accel="cuda", fatal="6.0, this card has 5.2"),
    Row(
        "driver of CUDA 12.0",
        RTX_3090,
        f"wheel vulkan, {CPU}",
        change={"driver_cuda": (12, 0), "vulkan_loader": True},
        says=("ATTENTION: CUDA.*runs CUDA 12.0, upstream's wheels need 12.1",),
    ),
    Row("driver of CUDA 11.8", RTX_3090, CPU, change={"driver_cuda": (11, 8)}, says=("ATTENTION: CUDA.*newer driver",)),
    Row(
        "driver of CUDA 11.8 and a toolkit 11",
        RTX_3090,
        "wheel cu118, compile cuda",
        accel="cuda",
        change={"driver_cuda": (11, 8), "nvcc": (11, 8), "cuda_runtimes": (11,)},
    ),
    Row(
        "old Windows driver",
        replace(RTX_3090, system="win32"),
        CPU,
        change={"driver_cuda": (12, 2)},
        says=("need 12.4",),
    ),
    Row(
        "driver that does not name its CUDA",
        RTX_3090,
        CPU,
        change={"driver_cuda": None},
        says=("does not say which CUDA",),
    ),
    Row("arm64 with a toolkit", RTX_3090, "compile cuda", accel="cuda", change={"machine": "arm64", "nvcc": (12, 4)}),
    Row(
        "arm64 without a toolkit",
        RTX_3090,
        accel="cuda",
        change={"machine": "arm64"},
        fatal="no CUDA wheel for arm64.*nvcc",
    ),
    Row("no driver, CUDA asked", LINUX, accel="cuda", change={"nvcc": (13, 0)}, fatal="no NVIDIA driver"),
    # --- CUDA by compiling
    Row("compile", RTX_3090, "compile cuda", accel="cuda", compile_only=True, change={"nvcc": (12, 2)}),
    Row(
        "compile, no toolkit",
        RTX_3090,
        accel="cuda",
        compile_only=True,
        fatal="^compiling for CUDA needs NVIDIA's toolkit",
    ),
    Row(
        "compile, no compiler",
        RTX_3090,
        accel="cuda",
        compile_only=True,
        change={"nvcc": (12, 2), "compiler": None},
        fatal="apt",
    ),
    Row(
        "nvcc too old, Ada",
        RTX_4090,
        accel="cuda",
        compile_only=True,
        change={"nvcc": (11, 5)},
        fatal="8.9.*needs CUDA 11.8",
    ),
    Row(
        "nvcc too old, Hopper",
        RTX_4090,
        accel="cuda",
        compile_only=True,
        change={"nvcc": (11, 7), "capabilities": ((9, 0),)},
        fatal="9.0.*needs CUDA 11.8",
    ),
    Row(
        "nvcc too old, Blackwell",
        RTX_5090,
        accel="cuda",
        compile_only=True,
        change={"nvcc": (12, 6)},
        fatal="12.0.*CUDA 12.8",
    ),
    Row(
        "nvcc new enough, Blackwell",
        RTX_5090,
        "compile cuda",
        accel="cuda",
        compile_only=True,
        change={"nvcc": (12, 8)},
    ),
    Row(
        "nvcc too new for Pascal",
        GTX_1080,
        accel="cuda",
        compile_only=True,
        change={"nvcc": (13, 0)},
        fatal="no longer knows",
    ),
    Row(
        "nvcc newer than the driver",
        RTX_4090,
        CUDA12,
        accel="cuda",
        change={"nvcc": (13, 0)},
        left_out=("newer drivers",),
    ),
    Row(
        "nvcc too old leaves the wheel", RTX_4090, CUDA12, accel="cuda", change={"nvcc": (11, 5)}, left_out=("too old",)
    ),
    # --- Vulkan
    Row("Vulkan without NVIDIA", LINUX, f"wheel vulkan, {CPU}", change={"vulkan_loader": True}),
    Row(
        "Vulkan with its SDK",
        LINUX,
        "wheel vulkan, compile vulkan",
        accel="vulkan",
        change={"vulkan_loader": True, "vulkan_sdk": True},
    ),
    Row("Vulkan, no SDK", LINUX, "wheel vulkan", accel="vulkan", change={"vulkan_loader": True}, left_out=("glslc",)),
    Row("Vulkan, no loader", LINUX, accel="vulkan", fatal="loader is not there"),
    Row("Vulkan on Windows", WINDOWS, "wheel vulkan", accel="vulkan", change={"vulkan_loader": True}),
    # --- Python
    Row("Python 3.9", LINUX, change={"python": (3, 9)}, fatal="3.10 or newer, this is 3.9"),
    Row(
        "environment of Python 3.9",
        LINUX,
        change={"python": (3, 9), "venv_exists": True, "venv": "env"},
        fatal="Python in env is 3.9.*delete",
    ),
    Row("Debian without venv", LINUX, change={"can_make_venv": False}, fatal="apt install python3.11-venv"),
    Row("Arch without venv", LINUX, change={"can_make_venv": False, "manager": "pacman"}, fatal="venv and ensurepip"),
    Row("no venv module, environment there", LINUX, CPU, change={"can_make_venv": False, "venv_exists": True}),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_attempts_and_messages(row: Row) -> None:
    decision = decide(replace(row.facts, **row.change), row.accel, row.compile_only)

    assert ", ".join(attempt.label for attempt in decision.attempts) == row.attempts
    assert (decision.fatal is None) == (row.fatal == "")
    if decision.fatal:
        assert re.search(row.fatal, decision.fatal)
    for found, patterns in ((decision.warnings, row.says), (decision.left_out, row.left_out)):
        for pattern in patterns:
            assert any(re.search(pattern, text) for text in found), (pattern, found)
    for text in (*decision.warnings, *decision.left_out, decision.fatal or ""):
        assert "\n" not in text


def test_only_expected_attention() -> None:
    """What is loud is what leaves hardware unused; a plain machine is installed without a word."""
    assert decide(LINUX, "auto").warnings == ()
    assert decide(MAC, "auto").warnings == ()
    assert decide(RTX_3090, "auto").warnings == ()


@pytest.mark.parametrize(
    ("facts", "accel", "expected"),
    [
        (RTX_3090, "cuda", Attempt("cuda", "wheel", "cu124", extra="cuda12")),
        (RTX_5090, "cuda", Attempt("cuda", "wheel", "cu130", extra="cuda13")),
        (replace(RTX_3090, cuda_runtimes=(12,)), "cuda", Attempt("cuda", "wheel", "cu124")),
        (replace(RTX_5090, cuda_runtimes=(12,)), "cuda", Attempt("cuda", "wheel", "cu130", extra="cuda13")),
        (LINUX, "cpu", Attempt("cpu", "compile")),
        (MAC, "cpu", Attempt("cpu", "compile", cmake_args="-DGGML_METAL=off", cached=False)),
        (MAC, "metal", Attempt("metal", "wheel", "metal")),
    ],
)
def test_first_attempt_in_full(facts: Facts, accel: str, expected: Attempt) -> None:
    assert decide(facts, accel).attempts[0] == expected


@pytest.mark.parametrize("accel", ["cuda", "metal", "vulkan"])
def test_compiled_accelerators_go_past_pips_cache(accel: str) -> None:
    facts = MAC if accel == "metal" else replace(RTX_3090, nvcc=(12, 4), vulkan_loader=True, vulkan_sdk=True)
    (attempt,) = decide(facts, accel, compile_only=True).attempts
    assert attempt.cmake_args == f"-DGGML_{accel.upper()}=on"
    assert not attempt.cached
    assert attempt.duration


HAVE_CPU = Engine("0.3.36", "cpu")
HAVE_CUDA = Engine("0.3.36", "cuda", ("NVIDIA GeForce RTX 3090",))
TRIED = tuple(attempt.label for attempt in decide(RTX_3090, "auto").attempts)


@pytest.mark.parametrize(
    ("facts", "engine", "accel", "compile_only", "kept"),
    [
        pytest.param(LINUX, HAVE_CPU, "auto", False, True, id="right one"),
        pytest.param(LINUX, replace(HAVE_CPU, version="0.3.40"), "auto", False, True, id="newer patch"),
        pytest.param(RTX_3090, replace(HAVE_CUDA, version="0.3.36+cu124"), "auto", False, True, id="local version"),
        pytest.param(LINUX, replace(HAVE_CPU, version="0.3.35"), "auto", False, False, id="too old"),
        pytest.param(LINUX, replace(HAVE_CPU, version="0.4.0"), "auto", False, False, id="too new"),
        pytest.param(RTX_3090, HAVE_CPU, "auto", False, False, id="CPU engine, a card is there"),
        pytest.param(
            RTX_3090,
            replace(HAVE_CPU, tried=TRIED),
            "auto",
            False,
            True,
            id="the same attempts ended so",
        ),
        pytest.param(RTX_3090, replace(HAVE_CPU, tried=TRIED), "cuda", False, False, id="CUDA by name after that"),
        pytest.param(RTX_3090, replace(HAVE_CPU, asked="cpu"), "auto", False, True, id="CPU was asked by name"),
        pytest.param(RTX_3090, HAVE_CUDA, "cpu", False, False, id="CPU is asked, CUDA is there"),
        pytest.param(LINUX, Engine("0.3.36", "rocm", ("card",)), "auto", False, True, id="unknown backend"),
        pytest.param(LINUX, replace(HAVE_CPU, how="wheel"), "cpu", True, False, id="a wheel, compiling is asked"),
        pytest.param(LINUX, replace(HAVE_CPU, how="compile"), "cpu", True, True, id="compiled, compiling is asked"),
        pytest.param(replace(LINUX, driver=None), HAVE_CUDA, "cuda", False, True, id="no way to get another"),
    ],
)
def test_an_engine_that_works_is_kept(facts: Facts, engine: Engine, accel: str, compile_only: bool, kept: bool) -> None:
    decision = decide(replace(facts, engine=engine), accel, compile_only)
    assert (decision.keep is not None) == kept
    assert decision.fatal is None


@pytest.mark.parametrize(
    ("version", "requirement", "fits"),
    [
        ("0.3.36", "~=0.3.36", True),
        ("0.3.37", "~=0.3.36", True),
        ("0.3.35", "~=0.3.36", False),
        ("0.4.0", "~=0.3.36", False),
        ("1.0", "~=0.3.36", False),
        ("0.3.36+cu124", "==0.3.36", True),
        ("0.4.0", ">=0.3.36", True),
        ("0.4.0", "!=0.4.0", True),  # left to pip
    ],
)
def test_versions(version: str, requirement: str, fits: bool) -> None:
    assert satisfies(version, requirement) is fits


VERSIONS = st.one_of(st.none(), st.tuples(st.integers(10, 14), st.integers(0, 9)))
MACHINES = st.builds(
    Facts,
    system=st.sampled_from(("linux", "darwin", "win32")),
    machine=st.sampled_from(("x86_64", "arm64", "riscv64")),
    python=st.just((3, 12)),
    requirement=st.just("~=0.3.36"),
    manager=st.sampled_from((None, "apt", "dnf", "pacman", "zypper", "apk")),
    compiler=st.sampled_from((None, "c++")),
    avx2=st.booleans(),
    driver=st.sampled_from((None, "550.54")),
    driver_cuda=VERSIONS,
    capabilities=st.lists(st.tuples(st.integers(3, 12), st.integers(0, 9)), max_size=3).map(tuple),
    nvcc=VERSIONS,
    vulkan_loader=st.booleans(),
    vulkan_sdk=st.booleans(),
    rosetta=st.booleans(),
    long_paths=st.booleans(),
)


@given(MACHINES)
def test_auto_always_ends_with_the_cpu(facts: Facts) -> None:
    decision = decide(facts, "auto")
    assert decision.fatal is None
    assert decision.attempts[-1].accel == "cpu"
    labels = [attempt.label for attempt in decision.attempts]
    assert len(set(labels)) == len(labels)
    if facts.compiler is None or not facts.long_paths:
        assert all(attempt.how == "wheel" for attempt in decision.attempts)


@given(MACHINES, st.sampled_from(("cpu", "cuda", "metal", "vulkan")), st.booleans())
def test_a_named_accelerator_is_used_or_refused(facts: Facts, accel: str, compile_only: bool) -> None:
    decision = decide(facts, accel, compile_only)
    assert {attempt.accel for attempt in decision.attempts} <= {accel}
    assert bool(decision.attempts) != bool(decision.fatal)
    for attempt in decision.attempts:
        if attempt.accel == "cuda" and attempt.name:
            assert facts.driver_cuda is not None
            assert attempt.name <= "cu{}{}".format(*facts.driver_cuda)
        assert attempt.how == "compile" or not compile_only
