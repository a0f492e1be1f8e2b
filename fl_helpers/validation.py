"""Is a model good at each hospital? Validation without training, from counts and sums.

A model is sent to the silos; functions that begin with `silo_` run there, on the scores
that it gives to the silo's own patients, and return only counts and sums. The others
run at the orchestrator. For a class of several, give its score and whether a patient
has it. Calibration slope and recalibration are a logistic regression on `logit(score)`:
`regression.fit_logistic`. Needs numpy and scipy: copy this file on its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

Counts = Mapping[str, np.ndarray]


class Scored(NamedTuple):
    """One silo's patients: what the model says, and what is true.

    score: [N] in [0, 1], the probability that the model gives. y: [N] bool, whether the
    patient has the disease. group: [N] whole numbers from 0, each patient's subgroup.
    """

    score: np.ndarray
    y: np.ndarray
    group: np.ndarray


class Paired(NamedTuple):
    """Two models at a silo: score and second, [N] in [0, 1], and y, [N] bool."""

    score: np.ndarray
    second: np.ndarray
    y: np.ndarray


class TooFew(ValueError):
    """A silo's refusal: an answer would describe too few patients."""

    code = "TOO_FEW"  # all that a real run says of it


def _check(data: Scored, min_count: int) -> None:
    score, y, group = (np.asarray(part) for part in data)
    if not (score.ndim == 1 and score.shape == y.shape == group.shape):
        raise ValueError(
            f"score, y and group must be [N], got {score.shape}, {y.shape} and "
            f"{group.shape}"
        )
    if y.dtype != bool or group.dtype.kind not in "iu" or (group < 0).any():
        raise ValueError("y must be bool, group whole numbers from 0 on")
    if not ((score >= 0) & (score <= 1)).all():  # also refuses NaN
        raise ValueError(
            "scores must be probabilities, 0 to 1; a model that gives logits needs a "
            "sigmoid or softmax"
        )
    ill = int(y.sum())
    if any(n < max(1, min_count) for n in (ill, len(y) - ill)):
        raise TooFew(
            f"fewer than {max(1, min_count)} patients with or without the disease; an "
            "answer would describe them"
        )


def logit(score: np.ndarray, *, edge: float = 1e-6) -> np.ndarray:
    """log(score / (1 - score)); scores nearer to 0 or 1 than `edge` count as `edge`."""
    inside = np.clip(np.asarray(score, dtype=np.float64), edge, 1 - edge)
    return np.log(inside / (1 - inside))


def recalibrate(score: np.ndarray, beta: Sequence[float]) -> np.ndarray:
    """Scores of the same order with a silo's own intercept and slope, beta [2].

    beta: of a logistic regression of y on `logit(score)`, from other patients of the
    silo than those that the result is tested on (Steyerberg 2009, ch. 20).
    """
    return 1 / (1 + np.exp(-(beta[0] + beta[1] * logit(score))))


# -- discrimination: does it rank the ill above the healthy?


def silo_ranking(data: Scored, *, min_count: int = 10) -> dict[str, float]:
    """Pairs of an ill and a healthy patient of this silo that the model ranks rightly.

    Returns concordant, tied and pairs (numbers, exact): their sums over silos give the
    AUROC within silos, without comparing patients of different ones.
    """
    _check(data, min_count)
    ill, healthy = data.score[data.y], np.sort(data.score[~data.y])
    below = np.searchsorted(healthy, ill, side="left")
    upto = np.searchsorted(healthy, ill, side="right")
    found = {"concordant": float(below.sum()), "tied": float((upto - below).sum())}
    return found | {"pairs": float(len(ill) * len(healthy))}


def auroc_of(ranking: Mapping[str, Any]) -> float:
    """AUROC from one silo's `silo_ranking`, or from the sums over silos."""
    right = float(ranking["concordant"]) + float(ranking["tied"]) / 2
    return right / float(ranking["pairs"])


class Estimate(NamedTuple):
    """A value with its standard error."""

    value: float
    error: float

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Normal interval, (low, high)."""
        half = float(stats.norm.ppf((1 + confidence) / 2)) * self.error
        return self.value - half, self.value + half


def auroc(score: np.ndarray, y: np.ndarray) -> Estimate:
    """AUROC of one silo's patients, with the standard error of DeLong et al. (1988)."""
    wins = _placements(score, y)
    return Estimate(float(wins[0].mean()), _spread(wins) ** 0.5)


def auroc_difference(a: np.ndarray, b: np.ndarray, y: np.ndarray) -> Estimate:
    """AUROC of scores a minus that of b, of the same patients, with DeLong's error.

    `silo_auroc_difference` lets these two numbers leave; `regression.meta_analysis`
    combines those of several silos.
    """
    pairs = zip(_placements(a, y), _placements(b, y), strict=True)
    wins = tuple(first - second for first, second in pairs)
    return Estimate(float(wins[0].mean()), _spread(wins) ** 0.5)


def silo_auroc_difference(data: Paired, *, min_count: int = 10) -> dict[str, float]:
    """`auroc_difference` of the second model minus the first, at this silo.

    Returns value and error: of each silo for itself, they do not add. min_count: of the
    ill, the healthy, and the patients whose two scores differ, if any do. Raises
    `TooFew`, and ValueError for scores that are no probabilities.
    """
    for score in (data.score, data.second):
        _check(Scored(score, data.y, np.zeros(len(data.y), int)), min_count)
    if 0 < (data.score != data.second).sum() < min_count:
        raise TooFew(f"the models differ on fewer than {min_count} patients")
    return auroc_difference(data.second, data.score, data.y)._asdict()


def _placements(score: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each ill patient the share of the healthy below, and the other way round."""
    ill, healthy = np.sort(score[y]), np.sort(score[~y])
    if min(len(ill), len(healthy)) < 2:
        raise ValueError("AUROC needs two patients with and two without the disease")

    def below(of: np.ndarray, among: np.ndarray) -> np.ndarray:
        ends = (np.searchsorted(among, of, side=side) for side in ("left", "right"))
        return sum(ends) / (2 * len(among))

    return below(score[y], healthy), 1 - below(score[~y], ill)


def _spread(wins: tuple[np.ndarray, np.ndarray]) -> float:
    return float(sum(part.var(ddof=1) / len(part) for part in wins))


# -- curves, from counts by score


def silo_score_counts(
    data: Scored, *, bins: int, min_count: int = 10
) -> dict[str, np.ndarray]:
    """Patients with and without the disease, by score in equal bins from 0 to 1.

    min_count: no bin may have 1 to min_count - 1 patients of a kind; 0 where only the
    sum over silos is seen, with the rule applied there. Returns int64 [bins] ill,
    healthy, and float [bins] score (sum of the scores in a bin), brier (one number, the
    sum of squared errors). Raises `TooFew`; ask again with fewer bins.
    """
    _check(data, min_count)
    place = np.minimum((data.score * bins).astype(np.int64), bins - 1)
    ill, healthy = (
        np.bincount(place[rows], minlength=bins) for rows in (data.y, ~data.y)
    )
    if any(((0 < n) & (n < min_count)).any() for n in (ill, healthy)):
        raise TooFew(
            f"a bin of scores has fewer than {min_count} patients; ask with fewer bins"
        )
    score = np.bincount(place, weights=data.score, minlength=bins)
    brier = float(((data.score - data.y) ** 2).sum())
    return {"ill": ill, "healthy": healthy, "score": score, "brier": np.array(brier)}


def finest_counts(
    data: Scored, *, most: int = 10, min_count: int = 10
) -> dict[str, np.ndarray]:
    """`silo_score_counts` with as many bins, `most` at the most, as the rule permits.

    For one silo's own curve: silos may end with different numbers of bins. Answer it
    once; a second answer with other bins could be subtracted. Raises `TooFew` if one
    bin is too many.
    """
    for bins in range(most, 1, -1):
        try:
            return silo_score_counts(data, bins=bins, min_count=min_count)
        except TooFew:
            continue
    return silo_score_counts(data, bins=1, min_count=min_count)


def auroc_bounds(counts: Counts) -> tuple[float, float, float]:
    """AUROC over all patients from counts by score: (lowest, middle, highest) possible.

    Pairs in one bin may be ranked either way; the middle takes half of them as right.
    """
    ill, healthy = counts["ill"].astype(float), counts["healthy"].astype(float)
    before = np.concatenate([[0.0], np.cumsum(healthy)[:-1]])
    pairs = ill.sum() * healthy.sum()
    low, tied = float(ill @ before / pairs), float(ill @ healthy / pairs)
    return low, low + tied / 2, low + tied


def average_precision(counts: Counts) -> float:
    """Mean precision over the ill, thresholds at the bins' lower edges, from above."""
    ill, healthy = counts["ill"][::-1].astype(float), counts["healthy"][::-1]
    found, called = np.cumsum(ill), np.cumsum(ill + healthy)
    precision = np.divide(found, called, out=np.zeros_like(found), where=called > 0)
    return float(precision @ ill / ill.sum())


def average_precision_bounds(counts: Counts) -> tuple[float, float]:
    """(lowest, highest) average precision that scores with these counts can have.

    Lowest: in each bin the healthy rank above the ill; highest: all ill of a bin share
    a score, and no healthy patient of the bin has one as high.
    """
    low, high, above = [], [], np.zeros(2)
    for bin_counts in zip(counts["ill"][::-1], counts["healthy"][::-1], strict=True):
        ill, healthy = map(int, bin_counts)
        found = above[0] + np.arange(1, ill + 1)
        low += [*(found / (found + above[1] + healthy))]
        high += [(above[0] + ill) / max(above.sum() + ill, 1)] * ill
        above += ill, healthy
    return float(np.mean(low)), float(np.mean(high))


def brier_score(counts: Counts) -> float:
    """Mean squared error of the probabilities."""
    return float(counts["brier"]) / float(counts["ill"].sum() + counts["healthy"].sum())


class Bin(NamedTuple):
    """A point of a calibration curve: mean score, share of the ill and its interval."""

    patients: int
    score: float
    share: float
    low: float
    high: float


def calibration_curve(counts: Counts, *, confidence: float = 0.95) -> list[Bin]:
    """Mean score against the share that is ill, for each bin that has patients."""
    curve = []
    for ill, healthy, score in zip(
        *(counts[name] for name in ("ill", "healthy", "score")), strict=True
    ):
        patients = int(ill + healthy)
        if patients:
            ends = share_interval(int(ill), patients, confidence=confidence)
            curve.append(Bin(patients, score / patients, ill / patients, *ends))
    return curve


def net_benefit(counts: Counts) -> dict[str, np.ndarray]:
    """Decision curves (Vickers and Elkin 2006) at thresholds between bins.

    Returns threshold [bins - 1], and per patient the net benefit of calling those at or
    above it by the model, of calling all, and of calling none (0). One true positive
    counts 1, a false positive threshold / (1 - threshold).
    """
    ill, healthy = counts["ill"].astype(float), counts["healthy"].astype(float)
    n, bins = ill.sum() + healthy.sum(), len(ill)
    threshold = np.arange(1, bins) / bins
    price = threshold / (1 - threshold)
    true, false = (np.cumsum(part[::-1])[::-1][1:] for part in (ill, healthy))
    model = (true - price * false) / n
    everyone = (ill.sum() - price * healthy.sum()) / n
    return {"threshold": threshold, "model": model, "all": everyone, "none": 0 * model}


# -- a threshold, and subgroups


def silo_confusion(
    data: Scored, *, threshold: float, groups: int, min_count: int = 10
) -> dict[str, np.ndarray]:
    """True and false positives and negatives at a threshold, for each subgroup.

    groups: how many there are. min_count: a subgroup with fewer ill or healthy patients
    (but some) is withheld: its row is 0. If that is one alone, or those withheld are
    too few together, the next smallest is withheld too, since the total minus the
    others would give them away. The rule is about whom a share is of: of ten ill
    patients, that one was missed is said.
    Returns counts int64 [groups, 4] (true positives, false negatives, false positives,
    true negatives) and withheld [groups], 0 or 1; its sum over silos says in how many
    silos a subgroup is missing.
    """
    _check(data, min_count)
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must lie between 0 and 1, got {threshold}")
    if data.group.max() >= groups:
        raise ValueError(f"some patients are in none of {groups} groups, 0 and up")
    kind = 2 * ~data.y + (data.score < threshold)
    counts = np.bincount(data.group * 4 + kind, minlength=4 * groups).reshape(groups, 4)
    withheld = _withheld(counts.reshape(groups, 2, 2).sum(axis=2), min_count)
    counts[withheld] = 0
    return {"counts": counts, "withheld": withheld.astype(np.int64)}


def _withheld(kinds: np.ndarray, min_count: int) -> np.ndarray:
    """Which subgroups do not leave; kinds: [groups, 2], the ill and the healthy."""
    there = kinds.sum(axis=1) > 0
    withheld = there & (kinds.min(axis=1) < min_count)
    while withheld.any() and (there & ~withheld).any():
        together = kinds[withheld].sum(axis=0)
        if withheld.sum() > 1 and not ((0 < together) & (together < min_count)).any():
            break
        others = np.where(there & ~withheld, kinds.sum(axis=1), np.iinfo(np.int64).max)
        withheld[int(others.argmin())] = True
    return withheld


class Share(NamedTuple):
    """A share with its interval and the number of patients that it is of."""

    value: float
    low: float
    high: float
    patients: int


def sensitivity(counts: Sequence[int], *, confidence: float = 0.95) -> Share:
    """Share of the ill that are called ill; counts: a row of `silo_confusion`."""
    return _share(counts[0], counts[0] + counts[1], confidence)


def specificity(counts: Sequence[int], *, confidence: float = 0.95) -> Share:
    """Share of the healthy that are not called ill."""
    return _share(counts[3], counts[2] + counts[3], confidence)


def _share(hits: int, patients: int, confidence: float) -> Share:
    if patients == 0:
        return Share(float("nan"), 0.0, 1.0, 0)
    ends = share_interval(int(hits), int(patients), confidence=confidence)
    return Share(int(hits) / int(patients), *ends, int(patients))


def share_interval(
    hits: int, patients: int, *, confidence: float = 0.95
) -> tuple[float, float]:
    """Wilson's score interval of hits / patients."""
    found = stats.binomtest(hits, patients).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)
