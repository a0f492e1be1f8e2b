"""Cost and peak memory of run_rounds against the number of silos and the model's size.

Only with --full. Every silo makes one SGD step on 8 rows in each round; each point is
a process of its own: seconds per round, the median of five, and its peak memory. The
slope is that of a line through all points; where the cost per silo or parameter is not
constant, the figures show it.
"""

import json
import subprocess
import sys

import numpy as np
import torch
from common import FULL, RESULTS, extra_memory, read_results, report, row
from torch import nn

from fl_helpers.aggregation import weighted_average
from fl_helpers.silos import Examples, Silo
from fl_helpers.simulation import run_rounds
from fl_helpers.training import train_locally

ROUNDS, ROWS, INPUTS = 6, 8, 100
POINTS = {  # (silos, parameters)
    "silos": [(n, 100_000) for n in (4, 16, 64, 250, 1000)],
    "parameters": [
        (4, n) for n in (10_000, 100_000, 1_000_000, 10_000_000, 30_000_000)
    ],
}


def run(num_silos, num_parameters):
    """Seconds of each round after the first, and bytes that the run needs beside model
    and data."""
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

    how = dict(rounds=ROUNDS, seed=0, progress=False, workers=1)
    work = model.state_dict(), silos, client_update, weighted_average
    client_update(
        work[0], silos[0], round_index=0, rng=rng
    )  # torch loads what it needs
    extra, history = extra_memory(lambda: run_rounds(*work, **how))
    seconds = [record["seconds"] for record in history.rounds[1:]]
    return dict(seconds=seconds, extra=extra)


def measure(points):
    rows = []
    for silos, parameters in points:
        command = [sys.executable, __file__, str(silos), str(parameters)]
        found = json.loads(subprocess.check_output(command))
        label = f"{silos:,} silos x {parameters:,} parameters"
        rows.append(row(f"{label}, a round", found["seconds"], unit="s"))
        extra = found["extra"] / 1e6
        rows.append(row(f"{label}, memory of the run", extra, unit="MB"))
    return rows


def slope(points, rows, what):
    """Cost of one more silo or parameter: a line, each point counted relative to it."""
    x = np.array([point[what == "parameters"] for point in points], float)
    per, unit = (1, "silo") if what == "silos" else (1e6, "million parameters")
    found = []
    for part, quantity in ((rows[::2], "ms"), (rows[1::2], "MB")):
        y = np.array([r["value"] for r in part])
        gradient, _ = np.polyfit(x, y, 1, w=1 / y)
        scale = 1000 * per if quantity == "ms" else per
        name = "time of a round" if quantity == "ms" else "memory"
        case = f"{name}, slope over {what}"
        found.append(row(case, gradient * scale, unit=f"{quantity} per {unit}"))
    return found


def draw(path=RESULTS):
    """docs/results/scale_silos.png and scale_parameters.png, from the results."""
    import matplotlib.pyplot as plt

    from fl_helpers.plots import use_style

    use_style()
    value = {row["case"]: float(row["value"]) for row in read_results(path)}
    for what, points in POINTS.items():
        x = [point[what == "parameters"] for point in points]
        fig, axes = plt.subplots(1, 2, figsize=(7.5, 3))
        labels = {"a round": "seconds per round", "memory of the run": "memory (MB)"}
        for axis, (kind, label) in zip(axes, labels.items(), strict=True):
            y = [value[f"{s:,} silos x {p:,} parameters, {kind}"] for s, p in points]
            axis.loglog(x, y, "o-", label="measured")
            axis.loglog(
                x, y[-1] * np.array(x) / x[-1], ":", color="0.5", label="linear"
            )
            axis.set(xlabel=what, ylabel=label)
        axes[0].legend()
        picture = path.with_name(f"scale_{what}.png")
        fig.savefig(picture, metadata={"Software": None})
        plt.close(fig)


def main():
    if len(sys.argv) == 3:
        print(json.dumps(run(*map(int, sys.argv[1:]))))
        return 0
    if not FULL:
        print("SKIPPED: scale, measured with --full")
        return 0
    code = 0
    for what, points in POINTS.items():
        rows = measure(points)
        code |= report(f"scale over {what}", rows + slope(points, rows, what))
    return code


if __name__ == "__main__":
    sys.exit(main())
