"""Messages -> tokens by the model's own template; what a user typed never becomes a control token. Knows no engine.

The template is rendered with the real content, in which only the spellings of control tokens are marked. The result is cut
at those marks alone, and what stood between them becomes plain text; everything else is token for token what
transformers' apply_chat_template gives. Tokenizing the user's text apart would be wrong: the "\\n" of a template merges with
a "\\n" that a message starts with.

llama.cpp does not apply the normaliser that Hugging Face's tokenizer applies, so it is applied here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

from jinja2 import TemplateError as JinjaError
from jinja2 import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwq_lite.errors import TemplateError
from qwq_lite.normalization import normalized

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
    spellings = sorted(vocab.special, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, spellings))) if spellings else None


class ChatTemplate:
    """A model's chat template, ready to render.

    In this process the sandbox is best effort: it keeps a template from reaching Python's objects, not from taking time.
    Raises: TemplateError when the source does not parse.
    """

    def __init__(self, source: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise TemplateError(
                f"tokenizer.chat_template, line {error.lineno}: {error.message}; convert the model again"
            ) from error
        except RecursionError as error:
            raise TemplateError("tokenizer.chat_template is nested too deeply; convert the model again") from error
        self.source = source

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **extra: Any) -> str:
        """The prompt's text. Raises: TemplateError with what the template objected to."""
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **extra)
        except (JinjaError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
            raise TemplateError(f"tokenizer.chat_template refuses these messages: {error}") from error

    def encode(self, vocab: Vocabulary, messages: Sequence[Message], form: str, **extra: Any) -> list[int]:
        """The prompt's tokens. Raises: TemplateError."""
        marks = _unused_pair(messages, extra)
        spellings = _pattern(vocab)
        marked = [_marked_message(message, spellings, marks, form) for message in messages]
        rendered = self.render(marked, **_marked(extra, spellings, marks, form))
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


def _marked_message(
    message: Message, spellings: re.Pattern[str] | None, marks: tuple[str, str], form: str
) -> dict[str, Any]:
    """A message with its spellings marked. A reply's own thinking tags are the template's business and stay."""
    keep = THINK_TAGS if message.get("role") == "assistant" else ()
    return {key: _marked(value, spellings, marks, form, keep) for key, value in message.items()}


def _marked(
    value: Any, spellings: re.Pattern[str] | None, marks: tuple[str, str], form: str, keep: Sequence[str] = ()
) -> Any:
    if isinstance(value, str):
        text = normalized(value, form)
        if spellings is None:
            return text
        opening, closing = marks
        return spellings.sub(lambda match: match[0] if match[0] in keep else f"{opening}{match[0]}{closing}", text)
    if isinstance(value, Mapping):
        return {
            _marked(key, spellings, marks, form): _marked(item, spellings, marks, form, keep)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_marked(item, spellings, marks, form, keep) for item in value]
    return value


def _unused_pair(*values: Any) -> tuple[str, str]:
    text = json.dumps(values, ensure_ascii=False, default=str)
    free = [character for character in _NONCHARACTERS if character not in text]
    if len(free) < 2:
        raise TemplateError("the messages contain all of Unicode's noncharacters U+FDD0 to U+FDEF; remove some")
    return free[0], free[1]


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    """JSON as transformers' templates expect it: characters as they are, and no HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise JinjaError(message)
