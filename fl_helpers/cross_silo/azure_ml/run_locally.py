"""Runs a plan on this machine: each job a process in a sandbox, a folder per datastore.

The same scripts run, from the same code snapshots and with the same arguments as on
Azure ML. What differs: the environment is this Python, and there are no identities;
what a job may reach is said by the plan and held by `cross_silo.sandbox`. There is no
shell that could interpret a value.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_helpers.cross_silo import sandbox
from fl_helpers.cross_silo.azure_ml.pipeline import check_plan
from fl_helpers.cross_silo.azure_ml.plan import Flow, Job, Plan
from fl_helpers.exchange import read_ledger

SLOT = re.compile(r"\$\{\{(inputs|outputs)\.(\w+)\}\}")


class RunError(RuntimeError):
    """A job failed; the message has its last lines, and where the others are.

    jobs: the names of those that failed.
    """

    def __init__(self, message: str, jobs: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.jobs = tuple(jobs)


@dataclass(frozen=True)
class Result:
    """What a run left in its folder.

    model: the folder of the last global model, for `exchange.read_model`; None if the
    plan trained none. metrics: one dict per number, with round, silo, metric and value;
    tests of a round are of the model that it began with. seconds: of each job.
    """

    folder: Path
    model: Path | None
    metrics: list[dict[str, Any]]
    ledgers: dict[str, list[Path]]
    seconds: dict[str, float]

    def ledger(self, silo: str) -> list[dict[str, Any]]:
        """All that went in or out of a silo, by its own ledger."""
        found = [read_ledger(path)[0] for path in self.ledgers[silo] if path.exists()]
        return [line for lines in found for line in lines]


def run(
    plan: Plan,
    folder: str | Path,
    *,
    data: Mapping[str, str | Path] | None = None,
    workers: int | None = None,
    sandbox_kind: str | None = None,
    timeout: float = 3600,
    show: Callable[[str], None] = print,
) -> Result:
    """Check a plan and run it; started again in the same folder, it goes on.

    folder: gets `stores/<datastore>/`, `logs/<job>.log` and `done/`. data: where each
    silo's data are, {silo's name: folder}; else in `stores/`. workers: jobs at the same
    time; None is one per core. sandbox_kind: None takes the best that this machine has.
    timeout: seconds that one job may take. show: gets a line when a job ends.

    A job is not run again if it ended well, and neither it, its code, nor what it reads
    has changed. Raises PlanRefused, or RunError at the first job that fails; the others
    are stopped.
    """
    check_plan(plan)
    kind = sandbox_kind or sandbox.available_sandbox()
    runner = _Runner(plan, Path(folder).resolve(), data or {}, kind)
    runner.play(workers or os.cpu_count() or 1, timeout, show)
    return runner.result()


@dataclass
class _Runner:
    plan: Plan
    folder: Path
    data: Mapping[str, str | Path]
    kind: str

    def __post_init__(self) -> None:
        self.jobs = {job.name: job for job in self.plan.jobs}
        self.marks: dict[str, str] = {}  # fingerprints of jobs that are done
        self.seconds: dict[str, float] = {}
        for name in ("logs", "done", "work"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def local(self, flow: Flow) -> Path:
        """The folder here that stands for one in a datastore."""
        for silo in self.plan.silos:
            own = flow.path == silo.data and flow.store in (silo.datastore, "")
            if own and silo.name in self.data:
                return Path(self.data[silo.name]).resolve()
        return self.folder / "stores" / (flow.store or "assets") / flow.path

    def play(self, workers: int, timeout: float, show: Callable[[str], None]) -> None:
        needed = {
            self.local(f) for j in self.plan.jobs for f in j.reads if not f.producer
        }
        if missing := sorted(str(path) for path in needed if not path.is_dir()):
            raise RunError(f"there is nothing at {missing}; name each silo in `data`")
        left, running = list(self.plan.jobs), dict[str, tuple[Any, float]]()
        try:
            while left or running:
                for job in [job for job in left if self.is_ready(job)]:
                    if self.was_done(job):
                        left.remove(job)
                        show(self.line(job.name, "was done", left, running))
                    elif len(running) < workers:
                        left.remove(job)
                        running[job.name] = self.start(job), time.monotonic()
                for name, (process, started) in list(running.items()):
                    seconds = time.monotonic() - started
                    if process.poll() is None and seconds < timeout:
                        continue
                    del running[name]
                    self.end(name, process, seconds)
                    show(self.line(name, "done", left, running))
                time.sleep(0.02)
        finally:
            for process, _ in running.values():
                _kill(process)

    def line(self, name: str, state: str, left: list[Job], running: Any) -> str:
        also = ", ".join(running)
        also = f"; running: {also}" if also else ""
        return f"{state:8}{self.seconds[name]:6.1f} s  {name}  ({len(left)} wait{also})"

    def is_ready(self, job: Job) -> bool:
        return all(flow.producer in ("", *self.marks) for flow in job.reads)

    def mark(self, job: Job) -> str:
        """Fingerprint of all that a job's result depends on. Not of the account, which
        grows: what it says of this very turn does not change."""
        given = [flow for flow in job.reads if not flow.producer]
        before = [self.local(flow) for flow in given if flow.name != "account"]
        parts = [job.command, job.literals, _contents(before)]  # its code's digest, too
        parts += [[vars(flow) for flow in (*job.reads, *job.writes)]]
        parts += [[self.marks[flow.producer] for flow in job.reads if flow.producer]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def was_done(self, job: Job) -> bool:
        path = self.folder / "done" / f"{job.name}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        if found.get("mark") != self.mark(job):
            return False
        self.marks[job.name], self.seconds[job.name] = found["mark"], found["seconds"]
        return True

    def start(self, job: Job) -> subprocess.Popen[bytes]:
        """Start a job's process: it sees its inputs, its outputs and its code."""
        (self.folder / "done" / f"{job.name}.json").unlink(missing_ok=True)
        work = self.folder / "work" / job.name
        reads = {flow.name: self.local(flow) for flow in job.reads}
        writes = {flow.name: self.local(flow) for flow in job.writes}
        for name, path in [("", work), *writes.items()]:
            if name != "booked":  # for good
                shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True, exist_ok=True)
        code = self.plan.code[job.code]
        _python, _flag, start, *words = job.command.split()
        values = {"inputs": job.literals | reads, "outputs": writes}
        words = [SLOT.sub(lambda m: str(values[m[1]][m[2]]), word) for word in words]
        command = sandbox.sandboxed(
            [sys.executable, "-EsB", f"{code}/{start}", *words],
            read=[code, *reads.values()],
            write=[work, *writes.values()],
            kind=self.kind,
            network=False,
        )
        environment = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG")}
        environment |= {"HOME": str(work), "TMPDIR": str(work), "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = str(Path(sandbox.__file__).parents[2])
        with (self.folder / "logs" / f"{job.name}.log").open("wb") as log:
            return subprocess.Popen(
                command,
                cwd=work,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def end(self, name: str, process: subprocess.Popen[bytes], seconds: float) -> None:
        """Take note that a job is done; RunError if it failed."""
        job, in_time = self.jobs[name], process.poll() is not None
        _kill(process)
        shutil.rmtree(self.folder / "work" / name, ignore_errors=True)
        if not in_time or process.returncode:
            log = self.folder / "logs" / f"{name}.log"
            logs = [log, *(self.local(f) / "log.txt" for f in job.writes)]
            last = "\n".join(_last_lines(path) for path in logs if path.exists())
            why = f"exited with {process.returncode}" if in_time else "took too long"
            what = f"{name} {why} after {seconds:.1f} s; see {log}\n{last}"
            raise RunError(what, [name])
        self.marks[name], self.seconds[name] = self.mark(job), round(seconds, 2)
        content = {"mark": self.marks[name], "seconds": self.seconds[name]}
        path = self.folder / "done" / f"{name}.json"
        path.with_suffix(".tmp").write_text(json.dumps(content))
        os.replace(path.with_suffix(".tmp"), path)

    def result(self) -> Result:
        found: dict[str, list[Path]] = {}
        ledgers: dict[str, list[Path]] = {silo.name: [] for silo in self.plan.silos}
        for job in self.plan.jobs:
            for flow in job.writes:
                found.setdefault(flow.name, []).append(self.local(flow))
                if flow.name == "private":
                    path = self.local(flow) / "ledger.jsonl"
                    ledgers[job.party.name].append(path)
        models = found.get("next_model", [])
        lines = [
            json.loads(line)
            for path in found.get("report", [])
            for line in (path / "metrics.jsonl").read_text().splitlines()
        ]
        last = models[-1] if models else None
        return Result(self.folder, last, lines, ledgers, dict(self.seconds))


def _contents(folders: Iterable[Path]) -> str:
    """Fingerprint of the files in folders, by their names, sizes and times."""
    files = [path for folder in folders for path in sorted(folder.rglob("*"))]
    found = [(str(p), p.lstat().st_size, p.lstat().st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a job's process, and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_lines(path: Path, count: int = 12) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-count:])
