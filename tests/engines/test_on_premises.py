"""A fleet of real processes: the simulation's bits, through faults and restarts."""

import contextlib
import inspect
import json
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import psutil
import pytest
import torch
from nvflare.app_common.job_launcher.client_process_launcher import (
    ClientProcessJobLauncher,
)
from nvflare.recipe import ProdEnv

from fl_helpers import aggregation, robust
from fl_helpers.cross_silo import hospital as example
from fl_helpers.cross_silo.federation import read_federation
from fl_helpers.cross_silo.on_premises import gate, job, provision, runs
from fl_helpers.cross_silo.on_premises.fleet import Fleet
from fl_helpers.cross_silo.on_premises.runs import RunError
from fl_helpers.cross_silo.on_premises.worker import RelaunchLauncher
from fl_helpers.cross_silo.run import Run
from fl_helpers.models import small_cnn
from fl_helpers.scaffold import zero_variates
from fl_helpers.silos import Examples, Silo
from fl_helpers.simulation import Stop, Terms, run_rounds, silo_rng
from fl_helpers.training import ClientFunctions, norm_entries

from . import dishonest, hospital
from .conftest import LIMITS, METRICS, wait_until

pytestmark = pytest.mark.engines
ROOT = Path(__file__).parents[2]
GATE = f"{gate.__name__}.EgressGate"
LIMIT = 90  # seconds that any run of these tests may take


@pytest.fixture(scope="module")
def fleet(silos_yaml, params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet")
    provision.provision(read_federation(silos_yaml), folder)
    fleet = Fleet(silos_yaml, folder, ready=180)
    for who in ("server", *fleet.sites):
        add_neighbour(fleet, who)
    (folder / "code" / "sitecustomize.py").write_text(RECORD_LOOK_UPS)
    with fleet:
        agree(fleet, params)
        yield fleet


def add_neighbour(fleet, who):
    """A component of the tests in each process, and the file that it is in."""
    (fleet.folder / "code").mkdir(exist_ok=True)
    shutil.copy(dishonest.__file__, fleet.folder / "code")
    path = fleet.kits / who / "local" / "resources.json"
    resources = json.loads(path.read_text())
    component = {"id": "neighbour", "path": "dishonest.Neighbour", "args": {}}
    resources["components"].append(component)
    path.write_text(json.dumps(resources))


RECORD_LOOK_UPS = """
import os, socket

def note(text):
    with open(os.path.join(os.environ["HOME"], "looked_up"), "a") as file:
        print(text, file=file)

def recorded(real):
    def look_up(host, *args, **more):
        note(host)
        return real(host, *args, **more)
    return look_up

note("recording")
for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
    setattr(socket, name, recorded(getattr(socket, name)))
"""


def agree(fleet, params, keep_local=()):
    """Every hospital lets the entries of this model out."""
    for site in fleet.sites:
        kit = fleet.kits / site
        gate.allow(kit, params, keep_local=keep_local, metrics=METRICS)


def new_run(name, params, **options):
    basis = dict(rounds=3, seed=7, quorum=3, deadline=40, limits=LIMITS)
    return Run(name=name, params=params, **basis | options)


def play(fleet, run):
    return list(fleet.run(run, timeout=LIMIT))


def of(events, kind):
    return [event for event in events if event["event"] == kind]


def simulate(run, silos, settings=None, aggregate=aggregation.weighted_average):
    both = ClientFunctions(*hospital.functions(settings or {}))
    return run_rounds(
        run.params, silos, both, aggregate, rounds=run.rounds, seed=run.seed,
        terms=Terms(keep_local=run.keep_local),
    )  # fmt: skip


def assert_same_bits(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].equal(value), name


def kill(fleet, who, *roles):
    """Kill a participant's processes whose command line names one of the roles."""
    for process in fleet.own_processes():
        with contextlib.suppress(psutil.Error):  # it ended with one killed before
            line = " ".join(process.cmdline())
            if str(fleet.kits / who) in line and any(role in line for role in roles):
                process.kill()


@pytest.fixture(scope="module")
def first(fleet, params):
    """The run that the tests below look at, its events, and to whom its processes were
    connected at the end of each round."""
    run, events, remote = new_run("fedavg", params), [], set()
    for event in fleet.run(run, timeout=LIMIT):
        events.append(event)
        if event["event"] == "round_end":
            remote |= {
                link.raddr.ip.removeprefix("::ffff:")
                for process in fleet.own_processes()
                for link in process.net_connections("tcp")
                if link.raddr
            }
    return run, events, remote


def test_three_rounds_equal_the_simulation(fleet, first, params, silos):
    run, events, _ = first
    expected = simulate(run, silos)
    assert_same_bits(fleet.result(run), expected.params)
    ends = of(events, "round_end")
    assert [e["round"] for e in ends] == [0, 1, 2]
    assert [e["train"] for e in ends] == [r["train"] for r in expected.rounds]
    tested = {e["rounds"]: e["test"] for e in of(events, "tested")}
    assert sorted(tested) == [0, 1, 2, 3]
    assert [tested[r + 1] for r in range(3)] == [r["test"] for r in expected.rounds]
    # Each tensor of each update is in the hospital's own ledger, with its size.
    out = [e for e in fleet.ledger("Hospital A") if e["direction"] == "out"]
    sent = [e for e in out if e["what"] in params and e["round"] == 2]
    assert {e["what"]: e["bytes"] for e in sent} == {
        name: value.nbytes for name, value in params.items()
    }


def test_no_host_but_this_one_is_looked_up_or_connected_to(fleet, first):
    _, _, remote = first
    assert remote == {"127.0.0.1"}  # there are connections, all of them here
    own = {"localhost", "127.0.0.1", "::1", "None", "", "0.0.0.0", socket.gethostname()}
    for who in ("server", *fleet.sites):
        names = (fleet.kits / who / "looked_up").read_text().split("\n")
        assert "recording" in names and set(names) <= own | {"recording"}, who


def test_scaffold_with_a_killed_worker_equals_the_simulation(fleet, silos, params):
    start = params | zero_variates(hospital.new_model())
    own = [name for name in start if name.startswith("own_variate.")]
    settings = {"scaffold": 1}
    run = new_run("scaffold", start, keep_local=own, settings=settings)
    agree(fleet, start, keep_local=own)
    try:
        for event in fleet.run(run, timeout=LIMIT):
            if event["event"] == "round_end" and event["round"] == 0:
                fleet.kill_worker("Hospital B")
    finally:
        agree(fleet, params)
    assert_same_bits(fleet.result(run), simulate(run, silos, settings).params)


def test_fedbn_fails_without_quorum_and_goes_on(fleet, silos, params, faults):
    """Hospitals B and C do round 1 twice, both times from the layers of round 0."""
    own = norm_entries(hospital.new_model())
    run = new_run("fedbn", params, keep_local=own)
    agree(fleet, params, keep_local=own)
    faults("Hospital A", {1: "raise"})
    try:
        with pytest.raises(RunError, match="round 1: 2 valid updates, the quorum is"):
            play(fleet, run)
        faults("Hospital A", {})
        events = play(fleet, run)
    finally:
        agree(fleet, params)
    assert of(events, "start")[0]["round"] == 1
    assert_same_bits(fleet.result(run), simulate(run, silos).params)
    sent = {e["what"] for e in fleet.ledger("Hospital B") if e["direction"] == "out"}
    assert sent >= set(params) - set(own)


def test_bad_updates_cost_one_hospital_one_round(
    fleet, silos, params, faults, silos_yaml
):
    plan = dict(enumerate(["", "raise", "nan", "shape", "lacks", "images", "metric"]))
    if fleet.sandbox_kind != "none":
        plan[7] = f"read {silos_yaml.parent / 'data/hospital_0/data.safetensors'}"
    faults("Hospital B", plan)
    how = {"rounds": len(plan), "quorum": 2, "aggregate": "coordinate_median"}
    run = new_run("refused", params, **how)
    events = play(fleet, run)
    refused = {e["round"]: e for e in of(events, "refused")}
    assert sorted(refused) == list(plan)[1:]
    assert {e["silo"] for e in refused.values()} == {"Hospital B"}
    assert max(e["seconds"] for e in of(events, "round_end")[1:]) < run.deadline / 2
    reasons = [e["reason"] for e in refused.values()]
    assert reasons[0] == "the site answered EXECUTION_EXCEPTION"
    unread = "the site answered DATA_UNREADABLE"  # another hospital's data
    assert reasons[6:] in ([], [unread])
    assert set(reasons[1:6]) == {"the site answered TASK_RESULT_FILTER_ERROR"}
    # The hospital's own ledger and log say what it was; the coordinator never learns.
    entries = fleet.ledger("Hospital B")
    said = [e["reason"] for e in entries if e["verdict"] == "refused"]
    for text in ("36 NaN", "[3]", "1 missing", "'images'", "patient_4711"):
        assert any(text in reason for reason in said), (text, said)
    assert "patient_4711.dcm" in (fleet.logs / "Hospital-B.log").read_text()
    for path in (fleet.kits / "server").rglob("*"):
        if path.is_file():
            assert b"patient_4711" not in path.read_bytes(), path
    # By hand, with the rule that the run names: from round 1 on, of A and C alone.
    update, _ = hospital.functions({})
    state = params
    for r in range(run.rounds):
        present = silos if r == 0 else [silos[0], silos[2]]
        state = robust.coordinate_median(
            update(state, s, round_index=r, rng=silo_rng(run.seed, s.name, r))
            for s in present
        )
    assert_same_bits(fleet.result(run), state)


def test_a_hospital_that_lies_costs_itself_only(fleet, silos, params):
    """Its own gate is gone: the coordinator's checks have to do."""
    path = fleet.kits / "Hospital-C" / "local" / "privacy.json"
    honest = path.read_text()
    path.write_text(honest.replace(GATE, "dishonest.NoGate"))
    lies = dishonest.NoGate.LIES
    run = new_run("lies", params, rounds=len(lies), quorum=2, evaluate=False)
    try:
        events = play(fleet, run)
    finally:
        path.write_text(honest)
    refused = [(e["silo"], e["round"]) for e in of(events, "refused")]
    assert refused == [("Hospital C", r) for r in range(len(lies))]
    reasons = dict(zip(lies, (e["reason"] for e in of(events, "refused")), strict=True))
    for lie, text in {"nan": "NaN", "hash": "SHA-256", "text": "bytes"}.items():
        assert text in reasons[lie], reasons
    honest_run = replace(run, quorum=1)
    assert_same_bits(fleet.result(run), simulate(honest_run, silos[:2]).params)
    inbox = fleet.kits / "server/runs/lies/inbox"
    assert not any(path.is_file() for path in inbox.rglob("*"))


def test_straggler_is_left_out_and_asked_again(fleet, params, faults):
    faults("Hospital C", {1: "slow 5"})
    run = new_run("straggler", params, rounds=40, quorum=2, deadline=3)
    events = play(fleet, run)
    first, second, *later = of(events, "round_end")
    assert len(first["silos"]) == 3
    assert second["missing"] == ["Hospital C"] and second["seconds"] < 5
    assert [e["silo"] for e in of(events, "back")] == ["Hospital C"]
    assert len(later[0]["silos"]) == 2 and len(later[-1]["silos"]) == 3
    assert len(of(events, "missing")) == 1  # one deadline is lost, not more


def test_a_dead_hospital_does_not_stop_the_others(fleet, params):
    run = new_run("dead", params, rounds=5, quorum=2, deadline=3)
    events = []
    for event in fleet.run(run, timeout=LIMIT):
        events.append(event)
        if event["event"] == "round_end" and event["round"] == 0:
            kill(fleet, "Hospital-A", "client_train", "worker_process")
            fleet.processes["Hospital-A"].wait(10)
    assert of(events, "round_end")[-1]["silos"] == ["Hospital B", "Hospital C"]
    fleet.start_process("Hospital-A")
    fleet.wait_ready()
    stop = Stop("loss", patience=1)  # higher is better, but the loss falls
    again = play(fleet, new_run("alive", params, rounds=9, stop=stop))
    assert [len(e["silos"]) for e in of(again, "round_end")] == [3, 3]
    assert of(again, "stopped")[0]["round"] == 1


def test_a_run_that_the_engine_gave_up_goes_on(fleet, silos, params):
    """Without our launcher, a hospital's dead worker ends the run of all hospitals."""
    path = fleet.kits / "Hospital-B" / "local" / "resources.json"
    before = path.read_text()
    stock = ClientProcessJobLauncher
    ours = f"{RelaunchLauncher.__module__}.{RelaunchLauncher.__name__}"
    assert ours in before
    path.write_text(before.replace(ours, f"{stock.__module__}.{stock.__name__}"))
    restart(fleet, "Hospital-B")
    run, events = new_run("given_up", params), []
    for event in fleet.run(run, timeout=LIMIT):
        events.append(event)
        if event["event"] == "round_end" and event["round"] == 0:
            fleet.kill_worker("Hospital B")
    assert [e["event"] for e in events].count("restart") == 1
    assert "EXECUTION_EXCEPTION" in of(events, "restart")[0]["reason"]
    assert_same_bits(fleet.result(run), simulate(run, silos).params)
    path.write_text(before)
    restart(fleet, "Hospital-B")


def restart(fleet, who):
    fleet.processes[who].kill()
    fleet.processes[who].wait(10)
    fleet.start_process(who)
    fleet.wait_ready()


def test_jobs_bring_neither_code_nor_other_classes(fleet, params, tmp_path):
    silos = [silo.name for silo in fleet.federation.silos]
    run = new_run("other", params, rounds=1, quorum=1)
    code = job.write_job(run, tmp_path / "code", silos)
    (code / "app" / "custom").mkdir()
    (code / "app" / "custom" / "mine.py").write_text("print('hello')")
    sent = fleet.session.submit_job(str(code))
    line = runs.Line(fleet.session, runs.Patience())
    wait_until(lambda: line.verdict(sent), 60, "the server refuses it")
    assert "FAILED_TO_RUN" in line.verdict(sent)
    other = job.write_job(run, tmp_path / "class", silos)
    config = other / "site" / "config" / "config_fed_client.json"
    stock = "nvflare.app_common.np.np_trainer.NPTrainer"
    content = json.loads(config.read_text())
    content["executors"][0]["executor"] = {"path": stock, "args": {}}
    config.write_text(json.dumps(content))
    sent = fleet.session.submit_job(str(other))
    wait_until(lambda: line.verdict(sent), 60, "all hospitals refuse it")
    assert "FAILED_TO_RUN" in line.verdict(sent)
    codes = line.left_out(sent, fleet.sites).values()
    assert len(codes) == 3 and all(c.startswith("CLASS_REFUSED (") for c in codes)
    assert f"CLASS_REFUSED: the job names ['{stock}']" in log_of(fleet, "Hospital-B")
    # Without the look at jobs that arrive, the list of classes holds by itself.
    path = fleet.kits / "Hospital-B" / "local" / "resources.json"
    before = path.read_text()
    resources = json.loads(before)
    del resources["app_validator"]
    path.write_text(json.dumps(resources))
    restart(fleet, "Hospital-B")
    sent = fleet.session.submit_job(str(other))
    why = f"{stock}' at config path"
    wait_until(lambda: why in log_of(fleet, "Hospital-B"), 60, "the worker refuses it")
    fleet.session.abort_job(sent)
    path.write_text(before)
    restart(fleet, "Hospital-B")


def log_of(fleet, site):
    return (fleet.logs / f"{site}.log").read_text()


def test_every_process_listens_on_the_loopback_interface_only(fleet):
    found = [
        connection.laddr.ip
        for process in fleet.own_processes()
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert found
    assert set(found) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_second_fleet_in_the_folder_is_refused(fleet, silos_yaml):
    with pytest.raises(RunError, match="another fleet runs"):
        Fleet(silos_yaml, fleet.folder).start()
    assert fleet.processes["server"].poll() is None


def test_hospitals_cannot_talk_to_each_other(fleet):
    """With the guards of both sides, and with the hospital's own alone."""
    check_neighbours(fleet)
    assert "HubGuard refused" in (fleet.logs / "server.log").read_text()
    fleet.stop()
    path = fleet.kits / "server" / "local" / "resources.json"
    resources = json.loads(path.read_text())
    without = [c for c in resources["components"] if c["id"] != "hub_guard"]
    path.write_text(json.dumps(resources | {"components": without}))
    fleet.start()
    check_neighbours(fleet)
    assert "SiteGuard refused" in (fleet.logs / "Hospital-B.log").read_text()


def check_neighbours(fleet):
    """Hospital A says hello to B, and, as a control, to the server: that works."""
    kit = fleet.kits / "Hospital-A"
    (kit / "greet").write_text("server Hospital-B")
    wait_until((kit / "answers").exists, 60, "Hospital A asked around")
    answers = json.loads((kit / "answers").read_text())
    assert answers["server"] == "ok" and answers["Hospital-B"] != "ok"
    assert (fleet.kits / "server" / "greeted_by").read_text() == "Hospital-A\n"
    assert not (fleet.kits / "Hospital-B" / "greeted_by").exists()
    for path in (kit / "greet", kit / "answers", fleet.kits / "server" / "greeted_by"):
        path.unlink()


def test_the_plain_job_of_notebook_10_is_one_that_nvflare_runs(tmp_path):
    """Its two files, with one site and one round, in NVFlare's own simulator."""
    path = ROOT / "notebooks" / "10_on_your_own_machines.ipynb"
    cells = nbformat.read(path, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    script, recipe = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    rng = torch.Generator().manual_seed(0)
    x, y = torch.rand(40, 1, 64, 64, generator=rng), torch.arange(40) % 3
    silo = Silo("Hospital A", Examples(x, y), Examples(x, y))
    example.save_silo(silo, tmp_path / "data")
    here = f"num_clients=1, workspace_root={str(tmp_path / 'all')!r}"
    for old, new in {
        "num_clients=4": here, "min_clients=4": "min_clients=1",
        "num_rounds=12": "num_rounds=1",
    }.items():  # fmt: skip
        assert old in recipe
        recipe = recipe.replace(old, new)
    assert "/srv/fl/data" in script
    script = script.replace("/srv/fl/data", str(tmp_path / "data"))
    (tmp_path / "train.py").write_text(script)
    (tmp_path / "job.py").write_text(recipe)
    command = [sys.executable, "job.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=3 * LIMIT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    final = next((tmp_path / "all").rglob("FL_global_model.pt"))
    model = torch.load(final, weights_only=True)["model"]
    assert model.keys() == small_cnn(3).state_dict().keys()
    # Two epochs of 40 // 16 batches: four steps, which BatchNorm has counted.
    assert model["body.1.num_batches_tracked"] == 4
    assert "username" in inspect.signature(ProdEnv).parameters
