"""A silo's turn in a round: the same as the simulation's; its function and example."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import play

from fl_helpers import exchange
from fl_helpers.aggregation import weighted_average
from fl_helpers.cross_silo import hospital, turn
from fl_helpers.cross_silo.run import Run
from fl_helpers.models import small_cnn
from fl_helpers.silos import Examples, Silo
from fl_helpers.simulation import silo_rng
from fl_helpers.training import ClientFunctions, Update

SETTINGS = {"num_classes": 2, "rounds": 2, "epochs": 1, "lr": 0.1, "batch_size": 4}


def new_silo(name, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x, y = torch.rand(20, 1, 28, 28, generator=rng), torch.arange(20) % 2
    train = Examples(x[:12], y[:12])
    return Silo(name, train, Examples(x[12:], y[12:]))  # of the same memory


def test_the_hospitals_function_is_loaded_by_file_or_by_module(tmp_path):
    code = "from fl_helpers.cross_silo.turn import Client\n"
    code += "from types import SimpleNamespace as Silo\n"
    code += "def make(data, settings):\n"
    code += "    return Client(Silo(name='A', given=(data, settings)), None)\n"
    code += "def other(data, settings): return 3\n"
    (tmp_path / "mine.py").write_text(code)
    entry = f"{tmp_path}/mine.py:make"
    client = turn.load_client(entry, "/data", {"lr": 1}, silo="A")
    assert client.silo.given == (Path("/data"), {"lr": 1})
    with pytest.raises(ValueError, match="the data are of 'A', this is 'B'"):
        turn.load_client(entry, "/data", {}, silo="B")
    with pytest.raises(TypeError, match="must return a Client, got int"):
        turn.load_client(f"{tmp_path}/mine.py:other", "/data", {}, silo="A")
    with pytest.raises(ModuleNotFoundError):
        turn.load_client("no_such_module:make", "/data", {}, silo="A")
    with pytest.raises(ValueError, match="got 'mine.py'"):
        turn.load_client("mine.py", "/data", {}, silo="A")


def test_an_entry_of_an_older_version_is_told_its_new_place():
    with pytest.raises(
        ImportError, match="write fl_helpers.cross_silo.hospital:client"
    ):
        turn.load_client("fl_helpers.hospital:client", "/data", {}, silo="A")


@pytest.mark.parametrize("keep_local", [(), ("head.bias", "head.weight")])
def test_turns_and_an_average_are_the_rounds_of_the_simulation(tmp_path, keep_local):
    params, silos = small_cnn(2).state_dict(), [new_silo("A", 1), new_silo("B", 2)]
    run = Run("x", params, rounds=2, seed=5, keep_local=keep_local, settings=SETTINGS)
    clients = {}
    for silo in silos:
        hospital.save_silo(silo, tmp_path / silo.name)
        entry, data = "fl_helpers.cross_silo.hospital:client", tmp_path / silo.name
        clients[silo.name] = turn.load_client(entry, data, SETTINGS, silo=silo.name)
    shared = run.shared
    own = {name: {k: params[k] for k in keep_local} for name in clients}
    for index in range(2):
        updates = []
        exchange.write_model(tmp_path / "model", shared, round_index=index)
        for name, client in clients.items():
            start = turn.receive(run, tmp_path / "model", own[name], round_index=index)
            assert list(start) == list(params)
            update, own[name] = turn.train(run, client, start, round_index=index)
            updates.append(update)
        shared = weighted_average(updates)
    one = clients["A"]
    expected = play(
        params, silos, one.update, weighted_average, rounds=2, seed=5,
        evaluate=one.evaluate, keep_local=keep_local,
    )  # fmt: skip
    assert shared.keys() == expected.params.keys()
    assert all(shared[name].equal(expected.params[name]) for name in shared)
    for name, kept in expected.local.items():
        assert all(own[name][k].equal(value) for k, value in kept.items())
    for update in updates:  # the test is of the model that the round began with
        tested = {
            f"test_{k}": v for k, v in expected.rounds[0]["test"][update.silo].items()
        }
        trained = expected.rounds[1]["train"][update.silo]
        assert update.metrics == trained | tested


def counting(evaluate):
    silo = SimpleNamespace(name="A", train=([0] * 7, [0] * 7))

    def update(params, silo, *, round_index, rng):
        drawn = torch.rand(1, generator=rng).item()
        assert drawn == torch.rand(1, generator=silo_rng(3, "A", round_index)).item()
        params = {name: value + 1 for name, value in params.items()}
        return Update(silo.name, params, 7, {"train_loss": 0.5})

    return turn.Client(silo, update, evaluate)


def test_what_torch_draws_by_itself_is_as_in_the_simulation():
    """Dropout, or a DataLoader without a generator, in a silo's own training loop."""

    def update(params, silo, *, round_index, rng):
        params = {name: value + torch.rand(3) for name, value in params.items()}
        return Update(silo.name, params, 7, {})

    def evaluate(params, silo):
        return {"loss": torch.rand(1).item()}

    start, silo = {"w": torch.zeros(3)}, counting(None).silo
    run, client = Run("x", start, rounds=2, seed=3), turn.Client(silo, update, evaluate)
    both = ClientFunctions(update, evaluate)
    expected = play(start, [silo], both, weighted_average, rounds=2, seed=3)
    for index in range(2):
        torch.rand(1)  # whatever was drawn before
        done, _ = turn.train(run, client, start, round_index=index)
        start = done.params
        tested = turn.test(run, client, start, round_index=index + 1).metrics
        assert tested["test_loss"] == expected.rounds[index]["test"]["A"]["loss"]
    assert start["w"].equal(expected.params["w"])


STATE = {"w": torch.zeros(2), "own": torch.zeros(1)}
RUN = Run("x", STATE, rounds=1, seed=3, keep_local=["own"])


def test_what_stays_is_divided_from_what_may_leave():
    scores = {"loss": 0.25, "worst": float("nan")}
    client = counting(lambda params, silo: scores)
    update, own = turn.train(RUN, client, STATE, round_index=4)
    assert update.params.keys() == {"w"} and own.keys() == {"own"}
    assert own["own"].item() == 1 and STATE["own"].item() == 0
    assert update.metrics == {"train_loss": 0.5, "test_loss": 0.25}  # finite ones
    tested = turn.test(RUN, client, STATE, round_index=4)
    assert (tested.params, tested.num_examples) == ({}, 7)
    assert tested.metrics == {"test_loss": 0.25}


def test_a_run_or_a_silo_without_a_test():
    update, _ = turn.train(RUN, counting(None), STATE, round_index=0)
    assert (
        update.metrics == {"train_loss": 0.5}
        and turn.test(RUN, counting(None), {}, round_index=0).metrics == {}
    )
    quiet = replace(RUN, evaluate=False)
    update, _ = turn.train(quiet, counting(lambda *_: 1 / 0), STATE, round_index=0)
    assert update.metrics == {"train_loss": 0.5}


def test_a_model_that_was_not_agreed_is_refused(tmp_path):
    exchange.write_model(tmp_path, {"w": torch.zeros(3)}, round_index=0)
    own = {"own": torch.zeros(1)}
    with pytest.raises(exchange.Refused, match=r"'w' is .*\[3\]"):
        turn.receive(RUN, tmp_path, own, round_index=0)
    exchange.write_model(tmp_path, {"w": torch.zeros(2)}, round_index=1)
    with pytest.raises(exchange.Refused, match="belongs to round 1, expected 0"):
        turn.receive(RUN, tmp_path, own, round_index=0)
    with pytest.raises(exchange.Refused, match="1 missing"):  # by the silo's own terms
        turn.receive(RUN, tmp_path, own, round_index=1, expected=STATE)


def test_the_example_trains_what_was_saved(tmp_path):
    silo = new_silo("Hospital A")
    hospital.save_silo(silo, tmp_path)
    own = turn.load_client(
        "fl_helpers.cross_silo.hospital:client", tmp_path, SETTINGS, silo="Hospital A"
    )
    assert own.silo.name == "Hospital A" and own.silo.test.x.equal(silo.test.x)
    params = small_cnn(2).state_dict()
    before = {name: value.clone() for name, value in params.items()}
    rng = silo_rng(0, "Hospital A", 0)
    update = own.update(params, own.silo, round_index=0, rng=rng)
    assert update.num_examples == 12 and not update.params["head.bias"].equal(
        params["head.bias"]
    )
    assert all(params[name].equal(value) for name, value in before.items())
    assert set(own.evaluate(params, own.silo)) == {"balanced_accuracy", "auroc"}


def test_an_entry_that_became_nan_is_not_kept():
    """The update is refused, and the silo goes on with the entries that it had."""

    def diverges(params, silo, *, round_index, rng):
        params = {name: value * torch.nan for name, value in params.items()}
        return Update(silo.name, params, 7, {})

    start = {"w": torch.ones(3), "own": torch.tensor([1.0, 2.0])}
    run = Run("x", start, rounds=1, seed=3, keep_local=["own"], evaluate=False)
    client = turn.Client(counting(None).silo, diverges)
    update, own = turn.train(run, client, start, round_index=0)
    assert own["own"].equal(start["own"]) and update.params["w"].isnan().all()
