"""A hospital's line to the server is slow, and is cut in the middle of an upload.

Its update is sent again, and what was trained once is not trained again. With FULL=1
100 MB at 4 Mbit/s with a cut of six minutes, 40 minutes in all; else less of each.
"""

import os
import re
from pathlib import Path

import pytest
import torch

from fl_helpers import exchange
from fl_helpers.cross_silo.on_premises import gate, site, trainer
from fl_helpers.cross_silo.run import Run

from .bad_line import FleetOverLines
from .conftest import LIMITS, METRICS, SENT, STATE
from .test_on_premises import assert_same_bits, simulate
from .test_on_premises_parts import through


@pytest.fixture
def trained(monkeypatch):
    """Rounds that were trained, in a list."""
    found, turn = [], trainer.Trainee.turn

    def counted(self, task, params, round_index):
        found.append(round_index)
        return turn(self, task, params, round_index)

    monkeypatch.setattr(trainer.Trainee, "turn", counted)
    return found


def sent_for(train, kit, *given, **how):
    """What leaves the hospital for a question: {file: its bytes}."""
    message = through(kit, train(*given, **how))
    assert message.get_return_code() == "OK"
    return {name: message[name] for name in (exchange.UPDATE, exchange.MANIFEST)}


def test_the_same_question_gets_the_same_answer_without_training(train, kit, trained):
    first = sent_for(train, kit, 0)
    assert sent_for(train, kit, 0) == first and trained == [0]
    lines = exchange.read_ledger(kit / "ledger.jsonl")[0]
    assert [e["what"] for e in lines if e["direction"] == "out"].count("w") == 2
    sent_for(train, kit, 1)
    assert trained == [0, 1]
    # Another model for a round, as after a damaged checkpoint: another question.
    sent_for(train, kit, 1, sent=SENT | {"n": torch.tensor(8)})
    assert trained == [0, 1, 1] and len([*kit.glob("kept/*/answer/*")]) == 1
    train(2, task="evaluate")
    assert not [*kit.glob("kept/*/answer/*")]


def test_an_answer_that_is_damaged_or_was_refused_is_trained_for_again(
    train, kit, trained
):
    first = sent_for(train, kit, 0)
    (path,) = kit.glob(f"kept/*/answer/*/{exchange.UPDATE}")
    path.write_bytes(path.read_bytes()[:-1])
    assert sent_for(train, kit, 0) == first and trained == [0, 0]
    gate.allow(kit, STATE, keep_local=["own"], metrics=["test_loss"], max_norm=0.5)
    own = Path(site.read_site(kit).client.rpartition(":")[0])
    further = 'params["own"] + 1, "w": params["w"] + 1}'
    own.write_text(own.read_text().replace('params["own"] + 1}', further))
    for _ in range(2):  # the norm of the change is 2: all four entries, by 1
        assert through(kit, train(1)).get_return_code() == "TASK_RESULT_FILTER_ERROR"
    assert trained == [0, 0, 1, 1]
    gate.allow(kit, STATE, keep_local=["own"], metrics=["test_loss"])
    sent_for(train, kit, 1)
    # What was kept passes the gate like any other: the policy of today decides.
    gate.allow(kit, STATE, keep_local=["own"], metrics=["test_loss"], max_norm=0.5)
    assert through(kit, train(1)).get_return_code() == "TASK_RESULT_FILTER_ERROR"
    assert trained == [0, 0, 1, 1, 1]


# ---- real processes

ROUNDS = 3
# Bytes of the model, bytes a second of the line, seconds: without it, and for a round.
SIZE, RATE, AWAY, DEADLINE = (
    (100_000_000, 500_000, 360, 900)
    if os.environ.get("FULL")
    else (3_000_000, 2_000_000, 4, 20)
)


@pytest.fixture
def fleet(silos_yaml, tmp_path):
    over = {"Hospital-B"}
    with FleetOverLines(silos_yaml, tmp_path / "fleet", over=over, ready=180) as fleet:
        yield fleet


def of(events, kind):
    return [event for event in events if event["event"] == kind]


@pytest.mark.engines
def test_a_cut_costs_no_round_and_no_training(fleet, params, silos):
    """Round 0: what is connected breaks off, within the deadline. Round 1: nothing is
    heard for longer than the deadline, and the round is asked again."""
    params = params | {"ballast": torch.rand(SIZE // 4)}
    fleet.allow(params, metrics=METRICS)
    run = Run(
        "lines", params, rounds=ROUNDS, seed=7, deadline=DEADLINE,
        wait_for_quorum=15 * DEADLINE, limits=LIMITS,
    )  # fmt: skip
    line, events = fleet.lines["Hospital-B"], []
    line.rate = RATE
    for event in fleet.run(run, timeout=15 * DEADLINE):
        events.append(event)
        if event["event"] == "round_start" and event["round"] == 0:
            line.cut_at(line.passed["up"] + SIZE // 2, seconds=AWAY, hang_up=True)
        if event["event"] == "round_start" and event["round"] == 1:
            line.cut_at(line.passed["up"] + SIZE // 2)
        if event["event"] == "waiting":
            assert event["silos"] == ["Hospital B"] and event["round"] == 1
            line.mend()
    assert line.cuts == 2
    assert [e["silo"] for e in of(events, "missing")] == ["Hospital B"]
    ends = of(events, "round_end")
    assert [len(e["silos"]) for e in ends] == [3] * ROUNDS
    log = (fleet.logs / "Hospital-B.log").read_text()
    assert re.findall(r"trained in round (\d)", log) == ["0", "1", "2"]
    assert_same_bits(fleet.result(run), simulate(run, silos).params)
