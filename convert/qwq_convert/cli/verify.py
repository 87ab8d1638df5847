"""qwq-lite verify: whether a converted file is what it was, and how far it is from its checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from qwq_convert.checkpoint.files import Checkpoint
from qwq_convert.cli import rounding
from qwq_convert.cli.bar import bar
from qwq_convert.roundtrip import RoundTrip
from qwq_convert.verify import Verification, compare, read_header, verify
from qwq_lite.cli import console
from qwq_lite.cli.console import escaped, size
from qwq_lite.errors import FormatError, QwqError

_UNLIKE = 0.8  # cosine below which it is hardly the same model: two-bit types stay above 0.9
_MEND = "fetch it again, or convert the checkpoint again"


@click.command(cls=console.Command)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--source", type=click.Path(path_type=Path), metavar="DIR", help="Also compare with this checkpoint.")
@click.option("-j", "--threads", type=click.IntRange(1, 512), help="Threads that read.  [default: all CPUs it may use]")
@click.option("--quiet", is_flag=True, help="No bar, and nothing said of a file that is OK.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def command(file: Path, source: Path | None, threads: int | None, quiet: bool, as_json: bool) -> None:
    """Say whether FILE, a GGUF file of `qwq-lite convert`, is what it was when it was written.

    Its structure is checked, and each tensor against the SHA-256 that the file carries. Its name and place do not matter. Of a
    split model, also one that llama-gguf-split has made of such a file, FILE is the first part, and all are read. Exit
    status 1 when it is damaged, and for a file without digests, which cannot be verified.

    Example: qwq-lite verify QwQ-32B-Q4_K_M.gguf
    """
    found: dict[str, RoundTrip] = {}
    try:
        header = read_header(file)
        data_bytes = sum(info.n_bytes for info in header.tensors)
        with contextlib.ExitStack() as stack:
            checkpoint = stack.enter_context(Checkpoint(source)) if source else None
            report = stack.enter_context(bar(2 * data_bytes if source else data_bytes, quiet))
            result = verify(header, threads, report)
            if checkpoint is not None and result.outcome != "damaged":
                found = compare(header, checkpoint, threads, report)
    except QwqError as error:
        if as_json:
            click.echo(json.dumps({"file": str(file), "outcome": "error", "message": str(error)}, indent=2))
        raise
    if as_json:
        click.echo(json.dumps(_as_dict(result, found), indent=2, allow_nan=False))
    else:
        _show(result, found, quiet)
    if source is not None and result.outcome == "damaged":
        click.secho("note: a damaged file is not compared with its checkpoint", err=True, dim=True)
    if result.outcome != "OK":
        raise FormatError(_verdict(result))
    if unlike := _unlike(found):
        raise FormatError(
            f"{file}: is whole, and was not made from {source}: {len(unlike)} of {len(found)} tensors are hardly the same"
            f" weights, the first is {unlike[0]}; name the checkpoint that it was made from, or convert this one"
        )


def _unlike(found: dict[str, RoundTrip]) -> list[str]:
    """Tensors that no rounding explains."""
    return [name for name, error in found.items() if not error.cosine >= _UNLIKE]


def _verdict(result: Verification) -> str:
    """One line on a file that is not OK."""
    path, n_tensors = result.header.path, len(result.header.tensors)
    if result.outcome == "cannot be verified":
        return (
            f"{path}: cannot be verified: it holds no digests (qwq_lite.sha256); compare it with the digest that its publisher"
            " gives, or convert the checkpoint with qwq-lite convert, whose files hold them"
        )
    tensors = {fault.place for fault in result.faults} - {"the header", "the end"}
    places = [f"{len(tensors)} of {n_tensors} tensors"] if tensors else []
    places += sorted({fault.place for fault in result.faults} - tensors)
    return f"{path}: is damaged: {', '.join(places)}; {_MEND}"


def _show(result: Verification, found: dict[str, RoundTrip], quiet: bool) -> None:
    """What is wrong, and where the weights are furthest from the checkpoint's, on stdout."""
    types = {info.name: info.type for info in result.header.tensors}
    for fault in result.faults:
        kind = f" ({types[fault.place].name})" if fault.place in types else ""
        click.echo(escaped(f"{fault.place}{kind}: {fault.message}"))
    if quiet:
        return
    if found:
        rounding.show(found, types)
    held = f"{len(result.header.tensors)} tensors, {size(result.header.file_bytes)}"
    if result.outcome == "OK":
        click.echo(escaped(f"{result.header.path}: OK: {held}; the header and every tensor match their digests"))
    elif result.outcome == "cannot be verified":
        click.echo(escaped(f"{result.header.path}: {held}; the structure is sound, the contents are unknown"))


def _as_dict(result: Verification, found: dict[str, RoundTrip]) -> dict[str, Any]:
    return {
        "file": str(result.header.path),
        "outcome": result.outcome,
        "digests": result.sealed,
        "n_tensors": len(result.header.tensors),
        "n_bytes": result.header.file_bytes,
        "faults": [dataclasses.asdict(fault) for fault in result.faults],
        "errors": rounding.as_dict(found),
        "unlike": _unlike(found),
    }
