"""breaks: where a text may end, by a table of cases, and the same for every way in which the text comes."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwq_lite.text import breaks
from qwq_lite.text.breaks import TAIL, Break, Kind

# Texts with | at every place where a break ends. What follows the last one is not complete.
ENDS = [
    "It is 5. |Then",
    "It is 5.",  # may become 5.1
    "Pi is 3.14 and e is 2.718 or",
    "Pi is 3. |14 is not",
    "Is it? |No! |Well",
    "Really?! |Yes",
    "He said 'no.' |Then",
    'He said "no." |Then',
    "(It is so.) |Then",
    "**It is so.** |Then",
    "`x`. |Then",
    "see a.b.c and x.y for",
    "Take two, e.g. a pear, i.e. fruit, cf. Dr. No vs. Mr. Bean and Ms. Poe of St. Ives, No. 5",
    "That is not vs code. |Then",
    "Apples, pears, etc. |Then",
    "Hmm... |so it is",
    "Hmm...so it is",
    "Hmm…|so it is",
    "1. Take the root",
    "12. Take the root",
    "Steps:\n|1. Take the root\n|2. Square it\n|10. Done. |Then",
    "I have 12. |Then",
    "line\n|line",
    "line.\n|line",
    "one\n\n|two",
    "one.\n\n|two",
    "one\n \t\n|two",
    "one\n\n\n\n|two",
    "one\n\n|  two",
    "one\n|two\n\n|three. |four",
    "今天很好。|明天",
    "好吗？|好！|那么",
    "他说：“好。”|然后",
    "（就是这样。）|然后",
    "「好。」|然後",
    "面积是3.14平方米，周长",
    "第一，第二；第三：",
    "嗯……|那么",
    "好。\n|那么",
    "好。\n\n|那么",
    "**好。**|那么",
    "",
    "no break at all, only commas; and colons: and dashes - here",
]


def cut(marked: str) -> tuple[str, list[int]]:
    """The text, and the places of the breaks that are seen once all of it is there."""
    parts = marked.split("|")
    places = [sum(map(len, parts[:n])) for n in range(1, len(parts))]
    return "".join(parts), places


def without_space(text: str, place: int) -> int:
    """A place before the white space that stands before it: where such a break ends is the same place."""
    return len(text[:place].rstrip())


def without_closers(text: str, place: int) -> int:
    """A place before what closes a sentence in Chinese, after its stop."""
    return len(text[:place].rstrip().rstrip("”）」…*"))


@pytest.mark.parametrize("marked", ENDS)
def test_a_break_is_where_it_is_marked(marked: str) -> None:
    text, places = cut(marked)
    n_after = breaks.n_after_last(text)
    if not places:
        assert n_after is None
        return
    assert n_after is not None
    assert without_space(text, len(text) - n_after) == without_space(text, places[-1])


@pytest.mark.parametrize("marked", ENDS)
def test_every_break_is_seen_as_the_text_comes(marked: str) -> None:
    """By someone who gets it letter by letter. A letter more may make a paragraph of a line, or close a quotation."""
    text, places = cut(marked)
    seen = set()
    for n in range(1, len(text) + 1):
        found = breaks.last(text[: n - 1], text[n - 1 : n])
        if found is not None:
            seen.add(without_closers(text, n - found.n_after))
    assert seen == {without_closers(text, place) for place in places}


@pytest.mark.parametrize(
    ("tail", "text", "found"),
    [
        ("It is 5", ". ", Break("sentence", 1)),
        ("It is 5.", " ", Break("sentence", 1)),
        ("It is 5.", " So", Break("sentence", 3)),
        ("It is 5", ".", None),
        ("It is 5.", "1", None),
        ("Is it so? Yes", ", it is", None),
        ("", "One. Two. Three", Break("sentence", 6)),
        ("", "", None),
        ("One. ", "", None),
        ("e.g", ". a", None),
        ("e.", "g. a", None),
        ("one", "\n", Break("line", 0)),
        ("one\n", "\n", Break("paragraph", 0)),
        ("one", "\n\ntwo", Break("paragraph", 3)),
        ("one\n", "two", None),
        ("one\n1", ". two", None),
        ("one\n", "12. two", None),
        ("one", ".\n1. two", Break("line", 6)),
        ("甲", "。", Break("sentence", 0)),
        ("甲", "。乙", Break("sentence", 1)),
        ("甲。", "”乙", Break("sentence", 1)),
        ("甲。乙", "丙", None),
        ("3", ".14", None),
    ],
)
def test_a_piece_completes_a_break_or_none(tail: str, text: str, found: Break | None) -> None:
    assert breaks.last(tail, text) == found


@pytest.mark.parametrize("stop", ["。", "！", "？", "…"])
def test_a_chinese_sentence_is_complete_with_its_stop_and_not_again_with_what_follows(stop: str) -> None:
    assert breaks.last("甲", stop) == Break("sentence", 0)
    assert breaks.last(f"甲{stop}", "乙") is None


@pytest.mark.parametrize(
    ("text", "sentence", "paragraph"),
    [
        ("One. Two", "Two", "One. Two"),
        ("One. Two.", "Two.", "One. Two."),
        ("One. Two. ", "Two. ", "One. Two. "),
        ("One. Two.\n\n", "Two.\n\n", "One. Two.\n\n"),
        ("One.\n\nTwo. Three?\n", "Three?\n", "Two. Three?\n"),
        ("One\n\nTwo\nThree", "Three", "Two\nThree"),
        ("One\n\nTwo\n \nThree: 3.14", "Three: 3.14", "Three: 3.14"),
        ("Hmm... so", "so", "Hmm... so"),
        ("1. One", "1. One", "1. One"),
        ("甲。乙", "乙", "甲。乙"),
        ("甲。\n\n乙。丙", "丙", "乙。丙"),
        ("", "", ""),
        ("\n\n", "\n\n", "\n\n"),
        ("One", "One", "One"),
    ],
)
def test_what_is_unfinished_is_the_last_sentence_or_paragraph(text: str, sentence: str, paragraph: str) -> None:
    """White space may stand on either side of the place: what is taken back loses that before it too."""
    for kind, last in (("sentence", sentence), ("paragraph", paragraph)):
        n = breaks.n_unfinished(text, "sentence" if kind == "sentence" else "paragraph")
        assert text[len(text) - n :].lstrip() == last.lstrip()


@pytest.mark.parametrize("ended", ["甲。乙。", "甲？乙！", "甲。乙。\n\n", "甲。“乙。”", "甲。乙…"])
def test_a_chinese_sentence_that_has_ended_is_the_last_one_as_an_english_one_is(ended: str) -> None:
    assert breaks.n_unfinished("A. B.\n\n", "sentence") == len(" B.\n\n")
    assert breaks.n_unfinished(ended, "sentence") == len(ended) - 2


LETTERS = [
    "a",
    "B",
    "1",
    "12",
    ".",
    "!",
    "?",
    " ",
    "\n",
    "\n\n",
    " \n",
    ")",
    "”",
    "*",
    "e.g.",
    "No.",
    "好",
    "。",
    "？",
    "…",
]
TEXTS = st.lists(st.sampled_from(LETTERS), max_size=40).map("".join)
PIECES = st.lists(st.lists(st.sampled_from(LETTERS), min_size=1, max_size=4).map("".join), max_size=25)


def longest_run(text: str) -> int:
    """Characters of white space and of signs that stand together: what decides about a break."""
    longest = run = 0
    for character in text:
        run = 0 if character.isalnum() else run + 1
        longest = max(longest, run)
    return longest


@given(PIECES)
@example(["a.", " ", "B"])
@example(["a\n", "\n", "\n", "a"])
@example(["1", ".", " a"])
@example(["e.", "g.", " a"])
def test_what_comes_piece_by_piece_has_the_breaks_of_the_whole(pieces: list[str]) -> None:
    """Where a piece completes something, that is the last break of all there is; where the last one moves, a piece did it."""
    whole, before = "", None
    for piece in pieces:
        found = breaks.last(whole, piece)
        whole += piece
        if longest_run(whole) > TAIL - 6:
            return
        n_after = breaks.n_after_last(whole)
        place = None if n_after is None else len(whole) - n_after
        if found is not None:
            assert found.n_after == n_after
        else:
            assert place == before
        before = place


@given(PIECES, TEXTS)
def test_no_more_than_the_tail_of_what_came_before_counts(pieces: list[str], older: str) -> None:
    text = "".join(pieces)
    tail = ("x" * TAIL + text)[-TAIL:]
    for piece in pieces:
        assert breaks.last(tail, piece) == breaks.last(older + tail, piece)


@given(TEXTS, st.integers(1, 60))
def test_the_place_of_a_break_does_not_depend_on_the_size_of_pieces(text: str, size: int) -> None:
    """The last one of a text is found by its last piece, or was found by one before."""
    if longest_run(text) > TAIL - 6:
        return
    place = None
    for start in range(0, len(text), size):
        found = breaks.last(text[:start], text[start : start + size])
        if found is not None:
            place = min(len(text), start + size) - found.n_after
    n_after = breaks.n_after_last(text)
    assert place == (None if n_after is None else len(text) - n_after)


@given(TEXTS, st.sampled_from(["paragraph", "sentence"]))
def test_what_is_taken_back_is_something_wherever_there_is_a_text(text: str, kind: str) -> None:
    """And what stands ends with a break, or is nothing."""
    n = breaks.n_unfinished(text, "paragraph" if kind == "paragraph" else "sentence")
    assert (n > 0) == (text != "")
    kept = text[: len(text) - n]
    assert not kept or breaks.n_after_last(kept + text[len(kept) : len(kept) + 1]) in (0, 1)


def test_the_kinds_are_those_of_the_pattern() -> None:
    kinds: tuple[Kind, ...] = ("paragraph", "line", "sentence")
    assert set(kinds) == set(breaks._BREAK.groupindex)


@given(
    st.text('.!?。！？…"”)]*`」 \n\t\u2003ab3,人', max_size=8),
    st.text('.!?。！？…"”)]*`」 \n\t\u2003ab3,人', min_size=1, max_size=4),
)
@example(".", "\u2003")
@example("", ".")
@example("so", " it")
def test_a_piece_that_a_quick_look_passes_over_ends_nothing(tail: str, text: str) -> None:
    """By the last break of the whole, which is another way to find it."""
    if breaks.is_plain(tail, text):
        before, after = breaks.n_after_last(f"{tail}x"), breaks.n_after_last(f"{tail}{text}x")
        assert after == (None if before is None else before + len(text))
