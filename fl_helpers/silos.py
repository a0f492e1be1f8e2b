"""Silos, and ways to divide one data set among them.

A partitioner says which rows go to which silo, {silo name: row indices}; every row is
in exactly one silo. `make_silos` turns that into tensors, with a stratified test set
per silo. Needs only numpy and torch: copy this file on its own.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

Partition = dict[str, np.ndarray]  # silo name -> row indices, int64
Sides = tuple[list[np.ndarray], list[np.ndarray]]  # row indices for training, testing


class Examples(NamedTuple):
    """Model inputs x [N, ...] float32 and class indices y [N] int64."""

    x: Tensor
    y: Tensor


class Rows(Dataset):
    """Some rows of a Dataset, read when they are asked for, with their labels.

    examples: (x, y) by index. rows: int [n] of them. y: class indices int64 [n].
    """

    def __init__(self, examples: Any, rows: np.ndarray, y: Tensor) -> None:
        self.examples, self.rows, self.y = examples, np.asarray(rows), y

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        return self.examples[int(self.rows[row])]


@dataclass(frozen=True)
class Silo:
    """One hospital's data: what it trains on, and what it is tested on.

    Each is `Examples` in memory, or any Dataset of (x, y), such as `Rows`.
    """

    name: str
    train: Examples | Dataset
    test: Examples | Dataset


def partition_iid(y: np.ndarray, num_silos: int, *, seed: int) -> Partition:
    """Deal the shuffled rows out in equal shares (sizes differ by at most one)."""
    order = np.random.default_rng(seed).permutation(_check_labels(y, num_silos))
    return _named(np.array_split(order, num_silos))


def partition_by_quantity(
    y: np.ndarray, shares: Sequence[float], *, seed: int, num_rows: int | None = None
) -> Partition:
    """Deal the rows out in unequal shares, each class in the same proportion.

    shares: one positive number per silo, relative (they need not sum to 1); each silo
    gets at least one row. num_rows: deal out only so many rows, drawn at random, and
    leave the others to nobody."""
    weights = np.asarray(shares, dtype=float)
    if not (weights > 0).all():
        raise ValueError(f"shares must all be > 0, got {list(shares)}")
    _check_labels(y, len(weights))
    if num_rows is not None and not len(weights) <= num_rows <= len(y):
        raise ValueError(
            f"num_rows={num_rows}, but there are only {len(y)} rows, for "
            f"{len(weights)} silos; choose {len(weights)} to {len(y)}"
        )
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(rows) for rows in _rows_by_class(y)]
    # Where a row stands in its class, 0..1: any stretch has the overall mix.
    place = np.concatenate([(np.arange(len(r)) + 0.5) / len(r) for r in rows])
    dealt = np.concatenate(rows)[np.argsort(place, kind="stable")][:num_rows]
    ends = (np.cumsum(weights / weights.sum())[:-1] * len(dealt)).round().astype(int)
    # No silo may be empty: each end lies at least 1 behind the one before, the first at
    # 1 or later. Less its index (1, 2, ...), an end need then only never fall, which a
    # running maximum sees to; the clip leaves a row for each silo still to come.
    index, spare = np.arange(1, len(weights)), len(dealt) - len(weights)
    ends = index + np.clip(np.maximum.accumulate(ends - index), 0, spare)
    return _named(np.split(dealt, ends))


def partition_dirichlet(
    y: np.ndarray,
    num_silos: int,
    alpha: float,
    *,
    seed: int,
    min_per_class: int = 0,
    max_draws: int = 1000,
) -> Partition:
    """Skew the label mix: each class is divided by shares drawn from Dirichlet(alpha).

    (Hsu et al. 2019 draw a mix per silo; we divide per class, as Yurochkin et al. 2019,
    so that every row is used.)

    y: class indices [N].
    num_silos: 1 to N.
    alpha: > 0; 100 is nearly IID, 0.1 leaves most of a class in one silo.
    seed: same seed, same partition.
    min_per_class: draw again until each silo has that many rows of each class.
    max_draws: after so many, raises ValueError."""
    if alpha <= 0:
        raise ValueError(f"alpha must be > 0, got {alpha}; 0.1 is skewed, 100 near IID")
    _check_labels(y, num_silos)
    rng = np.random.default_rng(seed)
    rows = _rows_by_class(y)
    for _ in range(max_draws):
        shares = rng.dirichlet([alpha] * num_silos, size=len(rows))  # [K, silos]
        by_class = [_split(r, s, rng) for r, s in zip(rows, shares, strict=True)]
        fewest = min(len(part) for parts in by_class for part in parts)
        parts = [np.concatenate(parts) for parts in zip(*by_class, strict=True)]
        if fewest >= min_per_class and min(map(len, parts)) > 0:
            return _named(parts)
    raise ValueError(
        f"none of {max_draws} draws at alpha={alpha} gave each of {num_silos} silos a "
        f"row and {min_per_class} of each class; use a larger alpha, fewer silos or a "
        "smaller min_per_class"
    )


def partition_by_counts(
    y: np.ndarray, counts: Mapping[str, Sequence[int]], *, seed: int
) -> Partition:
    """Give each silo exactly so many rows of each class, drawn at random.

    counts: {silo: rows per class}, at least one row per silo. Rows that nobody asks for
    go to nobody. Raises ValueError, naming the class, if there are too few rows."""
    _check_labels(y, len(counts))
    table = np.array([list(row) for row in counts.values()])
    if table.ndim != 2 or (table < 0).any() or not table.sum(axis=1).all():
        raise ValueError(f"each silo needs a row of some class, got {dict(counts)}")
    rng, pieces = np.random.default_rng(seed), []
    for k, wanted in enumerate(table.T):
        rows = rng.permutation(np.flatnonzero(y == k))
        if wanted.sum() > len(rows):
            raise ValueError(
                f"class {k} has {len(rows)} rows, the silos want {wanted.sum()}; ask "
                "for fewer"
            )
        pieces.append(np.split(rows, np.cumsum(wanted))[:-1])
    parts = [np.sort(np.concatenate(own)) for own in zip(*pieces, strict=True)]
    return dict(zip(counts, parts, strict=True))


def partition_by_site(site: np.ndarray) -> Partition:
    """Keep each hospital's rows together: the natural federation. site: str [N]."""
    if len(site) == 0:
        raise ValueError("no rows to partition")
    return {str(name): np.flatnonzero(site == name) for name in sorted(set(site))}


def make_silos(
    x: np.ndarray | Dataset,
    y: np.ndarray,
    partition: Mapping[str, np.ndarray],
    *,
    test_share: float,
    seed: int,
    patients: np.ndarray | None = None,
) -> list[Silo]:
    """Build the silos of a partition, each with its own stratified test set.

    x: images uint8 [N, H, W] or [N, H, W, C], a table [N, F] of numbers, or a Dataset
        of N examples, of which the silos are `Rows`: nothing is read here.
    y: [N] class indices.
    partition: {silo name: row indices}.
    test_share: share of each class in each silo that is held out, in (0, 1).
    seed: a silo's split is drawn from (seed, its name) alone, so it depends neither on
        the other silos nor on their order.
    patients: [N], whose row it is: all rows of a patient go to one side, and the shares
        are kept as well as that allows. None: each row is a patient of its own.

    Returns the silos in the order of names. Raises ValueError, naming the silo, if its
    training or test set would be empty, and for a patient in two silos."""
    if not 0 < test_share < 1:
        raise ValueError(f"test_share must lie between 0 and 1, got {test_share}")
    if len(x) != len(y) or patients is not None and len(patients) != len(y):
        raise ValueError(
            f"x has {len(x)} rows, y {len(y)}, patients "
            f"{len(y if patients is None else patients)}; give one of each per row"
        )
    if patients is not None:
        _check_patients(patients, partition)
    silos = []
    for name in sorted(partition):
        rows = np.asarray(partition[name])
        labels = torch.as_tensor(y[rows], dtype=torch.long)
        array = isinstance(x, np.ndarray)
        whole = Examples(to_tensor(x[rows]), labels) if array else Rows(x, rows, labels)
        who = None if patients is None else patients[rows]
        how = {"test_share": test_share, "seed": seed, "patients": who}
        silos.append(split_silo(name, whole, **how))
    return silos


def split_silo(
    name: str,
    examples: Examples | Rows,
    *,
    test_share: float,
    seed: int,
    patients: np.ndarray | None = None,
) -> Silo:
    """Hold out a stratified share of one silo's examples; at least one of each side.

    Also makes the validation split: pass a silo's training examples, and tune on the
    `test` of what comes back. patients: as in `make_silos`, of these examples."""
    if len(examples.y) == 0:
        raise ValueError(f"silo {name!r} has no rows to split; leave it out")
    rng, y = _silo_rng(seed, name), examples.y.numpy()
    if patients is None:
        train, test = _split_rows(y, test_share, rng)
    else:
        train, test = _split_patients(y, np.asarray(patients), test_share, rng)
    parts = [torch.from_numpy(np.sort(np.concatenate(part))) for part in (train, test)]
    if min(map(len, parts)) == 0:
        who, remedy = f"{len(y)} rows", "give it more rows"
        if patients is not None:
            who += f" of {len(np.unique(patients))} patient(s)"
            remedy = "give it more patients, or see to it that they are told apart"
        raise ValueError(
            f"silo {name!r} with {who} has {len(parts[0])} for training and "
            f"{len(parts[1])} for testing at test_share={test_share}; {remedy}"
        )
    return Silo(name, *(_take(examples, part) for part in parts))


def pool_silos(silos: Sequence[Silo], *, name: str = "centralized") -> Silo:
    """Put all silos' data in one place: the reference that the law forbids."""
    sides = [(silo.train, silo.test) for silo in silos]
    return Silo(name, *(_join(p) for p in zip(*sides, strict=True)))


def scale_silos(
    silos: Sequence[Silo], mean: np.ndarray, spread: np.ndarray
) -> list[Silo]:
    """Scale table columns, training and test rows, to (x - mean) / spread.

    mean, spread: [F], the same for all silos, from training rows only, such as the
    mean and the root of the variance that `combine_statistics` finds without pooling.
    A spread of 0 (a constant column) counts as 1. Returns new silos."""
    spread = np.where(np.asarray(spread) == 0, 1.0, spread)
    center, unit = (torch.as_tensor(v, dtype=torch.float32) for v in (mean, spread))

    def scaled(part: Examples) -> Examples:
        return Examples((part.x - center) / unit, part.y)

    return [Silo(s.name, scaled(s.train), scaled(s.test)) for s in silos]


def summarize_silos(
    silos: Sequence[Silo], classes: Sequence[str]
) -> list[dict[str, str | int]]:
    """Rows per silo and class, as one dict per silo (`pandas.DataFrame` shows them)."""
    table: list[dict[str, str | int]] = []
    for silo in silos:
        counts = torch.bincount(silo.train.y, minlength=len(classes))
        row: dict[str, str | int] = {"silo": silo.name}
        row |= {"train": len(silo.train.y), "test": len(silo.test.y)}
        row |= {c: int(n) for c, n in zip(classes, counts, strict=True)}
        table.append(row)
    return table


def to_tensor(x: np.ndarray) -> Tensor:
    """Turn images or a table into model inputs, float32.

    Images uint8 [N, H, W] or [N, H, W, C] become [N, C, H, W], scaled by the same
    constants everywhere, (pixel / 255 - 0.5) / 0.25: a mean taken over all hospitals'
    images would already be a use of pooled data. Tables [N, F] are only converted."""
    if x.ndim == 2:
        return torch.as_tensor(x, dtype=torch.float32)
    if x.dtype != np.uint8 or x.ndim not in (3, 4):
        raise ValueError(
            f"expected uint8 images [N, H, W] or [N, H, W, C] or a table [N, F], "
            f"got {x.dtype} {x.shape}"
        )
    images = torch.from_numpy(np.ascontiguousarray(x))
    images = images.unsqueeze(1) if x.ndim == 3 else images.permute(0, 3, 1, 2)
    return images.float().div_(255).sub_(0.5).div_(0.25).contiguous()


def _take(examples: Examples | Rows, rows: Tensor) -> Examples | Rows:
    if isinstance(examples, Rows):
        return Rows(examples.examples, examples.rows[rows.numpy()], examples.y[rows])
    return Examples(examples.x[rows], examples.y[rows])


def _join(parts: Sequence[Any]) -> Examples | Rows:
    labels = torch.cat([part.y for part in parts])
    if all(isinstance(part, Examples) for part in parts):
        return Examples(torch.cat([part.x for part in parts]), labels)
    return Rows(ConcatDataset(parts), np.arange(len(labels)), labels)


def _split_rows(y: np.ndarray, test_share: float, rng: np.random.Generator) -> Sides:
    train, test = [], []
    for rows in _rows_by_class(y):
        rows = rng.permutation(rows)
        held_out = round(test_share * len(rows))
        test.append(rows[:held_out])
        train.append(rows[held_out:])
    return train, test


def _split_patients(
    y: np.ndarray, patients: np.ndarray, test_share: float, rng: np.random.Generator
) -> Sides:
    """Patients in random order, each held out if its rows bring the shares of the
    classes nearer to what they should be."""
    classes = np.unique(y)
    wanted = np.array([test_share * (y == k).sum() for k in classes])
    train, test = [], []
    for patient in rng.permutation(np.unique(patients)):
        rows = np.flatnonzero(patients == patient)
        left = wanted - [(y[rows] == k).sum() for k in classes]
        nearer = np.abs(left).sum() < np.abs(wanted).sum()
        (test if nearer else train).append(rows)
        wanted = left if nearer else wanted
    for few, many in ((test, train), (train, test)):
        if not few and len(many) > 1:  # so few patients that none would do
            few.append(many.pop())
    none = [np.array([], int)]  # so that there is something to join
    return train or none, test or none


def _check_patients(patients: np.ndarray, partition: Mapping[str, np.ndarray]) -> None:
    of_silo = {name: set(patients[rows].tolist()) for name, rows in partition.items()}
    names = sorted(of_silo)
    for number, name in enumerate(names):
        for other in names[number + 1 :]:
            both = sorted(of_silo[name] & of_silo[other])
            if both:
                raise ValueError(
                    f"patient {both[0]!r} has rows in {name!r} and in {other!r}; "
                    "divide by patient; if silos count their own, put a name before"
                )


def _silo_rng(seed: int, name: str) -> np.random.Generator:
    """Generator of one silo; crc32 and not hash(), which differs between processes."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _rows_by_class(y: np.ndarray) -> list[np.ndarray]:
    return [np.flatnonzero(y == k) for k in np.unique(y)]


def _split(
    rows: np.ndarray, shares: np.ndarray, rng: np.random.Generator
) -> list[np.ndarray]:
    """Cut shuffled rows at the cumulative shares; nothing is lost to rounding."""
    cuts = np.cumsum(shares / shares.sum())[:-1] * len(rows)
    return np.split(rng.permutation(rows), cuts.round().astype(int))


def _named(parts: Sequence[np.ndarray]) -> Partition:
    names = [f"Hospital {_letters(k)}" for k in range(len(parts))]
    return {name: np.sort(rows) for name, rows in zip(names, parts, strict=True)}


def _letters(index: int) -> str:
    """0, 1, ... as A, B, ..., Z, AA, AB, ..."""
    rounds, letter = divmod(index, 26)
    return (_letters(rounds - 1) if rounds else "") + chr(ord("A") + letter)


def _check_labels(y: np.ndarray, num_silos: int) -> int:
    """Number of rows, after checking that they can be divided among the silos."""
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"y must be class indices [N], got {y.dtype} {y.shape}")
    if not 1 <= num_silos <= len(y):
        raise ValueError(f"cannot divide {len(y)} rows among {num_silos} silos")
    return len(y)
