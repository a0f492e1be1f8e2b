"""Shared by the benchmarks: bounds, interleaved timing, data, rows of the results.

Every bounded number is a ratio to a reference timed in the same run, pair by pair, so
that a busy machine slows both sides.
"""

import csv
import ctypes
import gc
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from fl_helpers.silos import Examples, Silo

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from machine import cpu_seconds, free_memory  # noqa: E402, F401

FULL = "--full" in sys.argv
RESULTS = Path(__file__).resolve().parents[2] / "docs/results/benchmarks.csv"

# {case: (goal, bound)}. A run fails when a value is above its bound by more than the
# noise measured in that run. The bound is the goal, or what is reached where that is
# more (docs/benchmarks.md says why); None is shown only: others on the machine decide.
BOUNDS = {
    "small CNN, 7,500 parameters, CPU": (1.02, 1.03),
    "CNN, 215,370 parameters, CPU": (1.02, 1.03),
    "4 silos x 1,000 images, CPU": (1.02, 1.05),
    "4 silos x 1,000 images, channels_last, CPU": (0.85, 0.85),
    "100 silos, 10 sampled, CNN, CPU": (1.02, 1.05),
    "100 silos, 10 sampled, small CNN, CPU": (1.02, 1.05),
    "2 workers / 2 bare threads, wall": (1.05, 1.05),
    "2 workers / 1 worker, CNN, wall": (0.59, None),
    "2 workers / 1 worker, tabular, wall": (0.77, None),
    "average of 100 updates, CPU": (1.3, 1.7),
    "average of 100 updates, extra memory": (1.2, 1.25),
    "average of 8 updates from folders, extra memory": (1.2, 2.1),
    "update to disk and back": (2.0, 2.0),
    "update to memory and back": (2.0, 2.0),
    "start-up: torch and core files, CPU": (1.1, 1.1),
    "start-up: core files beyond torch": (0.2, 0.2),
    "first step of a process / torch.optim.SGD, CPU": (1.0, 1.0),
    "train_locally of a Dataset / DataLoader loop, CPU": (1.05, 1.05),
    "train_locally of a Dataset / DataLoader loop, clock": (1.05, 1.05),
    "channels_last / plain, CNN of 215,370 parameters, CPU": (0.9, 0.9),
    "index of PNG files / opening each with Pillow, CPU": (2.0, 2.3),
    # 0.1 GB for 2.1 GB of images, beside what the process holds without them.
    "memory of a run over a folder / its decoded images": (0.05, 0.05),
    "bytes of a round, head only / whole ResNet-18": (0.001, 0.001),
    "coordinate_median, 8 updates": (None, 35),
    "trimmed_mean, 8 updates": (None, 35),
    "krum, 8 updates": (None, 12),
    "geometric_median, 8 updates": (None, 90),
    "NormClipping, 8 updates": (None, 18),
}


def compare(reference, candidate, *, pairs=5, warm_up=True):
    """Medians over pairs of runs: seconds of both, and the ratio with its noise.

    One untimed run of each comes first; the order within a pair alternates, and
    garbage is collected between runs, not in them. pairs: with --full; else half
    of them, at least 3.
    """
    pairs = pairs if FULL else max(min(3, pairs), math.ceil(pairs / 2))
    if warm_up:
        reference(), candidate()
    runs = []
    for pair in range(pairs):
        order = [("reference", reference), ("candidate", candidate)]
        times = {}
        for name, function in order if pair % 2 else order[::-1]:
            gc.collect()
            wall, cpu = time.perf_counter(), cpu_seconds()
            function()
            times[name] = (time.perf_counter() - wall, cpu_seconds() - cpu)
        runs.append(times)
    return summary(runs)


def summary(runs):
    """What `compare` returns, of its own runs or those of several calls together."""

    def each(clock):
        return [times["candidate"][clock] / times["reference"][clock] for times in runs]

    def median(side):
        return statistics.median(times[side][0] for times in runs)

    return SimpleNamespace(
        runs=runs,
        reference=median("reference"),
        candidate=median("candidate"),
        wall=each(0),
        cpu=each(1),
    )


def row(case, values, *, unit="ratio", times=None):
    """A row of the results: median and noise (half the distance of the quartiles).

    values: one, or one per pair. times: the `compare` that they come from.
    """
    values = values if isinstance(values, list) else [values]
    low, _, high = (
        statistics.quantiles(values, method="inclusive") if values[1:] else "   "
    )
    noise = (high - low) / 2 if values[1:] else None
    goal, bound = BOUNDS.get(case, (None, None))
    found = dict(case=case, value=statistics.median(values), unit=unit, noise=noise)
    found |= dict(pairs=len(values), goal=goal, bound=bound)
    if times:
        found |= dict(reference_s=times.reference, ours_s=times.candidate)
    return found


def missed(row):
    """Whether a value is above its bound by more than its noise."""
    bound = row["bound"]
    return bound is not None and row["value"] - (row["noise"] or 0) > bound


def report(title, rows):
    """Print one table, hand the rows to `run.py`; returns 1 if a bound is missed."""
    width = max(len(row["case"]) for row in rows)
    print(f"\n{title}\n{'':{width}}     value    noise  goal  bound")
    for found in rows:
        noise, goal, bound = (found[key] for key in ("noise", "goal", "bound"))
        verdict = "" if bound is None else "MISSED" if missed(found) else "ok"
        print(
            f"{found['case']:{width}}  {found['value']:8.3f} {shown(noise):>8} "
            f"{shown(goal):>5} {shown(bound):>6}  {found['unit']} {verdict}"
        )
    print(flush=True)
    if "BENCH_ROWS" in os.environ:
        with open(os.environ["BENCH_ROWS"], "a") as file:
            file.writelines(json.dumps({"table": title} | r) + "\n" for r in rows)
    return int(any(map(missed, rows)))


def shown(value):
    """Three digits, at most four decimals; a dash for what was not measured."""
    if value in (None, ""):
        return "-"
    digits = 2 - math.floor(math.log10(abs(float(value)))) if float(value) else 0
    return f"{float(value):,.{min(max(digits, 0), 4)}f}"


def read_results(path=RESULTS):
    """The rows of the committed results, numbers as text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def tables(rows):
    """The rows as the Markdown tables of docs/benchmarks.md."""
    columns = "case", "value", "unit", "noise", "pairs", "goal", "bound"
    columns += "reference, s", "ours, s"
    head = f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n"
    text = ""
    for title in dict.fromkeys(row["table"] for row in rows):
        text += f"\n### {title}\n\n{head}"
        for row in (row for row in rows if row["table"] == title):
            value, noise, reference, ours = (
                shown(row[key]) for key in ("value", "noise", "reference_s", "ours_s")
            )
            plain = (row[key] or "-" for key in ("pairs", "goal", "bound"))
            cells = row["case"], value, row["unit"], noise, *plain, reference, ours
            text += f"| {' | '.join(cells)} |\n"
    return text


def memory(key):
    """Bytes, of this process, as Linux reports them: VmRSS is now, VmHWM the peak."""
    (line,) = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(f"{key}:")
    ]
    return int(line.split()[1]) * 1024


def extra_memory(function):
    """Bytes that a call needs at its peak, and what it returns; Linux."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that is free here must not hide a need
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = memory("VmRSS")
    result = function()
    return memory("VmHWM") - before, result


def image_silos(num_silos, num_images, size=28):
    """Silos of random square images in 10 classes: speed does not need real ones."""
    rng = torch.Generator().manual_seed(0)

    def examples():
        x = torch.randn(num_images, 1, size, size, generator=rng)
        return Examples(x, torch.randint(10, (num_images,), generator=rng))

    silos = []
    for k in range(num_silos):
        train = examples()
        silos.append(Silo(f"silo {k:03d}", train, train))
    return silos


def cnn_215k():
    """Two convolutions and two linear layers, 215,370 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def sgd_epoch(model, silo, lr, batch_size, rng):
    """One epoch as anyone would write it by hand; incomplete batches are dropped.

    Returns the number of steps.
    """
    x, y = silo.train
    optimizer = torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=1e-4)
    order = torch.randperm(len(x), generator=rng).to(x.device)
    starts = range(0, len(x) - batch_size + 1, batch_size)
    for start in starts:
        batch = order[start : start + batch_size]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    return len(starts)


ROUNDS_WHERE = "date", "machine", "load_before", "torch"


def rounds_table(rows):
    """The rows of rounds.csv as Markdown: a column for each engine, model and number of
    silos."""
    cases = dict.fromkeys((r["engine"], r["megabytes"], r["silos"]) for r in rows)
    found = {
        (r["stage"], r["engine"], r["megabytes"], r["silos"]): r["seconds"]
        for r in rows
    }
    heads = [f"{e}: {s} silo{'s' * (s != '1')}, {float(m):.2g} MB" for e, m, s in cases]
    about = (f"\n- {name}: {rows[0][name]}" for name in ROUNDS_WHERE)
    text = (
        "".join(about)
        + f"\n\n| seconds | {' | '.join(heads)} |\n|---{'|---:' * len(cases)}|\n"
    )
    for stage in dict.fromkeys(row["stage"] for row in rows):
        cells = [found.get((stage, *case), 0) for case in cases]
        cells = [f"{float(c):.2f}" if float(c) else "-" for c in cells]
        text += f"| {stage} | {' | '.join(cells)} |\n"
    return text + "\n"
