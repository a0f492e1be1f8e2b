"""Shared by the benchmarks: interleaved timing, data, one small table per file.

Every number is a ratio to a reference timed in the same run, pair by pair, so that a
busy machine slows both sides. A goal is missed only beyond a noise margin.
"""

import gc
import statistics
import time
from types import SimpleNamespace

import torch
from torch import nn

from fl_helpers.silos import Examples, Silo


def compare(reference, candidate, *, pairs=7):
    """Median times of both, and the median over pairs of candidate / reference.

    One untimed run of each comes first; the order within a pair alternates, and
    garbage is collected between runs, not in them.
    """
    reference(), candidate()
    runs = []
    for pair in range(pairs):
        order = [("reference", reference), ("candidate", candidate)]
        times = {}
        for name, function in order if pair % 2 else order[::-1]:
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            function()
            times[name] = (time.perf_counter() - wall, time.process_time() - cpu)
        runs.append(times)

    def median(value):
        return statistics.median(value(times) for times in runs)

    return SimpleNamespace(
        reference=median(lambda t: t["reference"][0]),
        candidate=median(lambda t: t["candidate"][0]),
        wall=median(lambda t: t["candidate"][0] / t["reference"][0]),
        cpu=median(lambda t: t["candidate"][1] / t["reference"][1]),
    )


def at_most(label, value, goal, margin):
    """A row that fails if value > goal + margin."""
    return label, value, f"<= {goal:.2f}", margin, value <= goal + margin


def timed(label, times, goal, margin):
    """The rows of one comparison: CPU time decides, wall time is shown beside it."""
    print(
        f"{label}: {times.reference:.2f} s reference, {times.candidate:.2f} s ours, "
        f"wall ratio {times.wall:.3f}"
    )
    return at_most(f"{label}, CPU", times.cpu, goal, margin)


def report(title, rows):
    """Print one table; returns the exit code, 1 if a goal is missed."""
    width = max(len(row[0]) for row in rows)
    print(f"\n{title}\n{'':{width}}  result     goal  margin")
    for label, value, goal, margin, good in rows:
        verdict = "ok" if good else "MISSED"
        print(f"{label:{width}}  {value:6.3f}  {goal:>7}   {margin:.2f}  {verdict}")
    print(flush=True)
    return int(not all(row[-1] for row in rows))


def image_silos(num_silos, num_images):
    """Silos of random 28 x 28 images in 10 classes: speed does not need real ones."""
    rng = torch.Generator().manual_seed(0)

    def examples():
        x = torch.randn(num_images, 1, 28, 28, generator=rng)
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
    """One epoch as anyone would write it by hand; incomplete batches are dropped."""
    x, y = silo.train
    optimizer = torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=1e-4)
    order = torch.randperm(len(x), generator=rng)
    for start in range(0, len(x) - batch_size + 1, batch_size):
        batch = order[start : start + batch_size]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
