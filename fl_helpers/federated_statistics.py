"""Mean, variance and histogram over all silos, without any row leaving its silo.

Each silo sends counts and sums of its own rows; the orchestrator combines them into
exactly what it would compute from the pooled rows (Chan, Golub and LeVeque 1979,
eq. 2.1). Needs only numpy: copy this file on its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Statistics:
    """What a silo sends about F columns; also what comes out of combining several."""

    silo: str
    count: int  # rows
    mean: np.ndarray  # float64 [F]
    squares: np.ndarray  # float64 [F], sum over rows of (value - mean)^2
    histogram: np.ndarray  # int64 [F, B], rows per bin

    @property
    def variance(self) -> np.ndarray:
        """Population variance [F]; `squares / (count - 1)` is the unbiased one."""
        return self.squares / self.count


def local_statistics(
    silo: str, x: np.ndarray, *, bin_edges: Sequence[float], min_rows: int = 10
) -> Statistics:
    """Summarize one silo's rows; this is all that leaves the silo.

    x: [N, F] numbers. bin_edges: B + 1 increasing edges, the same for every silo and
    fixed beforehand (an edge taken from the data would give a patient's value away);
    values beyond the outer edges count in the outer bins. min_rows: a silo with fewer
    rows refuses, because a mean of few patients describes the patients.
    Raises ValueError, naming the silo, for too few rows, NaN, or bad edges."""
    x = np.asarray(x, dtype=np.float64)
    edges = np.asarray(bin_edges, dtype=np.float64)
    if x.ndim != 2 or len(x) < min_rows:
        raise ValueError(
            f"silo {silo!r} must have at least {min_rows} rows [N, F] to release "
            f"statistics, got an array {x.shape}"
        )
    if not np.isfinite(x).all():
        raise ValueError(
            f"silo {silo!r} has {int((~np.isfinite(x)).sum())} NaN or infinite values; "
            "decide inside the silo what to do with missing ones"
        )
    if len(edges) < 2 or not (np.diff(edges) > 0).all():
        raise ValueError(f"bin_edges must be two or more, increasing, got {edges}")
    mean = x.mean(axis=0)
    inside = np.clip(x, edges[0], edges[-1])
    histogram = [np.histogram(column, bins=edges)[0] for column in inside.T]
    squares = ((x - mean) ** 2).sum(axis=0)
    return Statistics(silo, len(x), mean, squares, np.array(histogram))


def combine_statistics(parts: Iterable[Statistics], *, name: str = "all") -> Statistics:
    """Combine the silos' statistics into those of all rows, at the orchestrator.

    Raises ValueError for no parts, or for parts with different columns or bins."""
    first, *others = [*parts] or [None]
    if first is None:
        raise ValueError("no statistics to combine; at least one silo must take part")
    total = replace(first, silo=name)
    for part in others:
        if part.histogram.shape != total.histogram.shape:
            raise ValueError(
                f"silo {part.silo!r} sent {part.histogram.shape} (columns, bins), the "
                f"others {total.histogram.shape}; agree on both before"
            )
        total = _combine_two(total, part)
    return total


def _combine_two(a: Statistics, b: Statistics) -> Statistics:
    count = a.count + b.count
    difference = b.mean - a.mean
    mean = a.mean + difference * (b.count / count)
    squares = a.squares + b.squares + difference**2 * (a.count * b.count / count)
    return Statistics(a.silo, count, mean, squares, a.histogram + b.histogram)
