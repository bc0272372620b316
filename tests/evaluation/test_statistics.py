"""Intervals and tests against values that were published or computed by hand."""

import pytest

from lorasmith.evaluation.statistics import Comparison, Count


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval(k, n, low, high):
    assert Count(k, n).interval() == pytest.approx((low, high), abs=5e-5)
    # The same interval seen from the other side.
    assert Count(n - k, n).interval() == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_nothing_counted_says_nothing():
    assert Count(0, 0).interval() == (0, 1)
    assert Count(0, 0).share == 0


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (Count(2, 3), "2 of 3 (67%)"),
        (Count(199, 200), "199 of 200 (99%)"),
        (Count(1, 300), "1 of 300 (1%)"),
        (Count(200, 200), "200 of 200 (100%)"),
    ],
)
def test_a_share_is_all_or_nothing_only_when_it_is(count, text):
    assert str(count) == text


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        (9, 1, 22 / 1024),  # 2 * (1 + 10) / 2^10
        (1, 9, 22 / 1024),
        (5, 0, 2 / 32),
        (6, 0, 2 / 64),
        (4, 4, 1.0),
        (0, 0, 1.0),
        (121, 59, 4.434e-06),  # scipy.stats.binomtest(59, 180)
    ],
)
def test_mcnemars_exact_test(gained, lost, p):
    assert Comparison(both=7, gained=gained, lost=lost, neither=3).p_value == pytest.approx(p, rel=1e-3)


@pytest.mark.parametrize(
    ("gained", "lost", "outcome"),
    [
        (6, 0, "better"),
        (0, 6, "worse"),
        (5, 0, "too few to tell"),
        (3, 3, "no difference"),
        (0, 0, "no difference"),
    ],
)
def test_what_can_be_said_of_two_models(gained, lost, outcome):
    assert Comparison(both=50, gained=gained, lost=lost, neither=0).outcome(0.05) == outcome


def test_pairs_are_counted_by_who_was_right():
    first, second = [True, True, False, False, False], [True, False, True, True, False]
    assert Comparison.of(first, second) == Comparison(both=1, gained=2, lost=1, neither=1)
