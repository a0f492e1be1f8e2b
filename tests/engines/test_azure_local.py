"""A plan run on this machine ends with the bits of the simulation."""

import pytest
import torch

from fl_helpers import exchange, simulation
from fl_helpers.aggregation import make_aggregate
from fl_helpers.azure_ml import run_locally
from fl_helpers.training import norm_entries, zero_variates

from . import azure_trial, hospital


@pytest.fixture
def federation(tmp_path):
    return azure_trial.read(tmp_path, azure_trial.content(azure_trial.NAMES[:2]))


@pytest.fixture
def data(silos_yaml):
    folders = sorted((silos_yaml.parent / "data").iterdir())
    return dict(zip(azure_trial.NAMES, folders, strict=True))


def trainable():
    return [name for name, _ in azure_trial.model().named_parameters()]


def variates():
    return zero_variates(azure_trial.model())


STRATEGIES = {
    "FedAvg": {},
    "FedProx": {"settings": {"mu": 0.1}},
    "FedAdam": {"aggregate": "FedAdam", "options": {"lr": 0.01}},
    "FedBN": {"keep_local": norm_entries(azure_trial.model())},
    "SCAFFOLD": {
        "settings": {"scaffold": 1},
        "keep_local": [name for name in variates() if name.startswith("own_")],
    },
}


@pytest.mark.engines
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_bits_of_the_simulation(strategy, federation, data, tmp_path, silos):
    how, params = STRATEGIES[strategy], azure_trial.model().state_dict()
    params |= variates() if strategy == "SCAFFOLD" else {}
    more = {"trainable": trainable()} if "aggregate" in how else {}
    graph = azure_trial.build(federation, params, tmp_path, **how, **more)
    result = run_locally.run(graph, federation, tmp_path, data=data)

    keep = how.get("keep_local", [])
    shared = {k: v for k, v in params.items() if k not in keep}
    update, test = hospital.functions(how.get("settings", {}))
    name, options = how.get("aggregate", "weighted_average"), how.get("options")
    history = simulation.run_rounds(
        params,
        silos[:2],
        update,
        make_aggregate(name, shared, trainable(), options),
        rounds=2,
        seed=0,
        evaluate=test,
        keep_local=keep,
    )
    final = exchange.read_model(result.model, shared, round_index=2)
    assert final.keys() == history.params.keys()
    for name, value in history.params.items():
        assert torch.equal(final[name], value), name
