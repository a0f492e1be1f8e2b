import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_helpers.federated_statistics import combine_statistics, local_statistics

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
