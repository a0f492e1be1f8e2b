"""Kills at random times in runs with masks and DP: they end, and nothing is spent or
opened twice. One in every check, twenty with FULL=1; test_secure_run.py kills workers
and the server at known places."""

import contextlib
import json
import os
import random
from dataclasses import replace

import psutil
import pytest
import torch

from fl_helpers.cross_silo import hospital as example
from fl_helpers.cross_silo.on_premises import gate, site
from fl_helpers.cross_silo.on_premises.fleet import Fleet
from fl_helpers.cross_silo.on_premises.runs import RunError
from fl_helpers.cross_silo.run import Run
from fl_helpers.exchange import Limits
from fl_helpers.models import small_cnn
from fl_helpers.silos import Examples, Silo

from .conftest import write_trial

pytestmark = pytest.mark.engines
NAMES = [f"Hospital {k}" for k in "ABCD"]
WHO = ["worker", "hospital", "server"]
SETTINGS = {"num_classes": 2, "noise_multiplier": 2.0, "max_grad_norm": 1.0}
SETTINGS |= {"sample_rate": 0.5, "steps": 1, "lr": 0.1}
# With FULL=1 the machine may be busy: a run gives up if nobody is there in time.
HOW_MANY, DEADLINE = (20, 120) if os.environ.get("FULL") else (1, 40)
ROUNDS = 3


@pytest.fixture(scope="module")
def params():
    torch.manual_seed(0)
    return small_cnn(2, norm="group").state_dict()


@pytest.fixture(scope="module")
def fleet(params, tmp_path_factory):
    trial = write_trial(tmp_path_factory.mktemp("trial"), dict.fromkeys(NAMES, 40))
    with Fleet(trial, tmp_path_factory.mktemp("soak"), ready=180) as fleet:
        client = "fl_helpers.cross_silo.hospital:private_client"
        for number, own in enumerate(fleet.sites.values()):
            rng = torch.Generator().manual_seed(number)
            x, y = torch.rand(40, 1, 28, 28, generator=rng), torch.arange(40) % 2
            silo = Silo(own.silo, Examples(x[:28], y[:28]), Examples(x[28:], y[28:]))
            example.save_silo(silo, own.data)
            budget = {"client": client, "epsilon": 1000.0, "delta": 1e-3}
            site.write_site(fleet.kits / own.name, replace(own, **budget))
            gate.allow(fleet.kits / own.name, params, secure=True)
        yield fleet


def strike(fleet, who, silo):
    """Kill, and start again what does not start again by itself."""
    if who == "worker":
        fleet.kill_worker(silo)
        return
    name = "server" if who == "server" else site.site_name(silo)
    for process in fleet.own_processes():
        with contextlib.suppress(psutil.Error):  # it has ended by itself
            if str(fleet.kits / name) in " ".join(process.cmdline()):
                process.kill()
    fleet.processes[name].wait(20)
    fleet.start_process(name)
    if who == "server":
        fleet.wait_ready()


@pytest.mark.parametrize("number", range(HOW_MANY))
def test_a_run_survives_a_kill(fleet, params, number):
    rng = random.Random(number)
    who, silo, at = WHO[number % 3], rng.choice(NAMES), rng.randrange(1, 16)
    limits = Limits(metrics=frozenset({"steps"}))
    how = {"rounds": ROUNDS, "seed": number, "quorum": 3, "deadline": DEADLINE}
    more = {"settings": SETTINGS, "limits": limits, "evaluate": False}
    run = Run(f"soak_{number}", params, secure=True, **how, **more)
    seen, struck = 0, False
    for _ in range(4):
        try:
            for _event in fleet.run(run, timeout=6 * DEADLINE):
                seen += 1
                if seen == at and not struck:
                    struck = True
                    strike(fleet, who, silo)
            break
        except RunError:
            assert struck, "it failed by itself"
            fleet.wait_ready()
    # What the server wrote: a kill may come before the reader of events has seen all.
    lines = (fleet.kits / "server/runs" / run.name / "events.jsonl").read_text()
    events = [json.loads(line) for line in lines.splitlines() if line.endswith("}")]
    ends = {n["round"]: n["silos"] for n in events if n["event"] == "round_end"}
    assert sorted(ends) == list(range(ROUNDS)), (who, silo, at)
    assert all(len(silos) >= 3 for silos in ends.values())
    final = fleet.result(run)
    assert all(value.isfinite().all() for value in final.values())
    for name in NAMES:
        check_memory(fleet, run, name)


def check_memory(fleet, run, silo):
    """What a hospital wrote: one set opened a round, each turn spent once, and nothing
    sent that was not booked."""
    kit = fleet.kits / site.site_name(silo)
    (folder,) = [
        path.parent
        for path in (kit / "secure").glob("*/keys.json")
        if path.parent.name == run_id(fleet, run)
    ]
    lines = (folder / "answered.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines if line.endswith("}")]
    trained = [line for line in lines if line["kind"] == "train"]
    for index in range(ROUNDS):
        here = [line for line in trained if line["round"] == index]
        opened = {(n["attempt"], *n["silos"]) for n in here if n["opened"]}
        assert len(opened) <= 1
        questions = {n["attempt"]: n["silos"] for n in here}
        assert all(n["silos"] == questions[n["attempt"]] for n in here)
        assert len({n["plain"] for n in here}) <= 1  # and so no mask served twice
    booked = [
        n for n in fleet.account(silo).lines if n["run"].startswith(f"{run.name} ")
    ]
    rounds = [line["round"] for line in booked]
    assert len(rounds) == len(set(rounds))
    assert {line["round"] for line in trained} <= set(rounds)


def run_id(fleet, run):
    path = fleet.folder / "jobs" / run.name / "app" / "config" / "run.json"
    return json.loads(path.read_text())["id"]
