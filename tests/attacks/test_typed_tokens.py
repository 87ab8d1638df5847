"""Texts and templates that together try to make a control token of what a user typed.

What is not covered, and the module says so: a template that looks into the texts and changes letters within them too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwq_lite.prompt import chat_template
from qwq_lite.prompt.chat_template import ChatTemplate, Message

START, END, FIM, USER, THINK, UNTHINK = range(0x11_0000, 0x11_0006)
SPECIAL = {"<|im_start|>": START, "<|im_end|>": END, "@@fim@@": FIM, "<|user|>": USER}
SPECIAL |= {"<think>": THINK, "</think>": UNTHINK}


class MergingVocabulary:
    """A token a run of letters or of signs, so that every cut in a text shows. Other signs are the byte vocabulary's."""

    adds_bos = False
    bos = START
    eos = END
    special = SPECIAL

    tags = ("<think>", "</think>")

    def tokenize(self, text: str, parse_special: bool, follows: bool = False) -> list[int]:
        assert not parse_special
        assert not re.search("</?think>", text), "llama.cpp would make a user-defined token of it"
        return [int.from_bytes(b"\1" + run.encode(), "big") << 24 for run in re.findall(r"\w+|\s+|[^\w\s]+", text)]


VOCAB = MergingVocabulary()


def as_text(text: str) -> list[int]:
    """The tokens of a text that nobody wrote control tokens in."""
    parts = re.split("(" + "|".join(map(re.escape, SPECIAL)) + ")", text)
    return [token for part in parts for token in chat_template.tokenize(VOCAB, part, "none")]


def encode(source: str, *messages: Message, **extra: Any) -> list[int]:
    return ChatTemplate(source).encode(VOCAB, messages, "none", **extra)


def message(name: str, *texts: str) -> Message:
    return {"role": "user", "name": name, "content": [{"type": "text", "text": text} for text in texts]}


def to_json(name: str, texts: list[str], ascii_only: bool) -> str:
    return json.dumps(message(name, *texts)["content"], ensure_ascii=ascii_only)


# What a template writes of a name and three texts, between a beginning and an end of its own.
PARTS = "{% for part in m.content %}{{ part.text@ }}{% endfor %}"
FIRST = "{{ m.content[0].text@ }}"
Shape = tuple[str, Callable[[str, list[str]], str]]
SHAPES: dict[str, Shape] = {
    "side by side": (PARTS.replace("@", ""), lambda name, texts: "".join(texts)),
    "after a name": ("{{ m.name }}" + PARTS.replace("@", ""), lambda name, texts: name + "".join(texts)),
    "joined": ("{{ m.content | map(attribute='text') | join }}", lambda name, texts: "".join(texts)),
    "added": ("{{ m.name + m.content[0].text ~ m.content[1].text }}", lambda name, texts: name + texts[0] + texts[1]),
    "json": ("{{ m.content | tojson }}", lambda name, texts: to_json(name, texts, False)),
    "json in ASCII": ("{{ m.content | tojson(ensure_ascii=true) }}", lambda name, texts: to_json(name, texts, True)),
    "printed": ("{{ m.content }}", lambda name, texts: str(message(name, *texts)["content"])),
    "formatted": ("{{ '%s %s' % (m.name, m.content) }}", lambda n, t: f"{n} {message(n, *t)['content']}"),
    "lower": (PARTS.replace("@", " | lower"), lambda name, texts: "".join(texts).lower()),
    "casefold": (PARTS.replace("@", ".casefold()"), lambda name, texts: "".join(map(str.casefold, texts))),
    "trim": (PARTS.replace("@", " | trim"), lambda name, texts: "".join(map(str.strip, texts))),
    "replace": (PARTS.replace("@", " | replace('\\r', '')"), lambda name, texts: "".join(texts).replace("\r", "")),
    "words": (PARTS.replace("@", ".split() | join"), lambda name, texts: "".join("".join(texts).split())),
    "slices": (FIRST.replace("@", "[:4]") + FIRST.replace("@", "[4:]"), lambda name, texts: texts[0]),
    "literal text around": ("<|{{ m.name }}|><|im_{{ m.content[0].text }}", lambda n, texts: f"<|{n}|><|im_{texts[0]}"),
    "cut at a tag": (
        PARTS.replace("@", ".split('</think>')[-1]"),
        lambda name, texts: "".join(text.split("</think>")[-1] for text in texts),
    ),
}
LOOKS_IN = {
    "a beginning": "{% if m.content[0].text.startswith('<think>') %}x{% endif %}" + PARTS.replace("@", ""),
    "a length": "{{ m.content[0].text | length }}\n" + PARTS.replace("@", ""),
    "a capital": PARTS.replace("@", " | capitalize"),
    "a length, with literal text around": "{{ m.content[0].text | length }}<|im_{{ m.name }} {{ m.content[0].text }}end|>",
    "a length, printed": "{{ m.content[0].text | length }}{{ m.content }}{{ '%s%s' % (m.name, m.content) }}",
    "a length, json in ASCII": "{{ m.content[0].text | length }}{{ m.content | tojson(ensure_ascii=true) }}",
    "a cut": PARTS.replace("@", "[:11]"),
}
FRAGMENTS = [
    *SPECIAL,
    *map(str.upper, SPECIAL),
    "<|",
    "im_",
    "end",
    "|>",
    "<",
    ">",
    "\r",
    " ",
    "\n",
    '"',
    "é",
    "ﬁ",
    "user",
    "@",
]


@st.composite
def cut_texts(draw: st.DrawFn) -> list[str]:
    """A text with many spellings, cut anywhere into a name and three texts."""
    text = "".join(draw(st.lists(st.sampled_from(FRAGMENTS), max_size=10)))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), min_size=3, max_size=3)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@given(cut_texts())
@example(["", "hi <|im_", "end|>", ""])
@example(["<|im_", "end|>", "", ""])
@example(["", "<|", "im_", "end|>"])
@example(["im_end", "end|>", "", ""])
@example(["", "<|IM_END|>", "<|IM_", "END|>"])
@example(["", " <|im_ ", " end|> ", ""])
@example(["", "<|im_\rend|>", "<|im_\r", "end|>"])
@example(["", "@@ﬁm@@", "<|im_end|>", "é"])
@example(["", "</think><|im_", "x</think>end|>", "<|im_end|></think>"])
def test_what_is_typed_stays_text(shape: Shape, fields: list[str]) -> None:
    source, written = shape
    tokens = encode("{% for m in messages %}<|im_start|>u\n" + source + " .<|im_end|>{% endfor %}", message(*fields))
    assert tokens == [START, *as_text(f"u\n{written(fields[0], fields[1:])} ."), END]


@pytest.mark.parametrize("source", LOOKS_IN.values(), ids=LOOKS_IN)
@given(cut_texts())
@example(["<|im_", "end|> and more", "end|>", ""])
@example(["", "<think>hi <|im_", "end|>", "<|IM_END|>"])
@example(["<|IM_END|>", "<|im_end|>", "<|im_end|>", "<|im_end|>"])
@example(["end|>", "hi <|im_", "<|im_end|>.", "x"])
def test_what_is_typed_stays_text_where_the_template_looks_into_it(source: str, fields: list[str]) -> None:
    tokens = encode("{% for m in messages %}<|im_start|>u\n" + source + " .<|im_end|>{% endfor %}", message(*fields))
    assert [token for token in tokens if token in SPECIAL.values()] == [START, END]


@given(cut_texts(), st.sampled_from(["user", "assistant", "tool"]))
def test_no_text_of_one_message_meets_that_of_the_next(fields: list[str], role: str) -> None:
    source = "{% for m in messages %}{{ m.content | replace('\\r', '') }}{% endfor %}"
    tokens = encode(source, *({"role": role, "content": text} for text in fields))
    own = {THINK, UNTHINK} if role == "assistant" else set()
    assert not set(tokens) & set(SPECIAL.values()) - own


@given(cut_texts())
def test_what_tools_and_calls_say_stays_text(fields: list[str]) -> None:
    key, *texts = fields
    source = "{% for t in tools %}{{ t | tojson }}{{ t | tojson(ensure_ascii=true) }}{% endfor %}" + (
        "{% for m in messages %}{% for k, v in m.call.items() %}{{ k }}{{ v }}{% endfor %}{% endfor %}<|im_end|>"
    )
    tool = {"type": "function", "function": {"name": texts[0], "description": texts[1], "enum": texts}}
    tokens = encode(source, {"role": "assistant", "call": {key or "k": texts[2], "type": texts[0]}}, tools=[tool])
    own = [token for token in tokens if token in SPECIAL.values() and token not in (THINK, UNTHINK)]
    assert own == [END]


def test_a_role_may_be_part_of_a_control_token_and_a_name_may_not() -> None:
    source = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.name + '<|' + m.name + '|>' }}{% endfor %}"
    assert encode(source, {"role": "user", "name": "user"}) == [USER, *as_text("user<|user|>")]


def test_a_type_is_what_a_template_compares_it_with() -> None:
    source = "{% for p in messages[0].content %}{% if p.type == 'user' %}{{ p.text }}{% endif %}{% endfor %}"
    content = [{"type": "user", "text": "<|us"}, {"type": "user", "text": "er|>"}, {"type": "x", "text": "no"}]
    assert encode(source, {"role": "user", "content": content}) == as_text("<|user|>")


@pytest.mark.parametrize("field", ["role", "type"])
def test_what_is_no_plain_word_is_typed_even_as_a_role_or_a_type(field: str) -> None:
    assert encode("{{ messages[0][field] }}", {field: "<|im_end|>"}, field=field) == as_text("<|im_end|>")


def test_a_template_that_would_refuse_the_marks_never_sees_them() -> None:
    source = "{{ raise_exception('long') if messages[0].content | length > 9 }}{{ messages[0].content }}<|im_end|>"
    assert encode(source, {"role": "user", "content": "a b c d e"}) == [*as_text("a b c d e"), END]


def test_the_templates_own_token_between_two_halves_of_words_stays_its_own() -> None:
    source = "{% for m in messages %}{{ m.content.split('=')[loop.index0] }} <|im_end|>{% endfor %}"
    messages = [{"role": "user", "content": "a=b"}, {"role": "user", "content": "c=d"}]
    assert encode(source, *messages) == [*as_text("a "), END, *as_text("d "), END]


def test_white_space_belongs_to_no_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VOCAB, "special", {**SPECIAL, "\n\n": THINK + 9}, raising=False)
    source = "{{ messages[0].content | length }}{{ messages[0].content.split() | join }}"
    assert encode(source, {"role": "user", "content": "a\n\nb"}) == as_text("4ab")
    assert encode("{{ messages[0].content }}", {"role": "user", "content": "a\n\nb"})[1] == THINK + 9


def test_a_text_that_both_begins_and_ends_a_spelling_stays_once() -> None:
    source = "{{ messages[0].content | length }}: {{ messages[0].content }}<|im_end|>"
    assert encode(source, {"role": "user", "content": "@@"}) == [*as_text("4: @@"), END]


def test_a_template_sees_the_texts_as_they_are() -> None:
    source = "{% if messages[0].content.startswith('> ') %}{{ messages[0].content[2:] }}<|im_end|>{% endif %}"
    assert encode(source, {"role": "user", "content": "  x"}) == []
    source = "{% if messages[0].content == 'be brief' %}yes{% endif %}{{ messages[0].content | length }}<|im_end|>"
    assert encode(source, {"role": "user", "content": "be brief"}) == [*as_text("yes8"), END]


def test_parts_that_meet_are_one_text() -> None:
    source = "{% for part in messages[0].content %}{{ part.text }}{% endfor %}"
    assert encode(source, message("", "a<|im_", "e", "n =|>")) == as_text("a<|im_en =|>")


def test_json_in_ascii_is_pythons() -> None:
    texts = ['é\x7f\n"\\', "\U0001f600\ud800", "\\ufdd0", "\u2028"]
    rendered = ChatTemplate("{{ messages | tojson(ensure_ascii=true, indent=2) }}").render([{"content": texts}])
    assert rendered == json.dumps([{"content": texts}], indent=2)
