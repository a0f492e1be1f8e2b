"""A run survives its server, coordinator, hospitals and disk, with the same bits.

Real processes; each test of a run ends with the model of `simulation.run_rounds`.
"""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import torch

from fl_helpers.cross_silo.on_premises import runs
from fl_helpers.cross_silo.on_premises.fleet import Fleet
from fl_helpers.cross_silo.on_premises.runs import Patience
from fl_helpers.cross_silo.run import Run

from . import hospital, lines
from .conftest import LIMITS, METRICS, wait_until
from .test_certificates import write_certificate
from .test_on_premises import assert_same_bits, simulate

pytestmark = pytest.mark.engines
LIMIT = 300  # seconds for a run; a fraction of it on a quiet machine
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def fleet(silos_yaml, tmp_path_factory):
    torch.manual_seed(0)
    params = hospital.new_model().state_dict()
    with Fleet(silos_yaml, tmp_path_factory.mktemp("survive"), ready=180) as fleet:
        fleet.allow(params, metrics=METRICS)
        yield fleet


def new_run(name, params, **change):
    basis = dict(rounds=4, seed=7, deadline=60, limits=LIMITS)
    return Run(name, params, **basis | change)


def of(events, kind):
    return [event for event in events if event["event"] == kind]


def play(fleet, run, **how):
    """As a coordinator does, whom nobody tells that a process has ended."""
    return runs.play(run, fleet.session, **fleet.places, timeout=LIMIT, **how)


def stop(fleet, who):
    fleet.processes[who].kill()
    fleet.processes[who].wait(10)


def test_the_servers_parent_is_killed(fleet, silos, params):
    """It is said, and when the server is back the same call goes on, with the moments
    that FedAdam remembers, and the hospitals' FedProx."""
    trainable = [name for name, _ in hospital.new_model().named_parameters()]
    rule = {"aggregate": "FedAdam", "options": {"lr": 0.02}, "trainable": trainable}
    settings = {"mu": 0.1}
    run = new_run("parent", params, rounds=5, settings=settings, **rule)
    events = []
    for event in play(fleet, run, patience=Patience(silence=3)):
        events.append(event)
        if (
            event["event"] == "round_end"
            and event["round"] == 1
            and "dead" not in run.name
        ):
            if not of(events, "no_answer") and not of(events, "restart"):
                stop(fleet, "server")
        if event["event"] == "no_answer" and len(of(events, "no_answer")) == 1:
            fleet.start_process("server")
    fleet.wait_ready()
    assert of(events, "no_answer")[0]["seconds"] >= 3
    (restart,) = of(events, "restart")
    assert "started anew" in restart["reason"]
    assert of(events, "start")[1]["round"] >= 2  # at most one round is played again
    expected = simulate(run, silos, settings, run.make_rule(params))
    assert_same_bits(fleet.result(run), expected.params)


def test_the_coordinators_interpreter_is_killed(fleet, silos, faults):
    """The same lines again follow the job that runs, instead of a second one."""
    faults("Hospital A", {6: "held"})  # so that it still runs when they are run again
    run, log = lines.new_run(), fleet.kits / "server/runs/again/events.jsonl"
    command = [sys.executable, "-m", "engines.lines", fleet.server.admin]
    command += [str(fleet.kits), str(fleet.folder / "jobs")]
    how = {
        "env": os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        "stdout": subprocess.PIPE, "text": True,
    }  # fmt: skip
    first = subprocess.Popen(command, **how)
    try:
        wait_until(lambda: '"round_end"' in first.stdout.readline(), LIMIT, "a round")
    finally:
        first.kill()
        first.communicate()
    rounds = log.read_text().count('"round_end"')
    wait_until(lambda: log.read_text().count('"round_end"') > rounds, 90, "it goes on")
    events = []
    with subprocess.Popen(command, **how) as second:
        watch = threading.Timer(LIMIT, second.kill)
        watch.start()
        for line in second.stdout:
            if line.startswith("{"):
                events.append(json.loads(line))
                faults("Hospital A", {})
        watch.cancel()
    assert second.returncode == 0
    assert events[0]["event"] == "attached" and events[-1]["event"] == "done"
    ends = [e["round"] for e in of(events, "round_end")]
    assert ends == list(range(run.rounds))  # each once, from the first on
    jobs = fleet.session.list_jobs()
    assert sum(job["job_name"] == run.name for job in jobs) == 1
    assert_same_bits(fleet.result(run), simulate(run, silos).params)


def test_two_hospitals_are_started_anew(fleet, silos, params):
    """They come back into the same run; without their quorum it waits for them."""
    run = new_run("waits", params, deadline=15, wait_for_quorum=300)
    events = []
    both = ("Hospital-B", "Hospital-C")
    for event in play(fleet, run):
        events.append(event)
        if event["event"] == "round_end" and event["round"] == 0:
            for who in both:
                stop(fleet, who)
        if event["event"] == "waiting" and len(of(events, "waiting")) == 1:
            for who in both:
                fleet.start_process(who)
    waiting = of(events, "waiting")[0]
    assert waiting["silos"] == ["Hospital B", "Hospital C"] and waiting["round"] == 1
    assert "'Hospital B' is away since round 1" in waiting["reason"]
    assert any("take part again" in e["reason"] for e in of(events, "restart"))
    assert [len(e["silos"]) for e in of(events, "round_end")] == [3] * 4
    assert_same_bits(fleet.result(run), simulate(run, silos).params)


def test_the_last_checkpoint_is_damaged(fleet, silos, params):
    """The file is named, and the run goes on from the round before."""
    run = new_run("damaged", params, rounds=3)
    list(play(fleet, run))
    path = fleet.kits / "server/runs/damaged/model_0003/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    longer = replace(run, rounds=5)
    events = list(play(fleet, longer))
    (damaged,) = of(events, "damaged")
    assert "damaged/model_0003 cannot be used" in damaged["reason"]
    assert of(events, "start")[0]["round"] == 2
    assert_same_bits(fleet.result(longer), simulate(longer, silos).params)


def test_an_expired_certificate_is_said_where_it_lies(fleet):
    """The engine itself says nothing: the hospital would just never appear."""
    stop(fleet, "Hospital-C")
    path = fleet.kits / "Hospital-C" / "startup" / "client.crt"
    kept, log = path.read_bytes(), fleet.logs / "Hospital-C.log"
    now, size = datetime.now(timezone.utc), log.stat().st_size
    try:
        yesterday = now - timedelta(days=1)
        write_certificate(path, "Hospital-C", now - timedelta(days=9), yesterday)
        fleet.start_process("Hospital-C")
        what = f"ended on {yesterday:%Y-%m-%d}"
        wait_until(lambda: what in log.read_text()[size:], 90, "its log says it")
    finally:
        stop(fleet, "Hospital-C")
        path.write_bytes(kept)
    fleet.start_process("Hospital-C")
    fleet.wait_ready()
