"""llama.cpp's shared libraries in this process: found, loaded once, their log kept, their failures explained.

Symbols of ggml come from the handle that llama_cpp holds. A wheel carries three copies of each library, and opening
`libggml*.so` by path would map a second one, with its own log callback and tables. On Windows a handle does not show
the symbols of the DLLs it depends on, so those are asked by name; LoadLibrary gives back the copy that is loaded.
"""

from __future__ import annotations

import collections
import ctypes
import importlib
import importlib.util
import os
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from qwq_lite.errors import EngineError

_LOG_LINES_KEPT = 60
_CONTINUED = 5  # GGML_LOG_LEVEL_CONT
WARN = 3  # GGML_LOG_LEVEL_WARN

# In the order in which they depend on each other.
_NVIDIA_LIBRARIES = ("cudart", "cublasLt", "cublas")


class _Log:
    """llama.cpp's last lines, from whatever thread they come."""

    def __init__(self) -> None:
        self.last: collections.deque[tuple[int, str]] = collections.deque(maxlen=_LOG_LINES_KEPT)
        self._lock = threading.Lock()

    def add(self, level: int, text: bytes | None, _user: object) -> None:
        line = (text or b"").decode("utf-8", "replace")
        with self._lock:
            if level == _CONTINUED and self.last:
                level, line = self.last[-1][0], self.last.pop()[1] + line
            self.last.append((level, line))


LOG = _Log()
_LOADING = threading.Lock()
_loaded: Any = None
_callback: Any = None  # the log callback must outlive the library


def engine() -> Any:
    """The module llama_cpp.llama_cpp, loaded at the first call. Any thread may ask.

    Raises: EngineError when it is not installed or its libraries do not load, with the command that mends it.
    """
    global _loaded, _callback  # noqa: PLW0603 - the library itself is one per process
    with _LOADING:
        if _loaded is None:
            preload_nvidia()
            module = _import_llama_cpp()
            _callback = module.llama_log_callback(LOG.add)
            module.llama_log_set(_callback, ctypes.c_void_p(0))
            module.llama_backend_init()
            _loaded = module
    return _loaded


def _import_llama_cpp() -> ModuleType:
    try:
        module = importlib.import_module("llama_cpp.llama_cpp")
    except ModuleNotFoundError as error:
        if error.name != "llama_cpp":
            raise
        raise EngineError("llama-cpp-python is not installed; run: python scripts/install.py") from error
    except (RuntimeError, OSError, FileNotFoundError) as error:
        raise EngineError(f"llama.cpp does not load: {error}; {load_failure_remedy(str(error))}") from error
    return module


def load_failure_remedy(message: str) -> str:
    """The one command that mends a library that does not load, from the system's message."""
    text = message.lower()
    if "cudart" in text or "cublas" in text:
        major = "13" if ".so.13" in text or "_13" in text else "12"
        return f'NVIDIA\'s runtime libraries are missing, run: pip install "qwq-lite[cuda{major}]"'
    if "libcuda.so" in text or "nvcuda" in text:
        return "the NVIDIA driver is missing: install it, or run: python scripts/install.py --accel cpu --force"
    if "vulkan" in text:
        cpu = "python scripts/install.py --accel cpu --force"
        return f"the Vulkan loader is missing (Debian: apt install libvulkan1), or run: {cpu}"
    if "libgomp" in text:
        return "the OpenMP runtime is missing, run: sudo apt install libgomp1"
    return "install it again, run: python scripts/install.py --force"


def preload_nvidia() -> list[Path]:
    """Load CUDA's runtime from NVIDIA's own wheels, so that upstream's CUDA build finds it without a toolkit.

    Returns the libraries that were loaded; none where the wheels are not installed. What fails here is not raised:
    the import of llama_cpp that follows says which library it misses.
    """
    found = nvidia_libraries()
    done = []
    for path in found:
        try:
            if sys.platform == "win32":
                os.add_dll_directory(str(path.parent))
                ctypes.CDLL(str(path))
            else:
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        done.append(path)
    return done


def nvidia_libraries(site_packages: Path | None = None) -> list[Path]:
    """Files of NVIDIA's runtime wheels, newest CUDA first, in the order in which they must be loaded.

    CUDA 12 wheels: nvidia/cuda_runtime/lib/libcudart.so.12, nvidia/cublas/lib/…; CUDA 13: nvidia/cu13/lib/….
    Windows has bin/ (and bin/x86_64/) with cudart64_12.dll and the like.
    """
    root = (site_packages or Path(sysconfig.get_path("purelib"))) / "nvidia"
    if sys.platform == "darwin" or not root.is_dir():
        return []
    pattern = "{}64_*.dll" if sys.platform == "win32" else "lib{}.so.*"
    found: list[Path] = []
    for name in _NVIDIA_LIBRARIES:
        found += sorted(root.rglob(pattern.format(name)), reverse=True)
    return found


def library_folder() -> Path | None:
    """Where llama_cpp finds its libraries, without loading them."""
    elsewhere = os.environ.get("LLAMA_CPP_LIB_PATH")
    if elsewhere is not None:
        return Path(elsewhere)
    spec = importlib.util.find_spec("llama_cpp")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "lib"


def symbol(name: str, restype: Any, argtypes: list[Any]) -> Callable[..., Any]:
    """A C function of ggml or llama that llama_cpp does not wrap. The GIL is released while it runs.

    Raises: EngineError when the loaded library does not export it.
    """
    for library in _libraries():
        function = getattr(library, name, None)
        if function is not None:
            # A CDLL hands out one shared object per name; a fresh one keeps these argtypes to this caller.
            typed = ctypes.CFUNCTYPE(restype, *argtypes)(ctypes.cast(function, ctypes.c_void_p).value or 0)
            typed.library = library  # type: ignore[attr-defined] # keeps the library alive
            return typed
    raise EngineError(f"this llama.cpp does not export {name}; run: python scripts/install.py --force")


def _libraries() -> Iterator[Any]:
    yield engine()._lib
    folder = library_folder()
    if sys.platform == "win32" and folder is not None:
        for dll in ("ggml-base.dll", "ggml.dll", "ggml-cpu.dll"):
            if (folder / dll).exists():
                yield ctypes.CDLL(str(folder / dll))


def last_lines(n: int = 8, level: int = WARN) -> str:
    """llama.cpp's last warnings and errors as one string, for an error message."""
    lines = [line.strip() for at, line in list(LOG.last) if at >= level and line.strip()]
    return " | ".join(lines[-n:])
