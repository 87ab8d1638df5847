"""llama.cpp's own converter, out of the source package of the very engine that is installed.

It is not the `gguf` of the registry: beside the engine's source lie a newer gguf-py and the converter's classes. One process
converts any number of folders, since most of its time goes into importing torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tests.engine_source import PACKAGE, kept

SCRIPT = "convert_hf_to_gguf.py"
WANTED = (SCRIPT, "conversion/", "gguf-py/gguf/")
# The script's own __main__, once for each call; its imports are found beside it.
DRIVER = """
import json, os, runpy, sys
script, calls = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, os.path.dirname(script))
for call in calls:
    sys.argv = [script, *call]
    runpy.run_path(script, run_name="__main__")
"""


@cache
def reference_converter() -> Path:
    """The script, with the Python files that it imports beside it, for the version of the engine that is installed."""
    script = kept("converter", lambda path: path.suffix == ".py" and str(path).startswith(WANTED)) / SCRIPT
    assert script.exists(), f"{PACKAGE} holds no {SCRIPT}"
    return script


def convert_as_reference(calls: Sequence[tuple[Path, Path, str]]) -> None:
    """Convert each (folder, output, type) with llama.cpp's converter, in one process without a network."""
    arguments = [[str(folder), "--outfile", str(output), "--outtype", kind] for folder, output, kind in calls]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(reference_converter()), json.dumps(arguments)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
