"""The check in a child process, and what follows from how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from qwq_lite.selftest.engine_check import Ended
from scripts import install_cli, install_steps
from scripts.install_decisions import Attempt, Decision
from scripts.install_engine import LOADING, read_check
from scripts.install_facts import STAMP, Engine, Facts, read_stamp, venv_python
from scripts.install_index import Index
from scripts.install_steps import Installer, InstallError, carry_out, pip_reason
from tests.played import CACHED, CARD, CPU_ATTEMPTS, ROOT, Played, installer, loaded

ILLEGAL = "this build uses CPU instructions that this CPU lacks"


# --- how a check is read


def test_devices_and_accelerator() -> None:
    assert read_check(loaded()) == Engine("0.3.36", "cpu")
    assert read_check(loaded(CARD, CARD)) == Engine("0.3.36", "cuda", ("a card", "a card"))
    assert read_check(loaded({**CARD, "backend": "MTL"})) == Engine("0.3.36", "metal", ("a card",))
    assert read_check(loaded({**CARD, "backend": "ROCm"})) == Engine("0.3.36", "rocm", ("a card",))
    shared = read_check(loaded({**CARD, "backend": "Vulkan", "kind": "igpu"}))
    assert isinstance(shared, Engine)
    assert shared.integrated_only


@pytest.mark.parametrize(
    ("finished", "reason"),
    [
        (Ended(-signal.SIGILL, ""), ILLEGAL),
        (Ended(0xC000001D, ""), ILLEGAL),  # Windows, as subprocess gives it
        (Ended(0xC000001D - 2**32, ""), ILLEGAL),  # and signed, as others do
        (Ended(-6, ""), "loading it ended by signal 6"),
        (Ended(0xC0000135, ""), "loading it ended with status 0xc0000135"),
        (
            Ended(1, '{"error": "RuntimeError: libcudart.so.12:\\n no such file"}'),
            "RuntimeError: libcudart.so.12: no such file",
        ),
        (Ended(None, ""), "it did not answer within 180 s"),
        (Ended(3, ""), "the check ended with status 3 and said nothing"),
        (Ended(0, "not JSON"), "the check ended with status 0 and said nothing"),
    ],
)
def test_every_way_to_fail_has_a_reason(finished: Ended, reason: str) -> None:
    assert read_check(finished) == reason


# --- a real child with a fake engine


def check_fake(tmp_path: Path, source: str) -> Ended:
    """Run install_check in a process that finds this `llama_cpp` before any other."""
    (tmp_path / "llama_cpp.py").write_text(source, encoding="utf-8")
    start = f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r}); runpy.run_path({str(LOADING)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-I", "-c", start], capture_output=True, text=True, timeout=120, check=False)
    return Ended(done.returncode, done.stdout)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_illegal_instruction_in_a_child(tmp_path: Path) -> None:
    done = check_fake(tmp_path, "import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    assert read_check(done) == ILLEGAL


def test_library_that_is_missing_in_a_child(tmp_path: Path) -> None:
    done = check_fake(tmp_path, "raise RuntimeError('libcudart.so.12: cannot open shared object file')\n")
    assert read_check(done) == "RuntimeError: libcudart.so.12: cannot open shared object file"


def test_engine_that_is_no_engine(tmp_path: Path) -> None:
    reason = read_check(check_fake(tmp_path, "print('hello')\n"))
    assert isinstance(reason, str)


def test_the_engine_of_this_environment() -> None:
    pytest.importorskip("llama_cpp")
    done = subprocess.run(
        [sys.executable, "-I", str(LOADING)], capture_output=True, text=True, timeout=300, check=False
    )
    engine = read_check(Ended(done.returncode, done.stdout))
    assert isinstance(engine, Engine), engine
    assert engine.version.startswith("0.3.")


# --- the attempts, with pip and the check played by the test


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (Ended(-signal.SIGSEGV, ""), "loading it ended by signal 11"),
        (Ended(1, '{"error": "ImportError: no such library"}'), "ImportError: no such library"),
    ],
)
def test_what_fails_its_check_is_removed_and_the_next_is_tried(
    failure: Ended, reason: str, venv: Path, said: list[str]
) -> None:
    played = Played([failure, loaded()])
    engine = installer(played, venv, said).install_engine(Decision(attempts=CPU_ATTEMPTS))

    assert engine.how == "wheel"
    assert played.verbs() == ["install", "install", "uninstall", "install", "install"]
    assert any(line.endswith(reason) for line in said)
    assert read_stamp(venv)["tried"] == ["compile cpu", "wheel cpu"]


def test_no_device_is_loud_and_tries_the_next(venv: Path, said: list[str]) -> None:
    attempts = (Attempt("cuda", "wheel", "cu125", "cuda12"), Attempt("cuda", "wheel", "cu124", "cuda12"), *CPU_ATTEMPTS)
    played = Played([loaded(), loaded()])
    engine = installer(played, venv, said).install_engine(Decision(attempts=attempts))

    assert engine.accel == "cpu"
    assert any("loads and finds no device for CUDA" in line for line in said)
    assert any(line.startswith("ATTENTION: no CUDA engine could be installed, going on with the CPU") for line in said)
    # cu124 needs what cu125 needed: another 500 MB would end the same way.
    assert not any("cu124" in word for command in played.commands for word in command)
    assert any("nvidia-cublas-cu12" in command for command in played.commands)


def test_cached_build_that_crashes_is_compiled_anew(venv: Path, said: list[str]) -> None:
    """pip's cache may be shared with a machine whose CPU can do more."""
    played = Played([Ended(-signal.SIGILL, ""), loaded()], pip_output=CACHED)
    engine = installer(played, venv, said).install_engine(Decision(attempts=CPU_ATTEMPTS))

    assert engine.how == "compile"
    compiling = [command for command in played.commands if "--no-deps" in command]
    assert ["--no-cache-dir" in command for command in compiling] == [False, True]


def test_compiling_an_accelerator_goes_past_the_cache(
    venv: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CMAKE_ARGS", "-DMINE=1")
    attempt = Attempt("cuda", "compile", cmake_args="-DGGML_CUDA=on", cached=False)
    played = Played([loaded(CARD)])
    engine = installer(played, venv, said).install_engine(Decision(attempts=(attempt,)))

    assert engine.devices == ("a card",)
    assert {"--no-cache-dir", "--no-binary"} <= set(played.commands[0])
    assert played.environments[0]["CMAKE_ARGS"] == "-DMINE=1 -DGGML_CUDA=on"
    assert "20 to 40 minutes" in said[0]


def test_users_cmake_args_keep_the_cache_out_for_the_cpu_too(
    venv: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    played = Played([loaded(), loaded()])
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    installer(played, venv, said).install_engine(Decision(attempts=CPU_ATTEMPTS))
    assert "--no-cache-dir" not in played.commands[0]
    played.commands.clear()
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_NATIVE=off")
    installer(played, venv, said).install_engine(Decision(attempts=CPU_ATTEMPTS))
    assert "--no-cache-dir" in played.commands[0]


def test_without_an_engine_the_project_is_not_installed(venv: Path, said: list[str]) -> None:
    played = Played([], failing="--force-reinstall")
    decision = Decision(attempts=CPU_ATTEMPTS, left_out=("something else is missing",))
    with pytest.raises(InstallError) as raised:
        carry_out(decision, installer(played, venv, said), None)

    message = str(raised.value)
    assert message.startswith("no engine could be installed. compile cpu: it does not build; wheel cpu: ")
    assert message.endswith("something else is missing")
    assert "\n" not in message
    assert not any("--editable" in command for command in played.commands)


def test_last_line_and_quick_second_run(venv: Path, said: list[str]) -> None:
    played = Played([loaded(CARD)])
    decision = Decision(attempts=(Attempt("cuda", "compile", cmake_args="-DGGML_CUDA=on", cached=False),))
    line = carry_out(decision, installer(played, venv, said), None)

    assert "0.3.36 for CUDA, 1 device (a card); next: " in line
    assert line.endswith("qwq-lite doctor")
    assert "--editable" in played.commands[-1]
    assert played.commands[-1][played.commands[-1].index("--only-binary") + 1] == "llama-cpp-python"

    # Now all is there: the command, the stamp, an engine that loads.
    venv_python(venv).with_name("qwq-lite.exe" if os.name == "nt" else "qwq-lite").touch()
    played.commands.clear()
    played.checks.append(loaded(CARD))
    again = installer(played, venv, said)
    present = again.look()
    assert present is not None
    assert (present.how, present.asked, present.tried) == ("compile", "auto", ("compile cuda",))
    carry_out(Decision(keep="kept"), again, present)
    assert said[-1] == "kept"
    assert played.commands == []

    # More extras: the project is installed again, the engine is not. Fewer: nothing is.
    more = Installer(ROOT, venv, "~=0.3.36", again.index, extras=("test", "check"), run=played, say=said.append)
    carry_out(Decision(keep="kept"), more, present)
    assert played.verbs() == ["install"]
    assert played.commands[0][-1].endswith("[check,test]")
    played.commands.clear()
    carry_out(Decision(keep="kept"), installer(played, venv, said), present)
    assert played.commands == []


def test_stamp_of_another_engine_does_not_count(venv: Path, said: list[str]) -> None:
    stamp = {"version": "0.3.36", "accel": "cuda", "how": "wheel", "asked": "cuda", "tried": []}
    (venv / STAMP).write_text(json.dumps(stamp), encoding="utf-8")
    assert installer(Played([loaded()]), venv, said).look() == Engine("0.3.36", "cpu")


def test_fatal_decision_starts_nothing(venv: Path, said: list[str]) -> None:
    played = Played([])
    with pytest.raises(InstallError, match=r"^no compiler$"):
        carry_out(Decision(fatal="no compiler"), installer(played, venv, said), None)
    assert played.commands == []


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("Collecting x\nERROR: No matching distribution found for x\n", "No matching distribution found for x"),
        (
            "error: subprocess-exited-with-error\n  /tmp/ggml.cpp:1:2: error: no avx\nERROR: Failed building wheel\n",
            "/tmp/ggml.cpp:1:2: error: no avx",
        ),
        ("  CMake Error at CMakeLists.txt:1:\nERROR: Failed building wheel\n", "CMake Error at CMakeLists.txt:1:"),
        ("cc1plus: fatal error: Killed signal\nERROR: Failed\n", "cc1plus: fatal error: Killed signal"),
        ("ERROR: Could not install packages: [Errno 28] No space left on device\n", "No space left on device"),
        ("ERROR: Exception:\nTraceback:\nReadTimeoutError: Read timed out.\n", "ReadTimeoutError: Read timed out."),
        ("", "pip said nothing"),
    ],
)
def test_the_line_that_says_why(output: str, reason: str) -> None:
    assert pip_reason(output).endswith(reason)


# --- the command line


FACTS = Facts(system="linux", machine="x86_64", python=(3, 11), requirement="~=0.3.36", compiler=None, manager="apt")


def test_failure_is_one_line_and_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install_cli, "probe", lambda _root, _venv: FACTS)
    assert install_cli.run(["--compile", "--venv", str(tmp_path / "venv")]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "install.py: compiling needs a C++ compiler, run: sudo apt install build-essential\n"
    assert not (tmp_path / "venv").exists()


def test_dry_run_prints_and_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install_cli, "probe", lambda _root, _venv: FACTS)
    assert install_cli.run(["--dry-run", "--venv", str(tmp_path / "venv")]) == 0
    said = capsys.readouterr()
    assert "attempt 1: wheel cpu" in said.out.splitlines()
    assert "compiler: none" in said.out.splitlines()
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("arguments", [["--accel", "tpu"], ["--extras", "a b"], ["--extras", "../x"], ["now"]])
def test_usage_errors_are_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        install_cli.run(arguments)
    assert raised.value.code == 2


def test_environment_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    def failing(command: Sequence[str], *, env: Mapping[str, str], log: Path | None) -> Ended:
        return Ended(1, "", "Error: no space\n")

    index = Index("http://example.invalid", "linux", "x86_64")
    with pytest.raises(InstallError, match=r"venv failed: Error: no space$"):
        Installer(ROOT, tmp_path / "venv", "~=0.3.36", index, run=failing, say=said.append).make_venv()
    monkeypatch.setattr(install_steps, "venv_python", lambda _venv: Path(sys.executable))
    with pytest.raises(InstallError, match=r"no pip in .* delete that folder"):
        Installer(ROOT, tmp_path / "venv", "~=0.3.36", index, run=failing, say=said.append).make_venv()


def test_environment_that_is_not_made_in_time(venv: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    """A part of one may be there: its Python, and no pip."""
    steps = Installer(ROOT, venv.with_name("other"), "~=0.3.36", Index("http://example.invalid", "linux", "x86_64"))
    steps.run = lambda _command, *, env, log: Ended(None, "")
    steps.say = said.append
    with pytest.raises(InstallError, match=r"failed: it did not end in time$"):
        steps.make_venv()
    monkeypatch.setattr(install_steps, "venv_python", lambda _venv: Path(sys.executable))
    with pytest.raises(InstallError, match=r"no pip in .* delete that folder"):
        steps.make_venv()
