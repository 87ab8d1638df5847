"""Write docs/cli.md from the commands' own help, or with --check compare and fail.

python scripts/docs.py [--check]
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TARGET = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
COMMANDS = ("plan", "convert", "verify", "inspect", "chat", "doctor")


def help_text(*words: str) -> str:
    """What `qwq-lite WORDS --help` prints, 100 columns wide."""
    code = (
        "import sys; from qwq_lite.cli import commands; sys.argv[0] = 'qwq-lite';"
        "commands.main(prog_name='qwq-lite', max_content_width=100, terminal_width=100)"
    )
    environment = {**os.environ, "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--help"],
        capture_output=True,
        encoding="utf-8",
        check=True,
        env=environment,
    )
    return done.stdout.rstrip()


def page() -> str:
    parts = ["# Commands\n\nMade from the commands' own help by `make docs`.\n"]
    for words in ((), *((name,) for name in COMMANDS)):
        parts.append(f"## {' '.join(('qwq-lite', *words))}\n\n```\n{help_text(*words)}\n```\n")
    return "\n".join(parts)


def main() -> int:
    text = page()
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(text, encoding="utf-8")
        return 0
    if TARGET.exists() and TARGET.read_text(encoding="utf-8") == text:
        return 0
    print(f"{TARGET.name} is not what the commands say; run: make docs", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
