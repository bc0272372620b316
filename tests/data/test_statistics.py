"""Distributions: round bins that hold every value."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.data.statistics import Bin, describe


def test_bins_are_round_and_complete():
    spread = describe(np.array([3, 7, 7, 12, 58]), max_bins=6)
    assert spread.bins == (
        Bin(0, 9, 3),
        Bin(10, 19, 1),
        Bin(20, 29, 0),
        Bin(30, 39, 0),
        Bin(40, 49, 0),
        Bin(50, 59, 1),
    )
    assert (spread.minimum, spread.median, spread.maximum, spread.percentile_95) == (3, 7, 58, 58)
    assert spread.mean == pytest.approx(17.4)


@given(st.lists(st.integers(0, 100_000), min_size=1, max_size=50), st.integers(1, 12))
def test_every_value_is_in_one_bin(values, max_bins):
    spread = describe(np.array(values), max_bins=max_bins)
    assert len(spread.bins) <= max_bins
    for b in spread.bins:
        assert b.count == sum(b.low <= value <= b.high for value in values)
    assert sum(b.count for b in spread.bins) == len(values)
