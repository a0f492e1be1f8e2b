"""docs/scale.md says what its script computes, and two levels average as one does."""

from types import SimpleNamespace

import pytest
import torch
from conftest import batchnorm_model, play

from experiments import scale
from fl_helpers.aggregation import weighted_average
from fl_helpers.robust import coordinate_median
from fl_helpers.silos import Examples, Silo
from fl_helpers.training import sgd_client

# A round number: a byte costs a nanosecond, half of it for the hash.
SERVER = SimpleNamespace(second_per_byte=1e-9, hash_per_byte=5e-10, models=2.0)


def test_the_page_has_the_tables_of_the_script():
    page = scale.PAGE.read_text()
    assert scale.fill(page) == page, "run python -m experiments.scale"


def test_a_round_by_hand():
    found = scale.one_round(1_000, 4_000_000, SERVER)
    assert found["GB, both ways"] == pytest.approx(8)  # 4 MB, 1,000 silos, twice
    assert found["s, 10 Mbit/s"] == pytest.approx(6_400)  # 64 Gbit
    assert found["s, 10 Gbit/s"] == pytest.approx(6.4)
    assert found["s, server's core"] == pytest.approx(4)
    assert found["of that hash"] == pytest.approx(2)
    assert found["server, GB"] == pytest.approx(0.008)
    # 64 s on the line and 4 on the core, and 4 GB that leave the cloud
    assert found["price"] == pytest.approx(68 / 3600 * 0.5 + 4 * 0.08)


def test_where_a_server_stops_by_hand():
    found = scale.where_it_stops(4_000_000, SERVER)
    # a silo is 64 Mbit, there and back: 6.4 s at 10 Mbit/s; 4 ms of a core
    assert found["10 Mbit/s"] == 9 and found["1 Gbit/s"] == 937
    assert found["one core"] == 15_000


def test_two_levels_by_hand():
    branches, one, two = scale.two_levels(10_000, 4_000_000, 1_000, SERVER)
    assert branches == 100
    assert one == pytest.approx(640 + 40)
    assert two == pytest.approx(2 * (6.4 + 0.4))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.01434, "0.0143"),
        (9, "9"),
        (326_797, "326,797"),
        (64.0, "64.0"),
        (6400, "6,400"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert scale.shown(value) == text


def test_two_levels_reach_the_model_of_one():
    """Nine silos of unequal size in three branches, two rounds of real training."""
    rng, silos = torch.Generator().manual_seed(0), []
    for k in range(9):
        x = torch.randn(8 + k, 1, 16, 16, generator=rng)
        train = Examples(x, torch.randint(2, (8 + k,), generator=rng))
        silos.append(Silo(f"{'abc'[k // 3]}{k}", train, train))
    torch.manual_seed(0)
    start = batchnorm_model().state_dict()
    client = sgd_client(batchnorm_model, epochs=1, lr=0.05, batch_size=4)
    work, how = (start, silos, client.update), dict(rounds=2, seed=0)
    flat = play(*work, weighted_average, **how).params
    two = play(*work, scale.in_branches(lambda name: name[0]), **how).params
    torch.testing.assert_close(two, flat)
    assert any(not torch.equal(start[name], value) for name, value in flat.items())


def test_the_median_does_not_split_into_branches():
    def update(name, value):
        params = {"w": torch.tensor([float(value)])}
        return SimpleNamespace(silo=name, params=params, num_examples=1)

    votes = {"a": (0, 0, 1), "b": (0, 0, 1), "c": (1, 1, 1)}  # five of nine say 1
    branches = [
        [update(f"{name}{k}", vote) for k, vote in enumerate(own)]
        for name, own in votes.items()
    ]
    flat = coordinate_median([one for branch in branches for one in branch])
    medians = [coordinate_median(branch) for branch in branches]
    two = coordinate_median(
        [update(str(k), median["w"]) for k, median in enumerate(medians)]
    )
    assert flat["w"].item() == 1 and two["w"].item() == 0
