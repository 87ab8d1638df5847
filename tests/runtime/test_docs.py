"""The library's page: each of its examples runs as it stands, with a small model under QwQ's name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import qwq_lite

PAGE = Path(__file__).resolve().parents[2] / "docs" / "library.md"
BLOCKS = re.findall(
    r"^## (.+?)\n(?:(?!^## ).)*?^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE
)


def test_every_example_is_found() -> None:
    assert len(BLOCKS) == PAGE.read_text("utf-8").count("```python") >= 7


@pytest.mark.parametrize(("title", "code"), BLOCKS, ids=[title for title, _ in BLOCKS])
def test_an_example_runs(
    title: str,
    code: str,
    demo_gguf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "QwQ-32B-Preview-Q4_K_M.gguf").symlink_to(demo_gguf)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, title, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip(), "an example shows something"


def test_the_page_names_every_public_name_but_single_errors() -> None:
    text = PAGE.read_text("utf-8")
    errors = {
        name
        for name in qwq_lite.__all__
        if isinstance(kind := getattr(qwq_lite, name), type) and issubclass(kind, BaseException)
    }
    assert {name for name in qwq_lite.__all__ if f"`{name}" not in text} <= errors
