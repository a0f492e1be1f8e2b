"""Whose rows were in secure sums, as a silo remembers it.

Two sums that have the same patients of A, B and C in them, one of A, B, C and D, and
one without D, give D's answer by subtraction, and so do three that are put together:
women and men at A, B and C, all patients at all four. So a silo lets each of its
patients be in sums of one set of silos only, whatever is asked, in all runs; `secure`
asks `subtracts` before it opens an answer.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

COHORT = "cohort "  # how the name of one begins, where an update has its SHA-256
FOLDER = "cohorts"  # of a silo's own folder for all runs


class Cohort(NamedTuple):
    """The patients that an answer is about.

    rows: bool [patients]. data: a digest of what rows are chosen by: positions in other
    data are other patients.
    """

    rows: np.ndarray
    data: str

    def text(self) -> str:
        packed = np.packbits(self.rows).tobytes().hex()
        return json.dumps({"data": self.data, "of": len(self.rows), "rows": packed})

    def name(self) -> str:
        return COHORT + hashlib.sha256(self.text().encode()).hexdigest()

    def keep(self, folder: Path) -> str:
        """Its name; its rows are on the disk of folder, as `subtracts` needs them."""
        name, path = self.name(), folder / FOLDER / self.name()
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with path.with_suffix(".tmp").open("w", encoding="utf-8") as file:
                file.write(self.text())
                file.flush()
                os.fsync(file.fileno())
            os.replace(path.with_suffix(".tmp"), path)
        return name


def read_cohort(folder: Path, name: str) -> Cohort | None:
    """What `Cohort.keep` wrote; None if it is lost or damaged."""
    try:
        text = (folder / FOLDER / name).read_text(encoding="utf-8")
        if COHORT + hashlib.sha256(text.encode()).hexdigest() != name:
            return None
        found = json.loads(text)
        packed = np.frombuffer(bytes.fromhex(found["rows"]), np.uint8)
        rows = np.unpackbits(packed, count=found["of"]).astype(bool)
        return Cohort(rows, found["data"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def subtracts(folder: Path, before: str, now: str) -> tuple[str, str] | None:
    """What two sums of different sets have in common, and the remedy, or None.

    before, now: digests of updates, or names of cohorts kept in folder. Cohorts have
    nothing in common only if that is certain: in the very same data, no row in both.
    """
    if not (before.startswith(COHORT) and now.startswith(COHORT)):
        how = "this very update was", "give this run another seed"
        return how if before == now else None
    one, other = (read_cohort(folder, name) for name in (before, now))
    if one and other and one.data == other.data and one.rows.shape == other.rows.shape:
        if not (one.rows & other.rows).any():
            return None
    return "patients of this cohort were", "ask the same silos as before"
