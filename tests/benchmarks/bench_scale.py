"""Cost and peak memory of run_rounds against silos, size of the model, and rounds.

Only with --full. Every silo makes one SGD step on 8 rows in each round; each point is
a process of its own: seconds of a round, the median of the last five; the peak memory
of the run; and how often in a round the kernel had to find a page of memory. The slope
is that of a line through all points; where the cost per silo, parameter or round is not
constant, the figures show it. The runs over rounds write a checkpoint after each.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from common import (
    FULL,
    RESULTS,
    extra_memory,
    free_memory,
    read_results,
    report,
    row,
    shown,
)
from torch import nn

from fl_helpers.aggregation import weighted_average
from fl_helpers.checkpoint import Checkpoint
from fl_helpers.planning import run_cost
from fl_helpers.silos import Examples, Silo
from fl_helpers.simulation import Execution, run_rounds
from fl_helpers.training import train_locally

ROWS, INPUTS, LAST = 8, 100, 5
RESNET_BYTES = 44_802_848  # of the state that bench_aggregation.py averages
POINTS = {  # (silos, parameters, rounds)
    "silos": [(n, 100_000, 6) for n in (4, 16, 64, 250, 1000)],
    "parameters": [(4, 10**n, 6) for n in (4, 5, 6, 7, 8)],
    "rounds": [(4, 10_000, n) for n in (10, 100, 1000)],
}
# PyTorch's own switch: memory in pages of 2 MB instead of 4 kB, where Linux has them.
LARGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}


def run(num_silos, num_parameters, rounds):
    """Seconds of the last rounds, bytes that the run needs beside model and data, and
    page faults of a round."""
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    width = num_parameters // (INPUTS + 3)  # weights in, biases, weights out
    model = nn.Sequential(nn.Linear(INPUTS, width), nn.ReLU(), nn.Linear(width, 2))
    silos = []
    for k in range(num_silos):
        x = torch.randn(ROWS, INPUTS, generator=rng)
        train = Examples(x, torch.randint(2, (ROWS,), generator=rng))
        silos.append(Silo(f"silo {k:04d}", train, train))

    def client_update(params, silo, *, round_index, rng):
        model.load_state_dict(params)
        options = dict(epochs=1, lr=0.01, batch_size=ROWS, rng=rng)
        return train_locally(model, silo, **options)

    ends, faults = [], []

    def on_round(record, params):
        ends.append(time.perf_counter())
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)

    work = model.state_dict(), silos, client_update, weighted_average
    # A call before: torch loads what it needs.
    client_update(work[0], silos[0], round_index=0, rng=rng)
    with tempfile.TemporaryDirectory() as folder:
        file = Checkpoint(Path(folder, "run.pt")) if rounds > LAST + 1 else None
        here = Execution(1, file, on_round=on_round, progress=False)
        how = dict(rounds=rounds, seed=0, execution=here)
        extra, _ = extra_memory(lambda: run_rounds(*work, **how))
    seconds = [b - a for a, b in pairwise(ends)][-LAST:]
    faults = [b - a for a, b in pairwise(faults)][-LAST:]
    return dict(seconds=seconds, extra=extra, faults=faults)


def label(silos, parameters, rounds):
    text = f"{silos:,} silos x {parameters:,} parameters"
    return text if rounds == 6 else f"{text}, {rounds:,} rounds"


def measure(points, *, env=None, name=""):
    """Three rows for each point: time, memory, page faults."""
    rows = []
    for point in points:
        if 30 * 4 * point[1] > free_memory():  # some copies for each of the silos
            print(f"SKIPPED: {label(*point)} does not fit into the free memory")
            continue
        command = [sys.executable, __file__, *map(str, point)]
        found = json.loads(
            subprocess.check_output(command, env=os.environ | (env or {}))
        )
        case = label(*point) + name
        rows.append(row(f"{case}, a round", found["seconds"], unit="s"))
        extra = found["extra"] / 1e6
        rows.append(row(f"{case}, memory of the run", extra, unit="MB"))
        rows.append(
            row(f"{case}, page faults of a round", found["faults"], unit="faults")
        )
    return rows


def slope(points, rows, what):
    """Cost of one more silo, parameter or round: a line, each point counted relative
    to it."""
    position = list(POINTS).index(what)
    x = np.array([point[position] for point in points], float)
    per, unit = {
        "silos": (1, "silo"),
        "parameters": (1e6, "million parameters"),
        "rounds": (1000, "1,000 rounds"),
    }[what]
    found = []
    for part, quantity in ((rows[::3], "ms"), (rows[1::3], "MB")):
        y = np.array([r["value"] for r in part])
        gradient, _ = np.polyfit(x[: len(y)], y, 1, w=1 / y)
        scale = 1000 * per if quantity == "ms" else per
        name = "time of a round" if quantity == "ms" else "memory"
        case = f"{name}, slope over {what}"
        found.append(row(case, gradient * scale, unit=f"{quantity} per {unit}"))
    return found


def draw(path=RESULTS):
    """docs/results/scale_{silos,parameters,rounds}.png, from the results."""
    import matplotlib.pyplot as plt

    from fl_helpers.plots import use_style

    use_style()
    rows = {row["case"]: row for row in read_results(path)}
    value = {case: float(row["value"]) for case, row in rows.items()}
    kinds = {  # of a row: label of its axis, name of its slope
        "a round": ("seconds per round", "time of a round"),
        "memory of the run": ("memory (MB)", "memory"),
    }
    for position, (what, points) in enumerate(POINTS.items()):
        fig, axes = plt.subplots(1, 2, figsize=(7.5, 3))
        for axis, (kind, (unit, name)) in zip(axes, kinds.items(), strict=True):
            x = np.array([point[position] for point in points])
            y = [value[f"{label(*point)}, {kind}"] for point in points]
            axis.plot(x, y, "o-", label="measured")
            large = [
                (n, value[case])
                for n, point in zip(x, points, strict=True)
                if (case := f"{label(*point)}, large pages, {kind}") in value
            ]
            if large:
                axis.plot(*zip(*large, strict=True), "s--", label="large pages")
            if what == "rounds":
                axis.set_ylim(bottom=0)
            else:
                axis.plot(x, y[-1] * x / x[-1], ":", color="0.5", label="linear")
                axis.set(xscale="log", yscale="log")
            fitted = rows[f"{name}, slope over {what}"]
            title = f"slope: {shown(fitted['value'])} {fitted['unit']}"
            axis.set(xlabel=what, ylabel=unit)
            axis.set_title(title, fontsize="medium")
        axes[0].legend()
        fig.savefig(path.with_name(f"scale_{what}.png"), metadata={"Software": None})
        plt.close(fig)


def projection(rows, *, silos=100, parameters=1_000_000_000, gbit_per_s=10):
    """On paper: one round of a federation that no machine here could hold.

    rows: the results, of which what 8 updates in folders cost is taken in proportion to
    their bytes. float32, nothing compressed; the orchestrator's line is shared by all
    silos. Training is not in it.
    """
    case = "average of 8 updates from folders"
    found = {row["case"]: row for row in rows}
    read = float(found[f"{case}, wall"]["ours_s"]) / (8 * RESNET_BYTES)  # s per byte
    models = float(found[f"{case}, extra memory"]["value"])
    size = 4 * parameters
    line = dict(training_minutes=0, mbit_per_s=1000 * gbit_per_s)
    cost = run_cost(size, silos=silos, rounds=1, **line)
    projected = {
        "one update": (size / 1e9, "GB"),
        "sent in a round, both directions": (cost["gigabytes"], "GB"),
        f"that over a line of {gbit_per_s} Gbit/s": (3600 * cost["hours"], "s"),
        "updates read, checked and averaged": (read * size * silos, "s"),
        "memory of the orchestrator": (models * size / 1e9, "GB"),
    }
    return [row(case, value, unit=unit) for case, (value, unit) in projected.items()]


def main():
    if len(sys.argv) == 4:
        print(json.dumps(run(*map(int, sys.argv[1:]))))
        return 0
    if not FULL:
        print("SKIPPED: scale, measured with --full")
        return 0
    code = 0
    for what, points in POINTS.items():
        rows = measure(points)
        rows += slope(points, rows, what)
        if what == "parameters":
            rows += measure(points[-2:], env=LARGE_PAGES, name=", large pages")
        code |= report(f"scale over {what}", rows)
    return code


if __name__ == "__main__":
    sys.exit(main())
