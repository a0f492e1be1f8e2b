"""The machine that something was measured on: what it is, and what is used of it."""

import os
import platform
import re
import resource
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return sum(sum(resource.getrusage(kind)[:2]) for kind in kinds)


def free_memory() -> int:
    """Bytes that a new process could take."""
    (line,) = [
        line
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    ]
    return int(line.split()[1]) * 1024


def circumstances() -> dict[str, str]:
    """Columns that are the same in all rows: when, where, with what."""
    model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    machine = f"{os.cpu_count()} cores, {model.group(1)}, " if model else ""
    machine += f"{free_memory() / 1e9:.0f} GB free, {platform.system()}"
    where = dict(date=datetime.now(timezone.utc).date().isoformat(), machine=machine)
    where |= dict(load_before=f"{os.getloadavg()[0]:.1f}")
    where |= dict(python=platform.python_version())
    return where | {name: version(name) for name in ("torch", "numpy", "safetensors")}
