"""respelling: what stands and what is forced are the tokens that a real tokenizer writes the whole text with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from tokenizers import Tokenizer

from qwq_lite.backend.model import LoadedModel
from qwq_lite.engine import reply_rules
from qwq_lite.engine.reply_rules import Thoughts
from qwq_lite.reply.commands import Steer
from qwq_lite.reply.fold import utf8
from qwq_lite.reply.policy import Rewrite
from qwq_lite.reply.retokenize import MOST_BACK, retokenize
from qwq_lite.text import breaks
from scripts.checkpoint_files import byte_symbols
from tests import oracle

TEXTS = {
    "English": "First I add them. It is 5, e.g. for two apples. Is it so?! Yes, it is so... I think. ",
    "paragraphs": "One thing is sure.\n\nThe other one is not?!\n\nSo let me see: 3.14 * 2 = 6.28 \n\nand  then",
    "Chinese": "让我想想。面积是3.14平方米，对吗？对！\n\n所以答案是六。那么……再看一遍。\n她说：“好。”然后",
    "code": "Let me try:\n\n```python\ndef f(x):\n    if x:\n        return x  # no\n\n    return 1\n```\n\nThat works. \n",
    "list": "Options:\n\n1. Add them.\n2. Take one away. \n   - the first one\n   - the other\n\n* **bold** and *so*\n\n\n3. End",
    "bold": "**It is so.** And **that** too.\n**Step 1:**\n**Check**",
    "signs": "x = (a + b)[0]; y += 1;\n\\[ \\boxed{5} \\]\n\nemoji 🙂🙂 and ﷽ and é, ö.\r\nnext\tline\u3000end",
    "spaces": "a.  \n  b?! \n\n  c。  \nd  ",
    "long line": "and so it goes on and on, " * 18,
}
ENDINGS = (". ", ".", "?!", "。", "**", "\n", " \n", ".\n\n", "…", ":\n", "`", "3.", " ")
HINT = Steer("Wait, I should try n = 0 first.\n")
CLOSED = -1  # a control token's id


class Tongue(NamedTuple):
    """A vocabulary: a text's tokens and a token's bytes."""

    tokenize: Callable[[str], list[int]]
    piece: Callable[[int], bytes]


@pytest.fixture(scope="module")
def demo(demo_gguf: Path) -> Iterator[Tongue]:
    model = LoadedModel(demo_gguf)
    yield Tongue(functools.partial(model.vocab.tokenize, parse_special=False), model.vocab.piece)
    model.close()


@pytest.fixture(scope="module")
def qwen() -> Tongue:
    """Qwen's own vocabulary, in which a stop and the newlines after it are one token."""
    tokenizer = Tokenizer.from_file(str(oracle.qwen_tokenizer_json()))
    values = {symbol: value for value, symbol in enumerate(byte_symbols())}
    names = {number: name for name, number in tokenizer.get_vocab(with_added_tokens=False).items()}

    def tokenize(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    return Tongue(tokenize, lambda token: bytes(values[symbol] for symbol in names[token]))


@pytest.fixture(params=["demo", "qwen"])
def tongue(request: pytest.FixtureRequest) -> Tongue:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Tongue)
    return Tongue(found.tokenize, lambda token: b"" if token == CLOSED else found.piece(token))


def texts() -> dict[str, str]:
    ended = {f"ends with {ending!r}": f"One line. \nAnother one{ending}" for ending in ENDINGS}
    return {**TEXTS, **ended, **{f"begins with {ending!r}": f"{ending}x" for ending in ENDINGS}}


def words() -> dict[str, tuple[str | int, ...]]:
    undivided, tagged = Thoughts("undivided"), Thoughts("tags", closed=CLOSED)
    return {
        "English": reply_rules.closing_words(undivided, "How many are there?"),
        "Chinese": reply_rules.closing_words(undivided, "一共有多少个？"),
        "tag": reply_rules.closing_words(tagged, "How many are there?"),
        "spelled tag": reply_rules.closing_words(Thoughts("tags"), "How many are there?"),
        "hint": (f"\n\n{HINT.hint}",),
    }


def text_of(tokens: Sequence[int], tongue: Tongue) -> str:
    """The text of the tokens as a reply has it: without the bytes of a character that is not complete."""
    return utf8(b"", b"".join(map(tongue.piece, tokens)))[0]


def spelled(kept: str, given: Sequence[str | int], tongue: Tongue) -> list[int]:
    """All of a text with its words, tokenized at once between control tokens."""
    tokens: list[int] = []
    text = kept
    for number, word in enumerate(given):
        if isinstance(word, int):
            tokens += [*(tongue.tokenize(text) if text else []), word]
            text = ""
        else:
            text += word if kept or number else word.lstrip("\n")
    return tokens + (tongue.tokenize(text) if text else [])


def check(tokens: Sequence[int], n_drop: int | None, given: tuple[str | int, ...], tongue: Tongue) -> None:
    n_kept, forced = retokenize(tokens, tongue.piece, Rewrite(n_drop, given), tongue.tokenize)
    assert 0 <= n_kept <= len(tokens)
    whole = text_of(tokens, tongue)
    if n_drop is None:
        n_after = breaks.n_after_last(text_of(tokens[-MOST_BACK:], tongue))
        n_drop = n_after if n_after is not None else len(whole) if len(tokens) <= MOST_BACK else 0
    kept = whole[: max(0, len(whole) - n_drop)].rstrip()
    made = [*tokens[:n_kept], *forced]
    assert made == spelled(kept, given, tongue)
    said = [word if isinstance(word, str) else "" for word in given]
    first = said[0] if kept else said[0].lstrip("\n")  # a phase begins without newlines
    assert text_of(made, tongue) == "".join([kept, first, *said[1:]])
    assert made.count(CLOSED) == given.count(CLOSED)


@pytest.mark.parametrize("how", words())
@pytest.mark.parametrize("name", texts())
def test_a_text_that_was_cut_anywhere_goes_on_as_one_text(name: str, how: str, tongue: Tongue) -> None:
    tokens, given = tongue.tokenize(texts()[name]), words()[how]
    for n_tokens in range(len(tokens) + 1):
        check(tokens[:n_tokens], 0, given, tongue)
        check(tokens[:n_tokens], None, given, tongue)


@pytest.mark.parametrize("how", words())
@pytest.mark.parametrize("name", ["English", "paragraphs", "Chinese", "code", "list", "spaces", "signs"])
def test_so_many_characters_are_dropped(name: str, how: str, tongue: Tongue) -> None:
    tokens, given = tongue.tokenize(texts()[name]), words()[how]
    for n_tokens in range(0, len(tokens) + 1, 3):
        whole = text_of(tokens[:n_tokens], tongue)
        for n_drop in {1, 2, 7, len(whole), *(breaks.n_unfinished(whole, kind) for kind in ("sentence", "paragraph"))}:
            check(tokens[:n_tokens], n_drop, given, tongue)


def test_a_control_token_that_ended_nothing_stands_before_the_text(tongue: Tongue) -> None:
    """Tokens without bytes, such as an opening tag of the model's own, are passed over."""
    tokens = [CLOSED, *tongue.tokenize("It is 5. So")]
    n_kept, forced = retokenize(tokens, tongue.piece, Rewrite(3, ("\n\nYes.",)), tongue.tokenize)
    assert text_of([*tokens[:n_kept], *forced], tongue) == "It is 5.\n\nYes."


def test_no_more_is_taken_back_than_the_limit_where_no_break_is_near(tongue: Tongue) -> None:
    tokens = tongue.tokenize("It is so. " + "and so on " * 2 * MOST_BACK)
    n_kept, forced = retokenize(tokens, tongue.piece, Rewrite(None, ("\n\nYes.",)), tongue.tokenize)
    assert n_kept >= len(tokens) - 1
    assert text_of(forced, tongue).endswith("\n\nYes.")
    near = tokens[: MOST_BACK - 20]
    n_kept, forced = retokenize(near, tongue.piece, Rewrite(None, ("\n\nYes.",)), tongue.tokenize)
    assert text_of([*near[:n_kept], *forced], tongue) == "It is so.\n\nYes."
