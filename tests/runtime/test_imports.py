"""Who may import whom, what `import qwq_lite` costs, and that no library is mapped twice."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qwq_lite
from qwq_lite.backend import native

ROOT = Path(__file__).resolve().parents[2]
# From the ground up: a module imports only modules that stand before it.
ROOMS = [
    "_version",
    "errors",
    "files",
    "output",
    "gguf_header",
    "normalization",
    "sampling",
    "catalog",
    "shape",
    "recipe",
    "hardware",
    "diagnosis",
    "backend",
    "budget",
    "sandbox",
    "template",
    "prompt",
    "events",
    "history",
    "stream",
    "model",
    "generation",
    "policies",
    "track",
    "state_file",
    "sequences",
    "scheduler",
    "chat",
    "local",
    "cli",
    "__main__",
]
BACKEND = ["native", "kernels", "vocab", "model", "context", "sampler", "devices"]
CONVERT_MAY_IMPORT = {"errors", "files", "output", "catalog", "shape", "recipe", "gguf_header", "backend.kernels"}
CONVERT_MAY_IMPORT |= {
    "normalization",
    "backend",
    "_version",
}  # `from qwq_lite.backend import kernels` names the folder


def imports(path: Path, package: str) -> Iterator[str]:
    """Dotted names below `package` that a file imports, at any depth of its code but under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith(f"{package}."):
                yield name.removeprefix(f"{package}.")


def room(name: str) -> str:
    return name.split(".", maxsplit=1)[0]


def test_every_module_has_a_place() -> None:
    found = {path.stem for path in (ROOT / "qwq_lite").glob("*.py")} - {"__init__"}
    assert found <= set(ROOMS), f"not in the order: {found - set(ROOMS)}"


@pytest.mark.parametrize("module", ROOMS)
def test_imports_run_upward(module: str) -> None:
    allowed = set(ROOMS[: ROOMS.index(module)])
    single = ROOT / "qwq_lite" / f"{module}.py"
    files = [single] if single.exists() else sorted((ROOT / "qwq_lite" / module).glob("*.py"))
    assert files
    for file in files:
        wrong = {name for name in map(room, imports(file, "qwq_lite")) if name in ROOMS} - allowed - {module}
        assert not wrong, f"{file.name} imports {wrong}"


def test_only_the_backend_imports_llama_cpp() -> None:
    for path in [*ROOT.glob("qwq_lite/**/*.py"), *ROOT.glob("convert/**/*.py")]:
        names = re.findall(r"^\s*(?:import|from) (llama_cpp)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert not names or path.parent.name == "backend", path


def test_the_converter_knows_little_of_the_runtime() -> None:
    for path in ROOT.glob("convert/qwq_convert/*.py"):
        modules = {
            name for name in imports(path, "qwq_lite") if (ROOT / "qwq_lite" / f"{name.replace('.', '/')}.py").exists()
        }
        assert modules <= CONVERT_MAY_IMPORT, f"{path.name}: {modules - CONVERT_MAY_IMPORT}"


def test_no_module_level_import_of_one_system_only() -> None:
    for path in [*ROOT.glob("qwq_lite/**/*.py"), *ROOT.glob("convert/**/*.py")]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            assert not names & {"fcntl", "resource", "termios", "msvcrt", "winreg", "pty"}, path


def test_importing_the_package_loads_neither_numpy_nor_llama_cpp() -> None:
    heavy = {"numpy", "llama_cpp", "click"}
    code = f"import sys; sys.path[:0] = {[str(ROOT)]!r}; import qwq_lite; print(sorted({heavy!r} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_public_names_are_pinned_and_all_there() -> None:
    assert qwq_lite.__all__ == [
        "Answer",
        "Chat",
        "CheckpointError",
        "ContextFull",
        "Done",
        "EngineClosed",
        "EngineError",
        "Event",
        "FormatError",
        "Model",
        "Notice",
        "OutputError",
        "PlanError",
        "Progress",
        "QwqError",
        "Reply",
        "Stats",
        "Stream",
        "TemplateError",
        "Thinking",
        "UsageError",
        "load",
    ]
    assert all(getattr(qwq_lite, name) is not None for name in qwq_lite.__all__)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_each_library_is_mapped_once() -> None:
    native.engine()
    native.symbol("ggml_quantize_chunk", None, [])
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
    for name in ("libllama", "libggml", "libggml-base", "libggml-cpu"):
        copies = {path for path in mapped if re.fullmatch(rf"{name}\.so(\.\d+)*", Path(path).name)}
        assert len(copies) == 1, copies


def test_a_missing_symbol_is_an_error_that_names_it() -> None:
    with pytest.raises(qwq_lite.EngineError, match="no_such_function"):
        native.symbol("no_such_function", None, [])
