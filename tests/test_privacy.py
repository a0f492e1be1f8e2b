import copy
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import batchnorm_model, linear_model, play
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.accountants.analysis.rdp import compute_rdp
from scipy import stats
from scipy.optimize import brentq
from torch import nn
from torchvision.models import resnet18

from fl_helpers.aggregation import weighted_average
from fl_helpers.models import small_cnn
from fl_helpers.privacy import (
    SPENT,
    Account,
    Budget,
    BudgetExceeded,
    Mechanism,
    PrivateUpdate,
    advantage,
    belief_after,
    dp_problems,
    epsilon_spent,
    most_found,
    noise_for,
    nothing_spent,
    privatise_update,
    secret_rng,
    spending_table,
    train_privately,
    with_tanh,
)
from fl_helpers.simulation import silo_rng

FREE = Budget(math.inf, 1e-3)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def account(budget=FREE, params=None):
    return Account(params or nothing_spent(), budget, silo="a")


def train(model, silo, **options):
    how = dict(noise_multiplier=0.0, max_grad_norm=1.0, sample_rate=1.0, steps=1)
    how |= {name: options.pop(name) for name in how if name in options}
    defaults = dict(account=account(), lr=0.1, rng=rng())
    mechanism = Mechanism(**how)
    return train_privately(model, silo, mechanism=mechanism, **(defaults | options))


def moved(update, before):
    return torch.cat([(update.params[k] - v).flatten() for k, v in before.items()])


# -- accounting


@pytest.mark.parametrize(
    ("noise", "rate", "steps"), [(1.1, 0.01, 1000), (2.0, 0.2, 60), (0.8, 0.05, 200)]
)
def test_epsilon_is_the_librarys_and_not_below_a_tight_one(noise, rate, steps):
    got = epsilon_spent(((noise, rate, steps),), 1e-5)
    rdp, prv = RDPAccountant(), PRVAccountant()
    rdp.history = prv.history = [(noise, rate, steps)]
    assert got == pytest.approx(rdp.get_epsilon(1e-5), rel=0.02)
    assert got > prv.get_epsilon(1e-5)  # numerically exact: Gopi et al. 2021


@pytest.mark.parametrize(
    ("noise", "epochs", "published"), [(1.3, 20, 1.34), (0.7, 70, 8.68)]
)
def test_epsilon_of_a_published_run(noise, epochs, published):
    # Bu et al. 2020 (Harvard Data Science Review), figure 4: MNIST, 256 of 60,000,
    # delta 1e-5, moments accountant. That converts to epsilon by the looser formula
    # rdp + log(1 / delta) / (order - 1); Opacus' newer one saves up to a fifth.
    rate, steps, orders = (
        256 / 60000,
        epochs * 60000 // 256,
        [k / 4 for k in range(5, 99)],
    )
    rdp = compute_rdp(q=rate, noise_multiplier=noise, steps=steps, orders=orders)
    old = min(r + math.log(1e5) / (a - 1) for r, a in zip(rdp, orders, strict=True))
    assert old == pytest.approx(published, rel=0.02)
    assert 0.8 * published < epsilon_spent(((noise, rate, steps),), 1e-5) < published


@pytest.mark.parametrize(("noise", "steps"), [(0.1, 10), (1.0, 10), (5.0, 3)])
def test_a_rate_of_one_is_the_gaussian_mechanism(noise, steps):
    # Exact: Balle and Wang 2018, eq. 6, with mu = sqrt(steps) / noise.
    mu = math.sqrt(steps) / noise

    def excess(eps):
        tail = math.exp(min(700.0, eps + stats.norm.logcdf(-eps / mu - mu / 2)))
        return stats.norm.cdf(-eps / mu + mu / 2) - tail - 1e-2

    exact = brentq(excess, 0, 1e4)
    assert exact <= epsilon_spent(((noise, 1.0, steps),), 1e-2) <= 1.35 * exact + 0.1


def test_nothing_costs_nothing_and_no_noise_is_no_promise():
    assert epsilon_spent((), 1e-5) == 0
    assert epsilon_spent(((1.0, 0.1, 5), (0.0, 0.1, 1)), 1e-5) == math.inf


@pytest.mark.parametrize("epsilon", [0.5, 8])
def test_planned_noise_uses_the_budget_up_and_not_more(epsilon):
    budget = Budget(epsilon, 1e-4)
    noise = noise_for(budget, sample_rate=0.1, steps=50)
    spent = epsilon_spent(((noise, 0.1, 50),), 1e-4)
    assert 0.95 * epsilon < spent <= epsilon
    assert noise_for(FREE, sample_rate=0.1, steps=50) == 0


def test_account_adds_up_over_rounds_and_stops_before_the_budget():
    budget = Budget(2.0, 1e-3)
    noise = noise_for(budget, sample_rate=0.2, steps=30)
    params = nothing_spent()
    for steps in (10, 20, 30):  # as rounds of 10 steps would
        mine = Account(params, budget, silo="St. Mary")
        mine.spend(noise, 0.2, 10)
        assert mine.epsilon == epsilon_spent(((noise, 0.2, steps),), 1e-3)
        params = mine.entries()
    with pytest.raises(BudgetExceeded, match="'St. Mary' stops: .* of 2 .*noise_for"):
        mine.spend(noise, 0.2, 1)
    assert mine.spent == ((noise, 0.2, 30),)  # nothing was booked
    mine.spend(500.0, 0.2, 1)  # what is left buys a step with much noise
    assert mine.entries()[SPENT].tolist() == [[noise, 0.2, 30], [500.0, 0.2, 1]]


@pytest.mark.parametrize(
    "steps",
    [
        (1.0, 0.1, -100), (1.0, 0.1, 0), (1.0, 0.1, 1.5), (1.0, 0.1, math.nan),
        (math.nan, 0.1, 1), (-1.0, 0.1, 1), (math.inf, 0.1, 1),
        (1.0, math.nan, 1), (1.0, 0.0, 1), (1.0, 1.5, 1),
    ],
)  # fmt: skip
def test_an_account_books_steps_that_can_be_taken_and_no_others(steps):
    mine = Account(nothing_spent(), Budget(50, 1e-3), silo="St. Mary")
    mine.spend(1.0, 0.1, 200)
    with pytest.raises(ValueError, match="steps a whole number >= 1.*'St. Mary'"):
        mine.spend(*steps)
    assert mine.spent == ((1.0, 0.1, 200),)
    changed = {SPENT: torch.tensor([[1.0, 0.1, 200], steps], dtype=torch.float64)}
    with pytest.raises(ValueError, match="in the account of silo 'St. Mary'"):
        Account(changed, Budget(50, 1e-3), silo="St. Mary")


def test_a_budget_must_be_a_promise():
    for epsilon, delta in ((0, 1e-3), (-1, 1e-3), (1, 0), (1, 1), (math.nan, 0.1)):
        with pytest.raises(ValueError, match="need epsilon > 0"):
            Budget(epsilon, delta)
    with pytest.raises(ValueError, match="keep_local"):
        Account({}, FREE, silo="a")


# -- DP-SGD


def by_hand(model, x, y, clip, lr):
    """One step on all examples: gradients one by one, clipped, averaged."""
    total = [torch.zeros_like(p) for p in model.parameters()]
    for k in range(len(x)):
        loss = nn.functional.cross_entropy(model(x[k : k + 1]), y[k : k + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        norm = math.sqrt(sum(g.square().sum().item() for g in grads))
        for t, g in zip(total, grads, strict=True):
            t += g * min(1.0, clip / norm)
    return torch.cat([(-lr * t / len(x)).flatten() for t in total])


@pytest.mark.parametrize("clip", [0.05, 1.0, 100.0])
def test_one_step_is_the_mean_of_clipped_gradients(silos, clip):
    torch.manual_seed(0)
    model = small_cnn(2, norm="group")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = by_hand(copy.deepcopy(model).train(), *silos[0].train, clip, lr=0.1)
    got = moved(train(model, silos[0], max_grad_norm=clip), before)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-7)


def test_no_example_moves_any_parameter_further_than_clip_allows(silos):
    torch.manual_seed(0)
    model = small_cnn(2, norm="group")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = silos[0].train
    for k in range(8):
        one = SimpleNamespace(name="a", train=(1000 * x[k : k + 1], y[k : k + 1]))
        model.load_state_dict(before)
        # lr 1 and one example: the step is its clipped gradient.
        update = train(model, one, lr=1.0, max_grad_norm=0.3)
        norms = [(update.params[n] - v).norm().item() for n, v in before.items()]
        assert max(norms) <= 0.3 * 1.0001
        assert math.hypot(*norms) == pytest.approx(0.3, rel=1e-3)  # the bound is met


@pytest.mark.parametrize("noise", [0.7, 3.0])
def test_noise_has_the_stated_variance(silos, noise):
    torch.manual_seed(0)
    model = small_cnn(2, norm="group")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    options = dict(max_grad_norm=0.5, lr=2.0)
    clean = moved(train(copy.deepcopy(model), silos[0], **options), before)
    noisy = moved(train(model, silos[0], noise_multiplier=noise, **options), before)
    # One step on all 40: each value gets lr * noise * clip / 40 times a normal draw.
    draws = (noisy - clean) / (2.0 * noise * 0.5 / 40)
    assert len(draws) > 6000
    assert stats.kstest(draws.numpy(), "norm").pvalue > 1e-3  # 2 % wrong is seen:
    assert stats.kstest(1.1 * draws.numpy(), "norm").pvalue < 1e-3
    low, high = stats.chi2.ppf([1e-5, 1 - 1e-5], len(draws))
    assert low < draws.square().sum().item() < high


def test_poisson_sampling_draws_each_example_on_its_own():
    # One weight per example: after a step, those that were drawn have moved.
    n, steps = 200, 60
    silo = SimpleNamespace(name="a", train=(torch.eye(n), torch.arange(n) % 2))
    model = nn.Linear(n, 2, bias=False)
    counts = []
    for seed in range(steps):
        nn.init.zeros_(model.weight)
        train(model, silo, sample_rate=0.1, rng=rng(seed))
        counts.append(int((model.weight.abs().sum(0) > 0).sum()))
    counts = torch.tensor(counts).double()
    # Binomial(200, 0.1): mean 20, variance 18. Shuffled batches would have variance 0.
    assert abs(counts.mean() - 20) < 4 * math.sqrt(18 / steps)
    low, high = stats.chi2.ppf([1e-4, 1 - 1e-4], steps - 1) * 18 / (steps - 1)
    assert low < counts.var() < high


def test_an_empty_batch_is_a_step_of_noise():
    silo = SimpleNamespace(name="a", train=(torch.ones(2, 256), torch.tensor([0, 1])))
    model = linear_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    options = dict(sample_rate=1e-6, noise_multiplier=1.0, lr=1e-6)
    update = train(model, silo, **options)
    # lr * noise * clip / (rate * n) = 1e-6 / 2e-6 = 0.5, on 514 values
    assert moved(update, before).std().item() == pytest.approx(0.5, rel=0.15)
    assert update.metrics["steps"] == 1


def test_same_rng_same_bits_and_the_global_generator_is_left_alone(silos):
    torch.manual_seed(0)
    model = small_cnn(2, norm="group")
    before = torch.get_rng_state()
    options = dict(sample_rate=0.3, steps=3, noise_multiplier=1.0)
    runs = [
        train(copy.deepcopy(model), silos[0], rng=rng(s), **options) for s in (1, 1, 2)
    ]
    first, again, other = (run.params["head.weight"] for run in runs)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_update_has_the_models_names_and_the_model_no_traces(silos):
    model = small_cnn(2, norm="group")
    names = set(model.state_dict())
    update = train(model, silos[0])
    assert set(update.params) == names | {SPENT}
    assert set(model.state_dict()) == names
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    assert set(update.metrics) == {"epsilon", "steps"}  # no loss: it has no noise


class Counting(nn.Module):
    """Keeps the mean of its inputs, as no layer under DP may."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.head = nn.Linear(256, 2)

    def forward(self, x):
        self.mean = x.detach().mean()
        return self.head(x.flatten(1))


def test_statistics_of_a_layer_of_ones_own_get_nothing_of_the_examples(silos):
    model = Counting()
    update = train(model, silos[0])
    assert update.params["mean"].item() == 0 == model.mean.item()


def test_frozen_layers_stay(silos):
    model = small_cnn(2, norm="group")
    model.body.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    update = train(model, silos[0], noise_multiplier=1.0)
    changed = {k for k, v in before.items() if not torch.equal(update.params[k], v)}
    assert changed == {"head.weight", "head.bias"}


def frozen_batchnorm():
    model = batchnorm_model()
    model[1].requires_grad_(False)  # Opacus looks at trainable layers only
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (batchnorm_model(), "1 .BatchNorm2d. shares.* Use GroupNorm"),
        (frozen_batchnorm(), "1 .BatchNorm2d. shares.* Use GroupNorm"),
        (resnet18(num_classes=2), "bn1 .BatchNorm2d.*ModuleValidator.fix"),
        (nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(256, 2)), "dropout"),
        (nn.Sequential(nn.Flatten(), nn.LSTM(256, 2)), "LSTM.*ModuleValidator.fix"),
    ],
)
def test_unsupported_layers_are_named_with_the_remedy(silos, model, message):
    mine = account()
    with pytest.raises(ValueError, match=message):
        train(model, silos[0], account=mine)


def test_a_model_that_opacus_repaired_can_be_trained():
    from opacus.validators import ModuleValidator

    model = ModuleValidator.fix(resnet18(num_classes=2))
    x = torch.randn(4, 3, 32, 32, generator=rng())
    silo = SimpleNamespace(name="a", train=(x, torch.arange(4) % 2))
    update = train(model, silo, noise_multiplier=0.1, lr=0.01)
    assert all(v.isfinite().all() for v in update.params.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sample_rate=0), "sample_rate > 0 and <= 1.* got 0.0, 0 and 1"),
        (dict(sample_rate=1.5), "got 0.0, 1.5"),
        (dict(steps=0), "steps a whole number >= 1.* and 0"),
        (dict(noise_multiplier=-1), "noise_multiplier must be .*>= 0.* got -1"),
        (dict(max_grad_norm=0), "max_grad_norm must be > 0, got 0"),
        (dict(account=account(Budget(1, 0.5))), "'a' has 40 inputs.*delta=0.5"),
    ],
)
def test_bad_settings_are_named(silos, options, message):
    with pytest.raises(ValueError, match=message):
        train(linear_model(), silos[0], **options)


def test_mismatched_data_and_divergence_name_the_silo(silos):
    x, y = silos[0].train
    with pytest.raises(ValueError, match="'b' has 40 inputs, 39 labels"):
        train(linear_model(), SimpleNamespace(name="b", train=(x, y[:-1])))
    with pytest.raises(FloatingPointError, match="'a'.*smaller lr"):
        far = SimpleNamespace(name="a", train=(1e6 * x, y))
        train(linear_model(), far, lr=1e38, steps=3)


def test_a_step_that_is_too_dear_is_not_taken(silos):
    model = linear_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BudgetExceeded):
        train(model, silos[0], account=account(Budget(1, 1e-3)), noise_multiplier=0.5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_tanh_takes_the_place_of_relu():
    model = with_tanh(small_cnn(2, norm="group"))
    kinds = [type(m) for m in model.modules()]
    assert kinds.count(nn.Tanh) == 3 and nn.ReLU not in kinds


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_trains_on_a_gpu_and_sends_from_the_cpu(silos):
    torch.manual_seed(0)
    model = small_cnn(2, norm="group")
    on_cpu = train(copy.deepcopy(model), silos[0])
    on_gpu = train(model.cuda(), silos[0])
    for name, value in on_cpu.params.items():
        assert on_gpu.params[name].device.type == "cpu"
        torch.testing.assert_close(on_gpu.params[name], value, rtol=1e-3, atol=1e-4)


# -- over rounds


def federate(silos, budget, *, rounds, noise, seed=0, **options):
    torch.manual_seed(0)
    start = linear_model().state_dict() | nothing_spent()

    def client(params, silo, *, round_index, rng):
        model = linear_model()
        model.load_state_dict({k: params[k] for k in model.state_dict()})
        how = dict(mechanism=Mechanism(noise, 1.0, 0.25, steps=2), lr=0.1, rng=rng)
        mine = Account(params, budget, silo=silo.name)
        return train_privately(model, silo, account=mine, **how)

    how = dict(rounds=rounds, seed=seed, keep_local=[SPENT])
    return play(start, silos, client, weighted_average, **how | options)


def test_the_account_survives_a_resume_and_the_bits_are_the_same(silos, tmp_path):
    budget = Budget(50, 1e-3)
    whole = federate(silos, budget, rounds=4, noise=1.0)
    file = dict(checkpoint=tmp_path / "run.pt")
    federate(silos, budget, rounds=2, noise=1.0, **file)
    resumed = federate(silos, budget, rounds=4, noise=1.0, **file)
    assert all(torch.equal(v, whole.params[k]) for k, v in resumed.params.items())
    for history in (whole, resumed):
        assert history.local["a"][SPENT].tolist() == [[1.0, 0.25, 8]]  # 4 rounds of 2
        assert SPENT not in history.params  # it never left the silo
    tables = (spending_table(run.rounds, budget) for run in (resumed, whole))
    assert next(tables) == next(tables)


def test_any_number_of_workers_gives_the_same_bits(silos):
    one, two = (
        federate(silos, FREE, rounds=2, noise=1.0, workers=workers)
        for workers in (1, 2)
    )
    assert all(torch.equal(v, two.params[k]) for k, v in one.params.items())


def test_spending_has_a_row_per_silo_and_round(silos):
    budget = Budget(50, 1e-3)
    history = federate(silos, budget, rounds=3, noise=1.0)
    rows = spending_table(history.rounds, budget)
    assert [(row["silo"], row["round"]) for row in rows] == [
        ("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2),
    ]  # fmt: skip
    assert rows[4] == {
        "silo": "a",
        "round": 2,
        "mechanism": "DP-SGD",
        "epsilon": epsilon_spent(((1.0, 0.25, 6),), 1e-3),
        "remaining": 50 - epsilon_spent(((1.0, 0.25, 6),), 1e-3),
        **advantage(epsilon_spent(((1.0, 0.25, 6),), 1e-3), 1e-3),
    }


def test_a_run_stops_before_the_budget_and_the_last_model_is_kept(silos, tmp_path):
    # Enough for 3 rounds of 2 steps, and not for a fourth.
    budget = Budget(epsilon_spent(((1.0, 0.25, 7),), 1e-3), 1e-3)
    file = dict(checkpoint=tmp_path / "run.pt")
    with pytest.raises(BudgetExceeded, match="'a' stops"):
        federate(silos, budget, rounds=10, noise=1.0, **file)
    kept = federate(silos, budget, rounds=3, noise=1.0, **file)
    table = spending_table(kept.rounds, budget)
    assert all(row["remaining"] >= 0 for row in table)
    expected = federate(silos, FREE, rounds=3, noise=1.0)
    assert all(torch.equal(v, kept.params[k]) for k, v in expected.params.items())


# -- a whole silo


def update_of(start, distance, silo="a"):
    """An update whose delta has the norm `distance`."""
    delta = {k: torch.randn(v.shape, generator=rng(1)) for k, v in start.items()}
    norm = math.sqrt(sum(v.square().sum().item() for v in delta.values()))
    params = {k: v + delta[k] * (distance / norm) for k, v in start.items()}
    return PrivateUpdate(silo, params, 40, {})


def privatise(update, start, **options):
    defaults = dict(account=account(), clip=2.0, noise_multiplier=0.0, num_silos=4)
    return privatise_update(update, start, **(defaults | dict(rng=rng()) | options))


@pytest.mark.parametrize(("distance", "expected"), [(8.0, 2.0), (0.5, 0.5), (0.0, 0.0)])
def test_a_whole_update_is_clipped(distance, expected):
    start = small_cnn(2, norm="group").state_dict()
    update = update_of(start, distance)
    got = privatise(update, start | nothing_spent())
    direction = moved(update, start)
    assert moved(got, start).norm().item() == pytest.approx(expected, rel=1e-3)
    if distance:
        cosine = nn.functional.cosine_similarity(moved(got, start), direction, dim=0)
        assert cosine.item() == pytest.approx(1, abs=1e-4)
    assert got.num_examples == 1 and set(got.params) == set(start) | {SPENT}


def test_shares_of_noise_add_up_to_the_stated_variance():
    start = small_cnn(2, norm="group").state_dict()
    noisy = [
        privatise(update_of(start, 1.0), start, noise_multiplier=0.3, rng=rng(k))
        for k in range(4)
    ]
    clean = moved(update_of(start, 1.0), start)
    total = sum(moved(update, start) - clean for update in noisy)
    draws = total / (0.3 * 2.0)  # noise multiplier times clip
    low, high = stats.chi2.ppf([1e-5, 1 - 1e-5], len(draws))
    assert low < draws.square().sum().item() < high
    assert noisy[0].metrics["epsilon"] == epsilon_spent(((0.3, 1.0, 1),), 1e-3)


def test_a_promise_that_is_none_is_refused():
    start = linear_model().state_dict()
    update = update_of(start, 1.0)
    with pytest.raises(ValueError, match="delta below 1 / num_silos = 0.25.*and 0.3"):
        privatise(update, start, account=account(Budget(math.inf, 0.3)))
    with pytest.raises(ValueError, match="clip must be > 0.*got 0 and"):
        privatise(update, start, clip=0)
    with pytest.raises(BudgetExceeded, match="'a' stops"):
        mine = account(Budget(1, 1e-2))
        privatise(update, start, account=mine, noise_multiplier=0.1)


def test_whole_numbers_cannot_be_hidden_in_noise():
    start = batchnorm_model().state_dict()
    with pytest.raises(ValueError, match="num_batches_tracked.*norm='group'"):
        privatise(PrivateUpdate("a", start, 1, {}), start)


# -- the generator of a real run


def test_a_secret_generator_repeats_for_the_same_round_only():
    params, secret = {"w": torch.ones(3)}, bytes(range(32))
    draw = lambda *a: torch.randn(50, generator=secret_rng(*a))  # noqa: E731
    first = draw(secret, params, 0)
    assert torch.equal(first, draw(secret, params, 0))
    others = [
        draw(secret[:31] + b"x", params, 0),
        draw(secret, {"w": torch.tensor([1.0, 1.0, 1.0001])}, 0),
        draw(secret, params, 1),
    ]
    assert not any(torch.equal(first, other) for other in others)
    many = torch.randn(10**5, generator=secret_rng(secret, params, 0))
    assert stats.kstest(many.numpy(), "norm").pvalue > 1e-3
    with pytest.raises(ValueError, match="32 bytes, got 5"):
        secret_rng(b"short", params, 0)


def test_a_seed_of_torch_is_too_short_to_be_a_secret():
    # Why secret_rng sets the whole state: two seeds that differ above bit 32 are one.
    seeds = (7, 7 + 2**32)
    a, b = (torch.randn(5, generator=rng(seed)) for seed in seeds)
    assert torch.equal(a, b)
    assert silo_rng(0, "a", 0).initial_seed() > 2**32


def test_problems_are_those_for_which_training_refuses():
    assert dp_problems(small_cnn(2, norm="group")) == []
    (first, *_) = dp_problems(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))
    assert first == "1 (Dropout) draws outside of rng"
    assert "shares statistics" in dp_problems(small_cnn(2))[0]


# -- what a budget means for one patient


def leakiest(epsilon, delta):
    """Chances of the four answers of the mechanism that gives away all that (epsilon,
    delta) allows, without and with the patient (Kairouz et al. 2015, equation 8)."""
    likely = (1 - delta) / (1 + math.exp(-epsilon))
    rare = 1 - delta - likely
    return np.array([delta, likely, rare, 0]), np.array([0, rare, likely, delta])


def test_a_belief_grows_as_bayes_rule_says():
    epsilon = 1.5
    without, with_it = leakiest(epsilon, 0)
    for prior in (0.5, 0.01):  # answer 2 is the one that speaks for the patient most
        after = prior * with_it[2] / (prior * with_it[2] + (1 - prior) * without[2])
        assert belief_after(prior, epsilon) == pytest.approx(after)
    assert belief_after(0.3, 0) == pytest.approx(0.3)  # nothing was learned
    assert belief_after(0.01, math.inf) == 1 and belief_after(0, math.inf) == 0
    with pytest.raises(ValueError, match="prior from 0 to 1 .* got 1.5 and 1"):
        belief_after(1.5, 1)


@pytest.mark.parametrize("delta", [0.0, 1e-5, 0.02])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 3.0, 8.0])
def test_no_test_finds_more_and_the_best_one_finds_as_many(epsilon, delta):
    """The best test accuses after the answers that speak most for the patient."""
    without, with_it = leakiest(epsilon, delta)
    false, true = np.cumsum(without[::-1]), np.cumsum(with_it[::-1])
    for share in (0.001, 0.01, 0.3, 0.9):
        best = np.interp(share, false, true)  # between two answers it tosses a coin
        found = most_found(
            Budget(epsilon or 1e-12, delta or 1e-300), false_alarms=share
        )
        assert found == pytest.approx(best, abs=1e-9)


def test_the_bound_holds_for_the_gaussian_mechanism():
    """One release, sensitivity 1: the best test is a threshold on a normal value."""
    noise, delta = 2.0, 1e-5
    budget = Budget(epsilon_spent(((noise, 1.0, 1),), delta), delta)
    found = stats.norm.sf(stats.norm.isf(0.01) - 1 / noise)
    assert 0.01 < found < most_found(budget)
    assert most_found(Budget(math.inf, delta)) == 1
    with pytest.raises(ValueError, match="false_alarms must be 0 to 1, got 2"):
        most_found(budget, false_alarms=2)


# -- a share of the noise each: the table of docs/security.md


def test_the_table_of_shares_is_what_the_accountant_says():
    text = (Path(__file__).parents[1] / "docs/security.md").read_text()
    part = text.split("### A share of the noise each")[1].split("\n## ")[0]
    rows = re.findall(r"\| (\d+), (\d+) \| ([\d.]+) \| ([\d.]+) \|", part)
    assert len(rows) == 5
    for *shares, few, many in rows:
        for share, said in zip(shares, (few, many), strict=True):
            spent = ((2.0 * int(share) ** 0.5, 0.2, 100),)
            assert f"{epsilon_spent(spent, 1e-5):.2f}" == said
    # One record moves the sum by lr C / (rate N); rounding, each weight by a step.
    step = 0.2 * 1 / (0.2 * 2000) / 2**-22
    assert f"{100 * 2300**0.5 / step:.0f} %" == "2 %" and "give 2 %" in part
    assert f"{100 * 11e6**0.5 / step:.0f} %" == "158 %" and "weights 158 %" in part


def test_in_one_step_shares_of_noise_add_up_to_the_noise_of_the_sum():
    """Updates of nothing but noise, at hospitals of different sizes: the weighted mean
    has the noise of one step on all records, sqrt(n) times a share."""
    sizes, noise, rate, lr = (10, 20, 40, 80), 2.0, 0.5, 0.1
    total, updates = sum(sizes), []
    for seed, n in enumerate(sizes):
        records = torch.zeros(n, 50), torch.zeros(n)
        silo = SimpleNamespace(name=str(seed), train=records)
        model = torch.nn.Linear(50, 400, bias=False)
        start = model.weight.detach().clone()
        update = train_privately(
            model,
            silo,
            mechanism=Mechanism(noise, 1.0, rate, steps=1),
            account=account(),
            lr=lr,
            rng=torch.Generator().manual_seed(seed),
            loss_fn=lambda logits, y: 0 * logits.sum(),
        )
        updates.append((update.params["weight"] - start) * n / total)
    # In units of lr / (rate N), the sum's: 20,000 numbers, so std within 2 %.
    stds = [value.std().item() * rate * total / lr for value in updates]
    assert stds == pytest.approx([noise] * 4, rel=0.02)
    whole = sum(updates).std().item() * rate * total / lr
    assert whole == pytest.approx(noise * 4**0.5, rel=0.02)
