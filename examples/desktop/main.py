"""A chat window for a GGUF model: what an application that embeds qwq_lite looks like.

python examples/desktop/main.py MODEL.gguf
"""

from __future__ import annotations

import sys

import qwq_lite


def main() -> int:
    # First of all, and before Qt is imported: when it is frozen, this program is also the engine's process.
    qwq_lite.run_worker_if_asked()
    from window import run

    return run(sys.argv)


if __name__ == "__main__":
    sys.exit(main())
