"""Matrix products of an installed llama.cpp, each compared with what it should be; the child of `engine_check`.

Each is one ggml graph: random blocks of a weight type with set scales, in a buffer type of a device, times 1 and 64 rows. The
reference is the float64 product of the same blocks, as ggml itself turns them into floats.

Run by path, with only the standard library, numpy and llama-cpp-python: the rest of the package may not be installed yet.
One JSON object a line on standard output:
    {"running": {"device": "CPU", "gpu": false, "buffer": "AMX", "extra": true, "type": "Q4_K", "rows": 1}}    before a product
    {"result": {the same, "error": 0.0004}}     after it: the largest |error| / (|w| |x|), null where a number is none
    {"done": true} at the end, or {"error": "why nothing could be checked"}
Arguments: --gpu for GPUs too, --skip=DEVICE:BUFFER:TYPE for what is not run again, TYPE may be *.

Source: ggml/include/ggml.h, ggml-backend.h, ggml/src/ggml-common.h (layouts of blocks)
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import json
import math
import os
import random
import signal
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]
    Doubles = npt.NDArray[np.float64]

N_OUT, N_IN = 64, 256  # rows and columns of the weights
ROWS = (1, 64)  # of the input: kernels differ for one and for many
_SEED = 27
_LONGEST_S = 600  # past every limit that a parent has
_N_THREADS = 2  # a fault may be of every thread but the first
# ggml_log_callback; the object must outlive the library
_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda _level, _text, _user: None)
_KINDS = ("cpu", "gpu", "igpu", "accel")  # enum ggml_backend_dev_type


class _Layout(NamedTuple):
    """A type of weights."""

    id: int  # enum ggml_type
    n: int  # values in a block
    n_bytes: int  # bytes of a block
    # byte offsets of F16 numbers in a block, and how many times the block's scale they are
    scales: tuple[tuple[int, float], ...]


# The minima of types that have some are set so that the values lie around 0.
TYPES = {
    "F32": _Layout(0, 1, 4, ()),
    "F16": _Layout(1, 1, 2, ()),
    "BF16": _Layout(30, 1, 2, ()),
    "Q4_0": _Layout(2, 32, 18, ((0, 1),)),
    "Q4_1": _Layout(3, 32, 20, ((0, 1), (2, -7.5))),
    "Q5_0": _Layout(6, 32, 22, ((0, 1),)),
    "Q5_1": _Layout(7, 32, 24, ((0, 1), (2, -15.5))),
    "Q8_0": _Layout(8, 32, 34, ((0, 1),)),
    "Q2_K": _Layout(10, 256, 84, ((80, 1), (82, 1.5))),
    "Q3_K": _Layout(11, 256, 110, ((108, 1),)),
    "Q4_K": _Layout(12, 256, 144, ((0, 1), (2, 7.5))),
    "Q5_K": _Layout(13, 256, 176, ((0, 1), (2, 15.5))),
    "Q6_K": _Layout(14, 256, 210, ((208, 1),)),
    "IQ2_XXS": _Layout(16, 256, 66, ((0, 1),)),
    "IQ2_XS": _Layout(17, 256, 74, ((0, 1),)),
    "IQ3_XXS": _Layout(18, 256, 98, ((0, 1),)),
    "IQ4_NL": _Layout(20, 32, 18, ((0, 1),)),
    "IQ3_S": _Layout(21, 256, 110, ((0, 1),)),
    "IQ2_S": _Layout(22, 256, 82, ((0, 1),)),
    "IQ4_XS": _Layout(23, 256, 136, ((0, 1),)),
}


def main(arguments: Sequence[str], results: int | None = None) -> int:
    """The child's whole life. results: the descriptor that its lines go to; default standard output."""
    out = _own_output() if results is None else os.fdopen(results, "w", encoding="utf-8")

    def say(message: Mapping[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    try:
        _settle()
        engine = _Engine()
        for device in engine.devices(gpu="--gpu" in arguments):
            _check_device(engine, device, frozenset(arguments), say)
    except Exception as error:  # whatever it is, the parent prints it as the reason
        say({"error": f"{type(error).__name__}: {error}"})
        return 1
    say({"done": True})
    return 0


def _own_output() -> Any:
    """Standard output on a descriptor of its own: what a library prints goes to standard error."""
    own = os.dup(1)
    with contextlib.suppress(OSError):
        os.dup2(2, 1)
    return os.fdopen(own, "w", encoding="utf-8")


def _settle() -> None:
    """A death is quick, and leaves neither core nor dialog."""
    os.environ["GGML_NO_BACKTRACE"] = "1"
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that wait for a busy machine in a loop take twice the time
    if sys.platform == "win32":
        ctypes.windll.kernel32.SetErrorMode(0x0001 | 0x0002 | 0x8000)
        return
    import resource

    # A kernel in an endless loop ends, also where the process that asked is gone.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_LONGEST_S)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))  # 0 would not hold where dumps go to a program: core(5)


class _Device(NamedTuple):
    pointer: int
    name: str
    is_gpu: bool
    buffers: tuple[
        tuple[int, str, bool], ...
    ]  # pointer, name, whether llama.cpp can go without it; the plain one first


class _InitParams(ctypes.Structure):
    """ggml.h, struct ggml_init_params"""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _TypeTraits(ctypes.Structure):
    """ggml.h, struct ggml_type_traits; from_float_ref follows"""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
    )


class _Engine:
    """llama.cpp in this process, and the calls of ggml that a product takes."""

    def __init__(self) -> None:
        _preload_nvidia(Path(sysconfig.get_path("purelib")) / "nvidia")
        self._libraries = list(_libraries())
        pointer, size, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
        data = [pointer, pointer, size, size]
        self.init = self._symbol("ggml_init", pointer, _InitParams)
        self.free = self._symbol("ggml_free", None, pointer)
        self.tensor = self._symbol("ggml_new_tensor_2d", pointer, pointer, ctypes.c_int, integer, integer)
        self.product = self._symbol("ggml_mul_mat", pointer, pointer, pointer, pointer)
        self.graph = self._symbol("ggml_new_graph", pointer, pointer)
        self.expand = self._symbol("ggml_build_forward_expand", None, pointer, pointer)
        self.overhead = self._symbol("ggml_tensor_overhead", size)() * 8 + self._symbol("ggml_graph_overhead", size)()
        self.alloc = self._symbol("ggml_backend_alloc_ctx_tensors_from_buft", pointer, pointer, pointer)
        self.use = self._symbol("ggml_backend_buffer_set_usage", None, pointer, ctypes.c_int)
        self.free_buffer = self._symbol("ggml_backend_buffer_free", None, pointer)
        self.supports = self._symbol("ggml_backend_dev_supports_op", ctypes.c_bool, pointer, pointer)
        self.set = self._symbol("ggml_backend_tensor_set", None, *data)
        self.get = self._symbol("ggml_backend_tensor_get", None, *data)
        self.start = self._symbol("ggml_backend_dev_init", pointer, pointer, ctypes.c_char_p)
        self.compute = self._symbol("ggml_backend_graph_compute", ctypes.c_int, pointer, pointer)
        self.stop = self._symbol("ggml_backend_free", None, pointer)
        self.traits = self._symbol("ggml_get_type_traits", ctypes.POINTER(_TypeTraits), ctypes.c_int)
        self._address = self._symbol("ggml_backend_reg_get_proc_address", pointer, pointer, ctypes.c_char_p)
        self._registry = self._symbol("ggml_backend_dev_backend_reg", pointer, pointer)

    def _symbol(self, name: str, restype: Any, *argtypes: Any) -> Callable[..., Any]:
        for library in self._libraries:
            function = getattr(library, name, None)
            if function is not None:
                address = ctypes.cast(function, ctypes.c_void_p).value or 0
                return ctypes.CFUNCTYPE(restype, *argtypes)(address)
        raise RuntimeError(f"this llama.cpp does not export {name}")

    def devices(self, *, gpu: bool) -> Iterator[_Device]:
        pointer, text = ctypes.c_void_p, ctypes.c_char_p
        get = self._symbol("ggml_backend_dev_get", pointer, ctypes.c_size_t)
        name, kind = (
            self._symbol(f"ggml_backend_dev_{of}", is_, pointer) for of, is_ in (("name", text), ("type", ctypes.c_int))
        )
        plain = self._symbol("ggml_backend_dev_buffer_type", pointer, pointer)
        buffer_name = self._symbol("ggml_backend_buft_name", text, pointer)
        for index in range(self._symbol("ggml_backend_dev_count", ctypes.c_size_t)()):
            device = get(index)
            is_kind = _KINDS[kind(device)] if 0 <= kind(device) < len(_KINDS) else "other"
            if is_kind in ("cpu", "accel") or (gpu and is_kind in ("gpu", "igpu")):
                types = [(plain(device), False), *((extra, True) for extra in self._extra_buffers(device))]
                named = tuple((one, buffer_name(one).decode(), is_extra) for one, is_extra in types)
                yield _Device(device, name(device).decode(), is_kind in ("gpu", "igpu"), named)

    def _extra_buffers(self, device: int) -> Iterator[int]:
        address = self._address(self._registry(device), b"ggml_backend_dev_get_extra_bufts")
        if address:
            pointer = ctypes.c_void_p
            found = ctypes.CFUNCTYPE(ctypes.POINTER(pointer), pointer)(address)(device)
            for index in range(64):
                if not found or not found[index]:
                    return
                yield found[index]

    def set_threads(self, device: _Device, backend: int, n: int) -> None:
        address = self._address(self._registry(device.pointer), b"ggml_backend_set_n_threads")
        if address:
            ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(address)(backend, n)


def _preload_nvidia(root: Path) -> None:
    """CUDA 12 wheels keep libraries in nvidia/NAME/lib, CUDA 13 in nvidia/cu13/lib, Windows in bin and bin/x86_64."""
    pattern = "{}64_*.dll" if sys.platform == "win32" else "lib{}.so.*"
    for name in ("cudart", "cublasLt", "cublas"):  # in the order in which they depend on each other
        for path in sorted(root.rglob(pattern.format(name)), reverse=True):
            with contextlib.suppress(OSError):  # the import that follows says what is missing
                if sys.platform == "win32":
                    os.add_dll_directory(str(path.parent))
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _libraries() -> Iterator[Any]:
    """The handle that llama_cpp holds; on Windows a handle does not show the DLLs it depends on."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None:
        raise RuntimeError("llama-cpp-python is not installed")
    # Its modules are found, and its __init__, which imports a tenth of a second of what is not used here, is not run.
    sys.modules.setdefault("llama_cpp", importlib.util.module_from_spec(spec))
    low: Any = importlib.import_module("llama_cpp.llama_cpp")
    low.llama_log_set(_SILENT, None)
    low.llama_backend_init()
    yield low._lib
    folder = Path(os.environ.get("LLAMA_CPP_LIB_PATH") or Path(low.__file__ or "").parent / "lib")
    for name in ("ggml-base.dll", "ggml.dll", "ggml-cpu.dll") if sys.platform == "win32" else ():
        if (folder / name).exists():
            yield ctypes.CDLL(str(folder / name))


def _check_device(
    engine: _Engine, device: _Device, skipped: frozenset[str], say: Callable[[Mapping[str, Any]], None]
) -> None:
    todo = [
        (buffer, name, extra, kind)
        for buffer, name, extra in device.buffers
        for kind in TYPES
        if not {f"--skip={device.name}:{name}:{one}" for one in (kind, "*")} & skipped
    ]
    if not todo:
        return
    backend = engine.start(device.pointer, None)
    if not backend:
        raise RuntimeError(f"the device {device.name} does not start")
    engine.set_threads(device, backend, _N_THREADS)
    for buffer, name, extra, kind in todo:
        for rows in ROWS:
            place = {"device": device.name, "gpu": device.is_gpu, "buffer": name, "extra": extra}
            product = {**place, "type": kind, "rows": rows}
            with _graph(engine, device, buffer, kind, rows) as graph:
                if graph is not None:
                    say({"running": product})
                    say({"result": {**product, "error": _error(engine, backend, kind, rows, graph)}})
    engine.stop(backend)


class _Graph(NamedTuple):
    """Pointers to a graph and its tensors."""

    graph: int
    weights: int  # shape [N_OUT, N_IN]
    x: int  # shape [rows, N_IN]
    y: int  # shape [rows, N_OUT]


@contextlib.contextmanager
def _graph(engine: _Engine, device: _Device, buffer: int, kind: str, rows: int) -> Iterator[_Graph | None]:
    """One product, its weights in a buffer of the given type; None where the device does not compute it there."""
    contexts = [engine.init(_InitParams(engine.overhead, None, True)) for _ in range(2)]
    buffers = []
    try:
        weights = engine.tensor(contexts[0], TYPES[kind].id, N_IN, N_OUT)
        x = engine.tensor(contexts[1], TYPES["F32"].id, N_IN, rows)
        y = engine.product(contexts[1], weights, x)
        buffers.append(engine.alloc(contexts[0], buffer))
        if buffers[0] and engine.supports(device.pointer, y):
            engine.use(buffers[0], 1)  # GGML_BACKEND_BUFFER_USAGE_WEIGHTS
            buffers.append(engine.alloc(contexts[1], device.buffers[0][0]))
            graph = engine.graph(contexts[1])
            engine.expand(graph, y)
            yield _Graph(graph, weights, x, y)
        else:
            yield None
    finally:
        for one in filter(None, buffers):
            engine.free_buffer(one)
        for context in contexts:
            engine.free(context)


def _error(engine: _Engine, backend: int, kind: str, rows: int, graph: _Graph) -> float | None:
    """The largest |error| / (|w| |x|) of a product; None where a number is none, or nothing was computed."""
    import numpy as np

    data, x = _random_weights(kind), _uniform(f"x{rows}", rows * N_IN)
    w = _floats(engine, kind)
    y = np.full((rows, N_OUT), np.nan, np.float32)
    engine.set(graph.weights, data, 0, len(data))
    engine.set(graph.x, x.tobytes(), 0, x.nbytes)
    if engine.compute(backend, graph.graph):
        return None
    engine.get(graph.y, y.ctypes.data, 0, y.nbytes)
    exact = x.astype(np.float64).reshape(rows, N_IN)
    norms = np.linalg.norm(exact, axis=1)[:, None] * np.linalg.norm(w, axis=1)[None, :]
    error = float(np.max(np.abs(y - np.einsum("ij,kj->ik", exact, w)) / norms))
    return error if math.isfinite(error) else None


def _uniform(name: str, n: int) -> Floats:
    """Numbers from -1 to 1, the same on every machine."""
    import numpy as np

    words = np.frombuffer(random.Random(f"{_SEED}:{name}").randbytes(4 * n), "<u4")
    return (words / 2**31 - 1).astype(np.float32)


@functools.cache
def _random_weights(kind: str) -> bytes:
    """Rows of N_IN values as random blocks, with scales that are no NaN and not far apart."""
    import numpy as np

    layout, n = TYPES[kind], N_OUT * N_IN
    if not layout.scales:
        values = _uniform(kind, n)
        if kind == "BF16":
            return bytes((values.view("<u4") >> 16).astype("<u2").tobytes())
        return bytes(values.astype("<f2" if kind == "F16" else "<f4").tobytes())
    n_blocks = n // layout.n
    random_bytes = random.Random(f"{_SEED}:{kind}").randbytes(n_blocks * layout.n_bytes)
    blocks = np.frombuffer(random_bytes, np.uint8).reshape(n_blocks, layout.n_bytes).copy()
    scale = 0.01 * (1 + _uniform(f"{kind} scales", n_blocks) / 2)
    for offset, times in layout.scales:
        blocks[:, offset : offset + 2] = (scale * times).astype("<f2").view(np.uint8).reshape(n_blocks, 2)
    return bytes(blocks.tobytes())


@functools.cache
def _floats(engine: _Engine, kind: str) -> Doubles:
    """The weights' values, of blocks as ggml reads them. Shape: (N_OUT, N_IN)."""
    import numpy as np

    data = _random_weights(kind)
    return _read(engine, kind, data).astype(np.float64).reshape(N_OUT, N_IN)


def _read(engine: _Engine, kind: str, data: bytes) -> Floats:
    import numpy as np

    layout = TYPES[kind]
    if kind == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    if not layout.scales:
        return np.frombuffer(data, "<f2" if kind == "F16" else "<f4").astype(np.float32)
    traits = engine.traits(layout.id).contents
    if (traits.blck_size, traits.type_size) != (layout.n, layout.n_bytes) or not traits.to_float:
        raise RuntimeError(f"this llama.cpp has other blocks of {kind}")
    values = np.empty(N_OUT * N_IN, np.float32)
    read = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64)(traits.to_float)
    read(data, values.ctypes.data, values.size)
    return values


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
