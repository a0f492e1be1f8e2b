"""Run every benchmark here, each in a process of its own.

    python tests/benchmarks/run.py          # some minutes, writes nothing
    python tests/benchmarks/run.py --full   # results, figures and docs/benchmarks.md

Exit code 1 if a ratio is above its bound (common.BOUNDS) by more than its noise.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench_scale
from common import FULL, RESULTS, read_results, tables
from machine import circumstances
from pages import filled

PAGE = RESULTS.parents[1] / "benchmarks.md"
FULL_ONLY = "bench_rounds.py", "bench_scale.py"
COLUMNS = "table case value unit noise pairs goal bound reference_s ours_s".split()


def write(rows, where):
    """Results, figures, and the tables between the two marks of the page."""
    write_csv(RESULTS, rows, COLUMNS, where)
    bench_scale.draw()
    fill(f"{listed(where)}\n{tables(read_results())}", RESULTS.name, "end")
    command = [sys.executable, "-m", "experiments.scale"]  # docs/scale.md quotes them
    subprocess.run(command, cwd=PAGE.parents[1], check=True)


def write_csv(path, rows, columns, where):
    """Four digits of each number; where: the same in all rows."""

    def digits(value):
        return f"{value:.4g}" if isinstance(value, float) else value

    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns + list(where), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: digits(value) for key, value in row.items()} | where)


def listed(where):
    lines = "\n".join(f"- {key}: {value}" for key, value in where.items())
    return f"\n{lines}"


def fill(text, name, end):
    """Replace what is between the marks of the page for one file of results."""
    marks = f"<!-- from {name} -->", f"<!-- {end} -->"
    PAGE.write_text(filled(PAGE.read_text(), text, *marks))


def main():
    # Threads that wait must sleep, not spin: otherwise other work on the machine
    # makes the timings many times longer.
    env = os.environ | {"OMP_WAIT_POLICY": "passive"}
    where, here = circumstances(), Path(__file__).parent
    scripts = sorted(here.glob("bench_*.py"))
    scripts = [script for script in scripts if FULL or script.name not in FULL_ONLY]
    missed = []
    # Whether glibc gives memory back to the kernel, and asks for it again in the next
    # step, is chance, and costs time: here it keeps what it has.
    keep = {"MALLOC_TRIM_THRESHOLD_": f"{10**9}", "MALLOC_MMAP_THRESHOLD_": f"{2**25}"}
    with tempfile.TemporaryDirectory() as folder:
        env["BENCH_ROWS"] = str(Path(folder, "rows"))
        for script in scripts:
            own = ["--full"] if FULL else []
            command, began = [sys.executable, script, *own], time.monotonic()
            steps = script.name in ("bench_simulation.py", "bench_training.py")
            its_env = env | keep if steps else env
            if subprocess.run(command, env=its_env).returncode:
                missed.append(script.name)
            print(f"{script.name}: {time.monotonic() - began:.0f} s\n", flush=True)
        lines = Path(env["BENCH_ROWS"]).read_text().splitlines()
    if FULL:
        rows = [json.loads(line) for line in lines]
        title = dict(table="on paper: 100 silos, 1,000,000,000 parameters, one round")
        rows += [title | row for row in bench_scale.projection(rows)]
        write(rows, where)
    print(f"bounds missed in: {', '.join(missed)}" if missed else "all bounds kept")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
