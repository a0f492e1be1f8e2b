"""Questions that need only sums over silos: statistics, regression, survival, trees.

A question is a function of one silo's data and plain settings that returns named
arrays; the orchestrator sees their sums. So the same function runs in a simulation, in
a real run, and below secure sums. Needs only numpy: copy this file on its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Arrays = dict[str, np.ndarray]
SiloFunction = Callable[..., Mapping[str, Any]]


class Ask(Protocol):
    """Asks every silo and returns the sums: ask(function, setting=value, ...).

    function(data, **settings) runs in each silo, with the silo's own data; it returns
    {name: number or array}, the same names and shapes in all silos.
    """

    def __call__(self, function: SiloFunction, **settings: Any) -> Arrays: ...


class TooFew(ValueError):
    """A silo's refusal: the answer would describe too few rows."""

    code = "TOO_FEW"  # all that a real run says of it


def ask_silos(data: Mapping[str, Any]) -> Ask:
    """The `Ask` of a simulation: all silos' data are here, in one process.

    data: {silo: its data}, whatever the functions take. Sums are float64, or int64 if
    all answers are integers, added in the order of silo names: the same bits whatever
    the order of `data`. The `Ask` raises what a silo's function raises, with the
    silo's name in front if it is a ValueError, and ValueError as `add_answers` does.
    """
    if not data:
        raise ValueError("no silos to ask")

    def ask(function: SiloFunction, **settings: Any) -> Arrays:
        return add_answers(
            (silo, _answer(silo, function, data[silo], settings))
            for silo in sorted(data)
        )

    return ask


def _answer(
    silo: str, function: SiloFunction, data: Any, settings: Mapping[str, Any]
) -> Mapping[str, Any]:
    try:
        return function(data, **settings)
    except ValueError as error:
        raise type(error)(f"silo {silo!r}: {error}") from error


def add_answers(answers: Iterable[tuple[str, Mapping[str, Any]]]) -> Arrays:
    """Sum what silos answered, in the order given.

    answers: (silo, {name: number or array}) of each. Raises ValueError, naming the
    silo, for other names or shapes than the first silo's, for what is no number, and
    for NaN or infinite values; and for no answers.
    """
    total: Arrays = {}
    first = ""
    for silo, answer in answers:
        arrays = as_arrays(silo, answer)
        if not first:
            first, total = silo, arrays
            continue
        if arrays.keys() != total.keys():
            differ = sorted(arrays.keys() ^ total.keys())
            raise ValueError(f"silo {silo!r} and {first!r} differ in {differ[:3]}")
        for name, value in arrays.items():
            if value.shape != total[name].shape:
                raise ValueError(
                    f"silo {silo!r} sent {name!r} as {list(value.shape)}, {first!r} "
                    f"as {list(total[name].shape)}; agree on columns and bins before"
                )
            total[name] = total[name] + value
    if not first:
        raise ValueError("no answers to add; at least one silo must take part")
    return total


def as_arrays(silo: str, answer: Mapping[str, Any]) -> Arrays:
    """A silo's answer as float64, or int64 for whole numbers.

    Raises ValueError, naming the silo, for what is no number, and for NaN or infinity.
    """
    return {name: _as_numbers(silo, name, value) for name, value in answer.items()}


def _as_numbers(silo: str, name: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise ValueError(
            f"silo {silo!r} sent {name!r} as {array.dtype}, not as numbers"
        )
    array = array.astype(np.float64 if array.dtype.kind == "f" else np.int64)
    if not np.isfinite(array).all():
        raise ValueError(f"silo {silo!r} sent NaN or infinite values in {name!r}")
    return array


def check_count(count: int, *, minimum: int, what: str = "rows") -> None:
    """The small-cell rule for a whole answer: raises `TooFew` for 1 to minimum - 1.

    0 passes: that a silo has no such rows is no statement about one of them.
    """
    if 0 < count < minimum:
        raise TooFew(f"fewer than {minimum} {what}; an answer would describe patients")


def suppress_small(counts: Any, *, minimum: int = 10) -> np.ndarray:
    """A table of counts whose small cells cannot be found from its margins.

    counts: [R] or [R, C] whole numbers >= 0 whose row and column sums may be known.
    Cells from 1 to minimum - 1 become NaN. If a row or column then has hidden cells
    that add up to less than `minimum`, or just one hidden cell (the margin minus the
    others would give it away), the smallest cell that is left there is hidden too,
    zeros last, until nothing changes (complementary suppression; Hundepool et al. 2012,
    ch. 4), and until no hidden cell follows from several margins together. Returns
    float64, NaN where hidden. Raises ValueError for other counts.
    """
    table = np.asarray(counts)
    if table.ndim not in (1, 2) or table.dtype.kind not in "iu" or (table < 0).any():
        raise ValueError(
            f"counts must be whole numbers >= 0 [R] or [R, C], got {table.dtype} "
            f"{list(table.shape)}"
        )
    values = np.atleast_2d(table).astype(np.float64)
    hidden = (values > 0) & (values < minimum)
    while any(
        [
            _hide_one_more(line, mask, minimum)
            for lines, masks in ((values, hidden), (values.T, hidden.T))
            for line, mask in zip(lines, masks, strict=True)
            if len(line) > 1
        ]
    ) or _hide_near_found(values, hidden):
        pass
    return np.where(hidden, np.nan, values).reshape(table.shape)


def _hide_near_found(values: np.ndarray, hidden: np.ndarray) -> bool:
    """Hide a cell more (in place) if margins have one solution only for a hidden one.

    Such a cell is the same in all solutions: 0 in each vector of the null space.
    """
    if not hidden.any() or hidden.all():
        return False
    rows, columns = np.nonzero(hidden)
    lines = [rows == k for k in range(len(values)) if values.shape[1] > 1]
    lines += [columns == k for k in range(values.shape[1]) if len(values) > 1]
    _, sizes, basis = np.linalg.svd(np.array(lines, dtype=np.float64))
    free = np.abs(basis[(sizes > 1e-9).sum() :]).max(axis=0, initial=0)
    found = np.flatnonzero(free < 1e-9)
    if not len(found):
        return False
    near = np.zeros_like(hidden)
    near[rows[found[0]]] = near[:, columns[found[0]]] = True
    choice = ~hidden & near if (~hidden & near).any() else ~hidden
    order = np.where(choice, np.where(values == 0, 1e300, values), np.inf)
    hidden[np.unravel_index(order.argmin(), order.shape)] = True
    return True


def _hide_one_more(line: np.ndarray, hidden: np.ndarray, minimum: int) -> bool:
    """Hide a cell of one row or column (in place) if the others give one away."""
    if not hidden.any() or hidden.all():
        return False
    if hidden.sum() > 1 and line[hidden].sum() >= minimum:
        return False
    order = np.where(hidden, np.inf, np.where(line == 0, 1e300, line))
    hidden[int(order.argmin())] = True
    return True


class CohortLedger:
    """What a silo was asked before: refuses a cohort that differs by few rows.

    Two sums over cohorts that differ in fewer than `minimum` rows give the sum over
    these rows by subtraction. Each admitted cohort is on disk before it is answered,
    so a crash forgets nothing; one that was admitted before is not written again. It
    looks at pairs of cohorts: combinations of three or more are not found, and neither
    are cohorts of another version of the data.
    """

    def __init__(self, path: str | Path, *, minimum: int = 10) -> None:
        """path: a file of the silo's own, made if it is missing. Raises ValueError for
        a damaged line: a ledger that has forgotten something protects nobody."""
        if minimum < 2:
            raise ValueError(f"minimum must be >= 2 rows, got {minimum}")
        self.path, self.minimum = Path(path), minimum
        self._asked = [*_read_cohorts(self.path)]

    def admit(self, rows: Any, *, about: str, data: str = "") -> None:
        """Note a cohort and return, or raise `TooFew`.

        rows: bool [N], which rows of the silo a question is about. about: the question,
        in words, for whoever reads the file. data: the version of the data that the
        rows belong to, such as a hash; other versions are not compared.
        """
        mask = _mask_of(rows)
        check_count(int(mask.sum()), minimum=self.minimum)
        self._admit(mask, about, data)

    def admit_part(self, rows: Any, *, about: str, data: str) -> None:
        """As `admit`, for whom a cut point of an answer separates from the others.

        A part may have few rows, or none: what counts is how it differs from the parts
        before. data: what is cut, with the cohort; parts of others are not compared.
        """
        self._admit(_mask_of(rows), about, data)

    def _admit(self, mask: np.ndarray, about: str, data: str) -> None:
        known = False
        for earlier, version, its_about in self._asked:
            if version != data or len(earlier) != len(mask):
                continue
            known = known or np.array_equal(earlier, mask)
            if 0 < (earlier ^ mask).sum() < self.minimum:
                raise TooFew(
                    f"the cohort differs from that of {its_about!r} by fewer than "
                    f"{self.minimum} rows; the difference would describe patients"
                )
        if not known:
            self._append(mask, about, data)
            self._asked.append((mask.copy(), data, about))

    def _append(self, mask: np.ndarray, about: str, data: str) -> None:
        packed = np.packbits(mask).tobytes().hex()
        entry = {"about": about, "data": data, "rows": len(mask), "mask": packed}
        line = json.dumps(entry | {"check": _digest(entry)}) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def _mask_of(rows: Any) -> np.ndarray:
    mask = np.asarray(rows)
    if mask.dtype != bool or mask.ndim != 1:
        raise ValueError(f"rows must be bool [N], got {mask.dtype} {mask.shape}")
    return mask


def _digest(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()[:16]


def _read_cohorts(path: Path) -> Iterable[tuple[np.ndarray, str, str]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            whole = entry.pop("check") == _digest(entry)
            packed = np.frombuffer(bytes.fromhex(entry["mask"]), dtype=np.uint8)
            mask = np.unpackbits(packed, count=entry["rows"]).astype(bool)
        except (ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise ValueError(
                f"{path}, line {number} is damaged; restore the file from a backup, or "
                "start a new one and answer nothing about these data that was asked "
                "before"
            )
        yield mask, entry["data"], entry["about"]
