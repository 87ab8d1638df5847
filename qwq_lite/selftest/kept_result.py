"""Runs the engine check once for each build and CPU, and keeps its result in the user's state folder.

A check takes a third of a second, the file that is kept a millisecond. A check that cannot run stops no load, and is not kept.
GPUs are the installer's and `doctor`'s business: a driver may take minutes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import platformdirs

from qwq_lite._version import __version__
from qwq_lite.backend import native
from qwq_lite.errors import EngineError, UsageError
from qwq_lite.selftest import engine_check
from qwq_lite.selftest.engine_check import Ended, Report
from qwq_lite.system import child
from qwq_lite.system.cpu import cpu_features

REMEDY = "run: qwq-lite doctor"
_KEPT = 8  # builds and machines: homes may be shared by several
_SUFFIX = ".check.json"


def check_once() -> Report:
    """The result for this engine on this CPU: what was kept, or a check in a child and its result."""
    return read() or check_again()


def read() -> Report | None:
    """What an earlier check found, None where there was none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return Report.from_json(json.loads(_path().read_text("utf-8")))
    return None


def check_again(*, gpu: bool = False) -> Report:
    """Check again and keep what concerns the CPU. gpu: GPUs too. Never raises for what a child does."""
    path = _path()  # before the check: a build that is replaced meanwhile is another
    report = engine_check.check(_run, gpu=gpu, timeout_s=child.TIMEOUT_S)
    if not report.could_not_run:
        with contextlib.suppress(OSError):
            _keep(path, report.on_host())
    return report


def complaint(report: Report) -> str | None:
    """One line about an engine that fails with its extra buffers only, and that goes on without them.

    None for an engine that computes. Raises: EngineError for one that fails in its plain buffer too.
    """
    if not report.fails:
        return None
    if report.extra_buffers_only:
        return f"llama.cpp fails on this CPU with weights in another layout ({report.text()}); they keep their own; {REMEDY}"
    raise EngineError(f"llama.cpp does not compute on this machine: {report.text()}; {REMEDY}")


def folder() -> Path:
    return platformdirs.user_state_path("qwq-lite", appauthor=False) / "checks"


def _run(arguments: Sequence[str], _timeout_s: float) -> Ended:
    if not getattr(sys, "frozen", False) and "py" not in Path(sys.executable or "").name.lower():
        return Ended(1, "", f"{sys.executable!r} is no Python, but a program that embeds it")
    try:
        done = child.ask(__name__, _serve.__name__, json.dumps(list(arguments)))
    except subprocess.TimeoutExpired as error:
        return Ended(None, (error.output or b"").decode("utf-8", "replace"))
    except (OSError, RuntimeError, UsageError) as error:
        return Ended(1, "", str(error))
    return Ended(done.returncode, done.stdout, done.stderr)


def _serve() -> None:
    """The child's side."""
    from qwq_lite.selftest import engine_products

    sys.exit(engine_products.main(json.loads(sys.stdin.read()), child.results()))


def _path() -> Path:
    """Where a result is kept, named after what it holds for: the libraries, by place, size and time, and what the CPU can do."""
    libraries = native.library_folder()
    digest = hashlib.blake2b(digest_size=16)
    with contextlib.suppress(OSError):
        for entry in sorted(os.scandir(libraries) if libraries else [], key=lambda entry: entry.name):
            stat = entry.stat()
            digest.update(f"{entry.path}:{stat.st_size}:{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    cpu = [platform.machine(), os.environ.get("PROCESSOR_IDENTIFIER", ""), *sorted(cpu_features())]
    digest.update(repr((cpu, __version__)).encode())  # another version may check more
    return folder() / f"{digest.hexdigest()}{_SUFFIX}"


def _keep(path: Path, report: Report) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, made = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(report.to_json(), file)
        Path(made).replace(path)
    except OSError:
        Path(made).unlink()
        raise
    by_age = sorted(path.parent.glob(f"*{_SUFFIX}"), key=lambda other: other.stat().st_mtime)
    for old in by_age[:-_KEPT]:
        old.unlink()
