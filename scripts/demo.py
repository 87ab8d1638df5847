"""The main job on a small real model: make its checkpoint, convert it, ask it. Rebuilds nothing that exists.

python scripts/demo.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.demo_checkpoint import DemoError, make_demo  # noqa: E402

FOLDER = ROOT / "build" / "demo"
CHECKPOINT = FOLDER / "SmolLM2-135M-Instruct"
MODEL = FOLDER / "SmolLM2-135M-Instruct-Q4_K_M.gguf"
QUESTION = "What is the capital of France?"
# A model of 135 million parameters answers in French, or in no language, unless it is told how: docs/log.md has the count.
SYSTEM = "Answer in one short English sentence."


def qwq_lite(*arguments: str) -> None:
    print("$ qwq-lite", *(f'"{word}"' if " " in word else word for word in arguments), flush=True)
    subprocess.run([sys.executable, "-m", "qwq_lite", *arguments], check=True)


def main() -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        made = make_demo(CHECKPOINT)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    print(f"{CHECKPOINT}: {'made' if made else 'is there'}")
    try:
        # The file's name appears only when it is complete, so one that exists is whole; it is older than its source only
        # when that was made anew.
        if not MODEL.exists() or MODEL.stat().st_mtime < (CHECKPOINT / "config.json").stat().st_mtime:
            qwq_lite("convert", str(CHECKPOINT), "-q", "Q4_K_M", "-o", str(MODEL), "--force")
        else:
            print(f"{MODEL}: is there, {MODEL.stat().st_size / 1e6:.1f} MB")
        qwq_lite("chat", str(MODEL), "-s", SYSTEM, "-p", QUESTION, "--seed", "1")
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
