"""What a hospital with a table of patients brings to an analysis. Adapt this file.

It is installed at the hospital and named in its settings (`tables` in its kit's
`local/site.json`). An example, for the heart disease data, so it imports the helpers
beside it; needs pandas.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd

from fl_helpers import regression, survival, trees, validation
from fl_helpers.cross_silo.turn import Tables

PATIENTS = "patients.csv"  # a row per patient
OUTCOME = "disease"  # 0 or 1
RANGES = {  # columns of numbers: lowest and highest possible value; others: 0 or 1
    "age": (18, 100),
    "resting_bp": (60, 240),
    "cholesterol": (50, 650),  # 0 in the file is a missing one
    "max_heart_rate": (50, 220),
    "st_depression": (-3, 7),
}
MERGED = {  # columns that few patients of a hospital have, as one
    "ecg_abnormal": ("ecg_st_t", "ecg_lv_hypertrophy"),
}
TIME, EVENT = "days", "died"  # of a survival analysis, if there are such columns
SCORE, GROUP = "score", "group"  # what a model says, and a subgroup from 0, if any
SECOND = "second"  # what another model says, to compare, if any
COHORTS = ("age", "sex")  # columns by which a question may choose patients


def load_tables(data: Path) -> Tables:
    """The rows of `patients.csv`, as each analysis takes them.

    A column of `MERGED` is 1 where one of its own is. Rows with a missing value are in
    the tables of trees and statistics only. Raises ValueError for a column that is
    missing or holds text.
    """
    rows = pd.read_csv(data / PATIENTS)
    missing = {OUTCOME, *RANGES, *chain(*MERGED.values())} - {*rows}
    text = [name for name in rows if not pd.api.types.is_numeric_dtype(rows[name])]
    if missing or text:
        raise ValueError(f"{PATIENTS}: {sorted(missing)} missing, {text} hold text")
    for name, rare in MERGED.items():
        rows[name] = rows[[*rare]].max(axis=1, skipna=False)
        rows = rows.drop(columns=[*rare])
    for name, (low, high) in RANGES.items():
        rows[name] = rows[name].where(rows[name].between(low, high))
    others = {OUTCOME, TIME, EVENT, SCORE, GROUP, SECOND}
    inputs = [name for name in rows if name not in others]
    whole = rows[inputs].notna().all(axis=1).to_numpy()
    x, y = rows[inputs].to_numpy(float), rows[OUTCOME].to_numpy()
    tables = {"regression": regression.Table(x[whole], y[whole])}
    tables["trees"] = trees.Rows(x, y)
    tables["federated_statistics"] = {k: rows[k].to_numpy(float) for k in inputs}
    if {TIME, EVENT} <= {*rows}:
        parts = rows[TIME].to_numpy(float), rows[EVENT].to_numpy() == 1, x
        tables["survival"] = survival.Survival(*(part[whole] for part in parts))
    if {SCORE, GROUP} <= {*rows}:
        parts = rows[SCORE].to_numpy(float), y == 1, rows[GROUP].to_numpy(int)
        tables["validation"] = validation.Scored(*parts)
        logits = validation.logit(parts[0])[:, None]
        tables["calibration"] = regression.Table(logits, y)
    if {SCORE, SECOND} <= {*rows}:
        parts = (rows[name].to_numpy(float) for name in (SCORE, SECOND))
        tables["comparison"] = validation.Paired(*parts, y == 1)
    some = dict.fromkeys(("regression", "survival"), whole)
    columns = {name: np.asarray(rows[name], dtype=float) for name in COHORTS}
    return Tables(len(rows), tables, some, columns)
