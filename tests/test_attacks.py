import copy
import math
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import batchnorm_model
from scipy import ndimage, stats
from sklearn import metrics as sk
from torch import nn
from torchvision.models import resnet18

from fl_helpers.attacks import (
    Search,
    attack_in_turn,
    audit_membership,
    closest,
    draw_mix,
    example_losses,
    invert_gradient,
    invert_linear,
    label_mix,
    labels_of_one,
    likelihood_ratio,
    likeness,
    membership_success,
    psnr,
    sent_gradient,
    shadow_halves,
    ssim,
)
from fl_helpers.models import mlp, small_cnn, smooth_cnn
from fl_helpers.silos import to_tensor
from fl_helpers.synthetic_cxr import synthetic_cxr
from fl_helpers.training import PlainSGD, Step, train_locally

SPAN = 4.0  # inputs of the models go from -2 to 2


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@cache
def radiographs(count=64):
    data = synthetic_cxr([count], seed=0)
    return to_tensor(data.x), torch.from_numpy(data.y).long()


def what_is_sent(model, x, y, **options):
    """Gradient direction in the update of a silo with these examples."""
    before = copy.deepcopy(model.state_dict())
    how = dict(
        epochs=1,
        lr=0.01,
        batch_size=len(y),
        rng=rng(),
        step=Step(PlainSGD(weight_decay=0)),
    )
    silo = SimpleNamespace(name="a", train=(x, y))
    update = train_locally(copy.deepcopy(model), silo, **(how | options))
    return sent_gradient(before, update.params, model)


# -- gradient inversion


def test_one_step_sends_the_gradient(silos):
    torch.manual_seed(0)
    model = small_cnn(2, norm="none")
    x, y = silos[0].train
    loss = nn.functional.cross_entropy(model(x), y)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    got = what_is_sent(model, x, y)
    for (name, value), true in zip(got.items(), expected, strict=True):
        torch.testing.assert_close(value / 0.01, true, atol=1e-4, rtol=1e-3, msg=name)


def test_inversion_of_a_linear_layer_is_exact_for_one_and_not_for_many():
    x, y = radiographs()
    torch.manual_seed(0)
    model = mlp(1024, 3, hidden=(64,))
    flat = x.flatten(1)

    def seen(rows):
        sent = what_is_sent(model, flat[rows], y[rows])
        found = invert_linear(sent["body.0.weight"], sent["body.0.bias"])
        return closest(found.unflatten(1, (1, 32, 32)), x[rows], span=SPAN)

    (one,) = seen([5])
    assert psnr(one, x[5], span=SPAN) > 40 and ssim(one, x[5], span=SPAN) > 0.99
    every = seen(list(range(64)))
    recovered = [psnr(a, b, span=SPAN) > 30 for a, b in zip(every, x, strict=True)]
    assert np.mean(recovered) < 0.5


def test_inversion_of_a_smooth_network_finds_one_image_and_not_one_of_eight():
    x, y = radiographs()
    torch.manual_seed(0)
    model = smooth_cnn(3)
    state = copy.deepcopy(model.state_dict())

    def seen(rows, **options):
        sent = what_is_sent(model, x[rows], y[rows], **options)
        how = dict(rng=rng(), search=Search(iterations=160), bounds=(-2.0, 2.0))
        found = invert_gradient(model, sent, y[rows], (1, 32, 32), **how)
        best = closest(found, x[rows], span=SPAN)
        return [ssim(a, b, span=SPAN) for a, b in zip(best, x[rows], strict=True)]

    average = ssim(x.mean(0), x[5], span=SPAN)  # what needs no attack
    assert seen([5])[0] > 0.95 > average
    assert np.mean(seen(list(range(8)))) < 0.5
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_noise_on_the_gradient_stops_inversion():
    x, y = radiographs()
    torch.manual_seed(0)
    model = smooth_cnn(3)
    sent = what_is_sent(model, x[5:6], y[5:6])
    norm = math.sqrt(sum(v.square().sum().item() for v in sent.values()))
    noisy = {
        name: v / norm + 0.1 * torch.randn(v.shape, generator=rng(1))
        for name, v in sent.items()
    }
    how = dict(rng=rng(), search=Search(iterations=160), bounds=(-2.0, 2.0))
    found = invert_gradient(model, noisy, y[5:6], (1, 32, 32), **how)
    assert ssim(found[0], x[5], span=SPAN) < 0.4 < ssim(x.mean(0), x[5], span=SPAN)


@pytest.mark.parametrize("label", [0, 1, 2])
def test_the_label_of_one_example_can_be_read_off(label):
    torch.manual_seed(0)
    model = small_cnn(3, norm="group")
    sent = what_is_sent(model, radiographs()[0][:1], torch.tensor([label]))
    assert labels_of_one(sent["head.bias"]).tolist() == [label]


def test_psnr_and_ssim_equal_their_definitions():
    a, b = np.random.default_rng(0).uniform(size=(2, 20, 24))
    ta, tb = torch.from_numpy(a), torch.from_numpy(b)
    assert psnr(ta, tb) == pytest.approx(-10 * math.log10(((a - b) ** 2).mean()))
    assert psnr(4 * ta, 4 * tb, span=4) == pytest.approx(psnr(ta, tb))
    assert psnr(ta, ta) == math.inf and ssim(ta, ta) == pytest.approx(1)

    def mean(t):  # scipy's windows, those that lie inside
        return ndimage.uniform_filter(t, 7)[3:-3, 3:-3]

    ma, mb = mean(a), mean(b)
    va, vb, cab = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    expected = (2 * ma * mb + 1e-4) * (2 * cab + 9e-4)
    expected /= (ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)
    assert ssim(ta, tb) == pytest.approx(expected.mean())
    assert ssim(4 * ta, 4 * tb, span=4) == pytest.approx(expected.mean())
    # constants 0.2 and 0.6: (2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4)
    flat = [torch.full((1, 8, 8), v) for v in (0.2, 0.6)]
    assert ssim(*flat) == pytest.approx(0.2401 / 0.4001)


# -- membership


def overfit(x, y, seed):
    """A model that knows these examples nearly by heart."""
    torch.manual_seed(seed)
    model = mlp(1024, 3, hidden=(32,))
    silo = SimpleNamespace(name="a", train=(x, y))
    train_locally(model, silo, epochs=40, lr=0.01, batch_size=16, rng=rng(seed))
    return model


@cache
def attacked():
    """An overfit model, 16 shadows, what these were taught, and who was a member."""
    x, y = radiographs(200)
    x = x.flatten(1)
    member = torch.rand(200, generator=rng(5)).argsort() < 100
    taught = shadow_halves(200, 16, rng(6))
    models = [overfit(x[r], y[r], k) for k, r in enumerate([member, *taught])]
    return models[0], models[1:], taught, member, (x, y)


def test_membership_is_seen_in_a_model_that_overfits_and_not_in_a_fresh_one():
    model, _, _, member, (x, y) = attacked()
    parts = (x[member], y[member]), (x[~member], y[~member])
    assert audit_membership(model, *parts)["auroc"] > 0.7
    fresh = audit_membership(mlp(1024, 3, hidden=(32,)), *parts)["auroc"]
    # No information: standard error 0.041 with 100 against 100; four of them.
    assert abs(fresh - 0.5) < 0.164


def test_likelihood_ratio_beats_the_threshold_where_it_must_and_fails_where_it_must():
    model, shadows, taught, member, (x, y) = attacked()
    scores = likelihood_ratio(model, shadows, taught, (x, y))
    ratio = membership_success(scores[member], scores[~member])
    plain = audit_membership(model, (x[member], y[member]), (x[~member], y[~member]))
    assert ratio["auroc"] > plain["auroc"] + 0.02
    # A model that was trained on none of them: its scores know nothing of `member`.
    others = synthetic_cxr([100], seed=1)
    own = to_tensor(others.x).flatten(1), torch.from_numpy(others.y).long()
    scores = likelihood_ratio(overfit(*own, 9), shadows, taught, (x, y))
    assert (
        abs(membership_success(scores[member], scores[~member])["auroc"] - 0.5) < 0.164
    )


def test_each_model_is_attacked_with_all_others_as_shadows():
    _, models, taught, _, examples = attacked()
    models, taught = models[:4], taught[:4]
    found = attack_in_turn(models, taught, examples)
    losses = torch.stack([example_losses(model, examples) for model in models])
    plain = membership_success(-losses[taught], -losses[~taught])
    assert found["loss"] == plain
    ratios = []
    for k in range(4):
        others = torch.arange(4) != k
        shadows = [models[j] for j in others.nonzero()[:, 0]]
        ratios.append(likelihood_ratio(models[k], shadows, taught[others], examples))
    ratios = torch.stack(ratios)
    ratio = membership_success(ratios[taught], ratios[~taught])
    assert found["likelihood ratio"] == ratio


def test_likeness_is_that_of_each_pair():
    x, _ = radiographs(4)
    got = likeness(x, x.roll(1, 0), span=SPAN)
    assert got == [ssim(x[k], x[k - 1], span=SPAN) for k in range(4)]
    assert likeness(x, x) == [1.0] * 4
    with pytest.raises(ValueError):  # three images for four originals
        likeness(x[:3], x)


def test_likelihood_ratio_is_the_ratio_of_two_normal_densities():
    class Fixed(nn.Module):
        """Says log(p / (1 - p)) = values of class 1, whatever the image."""

        def __init__(self, values):
            super().__init__()
            self.values = torch.as_tensor(values)

        def forward(self, x):
            return torch.stack([torch.zeros(len(x)), self.values[: len(x)]], dim=1)

    values = torch.randn(6, 2, generator=rng())
    taught = torch.tensor([[1, 0], [1, 0], [1, 1], [0, 1], [0, 1], [0, 0]]).bool()
    examples = (torch.zeros(2, 1), torch.ones(2).long())
    got = likelihood_ratio(
        Fixed([0.5, -1.0]), [Fixed(v) for v in values], taught, examples
    )
    with_it = [values[taught[:, n], n].mean().item() for n in range(2)]
    without = [values[~taught[:, n], n].mean().item() for n in range(2)]
    groups = [values[m, n] for n in range(2) for m in (taught[:, n], ~taught[:, n])]
    variance = sum(((g - g.mean()) ** 2).sum().item() for g in groups) / (12 - 4)
    for n, value in enumerate((0.5, -1.0)):
        densities = [
            stats.norm.logpdf(value, mean, math.sqrt(variance))
            for mean in (with_it[n], without[n])
        ]
        assert got[n].item() == pytest.approx(densities[0] - densities[1], rel=1e-4)


def test_membership_success_equals_scikit_learn():
    draw = np.random.default_rng(0)
    members, strangers = draw.normal(0.7, 1, 150).round(1), draw.normal(0, 1, 200)
    strangers = strangers.round(1)  # ties
    got = membership_success(torch.from_numpy(members), torch.from_numpy(strangers))
    labels = np.r_[np.ones(150), np.zeros(200)]
    scores = np.r_[members, strangers]
    assert got["auroc"] == pytest.approx(sk.roc_auc_score(labels, scores))
    fpr, tpr, _ = sk.roc_curve(labels, scores, drop_intermediate=False)
    assert got["tpr"] == pytest.approx(tpr[fpr <= 0.01].max())
    assert got["tpr_error"] == pytest.approx(
        math.sqrt(got["tpr"] * (1 - got["tpr"]) / 150)
    )


def test_membership_success_at_both_ends():
    far, near = torch.full((50,), 9.0), torch.zeros(100)
    assert membership_success(far, near) == {"auroc": 1, "tpr": 1, "tpr_error": 0}
    assert membership_success(near, near) == {"auroc": 0.5, "tpr": 0, "tpr_error": 0}


def test_too_few_strangers_are_refused():
    with pytest.raises(ValueError, match="99 strangers.*at least 100"):
        membership_success(torch.ones(5), torch.ones(99))
    assert (
        membership_success(torch.ones(5), torch.zeros(9), false_alarms=0.2)["tpr"] == 1
    )
    with pytest.raises(ValueError, match="0 members"):
        membership_success(torch.ones(0), torch.ones(100))


def test_shadows_have_each_example_in_half_of_them():
    taught = shadow_halves(50, 8, rng())
    assert taught.shape == (8, 50) and taught.sum(0).tolist() == [4] * 50
    assert len({tuple(row.tolist()) for row in taught}) == 8
    for bad in (2, 5):
        with pytest.raises(ValueError, match=f"even and >= 4.*got {bad}"):
            shadow_halves(50, bad, rng())


def test_losses_are_those_of_evaluation_and_the_model_is_left_as_it_was(silos):
    model = batchnorm_model().train()
    model[1].eval()
    state = copy.deepcopy(model.state_dict())
    got = example_losses(model, silos[0].train, batch_size=7)
    assert [m.training for m in model] == [True, False, True, True]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    x, y = silos[0].train
    expected = nn.functional.cross_entropy(model.eval()(x), y, reduction="none")
    torch.testing.assert_close(got, expected)


def test_the_audit_takes_a_model_that_is_not_ours():
    torch.manual_seed(0)
    x = torch.randn(120, 3, 16, 16, generator=rng())
    y = torch.randint(2, (120,), generator=rng())
    model = resnet18(num_classes=2)
    silo = SimpleNamespace(name="a", train=(x[:20], y[:20]))
    train_locally(model, silo, epochs=25, lr=0.005, batch_size=20, rng=rng())
    # Random labels: what it knows of them, it knows by heart.
    result = audit_membership(model, (x[:20], y[:20]), (x[20:], y[20:]))
    assert result["auroc"] > 0.8


# -- label mix


def bias_change(model, examples, seed=0):
    model = copy.deepcopy(model)
    before = model.head.bias.detach().clone()
    silo = SimpleNamespace(name="a", train=examples)
    how = dict(epochs=1, lr=0.005, batch_size=16, rng=rng(seed))
    return train_locally(model, silo, **how).params["head.bias"] - before


@cache
def simulated_updates():
    """A model, and what an attacker learns about it from 120 examples of its own."""
    torch.manual_seed(0)
    model = small_cnn(3, norm="group")
    x, y = radiographs(400)
    changes, mixes = [], []
    for k in range(30):
        shares = -torch.rand(3, generator=rng(k)).log()  # uniform over all mixes
        own = draw_mix((x[:120], y[:120]), shares / shares.sum(), 96, rng(k))
        changes.append(bias_change(model, own, k))
        mixes.append(torch.bincount(own[1], minlength=3) / 96)
    return model, torch.stack(changes), torch.stack(mixes)


def of_the_silo(counts):
    """Other radiographs, with so many of each class."""
    x, y = (part[120:] for part in radiographs(400))
    rows = torch.cat([(y == k).nonzero()[:n, 0] for k, n in enumerate(counts)])
    return x[rows], y[rows]


@pytest.mark.parametrize("counts", [(72, 12, 12), (12, 72, 12), (12, 12, 72)])
def test_the_label_mix_of_an_update_is_found(counts):
    model, changes, mixes = simulated_updates()
    got = label_mix(bias_change(model, of_the_silo(counts)), changes, mixes)
    true = torch.tensor(counts) / 96
    # Guessing an equal mix is wrong by 0.42.
    assert (got - true).abs().max() < 0.15 and got.sum().item() == pytest.approx(1)


def test_a_sum_over_silos_hides_the_label_mix_of_each():
    model, changes, mixes = simulated_updates()
    silos = [(72, 12, 12), (12, 72, 12), (12, 12, 72)]
    sent = [bias_change(model, of_the_silo(counts)) for counts in silos]
    got = label_mix(torch.stack(sent).mean(0), changes, mixes)
    assert (got - 1 / 3).abs().max() < 0.15  # the mix of all, and 0.42 off each silo's


def test_label_mix_recovers_a_law_that_it_can_express():
    change = torch.randn(40, 3, generator=rng())
    mixes = (change @ torch.randn(3, 3, generator=rng(1))).softmax(1)
    got = torch.stack([label_mix(c, change[8:], mixes[8:]) for c in change[:8]])
    torch.testing.assert_close(got, mixes[:8], atol=0.08, rtol=0)


def test_label_mix_needs_enough_updates():
    few = torch.zeros(7, 3)
    with pytest.raises(ValueError, match="7 simulated .* make at least 8"):
        label_mix(torch.zeros(3), few, few)
    with pytest.raises(ValueError, match="9 simulated updates with 8 mixes"):
        label_mix(torch.zeros(3), torch.zeros(9, 3), torch.zeros(8, 3))


def test_draws_have_the_mix_asked_for():
    y = torch.tensor([0] * 50 + [1] * 5 + [2] * 5)
    x = torch.arange(60.0)
    mix = torch.tensor([0.1, 0.6, 0.3])
    drawn, labels = draw_mix((x, y), mix, 10_000, rng())
    assert torch.equal(y[drawn.long()], labels)
    shares = torch.bincount(labels) / 10_000
    # standard error of a share: sqrt(0.6 * 0.4 / 10000) = 0.005
    assert (shares - mix).abs().max() < 0.02
