"""The graph of jobs that is made of a run and a federation; no network."""

import json
import re
import socket
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from fl_helpers.cross_silo.azure_ml import pipeline, sdk, snapshot, wire
from fl_helpers.exchange import Limits
from fl_helpers.simulation import Stop

from . import azure_trial

ROOT = Path(pipeline.__file__).parents[3]


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
    plan = azure_trial.build(fed, params, tmp_path, rounds=3)
    job = sdk.to_job(plan)
    assert job._validate().passed
    keys = ("hospital_a", "hospital_b", "hospital_c")
    names = ["initial"]
    for index in range(3):
        names += [f"train_000{index}_{key}" for key in keys]
        names += [f"aggregate_000{index}"]
    names += [f"evaluate_{key}" for key in keys] + ["collect"]
    assert list(job.jobs) == names == [job.name for job in plan.jobs]
    assert job.experiment_name == "trial" and job.settings.force_rerun
    final = job.outputs["final_model"].path
    assert final == "azureml://datastores/orchestrator/paths/fl/models/trial/0003"
    for name, value in before.items():
        assert torch.equal(params[name], value)


def test_a_round_by_itself_and_the_test_by_itself(fed, params, tmp_path):
    """What a driver needs that decides after each round; one digest for all."""
    whole = azure_trial.build(fed, params, tmp_path, rounds=3)
    one = azure_trial.build(
        *(fed, params, tmp_path), rounds=3, part_name="r2", start=("r1", 2), final=False
    )
    assert [job.name for job in one.jobs] == [
        *(f"train_0002_hospital_{key}" for key in "abc"), "aggregate_0002"
    ]  # fmt: skip
    reads = {(flow.store, flow.path) for job in one.jobs for flow in job.reads}
    assert ("orchestrator", "fl/models/r1/0002") in reads
    wire.check_job(sdk.to_job(one), one)
    last = azure_trial.build(
        *(fed, params, tmp_path), rounds=3, part_name="end", start=("r2", 3)
    )
    assert [job.kind for job in last.jobs] == ["evaluate"] * 3 + ["collect"]
    wire.check_job(sdk.to_job(last), last)
    assert {plan.digest for plan in (whole, one, last)} == {whole.digest}


def test_a_quorum_plays_without_the_silo_that_is_missing(fed, params, tmp_path):
    some = frozenset({"Hospital A", "Hospital C"})
    plan = azure_trial.build(
        *(fed, params, tmp_path),
        **{"rounds": 4, "part_rounds": 3, "part_name": "r", "start": ("r1", 2)},
        **{"final": False, "silos": some},
    )
    wire.check_job(sdk.to_job(plan), plan)
    assert {job.party.compute for job in plan.jobs} == {
        *("hospital-a", "hospital-c", "orchestrator")
    }
    assert [silo.name for silo in plan.silos] == sorted(some)
    back = azure_trial.build(
        *(fed, params, tmp_path),
        **{"rounds": 4, "part_name": "s", "start": ("r", 3), "final": False},
        **{"keep_local": ["3.bias"], "kept": {"Hospital B": ("r1", 2)}},
    )
    wire.check_job(sdk.to_job(back), back)
    kept = [flow.path for j in back.jobs for flow in j.reads if flow.name == "kept"]
    assert kept == ["fl/kept/r/0003", "fl/kept/r1/0002", "fl/kept/r/0003"]


def test_what_a_silo_may_ask_for_its_machines(params, tmp_path):
    content = azure_trial.content()
    content["silos"][0]["azure_ml"] |= {
        "instance_type": "gpu-4.large",
        "shm_size": "8g",
        "processes": 4,
        "data": "azureml:radiographs:3",
    }
    content["azure_ml"]["orchestrator"]["instance_type"] = "small"
    content["azure_ml"] |= {"environment": "azureml:fl-gpu:3", "hours": 36}
    fed = azure_trial.read(tmp_path, content)
    plan = azure_trial.build(fed, params, tmp_path)
    job = sdk.to_job(plan)
    wire.check_job(job, plan)
    found = job._to_rest_object().properties["jobs"]
    train, other = found["train_0000_hospital_a"], found["train_0000_hospital_b"]
    assert train["resources"] == {"instance_type": "gpu-4.large", "shm_size": "8g"}
    assert train["distribution"]["process_count_per_instance"] == 4
    assert train["inputs"]["data"]["uri"] == "azureml:radiographs:3"
    assert train["limits"]["timeout"] == "P1DT12H"
    assert "distribution" not in found["evaluate_hospital_a"]
    assert "resources" not in other and "distribution" not in other
    assert found["collect"]["resources"] == {"instance_type": "small"}
    component = job.jobs["collect"].component
    assert component.environment == "azureml:fl-gpu:3"


@pytest.mark.parametrize(
    "named",
    [
        "azureml://registries/azureml/environments/acpt-pytorch/versions/12",
        "registry.azurecr.io/fl/gpu@sha256:" + "0" * 64,
    ],
)
def test_a_curated_environment_or_an_image_by_its_digest(named, params, tmp_path):
    content = azure_trial.content()
    content["azure_ml"]["environment"] = named
    fed = azure_trial.read(tmp_path, content)
    plan = azure_trial.build(fed, params, tmp_path)
    wire.check_job(sdk.to_job(plan), plan)


@pytest.mark.parametrize(
    "named",
    [
        *("azureml:fl@latest", "azureml:fl:stable", "azureml:fl", "fl:3"),
        *("python:3.11", "registry.io/fl:stable", "registry.io/fl@sha256:12"),
        "azureml://registries/azureml/environments/acpt/labels/latest",
        "https://registry.io/fl@sha256:" + "0" * 64,
    ],
)
def test_an_environment_that_moves_is_refused(named, tmp_path):
    content = azure_trial.content()
    content["azure_ml"]["environment"] = named
    with pytest.raises(ValueError, match="azure_ml.environment must match"):
        azure_trial.read(tmp_path, content)


@pytest.mark.parametrize(
    "line",
    [
        *("torch", "torch>=2", "torch==2.*", "torch=2.1", "torch==2.1; x", "-r more"),
        *("--index-url https://x.org", "torch @ https://x.org/t.whl", "torch==stable"),
        *("--extra-index-url https://x.org", "--pre", "git+https://x.org/y", "../x"),
    ],
)
def test_packages_have_exact_versions_from_known_places(line):
    conda = yaml.safe_load((snapshot.JOBS / "conda.yaml").read_text())
    snapshot.check_packages(conda)
    pip = conda["dependencies"][-1]["pip"]
    pip.append(line)
    with pytest.raises(ValueError, match="must be a package==version"):
        snapshot.check_packages(conda)
    pip.pop()
    with pytest.raises(ValueError, match="channels"):
        snapshot.check_packages(conda | {"channels": ["https://x.org/conda"]})
    with pytest.raises(ValueError, match="must be a package=version"):
        bad = {"dependencies": ["python>=3", *conda["dependencies"]]}
        snapshot.check_packages(conda | bad)


def test_the_file_of_packages_is_looked_at_whenever_it_is_read(
    fed, tmp_path, monkeypatch
):
    text = (snapshot.JOBS / "conda.yaml").read_text()
    (tmp_path / "conda.yaml").write_text(text.replace("torch==", "torch>=", 1))
    monkeypatch.setattr(snapshot, "JOBS", tmp_path)
    with pytest.raises(ValueError, match="torch>="):
        snapshot.environments(fed)


STOP = Stop("loss", 2)


@pytest.mark.parametrize(
    "more, message",
    [
        ({"start": ("x", 3)}, "rounds must be 3, as many are done, to 2"),
        ({"start": ("x", 2), "final": False}, "unless the model is tested; got 2"),
        ({"part_rounds": 3}, "to 2; more"),
        ({"silos": frozenset({"Hospital A"})}, "a run needs 2 silos, got 1"),
        ({"silos": frozenset({"x", "y"})}, r"no such silos: \['x', 'y'\]"),
        ({"wait_for_quorum": 9}, "wait_for_quorum is for runs on premises"),
        ({"quorum": 2}, "no quorum and no stop; rounds.play_rounds has"),
        ({"secure": True}, "secure sums are for runs on premises"),
        ({"stop": STOP}, "no quorum and no stop; rounds.play_rounds has"),
        ({"limits": Limits()}, "no number test_... may leave"),
    ],
)
def test_what_cannot_be_run_is_said_before_it_is_built(
    fed, params, tmp_path, more, message
):
    with pytest.raises(ValueError, match=message):
        azure_trial.build(fed, params, tmp_path, **more)
    assert not (tmp_path / "code").exists()


def test_what_is_needed_must_be_released(params, tmp_path):
    content = azure_trial.content()
    content["azure_ml"]["released"] = ["model_update"]
    fed = azure_trial.read(tmp_path, content)
    azure_trial.build(fed, params, tmp_path, evaluate=False)
    with pytest.raises(ValueError, match=r"\['scores'\] may not leave a silo"):
        azure_trial.build(fed, params, tmp_path)


def test_numbers_leave_that_the_run_and_the_silos_name(fed, params, tmp_path):
    limits = Limits(metrics=frozenset({"steps", "test_loss", "age"}), max_bytes=9000)
    plan = azure_trial.build(fed, params, tmp_path, limits=limits)
    told = {job.literals.get("metrics") for job in plan.jobs} - {None}
    assert told == {"steps,test_loss"}
    sizes = {job.literals.get("max_bytes") for job in plan.jobs} - {None}
    assert sizes == {9000, pipeline.SCORES_BYTES}


# ---- what is uploaded

PACKAGE = ROOT / "fl_helpers"
OURS = {
    f"fl_helpers/{path.relative_to(PACKAGE)}"
    for path in (*PACKAGE.glob("*.py"), *PACKAGE.glob("cross_silo/*.py"))
}
OURS |= {"common.py", "run.json", "start.py", "files.json"}
SILO = {"train.py", "book.py", "evaluate.py", "prepare.py", "hospital.py"}
MAIN = {"initial.py", "aggregate.py", "collect.py", "initial.safetensors"}


def test_only_our_files_and_the_clients_are_there(fed, params, tmp_path):
    for _ in range(2):  # the second time it finds what was put there
        azure_trial.build(fed, params, tmp_path, settings={"lr": 0.1 + 0.2})
        for part, own in (("silo", SILO), ("orchestrator", MAIN)):
            folder = tmp_path / "code" / part
            files = [path for path in folder.rglob("*") if path.is_file()]
            names = {str(path.relative_to(folder)) for path in files}
            assert names == OURS | own
            (folder / "patients.csv").write_text("patient_4711")
    said = json.loads((tmp_path / "code/silo/run.json").read_text())
    assert said["client"] == "hospital.py:client"
    assert said["run"]["settings"] == {"lr": 0.1 + 0.2}
    assert list(said["run"]["params"]) == list(params)
    assert said["silos"]["hospital_b"] == "Hospital B"


def test_a_file_with_a_jobs_name_is_refused(params, tmp_path):
    (tmp_path / "train.py").write_text("")
    content = azure_trial.content()
    content["azure_ml"]["client"] = "train.py:client"
    fed = azure_trial.read(tmp_path, content)
    with pytest.raises(ValueError, match="train.py is the name of another file"):
        azure_trial.build(fed, params, tmp_path)


def test_the_pinned_versions_are_within_the_ranges_of_the_requirements():
    conda = yaml.safe_load((snapshot.JOBS / "conda.yaml").read_text())
    pins = [pin for pin in conda["dependencies"][-1]["pip"] if "==" in pin]
    pinned = {name: Version(v) for name, v in (pin.split("==") for pin in pins)}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    needs = [Requirement(line.split("#")[0]) for line in lines if re.match(r"\w", line)]
    ranges = {need.name: need.specifier for need in needs}
    shared = pinned.keys() & ranges.keys()
    others = {"torchvision", "numpy", "safetensors", "tqdm", "opacus"}
    assert shared == {"torch"} | others
    for name in shared:
        assert ranges[name].contains(pinned[name].public), name
    assert all("=" in d for d in conda["dependencies"][:-1])


def test_the_base_image_has_a_digest_and_may_be_another(fed, params, tmp_path):
    assert re.fullmatch(r"mcr\.microsoft\.com/azureml/.+@sha256:[0-9a-f]{64}",
                        snapshot.IMAGE)  # fmt: skip
    content, other = azure_trial.content(), "mcr.microsoft.com/x@sha256:" + "0" * 64
    content["azure_ml"]["base_image"] = other
    changed = azure_trial.read(tmp_path, content)
    plan = azure_trial.build(changed, params, tmp_path)
    assert plan.digest != azure_trial.build(fed, params, tmp_path).digest
    for part, found in snapshot.environments(fed).items():
        assert found["image"] == snapshot.IMAGE
        assert snapshot.environments(changed)[part] == found | {"image": other}
    wire.check_job(sdk.to_job(plan), plan)
    for image in ("mcr.microsoft.com/x:20260715.v1", "mcr.microsoft.com/x"):
        content["azure_ml"]["base_image"] = image
        with pytest.raises(ValueError, match="azure_ml.base_image must match"):
            azure_trial.read(tmp_path, content)
    content["azure_ml"] |= {"base_image": other, "environment": "azureml:fl:1"}
    with pytest.raises(ValueError, match="environment names another"):
        azure_trial.read(tmp_path, content)
