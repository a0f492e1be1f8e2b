"""Nothing is left running, whatever happens to whoever started it."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from fl_helpers.cross_silo.federation import read_federation
from fl_helpers.cross_silo.on_premises import provision, site
from fl_helpers.cross_silo.on_premises.fleet import MARK, Fleet
from fl_helpers.cross_silo.on_premises.runs import RunError
from fl_helpers.cross_silo.run import Run

from .conftest import LIMITS, METRICS, wait_until, write_trial

pytestmark = pytest.mark.engines
ROOT = Path(__file__).parents[2]


def marked(folder):
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(folder):
                found.append(process)
        except psutil.Error:
            pass
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill", "int"])
def test_nothing_is_left_when_the_driver_is_ended_during_a_run(
    silos_yaml, tmp_path, number
):
    driver = subprocess.Popen(
        [sys.executable, "-m", "engines.driver", silos_yaml, tmp_path],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_until(lambda: driver.stdout.readline() == "update\n", 180, "first update")
        assert len(marked(tmp_path)) >= 8  # server, three hospitals; a worker of each
        driver.send_signal(number)
        driver.communicate(timeout=60)  # a few seconds, if nothing else runs
    finally:
        driver.kill()
        driver.communicate()
    assert driver.returncode != 0
    wait_until(lambda: not marked(tmp_path), 60, "all processes end")


def test_a_process_that_cannot_start_is_reported_at_once(silos_yaml, tmp_path):
    federation = read_federation(silos_yaml)
    kits = provision.provision(federation, tmp_path)
    (kits / "Hospital-B" / "local" / "resources.json").write_text("{")
    started = time.monotonic()
    with pytest.raises(RunError, match=r"(?s)Hospital-B ended.*last lines of"):
        with Fleet(silos_yaml, tmp_path, ready=180):
            pass
    assert time.monotonic() - started < 30
    assert not marked(tmp_path)


def test_a_hospital_that_does_not_come_is_named(silos_yaml, tmp_path):
    """Its kit is from another authority: the server does not let it in."""
    federation = read_federation(silos_yaml)
    kits = provision.provision(federation, tmp_path / "one")
    other = provision.provision(federation, tmp_path / "two")
    for name in ("client.crt", "client.key"):
        stolen = (other / "Hospital-B" / "startup" / name).read_bytes()
        (kits / "Hospital-B" / "startup" / name).write_bytes(stolen)
    with pytest.raises(RunError, match=r"\['Hospital-B'\] did not connect") as e:
        with Fleet(silos_yaml, tmp_path / "one", ready=40):
            pass
    assert "Hospital-B.log" in str(e.value)
    assert not marked(tmp_path / "one")


@pytest.mark.parametrize("who", ["server", "Hospital-B"])
def test_a_kit_of_an_older_version_says_what_to_do(silos_yaml, tmp_path, who):
    """Hardened before, it names classes where they were."""
    kits = provision.provision(read_federation(silos_yaml), tmp_path)
    for path in (kits / who / "local").glob("*.json"):
        text = path.read_text()
        path.write_text(text.replace(site.HERE, "fl_helpers.on_premises"))
    with pytest.raises(RunError, match=rf"{who} ended(?s:.)*Harden it again with"):
        with Fleet(silos_yaml, tmp_path, ready=180):
            pass


@pytest.mark.skipif(not os.environ.get("FULL"), reason="set FULL=1: takes minutes")
def test_the_memory_of_parents_hardly_grows_over_fifty_jobs(
    silos_yaml, params, tmp_path
):
    """Resident megabytes of the processes that live on, after each job of a round."""
    sizes = {}
    with Fleet(silos_yaml, tmp_path, ready=180) as fleet:
        fleet.allow(params, metrics=METRICS)
        for job in range(50):
            run = Run(f"job_{job}", params, rounds=1, seed=job, limits=LIMITS)
            assert list(fleet.run(run, timeout=120))[-1]["event"] == "done"
            for process in fleet.own_processes():
                with contextlib.suppress(psutil.Error):  # it has just ended
                    line = process.cmdline()  # python -u -m ...client_train -m KIT
                    if " ".join(line[3:4]).endswith((".client_train", ".server_train")):
                        size = process.memory_info().rss / 1e6
                        sizes.setdefault(Path(line[5]).name, []).append(size)
    assert len(sizes) == 4  # the server's, and three hospitals'
    for who, found in sizes.items():
        print(who, [round(size) for size in found[::7]])
    grown = {who: found[-1] - found[9] for who, found in sizes.items()}
    assert max(grown.values()) < 20, grown  # in forty jobs; the first ten fill caches


KINDS = ["server_train", "runner_process", "client_train", "worker_process", "trainer"]


@pytest.mark.skipif(not os.environ.get("FULL"), reason="set FULL=1: takes minutes")
def test_what_a_round_of_eight_hospitals_holds_in_memory(params, tmp_path):
    """In models of 45 MB, beside what the same processes hold with one of 2 kB."""
    silos_yaml = write_trial(tmp_path, {f"Hospital {k}": 24 for k in "ABCDEFGH"})
    ballast = {"ballast": torch.rand(45 * 10**6 // 4)}
    models = {"small": params, "large": params | ballast}
    peaks = {}

    def watch(model, over):
        while not over.wait(0.05):
            for process in fleet.own_processes():
                with contextlib.suppress(psutil.Error, OSError, StopIteration):
                    line = " ".join(process.cmdline())
                    kind = next(kind for kind in KINDS if kind in line)
                    status = Path(f"/proc/{process.pid}/status").read_text()
                    size = int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1000
                    peaks[model, kind] = max(size, peaks.get((model, kind), 0.0))

    with Fleet(silos_yaml, tmp_path / "fleet", ready=240) as fleet:
        for model, start in models.items():
            fleet.allow(start, metrics=METRICS)
            over = threading.Event()
            watcher = threading.Thread(target=watch, args=(model, over))
            watcher.start()
            run = Run(model, start, rounds=2, seed=1, limits=LIMITS)
            assert list(fleet.run(run, timeout=400))[-1]["event"] == "done"
            over.set()
            watcher.join()
    held = {kind: (peaks["large", kind] - peaks["small", kind]) / 45 for kind in KINDS}
    print({kind: round(models, 1) for kind, models in held.items()})
    assert held["runner_process"] < 16 and held["server_train"] < 3
    assert held["worker_process"] < 7 and held["trainer"] < 4
    assert held["client_train"] < 1
