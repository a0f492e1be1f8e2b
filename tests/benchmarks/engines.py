"""Round latency of two engines: ours (on NVFlare) and Flower's deployment engine.

    python tests/benchmarks/engines.py           # docs/results/engines.csv, 15 minutes
    python tests/benchmarks/engines.py --smoke   # one short run each, writes nothing

A server and four silos, real processes on the loopback interface, same certificates.
Both engines call `hospital.client` at the silos and average, evaluate nothing, and must
end with the model of `run_rounds`. They take turns, so that a busy machine slows both;
medians of three runs. And with one silo: four on a small machine wait for each other's
cores, which on machines of their own they would not. Linux only.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from itertools import pairwise, product
from pathlib import Path

import pandas as pd
import psutil
import torch
from common import image_silos
from safetensors.torch import load_file, save_file

from fl_helpers.aggregation import weighted_average
from fl_helpers.cross_silo import hospital
from fl_helpers.cross_silo.federation import read_federation
from fl_helpers.cross_silo.on_premises import gate, provision
from fl_helpers.cross_silo.on_premises.fleet import Fleet
from fl_helpers.cross_silo.run import Run
from fl_helpers.models import small_cnn
from fl_helpers.silos import Examples, Silo
from fl_helpers.simulation import Execution, run_rounds

ROOT = Path(__file__).resolve().parents[2]
SILOS, IMAGES, CLASSES, SEED, RUNS = 4, 64, 10, 0, 3
TRAINING = dict(epochs=1, lr=0.02, batch_size=16)
PATIENCE = 300  # seconds, for each step


class Work:
    """What both engines are given: data in folders, settings, certificates; the end."""

    def __init__(self, folder, num_silos, rounds, size=28):
        silos, members = image_silos(num_silos, IMAGES, size), []
        self.folder, self.how = folder, dict(rounds=rounds, seed=SEED)
        self.places = [folder / f"data/silo_{k}" for k in range(num_silos)]
        for k, silo in enumerate(silos):
            test = Examples(*(part[:1].clone() for part in silo.train))  # not used
            hospital.save_silo(Silo(silo.name, silo.train, test), self.places[k])
            own = dict(organisation=f"h{k}", data=f"{self.places[k]}")
            members.append(dict(name=silo.name, on_premises=own))
        shared = dict(organisation="coordinator", admin="admin@coordinator.org")
        shared |= dict(
            host="localhost", port=0, client="fl_helpers.cross_silo.hospital:client"
        )
        federation = dict(project="latency", on_premises=shared, silos=members)
        self.silos_yaml = folder / "silos.yaml"
        self.silos_yaml.write_text(json.dumps(federation))  # JSON is YAML
        federation = read_federation(self.silos_yaml)
        self.kits = provision.provision(federation, folder / "fleet")
        self.settings = dict(num_classes=CLASSES, rounds=rounds, **TRAINING)
        torch.manual_seed(SEED)
        self.start = small_cnn(CLASSES).state_dict()
        update = hospital.client(self.places[0], self.settings).update
        work = self.start, silos, update, weighted_average
        here = Execution(progress=False)
        self.end = run_rounds(*work, execution=here, **self.how).params


class Ours:
    name, package = "fl_helpers/cross_silo/on_premises", "nvflare"
    note = "mutual TLS; sandbox, guards, gate and ledger on; silos poll every 0.1 s"

    def __init__(self, work):
        self.fleet = Fleet(work.silos_yaml, work.kits.parent)
        for site in self.fleet.sites:
            gate.allow(work.kits / site, work.start)
        how = dict(work.how, quorum=len(work.places), evaluate=False)
        self.job = Run("latency", work.start, settings=work.settings, **how)
        self.start, self.stop = self.fleet.start, self.fleet.stop

    def run(self):
        """When the rounds ended, and the final model."""
        events = self.fleet.run(self.job, timeout=PATIENCE)
        ends = [e["time"] for e in events if e["event"] == "round_end"]
        return ends, self.fleet.result(self.job)


class Flower:
    name, package = "Flower", "flwr"
    note = "TLS guide; state in memory; a new process per message; fixed polls of 3 s"

    def __init__(self, work):
        self.places, self.startup = work.places, work.kits / "server/startup"
        self.folder, self.processes = work.folder / "flower", {}
        self.port = provision.free_port()
        (self.folder / "submit").mkdir(parents=True)
        save_file(work.start, self.folder / "initial.safetensors")
        link = f'address = "localhost:{self.port}"\n'
        link += f'root-certificates = "{self.startup}/rootCA.pem"\n'
        (self.folder / "submit/config.toml").write_text(f"[superlink.local]\n{link}")
        run = dict(folder=f"{self.folder}", seed=SEED, silos=len(self.places))
        run |= work.settings
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in run.items()]
        (self.folder / "run.toml").write_text("".join(lines))

    def begin(self, who, program, *arguments):
        programs, home = Path(sys.executable).parent, f"{self.folder / who}"
        env = dict(PATH=f"{programs}:{os.environ['PATH']}", HOME=home, FLWR_HOME=home)
        env |= dict(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1")
        env |= dict(PYTHONPATH=f"{ROOT}", OMP_NUM_THREADS="1", MALLOC_ARENA_MAX="2")
        how = dict(env=env, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        how |= dict(start_new_session=True)  # an interrupt is for us to handle
        with (self.folder / f"{who}.log").open("wb") as log:
            command = [programs / program, *arguments]
            self.processes[who] = subprocess.Popen(command, stdout=log, **how)

    def wait(self, condition):
        end = time.monotonic() + PATIENCE
        while not condition():
            failed = [who for who, process in self.processes.items() if process.poll()]
            if failed or time.monotonic() > end:
                logs = [p.read_text()[-999:] for p in self.folder.glob("*.log")]
                raise RuntimeError(f"failed: {failed}, or time is over; {logs}")
            time.sleep(0.05)

    def logged(self, line, *who):
        logs = [(self.folder / f"{name}.log").read_bytes() for name in who]
        return all(line in log for log in logs)

    def start(self):
        files = {"ca-cert": "rootCA.pem", "cert": "server.crt", "key": "server.key"}
        tls = [f"--ssl-{kind}file={self.startup / files[kind]}" for kind in files]
        server = ["--host=localhost", f"--port={self.port}"]
        server += ["--disable-runtime-dependency-installation"]
        self.begin("superlink", "flower-superlink", *tls, *server)
        self.wait(lambda: self.logged(b"Uvicorn running", "superlink"))
        for place in self.places:
            link = [f"--root-certificates={self.startup}/rootCA.pem"]
            link += [f"--superlink=localhost:{self.port}"]
            own = [f"--port={provision.free_port()}", f'--node-config=data="{place}"']
            self.begin(place.name, "flower-supernode", *link, *own)
        self.wait(lambda: self.logged(b"SuperNode ID", *[p.name for p in self.places]))

    def run(self):
        app, settings = Path(__file__).parent / "flower_app", self.folder / "run.toml"
        self.begin("submit", "flwr", "run", app, "local", "--run-config", settings)
        final, ends = self.folder / "final.safetensors", self.folder / "ends"
        self.wait(final.exists)
        times = [float(line) for line in ends.read_text().split()]
        return times[1:], load_file(final)  # the first one is before round 1

    def stop(self):
        for process in self.processes.values():
            process.terminate()


def reap(seconds):
    """Wait until all descendants have ended and their CPU time is ours; else who."""
    end, own = time.monotonic() + seconds, psutil.Process()
    while (left := own.children(recursive=True)) and time.monotonic() < end:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)
    return left


def watch(peak, over):
    """Keep the largest sum of resident memory of all descendants, in bytes."""
    while not over.wait(0.2):
        total = 0
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        peak[0] = max(peak[0], total)


def busy():
    """CPU seconds: of this process, of its descendants that ended, of the machine."""
    own = os.times()
    return sum(own[:2]), sum(own[2:4]), sum(psutil.cpu_times()[:3])


def measure(engine, silos, rounds):
    """One run: seconds, CPU seconds, GB, and the number of processes left after it."""
    with tempfile.TemporaryDirectory(prefix="latency_") as folder:
        work = Work(Path(folder), silos, rounds)
        one, load, before = engine(work), os.getloadavg()[0], busy()
        peak, over, began = [0], threading.Event(), time.time()
        watcher = threading.Thread(target=watch, args=(peak, over))
        watcher.start()
        try:
            one.start()
            submitted = time.time()
            ends, final = one.run()
            time.sleep(3)  # the run's own processes end
            stopping = time.time()
        finally:
            over.set()
            watcher.join()
            one.stop()
            left = reap(20)
            stopped, after = time.time(), busy()
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            reap(10)
    for name, value in work.end.items():
        if value.is_floating_point():  # up to the order of additions
            torch.testing.assert_close(final[name], value, rtol=0, atol=1e-5)
    later = [b - a for a, b in pairwise(ends)]
    own, cpu, machine = (b - a for a, b in zip(before, after, strict=True))
    took = dict(ready_s=submitted - began, first_round_s=ends[0] - submitted)
    took |= dict(later_round_s=statistics.median(later), stop_s=stopped - stopping)
    took |= dict(cpu_s=cpu, peak_rss_gb=peak[0] / 1e9, left=len(left), load_before=load)
    took |= dict(cores_of_others=(machine - cpu - own) / (stopped - began))
    return {name: round(value, 2) for name, value in took.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="1 run, 2 rounds, no file")
    smoke = parser.parse_args().smoke
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans come to us
    engines = [Ours, Flower] if importlib.util.find_spec("flwr") else [Ours]
    if Flower not in engines:
        print("SKIPPED: Flower, see requirements-dev.txt", file=sys.stderr)
    numbers, found = [SILOS] if smoke else [SILOS, 1], []
    for silos, engine in [*product(numbers, engines)] * (1 if smoke else RUNS):
        row = dict(engine=engine.name, version=version(engine.package), silos=silos)
        row |= dict(note=engine.note) | measure(engine, silos, rounds=2 if smoke else 5)
        found.append(row)
        print(row, flush=True)
    if not smoke and Flower in engines:
        keys = ["silos", "engine", "version", "note"]
        table = pd.DataFrame(found).groupby(keys, sort=False).median().reset_index()
        table["note"] = table.pop("note")  # last
        table.round(2).to_csv(ROOT / "docs/results/engines.csv", index=False)


if __name__ == "__main__":
    main()
