"""What scripts/install.py finds on this machine: data, the parsers of tools' output, and the probe that fills it.

Does not know what follows from the facts (install_decisions) and changes nothing. Only the standard library.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STAMP = "qwq-lite-engine.json"  # in the virtual environment: how the engine came there
_TOOL_TIMEOUT_S = 20  # nvidia-smi hangs when a driver is broken
_AVX2_WINDOWS = 40  # PF_AVX2_INSTRUCTIONS_AVAILABLE

_MANAGERS = {
    "debian": "apt", "ubuntu": "apt", "fedora": "dnf", "rhel": "dnf", "centos": "dnf",
    "arch": "pacman", "suse": "zypper", "opensuse": "zypper", "alpine": "apk",
}  # fmt: skip


@dataclass(frozen=True)
class Engine:
    """An engine that loads: what the look at it in a child process found, and what the stamp beside it says."""

    version: str
    accel: str  # what it computes on: cuda, metal, vulkan, another backend of ggml, or cpu where it finds no GPU
    devices: tuple[str, ...] = ()  # GPUs it can use
    integrated_only: bool = False  # every one of them shares the system's memory
    how: str | None = None  # wheel, compile; None when someone else installed it
    asked: str | None = None  # the --accel of that run
    tried: tuple[str, ...] = ()  # labels of all attempts that run was going to make
    extra: str | None = None  # the extra with NVIDIA's runtime libraries it needs
    without: tuple[str, ...] = ()  # what it was compiled without


@dataclass(frozen=True)
class Facts:
    """What was found. Versions are (major, minor); None and () mean: not there, or it did not say."""

    system: str  # linux, darwin, win32
    machine: str  # x86_64, arm64
    python: tuple[int, int]  # of the virtual environment where there is one, else the one that runs this
    requirement: str  # llama-cpp-python's version specifier in pyproject.toml, such as "~=0.3.36"
    venv: str = ".venv"
    venv_exists: bool = False
    can_make_venv: bool = True
    manager: str | None = None  # apt, dnf, pacman, zypper, apk
    compiler: str | None = None
    gcc: tuple[int, int] | None = None  # the C++ compiler's version where it is GNU's
    amx: bool = False  # what it compiles for this CPU uses AMX
    avx2: bool = True
    driver: str | None = None  # NVIDIA's
    driver_cuda: tuple[int, int] | None = None  # the newest CUDA this driver runs
    capabilities: tuple[tuple[int, int], ...] = ()  # one a card
    nvcc: tuple[int, int] | None = None
    cuda_runtimes: tuple[int, ...] = ()  # majors whose libcudart and libcublas the loader finds by itself
    vulkan_loader: bool = False
    vulkan_sdk: bool = False  # glslc and headers, to compile
    rosetta: bool = False  # an x86 Python translated on Apple silicon
    long_paths: bool = True
    engine: Engine | None = None


def read_requirement(pyproject: str) -> str:
    """The version specifier of llama-cpp-python. Raises: ValueError when pyproject.toml names none."""
    match = re.search(r'"llama-cpp-python\s*([~=<>!][^";]*)[";]', pyproject)
    if match is None:
        raise ValueError('pyproject.toml holds no line "llama-cpp-python ~= …" among its dependencies')
    return re.sub(r"\s", "", match[1])


def read_extra(pyproject: str, extra: str) -> tuple[str, ...]:
    """The requirements of one optional dependency group. Python 3.10 has no tomllib, hence the pattern."""
    match = re.search(rf"^{re.escape(extra)} = \[\n(.*?)^\]", pyproject, re.MULTILINE | re.DOTALL)
    if match is None:
        raise ValueError(f"pyproject.toml has no extra {extra!r}")
    return tuple(re.findall(r'^\s*"([^"]+)"', match[1], re.MULTILINE))


def parse_version(text: str) -> tuple[int, int] | None:
    match = re.search(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


def parse_smi(banner: str) -> tuple[int, int] | None:
    """The CUDA version in nvidia-smi's banner; drivers from 610 on call it "CUDA UMD Version"."""
    match = re.search(r"CUDA(?: UMD)? Version\s*:\s*(\d+\.\d+)", banner)
    return parse_version(match[1]) if match else None


def parse_gpus(csv: str) -> tuple[str | None, tuple[tuple[int, int], ...]]:
    """Driver version and compute capabilities from `--query-gpu=driver_version,compute_cap --format=csv,noheader`."""
    rows = [[cell.strip() for cell in line.split(",")] for line in csv.splitlines() if line.count(",") == 1]
    versions = [parse_version(capability) for _, capability in rows]
    return (rows[0][0] if rows else None), tuple(version for version in versions if version)


def parse_nvcc(text: str) -> tuple[int, int] | None:
    match = re.search(r"release (\d+\.\d+)", text)
    return parse_version(match[1]) if match else None


def parse_macros(text: str) -> tuple[tuple[int, int] | None, bool]:
    """What a C++ compiler defines (-dM -E): its version if it is GNU's, and whether it compiles for AMX.

    clang and what is made from it say __GNUC__ too, for the version whose extensions they know.
    """
    defined = dict(re.findall(r"^#define (\w+) (\S+)", text, re.MULTILINE))
    version = (defined.get("__GNUC__", ""), defined.get("__GNUC_MINOR__", ""))
    gnu = not {"__clang__", "__NVCOMPILER"} & defined.keys() and all(number.isdigit() for number in version)
    return ((int(version[0]), int(version[1])) if gnu else None), "__AMX_TILE__" in defined


def parse_os_release(text: str) -> str | None:
    """The package manager of this distribution, from ID and, for its many descendants, ID_LIKE."""
    fields = dict(re.findall(r'^(ID|ID_LIKE)="?([^"\n]*)"?$', text, re.MULTILINE))
    names = (fields.get("ID", "") + " " + fields.get("ID_LIKE", "")).split()
    return next((_MANAGERS[name.split("-")[0]] for name in names if name.split("-")[0] in _MANAGERS), None)


def read_stamp(venv: Path) -> dict[str, object]:
    """What the last run wrote down; empty when there was none or the file is damaged."""
    try:
        stamp = json.loads((venv / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def venv_python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def shown_path(path: Path) -> str:
    """A path as the user would type it: relative below the working folder."""
    try:
        return os.path.relpath(path) if Path.cwd() in path.resolve().parents else str(path)
    except OSError:
        return str(path)


def tool_output(*command: str) -> str | None:
    """A tool's standard output, or None when it is not there, fails, or does not answer."""
    path = shutil.which(command[0])
    if path is None:
        return None
    try:
        done = subprocess.run(
            [path, *command[1:]], capture_output=True, text=True, errors="replace", timeout=_TOOL_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def probe(root: Path, venv: Path) -> Facts:
    """Ask this machine. The engine in the virtual environment is looked at by install_steps, in a child process.

    Raises: ValueError when pyproject.toml does not name the engine's version, OSError when it cannot be read.
    """
    requirement = read_requirement((root / "pyproject.toml").read_text(encoding="utf-8"))
    driver, driver_cuda, capabilities = _nvidia()
    gcc, amx = _gcc_and_amx()
    return Facts(
        system="linux" if sys.platform.startswith("linux") else sys.platform,
        machine=_machine(),
        python=_python_of(venv) or (sys.version_info[0], sys.version_info[1]),
        requirement=requirement,
        venv=shown_path(venv),
        venv_exists=venv_python(venv).exists(),
        can_make_venv=all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")),
        manager=parse_os_release(_text_of(Path("/etc/os-release"))),
        compiler=_compiler(),
        gcc=gcc,
        amx=amx,
        avx2=_avx2(),
        driver=driver,
        driver_cuda=driver_cuda,
        capabilities=capabilities,
        nvcc=_nvcc(),
        cuda_runtimes=_cuda_runtimes() if driver else (),
        vulkan_loader=_loads("vulkan-1.dll" if sys.platform == "win32" else "libvulkan.so.1"),
        vulkan_sdk=_vulkan_sdk(),
        rosetta=(tool_output("sysctl", "-n", "sysctl.proc_translated") or "").strip() == "1",
        long_paths=_long_paths(),
    )


def _machine() -> str:
    name = platform.machine().lower()
    return {"amd64": "x86_64", "aarch64": "arm64"}.get(name, name)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _python_of(venv: Path) -> tuple[int, int] | None:
    python = venv_python(venv)
    return parse_version(tool_output(str(python), "--version") or "") if python.exists() else None


def _compiler() -> str | None:
    if sys.platform == "darwin":
        # /usr/bin/clang++ is there without the tools: it opens a window that asks to install them.
        return "clang++" if tool_output("xcode-select", "-p") else None
    if sys.platform == "win32":
        programs = os.environ.get("PROGRAMFILES(X86)", r"C:\Program Files (x86)")
        vswhere = str(Path(programs) / "Microsoft Visual Studio" / "Installer" / "vswhere.exe")
        parts = "Microsoft.VisualStudio.Component.VC.Tools." + ("ARM64" if _machine() == "arm64" else "x86.x64")
        query = ("-latest", "-products", "*", "-requires", parts, "-property", "installationPath")
        return (tool_output(vswhere, *query) or "").strip() or shutil.which("cl")
    return _first_found((_cxx()[0], "g++", "clang++"))


def _cxx() -> list[str]:
    """The C++ compiler that the build will take, with its options: CMAKE_ARGS', CXX, the one that made this Python.

    scikit-build-core, which builds llama-cpp-python, sets CXX from Python's own configuration.
    """
    mine = re.search(r"CMAKE_CXX_COMPILER(?::\w+)?=(\S+)", os.environ.get("CMAKE_ARGS", ""))
    named = mine[1] if mine else os.environ.get("CXX")
    if named:
        return shlex.split(named) or ["c++"]
    words = shlex.split(sysconfig.get_config_var("CXX") or "")
    chosen = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    return chosen if chosen and shutil.which(chosen[0]) else ["c++"]


def _gcc_and_amx() -> tuple[tuple[int, int] | None, bool]:
    """Ask the C++ compiler what it would compile for this CPU, in the way in which ggml is compiled."""
    if not sys.platform.startswith("linux"):
        return None, False  # nowhere else does ggml use AMX
    options = shlex.split(os.environ.get("CXXFLAGS", ""))
    question = ("-march=native", "-dM", "-E", "-x", "c++", os.devnull)
    return parse_macros(tool_output(*_cxx(), *options, *question) or "")


def _first_found(names: Sequence[str]) -> str | None:
    return next((path for path in map(shutil.which, names) if path), None)


def _avx2() -> bool:
    if sys.platform == "win32":
        return bool(ctypes.windll.kernel32.IsProcessorFeaturePresent(_AVX2_WINDOWS))
    if sys.platform == "darwin":
        return (tool_output("sysctl", "-n", "hw.optional.avx2_0") or "").strip() == "1"
    return re.search(r"^flags\s*:.*\bavx2\b", _text_of(Path("/proc/cpuinfo")), re.MULTILINE) is not None


def _nvidia() -> tuple[str | None, tuple[int, int] | None, tuple[tuple[int, int], ...]]:
    smi = _first_found(("nvidia-smi", "/usr/lib/wsl/lib/nvidia-smi"))
    banner = tool_output(smi) if smi else None
    if smi is None or banner is None:
        return None, None, ()
    query = ("--query-gpu=driver_version,compute_cap", "--format=csv,noheader")
    driver, capabilities = parse_gpus(tool_output(smi, *query) or "")
    # Drivers from before compute_cap could be asked for still say which CUDA they run.
    return driver or "of unknown version", parse_smi(banner), capabilities


def _nvcc() -> tuple[int, int] | None:
    beside = [str(Path(os.environ[name]) / "bin" / "nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    nvcc = _first_found([os.environ.get("CUDACXX", "nvcc"), "nvcc", *beside, "/usr/local/cuda/bin/nvcc"])
    return parse_nvcc(tool_output(nvcc, "--version") or "") if nvcc else None


def _cuda_runtimes() -> tuple[int, ...]:
    if sys.platform == "win32":
        folder = Path(os.environ.get("CUDA_PATH", "no such folder")) / "bin"  # where llama_cpp looks
        return tuple(major for major in (11, 12, 13) if any(folder.glob(f"cudart64_{major}*.dll")))
    names = {11: ("libcudart.so.11.0", "libcublas.so.11")}
    names |= {major: (f"libcudart.so.{major}", f"libcublas.so.{major}") for major in (12, 13)}
    return tuple(major for major, libraries in names.items() if all(map(_loads, libraries)))


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _vulkan_sdk() -> bool:
    sdk = os.environ.get("VULKAN_SDK")
    folders = [Path(sdk) / "Include", Path(sdk) / "include"] if sdk else []
    headers = any((folder / "vulkan" / "vulkan.h").exists() for folder in [*folders, Path("/usr/include")])
    glslc = shutil.which("glslc") or (sdk and any((Path(sdk) / folder).exists() for folder in ("Bin", "bin")))
    return headers and bool(glslc)


def _long_paths() -> bool:
    if sys.platform != "win32":
        return True
    import winreg

    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"SYSTEM\CurrentControlSet\Control\FileSystem") as key:
            return bool(winreg.QueryValueEx(key, "LongPathsEnabled")[0])
    except OSError:
        return False
