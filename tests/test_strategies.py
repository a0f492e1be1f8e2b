"""Strategies against their papers' equations, Flower, torch.optim and FedAvg itself."""

import copy
import os
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import batchnorm_model, linear_model, play
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_helpers.aggregation import (
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedNova,
    FedYogi,
    QFedAvg,
    make_aggregate,
    weighted_average,
)
from fl_helpers.scaffold import ControlVariates, zero_variates
from fl_helpers.simulation import Execution, run_alone, state_bytes
from fl_helpers.training import (
    ProximalTerm,
    evaluate,
    norm_entries,
    train_locally,
)

RULES = {
    "FedAvgM": lambda *a: FedAvgM(*a, lr=0.7, momentum=0.5),
    "FedAdagrad": FedAdagrad,
    "FedAdam": FedAdam,
    "FedYogi": FedYogi,
    "FedNova": FedNova,
    "QFedAvg": lambda *a: QFedAvg(*a, q=0.5, lipschitz=20.0),
}


def update(silo, num_examples, params, **metrics):
    return SimpleNamespace(
        silo=silo, num_examples=num_examples, params=params, metrics=metrics
    )


def deltas(rounds, seed=0, sizes=(3, 1, 6)):
    """`rounds` lists of updates: what silos might send, whatever they were sent."""
    rng = torch.Generator().manual_seed(seed)

    def values():
        return {
            "w": torch.randn(4, 3, generator=rng),
            "b": torch.randn(3, generator=rng),
        }

    return [
        [update(f"silo {k}", n, values(), loss_before=0.3 + k, steps=5.0 + k)
         for k, n in enumerate(sizes)]
        for _ in range(rounds)
    ]  # fmt: skip


def zeros():
    return {"w": torch.zeros(4, 3), "b": torch.ones(3)}


# ---- Flower


@pytest.fixture(scope="module")
def flower():
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("flwr", reason="flwr needs Python >= 3.11")
        from flwr import app
        from flwr.serverapp import strategy
    return SimpleNamespace(app=app, strategy=strategy)


def replies(app, updates):
    def content(u):
        arrays = {k: app.Array(v.numpy().copy()) for k, v in u.params.items()}
        metrics = {"num-examples": u.num_examples, "loss": u.metrics["loss_before"]}
        records = {"arrays": app.ArrayRecord(arrays), "m": app.MetricRecord(metrics)}
        return app.RecordDict(records)

    # A stand-in for Message, which exists only inside a running Flower app.
    return [
        SimpleNamespace(
            content=content(u),
            has_content=lambda: True,
            has_error=lambda: False,
            metadata=SimpleNamespace(src_node_id=k),
        )
        for k, u in enumerate(updates)
    ]


@pytest.mark.parametrize("name", ["FedAvgM", "FedAdagrad", "FedAdam", "FedYogi"])
def test_server_optimizers_equal_flower_over_rounds(flower, name):
    adaptive = dict(lr=0.05, beta1=0.8, beta2=0.95, tau=1e-2)
    theirs = dict(eta=0.05, beta_1=0.8, beta_2=0.95, tau=1e-2)
    if name == "FedAvgM":
        rule = FedAvgM(zeros(), ["w", "b"], lr=0.7, momentum=0.6)
        other = flower.strategy.FedAvgM(server_learning_rate=0.7, server_momentum=0.6)
    elif name == "FedAdagrad":
        rule = FedAdagrad(zeros(), ["w", "b"], **adaptive | {"beta1": 0.0})
        other = flower.strategy.FedAdagrad(eta=0.05, tau=1e-2)
    else:
        rule = RULES[name](zeros(), ["w", "b"], **adaptive)
        other = getattr(flower.strategy, name)(**theirs)
    record = flower.app.ArrayRecord
    other.current_arrays = record(
        {k: flower.app.Array(v.numpy()) for k, v in zeros().items()}
    )
    if name != "FedAvgM":
        other.current_arrays = {k: v.numpy() for k, v in zeros().items()}
    for t, updates in enumerate(deltas(5)):
        ours = rule(updates)
        # Flower counts rounds from 1 and corrects with exponent round + 1; Adam's is
        # the number of steps: so its round is t here.
        got, _ = other.aggregate_train(t, replies(flower.app, updates))
        for key in ours:
            np.testing.assert_allclose(
                ours[key], got[key].numpy(), rtol=1e-4, atol=1e-6
            )
        other.current_arrays = (
            got if name == "FedAvgM" else {k: v.numpy() for k, v in got.items()}
        )


@pytest.mark.parametrize("q", [0.0, 0.1, 1.0, 2.0])
def test_q_fedavg_equals_flower(flower, q):
    rule = QFedAvg(zeros(), ["w", "b"], q=q, lipschitz=1 / 0.05)
    other = flower.strategy.QFedAvg(
        client_learning_rate=0.05, q=q, train_loss_key="loss"
    )
    other.current_arrays = flower.app.ArrayRecord(
        {k: flower.app.Array(v.numpy().copy()) for k, v in zeros().items()}
    )
    updates = deltas(1, sizes=(4, 4, 4))[0]  # Flower does not weight by size
    got, _ = other.aggregate_train(1, replies(flower.app, updates))
    for key, value in rule(updates).items():
        np.testing.assert_allclose(value, got[key].numpy(), rtol=1e-4, atol=1e-5)


# ---- torch.optim: the pseudo-gradient is minus the delta


@pytest.mark.parametrize(
    ("rule", "optimizer"),
    [
        (
            FedAdam(zeros(), ["w", "b"], lr=0.05, beta1=0.8, beta2=0.95, tau=1e-9),
            lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.8, 0.95), eps=1e-9),
        ),
        (
            FedAdagrad(zeros(), ["w", "b"], lr=0.05, beta1=0.0, tau=1e-9),
            lambda p: torch.optim.Adagrad(p, lr=0.05, eps=1e-9),
        ),
        (
            FedAvgM(zeros(), ["w", "b"], lr=0.3, momentum=0.9),
            lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9),
        ),
    ],
    ids=["Adam", "Adagrad", "SGD"],
)
def test_rules_equal_torch_optim_on_the_pseudo_gradient(rule, optimizer):
    weights = {k: v.requires_grad_() for k, v in zeros().items()}
    theirs = optimizer(list(weights.values()))
    for updates in deltas(6):
        mean = weighted_average(updates)
        for name, weight in weights.items():
            weight.grad = weight.detach() - mean[name]
        theirs.step()
        for name, value in rule(updates).items():
            torch.testing.assert_close(value, weights[name].detach())


def test_yogi_by_hand():
    rule = FedYogi({"w": torch.zeros(1)}, ["w"], lr=0.1, beta1=0.5, beta2=0.9, tau=1.0)
    # v: 0 -> 0 - .1*4*sign(0-4) = .4; m: .5*2 = 1; x = .1*1/(sqrt(.4)+1)
    x1 = 0.1 * 1 / (0.4**0.5 + 1)
    got = rule([update("a", 1, {"w": torch.tensor([2.0])})])["w"].item()
    assert got == pytest.approx(x1, rel=1e-6)
    # delta = .1: squared .01 < v, so v shrinks: .4 - .1*.01; m = .5*1 + .5*.1
    x2 = x1 + 0.1 * 0.55 / ((0.4 - 0.001) ** 0.5 + 1)
    got = rule([update("a", 1, {"w": torch.tensor([x1 + 0.1])})])["w"].item()
    assert got == pytest.approx(x2, rel=1e-6)


# ---- limits that are FedAvg, to the last bit


@pytest.mark.parametrize(
    "rule",
    [
        FedAvgM(zeros(), ["w", "b"], lr=1.0, momentum=0.0),
        QFedAvg(zeros(), ["w", "b"], q=0.0, lipschitz=7.0),
    ],
    ids=["FedAvgM without momentum", "q = 0"],
)
def test_limits_are_fedavg_exactly(rule):
    for updates in deltas(4):
        got, expected = rule(updates), weighted_average(updates)
        assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fednova_with_equal_steps_is_fedavg_exactly(momentum):
    rule = FedNova(zeros(), ["w", "b"], momentum=momentum)
    for updates in deltas(4):
        for u in updates:
            u.metrics["steps"] = 7.0
        got, expected = rule(updates), weighted_average(updates)
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_fednova_by_hand():
    # Steps 1 and 3, no momentum, equal sizes: a = 1, 3 and p = 1/2 each.
    # d = 2/1, 9/3 = 2, 3; x = 0 + (1 + 3)/2 * (2 + 3)/2 = 5. FedAvg: (2 + 9)/2 = 5.5.
    rule = FedNova({"w": torch.zeros(1)}, ["w"], momentum=0.0)
    sent = [
        update("a", 1, {"w": torch.tensor([2.0])}, steps=1.0),
        update("b", 1, {"w": torch.tensor([9.0])}, steps=3.0),
    ]
    assert rule(sent)["w"].item() == pytest.approx(5.0)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_fednova_measures_the_path_of_momentum(momentum):
    """Constant gradient 1, lr 1: after s steps of SGD the weight moved by |a|."""
    for steps in (1, 2, 5, 40):
        weight = torch.zeros(1, requires_grad=True, dtype=torch.float64)
        sgd = torch.optim.SGD([weight], lr=1.0, momentum=momentum)
        for _ in range(steps):
            weight.grad = torch.ones(1, dtype=torch.float64)
            sgd.step()
        rule = FedNova({"w": torch.zeros(1)}, ["w"], momentum=momentum)
        assert rule._path_length(steps) == pytest.approx(-weight.item())


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from(["FedNova", "QFedAvg"]))
def test_reweighting_rules_stay_between_the_silos_direction(seed, name):
    """All silos at the same place: every reweighting points there from x."""
    rng = torch.Generator().manual_seed(seed)
    place = {"w": torch.randn(4, 3, generator=rng), "b": torch.randn(3, generator=rng)}
    sent = [
        update(f"s{k}", k + 1, place, steps=9.0, loss_before=0.1 + k) for k in range(3)
    ]
    rule, x = RULES[name](zeros(), ["w", "b"]), zeros()
    new = rule(sent)
    moved = torch.cat([(new[k] - x[k]).flatten() for k in x])
    towards = torch.cat([(place[k] - x[k]).flatten() for k in x])
    share = (moved @ towards / towards.square().sum()).item()
    torch.testing.assert_close(moved, share * towards, rtol=1e-4, atol=1e-5)
    assert 0 < share <= 1 + 1e-6


# ---- what a rule must not do


@pytest.mark.parametrize("name", RULES)
def test_a_rule_leaves_its_inputs_alone_and_averages_what_is_not_trainable(name):
    params = {"w": torch.ones(2), "running_var": torch.ones(2), "n": torch.tensor(1)}
    rule = RULES[name](params, ["w"])

    def sent(silo, var, count):
        values = {"w": torch.full((2,), 3.0), "running_var": torch.full((2,), var)}
        values["n"] = torch.tensor(count)
        return update(silo, 1, values, steps=2.0, loss_before=1.0)

    updates = [sent("a", 1e-6, 5), sent("b", 3e-6, 8)]
    new = rule(updates)
    torch.testing.assert_close(new["running_var"], torch.full((2,), 2e-6))
    assert new["n"].item() == 8 and new["n"].dtype == torch.int64
    assert new["w"][0] > 1 and params["w"].tolist() == [1, 1]
    assert updates[0].params["w"].tolist() == [3, 3]
    new["w"].add_(100)  # the caller's copy: what the rule remembers is its own?
    assert rule.state_dict()["params.w"][0] < 50


@pytest.mark.parametrize("name", RULES)
def test_a_refused_update_changes_nothing(name):
    rule, rounds = RULES[name](zeros(), ["w", "b"]), deltas(3)
    rule(rounds[0])
    before = rule.state_dict()
    rounds[1][2].params["w"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="silo 2.*NaN"):
        rule(rounds[1])
    for count in (float("inf"), float("nan"), True, -3):
        rounds[2][1].num_examples = count
        with pytest.raises(ValueError, match=f"silo 1' reports num_examples={count}"):
            rule(rounds[2])
    after = rule.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", RULES)
def test_state_goes_from_one_object_to_another(name):
    first, rounds = RULES[name](zeros(), ["w", "b"]), deltas(5)
    for updates in rounds[:3]:
        first(updates)
    second = RULES[name](zeros(), ["w", "b"])
    second.load_state_dict(first.state_dict())
    for updates in rounds[3:]:
        expected, got = first(updates), second(updates)
        assert all(torch.equal(got[key], expected[key]) for key in expected)
    with pytest.raises(ValueError, match="not the state of a"):
        second.load_state_dict({"params.w": torch.zeros(1)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: FedAvgM(p, ["w"], lr=0), "lr must be > 0, got 0"),
        (lambda p: FedAvgM(p, ["w"], momentum=1.0), "momentum must be >= 0 and < 1"),
        (lambda p: FedAdam(p, ["w"], beta2=1.0), "beta2 must be"),
        (lambda p: FedAdam(p, ["w"], tau=0.0), "tau must be > 0"),
        (lambda p: FedNova(p, ["w"], momentum=-0.1), "momentum must be"),
        (lambda p: QFedAvg(p, ["w"], q=-1, lipschitz=1), "q must be >= 0, got -1"),
        (lambda p: FedAdam(p, ["v"]), r"unknown: \['v'\]"),
        (lambda p: FedAdam(p, []), "at least one"),
        (
            lambda p: FedAdam(p | {"seen": torch.tensor(1)}, ["w", "seen"]),
            r"whole numbers: \['seen'\]; take the names from model.named_parameters",
        ),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(zeros())


@pytest.mark.parametrize(
    ("name", "metric"), [("FedNova", "steps"), ("QFedAvg", "loss")]
)
def test_a_missing_metric_names_the_silo(name, metric):
    with pytest.raises(ValueError, match=f"silo 'a' reports {metric}.*nan"):
        RULES[name](zeros(), ["w", "b"])([update("a", 1, zeros())])


# ---- in the silo, and in the round loop


def client(make_model, prepare=lambda update, params, silo: update, mu=None, **options):
    options = dict(epochs=1, lr=0.05, batch_size=8) | options
    template = make_model()

    def client_update(params, silo, *, round_index, rng):
        model = copy.deepcopy(template)
        model.load_state_dict({key: params[key] for key in model.state_dict()})
        near = {} if mu is None else {"adjust_gradients": ProximalTerm(model, mu)}
        update = train_locally(model, silo, rng=rng, **options | near)
        return prepare(update, params, silo)

    return client_update


def loss_first(make_model):
    template = make_model()

    def prepare(update, params, silo):
        model = copy.deepcopy(template)
        model.load_state_dict(params)
        loss = evaluate(model, silo.train)["loss"]
        return replace(update, metrics=update.metrics | {"loss_before": loss})

    return client(make_model, prepare)


def scaffold(make_model):
    template = make_model()

    def client_update(params, silo, *, round_index, rng):
        variates, model = ControlVariates(params), copy.deepcopy(template)
        model.load_state_dict({key: params[key] for key in model.state_dict()})
        how = dict(epochs=1, lr=0.05, batch_size=8, rng=rng)
        update = train_locally(model, silo, adjust_gradients=variates.correct, **how)
        return replace(update, params=update.params | variates.entries())

    return client_update


def start(make_model):
    torch.manual_seed(3)
    return make_model()


def federate(model, silos, client_update, aggregate=weighted_average, **options):
    """Three rounds with everything that the strategy needs in its params."""
    params = options.pop("params", model.state_dict())
    options = dict(rounds=3, seed=0, threads=True) | options
    return play(params, silos, client_update, aggregate, **options)


def scaffold_setting(model):
    variates = zero_variates(model)
    own = [name for name in variates if name.startswith("own_variate.")]
    return dict(params=model.state_dict() | variates, keep_local=own)


def strategy_run(name, silos, **options):
    """One run of a strategy by name, on a model with BatchNorm."""
    model = start(batchnorm_model)
    trainable = [key for key, _ in model.named_parameters()]
    plain = client(batchnorm_model)
    if name == "SCAFFOLD":
        setting = scaffold_setting(model)
        return federate(model, silos, scaffold(batchnorm_model), **setting, **options)
    if name == "FedBN":
        options["keep_local"] = norm_entries(model)
    elif name == "FedPer":
        options["keep_local"] = ["3.weight", "3.bias"]
    elif name == "FedProx":
        plain = client(batchnorm_model, mu=0.5)
    elif name == "FedBN and FedAdam":
        options["keep_local"] = norm_entries(model)
        options["aggregate"] = FedAdam(model.state_dict(), trainable)
    else:
        options["aggregate"] = RULES[name](model.state_dict(), trainable)
    if name == "QFedAvg":
        plain = loss_first(batchnorm_model)
    return federate(model, silos, plain, **options)


EVERY = [*RULES, "SCAFFOLD", "FedBN", "FedPer", "FedProx", "FedBN and FedAdam"]


def many(silos, count):
    return [
        SimpleNamespace(name=f"{k}", train=silos[k % 2].train, test=silos[k % 2].test)
        for k in range(count)
    ]


@pytest.mark.parametrize("name", EVERY)
def test_resume_is_bit_identical_for_every_strategy(silos, name, tmp_path):
    silos = many(silos, 3)
    options = dict(rounds=5, silos_per_round=2)
    expected = strategy_run(name, silos, **options)

    def crash(record, params):
        if record["round"] == 2:
            raise KeyboardInterrupt

    file = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        strategy_run(name, silos, checkpoint=file, on_round=crash, **options)
    resumed = strategy_run(name, silos, checkpoint=file, **options)
    assert len(resumed.rounds) == 5
    for silo in silos:
        got, wanted = resumed.params_of(silo.name), expected.params_of(silo.name)
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", EVERY)
def test_the_number_of_workers_does_not_change_a_bit(silos, name):
    one, three = (strategy_run(name, many(silos, 3), workers=n) for n in (1, 3))
    assert all(torch.equal(one.params[key], three.params[key]) for key in one.params)
    assert all(
        torch.equal(one.local[silo][key], three.local[silo][key])
        for silo in one.local
        for key in one.local[silo]
    )


def test_a_used_rule_or_one_for_another_model_is_refused(silos):
    model = start(linear_model)
    names = [key for key, _ in model.named_parameters()]
    rule = FedAdam(model.state_dict(), names)
    federate(model, silos, client(linear_model), rule)
    with pytest.raises(ValueError, match="has been used; make a new one for each run"):
        federate(model, silos, client(linear_model), rule)
    other = FedAdam(linear_model().state_dict(), names)
    with pytest.raises(ValueError, match="does not stand at the params of this run"):
        federate(model, silos, client(linear_model), other)


def test_a_checkpoint_of_another_rule_is_refused(silos, tmp_path):
    model, file = start(linear_model), tmp_path / "run.pt"
    names = [key for key, _ in model.named_parameters()]
    federate(model, silos, client(linear_model), checkpoint=file)
    rule = FedAdam(model.state_dict(), names)
    with pytest.raises(ValueError, match="belongs to another run"):
        federate(model, silos, client(linear_model), rule, checkpoint=file)


def test_fedprox_without_proximal_weight_is_fedavg_exactly(silos):
    model = start(batchnorm_model)
    plain = federate(model, silos, client(batchnorm_model)).params
    zero = federate(model, silos, client(batchnorm_model, mu=0.0)).params
    some = federate(model, silos, client(batchnorm_model, mu=0.1)).params
    assert all(torch.equal(plain[key], zero[key]) for key in plain)
    assert not torch.equal(plain["0.weight"], some["0.weight"])


def test_what_stays_local_is_neither_sent_nor_mixed(silos):
    model = start(batchnorm_model)
    keep = norm_entries(model)
    assert keep == [f"1.{n}" for n in ("weight", "bias", "running_mean", "running_var",
                                       "num_batches_tracked")]  # fmt: skip
    seen = {}

    def spy(updates):
        updates = list(updates)
        seen.update({u.silo: u.params for u in updates})
        return weighted_average(updates)

    history = federate(model, silos, client(batchnorm_model), spy, keep_local=keep)
    assert all(seen[silo].keys().isdisjoint(keep) for silo in seen)
    assert history.params.keys().isdisjoint(keep)
    own = [history.local[silo.name]["1.running_mean"] for silo in silos]
    assert not torch.equal(*own)
    full = state_bytes(model.state_dict())
    kept = sum(model.state_dict()[name].nbytes for name in keep)
    assert history.rounds[0]["bytes_up"] == 2 * (full - kept)
    assert history.rounds[0]["bytes_down"] == 2 * (full - kept)


def test_everything_local_but_one_frozen_entry_is_training_alone(silos):
    """If only the counter is shared, each silo goes its own way: run_alone."""
    model = start(batchnorm_model)
    keep = [name for name in model.state_dict() if "num_batches" not in name]
    plain = client(batchnorm_model)
    history = federate(model, silos, plain, keep_local=keep)
    options = dict(rounds=3, seed=0, execution=Execution(progress=False))
    alone = run_alone(model.state_dict(), silos, plain, **options)
    for silo in silos:
        own = history.params_of(silo.name)
        assert all(torch.equal(own[key], alone[silo.name][key]) for key in keep)


def test_a_silo_that_did_not_take_part_keeps_what_it_had(silos):
    model, silos = start(batchnorm_model), many(silos, 3)
    history = federate(
        model,
        silos,
        client(batchnorm_model),
        rounds=1,
        silos_per_round=1,
        keep_local=norm_entries(model),
    )
    (took_part,) = history.rounds[0]["silos"]
    for silo in silos:
        same = torch.equal(
            history.local[silo.name]["1.running_mean"],
            model.state_dict()["1.running_mean"],
        )
        assert same == (silo.name != took_part)


@pytest.mark.parametrize(
    ("keep", "message"),
    [(["nope"], r"lacks: \['nope'\]"), (["1.weight", "1.bias"], "run_alone")],
)
def test_bad_local_entries_are_refused(silos, keep, message):
    with pytest.raises(ValueError, match=message):
        federate(start(linear_model), silos, client(linear_model), keep_local=keep)


def test_a_client_that_drops_its_own_entries_is_told(silos):
    def forgets(update, params, silo):
        return replace(update, params={"1.weight": update.params["1.weight"]})

    with pytest.raises(ValueError, match="silo 'a' must return the entries it keeps"):
        federate(
            start(linear_model),
            silos,
            client(linear_model, forgets),
            keep_local=["1.bias"],
        )


def test_norm_entries_finds_every_kind():
    model = torch.nn.Sequential(
        torch.nn.GroupNorm(1, 4),
        torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 4)),
        torch.nn.InstanceNorm1d(4, affine=True),
    )
    names = {"0.weight", "0.bias", "1.0.weight", "1.0.bias", "2.weight", "2.bias"}
    assert set(norm_entries(model)) == names
    assert norm_entries(torch.nn.Linear(2, 2)) == []


def test_an_aggregate_by_name():
    params = {"w": torch.zeros(2)}
    assert make_aggregate("weighted_average", params) is weighted_average
    rule = make_aggregate("FedAdam", params, ["w"], {"lr": 0.5})
    assert isinstance(rule, FedAdam) and rule.lr == 0.5
    for name in ("math", "Iterable", "ServerRule", "FedOpt", "nothing"):
        with pytest.raises(ValueError, match=f"got {name!r}"):
            make_aggregate(name, params, ["w"])
    with pytest.raises(ValueError, match="FedAdam does not take .*'speed'"):
        make_aggregate("FedAdam", params, ["w"], {"speed": 1.0})
