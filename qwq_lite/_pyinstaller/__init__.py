"""What PyInstaller must know of this package, found by it through an entry point."""

from __future__ import annotations

from pathlib import Path


def get_hook_dirs() -> list[str]:
    """Folders with hooks. Source: PyInstaller, "Providing PyInstaller hooks with your package"."""
    return [str(Path(__file__).parent)]
