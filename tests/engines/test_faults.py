"""One run on one fleet, and fault after fault at random times: nobody is silent, the
same lines go on, and the bits are those of `simulation.run_rounds`.

Three faults in every check; all of them, in random order, with FULL=1, which writes the
table `runs/faults.md`. test_on_premises.py and test_survive.py have some of the others.
"""

import contextlib
import json
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path

import psutil
import pytest

from fl_helpers.cross_silo.on_premises import runs
from fl_helpers.cross_silo.on_premises.runs import Patience, RunError
from fl_helpers.cross_silo.run import Run

from .bad_line import FleetOverLines
from .conftest import LIMITS, METRICS
from .test_certificates import write_certificate
from .test_on_premises import assert_same_bits, kill, simulate

pytestmark = pytest.mark.engines
ROOT = Path(__file__).parents[2]
SILENCE = 60  # seconds without an event that a coordinator may have to bear
WHO = "Hospital-B"  # the one that faults of a hospital strike
USUAL = {"start", "round_start", "update", "tested", "round_end", "done"}
MADE_UP = """
import os, shutil

real = shutil.disk_usage

def disk_usage(path):
    found = real(path)
    full = os.path.exists(os.path.join(os.environ["HOME"], "disk_full"))
    return found._replace(free=0) if full else found

shutil.disk_usage = disk_usage
"""


@dataclass
class Fault:
    """strike: what happens; returns what mends it, or None if it mends by itself. None
    is the death of the coordinator's interpreter."""

    strike: Callable
    words: str  # of what must have been said about it; "" if there is nothing to say
    said: list = field(default_factory=list)
    gaps: list = field(default_factory=list)
    began: float = 0.0
    seconds: float = 0.0
    again: int = 0  # times that the same lines were run
    lost: int = 0  # rounds that were played again


def restart(fleet, who):
    if who in fleet.processes and fleet.processes[who].poll() is None:
        fleet.processes[who].kill()
        fleet.processes[who].wait(20)
    fleet.start_process(who)
    if who == "server":
        fleet.wait_ready()


def stop(fleet, who):
    fleet.processes[who].kill()
    fleet.processes[who].wait(20)


def process_killed(who):
    def strike(fleet, run):
        stop(fleet, who)
        return lambda: restart(fleet, who)

    return strike


def job_killed(fleet, run):
    kill(fleet, "server", "runner_process")


def worker_killed(fleet, run):
    fleet.kill_worker("Hospital B")


def trainer_killed(fleet, run):
    for process in fleet.own_processes():
        with contextlib.suppress(psutil.Error):
            if "on_premises.trainer" in " ".join(process.cmdline()):
                process.kill()


def worker_stopped(fleet, run):
    for process in fleet.own_processes():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if str(fleet.kits / WHO) in line and "worker_process" in line:
                process.send_signal(signal.SIGSTOP)
                return lambda: process.send_signal(signal.SIGCONT)
    raise AssertionError("no worker")


def line_breaks(hang_up):
    def strike(fleet, run):
        fleet.lines[WHO].cut(hang_up)
        return fleet.lines[WHO].mend

    return strike


def line_hangs_up(fleet, run):
    fleet.lines[WHO].cut(hang_up=True)
    fleet.lines[WHO].mend()


def line_slow(fleet, run):
    fleet.lines[WHO].rate = 20_000  # bytes per second
    return lambda: setattr(fleet.lines[WHO], "rate", None)


def noise(fleet, run):
    """Half-open connections, and random bytes, at the server's port."""
    rng = random.Random(0)
    for number in range(200):
        link = socket.create_connection(("127.0.0.1", fleet.lines[WHO].target))
        with contextlib.suppress(OSError):
            link.sendall(rng.randbytes(64 if number % 2 else 0))
        fleet.noise.append(link)


def disk_full(who):
    def strike(fleet, run):
        (fleet.kits / who / "disk_full").touch()
        return (fleet.kits / who / "disk_full").unlink

    return strike


def damaged(name):
    """The newest of these files of the run, and the job that had it in memory ends."""

    def strike(fleet, run):
        kill(fleet, "server", "runner_process")
        path = max((fleet.kits / "server/runs" / run.name).glob(name))
        content = bytearray(path.read_bytes())
        content[-9] ^= 1
        path.write_bytes(content)

    return strike


def torn_line(*where):
    def strike(fleet, run):
        path = Path(str(fleet.kits.joinpath(*where)).format(run.name))
        with path.open("a") as file:
            file.write('{"event": "upd\n')

    return strike


def other_content(name, content):
    """A file of the hospital's kit."""

    def strike(fleet, run):
        path = fleet.kits / WHO / "local" / name
        before = path.read_text()
        path.unlink() if content is None else path.write_text(content)
        return lambda: path.write_text(before)

    return strike


def wrong_data(fleet, run):
    path = Path(fleet.sites[WHO].data) / "name"
    before = path.read_text()
    path.write_text("Hospital Z")
    fleet.kill_worker("Hospital B")  # data are read when it starts

    def mend():
        path.write_text(before)
        fleet.kill_worker("Hospital B")

    return mend


def certificate(begins, ends):
    """Valid from and to so many days from now."""

    def strike(fleet, run):
        stop(fleet, WHO)
        path, now = fleet.kits / WHO / "startup/client.crt", datetime.now(timezone.utc)
        before = path.read_bytes()
        days = [now + timedelta(days=day) for day in (begins, ends)]
        write_certificate(path, WHO, *days)
        fleet.start_process(WHO)

        def mend():
            path.write_bytes(before)
            restart(fleet, WHO)

        return mend

    return strike


FAULTS = {
    "state.json damaged": (damaged("state.json"), "damaged"),  # its job is killed, too
    "hospital's policy is gone": (other_content("egress.json", None), "MODEL_REFUSED"),
    "hospital's worker killed": (worker_killed, ""),
    "server's job killed": (job_killed, "restart"),
    "coordinator's interpreter killed": (None, "attached"),
    "training processes killed": (trainer_killed, ""),
    "hospital's worker stops": (worker_stopped, "waiting"),
    "hospital's parent killed": (process_killed(WHO), "waiting"),
    "server's parent killed": (process_killed("server"), "no_answer"),
    "line cut, nothing heard": (line_breaks(False), "waiting"),
    "line cut, hung up": (line_breaks(True), "waiting"),
    "line slow": (line_slow, ""),
    "200 half-open connections": (noise, ""),
    "hospital's disk full": (disk_full(WHO), "DISK_FULL"),
    "server's disk full": (disk_full("server"), "make room"),
    "checkpoint's bit flipped": (damaged("model_*/model.safetensors"), "damaged"),
    "line hangs up": (line_hangs_up, ""),
    "events.jsonl damaged": (
        torn_line("server", "runs", "{}", "events.jsonl"),
        "damaged",
    ),
    "hospital's ledger damaged": (torn_line(WHO, "ledger.jsonl"), ""),
    "hospital's policy damaged": (other_content("egress.json", "{"), "KIT_DAMAGED"),
    "data of another hospital": (wrong_data, "DATA_UNREADABLE"),
    "certificate expired": (certificate(-9, -1), "waiting"),
    "clock behind": (certificate(1, 9), "waiting"),
}
HOW_MANY = len(FAULTS) if os.environ.get("FULL") else 3


@pytest.fixture
def fleet(silos_yaml, params, tmp_path):
    fleet = FleetOverLines(silos_yaml, tmp_path / "fleet", over={WHO}, ready=240)
    (fleet.folder / "code").mkdir(parents=True)
    (fleet.folder / "code" / "sitecustomize.py").write_text(MADE_UP)
    fleet.noise = []
    with fleet:
        fleet.allow(params, metrics=METRICS)
        yield fleet
        for link in fleet.noise:
            link.close()


class Storm:
    """Strikes with one fault after another while a run is played."""

    def __init__(self, fleet, run, faults, rng):
        self.fleet, self.run, self.rng = fleet, run, rng
        self.left, self.done = list(faults.items()), {}
        self.now, self.mend, self.wait = None, None, 0
        self.rounds, self.ends, self.held = 0, 0, []

    def play(self):
        """Run the same lines until the run is over."""
        patience = Patience(silence=10, give_up=300)
        while True:
            self.fleet.session or self.fleet.wait_ready()
            events = runs.play(
                self.run, self.fleet.session, **self.fleet.places, timeout=3000,
                patience=patience,
            )  # fmt: skip
            try:
                if self._follow(events):
                    return
            except RunError as error:
                assert self.now, f"it failed without a fault: {error}"
                self.now.gaps.append(time.monotonic() - self.last)
                self.now.said.append(str(error))
                self._act()
            self.now.again += 1

    def _follow(self, events):
        """Whether it came to its end; else its interpreter was "killed": it is left as
        it stands, since to close it would end the run."""
        self.last = time.monotonic()
        for event in events:
            if self.now:
                self.now.gaps.append(time.monotonic() - self.last)
            self._hear(event)
            if not self.now and self.left and self._strike():
                self.held.append(events)
                return False
            self.last = time.monotonic()
        return True

    def _hear(self, event):
        kind = event["event"]
        if kind == "start" and self.now:
            self.now.lost = max(0, self.rounds - event["round"])
        if kind == "round_end":
            self.rounds = event["round"] + 1
            self.wait -= 1
            self.ends += 1
            if self.now and self.now.strike and self.ends > 1:
                if not self.mend:
                    self._over()
                elif not self.now.words:  # nothing says that there is something to mend
                    self._act()
        if not self.now:
            return
        if kind == "attached":
            self.now.said.append(kind)
            self._over()
        elif kind not in USUAL:
            reason = event.get("reason", "")
            self.now.said.append(f"{kind} {reason} {event.get('means', '')}")
            if self.now.words in " ".join(self.now.said):
                self._act()

    def _act(self):
        """Somebody has read it, and does what it says."""
        mend, self.mend = self.mend, None
        if mend:
            mend()
            self.ends = 0

    def _over(self):
        self.now.seconds = time.monotonic() - self.now.began
        print(row(self.name, self.now), flush=True)
        self.done[self.name], self.now = self.now, None
        self.wait = self.rng.randrange(1, 3)

    def _strike(self):
        """At a random event, after a round or two without a fault. True if it struck
        the coordinator."""
        if self.wait > 0 or self.rounds < 2 or self.rng.random() < 0.5:
            return False
        self.name, (strike, words) = self.left.pop(0)
        self.now, self.ends = Fault(strike, words, began=time.monotonic()), 0
        if strike is None:
            return True
        self.mend = strike(self.fleet, self.run)
        return False


def row(name, fault):
    said = sorted({text.split()[0] for text in fault.said})
    return (
        f"| {name} | {', '.join(said) or 'nothing, it was not felt'} "
        f"| {max(fault.gaps, default=0):.0f} | {fault.seconds:.0f} | {fault.lost} "
        f"| {fault.again} |"
    )


def test_a_run_survives_fault_after_fault(fleet, params, silos):
    rng = random.Random(21)
    names = list(FAULTS)[:HOW_MANY]
    if os.environ.get("FULL"):
        rng.shuffle(names)
    run = Run(
        "storm", params, rounds=6 * HOW_MANY + 4, seed=7, deadline=20,
        wait_for_quorum=600, limits=LIMITS,
    )  # fmt: skip
    storm = Storm(fleet, run, {name: FAULTS[name] for name in names}, rng)
    try:
        storm.play()
    finally:
        write_table(storm.done)
    assert not storm.left and not storm.now, (storm.left, storm.now)
    assert_same_bits(fleet.result(run), simulate(run, silos).params)
    for name, fault in storm.done.items():
        assert max(fault.gaps, default=0) < SILENCE, name
        assert fault.words in " ".join(fault.said), (name, fault.said)
        assert fault.lost <= 1, name
        assert fault.again <= 1, name
    path = fleet.kits / "server/runs/storm/events.jsonl"
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
    ends = [e for e in map(json.loads, lines) if e["event"] == "round_end"]
    assert all(len(end["silos"]) == 3 for end in ends)


def write_table(done):
    if os.environ.get("FULL"):
        (ROOT / "runs").mkdir(exist_ok=True)
        head = "| fault | said | longest silence, s | until a round ended, s | rounds "
        head += "played again | same lines run again |\n|---|---|---|---|---|---|\n"
        rows = [row(name, fault) for name, fault in done.items()]
        (ROOT / "runs" / "faults.md").write_text(head + "\n".join(rows) + "\n")
