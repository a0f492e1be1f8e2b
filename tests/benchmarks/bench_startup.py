"""What the core files add to `import torch`, each time in a new process."""

import subprocess
import sys
from functools import partial

from common import FULL, compare, report, row

CORE = "training, aggregation, simulation, exchange, silos"
ALL = """
import importlib, pkgutil, sys
import fl_helpers
for module in pkgutil.iter_modules(fl_helpers.__path__):
    if not module.ispkg:
        importlib.import_module(f"fl_helpers.{module.name}")
"""
# The first training in a process, by hand and by train_locally; prints its memory.
DATA = """
import resource, sys, torch
from types import SimpleNamespace
x, y, model = torch.randn(8, 2), torch.arange(8) % 2, torch.nn.Linear(2, 2)
"""
BY_HAND = """
optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
torch.nn.functional.cross_entropy(model(x), y).backward()
optimizer.step()
"""
OURS = """
from fl_helpers.training import train_locally
silo = SimpleNamespace(name="a", train=(x, y))
options = dict(epochs=1, lr=0.1, batch_size=8, rng=torch.Generator())
train_locally(model, silo, **options)
assert "torch._dynamo" not in sys.modules
"""
PEAK = "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
LAZY = 'assert not {"nvflare", "azure", "flwr"} & sys.modules.keys()'


def run(code):
    return subprocess.check_output([sys.executable, "-c", code], text=True)


def first_training():
    """Rows of one step in a new process, against the same with torch.optim.SGD."""
    both = [f"{DATA}{code}{PEAK}" for code in (BY_HAND, OURS)]
    runs = (partial(run, code) for code in both)
    times = compare(*runs, pairs=3, warm_up=False)
    case = "first step of a process"
    rows = [row(f"{case} / torch.optim.SGD, CPU", times.cpu, times=times)]
    if FULL and sys.platform == "linux":  # there, in kB
        for who, code in zip(("torch.optim.SGD", "ours"), both, strict=True):
            peak = int(run(code)) * 1024 / 1e6
            rows.append(row(f"{case}, memory, {who}", peak, unit="MB"))
    return rows


def main():
    # An engine is imported by who uses it. What is read from the disk here is in memory
    # for the runs that are timed: they need no warm-up.
    run(f"{ALL}{LAZY}")
    rows = []
    files = {"core": f"from fl_helpers import {CORE}"} | ({"all": ALL} if FULL else {})
    for what, code in files.items():
        times = compare(
            lambda: run("import torch, numpy"),
            lambda code=code: run(f"import torch, numpy\n{code}"),
            pairs=5,
            warm_up=False,
        )
        ratio = row(f"start-up: torch and {what} files, CPU", times.cpu, times=times)
        extra = [t["candidate"][0] - t["reference"][0] for t in times.runs]
        seconds = row(f"start-up: {what} files beyond torch", extra, unit="s")
        rows += [ratio, seconds]
    rows += first_training()
    return report("start-up / import torch and numpy", rows)


if __name__ == "__main__":
    sys.exit(main())
