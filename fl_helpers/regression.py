"""The regression of a paper without pooling: linear, logistic, and meta-analysis.

Functions that begin with `silo_` run inside a silo and return only sums; the others
run at the orchestrator and take `ask`, which calls such a function in every silo and
adds up (`analysis.ask_silos`, or a real run). Coefficients, errors and p-values are
those of the pooled rows (Wolfson et al. 2010, DataSHIELD). Needs numpy and scipy: copy
this file on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

Ask = Callable[..., dict[str, np.ndarray]]  # as `analysis.Ask`
INTERCEPT = "intercept"


class Table(NamedTuple):
    """One silo's rows.

    x: float [N, F], scaled alike in all silos. y: [N], numbers for a linear model, 0 or
    1 for a logistic one.
    """

    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Fit:
    """A fitted regression; the intercept comes first.

    beta: [F + 1]. covariance: [F + 1, F + 1], of beta. rows: how many patients.
    loglik: of the rows. freedom: degrees of freedom of Student's t for the p-values,
    None for the normal distribution. rounds: how often the silos were asked.
    """

    beta: np.ndarray
    covariance: np.ndarray
    rows: int
    loglik: float
    freedom: int | None
    rounds: int

    def table(
        self, names: Sequence[str], *, odds: bool = False, confidence: float = 0.95
    ) -> list[dict[str, Any]]:
        """Estimate, interval and p-value of each coefficient, as rows.

        names: of the F columns. odds: the odds ratios of a logistic model, exp(beta).
        """
        law = stats.norm if self.freedom is None else stats.t(self.freedom)
        error = np.sqrt(np.diag(self.covariance))
        wide = law.ppf((1 + confidence) / 2) * error
        p = 2 * law.sf(np.abs(self.beta / error))
        columns = [self.beta, self.beta - wide, self.beta + wide]
        columns = [np.exp(v) if odds else v for v in columns]
        keys = ("column", "odds ratio" if odds else "estimate", "low", "high", "p")
        rows = zip([INTERCEPT, *names], *columns, p, strict=True)
        return [dict(zip(keys, row, strict=True)) for row in rows]


class TooFewRows(ValueError):
    """A silo's refusal: its sums would describe too few patients."""

    code = "TOO_FEW"  # all that a real run says of it


def _numbers(values: Any, what: str) -> np.ndarray:
    try:
        return np.asarray(values, dtype=np.float64)
    except (ValueError, TypeError):  # their text would hold a patient's value
        raise ValueError(f"{what} holds text; give numbers, NaN if missing") from None


def _design(data: Table, beta: Sequence[float], min_rows: int) -> np.ndarray:
    """The rows with a column of ones in front, checked."""
    x, y = _numbers(data.x, "x"), _numbers(data.y, "y")
    if x.ndim != 2 or y.shape != (len(x),):
        raise ValueError(f"x must be [N, F] and y [N], got {x.shape} and {y.shape}")
    if len(beta) != x.shape[1] + 1:
        raise ValueError(f"beta has {len(beta)} values for {x.shape[1]} columns and 1")
    if len(x) < min_rows:
        raise TooFewRows(f"fewer than {min_rows} rows; this silo takes no part")
    missing = ~np.isfinite(x).all(axis=1) | ~np.isfinite(y)
    if missing.any():
        columns = np.flatnonzero(~np.isfinite(x).all(axis=0)).tolist()
        raise ValueError(
            f"columns {columns} of x, or y, have missing values; decide inside the "
            "silo what to do with them, in all silos alike"
        )
    return np.column_stack([np.ones(len(x)), x])


def silo_linear(
    data: Table, *, beta: Sequence[float], min_rows: int = 10
) -> dict[str, Any]:
    """Squared residuals at beta [F + 1], half their slope, and the cross products."""
    x = _design(data, beta, min_rows)
    residual = np.asarray(data.y, dtype=np.float64) - x @ np.asarray(beta)
    found = {"squares": float(residual @ residual), "gradient": x.T @ residual}
    return found | {"information": x.T @ x, "rows": len(x)}


def silo_logistic(
    data: Table, *, beta: Sequence[float], min_rows: int = 10
) -> dict[str, Any]:
    """Log-likelihood at beta [F + 1], its gradient and its information matrix.

    Also rows, and cases: the patients with y = 1. Both cases and the others must be
    at least min_rows or none: a silo with three cases refuses.
    """
    x, y = _design(data, beta, min_rows), np.asarray(data.y, dtype=np.float64)
    if not set(np.unique(y)) <= {0.0, 1.0}:
        raise ValueError("y must be 0 or 1 in a logistic model")
    cases = int(y.sum())
    if any(0 < n < min_rows for n in (cases, len(y) - cases)):
        raise TooFewRows(f"fewer than {min_rows} rows of a class; it takes no part")
    score = x @ np.asarray(beta, dtype=np.float64)
    share = 1 / (1 + np.exp(-np.clip(score, -700, 700)))
    loglik = float(y @ score - np.logaddexp(0, score).sum())
    found = {"loglik": loglik, "gradient": x.T @ (y - share)}
    found["information"] = (x.T * (share * (1 - share))) @ x
    return found | {"rows": len(x), "cases": cases}


def fit_linear(ask: Ask, num_features: int, *, min_rows: int = 10) -> Fit:
    """Least squares over all silos' rows, in three questions.

    Standard errors are the classical ones, p-values Student's t. Raises ValueError for
    columns that do not vary or are sums of others, and for no more rows than columns.
    """
    beta, rounds = np.zeros(num_features + 1), 3
    for _ in range(rounds - 1):  # the second step mends the rounding of the first
        found = ask(silo_linear, beta=beta.tolist(), min_rows=min_rows)
        beta = beta + _newton_step(found["information"], found["gradient"])
    found = ask(silo_linear, beta=beta.tolist(), min_rows=min_rows)
    rows, squares = int(found["rows"]), float(found["squares"])
    freedom = rows - len(beta)
    if freedom < 1:
        raise ValueError(f"{rows} rows are too few for {len(beta)} coefficients")
    covariance = np.linalg.inv(found["information"]) * squares / freedom
    loglik = -rows / 2 * (np.log(2 * np.pi * squares / rows) + 1)
    return Fit(beta, covariance, rows, float(loglik), freedom, rounds)


def fit_logistic(
    ask: Ask,
    num_features: int,
    *,
    ridge: float = 0.0,
    min_rows: int = 10,
    max_rounds: int = 30,
) -> Fit:
    """Maximum likelihood over all silos' rows, by Newton's method.

    ridge: weight of |beta|^2 / 2, without the intercept, >= 0; then the errors are
        those of the penalised likelihood. Fix it before test data are looked at.
    min_rows: a silo with fewer rows, cases or others refuses.
    Raises ValueError if it does not converge: a column that separates the classes has
    no finite coefficient; a ridge gives it one.
    """
    if ridge < 0:
        raise ValueError(f"ridge must be >= 0, got {ridge}")
    penalty = ridge * np.diag([0.0] + [1.0] * num_features)
    beta, step, best = np.zeros(num_features + 1), np.zeros(num_features + 1), None
    for rounds in range(1, max_rounds + 1):
        there = beta + step
        found = ask(silo_logistic, beta=there.tolist(), min_rows=min_rows)
        if not 0 < int(found["cases"]) < int(found["rows"]):
            one_class = int(found["cases"] > 0)
            raise ValueError(f"all rows have y = {one_class}; nothing to tell apart")
        value = float(found["loglik"]) - float(there @ penalty @ there) / 2
        if best is not None and value < best - 1e-12 * abs(best):
            step = step / 2
            continue
        beta, best = there, value
        curvature = found["information"] + penalty
        slope = found["gradient"] - penalty @ beta
        step = _newton_step(curvature, slope)
        if float(slope @ step) < 1e-14 * max(1.0, abs(best)):
            covariance = np.linalg.inv(curvature)
            loglik = float(found["loglik"])
            return Fit(beta, covariance, int(found["rows"]), loglik, None, rounds)
        if np.abs(beta).max() > 25:
            break
    raise ValueError(
        f"no maximum after {rounds} rounds: a column may separate the classes (the "
        f"largest coefficient is {np.abs(beta).max():.3g}); give ridge=1, or leave it "
        "out"
    )


def _newton_step(curvature: np.ndarray, slope: np.ndarray) -> np.ndarray:
    scale = np.sqrt(np.diag(curvature))
    if not (scale > 0).all():
        columns = (np.flatnonzero(scale == 0) - 1).tolist()
        raise ValueError(f"columns {columns} of x are 0 in all silos; leave them out")
    scaled = curvature / np.outer(scale, scale)
    if np.linalg.cond(scaled) > 1e12:
        raise ValueError(
            "some columns of x do not vary, or are sums of others; leave one out"
        )
    return np.linalg.solve(scaled, slope / scale) / scale


class Pooled(NamedTuple):
    """What a meta-analysis finds: estimate, standard error, and heterogeneity."""

    estimate: float
    error: float
    between: float  # variance of the true effects between silos, 0 for a fixed effect
    share: float  # I^2: share of the spread that is no chance, 0 to 1
    low: float  # of the 95 % interval
    high: float


def meta_analysis(
    estimates: Mapping[str, float], errors: Mapping[str, float], *, random: bool
) -> Pooled:
    """Combine one estimate and its standard error from each silo, by inverse variance.

    random: the silos' true effects differ (DerSimonian and Laird 1986); else they are
    one. Then the interval is that of Hartung and Knapp (2001), which says how little a
    few silos tell about how much silos differ, and is never narrower than with `error`.
    Two numbers leave each silo, once; where silos are small, the sums of `fit_logistic`
    use the data better. Raises ValueError for other names, fewer than two silos, or
    errors that are not > 0.
    """
    if estimates.keys() != errors.keys() or len(estimates) < 2:
        raise ValueError(
            "need an estimate and an error of two or more silos, got "
            f"{sorted(estimates)} and {sorted(errors)}"
        )
    silos = sorted(estimates)
    effect = np.array([estimates[silo] for silo in silos])
    variance = np.array([errors[silo] for silo in silos]) ** 2
    if not (np.isfinite(effect).all() and np.isfinite(variance).all()):
        raise ValueError("estimates and errors must be finite")
    if not (variance > 0).all():
        raise ValueError(f"standard errors must be > 0, got {dict(errors)}")
    weight = 1 / variance
    mean = float(weight @ effect / weight.sum())
    spread, freedom = float(weight @ (effect - mean) ** 2), len(silos) - 1
    share = max(0.0, 1 - freedom / spread) if spread > 0 else 0.0
    between, wider, likely = 0.0, 1.0, stats.norm.ppf(0.975)
    if random:
        scale = weight.sum() - (weight**2).sum() / weight.sum()
        between = max(0.0, (spread - freedom) / float(scale))
        weight = 1 / (variance + between)
        mean = float(weight @ effect / weight.sum())
        wider = max(1.0, float(weight @ (effect - mean) ** 2) / freedom) ** 0.5
        likely = stats.t.ppf(0.975, freedom)
    error = float(weight.sum() ** -0.5)
    half = float(likely * wider * error)
    return Pooled(mean, error, between, share, mean - half, mean + half)
