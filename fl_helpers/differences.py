"""How the silos differ, and what each of them contributes.

Before training: `label_divergence` and `feature_distance`, from counts and sums that a
silo may release. While training: `update_cosines`, from a round's updates. Afterwards:
`leave_one_out`. Needs numpy and torch: copy this file on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def label_divergence(counts: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """How far each silo's label mix is from the mix of all silos together.

    counts: {silo: rows per class}, the same classes in each. Returns the Jensen-Shannon
    distance per silo, 0 (the same mix) to 1 (no class in common): the square root of
    the divergence in bits (Endres and Schindelin 2003)."""
    table = np.array([list(row) for row in counts.values()], dtype=float)
    if table.ndim != 2 or not (table.sum(axis=1) > 0).all() or (table < 0).any():
        raise ValueError(f"each silo needs a row of some class, got {dict(counts)}")
    whole = table.sum(axis=0) / table.sum()

    def entropy(mix: np.ndarray) -> float:
        mix = mix[mix > 0]
        return float(-(mix * np.log2(mix)).sum())

    result = {}
    for silo, row in zip(counts, table, strict=True):
        mix = row / row.sum()
        bits = entropy((mix + whole) / 2) - (entropy(mix) + entropy(whole)) / 2
        result[silo] = max(bits, 0.0) ** 0.5
    return result


def feature_distance(parts: Iterable[Any], whole: Any) -> dict[str, float]:
    """How far each silo's column means are from those of all rows, in spreads.

    parts: one per silo, from `federated_statistics.local_statistics`; whole: what
    `combine_statistics` makes of them. Returns per silo the root mean square over
    columns of (mean_k - mean) / standard deviation of all rows; columns that are
    constant everywhere do not count."""
    varies = whole.variance > 0
    spread = np.sqrt(whole.variance[varies])
    result = {}
    for part in parts:
        gap = (part.mean - whole.mean)[varies] / spread
        result[part.silo] = float(np.sqrt((gap**2).mean())) if len(gap) else 0.0
    return result


def image_features(x: np.ndarray) -> np.ndarray:
    """Three numbers per image that a scanner changes: brightness, contrast, sharpness.

    x: [N, ..., H, W]. Returns [N, 3]: mean, standard deviation, and mean absolute step
    between neighbouring pixels, each over the whole image. Computed inside the silo, as
    columns for `federated_statistics.local_statistics`."""
    rows = np.asarray(x, dtype=np.float64)
    steps = [np.abs(np.diff(rows, axis=axis)) for axis in (-2, -1)]
    flat = rows.reshape(len(rows), -1)
    sharpness = sum(step.reshape(len(rows), -1).mean(axis=1) for step in steps) / 2
    return np.stack([flat.mean(axis=1), flat.std(axis=1), sharpness], axis=1)


def update_cosines(
    updates: Iterable[Any], params: Mapping[str, Tensor], trainable: Collection[str]
) -> Tensor:
    """Cosine between each two silos' deltas: 1 = they pull the same way, 0 = unrelated.

    updates: with params; params: the global model that they started from. Returns
    [K, K], in the order of the updates; NaN for a silo that did not move. Near
    convergence deltas add up to about 0 even if the silos are alike: their mean cosine
    is then about -1 / (K - 1)."""
    deltas = []
    for update in updates:
        names = [name for name in update.params if name in trainable]
        moved = [(update.params[k].double() - params[k]).flatten() for k in names]
        deltas.append(torch.cat(moved))
    directions = torch.stack(deltas)
    unit = directions / directions.norm(dim=1, keepdim=True)
    return unit @ unit.T


def leave_one_out(
    silos: Sequence[Any], value: Callable[[list[Any]], float]
) -> dict[str, float]:
    """What each silo's taking part is worth: value(all) - value(all but this one).

    silos: with names. value(silos): trains with these silos and returns one number,
    more is better, such as the mean balanced accuracy on the test sets of *all* silos.
    It is called once for all and once without each. Below 0: the others would be better
    off without. Two silos with the same data are worth nothing each; Shapley values
    share that out, at the price of 2^K trainings (Wang et al. 2020, "A principled
    approach to data valuation for federated learning"). Differences between few silos
    are noisy: take several seeds."""
    everyone = value(list(silos))
    return {
        one.name: everyone - value([silo for silo in silos if silo is not one])
        for one in silos
    }
