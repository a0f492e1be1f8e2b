import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from fl_helpers.federated_statistics import (
    combine_statistics,
    feature_distance,
    image_features,
    label_divergence,
    local_statistics,
)

EDGES = [-10, -1, 0, 1, 10]


@settings(deadline=None)
@given(st.lists(st.integers(10, 60), min_size=1, max_size=6), st.integers(0, 2**31))
def test_combined_equals_pooled(sizes, seed):
    rng = np.random.default_rng(seed)
    parts = [rng.normal(rng.normal(scale=3), size=(n, 2)) for n in sizes]
    sent = [local_statistics(str(i), x, bin_edges=EDGES) for i, x in enumerate(parts)]
    got, pooled = combine_statistics(sent), np.concatenate(parts)
    assert got.count == len(pooled) and got.silo == "all"
    np.testing.assert_allclose(got.mean, pooled.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got.variance, pooled.var(axis=0), rtol=1e-12)
    inside = np.clip(pooled, -10, 10)
    expected = [np.histogram(column, bins=EDGES)[0] for column in inside.T]
    assert np.array_equal(got.histogram, expected)


def test_by_hand_and_values_beyond_the_edges():
    x = np.array([[1.0], [3.0], [99.0], [-99.0]])
    got = local_statistics("a", x, bin_edges=[0, 2, 4], min_rows=4)
    assert got.mean.tolist() == [1.0]  # (1 + 3 + 99 - 99) / 4
    assert got.squares.tolist() == [0 + 4 + 98**2 + 100**2]
    assert got.histogram.tolist() == [[2, 2]]  # -99 and 1 | 3 and 99


@pytest.mark.parametrize(
    ("x", "edges", "message"),
    [
        (np.zeros((9, 1)), EDGES, "'St. Mary' must have at least 10 rows"),
        (np.zeros(20), EDGES, "'St. Mary' must have"),
        (np.full((10, 1), np.nan), EDGES, "'St. Mary' has 10 NaN"),
        (np.zeros((10, 1)), [1, 0], "increasing"),
        (np.zeros((10, 1)), [16], "increasing"),
    ],
)
def test_a_silo_refuses_what_it_should_not_send(x, edges, message):
    with pytest.raises(ValueError, match=message):
        local_statistics("St. Mary", x, bin_edges=edges)


def test_parts_must_fit_together():
    a = local_statistics("a", np.zeros((10, 1)), bin_edges=EDGES)
    b = local_statistics("b", np.zeros((10, 2)), bin_edges=EDGES)
    with pytest.raises(ValueError, match="silo 'b' sent"):
        combine_statistics([a, b])
    with pytest.raises(ValueError, match="no statistics"):
        combine_statistics([])


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
    with pytest.raises(ValueError, match="at least one"):
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
    got = feature_distance(parts)
    assert got["b"] == pytest.approx(np.sqrt((gap**2).mean()))
    assert got["b"] > 3 * got["a"]  # the larger silo is most of the whole


def test_image_features_by_hand():
    flat, stripes = np.full((4, 4), 7.0), np.tile([0.0, 2.0], (4, 2))
    features = image_features(np.stack([flat, stripes]))
    # stripes: mean 1, spread 1; steps 2 across and 0 down, mean 1
    np.testing.assert_allclose(features, [[7, 0, 0], [1, 1, 1]])
    assert image_features(np.zeros((5, 1, 8, 8))).shape == (5, 3)
