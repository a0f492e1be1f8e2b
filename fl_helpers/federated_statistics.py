"""Mean, variance, histogram and a table of patients; no row leaves its silo.

Each silo sends counts and sums of its own rows; the orchestrator combines them into
exactly what it would compute from the pooled rows (Chan, Golub and LeVeque 1979,
eq. 2.1). Needs only numpy: copy this file on its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

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


# -- the first table of a paper


class TooFew(ValueError):
    """A silo's refusal: its answer would describe too few patients."""

    code = "TOO_FEW"  # all that a real run says of it


@dataclass(frozen=True)
class Column:
    """What a silo sends about one column of numbers, or one category of a column.

    count: rows with a value. missing: rows without. mean, squares: as in `Statistics`;
    of a category the share of rows and n * share * (1 - share).
    """

    count: int
    missing: int
    mean: float
    squares: float

    @property
    def spread(self) -> float:
        """Standard deviation of the rows, with n - 1; NaN for fewer than two."""
        return (self.squares / (self.count - 1)) ** 0.5 if self.count > 1 else np.nan


def local_table(
    silo: str,
    columns: Mapping[str, np.ndarray],
    *,
    categories: Mapping[str, Sequence[str]] | None = None,
    min_rows: int = 10,
) -> dict[str, Column]:
    """One silo's part of a table of patients; this is all that leaves the silo.

    columns: {name: [N]}, numbers with NaN where missing, or for the names in categories
    the position of each row's category, -1 where missing. categories: {name: what its
    values are called}. min_rows: what describes 1 to min_rows - 1 rows, or all but so
    few, is left out: a small category, and the next smallest with it; a column with few
    values, or of which all but few are the same; a count of few missing ones shows as 0
    (who knows the number of rows can still take the count of the others from it).
    Returns {name or "name: category": Column}. Raises ValueError, naming the silo.
    """
    categories, found = categories or {}, {}
    rows = {len(values) for values in columns.values()}
    if len(rows) != 1:
        raise ValueError(f"silo {silo!r} must have columns of one length: {rows}")
    if min(rows) < min_rows:
        raise TooFew(f"silo {silo!r} must have at least {min_rows} rows")
    for name, values in columns.items():
        if name in categories:
            parts = _shares(silo, name, values, categories[name], min_rows)
            found |= {f"{name}: {label}": part for label, part in parts.items()}
        else:
            there = _numbers(silo, name, values)
            if len(there) >= min_rows and not few_differ(there, min_rows):
                missing = _unless_small(len(values) - len(there), min_rows)
                squares = float(((there - there.mean()) ** 2).sum())
                found[name] = Column(len(there), missing, float(there.mean()), squares)
    return found


def _numbers(
    silo: str, name: str, values: np.ndarray, *, keep: bool = False
) -> np.ndarray:
    """As float64; keep: with the missing ones, too."""
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except ValueError:
        raise ValueError(
            f"silo {silo!r}, column {name!r} holds text; give numbers, or list it in "
            "categories"
        ) from None
    if np.isinf(numbers).any():
        raise ValueError(f"silo {silo!r}, column {name!r} has infinite values")
    return numbers if keep else numbers[~np.isnan(numbers)]


def few_differ(values: np.ndarray, limit: int) -> bool:
    """Whether all but 1 to limit - 1 values are the same: a mean would count them."""
    return 0 < len(values) - np.unique(values, return_counts=True)[1].max() < limit


def _unless_small(count: int, limit: int) -> int:
    return 0 if count < limit else count


def _shares(
    silo: str, name: str, codes: np.ndarray, labels: Sequence[str], limit: int
) -> dict[str, Column]:
    codes = np.asarray(codes)
    if codes.dtype.kind not in "iu" or codes.min() < -1 or codes.max() >= len(labels):
        raise ValueError(
            f"silo {silo!r}, column {name!r} must hold positions 0 to "
            f"{len(labels) - 1}, or -1 for missing"
        )
    counts = np.bincount(codes[codes >= 0], minlength=len(labels))
    hidden = (counts > 0) & (counts < limit)
    if hidden.any() and counts[hidden].sum() < limit and (counts >= limit).any():
        hidden[np.where(counts >= limit, counts, counts.max() + 1).argmin()] = True
    n, missing = int(counts.sum()), _unless_small(int((codes < 0).sum()), limit)
    return {
        label: Column(n, missing, k / n, k * (1 - k / n))
        for label, k, secret in zip(labels, counts, hidden, strict=True)
        if n >= limit and not secret
    }


def combine_tables(tables: Mapping[str, Mapping[str, Column]]) -> dict[str, Column]:
    """All silos together, for each row of the table that every silo sent.

    A row that one silo held back is left out: the rest would stand for all.
    """
    parts = [tables[silo] for silo in sorted(tables)]
    if not parts:
        raise ValueError("no tables to combine; at least one silo must take part")
    names = [name for name in parts[0] if all(name in part for part in parts)]
    whole = {}
    for name in names:
        total, *others = (part[name] for part in parts)
        for one in others:
            count, difference = total.count + one.count, one.mean - total.mean
            mean = total.mean + difference * one.count / count
            between = difference**2 * total.count * one.count / count
            squares = total.squares + one.squares + between
            total = Column(count, total.missing + one.missing, mean, squares)
        whole[name] = total
    return whole


def standardised_difference(a: Column, b: Column) -> float:
    """How far two silos' means are apart, in standard deviations (Austin 2009, eq. 1).

    Above .1 is usually called a difference, whatever the number of patients.
    """
    variance = [part.squares / part.count for part in (a, b)]
    return abs(a.mean - b.mean) / max((sum(variance) / 2) ** 0.5, 1e-12)


def first_table(
    tables: Mapping[str, Mapping[str, Column]],
) -> list[dict[str, str | float]]:
    """The first table of a paper, from what the silos sent, as rows to print.

    tables: {silo: `local_table`}. Each row: "row", its name; a text per silo, mean and
    standard deviation of numbers, the share of a category, how many are missing where
    that was sent (few were not), "held back" where the silo did not send the row;
    "apart", the largest standardised difference between two silos.
    """
    rows = dict.fromkeys(name for table in tables.values() for name in table)
    found: list[dict[str, str | float]] = []
    for row in rows:
        sent = {silo: table[row] for silo, table in tables.items() if row in table}
        text = "{0.mean:.0%}" if ": " in row else "{0.mean:.1f} ± {0.spread:.1f}"
        parts = [*sent.values()]
        apart = max(standardised_difference(a, b) for a in parts for b in parts)
        line = dict.fromkeys(tables, "held back")
        for silo, part in sent.items():
            missing = f", {part.missing} missing" if part.missing else ""
            line[silo] = text.format(part) + missing
        found.append({"row": row} | line | {"apart": apart})
    return found


# -- the same as questions of a real run, each silo's answer for itself


def silo_table(
    data: Mapping[str, np.ndarray],
    *,
    categories: Mapping[str, Sequence[str]] | None = None,
    min_rows: int = 10,
) -> dict[str, np.ndarray]:
    """`local_table` as arrays: {row: [count, missing, mean, squares]}."""
    table = local_table("asked", data, categories=categories, min_rows=min_rows)
    return {
        row: np.array([part.count, part.missing, part.mean, part.squares])
        for row, part in table.items()
    }


def tables_of(
    answers: Mapping[str, Mapping[str, np.ndarray]],
) -> dict[str, dict[str, Column]]:
    """{silo: what `silo_table` answered} as the tables that `first_table` takes."""
    return {
        silo: {
            row: Column(int(v[0]), int(v[1]), float(v[2]), float(v[3]))
            for row, v in answer.items()
        }
        for silo, answer in answers.items()
    }


def unit_warnings(
    tables: Mapping[str, Mapping[str, Column]], *, factor: float = 30.0
) -> list[str]:
    """Silos whose numbers are of another order of magnitude, as a sentence for each.

    tables: {silo: `local_table`}. Compared is the root mean square of a column of
    numbers, which another unit multiplies by exactly its factor, with the median of all
    silos; of two silos with the other, so that both are named.
    """
    rows = dict.fromkeys(r for table in tables.values() for r in table if ": " not in r)
    said = []
    for row in rows:
        size = {
            silo: (table[row].mean ** 2 + table[row].squares / table[row].count) ** 0.5
            for silo, table in sorted(tables.items())
            if row in table
        }
        for silo, own in size.items():
            others = [v for other, v in size.items() if other != silo] or [0.0]
            usual = float(np.median(others if len(others) < 2 else [*size.values()]))
            if usual > 0 and not usual / factor < own < usual * factor:
                said.append(
                    f"silo {silo!r}, column {row!r}: values of about {own:.3g}, "
                    f"{usual:.3g} elsewhere; is it another unit, or 0 for missing?"
                )
    return said


SKETCH = 64  # numbers; see `silo_sketch`


def silo_sketch(
    data: Mapping[str, np.ndarray], *, min_rows: int = SKETCH
) -> dict[str, Any]:
    """A silo's rows as 64 sums, by which two silos with the same rows can be told.

    Each row has 64 signs, +1 or -1, from its hash; a silo sends their sums over its
    rows (Alon, Matias and Szegedy 1996), the number of rows, and how many repeat an
    earlier one. Whoever knows a whole row can test whether it is in, with a z of
    (64 / rows) ** 0.5, so a silo with fewer than 64 rows refuses, min_rows can only ask
    for more, and no setting changes the hash: asking again tells nothing new.
    """
    columns = [_numbers("asked", name, data[name], keep=True) for name in sorted(data)]
    table = np.column_stack(columns) + 0.0  # -0.0 is 0.0
    if len(table) < max(min_rows, SKETCH):
        raise TooFew(f"fewer than {max(min_rows, SKETCH)} rows; no sketch of so few")
    digests = [hashlib.sha256(row.tobytes()).digest()[: SKETCH // 8] for row in table]
    bits = np.unpackbits(np.frombuffer(b"".join(digests), np.uint8))
    signs = 2 * bits.reshape(len(table), SKETCH).astype(np.int64) - 1
    repeated = _unless_small(len(digests) - len({*digests}), 10)
    return {"sketch": signs.sum(axis=0), "rows": len(table), "repeated": repeated}


def copy_warnings(sketches: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Silos that hold the same rows, and rows that a silo holds twice, in sentences.

    sketches: {silo: `silo_sketch`}. The product of two sketches estimates how many
    pairs of rows are equal, with an error of about (rows * rows / 64) ** 0.5; said is
    what is above four errors and half of the smaller silo. So it finds a copy, of silos
    of like size, and no few patients in common; rows of a few yes-or-no columns are
    equal by chance, and are found, too.
    """
    said = [
        f"silo {silo!r}: {int(s['repeated'])} of {int(s['rows'])} rows repeat another"
        for silo, s in sorted(sketches.items())
        if int(s["repeated"])
    ]
    for (a, one), (b, other) in combinations(sorted(sketches.items()), 2):
        n = [int(part["rows"]) for part in (one, other)]
        same = float(one["sketch"] @ other["sketch"]) / SKETCH
        if same > max(4 * (n[0] * n[1] / SKETCH) ** 0.5, min(n) / 2):
            said.append(
                f"silos {a!r} and {b!r}: about {same:.0f} equal pairs of rows, of "
                f"{n[0]} and {n[1]}; is one a copy of the other?"
            )
    return said
