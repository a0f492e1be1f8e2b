"""A run round by round: quorum, stop, resume. Jobs are not run, but for one test."""

import json

import pytest
import torch

from fl_helpers import exchange, simulation
from fl_helpers.aggregation import make_aggregate
from fl_helpers.cross_silo.azure_ml import pipeline, rounds, run_locally
from fl_helpers.scaffold import zero_variates
from fl_helpers.training import norm_entries

from . import azure_trial, hospital

NAMES = azure_trial.NAMES


@pytest.fixture
def fed(tmp_path):
    return azure_trial.read(tmp_path, azure_trial.content())


@pytest.fixture
def params():
    return azure_trial.model().state_dict()


class JobsFailed(RuntimeError):
    def __init__(self, *jobs):
        super().__init__(jobs)
        self.jobs = jobs


class Azure:
    """Checks each plan; fails as `faults` says, {number of the try: jobs}."""

    def __init__(self, faults=(), scores=()):
        self.faults, self.scores, self.plans = dict(faults), iter(scores), []

    def __call__(self, graph):
        pipeline.check_plan(graph)
        self.plans.append(graph)
        if jobs := self.faults.get(len(self.plans)):
            raise JobsFailed(*jobs)
        index = int(graph.jobs[-1].literals["round"])
        line = {"round": index, "metric": "test_loss", "value": next(self.scores, 1.0)}
        return [line | {"silo": silo.name} for silo in graph.silos]


def play(azure, fed, params, folder, **more):
    run = azure_trial.make_run(params, **{"rounds": 3} | more)
    return rounds.play_rounds(run, fed, folder, azure, show=lambda _: None)


def reads(graph, name):
    return [f.path for job in graph.jobs for f in job.reads if f.name == name]


def test_each_round_starts_where_the_last_one_ended(fed, params, tmp_path):
    azure = Azure()
    state = play(azure, fed, params, tmp_path)
    assert [[job.kind for job in graph.jobs] for graph in azure.plans] == [
        ["initial", *["train"] * 3, "aggregate"],
        *[[*["train"] * 3, "aggregate"]] * 2,
        [*["evaluate"] * 3, "collect"],
    ]
    models = [set(reads(graph, "model")) for graph in azure.plans]
    assert models == [
        {"fl/models/trial-0001/0000"},
        {"fl/models/trial-0001/0001"},
        {"fl/models/trial-0002/0002"},
        {"fl/models/trial-0003/0003"},
    ]
    assert (state["name"], state["rounds_done"]) == ("trial-0003", 3)
    assert len(state["metrics"]) == 4 * 3 and state["missing"] == {}


def test_without_a_silo_that_fails_and_with_it_when_it_is_back(fed, params, tmp_path):
    """Hospital B misses round 0 and 1; what it keeps is what it started from."""
    b0, b1 = "train_0000_hospital_b", "train_0001_hospital_b"
    azure = Azure({1: [b0], 3: [b1, "aggregate_0001"]})
    how = {"quorum": 2, "keep_local": ["3.bias"], "evaluate": False}
    state = play(azure, fed, params, tmp_path, **how)
    sizes = [sum(job.kind == "train" for job in graph.jobs) for graph in azure.plans]
    assert sizes == [3, 2, 3, 2, 3]
    assert state["missing"] == {"0": ["Hospital B"], "1": ["Hospital B"]}
    assert reads(azure.plans[4], "kept") == [
        *("fl/kept/trial-0004/0002", "fl/models/trial-0002/kept"),
        "fl/kept/trial-0004/0002",
    ]


def test_too_few_silos(fed, params, tmp_path):
    jobs = ["train_0000_hospital_a", "prepare_hospital_c"]
    with pytest.raises(simulation.NoQuorum, match="1 silos are left, the quorum is 2"):
        play(Azure({1: jobs}), fed, params, tmp_path, quorum=2)
    azure = Azure()  # started again when they are there
    state = play(azure, fed, params, tmp_path, quorum=2)
    assert state["rounds_done"] == 3 and state["tries"] == 5
    with pytest.raises(simulation.NoQuorum, match="2 silos are left, the quorum is 3"):
        play(Azure({1: jobs[:1]}), fed, params, tmp_path / "all")


def test_a_fault_at_the_orchestrator_is_not_the_silos(fed, params, tmp_path):
    with pytest.raises(JobsFailed):
        play(Azure({2: ["aggregate_0001"]}), fed, params, tmp_path, quorum=1)
    state = json.loads((tmp_path / "state.json").read_text())
    assert (state["name"], state["rounds_done"]) == ("trial-0001", 1)
    azure = Azure()
    play(azure, fed, params, tmp_path, quorum=1)
    assert azure.plans[0].jobs[0].name == "train_0001_hospital_a"
    assert play(azure, fed, params, tmp_path)["tries"] == 5  # nothing is left to do
    with pytest.raises(ValueError, match=r"another run: \['seed'\] differ"):
        play(azure, fed, params, tmp_path, seed=1)
    with pytest.raises(ValueError, match=r"another run: \['settings'\] differ"):
        play(azure, fed, params, tmp_path, settings={"mu": 1})


def test_it_stops_when_scores_get_no_better(fed, params, tmp_path):
    stop = simulation.Stop("loss", 2, higher_is_better=False)
    scores = [1.0, 0.5, 0.6, 0.5, 0.1]
    state = play(Azure(scores=scores), fed, params, tmp_path, rounds=9, stop=stop)
    # After 4 rounds, neither of the last two scores beats 0.5.
    assert state["rounds_done"] == 4 and state["stopped"] and state["tested"]


@pytest.mark.engines
def test_all_strategies_at_once_round_by_round(tmp_path, silos_yaml, silos):
    """FedProx, FedBN, SCAFFOLD and a rule that remembers end with the bits of the
    simulation."""
    fed = azure_trial.read(tmp_path, azure_trial.content(NAMES[:2]))
    folders = sorted((silos_yaml.parent / "data").iterdir())
    data = dict(zip(NAMES, folders, strict=True))
    model, variates = azure_trial.model(), zero_variates(azure_trial.model())
    params = model.state_dict() | variates
    trainable = [name for name, _ in model.named_parameters()]
    keep = norm_entries(model)
    keep += [name for name in variates if name.startswith("own_variate.")]
    settings = {"mu": 0.1, "scaffold": 1}
    rule, options = "FedAdam", {"lr": 0.01}

    def here(graph):
        return run_locally.run(graph, tmp_path, data=data).metrics

    state = play(
        *(here, fed, params, tmp_path),
        **{"rounds": 2, "keep_local": keep, "settings": settings, "evaluate": False},
        **{"aggregate": rule, "options": options, "trainable": trainable},
    )

    update, _ = hospital.functions(settings)
    rule = make_aggregate(rule, params, trainable, options)
    history = simulation.run_rounds(
        *(params, silos[:2], update, rule),
        **{"rounds": 2, "seed": 0, "terms": simulation.Terms(keep_local=keep)},
    )
    models = tmp_path / "stores/orchestrator/fl/models" / state["name"]
    final = exchange.read_model(models / "0002", history.params, round_index=2)
    for name, value in history.params.items():
        assert torch.equal(final[name], value), name
    for silo in fed.silos:
        kept = (
            tmp_path
            / "stores"
            / silo.azure_ml.datastore
            / "fl/kept"
            / state["name"]
            / "0002"
        )
        who = "entries that stay in the silo"
        own = exchange.read_model(kept, history.local[silo.name], silo=who)
        for name, value in history.local[silo.name].items():
            assert torch.equal(own[name], value), name
        private = (tmp_path / "stores" / silo.azure_ml.datastore).rglob("ledger.jsonl")
        text = "".join(path.read_text() for path in private)
        assert "3.weight" in text
        assert not any(f'"{name}"' in text for name in keep), "a kept entry left"
