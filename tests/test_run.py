"""What a real run is: refused early, and the same after it has travelled as JSON."""

import json

import pytest
import torch

from fl_helpers.aggregation import SERVER_RULES
from fl_helpers.cross_silo.run import NEED_THE_AVERAGE, Run, from_plain, to_plain
from fl_helpers.exchange import Limits
from fl_helpers.robust import ROBUST_RULES
from fl_helpers.simulation import Stop
from fl_helpers.training import Update

STATE = {"w": torch.ones(2, 2), "n": torch.tensor(3), "own": torch.zeros(4)}


def new_run(**more):
    return Run(**dict(name="x", params=STATE, rounds=1, seed=1) | more)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "../x"}, "name must be letters"),
        ({"rounds": 0}, "rounds must be an integer >= 1, got 0"),
        ({"quorum": 0}, "quorum must be an integer >= 1, got 0"),
        ({"deadline": 2.5}, "deadline must be an integer >= 1, got 2.5"),
        ({"seed": "1"}, "seed must be an integer, got '1'"),
        ({"keep_local": ["x"]}, r"params lacks: \['x'\]"),
        ({"keep_local": list(STATE)}, "not all of them"),
        ({"aggregate": "FedEx"}, "got 'FedEx'"),
        ({"aggregate": "FedAdam", "trainable": ["x"]}, r"unknown: \['x'\]"),
        ({"settings": {"f": print}}, "plain numbers and texts.*'f': a builtin"),
        ({"settings": {"lr": torch.tensor(0.1)}}, "give float"),
        ({"limits": Limits(norm_factor=3.0)}, "norm_factor is for `run_rounds` only"),
        (
            {"secure": True, "aggregate": "krum", "options": {"malicious": 1}},
            "'krum' looks at each silo's update, which a secure run hides",
        ),
        (
            {"secure": True, "aggregate": "FedNova", "trainable": ["w"]},
            "'FedNova' looks at each silo's update",
        ),
        ({"secure": True, "quorum": 2}, "a quorum of 3 or more, got 2"),
    ],
)
def test_a_run_is_checked_before_it_is_sent(change, message):
    with pytest.raises(ValueError, match=message):
        new_run(**change)


def test_every_rule_by_name_says_whether_it_can_be_secure():
    """Those that are let in get no more than the average, as one update of all."""
    update = Update("all silos", {"w": STATE["w"] + 1}, 30, {})
    for name in NEED_THE_AVERAGE:
        trained = {} if name == "weighted_average" else {"trainable": ["w"]}
        state = {"w": STATE["w"]}
        run = new_run(params=state, aggregate=name, secure=True, **trained)
        assert not run.make_rule(state)(iter([update]))["w"].equal(state["w"])
    known = {"weighted_average", *SERVER_RULES, *ROBUST_RULES}
    refused = known - set(NEED_THE_AVERAGE)
    assert refused == {"FedNova", "QFedAvg", *ROBUST_RULES}


def test_what_travels_is_in_the_models_order():
    run = new_run(keep_local=["n"])
    assert list(run.shared) == ["w", "own"]
    assert list(run.in_order({"own": 1, "w": 2})) == ["w", "own"]


def test_a_rule_stands_at_the_shared_entries_and_skips_what_is_kept():
    trained = {"aggregate": "FedAdam", "trainable": ["own", "w"], "keep_local": ["own"]}
    run = new_run(**trained, options={"lr": 0.1})
    rule = run.make_rule(run.shared)
    assert rule([Update("A", run.shared, 1, {})])["w"].equal(STATE["w"])  # no delta


def test_a_run_is_the_same_after_it_has_travelled_as_json():
    run = new_run(
        trainable={"w"}, keep_local=("own",), aggregate="FedAdam", quorum=2,
        options={"lr": 0.1 + 0.2}, settings={"epochs": 1, "lr": 1e-17, "how": "x"},
        stop=Stop("loss", 2, higher_is_better=False),
        limits=Limits(max_norm=2.5, metrics=frozenset({"train_loss", "test_loss"})),
    )  # fmt: skip
    text = json.dumps(to_plain(run))
    found = from_plain(json.loads(text))
    assert json.dumps(to_plain(found)) == text
    assert found.limits == run.limits and found.stop == run.stop
    assert found.settings == run.settings and type(found.settings["epochs"]) is int
    for name, value in STATE.items():
        kept = found.params[name]
        assert (kept.shape, kept.dtype) == (value.shape, value.dtype)
        assert kept.device.type == "meta"  # the values travel in another file
    assert list(found.params) == list(STATE)
    with pytest.raises(TypeError, match="more"):
        from_plain(json.loads(text) | {"more": 1})
