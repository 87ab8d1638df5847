"""The parsers of tools' output, and the probe on whatever machine runs the tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import install_facts
from scripts.install_facts import (
    parse_gpus,
    parse_nvcc,
    parse_os_release,
    parse_smi,
    probe,
    read_extra,
    read_requirement,
    read_stamp,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("banner", "version"),
    [
        ("| NVIDIA-SMI 550.54.15   Driver Version: 550.54.15   CUDA Version: 12.4  |", (12, 4)),
        ("| NVIDIA-SMI 610.47   KMD Version: 610.47   CUDA UMD Version: 13.3 |", (13, 3)),
        ("| NVIDIA-SMI 390.1  Driver Version: 390.1  |", None),
        ("| CUDA Version: N/A |", None),
        ("", None),
    ],
)
def test_smi_banner(banner: str, version: tuple[int, int] | None) -> None:
    assert parse_smi(banner) == version


def test_gpus() -> None:
    assert parse_gpus("550.54.15, 8.6\n550.54.15, 12.0\n") == ("550.54.15", ((8, 6), (12, 0)))
    assert parse_gpus("470.1, [N/A]\n") == ("470.1", ())
    assert parse_gpus("No devices were found\n") == (None, ())
    assert parse_gpus("") == (None, ())


def test_nvcc() -> None:
    assert parse_nvcc("Cuda compilation tools, release 12.4, V12.4.131") == (12, 4)
    assert parse_nvcc("nvcc: command not found") is None


@pytest.mark.parametrize(
    ("text", "manager"),
    [
        ('NAME="Debian"\nID=debian\n', "apt"),
        ('ID=linuxmint\nID_LIKE="ubuntu debian"\n', "apt"),
        ("ID=fedora\n", "dnf"),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"\n', "dnf"),
        ("ID=manjaro\nID_LIKE=arch\n", "pacman"),
        ('ID="opensuse-tumbleweed"\nID_LIKE="opensuse suse"\n', "zypper"),
        ("ID=nixos\n", None),
        ("", None),
    ],
)
def test_package_manager(text: str, manager: str | None) -> None:
    assert parse_os_release(text) == manager


def test_requirement_and_extras_come_from_pyproject() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert read_requirement(pyproject).startswith("~=")
    for extra, library in (("cuda12", "nvidia-cublas-cu12"), ("cuda13", "nvidia-cublas ~= 13.0")):
        assert library in read_extra(pyproject, extra)
    with pytest.raises(ValueError, match="no extra 'cuda11'"):
        read_extra(pyproject, "cuda11")
    with pytest.raises(ValueError, match="no line"):
        read_requirement("[project]\n")


@pytest.mark.parametrize(
    ("line", "requirement"),
    [
        ('"llama-cpp-python ~= 0.3.36",   # the engine', "~=0.3.36"),
        ('"llama-cpp-python>=0.3.36,<0.4"', ">=0.3.36,<0.4"),
        ("\"llama-cpp-python == 0.3.36 ; python_version > '3'\"", "==0.3.36"),
    ],
)
def test_requirement_spellings(line: str, requirement: str) -> None:
    assert read_requirement(line) == requirement


def test_stamp_that_is_damaged_counts_as_none(tmp_path: Path) -> None:
    assert read_stamp(tmp_path) == {}
    for text in ("{", "[1]", ""):
        (tmp_path / install_facts.STAMP).write_text(text, encoding="utf-8")
        assert read_stamp(tmp_path) == {}
    (tmp_path / install_facts.STAMP).write_text(json.dumps({"accel": "cpu"}), encoding="utf-8")
    assert read_stamp(tmp_path) == {"accel": "cpu"}


def test_probe_says_something_of_every_machine(tmp_path: Path) -> None:
    facts = probe(ROOT, tmp_path / "none")
    assert facts.system in ("linux", "darwin", "win32")
    assert facts.python >= (3, 10)
    assert not facts.venv_exists
    assert facts.engine is None
