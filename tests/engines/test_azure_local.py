"""A plan run on this machine ends with the bits of the simulation; jobs stay inside."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from fl_helpers import exchange, simulation
from fl_helpers.cross_silo import sandbox
from fl_helpers.cross_silo.azure_ml import plan, run_locally, start
from fl_helpers.training import ClientFunctions

from . import attacker, azure_trial, hospital

NAMES = azure_trial.NAMES[:2]


@pytest.fixture
def federation(tmp_path):
    return azure_trial.read(tmp_path, azure_trial.content(NAMES))


@pytest.fixture
def data(silos_yaml):
    folders = sorted((silos_yaml.parent / "data").iterdir())
    return dict(zip(azure_trial.NAMES, folders, strict=True))


def simulated(params, silos, rule):
    """What `run_rounds` makes of it in this process."""
    both = ClientFunctions(*hospital.functions({}))
    return simulation.run_rounds(params, silos[:2], both, rule, rounds=2, seed=0)


def assert_same(folder, history):
    final = exchange.read_model(folder, history.params, round_index=2)
    for name, value in history.params.items():
        assert torch.equal(final[name], value), name


@pytest.mark.engines
def test_a_run_that_fails_goes_on_and_ends_with_the_bits_of_the_simulation(
    federation, data, tmp_path, silos, faults
):
    params, said = azure_trial.model().state_dict(), []
    clipped = {"aggregate": "NormClipping", "options": {"max_norm": 0.5}}
    graph = azure_trial.build(federation, params, tmp_path, **clipped)
    how = {"data": data, "show": said.append}

    faults("Hospital B", {0: "raise"})
    name = "train_0000_hospital_b"
    said_so = f"(?s){name} exited.*patient_4711"
    with pytest.raises(run_locally.RunError, match=said_so) as e:
        run_locally.run(graph, tmp_path, workers=1, **how)
    log = tmp_path / "logs" / f"{name}.log"
    assert str(log) in str(e.value)
    assert log.read_text() == (
        "hospital_b, round 0: RuntimeError; more in the silo, private/log.txt\n"
    )

    faults("Hospital B", {})
    said.clear()
    result = run_locally.run(graph, tmp_path, **how)
    # What depends on Hospital B's folder, which has changed, is done again.
    assert skipped(said) == {"initial", "train_0000_hospital_a"}
    assert len(said) == len(graph.jobs) == 10

    rule = azure_trial.make_run(params, **clipped).make_rule(params)
    history = simulated(params, silos, rule)
    assert_same(result.model, history)
    check_metrics(result.metrics, history)
    check_ledger(result.ledger("Hospital A"), params)
    assert set(result.seconds) == {job.name for job in graph.jobs}

    said.clear()
    (tmp_path / "done" / "collect.json").unlink()
    graph = azure_trial.build(federation, params, tmp_path, **clipped)  # code anew
    run_locally.run(graph, tmp_path, **how)
    assert skipped(said) == {job.name for job in graph.jobs} - {"collect"}


def skipped(said):
    """Jobs that were not run again; a line is "was done  1.2 s  name (...)"."""
    return {line.split()[4] for line in said if line.startswith("was done")}


def check_metrics(found, history):
    """Tests in round r are of the model that it began with, so of record r - 1."""
    for line in found:
        index, kind = line["round"], line["metric"]
        if kind.startswith("test_") and index > 0:
            record = history.rounds[index - 1]["test"]
            assert line["value"] == record[line["silo"]][kind.removeprefix("test_")]
        elif not kind.startswith("test_"):
            assert line["value"] == history.rounds[index]["train"][line["silo"]][kind]
    kinds = {(line["round"], line["silo"], line["metric"]) for line in found}
    tests = {(r, s, f"test_{m}") for r in range(3) for s in NAMES for m in METRICS}
    train = {
        (r, s, m) for r in range(2) for s in NAMES for m in ("train_loss", "steps")
    }
    assert kinds == tests | train and len(found) == len(kinds)


METRICS = ("loss", "accuracy")


def check_ledger(found, params):
    out = [line for line in found if line["direction"] == "out"]
    assert {line["silo"] for line in out} == {"Hospital A"}
    assert all(line["verdict"] == "accepted" for line in found)
    numbers = ["num_examples", "train_loss", "steps", "test_loss", "test_accuracy"]
    scores = ["num_examples", "test_loss", "test_accuracy"]
    expected = [*params, *numbers] * 2 + scores
    assert sorted(line["what"] for line in out) == sorted(expected)
    came = [line["what"] for line in found if line["direction"] == "in"]
    assert sorted(came) == sorted([*params] * 3)


# ---- jobs stay inside


@pytest.fixture
def only_prepare(tmp_path, monkeypatch):
    """The jobs that prepare the silos' data, with a function of the attacker's."""
    monkeypatch.setattr(run_locally, "check_plan", lambda plan: None)  # not a whole one

    def build(function, **settings):
        content = azure_trial.content(NAMES)
        content["azure_ml"]["prepare"] = f"{attacker.__file__}:{function}"
        fed = azure_trial.read(tmp_path, content)
        params = azure_trial.model().state_dict()
        graph = azure_trial.build(fed, params, tmp_path, settings=settings)
        jobs = tuple(job for job in graph.jobs if job.kind == "prepare")
        return replace(graph, jobs=jobs)

    return build


@pytest.mark.parametrize("kind", ["bubblewrap", "landlock"])
def test_a_silos_job_sees_nothing_of_another(kind, only_prepare, tmp_path, data):
    if not sandbox.works(kind):
        pytest.skip(f"{kind} does not work on this machine: isolation is NOT tested")
    places = {}
    for name in NAMES:  # a shell would run what this folder is called
        places[name] = tmp_path / f"{name} $(touch pwned); touch pwned"
        places[name].mkdir()
        content = (data[name] / "data.safetensors").read_bytes()
        (places[name] / "data.safetensors").write_bytes(content)
    name = f"fl-{os.getpid()}"  # of a socket without a file
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as other,
    ):
        other.bind(f"\0{name}")
        other.listen()
        jobs = only_prepare(
            "prepare",
            other=str(places["Hospital B"]),
            pid=os.getpid(),
            socket=name,
            port=server.getsockname()[1],
        )
        graph = replace(jobs, jobs=jobs.jobs[:1])
        assert graph.jobs[0].name == "prepare_hospital_a"
        run_locally.run(graph, tmp_path, data=places, sandbox_kind=kind)
    target = tmp_path / "stores/hospital_a/fl/prepared/trial/data"
    done = json.loads((target / "done.json").read_text())
    # bubblewrap: beside its folders is an empty file system that ends with the job.
    assert set(done) - {"write beside"} == {"read own"}
    assert not (target.parent.parent / "x").exists()
    assert not [*tmp_path.rglob("pwned")] and not Path("pwned").exists()


def test_what_a_silos_job_prints_or_raises_stays_in_its_store(
    only_prepare, tmp_path, data
):
    graph = only_prepare("talk")
    with pytest.raises(run_locally.RunError, match="cannot read patient_4711.dcm"):
        run_locally.run(graph, tmp_path, data=data, workers=1)
    log = (tmp_path / "logs/prepare_hospital_a.log").read_text()
    assert log == "hospital_a, data: ValueError; more in the silo, private/log.txt\n"
    private = tmp_path / "stores/hospital_a/fl/private/trial/prepare"
    assert (private / "log.txt").read_text().count("patient_4711") >= 5
    assert (private / "outputs/patient_4711").exists()
    assert not [*(tmp_path / "code").rglob("outputs")]


def test_a_job_that_takes_too_long_is_ended_with_its_children(
    only_prepare, tmp_path, data
):
    graph = only_prepare("wait")
    with pytest.raises(run_locally.RunError, match="took too long after"):
        run_locally.run(graph, tmp_path, data=data, timeout=8, workers=1)
    from engines.conftest import wait_until

    def sleeping():
        found = psutil.process_iter(["cmdline"])
        return [p for p in found if (p.info["cmdline"] or [])[-1:] == ["60.25"]]

    wait_until(lambda: not sleeping(), 10, "the job's child ends")


def test_missing_data_are_named_before_anything_runs(federation, tmp_path):
    graph = azure_trial.build(federation, azure_trial.model().state_dict(), tmp_path)
    missing = "nothing at .*hospital_a/radiographs.*hospital_b/radiographs"
    with pytest.raises(run_locally.RunError, match=missing):
        run_locally.run(graph, tmp_path)
    assert not [*(tmp_path / "logs").iterdir()]


def test_a_refused_plan_does_not_run(federation, tmp_path):
    graph = azure_trial.build(federation, azure_trial.model().state_dict(), tmp_path)
    bad = replace(graph, jobs=graph.jobs[:-1])
    with pytest.raises(plan.PlanRefused, match="collect: the job is None"):
        run_locally.run(bad, tmp_path)
    assert not (tmp_path / "stores").exists()


# ---- a job looks at its code and its environment first


def snapshot_of(federation, folder):
    plan = azure_trial.build(federation, azure_trial.model().state_dict(), folder)
    return plan.code["silo"], plan.codes["silo"]


TAMPERINGS = {  # what is done to a snapshot: (how, whether a job would run it)
    "a script": (lambda f: (f / "train.py").write_text("import os"), False),
    "a helper": (lambda f: (f / "fl_helpers/models.py").unlink(), False),
    "the run": (lambda f: (f / "run.json").write_text("{}"), False),
    "the list": (lambda f: start.write_files(f), True),
    "a module beside": (lambda f: (f / "torch.py").write_text(""), False),
    "a compiled module": (lambda f: (f / "json.pyc").write_bytes(b""), False),
    "a library": (lambda f: (f / "fl_helpers/_x.so").write_bytes(b""), False),
    "a link to a file": (lambda f: (f / "x.txt").symlink_to("/etc/passwd"), False),
    "a link to a folder": (lambda f: (f / "torch").symlink_to("/tmp"), False),
    "a script that is a link": (
        lambda f: (
            shutil.move(f / "train.py", f.parent / "train.py"),
            (f / "train.py").symlink_to(f.parent / "train.py"),
        ),
        False,
    ),
    "patients": (lambda f: (f / "patients.csv").write_text("x"), False),
    "an ignore file": (lambda f: (f / ".amlignore").write_text("x"), False),
    "logs of the service": (lambda f: (f / "logs").mkdir(), True),
    "a note": (lambda f: (f / "note.txt").write_text("x"), True),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_code_that_is_not_what_was_signed(name, federation, tmp_path):
    """The list itself unchanged is nothing; notes stay here, and do no harm there."""
    folder, digest = snapshot_of(federation, tmp_path)
    start.verify(folder, digest, exactly=True)
    tamper, harmless = TAMPERINGS[name]
    tamper(folder)
    if harmless:
        start.verify(folder, digest)
    else:
        with pytest.raises(ValueError, match="is not the code"):
            start.verify(folder, digest)
    if name not in ("the list", "logs of the service"):  # an empty folder is not sent
        with pytest.raises(ValueError, match="is not the code"):
            start.verify(folder, digest, exactly=True)
    with pytest.raises(ValueError, match="is not the code with the digest 000"):
        start.verify(folder, "0" * 64)


SHOW = """
import os, pathlib, sys
raw = pathlib.Path("/proc/self/environ").read_text()
print(sorted(k for k in os.environ if "ML" in k or k == "RANK"), "s3cret" in raw)
"""


@pytest.mark.parametrize(
    "script, seen",
    [
        ("train.py", "['RANK'] False"),
        ("collect.py", "['AZUREML_RUN_TOKEN', 'MLFLOW_TRACKING_URI', 'RANK'] True"),
    ],
)
def test_a_silos_script_finds_no_token(script, seen, tmp_path):
    shutil.copy(start.__file__, tmp_path / "start.py")
    (tmp_path / script).write_text(SHOW)
    digest = start.write_files(tmp_path)
    secret = dict.fromkeys(("AZUREML_RUN_TOKEN", "MLFLOW_TRACKING_URI"), "s3cret")
    path = {"PATH": os.environ["PATH"], "RANK": "0"}
    line = [sys.executable, "-B", "start.py", digest, script, "--x", "y"]
    how = dict(cwd=tmp_path, env=path | secret, capture_output=True, text=True)
    done = subprocess.run(line, **how)
    assert done.stdout.strip() == seen, done.stderr
    (tmp_path / script).write_text("print('another')")
    done = subprocess.run(line, **how)
    assert done.returncode and not done.stdout
    assert f"['{script}'] differ" in done.stderr


# ---- metrics


@pytest.fixture
def common(monkeypatch):
    """The jobs' shared file, as a module."""
    path = Path(run_locally.__file__).parent / "jobs" / "common.py"
    spec = importlib.util.spec_from_file_location("azure_common", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "azure_common", module)
    spec.loader.exec_module(module)
    return module


FOUND = {"Hospital A": {"train_loss": 0.5}, "Hospital B": {"train_loss": 0.25}}


def test_metrics_go_to_a_file_without_mlflow(common, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "azureml://x")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    common.report(tmp_path, 3, FOUND)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"round": 3, "silo": "Hospital A", "metric": "train_loss", "value": 0.5},
        {"round": 3, "silo": "Hospital B", "metric": "train_loss", "value": 0.25},
    ]


def test_metrics_go_to_the_run_of_the_whole_pipeline(common, tmp_path, monkeypatch):
    logged = []

    class Client:
        def log_metric(self, run, name, value, *, step):
            logged.append((run, name, value, step))

    fake = SimpleNamespace(MlflowClient=Client, __spec__=object())
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    common.report(tmp_path, 3, FOUND)
    assert logged == []  # no tracking server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "azureml://x")
    monkeypatch.setenv("MLFLOW_RUN_ID", "job")
    monkeypatch.setenv("AZUREML_ROOT_RUN_ID", "root")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "")
    common.report(tmp_path, 3, FOUND)
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert logged == [
        ("root", "Hospital A/train_loss", 0.5, 3),
        ("root", "Hospital B/train_loss", 0.25, 3),
    ]


def many(silos):
    names = [f"Hospital {k:02d}" for k in range(silos)]
    return {name: {"steps": 1.0, "test_auroc": 0.5, "loss": 1.0} for name in names}


def test_a_fault_of_the_curves_never_fails_a_round_and_they_are_at_most_fifty(
    common, tmp_path, monkeypatch, capsys
):
    logged = []

    class Client:
        def log_metric(self, run, name, value, *, step):
            logged.append(name)
            if len(logged) == 60:
                raise ConnectionError("no answer")

    fake = SimpleNamespace(MlflowClient=Client, __spec__=object())
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    for key in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.setenv(key, "x")
    common.report(tmp_path, 0, many(20))
    assert len(logged) == 50 and "10 metrics are only in" in capsys.readouterr().out
    assert {f"Hospital {k:02d}/test_auroc" for k in range(20)} <= set(logged)
    first = list(logged)
    common.report(tmp_path, 1, many(20))  # fails at the tenth
    assert logged[50:] == first[:10]
    assert "no answer" in capsys.readouterr().err
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 60
