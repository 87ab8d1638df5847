"""sampling: whose word counts, what is out of range, and the seed of a draw."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwq_lite.errors import UsageError
from qwq_lite.formats.gguf_header import Value
from qwq_lite.sampling import Sampling, draw_seed, resolve

CATALOGUE = Sampling(0.5, 50, 0.5, 0.05)
FILE: dict[str, Value] = {
    "general.sampling.temp": 0.25,
    "general.sampling.top_k": 25,
    "general.sampling.top_p": 0.75,
    "general.sampling.min_p": 0.25,
}
PINNED = [34409317, 3272260992, 3966632782]
USER = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def test_the_catalogue_counts_where_nobody_says_anything() -> None:
    assert resolve(dict.fromkeys(USER), {}, CATALOGUE) == CATALOGUE


def test_the_file_counts_before_the_catalogue() -> None:
    assert resolve({}, FILE, CATALOGUE) == Sampling(0.25, 25, 0.75, 0.25)


def test_the_user_counts_before_the_file_even_with_zero() -> None:
    assert resolve(USER, FILE, CATALOGUE) == Sampling(0.0, 0, 1.0, 0.0)


def test_each_setting_has_its_own_source() -> None:
    settings = resolve({"top_p": 0.9, "min_p": None}, {"general.sampling.top_k": 7}, CATALOGUE)
    assert settings == Sampling(0.5, 7, 0.9, 0.05)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 101),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_k", 1 << 21),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
    ],
)
def test_a_value_of_the_users_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} is .* allowed"):
        resolve({name: value}, FILE, CATALOGUE)


@pytest.mark.parametrize("value", [-1, 1e9, math.nan, math.inf, "hot", True, [0.5]], ids=repr)
@pytest.mark.parametrize("key", list(FILE))
def test_an_absurd_value_of_the_files_is_passed_over(key: str, value: Value) -> None:
    assert resolve({}, {key: value}, CATALOGUE) == CATALOGUE


def test_an_absurd_value_leaves_the_files_other_settings_alone() -> None:
    assert resolve({}, FILE | {"general.sampling.temp": -1.0}, CATALOGUE) == Sampling(0.5, 25, 0.75, 0.25)


@given(st.integers(0, 1 << 64), st.integers(0, 100), st.integers(0, 1 << 20))
def test_the_seed_of_a_draw_is_a_32_bit_function_of_its_place(seed: int, attempt: int, position: int) -> None:
    drawn = draw_seed(seed, attempt, position)
    assert drawn == draw_seed(seed, attempt, position)
    assert 0 <= drawn < 1 << 32


def test_draws_at_other_places_have_other_seeds() -> None:
    places = [(seed, attempt, position) for seed in range(4) for attempt in range(4) for position in range(100)]
    assert len({draw_seed(*place) for place in places}) == len(places)


def test_the_seed_of_a_draw_is_the_same_on_every_machine() -> None:
    assert [draw_seed(1, 0, position) for position in range(3)] == PINNED
