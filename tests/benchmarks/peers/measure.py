"""Whole runs of other frameworks and of `run_rounds`, from process start to its end.

    python tests/benchmarks/peers/measure.py           # results, and docs/benchmarks.md
    python tests/benchmarks/peers/measure.py --smoke   # one run of each, writes nothing

Exit code 1 if a framework did other work than the others, or if a goal is missed.
"""

import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parent), str(HERE.parents[2] / "tools")]
from machine import circumstances  # noqa: E402

# {name: (script, what must be installed; the first one's version is shown)}
PEERS = {
    "ours": ("ours.py", ["fl-helpers"]),
    "bare PyTorch loop": ("bare.py", ["torch"]),
    "Flower": ("flower.py", ["flwr", "ray"]),
    "NVFlare": ("nvflare_simulator.py", ["nvflare"]),
    "pfl": ("pfl_simulation.py", ["pfl"]),
    "FedLab": ("fedlab_simulation.py", ["fedlab"]),
}
REFERENCE = "bare PyTorch loop"
# {workload: who runs it, if not all}: pfl and FedLab would need another data path.
ONLY = {"W3": ("ours", REFERENCE, "Flower", "NVFlare")}
# {name: how many times our seconds and our memory a run must take at least}
GOALS = {"Flower": (2, 3), "NVFlare": (2, 3), "pfl": (1, 0), "FedLab": (1, 0)}
GOALS[REFERENCE] = (1, 0)
# With more silos than processes, NVFlare starts a new process for each silo's turn:
# minutes for one round. {(name, workload): rounds}; such a run is made once.
FEWER_ROUNDS = {("NVFlare", "W2"): 1}
RUNS = 3
# Of the test loss. Orders of batches, and silos drawn, differ by framework and seed:
# three seeds of the reference lay up to 0.08 apart; an untrained model has 2.3.
TOLERANCE = 0.1
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # of each worker
    "OMP_WAIT_POLICY": "passive",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
COLUMNS = "framework version workload rounds runs seconds startup_s cpu_s peak_mb"
COLUMNS += " seconds_to_ours memory_to_ours seconds_to_bare memory_to_bare"
COLUMNS = f"{COLUMNS} steps test_loss loss_low loss_high".split()


class Usage:
    """CPU seconds and peak memory of a process and all that it starts, by sampling."""

    def __init__(self, pid):
        self.root, self.cpu, self.peak = psutil.Process(pid), {}, 0

    def sample(self):
        """Memory is the sum of PSS, which counts a shared page once; RSS off Linux."""
        try:
            found = {self.root, *self.root.children(recursive=True), *self.cpu}
        except psutil.NoSuchProcess:
            found = set(self.cpu)
        memory = 0
        for process in found:
            try:
                times, info = process.cpu_times(), process.memory_full_info()
            except psutil.Error:
                continue  # it has ended, or just now
            self.cpu[process] = times.user + times.system
            memory += getattr(info, "pss", info.rss)
        self.peak = max(self.peak, memory)

    def end(self):
        """Wait for what the process left behind, then stop that."""
        _, left = psutil.wait_procs(list(self.cpu), timeout=10)
        for process in left:
            process.kill()


def measure(name, workload, seed, folder):
    """One run in a process of its own."""
    result = folder / f"{name}-{workload}-{seed}.json"
    command = [sys.executable, HERE / PEERS[name][0], workload, result, str(seed)]
    if (name, workload) in FEWER_ROUNDS:
        command.append(str(FEWER_ROUNDS[name, workload]))
    env = os.environ | ENVIRONMENT | dict(FLWR_HOME=str(folder), RAY_TMPDIR=str(folder))
    with result.with_suffix(".log").open("w") as log:
        before, started = children_cpu(), time.time()
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        usage = Usage(process.pid)
        while process.poll() is None:
            began = time.perf_counter()
            usage.sample()
            pause = max(
                0.1, 20 * (time.perf_counter() - began)
            )  # at most 5 % of a core
            try:
                process.wait(pause)
            except subprocess.TimeoutExpired:
                pass
        seconds = time.time() - started
    # Sampling misses the end of each process, the other count who was not waited for.
    cpu = max(children_cpu() - before, sum(usage.cpu.values()))
    usage.end()
    if process.returncode or not result.exists():
        sys.exit(
            f"{name}, {workload}:\n{result.with_suffix('.log').read_text()[-4000:]}"
        )
    found = json.loads(result.read_text())
    ends = found["ends"]
    rounds = [later - earlier for earlier, later in zip(ends, ends[1:], strict=False)]
    startup = ends[0] - started - statistics.median(rounds) if rounds else None
    print(
        f"{name:18} {workload} {seconds:6.1f} s {usage.peak / 1e6:6.0f} MB", flush=True
    )
    return dict(
        seconds=seconds,
        cpu_s=cpu,
        peak_mb=usage.peak / 1e6,
        startup_s=startup,
        steps=found["steps"],
        rounds=len(ends),
        model=result.with_suffix(".safetensors"),
    )


def children_cpu():
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def installed():
    """{name: version} of what can run here; says what cannot."""
    found = {}
    for name, (_, packages) in PEERS.items():
        try:
            found[name] = [version(package) for package in packages][0]
        except PackageNotFoundError as error:
            print(f"SKIPPED {name}: {error}")
    return found


def summary(runs, versions):
    """runs: {(name, workload): [what `measure` returns]}; one row each."""
    rows = []
    for (name, workload), own in runs.items():
        row = dict(framework=name, version=versions[name], workload=workload)
        row |= dict(runs=len(own), rounds=own[0]["rounds"], steps=own[0]["steps"])
        for key in ("seconds", "startup_s", "cpu_s", "peak_mb", "test_loss"):
            values = [run[key] for run in own if run[key] is not None]
            row[key] = statistics.median(values) if values else None
        for to, other in (("ours", "ours"), ("bare", REFERENCE)):
            pairs = list(zip(own, runs[other, workload], strict=False))
            for key, column in (("seconds", "seconds"), ("peak_mb", "memory")):
                ratios = [one[key] / two[key] for one, two in pairs]
                row[f"{column}_to_{to}"] = statistics.median(ratios)
        losses = [run["test_loss"] for run in own]
        rows.append(row | dict(loss_low=min(losses), loss_high=max(losses)))
    return rows


def unlike(rows, workloads):
    """Who made other steps than asked, or whose model is unlike the reference."""
    reference = {r["workload"]: r for r in rows if r["framework"] == REFERENCE}
    problems = []
    for row in rows:
        workload = workloads[row["workload"]]
        case = f"{row['framework']}, {row['workload']}"
        rounds, expected = float(row["rounds"]), float(row["test_loss"])
        if float(row["steps"]) * workload.rounds != workload.steps * rounds:
            problems.append(f"{case}: {row['steps']} steps in {row['rounds']} rounds")
        like = float(reference[row["workload"]]["test_loss"])
        if rounds == workload.rounds and abs(expected - like) > TOLERANCE:
            problems.append(f"{case}: test loss {expected}, reference {like}")
    return problems


def missed(rows):
    """Goals that are not reached, as the page names them."""
    found = []
    for row in rows:
        goals = GOALS.get(row["framework"], (0, 0))
        for what, goal in zip(("seconds", "memory"), goals, strict=True):
            if float(row[f"{what}_to_ours"]) < goal:
                found.append(f"{row['framework']}, {row['workload']}, {what}")
    return found


def table(rows):
    """The goals and the rows as Markdown, for docs/benchmarks.md."""
    from common import shown

    columns = "framework", "version", "seconds", "until round 1, s", "CPU s", "MB"
    columns += "seconds / ours", "memory / ours", "seconds / bare", "test loss"
    head = f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n"
    keys = "seconds startup_s cpu_s peak_mb seconds_to_ours memory_to_ours"
    keys = f"{keys} seconds_to_bare test_loss".split()
    runs = max(int(row["runs"]) for row in rows)
    text = (
        f"\nRuns of each: {runs}. Goals missed: {'; '.join(missed(rows)) or 'none'}.\n"
    )
    for workload in dict.fromkeys(row["workload"] for row in rows):
        own = [row for row in rows if row["workload"] == workload]
        text += f"\n### {workload}\n\n{head}"
        for row in own:
            name, all_rounds = row["framework"], own[0]["rounds"]
            if row["rounds"] != all_rounds:
                name += f", {row['rounds']} of {all_rounds} rounds"
            cells = name, row["version"], *(shown(row[key]) for key in keys)
            text += f"| {' | '.join(cells)} |\n"
    return text


def read_results():
    with (HERE.parents[2] / "docs/results/peers.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def write(rows, where):
    """The results, and the table between the two marks of the page."""
    import run

    path = run.RESULTS.with_name("peers.csv")
    run.write_csv(path, rows, COLUMNS, where)
    text = f"{run.listed(where)}\n{table(read_results())}"
    run.fill(text, path.name, "end of peers")


def cases(names):
    """Who runs which workload, (name, workload)."""
    every = [(name, w) for w in ("W1", "W2", "W3") for name in names]
    return [(name, w) for name, w in every if name in ONLY.get(w, names)]


def main():
    versions, runs = installed(), {}
    load = f"{os.getloadavg()[0]:.1f}"
    smoke = "--smoke" in sys.argv
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1 if smoke else RUNS):
            for name, workload in cases(versions):
                if seed == 0 or (name, workload) not in FEWER_ROUNDS:
                    found = measure(name, workload, seed, Path(folder))
                    runs.setdefault((name, workload), []).append(found)
        # Only now: pages of torch in this process would count half in the runs.
        from safetensors.torch import load_file
        from workload import WORKLOADS, test_loss

        for (_, workload), own in runs.items():
            for one in own:
                one["test_loss"], _ = test_loss(workload, load_file(one["model"]))
    rows = summary(runs, versions)
    print(table(rows))
    if not smoke:
        write(rows, circumstances() | dict(load_before=load))
    problems = unlike(rows, WORKLOADS)
    print(*problems, sep="\n")
    return int(bool(problems or missed(rows)))


if __name__ == "__main__":
    sys.exit(main())
