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
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
FOLDERS = {"qwq_lite": ROOT / "qwq_lite", "qwq_convert": ROOT / "convert" / "qwq_convert"}


def table(header: str) -> list[tuple[str, int]]:
    """Rooms and their numbers, from the rows of docs/design.md below a header."""
    rows = DESIGN.split(f"| | {header} |", maxsplit=1)[1].split("\n\n", maxsplit=1)[0].splitlines()[2:]
    cells = [row.split("|")[1:3] for row in rows]
    return [(name, int(number)) for number, names in cells for name in re.findall(r"`([^`]+)`", names)]


TABLES = {"qwq_lite": table("room"), "qwq_convert": table("room of qwq_convert")}
MODULES = [(package, path) for package, folder in FOLDERS.items() for path in sorted(folder.rglob("*.py"))]


def dotted(package: str, path: Path) -> str:
    """A file's name below its package, as an import says it; `__init__` for the package's own file."""
    parts = path.relative_to(FOLDERS[package]).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def room(package: str, name: str) -> str | None:
    """The room of a module, or None for a folder that is no room but has a room for each of its files."""
    rooms = dict(TABLES[package])
    top = name.split(".", maxsplit=1)[0]
    if f"{top}/" in rooms:
        return f"{top}/"
    return name if name in rooms else None


def imports(package: str, path: Path, of: str) -> Iterator[str]:
    """Modules below the package `of` that a file imports, at any depth of its code, and under TYPE_CHECKING too."""
    known = {dotted(of, file) for owner, file in MODULES if owner == of}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = [package, *path.relative_to(FOLDERS[package]).parts]
                base = ".".join([*above[: -node.level], *([base] if base else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:  # of `from a.b import c`, c may be a module or something in one
            first, *parts = name.split(".")
            if first == of:
                found = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
                yield next((module for module in found if module in known), "__init__")


@pytest.mark.parametrize("package", TABLES)
def test_every_module_stands_in_the_table_once(package: str) -> None:
    listed = [name for name, _ in TABLES[package]]
    assert len(listed) == len(set(listed))
    used = set()
    for path in [path for owner, path in MODULES if owner == package]:
        mine = room(package, dotted(package, path))
        if mine is None:
            assert path.name == "__init__.py", f"{path.name} is not in the table"
            assert len(ast.parse(path.read_text(encoding="utf-8")).body) == 1, f"{path} has more than its docstring"
        else:
            used.add(mine)
    assert used == set(listed), "the table has a room that there is not"


@pytest.mark.parametrize(
    ("package", "path"), MODULES, ids=lambda value: value.stem if isinstance(value, Path) else value
)
def test_imports_run_upward(package: str, path: Path) -> None:
    numbers, mine = dict(TABLES[package]), room(package, dotted(package, path))
    for name in imports(package, path, package):
        other = room(package, name)
        if other is not None and other != mine:
            assert mine is not None and numbers[other] < numbers[mine], f"{mine} imports {name}"


def test_only_the_backend_imports_llama_cpp() -> None:
    for path in [*ROOT.glob("qwq_lite/**/*.py"), *ROOT.glob("convert/**/*.py")]:
        names = re.findall(r"^\s*(?:import|from) (llama_cpp)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert not names or path.parent.name == "backend", path


def test_the_converter_imports_what_the_page_says() -> None:
    sentence = re.search(r"^`qwq_convert` imports from `qwq_lite` only ([^.]+(?:\.\w[^.]*)*)\. ", DESIGN, re.MULTILINE)
    assert sentence
    paths = [path for package, path in MODULES if package == "qwq_convert"]
    found = {name for path in paths for name in imports("qwq_convert", path, "qwq_lite")}
    assert found == set(re.findall(r"`([^`]+)`", sentence[1]))


def test_the_runtime_does_not_import_the_converter() -> None:
    for path in [path for package, path in MODULES if package == "qwq_lite"]:
        assert not [*imports("qwq_lite", path, "qwq_convert")], path


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
        "EngineCrashed",
        "EngineError",
        "Event",
        "FormatError",
        "Model",
        "Notice",
        "OutputError",
        "PlanError",
        "Planned",
        "Progress",
        "QwqError",
        "Reply",
        "RequestCrashed",
        "RunPlan",
        "Stats",
        "Stream",
        "TemplateError",
        "Thinking",
        "UsageError",
        "Wishes",
        "load",
        "plan_model",
        "run_worker_if_asked",
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
