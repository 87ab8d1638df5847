"""qwq-lite plan: what it prints, what it says in one line, and that the commands it advises work."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qwq_lite.backend.settings import KV_TYPES
from qwq_lite.cli import commands, console
from qwq_lite.plan import machines, planning
from qwq_lite.plan.run_plan import HOST_WEIGHTS
from qwq_lite.store import catalog
from tests.checkpoints import write_random_checkpoint
from tests.convert.broken import SHARD, change_json, remove

COMMAND = [sys.executable, "-c", "from qwq_lite.cli import main; main()"]
WAIT_S = 120
KEYS = {
    "model", "weight_type", "on", "choice", "sources", "devices", "mapped", "reclaimable", "decode_tok_s_estimate",
    "notices", "refused", "next_best", "faster", "raise_limit", "next",
}  # fmt: skip
COLUMNS = {"weights", "kv", "compute", "backend", "total", "limit", "free"}
CHOICES = {
    "n_ctx", "type_k", "type_v", "n_ubatch", "n_gpu_layers", "n_seq_max", "n_outputs_max", "load_mode", "repack",
    "no_host", "tensor_split",
}  # fmt: skip
QWQ_3090 = ("qwq-32b-preview", "--machine", "rtx-3090")


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str


class Runner:
    """The command line in this process: with --machine nothing of it needs llama.cpp."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str | Path, command: str = "plan") -> Done:
        self._monkeypatch.setattr(sys, "argv", ["qwq-lite", command, *map(str, arguments)])
        status = 0
        try:
            console.run(commands)
        except SystemExit as end:
            assert isinstance(end.code, int)
            status = end.code
        said = self._capsys.readouterr()
        return Done(status, said.out, said.err)

    def json(self, *arguments: str | Path) -> dict[str, Any]:
        done = self(*arguments, "--json")
        assert (done.status, done.err) == (0, "")
        found: dict[str, Any] = json.loads(done.out)
        return found


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(monkeypatch, capsys)


def assert_one_line(done: Done, status: int) -> str:
    assert done.status == status
    assert done.out == ""
    assert len(done.err.splitlines()) == 1
    assert done.err.startswith("qwq-lite: ")
    return done.err


# What it prints


def test_the_text_has_a_table_the_refusals_and_the_next_step(plan: Runner) -> None:
    done = plan(*QWQ_3090)
    assert (done.status, done.err) == (0, "")
    assert "\x1b" not in done.out
    lines = done.out.splitlines()
    assert "qwq-32b-preview, Q4_K_M" in lines[0]
    assert "32,768 tokens, q8_0 KV" in lines[1]
    (head,) = (line for line in lines if "weights" in line)
    assert re.findall(r"\w+", head) == ["GiB", "weights", "kv", "compute", "backend", "total", "limit", "free"]
    (gpu,), (host,) = ([line for line in lines if re.match(rf"\W*{name} ", line)] for name in ("CUDA0", "CPU"))
    for row in (gpu, host):
        weights, kv, compute, backend, total, limit, free = map(float, re.findall(r"-?\d+\.\d\d", row))
        assert total == pytest.approx(weights + kv + compute + backend, abs=0.03)
        assert free == pytest.approx(limit - total, abs=0.02)
        assert free >= 0
    assert any(line.startswith("Refused: ") and "f16" in line and "GiB too much for CUDA0" in line for line in lines)
    assert any(line.startswith("Also fits: ") for line in lines)
    assert any(line.startswith("Estimate: ") and "tok/s" in line for line in lines)
    fetch, convert, chat = lines[-3:]
    assert fetch.startswith("Next: hf download ")
    assert convert.startswith("then: qwq-lite convert ")
    assert "-q Q4_K_M" in convert
    assert chat.startswith("then: qwq-lite chat QwQ-32B-Preview-Q4_K_M.gguf --ctx 32768 ")


def test_it_runs_as_a_process_and_prints_nothing_but_text() -> None:
    done = subprocess.run(
        [*COMMAND, "plan", *QWQ_3090], capture_output=True, encoding="utf-8", timeout=WAIT_S, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "Next: " in done.stdout


def test_a_slow_machine_is_warned_of_first(plan: Runner) -> None:
    done = plan("qwq-32b", "--machine", "rtx-3090", "--gpu-layers", "0", "--ctx", "16384", "--type-k", "q8_0")
    assert done.status == 0
    assert "Slow: " not in done.out  # 3.8 tok/s: 7 minutes for a typical answer
    slower = plan("qwq-32b", "-q", "Q8_0", "--machine", "desktop-64gb")
    first, second = slower.out.splitlines()[:2]
    assert re.match(r"Slow: about \d\.\d tok/s by .*; a typical answer \(1,700 tokens\) takes \d+\.\d minutes, ", first)
    assert second.startswith("Faster: ")
    assert "Estimate: " not in slower.out
    arguments = shlex.split(second.split("qwq-lite plan ")[1])
    faster = plan(*arguments)
    assert (faster.status, faster.err) == (0, "")
    assert "Slow: " not in faster.out
    assert plan.json("qwq-32b", "-q", "Q8_0", "--machine", "desktop-64gb")["faster"] == arguments[0]


@pytest.mark.parametrize(
    ("arguments", "lead"),
    [
        (("qwq-32b", "--machine", "rtx-3090"), "Estimate"),
        (("qwq-32b", "--machine", "rtx-3090", "--gpu-layers", "0", "--type-k", "q8_0"), "Estimate"),
        (("qwq-32b", "-q", "Q8_0", "--machine", "desktop-64gb"), "Slow"),
    ],
)
def test_the_speed_is_said_once_with_what_answers_take(arguments: tuple[str, ...], lead: str, plan: Runner) -> None:
    said = [line for line in plan(*arguments).out.splitlines() if "tok/s" in line]
    form = (
        rf"{lead}: about (\d+\.\d) tok/s by the memory's bandwidth; a typical answer \(1,700 tokens\) takes (\d+\.\d) minutes,"
        r" a long one \(4,400\) (\d+\.\d) minutes"
    )
    (match,) = (re.fullmatch(form, line) for line in said)
    assert match is not None
    speed, typical, long = map(float, match.groups())
    estimate = plan.json(*arguments)["decode_tok_s_estimate"]
    assert speed == pytest.approx(estimate, abs=0.06)
    assert typical == pytest.approx(1_700 / estimate / 60, abs=0.1)
    assert long == pytest.approx(4_400 / estimate / 60, abs=0.15)
    assert (lead == "Slow") == (typical > 10)


def test_the_faster_model_is_for_what_was_given(plan: Runner) -> None:
    asked = ("--machine", "desktop-64gb", "--reserve", "1GiB", "--ctx", "16384", "--host-weights", "no-repack")
    second = plan("qwq-32b", "-q", "Q8_0", *asked).out.splitlines()[1]
    arguments = shlex.split(second.split("qwq-lite plan ")[1])
    assert sorted(arguments[1:]) == sorted(asked)
    choice = plan.json(*arguments)["choice"]
    assert (choice["n_ctx"], choice["repack"]) == (16_384, False)


def test_a_smaller_weight_type_of_the_same_model_is_faster_too(plan: Runner) -> None:
    second = plan("qwq-32b-preview", "-q", "Q8_0", "--machine", "desktop-64gb").out.splitlines()[1]
    assert second.startswith("Faster: ")
    assert "nothing known" not in second
    assert "Slow: " not in plan(*shlex.split(second.split("qwq-lite plan ")[1])).out


@pytest.mark.parametrize("machine", ["rtx-3090", "rtx-3060-12gb", "2x-rtx-3060-12gb", "m3-max-36gb", "laptop-32gb"])
def test_json_has_its_keys_and_adds_up(machine: str, plan: Runner) -> None:
    found = plan.json("qwq-32b-preview", "--machine", machine)
    assert found.keys() >= KEYS
    assert isinstance(found["next"], list)
    assert isinstance(found["notices"], list)
    assert found["choice"].keys() >= CHOICES
    assert (found["model"], found["weight_type"]) == ("qwq-32b-preview", "Q4_K_M")
    assert "by table" in found["on"]
    for row in found["devices"].values():
        assert row.keys() == COLUMNS
        assert all(isinstance(value, int) for value in row.values())
        assert row["total"] == row["weights"] + row["kv"] + row["compute"] + row["backend"]
        assert row["free"] == row["limit"] - row["total"] >= 0
    assert sum(row["weights"] for row in found["devices"].values()) == pytest.approx(19.85e9, rel=0.001)
    host, n_gpus = found["devices"]["CPU"], len(found["devices"]) - 1
    assert 0 <= found["mapped"] + found["reclaimable"] <= host["weights"]
    assert host["backend"] > 0
    assert len(found["choice"]["tensor_split"]) == (n_gpus if n_gpus > 1 else 0)
    assert found["decode_tok_s_estimate"] > 0
    assert all(isinstance(line, str) for line in (*found["refused"], *found["next_best"], *found["next"]))
    assert found["notices"] == [] or found["choice"]["n_gpu_layers"] < 65


@pytest.mark.parametrize(
    ("arguments", "backend", "limit"),
    [
        (("--machine", "rtx-3090"), "table", "table"),
        (("--machine", "rtx-3090", "--memory", "23GiB"), "table", "given"),
        (("--machine", "rtx-3090", "--gpu-layers", "0"), "formula", "table"),
        (("--machine", "laptop-32gb"), "formula", "table"),
        (("--machine", "laptop-32gb", "--memory", "30GiB"), "formula", "given"),
    ],
)
def test_every_column_says_where_its_figures_come_from(
    arguments: tuple[str, ...], backend: str, limit: str, plan: Runner
) -> None:
    sources = plan.json("qwq-32b-preview", *arguments)["sources"]
    assert sources == {
        **dict.fromkeys(("weights", "kv", "compute"), "formula"),
        "backend": backend,
        "total": "sum",
        "limit": limit,
        "free": "rest",
    }
    lines = plan("qwq-32b-preview", *arguments).out.splitlines()
    (row,) = (line for line in lines if re.match(r"\W*source ", line))
    (head,) = (line for line in lines if re.match(r"\W*GiB ", line))
    assert dict(zip(re.findall(r"\w+", head)[1:], re.findall(r"\w+", row)[1:], strict=True)) == sources


def test_a_macs_limit_that_can_be_raised_is_said_with_the_command(plan: Runner) -> None:
    command = "sudo sysctl iogpu.wired_limit_mb=24576"
    assert plan.json("qwq-32b-preview", "--machine", "m2-pro-32gb")["raise_limit"] == command
    assert f": {command}\n" in plan("qwq-32b-preview", "--machine", "m2-pro-32gb").out
    assert plan.json("qwq-32b-preview", "--machine", "m3-max-36gb")["raise_limit"] is None
    assert "sysctl" not in plan("qwq-32b-preview", "--machine", "m3-max-36gb").out


def test_a_wish_with_a_catch_is_granted_with_a_note(plan: Runner) -> None:
    done = plan("qwq-32b-preview", "--machine", "desktop-64gb", "--ctx", "40960", "--gpu-layers", "5", "--json")
    assert done.status == 0
    assert json.loads(done.out)["choice"]["n_ctx"] == 40_960
    trained, layers = done.err.splitlines()
    assert "32,768" in trained
    assert "--gpu-layers" in layers


def test_text_and_json_say_the_same(plan: Runner) -> None:
    found, lines = plan.json(*QWQ_3090), plan(*QWQ_3090).out.splitlines()
    assert [line.removeprefix("Refused: ") for line in lines if line.startswith("Refused: ")] == found["refused"]
    assert [line.removeprefix("Also fits: ") for line in lines if line.startswith("Also fits: ")] == found["next_best"]
    first, *more = found["next"]
    assert lines[-len(found["next"]) :] == [f"Next: {first}", *(f"then: {command}" for command in more)]


# What the user gives


def test_what_is_given_is_what_is_planned(plan: Runner) -> None:
    asked = ("--ctx", "5000", "--type-k", "Q8_0", "--type-v", "q4_0", "--gpu-layers", "40", "-q", "q4_k_m")
    done = plan(*QWQ_3090, *asked, "--json")
    (notice,) = json.loads(done.out)["notices"]
    assert done.err == f"{notice}\n"
    assert "unequal K and V" in notice
    choice = json.loads(done.out)["choice"]
    assert [choice[name] for name in ("n_ctx", "type_k", "type_v", "n_gpu_layers")] == [5000, "q8_0", "q4_0", 40]


@pytest.mark.parametrize(
    ("machine", "types", "said"),
    [
        ("rtx-3090", ("q8_0", "q4_0"), True),
        ("2x-rtx-3060-12gb", ("q8_0", "q4_0"), True),
        ("rtx-3090", ("q8_0", "q8_0"), False),
        ("m3-max-36gb", ("q8_0", "q4_0"), False),
        ("laptop-32gb", ("q8_0", "q4_0"), False),
    ],
)
@pytest.mark.parametrize("json_option", [(), ("--json",)])
def test_unequal_k_and_v_on_cuda_are_noted_on_standard_error(
    machine: str, types: tuple[str, str], said: bool, json_option: tuple[str, ...], plan: Runner
) -> None:
    asked = ("deepseek-r1-distill-qwen-7b", "--machine", machine, "--type-k", types[0], "--type-v", types[1])
    done = plan(*asked, *json_option)
    assert done.status == 0
    assert len(done.err.splitlines()) == int(said)
    assert ("unequal K and V (--type-k, --type-v) on the CPU" in done.err) == said
    assert ("unequal K and V" in done.out) == (said and json_option != ())


@pytest.mark.parametrize(("option", "name"), [("--type-k", "q8_0"), ("--type-v", "q4_0")])
def test_one_cache_type_is_that_of_both(option: str, name: str, plan: Runner) -> None:
    choice = plan.json(*QWQ_3090, option, name)["choice"]
    assert (choice["type_k"], choice["type_v"]) == (name, name)


def test_a_larger_weight_type_falls_to_the_next_that_fits(plan: Runner) -> None:
    done = plan("deepseek-r1-distill-qwen-7b", "-q", "F16", "--machine", "laptop-16gb", "--json")
    assert done.err == "F16 does not fit; this is Q8_0\n"
    found = json.loads(done.out)
    assert found["notices"] == ["F16 does not fit; this is Q8_0"]
    assert found["weight_type"] == "Q8_0"
    assert found["refused"][0].startswith("F16")


@pytest.mark.parametrize(("memory", "limit"), [("24GiB", 24 << 30), ("24gb", 24 * 10**9), ("22.5 GiB", 45 << 29)])
def test_a_budget_is_the_gpus(memory: str, limit: int, plan: Runner) -> None:
    found = plan.json(*QWQ_3090, "--memory", memory)
    assert found["devices"]["CUDA0"]["limit"] == limit
    assert plan.json(*QWQ_3090, "--memory", memory, "--reserve", "1GiB")["devices"]["CUDA0"]["limit"] == limit - (
        1 << 30
    )


def test_a_budget_is_the_hosts_where_there_is_no_gpu(plan: Runner) -> None:
    found = plan.json("qwq-32b", "--machine", "laptop-16gb", "--memory", "30GiB", "--reserve", "512MiB")
    assert found["devices"]["CPU"]["limit"] == (59 << 29)


@pytest.mark.parametrize("name", ["--memory", "--reserve"])
@pytest.mark.parametrize("text", ["much", "24", "22.5", "00", "24i", "-5", "24 TiB", "1e9", "24GiB!", "nan"])
def test_a_budget_that_is_no_size_is_one_line_with_an_example(name: str, text: str, plan: Runner) -> None:
    said = assert_one_line(plan(*QWQ_3090, f"{name}={text}"), 2)
    assert "a number with a unit" in said
    assert name in said
    assert repr(text) in said
    assert "24GiB" in said


def test_a_budget_beyond_any_number_is_one_line(plan: Runner) -> None:
    assert_one_line(plan(*QWQ_3090, "--memory", "9" * 400 + "GiB"), 2)


def test_an_unknown_machine_is_one_line_with_the_names(plan: Runner) -> None:
    said = assert_one_line(plan("qwq-32b", "--machine", "rtx-9999"), 2)
    assert "'rtx-9999'" in said
    assert all(machine.name in said for machine in machines.MACHINES)


def test_a_smaller_type_that_would_be_all_on_the_gpu_is_named(plan: Runner) -> None:
    done = plan("qwq-32b", "-q", "Q6_K", "--machine", "rtx-3090", "--json")
    assert done.status == 0
    assert json.loads(done.out)["choice"]["n_gpu_layers"] < 65
    (notice,) = json.loads(done.out)["notices"]
    assert done.err == f"{notice}\n"
    assert notice.startswith("Q4_K_M (-q Q4_K_M) would be all on the GPU: 32,768 tokens, q8_0 KV, 65/65 layers")
    assert plan.json("qwq-32b", "-q", "Q4_K_M", "--machine", "rtx-3090")["choice"]["n_gpu_layers"] == 65


def test_a_type_that_does_not_fit_and_a_smaller_one_on_the_gpu_are_both_named(plan: Runner) -> None:
    done = plan("qwq-32b", "-q", "F16", "--machine", "rtx-3090")
    assert done.status == 0
    other, smaller = done.err.splitlines()
    assert re.fullmatch(r"F16 does not fit; this is Q\w+", other)
    assert smaller.startswith("Q4_K_M (-q Q4_K_M) would be all on the GPU: ")
    assert other not in done.out


def test_layers_that_were_asked_for_are_no_reason_to_name_a_smaller_type(plan: Runner) -> None:
    assert plan.json("qwq-32b", "-q", "Q6_K", "--machine", "rtx-3090", "--gpu-layers", "20")["notices"] == []


def test_a_repository_is_a_name_too(plan: Runner) -> None:
    assert plan.json("Qwen/QwQ-32B", "--machine", "rtx-3090")["choice"]["n_ctx"] == 32_768
    for name in catalog.GEOMETRIES:
        repository = catalog.geometry(name)[0].repository
        by_repository = plan.json(repository, "--machine", "rtx-3090")
        assert by_repository["model"] == repository
        assert by_repository == {**plan.json(name, "--machine", "rtx-3090"), "model": repository}


@pytest.mark.parametrize("name", ["missing.gguf", "missing.GGUF", "missing/model.gguf", "/missing/model"])
def test_a_file_that_is_not_there_is_said_to_be_so(name: str, plan: Runner) -> None:
    assert f"{name}: there is no such file" in assert_one_line(plan(name, "--machine", "rtx-3090"), 1)


def test_a_folder_without_a_config_is_said_to_be_none(tmp_path: Path, plan: Runner) -> None:
    said = assert_one_line(plan(tmp_path, "--machine", "rtx-3090"), 1)
    assert f"{tmp_path}: has no config.json" in said


def test_a_size_needs_a_unit_but_for_nothing(plan: Runner) -> None:
    said = assert_one_line(plan(*QWQ_3090, "--memory", "24"), 2)
    assert "--memory is '24'" in said
    assert "24GiB" in said
    assert plan.json(*QWQ_3090, "--reserve", "0") == plan.json(*QWQ_3090)


@pytest.mark.parametrize("nothing", ["0", "0GiB"])
def test_a_budget_of_nothing_is_one(nothing: str, plan: Runner) -> None:
    found = plan.json(*QWQ_3090, "--memory", nothing)
    assert found["choice"]["n_gpu_layers"] == 0
    assert found["sources"]["limit"] == "given"
    said = assert_one_line(plan("qwq-32b", "--machine", "laptop-16gb", "--memory", nothing), 1)
    assert "GiB too much for the host" in said


@pytest.mark.parametrize("model", ["qwq-33b", "Qwen/QwQ-33B"])
def test_an_unknown_model_is_one_line_with_the_names(model: str, plan: Runner) -> None:
    said = assert_one_line(plan(model, "--machine", "rtx-3090"), 2)
    assert repr(model) in said
    assert all(name in said for name in catalog.GEOMETRIES)


@pytest.mark.parametrize("option", ["--type-k", "--type-v"])
def test_an_unknown_cache_type_is_one_line_with_the_names(option: str, plan: Runner) -> None:
    said = assert_one_line(plan(*QWQ_3090, option, "f17"), 2)
    assert f"({option}) is 'f17'" in said
    assert all(name in said for name in KV_TYPES)


def test_an_unknown_weight_type_is_one_line_with_the_names(plan: Runner) -> None:
    said = assert_one_line(plan(*QWQ_3090, "-q", "Q9"), 2)
    assert "'Q9'" in said
    assert "Q4_K_M" in said


@pytest.mark.parametrize("name", HOST_WEIGHTS)
def test_host_weights_lie_where_they_are_wished(name: str, plan: Runner) -> None:
    found = plan.json("qwq-32b-preview", "--machine", "laptop-32gb", "--host-weights", name.upper())
    assert {key: found["choice"][key] for key in HOST_WEIGHTS[name]} == HOST_WEIGHTS[name]
    assert (found["mapped"] + found["reclaimable"] > 0) == (name in ("mmap", "no-repack"))
    assert (found["reclaimable"] > 0) == (name == "mmap")


def test_unknown_host_weights_are_one_line_with_the_names(plan: Runner) -> None:
    said = assert_one_line(plan(*QWQ_3090, "--host-weights", "disk"), 2)
    assert "'disk'" in said
    assert all(name in said for name in HOST_WEIGHTS)


def test_an_empty_model_is_one_line(plan: Runner) -> None:
    assert "MODEL is empty" in assert_one_line(plan("", "--machine", "rtx-3090"), 2)


def test_threads_change_nothing_for_a_known_machine(plan: Runner) -> None:
    plain = plan.json(*QWQ_3090)
    for n_threads in (1, 512):
        done = plan(*QWQ_3090, "--threads", str(n_threads), "--json")
        found = json.loads(done.out)
        (notice,) = found.pop("notices")
        assert notice.startswith("n_threads (--threads) is ignored")
        assert notice in done.err
        assert found == {key: value for key, value in plain.items() if key != "notices"}


@pytest.mark.parametrize(
    "option",
    [
        ("--ctx", "255"),
        ("--ctx", "many"),
        ("--gpu-layers", "-2"),
        ("--threads", "0"),
        ("--threads", "513"),
        ("--threads", "all"),
    ],
)
def test_a_number_out_of_range_is_usage(option: tuple[str, str], plan: Runner) -> None:
    done = plan(*QWQ_3090, *option)
    assert (done.status, done.out) == (2, "")
    assert option[0] in done.err


# Nothing fits


def advised(said: str) -> list[str]:
    """The arguments of the command after "what fits:"."""
    words = shlex.split(said.split("what fits: ")[1])
    assert words[:2] == ["qwq-lite", "plan"]
    return words[2:]


@pytest.mark.parametrize("machine", ["laptop-16gb", "m1-16gb"])
def test_nothing_fits_is_one_line_with_a_command_that_works(machine: str, plan: Runner) -> None:
    said = assert_one_line(plan("qwq-32b", "--machine", machine), 1)
    assert "GiB too much for " in said
    arguments = advised(said)
    assert machine in arguments
    done = plan(*arguments)
    assert (done.status, done.err) == (0, "")


def test_a_machine_for_which_nothing_is_small_enough_gets_no_command(plan: Runner) -> None:
    said = assert_one_line(plan("qwq-32b", "--machine", "laptop-16gb", "--memory", "512MiB"), 1)
    assert "GiB too much for the host" in said
    assert "what fits" not in said


@pytest.mark.parametrize("budget", [("--memory", "6GiB"), ("--reserve", "6GiB")])
def test_the_command_that_works_is_for_the_same_budget(budget: tuple[str, str], plan: Runner) -> None:
    arguments = advised(assert_one_line(plan("qwq-32b", "--machine", "laptop-16gb", *budget), 1))
    assert list(budget) == arguments[-2:] or f"{budget[0]}={budget[1]}" in arguments
    assert plan(*arguments).status == 0


def test_what_fits_is_not_what_did_not(plan: Runner) -> None:
    arguments = advised(assert_one_line(plan("qwq-32b-preview", "--machine", "laptop-32gb", "--ctx", "131072"), 1))
    assert "qwq-32b-preview" not in arguments or "--ctx" in arguments


# Folders and files


def test_a_checkpoint_is_planned_without_its_weights(tmp_path: Path, plan: Runner) -> None:
    folder = write_random_checkpoint(tmp_path / "model")
    before = plan.json(folder, "--machine", "rtx-3090")
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    assert plan.json(folder, "--machine", "rtx-3090") == before
    assert before["model"] == str(folder)
    assert before["choice"]["n_ctx"] == 4096
    assert before["choice"]["n_gpu_layers"] == 3


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights that are quantized": (
        change_json("config.json", quantization_config={"quant_method": "awq"}),
        "(AWQ)",
    ),
    "code of its own": (change_json("config.json", auto_map={"AutoModelForCausalLM": "a.B"}), "auto_map"),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer.json"),
    "a shard that is missing": (remove(SHARD), SHARD),
    "settings that are none": (change_json("generation_config.json", temperature="hot"), "temperature"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_convert_would_refuse_is_said(case: str, tmp_path: Path, plan: Runner) -> None:
    folder = write_random_checkpoint(tmp_path / "model")
    change, words = REFUSED[case]
    change(folder)
    done = plan(folder, "--machine", "rtx-3090", "--json")
    (notice,) = json.loads(done.out)["notices"]
    assert notice.startswith("convert will refuse this folder: ") and words in notice
    assert (done.status, done.err) == (0, notice + "\n")
    refused = plan(folder, "-q", "Q8_0", "-o", tmp_path / "out.gguf", command="convert")
    assert refused.err == f"qwq-lite: {notice.partition('folder: ')[2]}\n", "in the same words"


def test_a_signal_leaves_no_temporary_file(tmp_path: Path, plan: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(*_: object, **__: object) -> None:
        with tempfile.TemporaryDirectory(dir=tmp_path):
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL, "it would end the tests"
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(planning, "plan_model", ended)
    assert plan("qwq-32b", "--machine", "rtx-3090") == Done(128 + signal.SIGTERM, "", "")
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_without_weights_config_json_is_asked_alone(tmp_path: Path, plan: Runner) -> None:
    folder = write_random_checkpoint(tmp_path / "model")
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    assert plan.json(folder, "--machine", "rtx-3090")["notices"] == []
    change_json("config.json", quantization_config={"quant_method": "gptq"})(folder)
    assert "(GPTQ)" in plan(folder, "--machine", "rtx-3090").err


def test_the_next_step_of_a_folder_names_the_folder(tmp_path: Path, plan: Runner) -> None:
    folder = write_random_checkpoint(tmp_path / "my model")
    convert, chat = plan.json(folder, "--machine", "rtx-3090")["next"]
    assert shlex.split(convert) == ["qwq-lite", "convert", str(folder), "-q", "Q4_K_M"]
    assert shlex.split(chat)[:3] == ["qwq-lite", "chat", "my model-Q4_K_M.gguf"]


@pytest.mark.parametrize("name", ["qwq-32b-preview", "QwQ-32B", "deepseek-r1-distill-qwen-7b"])
def test_the_next_step_of_a_name_fetches_its_repository(name: str, plan: Runner) -> None:
    repository = catalog.geometry(name)[0].repository
    folder = repository.rpartition("/")[2]
    fetch, convert, chat = plan.json(name, "--machine", "rtx-3090")["next"]
    assert shlex.split(chat)[:3] == ["qwq-lite", "chat", f"{folder}-Q4_K_M.gguf"]
    assert shlex.split(fetch) == ["hf", "download", repository, "--local-dir", folder]
    assert shlex.split(convert) == ["qwq-lite", "convert", folder, "-q", "Q4_K_M"]


def weights(found: dict[str, Any]) -> int:
    return sum(row["weights"] for row in found["devices"].values())


def test_a_tied_checkpoint_has_one_table_less(tmp_path: Path, plan: Runner) -> None:
    """The index decides where there is one, config.json where there is none: llama.cpp keeps an lm_head that exists."""
    sizes = {}
    for name, tied, shards, says in (
        ("untied", False, 2, False),
        ("untied, one file", False, 1, False),
        ("tied", True, 2, True),
        ("tied, one file", True, 1, True),
        ("says tied, has lm_head", False, 2, True),
    ):
        folder = write_random_checkpoint(
            tmp_path / name, tied=tied, shards=shards, overrides={"tie_word_embeddings": says}
        )
        sizes[name] = weights(plan.json(folder, "-q", "F16", "--machine", "laptop-16gb"))
    untied, tied_size = sizes["untied"], sizes["tied"]
    assert untied - tied_size == 320 * 256 * 2
    assert sizes == {
        "untied": untied,
        "untied, one file": untied,
        "tied": tied_size,
        "tied, one file": tied_size,
        "says tied, has lm_head": untied,
    }


def test_a_tied_checkpoint_has_its_table_on_the_gpu_and_on_the_host(tmp_path: Path, plan: Runner) -> None:
    untied, tied = (
        plan.json(write_random_checkpoint(tmp_path / str(tied), tied=tied), "-q", "F16", "--machine", "rtx-3090")
        for tied in (False, True)
    )
    assert weights(untied) == weights(tied)
    assert untied["devices"]["CUDA0"]["weights"] == tied["devices"]["CUDA0"]["weights"]
    assert tied["decode_tok_s_estimate"] == pytest.approx(untied["decode_tok_s_estimate"], rel=0.01)


def test_a_checkpoint_takes_what_its_file_will(tiny_gguf: Path, tmp_path: Path, plan: Runner) -> None:
    folder = write_random_checkpoint(tmp_path / "model")
    by_folder = plan.json(folder, "-q", "F16", "--machine", "rtx-3090")
    by_file = plan.json(tiny_gguf, "--machine", "rtx-3090")
    assert by_file["devices"] == by_folder["devices"]
    assert by_file["choice"] == by_folder["choice"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", "{}"),
        ("model.safetensors.index.json", "{"),
        ("model.safetensors.index.json", "[]"),
        ("model.safetensors.index.json", "{}"),
        pytest.param(
            "model.safetensors.index.json",
            '{"weight_map": 5}',
        ),
    ],
)
def test_a_damaged_checkpoint_is_one_line(name: str, content: str, tmp_path: Path, plan: Runner) -> None:
    folder = write_random_checkpoint(tmp_path / "model")
    (folder / name).write_text(content, "utf-8")
    assert str(folder) in assert_one_line(plan(folder, "--machine", "rtx-3090"), 1)


def test_a_checkpoint_of_another_family_is_one_line(tmp_path: Path, plan: Runner) -> None:
    other = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    folder = write_random_checkpoint(tmp_path / "model", overrides=other)
    assert_one_line(plan(folder, "--machine", "rtx-3090"), 1)


def test_an_empty_folder_is_one_line(tmp_path: Path, plan: Runner) -> None:
    assert str(tmp_path) in assert_one_line(plan(tmp_path, "--machine", "rtx-3090"), 1)


def test_a_file_has_its_weight_type(tiny_gguf: Path, plan: Runner) -> None:
    said = assert_one_line(plan(tiny_gguf, "-q", "Q4_K_M", "--machine", "rtx-3090"), 2)
    assert str(tiny_gguf) in said
    assert "-q" in said


def test_a_file_is_named_without_a_weight_type_and_its_next_step_is_a_chat(tiny_gguf: Path, plan: Runner) -> None:
    found, lines = (
        plan.json(tiny_gguf, "--machine", "rtx-3090"),
        plan(tiny_gguf, "--machine", "rtx-3090").out.splitlines(),
    )
    assert found["weight_type"] is None
    assert found["notices"] == []
    assert lines[0].startswith(f"{tiny_gguf}, on ")
    (command,) = found["next"]
    assert lines[-1] == f"Next: {command}"
    assert not any(line.startswith("then: ") for line in lines)
    assert shlex.split(command)[:3] == ["qwq-lite", "chat", str(tiny_gguf)]


def test_a_damaged_file_is_one_line(tmp_path: Path, plan: Runner) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 100)
    assert str(path) in assert_one_line(plan(path, "--machine", "rtx-3090"), 1)


def test_the_next_step_of_a_file_is_a_chat_that_works(tiny_gguf: Path) -> None:
    """On this machine: llama.cpp's own count, and a command that takes what was planned."""
    done = subprocess.run(
        [*COMMAND, "plan", str(tiny_gguf), "--json"], capture_output=True, encoding="utf-8", timeout=WAIT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["sources"]["weights"] in ("measured", "formula")
    assert found["sources"]["limit"] == "measured"
    assert all(row["free"] >= 0 for row in found["devices"].values())
    (command,) = found["next"]
    assert found["weight_type"] is None
    words = shlex.split(command)
    assert words[:2] == ["qwq-lite", "chat"]
    ran = subprocess.run(
        [*COMMAND, *words[1:], "-p", "Hi", "-n", "2", "--seed", "1", "--thought-style", "none"],
        capture_output=True,
        encoding="utf-8",
        timeout=WAIT_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


def test_the_next_step_survives_a_path_with_a_space(tiny_gguf: Path, tmp_path: Path, plan: Runner) -> None:
    path = tmp_path / "my model.gguf"
    shutil.copyfile(tiny_gguf, path)
    (command,) = plan.json(path, "--machine", "rtx-3090")["next"]
    assert str(path) in shlex.split(command)


@pytest.mark.parametrize("name", HOST_WEIGHTS)
def test_the_next_step_of_a_file_says_where_host_weights_lie(name: str, tiny_gguf: Path, plan: Runner) -> None:
    (command,) = plan.json(tiny_gguf, "--machine", "rtx-3090", "--host-weights", name)["next"]
    words = shlex.split(command)
    if name == "mmap":
        assert "--host-weights" not in words
    else:
        assert words[-2:] == ["--host-weights", name]


def test_a_context_above_32_bits_is_not_planned_as_a_short_one(tiny_gguf: Path, plan: Runner) -> None:
    done = plan(tiny_gguf, "--ctx", str((1 << 32) + 256))
    assert done.status in (1, 2)
