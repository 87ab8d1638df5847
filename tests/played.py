"""pip, a virtual environment and the looks at an engine, played: what the tests of the installer's steps start from."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qwq_lite.selftest.engine_check import Ended
from scripts.install_decisions import Attempt
from scripts.install_engine import COMPUTING, LOADING
from scripts.install_facts import venv_python
from scripts.install_index import Index
from scripts.install_steps import Installer

ROOT = Path(__file__).resolve().parents[1]
CPU_DEVICE = {"backend": "CPU", "kind": "cpu", "description": "a processor"}
CARD = {"backend": "CUDA", "kind": "gpu", "description": "a card"}
CPU_ATTEMPTS = (Attempt("cpu", "compile"), Attempt("cpu", "wheel", "cpu"))
CACHED = "  Using cached llama_cpp_python-0.3.36-py3-none-linux_x86_64.whl"
DONE = '{"done": true}\n'
RIGHT = Ended(0, DONE)


def loaded(*devices: Mapping[str, str]) -> Ended:
    """An engine that loads."""
    report = {"version": "0.3.36", "gpu_offload": len(devices) > 1, "devices": [CPU_DEVICE, *devices]}
    return Ended(0, "noise of a library\n" + json.dumps(report) + "\n")


def product(buffer: str, device: str = "CPU", kind: str = "Q4_K") -> dict[str, object]:
    extra = device == "CPU" and buffer != "CPU"
    return {"device": device, "buffer": buffer, "extra": extra, "type": kind, "rows": 1}


def wrong(*buffers: str, device: str = "CPU") -> Ended:
    """A check that finds wrong numbers in each of these buffers."""
    products = [product(buffer, device) for buffer in buffers]
    lines = [line for one in products for line in ({"running": one}, {"result": {**one, "error": 0.12}})]
    return Ended(0, "".join(json.dumps(line) + "\n" for line in lines) + DONE)


def died(buffer: str, by: int = signal.SIGILL, device: str = "CPU") -> Ended:
    """A check that ends in a product. It goes on in a new child."""
    return Ended(-by, json.dumps({"running": product(buffer, device)}) + "\n")


@dataclass
class Played:
    """Answers pip with success unless told otherwise, and each look at an engine with the next of its lists."""

    checks: list[Ended]  # engines that load, or do not
    products: list[Ended] = field(default_factory=list)  # then what they compute; what is missing is right
    pip_output: str | list[str] = ""  # of each installation that may come from pip's cache
    failing: str = ""  # a word in pip's arguments that makes it fail
    commands: list[list[str]] = field(default_factory=list)
    environments: list[Mapping[str, str]] = field(default_factory=list)
    asked: list[list[str]] = field(default_factory=list)  # arguments of the products' children

    def __call__(self, command: Sequence[str], *, env: Mapping[str, str], log: Path | None) -> Ended:
        if str(LOADING) in command:
            return self.checks.pop(0)
        if str(COMPUTING) in command:
            self.asked.append(list(command[command.index(str(COMPUTING)) + 1 :]))
            return self.products.pop(0) if self.products else RIGHT
        if "--version" in command:
            return Ended(0, "pip 24.0 from somewhere")
        self.commands.append([word for word in command[1:] if word not in ("-m", "pip")])
        self.environments.append(dict(env))
        if self.failing and any(self.failing in word for word in command):
            return Ended(1, "ERROR: it does not build")
        if isinstance(self.pip_output, str):
            return Ended(0, self.pip_output)
        return Ended(0, self.pip_output.pop(0) if "--force-reinstall" in command and self.pip_output else "")

    def verbs(self) -> list[str]:
        return [next(word for word in command if not word.startswith("-")) for command in self.commands]

    def builds(self) -> list[tuple[bool, str, str]]:
        """Of each installation by compiling: whether pip's cache may serve it, its CMAKE_ARGS and its CXXFLAGS."""
        made = zip(self.commands, self.environments, strict=True)
        return [
            ("--no-cache-dir" not in command, env.get("CMAKE_ARGS", ""), env.get("CXXFLAGS", ""))
            for command, env in made
            if "--force-reinstall" in command and "--no-index" not in command
        ]


def make_venv(folder: Path) -> Path:
    python = venv_python(folder / "venv")
    python.parent.mkdir(parents=True)
    python.touch()
    return folder / "venv"


def installer(played: Played, venv: Path, said: list[str]) -> Installer:
    index = Index("http://example.invalid", "linux", "x86_64", fetch=lambda _url, _timeout: None)
    return Installer(ROOT, venv, "~=0.3.36", index, run=played, say=said.append)
