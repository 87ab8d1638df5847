"""What several tests of the installer start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.played import make_venv


@pytest.fixture
def venv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("CMAKE_ARGS", "CC", "CXX", "CFLAGS", "CXXFLAGS"):
        monkeypatch.delenv(name, raising=False)
    return make_venv(tmp_path)


@pytest.fixture
def said() -> list[str]:
    return []
