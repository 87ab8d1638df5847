"""llama.cpp's own converter, out of the source package of the very engine that is installed.

It is not the `gguf` of the registry: beside the engine's source lie a newer gguf-py and the converter's classes. pip fetches
the package once; what the converter needs of it is kept under build/oracle. One process converts any number of folders,
since most of its time goes into importing torch.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path, PurePosixPath

import pytest

from scripts.demo_checkpoint import DownloadError
from tests.oracle import BUILD
from tests.parity.templates import PACKAGE, download_sdist

VENDORED = "vendor/llama.cpp"
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
    """The script, with what it imports beside it, for the version of the engine that is installed."""
    version = importlib.metadata.version(PACKAGE)
    kept = BUILD / "oracle" / f"converter-{version}"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(dir=kept.parent) as room:
                extract_converter(download_sdist(f"{PACKAGE}=={version}", Path(room)), Path(room, "new"))
                Path(room, "new").rename(kept)
        except DownloadError as e:
            pytest.skip(str(e))
    return kept / SCRIPT


def extract_converter(sdist: Path, folder: Path) -> None:
    """Copy the converter's Python files out of the package, and nothing else of its thousands of files."""
    with tarfile.open(sdist) as archive:
        for member in archive:
            name = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            if not name.is_relative_to(VENDORED) or name.suffix != ".py" or ".." in name.parts:
                continue
            inner = name.relative_to(VENDORED)
            content = archive.extractfile(member) if str(inner).startswith(WANTED) else None
            if content is not None:
                (folder / inner).parent.mkdir(parents=True, exist_ok=True)
                (folder / inner).write_bytes(content.read())
    assert (folder / SCRIPT).exists(), f"{sdist.name} holds no {VENDORED}/{SCRIPT}"


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
