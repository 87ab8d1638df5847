"""Tokenizer files -> GGUF's tokenizer keys, for byte-level BPE with Qwen2's pre-tokenizer. Knows no weights.

The pre-tokenizer is recognised by its regular expression, not by the hash of a sample's ids. llama.cpp does not apply
NFC and Hugging Face does, so the normaliser is recorded in the file for the runtime to apply.
Source: llama.cpp conversion/base.py (get_vocab_base), gguf-py/gguf/vocab.py (SpecialVocab)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import TokenType

from qwq_lite.errors import CheckpointError

from .source import Checkpoint

QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = {QWEN2_REGEX: "qwen2"}
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


@dataclass(frozen=True)
class Vocab:
    """What GGUF keeps of a tokenizer. `tokens` and `types` have one entry for every row of the embedding."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str
    normalizer: str  # "NFC" or "none"
    special_ids: dict[str, int]  # bos, eos, unknown, padding -> id
    add_bos: bool
    add_eos: bool
    chat_template: str | None


def load(checkpoint: Checkpoint, n_rows: int) -> Vocab:
    """The tokenizer of a checkpoint whose embedding has `n_rows` rows.

    Raises: CheckpointError naming file and field.
    """
    path = checkpoint.folder / "tokenizer.json"
    tokenizer = checkpoint.json("tokenizer.json")
    if tokenizer is None:
        raise CheckpointError(f"{path}: is missing; fetch it from the model's repository")
    settings = checkpoint.json("tokenizer_config.json") or {}
    tokens, types = _tokens(tokenizer, settings, path, n_rows)
    ids = {token: number for number, token in enumerate(tokens)}
    add_bos, add_eos = _added_ends(settings)
    return Vocab(
        tokens=tokens,
        types=types,
        merges=_merges(tokenizer, path, ids),
        pre=_pre_tokenizer(tokenizer, path),
        normalizer=_normalizer(tokenizer.get("normalizer"), path),
        special_ids=_special_ids(checkpoint, settings, ids, n_rows),
        add_bos=add_bos,
        add_eos=add_eos,
        chat_template=_chat_template(checkpoint, settings),
    )


def _model(tokenizer: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        found = model.get("type") if isinstance(model, dict) else model
        raise CheckpointError(
            f"{path}: model.type is {found!r}, BPE is expected: this tokenizer is not of the qwen2 family"
        )
    return model


def _added_tokens(
    tokenizer: Mapping[str, Any], settings: Mapping[str, Any], path: Path
) -> Iterator[tuple[int, str, bool]]:
    """(id, text, special) of every added token; tokenizer_config.json may know more of them than tokenizer.json."""
    added, decoder = tokenizer.get("added_tokens") or [], settings.get("added_tokens_decoder") or {}
    if not isinstance(added, list) or not isinstance(decoder, dict):
        raise CheckpointError(
            f"{path}: added_tokens is no list, or added_tokens_decoder in tokenizer_config.json no object"
        )
    if not all(isinstance(entry, dict) for entry in [*added, *decoder.values()]):
        raise CheckpointError(f"{path}: added_tokens has an entry that is no object; fetch the file again")
    listed = [(entry.get("id"), entry) for entry in added]
    listed += [(int(key) if str(key).isdecimal() else None, entry) for key, entry in decoder.items()]
    for number, entry in listed:
        content = entry.get("content")
        if not isinstance(number, int) or not isinstance(content, str) or not content:
            raise CheckpointError(f"{path}: added_tokens has an entry without id or content: {entry!r}")
        yield number, content, bool(entry.get("special"))


def _tokens(
    tokenizer: Mapping[str, Any], settings: Mapping[str, Any], path: Path, n_rows: int
) -> tuple[list[str], list[int]]:
    vocab = _model(tokenizer, path).get("vocab")
    if not isinstance(vocab, dict) or not vocab:
        raise CheckpointError(f"{path}: model.vocab is missing or not an object")
    tokens = [f"[PAD{number}]" for number in range(n_rows)]
    types = [int(TokenType.UNUSED)] * n_rows

    def put(number: object, token: str, kind: TokenType) -> None:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < n_rows:
            raise CheckpointError(
                f"{path}: token {token!r} has id {number!r}; ids from 0 to {n_rows - 1} have a row in the embedding"
            )
        if not _is_unicode(token):
            raise CheckpointError(f"{path}: token {token!r} is no Unicode text; fetch the file again")
        if types[number] != TokenType.UNUSED and tokens[number] != token:
            raise CheckpointError(
                f"{path}: id {number} belongs to {tokens[number]!r} and to {token!r}; fetch the file again"
            )
        tokens[number], types[number] = token, int(kind)

    for token, number in vocab.items():
        put(number, token, TokenType.NORMAL)
    for number, token, special in _added_tokens(tokenizer, settings, path):
        put(number, token, TokenType.CONTROL if special or _looks_special(token) else TokenType.USER_DEFINED)
    twice, count = Counter(tokens).most_common(1)[0]
    if count > 1:
        raise CheckpointError(f"{path}: token {twice!r} has two ids; llama.cpp needs every token once")
    return tokens, types


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it; JSON can spell lone surrogates, which it cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _looks_special(token: str) -> bool:
    """Some models do not mark their control tokens as special; llama.cpp's converter goes by their look."""
    return (token.startswith("<|") and token.endswith("|>")) or (token.startswith("<｜") and token.endswith("｜>"))


def _merges(tokenizer: Mapping[str, Any], path: Path, ids: Mapping[str, int]) -> list[str]:
    """Merges as `left right`, from strings (older files) or pairs (newer ones)."""
    raw = _model(tokenizer, path).get("merges")
    if not isinstance(raw, list):
        raise CheckpointError(f"{path}: model.merges is missing or not a list")
    merges = []
    for number, entry in enumerate(raw):
        parts = entry.split(" ") if isinstance(entry, str) else entry
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
            raise CheckpointError(f"{path}: model.merges[{number}] is {entry!r}, two pieces are expected")
        if "".join(parts) not in ids:
            raise CheckpointError(
                f"{path}: model.merges[{number}] makes {''.join(parts)!r}, which is no token; fetch the file again"
            )
        merges.append(" ".join(part.replace(" ", "Ġ") for part in parts))
    return merges


def _parts(component: Any, plural: str) -> list[dict[str, Any]]:
    """The members of a Sequence, or the component alone."""
    if not isinstance(component, dict):
        return []
    members = component.get(plural)
    return [part for part in members if isinstance(part, dict)] if isinstance(members, list) else [component]


def _pre_tokenizer(tokenizer: Mapping[str, Any], path: Path) -> str:
    parts = _parts(tokenizer.get("pre_tokenizer"), "pretokenizers")
    regexes = [str(part["pattern"].get("Regex")) for part in parts if _splits_as_qwen2(part)]
    byte_level = [part for part in parts if part.get("type") == "ByteLevel" and not part.get("add_prefix_space")]
    if len(regexes) == 1 and regexes[0] in _PRE_TOKENIZERS and len(byte_level) == 1 and len(parts) == 2:
        return _PRE_TOKENIZERS[regexes[0]]
    raise CheckpointError(
        f"{path}: pre_tokenizer splits by {regexes or [part.get('type') for part in parts]}, which is not Qwen2's;"
        " convert this model with llama.cpp's convert_hf_to_gguf.py"
    )


def _splits_as_qwen2(part: Mapping[str, Any]) -> bool:
    return (
        part.get("type") == "Split"
        and isinstance(part.get("pattern"), dict)
        and part.get("behavior") == "Isolated"
        and not part.get("invert")
    )


def _normalizer(component: Any, path: Path) -> str:
    if component is None:
        return "none"
    if not isinstance(component, dict):
        raise CheckpointError(
            f"{path}: normalizer is {component!r}, an object or null is expected; fetch the file again"
        )
    kinds = [part.get("type") for part in _parts(component, "normalizers")]
    if kinds in ([], ["NFC"]):
        return "NFC" if kinds else "none"
    raise CheckpointError(f"{path}: normalizer is {kinds}; NFC or none can be kept: convert this model with llama.cpp")


def _token_text(value: Any) -> str | None:
    """tokenizer_config.json gives a special token as a string or as an object with its content."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _special_ids(
    checkpoint: Checkpoint, settings: Mapping[str, Any], ids: Mapping[str, int], n_rows: int
) -> dict[str, int]:
    """GGUF's special ids by name: from tokenizer_config.json, and from config.json where that says nothing."""
    found: dict[str, int] = {}
    for name, gguf_name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        text = _token_text(settings.get(f"{name}_token"))
        if text is not None and text in ids:
            found[gguf_name] = ids[text]
            continue
        number = checkpoint.config.get(f"{name}_token_id")
        if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < n_rows:
            found[gguf_name] = number
    return found


def _added_ends(settings: Mapping[str, Any]) -> tuple[bool, bool]:
    return settings.get("add_bos_token") is True, settings.get("add_eos_token") is True


def _chat_template(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> str | None:
    """The template from its own file (transformers 5) or from tokenizer_config.json; of several, the one named default."""
    jinja, as_json = _TEMPLATE_FILES
    template: Any = checkpoint.text(jinja)
    if template is None:
        template = (checkpoint.json(as_json) or {}).get("chat_template", settings.get("chat_template"))
    if isinstance(template, list):
        named = [
            entry.get("template") for entry in template if isinstance(entry, dict) and entry.get("name") == "default"
        ]
        template = named[0] if named else None
    if template is not None and (not isinstance(template, str) or not _is_unicode(template)):
        raise CheckpointError(
            f"{checkpoint.folder}: chat_template is {type(template).__name__}, a string of Unicode is expected"
        )
    return template
