"""What an answer would give away of few patients, beside small counts.

Counts at two cut points give who lies between them by subtraction, and products of
columns are a row where few patients have a value. `questions` asks both before an
answer leaves (statistical disclosure control: Hundepool et al. 2012).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fl_helpers import federated_statistics, regression

PRODUCTS = {  # they send sums of products of columns: a row each, of the patients' own
    "fl_helpers.regression:silo_linear",
    "fl_helpers.regression:silo_logistic",
    "fl_helpers.survival:silo_cox",
    "fl_helpers.survival:silo_hazards_over_time",
}
MOST_CUTS = 100  # of a question that counts by time or by score


class Denied(ValueError):
    """A question that this hospital does not answer; why stays in its log."""

    code = "QUESTION_DENIED"


def cuts(
    function: str, data: Any, settings: Mapping[str, Any], arrays: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """What an answer cuts, and who is on the lower side of each cut point.

    Two life tables with an edge at day 100 and at day 101, or the counts at two
    thresholds, would give who lies between by subtraction. Denied for too many cuts.
    """
    name = function.partition(":")[2]
    if name == "silo_life_table":
        _check_cuts(len(settings["edges"]))
        for edge in settings["edges"]:
            yield "events by time", data.event & (data.time <= edge)
    elif name in ("silo_score_counts", "finest_counts"):
        bins = len(arrays["ill"])
        _check_cuts(bins)
        for cut in range(1, bins):
            below = (data.score * bins).astype(np.int64) < cut
            yield from (("ill", below & data.y), ("healthy", below & ~data.y))
    elif name == "silo_confusion":
        below = data.score < settings["threshold"]
        yield from (("ill", below & data.y), ("healthy", below & ~data.y))
        for group in np.flatnonzero(arrays["counts"].sum(axis=1)):
            inside = below & (data.group == group)
            yield f"ill of {group}", inside & data.y
            yield f"healthy of {group}", inside & ~data.y


def check_columns(data: Any, minimum: int) -> None:
    """Denied for columns that single out few patients: their products are theirs alone.

    Of one column, for 1 to minimum - 1 rows beside those that have one and the same
    value. Of all columns together, for a row that a weighted sum of them tells from all
    others (a leverage of 1): such as the only one without a 1 in any of a category's.
    """
    parts = [data.x, data.y] if isinstance(data, regression.Table) else [data.x]
    x = np.column_stack([np.asarray(part, dtype=np.float64) for part in parts])
    for k, column in enumerate(x.T):
        if federated_statistics.few_differ(column, minimum):
            raise Denied(
                f"column {k} of x (y is the last) has one value in all but fewer than "
                f"{minimum} rows; merge rare categories, leave it out, or ask in "
                "secure sums"
            )
    x = np.column_stack([np.ones(len(x)), x])
    basis, sizes, _ = np.linalg.svd(
        x / np.maximum(np.abs(x).max(axis=0), 1e-300), False
    )
    leverage = (basis[:, sizes > 1e-9 * sizes[0]] ** 2).sum(axis=1)
    if leverage.max() > 1 - 1e-9:
        raise Denied(
            "the columns together single out a row; merge rare categories, ask about "
            "more rows or fewer columns, or ask in secure sums"
        )


def _check_cuts(number: int) -> None:
    if number > MOST_CUTS:
        raise Denied(f"{number} intervals or bins; a question has at most {MOST_CUTS}")
