"""A real run with masks and DP: a hospital's budget is its own, and ends its part."""

from dataclasses import replace

import pytest
import torch

from fl_helpers.cross_silo import hospital as example
from fl_helpers.cross_silo.account import SiloAccount
from fl_helpers.cross_silo.fixed_point import ALL
from fl_helpers.cross_silo.on_premises import gate, site
from fl_helpers.cross_silo.on_premises.fleet import Fleet
from fl_helpers.cross_silo.on_premises.runs import RunError
from fl_helpers.cross_silo.run import Run
from fl_helpers.exchange import Limits, read_ledger
from fl_helpers.models import small_cnn
from fl_helpers.privacy import Budget, epsilon_spent
from fl_helpers.silos import Examples, Silo

from .conftest import write_trial

pytestmark = pytest.mark.engines
NAMES = [f"Hospital {k}" for k in "ABCD"]
METRICS = ("test_balanced_accuracy", "test_auroc")
SETTINGS = {"num_classes": 2, "noise_multiplier": 2.0, "max_grad_norm": 1.0}
SETTINGS |= {"sample_rate": 0.5, "steps": 2, "lr": 0.1}
DELTA = 1e-3


def cost(rounds):
    return epsilon_spent(((2.0, 0.5, 2 * rounds),), DELTA)


@pytest.fixture(scope="module")
def params():
    torch.manual_seed(0)
    return small_cnn(2, norm="group").state_dict()


@pytest.fixture(scope="module")
def fleet(params, tmp_path_factory):
    trial = write_trial(tmp_path_factory.mktemp("trial"), dict.fromkeys(NAMES, 40))
    with Fleet(trial, tmp_path_factory.mktemp("private"), ready=180) as fleet:
        client = "fl_helpers.cross_silo.hospital:private_client"
        for number, own in enumerate(fleet.sites.values()):
            rng = torch.Generator().manual_seed(number)
            x, y = torch.rand(40, 1, 28, 28, generator=rng), torch.arange(40) % 2
            silo = Silo(own.silo, Examples(x[:28], y[:28]), Examples(x[28:], y[28:]))
            example.save_silo(silo, own.data)
            # A's budget is for two rounds, that of the others for four.
            epsilon = cost(2 if own.silo == "Hospital A" else 4) * 1.001
            budget = {"client": client, "epsilon": epsilon, "delta": DELTA}
            site.write_site(fleet.kits / own.name, replace(own, **budget))
            gate.allow(fleet.kits / own.name, params, metrics=METRICS, secure=True)
        yield fleet


def new_run(name, params):
    limits = Limits(metrics=frozenset({"steps", *METRICS}))
    how = {"rounds": 6, "seed": 1, "quorum": 3, "settings": SETTINGS, "limits": limits}
    return Run(name, params, secure=True, deadline=60, **how)


def of(events, kind):
    return [event for event in events if event["event"] == kind]


def account(fleet, silo):
    own = site.read_site(fleet.kits / site.site_name(silo))
    budget = Budget(own.epsilon, own.delta)
    path = fleet.kits / own.name / "privacy" / "account.jsonl"
    return SiloAccount(path, budget, silo=silo)


def test_a_budget_ends_one_hospitals_part_and_then_the_run(fleet, params):
    run = new_run("first", params)
    events = list(fleet.run(run, timeout=120))
    ends = of(events, "round_end")
    assert [e["silos"] for e in ends] == [NAMES] * 2 + [NAMES[1:]] * 2
    spent = {(e["silo"], e["round"]) for e in of(events, "refused")}
    assert spent == {("Hospital A", 2), *((name, 4) for name in NAMES[1:])}
    assert {e["reason"] for e in of(events, "refused")} == {
        "the site answered PRIVACY_BUDGET_SPENT"
    }
    (stopped,) = of(events, "stopped")
    assert stopped["round"] == 3
    assert "the privacy budget is spent at ['Hospital A', 'Hosp" in stopped["reason"]
    assert events[-1] == {**events[-1], "event": "done", "rounds": 4}
    final = fleet.result(run)  # the model of the last round that there was
    assert all(value.isfinite().all() for value in final.values())
    assert ends[3]["train"][ALL] == {"steps": 2.0}
    for name in NAMES:
        rounds = 2 if name == "Hospital A" else 4
        assert account(fleet, name).epsilon == cost(rounds)
    codes = [e for e in fleet.ledger("Hospital A") if e["what"].startswith("code")]
    assert [e["what"] for e in codes] == ["code PRIVACY_BUDGET_SPENT"]
    server = read_ledger(fleet.kits / "server/runs/first/ledger.jsonl")[0]
    kinds = {e["what"] for e in server if e["verdict"] == "accepted"}
    assert kinds == {"masked_weights", "masked_numbers", "num_examples", "attempt"}


def test_another_run_on_the_same_records_does_not_begin(fleet, params):
    before = {name: account(fleet, name).lines for name in NAMES}
    events = list(fleet.run(new_run("second", params), timeout=120))
    assert of(events, "round_end") == []
    assert of(events, "stopped")[0]["reason"].startswith("the privacy budget is spent")
    assert fleet.result(new_run("second", params))["head.bias"].equal(
        params["head.bias"]
    )
    assert {name: account(fleet, name).lines for name in NAMES} == before


def test_a_run_without_a_hospitals_own_budget_gets_nothing(fleet, params):
    """A budget is the hospital's setting; a run cannot bring one."""
    for own in fleet.sites.values():
        kit = fleet.kits / own.name
        site.write_site(kit, replace(site.read_site(kit), epsilon=None, delta=None))
    with pytest.raises(RunError, match="EXECUTION_EXCEPTION"):
        list(fleet.run(new_run("third", params), timeout=120))
