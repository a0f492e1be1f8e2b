"""FedAvg and the server rules: equations by hand, numpy, Flower, torch.optim."""

import math
import os
import warnings
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import batchnorm_model
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


def update(silo, num_examples, **params):
    return SimpleNamespace(silo=silo, num_examples=num_examples, params=params)


def test_mean_follows_number_of_examples():
    small = update("a", 1, w=torch.tensor([8.0, 0.0]))
    large = update("b", 3, w=torch.tensor([0.0, 4.0]))
    mean = weighted_average([small, large])
    torch.testing.assert_close(mean["w"], torch.tensor([2.0, 3.0]))  # 8/4, 3*4/4


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 10**6),
            st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_equals_a_float64_numpy_mean(silos):
    updates = [update(str(i), n, w=torch.tensor(v)) for i, (n, v) in enumerate(silos)]
    sizes = [n for n, _ in silos]
    values = np.array([u.params["w"].numpy() for u in updates], dtype=np.float64)
    expected = np.average(values, axis=0, weights=sizes)
    got = weighted_average(updates)["w"].numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-3)


def test_one_update_and_equal_updates_come_out_exactly():
    w = torch.randn(50, generator=torch.Generator().manual_seed(1)) / 3
    assert torch.equal(weighted_average([update("a", 7, w=w)])["w"], w)
    same = [update(name, n, w=w.clone()) for name, n in (("a", 3), ("b", 11), ("c", 5))]
    assert torch.equal(weighted_average(same)["w"], w)


def test_inputs_are_not_modified_and_the_result_is_new():
    a, b = update("a", 1, w=torch.ones(3)), update("b", 1, w=torch.zeros(3))
    mean = weighted_average([a, b])
    mean["w"].add_(100)
    assert a.params["w"].tolist() == [1, 1, 1] and b.params["w"].tolist() == [0, 0, 0]


def test_integer_and_boolean_entries_take_the_maximum():
    a = update("a", 9, n=torch.tensor(5), m=torch.tensor([True, False]))
    b = update("b", 1, n=torch.tensor(8), m=torch.tensor([False, False]))
    mean = weighted_average([a, b])
    assert mean["n"].item() == 8 and mean["n"].dtype == torch.int64
    assert mean["m"].tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_keep_their_dtype(dtype):
    updates = [
        update(str(i), 1, w=torch.tensor([float(i)], dtype=dtype)) for i in range(3)
    ]
    mean = weighted_average(updates)["w"]
    assert mean.dtype == dtype and mean.item() == 1.0  # (0 + 1 + 2) / 3


def test_averages_a_batchnorm_model_with_its_statistics():
    torch.manual_seed(0)
    states = [batchnorm_model().state_dict() for _ in range(2)]
    states[1]["1.running_mean"] += 2.0
    states[1]["1.num_batches_tracked"] += 7
    sent = [update("a", 1, **states[0]), update("b", 1, **states[1])]
    mean = weighted_average(sent)
    assert mean["1.running_mean"].tolist() == [1.0] * 4  # (0 + 2) / 2
    assert mean["1.num_batches_tracked"].item() == 7
    batchnorm_model().load_state_dict(mean)


def test_holds_one_update_at_a_time():
    alive = []

    def generate():
        for i in range(10):
            item = update(str(i), 1, w=torch.full((4,), float(i)))
            alive.append(weakref.ref(item.params["w"]))
            yield item
            del item
            # Who asks for the next one has let go of this one.
            assert not any(ref() is not None for ref in alive)

    assert weighted_average(generate())["w"][0].item() == pytest.approx(4.5)  # 0..9


def test_large_finite_values_are_not_taken_for_infinite():
    big = torch.full((4,), 3e38)  # finite, but their float32 sum is not
    assert torch.equal(weighted_average([update("a", 1, w=big)])["w"], big)


GOOD = {"w": torch.zeros(2, 3), "b": torch.zeros(2)}


@pytest.mark.parametrize(
    ("params", "num_examples", "message"),
    [
        (GOOD, 0, "num_examples=0"),
        (GOOD, -1, "num_examples=-1"),
        (GOOD, math.nan, "num_examples=nan"),
        (GOOD, math.inf, "num_examples=inf; it must be a finite number > 0"),
        (GOOD, True, "num_examples=True"),
        ({"w": GOOD["w"]}, 1, r"another model: 'b' is None, the others' \(\(2,\)"),
        (
            GOOD | {"extra": torch.zeros(1)},
            1,
            r"another model: 'extra' is .*, the others' None",
        ),
        (GOOD | {"b": torch.zeros(3)}, 1, r"'b' is \(\(3,\), .*others' \(\(2,\)"),
        (GOOD | {"b": torch.zeros(2).double()}, 1, "torch.float64"),
        (GOOD | {"b": torch.tensor([0.0, torch.nan])}, 1, "1 NaN or infinite"),
        (GOOD | {"b": torch.tensor([torch.inf, -torch.inf])}, 1, "2 NaN or infinite"),
    ],
)
def test_refuses_a_bad_update_and_names_the_silo(params, num_examples, message):
    good, bad = update("a", 1, **GOOD), update("St. Mary", num_examples, **params)
    with pytest.raises(ValueError, match=message) as error:
        weighted_average([good, bad])
    assert "St. Mary" in str(error.value)


def test_an_empty_model_is_another_model():
    with pytest.raises(ValueError, match="'b' sent another model: 'b' is"):
        weighted_average([update("a", 1), update("b", 1, **GOOD)])


def test_refuses_no_update_and_two_of_one_silo():
    with pytest.raises(ValueError, match="no updates"):
        weighted_average([])
    with pytest.raises(ValueError, match="'a' sent two"):
        weighted_average([update("a", 1, **GOOD), update("a", 1, **GOOD)])


def test_any_shape_and_memory_layout():
    grid = torch.arange(6.0).reshape(2, 3)
    a = update("a", 1, scalar=torch.tensor(1.0), w=grid.T, none=torch.zeros(0, 3))
    b = update("b", 3, scalar=torch.tensor(5.0), w=grid.T + 4, none=torch.zeros(0, 3))
    mean = weighted_average([a, b])
    assert mean["scalar"].item() == 4.0  # (1 + 3 * 5) / 4
    assert torch.equal(mean["w"], grid.T + 3)  # (0 + 3 * 4) / 4 more than a's
    assert mean["none"].shape == (0, 3)
    assert a.params["w"].tolist() == grid.T.tolist()


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 10**6), st.floats(-(2.0**126), 2.0**126, width=32)),
        min_size=1,
        max_size=6,
    )
)
def test_mean_lies_between_the_extremes(silos):
    sent = [update(str(i), n, w=torch.tensor([v])) for i, (n, v) in enumerate(silos)]
    values = [v for _, v in silos]
    assert min(values) <= weighted_average(sent)["w"].item() <= max(values)


def test_half_precision_is_summed_in_float32():
    # In float16, 2048 + 1 is 2048: a mean kept in it would not move from 2048.
    sent = [update("a", 1, w=torch.tensor([2048.0]).half())]
    sent += [update(str(i), 1, w=torch.tensor([2056.0]).half()) for i in range(15)]
    # (2048 + 15 * 2056) / 16 = 2055.5, and float16 has every second number there
    assert weighted_average(sent)["w"].item() == 2056


# ---- the server rules

RULES = {
    "FedAvgM": lambda *a: FedAvgM(*a, lr=0.7, momentum=0.5),
    "FedAdagrad": FedAdagrad,
    "FedAdam": FedAdam,
    "FedYogi": FedYogi,
    "FedNova": FedNova,
    "QFedAvg": lambda *a: QFedAvg(*a, q=0.5, lipschitz=20.0),
}


def reply(silo, num_examples, params, **metrics):
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
        [reply(f"silo {k}", n, values(), loss_before=0.3 + k, steps=5.0 + k)
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
    got = rule([reply("a", 1, {"w": torch.tensor([2.0])})])["w"].item()
    assert got == pytest.approx(x1, rel=1e-6)
    # delta = .1: squared .01 < v, so v shrinks: .4 - .1*.01; m = .5*1 + .5*.1
    x2 = x1 + 0.1 * 0.55 / ((0.4 - 0.001) ** 0.5 + 1)
    got = rule([reply("a", 1, {"w": torch.tensor([x1 + 0.1])})])["w"].item()
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
        reply("a", 1, {"w": torch.tensor([2.0])}, steps=1.0),
        reply("b", 1, {"w": torch.tensor([9.0])}, steps=3.0),
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
        reply(f"s{k}", k + 1, place, steps=9.0, loss_before=0.1 + k) for k in range(3)
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
        return reply(silo, 1, values, steps=2.0, loss_before=1.0)

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
        RULES[name](zeros(), ["w", "b"])([reply("a", 1, zeros())])


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
