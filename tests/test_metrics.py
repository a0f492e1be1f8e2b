"""Metrics against scikit-learn, a brute-force distance, and numbers by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from sklearn import metrics as sk

from fl_helpers import metrics, training
from fl_helpers.metrics import (
    dice,
    hausdorff95,
    label_metrics,
    regression_metrics,
    segmentation_metrics,
)


def masks(seed, n=6, size=12, share=0.3):
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, size, size, generator=rng) < share


@given(st.integers(0, 10**6))
def test_dice_is_the_f1_score_of_the_pixels(seed):
    said, true = masks(seed), masks(seed + 1)
    expected = [
        sk.f1_score(t.flatten(), s.flatten()) for s, t in zip(said, true, strict=True)
    ]
    np.testing.assert_allclose(dice(said, true), expected)


def border(mask):
    """Pixels with a neighbour outside (4-connected), the image's edge included."""
    inside = np.pad(mask, 1)
    whole = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    return np.argwhere(mask & ~whole)


@given(st.integers(0, 10**6), st.sampled_from([None, (0.5, 2.0)]))
def test_hausdorff95_is_that_of_all_pairs_of_border_pixels(seed, spacing):
    said, true = masks(seed, 2, 9), masks(seed + 1, 2, 9)
    distances = hausdorff95(said, true, spacing=spacing)
    for found, s, t in zip(distances, said, true, strict=True):
        pair = cdist(*(border(m[0].numpy()) * (spacing or 1.0) for m in (s, t)))
        each = [np.percentile(pair.min(axis=k), 95) for k in (0, 1)]
        assert found.item() == pytest.approx(max(each))


def test_a_square_that_is_moved_by_two_pixels():
    true, said = torch.zeros(2, 1, 1, 12, 12, dtype=torch.bool)
    true[..., 2:6, 2:6], said[..., 2:6, 4:8] = True, True
    # 4 x 2 of 16 pixels in common: 2 * 8 / 32. The far column is 2 pixels away.
    assert dice(said, true).tolist() == [0.5]
    assert hausdorff95(said, true).tolist() == [2.0]
    assert hausdorff95(said, true, spacing=(1.0, 0.5)).tolist() == [1.0]


def test_images_without_an_outline_are_counted_apart():
    true = torch.zeros(4, 1, 8, 8)
    true[:2, :, 2:4, 2:4] = 1
    logits = torch.full((4, 1, 8, 8), -1.0)
    logits[0, :, 2:4, 2:4] = 1.0  # found; the second is missed; the third invented
    logits[2, :, 0, 0] = 1.0
    found = segmentation_metrics(logits, true)
    assert found == {
        "dice": 0.5,
        "hausdorff95": 0.0,
        "missed": 0.5,
        "false_alarms": 0.5,
    }
    none = segmentation_metrics(logits[2:], true[2:])
    assert math.isnan(none["dice"]) and math.isnan(none["missed"])
    with pytest.raises(ValueError, match="must have one shape"):
        segmentation_metrics(logits, true[:, 0])


def test_each_label_has_the_auroc_of_scikit_learn():
    rng = np.random.default_rng(0)
    y = rng.integers(2, size=(80, 3))
    y[:, 2] = 1  # everybody has it
    scores = (rng.normal(size=(80, 3)) + y).round(1)  # ties
    found = label_metrics(torch.tensor(scores), torch.tensor(y))
    each = [sk.roc_auc_score(y[:, k], scores[:, k]) for k in (0, 1)]
    assert [found["auroc_0"], found["auroc_1"]] == pytest.approx(each)
    assert math.isnan(found["auroc_2"]) and found["auroc"] == pytest.approx(
        np.mean(each)
    )
    with pytest.raises(ValueError, match=r"must both be \[examples, labels\]"):
        label_metrics(torch.zeros(5, 2), torch.zeros(5))


def test_the_area_in_two_files_is_the_same():
    rng = torch.Generator().manual_seed(0)
    score, positive = (
        torch.rand(50, generator=rng).round(decimals=1),
        torch.arange(50) % 3 == 0,
    )
    ours = metrics._auroc(score.numpy(), positive.numpy())
    assert ours == pytest.approx(training._auroc(score, positive))


def test_errors_of_numbers():
    found = regression_metrics(torch.tensor([[1.0], [4.0]]), torch.tensor([3.0, 3.0]))
    # errors -2 and 1
    assert found == pytest.approx({"mae": 1.5, "bias": -0.5, "rmse": math.sqrt(2.5)})
    with pytest.raises(ValueError, match="one number per example"):
        regression_metrics(torch.zeros(4, 2), torch.zeros(4))
