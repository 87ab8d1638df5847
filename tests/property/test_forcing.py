"""track: what a rewind forces comes next, and what a reader asks for outlives rewinds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwq_lite.events import Answer, Notice, Thinking, ThoughtEnd
from qwq_lite.reply.commands import Steer
from qwq_lite.reply.policies.phases import Phases
from qwq_lite.reply.policy import Draw, Rewind
from tests.tracks import (
    CLOSE,
    NEWLINE,
    OPEN,
    REST,
    SAMPLING,
    WHOLE,
    A,
    B,
    Sees,
    everything,
    seen,
    take,
    texts,
    track_of,
)


def test_what_a_rewind_forces_comes_next_and_is_counted() -> None:
    track = track_of(Sees())
    take(track, A, B, A)
    track.rewind(Rewind(1, frozenset({B}), forced=(WHOLE, REST)))
    drawn = []
    while (token := track.constrain(SAMPLING).forced) is not None:
        assert track.constrain(SAMPLING) == Draw(SAMPLING, forced=token)
        drawn.append(token)
        take(track, token)
    assert drawn == [WHOLE, REST]
    take(track, B)
    assert [taken.forced for taken in seen(track)] == [False, True, True, False]
    assert (track.tokens, track.n_forced, track.n_taken) == ([A, WHOLE, REST, B], 2, 6)


def test_what_a_rewind_forced_is_replayed_by_a_later_one_behind_it() -> None:
    track = track_of(Sees())
    take(track, A, B)
    track.rewind(Rewind(1, forced=(WHOLE, NEWLINE)))
    take(track, WHOLE, NEWLINE, B, A)
    before = seen(track)[:4]
    track.rewind(Rewind(4, forced=(B,)))
    assert (seen(track), track.tokens) == (before, [A, WHOLE, NEWLINE, B])
    assert [taken.forced for taken in before] == [False, True, True, False]
    assert track.state.forced == (B,)
    take(track, B)
    assert track.n_forced == 3


def test_a_later_rewind_amid_what_was_forced_leaves_the_rest_to_be_drawn() -> None:
    track = track_of(Sees())
    take(track, A, B)
    track.rewind(Rewind(1, forced=(WHOLE, NEWLINE, A)))
    take(track, WHOLE, NEWLINE, A, B)
    track.rewind(Rewind(2))
    assert not track.state.forced
    take(track, B)
    assert (track.tokens, track.n_forced) == ([A, WHOLE, B], 3)
    assert [taken.forced for taken in seen(track)] == [False, True, False]


def test_a_later_rewind_amid_what_was_forced_may_force_something_else() -> None:
    track = track_of()
    take(track, A, B)
    track.rewind(Rewind(1, forced=(WHOLE, NEWLINE, A)))
    take(track, WHOLE, NEWLINE)
    track.rewind(Rewind(2, forced=(B,)))
    assert track.state.forced == (B,)
    take(track, B)
    assert not track.state.forced
    assert track.tokens == [A, WHOLE, B]


@pytest.mark.parametrize("place", [0, 1])
def test_what_was_forced_vanishes_with_a_later_rewind_to_its_place_or_before_it(place: int) -> None:
    track = track_of()
    take(track, A, B)
    track.rewind(Rewind(1, forced=(WHOLE, NEWLINE)))
    take(track, WHOLE)
    track.rewind(Rewind(place))
    for _ in range(4):
        assert track.constrain(SAMPLING).forced is None
        take(track, A)
    assert track.n_forced == 1


ORDINARY = st.sampled_from([A, WHOLE, B])


@given(
    st.lists(
        st.one_of(
            ORDINARY,
            ORDINARY,
            st.builds(
                lambda n, forced: Rewind(n, forced=forced), st.integers(0, 8), st.lists(ORDINARY, max_size=4).map(tuple)
            ),
        ),
        max_size=25,
    )
)
def test_what_comes_next_is_what_the_last_rewind_that_still_holds_forces_there(steps: list[int | Rewind]) -> None:
    track = track_of(Sees())
    holding: list[Rewind] = []
    forced_at: list[bool] = []
    n_forced = 0
    for step in steps:
        if isinstance(step, Rewind):
            if step.n_tokens > len(track.tokens):
                continue
            track.rewind(step)
            n = step.n_tokens
            holding = [replace(rw, forced=rw.forced[: n - rw.n_tokens]) for rw in holding if rw.n_tokens < n]
            holding += [step] if step.forced else []
            del forced_at[step.n_tokens :]
        else:
            forced = track.constrain(SAMPLING).forced
            n_forced += forced is not None
            forced_at.append(forced is not None)
            take(track, step if forced is None else forced)
        n = len(track.tokens)
        last = next((rewind for rewind in reversed(holding) if rewind.n_tokens <= n), Rewind(0))
        assert track.state.forced == last.forced[n - last.n_tokens :]
        assert (track.n_forced, [taken.forced for taken in seen(track)]) == (n_forced, forced_at)


@pytest.mark.parametrize("ends", [None, "budget", "asked"])
def test_what_ended_the_thought_is_the_rewind_that_says_so_or_the_model_itself(ends: ThoughtEnd | None) -> None:
    track = track_of(Phases(OPEN, CLOSE))
    take(track, A, B)
    track.rewind(Rewind(1, forced=(NEWLINE, CLOSE, NEWLINE), ends=ends))
    assert (track.thought_end, track.n_thinking) == (None, 1)
    take(track, NEWLINE, CLOSE, NEWLINE, A)
    assert (track.thought_end, track.n_thinking) == (ends or "itself", 4 if ends else 3)


def test_a_thought_that_was_ended_is_over_after_the_forced_tokens_whatever_they_say() -> None:
    track = track_of(Phases(OPEN, CLOSE))
    take(track, A, B)
    track.rewind(Rewind(2, forced=(NEWLINE, WHOLE), ends="budget"))
    take(track, NEWLINE, WHOLE)
    assert track.state.phase == "answer"
    take(track, B)
    assert (texts(track), track.thought_end, track.n_thinking) == (("a b\n人", " b"), "budget", 4)


def test_a_rewind_behind_the_place_where_the_thought_was_ended_ends_it_again_and_one_before_it_does_not() -> None:
    for place, phase in ((3, "answer"), (2, "thinking")):
        track = track_of()
        take(track, A, B)
        track.rewind(Rewind(1, forced=(WHOLE, NEWLINE), ends="budget"))
        take(track, WHOLE, NEWLINE)
        track.rewind(Rewind(place))
        take(track, B)
        assert track.state.phase == phase


def test_what_was_shown_and_is_forced_again_is_not_shown_twice_and_not_called_lost() -> None:
    track = track_of(Phases(OPEN, CLOSE))
    take(track, A, A, B, A)
    events = track.rewind(Rewind(1, forced=(A, NEWLINE, CLOSE), why="it was time", ends="budget"))
    assert events == (Notice("it was time; the last 3 characters of the thought no longer count", "closed", 3),)
    assert take(track, A) == []
    assert take(track, NEWLINE, CLOSE, B) == [Thinking("\n"), Answer(" b")]
    assert texts(track) == ("aa", " b")


def test_the_word_on_a_thought_of_which_nothing_is_lost_stands_before_the_answer() -> None:
    track = track_of(Phases(OPEN, CLOSE))
    take(track, A)
    assert track.rewind(Rewind(1, forced=(NEWLINE, CLOSE, B), why="it was time", ends="budget")) == ()
    shown = take(track, NEWLINE, CLOSE, B)
    assert shown == [Thinking("\n"), Notice("it was time", "closed"), Answer(" b")]


# What the reader asks for.

ASKED = ("asked", 96)


def test_a_reader_that_waits_is_told_to_the_policies_from_the_next_token_on() -> None:
    track = track_of(Sees())
    take(track, A, B)
    assert track.conclude()
    assert (track.state.given.asked_at, track.tokens) == (2, [A, B])
    take(track, A, B)
    assert [taken.end for taken in seen(track)] == [None, None, ASKED, ASKED]


def test_a_reader_may_wait_from_the_first_token_on() -> None:
    track = track_of(Sees())
    assert track.conclude()
    take(track, A)
    assert [taken.end for taken in seen(track)] == [ASKED]


@pytest.mark.parametrize("place", [0, 1, 2, 3, 4])
def test_that_the_reader_waits_outlives_a_rewind(place: int) -> None:
    track = track_of(Sees())
    take(track, A, B)
    track.conclude()
    take(track, A, B)
    before = seen(track)[:place]
    track.rewind(Rewind(place))
    assert (seen(track), track.state.given.asked_at) == (before, min(2, place))
    take(track, WHOLE)
    assert [taken.end for taken in seen(track)] == [None] * min(2, place) + [ASKED] * (place + 1 - min(2, place))


def test_there_is_no_thought_to_end_or_to_steer_in_an_answer() -> None:
    track = track_of(Phases(OPEN, CLOSE))
    take(track, A, CLOSE)
    before = everything(track)
    assert not track.conclude()
    assert track.steer(Steer("Wait.")) is None
    assert everything(track) == before
