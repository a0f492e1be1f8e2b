"""Survival analyses from sums, against lifelines, statsmodels and a plain sum."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize

from fl_helpers.analysis import ask_silos
from fl_helpers.survival import (
    Survival,
    TooFewEvents,
    concordance,
    cox_loss,
    fit_cox,
    kaplan_meier,
    log_rank,
    made_up_survival,
    proportional_hazards,
    silo_concordance,
    silo_cox,
    silo_life_table,
)

SIZES = {"A": 120, "B": 80, "C": 60}


@pytest.fixture(scope="module")
def patients():
    """Times in whole weeks: many ties."""
    made = made_up_survival(SIZES, seed=3)
    return {k: v._replace(time=np.ceil(v.time / 30)) for k, v in made.items()}


def frame(patients):
    parts = []
    for silo, data in patients.items():
        columns = {f"x{k}": column for k, column in enumerate(data.x.T)}
        about = {"time": data.time, "event": data.event, "silo": silo}
        parts.append(pd.DataFrame(about | columns))
    return pd.concat(parts, ignore_index=True)


def test_cox_with_efron_ties_is_the_pooled_stratified_fit_of_lifelines(patients):
    lifelines = pytest.importorskip("lifelines")
    oracle = lifelines.CoxPHFitter().fit(
        frame(patients),
        "time",
        "event",
        strata=["silo"],
        fit_options={"precision": 1e-9},
    )
    fit = fit_cox(ask_silos(patients), 3)
    np.testing.assert_allclose(fit.beta, oracle.params_, atol=1e-6)
    errors = np.sqrt(np.diag(fit.covariance))
    np.testing.assert_allclose(errors, oracle.standard_errors_, rtol=1e-5)
    assert fit.loglik == pytest.approx(oracle.log_likelihood_, abs=1e-6)
    assert (fit.patients, fit.events) == (260, int(frame(patients).event.sum()))
    rows = fit.table(["x0", "x1", "x2"])
    found = [row["p"] for row in rows]
    np.testing.assert_allclose(found, oracle.summary["p"], rtol=1e-4)
    assert rows[0]["low"] < np.exp(0.7) < rows[0]["high"]  # the effect that was put in


def test_cox_with_breslow_ties_is_that_of_statsmodels(patients):
    phreg = pytest.importorskip("statsmodels.duration.hazard_regression")
    table = frame(patients)
    x = table[["x0", "x1", "x2"]].to_numpy()
    oracle = phreg.PHReg(
        table.time, x, status=table.event, strata=table.silo, ties="breslow"
    ).fit()
    fit = fit_cox(ask_silos(patients), 3, ties="breslow")
    np.testing.assert_allclose(fit.beta, oracle.params, atol=1e-6)


def test_three_patients_by_hand():
    # Times 1, 2, 3; the first two are events; x = 1, 0, 0; beta = 0.
    # loglik = -log 3 - log 2; gradient = (1 - 1/3) + (0 - 0) = 2/3;
    # information = 1/3 - 1/9 + 0 = 2/9.
    event = np.array([True, True, False])
    data = Survival(np.array([1.0, 2.0, 3.0]), event, np.array([[1.0], [0], [0]]))
    found = silo_cox(data, beta=[0.0], ties="efron", min_events=1)
    assert found["loglik"] == pytest.approx(-np.log(6))
    assert found["gradient"] == pytest.approx([2 / 3])
    assert found["information"] == pytest.approx(np.array([[2 / 9]]))


def test_a_ridge_is_the_penalty_that_it_says(patients):
    ask, ridge = ask_silos(patients), 40.0

    def minus(beta):
        found = ask(silo_cox, beta=beta, ties="efron")
        value = ridge / 2 * beta @ beta - found["loglik"]
        return value, ridge * beta - found["gradient"]

    oracle = minimize(minus, np.zeros(3), jac=True, tol=1e-10).x
    np.testing.assert_allclose(fit_cox(ask, 3, ridge=ridge).beta, oracle, atol=1e-5)


def test_the_gradient_is_the_slope_of_the_likelihood(patients):
    data, beta, step = patients["B"], np.array([0.3, -0.2, 0.9]), 1e-5
    found = silo_cox(data, beta=beta, ties="efron")
    for k in range(3):
        ends = []
        for sign in (1, -1):
            moved = beta.copy()
            moved[k] += sign * step
            ends.append(silo_cox(data, beta=moved, ties="efron")["loglik"])
        slope = (ends[0] - ends[1]) / (2 * step)
        assert found["gradient"][k] == pytest.approx(slope, abs=1e-5)


def test_large_scores_do_not_overflow(patients):
    found = silo_cox(patients["A"], beta=[400.0, 0, 0], ties="breslow")
    assert np.isfinite(found["loglik"]) and np.isfinite(found["information"]).all()


def test_a_silo_with_few_events_takes_no_part(patients):
    few = made_up_survival({"tiny": 12}, censored=0.5, seed=0)
    with pytest.raises(TooFewEvents, match="silo 'tiny': fewer than 10 events"):
        fit_cox(ask_silos(patients | few), 3)


def test_a_covariate_that_predicts_every_event_is_said_to(patients):
    data = patients["A"]
    first = ask_silos({"A": data._replace(x=-data.time[:, None])})  # highest goes first
    with pytest.raises(ValueError, match="no maximum after"):
        fit_cox(first, 1)
    assert np.isfinite(fit_cox(first, 1, ridge=1.0).beta).all()


def test_columns_that_say_nothing_are_named(patients):
    data = patients["A"]
    same = np.column_stack([data.x, np.ones(len(data.x))])
    with pytest.raises(ValueError, match=r"columns \[3\] of x do not vary"):
        fit_cox(ask_silos({"A": data._replace(x=same)}), 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time": np.array([0.0, 1, 2])}, "1 of 3 times are not above 0"),
        ({"time": np.array([-1.0, np.nan, 2])}, "2 of 3 times"),
        ({"event": np.array([1, 0, 1])}, "event must be bool"),
        ({"x": np.array([[1.0], [np.nan], [0]])}, "1 of 3 rows of x have missing"),
        ({"x": np.ones((2, 1))}, "3 times, 3 events, 2 rows"),
        ({"event": np.zeros(3, dtype=bool)}, "fewer than 1 events"),
    ],
)
def test_data_that_cannot_be_right_are_refused(change, message):
    whole = Survival(np.arange(1.0, 4), np.ones(3, dtype=bool), np.eye(3)[:, :1])
    with pytest.raises(ValueError, match=message):
        fit_cox(ask_silos({"A": whole._replace(**change)}), 1, min_events=0)


def test_kaplan_meier_with_an_interval_a_day_is_that_of_lifelines(patients):
    lifelines = pytest.importorskip("lifelines")
    table = frame(patients)
    # Half-month intervals: events at whole months, so censored half a month later.
    late = {
        k: v._replace(time=np.where(v.event, v.time, v.time + 0.5))
        for k, v in patients.items()
    }
    edges = np.arange(0, table.time.max() + 1.5, 0.5)
    life = ask_silos(late)(silo_life_table, edges=edges, min_count=0)
    curve = kaplan_meier(life, edges=edges)
    oracle = lifelines.KaplanMeierFitter().fit(table.time, table.event)
    expected = oracle.survival_function_at_times(curve.time).to_numpy()
    np.testing.assert_allclose(curve.share, expected, atol=1e-12)
    bounds = oracle.confidence_interval_.reindex(curve.time, method="ffill").to_numpy()
    inside = (curve.share > 0) & (curve.share < 1)
    np.testing.assert_allclose(curve.low[inside], bounds[inside, 0], atol=1e-9)
    np.testing.assert_allclose(curve.high[inside], bounds[inside, 1], atol=1e-9)


def test_small_intervals_do_not_leave(patients):
    edges = np.arange(0, 100.0)
    with pytest.raises(TooFewEvents, match="fewer than 10 events or patients at risk"):
        ask_silos(patients)(silo_life_table, edges=edges)
    wide = ask_silos(patients)(silo_life_table, edges=[0, 8])
    assert wide["at_risk"] == [260]


def test_the_log_rank_test_is_the_stratified_one_of_statsmodels(patients):
    survfunc = pytest.importorskip("statsmodels.duration.survfunc")
    grouped = {
        k: v._replace(x=(v.x[:, :1] > 0.2) + (v.x[:, :1] > 1.0) * 1.0)
        for k, v in patients.items()
    }
    table = frame(grouped)
    statistic, p = survfunc.survdiff(
        table.time, table.event, table.x0, strata=table.silo
    )
    found = log_rank(ask_silos(grouped), group=0, groups=3, min_events=0)
    assert found.statistic == pytest.approx(statistic) and found.freedom == 2
    assert found.p == pytest.approx(p)


def test_proportional_hazards_is_the_score_test_of_a_slope_in_time(patients):
    """With log(time) as a covariate that changes, summed patient by patient."""
    ask = ask_silos(patients)
    fit = fit_cox(ask, 3, ties="breslow")
    score, information = np.zeros(6), np.zeros((6, 6))
    for data in patients.values():
        for i in np.flatnonzero(data.event):
            wide = np.column_stack([data.x, data.x * np.log(data.time[i])])
            risk = data.time >= data.time[i]
            weight = np.exp(data.x[risk] @ fit.beta)
            weight /= weight.sum()
            mean = weight @ wide[risk]
            score += wide[i] - mean
            centred = wide[risk] - mean
            information += (centred.T * weight) @ centred
    for k, found in enumerate(proportional_hazards(ask, fit)):
        keep = [0, 1, 2, 3 + k]
        inverse = np.linalg.inv(information[np.ix_(keep, keep)])
        assert found.statistic == pytest.approx(score[keep] @ inverse @ score[keep])


def test_hazards_that_change_are_found_and_others_are_not():
    rng = np.random.default_rng(0)
    group = np.repeat([0.0, 1.0], 400)
    steady = rng.exponential(1 / np.exp(0.7 * group)) + 1e-9
    changing = (
        np.where(group == 1, rng.weibull(3, 800), rng.exponential(size=800)) + 1e-9
    )
    for times, small in ((steady, False), (changing, True)):
        data = {"A": Survival(times, np.ones(800, dtype=bool), group[:, None])}
        fit = fit_cox(ask_silos(data), 1, ties="breslow")
        (test,) = proportional_hazards(ask_silos(data), fit)
        assert (test.p < 1e-6) == small and (small or test.p > 0.01)


def test_concordance_is_that_of_lifelines_and_adds_up_over_silos(patients):
    utils = pytest.importorskip("lifelines.utils")
    beta, parts = np.array([0.7, -0.5, 0.0]), []
    for data in patients.values():
        score = (data.x @ beta).round(1)  # with ties
        expected = utils.concordance_index(data.time, -score, data.event)
        assert concordance(data, score) == pytest.approx(expected)
        parts.append(silo_concordance(data, beta=beta))
    found = ask_silos(patients)(silo_concordance, beta=beta.tolist())
    assert found["pairs"] == sum(part["pairs"] for part in parts)


def test_the_loss_of_a_network_is_the_likelihood(patients):
    data, beta = patients["C"], np.array([0.3, -0.1, 0.2])
    found = silo_cox(data, beta=beta, ties="breslow")
    y = torch.tensor(np.column_stack([data.time, data.event]))
    scores = torch.tensor(data.x @ beta, requires_grad=True)
    loss = cox_loss(scores, y)
    assert loss.item() == pytest.approx(-found["loglik"] / data.event.sum())
    loss.backward()
    slope = data.x.T @ scores.grad.numpy()
    np.testing.assert_allclose(slope, -found["gradient"] / data.event.sum(), atol=1e-9)
    none = torch.column_stack([y[:, 0], torch.zeros(len(y))])
    assert cox_loss(scores, none).item() == 0


def test_made_up_patients_have_the_effects_that_were_put_in():
    made = made_up_survival({"A": 4000, "B": 4000}, effects=(0.5, 0.0), seed=1)
    fit = fit_cox(ask_silos(made), 2)
    error = np.sqrt(np.diag(fit.covariance))
    assert (np.abs(fit.beta - [0.5, 0.0]) < 4 * error).all() and error.max() < 0.03
    censored = 1 - np.mean([data.event.mean() for data in made.values()])
    assert censored == pytest.approx(0.4, abs=0.03)
    again = made_up_survival({"B": 4000, "A": 5}, effects=(0.5, 0.0), seed=1)
    np.testing.assert_array_equal(again["B"].time, made["B"].time)


@pytest.mark.parametrize("part", ["time", "x"])
def test_text_is_named_without_what_it_says(patients, part):
    text = np.full(patients["B"]._asdict()[part].shape, "Smith", dtype=object)
    bad = patients | {"B": patients["B"]._replace(**{part: text})}
    with pytest.raises(ValueError, match="silo 'B': .* holds text") as error:
        fit_cox(ask_silos(bad), 3)
    assert "Smith" not in str(error.value)


def test_a_hospital_that_is_all_censored_takes_no_part(patients):
    none = patients["B"]._replace(event=np.zeros(len(patients["B"].time), dtype=bool))
    with pytest.raises(TooFewEvents, match="silo 'B': fewer than 10 events"):
        fit_cox(ask_silos(patients | {"B": none}), 3)


def test_a_column_that_one_hospital_lacks_is_named(patients):
    less = patients["B"]._replace(x=patients["B"].x[:, :2])
    with pytest.raises(ValueError, match="silo 'B': beta has 3 values, x 2 columns"):
        fit_cox(ask_silos(patients | {"B": less}), 3)


def test_other_ties_are_an_error(patients):
    with pytest.raises(ValueError, match="ties must be breslow or efron, got 'Efron'"):
        fit_cox(ask_silos(patients), 3, ties="Efron")
