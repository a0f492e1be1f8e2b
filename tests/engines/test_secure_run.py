"""Secure runs of real processes: the sum's bits, and nothing else at the server."""

import pytest

from fl_helpers import aggregation
from fl_helpers.cross_silo.fixed_point import ALL, SecureAverage
from fl_helpers.cross_silo.on_premises import gate
from fl_helpers.cross_silo.on_premises.fleet import Fleet
from fl_helpers.cross_silo.run import Run
from fl_helpers.simulation import Terms, run_rounds
from fl_helpers.training import ClientFunctions

from . import hospital
from .conftest import LIMITS, METRICS, SIZES

pytestmark = pytest.mark.engines
LIMIT = 90  # seconds that any run of these tests may take
TOTAL = sum(SIZES.values())


@pytest.fixture(scope="module")
def fleet(silos_yaml, params, tmp_path_factory):
    with Fleet(silos_yaml, tmp_path_factory.mktemp("secure"), ready=60) as fleet:
        agree(fleet, params)
        yield fleet


def agree(fleet, params, keep_local=()):
    for site in fleet.sites:
        how = {"keep_local": keep_local, "metrics": METRICS, "secure": True}
        gate.allow(fleet.kits / site, params, **how)


def new_run(name, params, **options):
    basis = dict(rounds=3, seed=7, quorum=3, deadline=40, limits=LIMITS, secure=True)
    return Run(name=name, params=params, **basis | options)


def play(fleet, run):
    return list(fleet.run(run, timeout=LIMIT))


def of(events, kind):
    return [event for event in events if event["event"] == kind]


def simulate(run, silos, settings=None, rule=aggregation.weighted_average):
    """The same run in one process: the same integers, without masks."""
    both = ClientFunctions(*hospital.functions(settings or {}))
    return run_rounds(
        run.params, silos, both, SecureAverage(rule, run.shared, total=TOTAL),
        rounds=run.rounds, seed=run.seed, terms=Terms(keep_local=run.keep_local),
    )  # fmt: skip


def assert_same_bits(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].equal(value), name


def test_a_secure_run_has_the_bits_of_the_simulated_one(fleet, params, silos):
    run = new_run("fedavg", params)
    events = play(fleet, run)
    expected = simulate(run, silos)
    assert_same_bits(fleet.result(run), expected.params)
    ends = of(events, "round_end")
    assert [e["silos"] for e in ends] == [list(SIZES)] * 3
    for end, record in zip(ends, expected.rounds, strict=True):
        losses = [record["train"][silo]["train_loss"] for silo in SIZES]
        # A metric is off by half of 2^-32 per silo.
        mean = pytest.approx(sum(losses) / 3, abs=1e-9)
        assert end["train"][ALL]["train_loss"] == mean
    tested = {e["rounds"]: e["test"][ALL] for e in of(events, "tested")}
    losses = [expected.rounds[2]["test"][silo]["loss"] for silo in SIZES]
    assert tested[3]["loss"] == pytest.approx(sum(losses) / 3, abs=1e-9)
