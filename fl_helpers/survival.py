"""Time to event without pooling: Kaplan-Meier, log-rank test, Cox regression.

Functions that begin with `silo_` run inside a silo and return only sums; the others
run at the orchestrator and take `ask`, which calls such a function in every silo and
adds up (`analysis.ask_silos`, or a real run). Exact: the Cox model stratified by silo
has the coefficients of the pooled, stratified fit (Lu et al. 2015, WebDISCO). Needs
numpy, scipy and torch (for `cox_loss` only): copy this file on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

Ask = Callable[..., dict[str, np.ndarray]]  # as `analysis.Ask`
Ties = Literal["breslow", "efron"]
Rows = list[dict[str, Any]]


class Survival(NamedTuple):
    """One silo's patients.

    time: [N] > 0, until the event or until observation ended, the same unit in all
    silos. event: [N] bool, whether the event was seen. x: float [N, F] covariates,
    scaled alike in all silos.
    """

    time: np.ndarray
    event: np.ndarray
    x: np.ndarray


def check_survival(data: Survival) -> None:
    """Raise ValueError, with how many rows, for data that no analysis should take."""
    time, event, x = (np.asarray(part) for part in data)
    if not {time.dtype.kind, x.dtype.kind} <= {*"biuf"}:
        raise ValueError("time and x must be numbers, one of them holds text")
    if not (time.ndim == event.ndim == 1 and x.ndim == 2):
        raise ValueError("time and event must be [N] and x [N, F]")
    if not len(time) == len(event) == len(x):
        raise ValueError(f"{len(time)} times, {len(event)} events, {len(x)} rows of x")
    if event.dtype != bool:
        raise ValueError(f"event must be bool, got {event.dtype}; compare with == 1")
    bad = int((~np.isfinite(time) | ~(time > 0)).sum())
    if bad:
        raise ValueError(
            f"{bad} of {len(time)} times are not above 0; a patient whose event came "
            "at once needs a decision, such as half a day"
        )
    missing = int((~np.isfinite(x)).any(axis=1).sum())
    if missing:
        raise ValueError(f"{missing} of {len(x)} rows of x have missing values")


def _check_events(data: Survival, min_events: int) -> None:
    check_survival(data)
    if int(data.event.sum()) < max(1, min_events):
        raise TooFewEvents(
            f"fewer than {max(1, min_events)} events; sums over so few would describe "
            "patients, so this silo takes no part"
        )


class TooFewEvents(ValueError):
    """A silo's refusal: its sums would describe too few patients with an event."""

    code = "TOO_FEW"  # all that a real run says of it


# -- Kaplan-Meier


def silo_life_table(
    data: Survival, *, edges: Sequence[float], min_count: int = 10
) -> dict[str, np.ndarray]:
    """Patients at risk and events in each interval of time.

    edges: [B + 1], increasing, from 0 on; interval b is (edges[b], edges[b + 1]].
    min_count: no interval may have 1 to min_count - 1 events or patients at risk (but
    so few may leave in it); 0 where only the sum over silos is seen, with the rule
    applied there.
    Returns int64 [B]: at_risk (at the start of an interval), events, censored (in it).
    Raises `TooFewEvents` for small cells; ask again with longer intervals.
    """
    check_survival(data)
    bounds = np.asarray(edges, dtype=np.float64)
    if bounds.ndim != 1 or bounds.size < 2 or bounds[0] or (np.diff(bounds) <= 0).any():
        raise ValueError(f"edges must increase from 0, got {list(edges)}")
    inside = np.searchsorted(bounds, data.time, side="left") - 1  # len(bounds)-1: later
    counted = np.stack([data.event, ~data.event]) & (inside < len(bounds) - 1)
    events, censored = (
        np.bincount(inside[rows], minlength=len(bounds) - 1) for rows in counted
    )
    at_risk = np.array([(inside >= b).sum() for b in range(len(bounds) - 1)])
    small = [(0 < v) & (v < min_count) for v in (events, at_risk)]
    if np.any(small):
        raise TooFewEvents(
            f"an interval has fewer than {min_count} events or patients at risk; ask "
            "with longer or fewer intervals"
        )
    return {"at_risk": at_risk, "events": events, "censored": censored}


@dataclass(frozen=True)
class Curve:
    """A survival curve: share without event at each time, and its interval; all [B]."""

    time: np.ndarray
    share: np.ndarray
    low: np.ndarray
    high: np.ndarray


def kaplan_meier(
    life_table: Mapping[str, np.ndarray],
    *,
    edges: Sequence[float],
    confidence: float = 0.95,
) -> Curve:
    """The Kaplan-Meier curve at the ends of intervals, from summed life tables.

    Patients who were censored in an interval count half of it (the actuarial form);
    with short intervals this is the product-limit estimate. Greenwood's variance on the
    scale of log(-log), so that the interval stays in [0, 1].
    """
    at_risk = life_table["at_risk"] - life_table["censored"] / 2
    events = life_table["events"].astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        hazard = np.where(at_risk > 0, events / at_risk, 0.0)
        share = np.cumprod(1 - hazard)
        terms = np.where(at_risk > events, events / (at_risk * (at_risk - events)), 0.0)
        spread = np.sqrt(np.cumsum(terms)) / np.abs(np.log(share))
        factor = np.exp(stats.norm.ppf((1 + confidence) / 2) * spread)
        low, high = share**factor, share ** (1 / factor)
    plain = (share == 1) | (share == 0)
    low, high = np.where(plain, share, low), np.where(plain, share, high)
    return Curve(np.asarray(edges[1:], dtype=np.float64), share, low, high)


# -- log-rank test


def silo_log_rank(
    data: Survival, *, group: int, groups: int, min_events: int = 10
) -> dict[str, np.ndarray]:
    """Observed and expected events of groups, at this silo's own event times.

    group: the column of x that holds the group, 0 to groups - 1. min_events: no group
    may have 1 to min_events - 1 patients or events. Returns observed and expected [G]
    and variance [G, G] (hypergeometric).
    """
    _check_events(data, min_events)
    place = np.unique(data.x[:, group], return_inverse=True)[1]
    few = [
        0 < n < min_events for v in (place, place[data.event]) for n in np.bincount(v)
    ]
    if any(few):  # before the next error, which would say whether there is such a one
        raise TooFewEvents(f"a group has fewer than {min_events} patients or events")
    member = data.x[:, group].astype(np.int64)
    if not np.isin(data.x[:, group], np.arange(groups)).all():
        raise ValueError(f"column {group} must hold whole numbers 0 to {groups - 1}")
    one_hot = np.eye(groups)[member]
    observed, expected = np.zeros(groups), np.zeros(groups)
    variance = np.zeros((groups, groups))
    for moment in np.unique(data.time[data.event]):
        risk = one_hot[data.time >= moment].sum(axis=0)
        died = one_hot[(data.time == moment) & data.event].sum(axis=0)
        n, d = risk.sum(), died.sum()
        share = risk / n
        observed += died
        expected += d * share
        if n > 1:
            scale = d * (n - d) / (n - 1)
            variance += scale * (np.diag(share) - np.outer(share, share))
    return {"observed": observed, "expected": expected, "variance": variance}


class Test(NamedTuple):
    """A test's statistic, its degrees of freedom and its p-value."""

    statistic: float
    freedom: int
    p: float


def log_rank(ask: Ask, *, group: int, groups: int, min_events: int = 10) -> Test:
    """The log-rank test stratified by silo: do groups differ in time to event?"""
    how = {"group": group, "groups": groups, "min_events": min_events}
    found = ask(silo_log_rank, **how)
    difference = (found["observed"] - found["expected"])[1:]
    variance = found["variance"][1:, 1:]
    return _chi_square(difference, variance)


def _chi_square(difference: np.ndarray, variance: np.ndarray) -> Test:
    statistic = float(difference @ np.linalg.pinv(variance) @ difference)
    freedom = int(np.linalg.matrix_rank(variance))
    return Test(statistic, freedom, float(stats.chi2.sf(statistic, freedom)))


# -- Cox regression


def silo_cox(
    data: Survival, *, beta: Sequence[float], ties: Ties, min_events: int = 10
) -> dict[str, Any]:
    """Log partial likelihood of a silo's patients, its gradient and its Hessian.

    beta: [F] log hazard ratios. Returns loglik (number), gradient [F], information
    [F, F] (minus the Hessian), events and patients (numbers).
    """
    if ties not in ("breslow", "efron"):
        raise ValueError(f"ties must be breslow or efron, got {ties!r}")
    _check_events(data, min_events)
    weight = np.asarray(beta, dtype=np.float64)
    if weight.shape != (data.x.shape[1],):
        raise ValueError(f"beta has {len(weight)} values, x {data.x.shape[1]} columns")
    loglik, gradient = 0.0, np.zeros_like(weight)
    information = np.zeros((len(weight), len(weight)))
    for risk, died in _risk_sets(data, weight):
        for share in np.arange(died.count) / died.count:
            part = risk if ties == "breslow" else risk.less(died, share)
            mean = part.first / part.total
            loglik -= np.log(part.total) + part.shift
            gradient -= mean
            information += part.second / part.total - np.outer(mean, mean)
        loglik += died.score
        gradient += died.sum_x
    counts = {"events": int(data.event.sum()), "patients": len(data.time)}
    return {
        "loglik": loglik,
        "gradient": gradient,
        "information": information,
        **counts,
    }


class _Sums(NamedTuple):
    """Sums over a set of patients: of exp(score - shift), times x, times x x'."""

    total: float
    first: np.ndarray
    second: np.ndarray
    shift: float
    count: int = 0
    score: float = 0.0
    sum_x: Any = 0.0

    def plus(self, new: _Sums) -> _Sums:
        """Both together, on the scale of the new one."""
        return new.less(self, -np.exp(self.shift - new.shift))

    def less(self, other: _Sums, share: float) -> _Sums:
        total = self.total - share * other.total
        first = self.first - share * other.first
        second = self.second - share * other.second
        return self._replace(total=total, first=first, second=second)


def _risk_sets(data: Survival, beta: np.ndarray) -> Iterator[tuple[_Sums, _Sums]]:
    """Per event time, latest first: sums over who is at risk, and over who has it."""
    x = data.x.astype(np.float64)
    score = x @ beta
    size = x.shape[1]
    sums = _Sums(0.0, np.zeros(size), np.zeros((size, size)), -np.inf)
    moments, index = np.unique(data.time, return_inverse=True)
    order = np.argsort(index, kind="stable")
    starts = np.searchsorted(index[order], np.arange(len(moments) + 1))
    for k in range(len(moments) - 1, -1, -1):
        rows = order[starts[k] : starts[k + 1]]
        # exp() of the largest score so far is 1, so that nothing overflows or vanishes
        shift = max(sums.shift, float(score[rows].max()))
        sums = sums.plus(_summed(x[rows], score[rows], shift))
        rows = rows[data.event[rows]]
        if len(rows):
            yield sums, _summed(x[rows], score[rows], shift)


def _summed(x: np.ndarray, score: np.ndarray, shift: float) -> _Sums:
    weight = np.exp(score - shift)
    second = (x.T * weight) @ x
    more = {"count": len(x), "score": float(score.sum()), "sum_x": x.sum(axis=0)}
    return _Sums(float(weight.sum()), weight @ x, second, shift, **more)


@dataclass(frozen=True)
class CoxFit:
    """A Cox model: what was found, and from what.

    beta: [F] log hazard ratios. covariance: [F, F], of beta. loglik: at beta, without
    the penalty. rounds: how often the silos were asked.
    """

    beta: np.ndarray
    covariance: np.ndarray
    loglik: float
    events: int
    patients: int
    rounds: int

    def table(self, names: Sequence[str], *, confidence: float = 0.95) -> Rows:
        """Hazard ratio, interval and Wald p-value of each covariate, as rows."""
        error = np.sqrt(np.diag(self.covariance))
        wide = stats.norm.ppf((1 + confidence) / 2) * error
        p = 2 * stats.norm.sf(np.abs(self.beta / error))
        columns = (np.exp(v) for v in (self.beta, self.beta - wide, self.beta + wide))
        keys = ("covariate", "hazard ratio", "low", "high", "p")
        rows = zip(names, *columns, p, strict=True)
        return [dict(zip(keys, row, strict=True)) for row in rows]


def fit_cox(
    ask: Ask,
    num_features: int,
    *,
    ties: Ties = "efron",
    ridge: float = 0.0,
    min_events: int = 10,
    max_rounds: int = 30,
) -> CoxFit:
    """Fit a Cox model, stratified by silo, by Newton's method on summed derivatives.

    ask: calls a function in every silo and returns the sums.
    num_features: columns of x.
    ties: how events at the same time count; Efron's way is the better one.
    ridge: weight of |beta|^2 / 2 in the penalised likelihood, >= 0; fix it before any
        test data are looked at.
    min_events: a silo with fewer events refuses.
    max_rounds: questions, at most.

    Each silo has a baseline hazard of its own, so differences between silos are not
    modelled, and no event time leaves a silo. A step that lowers the likelihood is
    halved. Raises ValueError if it does not converge, which covariates that predict
    every event cause: the likelihood then has no maximum; a ridge gives it one.
    """
    if ridge < 0:
        raise ValueError(f"ridge must be >= 0, got {ridge}")
    beta, step, best = np.zeros(num_features), np.zeros(num_features), None
    for rounds in range(1, max_rounds + 1):
        how = {"ties": ties, "min_events": min_events}
        found = ask(silo_cox, beta=(beta + step).tolist(), **how)
        value = float(found["loglik"]) - ridge / 2 * float(
            (beta + step) @ (beta + step)
        )
        if best is not None and value < best - 1e-12 * abs(best):
            step = step / 2
            continue
        beta, best = beta + step, value
        curvature = found["information"] + ridge * np.eye(num_features)
        slope = found["gradient"] - ridge * beta
        step = _newton_step(curvature, slope)
        if float(slope @ step) < 1e-10:  # twice what is left to gain, about
            covariance = np.linalg.inv(curvature)
            counts = int(found["events"]), int(found["patients"])
            loglik = float(found["loglik"])
            return CoxFit(beta, covariance, loglik, *counts, rounds)
        if np.abs(beta).max() > 25:
            break
    raise ValueError(
        f"no maximum after {rounds} rounds: a covariate may predict every event (the "
        f"largest log hazard ratio is {np.abs(beta).max():.3g}); give ridge=1, or "
        "leave it out"
    )


def _newton_step(curvature: np.ndarray, slope: np.ndarray) -> np.ndarray:
    constant = np.flatnonzero(np.diag(curvature) < 1e-12)
    if len(constant):
        raise ValueError(
            f"columns {constant.tolist()} of x do not vary among the patients at risk "
            "in any silo; leave them out, or give a ridge"
        )
    try:
        return np.linalg.solve(curvature, slope)
    except np.linalg.LinAlgError:
        raise ValueError(
            "some columns of x are sums of others; leave one out, or give a ridge"
        ) from None


# -- is the model right, and is it any good?


def silo_hazards_over_time(
    data: Survival, *, beta: Sequence[float], min_events: int = 10
) -> dict[str, np.ndarray]:
    """Sums for `proportional_hazards`, with the logarithm of time (Breslow ties)."""
    _check_events(data, min_events)
    size = data.x.shape[1]
    names = ("score", "flat", "mixed", "steep")
    found = {n: np.zeros(size if n == "score" else (size, size)) for n in names}
    weight = np.asarray(beta, dtype=np.float64)
    moments = np.unique(data.time[data.event])[::-1]  # latest first, as the risk sets
    for moment, (risk, died) in zip(moments, _risk_sets(data, weight), strict=True):
        mean = risk.first / risk.total
        spread = died.count * (risk.second / risk.total - np.outer(mean, mean))
        clock = np.log(moment)
        found["score"] += clock * (died.sum_x - died.count * mean)
        found["flat"] += spread
        found["mixed"] += clock * spread
        found["steep"] += clock**2 * spread
    return found


def proportional_hazards(ask: Ask, fit: CoxFit, *, min_events: int = 10) -> list[Test]:
    """Does a hazard ratio change over time? One score test for each covariate.

    The test of a term beta * log(time) beside each covariate (Grambsch and Therneau
    1994), at the coefficients of a fit with Breslow ties and without a ridge.
    """
    found = ask(silo_hazards_over_time, beta=fit.beta.tolist(), min_events=min_events)
    inverse = np.linalg.inv(found["flat"])
    left = found["steep"] - found["mixed"] @ inverse @ found["mixed"].T
    pairs = zip(found["score"], np.diag(left), strict=True)
    return [_chi_square(np.array([s]), np.array([[v]])) for s, v in pairs]


def silo_concordance(
    data: Survival, *, beta: Sequence[float], min_events: int = 10
) -> dict[str, float]:
    """Pairs of a silo's patients that the score orders as their times (Harrell 1982).

    A pair counts if the earlier time is an event. Returns concordant, tied (the same
    score) and pairs: c = (concordant + tied / 2) / pairs.
    """
    _check_events(data, min_events)
    score = data.x @ np.asarray(beta, dtype=np.float64)
    return dict(zip(("concordant", "tied", "pairs"), _pairs(data, score), strict=True))


def concordance(data: Survival, score: np.ndarray) -> float:
    """Harrell's c of scores (higher: earlier event) for one set of patients; NaN if no
    pair can be compared."""
    concordant, tied, pairs = _pairs(data, np.asarray(score))
    return (concordant + tied / 2) / pairs if pairs else float("nan")


def _pairs(data: Survival, score: np.ndarray) -> tuple[float, float, float]:
    concordant = tied = pairs = 0
    for i in np.flatnonzero(data.event):
        same = (data.time == data.time[i]) & ~data.event  # censored then: outlived it
        others = score[(data.time > data.time[i]) | same]
        pairs += len(others)
        concordant += int((others < score[i]).sum())
        tied += int((others == score[i]).sum())
    return float(concordant), float(tied), float(pairs)


def cox_loss(scores: Tensor, y: Tensor) -> Tensor:
    """Minus the mean log partial likelihood of a batch, for a network that scores risk.

    scores: [N] or [N, 1]; y: float [N, 2], time and event (0 or 1). Breslow's form; a
    batch without events gives 0. A batch is its own risk set: use large ones.
    """
    time, event = y[:, 0], y[:, 1]
    order = torch.argsort(time, descending=True, stable=True)
    score, time, event = scores.reshape(-1)[order], time[order], event[order]
    risk = torch.logcumsumexp(score, dim=0)
    last = torch.searchsorted(-time, -time, right=True) - 1  # all with that time
    return -((score - risk[last]) * event).sum() / event.sum().clamp(min=1)


# -- data


def made_up_survival(
    sizes: Mapping[str, int],
    *,
    effects: Sequence[float] = (0.7, -0.5, 0.0),
    centre_effect: float = 0.5,
    censored: float = 0.4,
    seed: int,
) -> dict[str, Survival]:
    """Patients of made-up hospitals with known hazards, so that a fit can be checked.

    sizes: patients per silo. effects: [F] true log hazard ratios; covariates are
    standard normal, shifted a little from silo to silo. centre_effect: spread of the
    silos' log baseline hazards. censored: share of patients, about, who leave before
    the event. Times are exponential given the covariates, about a year, in days.
    """
    if not 0 <= censored < 1:
        raise ValueError(f"censored must be in [0, 1), got {censored}")
    made = {}
    for name in sorted(sizes):
        rng = np.random.default_rng([seed, *name.encode()])
        shift = rng.normal(scale=0.3, size=len(effects))
        x = rng.normal(size=(sizes[name], len(effects))) + shift
        rate = np.exp(x @ np.asarray(effects) + centre_effect * rng.normal())
        until = rng.exponential(365 / rate)
        leave = rng.exponential(365 / rate) * (1 - censored) / max(censored, 1e-9)
        time = np.ceil(np.minimum(until, leave))  # whole days, so there are ties
        made[name] = Survival(time, until <= leave, x)
    return made
