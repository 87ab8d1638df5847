"""qwq-lite doctor: what this installation can do, and the command that mends what it cannot."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import sys
from pathlib import Path

import click

from qwq_lite._version import __version__
from qwq_lite.backend.hardware import EngineReport
from qwq_lite.cli import console, diagnosis
from qwq_lite.errors import EngineError
from qwq_lite.selftest import kept_result
from qwq_lite.selftest.engine_check import Report
from qwq_lite.system.units import GIB


@click.command(cls=console.Command)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def command(as_json: bool) -> None:
    """Say what this installation can do, and what is wrong with it.

    Every device that llama.cpp uses computes a few matrix products, which are compared with what they should be. Each thing
    that is wrong comes with the one command that mends it. Exit status 1 when something is an error.
    """
    from qwq_lite.backend.devices import report_from_child

    engine, check, failure = None, None, ""
    try:
        engine = report_from_child()
        check = kept_result.check_again(gpu=bool(engine.gpus))
    except EngineError as error:
        failure = str(error)
    machine = diagnosis.look(Path())
    found = diagnosis.findings(machine, engine, failure, check)
    if as_json:
        click.echo(json.dumps(_as_json(machine, engine, check, found)))
    else:
        _print_text(machine, engine, check, found)
    if any(finding.level == "error" for finding in found):
        raise click.exceptions.Exit(1)


def _engine_package() -> str:
    try:
        return importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _memory_bytes() -> tuple[int, int]:
    """What this process could have at most, and what it can still take."""
    from qwq_lite.system import process_limits

    return process_limits.total_memory_bytes(), process_limits.available_memory_bytes()


def _print_text(
    machine: diagnosis.HostHardware, engine: EngineReport | None, check: Report | None, found: list[diagnosis.Finding]
) -> None:
    total, available = _memory_bytes()
    rows = [
        ("qwq-lite", __version__),
        ("Python", f"{platform.python_version()} ({sys.executable})"),
        ("llama-cpp-python", _engine_package()),
        ("llama.cpp", engine.version if engine else "does not load"),
        ("GPU offload", "yes" if engine and engine.gpus else "no"),
    ]
    for device in engine.devices if engine else ():
        free = available if device.kind == "cpu" else device.free_bytes
        rows.append((device.name, f"{device.description}: {free / GIB:.1f} of {device.total_bytes / GIB:.1f} GiB free"))
    rows += [
        ("products", _products(check)),
        ("CPU features", ", ".join(engine.features) if engine else "unknown"),
        ("memory", f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"),
        ("disk", f"{machine.free_disk_bytes / 1e9:.1f} GB free here"),
    ]
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        click.echo(f"{name:<{width}}  {console.printable(text)}")
    for finding in found:
        color = "red" if finding.level == "error" else "yellow"
        click.secho(f"\n{finding.level}: {finding.text}", fg=color, bold=finding.level == "error")
        click.echo(f"  mend it: {finding.command}")
    if not found:
        click.echo("\nNothing is wrong.")


def _products(check: Report | None) -> str:
    """What became of a matrix product of each weight type."""
    if check is None or check.could_not_run:
        return "not checked"
    right = f"right in {', '.join(check.buffers)}" if check.buffers else ""
    return "; ".join(part for part in (right, check.text()) if part)


def _as_json(
    machine: diagnosis.HostHardware, engine: EngineReport | None, check: Report | None, found: list[diagnosis.Finding]
) -> dict[str, object]:
    total, available = _memory_bytes()
    return {
        "qwq_lite": __version__,
        "python": platform.python_version(),
        "llama_cpp_python": _engine_package(),
        "engine": dataclasses.asdict(engine) if engine else None,
        "check": check.to_json() if check else None,
        "gpus_present": machine.gpus,
        "memory_bytes": {"total": total, "available": available},
        "free_disk_bytes": machine.free_disk_bytes,
        "findings": [dataclasses.asdict(finding) for finding in found],
    }
