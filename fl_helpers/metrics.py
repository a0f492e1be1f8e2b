"""How good a model is for other tasks than classes: outlines, several labels, numbers.

`segmentation_metrics`, `label_metrics` and `regression_metrics` take all outputs and
labels of a test set, and return plain numbers by name: pass one as `metrics=` to
`training.evaluate` or `training.sgd_client`. NaN is what the test set does not define.
Needs numpy, torch and scipy: copy this file on its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage, stats
from torch import Tensor


def segmentation_metrics(logits: Tensor, y: Tensor) -> dict[str, float]:
    """Overlap and distance of outlines, means over images.

    logits: [N, ...]; above 0 is inside. y: [N, ...] of the same shape, 0 or 1; N masks
    of one channel. Returns dice and hausdorff95 (pixels) of the images that have an
    outline, missed (share of these in which nothing is said) and false_alarms (share of
    the images without an outline in which something is said).
    """
    if logits.shape != y.shape:
        raise ValueError(
            f"outputs {list(logits.shape)} and masks {list(y.shape)} must have one "
            "shape; give masks a channel of their own, and the size of the image"
        )
    said, true = logits > 0, y > 0.5
    there, spoke = true.flatten(1).any(1), said.flatten(1).any(1)
    return {
        "dice": dice(said, true).nanmean().item(),
        "hausdorff95": hausdorff95(said, true).nanmean().item(),
        "missed": _share(~spoke[there]),
        "false_alarms": _share(spoke[~there]),
    }


def dice(said: Tensor, true: Tensor) -> Tensor:
    """Dice's coefficient of each image [N], 2 |A and B| / (|A| + |B|) (Dice 1945).

    said, true: bool [N, ...]. NaN where true is empty: no overlap could be reached.
    """
    said, true = said.flatten(1), true.flatten(1)
    both, size = (said & true).sum(1).double(), (said.sum(1) + true.sum(1)).double()
    return torch.where(true.any(1), 2 * both / size, torch.nan)


def hausdorff95(
    said: Tensor, true: Tensor, *, spacing: Sequence[float] | None = None
) -> Tensor:
    """How far the outlines of each image are apart [N], without the worst 5 %.

    The larger of two numbers: the 95th percentile of the distances from the border of
    the one to the border of the other, in both directions (Huttenlocher et al. 1993,
    with a percentile for the maximum).
    said, true: bool [N, ..., H, W]; leading axes but the first must be 1.
    spacing: size of a pixel along H and W, such as millimetres; None is pixels.
    NaN where one of the two is empty.
    """
    shape = (len(said), *said.shape[-2:])
    pairs = torch.stack([said.reshape(shape), true.reshape(shape)], dim=1).numpy()
    found = []
    for a, b in pairs:
        borders = [m & ~ndimage.binary_erosion(m) for m in (a, b)]
        if not (a.any() and b.any()):
            found.append(float("nan"))
            continue
        away = [ndimage.distance_transform_edt(~m, spacing) for m in borders]
        each = (away[1][borders[0]], away[0][borders[1]])
        found.append(max(float(np.percentile(distances, 95)) for distances in each))
    return torch.tensor(found, dtype=torch.double)


def label_metrics(logits: Tensor, y: Tensor) -> dict[str, float]:
    """AUROC of several labels per image, each for itself.

    logits: [N, L]; y: [N, L], 0 or 1. Returns auroc_l for each label l, NaN if all
    images have it or none, and auroc, the mean of those that are defined.
    """
    if logits.shape != y.shape or y.dim() != 2:
        raise ValueError(
            f"outputs {list(logits.shape)} and labels {list(y.shape)} must both be "
            "[examples, labels]"
        )
    areas = [
        _auroc(logits[:, k].numpy(), y[:, k].numpy() > 0.5) for k in range(y.shape[1])
    ]
    each = {f"auroc_{k}": area for k, area in enumerate(areas)}
    return {
        "auroc": float(np.nanmean(areas)) if np.isfinite(areas).any() else float("nan")
    } | each


def regression_metrics(outputs: Tensor, y: Tensor) -> dict[str, float]:
    """Errors of numbers. outputs, y: [N] or [N, 1], in the unit of y.

    Returns mae (mean absolute error), bias (mean of outputs - y) and rmse.
    """
    if outputs.numel() != y.numel():
        raise ValueError(
            f"outputs {list(outputs.shape)} and y {list(y.shape)} must be one number "
            "per example"
        )
    error = outputs.flatten().double() - y.flatten().double()
    return {
        "mae": error.abs().mean().item(),
        "bias": error.mean().item(),
        "rmse": error.square().mean().sqrt().item(),
    }


def _auroc(score: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive scores above a negative, ties counted half."""
    m, n = int(positive.sum()), int((~positive).sum())
    if m == 0 or n == 0:
        return float("nan")
    ranks = stats.rankdata(score)[positive].sum()
    return float((ranks - m * (m + 1) / 2) / (m * n))


def _share(found: Tensor) -> float:
    return found.double().mean().item() if len(found) else float("nan")
