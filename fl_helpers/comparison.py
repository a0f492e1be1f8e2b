"""What a comparison rests on: intervals, pairs won, and who carries the mean.

Two approaches are compared on the same seeds and the same test sets, so what counts is
the difference in each pair, each with its own tuned learning rate. Needs numpy and
scipy: copy this file on its own.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval; wins: how many of the n values are > 0."""

    mean: float
    low: float
    high: float
    wins: int
    n: int

    def __str__(self) -> str:
        half = (self.high - self.low) / 2
        return f"{self.mean:+.1f} ± {half:.1f} ({self.wins} of {self.n})"


def paired_interval(
    differences: Sequence[float], *, confidence: float = 0.95
) -> Interval:
    """Mean of paired differences with Student's t interval.

    differences: [n], one per seed or split, of two approaches on the same test sets;
    n >= 2. The seeds must be independent of each other: several hospitals of one seed
    are not, take their mean first. Raises ValueError for fewer values and for NaN.
    """
    values = np.asarray(differences, dtype=float)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(
            f"an interval needs two or more finite differences, got {values.tolist()}; "
            "repeat the comparison with more seeds"
        )
    error = values.std(ddof=1) / np.sqrt(len(values))
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * error)
    mean = float(values.mean())
    wins = int((values > 0).sum())
    return Interval(mean, mean - half, mean + half, wins, len(values))


def share_interval(
    hits: int, examples: int, *, confidence: float = 0.95
) -> tuple[float, float]:
    """Between which shares the truth lies if `hits` of `examples` tests succeeded.

    Wilson's score interval: for shares such as accuracy or sensitivity on one test set.
    Returns (low, high) in [0, 1]. Raises ValueError unless 0 <= hits <= examples >= 1.
    """
    if not 0 <= hits <= examples or examples < 1:
        raise ValueError(f"need 0 <= hits <= examples >= 1, got {hits} of {examples}")
    found = stats.binomtest(hits, examples).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def without_each(per_silo: Mapping[str, Sequence[float]]) -> dict[str, Interval]:
    """Who carries the mean: the paired interval with one silo left out, for each silo.

    per_silo: {silo: [n] paired differences, one per seed, the same seeds for all}, at
    least two silos. Returns {the silo that is left out: interval of the others' mean}.
    """
    table = {silo: np.asarray(values, dtype=float) for silo, values in per_silo.items()}
    if len(table) < 2:
        raise ValueError(f"leaving one of {sorted(table)} out leaves nobody")
    return {
        silo: paired_interval(np.mean([table[k] for k in table if k != silo], axis=0))
        for silo in table
    }


def holds(per_silo: Mapping[str, Sequence[float]]) -> bool:
    """Whether a gain is clear: its interval is above 0, whoever is left out.

    The rule of this project for "better", fixed before the results were looked at. It
    does not correct for the number of comparisons: say how many there were.
    """
    everyone = paired_interval(np.mean([*per_silo.values()], axis=0))
    others = without_each(per_silo).values()
    return min(everyone.low, *(interval.low for interval in others)) > 0


def tuned_rates(path: str | Path, dataset: str) -> dict[str, float]:
    """Learning rate of each approach, from recorded scores on validation data.

    path: CSV with dataset, lr, approach and balanced_accuracy, a row per seed, such as
    docs/results/tuning.csv. At the largest useful rate training is close to diverging,
    so the choice is the rate with the best mean score of itself and the next larger
    one of the grid. Returns {approach: rate}. Raises ValueError for a data set that
    was not tuned, naming those that were."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    tuned = sorted({row["dataset"] for row in rows})
    if dataset not in tuned:
        raise ValueError(
            f"no learning rates are recorded for {dataset!r}, only for "
            f"{', '.join(tuned)}; choose one of these, or record them first: "
            f"python -m experiments.tuning --dataset {dataset}"
        )
    scores: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        if row["dataset"] == dataset:
            of_rate = scores.setdefault(row["approach"], {})
            score = float(row["balanced_accuracy"])
            of_rate.setdefault(float(row["lr"]), []).append(score)
    return {approach: _steady_rate(of_rate) for approach, of_rate in scores.items()}


def _steady_rate(scores: Mapping[float, Sequence[float]]) -> float:
    rates = sorted(scores)
    means = [float(np.mean(scores[rate])) for rate in rates]
    pairs = [(a + b) / 2 for a, b in zip(means, means[1:], strict=False)]
    return rates[int(np.argmax(pairs))]


def judge(per_silo: Mapping[str, Sequence[float]]) -> tuple[Interval, bool]:
    """The interval of the mean over silos, and whether it is clear in either direction.

    Clear: `holds`, for the differences or for their negatives.
    """
    lost = {silo: -np.asarray(values) for silo, values in per_silo.items()}
    everyone = paired_interval(np.mean([*per_silo.values()], axis=0))
    return everyone, holds(per_silo) or holds(lost)
