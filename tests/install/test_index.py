"""Upstream's index, played by servers on the loopback: one answers, one stalls, one refuses, one breaks off.

pip is real and runs in a throwaway environment; the wheels are built here and hold a fake engine.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from qwq_lite.selftest.engine_check import Ended
from scripts import install_index, install_steps
from scripts.install_decisions import Attempt, Decision
from scripts.install_facts import Engine, venv_python
from scripts.install_index import Index, fetch
from scripts.install_processes import run_process
from scripts.install_steps import Installer, InstallError

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENT = "~=0.3.36"

# What install_check asks of the engine: the same symbols, from Python.
FAKE_ENGINE = {
    "llama_cpp/__init__.py": "def llama_supports_gpu_offload():\n    return True\n",
    "llama_cpp/llama_cpp.py": """
class Function:
    def __init__(self, value):
        self.value = value
    def __call__(self, *arguments):
        return self.value
class _lib:
    ggml_backend_dev_count = Function(1)
    ggml_backend_dev_get = Function(1)
    ggml_backend_dev_type = Function(1)
    ggml_backend_dev_backend_reg = Function(1)
    ggml_backend_reg_name = Function(b"BACKEND")
    ggml_backend_dev_description = Function(b"A card")
""",
}


def build_wheel(backend: str, version: str = "0.3.36", tag: str = "py3-none-any") -> tuple[str, bytes]:
    """A wheel named like upstream's, whose engine finds one GPU of this backend. Returns its file name and bytes."""
    info = f"llama_cpp_python-{version}.dist-info"
    files = {name: text.replace("BACKEND", backend) for name, text in FAKE_ENGINE.items()}
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: {version}\n"
    files[f"{info}/WHEEL"] = f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n"
    rows = [f"{info}/RECORD,,"]
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        rows.append(f"{name},sha256={digest},{len(text.encode())}")
    files[f"{info}/RECORD"] = "\n".join(rows) + "\n"
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return f"llama_cpp_python-{version}-{tag}.whl", wheel.getvalue()


@dataclass
class Server:
    """Files by path. A None stalls until the test is over; a path in `halved` stops half-way, once."""

    base: str = ""
    files: dict[str, bytes | None] = field(default_factory=dict)
    halved: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def add_wheel(self, name: str, backend: str, version: str = "0.3.36") -> None:
        file, content = build_wheel(backend, version)
        page = f"/{name}/llama-cpp-python/"
        self.files[page] = f'<!DOCTYPE html><html><body><a href="{file}">{file}</a></body></html>'.encode()
        self.files[page + file] = content


@contextmanager
def serving() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            content = state.files.get(self.path, b"")
            if content is None:
                state.over.wait(60)
                return
            self.send_response(200 if content else 404)
            self.send_header("Content-Type", "text/html" if self.path.endswith("/") else "application/octet-stream")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.path in state.halved:
                state.halved.discard(self.path)
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                state.over.wait(60)
            else:
                self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = False
    state.base = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield state
    finally:
        state.over.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as state:
        yield state


@pytest.fixture
def refusing() -> str:
    """The address of a port that nobody listens on."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{closed.getsockname()[1]}"


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(path)], check=True, capture_output=True, timeout=300)
    return path


@pytest.fixture(autouse=True)
def hermetic(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """pip sees no configuration of this machine, no index but the test's, and an empty cache; waits are short."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(install_index, "INDEX_TIMEOUT_S", 1)
    monkeypatch.setattr(install_steps, "INDEX_TIMEOUT_S", 1)


@dataclass
class Watched:
    """Runs what it is given and keeps the commands."""

    commands: list[list[str]] = field(default_factory=list)

    def __call__(self, command: Sequence[str], *, env: Mapping[str, str], log: Path | None) -> Ended:
        self.commands.append(list(command))
        return run_process(command, env=env, log=log)

    def pip(self, verb: str) -> list[list[str]]:
        return [command for command in self.commands if verb in command and "pip" in command]


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture
def said() -> list[str]:
    return []


def installer(base: str, venv: Path, watched: Watched, said: list[str]) -> Installer:
    index = Index(base, "linux", "x86_64")
    return Installer(ROOT, venv, REQUIREMENT, index, run=watched, say=said.append)


def wheels(*names: str, accel: str = "vulkan") -> Decision:
    return Decision(attempts=tuple(Attempt(accel, "wheel", name) for name in names))


def test_wheel_from_the_page_that_has_one(server: Server, venv: Path, watched: Watched, said: list[str]) -> None:
    server.add_wheel("vulkan", "Vulkan")
    engine = installer(server.base, venv, watched, said).install_engine(wheels("vulkan"))

    assert engine == Engine("0.3.36", "vulkan", ("A card",), how="wheel", asked="auto", tried=("wheel vulkan",))
    (command,) = [command for command in watched.pip("install") if "--find-links" in command]
    assert command[command.index("--find-links") + 1] == f"{server.base}/vulkan/llama-cpp-python/"
    for option in ("--no-index", "--no-deps", "--only-binary"):
        assert option in command
    assert command[command.index("--retries") + 1] == "0"
    assert command[command.index("--timeout") + 1] == "1"


def test_names_that_are_missing_are_passed_over(server: Server, venv: Path, watched: Watched, said: list[str]) -> None:
    """cu125 is not on the index at all, cu124 holds another release only: pip is asked for cu122 alone."""
    server.add_wheel("cu124", "CUDA", version="0.2.90")
    server.add_wheel("cu122", "CUDA")
    engine = installer(server.base, venv, watched, said).install_engine(wheels("cu125", "cu124", "cu122", accel="cuda"))

    assert engine.accel == "cuda"
    links = [command[command.index("--find-links") + 1] for command in watched.commands if "--find-links" in command]
    assert links == [f"{server.base}/cu122/llama-cpp-python/"]
    assert sum("the index has no wheel" in line for line in said) == 2


def test_stalled_index_is_asked_once(server: Server, venv: Path, watched: Watched, said: list[str]) -> None:
    """urllib waits once, pip waits once; the other names cost nothing."""
    for name in ("cu125", "cu124", "cu122"):
        server.files[f"/{name}/llama-cpp-python/"] = None
    with pytest.raises(InstallError, match="the index of wheels does not answer"):
        installer(server.base, venv, watched, said).install_engine(wheels("cu125", "cu124", "cu122", accel="cuda"))

    assert server.asked == ["/cu125/llama-cpp-python/"] * 2
    assert len([command for command in watched.commands if "--find-links" in command]) == 1


def test_refusing_index_is_asked_once(refusing: str, venv: Path, watched: Watched, said: list[str]) -> None:
    with pytest.raises(InstallError, match="the index of wheels does not answer"):
        installer(refusing, venv, watched, said).install_engine(wheels("cu125", "cu124", accel="cuda"))
    assert len([command for command in watched.commands if "--find-links" in command]) == 1


def test_slow_download_gets_more_patience(server: Server, venv: Path, watched: Watched, said: list[str]) -> None:
    """The page answers, the file stalls half-way: that is a slow line, not a silent index."""
    server.add_wheel("vulkan", "Vulkan")
    (file,) = server.halved = {path for path in server.files if path.endswith(".whl")}
    engine = installer(server.base, venv, watched, said).install_engine(wheels("vulkan"))

    assert engine.accel == "vulkan"
    assert server.asked.count(file) == 2  # by a second pip, or by one that resumes


def test_wheel_for_another_device_is_not_kept(server: Server, venv: Path, watched: Watched, said: list[str]) -> None:
    """A build that loads and finds no device of the accelerator is uninstalled, with its reason, for the next one."""
    server.add_wheel("cu125", "Vulkan")
    server.add_wheel("vulkan", "Vulkan")
    attempts = (*wheels("cu125", accel="cuda").attempts, *wheels("vulkan").attempts)
    engine = installer(server.base, venv, watched, said).install_engine(Decision(attempts=attempts))

    assert engine.accel == "vulkan"
    assert any("finds no device for CUDA" in line for line in said)
    assert any(line.startswith("ATTENTION: no CUDA engine") for line in said)
    assert len(watched.pip("uninstall")) == 1


def test_installing_twice_looks_and_keeps(server: Server, venv: Path, watched: Watched, said: list[str]) -> None:
    server.add_wheel("vulkan", "Vulkan")
    first = installer(server.base, venv, watched, said)
    installed = first.install_engine(wheels("vulkan"))
    assert installer(server.base, venv, watched, said).look() == installed


def test_dependencies_never_compile_the_engine(server: Server, venv: Path, watched: Watched, said: list[str]) -> None:
    server.add_wheel("vulkan", "Vulkan")
    installer(server.base, venv, watched, said).install_engine(wheels("vulkan"))
    for command in watched.pip("install"):
        assert command[command.index("--only-binary") + 1] in (":all:", "llama-cpp-python")
    assert venv_python(venv).exists()


@pytest.mark.parametrize(
    ("file", "system", "machine", "fits"),
    [
        ("llama_cpp_python-0.3.36-py3-none-linux_x86_64.whl", "linux", "x86_64", True),
        ("llama_cpp_python-0.3.36-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl", "linux", "x86_64", True),
        ("llama_cpp_python-0.3.36+cu124-py3-none-linux_x86_64.whl", "linux", "x86_64", True),
        ("llama_cpp_python-0.3.36-1-py3-none-linux_x86_64.whl", "linux", "x86_64", True),
        ("llama_cpp_python-0.3.36-py3-none-win_amd64.whl", "win32", "x86_64", True),
        ("llama_cpp_python-0.3.36-py3-none-macosx_11_0_arm64.whl", "darwin", "arm64", True),
        ("llama_cpp_python-0.3.36-py3-none-linux_aarch64.whl", "linux", "arm64", True),
        ("llama_cpp_python-0.3.36-py3-none-win_amd64.whl", "linux", "x86_64", False),
        ("llama_cpp_python-0.3.36-py3-none-linux_x86_64.whl", "linux", "arm64", False),
        ("llama_cpp_python-0.3.36-py3-none-macosx_11_0_arm64.whl", "win32", "x86_64", False),
        ("llama_cpp_python-0.3.35-py3-none-linux_x86_64.whl", "linux", "x86_64", False),
        ("llama_cpp_python-0.3.36.tar.gz", "linux", "x86_64", False),
    ],
)
def test_which_files_fit(file: str, system: str, machine: str, fits: bool) -> None:
    page = f'<a href="https://example.invalid/releases/{file.replace("+", "%2B")}#sha256=00">{file}</a>'
    index = Index("http://example.invalid", system, machine, fetch=lambda _url, _timeout: page)
    assert (index.absent("cpu", REQUIREMENT) is None) == fits


def test_trickling_server_is_no_answer() -> None:
    """A server that sends a byte now and then keeps urllib's timeout from ever running out."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def trickle() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
                while not over.wait(0.05):
                    try:
                        connection.sendall(b"x")
                    except OSError:
                        return

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            assert fetch(f"http://127.0.0.1:{listener.getsockname()[1]}/", 0.2) is None
        finally:
            over.set()
            thread.join()


def test_page_that_breaks_off_is_no_answer(server: Server) -> None:
    """Half a page must not pass for one that lists nothing."""
    server.add_wheel("cpu", "CPU")
    page = "/cpu/llama-cpp-python/"
    server.halved = {page}
    server.over.set()  # the connection ends at once
    assert fetch(server.base + page, 5) is None
    assert fetch(server.base + page, 5) == (server.files[page] or b"").decode()
    assert fetch(server.base + "/nothing/", 5) == ""


def test_address_that_is_none() -> None:
    assert fetch("no address", 0.2) is None
