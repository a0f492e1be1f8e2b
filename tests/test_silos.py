import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_helpers.silos import (
    Rows,
    make_silos,
    partition_by_counts,
    partition_by_quantity,
    partition_by_site,
    partition_dirichlet,
    partition_iid,
    pool_silos,
    scale_silos,
    split_silo,
    summarize_silos,
    to_tensor,
)

Y = np.repeat([0, 1, 2], [300, 200, 100])
PARTITIONERS = {
    "iid": lambda y, n, seed: partition_iid(y, n, seed=seed),
    "quantity": lambda y, n, seed: partition_by_quantity(y, range(1, n + 1), seed=seed),
    "dirichlet": lambda y, n, seed: partition_dirichlet(y, n, 1.0, seed=seed),
    "site": lambda y, n, seed: partition_by_site(
        np.array(["A", "B"])[np.arange(len(y)) % 2]
    ),
}


@pytest.mark.parametrize("name", PARTITIONERS)
@settings(deadline=None, max_examples=30)
@given(
    num_silos=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(50, 300),
)
def test_every_row_is_in_exactly_one_silo(name, num_silos, seed, rows):
    y = np.random.default_rng(seed).integers(3, size=rows)
    partition = PARTITIONERS[name](y, num_silos, seed)
    together = np.concatenate(list(partition.values()))
    assert np.array_equal(np.sort(together), np.arange(rows))
    again = PARTITIONERS[name](y, num_silos, seed)
    assert all(np.array_equal(partition[k], again[k]) for k in partition)


def counts(partition):
    return np.array([np.bincount(Y[rows], minlength=3) for rows in partition.values()])


def test_iid_deals_equal_shares_and_the_seed_matters():
    partition = partition_iid(Y, 4, seed=0)
    assert list(partition) == ["Hospital A", "Hospital B", "Hospital C", "Hospital D"]
    assert [len(rows) for rows in partition.values()] == [150] * 4
    assert not np.array_equal(
        partition["Hospital A"], partition_iid(Y, 4, seed=1)["Hospital A"]
    )


def test_quantity_keeps_the_label_mix():
    partition = partition_by_quantity(Y, [4, 1], seed=0)
    assert counts(partition).tolist() == [[240, 160, 80], [60, 40, 20]]  # 4/5 and 1/5


def test_no_silo_is_empty_even_with_tiny_classes():
    for shares in ([1, 1], [1000, 1, 1], [1, 1, 1000]):
        partition = partition_by_quantity(np.arange(10), shares, seed=0)
        assert min(map(len, partition.values())) >= 1
    with pytest.raises(ValueError, match="'x' has no rows"):
        make_silos(X, Y, {"x": np.array([], int)}, test_share=0.5, seed=0)


def test_quantity_can_leave_rows_to_nobody():
    partition = partition_by_quantity(Y, [2, 1], seed=0, num_rows=300)
    assert counts(partition).tolist() == [[100, 67, 33], [50, 33, 17]]  # half of each
    with pytest.raises(ValueError, match="num_rows=601, but there are only 600"):
        partition_by_quantity(Y, [1, 1], seed=0, num_rows=601)


def test_label_skew_grows_as_alpha_falls():
    def skew(alpha):
        draws = [counts(partition_dirichlet(Y, 4, alpha, seed=s)) for s in range(20)]
        mixes = [c / c.sum(1, keepdims=True) for c in draws]
        return np.mean(
            [np.abs(m - np.array([3, 2, 1]) / 6).sum(1).mean() for m in mixes]
        )

    assert skew(100) < skew(1) < skew(0.1)
    assert skew(10_000) < 0.05  # nearly the overall mix


def test_dirichlet_keeps_a_minimum_or_says_that_it_cannot():
    partition = partition_dirichlet(Y, 4, 0.3, seed=0, min_per_class=5)
    assert counts(partition).min() >= 5
    with pytest.raises(ValueError, match="larger alpha"):
        partition_dirichlet(Y, 4, 0.01, seed=0, min_per_class=20, max_draws=20)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: partition_dirichlet(Y, 4, 0, seed=0), "alpha must be > 0, got 0"),
        (lambda: partition_iid(Y, 0, seed=0), "cannot divide 600 rows among 0"),
        (lambda: partition_iid(Y[:3], 4, seed=0), "cannot divide 3 rows among 4"),
        (lambda: partition_by_quantity(Y, [1, 0], seed=0), "shares must all be > 0"),
        (lambda: partition_iid(Y.astype(float), 2, seed=0), "class indices"),
        (lambda: partition_by_site(np.array([])), "no rows"),
    ],
)
def test_bad_requests_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


X = np.random.default_rng(0).integers(256, size=(600, 8, 8), dtype=np.uint8)


def test_silos_split_each_class_and_do_not_depend_on_each_other():
    partition = partition_by_quantity(Y, [2, 1], seed=0)
    silos = make_silos(X, Y, partition, test_share=0.25, seed=0)
    assert torch.bincount(silos[0].test.y).tolist() == [50, 33, 17]  # 1/4 of 200 133 67
    assert len(silos[0].train.y) + len(silos[0].test.y) == 400
    alone = make_silos(
        X, Y, {"Hospital B": partition["Hospital B"]}, test_share=0.25, seed=0
    )
    assert torch.equal(alone[0].train.x, silos[1].train.x)
    shuffled = dict(reversed(partition.items()))
    again = make_silos(X, Y, shuffled, test_share=0.25, seed=0)
    assert [silo.name for silo in again] == ["Hospital A", "Hospital B"]
    assert torch.equal(again[0].test.x, silos[0].test.x)


def test_training_and_test_rows_are_different_rows():
    x = np.arange(600 * 64, dtype=np.float32).reshape(600, 64)
    (silo,) = make_silos(x, Y, {"A": np.arange(600)}, test_share=0.5, seed=3)
    train, test = set(silo.train.x[:, 0].tolist()), set(silo.test.x[:, 0].tolist())
    assert not train & test and len(train | test) == 600


def test_pool_and_summary():
    silos = make_silos(X, Y, partition_iid(Y, 3, seed=0), test_share=0.5, seed=0)
    pooled = pool_silos(silos)
    assert len(pooled.train.y) == sum(len(silo.train.y) for silo in silos)
    rows = summarize_silos(silos, ("n", "p", "e"))
    assert [row["silo"] for row in rows] == [silo.name for silo in silos]
    assert rows[0]["n"] + rows[0]["p"] + rows[0]["e"] == rows[0]["train"]
    assert rows[0]["train"] + rows[0]["test"] == 200


def test_images_are_scaled_by_constants():
    grey = to_tensor(np.array([[[0, 255]]], dtype=np.uint8))
    assert grey.shape == (1, 1, 1, 2) and grey.flatten().tolist() == [-2, 2]  # ±.5/.25
    assert to_tensor(np.zeros((2, 5, 6, 3), dtype=np.uint8)).shape == (2, 3, 5, 6)
    assert to_tensor(np.array([[1.5, 2.5]])).tolist() == [[1.5, 2.5]]
    with pytest.raises(ValueError, match="uint8 images"):
        to_tensor(np.zeros((2, 5, 6)))


def test_a_silo_without_test_rows_is_named():
    with pytest.raises(ValueError, match="'tiny' with 1 rows"):
        make_silos(X, Y, {"tiny": np.array([0])}, test_share=0.25, seed=0)
    with pytest.raises(ValueError, match="test_share must lie between 0 and 1"):
        make_silos(X, Y, {"A": np.arange(9)}, test_share=1.0, seed=0)


def test_validation_split_of_a_training_set():
    (silo,) = make_silos(X, Y, {"A": np.arange(600)}, test_share=0.5, seed=0)
    tuning = split_silo("A", silo.train, test_share=0.2, seed=0)
    assert len(tuning.test.y) == 60 and len(tuning.train.y) == 240


@settings(deadline=None, max_examples=60)
@given(
    classes=st.integers(1, 12),
    rows=st.integers(4, 60),
    shares=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    data=st.data(),
)
def test_quantity_deals_out_exactly_num_rows(classes, rows, shares, data):
    num_rows = data.draw(st.integers(len(shares), rows))
    y = np.arange(rows) % classes
    partition = partition_by_quantity(y, shares, seed=0, num_rows=num_rows)
    together = np.concatenate(list(partition.values()))
    assert len(set(together.tolist())) == len(together) == num_rows


def test_quantity_refuses_to_deal_out_nothing():
    for num_rows in (0, -5):
        with pytest.raises(ValueError, match=f"num_rows.*{num_rows}"):
            partition_by_quantity(Y, [1, 1], seed=0, num_rows=num_rows)


def test_dirichlet_uses_every_row_at_extreme_skew():
    partition = partition_dirichlet(Y, 2, 1e-3, seed=0, max_draws=10_000)
    assert np.array_equal(
        np.sort(np.concatenate([*partition.values()])), np.arange(600)
    )
    # A share is almost 0 or 1: each class is (nearly) in one silo.
    assert (counts(partition).max(0) >= 0.99 * np.array([300, 200, 100])).all()


def test_letters_go_on_after_z():
    names = [*partition_iid(np.zeros(703, int), 703, seed=0)]
    found = [names[k].removeprefix("Hospital ") for k in (0, 25, 26, 51, 52, 701, 702)]
    assert found == ["A", "Z", "AA", "AZ", "BA", "ZZ", "AAA"]


def test_test_rows_are_drawn_at_random():
    x = np.arange(600, dtype=np.float32)[:, None]
    everyone = {"A": np.arange(600), "B": np.arange(600)}

    def held_out(seed):
        silos = make_silos(x, Y, everyone, test_share=0.25, seed=seed)
        return [frozenset(silo.test.x[:, 0].tolist()) for silo in silos]

    first_quarters = {*range(75), *range(300, 350), *range(500, 525)}
    drawn = [first_quarters, *held_out(0), *held_out(1)]
    assert len({frozenset(rows) for rows in drawn}) == 5  # by seed and by name


def test_scaled_columns_are_in_spreads_from_the_mean_and_the_rest_stays():
    x = np.array([[0, 5], [2, 5], [4, 5], [6, 5]], np.float32)
    parts = {"A": np.arange(4)}
    before = make_silos(x, np.array([0, 1, 0, 1]), parts, test_share=0.5, seed=0)
    (silo,) = scale_silos(before, np.array([3.0, 5.0]), np.array([2.0, 0.0]))
    # (0, 2, 4, 6 - 3) / 2; a constant column becomes 0, not NaN
    values = sorted(silo.train.x[:, 0].tolist() + silo.test.x[:, 0].tolist())
    assert values == [-1.5, -0.5, 0.5, 1.5] and not silo.train.x[:, 1].any()
    assert before[0].train.x[:, 1].eq(5).all() and silo.train.y is before[0].train.y


def test_counts_are_dealt_exactly_and_the_rest_to_nobody():
    wanted = {"A": [270, 100, 0], "B": [30, 0, 60]}  # of 300, 200 and 100
    partition = partition_by_counts(Y, wanted, seed=0)
    assert counts(partition).tolist() == [[270, 100, 0], [30, 0, 60]]
    together = np.concatenate(list(partition.values()))
    assert len(set(together)) == len(together) == 460
    other = partition_by_counts(Y, wanted, seed=1)
    assert not np.array_equal(partition["A"], other["A"])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"A": [0, 201, 0]}, "class 1 has 200 rows, the silos want 201"),
        ({"A": [1, 0, 0], "B": [0, 0, 0]}, "a row of some class"),
        ({"A": [-1, 2, 0]}, "a row of some class"),
    ],
)
def test_counts_that_cannot_be_dealt_are_refused(wanted, message):
    with pytest.raises(ValueError, match=message):
        partition_by_counts(Y, wanted, seed=0)


# ---- patients, and data that are read when they are needed


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(4, 40), st.sampled_from([0.2, 0.3, 0.5]))
def test_a_patient_is_on_one_side_and_the_shares_are_nearly_kept(seed, n, share):
    rng = np.random.default_rng(seed)
    patients = np.repeat([f"p{k}" for k in range(n)], rng.integers(1, 5, n))
    y = rng.integers(2, size=len(patients))
    x = np.arange(len(y), dtype=np.float32)[:, None]  # the row's own number
    (silo,) = make_silos(x, y, {"A": np.arange(len(y))}, test_share=share, seed=seed,
                         patients=patients)  # fmt: skip
    train, test = (part.x[:, 0].long().numpy() for part in (silo.train, silo.test))
    assert not set(patients[train]) & set(patients[test])
    assert sorted([*train, *test]) == list(range(len(y)))
    for k in (0, 1):  # within the rows of one patient, at most 4
        wanted = share * (y == k).sum()
        assert abs((y[test] == k).sum() - wanted) <= 4


def test_patients_that_cannot_be_divided_are_named():
    x, y = np.zeros((6, 1), np.float32), np.array([0, 0, 0, 1, 1, 1])
    patients = np.array(["p", "q", "r", "r", "s", "t"])
    halves = {"A": np.array([0, 1, 2]), "B": np.array([3, 4, 5])}
    how = dict(test_share=0.3, seed=0)
    with pytest.raises(ValueError, match="patient 'r' has rows in 'A' and in 'B'"):
        make_silos(x, y, halves, patients=patients, **how)
    with pytest.raises(ValueError, match="x has 6 rows, y 6, patients 3"):
        make_silos(x, y, halves, patients=patients[:3], **how)
    one = np.array(["p"] * 6)
    with pytest.raises(
        ValueError, match=r"6 rows of 1 patient\(s\) has 6 .* told apart"
    ):
        make_silos(x, y, {"A": np.arange(6)}, patients=one, **how)


class Counted(torch.utils.data.Dataset):
    read = 0

    def __len__(self):
        return 12

    def __getitem__(self, row):
        Counted.read += 1
        return torch.full((1, 4, 4), float(row)), row % 2


def test_a_dataset_is_divided_without_reading_it():
    y = np.arange(12) % 2
    two = {"A": np.arange(8), "B": np.arange(8, 12)}
    silos = make_silos(Counted(), y, two, test_share=0.5, seed=0)
    table = summarize_silos(silos, ["even", "odd"])
    assert table[0] == {"silo": "A", "train": 4, "test": 4, "even": 2, "odd": 2}
    pooled = pool_silos(silos)
    assert len(pooled.train) == 6 and isinstance(pooled.train, Rows)
    assert Counted.read == 0
    rows = [int(x[0, 0, 0]) for part in (pooled.train, pooled.test)
            for x, _ in (part[k] for k in range(len(part)))]  # fmt: skip
    assert sorted(rows) == list(range(12)) and Counted.read == 12
    labels = [pooled.train[k][1] for k in range(6)]
    assert labels == pooled.train.y.tolist()
    same = make_silos(np.zeros((12, 1), np.float32), y, two, test_share=0.5, seed=0)
    assert torch.equal(same[0].train.y, silos[0].train.y)  # drawn as for arrays
