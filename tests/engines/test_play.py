"""What `play` makes of a server that is silent, starts anew, or has the job already."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from nvflare.fuel.flare_api.api_spec import JobNotFound, NoConnection, SessionClosed

from fl_helpers.cross_silo.on_premises import line, runs
from fl_helpers.cross_silo.on_premises.runs import Patience, RunError
from fl_helpers.cross_silo.run import Run

NAMES = ["Hospital A", "Hospital B"]
START = {"w": torch.zeros(2)}
ROUND = [{"event": "round_end", "round": 0}]


class Server:
    """A session, and the server behind it: each step is what happens at one look.

    step(server) is called with each question after the last; it may change it.
    """

    def __init__(self, folder, *steps):
        self.folder, self.steps = folder, list(steps)
        self.jobs, self.running, self.asked = {}, set(), 0
        self.sites = {name.replace(" ", "-"): "ours" for name in NAMES}
        self.up, self.aborted = True, []

    def say(self, *events):
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "events.jsonl").open("a") as file:
            for event in events:
                file.write(json.dumps({"time": 1.0, **event}) + "\n")

    def look(self):
        if not self.up:
            raise NoConnection("cannot connect to server")

    def submit_job(self, folder):
        self.look()
        job = f"job{len(self.jobs)}"
        self.jobs[job] = "RUNNING"
        self.running = {job}
        self.sites = dict.fromkeys(self.sites, "ours")
        self.say({"event": "start", "job": job})
        return job

    def get_job_meta(self, job):
        self.asked += 1
        if self.steps:
            self.steps.pop(0)(self)
        self.look()
        if job not in self.jobs:
            raise JobNotFound(job)
        detail = ["server: OK", *(f"{site}: OK" for site in self.sites)]
        return {"status": self.jobs[job], "job_deploy_detail": detail}

    def get_system_info(self):
        self.look()
        jobs = [SimpleNamespace(job_id=job) for job in self.running]
        about = {"last_connect_time": time.time()}
        clients = [SimpleNamespace(name=site, **about) for site in self.sites]
        return SimpleNamespace(job_info=jobs, client_info=clients)

    def check_status(self, kind, sites):
        self.look()
        (job,) = self.running
        known = {"ours": {"job_id": job, "status": "started"}, "idle": {"status": "no"}}
        known["dead"] = {"status": "no_reply"}
        rows = [{"client_name": s, **known[self.sites[s]]} for s in sites]
        return {"client_status": rows}

    def abort_job(self, job):
        self.look()
        self.aborted.append(job)
        self.jobs[job] = "FINISHED:ABORTED"
        self.running -= {job}


def nothing(server):
    pass


def down(server):
    server.up = False


def anew(server):
    """The server was started again: it lists the job, and does not run it."""
    server.up, server.running = True, set()


def done(server):
    server.say(*ROUND, {"event": "done"})


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on only when somebody sleeps, or looks at it."""
    now = [1000.0]

    def look():
        now[0] += 0.001
        return now[0]

    def sleep(seconds):
        now[0] += seconds

    fake = SimpleNamespace(monotonic=look, time=time.time, sleep=sleep)
    monkeypatch.setattr(runs, "time", fake)
    monkeypatch.setattr(line, "time", fake)
    return now


@pytest.fixture
def folder(tmp_path, clock):
    return tmp_path / "server" / "runs" / "x"


def new_run(**change):
    return Run(**dict(name="x", params=START, rounds=2, seed=1, quorum=1) | change)


def play(server, run=None, **how):
    kit = server.folder.parents[1]
    places = {"server_kit": kit, "jobs": kit.parent / "jobs", "silos": NAMES}
    events = runs.play(run or new_run(), server, **places, **how)
    return (event for event in events if event["event"] != "certificate")


def kinds(events):
    return [event["event"] for event in events]


def test_a_silent_server_is_an_event_again_and_again_and_then_an_error(folder, clock):
    server = Server(folder, nothing, down)
    events, begun = [], clock[0]
    with pytest.raises(RunError, match="has not answered for 20. s .*same lines again"):
        for event in play(server, patience=Patience(30, 200)):
            events.append((event, clock[0]))
    silent = [(e["seconds"], at) for e, at in events if e["event"] == "no_answer"]
    assert [round(s / 30) for s, _ in silent] == [1, 2, 3, 4, 5, 6]
    assert clock[0] - begun < 230
    times = [begun, *(at for _, at in events), clock[0]]
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert max(gaps) < 33  # never silent for longer


def test_a_server_that_answers_again_goes_on(folder, clock):
    steps = [nothing, down, *[nothing] * 50, lambda server: setattr(server, "up", True)]
    found = list(play(Server(folder, *steps, done)))
    assert kinds(found) == ["start", "no_answer", "round_end", "done"]


def test_a_server_that_was_started_anew_is_given_the_run_again(folder):
    server = Server(folder, nothing, down, nothing, anew, *[nothing] * 6, done)
    found = list(play(server))
    assert kinds(found) == ["start", "restart", "start", "round_end", "done"]
    assert "started anew" in found[1]["reason"] and [*server.jobs] == ["job0", "job1"]


def test_other_errors_are_not_swallowed(folder):
    def break_down(server):
        raise KeyError("not expected")

    with pytest.raises(KeyError, match="not expected"):
        list(play(Server(folder, nothing, break_down)))


def test_a_session_that_was_closed_here_is_told_with_the_way_to_go_on(folder):
    def close(server):
        raise SessionClosed("session closed")

    with pytest.raises(RunError, match="closed on this side.* same lines again"):
        list(play(Server(folder, nothing, close)))


def test_a_server_that_is_not_there_at_the_start(folder):
    server = Server(folder)
    server.up = False
    found = []
    with pytest.raises(RunError, match="has not answered for 100 s"):
        for event in play(server, patience=Patience(30, 100)):
            found.append(event)
    assert kinds(found) == ["no_answer"] * 3


def test_the_same_lines_follow_the_job_that_runs(folder):
    server = Server(folder)
    first = play(server)
    assert next(first)["event"] == "start"
    server.say({"event": "round_start", "round": 0})
    server.steps = [nothing, done]  # the first one looks no more: it was killed
    found = list(play(server))
    assert kinds(found) == ["attached", "start", "round_start", "round_end", "done"]
    assert found[0]["job"] == "job0" and [*server.jobs] == ["job0"]
    assert server.aborted == []
    first.close()  # as if it were still there: an interrupt ends the run
    assert server.aborted == ["job0"]


@pytest.mark.parametrize(
    "change",
    [
        lambda server: server.jobs.update(job0="FINISHED:COMPLETED"),
        lambda server: server.jobs.clear(),
        anew,
    ],
    ids=["over", "unknown", "lost"],
)
def test_a_job_that_runs_no_more_is_not_followed(folder, change):
    server = Server(folder)
    first = play(server)
    next(first)
    change(server)
    server.steps = [nothing, done]
    found = list(play(server))
    assert kinds(found) == ["start", "round_end", "done"]


def test_a_job_that_is_over_is_not_followed_while_the_engine_lists_it(folder):
    server = Server(folder, nothing, done)
    list(play(server))
    assert server.jobs == {"job0": "RUNNING"}  # it takes some seconds
    server.steps = [nothing, done]
    assert kinds(play(server))[0] == "start" and len(server.jobs) == 2


def test_a_torn_note_of_the_job_is_no_job(folder):
    folder.mkdir(parents=True)
    (folder / "job.json").write_text('{"job": "jo')
    assert kinds(play(Server(folder, done)))[-1] == "done"


def test_who_the_job_could_not_be_given_to_is_said_and_why(folder):
    server = Server(folder, nothing)
    meta = server.get_job_meta

    def partial(job):
        found = meta(job)
        detail = ["server: OK", "Hospital-A: NVFLARE_ERROR: failed to stage app app"]
        return found | {"job_deploy_detail": detail}

    server.get_job_meta, found = partial, []
    for event in play(server):
        found.append(event)
        if kinds(found).count("left_out") == 2:
            done(server)
    left = {e["silo"]: e["reason"] for e in found if e["event"] == "left_out"}
    assert left["Hospital A"] == "failed to stage app app"
    assert "was not connected when" in left["Hospital B"]
    server.jobs["job0"], server.steps = "FINISHED:COMPLETED", []
    failed = {
        "status": "FINISHED:FAILED_TO_RUN",
        "job_deploy_detail": ["Hospital-A: X"],
    }
    server.get_job_meta, server.say = lambda job: failed, nothing  # it never began
    with pytest.raises(RunError, match="FAILED_TO_RUN; .*out: .*'Hospital A': 'X'"):
        list(play(server))


def back(server):
    server.sites["Hospital-B"] = "idle"


def missing(server):
    server.sites["Hospital-B"] = "dead"
    server.say({"event": "missing", "round": 0, "silo": "Hospital B"})


def waits(server):
    missing(server)
    about = {"round": 0, "silos": ["Hospital B"], "seconds": 60}
    server.say({"event": "waiting", **about})


def test_hospitals_that_come_back_take_part_in_the_same_run_again(folder):
    """In a round that waits for them, or else after one; by default not at all."""
    steps = [nothing, waits, *[nothing] * 3, back, *[nothing] * 6, done]
    server = Server(folder, *steps)
    found = list(play(server, new_run(wait_for_quorum=600)))
    assert "['Hospital B'] came back" in next(
        e["reason"] for e in found if e["event"] == "restart"
    )
    assert {*server.aborted} == {"job0"} and kinds(found)[-1] == "done"


def played(server):
    server.say(*ROUND)


@pytest.mark.parametrize(
    "away, then, pause", [(missing, played, 300), (waits, nothing, 30)]
)
def test_a_hospital_that_comes_back_twice_in_a_short_time_is_told_of(
    folder, away, then, pause
):
    """The run starts anew for it once in five minutes while the others go on, and once
    in half a minute while they wait for it; nobody has to wonder why not at once."""
    again = [away, nothing, back, *[then] * 3]
    server = Server(folder, nothing, *again, *again, done)
    found = list(play(server, new_run(wait_for_quorum=600)))
    held = [e for e in found if "are back" in e.get("reason", "")]
    assert [e["event"] for e in held] == ["waiting"] and {*server.aborted} == {"job0"}
    assert pause - 20 < held[0]["seconds"] <= pause
    assert held[0]["silos"] == ["Hospital B"]
    longer = [*[then] * (pause // 2), done]  # two seconds each
    server = Server(folder.parent / "y", nothing, *again, *again, *longer)
    found = list(play(server, new_run(wait_for_quorum=600, name="y")))
    assert {*server.aborted} == {"job0", "job1"} and kinds(found).count("restart") == 2


def test_to_come_back_again_and_again_does_not_end_a_run_that_waits(folder):
    again = [waits, nothing, back, *[nothing] * 16]  # longer than the half minute
    server = Server(folder, nothing, *again * 4, done)
    found = list(play(server, new_run(wait_for_quorum=600)))
    assert kinds(found).count("restart") == 4 and kinds(found)[-1] == "done"


def test_a_round_that_has_its_quorum_is_not_broken_off(folder):
    steps = [nothing, missing, back, *[nothing] * 5, lambda s: s.say(*ROUND)]
    server = Server(folder, *steps, *[nothing] * 5, done)
    found = list(play(server, new_run(wait_for_quorum=600)))
    after = kinds(found).index("round_end")
    assert kinds(found)[after:].count("restart") == 1
    assert "restart" not in kinds(found)[:after] and {*server.aborted} == {"job0"}


def test_a_run_that_does_not_wait_goes_on_without_those_who_come_back(folder):
    steps = [nothing, missing, back, lambda s: s.say(*ROUND), *[nothing] * 5, done]
    server = Server(folder, *steps)
    assert "restart" not in kinds(play(server)) and server.aborted == []


def test_a_run_that_waits_begins_when_enough_are_connected(folder, clock):
    server = Server(folder, nothing, done)
    server.sites = {}
    found = []
    for event in play(server, new_run(wait_for_quorum=600)):
        found.append(event)
        if clock[0] > 1100:
            server.sites = {"Hospital-A": "ours"}
    assert kinds(found)[:4] == ["waiting"] * 4 and kinds(found)[-1] == "done"
    assert found[0]["silos"] == NAMES
    server.sites = {}
    with pytest.raises(RunError, match=r"\['Hospital A', 'Hospital B'\] are not conn"):
        list(play(server, new_run(wait_for_quorum=60)))
    assert len(server.jobs) == 1


def test_restarts_count_only_without_a_round_between(folder):
    """Three times with one, and three times without; the third of these is too many."""

    def give_up(server):
        job = f"job{len(server.jobs) - 1}"
        server.jobs[job], server.running = "FINISHED:EXECUTION_EXCEPTION", set()

    def round_and_give_up(server):
        server.say(*ROUND)
        give_up(server)

    server, found = Server(folder), []
    meta = server.get_job_meta
    plan = iter([round_and_give_up] * 3 + [give_up] * 3)

    def once(job):
        if server.jobs.get(job) == "RUNNING":
            next(plan)(server)
        return meta(job)

    server.get_job_meta = once
    with pytest.raises(RunError, match="ended 3 times without a round between"):
        for event in play(server):
            found.append(event)
    # Two that a round followed; of the three in a row the last one is the error.
    assert kinds(found).count("restart") == 2 + 2


def test_a_damaged_event_is_named_and_the_run_goes_on(folder):
    def tear(server):
        with (folder / "events.jsonl").open("a") as file:
            file.write('{"event": "upd\n[1]\n')

    found = list(play(Server(folder, nothing, tear, done)))
    damaged = [e for e in found if e["event"] == "damaged"]
    assert len(damaged) == 2 and str(folder / "events.jsonl") in damaged[0]["reason"]
    assert kinds(found)[-1] == "done"
