"""phases and headings: labelled transcripts come in pieces of every size, and thought and answer are where the labels say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwq_lite.events import Answer, Event, FinishReason, Thinking
from qwq_lite.reply.builder import ReplyBuilder
from qwq_lite.reply.policies.headings import Headings
from qwq_lite.reply.policies.phases import CLOSINGS, OPENING, Phases
from qwq_lite.reply.policies.stops import Stops
from qwq_lite.reply.policy import Begin, Phase, Policy, Stop
from qwq_lite.text import final_answer
from tests.samples import examples
from tests.transcripts import TRANSCRIPTS, Transcript

LABEL, CLOSING = "‖", CLOSINGS[0]
END, OPEN, CLOSE = range(3)
TAGS = {OPENING: OPEN, CLOSING: CLOSE}
PREVIEW = [transcript for transcript in TRANSCRIPTS if not transcript.tagged]
TAGGED = [transcript for transcript in TRANSCRIPTS if transcript.tagged]
SIZES = st.lists(st.integers(1, 10), min_size=1, max_size=6)


@dataclass
class Read:
    """What a reader saw: the texts of both phases, and thought and answer of the reply."""

    thinking: str
    answer: str
    phase: Phase
    texts: tuple[str, str]


def named(transcripts: Iterable[Transcript]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("transcript", [pytest.param(each, id=each.name) for each in transcripts])


def pieces_of(text: str, sizes: Iterator[int]) -> list[bytes]:
    """A text's bytes, cut where the sizes say: within characters too."""
    raw, parts, place = text.encode(), [], 0
    while place < len(raw):
        size = next(sizes)
        parts.append(raw[place : place + size])
        place += size
    return parts


def no_words(text: str) -> list[int]:
    raise AssertionError("nothing is to be tokenized")


def read(parts: Sequence[bytes | int], policy: Policy, begin: Begin, *, ended: bool, tag: bytes = b"") -> Read:
    """The reply to parts that come one by one, each with an id of its own; a number is a tag's id. tag: a tag's bytes."""
    pieces = [b"", tag, tag, *(part for part in parts if isinstance(part, bytes))]
    free = iter(range(3, len(pieces)))

    track = ReplyBuilder((policy, Stops(frozenset({END}))), begin, pieces.__getitem__, no_words)
    events: list[Event] = []
    for part in parts:
        more, action = track.take(part if isinstance(part, int) else next(free))
        events += more
        assert action is None
    reason: FinishReason = "stop" if ended else "length"
    if ended:
        more, action = track.take(END)
        assert action == Stop("stop", mute=True)
        events += more
    else:
        events += track.flush()
    thinking = "".join(event.text for event in events if isinstance(event, Thinking))
    answer = "".join(event.text for event in events if isinstance(event, Answer))
    return Read(thinking, answer, track.state.phase, track.texts(reason))


def bare(text: str) -> str:
    return "".join(text.split())


def test_there_are_texts_enough_of_both_kinds() -> None:
    assert len(TRANSCRIPTS) >= 60
    assert min(len(PREVIEW), len(TAGGED)) >= 20
    assert len({transcript.name for transcript in TRANSCRIPTS}) == len(TRANSCRIPTS)
    assert all(transcript.marked.count(LABEL) <= 1 for transcript in TRANSCRIPTS)


@named(PREVIEW)
@settings(max_examples=12)
@given(sizes=SIZES)
@example(sizes=[1])
@example(sizes=[2, 1])
@example(sizes=[10_000])
def test_a_text_without_tags_turns_where_its_reader_would(transcript: Transcript, sizes: list[int]) -> None:
    text = transcript.marked.replace(LABEL, "")
    found = read(pieces_of(text, cycle(sizes)), Headings(), Begin("thinking", undivided=True), ended=transcript.ended)
    place = final_answer.causal_start(text)
    if transcript.causal:
        assert place == transcript.marked.index(LABEL)
    assert found.phase == ("thinking" if place is None else "answer")
    thinking, answer = (text, "") if place is None else (text[:place], text[place:])
    assert (found.thinking, found.answer) == (thinking.lstrip("\n"), answer.lstrip("\n"))
    label = max(0, transcript.marked.find(LABEL))
    assert (bare(found.texts[0]), bare(found.texts[1])) == (bare(text[:label]), bare(text[label:]))


FENCES, DISPLAYS = (
    ["```", "```py", "``", "`"],
    ["$$", " $$ ", "$", "a $$", "\\[", "\\(", "\\boxed{1}", "\\boxed", "\\bo"],
)
HEADINGS = ["**Final Answer**", "## Final Solution", "Final answer:", "**最终答案**"]
HARD = st.sampled_from([*FENCES, *DISPLAYS, *HEADINGS, "x", " ", "\t", " " * 57, " " * 59])


@examples(400)
@given(
    st.lists(st.builds(lambda line, end: line + end, HARD, st.sampled_from(["\n", "\n", "\n\n", ""])), max_size=9),
    SIZES,
)
@example(["x\n", "```py\n", "$$\n", "```\n", "**Final Answer**\n"], [1])
@example(["$$\n", "```\n", "**Final Answer**\n", "```\n", "\\boxed{1}\n"], [3])
@example([" " * 57, "```\n", "**Final Answer**\n"], [1])
def test_blocks_and_formulas_turn_a_text_where_its_reader_would(lines: list[str], sizes: list[int]) -> None:
    text = "".join(lines)
    place = final_answer.causal_start(text)
    found = read(pieces_of(text, cycle(sizes)), Headings(), Begin("thinking", undivided=True), ended=True)
    assert found.phase == ("thinking" if place is None else "answer")
    assert found.thinking == text[:place].lstrip("\n")


@pytest.mark.parametrize(
    ("text", "reason", "counts"),
    [
        ("Paris is the capital of France.", "stop", (0, 8, None)),
        ("Paris is the capital of France.", "length", (0, 7, None)),
        ("Paris is the capital of France.", "cancelled", (7, 0, None)),
        ("Let me see. \n\nSo the answer is 4.", "stop", (6, 7, "itself")),
        ("Hm, 4.\n**Final Answer**\n\n4.", "stop", (5, 8, "itself")),
    ],
)
def test_the_counts_of_a_text_without_tags_are_those_of_its_thought_and_answer(
    text: str, reason: FinishReason, counts: tuple[int, int, str | None]
) -> None:
    pieces = [b"", *(part.encode() for part in re.findall(r" ?\w+|\n+|\*\*|.", text))]
    track = ReplyBuilder(
        (Headings(), Stops(frozenset({END}))), Begin("thinking", undivided=True), pieces.__getitem__, no_words
    )
    for token in range(1, len(pieces)):
        track.take(token)
    if reason == "stop":
        track.take(END)
    else:
        track.flush()
    ended = track.ended(reason)
    assert ended[2:] == counts
    assert len(track.tokens) == sum(counts[:2])
    assert ended[:2] == track.texts(reason)


@dataclass(frozen=True)
class Spelling:
    """How the tags of a text come: the first closing one, those after it, the opening one: by id, or as text (False)."""

    first: bool
    later: bool = True
    opening: bool = True


def tagged_parts(text: str, spelling: Spelling, sizes: Iterator[int]) -> list[bytes | int]:
    """The text's parts; what stands between two ids is cut into pieces as one."""
    parts: list[bytes | int] = []
    plain, n_closed = "", 0
    for part in re.split(f"(\\A{OPENING}|{CLOSING})", text):
        if part == CLOSING:
            by_id = spelling.later if n_closed else spelling.first
            n_closed += 1
        else:
            by_id = part == OPENING and not plain and not parts and spelling.opening
        if by_id:
            parts += [*pieces_of(plain, sizes), TAGS[part]]
            plain = ""
        else:
            plain += part
    return [*parts, *pieces_of(plain, sizes)]


def labelled(transcript: Transcript, spelling: Spelling) -> tuple[str, str]:
    """Thought and answer by the label. The thought ends at the first tag; one after the label that has an id is no text."""
    before, label, after = transcript.marked.partition(LABEL)
    before = before.removeprefix(OPENING)
    if not label:
        return ("", before) if transcript.ended else (before, "")
    tag = re.search("|".join([*map(re.escape, CLOSINGS), r"(?<=\n)[<‹]答案[>›]"]), before)
    assert tag is not None
    return before[: tag.start()], after.replace(CLOSING, "") if spelling.later else after


@named(TAGGED)
@settings(max_examples=12)
@given(sizes=SIZES, first=st.booleans(), opened=st.booleans(), tag_has_bytes=st.booleans())
@example(sizes=[1], first=False, opened=False, tag_has_bytes=False)
@example(sizes=[1], first=False, opened=True, tag_has_bytes=False)
@example(sizes=[2, 1], first=False, opened=True, tag_has_bytes=False)
@example(sizes=[10_000], first=False, opened=False, tag_has_bytes=False)
def test_a_text_with_tags_has_its_thought_and_answer(
    transcript: Transcript, sizes: list[int], first: bool, opened: bool, tag_has_bytes: bool
) -> None:
    """The tag that ends the thought by its id or as text. The template opened the thought where the text does not."""
    text = transcript.marked.replace(LABEL, "")
    spelling = Spelling(first)
    begin = Begin("answer" if text.startswith(OPENING) and opened else "thinking")
    tag = CLOSING.encode() if tag_has_bytes else b""
    parts = tagged_parts(text, spelling, cycle(sizes))
    found = read(parts, Phases(OPEN, CLOSE), begin, ended=transcript.ended, tag=tag)
    thinking, answer = labelled(transcript, spelling)
    assert (bare(found.texts[0]), bare(found.texts[1])) == (bare(thinking), bare(answer))


@named(TAGGED)
@settings(max_examples=8)
@given(sizes=SIZES)
@example(sizes=[1])
@example(sizes=[3])
def test_a_model_without_tokens_for_its_tags_spells_all_of_them(transcript: Transcript, sizes: list[int]) -> None:
    text = transcript.marked.replace(LABEL, "")
    begin = Begin("answer" if text.startswith(OPENING) else "thinking")
    found = read(pieces_of(text, cycle(sizes)), Phases(), begin, ended=transcript.ended)
    thinking, answer = labelled(transcript, Spelling(False, False))
    if transcript.name in ("tagged_two_tags_nothing_after_last", "tagged_zh_two_tags_white_space_after_last"):
        answer = answer.replace(CLOSING, "")
        found.texts = (found.texts[0], found.texts[1].replace(CLOSING, ""))  # text of the answer, or its end
    assert (bare(found.texts[0]), bare(found.texts[1])) == (bare(thinking), bare(answer))


@pytest.mark.parametrize("closing", [*CLOSINGS, "\n<答案>", "<答案>"])
@given(sizes=SIZES)
@example(sizes=[1])
@example(sizes=[1, 100])
@example(sizes=[2])
def test_a_thought_may_end_at_once(closing: str, sizes: list[int]) -> None:
    found = read(pieces_of(f"{closing}\n\nYes.", cycle(sizes)), Phases(OPEN, CLOSE), Begin("thinking"), ended=True)
    assert (found.thinking, found.answer) == ("", "Yes.")


@given(sizes=SIZES)
@example(sizes=[1])
@example(sizes=[1, 1, 1, 2, 100])
def test_a_tag_at_a_lines_start_is_one_however_its_characters_are_cut(sizes: list[int]) -> None:
    found = read(pieces_of("嗯。\n‹答案>好", cycle(sizes)), Phases(OPEN, CLOSE), Begin("thinking"), ended=True)
    assert (found.thinking, found.answer) == ("嗯。\n", "好")


@given(sizes=SIZES)
@example(sizes=[1])
def test_what_looks_like_a_tag_is_text(sizes: list[int]) -> None:
    text = "a < b, </thin, </ think>, <答案> here, ‹ and <</thinks> and </"
    found = read(pieces_of(text, cycle(sizes)), Phases(OPEN, CLOSE), Begin("thinking"), ended=False)
    assert (found.thinking, found.answer) == (text, "")


@given(sizes=SIZES)
def test_an_answer_may_spell_the_opening_tag(sizes: list[int]) -> None:
    parts: list[bytes | int] = [b"Hm.\n", CLOSE, *pieces_of("\n\n<think> opens a thought.", cycle(sizes))]
    found = read(parts, Phases(OPEN, CLOSE), Begin("thinking"), ended=True)
    assert found.texts == ("Hm.", "<think> opens a thought.")
