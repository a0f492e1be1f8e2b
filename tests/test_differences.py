"""How silos differ, by hand and against scipy; what each contributes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from fl_helpers.differences import (
    feature_distance,
    image_features,
    label_divergence,
    leave_one_out,
    update_cosines,
)
from fl_helpers.federated_statistics import combine_statistics, local_statistics


def test_label_divergence_by_hand():
    # Two silos of equal size, mixes (1, 0) and (0, 1); together (1/2, 1/2).
    # m = (3/4, 1/4): H(m) - (0 + 1)/2 = 0.8113 - 0.5 bits; the root is 0.5580.
    got = label_divergence({"a": [5, 0], "b": [0, 5]})
    assert got["a"] == pytest.approx(got["b"]) == pytest.approx(0.5580, abs=1e-4)
    assert label_divergence({"a": [2, 4], "b": [10, 20]}) == {"a": 0, "b": 0}


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=1))
def test_label_divergence_equals_scipy(rows):
    counts = {str(k): row for k, row in enumerate(rows) if sum(row)}
    if not counts:
        return
    whole = np.sum(list(counts.values()), axis=0)
    for name, value in label_divergence(counts).items():
        expected = jensenshannon(counts[name], whole, base=2)
        assert value == pytest.approx(expected, abs=1e-6) and 0 <= value <= 1


def test_label_divergence_refuses_an_empty_silo():
    with pytest.raises(ValueError, match="needs a row of some class"):
        label_divergence({"a": [0, 0], "b": [1, 0]})


def test_feature_distance_is_in_spreads_of_all_rows():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (400, 2)), rng.normal(3, 1, (100, 2))
    a, b = (np.c_[part, np.ones(len(part))] for part in (a, b))  # a constant column
    parts = [
        local_statistics(name, part, bin_edges=(0, 1))
        for name, part in (("a", a), ("b", b))
    ]
    pooled = np.r_[a, b]
    gap = (b.mean(0) - pooled.mean(0))[:2] / pooled.std(0)[:2]
    got = feature_distance(parts, combine_statistics(parts))
    assert got["b"] == pytest.approx(np.sqrt((gap**2).mean()))
    assert got["b"] > 3 * got["a"]  # the larger silo is most of the whole


def test_image_features_by_hand():
    flat, stripes = np.full((4, 4), 7.0), np.tile([0.0, 2.0], (4, 2))
    features = image_features(np.stack([flat, stripes]))
    # stripes: mean 1, spread 1; steps 2 across and 0 down, mean 1
    np.testing.assert_allclose(features, [[7, 0, 0], [1, 1, 1]])
    assert image_features(np.zeros((5, 1, 8, 8))).shape == (5, 3)


def test_cosines_by_hand():
    x = {"w": torch.tensor([1.0, 1.0]), "n": torch.tensor(3)}

    def at(a, b):
        params = {"w": torch.tensor([a, b]), "n": torch.tensor(9)}
        return SimpleNamespace(params=params)

    # deltas: (1, 0), (0, 2), (-3, 0)
    cosines = update_cosines([at(2, 1), at(1, 3), at(-2, 1)], x, ["w"])
    expected = [[1, 0, -1], [0, 1, 0], [-1, 0, 1]]
    torch.testing.assert_close(cosines, torch.tensor(expected, dtype=torch.float64))


def test_deltas_of_silos_that_are_alike_have_cosines_below_zero_near_convergence():
    x = {"w": torch.zeros(1000)}
    draws = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    sent = [SimpleNamespace(params={"w": row}) for row in draws - draws.mean(dim=0)]
    cosines = update_cosines(sent, x, ["w"])
    # They add up to 0: their 12 inner products are minus the 4 squared lengths.
    mean = cosines[~torch.eye(4).bool()].mean().item()
    assert mean == pytest.approx(-1 / 3, abs=0.01)


def test_leave_one_out():
    worth = {"a": 3.0, "b": -1.0, "c": 0.5}
    silos = [SimpleNamespace(name=name) for name in worth]

    def additive(some):
        return sum(worth[silo.name] for silo in some)

    def any_of_two(some):  # "a" and "b" have the same data
        return float(bool({"a", "b"} & {silo.name for silo in some}))

    assert leave_one_out(silos, additive) == worth
    assert leave_one_out(silos, any_of_two) == {"a": 0, "b": 0, "c": 0}
    assert leave_one_out(silos[:2], any_of_two) == {"a": 0, "b": 0}
