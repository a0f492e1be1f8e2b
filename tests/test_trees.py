"""Trees from sums: the pooled ones, as good as XGBoost, and nothing small leaves."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import log_loss, roc_auc_score

from fl_helpers import trees
from fl_helpers.analysis import ask_silos
from fl_helpers.data import load_heart_disease
from fl_helpers.trees import (
    Growth,
    Rows,
    TooFew,
    Trees,
    equal_bins,
    even_bins,
    fit_trees,
    silo_histograms,
    silo_loss,
    trees_from_json,
)

SIZES = {"A": 500, "B": 300, "C": 200}
COLUMNS = {"a": (-3, 3), "b": (-3, 3), "kind": 4, "noise": (-3, 3)}


def made_up(n, seed):
    """An interaction, a category, and missing values that say something."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 4))
    x[:, 2] = rng.integers(0, 4, n)
    score = 2 * x[:, 0] * x[:, 1] + 1.5 * (x[:, 2] == 2) - 0.4
    missing = rng.random(n) < 0.15
    score[missing] += 1.0
    y = (score + rng.logistic(size=n) > 0) * 1
    x[missing, 0] = np.nan
    return x, y


@pytest.fixture(scope="module")
def silos():
    return {name: made_up(n, k) for k, (name, n) in enumerate(SIZES.items())}


@pytest.fixture(scope="module")
def pooled(silos):
    return tuple(np.concatenate(parts) for parts in zip(*silos.values(), strict=True))


def asks(silos):
    return ask_silos({name: Rows(*data) for name, data in silos.items()})


FAST = Growth(trees=8, rate=0.3)


def test_federated_trees_are_the_pooled_ones_bit_for_bit(silos, pooled):
    bins = even_bins(COLUMNS, bins=16)
    federated = fit_trees(asks(silos), bins, growth=FAST, min_count=0)
    alone = fit_trees(asks({"all": pooled}), bins, growth=FAST, min_count=0)
    assert federated.to_json() == alone.to_json()
    assert len(federated.trees) == 8 and federated.importance()["noise"] < 0.1


def test_right_children_from_the_parent_are_what_would_be_asked(silos, monkeypatch):
    bins, asked = even_bins(COLUMNS, bins=16), []

    def ask(function, **how):
        if function is silo_histograms:
            asked.append(len(how["nodes"]))
        return asks(silos)(function, **how)

    few = fit_trees(ask, bins, growth=Growth(trees=1), min_count=0)
    # One of two siblings on each of the levels below the root.
    assert asked == [1, 1, 2, 4][: len(asked)]
    whole = _fit_asking_every_node(asks(silos), bins, Growth(trees=1), monkeypatch)
    assert few.to_json() == whole.to_json()


def _fit_asking_every_node(ask, bins, growth, monkeypatch):
    """min_count=1 hides nothing, but then no difference is taken."""
    return fit_trees(ask, bins, growth=growth, min_count=1)


def test_one_split_by_hand():
    # 4 rows left of 0 without, 4 right of it with the disease: base 0, gradients +-1/2,
    # curvatures 1/4. Left: G = 2, H = 1: value -rate * 2 / (1 + 1) = -1, right +1.
    x = np.array([[-1.0]] * 4 + [[1.0]] * 4)
    data = {"A": (x, np.repeat([0, 1], 4))}
    growth = Growth(trees=1, depth=1, rate=1.0, min_rows=1)
    bins = even_bins({"a": (-2, 2)}, bins=2)
    model = fit_trees(asks(data), bins, growth=growth, min_count=0)
    (tree,) = model.trees
    assert model.base == 0 and tree["value"][1:] == [-1.0, 1.0]
    # Gain: (2^2 / 2 + 2^2 / 2 - 0) / 2.
    assert tree["gain"][0] == 2.0 and tree["rows"] == [8, 4, 4]
    assert model.scores(np.array([[-0.1], [0.1]])) == pytest.approx(
        [1 / (1 + np.e), np.e / (1 + np.e)]
    )


def test_missing_values_go_where_they_win():
    x = np.array([[0.0]] * 20 + [[1.0]] * 20 + [[np.nan]] * 20)
    y = np.repeat([0, 1, 1], 20)
    bins = even_bins({"a": (0, 1)}, bins=2)
    model = fit_trees(asks({"A": (x, y)}), bins, growth=FAST)
    found = model.scores(np.array([[0.0], [1.0], [np.nan]]))
    assert found[0] < 0.2 and found[1] == found[2] > 0.8


def test_a_category_is_split_from_the_others():
    # Category 1 of 0, 1, 2 is ill: no threshold finds it, one question does.
    x, y = np.repeat([[0.0], [1.0], [2.0]], 20, axis=0), np.repeat([0, 1, 0], 20)
    growth = Growth(trees=1, depth=1)
    model = fit_trees(asks({"A": (x, y)}), even_bins({"k": 3}), growth=growth)
    (tree,) = model.trees
    assert tree["equal"][0] and tree["code"][0] == 2
    found = model.scores(np.array([[0.0], [1.0], [2.0]]))
    assert found[1] > found[0] == found[2]


def test_as_good_as_xgboost_on_new_rows(silos, pooled):
    xgboost = pytest.importorskip("xgboost")
    columns = COLUMNS | {"kind": (-0.5, 3.5)}  # as a number, as XGBoost takes it here
    fine = even_bins(columns, bins=256)
    bins = equal_bins(asks(silos), fine, min_count=0)
    growth = Growth(trees=60)
    ours = fit_trees(asks(silos), bins, growth=growth, min_count=0)
    how = {"max_depth": 3, "eta": 0.1, "lambda": 1, "objective": "binary:logistic"}
    how |= {"nthread": 1, "max_bin": 32, "tree_method": "hist"}
    theirs = xgboost.train(how, xgboost.DMatrix(pooled[0], pooled[1]), 60)
    x, y = made_up(4000, 99)
    expected = roc_auc_score(y, theirs.predict(xgboost.DMatrix(x)))
    assert roc_auc_score(y, ours.scores(x)) == pytest.approx(expected, abs=0.01)
    assert expected > 0.7


def test_heart_disease_as_xgboost():
    xgboost = pytest.importorskip("xgboost")
    heart = load_heart_disease()
    x, y = heart.x.astype(float), heart.y
    rng = np.random.default_rng(0)
    test = rng.random(len(y)) < 0.4
    silos = {
        site: (x[rows & ~test], y[rows & ~test])
        for site in np.unique(heart.site)
        for rows in [heart.site == site]
    }
    ranges = {
        n: (c.min() - 1, c.max() + 1) for n, c in zip(heart.features, x.T, strict=True)
    }
    bins = equal_bins(asks(silos), even_bins(ranges, bins=128), min_count=0)
    growth = Growth(trees=30)
    ours = fit_trees(asks(silos), bins, growth=growth, min_count=0)
    how = {"max_depth": 3, "eta": 0.1, "lambda": 1, "objective": "binary:logistic"}
    data = xgboost.DMatrix(x[~test], y[~test])
    theirs = xgboost.train(how | {"nthread": 1}, data, 30)
    expected = roc_auc_score(y[test], theirs.predict(xgboost.DMatrix(x[test])))
    assert roc_auc_score(y[test], ours.scores(x[test])) == pytest.approx(
        expected, abs=0.02
    )


def test_equal_bins_have_equal_rows(silos, pooled):
    fine = even_bins(COLUMNS, bins=256)
    bins = equal_bins(asks(silos), fine, bins=8, min_count=0)
    codes = bins.codes(pooled[0])
    for k in (0, 1, 3):
        counts = np.bincount(codes[:, k])[1:]
        assert len(counts) == 8 and counts.max() < 1.4 * counts.min()
    assert bins.categories == (0, 0, 4, 0) and bins.edges[2] == ()


def test_the_loss_is_that_of_scikit_learn_and_ends_the_fit(silos, pooled):
    bins = even_bins(COLUMNS, bins=16)
    x, y = made_up(400, 7)
    held_out = asks({"A": (x[:250], y[:250]), "B": (x[250:], y[250:])})
    growth = Growth(trees=200, rate=0.5)
    model = fit_trees(asks(silos), bins, growth=growth, validate=held_out, patience=5)
    assert len(model.trees) < 100 and len(model.losses) == len(model.trees) + 5
    assert min(model.losses) == model.losses[len(model.trees) - 1]
    assert log_loss(y, model.scores(x)) == pytest.approx(min(model.losses))
    whole = held_out(silo_loss, model=model.plain())
    assert float(whole["loss"]) / 400 == pytest.approx(min(model.losses))


def test_a_model_comes_back_from_json(silos):
    model = fit_trees(asks(silos), even_bins(COLUMNS, bins=16), growth=FAST)
    again = trees_from_json(model.to_json())
    x, _ = made_up(100, 5)
    np.testing.assert_array_equal(again.scores(x), model.scores(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree["left"].__setitem__(0, 0),  # a circle
        lambda tree: tree["right"].__setitem__(0, 999),
        lambda tree: tree["column"].__setitem__(0, 4),
        lambda tree: tree["value"].pop(),
    ],
)
def test_a_damaged_model_is_refused(silos, change):
    model = fit_trees(asks(silos), even_bins(COLUMNS, bins=16), growth=FAST)
    plain = json.loads(model.to_json())
    change(plain["trees"][1])
    with pytest.raises(ValueError, match="tree 1 is damaged"):
        trees_from_json(json.dumps(plain))


@given(arrays(np.int64, (2, 3, 5), elements=st.integers(0, 30)))
def test_no_cell_of_few_rows_leaves(rows):
    hidden = trees._hidden(rows, 10)
    assert hidden[(rows > 0) & (rows < 10)].all()
    left = np.where(hidden, rows, 0).sum(-1)  # what the total minus the rest would say
    some = hidden.any(-1) & (rows >= 10).any(-1)
    assert (left[some] >= 10).all()


def test_a_silos_small_cells_count_as_nothing(silos):
    data = Rows(*silos["C"])
    bins = even_bins(COLUMNS, bins=32)
    model = Trees(bins, 0.0, []).plain()
    tree = {key: [value] for key, value in trees.LEAF.items()}
    found = silo_histograms(data, model=model, tree=tree, nodes=[0])
    whole = silo_histograms(data, model=model, tree=tree, nodes=[0], min_count=0)
    rows = found["rows"]
    assert not ((rows > 0) & (rows < 10)).any() and whole["rows"].sum() == 4 * 200
    assert 0 < rows.sum() < whole["rows"].sum()
    assert (found["gradient"][rows == 0] == 0).all()


def test_trees_still_learn_when_small_cells_are_hidden(silos):
    x, y = made_up(4000, 99)
    bins = equal_bins(asks(silos), even_bins(COLUMNS, bins=64), bins=8)
    found = fit_trees(asks(silos), bins, growth=Growth(trees=60))
    assert roc_auc_score(y, found.scores(x)) > 0.7


def test_what_a_silo_remembers_is_what_it_would_work_out(silos):
    bins = even_bins(COLUMNS, bins=16)
    model = fit_trees(asks(silos), bins, growth=FAST)
    other = fit_trees(asks(silos), bins, growth=Growth(trees=3, depth=1))
    used, fresh = Rows(*silos["A"]), Rows(*silos["A"])
    for plain in (other.plain(), model.plain(), Trees(bins, 0.3, []).plain()):
        np.testing.assert_array_equal(
            used.margin(plain), Rows(*silos["A"]).margin(plain)
        )
    wider = asdict(even_bins(COLUMNS, bins=4))
    np.testing.assert_array_equal(used.codes(wider), fresh.codes(wider))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((20, 4)), np.arange(20), "y 0 or 1"),
        (np.full((20, 4), np.inf), np.zeros(20), "finite or NaN"),
        (np.zeros((20, 4)), np.zeros(19), r"x must be \[N, F\]"),
        (np.zeros((0, 4)), np.zeros(0), r"x must be \[N, F\]"),
    ],
)
def test_bad_rows_are_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        Rows(x, y)


def test_what_was_not_agreed_on_is_refused_by_name(silos):
    bins = even_bins(COLUMNS, bins=16)
    x, y = silos["B"]
    unknown = x.copy()
    unknown[0, 2] = 7
    for changed, message in (
        (unknown, "silo 'B': column 'kind' must hold categories 0 to 3"),
        (x[:, :3], r"silo 'B': x must be \[N, 4\]"),
        (x[:9], "silo 'B': fewer than 10 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_trees(asks(silos | {"B": (changed, y[: len(changed)])}), bins)
    with pytest.raises(TooFew, match="silo 'B': fewer than 10 rows of a class"):
        fit_trees(asks(silos | {"B": (x, (np.arange(300) < 3) * 1)}), bins)
    with pytest.raises(ValueError, match="there is nothing to learn"):
        fit_trees(asks({"A": (x, np.zeros(300))}), bins)
    with pytest.raises(ValueError, match="range of 'a' must be"):
        even_bins({"a": (1, 1)})
    with pytest.raises(ValueError, match="must be >= 1"):
        Growth(depth=0)


def test_text_is_named_without_what_it_says():
    with pytest.raises(ValueError, match="x holds text") as error:
        Rows(np.full((20, 4), "Smith", dtype=object), np.zeros(20))
    assert "Smith" not in str(error.value)


def test_a_constant_column_is_never_asked_about(silos):
    flat = {}
    for name, (x, y) in silos.items():
        x = x.copy()
        x[:, 0] = 1.0
        flat[name] = (x, y)
    model = fit_trees(asks(flat), even_bins(COLUMNS, bins=8), growth=Growth(trees=3))
    first = next(iter(COLUMNS))
    assert model.importance()[first] == 0 and sum(model.importance().values()) > 0
