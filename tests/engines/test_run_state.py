"""What the server keeps of a run: damage, disk, one job, and waiting for a quorum."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from nvflare.apis.signal import Signal

from fl_helpers import aggregation, exchange
from fl_helpers.cross_silo.on_premises import controller, record, refusals
from fl_helpers.cross_silo.on_premises.attendance import Answers, Attendance
from fl_helpers.cross_silo.run import Run
from fl_helpers.simulation import NoQuorum
from fl_helpers.training import Update

START = {"w": torch.zeros(2, 3), "b": torch.zeros(2)}


def new_rule():
    return aggregation.FedAdam(START, ["w"], lr=0.1)


def after(rounds):
    """The states of a run of one silo, whose rule has a memory: params by round."""
    rule, params, found = new_rule(), START, [START]
    for index in range(rounds):
        moved = {name: value + index + 1 for name, value in params.items()}
        params = rule([Update("A", moved, 10, {})])
        found.append(params)
    return found


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "local").mkdir()
    return tmp_path / "runs" / "x"


def play(folder, rounds, keep=None):
    """Play a run to so many rounds; what it began with: (rounds done, rule, params)."""
    if keep:
        (folder.parents[1] / "local" / "keep_models").write_text(f"{keep}\n")
    kept, rule = record.Record(folder), new_rule()
    state, params = kept.resume("id", START, rule)
    begun = state.rounds_done
    for index in range(begun, rounds):
        moved = {name: value + index + 1 for name, value in params.items()}
        params = rule([Update("A", moved, 10, {})])
        state.rounds_done, state.scores = index + 1, [*state.scores, index / 10]
        kept.save(state, params, rule)
    return begun, state, params


def events(folder, kind):
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == kind]


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def assert_same(params, expected):
    assert all(params[name].equal(expected[name]) for name in expected)


# ---- a damaged checkpoint


@pytest.mark.parametrize(
    "file, damage, begun",
    [
        ("model_0003/model.safetensors", flip, 2),
        ("model_0003/manifest.json", cut, 2),
        ("memory_0003.safetensors", flip, 2),
        ("memory_0003.safetensors", lambda path: path.unlink(), 2),
        ("state.json", cut, 3),  # there is another one of this round
        ("state.json", flip, 3),
        ("state.json", lambda path: path.write_bytes(b""), 3),
    ],
)
def test_a_damaged_file_is_named_and_the_last_good_round_taken(
    folder, file, damage, begun
):
    play(folder, 3)
    damage(folder / file)
    found, state, params = play(folder, 5)
    assert found == begun
    said = events(folder, "damaged")
    assert str(folder / file.split("/")[0]) in said[0]["file"]
    assert "cannot be used" in said[0]["reason"] and len(said) == 1
    assert_same(params, after(5)[5])  # the bits of a run without damage
    assert state.scores == [0.0, 0.1, 0.2, 0.3, 0.4]


def test_two_damaged_rounds_and_then_all(folder):
    play(folder, 3)
    for done in (3, 2):
        flip(folder / f"model_000{done}" / "model.safetensors")
    assert play(folder, 3)[0] == 1 and len(events(folder, "damaged")) == 2
    for done in (1, 2, 3):
        flip(folder / f"model_000{done}" / "model.safetensors")
    begun, _, params = play(folder, 3)  # all of its rounds are there: from the start
    assert begun == 0
    assert_same(params, after(3)[3])


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(folder):
    play(folder, 4, keep=2)
    for path in folder.glob("model_*/model.safetensors"):
        flip(path)
    with pytest.raises(ValueError, match=r"no checkpoint in .*/x can be read.*backup"):
        play(folder, 5)


def test_a_state_of_an_older_version_goes_on(folder):
    play(folder, 2)
    kept = json.loads((folder / "state.json").read_text())
    for path in folder.glob("state_*.json"):
        path.unlink()
    old = {key: kept[key] for key in ("run", "rounds_done", "scores")}
    (folder / "state.json").write_text(json.dumps(old))
    assert play(folder, 3)[0] == 2
    with pytest.raises(ValueError, match="belongs to another run"):
        record.Record(folder).resume("other", START, new_rule())


# ---- disk


def test_the_last_models_are_kept_and_the_final_one(folder, tmp_path):
    play(folder, 9, keep=3)
    names = {path.name for path in folder.iterdir()}
    kept = {name for name in names if name[-1].isdigit() or "_0" in name}
    kinds = ("model_000{}", "memory_000{}.safetensors", "state_000{}.json")
    assert kept == {kind.format(done) for kind in kinds for done in (7, 8, 9)}
    record.Record(folder).publish(9, tmp_path / "download")
    final = exchange.read_model(folder / "final", START)
    assert_same(final, after(9)[9])
    assert play(folder, 9)[0] == 9  # and the run can still go on from there
    assert record.Record(tmp_path / "runs" / "y").keep == 3
    for text in ("1", "all", ""):
        (tmp_path / "local" / "keep_models").write_text(text)
        with pytest.raises(ValueError, match="keep_models must hold an integer >= 2"):
            assert record.Record(folder).keep


def test_a_run_says_what_room_it_needs(folder, monkeypatch):
    kept, free = record.Record(folder), SimpleNamespace(free=0)
    monkeypatch.setattr(refusals.shutil, "disk_usage", lambda path: free)
    params = {"w": torch.zeros(250_000)}  # a megabyte
    # 5 rounds, 3 updates, the final model twice and a megabyte for the rest.
    free.free = 11 * 10**6 - 1
    with pytest.raises(refusals.Refusal, match=r"has 11 MB left, .* needs 11 MB: make"):
        kept.require_room(params, rounds=5, silos=3)
    free.free += 1
    kept.require_room(params, rounds=5, silos=3)
    kept.require_room(params, rounds=1, silos=3)
    with pytest.raises(refusals.Refusal, match="needs 16 MB"):  # 10 are kept of 99
        kept.require_room(params, rounds=99, silos=3)


# ---- one job per run


def test_a_second_job_does_not_play_a_run(folder):
    kept = record.Record(folder)
    with kept.alone("first"):
        assert (folder / "lock").read_text() == "first"
        with pytest.raises(RuntimeError, match="job first plays this run already"):
            with record.Record(folder).alone("second", seconds=0.3):
                pass
    with record.Record(folder).alone("second", seconds=0):
        assert (folder / "lock").read_text() == "second"
    assert not (folder / "events.jsonl").exists()  # it writes nothing into the run


def test_a_job_that_dies_leaves_the_run(folder):
    kept = record.Record(folder)
    script = (
        "import sys, time, pathlib\n"
        "from fl_helpers.cross_silo.on_premises.record import Record\n"
        "with Record(pathlib.Path(sys.argv[1])).alone('first'):\n"
        "    print('ready', flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(folder)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(RuntimeError, match="job first"):
            with kept.alone("second", seconds=0):
                pass
    finally:
        other.kill()
        other.communicate()
    with kept.alone("second", seconds=5):
        pass


# ---- who is there


def test_all_who_are_away_are_named_since_when():
    there = Attendance({"Hospital-A": "Hospital A", "B": "B", "C": "C"})
    assert there.note(2, ["Hospital-A", "B", "C"], {"C"}) == ["Hospital A", "B"]
    assert there.present() == ["C"]
    assert there.note(5, ["C"], {}) == ["C"]
    said = there.said().split("; ")
    assert [s[: s.index(",")] for s in said] == [
        "'B' is away since round 2",
        "'C' is away since round 5",
        "'Hospital A' is away since round 2",
    ]
    there.heard |= {"B"}
    assert there.back() == ["B"] and there.present() == ["B"]
    there.ended.add("B")
    assert there.present() == []


# ---- waiting for a quorum


class Fake(controller.RoundController):
    """A controller whose silos answer by a script, by round and attempt."""

    def __init__(self, folder, script, names="ABC", **run):
        threads = torch.get_num_threads()
        super().__init__()
        torch.set_num_threads(threads)
        run = dict(name="x", params=START, rounds=3, seed=1, evaluate=False) | run
        silos = {name: name for name in names}
        initial = lambda names: run["params"]  # noqa: E731
        self.job = SimpleNamespace(
            run=Run(**run), silos=silos, id="id", initial=initial
        )
        self.record, self.there = record.Record(folder), Attendance(silos)
        self.download, self.abort = folder / "download", Signal()
        self.script, self.asked = script, []

    def _ask(self, task, index, sites):
        attempt = sum(before == index for before, _ in self.asked)
        self.asked.append((index, sites))
        plan = self.script.get((index, attempt), {})
        updates, refused = {}, {}
        for name in sites:
            how = plan.get(name, "ok")
            if how == "ok":
                moved = {k: v + ord(name) * (index + 1) for k, v in self.params.items()}
                about = {"num_examples": ord(name), "metrics": {}, "num_bytes": 8}
                updates[name] = SimpleNamespace(silo=name, params=moved, **about)
            elif how != "away":
                refused[name] = f"the site answered {how}"
        for name in plan.get("heard", ""):
            self.there.heard.add(name)
        return Answers(updates, refused, tuple(sorted(updates)))


def run_of(fake):
    """(how it ended, its events)."""
    error = None
    try:
        fake._play_or_say_why()
    except Exception as raised:
        error = raised
    lines = (fake.record.folder / "events.jsonl").read_text().splitlines()
    return error, list(map(json.loads, lines))


def test_a_round_is_asked_again_when_hospitals_are_back_and_has_the_same_bits(folder):
    whole = Fake(folder.parent / "whole", {})
    assert run_of(whole)[0] is None
    script = {
        (1, 0): {"B": "away", "C": "away"},
        (1, 1): {"C": "DISK_FULL"},
        (1, 2): {},
    }
    fake = Fake(folder, script, wait_for_quorum=60)
    waits = iter(["BC", ""])
    wait = fake._wait

    def hear(*args):
        fake.there.heard |= {*next(waits)}
        return wait(*args)

    fake._wait, controller.PAUSE = hear, 0.2
    error, found = run_of(fake)
    assert error is None
    # Only those are asked again whose update is not there.
    everyone = ["A", "B", "C"]
    asked = [everyone, everyone, ["B", "C"], ["C"], everyone]
    assert [sites for _, sites in fake.asked] == asked
    assert_same(fake.params, whole.params)
    waiting = [e for e in found if e["event"] == "waiting"]
    assert [e["silos"] for e in waiting] == [["B", "C"], ["C"]]
    assert waiting[0]["round"] == 1 and 0 < waiting[0]["seconds"] <= 60
    ends = [e for e in found if e["event"] == "round_end"]
    assert [e["silos"] for e in ends] == [everyone] * 3
    assert [e["silo"] for e in found if e["event"] == "back"] == ["B", "C"]


@pytest.fixture(autouse=True)
def pause(monkeypatch):
    monkeypatch.setattr(controller, "PAUSE", controller.PAUSE)


def test_without_waiting_a_run_ends_at_once_with_its_last_model_and_all_reasons(folder):
    script = {
        (0, 0): {"C": "away"},
        (1, 0): {"A": "DISK_FULL"},
    }
    fake = Fake(folder, script, quorum=2)
    error, found = run_of(fake)
    assert isinstance(error, NoQuorum)
    text = str(error)
    assert "round 1: 1 valid updates, the quorum is 2" in text
    assert "'C' is away since round 0" in text  # it was not asked in this round
    assert "DISK_FULL (its disk is full" in text and "start the same run again" in text
    assert found[-1]["event"] == "no_quorum" and found[-1]["rounds"] == 1
    assert not [e for e in found if e["event"] == "waiting"]
    final = exchange.read_model(folder / "final", START)
    assert_same(final, exchange.read_model(folder / "model_0001", START))


def test_the_time_to_wait_ends_and_says_so(folder):
    fake = Fake(folder, {(0, 0): {"B": "away"}}, wait_for_quorum=1)
    error, found = run_of(fake)
    assert isinstance(error, NoQuorum) and "'B' is away since round 0" in str(error)
    assert [e["silos"] for e in found if e["event"] == "waiting"] == [["B"]]
    final = exchange.read_model(folder / "final", START)
    assert_same(final, START)


def test_whom_it_waits_for_is_said_again_and_again(folder, monkeypatch):
    now = [0.0]
    sleep = lambda seconds: now.append(now.pop() + seconds)  # noqa: E731
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=sleep)
    monkeypatch.setattr(controller, "time", clock)
    _, found = run_of(Fake(folder, {(0, 0): {"B": "away"}}, wait_for_quorum=199))
    waiting = [e for e in found if e["event"] == "waiting"]
    assert [e["silos"] for e in waiting] == [["B"]] * 4
    assert [e["seconds"] for e in waiting] == [199, 149, 99, 49]


def test_a_budget_that_is_spent_is_not_waited_for(folder):
    script = {(1, 0): {"B": "PRIVACY_BUDGET_SPENT", "C": "PRIVACY_BUDGET_SPENT"}}
    fake = Fake(folder, script, quorum=2, wait_for_quorum=60)
    ask = fake._ask

    def spend(task, index, sites):
        answers = ask(task, index, sites)
        fake.there.ended |= answers.refused.keys()
        return answers

    fake._ask = spend
    begun = time.monotonic()
    error, found = run_of(fake)
    assert error is None and time.monotonic() - begun < 30
    (stopped,) = [e for e in found if e["event"] == "stopped"]
    assert stopped["reason"].startswith("the privacy budget is spent at ['B', 'C']")
    assert found[-1]["event"] == "done" and found[-1]["rounds"] == 1


def test_an_abort_ends_the_wait(folder):
    fake = Fake(folder, {(0, 0): {"B": "away"}}, wait_for_quorum=60)
    ask = fake._ask

    def aborted(*args):
        answers = ask(*args)
        fake.abort.trigger("by somebody")
        return answers

    fake._ask = aborted
    error, found = run_of(fake)
    assert "aborted" in str(error) and found[-1]["event"] == "aborted"


# ---- memory

ROUND = """
import resource, sys, tempfile
from pathlib import Path
import torch
from fl_helpers import aggregation, exchange
from fl_helpers.cross_silo.on_premises import controller, gate
from fl_helpers.training import Update
sys.path.insert(0, sys.argv[1])
from engines.test_run_state import Fake

START = {"w": torch.zeros(4_000_000)}  # 16 MB
NAMES = "ABCDEFGH"

class Server(Fake):
    def _ask(self, task, index, sites):
        updates = {}
        for number, name in enumerate(sites, start=1):
            params = {"w": self.params["w"] + number}
            update = Update(name, params, number, {})
            del params
            with tempfile.TemporaryDirectory() as folder:
                exchange.write_update(folder, update, round_index=index)
                del update
                message = gate.pack(folder)
            updates[name] = self._take(task, message, name, index)
            del message
        return controller.Answers(updates, {}, tuple(updates))

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(1)
server = Server(Path(sys.argv[2]), {}, params=START, names=NAMES, rounds=2)
server.abort.triggered  # all is imported
before, size = peak(), START["w"].nbytes
server._play_or_say_why()
print((peak() - before) / size, server.params["w"].unique().tolist())
print([*Path(sys.argv[2]).glob("inbox/*")])
"""


def test_the_memory_of_a_round_does_not_grow_with_the_hospitals(folder):
    here = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", ROUND, here, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    growth, *rest = done.stdout.splitlines()[0].split(" ", 1)
    # The global model, the mean, one update and its message; the files of the last are
    # written from and read into memory once more. Eight updates would be ten models.
    assert float(growth) < 6.5, done.stdout
    # By hand: 1 + 4 + ... + 64 over 1 + 2 + ... + 8 is 204 / 36, in each round.
    assert json.loads(rest[0]) == [pytest.approx(2 * 204 / 36, rel=1e-6)]
    assert done.stdout.splitlines()[1] == "[]"
