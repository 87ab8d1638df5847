"""Where results go: their names, what stands there already, the room on the disk. Knows no weights and no formats."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from gguf.constants import LlamaFileType

from qwq_convert.checkpoint.files import Checkpoint
from qwq_lite.errors import OutputError, UsageError
from qwq_lite.formats.tensor_types import file_type_name
from qwq_lite.system.output import temporary_name


def outputs(name: str, kinds: Sequence[LlamaFileType], output: str | Path | None) -> dict[LlamaFileType, Path]:
    """A file for each kind: `output` itself, or NAME-TYPE.gguf in a folder of that name, or else in the working folder.

    output: a folder where it is one, where it is written as one, or where several kinds are wanted.
    Raises: UsageError for several kinds and one file's name.
    """
    wanted, path = list(dict.fromkeys(kinds)), Path() if output is None else Path(output)
    if output is None or names_folder(output) or path.is_dir():
        return {kind: path / f"{name}-{file_type_name(kind)}.gguf" for kind in wanted}
    if len(wanted) == 1:
        return {wanted[0]: path}
    if path.suffix.lower() == ".gguf":
        raise UsageError(
            f"{path} names one file, and {len(wanted)} types are asked for; name a folder with -o, for example"
            f" {path.with_suffix('')}{os.sep}"
        )
    return outputs(name, wanted, f"{output}{os.sep}")


def names_folder(output: str | Path | None) -> bool:
    """Whether a name is written as a folder's: with a separator, or a dot, at its end. A Path has lost the separator."""
    return output is not None and os.path.basename(output) in ("", ".", "..")  # noqa: PTH119


def check(
    finals: Sequence[Path],
    checkpoint: Checkpoint,
    force: bool,
    keep: Sequence[Path] = (),
    make: bool = False,
) -> None:
    """Everything about names that can be known before work starts. keep: files that must not be replaced.

    make: the folder will be made where it is not there. Raises: OutputError.
    """
    for final in finals:
        _check_not_source(final, checkpoint, keep)
        folder = final.parent
        if not folder.is_dir() and (not make or folder.exists() or not folder.parent.is_dir()):
            raise OutputError(f"{final}: the folder {folder} is not there; make it first, or choose another -o")
        if final.is_dir():
            raise OutputError(f"{final}: is a folder; name a file with -o, for example {final / 'model.gguf'}")
        if final.exists() and not final.is_file():
            raise OutputError(f"{final}: is no regular file and will not be replaced; choose another -o")
        if os.path.lexists(final) and not force:
            raise OutputError(f"{final}: exists; replace it with --force, or choose another -o")


def check_room(files: Sequence[tuple[Path, int]]) -> None:
    """Whether each disk has room for what will be written to it. What a killed conversion left is written over.

    Raises: OutputError with what is missing.
    """
    wanted: dict[int, int] = defaultdict(int)
    folder_of = {}
    for final, n_bytes in files:
        temporary = temporary_name(final)
        folder = final.parent if final.parent.is_dir() else final.parent.parent  # one that will be made
        device = folder.stat().st_dev
        left_over = 512 * getattr(temporary.stat(), "st_blocks", 0) if temporary.is_file() else 0
        wanted[device] += n_bytes - left_over
        folder_of[device] = folder
    for device, n_bytes in wanted.items():
        free = shutil.disk_usage(folder_of[device]).free
        if free < n_bytes:
            raise OutputError(
                f"{folder_of[device]}: {n_bytes / 1e9:.2f} GB are needed there, {free / 1e9:.2f} GB are free;"
                f" make room for {(n_bytes - free) / 1e9:.2f} GB more, or choose another -o"
            )


def make_folder(folder: Path) -> None:
    """The folder for the results, unless it is there. Raises: OutputError."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder}: the folder cannot be made: {error.strerror or error}; choose another -o"
        ) from error


def _check_not_source(output: Path, checkpoint: Checkpoint, keep: Sequence[Path]) -> None:
    """The output must be no file that is read, whatever name or link leads to it."""
    if output.exists() and not output.is_dir():
        for file in [*checkpoint.folder.iterdir(), *keep]:
            if file.is_file() and file.samefile(output):
                raise OutputError(f"{output}: is {file}, which the conversion reads; choose another -o")
