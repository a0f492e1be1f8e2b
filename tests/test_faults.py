import copy
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import batchnorm_model, play

from fl_helpers.aggregation import FedAdam, weighted_average
from fl_helpers.exchange import Ledger, Limits, check_update, read_ledger
from fl_helpers.faults import (
    crash,
    garbage,
    other_model,
    slow,
    unreachable,
    with_faults,
)
from fl_helpers.simulation import NoQuorum, silo_rng
from fl_helpers.training import Update, norm_entries, sgd_client

client = sgd_client(batchnorm_model, epochs=1, lr=0.1, batch_size=8).update


def start():
    torch.manual_seed(0)
    return batchnorm_model().state_dict()


@pytest.fixture
def four(silos):
    """Silos "a" to "d": twice the same two sets of rows."""
    found = [copy.copy(silos[k % 2]) for k in range(4)]
    for name, silo in zip("abcd", found, strict=True):
        silo.name = name
    return found


def run(silos, client=client, aggregate=weighted_average, **options):
    options = dict(rounds=4, seed=0, threads=True) | options
    return play(start(), silos, client, aggregate, **options)


def by_hand(silos, present):
    """What a run must give in which only some silos take part in each round."""
    params = start()
    for round_index, names in enumerate(present):
        params = weighted_average(
            client(params, silo, round_index=round_index,
                   rng=silo_rng(0, silo.name, round_index))
            for silo in silos if silo.name in names
        )  # fmt: skip
    return params


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


CHECK = partial(check_update, limits=Limits(norm_factor=5.0))


# -- who fails is left out, the others go on


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (unreachable, "ConnectionError: the silo does not answer"),
        (crash, "RuntimeError: the silo's process ended in the middle of the round"),
        (garbage, "Refused: refused what 'b' sends: '0.weight' has 36 NaN or infinite"),
        (other_model, "Refused: refused what 'b' sends: it does not have the global"),
        (lambda train: None, "Refused|AttributeError"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_round_goes_on_without_a_silo_that_fails(four, fault, reason, workers):
    faulty = with_faults(client, {("b", 1): fault, ("b", 2): fault})
    history = run(four, faulty, quorum=3, check=CHECK, workers=workers)
    present = ["abcd", "acd", "acd", "abcd"]
    assert ["".join(record["silos"]) for record in history.rounds] == present
    assert [list(record["missing"]) for record in history.rounds] == [
        [],
        ["b"],
        ["b"],
        [],
    ]
    missing = history.rounds[1]["missing"]["b"]
    assert any(missing.startswith(part) for part in reason.split("|")), missing
    assert list(history.rounds[1]["train"]) == list("acd")
    # The average is over those that came, with their own shares of the examples.
    assert_equal(history.params, by_hand(four, present))


def test_bytes_count_who_was_asked_and_who_was_used(four):
    history = run(
        four, with_faults(client, {("b", 0): unreachable}), rounds=1, quorum=3
    )
    (record,) = history.rounds
    assert record["bytes_down"] * 3 == record["bytes_up"] * 4


def test_a_silo_is_asked_once_more_with_the_same_draws(four):
    asked = []

    def counted(params, silo, **more):
        asked.append((silo.name, more["round_index"]))
        return client(params, silo, **more)

    faults = {
        ("b", 1): [crash],
        ("c", 2): [crash, crash],
        ("d", 3): [crash, unreachable],
    }
    history = run(four, with_faults(counted, faults), quorum=3)
    assert [list(record["missing"]) for record in history.rounds] == [
        [],
        [],
        ["c"],
        ["d"],
    ]
    assert_equal(history.params, by_hand(four, ["abcd", "abcd", "abd", "abc"]))
    # crash trains before it fails, unreachable does not
    assert [asked.count(key) for key in faults] == [2, 2, 1]


def test_what_is_refused_is_not_asked_again_and_is_in_the_ledger(four, tmp_path):
    trained = []

    def counted(params, silo, **more):
        trained.append(silo.name)
        return client(params, silo, **more)

    ledger = Ledger(tmp_path / "ledger.jsonl")
    check = partial(check_update, ledger=ledger)
    faulty = with_faults(counted, {("b", 0): garbage})
    run(four, faulty, rounds=1, quorum=1, check=check)
    assert trained.count("b") == 1
    lines, _ = read_ledger(ledger.path)
    refused = [line for line in lines if line["verdict"] == "refused"]
    assert [(line["silo"], line["round"]) for line in refused] == [("b", 0)]
    assert {line["silo"] for line in lines if line["verdict"] == "accepted"} == set(
        "acd"
    )


def test_without_a_quorum_the_first_failure_ends_the_run(four, tmp_path):
    file = tmp_path / "run.pt"
    for fault, error in ((unreachable, ConnectionError), (garbage, ValueError)):
        faulty = with_faults(client, {("b", 2): fault})
        with pytest.raises(error):
            run(four, faulty, check=CHECK, checkpoint=file)
    assert_equal(run(four, checkpoint=file).params, run(four).params)


def test_without_a_check_the_average_refuses_and_ends_the_run(four):
    faulty = with_faults(client, {("b", 2): garbage})
    with pytest.raises(ValueError, match="silo 'b' sent .* NaN or infinite"):
        run(four, faulty, quorum=1)


def test_no_fault_gives_the_same_bits_with_and_without_terms(four):
    terms = dict(quorum=2, check=CHECK)
    assert_equal(run(four, **terms).params, run(four).params)
    assert_equal(run(four, **terms, deadline=300.0).params, run(four).params)


# -- quorum


def test_below_the_quorum_the_run_stops_and_goes_on_later(four, tmp_path):
    file = tmp_path / "run.pt"
    faulty = with_faults(client, {(name, 2): unreachable for name in "ab"})

    def go(client, **more):
        rule = FedAdam(
            start(), [name for name, _ in batchnorm_model().named_parameters()]
        )
        return run(four, client, rule, quorum=3, **more)

    with pytest.raises(NoQuorum) as stopped:
        go(faulty, checkpoint=file)
    text = str(stopped.value)
    assert text.startswith(
        "round 2: 2 updates, the quorum is 3; missing: {'a': 'Connect"
    )
    assert "run again when more silos are there" in text
    assert isinstance(stopped.value.__cause__, ConnectionError)
    resumed = go(client, checkpoint=file)  # they are back
    assert_equal(resumed.params, go(client).params)


def test_a_lower_quorum_may_be_agreed_on_to_go_on(four, tmp_path):
    file = tmp_path / "run.pt"
    faulty = with_faults(client, {("a", 2): unreachable})
    with pytest.raises(NoQuorum):
        run(four, faulty, quorum=4, checkpoint=file)
    history = run(four, faulty, quorum=3, checkpoint=file)
    assert_equal(history.params, by_hand(four, ["abcd", "abcd", "bcd", "abcd"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(quorum=0), "quorum must be 1 to 4 .*, got 0"),
        (dict(quorum=5), "quorum must be 1 to 4 .*, got 5"),
        (dict(quorum=3, silos_per_round=2), "quorum must be 1 to 2 .*, got 3"),
        (dict(deadline=0), "deadline must be > 0 seconds, got 0"),
        (dict(deadline=float("nan")), "deadline must be > 0 seconds, got nan"),
    ],
)
def test_impossible_terms_are_refused(four, options, message):
    with pytest.raises(ValueError, match=message):
        run(four, **options)


def test_what_stays_in_a_silo_outlives_its_absence(four):
    """FedBN: who misses a round goes on with the entries it had."""
    kept = norm_entries(batchnorm_model())
    options = dict(keep_local=kept, quorum=3)
    before = run(four, rounds=2, **options)
    faulty = with_faults(client, {("b", 2): unreachable, ("c", 2): garbage})
    after = run(four, faulty, rounds=3, **options | dict(quorum=2, check=CHECK))
    for name in "bc":
        assert_equal(after.local[name], before.local[name])
    assert not after.local["a"]["1.running_mean"].equal(
        before.local["a"]["1.running_mean"]
    )


# -- deadline


def quick(params, silo, *, round_index, rng):
    moved = {name: value + ord(silo.name) for name, value in params.items()}
    return Update(silo.name, moved, 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_silo_that_hangs_is_not_waited_for(four, workers):
    release, answered = threading.Event(), threading.Event()

    def hangs(train):
        release.wait(60)
        answered.set()
        return train()

    try:
        faulty = with_faults(quick, {("a", 0): hangs})  # "a" is the first in line
        options = dict(rounds=2, seed=0, workers=workers, threads=True)
        history = play(
            {"w": torch.zeros(1)}, four, faulty, weighted_average,
            quorum=3, deadline=2.0, **options,
        )  # fmt: skip
    finally:
        release.set()
    assert history.rounds[0]["missing"] == {"a": "TimeoutError: no answer within 2 s"}
    assert history.rounds[1]["missing"] == {}
    # Round 0 without "a", which is 97: mean(98, 99, 100); round 1 with it.
    assert history.params["w"].item() == 99 + 98.5
    assert answered.wait(60)  # its late update arrives after that, and goes nowhere
    assert history.params["w"].item() == 99 + 98.5


def test_a_slow_silo_makes_it_within_a_long_deadline(four):
    faulty = with_faults(client, {("b", 1): slow(0.2)})
    history = run(four, faulty, quorum=4, deadline=300.0)
    assert_equal(history.params, run(four).params)


def test_late_silos_can_cost_the_quorum(four):
    release = threading.Event()
    try:
        faulty = with_faults(quick, {("a", 0): lambda train: release.wait(60)})
        with pytest.raises(NoQuorum, match="missing: {'a': 'TimeoutError"):
            play(
                {"w": torch.zeros(1)}, four, faulty, weighted_average,
                rounds=1, seed=0, quorum=4, deadline=0.5, threads=True,
            )  # fmt: skip
    finally:
        release.set()


def test_a_process_ends_though_a_silo_hangs():
    code = """
import threading, torch
from types import SimpleNamespace
from fl_helpers.simulation import Execution, Terms, run_rounds
from fl_helpers.training import ClientFunctions
def update(params, silo, *, round_index, rng):
    if silo.name == "b":
        threading.Event().wait()  # for ever
    return SimpleNamespace(silo=silo.name, params=params, num_examples=1, metrics={})
silos = [SimpleNamespace(name=name) for name in "ab"]
client = ClientFunctions(update, draws_only_from_rng=True)
history = run_rounds({"w": torch.ones(1)}, silos, client, lambda u: list(u)[0].params,
                     rounds=1, seed=0, terms=Terms(quorum=1, deadline=1.0),
                     execution=Execution(progress=False))
print(history.rounds[0]["missing"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "{'b': 'TimeoutError: no answer within 1 s'}\n"


# -- the norm limit that follows the run


def shouting(factor):
    def fault(train):
        update = train()
        loud = {k: v * factor if v.is_floating_point() else v
                for k, v in update.params.items()}  # fmt: skip
        return Update(update.silo, loud, update.num_examples, update.metrics)

    return fault


def test_norms_are_recorded_and_limit_later_rounds(four, tmp_path):
    faults = {("b", 0): shouting(100), ("b", 2): shouting(100)}
    faulty, file = with_faults(client, faults), tmp_path / "run.pt"
    options = dict(quorum=3, check=CHECK)
    history = run(four, faulty, **options)
    # Four norms after round 0, which has no limit yet; eight before round 2.
    assert [list(record["missing"]) for record in history.rounds] == [[], [], ["b"], []]
    assert "norm" in history.rounds[2]["missing"]["b"]
    assert len(history.norms) == 4 + 4 + 3 + 4
    assert history.rounds[0]["norms"]["b"] > 20 * history.rounds[0]["norms"]["a"]
    # The limit is part of the checkpoint, through the records.
    run(four, faulty, rounds=2, checkpoint=file, **options)
    resumed = run(four, faulty, checkpoint=file, **options)
    assert_equal(resumed.params, history.params)


def test_norms_of_a_round_do_not_limit_the_same_round(four):
    seen = []

    def check(update, expected, *, silo, round_index, norms):
        seen.append((silo, round_index, len(norms)))
        return 1.0

    run(four, rounds=2, check=check)
    assert seen == [(s, r, 4 * r) for r in range(2) for s in "abcd"]


# -- the schedule


def test_faults_hit_whom_the_schedule_says():
    def echo(params, silo, *, round_index, rng):
        return (silo.name, round_index)

    schedule = {("a", 1): unreachable, ("b", 0): [unreachable, crash]}
    faulty = with_faults(echo, schedule)

    def ask(name, round_index):
        silo = SimpleNamespace(name=name)
        try:
            return faulty(None, silo, round_index=round_index, rng=None)
        except (ConnectionError, RuntimeError) as error:
            return type(error).__name__

    assert [ask("a", r) for r in (0, 1, 1, 2)] == [
        ("a", 0), "ConnectionError", "ConnectionError", ("a", 2)
    ]  # fmt: skip
    assert [ask("b", 0) for _ in range(4)] == [
        "ConnectionError", "RuntimeError", ("b", 0), ("b", 0)
    ]  # fmt: skip


def test_garbage_leaves_the_update_of_the_silo_alone():
    params = {"w": torch.ones(2), "n": torch.tensor(3)}
    update = Update("a", params, 1)
    spoiled = garbage(lambda: update)
    assert spoiled.params["w"].isnan().all() and spoiled.params["n"].item() == 3
    assert params["w"].tolist() == [1, 1]
    assert list(other_model(lambda: update).params) == ["old.w", "n"]


# -- kill -9 at any point, then go on

KILLED = Path(__file__).with_name("killed.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_run_that_is_killed_anywhere_ends_with_the_same_bits(tmp_path):
    done = subprocess.run(
        [sys.executable, KILLED, tmp_path], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    at_points, at_times = done.stdout.splitlines()
    assert at_points.startswith("killed at ") and at_times.startswith("killed by time")
