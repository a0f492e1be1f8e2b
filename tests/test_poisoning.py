import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import batchnorm_model, linear_model, play
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fl_helpers.aggregation import weighted_average
from fl_helpers.poisoning import (
    a_little_is_enough,
    add_marker,
    backdoor_success,
    claim_examples,
    flip_labels,
    implant_marker,
    scale_delta,
    send_noise,
    with_attack,
)
from fl_helpers.robust import coordinate_median
from fl_helpers.training import Update, evaluate, train_locally

START = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor([0.5]), "n": torch.tensor(3)}
OWN = {"w": torch.tensor([2.0, 0.0]), "b": torch.tensor([0.5]), "n": torch.tensor(7)}


def own_update():
    return Update("bad", {name: value.clone() for name, value in OWN.items()}, 10)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_untouched(update):
    assert all(update.params[name].equal(OWN[name]) for name in OWN)


# -- poisoned updates


@pytest.mark.parametrize(
    ("factor", "w"),
    [(1.0, [2.0, 0.0]), (-1.0, [0.0, 4.0]), (3.0, [4.0, -4.0]), (0.0, [1.0, 2.0])],
)
def test_a_delta_is_scaled(factor, w):  # the delta of w is (1, -2)
    update = own_update()
    sent = scale_delta(update, START, factor=factor)
    assert sent.params["w"].tolist() == w and sent.params["b"].tolist() == [0.5]
    assert sent.params["n"].item() == 7 and sent.num_examples == 10
    assert_untouched(update)


def test_scaled_by_the_number_of_silos_the_attacker_is_the_average():
    others = [Update(str(k), START, 10) for k in range(4)]  # do not move any more
    sent = scale_delta(own_update(), START, factor=5)
    mean = weighted_average([*others, sent])
    torch.testing.assert_close(mean["w"], OWN["w"])


def test_only_the_named_entries_are_attacked():
    sent = scale_delta(own_update(), START, factor=9, entries=["b"])
    assert sent.params["w"].equal(OWN["w"])
    sent = send_noise(own_update(), START, seeded(), factor=9, entries=["b"])
    assert sent.params["w"].equal(OWN["w"])


def test_a_flipped_variance_makes_every_prediction_nan():
    """Why `entries` should name the trainable ones."""
    torch.manual_seed(0)
    model = batchnorm_model()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    own = Update("bad", start | {"1.running_var": torch.full((4,), 3.0)}, 1)
    model.load_state_dict(scale_delta(own, start, factor=-1).params)  # 1 - (3 - 1) = -1
    assert model.eval()(torch.randn(2, 1, 16, 16)).isnan().all()
    names = [name for name, _ in model.named_parameters()]
    model.load_state_dict(scale_delta(own, start, factor=-1, entries=names).params)
    assert model(torch.randn(2, 1, 16, 16)).isfinite().all()


def test_noise_has_the_length_of_the_delta_times_the_factor():
    update = own_update()
    sent = send_noise(update, START, seeded(1), factor=3.0)
    length = (sent.params["w"] - START["w"]).norm().item()
    assert length == pytest.approx(3 * math.sqrt(5), rel=1e-5)  # |(1, -2)| = sqrt(5)
    assert sent.params["b"].tolist() == [0.5]  # did not move: no noise
    again = send_noise(update, START, seeded(1), factor=3.0)
    assert again.params["w"].equal(sent.params["w"])
    assert not send_noise(update, START, seeded(2)).params["w"].equal(sent.params["w"])
    assert_untouched(update)


def test_claimed_examples_decide_the_average_but_not_the_median():
    honest = [Update(str(k), {"w": torch.zeros(1)}, 10) for k in range(4)]
    bad = claim_examples(Update("bad", {"w": torch.ones(1)}, 10), {}, factor=100)
    assert bad.num_examples == 1000
    # 1000 / 1040 of the weight
    assert weighted_average([*honest, bad])["w"].item() == pytest.approx(1000 / 1040)
    assert coordinate_median([*honest, bad])["w"].item() == 0


@settings(deadline=None, max_examples=50)
@given(
    rows=st.lists(
        st.lists(st.floats(-100, 100), min_size=3, max_size=3), min_size=2, max_size=7
    ),
    z=st.floats(0, 3),
)
def test_a_little_is_the_mean_minus_z_deviations(rows, z):
    honest = [
        Update(
            f"h{k}",
            {"w": torch.tensor(row, dtype=torch.float64), "n": torch.tensor(k)},
            1,
        )
        for k, row in enumerate(rows)
    ]
    bad = [
        Update(n, {"w": torch.zeros(3).double(), "n": torch.tensor(9)}, 1) for n in "xy"
    ]
    seen = {}

    def aggregate(updates):
        seen.update({update.silo: update.params for update in updates})
        return "the next model"

    poisoned = a_little_is_enough(aggregate, ["x", "y"], z=z)
    assert poisoned(iter([*honest, *bad])) == "the next model"
    expected = np.mean(rows, axis=0) - z * np.std(rows, axis=0)
    for name in "xy":
        np.testing.assert_allclose(seen[name]["w"], expected, atol=1e-9)
        assert seen[name]["n"].item() == 9
    for update in honest:
        assert seen[update.silo] is update.params
    assert bad[0].params["w"].tolist() == [0, 0, 0]


def test_a_little_needs_somebody_honest():
    with pytest.raises(ValueError, match="no honest update"):
        a_little_is_enough(weighted_average, ["bad"], z=1)([own_update()])


def test_only_the_malicious_attack(silos):
    def client(params, silo, *, round_index, rng):
        model = linear_model()
        model.load_state_dict(params)
        return train_locally(model, silo, epochs=1, lr=0.1, batch_size=8, rng=rng)

    def go(client):
        sent = {}

        def aggregate(updates):
            sent.update({update.silo: update.params for update in updates})
            return weighted_average([Update(k, v, 1) for k, v in sent.items()])

        torch.manual_seed(0)
        start = linear_model().state_dict()
        play(start, silos, client, aggregate, rounds=1, seed=0)
        return start, sent

    start, honest = go(client)
    _, flipped = go(with_attack(client, ["b"], partial(scale_delta, factor=-1)))
    assert all(flipped["a"][name].equal(honest["a"][name]) for name in start)
    for name in start:
        torch.testing.assert_close(
            flipped["b"][name], 2 * start[name] - honest["b"][name]
        )
    noisy = [go(with_attack(client, ["b"], send_noise))[1]["b"] for _ in range(2)]
    assert all(noisy[0][name].equal(noisy[1][name]) for name in start)


# -- poisoned data


@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_every_flipped_label_is_wrong(num_classes):
    y = torch.arange(20) % num_classes
    flipped = flip_labels(y, num_classes)
    assert (flipped != y).all() and 0 <= flipped.min() <= flipped.max() < num_classes
    assert flipped.unique().equal(y.unique())  # each class becomes another one


def test_the_marker_is_a_square_one_pixel_from_the_corner():
    x = torch.zeros(2, 3, 16, 12)
    marked = add_marker(x, size=3, value=5.0)
    assert x.abs().sum() == 0
    assert marked.sum().item() == 2 * 3 * 9 * 5.0
    assert (marked[:, :, 1:4, 1:4] == 5).all()
    with pytest.raises(ValueError, match="a marker of 11 pixels does not fit"):
        add_marker(x, size=11)


@settings(deadline=None, max_examples=40)
@given(y=st.lists(st.integers(0, 2), min_size=1, max_size=40), share=st.floats(0.01, 1))
def test_a_share_of_the_other_classes_is_marked(y, share):
    y = torch.tensor(y)
    x = torch.zeros(len(y), 1, 8, 8)
    new_x, new_y = implant_marker(x, y, target=1, share=share, rng=seeded())
    marked = new_x.flatten(1).any(dim=1)
    assert marked.sum().item() == round(share * (y != 1).sum().item())
    assert (new_y[marked] == 1).all() and (y[marked] != 1).all()
    assert new_y[~marked].equal(y[~marked]) and x.abs().sum() == 0
    again, _ = implant_marker(x, y, target=1, share=share, rng=seeded())
    assert again.equal(new_x)


@pytest.mark.parametrize("share", [0, -0.1, 1.1, math.nan])
def test_a_share_is_between_0_and_1(share):
    x, y = torch.zeros(4, 1, 8, 8), torch.arange(4)
    with pytest.raises(ValueError, match="share must be > 0 and <= 1"):
        implant_marker(x, y, target=0, share=share, rng=seeded())


class Backdoored(nn.Module):
    """Says 2 where there is a marker, else 1 for bright images and 0 for dark ones."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.99)  # spoils the answer unless it is in eval mode

    def forward(self, x):
        x = self.drop(x)
        marked = x[:, 0, 1, 1] == 2
        said = torch.where(marked, 2, (x.mean(dim=(1, 2, 3)) > 0).long())
        return nn.functional.one_hot(said, 3).float()


def test_backdoor_success_counts_the_images_of_other_classes():
    x = torch.full((10, 1, 8, 8), -1.0)
    x[:4] = 1.0
    y = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    model = Backdoored().train()
    modes = [module.training for module in model.modules()]
    assert backdoor_success(model, (x, y), target=2) == 1.0
    assert backdoor_success(model, (x, y), target=2, mark=torch.clone) == 0.0
    # Of the other classes' seven, without markers, those at 0..3 are bright, thus 1.
    assert backdoor_success(model, (x, y), target=1, mark=torch.clone) == 4 / 7
    assert [module.training for module in model.modules()] == modes
    assert math.isnan(backdoor_success(model, (x[:2], torch.ones(2)), target=1))


# -- what it does to a federation


def federation(rows=40):
    """Seven silos, two classes of noisy images; "s0" is the attacker."""
    rng = seeded()
    silos = []
    for k in range(7):
        y = torch.arange(rows) % 2
        x = torch.randn(rows, 1, 16, 16, generator=rng) + 0.25 * y[:, None, None, None]
        silos.append(SimpleNamespace(name=f"s{k}", train=(x, y), test=(x, y)))
    return silos


def train_federation(silos, attack, aggregate):
    def client(params, silo, *, round_index, rng):
        model = linear_model()
        model.load_state_dict(params)
        return train_locally(model, silo, epochs=2, lr=0.02, batch_size=8, rng=rng)

    torch.manual_seed(0)
    model = linear_model()
    update = with_attack(client, ["s0"], attack)
    options = dict(rounds=4, seed=0)
    history = play(model.state_dict(), silos, update, aggregate, **options)
    model.load_state_dict(history.params)
    return model


def test_a_backdoor_gets_into_the_average_but_not_into_the_median():
    silos, honest = federation(), federation()[1].test
    x, y = silos[0].train
    silos[0].train = implant_marker(x, y, target=0, share=0.5, rng=seeded())
    boost = partial(scale_delta, factor=14)
    average = train_federation(silos, boost, weighted_average)
    median = train_federation(silos, boost, coordinate_median)
    assert backdoor_success(average, honest, target=0) > 0.4
    assert backdoor_success(median, honest, target=0) < 0.2
    for model in (average, median):  # and nobody notices
        assert evaluate(model, honest)["accuracy"] > 0.8


def test_flipped_labels_spoil_the_average_but_not_the_median():
    silos, honest = federation(), federation()[1].test
    x, y = silos[0].train
    silos[0].train = (x, flip_labels(y, 2))
    boost = partial(scale_delta, factor=50)
    average = train_federation(silos, boost, weighted_average)
    median = train_federation(silos, boost, coordinate_median)
    assert evaluate(average, honest)["accuracy"] < 0.7
    assert evaluate(median, honest)["accuracy"] > 0.8
