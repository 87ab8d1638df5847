"""Tokenizer files -> GGUF's tokenizer keys, for byte-level BPE with Qwen2's pre-tokenizer. Knows no weights.

The pre-tokenizer is recognised by its regular expression, not by the hash of a sample's ids. llama.cpp does not apply
NFC and Hugging Face does, so the normaliser is recorded in the file for the runtime to apply. What is special, and which
ends are added, follows llama.cpp's converter and what transformers makes of the files for it.
Source: llama.cpp conversion/base.py (get_vocab_base), gguf-py/gguf/vocab.py (SpecialVocab); transformers
tokenization_utils_base.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwq_convert.checkpoint import tokenizer_files
from qwq_convert.checkpoint.chat_templates import templates
from qwq_convert.checkpoint.files import Checkpoint
from qwq_convert.checkpoint.text_files import quote
from qwq_convert.checkpoint.token_table import AddedToken, added_tokens, rows
from qwq_convert.checkpoint.tokenizer_files import QWEN2_REGEX, TokenizerFiles
from qwq_lite import arguments
from qwq_lite.errors import CheckpointError

_PRE_TOKENIZERS = {QWEN2_REGEX: "qwen2"}
# Hugging Face's word for a special token -> GGUF's, in the order in which transformers and llama.cpp look at them
_SPECIAL = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "seperator",
    "pad": "padding",
    "cls": None,
    "mask": "mask",
}
_SPECIAL_LISTS = ("additional_special_tokens", "extra_special_tokens")
# Settings of BPE that would make other tokens of the same merges, and the values that make these
_PLAIN_BPE: dict[str, tuple[object, ...]] = {
    "byte_fallback": (None, False),
    "continuing_subword_prefix": (None, ""),
    "dropout": (None, 0),
    "end_of_word_suffix": (None, ""),
    "ignore_merges": (None, False),
}


# Tokens of the family that end an answer in llama.cpp whatever the file says of them. Source: llama-vocab.cpp
_END_ANYWHERE = frozenset({"<|im_end|>", "<|endoftext|>", "<｜end▁of▁sentence｜>"})
_TEXT, _SECOND = ("Sequence", "A"), ("Sequence", "B")  # what a post-processor's template calls the texts


@dataclass(frozen=True)
class TokenizerKeys:
    """What GGUF keeps of a tokenizer. `tokens` and `types` have one entry for every row of the embedding."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str
    normalizer: str  # "NFC" or "none"
    special_ids: dict[str, int]  # bos, eos, unknown, seperator, padding, mask -> id, those that there are
    adds: dict[str, bool]  # bos, eos, sep -> whether it is put around a text, where the files say so
    chat_template: str | None
    named_templates: dict[str, str] = field(default_factory=dict)

    @property
    def add_bos(self) -> bool | None:
        return self.adds.get("bos")

    @property
    def add_eos(self) -> bool | None:
        return self.adds.get("eos")


def load(checkpoint: Checkpoint, n_rows: int) -> TokenizerKeys:
    """The tokenizer of a checkpoint whose embedding has `n_rows` rows.

    Raises: CheckpointError naming file and field.
    """
    settings = checkpoint.json("tokenizer_config.json") or {}
    files = tokenizer_files.read(checkpoint, settings)
    tokenizer, path = files.parts, files.vocab
    model, roles = _model(tokenizer, path), _roles(settings)
    listed, more = added_tokens(checkpoint, tokenizer.get("added_tokens"), settings, path)
    special = [*roles.values(), *_more_special(settings)]
    tokens, types = rows(
        checkpoint,
        (model["vocab"], path),
        [*listed, *more],
        (special, checkpoint.folder / "tokenizer_config.json"),
        n_rows,
    )
    adds = _adds(checkpoint, files, settings, roles)
    special_ids = _special_ids(checkpoint, listed if files.whole is not None else [*listed, *more], roles, n_rows)
    _note_endless(checkpoint, tokens, special_ids)
    template, named_templates = templates(checkpoint, settings)
    return TokenizerKeys(
        tokens=tokens,
        types=types,
        merges=_merges(model, files.merges),
        pre=_pre_tokenizer(tokenizer, path),
        normalizer=_normalizer(tokenizer.get("normalizer"), path),
        special_ids=special_ids,
        adds=adds,
        chat_template=template,
        named_templates=named_templates,
    )


def _model(tokenizer: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        found = model.get("type") if isinstance(model, dict) else model
        raise CheckpointError(
            f"{path}: model.type is {quote(found)}, BPE is expected: this tokenizer is not of the qwen2 family"
        )
    for name, plain in _PLAIN_BPE.items():
        if (value := model.get(name)) not in plain:
            raise CheckpointError(
                f"{path}: model.{name} is {quote(value)}, {plain[1]!r} is expected: this tokenizer is not of the qwen2 family"
            )
    if not isinstance(model.get("vocab"), dict) or not model["vocab"]:
        raise CheckpointError(f"{path}: model.vocab is missing or not an object")
    return model


def _roles(settings: Mapping[str, Any]) -> dict[str, str]:
    """Hugging Face's word for a special token -> its text, from tokenizer_config.json."""
    found = {name: _token_text(settings.get(f"{name}_token")) for name in _SPECIAL}
    return {name: text for name, text in found.items() if text is not None}


def _more_special(settings: Mapping[str, Any]) -> list[str]:
    """Special tokens without a role; a list, or in some files an object of names and tokens."""
    listed: list[Any] = []
    for name in _SPECIAL_LISTS:
        value = settings.get(name) or []
        listed += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for entry in listed if (text := _token_text(entry)) is not None]


def _merges(model: Mapping[str, Any], path: Path) -> list[str]:
    """Merges as `left right`, from strings (older files) or pairs (newer ones)."""
    raw, known = model.get("merges"), model["vocab"]
    if not isinstance(raw, list) or not raw:
        raise CheckpointError(f"{path}: merges is missing, empty or not a list; fetch the file again")
    merges = []
    for number, entry in enumerate(raw):
        pair = entry.split(" ") if isinstance(entry, str) else entry
        left, right = pair if isinstance(pair, list) and len(pair) == 2 else (None, None)
        if not isinstance(left, str) or not isinstance(right, str):
            raise CheckpointError(f"{path}: merges[{number}] is {quote(entry)}, two pieces are expected")
        if left not in known or right not in known or left + right not in known:
            unknown = next(piece for piece in (left, right, left + right) if piece not in known)
            raise CheckpointError(
                f"{path}: merges[{number}] needs {quote(unknown)}, which is no token; fetch the file again"
            )
        if " " in left + right:
            left, right = left.replace(" ", "Ġ"), right.replace(" ", "Ġ")
        merges.append(f"{left} {right}")
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
    byte_level = [part for part in parts if _is_byte_level(part)]
    if len(regexes) == 1 and regexes[0] in _PRE_TOKENIZERS and len(byte_level) == 1 and len(parts) == 2:
        return _PRE_TOKENIZERS[regexes[0]]
    raise CheckpointError(
        f"{path}: pre_tokenizer splits by {quote(regexes or [part.get('type') for part in parts])}, which is not Qwen2's;"
        " convert this model with llama.cpp's convert_hf_to_gguf.py"
    )


def _is_byte_level(part: Mapping[str, Any]) -> bool:
    """Bytes to symbols and nothing else: no space in front, and no split by GPT-2's regex, which is the default."""
    plain = not part.get("add_prefix_space") and part.get("use_regex") is False
    return part.get("type") == "ByteLevel" and plain


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
            f"{path}: normalizer is {quote(component)}, an object or null is expected; fetch the file again"
        )
    kinds = [part.get("type") for part in _parts(component, "normalizers")]
    if kinds in ([], ["NFC"]):
        return "NFC" if kinds else "none"
    raise CheckpointError(
        f"{path}: normalizer is {quote(kinds)}; NFC or none can be kept: convert this model with llama.cpp"
    )


def _token_text(value: Any) -> str | None:
    """tokenizer_config.json gives a special token as a string or as an object with its content."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _special_ids(
    checkpoint: Checkpoint, numbered: Sequence[AddedToken], roles: Mapping[str, str], n_rows: int
) -> dict[str, int]:
    """GGUF's special ids by name: of the added tokens that llama.cpp looks at, and from config.json where these have none."""
    added: dict[str, int] = {}
    for token in numbered:
        added.setdefault(token.text, token.id)
    found = {name: added[text] for name, text in roles.items() if text in added}
    for name in _SPECIAL:
        number = checkpoint.config.get(f"{name}_token_id")
        if name in found or not arguments.is_whole(number):
            continue  # several ids of one role stand in a list: these are generation_config.json's
        if not 0 <= number < n_rows:
            raise CheckpointError(
                f"{checkpoint.folder / 'config.json'}: {name}_token_id is {quote(number)};"
                f" ids from 0 to {n_rows - 1} have a row in the embedding"
            )
        found[name] = number
    return {gguf: found[name] for name in found if (gguf := _SPECIAL[name]) is not None}


def _note_endless(checkpoint: Checkpoint, tokens: Sequence[str], special_ids: Mapping[str, int]) -> None:
    """Say that no token ends an answer."""
    if "eos" not in special_ids and not _END_ANYWHERE & set(tokens):
        checkpoint.notice(
            f"{checkpoint.folder}: no token ends an answer: eos_token in tokenizer_config.json and eos_token_id in config.json"
            " name none that the tokenizer has; answers will go on until they are stopped"
        )


def _adds(
    checkpoint: Checkpoint, files: TokenizerFiles, settings: Mapping[str, Any], roles: dict[str, str]
) -> dict[str, bool]:
    """Which ends a text gets: the post-processor's word, and that of tokenizer_config.json where it says nothing.

    Where the two differ there is a notice; llama.cpp's converter chooses the same, and warns. Without either, a tokenizer of
    vocab.json and merges.txt puts none.
    roles: gets the token that the post-processor puts first or last, where tokenizer_config.json names none.
    """
    adds: dict[str, bool] = {}
    for part in _parts(files.parts.get("post_processor"), "processors"):
        if part.get("type") == "ByteLevel":
            adds.setdefault("bos", False)
            adds.setdefault("eos", False)
        elif part.get("type") != "TemplateProcessing" or not _apply_template(part, roles, adds):
            raise CheckpointError(
                f"{files.whole}: post_processor {quote(part.get('type'))} puts tokens around a text that GGUF has no word for;"
                " convert this model with llama.cpp's convert_hf_to_gguf.py"
            )
    for name in ("bos", "eos", "sep"):
        said = settings.get(f"add_{name}_token")
        if isinstance(said, bool) and adds.setdefault(name, said) != said:
            checkpoint.notice(
                f"{checkpoint.folder / 'tokenizer_config.json'}: add_{name}_token is {str(said).lower()}, and the tokenizer's"
                f" post_processor puts {'none' if said else 'one'}: the latter is kept, as llama.cpp's converter keeps it"
            )
        elif files.whole is None and name != "sep":
            adds.setdefault(name, False)
    return adds


def _apply_template(part: Mapping[str, Any], roles: dict[str, str], adds: dict[str, bool]) -> bool:
    """Take over a TemplateProcessing that puts bos before a text and eos behind it; whether it is no more than that.

    Layout: "single" and "pair" are lists of {"SpecialToken": {"id": text}} and {"Sequence": {"id": "A" or "B"}}.
    """
    single, pair = _pieces(part.get("single")), _pieces(part.get("pair"))
    if single.count(_TEXT) != 1:
        return False
    at = single.index(_TEXT)
    if at > 1 or len(single) - at > 2:
        return False
    before, behind = single[:at], single[at + 1 :]
    for name, ends in (("bos", before), ("eos", behind)):
        for _, token in ends:
            if roles.setdefault(name, token) != token:
                return False
            adds[name] = True
    if (before or behind) and _TEXT in pair and _SECOND in pair:
        between = pair[pair.index(_TEXT) + 1 : pair.index(_SECOND)]
        if between:
            adds["sep"] = False
        return not {roles.get("sep"), roles.get("eos")} & {token for _, token in between}
    return True


def _pieces(template: Any) -> list[tuple[str, str]]:
    """(kind, text) of each piece of a template."""
    entries = template if isinstance(template, list) else []
    return [
        (kind, str(value.get("id")))
        for entry in entries
        if isinstance(entry, dict)
        for kind, value in entry.items()
        if isinstance(value, dict)
    ]
