"""The command line in this process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qwq_lite.cli import commands, console


def run(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    """`qwq-lite WORDS`; its exit status. What it printed is in `capsys`."""
    monkeypatch.setattr(sys, "argv", ["qwq-lite", *map(str, words)])
    try:
        console.run(commands)
    except SystemExit as error:
        assert isinstance(error.code, int)
        return error.code
    return 0
