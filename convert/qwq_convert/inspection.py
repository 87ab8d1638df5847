"""What a model file or a checkpoint folder holds, from headers and tokenizer files alone. Reads no weights.

Both are looked at leniently: a section that cannot be understood becomes a notice, and what can be is still shown. What `convert`
would refuse of a checkpoint is a fault.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from gguf.constants import GGUFValueType, Keys, LlamaFileType, TokenType

from qwq_convert import digests, metadata
from qwq_convert.checkpoint import family, tokenizer
from qwq_convert.checkpoint.files import Checkpoint
from qwq_convert.checkpoint.tensors import pair
from qwq_lite import sampling
from qwq_lite.errors import QwqError
from qwq_lite.formats import gguf_header
from qwq_lite.formats.gguf_header import Header, Value
from qwq_lite.formats.shape import ModelShape, from_config, from_header
from qwq_lite.formats.tensor_types import file_type_name
from qwq_lite.store import catalog
from qwq_lite.text import normalization

_Found = TypeVar("_Found")

_SAMPLING = "general.sampling."
_OURS = "qwq_lite."
# general.* that says who made a file and from what; the rest of general is shown elsewhere or says nothing.
_ORIGINS = (
    "author",
    "organization",
    "version",
    "finetune",
    "license",
    "license.name",
    "quantized_by",
    "url",
    "repo_url",
)
_ORIGIN_GROUPS = ("general.source.", "general.base_model.", "quantize.imatrix.")
# Sampling's name -> GGUF's behind general.sampling.; generation_config.json has the former
_SETTINGS = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
_REPEAT = {"repetition_penalty": "penalty_repeat"}


@dataclass(frozen=True)
class TypeSum:
    """All tensors of one type."""

    type: str
    n_tensors: int
    n_params: int
    n_bytes: int

    @property
    def bits(self) -> float:
        """Bits a weight, block scales included."""
        return 8 * self.n_bytes / self.n_params if self.n_params else 0.0


@dataclass(frozen=True)
class Token:
    """A token with a meaning."""

    id: int
    text: str
    role: str  # eos, bos, …, or "" for one that is control or added and has no role


@dataclass(frozen=True)
class Tokenizer:
    """What a file says of its tokenizer."""

    model: str | None  # llama.cpp's name
    pre: str | None  # llama.cpp's name of the pre-tokenizer
    n_tokens: int
    n_unused: int
    n_merges: int
    special: tuple[Token, ...]
    added: tuple[Token, ...]  # tokens that ordinary text does not become
    normalizer: str
    normalizer_origin: str  # what says so
    add_bos: bool | None
    add_eos: bool | None


@dataclass(frozen=True)
class Setting:
    """One sampling setting."""

    name: str
    value: float | int | str
    origin: str  # the file's key, generation_config.json, or the catalogue
    used: bool = True  # `chat` takes it


@dataclass(frozen=True)
class Inspection:
    """Everything that is shown."""

    path: Path
    form: str
    name: str | None
    file_type: str | None
    n_bytes: int
    shape: ModelShape | None  # None where it cannot be understood; a notice says why
    rope: Mapping[str, Value]
    tied: bool | None  # None where the weights cannot be found
    types: tuple[TypeSum, ...]  # empty where the weights cannot be found
    tokenizer: Tokenizer | None  # None where it cannot be understood; a notice says why
    template: str | None
    sampling: tuple[Setting, ...]
    origin: Mapping[str, Value]  # who made it and from what, by key
    digests: bool | None  # None for a checkpoint, which keeps none of its own
    notices: tuple[str, ...]
    faults: tuple[str, ...] = ()  # why `convert` would refuse it, in its words and order

    @property
    def total(self) -> TypeSum:
        sums = self.types
        return TypeSum(
            "all", sum(s.n_tensors for s in sums), sum(s.n_params for s in sums), sum(s.n_bytes for s in sums)
        )


def inspect(path: Path) -> Inspection:
    """Look at a GGUF file or a checkpoint folder.

    Raises: FormatError for a file that cannot be read or has no valid header, CheckpointError for a folder without a config.json.

    Example:
        inspect(Path("QwQ-32B-Q4_K_M.gguf")).total.bits
    """
    if path.is_dir():
        with Checkpoint(path) as checkpoint:
            return _of_checkpoint(checkpoint)
    return _of_file(gguf_header.read(path))


def faults(folder: Path) -> tuple[str, ...]:
    """Why `convert` would refuse a folder, in its words and order; by config.json alone where no weights are there yet."""
    try:
        with Checkpoint(folder) as checkpoint:
            if any(name.endswith(".safetensors") for name in checkpoint.names()):
                return _of_checkpoint(checkpoint).faults
            family.check(checkpoint)
    except QwqError as error:
        return (str(error),)
    return ()


def _of_file(header: Header) -> Inspection:
    keys, notices = header.keys, []
    shape = None
    try:
        shape = from_header(header)
    except QwqError as error:
        notices.append(str(error))
    arch = keys.get(Keys.General.ARCHITECTURE)
    name, kind = _text(keys, Keys.General.NAME), keys.get(Keys.General.FILE_TYPE)
    known = catalog.find(name, _text(keys, Keys.General.BASENAME), header.path.name)
    return Inspection(
        path=header.path,
        form=f"GGUF in {len(header.parts)} files" if header.parts else "GGUF",
        name=name,
        file_type=_file_type(kind),
        n_bytes=header.file_bytes,
        shape=shape,
        rope={key: value for key, value in keys.items() if key.startswith(f"{arch}.rope.scaling.")},
        tied=all(info.name != "output.weight" for info in header.tensors),
        types=_sums((info.type.name, math.prod(info.shape), info.n_bytes) for info in header.tensors),
        tokenizer=_tokenizer(keys),
        template=_text(keys, Keys.Tokenizer.CHAT_TEMPLATE),
        sampling=_file_settings(keys, known),
        origin=_origin(keys),
        digests=_has_digests(keys, len(header.tensors)),
        notices=tuple(notices),
    )


def _text(keys: Mapping[str, Value], key: str) -> str | None:
    value = keys.get(key)
    return value if isinstance(value, str) else None


def _file_type(kind: Value | None) -> str | None:
    try:
        return file_type_name(LlamaFileType(kind)) if isinstance(kind, int) else None
    except ValueError:
        return f"unknown ({kind})"


def _sums(tensors: Iterable[tuple[str, int, int]]) -> tuple[TypeSum, ...]:
    """(type, parameters, bytes) of each tensor, summed by type, the largest first."""
    found: dict[str, TypeSum] = {}
    for kind, n_params, n_bytes in tensors:
        so_far = found.get(kind, TypeSum(kind, 0, 0, 0))
        found[kind] = TypeSum(kind, so_far.n_tensors + 1, so_far.n_params + n_params, so_far.n_bytes + n_bytes)
    return tuple(sorted(found.values(), key=lambda entry: -entry.n_bytes))


def _tokenizer(keys: Mapping[str, Value]) -> Tokenizer | None:
    tokens, types, merges = (keys.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "merges"))
    if not isinstance(tokens, list):
        return None
    kinds: list[Any] = types if isinstance(types, list) else []
    ids = {
        key.removeprefix("tokenizer.ggml.").removesuffix("_token_id"): value
        for key, value in keys.items()
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id") and isinstance(value, int)
    }
    add = [keys.get(key) for key in (Keys.Tokenizer.ADD_BOS, Keys.Tokenizer.ADD_EOS)]
    own = isinstance(keys.get(normalization.KEY), str)
    assumed = "assumed by tokenizer.ggml.pre: the file does not say"
    return Tokenizer(
        model=_text(keys, Keys.Tokenizer.MODEL),
        pre=_text(keys, Keys.Tokenizer.PRE),
        n_tokens=len(tokens),
        n_unused=Counter(kinds)[int(TokenType.UNUSED)],
        n_merges=len(merges) if isinstance(merges, list) else 0,
        special=_special(ids, tokens),
        added=_added(ids, tokens, kinds),
        normalizer=normalization.normal_form(keys),
        normalizer_origin=normalization.KEY if own else assumed,
        add_bos=add[0] if isinstance(add[0], bool) else None,
        add_eos=add[1] if isinstance(add[1], bool) else None,
    )


def _special(ids: Mapping[str, int], tokens: Sequence[Any]) -> tuple[Token, ...]:
    """Tokens with a role; an id that no token has keeps an empty text."""
    return tuple(
        Token(number, str(tokens[number]) if 0 <= number < len(tokens) else "", role) for role, number in ids.items()
    )


def _added(ids: Mapping[str, int], tokens: Sequence[Any], kinds: Sequence[Any]) -> tuple[Token, ...]:
    wanted, roles = (TokenType.CONTROL, TokenType.USER_DEFINED), set(ids.values())
    pairs = enumerate(zip(tokens, kinds, strict=False))
    return tuple(Token(i, str(text), "") for i, (text, kind) in pairs if kind in wanted and i not in roles)


def _file_settings(keys: Mapping[str, Value], known: catalog.CatalogModel | None) -> tuple[Setting, ...]:
    """What `chat` samples with, as `sampling.resolve` decides it, and the file's other settings."""
    given = {
        key.removeprefix(_SAMPLING): value
        for key, value in keys.items()
        if key.startswith(_SAMPLING) and isinstance(value, int | float | str)
    }
    resolved = sampling.resolve({}, keys, _catalogue(known))
    found = []
    for name, short in _SETTINGS.items():
        value = getattr(resolved, name)
        own = given.get(short) == value
        if own:  # else it is absurd: `resolve` passed it over, and it stays among those that are not used
            given.pop(short)
        found.append(Setting(name, value, _SAMPLING + short if own else _catalogue_origin(known)))
    return (*found, *(Setting(name, value, _SAMPLING + name, used=False) for name, value in given.items()))


def _catalogue(known: catalog.CatalogModel | None) -> sampling.Sampling:
    return known.sampling if known else catalog.DEFAULT_SAMPLING


def _catalogue_origin(known: catalog.CatalogModel | None) -> str:
    return f"catalogue: {known.name}" if known else "default"


def _origin(keys: Mapping[str, Value]) -> dict[str, Value]:
    shown_elsewhere = (digests.KEY, normalization.KEY)
    wanted = {f"general.{name}" for name in _ORIGINS}
    return {
        key: value
        for key, value in keys.items()
        if key in wanted
        or key.startswith(_ORIGIN_GROUPS)
        or (key.startswith(_OURS) and key not in shown_elsewhere and not isinstance(value, list))
    }


def _has_digests(keys: Mapping[str, Value], n_tensors: int) -> bool:
    """Whether there is an array of the right length that was filled in; `verify` says whether it is right."""
    value, (unknown, kind) = keys.get(digests.KEY), digests.placeholder(n_tensors)
    assert kind == GGUFValueType.ARRAY and isinstance(unknown, list)
    return isinstance(value, list) and len(value) == len(unknown) and value != unknown


def _of_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """What can be shown of it, and its faults in the order in which `convert` meets them."""
    faults = _Faults()
    faults.of(partial(family.check, checkpoint))
    shape = faults.of(partial(from_config, checkpoint.config, checkpoint.folder / "config.json"))
    found = faults.of(lambda: checkpoint.tensors) or {}
    if shape is not None and found:
        faults.of(partial(pair, checkpoint, shape))
    words = None if shape is None else faults.of(partial(tokenizer.load, checkpoint, shape.n_vocab))
    if shape is not None and words is not None:
        faults.of(partial(metadata.keys, checkpoint, shape, words, LlamaFileType.ALL_F32, 1))
    tensors = found.values()
    settings = _folder_settings(checkpoint, faults)
    return Inspection(
        path=checkpoint.folder,
        form="Hugging Face checkpoint",
        name=checkpoint.name,
        file_type=None,
        n_bytes=sum(tensor.n_bytes for tensor in tensors),
        shape=shape,
        rope=_rope(shape),
        tied="lm_head.weight" not in found if found else None,
        types=_sums((tensor.type.name, math.prod(tensor.shape), tensor.n_bytes) for tensor in tensors),
        tokenizer=None if words is None else _of_vocab(words),
        template=None if words is None else words.chat_template,
        sampling=settings,
        origin={
            key: value
            for key in ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
            if isinstance(value := checkpoint.config.get(key), str) and value
        },
        digests=None,
        notices=tuple(checkpoint.notices),
        faults=tuple(faults.found),
    )


class _Faults:
    """Why parts of a checkpoint cannot be read, each once."""

    def __init__(self) -> None:
        self.found: dict[str, None] = {}

    def of(self, read: Callable[[], _Found]) -> _Found | None:
        """What can be read; None where it cannot."""
        try:
            return read()
        except QwqError as error:
            self.found[str(error)] = None
            return None


def _rope(shape: ModelShape | None) -> dict[str, Value]:
    scaling = shape.rope_scaling if shape else None
    if scaling is None:
        return {}
    found: dict[str, Value] = {"type": scaling.type, "factor": scaling.factor, **(scaling.yarn or {})}
    if scaling.original_context_length is not None:
        found["original_context_length"] = scaling.original_context_length
    return found


def _of_vocab(words: tokenizer.TokenizerKeys) -> Tokenizer:
    return Tokenizer(
        model="gpt2",
        pre=words.pre,
        n_tokens=len(words.tokens),
        n_unused=Counter(words.types)[int(TokenType.UNUSED)],
        n_merges=len(words.merges),
        special=_special(words.special_ids, words.tokens),
        added=_added(words.special_ids, words.tokens, words.types),
        normalizer=words.normalizer,
        normalizer_origin="tokenizer.json",
        add_bos=words.add_bos,
        add_eos=words.add_eos,
    )


def _folder_settings(checkpoint: Checkpoint, faults: _Faults) -> tuple[Setting, ...]:
    """As for the file that `convert` would write: its keys are those of generation_config.json."""
    found = faults.of(partial(checkpoint.json, "generation_config.json"))
    given = found or {}
    keys = {f"{_SAMPLING}{short}": given[long] for long, short in (_SETTINGS | _REPEAT).items() if long in given}
    names = {short: long for long, short in (_SETTINGS | _REPEAT).items()}
    return tuple(
        Setting(names.get(entry.name, entry.name), entry.value, _folder_origin(entry.origin), entry.used)
        for entry in _file_settings(keys, catalog.find(checkpoint.name))
    )


def _folder_origin(origin: str) -> str:
    return "generation_config.json" if origin.startswith(_SAMPLING) else origin
