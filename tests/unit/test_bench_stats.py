"""The comparison's arithmetic: ratios within a round, medians and ranges over the rounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.stats import Spread, percentile, ratios, rotated, spread


def test_spread_is_the_median_and_the_range() -> None:
    assert spread([3.0, 1.0, 10.0]) == Spread(3.0, 1.0, 10.0, 3)
    assert spread([1.0, 2.0]) == Spread(1.5, 1.0, 2.0, 2)
    assert spread([]) is None


def test_ratios_are_built_within_a_round() -> None:
    """A slow round slows both: neither ratio moves, where dividing the medians would give something else."""
    assert ratios({0: 200.0, 1: 20.0}, {0: 100.0, 1: 10.0}) == [2.0, 2.0]


def test_ratios_leave_out_rounds_that_one_of_them_did_not_finish() -> None:
    assert ratios({0: 4.0, 1: 6.0, 3: 9.0}, {0: 2.0, 2: 1.0, 3: 3.0}) == [2.0, 3.0]
    assert ratios({0: 4.0}, {0: 0.0}) == []


def test_percentile_is_the_nearest_rank() -> None:
    values = [float(value) for value in range(1, 101)]
    assert percentile(values, 50) == 50.0
    assert percentile(values, 99) == 99.0
    assert percentile([7.0], 99) == 7.0
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


@given(st.integers(1, 12), st.integers(0, 40))
def test_every_round_has_every_contender_once_and_starts_with_the_next(count: int, number: int) -> None:
    order = rotated(count, number)
    assert sorted(order) == list(range(count))
    assert order[0] == number % count
