"""A one-shot child that answers one question about llama.cpp: what ends it does not end who asks."""

from __future__ import annotations

import os
import subprocess
import sys

TIMEOUT_S = 120  # the first load of a CUDA build compiles kernels for cards newer than itself


def ask(module: str, function: str, question: str = "") -> subprocess.CompletedProcess[str]:
    """Call `module.function()` in a fresh interpreter, with `question` on its standard input, and wait for its end.

    Raises: subprocess.TimeoutExpired.
    """
    # -c and the parent's own path: with -m, a file called numpy.py in the current folder would be taken for numpy.
    code = f"import sys; sys.path[:] = {sys.path!r}; from {module} import {function}; {function}()"
    return subprocess.run(
        [sys.executable, "-c", code],
        input=question,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=TIMEOUT_S,
        check=False,
        # ggml's backtrace of an abort comes after the reason, hides it and may wait for a debugger.
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
    )
