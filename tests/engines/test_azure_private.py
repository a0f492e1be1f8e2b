"""DP-SGD as a graph of jobs: the account is in the hospital's own store, outlives runs
and kills, and what was not booked is not trained."""

import json
import shutil

import pytest
import torch

from fl_helpers import exchange, simulation
from fl_helpers.aggregation import weighted_average
from fl_helpers.cross_silo.account import SiloAccount, gather
from fl_helpers.cross_silo.azure_ml import explain, run_locally, sdk, wire
from fl_helpers.cross_silo.azure_ml.plan import PlanRefused
from fl_helpers.cross_silo.turn import Place
from fl_helpers.privacy import Budget, epsilon_spent
from fl_helpers.training import ClientFunctions

from . import azure_trial, hospital

NAMES = azure_trial.NAMES[:2]
DELTA = 1e-3


def cost(rounds):  # of the tests' hospital: noise 2, rate 0.5, 2 steps a round
    return epsilon_spent(((2.0, 0.5, 2 * rounds),), DELTA)


BUDGET = cost(2) * 1.001  # two rounds, in all runs


def read(folder, **own):
    """A federation whose silos keep accounts."""
    content = azure_trial.content(NAMES)
    content["azure_ml"]["client"] = f"{hospital.__file__}:private"
    for silo in content["silos"]:
        silo["azure_ml"] |= {"account": "privacy"} | own
    return azure_trial.read(folder, content)


def build(folder, name="first", fed=None, **more):
    params = hospital.private_model().state_dict()
    how = {"name": name, "settings": {"lr": 0.1}, "evaluate": False} | more
    return azure_trial.build(fed or read(folder), params, folder, **how)


def store(folder, silo):
    return folder / "stores" / silo.replace(" ", "_").lower()


def account(folder, silo, path, **turn):
    gather(store(folder, silo) / "privacy", path, **turn)
    return SiloAccount(path, Budget(BUDGET, DELTA), silo=silo)


@pytest.fixture
def data(silos_yaml, tmp_path):
    folders = sorted((silos_yaml.parent / "data").iterdir())[:2]
    for folder, name in zip(folders, NAMES, strict=True):
        shutil.copytree(folder, tmp_path / "data" / name)
        (store(tmp_path, name) / "privacy").mkdir(parents=True)
        budget = {"epsilon": BUDGET, "delta": DELTA}
        path = store(tmp_path, name) / "privacy" / "budget.json"
        path.write_text(json.dumps(budget))
    return {name: tmp_path / "data" / name for name in NAMES}


@pytest.mark.engines
def test_an_account_outlives_a_kill_and_ends_the_next_run(data, tmp_path):
    how = {"data": data, "show": lambda line: None}
    (data["Hospital B"] / "kill").write_text("1")
    graph = build(tmp_path)
    with pytest.raises(run_locally.RunError, match="train_0001_hospital_b exited wi"):
        run_locally.run(graph, tmp_path, **how)
    for name in NAMES:  # the one that was killed has spent its second round, too
        assert account(tmp_path, name, tmp_path / "x").epsilon == cost(2)
    (data["Hospital B"] / "kill").unlink()
    result = run_locally.run(graph, tmp_path, **how)  # the same turn again: no more
    assert_same_bits(result.model, data, tmp_path)

    with pytest.raises(
        run_locally.RunError, match=": PRIVACY_BUDGET_SPENT; more i"
    ) as e:
        run_locally.run(build(tmp_path, "second"), tmp_path, workers=1, **how)
    assert e.value.jobs == ("book_0000_hospital_a",)
    assert "has spent epsilon" in str(e.value)  # by its own log, on this machine only
    log = (tmp_path / "logs/book_0000_hospital_a.log").read_text()
    assert log.count("\n") == 1 and "epsilon" not in log
    check_where(tmp_path)


def assert_same_bits(folder, data, tmp_path):
    """As the simulation makes them of the same secrets."""

    def update(params, silo, *, round_index, rng):
        own = tmp_path / "copies" / f"{silo.name} {round_index}"
        own.mkdir(parents=True)
        account(tmp_path, silo.name, own / "account.jsonl", run="first",
                round_index=round_index)  # fmt: skip
        place = Place(own, "first", BUDGET, DELTA, only="draw")
        client = hospital.private(data[silo.name], {"lr": 0.1}, place)
        return client.update(params, silo, round_index=round_index, rng=rng)

    params = hospital.private_model().state_dict()
    silos = [hospital.load_silo(data[name]) for name in NAMES]
    history = simulation.run_rounds(
        params, silos, ClientFunctions(update, None), weighted_average, rounds=2, seed=0
    )
    final = exchange.read_model(folder, params, round_index=2)
    for name, value in history.params.items():
        assert torch.equal(final[name], value), name
        assert not torch.equal(value, params[name])


def check_where(tmp_path):
    """Nothing of an account is outside of the hospital's own store."""
    secrets = []
    for name in NAMES:
        found = sorted((store(tmp_path, name) / "privacy").rglob("account.jsonl"))
        assert len(found) == 2  # one a round, of the first run only
        for path in found:
            secret, line = map(json.loads, path.read_text().splitlines())
            secrets.append(secret["secret"].encode())
            assert line["silo"] == name and line["run"] == "first"
    assert len(set(secrets)) == 4
    outside = [store(tmp_path, "orchestrator"), tmp_path / "logs", tmp_path / "done"]
    for path in (path for folder in outside for path in folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        assert not any(secret in content for secret in secrets), path
        assert path.name != "account.jsonl" and b"epsilon" not in content, path


def test_the_plan_books_before_it_trains(tmp_path):
    plan = build(tmp_path)
    jobs = {job.name: job for job in plan.jobs}
    for name, job in jobs.items():
        if job.kind == "train":
            (booked,) = [flow for flow in job.reads if flow.name == "booked"]
            assert booked.producer == name.replace("train", "book")
            assert booked.store == job.party.datastore
            assert booked.path == f"privacy/first/{job.literals['round']:04d}"
            (written,) = [f for f in jobs[booked.producer].writes if f.name == "booked"]
            # Kept when the job has ended; so one job could not book and train.
            assert written.mode == "upload"
    assert [job.kind for job in plan.jobs].count("book") == 4
    orchestrators = [j for j in plan.jobs if j.party.name == "orchestrator"]
    for flow in (f for job in orchestrators for f in (*job.reads, *job.writes)):
        assert "privacy" not in flow.path


def test_what_would_be_sent_is_the_plan_and_an_account_that_leaves_is_refused(tmp_path):
    plan = build(tmp_path)
    wire.check_job(sdk.to_job(plan), plan)
    job = sdk.to_job(plan)
    outside = "azureml://datastores/orchestrator/paths/privacy/first/0000"
    job.jobs["book_0000_hospital_a"].outputs["booked"].path = outside
    with pytest.raises(PlanRefused, match="book_0000_hospital_a: .*booked"):
        wire.check_job(job, plan)
    text = explain.explain_plan(plan).markdown
    own = "hospital_a: privacy, hospital_a: privacy/first/, hospital_a: radiographs |"
    assert own in text and "book.py" in text


def test_a_hospital_without_a_budget_of_its_own_trains_nothing(data, tmp_path):
    path = store(tmp_path, "Hospital A") / "privacy" / "budget.json"
    path.write_text('{"epsilon": "much"}')
    how = {"data": data, "show": lambda line: None, "workers": 1}
    with pytest.raises(run_locally.RunError, match="own budget.json must be in its ac"):
        run_locally.run(build(tmp_path, rounds=1), tmp_path, **how)
    assert not [*store(tmp_path, "orchestrator").rglob("updates")]
    shutil.rmtree(path.parent)
    with pytest.raises(run_locally.RunError, match="nothing at .*hospital_a/privacy"):
        run_locally.run(build(tmp_path, rounds=1), tmp_path, **how)


@pytest.mark.parametrize("folder", ["radiographs", "radiographs/x", "fl", "fl/x", ".."])
def test_an_account_has_a_folder_of_its_own(folder, tmp_path):
    with pytest.raises(ValueError, match="azure_ml.account must be"):
        read(tmp_path, account=folder)


def test_all_hospitals_keep_accounts_or_none(tmp_path):
    content = azure_trial.content(NAMES)
    content["silos"][1]["azure_ml"]["account"] = "privacy"
    with pytest.raises(
        ValueError, match=r"silos\[1\].azure_ml.account must be there f"
    ):
        azure_trial.read(tmp_path, content)
