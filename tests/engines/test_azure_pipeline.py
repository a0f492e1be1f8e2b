"""`silos.yaml` and the graph of jobs that is made of it; no network, no workspace."""

import json
import re
import socket
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from fl_helpers.cross_silo.azure_ml import federation, pipeline, plan
from fl_helpers.cross_silo.on_premises import provision

from . import azure_trial

ROOT = Path(federation.__file__).parents[3]
EXAMPLE = ROOT / "fl_helpers" / "silos.yaml"


# ---- silos.yaml


def test_the_example_file_serves_both_engines():
    found = federation.read_federation(EXAMPLE)
    assert [silo.name for silo in found.silos] == [
        site.silo for site in provision.read_silos(EXAMPLE).sites
    ]
    assert (
        found.silos[0].key == "hospital_a" and found.silos[0].outbox == "orchestrator"
    )
    assert found.released == {"model_update", "scores"}
    assert found.owner(compute="hospital-c").name == "Hospital C"
    assert found.owner(datastore="hospital-c") is None  # that is a compute
    assert found.owner(compute="", datastore="") is None


def test_silos_are_in_the_order_of_their_names(tmp_path):
    content = azure_trial.content(("Zeta", "Beta", "Alpha"))
    names = [silo.name for silo in azure_trial.read(tmp_path, content).silos]
    assert names == ["Alpha", "Beta", "Zeta"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.pop("azure_ml"), "azure_ml.workspace.subscription_id is missing"),
        (
            lambda c: c["silos"][1].pop("azure_ml"),
            r"silos\[1\].azure_ml.compute is miss",
        ),
        (lambda c: c["silos"][1].pop("name"), r"silos\[1\].name is missing"),
        (lambda c: c.update(silos=c["silos"][:1]), r"silos\[1\].name is missing"),
        (lambda c: c.update(rounds=3), r"line \d+: rounds is not a known key"),
        (lambda c: c["silos"][0].update(x=1), r"silos\[0\].x is not a known key"),
        (lambda c: c["silos"][1].update(name="a/b"), r"silos\[1\].name must match"),
        (lambda c: c["silos"][1].update(name=7), r"name must match .* got 7"),
        (
            lambda c: c["silos"][1].update(name="Hospital-A"),
            "the key 'hospital_a' is used twice",
        ),
        (lambda c: c["silos"][1].update(name="Hospital A"), "key 'hospital_a' is used"),
        (lambda c: c["silos"][1].update(name="Orchestrator"), "used twice, by 'orch"),
        (
            lambda c: c["silos"][1]["azure_ml"].update(compute="Hospital-A"),
            "the compute 'Hospital-A' is used twice, by 'Hospital A' and 'Hospital B'",
        ),
        (
            lambda c: c["silos"][1]["azure_ml"].update(datastore="orchestrator"),
            "'orchestrator' is used twice, by 'orchestrator' and 'Hospital B'",
        ),
        (
            lambda c: c["silos"][1]["azure_ml"].update(outbox="hospital_a"),
            "the outbox 'hospital_a' of 'Hospital B' belongs to 'Hospital A'",
        ),
        (
            lambda c: c["silos"][1]["azure_ml"].update(data="x/../../y"),
            r"silos\[1\].azure_ml.data must be a folder of its own",
        ),
        (
            lambda c: c["silos"][1]["azure_ml"].update(data="fl/x"),
            r"silos\[1\].azure_ml.data must be a folder of its own",
        ),
        (lambda c: c["silos"][1]["azure_ml"].update(data="/x"), "data must match"),
        (lambda c: c["azure_ml"].update(client="x"), "azure_ml.client must match"),
        (
            lambda c: c["azure_ml"].update(environment="azureml:x@latest"),
            "environment must match",
        ),
        (
            lambda c: c["azure_ml"]["workspace"].update(subscription_id="mine"),
            "subscription_id must match",
        ),
        (lambda c: c["azure_ml"].update(metrics=["a b"]), r"metrics\[0\] must match"),
    ],
)
def test_an_error_names_the_file_and_the_key(tmp_path, change, message):
    content = azure_trial.content()
    change(content)
    with pytest.raises(ValueError, match=rf"silos\.yaml: .*{message}"):
        azure_trial.read(tmp_path, content)


@pytest.mark.parametrize(
    "text, message",
    [
        ("silos: [", "is not YAML"),
        ("", "azure_ml.workspace.subscription_id is missing|silos.*missing|missing"),
        ("&a [*a]", "is not YAML"),
        ("project: a\n\nproject: b\n", "line 3: project is given twice"),
        ("project: a\nsilos:\n- {name: x,\n   nam: y}\n", r"line 4: silos\[0\].nam is"),
    ],
)
def test_a_file_that_is_something_else(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"mine\.yaml.*({message})"):
        federation.read_federation(tmp_path / "mine.yaml")


def test_only_some_silos():
    found = federation.read_federation(EXAMPLE)
    some = found.only(["Hospital D", "Hospital B"])
    assert [silo.name for silo in some.silos] == ["Hospital B", "Hospital D"]
    with pytest.raises(ValueError, match=r"no such silos: \['Hospital E'\]"):
        found.only(["Hospital B", "Hospital E"])


# ---- the graph


@pytest.fixture
def fed(tmp_path):
    return azure_trial.read(tmp_path, azure_trial.content())


@pytest.fixture
def params():
    return azure_trial.model().state_dict()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a look-up of a host")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_the_jobs_of_a_run_and_the_sdk_finds_nothing_wrong(fed, params, tmp_path):
    before = {name: value.clone() for name, value in params.items()}
    job = azure_trial.job(fed, params, tmp_path, rounds=3)
    assert job._validate().passed
    keys = ("hospital_a", "hospital_b", "hospital_c")
    names = ["initial"]
    for index in range(3):
        names += [f"train_000{index}_{key}" for key in keys]
        names += [f"aggregate_000{index}"]
    assert list(job.jobs) == names + [f"evaluate_{key}" for key in keys] + ["collect"]
    assert job.experiment_name == "trial" and job.settings.force_rerun
    final = job.outputs["final_model"].path
    assert final == "azureml://datastores/orchestrator/paths/fl/models/trial/0003"
    for name, value in before.items():
        assert torch.equal(params[name], value)


def test_a_round_by_itself_and_the_test_by_itself(fed, params, tmp_path):
    """What a driver needs that decides after each round."""
    one = azure_trial.build(
        *(fed, params, tmp_path), run="r2", rounds=3, warm_start=("r1", 2), final=False
    )
    assert [job.name for job in one.jobs] == [
        *(f"train_0002_hospital_{key}" for key in "abc"), "aggregate_0002"
    ]  # fmt: skip
    reads = {(flow.store, flow.path) for job in one.jobs for flow in job.reads}
    assert ("orchestrator", "fl/models/r1/0002") in reads
    plan.check_plan(one, fed)
    last = azure_trial.build(
        *(fed, params, tmp_path), run="end", rounds=3, warm_start=("r2", 3)
    )
    assert [job.kind for job in last.jobs] == ["evaluate"] * 3 + ["collect"]
    plan.check_plan(last, fed)
    assert not (tmp_path / "code/orchestrator/initial.safetensors").exists()


def test_a_quorum_plays_without_the_silo_that_is_missing(fed, params, tmp_path):
    some = fed.only(["Hospital A", "Hospital C"])
    graph = azure_trial.build(
        some, params, tmp_path, run="r", rounds=3, warm_start=("r1", 2), final=False
    )
    plan.check_plan(graph, some)
    back = azure_trial.build(
        *(fed, params, tmp_path),
        **{"run": "s", "rounds": 4, "warm_start": ("r", 3), "final": False},
        **{"keep_local": ["3.bias"], "kept": {"Hospital B": ("r1", 2)}},
    )
    plan.check_plan(back, fed)
    kept = [flow.path for j in back.jobs for flow in j.reads if flow.name == "kept"]
    assert kept == ["fl/kept/r/0003", "fl/kept/r1/0002", "fl/kept/r/0003"]
    assert {job.compute for job in graph.jobs} == {
        *("hospital-a", "hospital-c", "orchestrator")
    }


def test_what_a_kubernetes_compute_and_an_own_environment_need(params, tmp_path):
    content = azure_trial.content()
    content["silos"][0]["azure_ml"]["instance_type"] = "gpu"
    content["azure_ml"]["orchestrator"]["instance_type"] = "small"
    content["azure_ml"]["environment"] = "azureml:fl-gpu:3"
    fed = azure_trial.read(tmp_path, content)
    found = azure_trial.job(fed, params, tmp_path)._to_dict()
    kinds = {name: job.get("resources") for name, job in found["jobs"].items()}
    assert kinds["train_0000_hospital_a"] == {"instance_type": "gpu"}
    assert kinds["collect"] == {"instance_type": "small"}
    assert kinds["train_0000_hospital_b"] is None
    graph = plan.read_plan(found)
    plan.check_plan(graph, fed)
    assert {job.environment for job in graph.jobs} == {"azureml:fl-gpu:3"}


@pytest.mark.parametrize(
    "more, message",
    [
        ({"run": "a/b"}, "run must be letters, digits, _ and -, got 'a/b'"),
        ({"rounds": 0}, "rounds must be >= 1"),
        ({"warm_start": ("x", 3)}, "rounds must be >= 1 and >= 3"),
        ({"warm_start": ("x", 2), "final": False}, "as many are done"),
        ({"keep_local": ["x"]}, r"unknown: \['x'\]"),
        ({"aggregate": "median"}, "aggregate must be weighted_average"),
        ({"aggregate": "FedAdam"}, "trainable must name"),
        ({"client": "x.py"}, "client must be module:function"),
    ],
)
def test_what_cannot_be_run_is_said_before_it_is_built(
    fed, params, tmp_path, more, message
):
    with pytest.raises(ValueError, match=message):
        azure_trial.job(fed, params, tmp_path, **more)
    assert not (tmp_path / "code").exists()


def test_nothing_is_shared_or_nobody_shares(fed, params, tmp_path):
    with pytest.raises(ValueError, match="keep_local must name .* not all"):
        azure_trial.job(fed, params, tmp_path, keep_local=list(params))
    with pytest.raises(ValueError, match="a run needs 2 silos, got 1"):
        azure_trial.job(fed.only(["Hospital A"]), params, tmp_path)


# ---- what is uploaded

OURS = {f"fl_helpers/{path.name}" for path in (ROOT / "fl_helpers").glob("*.py")}
SILO = {"common.py", "train.py", "evaluate.py", "prepare.py", "run.json", "hospital.py"}
MAIN = {"common.py", "initial.py", "aggregate.py", "collect.py", "run.json"}


def uploaded(folder):
    """What the SDK would upload of a folder."""
    from azure.ai.ml._utils import _asset_utils as sdk

    ignore = sdk.get_ignore_file(folder)
    found = sdk.get_upload_files_from_folder(str(folder), ignore_file=ignore)
    return {str(Path(path).relative_to(folder)) for path, _ in found}


def test_only_our_files_and_the_clients_are_uploaded(fed, params, tmp_path):
    for _ in range(2):  # the second run finds what was put there
        azure_trial.job(fed, params, tmp_path, settings={"lr": 0.1 + 0.2})
        for part in ("silo", "orchestrator"):
            folder = tmp_path / "code" / part
            for name in ("patients.csv", "fl_helpers/patients.csv", "x/train.py"):
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text("patient_4711")
    main = MAIN | {"initial.safetensors"}
    assert uploaded(tmp_path / "code/silo") == SILO | OURS
    assert uploaded(tmp_path / "code/orchestrator") == main | OURS
    run = json.loads((tmp_path / "code/silo/run.json").read_text())
    assert run["client"] == "hospital.py:client"
    assert run["settings"] == {"lr": 0.1 + 0.2}
    assert list(run["entries"]) == list(params)
    azure_trial.job(fed, params, tmp_path)  # written anew
    assert not [*(tmp_path / "code").rglob("patients.csv")]


def test_a_file_with_a_jobs_name_is_refused(fed, params, tmp_path):
    (tmp_path / "train.py").write_text("")
    with pytest.raises(ValueError, match="train.py is the name of another file"):
        azure_trial.job(fed, params, tmp_path, client=f"{tmp_path}/train.py:client")


def test_the_pinned_versions_are_within_the_ranges_of_the_requirements():
    conda = yaml.safe_load((pipeline.JOBS / "conda.yaml").read_text())
    pins = [pin for pin in conda["dependencies"][-1]["pip"] if "==" in pin]
    pinned = {name: Version(v) for name, v in (pin.split("==") for pin in pins)}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    needs = [Requirement(line.split("#")[0]) for line in lines if re.match(r"\w", line)]
    ranges = {need.name: need.specifier for need in needs}
    shared = pinned.keys() & ranges.keys()
    assert shared == {"torch", "torchvision", "numpy", "safetensors", "tqdm"}
    for name in shared:
        assert ranges[name].contains(pinned[name].public), name
    assert all("=" in d for d in conda["dependencies"][:-1])
    assert re.search(r":\d{8}\.v\d+$", pipeline.IMAGE)
