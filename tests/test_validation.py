"""Validation from counts, against scikit-learn on the pooled patients and by hand."""

from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from sklearn import metrics
from sklearn.calibration import calibration_curve as sklearn_curve

from fl_helpers.analysis import ask_silos
from fl_helpers.regression import Table, fit_logistic
from fl_helpers.validation import (
    Paired,
    Scored,
    TooFew,
    auroc,
    auroc_bounds,
    auroc_difference,
    auroc_of,
    average_precision,
    average_precision_bounds,
    brier_score,
    calibration_curve,
    finest_counts,
    logit,
    net_benefit,
    recalibrate,
    sensitivity,
    silo_auroc_difference,
    silo_confusion,
    silo_ranking,
    silo_score_counts,
    specificity,
)

SIZES = {"A": 400, "B": 250, "C": 150}


@pytest.fixture(scope="module")
def silos():
    rng = np.random.default_rng(0)
    made = {}
    for shift, (name, n) in enumerate(SIZES.items()):
        y = rng.random(n) < 0.4
        score = 1 / (1 + np.exp(-(rng.normal(size=n) + 1.5 * y - 0.7 + 0.2 * shift)))
        made[name] = Scored(score.round(3), y, rng.integers(0, 3, n))
    return made


@pytest.fixture(scope="module")
def pooled(silos):
    return Scored(
        *(np.concatenate(parts) for parts in zip(*silos.values(), strict=True))
    )


def test_ranking_is_the_auroc_of_scikit_learn_with_ties(silos):
    for data in silos.values():
        expected = metrics.roc_auc_score(data.y, data.score)
        assert auroc_of(silo_ranking(data)) == pytest.approx(expected)
        assert auroc(data.score, data.y).value == pytest.approx(expected)


def test_the_ranking_of_all_is_weighted_by_pairs(silos):
    whole = ask_silos(silos)(silo_ranking)
    parts = [silo_ranking(data) for data in silos.values()]
    pairs = [part["pairs"] for part in parts]
    mean = np.average([auroc_of(part) for part in parts], weights=pairs)
    assert auroc_of(whole) == pytest.approx(mean)


def test_four_patients_by_hand():
    # Ill .9 and .4, healthy .5 and .1: three of four pairs are right.
    y = np.array([True, True, False, False])
    score = np.array([0.9, 0.4, 0.5, 0.1])
    found = auroc(score, y)
    # Placements: ill 1 and 1/2, healthy 1/2 and 1: variance (1/8) / 2 for each.
    assert found.value == 0.75 and found.error == pytest.approx(np.sqrt(1 / 8))
    assert silo_ranking(Scored(score, y, y * 1), min_count=0)["concordant"] == 3


def test_delongs_error_is_that_of_many_samples():
    rng = np.random.default_rng(1)

    def sample():
        y = np.arange(300) < 120
        first = rng.normal(size=300) + y
        return y, first, first + rng.normal(size=300)

    found, errors, differences, their = [], [], [], []
    for _ in range(400):
        y, a, b = sample()
        one, both = auroc(a, y), auroc_difference(a, b, y)
        found.append(one.value), errors.append(one.error)
        differences.append(both.value), their.append(both.error)
    # The spread of 400 values is known to 1 / sqrt(800) = 3.5 %.
    assert np.std(found) == pytest.approx(np.mean(errors), rel=0.12)
    assert np.std(differences) == pytest.approx(np.mean(their), rel=0.12)


def test_the_difference_of_a_model_to_itself_is_none(silos):
    data = silos["A"]
    assert auroc_difference(data.score, data.score, data.y) == (0.0, 0.0)


def test_the_difference_that_leaves_is_of_enough_patients_who_differ(silos):
    score, y, _ = silos["A"]
    sent = silo_auroc_difference(Paired(score, score**2 * (score > 0.5), y))
    expected = auroc_difference(score**2 * (score > 0.5), score, y)
    assert (sent["value"], sent["error"]) == expected and expected.value < 0
    assert silo_auroc_difference(Paired(score, score, y))["value"] == 0
    for few, refused in ((9, True), (10, False)):
        second = np.where(np.arange(len(y)) < few, score / 2, score)
        with pytest.raises(TooFew) if refused else nullcontext():
            silo_auroc_difference(Paired(score, second, y))
    with pytest.raises(TooFew, match="fewer than 10 patients with or without"):
        silo_auroc_difference(Paired(score, score / 2, np.arange(len(y)) < 9))
    with pytest.raises(ValueError, match="scores must be probabilities"):
        silo_auroc_difference(Paired(score, score * np.nan, y))


@pytest.mark.parametrize("bins", [2, 10, 1000])
def test_the_auroc_by_bins_lies_within_its_bounds(silos, pooled, bins):
    counts = ask_silos(silos)(silo_score_counts, bins=bins, min_count=0)
    low, middle, high = auroc_bounds(counts)
    exact = metrics.roc_auc_score(pooled.y, pooled.score)
    assert low <= exact <= high and middle == pytest.approx(exact, abs=1 / bins)
    as_binned = metrics.roc_auc_score(pooled.y, np.floor(pooled.score * bins))
    assert middle == pytest.approx(as_binned, abs=2e-3 if bins == 1000 else 1e-12)


def test_brier_precision_and_calibration_are_those_of_scikit_learn(silos, pooled):
    counts = ask_silos(silos)(silo_score_counts, bins=10, min_count=0)
    expected = metrics.brier_score_loss(pooled.y, pooled.score)
    assert brier_score(counts) == pytest.approx(expected)
    binned = np.minimum(np.floor(pooled.score * 10), 9)
    expected = metrics.average_precision_score(pooled.y, binned)
    assert average_precision(counts) == pytest.approx(expected)
    share, score = sklearn_curve(pooled.y, pooled.score, n_bins=10)
    curve = calibration_curve(counts)
    np.testing.assert_allclose([point.share for point in curve], share, atol=0.02)
    assert sum(point.patients for point in curve) == 800
    inside = [point.low <= point.share <= point.high for point in curve]
    assert all(inside)


def test_small_bins_do_not_leave(silos):
    with pytest.raises(TooFew, match="silo 'A': a bin of scores has fewer than 10"):
        ask_silos(silos)(silo_score_counts, bins=50)
    score, y = np.repeat([0.2, 0.8, 0.2, 0.8], 10), np.repeat([True, False], 20)
    data = Scored(score, y, np.zeros(40, dtype=int))
    assert silo_score_counts(data, bins=2)["ill"].tolist() == [10, 10]
    with pytest.raises(TooFew):
        silo_score_counts(data._replace(score=np.append(score[:-1], 0.2)), bins=2)


def test_the_finest_answer_is_the_first_that_is_not_refused(silos):
    data = silos["A"]
    bins = len(finest_counts(data, most=50)["ill"])
    assert 1 < bins < 50
    silo_score_counts(data, bins=bins)
    for finer in range(bins + 1, 51):
        with pytest.raises(TooFew):
            silo_score_counts(data, bins=finer)
    assert len(finest_counts(data, most=1)["ill"]) == 1
    nine = data._replace(y=np.arange(len(data.y)) < 9)
    with pytest.raises(TooFew, match="fewer than 10 patients with or without"):
        finest_counts(nine)


def test_net_benefit_by_hand():
    # Bins [0, .5) and [.5, 1]: 5 of 20 ill and 60 of 80 healthy are below.
    counts = {"ill": np.array([5, 15]), "healthy": np.array([60, 20])}
    found = net_benefit(counts)
    assert found["threshold"] == [0.5]
    assert found["model"] == pytest.approx([(15 - 20) / 100])  # at .5 both count 1
    assert found["all"] == pytest.approx([(20 - 80) / 100]) and found["none"] == [0]


def test_sensitivity_and_specificity_are_those_of_scikit_learn(silos, pooled):
    found = ask_silos(silos)(silo_confusion, threshold=0.5, groups=3, min_count=0)
    called = pooled.score >= 0.5
    for group, row in enumerate(found["counts"]):
        rows = pooled.group == group
        expected = metrics.recall_score(pooled.y[rows], called[rows])
        assert sensitivity(row).value == pytest.approx(expected)
        expected = metrics.recall_score(~pooled.y[rows], ~called[rows])
        assert specificity(row).value == pytest.approx(expected)
    share = sensitivity(found["counts"].sum(axis=0))
    wilson = stats.binomtest(round(share.value * share.patients), share.patients)
    assert share.low == wilson.proportion_ci(method="wilson").low


def test_a_small_subgroup_takes_another_with_it():
    # Group 2 has three ill patients; without group 1 it could be found from the total.
    group = np.repeat([0, 1, 2], [100, 60, 40])
    y = np.concatenate([np.arange(100) < 50, np.arange(60) < 30, np.arange(40) < 3])
    data = Scored(np.full(200, 0.7), y, group)
    found = silo_confusion(data, threshold=0.5, groups=4)
    assert found["withheld"].tolist() == [0, 1, 1, 0]
    assert found["counts"].tolist() == [[50, 0, 50, 0], [0] * 4, [0] * 4, [0] * 4]
    everything = silo_confusion(data, threshold=0.5, groups=4, min_count=1)
    assert everything["counts"].sum() == 200 and not everything["withheld"].any()


def test_small_subgroups_that_are_few_together_take_another_with_them():
    # Two groups of one ill patient each: the total minus the others has two.
    group = np.repeat([0, 1, 2, 3], [100, 60, 21, 21])
    few = np.arange(21) < 1
    y = np.concatenate([np.arange(100) < 50, np.arange(60) < 30, few, few])
    data = Scored(np.full(202, 0.7), y, group)
    found = silo_confusion(data, threshold=0.5, groups=4)
    assert found["withheld"].tolist() == [0, 1, 1, 1]


@given(arrays(np.int64, (5, 2), elements=st.integers(0, 30)))
def test_no_subgroups_are_withheld_that_are_few_together(kinds):
    if (kinds.sum(axis=0) < 10).any():
        return  # refused as a whole
    y = np.concatenate([np.arange(sum(k)) < k[0] for k in kinds])
    data = Scored(np.full(len(y), 0.7), y, np.repeat(np.arange(5), kinds.sum(axis=1)))
    found = silo_confusion(data, threshold=0.5, groups=5)
    hidden = found["withheld"] == 1
    there = kinds.sum(axis=1) > 0
    assert (found["counts"][~hidden].sum(axis=1) == kinds[~hidden].sum(axis=1)).all()
    assert hidden[there & (kinds.min(axis=1) < 10)].all()
    if hidden.any() and (there & ~hidden).any():
        together = kinds[hidden].sum(axis=0)
        assert hidden.sum() > 1 and not ((0 < together) & (together < 10)).any()


def test_the_bounds_of_average_precision_hold_and_meet_with_fine_bins():
    rng = np.random.default_rng(8)
    y = rng.random(400) < 0.3
    score = np.round(1 / (1 + np.exp(-(y + rng.normal(size=400)))), 2)  # ties, too
    expected = metrics.average_precision_score(y, score)
    data, widths = Scored(score, y, np.zeros(400, dtype=int)), []
    for bins in (3, 10, 100, 1000):
        counts = silo_score_counts(data, bins=bins, min_count=1)
        low, high = average_precision_bounds(counts)
        assert low <= expected <= high and low <= average_precision(counts) <= high
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True) and widths[-1] < 0.1
    # By hand: two ill and a healthy one in the only bin. The healthy one may be above
    # both, 1/2 and 2/3, or below.
    counts = {"ill": np.array([2]), "healthy": np.array([1])}
    assert average_precision_bounds(counts) == pytest.approx((7 / 12, 1))


def test_calibration_slope_and_recalibration_of_a_model_that_is_too_sure():
    rng = np.random.default_rng(2)
    truth = rng.normal(size=4000)
    y = (rng.random(4000) < 1 / (1 + np.exp(-truth))) * 1.0
    sure = 1 / (1 + np.exp(-(2 * truth + 1)))  # slope 1/2, then shifted by 1
    half = [Table(logit(sure[i::2])[:, None], y[i::2]) for i in (0, 1)]
    fit = fit_logistic(ask_silos(dict(zip("AB", half, strict=True))), 1)
    error = np.sqrt(np.diag(fit.covariance))
    assert (np.abs(fit.beta - [-0.5, 0.5]) < 4 * error).all() and error.max() < 0.1


def test_recalibration_moves_the_log_odds_and_keeps_the_order(silos):
    score = silos["A"].score
    assert recalibrate(np.array([0.5, 0.8]), [0, 1]) == pytest.approx([0.5, 0.8])
    # Odds of .8 are 4: the root of 4, times 3, is 6, or 6 of 7.
    assert recalibrate(np.array([0.8]), [np.log(3), 0.5]) == pytest.approx([6 / 7])
    order = np.argsort(score, kind="stable")
    assert (np.diff(recalibrate(score, [-1, 0.3])[order]) >= 0).all()


def test_after_recalibration_the_mean_score_is_the_share_of_the_ill(silos):
    # The score equations of the likelihood, here on the patients that it was fitted to.
    data = silos["B"]
    rows = Table(logit(data.score)[:, None], data.y * 1.0)
    fit = fit_logistic(ask_silos({"B": rows}), 1)
    assert recalibrate(data.score, fit.beta).mean() == pytest.approx(data.y.mean())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": np.full(40, 1.2)}, "scores must be probabilities"),
        ({"score": np.full(40, np.nan)}, "scores must be probabilities"),
        ({"y": np.arange(40)}, "y must be bool"),
        ({"group": np.full(40, -1)}, "group whole numbers"),
        ({"score": np.zeros(39)}, r"must be \[N\], got \(39,\)"),
        ({"y": np.arange(40) < 9}, "fewer than 10 patients with or without"),
        ({"y": np.ones(40, dtype=bool)}, "fewer than 10 patients with or without"),
    ],
)
def test_bad_patients_are_refused(change, message):
    data = Scored(np.full(40, 0.5), np.arange(40) < 20, np.zeros(40, dtype=int))
    for function, how in (
        (silo_ranking, {}),
        (silo_score_counts, {"bins": 2}),
        (silo_confusion, {"threshold": 0.5, "groups": 1}),
    ):
        function(data, **how)
        with pytest.raises(ValueError, match=message):
            function(data._replace(**change), **how)


def test_thresholds_and_groups_out_of_range_are_refused():
    data = Scored(np.full(40, 0.5), np.arange(40) < 20, np.ones(40, dtype=int))
    with pytest.raises(ValueError, match="threshold must lie between 0 and 1, got 1"):
        silo_confusion(data, threshold=1, groups=2)
    with pytest.raises(ValueError, match="some patients are in none of 1 groups"):
        silo_confusion(data, threshold=0.5, groups=1)
