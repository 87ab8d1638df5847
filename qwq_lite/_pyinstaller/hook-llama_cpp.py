"""llama.cpp's libraries, each once: a wheel has every one under three names, and two copies in one process are two engines."""

from __future__ import annotations

import filecmp
from pathlib import Path

from PyInstaller.utils.hooks import collect_dynamic_libs

_OPENED = "libllama"  # by llama_cpp, under its shortest name
_UNUSED = "libmtmd"  # reads pictures and sound, and needs libllama under another name


def _is_wanted(library: Path) -> bool:
    """Whether a library must be named here: what another one needs, under a name of its own, PyInstaller finds."""
    stem = library.name.split(".")[0]
    if stem in (_OPENED, _UNUSED):
        return stem == _OPENED and library.name.count(".") == 1  # macOS' other names end in .dylib too
    others = (path for path in library.parent.glob(f"{stem}.*") if path != library)
    return not any(filecmp.cmp(library, other, shallow=False) for other in others)


binaries = [entry for entry in collect_dynamic_libs("llama_cpp") if _is_wanted(Path(entry[0]))]
