"""Messages -> tokens by the model's own template; what a user typed never becomes a control token. Knows no engine.

Every value of the messages but plain words that name a role or a type counts as typed by a user. The template is rendered
as it is, and again with each word of a user's text between two marks. Where both give the same text, the marks tell
which letters are whose, whatever the template does to them, and a control token is a spelling without a user's letter.
Where they differ the template looks into the texts. Then only the spellings in a text are marked, in any case of letters,
and what begins or ends one at the edges of a text; a template that also changes letters within a text, by `replace` or by
cutting it into letters, could still make a spelling of it.

The marks are removed, the text between two control tokens is tokenized as one piece, and all is token for token what
transformers' apply_chat_template gives. Tokenizing the user's text apart would be wrong: the "\\n" of a template merges
with a "\\n" that a message starts with. A spelling that a user typed is tokenized apart, as transformers does it.

llama.cpp does not apply the normaliser that Hugging Face's tokenizer applies, so it is applied here.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qwq_lite.errors import TemplateError
from qwq_lite.prompt.template import Template
from qwq_lite.prompt.template_limits import FIELD
from qwq_lite.text.normalization import normalize
from qwq_lite.text.tags import THINK_TAGS

Message = Mapping[str, Any]
Marks = tuple[str, str]  # before and after what a user typed
Marking = Callable[[str], str]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_NAMED = ("role", "type")  # fields that an application fills, and templates compare or make control tokens of
# Code points that Unicode keeps for a program's own use and that no text contains; a pair that does not occur marks a span.
# The sandbox never escapes them.
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class Vocabulary(Protocol):
    """What this module needs of a vocabulary; backend.vocab.Vocab is one."""

    adds_bos: bool
    bos: int
    eos: int

    @property
    def special(self) -> dict[str, int]: ...

    @property
    def tags(self) -> tuple[str, ...]: ...

    def tokenize(self, text: str, parse_special: bool, follows: bool = False) -> list[int]: ...


def tokenize(vocab: Vocabulary, text: str, form: str, follows: bool = False) -> list[int]:
    """Ids of a text as plain text: nothing added, and no spelling becomes a control token or a tag.

    `form` is `normalization.normalizer()` of the model; follows: other text stands before it. Equal to llama_tokenize of the
    normalised text with parse_special off, but for tags, which llama.cpp makes tokens of even then.
    """
    pieces = _split_tags(vocab.tags, normalize(text, form))
    return [
        token
        for n, piece in enumerate(pieces)
        if piece
        for token in vocab.tokenize(piece, False, follows=follows or n > 0)
    ]


def _split_tags(tags: tuple[str, ...], text: str) -> list[str]:
    """A text in pieces, none of which holds a tag. Each is cut where its first word ends: there every pre-tokenizer cuts."""
    pattern = _spellings(tags).pattern
    pieces, start, match = list[str](), 0, pattern.search(text)
    while match:
        end_of_word = re.search(r"(?<=[^\W_])[\W_]", match[0])
        cut = match.start() + (end_of_word.start() if end_of_word else 1)
        pieces.append(text[start:cut])
        start, match = cut, pattern.search(text, cut)
    return [*pieces, text[start:]]


@dataclass(frozen=True)
class _Spellings:
    """How a vocabulary's special tokens are written."""

    pattern: re.Pattern[str]  # as a group, so that split() keeps them; the longer of two that start alike counts
    typed: re.Pattern[str]  # the same in any case of letters, less white space: that belongs to no one
    heads: frozenset[str]  # how they begin, in small letters
    tails: frozenset[str]  # and how they end
    longest: int


@functools.lru_cache(maxsize=8)
def _spellings(spellings: tuple[str, ...]) -> _Spellings:
    longest_first = sorted(spellings, key=len, reverse=True)
    every, typed = (
        "|".join(map(re.escape, some)) or "(?!)" for some in (longest_first, filter(str.strip, longest_first))
    )
    cuts = [(text[:cut], text[cut:]) for text in map(str.casefold, spellings) for cut in range(1, len(text))]
    return _Spellings(
        re.compile(f"({every})"),
        re.compile(typed, re.IGNORECASE),
        frozenset(head for head, _ in cuts),
        frozenset(tail for _, tail in cuts),
        max(map(len, spellings), default=0),
    )


class ChatTemplate:
    """A model's chat template, ready to render.

    Args:
        origin: what its errors begin with: the file that it comes from.
        given: it is not the model's own; its errors then name the option.

    Raises: TemplateError when the source does not parse or asks for what templates may not do.
    """

    def __init__(self, source: str, origin: str = "", *, given: bool = False) -> None:
        self.source, self._origin, self._given = source, origin, given
        with self._errors():
            self._template = Template(source)

    def render(self, messages: Sequence[Message], **extra: Any) -> str:
        """The prompt's text, up to where the reply begins unless extra has add_generation_prompt.

        Raises: TemplateError with what the template objected to, or the limit that it met.
        """
        with self._errors():
            return self._template.render({"messages": messages, "add_generation_prompt": True, **extra})

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except TemplateError as error:
            text = str(error)
            if self._given:
                text = text.replace(FIELD, "the template of --chat-template")
                text = text.replace("convert the model again", "give another one")
            raise TemplateError(f"{self._origin}: {text}" if self._origin else text) from error

    def without_empty_system(self, vocab: Vocabulary, messages: Sequence[Message], **extra: Any) -> Sequence[Message]:
        """The messages, less an empty system message where the prompt is shorter without it.

        An empty one asks for no system prompt. Some templates must have it, or they write a system prompt of their own; others
        would make an empty turn of it, or refuse it.
        """
        first = messages[0] if messages else {}
        if first.get("role") != "system" or first.get("content") != "":
            return messages
        kept, left_out = (self._plain(vocab, some, extra) for some in (messages, messages[1:]))
        if left_out is None or (kept is not None and len(kept) < len(left_out)):
            return messages
        return messages[1:]

    def shows(self, vocab: Vocabulary, messages: Sequence[Message], **extra: Any) -> bool:
        """Whether `extra` changes the prompt of these messages; True where that cannot be told."""
        bare = self._plain(vocab, messages, {})
        return bare is None or bare != self._plain(vocab, messages, extra)

    def shows_system(self, vocab: Vocabulary, text: str) -> bool:
        """Whether a system prompt changes the prompt of a question; True where that cannot be told."""
        question = {"role": "user", "content": "?"}
        found = self._plain(vocab, [{"role": "system", "content": text}, question], {})
        return found is None or found != self._plain(vocab, [question], {})

    def _plain(self, vocab: Vocabulary, messages: Sequence[Message], extra: dict[str, Any]) -> str | None:
        """The prompt's text without marks; None where the template refuses."""
        with contextlib.suppress(TemplateError):
            return self.render(messages, **_own_tokens(vocab), **extra)
        return None

    def encode(self, vocab: Vocabulary, messages: Sequence[Message], form: str, **extra: Any) -> list[int]:
        """The prompt's tokens. Raises: TemplateError."""
        spellings = _spellings(tuple(vocab.special))
        marks = _unused_pair(messages, extra)
        rendered = self._render_marked(messages, extra, _own_tokens(vocab), spellings, marks)
        tokens = list(_encode(vocab, _pieces(rendered, spellings.pattern, marks), spellings.pattern, form))
        if vocab.adds_bos and tokens[:1] != [vocab.bos]:
            tokens.insert(0, vocab.bos)
        return tokens

    def _render_marked(
        self,
        messages: Sequence[Message],
        extra: dict[str, Any],
        own: dict[str, str],
        spellings: _Spellings,
        marks: Marks,
    ) -> str:
        """The prompt's text with marks around what a user typed, so far as it could be part of a spelling."""

        def render(mark: Marking) -> str:
            marked = [_mark_message(message, mark) for message in messages]
            return self.render(marked, **own, **_mark(extra, mark))

        opening, closing = marks
        plain = self.render(messages, **own, **extra)
        with contextlib.suppress(TemplateError):  # the marks made it one: they are too many, or the template saw them
            rendered = render(lambda text: re.sub(r"\S+", rf"{opening}\g<0>{closing}", text))
            others = re.sub(rf"{opening}[^{opening}{closing}\s]*{closing}", "", rendered)
            if re.sub(f"[{opening}{closing}]", "", rendered) == plain and not set(marks) & set(others):
                return rendered
        return render(functools.partial(_mark_spellings, spellings=spellings, marks=marks))


def _pieces(rendered: str, spellings: re.Pattern[str], marks: Marks) -> Iterator[tuple[str, bool]]:
    """The text without the marks, in pieces, and which of them are control tokens of the template's own."""
    opening, closing = marks
    parts = ["", *re.split(f"([{opening}{closing}])", rendered), ""]  # mark, text, mark, text, … mark
    for number in range(1, len(parts), 2):
        text, start, end = parts[number], 0, len(parts[number])
        opened, closed = parts[number - 1] == opening, parts[number + 1] == closing
        # A template that cuts a message may leave one of the two marks: the spelling at that mark alone was typed.
        for match in spellings.finditer(text) if not (opened and closed) else ():
            typed = (opened and match.start() == 0) or (closed and match.end() == end)
            if not typed:
                yield text[start : match.start()], False
                yield match[0], True
                start = match.end()
        yield text[start:], False


def _encode(
    vocab: Vocabulary, pieces: Iterator[tuple[str, bool]], spellings: re.Pattern[str], form: str
) -> Iterator[int]:
    special, text = vocab.special, list[str]()
    for piece, own in (*pieces, ("", True)):
        if not own:
            text.append(piece)
            continue
        for n, part in enumerate(filter(None, spellings.split("".join(text)))):
            yield from tokenize(vocab, part, form, follows=n > 0)
        text.clear()
        if piece:
            yield special[piece]


def _own_tokens(vocab: Vocabulary) -> dict[str, str]:
    """The spellings that a template may write by name, as transformers gives them to it; unmarked, for they are its own."""
    spelled = {token: spelling for spelling, token in vocab.special.items()}
    return {
        name: spelled[token] for name, token in (("bos_token", vocab.bos), ("eos_token", vocab.eos)) if token in spelled
    }


def _mark_message(message: Message, mark: Marking) -> Any:
    """A message with what its user typed marked. A reply's own thinking tags are the template's business and stay."""
    if message.get("role") != "assistant":
        return _mark(message, mark)
    tags = "|".join(THINK_TAGS)

    def mark_between_tags(text: str) -> str:
        return "".join(part if part in THINK_TAGS else mark(part) for part in re.split(f"({tags})", text))

    return _mark(message, mark_between_tags)


def _mark(value: Any, mark: Marking) -> Any:
    """The value with its texts marked. Not normalised yet: a mark that follows a tag would compose with its `>`."""
    if isinstance(value, str):
        return mark(value)
    if isinstance(value, Mapping):
        kept = {key for key, item in value.items() if key in _NAMED and _is_word(item)}
        return {
            key if _is_word(key) else _mark(key, mark): item if key in kept else _mark(item, mark)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_mark(item, mark) for item in value]
    return value


def _is_word(value: Any) -> bool:
    """Such as a template itself may write, to look a key up or to compare with."""
    return isinstance(value, str) and value.isidentifier()


def _mark_spellings(text: str, spellings: _Spellings, marks: Marks) -> str:
    """A text with marks around the spellings in it, and around what begins or ends one at its edges."""
    opening, closing = marks
    body = text.strip()
    start, end = 0, len(body)
    for length in range(1, min(spellings.longest, len(body) + 1)):
        if body[:length].casefold() in spellings.tails:
            start = length
        if body[-length:].casefold() in spellings.heads:
            end = len(body) - length
    end = max(start, end)
    middle = spellings.typed.sub(rf"{opening}\g<0>{closing}", body[start:end])
    head, tail = (f"{opening}{part}{closing}" if part else "" for part in (body[:start], body[end:]))
    before, _, after = text.partition(body) if body else (text, "", "")
    return f"{before}{head}{middle}{tail}{after}"


def _unused_pair(*values: Any) -> Marks:
    text = json.dumps(values, ensure_ascii=False, default=str)
    free = [character for character in _NONCHARACTERS if character not in text]
    if len(free) < 2:
        raise TemplateError("the messages contain all of Unicode's noncharacters U+FDD0 to U+FDEF; remove some")
    return free[0], free[1]
