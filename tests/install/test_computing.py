"""An engine that loads and does not compute: how it is told, what is built next, and when an engine is kept."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from qwq_lite.selftest.engine_check import Ended
from scripts import install_facts
from scripts.install_decisions import Attempt, Decision, decide
from scripts.install_engine import Examined, examine
from scripts.install_facts import Facts, parse_macros, read_stamp
from scripts.install_flags import AMX, NATIVE, REPACK, breaks_amx, build_environment
from scripts.install_processes import run_process
from scripts.install_steps import InstallError, carry_out
from tests.bad_engines import RET, UD2, broken_copy, only_x86_linux
from tests.played import (
    CACHED,
    CARD,
    CPU_ATTEMPTS,
    RIGHT,
    Played,
    died,
    installer,
    loaded,
    wrong,
)

PLAIN, REPACKED = "ggml_vec_dot_q4_K_q8_K", "ggml_gemv_q4_K_8x8_q8_K"
KEPT = "it is kept, since models can be loaded without the buffers that fail, and run slower"
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
CUDA_ATTEMPTS = (Attempt("cuda", "wheel", "cu125"), Attempt("cuda", "wheel", "cu124"), *CPU_ATTEMPTS)
LINUX = Facts(
    system="linux", machine="x86_64", python=(3, 11), requirement="~=0.3.36", manager="apt", compiler="/usr/bin/c++"
)


# --- compilers


@pytest.mark.parametrize(
    ("gcc", "breaks"),
    [
        ((11, 4), True),  # Ubuntu 22.04
        ((12, 2), True),  # Debian 12
        ((12, 3), True),
        ((12, 4), False),
        ((13, 0), True),
        ((13, 2), True),
        ((13, 3), False),
        ((14, 0), False),
        ((15, 1), False),
        (None, False),  # clang
    ],
)
def test_compilers_that_break_amx(gcc: tuple[int, int] | None, breaks: bool) -> None:
    assert breaks_amx(gcc) is breaks
    facts = replace(LINUX, gcc=gcc, amx=True)
    compiled, wheel = decide(facts, "auto").attempts
    assert compiled == (
        Attempt("cpu", "compile", without=(AMX,), cached=False) if breaks else Attempt("cpu", "compile")
    )
    assert wheel.without == ()
    assert any("AMX stays unused" in warning for warning in decide(facts, "auto").warnings) == breaks
    assert decide(replace(facts, amx=False), "auto") == decide(LINUX, "auto")


@pytest.mark.parametrize("accel", ["cuda", "vulkan"])
def test_builds_for_a_gpu_leave_amx_out_too(accel: str) -> None:
    """Layers that stay on the CPU are computed by the same code."""
    card = replace(LINUX, driver="550.54", driver_cuda=(12, 4), capabilities=((8, 6),), nvcc=(12, 2))
    facts = replace(card, gcc=(12, 2), amx=True, vulkan_loader=True, vulkan_sdk=True)
    (attempt,) = decide(facts, accel, compile_only=True).attempts
    assert attempt.without == (AMX,)
    assert attempt.cmake_args == f"-DGGML_{accel.upper()}=on"


@pytest.mark.parametrize(
    ("macros", "found"),
    [
        ("#define __GNUC__ 12\n#define __GNUC_MINOR__ 2\n#define __AMX_TILE__ 1\n", ((12, 2), True)),
        ("#define __GNUC__ 13\n#define __GNUC_MINOR__ 3\n", ((13, 3), False)),
        ("#define __GNUC__ 4\n#define __GNUC_MINOR__ 2\n#define __clang__ 1\n#define __AMX_TILE__ 1\n", (None, True)),
        ("#define __GNUC__ 12\n#define __GNUC_MINOR__ 2\n#define __NVCOMPILER 1\n", (None, False)),
        ("", (None, False)),
    ],
)
def test_what_a_compiler_defines(macros: str, found: tuple[tuple[int, int] | None, bool]) -> None:
    assert parse_macros(macros) == found


@pytest.mark.skipif(os.name == "nt", reason="a shell script as compiler")
@pytest.mark.parametrize("by", ["CXX", "CMAKE_ARGS"])
def test_the_compiler_that_the_build_takes_is_asked(by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "c++-of-mine"
    macros = "#define __GNUC__ 13\\n#define __GNUC_MINOR__ 2\\n#define __AMX_TILE__ 1\\n"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-march=native*) printf "{macros}";; esac\n')
    compiler.chmod(0o755)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    monkeypatch.setenv(by, {"CXX": f"{compiler} -pipe", "CMAKE_ARGS": f"-DCMAKE_CXX_COMPILER={compiler}"}[by])
    facts = install_facts.probe(Path(__file__).resolve().parents[2], tmp_path / "none")
    assert (facts.gcc, facts.amx) == ((13, 2), True)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_the_flags_take_amx_out_of_what_gcc_compiles() -> None:
    """For a CPU that has it. A gcc that knows neither is not given the flags, since it defines no AMX."""

    def defines(*options: str) -> tuple[bool, bool]:
        command = ["g++", *options, "-dM", "-E", "-x", "c++", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode == 0, parse_macros(done.stdout)[1]

    if defines("-march=sapphirerapids") != (True, True):
        pytest.skip("this g++ knows no CPU with AMX")
    flags = build_environment({}, "", (AMX,))["CXXFLAGS"].split()
    assert defines(*flags, "-march=sapphirerapids") == (True, False)


# --- flags


@pytest.mark.parametrize(
    ("mine", "cmake_args", "without", "expected"),
    [
        ({}, "", (), {"CMAKE_ARGS": ""}),
        ({}, "", (AMX,), {"CMAKE_ARGS": "", "CFLAGS": NO_AMX, "CXXFLAGS": NO_AMX}),
        ({"CXXFLAGS": "-g"}, "", (AMX,), {"CMAKE_ARGS": "", "CFLAGS": NO_AMX, "CXXFLAGS": f"-g {NO_AMX}"}),
        ({}, "-DGGML_CUDA=on", (NATIVE,), {"CMAKE_ARGS": "-DGGML_CUDA=on -DGGML_NATIVE=OFF"}),
        ({"CMAKE_ARGS": "-DX=1"}, "", (REPACK,), {"CMAKE_ARGS": "-DX=1 -DGGML_CPU_REPACK=OFF"}),
        ({}, "", (REPACK, NATIVE), {"CMAKE_ARGS": "-DGGML_CPU_REPACK=OFF -DGGML_NATIVE=OFF"}),
        (  # CMake reads CXXFLAGS only where nothing sets the variable
            {"CMAKE_ARGS": "-DCMAKE_CXX_FLAGS='-O2 -g' -D CMAKE_C_FLAGS:STRING=-O1 -DX=1"},
            "",
            (AMX,),
            {
                "CMAKE_ARGS": f"'-DCMAKE_CXX_FLAGS=-O2 -g {NO_AMX}' -D 'CMAKE_C_FLAGS:STRING=-O1 {NO_AMX}' -DX=1",
                "CFLAGS": NO_AMX,
                "CXXFLAGS": NO_AMX,
            },
        ),
    ],
)
def test_flags_join_the_users(
    mine: dict[str, str], cmake_args: str, without: tuple[str, ...], expected: dict[str, str]
) -> None:
    assert build_environment(mine, cmake_args, without) == expected


# --- what is built next


@dataclass(frozen=True)
class Course:
    """One run of the installer: what its engines compute, and what that makes it build."""

    name: str
    products: tuple[Ended, ...]
    builds: tuple[tuple[bool, str, str], ...]  # may pip's cache serve it, CMAKE_ARGS, CXXFLAGS
    how: str = "compile"
    without: tuple[str, ...] = ()
    checks: tuple[Ended, ...] = (loaded(),) * 4
    pip_output: tuple[str, ...] = ()  # of the builds, in their order
    first: Attempt = CPU_ATTEMPTS[0]
    says: str = ""


FRESH = (False, "", "")
FROM_CACHE = (True, "", "")
WITHOUT_AMX = (False, "", NO_AMX)
WITHOUT_REPACK = (False, "-DGGML_CPU_REPACK=OFF", "")
PORTABLE = (False, "-DGGML_NATIVE=OFF", "")

COURSES = [
    Course("it computes", (RIGHT,), (FROM_CACHE,)),
    Course(
        "AMX dies",
        (died("AMX"), RIGHT),
        (FROM_CACHE, WITHOUT_AMX),
        without=(AMX,),
        says="died by SIGILL in buffer AMX of CPU: Q4_K",
    ),
    Course(
        "repacked weights give wrong numbers",
        (wrong("CPU_REPACK"),),
        (FROM_CACHE, WITHOUT_REPACK),
        without=(REPACK,),
        says="wrong numbers in buffer CPU_REPACK of CPU: Q4_K",
    ),
    Course("the plain buffer is wrong", (wrong("CPU"),), (FROM_CACHE, PORTABLE), without=(NATIVE,)),
    Course("the plain buffer dies", (died("CPU", signal.SIGSEGV), RIGHT), (FROM_CACHE, PORTABLE), without=(NATIVE,)),
    Course("a buffer that no option turns off", (wrong("CPU_NEW"),), (FROM_CACHE, PORTABLE), without=(NATIVE,)),
    Course(
        "two buffers",
        (wrong("AMX", "CPU_REPACK"),),
        (FROM_CACHE, (False, "-DGGML_CPU_REPACK=OFF", NO_AMX)),
        without=(AMX, REPACK),
    ),
    Course(
        "it does not even load",
        (),
        (FROM_CACHE, PORTABLE),
        without=(NATIVE,),
        checks=(Ended(-signal.SIGILL, ""), loaded()),
    ),
    Course(
        "pip's cache held it: the same, compiled here",
        (died("AMX"), RIGHT, RIGHT),
        (FROM_CACHE, FRESH),
        pip_output=(CACHED,),
        says="pip cache remove llama_cpp_python",
    ),
    Course(
        "pip's cache held it, and this compiler makes the same",
        (died("AMX"), RIGHT, died("AMX"), RIGHT, RIGHT),
        (FROM_CACHE, FRESH, WITHOUT_AMX),
        without=(AMX,),
        pip_output=(CACHED,),
    ),
    Course(
        "two builds, then the wheel",
        (wrong("CPU_REPACK"), wrong("CPU"), RIGHT),
        (FROM_CACHE, WITHOUT_REPACK),
        how="wheel",
    ),
    Course(
        "two builds after the cache's, then the wheel",
        (wrong("CPU"), wrong("CPU"), wrong("CPU"), RIGHT),
        (FROM_CACHE, FRESH, PORTABLE),
        how="wheel",
        pip_output=(CACHED,),
    ),
    Course(
        "no flag mends a GPU",
        (wrong("CUDA0", device="CUDA0"), RIGHT),
        ((False, "-DGGML_CUDA=on", ""),),
        how="wheel",
        checks=(loaded(CARD), loaded()),
        first=Attempt("cuda", "compile", cmake_args="-DGGML_CUDA=on", cached=False),
    ),
    Course(
        "what is left out already is not built twice",
        (wrong("AMX"), RIGHT),
        (WITHOUT_AMX,),
        how="wheel",
        first=Attempt("cpu", "compile", without=(AMX,), cached=False),
    ),
]


@pytest.mark.parametrize("course", COURSES, ids=lambda course: course.name)
def test_the_failing_buffer_picks_the_next_build(course: Course, venv: Path, said: list[str]) -> None:
    played = Played(list(course.checks), list(course.products), list(course.pip_output))
    attempts = (course.first, CPU_ATTEMPTS[1])
    engine = installer(played, venv, said).install_engine(Decision(attempts=attempts))

    assert played.builds() == list(course.builds)
    assert (engine.how, engine.without) == (course.how, course.without)
    assert read_stamp(venv)["without"] == list(course.without)
    assert not played.products, "an engine was not checked"
    assert any(course.says in line for line in said)


def test_engine_that_fails_only_where_it_can_go_without_is_better_than_none(venv: Path, said: list[str]) -> None:
    played = Played([loaded(), loaded()], [wrong("CPU_REPACK"), wrong("CPU_REPACK")])
    engine = installer(played, venv, said).install_engine(Decision(attempts=CPU_ATTEMPTS[:1]))

    assert engine.without == (REPACK,)
    assert "uninstall" not in played.verbs()
    assert said[-1].startswith("ATTENTION: nothing better could be installed")
    assert said[-1].endswith(KEPT)

    # The next run does not spend the minutes again; --force does.
    played = Played([loaded()], [wrong("CPU_REPACK")])
    assert installer(played, venv, said).look() == engine
    assert said[-1].endswith(KEPT)


def test_engine_for_a_gpu_that_fails_only_there_is_better_than_one_for_the_cpu(venv: Path, said: list[str]) -> None:
    played = Played([loaded(CARD)], [wrong("CPU_REPACK")])
    engine = installer(played, venv, said).install_engine(Decision(attempts=(CUDA_ATTEMPTS[0], *CPU_ATTEMPTS)))
    assert engine.accel == "cuda"
    assert engine.devices == ("a card",)
    assert "uninstall" not in played.verbs()


def test_engine_whose_plain_buffer_fails_is_never_kept(venv: Path, said: list[str]) -> None:
    played = Played([loaded(), loaded()], [wrong("CPU"), wrong("CPU")])
    with pytest.raises(InstallError) as raised:
        installer(played, venv, said).install_engine(Decision(attempts=CPU_ATTEMPTS[:1]))
    assert str(raised.value) == (
        "no engine could be installed. compile cpu: it fails its check: wrong numbers in buffer CPU of CPU: Q4_K; "
        "compile cpu without features beyond AVX2: it fails its check: wrong numbers in buffer CPU of CPU: Q4_K"
    )


def test_gpu_that_computes_wrongly(venv: Path, said: list[str]) -> None:
    """No flag of a build mends it, and wheels for the same CUDA have the same kernels."""
    played = Played([loaded(CARD), loaded()], [wrong("CUDA0", device="CUDA0")])
    engine = installer(played, venv, said).install_engine(Decision(attempts=CUDA_ATTEMPTS))

    assert engine.accel == "cpu"
    assert played.asked == [["--gpu"], []]
    assert any("wheel cu125 is not used: it fails its check: wrong numbers in buffer CUDA0" in line for line in said)
    assert not any("cu124" in word for command in played.commands for word in command)


@pytest.mark.parametrize(
    ("products", "why"),
    [
        ([Ended(1, '{"error": "ImportError: numpy"}')], "ImportError: numpy"),
        ([Ended(3, "", "Traceback\nMemoryError")], "the check ended with status 3: MemoryError"),
        ([Ended(-signal.SIGTERM, "")], "the check ended by SIGTERM"),
        ([Ended(None, "")], "it did not load in time"),
        ([Ended(None, died("CUDA0", device="CUDA0").output), RIGHT], "no result within 180 s"),
    ],
)
def test_a_check_that_cannot_run_stops_nothing(products: list[Ended], why: str, venv: Path, said: list[str]) -> None:
    """The last one is a GPU's: its driver may translate kernels for minutes at the first start."""
    played = Played([loaded(CARD)] * 2, products * 2)
    steps = installer(played, venv, said)
    engine = steps.install_engine(Decision(attempts=CUDA_ATTEMPTS))

    assert (engine.accel, engine.how) == ("cuda", "wheel")
    notice = "the engine loads, and whether it computes could not be checked: "
    assert [line for line in said if line.startswith(notice) and why in line]
    assert steps.look() == engine
    assert sum(line.startswith(notice) for line in said) == 2


# --- a real engine


def look_at(libraries: Path, monkeypatch: pytest.MonkeyPatch) -> Examined:
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(libraries))
    return examine(Path(sys.executable), run_process)


@only_x86_linux
@pytest.mark.parametrize(
    ("function", "code", "reason", "suspects", "limps"),
    [
        (PLAIN, UD2, "died by SIGILL in buffer CPU of CPU: Q4_K", (NATIVE,), False),
        (PLAIN, RET, "wrong numbers in buffer CPU of CPU: Q4_K", (NATIVE,), False),
        (REPACKED, UD2, "died by SIGILL in buffer CPU_REPACK of CPU: ", (REPACK,), True),
    ],
)
def test_broken_engine(
    function: str,
    code: bytes,
    reason: str,
    suspects: tuple[str, ...],
    limps: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if limps and "CPU_REPACK" not in examine(Path(sys.executable), run_process).report.buffers:
        pytest.skip("this build of llama.cpp repacks nothing")
    found = look_at(broken_copy(tmp_path, {function: code}), monkeypatch)
    assert reason in found.reason
    assert (found.suspects, found.limps) == (suspects, limps)


@only_x86_linux
def test_copy_of_the_engine_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes the others fail is the broken function."""
    found = look_at(broken_copy(tmp_path, {}), monkeypatch)
    assert (found.reason, found.notice) == ("", "")
    assert "CPU" in found.report.buffers


# --- the engine that is there


def test_installed_engine_that_fails_is_mended(venv: Path, said: list[str]) -> None:
    """The same wheel may be right in pip's cache, so that the first attempt is what it always is."""
    played = Played([loaded()], [RIGHT])
    assert installer(played, venv, said).install_engine(Decision(attempts=CPU_ATTEMPTS)).how == "compile"
    played = Played([loaded()] * 2, [died("AMX"), RIGHT, RIGHT])
    steps = installer(played, venv, said)
    present = steps.look()

    assert present is None
    assert said[-1] == (
        "ATTENTION: llama-cpp-python 0.3.36 is installed and it fails its check: "
        "died by SIGILL in buffer AMX of CPU: Q4_K; it is to be replaced"
    )
    decision = decide(replace(LINUX, engine=present), "auto")
    assert decision.keep is None
    carry_out(decision, steps, present)
    assert played.builds() == [FROM_CACHE]


def test_installed_engine_that_does_not_load_is_said(venv: Path, said: list[str]) -> None:
    assert installer(Played([Ended(-signal.SIGILL, "")]), venv, said).look() is None
    assert said == [
        "the engine that is installed is not used: this build uses CPU instructions that this CPU lacks",
    ]
    absent = Ended(1, '{"error": "ModuleNotFoundError: No module named \'llama_cpp\'"}')
    assert installer(Played([absent]), venv, said).look() is None
    assert len(said) == 1


@pytest.mark.parametrize("fault", [wrong("CPU_REPACK"), died("AMX")])
def test_engine_of_a_kind_that_is_not_built_here_is_kept(fault: Ended, venv: Path, said: list[str]) -> None:
    """Only what it can go without fails, and an engine for ROCm took its owner half an hour."""
    rocm = loaded({**CARD, "backend": "ROCm"})
    engine = installer(Played([rocm], [fault]), venv, said).look()
    assert engine is not None
    assert engine.accel == "rocm"
    assert said[-1].endswith(KEPT)
    assert installer(Played([rocm], [wrong("CPU")]), venv, said).look() is None


def test_installed_engine_stays_where_nothing_better_can_be_had(venv: Path, said: list[str]) -> None:
    """Neither compiler nor index: it works without the buffer that fails."""
    played = Played([loaded()], [wrong("CPU_REPACK")], failing="--force-reinstall")
    steps = installer(played, venv, said)
    assert steps.look() is None
    line = carry_out(Decision(attempts=CPU_ATTEMPTS), steps, None)
    assert line.startswith("qwq-lite is installed with llama-cpp-python 0.3.36 for the CPU; ")
    assert any(line.startswith("ATTENTION: nothing better") for line in said)

    played = Played([loaded()], [wrong("CPU")], failing="--force-reinstall")
    steps = installer(played, venv, said)
    assert steps.look() is None
    with pytest.raises(InstallError):
        carry_out(Decision(attempts=CPU_ATTEMPTS), steps, None)


def test_second_run_knows_what_was_left_out_and_keeps_it(venv: Path, said: list[str]) -> None:
    facts = replace(LINUX, gcc=(12, 2), amx=True)
    decision = decide(facts, "auto")
    line = carry_out(decision, installer(Played([loaded()]), venv, said), None)
    assert "for the CPU without AMX; next: " in line
    assert any("AMX" in warning and "12.2" in warning for warning in decision.warnings)

    played = Played([loaded()])
    again = installer(played, venv, said)
    present = again.look()
    assert present is not None
    assert present.without == (AMX,)
    kept = decide(replace(facts, engine=present), "auto")
    assert kept.warnings == ()
    assert "without AMX" in carry_out(kept, again, present)
    assert played.builds() == []


@pytest.mark.parametrize("name", ["CMAKE_ARGS", "CC", "CXX", "CFLAGS", "CXXFLAGS"])
def test_what_the_user_set_for_the_build_keeps_pips_cache_out(
    name: str, venv: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another compiler than the one whose wheel is in the cache, say."""
    monkeypatch.setenv(name, "mine")
    played = Played([loaded()])
    installer(played, venv, said).install_engine(Decision(attempts=CPU_ATTEMPTS))
    ((from_cache, _, _),) = played.builds()
    assert not from_cache
    assert played.environments[0][name] == "mine"
