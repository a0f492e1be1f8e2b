"""What a run costs: by hand, and as docs/azure-ml.md says."""

import csv
import re
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import play

from fl_helpers.planning import (
    OVERHEAD,
    Overhead,
    patients_needed,
    run_cost,
    visible_gain,
)
from fl_helpers.simulation import state_bytes
from fl_helpers.training import Update

ROOT = Path(__file__).parent.parent
PLAN = dict(silos=4, rounds=10, training_minutes=5, mbit_per_s=100)


def test_cost_by_hand():
    # a round sends 2 * 4 * 75 MB = 600 MB = 4,800 Mbit: 48 s at 100 Mbit/s
    overhead = Overhead(start_minutes=2, end_minutes=4)
    plan = PLAN | dict(overhead=overhead, price_per_hour=(0.5, 3))
    cost = run_cost(75_000_000, **plan)
    minutes = 2 + 10 * (5 + 0.8) + 4
    assert cost == pytest.approx(
        {
            "gigabytes": 6.0,
            "hours": minutes / 60,
            "transfer_hours": 8 / 60,
            "machine_hours": 5 * minutes / 60,
            "cost_from": 0.5 * 5 * minutes / 60,
            "cost_to": 3 * 5 * minutes / 60,
        }
    )


def test_bytes_are_those_that_a_simulation_counts():
    params = {"w": torch.zeros(7), "n": torch.zeros(3, dtype=torch.int64)}
    silos = [type("Silo", (), {"name": name}) for name in "ABC"]

    def client(params, silo, **_):
        return Update(silo.name, params, 1)

    first = lambda updates: list(updates)[0].params  # noqa: E731
    history = play(params, silos, client, first, rounds=2, seed=0)
    plan = PLAN | dict(silos=3, rounds=2)
    cost = run_cost(state_bytes(params), **plan)
    assert cost["gigabytes"] * 1e9 == pytest.approx(history.bytes_sent)


def test_hours_are_those_of_the_azure_guide():
    guide = (ROOT / "docs/azure-ml.md").read_text()
    said = re.search(r"For (`o` = .*?), all in minutes", guide)[1]
    n = {k: float(v) for k, v in re.findall(r"`(\w+)` = ([\d.]+)", said)}
    rows = re.findall(r"(?m)^\| (\d+) \| (\d+) \| \d+ \| (\d+) \| (\d+) \|", guide)
    assert len(rows) == 4
    for rounds, silos, kept, given_back in rows:
        both = dict(rounds=int(rounds), silos=int(silos), mbit_per_s=1e9)
        both |= dict(training_minutes=n["t"])
        each, end = 2 * n["o"] + n["a"], 2 * n["o"] + 1
        more = 2 * n["b"]
        for told, extra in ((kept, 0), (given_back, more)):
            times = Overhead(n["b"], each + extra, end + extra)
            hours = run_cost(1, **both, overhead=times)["hours"]
            assert abs(60 * hours - int(told)) <= 0.51
            names = {0: "Azure ML, machines kept"}
            name = names.get(extra, "Azure ML, machines given back")
            assert OVERHEAD[name] == times


def test_overhead_of_own_machines_is_what_was_measured():
    with (ROOT / "docs/results/engines.csv").open() as file:
        row = next(csv.DictReader(file))
    assert row["engine"].endswith("/on_premises") and row["silos"] == "4"
    measured = (
        float(row[k]) / 60 for k in ("first_round_s", "later_round_s", "stop_s")
    )
    assert astuple(OVERHEAD["own machines"]) == pytest.approx([*measured], abs=5e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(silos=0), "silos must be >= 1, got 0"),
        (dict(rounds=-1), "rounds must be >= 1, got -1"),
        (dict(mbit_per_s=0), "mbit_per_s must be > 0"),
        (dict(price_per_hour=(3, 1)), "lowest, highest"),
        (dict(training_minutes=-1), "training_minutes must be >= 0"),
        (
            dict(overhead=Overhead(end_minutes=float("nan"))),
            "end_minutes must be >= 0, got nan",
        ),
    ],
)
def test_impossible_plans_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        run_cost(1, **PLAN | change)


def test_patients_by_hand():
    # (1.95996 * sqrt(0.2) + 0.84162 * sqrt(0.2 - 0.01))^2 / 0.01 = 154.6
    assert patients_needed(0.1, 0.2) == 155
    # power 0.5 has a quantile of 0: 1.95996^2 * 0.2 / 0.01 = 76.8
    assert patients_needed(0.1, 0.2, power=0.5) == 77


@pytest.mark.parametrize(("gain", "disagree"), [(0.05, 0.15), (0.1, 0.3), (0.03, 0.2)])
def test_so_many_patients_show_the_gain_in_four_of_five_trials(gain, disagree):
    """Trials in which both models are tested, counted by McNemar's test."""
    rng, trials = np.random.default_rng(0), 20_000
    n = patients_needed(gain, disagree)
    only_new, only_old = (disagree + gain) / 2, (disagree - gain) / 2
    shares = [only_new, only_old, 1 - disagree]
    new, old, _ = rng.multinomial(n, shares, size=trials).T
    found = (new - old) / np.sqrt(np.maximum(new + old, 1)) > 1.959964
    assert found.mean() == pytest.approx(0.8, abs=0.02)  # chance alone: 0.003


@pytest.mark.parametrize("disagree", [0.1, 0.2, 1.0])
@pytest.mark.parametrize("power", [0.5, 0.8, 0.95])
def test_the_visible_gain_needs_that_many_patients(disagree, power):
    for patients in (400, 1000, 30_000):
        gain = visible_gain(patients, disagree, power=power)
        assert patients_needed(gain * 1.0001, disagree, power=power) <= patients
        assert patients_needed(gain * 0.98, disagree, power=power) > patients


def test_too_few_patients_show_nothing():
    assert visible_gain(3, 0.1) == visible_gain(30, 0.1) == float("inf")
    assert visible_gain(100, 0.1) < 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: patients_needed(0, 0.2), "0 < gain <= disagree"),
        (lambda: patients_needed(5, 20), "0.05 is five points"),
        (lambda: patients_needed(0.3, 0.2), "got 0.3 and 0.2"),
        (lambda: patients_needed(0.1, float("nan")), "got 0.1 and nan"),
        (lambda: patients_needed(0.1, 0.2, power=1), "power must be"),
        (lambda: visible_gain(100, 0.2, confidence=95), "confidence must be"),
        (lambda: visible_gain(0, 0.2), "patients >= 1"),
    ],
)
def test_impossible_tests_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_uncertainty_of_a_sensitivity_in_the_plan_guide():
    """1.96 * sqrt(p (1 - p) / n) for p = 0.8, in points."""
    guide = (ROOT / "docs/plan-your-fl-project.md").read_text()
    patients = re.search(r"in the test set \| (.+) \|\n", guide)[1].split(" | ")
    told = re.search(r"in points \| (.+) \|\n", guide)[1].split(" | ")
    for n, points in zip(patients, told, strict=True):
        true = 100 * 1.96 * (0.8 * 0.2 / int(n)) ** 0.5
        assert points == f"± {true:.0f}"


def test_patients_for_a_gain_in_the_plan_guide():
    guide = (ROOT / "docs/plan-your-fl-project.md").read_text()
    gains = re.search(r"gain, in points \| (.+) \|\n", guide)[1].split(" | ")
    told = re.search(r"with the disease \| ([\d, |]+) \|\n\nA hosp", guide)[1].split(
        " | "
    )
    assert "15 % of them" in " ".join(guide.split())
    for gain, patients in zip(gains, told, strict=True):
        assert patients == f"{patients_needed(int(gain) / 100, 0.15):,}"


def test_anchors_of_the_plan_guide_exist():
    folder = ROOT / "docs"
    text = (folder / "plan-your-fl-project.md").read_text()
    found = re.findall(r"\]\(([\w./-]*\.md)?#([\w-]+)\)", text)
    assert len(found) > 30
    for file, anchor in found:
        target = (folder / file).read_text() if file else text
        titles = re.findall(r"(?m)^#+ (.+)$", target)
        anchors = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
        assert anchor in anchors, f"{file}#{anchor}"
