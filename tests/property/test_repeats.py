"""The labeller of exact loops says what its definition says, read off token by token."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bench.measure.repeats import EIGHT, LEAST, THREE, Repeat, loops, stretches

FEW = st.lists(st.integers(0, 2), max_size=40)


def holds(tokens: list[int], repeat: Repeat) -> bool:
    """Whether the stretch has the period, and neither end can be moved out."""
    start, end, period = repeat
    inside = all(tokens[i] == tokens[i - period] for i in range(start + period, end))
    before = start == 0 or tokens[start - 1] != tokens[start - 1 + period]
    after = end == len(tokens) or tokens[end] != tokens[end - period]
    return inside and before and after


@given(FEW, st.integers(2, 4))
def test_each_stretch_has_its_period_and_none_is_left_out(tokens: list[int], least: int) -> None:
    found = stretches(tokens, least)
    for repeat in found:
        assert holds(tokens, repeat)
        assert repeat.n_copies >= least
    for start in range(len(tokens)):
        for period in range(1, len(tokens) // least + 1):
            end = start + period
            while end < len(tokens) and tokens[end] == tokens[end - period]:
                end += 1
            if end - start >= least * period:
                assert any(r.start <= start and end <= r.end and period % r.period == 0 for r in found)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=90), st.integers(1, 12), st.booleans())
def test_a_loop_has_sixty_four_tokens_and_eight_copies_or_three_that_reach_the_end(
    period: list[int], n_copies: int, ends: bool
) -> None:
    tokens = [-1, *period * n_copies] + [] * ends + [-2] * (not ends)
    whole = [repeat for repeat in stretches(period * 2) if repeat.end - repeat.start == 2 * len(period)]
    shortest = whole[0].period  # a period may be made of shorter ones
    n = len(period) * n_copies
    expected = n >= LEAST and n >= shortest * (THREE if ends else EIGHT)
    found = [repeat for repeat in loops(tokens) if repeat.end - repeat.start == n]
    assert found == ([Repeat(1, 1 + n, shortest)] if expected else [])


def test_periods_beyond_the_longest_are_not_labelled() -> None:
    assert [repeat.period for repeat in loops([*range(1024)] * 3)] == [1024]
    assert not loops([*range(1025)] * 3)
