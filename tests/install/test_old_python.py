"""A Python that is too old gets one line and status 1, whatever syntax the rest of the installer uses."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import install

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "install.py"


def old_pythons() -> list[str]:
    """Interpreters from 3.6 to 3.9 that are on the path or kept by pyenv."""
    versions = ("3.6", "3.7", "3.8", "3.9")
    found = [shutil.which(f"python{version}") for version in versions]
    pyenv = Path.home() / ".pyenv" / "versions"
    found += [str(path) for version in versions for path in sorted(pyenv.glob(f"{version}.*/bin/python"))]
    return [path for path in found if path and "shims" not in path]


@pytest.mark.parametrize("python", old_pythons())
def test_real_old_pythons(python: str) -> None:
    done = subprocess.run([python, "-W", "error", str(SCRIPT)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("qwq-lite needs Python 3.10 or newer, ")


@pytest.mark.parametrize("version", [(3, 6, 15), (3, 9, 6)])
def test_one_line_and_status_1(
    version: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    assert install.main([]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert ".".join(map(str, version)) in said.err


def test_new_enough() -> None:
    assert install.old_python((3, 10, 0), "python3") is None
    assert install.old_python((4, 0, 0), "python3") is None
