"""Load the engine and say in one JSON line what it finds. Runs in the virtual environment's Python, as a child.

A build that uses instructions this CPU lacks, or whose libraries are missing, ends this process and not its parent.
NVIDIA's runtime libraries are loaded first, from the places where qwq_lite.backend.native will take them.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_KINDS = ("cpu", "gpu", "igpu", "accel")  # ggml_backend_dev_type


def main() -> int:
    try:
        preload_nvidia(Path(sysconfig.get_path("purelib")) / "nvidia")
        found = describe()
    except Exception as error:
        # Whatever it is, the parent prints it as the reason and makes the next attempt.
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        return 1
    print(json.dumps(found))
    return 0


def preload_nvidia(root: Path) -> None:
    """CUDA 12 wheels keep libraries in nvidia/NAME/lib, CUDA 13 in nvidia/cu13/lib, Windows in bin and bin/x86_64."""
    pattern = "{}64_*.dll" if sys.platform == "win32" else "lib{}.so.*"
    for name in ("cudart", "cublasLt", "cublas"):  # in the order in which they depend on each other
        for path in sorted(root.rglob(pattern.format(name)), reverse=True):
            try:
                if sys.platform == "win32":
                    os.add_dll_directory(str(path.parent))
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue  # the import that follows says what is missing


def describe() -> dict[str, object]:
    import llama_cpp

    version = importlib.metadata.version("llama-cpp-python")
    devices = [_device(i) for i in range(_call("ggml_backend_dev_count", ctypes.c_size_t))]
    return {"version": version, "gpu_offload": bool(llama_cpp.llama_supports_gpu_offload()), "devices": devices}


def _device(i: int) -> dict[str, str]:
    device = ctypes.c_void_p(_call("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t(i)))
    kind = int(_call("ggml_backend_dev_type", ctypes.c_int, device))
    registry = ctypes.c_void_p(_call("ggml_backend_dev_backend_reg", ctypes.c_void_p, device))
    return {
        "backend": _text(_call("ggml_backend_reg_name", ctypes.c_char_p, registry)),
        "kind": _KINDS[kind] if 0 <= kind < len(_KINDS) else str(kind),
        "description": _text(_call("ggml_backend_dev_description", ctypes.c_char_p, device)),
    }


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "replace")


def _call(name: str, restype: Any, *arguments: Any) -> Any:
    for library in _libraries():
        function = getattr(library, name, None)
        if function is not None:
            function.restype = restype
            return function(*arguments)
    raise RuntimeError(f"the engine does not export {name}")


def _libraries() -> Iterator[Any]:
    """The handle that llama_cpp holds; on Windows a handle does not show the DLLs it depends on."""
    import llama_cpp.llama_cpp as low

    yield low._lib
    folder = Path(low.__file__).parent / "lib"
    for name in ("ggml-base.dll", "ggml.dll") if sys.platform == "win32" else ():
        if (folder / name).exists():
            yield ctypes.CDLL(str(folder / name))


if __name__ == "__main__":
    sys.exit(main())
