"""What the core files add to `import torch`, each time in a new process."""

import subprocess
import sys

from common import FULL, compare, report, row

CORE = "training, aggregation, simulation, exchange, silos"
ALL = """
import importlib, pkgutil, sys
import fl_helpers
for module in pkgutil.iter_modules(fl_helpers.__path__):
    if not module.ispkg:
        importlib.import_module(f"fl_helpers.{module.name}")
"""
LAZY = 'assert not {"nvflare", "azure", "flwr"} & sys.modules.keys()'


def run(code):
    subprocess.run([sys.executable, "-c", code], check=True)


def main():
    run(f"{ALL}{LAZY}")  # an engine is imported by who uses it
    rows = []
    files = {"core": f"from fl_helpers import {CORE}"} | ({"all": ALL} if FULL else {})
    for what, code in files.items():
        times = compare(
            lambda: run("import torch, numpy"),
            lambda code=code: run(f"import torch, numpy\n{code}"),
            pairs=5,
        )
        ratio = row(f"start-up: torch and {what} files, CPU", times.cpu, times=times)
        extra = [t["candidate"][0] - t["reference"][0] for t in times.runs]
        seconds = row(f"start-up: {what} files beyond torch", extra, unit="s")
        rows += [ratio, seconds]
    return report("start-up / import torch and numpy", rows)


if __name__ == "__main__":
    sys.exit(main())
