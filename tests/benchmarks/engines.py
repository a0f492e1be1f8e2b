"""Round latency of two engines: ours (on NVFlare) and Flower's deployment engine.

    python tests/benchmarks/engines.py           # docs/results/engines.csv, 15 minutes
    python tests/benchmarks/engines.py --smoke   # one short run each, writes nothing

A server and four silos, each with processes of its own, on the loopback interface, with
the same certificates. Both call `hospital.client` at the silos and average; nothing is
evaluated; both must end with the model of `run_rounds`. They take turns, so that a busy
machine slows both. Linux only.
"""

import argparse
import contextlib
import csv
import ctypes
import importlib.util
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file, save_file

from fl_helpers import hospital
from fl_helpers.aggregation import weighted_average
from fl_helpers.models import small_cnn
from fl_helpers.on_premises import gate, provision
from fl_helpers.on_premises.fleet import Fleet, Run
from fl_helpers.silos import make_silos, partition_by_site
from fl_helpers.simulation import run_rounds
from fl_helpers.synthetic_cxr import synthetic_cxr

ROOT = Path(__file__).resolve().parents[2]
SIZES, SEED, PATIENCE = (128, 96, 64, 64), 0, 300  # images per silo; seed; seconds
PR_SET_CHILD_SUBREAPER = 36
SILOS_YAML = """\
project: latency
on_premises: {organisation: coordinator, admin: admin@coordinator.org, host: localhost,
              port: 0, client: "fl_helpers.hospital:client"}
silos:
"""


class Work:
    """What both engines are given: data in folders, settings, certificates; the end."""

    def __init__(self, folder, rounds):
        data = synthetic_cxr(SIZES, heterogeneity=0.25, seed=SEED)
        site = partition_by_site(data.site)
        silos = make_silos(data.x, data.y, site, test_share=0.5, seed=SEED)
        self.folder, self.rounds, self.places, text = folder, rounds, [], SILOS_YAML
        for k, silo in enumerate(silos):
            self.places.append(folder / f"data/{k}")
            hospital.save_silo(silo, self.places[k])
            own = f"{{organisation: h{k}, data: {self.places[k]}}}"
            text += f"  - {{name: {silo.name}, on_premises: {own}}}\n"
        (folder / "silos.yaml").write_text(text)
        federation = provision.read_silos(folder / "silos.yaml")
        self.kits = provision.provision(federation, folder / "fleet")
        self.settings = dict(num_classes=len(data.classes), rounds=rounds)
        self.settings |= dict(epochs=1, lr=0.02, batch_size=16)
        torch.manual_seed(SEED)
        self.start = small_cnn(len(data.classes)).state_dict()
        update = hospital.client(self.places[0], self.settings).update
        how = dict(rounds=rounds, seed=SEED, progress=False)
        done = run_rounds(self.start, silos, update, weighted_average, **how)
        self.end = done.params

    def check(self, found):
        """The engine did what it was asked for, up to the order of additions."""
        for name, value in self.end.items():
            if value.is_floating_point():
                torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)


class Ours:
    engine, package, version = "fl_helpers/on_premises", "nvflare", "NVFlare {}"
    note = "mutual TLS; sandbox, guards, gate and ledger on; silos poll every 0.25 s"

    def __init__(self, work):
        self.fleet = Fleet(work.folder / "silos.yaml", work.folder / "fleet")
        for site in self.fleet.sites:
            gate.allow(work.kits / site, work.start)
        how = dict(rounds=work.rounds, seed=SEED, quorum=len(SIZES), evaluate=False)
        self.job = Run("latency", work.start, settings=work.settings, **how)
        self.start, self.stop = self.fleet.start, self.fleet.stop

    def run(self):
        """When the rounds ended, and the final model."""
        events = self.fleet.run(self.job, timeout=PATIENCE)
        ends = [e["time"] for e in events if e["event"] == "round_end"]
        return ends, self.fleet.result(self.job)


class Flower:
    engine, package, version = "Flower", "flwr", "flwr {}"
    note = "TLS; state in memory; a new process per message, polls of 1 and 3 s"
    more = {}  # environment variables

    def __init__(self, work):
        self.work, self.folder, self.processes = work, work.folder / "flower", {}
        self.address = f"localhost:{provision.free_port()}"
        self.authority = work.kits / "server/startup/rootCA.pem"
        (self.folder / "submit").mkdir(parents=True)
        save_file(work.start, self.folder / "initial.safetensors")
        link = f'root-certificates = "{self.authority}"\naddress = "{self.address}"\n'
        (self.folder / "submit/config.toml").write_text(f"[superlink.local]\n{link}")
        run = work.settings | dict(folder=f"{self.folder}", seed=SEED, silos=len(SIZES))
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in run.items()]
        (self.folder / "run.toml").write_text("".join(lines))

    def begin(self, who, program, *arguments):
        programs, home = Path(sys.executable).parent, self.folder / who
        environment = dict(HOME=f"{home}", FLWR_HOME=f"{home}", PYTHONPATH=f"{ROOT}")
        environment["PATH"] = f"{programs}:{os.environ['PATH']}"
        environment |= dict(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1")
        environment |= dict(OMP_NUM_THREADS="1", MALLOC_ARENA_MAX="2")  # as ours
        with (self.folder / f"{who}.log").open("wb") as log:
            self.processes[who] = subprocess.Popen(
                [programs / program, *arguments],
                env=environment | self.more,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, condition):
        end = time.monotonic() + PATIENCE
        while not condition():
            failed = [name for name, p in self.processes.items() if p.poll()]
            if failed or time.monotonic() > end:
                logs = {
                    p.name: p.read_text()[-1500:] for p in self.folder.glob("*.log")
                }
                raise RuntimeError(
                    f"failed: {failed}, or {PATIENCE} s are over\n{logs}"
                )
            time.sleep(0.05)

    def start(self):
        host, port = self.address.split(":")
        kit = self.work.kits / "server/startup"
        tls = [
            "--ssl-ca-certfile",
            self.authority,
            "--ssl-certfile",
            kit / "server.crt",
        ]
        tls += ["--ssl-keyfile", kit / "server.key", "--host", host, "--port", port]
        no_installation = "--disable-runtime-dependency-installation"
        self.begin("superlink", "flower-superlink", *tls, no_installation)
        self.wait(lambda: listens(host, int(port)))  # else nodes wait longer to retry
        for k, place in enumerate(self.work.places):
            to = ["--root-certificates", self.authority, "--superlink", self.address]
            own = ["--port", f"{provision.free_port()}"]
            own += ["--node-config", f'data="{place}"']
            self.begin(f"node{k}", "flower-supernode", *to, *own)
        logs = [self.folder / f"node{k}.log" for k in range(len(SIZES))]
        self.wait(lambda: all(b"SuperNode ID" in log.read_bytes() for log in logs))

    def run(self):
        """When the rounds ended, and the final model."""
        app, options = Path(__file__).parent / "flower_app", self.folder / "run.toml"
        self.begin("submit", "flwr", "run", app, "local", "--run-config", options)
        final = self.folder / "final.safetensors"
        self.wait(final.exists)
        ends = [float(line) for line in (self.folder / "ends").read_text().split()]
        return ends[1:], load_file(final)  # the first one is before round 1

    def stop(self):
        server = self.processes.pop("superlink")
        for processes in (self.processes.values(), [server]):
            for process in processes:
                process.terminate()
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=20)


class FlowerShortPoll(Flower):
    """With a setting that is in its code, but that we found in no documentation."""

    engine = "Flower, short poll"
    note = f"{Flower.note}; FLWR_SUPEREXEC_TASK_POLL_INTERVAL=0.25, not documented"
    more = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25"}


def listens(host, port):
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def descendants():
    return psutil.Process().children(recursive=True)


def reap(seconds):
    """Wait until all descendants have ended and their CPU time is ours; else who."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        left = descendants()
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.02)


def watch(peak, over):
    """Keep the largest sum of resident memory of all descendants, in bytes."""
    while not over.wait(0.2):
        total = 0
        for process in descendants():
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        peak[0] = max(peak[0], total)


def measure(engine, rounds):
    """One run: seconds, CPU seconds, MB, and the number of processes left after it."""
    with tempfile.TemporaryDirectory(prefix="latency_") as folder:
        work = Work(Path(folder), rounds)
        one, before, took = engine(work), cpu_seconds(), {}
        peak, over, began = [0], threading.Event(), time.time()
        watcher = threading.Thread(target=watch, args=(peak, over))
        watcher.start()
        try:
            one.start()
            submitted = time.time()
            ends, final = one.run()
            stopping = time.time()
        finally:
            over.set()
            watcher.join()
            one.stop()
            left = reap(10)
            stopped = time.time()
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            reap(10)
        work.check(final)
    rounds = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    took = dict(ready_s=submitted - began, first_round_s=ends[0] - submitted)
    took |= dict(later_round_s=statistics.median(rounds), stop_s=stopped - stopping)
    took |= dict(cpu_s=cpu_seconds() - before, peak_rss_mb=peak[0] / 1e6)
    return took | dict(left=len(left), load=os.getloadavg()[0])


def cpu_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="1 run, 2 rounds, no file")
    smoke = parser.parse_args().smoke
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans come to us
    engines = [Ours, Flower, FlowerShortPoll]
    if not importlib.util.find_spec("flwr"):
        print(
            "SKIPPED: Flower is not installed (requirements-dev.txt)", file=sys.stderr
        )
        engines = [Ours]
    runs = {engine: [] for engine in engines}
    for _ in range(1 if smoke else 3):
        for engine in engines:
            runs[engine].append(measure(engine, rounds=2 if smoke else 5))
            last = {key: round(value, 2) for key, value in runs[engine][-1].items()}
            print(engine.engine, last, flush=True)
    rows = []
    for engine in engines:
        row = dict(engine=engine.engine)
        row["version"] = engine.version.format(version(engine.package))
        for key in runs[engine][0]:
            row[key] = round(statistics.median(r[key] for r in runs[engine]), 1)
        rows.append(row | dict(runs=len(runs[engine]), note=engine.note))
    if not smoke and len(engines) > 1:
        with (ROOT / "docs/results/engines.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
