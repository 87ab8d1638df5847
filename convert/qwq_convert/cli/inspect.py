"""qwq-lite inspect: what a model file or a checkpoint folder holds, as text or JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from qwq_convert.inspection import Inspection, Token, Tokenizer, TypeSum, inspect
from qwq_lite.cli import console
from qwq_lite.cli.console import escaped, size
from qwq_lite.errors import CheckpointError
from qwq_lite.formats.shape import ModelShape

_ADDED = 12  # tokens shown
_LINES, _COLUMNS = 4, 100  # of the template and of long values
Rows = Iterator[tuple[str, str]]


@click.command(cls=console.Command)
@click.argument("path", type=click.Path(path_type=Path), metavar="FILE|DIR")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def command(path: Path, as_json: bool) -> None:
    """Say what FILE, a GGUF model, or DIR, a Hugging Face checkpoint, holds.

    Architecture, sizes by type, tokenizer, template, sampling and where each setting comes from. No weight is read. Exit status 1
    for a checkpoint that `convert` would refuse.

    Example: qwq-lite inspect QwQ-32B-Q4_K_M.gguf
    """
    found = inspect(path)
    if as_json:
        click.echo(json.dumps(_as_dict(found), indent=2, allow_nan=False))
    else:
        _show(found)
    first, *more = found.faults or (None,)
    for notice in (*found.notices, *more):
        click.secho(escaped(f"note: {notice}"), err=True, dim=True)
    if first is not None:
        raise CheckpointError(first)


def _show(found: Inspection) -> None:
    click.echo(escaped(f"{found.path}: {found.form}, {size(found.n_bytes)}"))
    _section("Model", _model(found))
    click.echo("\nWeights")
    for line in _table(found):
        click.echo(f"  {line}")
    _section("Tokenizer", _tokenizer(found.tokenizer))
    _section("Template", _template(found.template))
    _section("Sampling", _sampling(found))
    _section("Origin", _origin(found))


def _section(title: str, rows: Rows) -> None:
    lines = [(escaped(name), escaped(text)) for name, text in rows]
    width = max((len(name) for name, _ in lines), default=0)
    click.echo(f"\n{title}")
    for name, text in lines:
        click.echo(f"  {name:{width}}  {text}".rstrip())


def _model(found: Inspection) -> Rows:
    yield "name", found.name or "not given"
    if found.file_type is not None:
        yield "file type", found.file_type
    if found.shape is not None:
        yield from _geometry(found.shape, found.tied)
    for key, value in found.rope.items():
        yield key.rpartition(".")[2] if "." in key else key, _value(value)
    if not found.types:
        return
    n_params = found.total.n_params
    yield "parameters", f"{n_params / 1e9:.2f} billion" if n_params >= 1e9 else f"{n_params / 1e6:.1f} million"


def _geometry(shape: ModelShape, tied: bool | None) -> Rows:
    yield "architecture", f"{shape.arch}, {shape.n_layer} layers of {shape.n_embd} columns, feed-forward {shape.n_ff}"
    yield "attention", f"{shape.n_head} heads of {shape.n_embd_head}, {shape.n_head_kv} for keys and values"
    output = "" if tied is None else f", output {'tied to the embedding' if tied else 'of its own'}"
    yield "vocabulary", f"{shape.n_vocab:,} rows{output}"
    yield "context", f"{shape.n_ctx_train:,} tokens trained"
    yield "rope base", f"{shape.rope_freq_base:,.0f}"
    yield "norm epsilon", f"{shape.rms_norm_eps:.3g}"


def _table(found: Inspection) -> Iterator[str]:
    if not found.types:
        yield "none that can be read"
        return
    yield f"{'type':8} {'tensors':>7} {'parameters':>15} {'size':>10} {'bits':>6}"
    for entry in [*found.types, *([found.total] if len(found.types) > 1 else [])]:
        yield _row(entry)


def _row(entry: TypeSum) -> str:
    return f"{entry.type:8} {entry.n_tensors:7} {entry.n_params:15,} {size(entry.n_bytes):>10} {entry.bits:6.2f}"


def _tokenizer(words: Tokenizer | None) -> Rows:
    if words is None:
        yield "none", "no tokens, or none that can be understood"
        return
    yield "model", f"{words.model or 'not given'}, pre-tokenizer {words.pre or 'not given'}"
    yield "tokens", f"{words.n_tokens:,}, of which {words.n_unused:,} unused; {words.n_merges:,} merges"
    yield "normaliser", f"{words.normalizer} ({words.normalizer_origin})"
    yield "adds", f"bos {_flag(words.add_bos)}, eos {_flag(words.add_eos)}"
    for token in words.special:
        yield token.role, _token(token) if token.text else f"{token.id}: there is no such token"
    for i, token in enumerate(words.added[:_ADDED]):
        yield "" if i else "added", _token(token)
    if len(words.added) > _ADDED:
        yield "", f"and {len(words.added) - _ADDED} more: --json has them"


def _token(token: Token) -> str:
    return f"{token.id} {_short(token.text)}"


def _flag(value: bool | None) -> str:
    return "not said" if value is None else "yes" if value else "no"


def _template(template: str | None) -> Rows:
    if template is None:
        yield "none", "`chat` takes ChatML where the vocabulary has its tokens"
        return
    lines = template.splitlines()
    yield "length", f"{len(template):,} characters, {len(lines):,} lines"
    for line in lines[:_LINES]:
        yield "", _short(line)
    if len(lines) > _LINES:
        yield "", "…"


def _sampling(found: Inspection) -> Rows:
    for setting in found.sampling:
        unused = "" if setting.used else ", which `chat` does not use"
        yield setting.name, f"{_value(setting.value)} ({setting.origin}{unused})"


def _origin(found: Inspection) -> Rows:
    for key, value in found.origin.items():
        yield key.removeprefix("general."), _value(value)
    if found.digests is not None:
        yield "digests", "there; to check them: qwq-lite verify" if found.digests else "none: it cannot be verified"


def _value(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else _short(str(value))


def _short(text: str) -> str:
    return text if len(text) <= _COLUMNS else f"{text[:_COLUMNS]}…"


def _as_dict(found: Inspection) -> dict[str, Any]:
    total = found.total
    types = [{**dataclasses.asdict(entry), "bits": round(entry.bits, 4)} for entry in found.types]
    answer = {
        **dataclasses.asdict(found),
        "path": str(found.path),
        "n_params": total.n_params,
        "bits": round(total.bits, 4),
        "types": types,
    }
    cleaned: dict[str, Any] = _json(answer)
    return cleaned


def _json(value: Any) -> Any:
    """The same without what JSON does not have: a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {str(key): _json(entry) for key, entry in value.items()}
    if isinstance(value, str):
        return value
    if isinstance(value, Iterable):
        return [_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
