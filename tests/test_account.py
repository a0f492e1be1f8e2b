"""A hospital's privacy account: nobody outside decides what has been spent."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import linear_model, play

from fl_helpers.aggregation import weighted_average
from fl_helpers.cross_silo import hospital, turn
from fl_helpers.cross_silo.account import Booked, SiloAccount, gather, kept
from fl_helpers.models import small_cnn
from fl_helpers.privacy import (
    SPENT,
    Account,
    Budget,
    BudgetExceeded,
    Mechanism,
    advantage,
    epsilon_spent,
    nothing_spent,
    train_privately,
)
from fl_helpers.silos import Examples, Silo

STEP = Mechanism(2.0, max_grad_norm=1.0, sample_rate=0.25, steps=2)
ROOT = Path(__file__).parents[1]


def cost(turns, delta=1e-3):
    return epsilon_spent(((2.0, 0.25, 2 * turns),), delta)


def silo_of(n=40, seed=0):
    x = torch.randn(n, 1, 16, 16, generator=torch.Generator().manual_seed(seed))
    return SimpleNamespace(name="St. Mary", train=(x, torch.arange(n) % 2))


def train(account, run="first", index=0, *, seed=0, silo=None, step=STEP, **options):
    torch.manual_seed(seed)
    where = account.turn(run, index)
    how = {"mechanism": step, "account": where, "lr": 0.1} | options
    return train_privately(linear_model(), silo or silo_of(), **how).params["1.weight"]


@pytest.fixture
def account(tmp_path):
    return SiloAccount(tmp_path / "x.jsonl", Budget(50, 1e-3), silo="St. Mary")


def test_it_counts_over_rounds_runs_and_processes(account):
    for turns, (run, index) in enumerate([("a", 0), ("a", 1), ("b", 0), ("c", 0)], 1):
        train(account, run, index)
        again = SiloAccount(account.path, account.budget, silo="St. Mary")
        assert again.epsilon == account.epsilon == cost(turns)
    assert [line["epsilon"] for line in account.lines] == [
        cost(k) for k in (1, 2, 3, 4)
    ]


def test_a_second_run_under_another_name_begins_where_the_first_ended(tmp_path):
    budget = Budget(cost(3) * 1.001, 1e-3)
    account = SiloAccount(tmp_path / "x.jsonl", budget, silo="St. Mary")
    for index in range(3):
        train(account, "first", index)
    with pytest.raises(BudgetExceeded, match="'St. Mary' stops: it has spent"):
        train(account, "second", 0)
    assert account.epsilon == cost(3)


def test_the_same_turn_is_drawn_again_and_booked_once(account):
    first = train(account)
    assert train(account).equal(first) and account.epsilon == cost(1)
    assert not train(account, "other").equal(first)  # other noise: it is booked, too
    assert account.epsilon == cost(2)


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"lr": 0.2},
        {"momentum": 0.5},
        {"silo": silo_of(seed=1)},
        {"silo": silo_of(n=39)},
        {"step": Mechanism(2.0, 0.5, 0.25, steps=2)},
        {"step": Mechanism(1.0, 1.0, 0.25, steps=2)},
        {"loss_fn": lambda logits, y: torch.nn.functional.cross_entropy(logits, y)},
    ],
)
def test_a_round_that_was_answered_is_answered_for_nothing_else(account, other):
    """Two updates with one noise would give it away: their difference has none."""
    train(account)
    with pytest.raises(
        ValueError, match="has answered round 0 of run 'first' for anot"
    ):
        train(account, **other)
    assert account.epsilon == cost(1)


def test_the_coordinators_seed_draws_no_noise(account):
    """Its generator is refused, so nobody can take the noise off again."""
    with pytest.raises(ValueError, match="a SiloTurn and no rng"):
        train(account, rng=torch.Generator().manual_seed(0))
    assert account.lines == []
    free = Account(nothing_spent(), Budget(math.inf, 1e-3), silo="St. Mary")
    with pytest.raises(ValueError, match="give an Account and the round's rng"):
        train_privately(linear_model(), silo_of(), mechanism=STEP, account=free, lr=0.1)
    other = SiloAccount(account.path.with_name("y.jsonl"), account.budget, silo="x")
    assert not train(account).equal(train(other))  # a secret of its own


def test_it_is_on_the_disk_before_a_record_is_looked_at_by_training(account):
    silo = silo_of()
    silo.train = (silo.train[0], silo.train[1] + 100)  # no such class
    with pytest.raises((IndexError, RuntimeError)):
        train(account, silo=silo)
    assert account.epsilon == cost(1)


def test_a_budget_that_is_spent_is_refused_before_a_record_is_looked_at(tmp_path):
    class Watched:
        name, looked = "St. Mary", 0

        @property
        def train(self):
            x, y = silo_of().train
            return Unreadable(x, self), y

    class Unreadable:
        def __init__(self, x, silo):
            self.x, self.silo = x, silo

        def __len__(self):
            return len(self.x)

        def __getattr__(self, name):
            self.silo.looked += 1
            return getattr(self.x, name)

    budget = Budget(cost(1) * 0.99, 1e-3)
    account = SiloAccount(tmp_path / "x.jsonl", budget, silo="St. Mary")
    silo = Watched()
    with pytest.raises(BudgetExceeded):
        train(account, silo=silo)
    assert silo.looked == 0


def test_a_kill_does_not_undo_it(tmp_path):
    """Killed as soon as the first noise is drawn; then the turn has been spent."""
    code = f"""
        import os, signal, sys
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        import torch
        from pathlib import Path
        import test_account
        from fl_helpers.cross_silo import account
        from fl_helpers.privacy import Budget
        def drawn(digest):
            os.kill(os.getpid(), signal.SIGKILL)
        account.generator_of = drawn
        mine = account.SiloAccount({str(tmp_path / "x.jsonl")!r}, Budget(50, 1e-3),
                                   silo="St. Mary")
        test_account.train(mine)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    again = SiloAccount(tmp_path / "x.jsonl", Budget(50, 1e-3), silo="St. Mary")
    assert again.epsilon == cost(1)
    train(again)  # the worker that is started again plays the same round
    assert again.epsilon == cost(1)


def test_a_torn_line_was_not_booked_and_a_damaged_one_is_not_skipped(account):
    train(account)
    with account.path.open("a") as file:
        file.write('{"run": "first", "round": 1, "tur')
    assert account.epsilon == cost(1)
    train(account, "first", 1)
    assert account.epsilon == cost(2)
    whole = account.path.read_text()
    account.path.write_text(whole.replace('"round": 0', '"round" 0'))
    with pytest.raises(ValueError, match="x.jsonl is damaged.*backup"):
        train(account, "first", 2)


def test_a_full_disk_stops_the_turn(account, monkeypatch):
    train(account)

    def full(descriptor):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            train(account, "first", 1)


def test_the_secret_is_the_hospitals_alone(account):
    train(account)
    assert account.path.stat().st_mode & 0o077 == 0
    secret = json.loads(account.path.read_text().split("\n")[0])["secret"]
    assert len(bytes.fromhex(secret)) == 32
    assert secret not in json.dumps(account.lines) + account.said()


def test_several_processes_book_one_after_the_other(tmp_path):
    code = f"""
        import sys
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        import test_account
        from fl_helpers.cross_silo.account import SiloAccount
        from fl_helpers.privacy import Budget
        budget = Budget(test_account.cost(5) * 1.001, 1e-3)
        mine = SiloAccount({str(tmp_path / "x.jsonl")!r}, budget, silo="St. Mary")
        for index in range(4):
            try:
                test_account.train(mine, sys.argv[1], index)
            except test_account.BudgetExceeded:
                pass
    """
    line = [sys.executable, "-c", textwrap.dedent(code)]
    processes = [subprocess.Popen([*line, name]) for name in ("a", "b")]
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    account = SiloAccount(tmp_path / "x.jsonl", Budget(50, 1e-3), silo="St. Mary")
    assert len(account.lines) == 5  # the budget is for five turns, of eight
    assert len({line["turn"] for line in account.lines}) == 5


def test_delta_must_be_well_below_one_over_the_patients(tmp_path):
    account = SiloAccount(tmp_path / "x.jsonl", Budget(50, 0.004), silo="St. Mary")
    with pytest.raises(ValueError, match="40 patients, and delta is 0.004.* 0.0025"):
        train(account)
    assert account.lines == []


# -- where one process books, and another one draws


def test_one_books_and_another_one_draws_no_more_than_that(account, tmp_path):
    """As jobs do: files that are written once, gathered before each turn."""
    store, budget = tmp_path / "store", Budget(cost(2) * 1.001, 1e-3)

    def turn_of(only, index, **more):
        path = tmp_path / f"{only}.jsonl"
        gather(store, path, run="first", round_index=index)
        mine = SiloAccount(path, budget, silo="St. Mary", only=only)
        return mine, lambda: train(mine, "first", index, **more)

    def book(index, folder):
        mine, begin = turn_of("book", index)
        with pytest.raises(Booked):
            begin()
        (store / folder).mkdir(parents=True)
        (store / folder / "account.jsonl").write_text(kept(mine, "first", index))

    with pytest.raises(ValueError, match="has not booked round 0 of run 'first'"):
        turn_of("draw", 0)[1]()
    book(0, "a")
    first = turn_of("draw", 0)[1]()
    book(0, "b")  # another graph, the same turn: the same noise, and booked once
    assert (store / "a/account.jsonl").read_text() == (
        store / "b/account.jsonl"
    ).read_text()
    mine, draw = turn_of("draw", 0)
    assert draw().equal(first) and mine.epsilon == cost(1)
    with pytest.raises(ValueError, match="for another model, data or settings"):
        turn_of("draw", 0, seed=1)[1]()
    book(1, "c")
    with pytest.raises(BudgetExceeded):
        turn_of("book", 2)[1]()
    secrets = {path.read_text().split("\n")[0] for path in store.rglob("*.jsonl")}
    assert len(secrets) == 2  # one a turn
    (store / "c/account.jsonl").write_text(next(iter(secrets)) + "\n")  # torn
    with pytest.raises(ValueError, match="c/account.jsonl is damaged"):
        turn_of("book", 2)


# -- what it means


def test_the_advantage_is_that_of_a_mechanism_that_reaches_it():
    """Randomised response tells the truth with chance odds / (1 + odds)."""
    found = advantage(math.log(3), 0.0)
    assert found["odds"] == pytest.approx(3) and found["certainty"] == pytest.approx(
        0.75
    )
    assert found["found"] == pytest.approx(0.03)  # 3 times one percent
    # At epsilon 8 nothing is promised: 1 - 0.99 / exp(8) is the smaller one.
    assert advantage(8.0, 0.0)["found"] == pytest.approx(1 - 0.99 / math.exp(8))
    assert advantage(0.0, 0.0) == {"odds": 1.0, "certainty": 0.5, "found": 0.01}
    assert advantage(math.inf, 0.0)["found"] == 1


def test_a_report_says_it_in_words(account):
    train(account)
    said, found = account.said(), advantage(cost(1), 1e-3)
    assert f"St. Mary: epsilon {cost(1):.2f} of 50 is spent" in said
    assert f"{100 * found['certainty']:.0f} % at most" in said
    (row,) = account.rows()
    assert row["epsilon"] == cost(1) and row["remaining"] == 50 - cost(1)


# -- in a simulation, the account is in the state that a silo keeps


def test_an_update_that_the_orchestrator_refuses_was_seen_and_is_booked(silos):
    """With a quorum, and a check that refuses silo "a" in each of three rounds."""
    budget = Budget(50, 1e-3)

    def client(params, silo, *, round_index, rng):
        model = linear_model()
        model.load_state_dict({k: params[k] for k in model.state_dict()})
        mine = Account(params, budget, silo=silo.name)
        how = {"mechanism": STEP, "account": mine, "lr": 0.1, "rng": rng}
        return train_privately(model, silo, **how)

    def check(update, expected, *, silo, round_index, norms):
        if silo == "a":
            raise ValueError("too far")

    start = linear_model().state_dict() | nothing_spent()
    history = play(
        start, silos, client, weighted_average, rounds=3, seed=0, quorum=1,
        check=check, keep_local=[SPENT],
    )  # fmt: skip
    assert [list(r["missing"]) for r in history.rounds] == [["a"]] * 3
    for name in "ab":  # 3 rounds of 2 steps, for both
        assert history.local[name][SPENT].tolist() == [[2.0, 0.25, 6]]


# -- the hospital's example


SETTINGS = {"num_classes": 2, "noise_multiplier": 2.0, "max_grad_norm": 1.0}
SETTINGS |= {"sample_rate": 0.5, "steps": 1, "lr": 0.1}


def test_the_example_trains_within_the_hospitals_own_budget(tmp_path):
    x, y = torch.rand(20, 1, 28, 28), torch.arange(20) % 2
    silo = Silo("A", Examples(x[:12], y[:12]), Examples(x[12:], y[12:]))
    hospital.save_silo(silo, tmp_path / "data")
    one = epsilon_spent(((2.0, 0.5, 1),), 1e-3)
    entry = "fl_helpers.cross_silo.hospital:private_client"

    def client(run):
        place = turn.Place(tmp_path / "own", run, one * 1.001, 1e-3)
        return turn.load_client(
            entry, tmp_path / "data", SETTINGS, silo="A", place=place
        )

    params = small_cnn(2, norm="group").state_dict()
    how = {"round_index": 0, "rng": torch.Generator().manual_seed(0)}
    first = client("first").update(params, silo, **how)
    again = client("first").update(params, silo, **how)
    assert all(first.params[k].equal(v) for k, v in again.params.items())
    assert set(first.params) == set(params)
    with pytest.raises(BudgetExceeded) as refused:
        client("second").update(params, silo, **how)
    assert refused.value.code == "PRIVACY_BUDGET_SPENT"
    with pytest.raises(ValueError, match="private_client needs a place of its own"):
        turn.load_client(entry, tmp_path / "data", SETTINGS, silo="A")
