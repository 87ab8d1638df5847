"""Files out of the source package of the very engine that is installed, for comparisons with llama.cpp's own.

They are data of others and are not copied here. pip fetches the package; what a comparison needs of it is kept under
build/oracle, by the engine's version.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest

from scripts.demo_checkpoint import DownloadError
from tests.oracle import BUILD, built_once

PACKAGE = "llama-cpp-python"
VENDORED = "vendor/llama.cpp"


def kept(name: str, wanted: Callable[[PurePosixPath], bool]) -> Path:
    """The folder under build/oracle with the files of llama.cpp that `wanted` names, by their paths there.

    Skips the test where pip cannot fetch the package.
    """
    version = importlib.metadata.version(PACKAGE)
    folder = BUILD / "oracle" / f"{name}-{version}"
    with built_once():
        if not folder.exists():
            try:
                with tempfile.TemporaryDirectory(dir=folder.parent) as room:
                    extract(download_sdist(f"{PACKAGE}=={version}", Path(room)), Path(room, "new"), wanted)
                    Path(room, "new").rename(folder)
            except DownloadError as e:
                pytest.skip(str(e))
    return folder


def extract(sdist: Path, folder: Path, wanted: Callable[[PurePosixPath], bool]) -> None:
    """Copy some of llama.cpp's files out of the package, and nothing else of its thousands."""
    folder.mkdir()
    with tarfile.open(sdist) as archive:
        for member in archive:
            name = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            if not name.is_relative_to(VENDORED) or ".." in name.parts or not wanted(name.relative_to(VENDORED)):
                continue
            content = archive.extractfile(member)
            if content is not None:
                path = folder / name.relative_to(VENDORED)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.read())


def download_sdist(package: str, folder: Path) -> Path:
    """Let pip fetch the source package of `package`, without what it depends on; pip also prepares its metadata.

    Raises: DownloadError with pip's own last word.
    """
    options = ("--no-deps", "--no-binary", PACKAGE, "--disable-pip-version-check", "--dest", str(folder))
    pip = [sys.executable, "-m", "pip", "download", *options, package]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("*.tar.gz"))
    if done.returncode or not found:
        said = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines() or ["nothing"]
        raise DownloadError(f"pip could not download the source of {package}: {said[-1].removeprefix('ERROR: ')}")
    return found[-1]
