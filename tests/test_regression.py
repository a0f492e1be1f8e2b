"""Regression from sums, against statsmodels on the pooled rows."""

import numpy as np
import pytest

from fl_helpers.analysis import ask_silos
from fl_helpers.regression import (
    Table,
    TooFewRows,
    fit_linear,
    fit_logistic,
    meta_analysis,
    silo_logistic,
)

SIZES = {"A": 90, "B": 60, "C": 45}


def made_up(*, logistic, seed=0):
    rng = np.random.default_rng(seed)
    silos = {}
    for shift, (name, n) in enumerate(SIZES.items()):
        x = rng.normal(size=(n, 3)) * [1, 5, 0.2] + shift
        score = 0.5 - 0.8 * x[:, 0] + 0.1 * x[:, 1]
        noise = rng.logistic(size=n) if logistic else rng.normal(size=n)
        y = (score + noise > 0) * 1.0 if logistic else score + noise
        silos[name] = Table(x, y)
    return silos


def pooled(silos):
    x, y = (np.concatenate(parts) for parts in zip(*silos.values(), strict=True))
    return np.column_stack([np.ones(len(x)), x]), y


@pytest.mark.parametrize("logistic", [False, True])
def test_the_fit_is_that_of_statsmodels_on_the_pooled_rows(logistic):
    models = pytest.importorskip("statsmodels.api")
    silos = made_up(logistic=logistic)
    x, y = pooled(silos)
    if logistic:
        oracle = models.Logit(y, x).fit(disp=0, tol=1e-12)
        fit = fit_logistic(ask_silos(silos), 3)
    else:
        oracle = models.OLS(y, x).fit()
        fit = fit_linear(ask_silos(silos), 3)
    np.testing.assert_allclose(fit.beta, oracle.params, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(np.sqrt(np.diag(fit.covariance)), oracle.bse, rtol=1e-8)
    assert fit.loglik == pytest.approx(oracle.llf, rel=1e-10)
    rows = fit.table("abc")
    assert [row["column"] for row in rows] == ["intercept", "a", "b", "c"]
    np.testing.assert_allclose([r["p"] for r in rows], oracle.pvalues, rtol=1e-6)
    bounds = [[row["low"], row["high"]] for row in rows]
    np.testing.assert_allclose(bounds, oracle.conf_int(), rtol=1e-7)


def test_a_mean_and_a_share_by_hand():
    # The mean of 1, 2, 6 is 3, their variance 7, that of the mean 7 / 3.
    rows = Table(np.array([[1.0], [-1], [0]]), np.array([1.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="fewer than 10 rows"):
        fit_linear(ask_silos({"A": rows}), 1)
    empty = Table(np.zeros((3, 0)), np.array([1.0, 2, 6]))
    fit = fit_linear(ask_silos({"A": empty}), 0, min_rows=0)
    assert fit.beta[0] == pytest.approx(3)
    assert fit.covariance[0, 0] == pytest.approx(7 / 3)
    # 30 of 40 are cases: log odds log 3, variance 1 / (40 * 3/4 * 1/4).
    cases = Table(np.zeros((40, 0)), np.repeat([1.0, 0], [30, 10]))
    fit = fit_logistic(ask_silos({"A": cases}), 0)
    assert fit.beta == pytest.approx([np.log(3)])
    assert fit.covariance[0, 0] == pytest.approx(1 / 7.5)
    assert fit.table([], odds=True)[0]["odds ratio"] == pytest.approx(3)


def test_a_column_in_other_units_changes_only_its_own_coefficient():
    silos = made_up(logistic=True)
    milli = {k: Table(v.x * [1, 1, 1e6], v.y) for k, v in silos.items()}
    one, other = (fit_logistic(ask_silos(s), 3) for s in (silos, milli))
    np.testing.assert_allclose(other.beta, one.beta / [1, 1, 1, 1e6], rtol=1e-6)


def test_separated_classes_are_said_to_and_a_ridge_helps():
    silos = made_up(logistic=True)
    split = {
        k: Table(v.y[:, None] * 2 - 1 + 0.1 * v.x[:, :1], v.y) for k, v in silos.items()
    }
    with pytest.raises(ValueError, match="a column may separate the classes"):
        fit_logistic(ask_silos(split), 1)
    assert np.isfinite(fit_logistic(ask_silos(split), 1, ridge=1.0).beta).all()
    with pytest.raises(ValueError, match="ridge must be >= 0"):
        fit_logistic(ask_silos(split), 1, ridge=-1.0)


def test_a_ridge_spares_the_intercept():
    # With an infinite ridge, only the share of cases is left.
    silos = made_up(logistic=True)
    _, y = pooled(silos)
    fit = fit_logistic(ask_silos(silos), 3, ridge=1e9)
    assert fit.beta[0] == pytest.approx(np.log(y.mean() / (1 - y.mean())), abs=1e-6)
    assert np.abs(fit.beta[1:]).max() < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (np.full_like(x, np.nan), y), r"silo 'B': columns \[0, 1, 2\]"),
        (lambda x, y: (x, y * 2), "silo 'B': y must be 0 or 1"),
        (lambda x, y: (x[:, :2], y), "silo 'B': beta has 4 values for 2 columns"),
        (lambda x, y: (x[:8], y[:8]), "silo 'B': fewer than 10 rows"),
        (
            lambda x, y: (x, np.arange(60) < 4),
            "silo 'B': fewer than 10 rows of a class",
        ),
        (lambda x, y: (x, y[1:]), r"x must be \[N, F\] and y \[N\]"),
    ],
)
def test_bad_rows_of_a_silo_are_refused_by_name(change, message):
    silos = made_up(logistic=True)
    silos["B"] = Table(*change(*silos["B"]))
    with pytest.raises(ValueError, match=message):
        fit_logistic(ask_silos(silos), 3)


@pytest.mark.parametrize("fit", [fit_linear, fit_logistic])
def test_columns_that_say_the_same_are_refused(fit):
    silos = made_up(logistic=fit is fit_logistic)
    same = {
        k: Table(np.column_stack([v.x, v.x[:, 0] - v.x[:, 1]]), v.y)
        for k, v in silos.items()
    }
    with pytest.raises(ValueError, match="do not vary, or are sums of others"):
        fit(ask_silos(same), 4)


def test_a_silo_of_one_class_takes_part():
    # No case at all says nothing about a single patient.
    only = Table(np.ones((20, 1)), np.zeros(20))
    assert silo_logistic(only, beta=[0.0, 0.0])["cases"] == 0
    with pytest.raises(TooFewRows):
        silo_logistic(only._replace(y=np.arange(20) < 9), beta=[0.0, 0.0])


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("second", [0.9, 0.3])
def test_meta_analysis_is_that_of_statsmodels(random, second):
    combine = pytest.importorskip("statsmodels.stats.meta_analysis").combine_effects
    effects, errors = [0.2, second, -0.4, 0.5], [0.2, 0.3, 0.25, 0.1]
    oracle = combine(np.array(effects), np.array(errors) ** 2, method_re="chi2")
    found = meta_analysis(
        dict(zip("abcd", effects, strict=True)),
        dict(zip("abcd", errors, strict=True)),
        random=random,
    )
    mean, error = (
        (oracle.mean_effect_re, oracle.sd_eff_w_re)
        if random
        else (oracle.mean_effect_fe, oracle.sd_eff_w_fe)
    )
    assert found.estimate == pytest.approx(mean) and found.error == pytest.approx(error)
    assert found.between == pytest.approx(oracle.tau2 if random else 0)
    assert found.share == pytest.approx(oracle.i2)
    half = 1.959964 * error
    if random:  # Hartung and Knapp's error, if it is the larger; t of 3 degrees: 3.1824
        half = 3.182446 * max(error, oracle.sd_eff_w_re_hksj)
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half))


def test_meta_analysis_refuses_what_it_cannot_weigh():
    with pytest.raises(ValueError, match="two or more silos"):
        meta_analysis({"a": 1.0}, {"a": 1.0}, random=False)
    with pytest.raises(ValueError, match="must be > 0"):
        meta_analysis({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 0.0}, random=False)


@pytest.mark.parametrize("fit", [fit_linear, fit_logistic])
@pytest.mark.parametrize("part", ["x", "y"])
def test_text_is_named_without_what_it_says(fit, part):
    silos = made_up(logistic=True)
    text = np.full(silos["B"]._asdict()[part].shape, "Smith", dtype=object)
    silos["B"] = silos["B"]._replace(**{part: text})
    with pytest.raises(ValueError, match=f"silo 'B': {part} holds text") as error:
        fit(ask_silos(silos), 3)
    assert "Smith" not in str(error.value) + repr(error.value.__cause__)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_one_class_only_is_said_to(value):
    """The intercept has no finite value then."""
    silos = {
        k: Table(v.x, np.full(len(v.y), value))
        for k, v in made_up(logistic=True).items()
    }
    with pytest.raises(ValueError, match="all rows have y = "):
        fit_logistic(ask_silos(silos), 3)


@pytest.mark.parametrize("fit", [fit_linear, fit_logistic])
def test_a_constant_column_is_refused(fit):
    """It says the same as the intercept; one of zeros says nothing."""
    for value, message in ((1.0, "do not vary"), (0.0, r"columns \[1\] of x are 0")):
        silos = made_up(logistic=True)
        for name, (x, y) in silos.items():
            x = x.copy()
            x[:, 1] = value
            silos[name] = Table(x, y)
        with pytest.raises(ValueError, match=message):
            fit(ask_silos(silos), 3)


def test_rows_that_are_twice_there_count_twice():
    """Not found by sums; `silo_sketch` of federated_statistics finds them."""
    silos = made_up(logistic=False)
    once, twice = (
        silos,
        {k: Table(*(np.concatenate([p, p]) for p in v)) for k, v in silos.items()},
    )
    one, two = (fit_linear(ask_silos(s), 3) for s in (once, twice))
    np.testing.assert_allclose(one.beta, two.beta, rtol=1e-9)
    assert two.rows == 2 * one.rows  # and the intervals are too narrow
