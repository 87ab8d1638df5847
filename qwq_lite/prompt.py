"""Messages -> tokens by the model's own template; what a user typed never becomes a control token. Knows no engine.

The template is rendered with the real content, in which only the spellings of control tokens are marked. The result is cut
at those marks alone, and what stood between them becomes plain text; everything else is token for token what
transformers' apply_chat_template gives. Tokenizing the user's text apart would be wrong: the "\\n" of a template merges with
a "\\n" that a message starts with.

llama.cpp does not apply the normaliser that Hugging Face's tokenizer applies, so it is applied here.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from qwq_lite.errors import TemplateError
from qwq_lite.normalization import normalized
from qwq_lite.template import Template

Message = Mapping[str, Any]

THINK_TAGS = ("<think>", "</think>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Code points that Unicode keeps for a program's own use and that no text contains; a pair that does not occur marks a span.
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class Vocabulary(Protocol):
    """What this module needs of a vocabulary; backend.vocab.Vocab is one."""

    adds_bos: bool
    bos: int
    eos: int

    @property
    def special(self) -> dict[str, int]: ...

    def tokenize(self, text: str, parse_special: bool) -> list[int]: ...


def tokenize(vocab: Vocabulary, text: str, form: str) -> list[int]:
    """Ids of a text as plain text: nothing added, and no spelling becomes a control or user-defined token.

    `form` is `normalization.normalizer()` of the model. Equal to Hugging Face's tokenizer with
    add_special_tokens off on text without such spellings.
    """
    text = normalized(text, form)
    spellings = _pattern(vocab)
    if spellings is None or not spellings.search(text):
        return vocab.tokenize(text, False) if text else []
    pieces, start = [], 0
    for match in spellings.finditer(text):
        # llama.cpp replaces a user-defined spelling even with parse_special off: cut it where a word begins, which is
        # where the pre-tokenizer cuts too.
        letter = re.search(r"(?<=\W)\w|(?<=\w)\W", match[0])
        cut = match.start() + (letter.start() if letter else 1)
        pieces.append(text[start:cut])
        start = cut
    return [token for piece in [*pieces, text[start:]] if piece for token in vocab.tokenize(piece, False)]


def _pattern(vocab: Vocabulary) -> re.Pattern[str] | None:
    return _compiled(tuple(vocab.special))


@functools.lru_cache(maxsize=8)
def _compiled(spellings: tuple[str, ...]) -> re.Pattern[str] | None:
    """One pattern a vocabulary; the longer of two spellings that start alike counts."""
    longest_first = sorted(spellings, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if spellings else None


class ChatTemplate:
    """A model's chat template, ready to render.

    Raises: TemplateError when the source does not parse or asks for what templates may not do.
    """

    def __init__(self, source: str) -> None:
        self._template = Template(source)
        self.source = source

    def render(self, messages: Sequence[Message], **extra: Any) -> str:
        """The prompt's text, up to where the reply begins unless extra has add_generation_prompt.

        Raises: TemplateError with what the template objected to, or the limit that it met.
        """
        return self._template.render({"messages": messages, "add_generation_prompt": True, **extra})

    def encode(self, vocab: Vocabulary, messages: Sequence[Message], form: str, **extra: Any) -> list[int]:
        """The prompt's tokens. Raises: TemplateError."""
        marks = _unused_pair(messages, extra)
        spellings = _pattern(vocab)
        marked = [_marked_message(message, spellings, marks) for message in messages]
        rendered = self.render(marked, **_own_tokens(vocab), **_marked(extra, spellings, marks))
        tokens = list(_encoded(vocab, rendered, spellings, marks, form))
        if vocab.adds_bos and tokens[:1] != [vocab.bos]:
            tokens.insert(0, vocab.bos)
        return tokens


def _encoded(
    vocab: Vocabulary, rendered: str, spellings: re.Pattern[str] | None, marks: tuple[str, str], form: str
) -> Iterator[int]:
    opening, closing = marks
    parts = ["", *re.split(f"([{opening}{closing}])", rendered), ""]  # mark, text, mark, text, … mark
    for number in range(1, len(parts), 2):
        text, start, end = parts[number], 0, len(parts[number])
        opened, closed = parts[number - 1] == opening, parts[number + 1] == closing
        if (opened and closed) or spellings is None:
            yield from tokenize(vocab, text, form)
            continue
        # A template that cuts a message may leave one of the two marks: the spelling at that mark alone was typed.
        found = list(spellings.finditer(text))
        for match in found:
            typed = (opened and match.start() == 0) or (closed and match.end() == end)
            if not typed:
                yield from tokenize(vocab, text[start : match.start()], form)
                yield vocab.special[match[0]]
                start = match.end()
        yield from tokenize(vocab, text[start:], form)


def _own_tokens(vocab: Vocabulary) -> dict[str, str]:
    """The spellings that a template may write by name, as transformers gives them to it; unmarked, for they are its own."""
    spelled = {token: spelling for spelling, token in vocab.special.items()}
    return {
        name: spelled[token] for name, token in (("bos_token", vocab.bos), ("eos_token", vocab.eos)) if token in spelled
    }


def _marked_message(message: Message, spellings: re.Pattern[str] | None, marks: tuple[str, str]) -> dict[str, Any]:
    """A message with its spellings marked. A reply's own thinking tags are the template's business and stay."""
    keep = THINK_TAGS if message.get("role") == "assistant" else ()
    return {key: _marked(value, spellings, marks, keep) for key, value in message.items()}


def _marked(value: Any, spellings: re.Pattern[str] | None, marks: tuple[str, str], keep: Sequence[str] = ()) -> Any:
    """The value with marks around each spelling. Not normalised yet: a mark that follows a tag would compose with its `>`."""
    if isinstance(value, str) and spellings is not None:
        opening, closing = marks
        return spellings.sub(lambda match: match[0] if match[0] in keep else f"{opening}{match[0]}{closing}", value)
    if isinstance(value, Mapping):
        return {_marked(key, spellings, marks): _marked(item, spellings, marks, keep) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(item, spellings, marks, keep) for item in value]
    return value


def _unused_pair(*values: Any) -> tuple[str, str]:
    text = json.dumps(values, ensure_ascii=False, default=str)
    free = [character for character in _NONCHARACTERS if character not in text]
    if len(free) < 2:
        raise TemplateError("the messages contain all of Unicode's noncharacters U+FDD0 to U+FDEF; remove some")
    return free[0], free[1]
