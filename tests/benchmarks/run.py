"""Run every benchmark here, each in a process of its own; exit code 1 if one misses."""

import os
import subprocess
import sys
from pathlib import Path


def main():
    # Threads that wait must sleep, not spin: otherwise other work on the machine
    # makes the timings many times longer.
    env = os.environ | {"OMP_WAIT_POLICY": "passive"}
    here = Path(__file__).parent
    scripts = [*sorted(here.glob("bench_*.py")), here / "strategies.py"]
    codes = [subprocess.run([sys.executable, script], env=env) for script in scripts]
    missed = [s.name for s, c in zip(scripts, codes, strict=True) if c.returncode]
    print(f"goals missed in: {', '.join(missed)}" if missed else "all goals met")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
