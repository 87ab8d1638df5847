"""lines and fences: a text in any pieces has the same lines, and every rule agrees on what is code."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwq_lite.text import fences, final_answer
from qwq_lite.text.lines import Line, LinePiece, follow

# By CommonMark 0.31, 4.5: each line, and whether it stands in a block or is a fence.
BLOCKS = {
    "a word on the language": ["```python", "x", "```"],
    "tildes": ["~~~", "```", "~~~~"],
    "a longer fence closes": ["```", "x", "`````"],
    "a shorter one does not": ["````", "```", "````"],
    "one with a word does not": ["```", "```x", "```"],
    "indented": ["  ```", "x", "\t```"],
    "blank at its end": ["```", "x", "```  \r"],
}
NO_BLOCKS = ["``", "``` a `b`", "x ```", "~~", "**```**"]
TEXTS = st.lists(
    st.sampled_from(
        ["```", "````", "~~~", "`", "x", " ", "\n", "\n", "**Answer**", "#", "\\[", "\\boxed{", "\t", "|", "\r", "    "]
    ),
    max_size=30,
).map("".join)


def pieces(text: str, places: Sequence[int]) -> list[str]:
    ends = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(ends)]


def followed(parts: Sequence[str]) -> tuple[Line, list[LinePiece]]:
    line, ended = Line(), list[LinePiece]()
    for part in parts:
        line, rows = follow(line, part)
        ended += [row for row in rows if row.ended]
    return line, ended


@pytest.mark.parametrize("lines", BLOCKS.values(), ids=BLOCKS)
def test_a_block_is_code_from_fence_to_fence(lines: list[str]) -> None:
    text = "\n".join(["before", *lines, "after"])
    assert [*fences.outside_code(text)] == ["before", "after"]
    assert not fences.open_fence(text)
    assert fences.open_fence("\n".join(lines[:-1]))


@pytest.mark.parametrize("line", NO_BLOCKS)
def test_what_opens_no_block(line: str) -> None:
    assert not fences.opens(line)
    assert [*fences.outside_code(f"{line}\nx")] == [line, "x"]


@given(TEXTS, st.lists(st.integers(0, 200)))
@example("```\n\t```x```\n```\n|", [1, 2, 9])
def test_a_text_in_any_pieces_has_the_same_lines(text: str, places: list[int]) -> None:
    line, ended = followed(pieces(text, places))
    outside = [*fences.outside_code(text)]
    *whole, last = text.split("\n")
    assert len(ended) == len(whole)
    assert [full for full, row in zip(whole, ended, strict=True) if not row.in_code] == outside[
        : len(outside) - (not line.fence and not fences.opens(last))
    ]
    assert line.fence == fences.open_fence("\n".join([*whole, ""]))
    if last.strip():
        indent = last[: len(last) - len(last.lstrip(" \t"))]
        assert line.set_apart == (last.lstrip(" \t").startswith("|") or "\t" in indent or len(indent) >= 4)


@given(TEXTS, st.lists(st.integers(0, 200)))
def test_what_may_announce_an_answer_is_known_whole(text: str, places: list[int]) -> None:
    line, ended = followed(pieces(text, places))
    for full, row in zip(text.split("\n"), ended, strict=False):
        if not row.in_code and final_answer.is_heading(full):
            assert row.text == full
    last = text.rpartition("\n")[2]
    if not line.fence and final_answer.may_announce(last) and not fences.opens(last):
        assert line.text == last


def test_characters_that_are_left_are_counted_from_a_lines_start() -> None:
    _, rows = follow(Line("ab"), "c\nde\n\nf")
    assert [(row.text, row.n_left, row.ended) for row in rows] == [
        ("abc", 9, True),
        ("de", 5, True),
        ("", 2, True),
        ("f", 1, False),
    ]
