"""Who may import whom, what `import qwq_lite` costs, and that no library is mapped twice."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import qwq_lite
from qwq_lite.backend import native

ROOT = Path(__file__).resolve().parents[2]
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
FOLDERS = {"qwq_lite": ROOT / "qwq_lite", "qwq_convert": ROOT / "convert" / "qwq_convert"}
MODULES = [(owner, path) for owner, folder in FOLDERS.items() for path in sorted(folder.rglob("*.py"))]
WITH_CODE = {"__init__", "cli", "_pyinstaller"}  # packages of qwq_lite that entry points name


def table(owner: str) -> dict[str, int]:
    """Packages, and the number of their row in docs/design.md."""
    rows = DESIGN.split(f"| package of {owner} |", maxsplit=1)[1].split("\n\n", maxsplit=1)[0].splitlines()[2:]
    return {name: n for n, row in enumerate(rows) for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


TABLES = {owner: table(owner) for owner in FOLDERS}


def dotted(owner: str, path: Path) -> str:
    """A file's name below its package, as an import says it; `__init__` for the package's own file."""
    parts = path.relative_to(FOLDERS[owner]).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def row(owner: str, name: str) -> int:
    """The row of a module: its package's, or its own; modules at the top of qwq_convert have one together."""
    top = name.split(".", maxsplit=1)[0]
    return TABLES[owner][top if top in TABLES[owner] or owner == "qwq_lite" else owner]


def imports(owner: str, path: Path, of: str) -> Iterator[str]:
    """Modules below the package `of` that a file imports, at any depth of its code, and under TYPE_CHECKING too."""
    known = {dotted(of, file) for package, file in MODULES if package == of}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:  # of `from a.b import c`, c may be a module or something in one
            first, *parts = name.split(".")
            if first == of:
                found = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
                yield next((module for module in found if module in known), "__init__")


@pytest.mark.parametrize("owner", FOLDERS)
def test_every_package_stands_in_the_table_once(owner: str) -> None:
    tops = {dotted(owner, path).split(".", maxsplit=1)[0] for package, path in MODULES if package == owner}
    packages = {path.parent.name for path in FOLDERS[owner].glob("*/__init__.py")}
    assert packages <= TABLES[owner].keys()
    assert TABLES[owner].keys() == (tops if owner == "qwq_lite" else {*packages, owner})


@pytest.mark.parametrize(
    "path", [path for _, path in MODULES if path.name == "__init__.py"], ids=lambda p: p.parent.name
)
def test_a_package_holds_a_docstring_and_few_modules(path: Path) -> None:
    code = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(code)
    assert len(code.body) == 1 or (path.parent == FOLDERS["qwq_lite"] or path.parent.name in WITH_CODE)
    assert len([*path.parent.glob("*.py")]) <= 1 + 13


def test_the_top_of_the_package_is_short() -> None:
    assert len([*FOLDERS["qwq_lite"].glob("*.py")]) <= 8


@pytest.mark.parametrize(("owner", "path"), MODULES, ids=lambda value: value.stem if isinstance(value, Path) else value)
def test_a_module_is_short(owner: str, path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize(("owner", "path"), MODULES, ids=lambda value: value.stem if isinstance(value, Path) else value)
def test_imports_run_upward(owner: str, path: Path) -> None:
    mine = dotted(owner, path)
    for name in imports(owner, path, owner):
        assert row(owner, name) <= row(owner, mine), f"{mine} imports {name}"


@pytest.mark.parametrize("owner", FOLDERS)
def test_no_modules_import_each_other_in_a_circle(owner: str) -> None:
    graph = {
        dotted(owner, path): {*imports(owner, path, owner)} - {dotted(owner, path)}
        for package, path in MODULES
        if package == owner
    }
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_only_the_backend_imports_llama_cpp() -> None:
    for path in [*ROOT.glob("qwq_lite/**/*.py"), *ROOT.glob("convert/**/*.py")]:
        names = re.findall(r"^\s*(?:import|from) (llama_cpp)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert not names or path.parent.name == "backend", path


def test_the_converter_imports_what_the_page_says() -> None:
    sentence = re.search(
        r"^`qwq_convert` imports from `qwq_lite` only (.*?), in\s+its commands (.*?) too\.", DESIGN, re.M | re.S
    )
    assert sentence
    anywhere, in_commands = ({*re.findall(r"`([^`]+)`", names)} for names in sentence.groups())
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for path in [path for owner, path in MODULES if owner == "qwq_convert"]:
        tops = {name.split(".", maxsplit=1)[0] for name in imports("qwq_convert", path, "qwq_lite")}
        found[path.parent.name == "cli"] |= tops
    assert found[False] == anywhere
    assert found[True] <= anywhere | in_commands and in_commands <= found[True]


def test_the_runtime_does_not_import_the_converter() -> None:
    for path in [path for owner, path in MODULES if owner == "qwq_lite"]:
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
