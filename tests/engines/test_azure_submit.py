"""Through the real `MLClient` to a fake Azure, which runs what it received."""

import json
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import requests
import torch

from fl_helpers import exchange, simulation
from fl_helpers.aggregation import weighted_average
from fl_helpers.cross_silo.azure_ml import pipeline, plan, rounds, snapshot, workspace
from fl_helpers.cross_silo.azure_ml.preflight import preflight
from fl_helpers.cross_silo.azure_ml.problems import AzureProblem, explain
from fl_helpers.training import ClientFunctions

from . import azure_trial, fake_azure, hospital

ROOT = Path(__file__).parents[2]
CORE = ROOT / "fl_helpers"
HELPERS = {
    f"fl_helpers/{path.relative_to(CORE)}"
    for path in (*CORE.glob("*.py"), *CORE.glob("cross_silo/*.py"))
}
HELPERS |= {"common.py", "run.json", "start.py", "files.json"}
SENT = {  # by code snapshot: all that leaves this machine
    "silo": {"prepare.py", "book.py", "train.py", "evaluate.py", "hospital.py"}
    | HELPERS,
    "orchestrator": {"initial.py", "aggregate.py", "collect.py", "initial.safetensors"}
    | HELPERS,
}


@pytest.fixture
def federation(tmp_path):
    found = azure_trial.content()
    space = found["azure_ml"]["workspace"]
    space["subscription_id"] = "12345678-9abc-def0-1234-56789abcdef0"
    return azure_trial.read(tmp_path, found)


@pytest.fixture
def data(silos_yaml):
    folders = sorted((silos_yaml.parent / "data").iterdir())
    return dict(zip(azure_trial.NAMES, folders, strict=True))


@pytest.fixture
def azure(federation, data, tmp_path, monkeypatch):
    """A fake Azure; the test fails if a name is looked up, or a call is not known."""
    fake = fake_azure.FakeAzure(federation, tmp_path / "cloud", data=data)
    lookups = []

    def no_names(host, *_, **__):
        lookups.append(host)
        raise OSError(f"look-up of {host}")

    monkeypatch.setattr(socket, "getaddrinfo", no_names)
    send = fake_azure.adapter(fake)
    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
    monkeypatch.setattr("time.sleep", fake_azure.quick_sleep)
    yield fake
    assert not fake.unknown and not lookups


@pytest.fixture
def connection(azure, federation):
    return workspace.connect(federation, credential=fake_azure.Credential())


def build(federation, folder, **more):
    params = azure_trial.model().state_dict()
    return azure_trial.build(federation, params, folder, **more)


def send(connection, federation, folder, **more):
    found = build(federation, folder, **more)
    return workspace.submit(connection, found, approved=found.digest)


@pytest.mark.engines
def test_what_is_submitted_runs_to_the_bits_of_the_simulation(
    azure, connection, federation, tmp_path, silos, capfd, monkeypatch
):
    # test_azure_local.py has the same for plans that never left this machine.
    core = tmp_path / "other" / "fl_helpers"  # to see whose the jobs import
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(CORE, core, ignore=skip)
    (core / "patients.csv").write_text("name,diagnosis\n")
    with (core / "__init__.py").open("a") as file:
        file.write("\nprint('from the upload')\n")
    monkeypatch.setattr(snapshot, "PACKAGE", core)
    sent = send(connection, federation, tmp_path)
    assert sent.name == "trial" and sent.studio_url.startswith("https://ml.azure.com/")

    # What was uploaded, by the folder's name; its container is a new one each time.
    uploaded = {}
    for path in azure.blobs:
        _, _, folder, name = path.split("/", 3)
        uploaded.setdefault(folder, set()).add(name)
    assert uploaded == SENT
    assert b"diagnosis" not in b"".join(azure.blobs.values())

    # What was sent pins each job to one party: by the text of the request.
    body = json.loads(azure.body_of("trial"))["properties"]
    owners = {party.compute: party for party in federation.parties}
    stores = {party.datastore: party for party in federation.parties}
    assert len(body["jobs"]) == 13  # initial, 2 x (3 + 1), 3 that test, collect
    for name, node in body["jobs"].items():
        party = owners[node["computeId"].rpartition("/")[2]]
        folders = node.get("inputs", {}) | node["outputs"]
        for key, where in folders.items():
            if "uri" not in where:
                continue
            store, path = re.fullmatch(
                r"azureml://datastores/(\w+)/paths/(.+)", where["uri"]
            ).groups()
            out = key in ("model_update", "scores")
            assert (stores[store] is party) != out, (name, key, where)
            if out:
                assert stores[store] is federation.azure_ml.orchestrator
                assert path.startswith(f"fl/updates/{party.key}/trial/")

    thread = azure.start("trial")
    workspace.wait(connection, "trial", poll=0.2, timeout=900)
    thread.join(10)
    numbers = workspace.download_metrics(connection, "trial", tmp_path / "reports")
    all_of_it = azure.results["trial"].metrics  # here there are those of the last round
    assert numbers == [line for line in all_of_it if line["round"] >= 1] != []
    assert set(azure.children["trial"].values()) == {"Completed"}
    assert "13/13" in capfd.readouterr().err  # the bar
    logs = [*(azure.folder / "logs").iterdir()]  # of the orchestrator's jobs
    logs = [path for path in logs if "hospital" not in path.name]
    logs += (azure.folder / "stores").glob("hospital_*/fl/private/trial/*/log.txt")
    assert len(logs) == 13
    assert all("from the upload" in path.read_text() for path in logs)

    params = azure_trial.model().state_dict()
    final = workspace.download_model(connection, "trial", tmp_path / "model", params)
    both = ClientFunctions(*hospital.functions({}))
    history = simulation.run_rounds(
        params, silos, both, weighted_average, rounds=2, seed=0
    )
    for name, value in history.params.items():
        assert torch.equal(final[name], value), name


def test_nothing_is_sent_if_the_plan_is_refused(
    azure, connection, federation, tmp_path
):
    found = build(federation, tmp_path)
    jobs = [
        replace(job, party=federation.parties[2])
        if job.name == "train_0000_hospital_a"
        else job
        for job in found.jobs
    ]
    bad, calls = replace(found, jobs=tuple(jobs)), len(azure.calls)
    with pytest.raises(plan.PlanRefused, match="train_0000_hospital_a"):
        workspace.submit(connection, bad, approved=bad.digest)
    with pytest.raises(plan.PlanRefused, match="its digest is"):
        workspace.submit(connection, found, approved="0" * 64)
    content = azure_trial.full_content()  # the same parties in another workspace
    content["azure_ml"]["workspace"]["name"] = "other"
    (tmp_path / "other").mkdir()
    other = build(azure_trial.read(tmp_path / "other", content), tmp_path / "other")
    with pytest.raises(plan.PlanRefused, match="its workspace is .*name='other'"):
        workspace.submit(connection, other, approved=other.digest)
    (tmp_path / "code/silo/patients.csv").write_text("name,diagnosis\n")
    with pytest.raises(plan.PlanRefused, match=r"\['patients.csv'\] were added"):
        workspace.submit(connection, found, approved=found.digest)
    assert len(azure.calls) == calls and not azure.blobs


def test_a_run_has_a_name_of_its_own(azure, connection, federation, tmp_path):
    send(connection, federation, tmp_path, rounds=1)
    assert workspace._gates[connection].plan is None  # shut behind it
    with pytest.raises(AzureProblem, match="'trial'.*a name of its own"):
        send(connection, federation, tmp_path, rounds=1)
    assert workspace._gates[connection].plan is None


def test_a_job_that_fails_is_named(azure, connection, federation, tmp_path):
    send(connection, federation, tmp_path, rounds=1)
    azure.jobs["trial"]["properties"]["status"] = "Failed"
    azure.children["trial"] = {
        "initial": "Completed",
        "train_0000_hospital_b": "Failed",
    }
    with pytest.raises(AzureProblem, match=r"Failed.*\['train_0000_hospital_b'\]"):
        workspace.wait(connection, "trial", show_progress=False)


def test_waiting_ends(azure, connection, federation, tmp_path):
    send(connection, federation, tmp_path, rounds=1)
    with pytest.raises(AzureProblem, match="not over after 0 s"):
        workspace.wait(connection, "trial", timeout=0, show_progress=False)
    connection.jobs.begin_cancel("trial")
    with pytest.raises(AzureProblem, match="is Canceled"):
        workspace.wait(connection, "trial", show_progress=False)


def test_a_job_that_fails_beyond_the_first_page_is_named(
    azure, connection, federation, tmp_path
):
    """130 jobs, the 121st fails: the service lists 50, unless it is asked for more."""
    send(connection, federation, tmp_path, rounds=1)
    job = azure.jobs["trial"]["properties"]
    names = [f"train_{k:04d}_hospital_a" for k in range(130)]
    job |= {"status": "Failed", "jobs": dict.fromkeys(names, job["jobs"]["initial"])}
    azure.children["trial"] = dict.fromkeys(names, "Completed") | {names[120]: "Failed"}
    assert len(list(connection.jobs.list(parent_job_name="trial"))) == 50  # a control
    with pytest.raises(AzureProblem) as problem:
        workspace.wait(connection, "trial", show_progress=False)
    assert problem.value.jobs == (names[120],)


def test_a_break_of_the_connection_does_not_end_the_waiting(
    azure, connection, federation, tmp_path, monkeypatch
):
    send(connection, federation, tmp_path, rounds=1)
    azure.jobs["trial"]["properties"]["status"] = "Completed"
    left = [requests.ConnectionError("no route")] * 12  # the SDK tries four times

    def deny(call):
        if left and call.path.endswith("/jobs/trial"):
            raise left.pop()

    monkeypatch.setattr(azure, "deny", deny)
    workspace.wait(connection, "trial", poll=0, show_progress=False)
    assert not left
    azure.denied["/jobs/trial$"] = (503, "ServerBusy", "later")
    monkeypatch.undo()
    monkeypatch.setattr(workspace, "BREAK", 0)
    send_ = fake_azure.adapter(azure)
    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send_)
    monkeypatch.setattr("time.sleep", fake_azure.quick_sleep)
    with pytest.raises(AzureProblem, match="'trial'"):
        workspace.wait(connection, "trial", poll=0, show_progress=False)


def test_errors_of_one_connection_are_not_those_of_the_run(
    azure, connection, federation, tmp_path, monkeypatch
):
    errors = [
        requests.exceptions.ReadTimeout("slow"),
        requests.exceptions.SSLError("cut"),
        requests.exceptions.ChunkedEncodingError("cut in the middle"),
        (429, "TooManyRequests", "later"),
        (408, "RequestTimeout", "later"),
        (502, "BadGateway", "later"),
    ]
    send(connection, federation, tmp_path, rounds=1)
    azure.jobs["trial"]["properties"]["status"] = "Completed"
    left = []

    def deny(call):
        if not (left and call.path.endswith("/jobs/trial")):
            return None
        found = left.pop()
        if isinstance(found, Exception):
            raise found
        return fake_azure.failure(*found)

    monkeypatch.setattr(azure, "deny", deny)
    for error in errors:
        left[:] = [error] * 12
        workspace.wait(connection, "trial", poll=0, show_progress=False)
        assert not left, error


def test_only_a_connection_of_ours_sends(federation, tmp_path):
    found = build(federation, tmp_path, rounds=1)
    with pytest.raises(TypeError, match="workspace.connect"):
        workspace.submit(fake_azure.Credential(), found, approved=found.digest)


def test_a_registered_model_says_where_it_comes_from(
    azure, connection, federation, tmp_path
):
    made = build(federation, tmp_path, rounds=1)
    model = workspace.register_model(connection, made, name="radiographs")
    body = json.loads(next(c.body for c in azure.calls if "/models/radiographs/versions"
                           in c.path and c.method == "PUT"))["properties"]  # fmt: skip
    assert body["modelUri"] == "azureml://jobs/trial/outputs/final_model"
    assert body["modelType"] == "custom_model" and model.name == "radiographs"
    assert body["tags"] == {
        "plan": made.digest,
        "report": "azureml://jobs/trial/outputs/report",
        "rounds": "1",
        "run": "trial",
        "silos": "Hospital A, Hospital B, Hospital C",
    }
    assert not azure.blobs  # nothing is uploaded: it stays where it is


def test_a_model_that_was_changed_is_refused(azure, connection, federation, tmp_path):
    send(connection, federation, tmp_path)
    azure.jobs["trial"]["properties"]["status"] = "Completed"
    params = azure_trial.model().state_dict()
    with pytest.raises(AzureProblem, match="nothing in its output"):
        workspace.download_model(connection, "trial", tmp_path / "none", params)
    made = azure.folder / "stores/orchestrator/fl/models/trial/0002"
    exchange.write_model(made, params, round_index=2)
    path = made / exchange.MODEL
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(exchange.Refused, match="SHA-256|hash"):
        workspace.download_model(connection, "trial", tmp_path / "model", params)


def test_round_by_round_with_a_quorum_until_it_gets_no_better(
    federation, tmp_path, monkeypatch
):
    azure = fake_azure.Instant(federation, tmp_path / "cloud")
    params = azure_trial.model().state_dict()
    azure.params, azure.failing = params, ("train_0001_hospital_b",)
    azure.scores = {0: 1.0, 1: 0.5, 2: 0.7, 3: 0.6}  # no better than round 1 from 2 on
    send = fake_azure.adapter(azure)
    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
    connection = workspace.connect(federation, credential=fake_azure.Credential())
    stop = simulation.Stop("loss", 2, higher_is_better=False)
    run = azure_trial.make_run(params, name="long", rounds=9, quorum=2, stop=stop)
    part = plan.Part(rounds=1)  # the digest is that of the whole run
    digest = pipeline.build_pipeline(run, federation, tmp_path, part=part).digest
    state = rounds.play_rounds(
        run,
        federation,
        tmp_path / "run",
        workspace.player(
            connection, tmp_path / "reports", approved=digest, show_progress=False
        ),
    )
    assert state["rounds_done"] == 4 and state["stopped"] and state["tested"]
    assert state["missing"] == {"1": ["Hospital B"]}
    assert not azure.unknown and len(azure.jobs) == 4 + 1 + 1  # one again, one tests
    last = workspace.download_model(
        connection, state["name"], tmp_path / "model", params
    )
    assert last.keys() == params.keys()


NO_ROLE = (
    "The client 'me' does not have authorization to perform action '{}' over scope"
)
CONNECTING = {
    "no such subscription": ("/workspaces/ws$", (404, "SubscriptionNotFound", "")),
    "no such resource group": ("/workspaces/ws$", (404, "ResourceGroupNotFound", "")),
    "workspace 'ws': it is not there": (
        "/workspaces/ws$",
        (404, "ResourceNotFound", ""),
    ),
    "`az login`, then": ("/workspaces/ws$", (401, "ExpiredAuthenticationToken", "")),
    "another tenant": (
        "/workspaces/ws$",
        (401, "InvalidAuthenticationTokenTenant", ""),
    ),
    "role is missing for M.ML/workspaces/read": (
        "/workspaces/ws$",
        (403, "AuthorizationFailed", NO_ROLE.format("M.ML/workspaces/read")),
    ),
}


@pytest.mark.parametrize("told", CONNECTING)
def test_connecting_says_what_is_wrong(told, azure, federation):
    path, answer = CONNECTING[told]
    azure.denied[path] = answer
    with pytest.raises(AzureProblem, match=re.escape(told)):
        workspace.connect(federation, credential=fake_azure.Credential())


def test_connecting_without_a_workspace_or_network(azure, federation, tmp_path):
    example = azure_trial.read(tmp_path, azure_trial.content())
    assert workspace.is_configured(federation) and not workspace.is_configured(example)
    with pytest.raises(AzureProblem, match="names no subscription"):
        workspace.connect(example, credential=fake_azure.Credential())
    azure.denied["/workspaces/ws$"] = requests.ConnectionError("no route")
    with pytest.raises(AzureProblem, match="cannot be reached"):
        workspace.connect(federation, credential=fake_azure.Credential())


def test_not_signed_in(azure, federation, monkeypatch):
    from azure.identity import CredentialUnavailableError

    class Nobody:
        def __init__(self, *, exclude_interactive_browser_credential):
            assert exclude_interactive_browser_credential is False

        def get_token(self, *scopes, **_):
            raise CredentialUnavailableError("Please run 'az login'")

    workspace.sign_in.cache_clear()
    monkeypatch.setattr("azure.identity.DefaultAzureCredential", Nobody)
    with pytest.raises(AzureProblem, match="you are not signed in; `az login`"):
        workspace.connect(federation)
    workspace.sign_in.cache_clear()


def test_sending_says_what_is_wrong(azure, connection, federation, tmp_path):
    azure.denied["code-"] = (403, "AuthorizationPermissionMismatch", "denied")
    with pytest.raises(AzureProblem, match="Storage Blob Data Contributor"):
        send(connection, federation, tmp_path, rounds=1)
    azure.denied = {
        "/jobs/trial$": (403, "AuthorizationFailed", NO_ROLE.format("M.ML/jobs/write"))
    }
    with pytest.raises(AzureProblem, match="'trial': a role is missing for M.ML/jobs"):
        send(connection, federation, tmp_path, rounds=1)
    del azure.computes["hospital-c"]
    with pytest.raises(AzureProblem, match="hospital-c"):
        send(connection, federation, tmp_path, rounds=1)


def test_other_errors_pass_without_what_opens_a_store():
    from azure.core.exceptions import HttpResponseError

    told = explain(HttpResponseError("PUT https://x/y?sv=1&sig=abc%2B&se=2 took long"))
    assert told == "Azure refuses: PUT https://x/y?sv=1&sig=...&se=2 took long"


def look(connection, federation):
    return preflight(connection, federation, credential=fake_azure.Credential())


def test_preflight_lists_what_is_there(azure, connection, federation):
    found = {(f.party, f.what, f.name): f.found for f in look(connection, federation)}
    assert found["you", "permissions in", "ws"] == "8 of 8 that are needed"
    nodes = "amlcompute, Standard_DS3_v2, 0 to 1 nodes"
    for party in federation.parties:
        assert found[party.name, "compute", party.compute] == nodes
        assert found[party.name, "identity", party.compute] == party.key
        where = f"{party.key.replace('_', '')}/{party.datastore.replace('_', '-')}"
        assert found[party.name, "datastore", party.datastore] == where
    quota = "standardDSv2Family: 16 cores needed, limit 100, 0 in use"  # 4 x 4 cores
    assert found["all", "quota in", "nowhere"] == quota
    assert len(found) == 1 + 3 * 4 + 1


def at(path, value):
    """Change what the fake has at a path of keys."""

    def change(azure):
        *keys, last = path
        found = azure
        for key in keys:
            found = getattr(found, key) if found is azure else found[key]
        found[last] = value

    return change


def remove(kind, name):
    return lambda azure: getattr(azure, kind).pop(name)


SCALE = ("computes", "hospital-a", "properties", "properties", "scaleSettings")
BREAK = {
    "Hospital B: compute 'hospital-b': it is not there": remove(
        "computes", "hospital-b"
    ),
    "Hospital C: datastore 'hospital_c': it is not there": remove(
        "datastores", "hospital_c"
    ),
    "Hospital A: compute 'hospital-a': it can have no nodes": at(
        SCALE, {"maxNodeCount": 0, "minNodeCount": 0}
    ),
    "Hospital A: compute 'hospital-a': it is Failed": at(
        ("computes", "hospital-a", "properties", "provisioningState"), "Failed"
    ),
    "orchestrator: identity 'orchestrator': it has none": at(
        ("computes", "orchestrator", "identity"), None
    ),
    "Hospital B: identity 'hospital-b': 'Hospital A' has it": at(
        ("computes", "hospital-b", "identity"),
        fake_azure.compute("hospital_a")["identity"],
    ),
    "Hospital A: datastore 'hospital_a': it holds a key": at(
        ("datastores", "hospital_a", "properties", "credentials"),
        {"credentialsType": "AccountKey", "secrets": {"secretsType": "AccountKey"}},
    ),
    "Hospital B: datastore 'hospital_b': it is hospitala/hospital-a, as": at(
        ("datastores", "hospital_b"), fake_azure.datastore("hospital_a", "hospital_a")
    ),
    "16 cores needed, limit 12": at(
        ("usages", 0), fake_azure.usage("Dedicated", 8, 12)
    ),
    "role is missing for jobs/write, components/versions/write": at(
        ("permissions", 0),
        {"actions": ["*"], "notActions": ["*/jobs/write", "*/components/*/write"]},
    ),
    "you: permissions in 'ws': a role is missing": lambda azure: azure.denied.update(
        {"permissions$": (403, "AuthorizationFailed", "")}
    ),
}


@pytest.mark.parametrize("told", BREAK)
def test_preflight_says_what_is_wrong(told, azure, connection, federation):
    BREAK[told](azure)
    with pytest.raises(AzureProblem, match=re.escape(told)) as problem:
        look(connection, federation)
    assert str(problem.value).count("\n- ") == 1


def test_preflight_says_all_at_once(azure, connection, federation):
    azure.computes.clear(), azure.datastores.clear()
    with pytest.raises(AzureProblem) as problem:
        look(connection, federation)
    assert str(problem.value).count("it is not there") == 8  # 4 parties, 2 each


def test_a_registered_environment_is_looked_for(azure, federation, tmp_path):
    found = azure_trial.content()
    found["azure_ml"]["environment"] = "azureml:fl-gpu:3"
    found["azure_ml"]["workspace"]["subscription_id"] = (
        "1" + "0" * 7 + "-0000" * 3 + ("-" + "0" * 12)
    )
    gpu = azure_trial.read(tmp_path, found)
    azure.__init__(gpu, tmp_path / "cloud")
    with pytest.raises(
        AzureProblem, match="all: environment 'fl-gpu': it is not there"
    ):
        look(workspace.connect(gpu, credential=fake_azure.Credential()), gpu)


@pytest.mark.parametrize(
    "path, fine",
    [
        ("azureml://datastores/hospital_a/paths/radiographs", True),
        ("azureml://datastores/hospital_b/paths/radiographs", False),
        ("azureml://datastores/hospital_b/paths/datastores/hospital_a/paths/x", False),
        ("https://x.blob.core.windows.net/radiographs", False),
    ],
)
def test_a_data_asset_is_in_its_silos_own_store(path, fine, azure, tmp_path):
    found = azure_trial.full_content()
    found["silos"][0]["azure_ml"]["data"] = "azureml:radiographs:3"
    fed = azure_trial.read(tmp_path, found)
    azure.__init__(fed, tmp_path / "cloud")
    about = {"dataType": "uri_folder", "dataUri": path}
    where = f"{azure.workspace}/data/radiographs/versions/3"
    azure.resources[where] = {"id": where, "name": "3", "properties": about}
    there = workspace.connect(fed, credential=fake_azure.Credential())
    if fine:
        assert look(there, fed)[-1].found == path
        return
    with pytest.raises(AzureProblem, match="data asset.*not in its own datastore"):
        look(there, fed)


NO_TELEMETRY = """
import os, socket, sys, threading, IPython
asked = []
def no_names(host, *_, **__):
    asked.append(host)
    raise OSError("no network")
socket.getaddrinfo = no_names
class Jupyter:  # as the SDK asks for it
    config = {"IPKernelApp": {}}
IPython.get_ipython = Jupyter
import requests
from pathlib import Path
from tests.engines import azure_trial, fake_azure
from fl_helpers.cross_silo.azure_ml import workspace
from fl_helpers.cross_silo.federation import read_federation
found = read_federation(sys.argv[1])
fake = fake_azure.FakeAzure(found, Path(sys.argv[1]).parent)
real = requests.adapters.HTTPAdapter.send
requests.adapters.HTTPAdapter.send = fake_azure.adapter(fake)
workspace.connect(found, credential=fake_azure.Credential())
assert not asked and threading.active_count() == 1, (asked, threading.enumerate())
requests.adapters.HTTPAdapter.send = real
from azure.ai import ml
getattr(ml, "MLClient")(fake_azure.Credential(), "sub", "rg", "ws")
assert threading.active_count() > 1, "the control: the default does start threads"
print("fine", flush=True)
os._exit(0)  # the telemetry would still try to send
"""


def test_connecting_in_jupyter_sends_no_telemetry(federation, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", NO_TELEMETRY, str(tmp_path / "silos.yaml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "fine" in done.stdout, done.stderr[-3000:]


def test_there_is_one_way_to_connect():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    )
    bare = re.compile(r"MLClient(\.from_config)?\(")
    found = [
        name
        for name in listed.stdout.splitlines()
        if name.endswith((".py", ".ipynb", ".md")) and (ROOT / name).is_file()
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
        if bare.search(line) and name != Path(__file__).relative_to(ROOT).as_posix()
    ]
    assert found == ["fl_helpers/cross_silo/azure_ml/workspace.py"]
