"""engine_check: an engine that computes passes; wrong numbers, deaths and silence are found and located."""

from __future__ import annotations

import ast
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from qwq_lite.formats.tensor_types import TENSOR_TYPES
from qwq_lite.selftest import engine_check, engine_products
from qwq_lite.selftest.engine_check import Ended, Fault, Report, check, run_child
from tests.bad_engines import RET, UD2, broken_copy, only_x86_linux

PLAIN, REPACKED = "ggml_vec_dot_q4_K_q8_K", "ggml_gemv_q4_K_8x8_q8_K"


def run_with(libraries: Path | None = None) -> engine_check.Run:
    env = {**os.environ, **({"LLAMA_CPP_LIB_PATH": str(libraries)} if libraries else {})}
    return lambda arguments, timeout_s: run_child(
        [sys.executable, "-I", str(engine_check.CHILD), *arguments], timeout_s, env
    )


def product(type: str, buffer: str = "CPU", rows: int = 1, extra: bool = False) -> dict[str, object]:
    return {"device": "CPU", "buffer": buffer, "extra": extra, "type": type, "rows": rows}


def running(type: str, buffer: str = "CPU", extra: bool = False) -> str:
    return json.dumps({"running": product(type, buffer, extra=extra)}) + "\n"


def result(type: str, error: float | None, buffer: str = "CPU", extra: bool = False) -> str:
    return json.dumps({"result": {**product(type, buffer, extra=extra), "error": error}}) + "\n"


DONE = json.dumps({"done": True}) + "\n"


class Script:
    """Children that say what they are told to, one after the other."""

    def __init__(self, *children: Ended) -> None:
        self.children = list(children)
        self.asked: list[list[str]] = []

    def __call__(self, arguments: Sequence[str], timeout_s: float) -> Ended:
        self.asked.append(list(arguments))
        return self.children.pop(0)


# ---- the engine that is installed ----


def test_the_installed_engine_computes_every_type_in_its_plain_buffer() -> None:
    seen: list[Ended] = []

    def run(arguments: Sequence[str], timeout_s: float) -> Ended:
        seen.append(run_with()(arguments, timeout_s))
        return seen[-1]

    report = check(run)
    assert report.faults == () and report.could_not_run == "" and "CPU" in report.buffers
    results = [line["result"] for line in map(json.loads, seen[0].output.splitlines()) if "result" in line]
    plain = {(one["type"], one["rows"]) for one in results if one["buffer"] == "CPU"}
    assert plain == {(name, rows) for name in TENSOR_TYPES for rows in (1, 64)}
    assert max(one["error"] for one in results) < engine_check.MOST_ERROR / 3


def test_every_type_that_the_converter_offers_is_checked() -> None:
    assert set(engine_products.TYPES) == set(TENSOR_TYPES)
    assert {name: layout.id for name, layout in engine_products.TYPES.items()} == {
        name: int(kind) for name, kind in TENSOR_TYPES.items()
    }


def test_the_file_runs_by_its_own_path() -> None:
    done = run_child([sys.executable, "-I", engine_check.__file__], engine_check.TIMEOUT_S)
    assert json.loads(done.output.splitlines()[-1]) == {"done": True}


@pytest.mark.parametrize("module", [engine_check, engine_products])
def test_the_installer_can_import_the_files_without_dependencies(module: object) -> None:
    path = Path(str(module.__file__))  # type: ignore[attr-defined]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= {*sys.stdlib_module_names}


# ---- engines with one broken kernel ----


@only_x86_linux
@pytest.mark.parametrize(
    ("function", "code", "buffer", "extra", "kind", "what"),
    [
        pytest.param(PLAIN, RET, "CPU", False, "wrong", "wrong numbers", id="plain, wrong"),
        pytest.param(PLAIN, UD2, "CPU", False, "died", "died by SIGILL", id="plain, dies"),
        pytest.param(REPACKED, RET, "CPU_REPACK", True, "wrong", "wrong numbers", id="repacked, wrong"),
        pytest.param(REPACKED, UD2, "CPU_REPACK", True, "died", "died by SIGILL", id="repacked, dies"),
    ],
)
def test_one_broken_kernel_is_located(
    tmp_path: Path, function: str, code: bytes, buffer: str, extra: bool, kind: str, what: str
) -> None:
    report = check(run_with(broken_copy(tmp_path, {function: code})))
    assert report.could_not_run == ""
    found = {(fault.device, fault.buffer, fault.type, fault.extra, fault.kind) for fault in report.faults}
    assert found == {("CPU", buffer, "Q4_K", extra, kind)}
    assert report.faults[0].what.startswith(what)
    assert report.fails and report.extra_buffers_only is extra
    assert report.text() == f"{what} in buffer {buffer} of CPU: Q4_K"


@only_x86_linux
def test_faults_of_several_kinds_are_all_found(tmp_path: Path) -> None:
    broken = {PLAIN: UD2, "ggml_vec_dot_q6_K_q8_K": RET, "ggml_vec_dot_q8_0_q8_0": UD2, REPACKED: RET}
    report = check(run_with(broken_copy(tmp_path, broken)))
    found = {(fault.buffer, fault.type, fault.kind) for fault in report.faults}
    expected = {("CPU", "Q8_0", "died"), ("CPU", "Q4_K", "died"), ("CPU_REPACK", "Q4_K", "wrong")}
    assert found == expected  # after two deaths the rest of a buffer, Q6_K in it, is left out
    assert not report.extra_buffers_only


# ---- children of other kinds ----


def test_what_was_done_is_not_run_again_after_a_death() -> None:
    script = Script(Ended(-4, result("F32", 0.0) + running("Q4_0")), Ended(0, result("Q8_0", 0.0) + DONE))
    report = check(script, gpu=True)
    assert script.asked == [["--gpu"], ["--gpu", "--skip=CPU:CPU:F32", "--skip=CPU:CPU:Q4_0"]]
    assert report.faults == (Fault("CPU", "CPU", "Q4_0", 1, "died", "died by SIGILL", False, "SIGILL"),)
    assert report.buffers == ()


def test_a_buffer_in_which_two_types_die_is_given_up() -> None:
    script = Script(
        Ended(-4, result("F32", 0.0) + running("Q4_0", "AMX", True)),
        Ended(-4, running("Q4_K", "AMX", True)),
        Ended(0, result("Q4_0", 0.0, "CPU_REPACK", True) + DONE),
    )
    report = check(script)
    assert "--skip=CPU:AMX:*" in script.asked[2]
    assert report.text() == "died by SIGILL in buffer AMX of CPU: Q4_0, Q4_K"
    assert report.extra_buffers_only and report.buffers == ("CPU", "CPU_REPACK")


@pytest.mark.parametrize("error", [0.2, None])
def test_wrong_numbers_and_no_numbers_are_faults(error: float | None) -> None:
    report = check(Script(Ended(0, result("Q4_0", error) + DONE)))
    assert report.faults[0].kind == "wrong" and report.fails


def test_a_child_that_hangs_is_a_fault_that_stops_nothing() -> None:
    report = check(Script(Ended(None, running("Q4_0")), Ended(0, DONE)), timeout_s=7)
    assert report.faults[0].what == "no result within 7 s" and not report.fails


def test_a_hang_in_an_extra_buffer_is_reason_to_go_without_it() -> None:
    report = check(Script(Ended(None, running("Q4_0", "AMX", True)), Ended(None, running("Q4_0")), Ended(0, DONE)))
    assert [fault.kind for fault in report.faults] == ["hung", "hung"]
    assert report.fails and report.extra_buffers_only


@pytest.mark.parametrize(
    ("ended", "reason"),
    [
        pytest.param(Ended(-9, running("Q4_0")), "by SIGKILL", id="killed for memory"),
        pytest.param(Ended(-2, running("Q4_0")), "by SIGINT", id="Ctrl-C"),
        pytest.param(Ended(0xC000013A, running("Q4_0")), "status", id="Ctrl-C on Windows"),
        pytest.param(Ended(1, "", "no such file\n"), "with status 1: no such file", id="no interpreter"),
        pytest.param(Ended(1, json.dumps({"error": "No module named 'numpy'"})), "numpy", id="no numpy"),
        pytest.param(Ended(None, ""), "in time", id="does not load in time"),
        pytest.param(Ended(0, "hello\n[1]\n"), "with status 0", id="says nothing that counts"),
    ],
)
def test_a_check_that_cannot_run_says_why_and_blames_nothing(ended: Ended, reason: str) -> None:
    report = check(Script(ended))
    assert reason in report.could_not_run and report.faults == () and not report.fails


@pytest.mark.parametrize(("code", "name"), [(-4, "SIGILL"), (-11, "SIGSEGV"), (0xC000001D, "STATUS_ILLEGAL")])
def test_a_death_before_any_product_is_a_fault_of_the_library(code: int, name: str) -> None:
    report = check(Script(Ended(code, "")))
    assert name in report.text() and "while it was loaded" in report.text()
    assert report.fails and not report.extra_buffers_only and report.could_not_run == ""


def test_what_others_print_is_passed_over() -> None:
    assert check(Script(Ended(0, "a line of a sitecustomize\n" + result("F32", 0.0) + DONE))).buffers == ("CPU",)


def test_a_report_survives_json() -> None:
    report = check(Script(Ended(-4, running("Q4_0")), Ended(0, result("F32", 0.0) + DONE)))
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report
