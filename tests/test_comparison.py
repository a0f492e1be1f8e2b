"""Intervals, pairs won, and who carries a mean."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fl_helpers.comparison import (
    holds,
    judge,
    paired_interval,
    share_interval,
    tuned_rates,
    without_each,
)


def test_the_interval_is_the_one_of_the_t_test():
    values = [1.0, 2.0, 4.0, 5.0]
    found = paired_interval(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found.mean == 3.0  # 12 / 4
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert (found.wins, found.n) == (4, 4)


def test_it_says_so_in_one_line():
    # mean 0.5, standard deviation 0.7071, error 0.5, t(1) = 12.706: half 6.353
    assert str(paired_interval([0.0, 1.0])) == "+0.5 ± 6.4 (1 of 2)"


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30))
def test_more_confidence_never_narrows_it(values):
    narrow, wide = (paired_interval(values, confidence=c) for c in (0.8, 0.99))
    assert wide.low <= narrow.low <= narrow.mean <= narrow.high <= wide.high


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("nan")], [[1.0, 2.0]]])
def test_too_little_is_refused(values):
    with pytest.raises(ValueError, match="two or more finite"):
        paired_interval(values)


def test_225_images_at_83_percent_are_known_to_five_points():
    low, high = share_interval(187, 225)  # .831; normal approximation: +- .049
    assert (high - low) / 2 == pytest.approx(0.049, abs=0.001)
    assert low < 187 / 225 < high


def test_a_share_of_none_or_all_has_an_interval_too():
    assert share_interval(0, 10)[0] == 0 and share_interval(10, 10)[1] == 1
    with pytest.raises(ValueError, match="0 <= hits"):
        share_interval(11, 10)


def test_one_silo_can_carry_a_mean():
    """Without C nothing is left of a mean gain of 2.5 points."""
    gains = {"A": [0.1, -0.1, 0.0], "B": [-0.1, 0.1, 0.0], "C": [7.4, 7.5, 7.6]}
    alone = without_each(gains)
    assert alone["C"].mean == pytest.approx(0) and alone["A"].mean > 3.6
    assert paired_interval(np.mean([*gains.values()], axis=0)).low > 2
    assert not holds(gains)


def test_a_gain_of_everybody_holds():
    assert holds({"A": [1.0, 1.1, 0.9], "B": [2.0, 2.1, 1.9], "C": [3.0, 3.1, 3.0]})


def test_leaving_the_only_silo_out_is_refused():
    with pytest.raises(ValueError, match="leaves nobody"):
        without_each({"A": [1.0, 2.0]})


def write_scores(folder, *rows):
    path = folder / "tuning.csv"
    header = "dataset,seed,lr,approach,balanced_accuracy"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_the_rate_is_good_together_with_the_next_larger_one(tmp_path):
    path = write_scores(
        tmp_path,
        # means .6, .8, .9, .1: the pairs .7, .85, .5, so the second rate
        *("x,1,0.01,local,0.5", "x,2,0.01,local,0.7"),
        *("x,1,0.04,local,0.9", "x,1,0.02,local,0.8", "x,1,0.08,local,0.1"),
        # the pairs .5 and .75
        *("x,1,0.01,federated,0.3", "x,1,0.02,federated,0.7"),
        "x,1,0.04,federated,0.8",
        "other,1,0.01,local,1.0",
    )
    assert tuned_rates(path, "x") == {"local": 0.02, "federated": 0.02}


def test_a_set_without_rates_is_refused_with_those_that_have_them(tmp_path):
    path = write_scores(tmp_path, "a,1,0.1,local,0.5", "b,1,0.1,local,0.5")
    with pytest.raises(ValueError, match=r"'bloodmnist', only for a, b; .*tuning"):
        tuned_rates(path, "bloodmnist")


def test_judged_in_both_directions():
    steady = {"A": [1.0, 1.1, 0.9], "B": [2.0, 2.1, 1.9], "C": [3.0, 3.1, 3.0]}
    carried = {"A": [0.1, -0.1, 0.0], "B": [-0.1, 0.1, 0.0], "C": [7.4, 7.5, 7.6]}
    for sign in (1, -1):  # a loss is judged as its gain is
        turned = {k: [sign * v for v in values] for k, values in steady.items()}
        found, clear = judge(turned)
        assert found.mean == pytest.approx(sign * 18.1 / 9) and clear
        assert not judge({k: [sign * v for v in x] for k, x in carried.items()})[1]
