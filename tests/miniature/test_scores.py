"""Means, their intervals and tables of them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miniature.scores import estimate, pooled, table


@pytest.mark.parametrize(("hits", "count"), [(1, 2), (3, 10), (450, 500), (2090, 2100)])
def test_shares_have_wilsons_interval(hits: int, count: int) -> None:
    """Its ends are the shares from which the one that was seen is 1.96 of their standard deviations away."""
    one = estimate([1.0] * hits + [0.0] * (count - hits))
    assert (one.mean, one.count) == (hits / count, count)
    for end in (one.low, one.high):
        assert abs(one.mean - end) / math.sqrt(end * (1 - end) / count) == pytest.approx(1.959964)
    assert one.low < one.mean < one.high


def test_nothing_and_everything_have_an_interval_too() -> None:
    none, every = estimate([0.0] * 10), estimate([1.0] * 10)
    assert (none.low, every.high) == (0, 1)
    assert none.high == pytest.approx(1.959964**2 / (10 + 1.959964**2))
    assert every.low == pytest.approx(1 - none.high)


def test_other_means_have_the_normal_interval() -> None:
    one = estimate([0.2, 0.4, 0.9])
    error = np.std([0.2, 0.4, 0.9], ddof=1) / math.sqrt(3)
    assert one.mean == pytest.approx(0.5)
    assert one.low == pytest.approx(0.5 - 1.959964 * error)
    assert one.high == pytest.approx(0.5 + 1.959964 * error)
    assert estimate([0.3]).low == estimate([0.3]).high == 0.3


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=200))
def test_a_share_lies_in_its_interval_and_that_in_0_to_1(values: list[float]) -> None:
    one = estimate(values)
    assert 0 <= one.low <= one.mean <= one.high <= 1
    assert one.low < one.high


def test_a_right_interval_holds_the_truth_95_times_of_100() -> None:
    draws = np.random.default_rng(0)
    inside = [
        one.low <= 0.9 <= one.high
        for one in (estimate((draws.random(700) < 0.9).astype(float).tolist()) for _ in range(1000))
    ]
    assert 0.93 < np.mean(inside) < 0.97


def test_sets_are_pooled_and_written_as_a_table() -> None:
    sets = [
        {"A": {"object first": [1.0, 1.0]}, "B + A": {"object first": [1.0, 0.0], "sharpness": [0.5]}},
        {"A": {"object first": [1.0, 0.0]}, "B + A": {"object first": [0.0, 0.0], "sharpness": [0.7]}},
    ]
    together = pooled(sets)
    assert together["A"]["object first"] == [1.0, 1.0, 1.0, 0.0]
    assert sets[0]["A"]["object first"] == [1.0, 1.0]
    assert table(together).splitlines() == [
        "| score | A | B + A |",
        "|---|---:|---:|",
        "| object first | 75.0 % (30.1 to 95.4) | 25.0 % (4.6 to 69.9) |",
        "| sharpness |  | 60.0 % (40.4 to 79.6) |",
    ]
