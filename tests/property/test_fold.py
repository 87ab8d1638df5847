"""generation: a reply's text does not depend on where its tokens are cut; tags, ends and stop texts do what they are for."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from qwq_lite.events import Answer, Event, FinishReason, Notice, Thinking
from qwq_lite.reply import fold
from qwq_lite.reply.builder import ReplyBuilder
from qwq_lite.reply.fold import State
from qwq_lite.reply.policies.headings import Headings
from qwq_lite.reply.policies.order import arrange
from qwq_lite.reply.policies.phases import ANSWERS, CLOSINGS, Phases
from qwq_lite.reply.policies.stops import Stops
from qwq_lite.reply.policy import Begin, Phase, Policy, Stop
from tests.samples import examples

TEXT, END, OPEN, CLOSE = 0, 1, 2, 3
FIRST_FREE = 100  # every piece of text gets an id of its own from here on, as no two tokens of a vocabulary share one
TEXTS = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("人工智能答案😀👩‍🚀🇨🇳éß\n")))
PLACES = st.lists(st.integers(0, 1000))

Token = tuple[int, bytes]
Shown = tuple[str, str, FinishReason | None]


def rules(*stops: str, max_tokens: int | None = None, tags: bool = True) -> tuple[Policy, ...]:
    phases = [Phases(OPEN, CLOSE)] if tags else []
    return arrange([*phases, Stops(frozenset({END}), stops, max_tokens)])


def untokenized(_text: str) -> list[int]:
    raise AssertionError("no policy here rewrites a text")


def play(
    tokens: Iterable[Token], policies: tuple[Policy, ...] | None = None, phase: Phase = "answer"
) -> tuple[ReplyBuilder, list[Event], FinishReason | None]:
    """A reply after the tokens, or after the first of them that ends it; what it showed, and its finish."""
    pieces: dict[int, bytes] = {}
    track = ReplyBuilder(rules() if policies is None else policies, Begin(phase), pieces.__getitem__, untokenized)
    events: list[Event] = []
    finish: FinishReason | None = None
    for i, (token, piece) in enumerate(tokens):
        number = FIRST_FREE + i if token == TEXT else token
        pieces[number] = piece
        new, action = track.take(number)
        events += new
        if isinstance(action, Stop):
            finish = action.reason
            break
    return track, events, finish


def run(tokens: Iterable[Token], policies: tuple[Policy, ...] | None = None, phase: Phase = "answer") -> Shown:
    """Thought, answer and finish: all that was shown, also of an answer that began anew.

    What the reply says in the end is what was shown, without the space around it and without answers that no longer count;
    of one that ends while it thinks all is the answer. Asserted here for every case.
    """
    track, events, finish = play(tokens, policies, phase)
    thought, answers = "", [""]
    for event in events:
        if isinstance(event, Thinking):
            assert event.text
            thought += event.text
        elif isinstance(event, Answer):
            assert event.text
            answers[-1] += event.text
        else:
            assert answers[-1]
            assert event == restarted(len(answers[-1]))
            answers.append("")
    answer = next((text for text in reversed(answers) if text.strip()), "").rstrip()
    assert track.texts("length") == (thought.strip(), answer)
    whole = ("", thought.strip()) if track.state.phase == "thinking" else (thought.strip(), answer)
    assert track.texts("stop") == whole
    return thought, "".join(answers), finish


def restarted(n_chars: int) -> Notice:
    return Notice(f"the {n_chars} characters of the answer so far no longer count", "restarted", n_chars)


def text(*pieces: str | bytes) -> list[Token]:
    return [(TEXT, piece.encode() if isinstance(piece, str) else piece) for piece in pieces]


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    ends = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(ends)]


def ended(pieces: Iterable[bytes]) -> list[Token]:
    return [*text(*pieces), (END, b"")]


def state_after(tokens: Iterable[Token], policies: tuple[Policy, ...] | None = None, phase: Phase = "answer") -> State:
    timed = ((token, piece, 0.0) for token, piece in tokens)
    return fold.fold(rules() if policies is None else policies, Begin(phase), timed)[0]


@given(TEXTS, PLACES)
@example("人😀", [1, 2, 3, 4, 5, 6])
def test_a_text_cut_anywhere_is_the_same_text(whole: str, places: list[int]) -> None:
    assert run(ended(cut(whole.encode(), places))) == ("", whole.lstrip("\n"), "stop")


@given(st.binary(), PLACES)
@example(b"\xe4\xba", [1])
@example(b"a\xf0\x9f\x98", [2, 3])
@example(b"\xed\xa0\x80", [1, 2])
def test_bytes_that_are_no_text_become_replacement_characters_wherever_they_are_cut(
    data: bytes, places: list[int]
) -> None:
    expected = data.decode("utf-8", "replace").lstrip("\n")
    assert run(ended(cut(data, places))) == ("", expected, "stop")


@given(TEXTS, PLACES)
def test_no_replacement_character_is_shown_while_a_character_is_unfinished(whole: str, places: list[int]) -> None:
    clean = whole.replace("\ufffd", "")
    assert "\ufffd" not in run(text(*cut(clean.encode(), places)))[1]


@given(TEXTS, TEXTS, PLACES)
def test_text_before_the_closing_tag_is_thought_and_after_it_the_answer(
    thought: str, answer: str, places: list[int]
) -> None:
    assume(not any(tag in thought for tag in (*CLOSINGS, *ANSWERS)))  # those end it themselves
    tokens = [*text(*cut(thought.encode(), places)), (CLOSE, b"</think>"), *ended(cut(answer.encode(), places))]
    assert run(tokens, phase="thinking") == (thought.lstrip("\n"), answer.lstrip("\n"), "stop")


def test_an_opening_tag_at_the_start_begins_a_thought() -> None:
    tokens = [(OPEN, b"<think>"), *text("\n", "Hm."), (CLOSE, b"</think>"), *text("\n\n", "5"), (END, b"")]
    assert run(tokens) == ("Hm.", "5", "stop")


def test_an_opening_tag_after_newlines_begins_a_thought() -> None:
    assert run([*text("\n", "\n"), (OPEN, b"<think>"), *text("Hm.")]) == ("Hm.", "", None)


def test_an_opening_tag_that_repeats_the_one_of_the_prompt_is_no_text() -> None:
    assert run([(OPEN, b"<think>"), *text("\nHm.")], phase="thinking") == ("Hm.", "", None)


def test_an_opening_tag_within_an_answer_is_text() -> None:
    assert run([*text("The tag "), (OPEN, b"<think>"), *text(" opens")]) == ("", "The tag <think> opens", None)


def test_an_opening_tag_after_a_thought_is_text() -> None:
    tokens = [*text("Hm."), (CLOSE, b"</think>"), (OPEN, b"<think>"), *text(" opens")]
    assert run(tokens, phase="thinking") == ("Hm.", "<think> opens", None)


def test_an_opening_tag_after_an_empty_thought_is_text() -> None:
    tokens = [(CLOSE, b"</think>"), (OPEN, b"<think>"), *text(" opens")]
    assert run(tokens, phase="thinking") == ("", "<think> opens", None)


def test_tags_are_text_for_a_model_that_has_none() -> None:
    assert run([*text("</think>", "a"), (OPEN, b"<think>")], rules(tags=False)) == ("", "</think>a<think>", None)


@pytest.mark.parametrize("newlines", [("\n\n",), ("\n", "\n"), ("\n\nThe", " answer")])
def test_newlines_that_follow_the_closing_tag_are_dropped(newlines: tuple[str, ...]) -> None:
    _, answer, _ = run([(CLOSE, b"</think>"), *text(*newlines, "x\n\ny")], phase="thinking")
    assert answer == "".join(newlines).lstrip("\n") + "x\n\ny"


def test_a_character_that_the_closing_tag_cuts_belongs_to_the_thought() -> None:
    tokens = [*text("a", b"\xe4\xba"), (CLOSE, b"</think>"), *text(b"\xba", "b")]
    assert run(tokens, phase="thinking") == ("a\ufffd", "\ufffdb", None)


def test_an_end_token_stops_shows_nothing_of_itself_and_is_counted() -> None:
    policies = rules()
    step = fold.advance(policies, state_after(text("a", "b", "c")), END, b"")
    assert isinstance(step.action, Stop)
    assert (step.events, step.action.reason, step.state.n_tokens) == ((), "stop", 4)


@pytest.mark.parametrize("stops", [(), ("ab",)])
def test_an_end_token_with_a_spelling_shows_nothing_of_it(stops: tuple[str, ...]) -> None:
    """A file may declare its end token as an ordinary one, which has text."""
    assert run([*text("x", "a"), (END, b"b</s>")], rules(*stops)) == ("", "xa", "stop")


def test_an_end_token_flushes_an_unfinished_character() -> None:
    assert run(ended([b"a\xe4"])) == ("", "a\ufffd", "stop")


def test_an_end_token_with_a_spelling_flushes_an_unfinished_character() -> None:
    assert run([*text(b"a\xe4"), (END, b"</s>")]) == ("", "a\ufffd", "stop")


def test_an_end_token_ends_a_thought_too() -> None:
    assert run(ended([b"Hm."]), phase="thinking") == ("Hm.", "", "stop")


def test_as_many_tokens_as_allowed_end_with_length() -> None:
    policies = rules(max_tokens=3)
    assert run(text("a", "b", "c", "d"), policies) == ("", "abc", "length")
    assert run(text("a", "b"), policies) == ("", "ab", None)


def test_the_last_token_allowed_flushes_an_unfinished_character() -> None:
    assert run(text("a", b"\xf0\x9f", b"\x98\x80"), rules(max_tokens=2)) == ("", "a\ufffd", "length")


def test_tags_count_as_tokens() -> None:
    assert run([(OPEN, b""), (CLOSE, b""), *text("a")], rules(max_tokens=2)) == ("", "", "length")


def test_an_end_token_counts_and_its_reason_comes_first() -> None:
    assert run(ended([b"a"]), rules(max_tokens=2)) == ("", "a", "stop")
    assert run(ended([b"a"]), rules(max_tokens=1)) == ("", "a", "length")


def test_a_reply_that_is_left_shows_its_unfinished_character_and_what_was_held() -> None:
    assert fold.close(State(phase="thinking", pending=b"\xe4\xba")) == (Thinking("\ufffd"),)
    assert fold.close(state_after(text("xS", b"T\xe4"), rules("STOP"))) == (Answer("ST\ufffd"),)
    assert fold.close(State()) == ()


# Stop texts. What ends first in the text ends the reply, as it would if every token were one character: so the place does
# not depend on the tokens. Of those that end together the longest is taken, that nothing of it is shown.

LETTERS = "ab\n人é"  # few, so that stop texts are met, overlap and repeat; one, two and three bytes long
NEAR = st.text(LETTERS, max_size=14)
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=4), min_size=1, max_size=3)


def before_stop(whole: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text that stands before the first stop text, and whether there is one."""
    shown = whole.lstrip("\n")
    found = [(shown.index(stop) + len(stop), shown.index(stop)) for stop in stops if stop in shown]
    return (shown[: min(found)[1]], True) if found else (shown, False)


def nested(stops: Sequence[str]) -> bool:
    """Whether a stop text has another one inside, and not at its beginning."""
    return any(a != b and a in b and not b.startswith(a) for a in stops for b in stops)


@examples(400)
@given(NEAR, STOPS, PLACES)
def test_a_stop_text_is_found_at_the_same_place_however_characters_are_put_together(
    whole: str, stops: list[str], places: list[int]
) -> None:
    """Two restrictions that the law below does without: no stop text inside another one, no character cut."""
    assume(not nested(stops))
    ends = [0, *sorted(place % (len(whole) + 1) for place in places), len(whole)]
    shown, found = before_stop(whole, stops)
    tokens = text(*(whole[a:b] for a, b in itertools.pairwise(ends)))
    assert run([*tokens, (END, b"")], rules(*stops)) == ("", shown, "stop")
    if found:
        assert run(tokens, rules(*stops)) == ("", shown, "stop")


@examples(400)
@given(NEAR, STOPS, PLACES)
@example("STOP人", ["STOP"], [5])
@example("xabc", ["abc", "b"], [])
def test_a_stop_text_is_found_at_the_same_place_wherever_the_bytes_are_cut(
    whole: str, stops: list[str], places: list[int]
) -> None:
    shown, found = before_stop(whole, stops)
    tokens = text(*cut(whole.encode(), places))
    assert run([*tokens, (END, b"")], rules(*stops)) == ("", shown, "stop")
    if found:
        assert run(tokens, rules(*stops)) == ("", shown, "stop")


def test_a_character_that_begins_after_a_stop_text_is_not_shown() -> None:
    assert run(text("a", b"STOP\xe4")) == ("", "aSTOP", None)
    assert run(text("a", b"STOP\xe4"), rules("STOP")) == ("", "a", "stop")


def test_of_stop_texts_in_each_other_the_one_that_ends_first_wins_in_one_token_as_in_several() -> None:
    assert run(text("x", "ab", "c"), rules("abc", "b")) == ("", "xa", "stop")
    assert run(text("xabc"), rules("abc", "b")) == ("", "xa", "stop")


@given(NEAR, STOPS)
def test_text_is_held_only_while_a_stop_text_may_have_begun(whole: str, stops: list[str]) -> None:
    """Whatever is shown late is the longest end that begins a stop text, and nothing when the reply cannot end there."""
    shown, found = before_stop(whole, stops)
    if found:
        whole = "\n" * (len(whole) - len(whole.lstrip("\n"))) + shown
    for n in range(len(whole) + 1):
        so_far = whole[:n].lstrip("\n")
        held = max(k for k in range(len(so_far) + 1) if k == 0 or any(s.startswith(so_far[-k:]) for s in stops))
        state = state_after(text(*whole[:n]), rules(*stops))
        assert state.held == so_far[len(so_far) - held :]


@pytest.mark.parametrize("stops", [("ab", "abc"), ("abc", "ab"), ("abc",), ("bc", "abc"), ("abc", "bc")])
@pytest.mark.parametrize("pieces", [("xabcy",), ("xa", "bcy"), ("x", "a", "b", "c", "y"), ("xab", "c", "y")])
def test_of_overlapping_stop_texts_the_first_one_wins_and_nothing_of_it_is_shown(
    stops: tuple[str, ...], pieces: tuple[str, ...]
) -> None:
    assert run(text(*pieces), rules(*stops)) == ("", "x", "stop")


def test_text_that_only_looked_like_a_stop_text_is_shown() -> None:
    policies = rules("STOP")
    assert run(text("S", "T", "O"), policies) == ("", "", None)
    assert run(text("S", "T", "O", "x"), policies) == ("", "STOx", None)
    assert run(text("ST", "ST", "ST", "OP"), policies) == ("", "STST", "stop")
    assert run(ended([b"S", b"TO"]), policies) == ("", "STO", "stop")
    assert run(text("S", "TO"), rules("STOP", max_tokens=2)) == ("", "STO", "length")


def test_a_stop_text_that_overlaps_with_itself_is_found_where_it_first_begins() -> None:
    assert run(text("xa", "a", "a", "b"), rules("aab")) == ("", "xa", "stop")


def test_a_stop_text_in_a_thought_is_text() -> None:
    tokens = [*text("a STOP", " b ST"), (CLOSE, b"</think>"), *text("OP c ", "STOP d")]
    assert run(tokens, rules("STOP"), phase="thinking") == ("a STOP b ST", "OP c ", "stop")


def test_a_thought_is_not_held_back_for_a_stop_text() -> None:
    assert run(text("ST"), rules("STOP"), phase="thinking") == ("ST", "", None)


# Of a model that marks no thought, thought and answer are one text, and a stop text counts in all of it.


def undivided(tokens: Iterable[Token], *stops: str) -> tuple[str, str, FinishReason | None]:
    """What was shown as thought and as answer, and the finish."""
    pieces: dict[int, bytes] = {}
    policies = arrange([Headings(), Stops(frozenset({END}), stops, undivided=True)])
    track = ReplyBuilder(policies, Begin("thinking", undivided=True), pieces.__getitem__, untokenized)
    shown, finish = {Thinking: "", Answer: ""}, None
    for i, (token, piece) in enumerate(tokens):
        pieces[FIRST_FREE + i if token == TEXT else token] = piece
        events, action = track.take(FIRST_FREE + i if token == TEXT else token)
        for event in events:
            assert isinstance(event, Thinking | Answer)
            shown[type(event)] += event.text
        if isinstance(action, Stop):
            finish = action.reason
            break
    assert "".join(track.texts("length")) == (shown[Thinking] + shown[Answer]).rstrip()
    return shown[Thinking], shown[Answer], finish


@pytest.mark.parametrize("pieces", [("a STOP b",), ("a ", "ST", "OP", " b"), ("a S", "TOP b"), tuple("a STOP b")])
def test_a_stop_text_ends_a_text_without_tags_wherever_it_stands(pieces: tuple[str, ...]) -> None:
    assert undivided(text(*pieces), "STOP") == ("a ", "", "stop")


@pytest.mark.parametrize("cut_at", range(40))
def test_a_stop_text_after_the_heading_of_a_text_without_tags_ends_it_too(cut_at: int) -> None:
    whole = "Hm.\n\n**Final Answer**\n\n5\n\nUser: and 6?"
    shown = undivided(text(whole[:cut_at], whole[cut_at:]), "\n\nUser:")
    assert shown == ("Hm.\n\n", "**Final Answer**\n\n5", "stop")


@pytest.mark.parametrize("cut_at", range(24))
@pytest.mark.parametrize("before", ["", "\n\n", "m.\n\n"])
@pytest.mark.parametrize("after", ["", "\n"])
def test_a_stop_text_with_a_heading_is_not_shown(before: str, after: str, cut_at: int) -> None:
    whole, stop = "Hm.\n\n**Final Answer**\n5", f"{before}**Final Answer**{after}"
    assert undivided(text(whole[:cut_at], whole[cut_at:]), stop) == (whole.partition(stop)[0], "", "stop")


@examples(400)
@given(NEAR, STOPS, PLACES)
def test_a_text_without_tags_ends_at_the_same_place_wherever_the_bytes_are_cut(
    whole: str, stops: list[str], places: list[int]
) -> None:
    shown, found = before_stop(whole, stops)
    assert undivided(ended(cut(whole.encode(), places)), *stops) == (shown, "", "stop")
    if found:
        assert undivided(text(*cut(whole.encode(), places)), *stops) == (shown, "", "stop")


@given(PLACES)
def test_newlines_that_lead_an_answer_match_no_stop_text(places: list[int]) -> None:
    pieces = cut(b"\n\n\nHello\n\nthere", places)
    tokens = [*text("Hm."), (CLOSE, b"</think>"), *text(*pieces)]
    assert run(tokens, rules("\n\n"), phase="thinking") == ("Hm.", "Hello", "stop")


def test_an_answer_may_begin_with_its_stop_text() -> None:
    assert run(text("\n", "ST", "OP"), rules("STOP")) == ("", "", "stop")


def test_a_stop_text_that_completes_with_the_last_token_allowed_is_the_reason() -> None:
    assert run(text("a", "STOP"), rules("STOP", max_tokens=2)) == ("", "a", "stop")


@pytest.mark.parametrize(
    ("before", "after"), [(("ST",), ("OPxyz",)), (("ab",), ("\n\nSTO", "xyz")), (("ab",), ("\n\n\nxyz",))]
)
def test_a_closing_tag_in_an_answer_does_not_make_the_text_depend_on_the_tokens(
    before: tuple[str, ...], after: tuple[str, ...]
) -> None:
    def ways(pieces: Iterable[str]) -> Shown:
        return run([*text(*before), (CLOSE, b"</think>"), *text(*pieces)], rules("STOP", "\n\n"))

    assert ways(after) == ways("".join(after))
    assert ways(after) == ("", "".join(before) + "".join(after).lstrip("\n"), None)


PARTS = st.lists(st.one_of(st.sampled_from([OPEN, CLOSE]), st.text("aST\n人", max_size=6)), max_size=6)


@given(PARTS, PLACES, st.sampled_from(["thinking", "answer"]))
def test_with_tags_in_it_a_reply_does_not_depend_on_where_its_text_is_cut(
    parts: list[int | str], places: list[int], phase: Phase
) -> None:
    """Stop texts are left out: see above for what a second closing tag does to them."""

    def tokens(pieces_of: Sequence[int]) -> list[Token]:
        found: list[Token] = []
        for part in parts:
            found += [(part, b"<tag>")] if isinstance(part, int) else text(*cut(part.encode(), pieces_of))
        return [*found, (END, b"")]

    assert run(tokens(places), phase=phase) == run(tokens([]), phase=phase)


# An answer that begins anew: a second closing tag. What it held so far stays shown and stops counting.


def parted(*answers: str) -> list[Token]:
    """Answers with a closing tag between each two."""
    tokens = text(answers[0])
    for answer in answers[1:]:
        tokens += [(CLOSE, b"</think>"), *text(answer)]
    return tokens


def test_a_second_closing_tag_lets_the_answer_begin_anew_and_says_what_no_longer_counts() -> None:
    thought: list[Token] = [*text("Hm."), (CLOSE, b"</think>")]
    track, events, _ = play([*thought, *parted("So 4", "\n\n5\n"), (END, b"")], phase="thinking")
    assert events == [Thinking("Hm."), Answer("So 4"), restarted(4), Answer("5\n")]
    assert track.texts("stop") == ("Hm.", "5")


@pytest.mark.parametrize("blank", ["", "\n\n", " \n "])
def test_an_answer_after_which_nothing_but_space_comes_counts_all_the_same(blank: str) -> None:
    track, events, _ = play([*parted("4", blank), (END, b"")])
    assert events[:2] == [Answer("4"), restarted(1)]
    assert track.texts("stop") == ("", "4")


def test_an_answer_of_which_nothing_was_shown_begins_anew_without_a_word() -> None:
    tokens: list[Token] = [(CLOSE, b"</think>"), *text("\n"), (CLOSE, b"</think>"), (CLOSE, b"</think>"), *text("5")]
    track, events, _ = play(tokens, phase="thinking")
    assert events == [Answer("5")]
    assert track.texts("stop") == ("", "5")


def test_text_that_the_closing_tag_lets_go_no_longer_counts_either() -> None:
    """It was held for a stop text, or for the rest of its last character."""
    _, events, _ = play([*text("aS", "T"), (CLOSE, b"</think>"), *text("OP")], rules("STOP"))
    assert events == [Answer("a"), Answer("ST"), restarted(3), Answer("OP")]
    _, events, _ = play([*text(b"a\xe4"), (CLOSE, b"</think>"), *text("b")])
    assert events == [Answer("a"), Answer("\ufffd"), restarted(2), Answer("b")]


def test_a_thought_that_ends_begins_no_answer_anew() -> None:
    _, events, _ = play([(OPEN, b"<think>"), *parted("Hm.", "5")])
    assert events == [Thinking("Hm."), Answer("5")]


@given(st.lists(NEAR, min_size=1, max_size=5), PLACES)
def test_of_answers_that_closing_tags_part_the_last_one_with_text_counts(answers: list[str], places: list[int]) -> None:
    tokens: list[Token] = []
    for i, answer in enumerate(answers):
        tokens += [(CLOSE, b"</think>")] if i else []
        tokens += text(*cut(answer.encode(), places))
    track, events, _ = play([*tokens, (END, b"")])
    shown = [answer.lstrip("\n") for answer in answers]
    assert "".join(event.text for event in events if isinstance(event, Answer)) == "".join(shown)
    assert [event for event in events if isinstance(event, Notice)] == [restarted(len(a)) for a in shown[:-1] if a]
    assert track.texts("stop") == ("", next((a.rstrip() for a in reversed(shown) if a.strip()), ""))
