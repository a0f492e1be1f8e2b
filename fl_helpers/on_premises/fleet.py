"""A whole federation of real processes on this machine, for a notebook or a test.

Provision, start, wait until all hospitals are connected, run, watch, and always shut
down: after the end, an error, an interrupt, and when the notebook's kernel is killed.
Everything listens on the loopback interface only. On real machines each hospital starts
its own kit (`startup/start.sh`), and only `Run` and `Fleet.run` matter.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import logging
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import save_file

from fl_helpers import exchange
from fl_helpers.on_premises import controller, executor, provision, sandbox, site
from fl_helpers.simulation import Params

MARK = "FL_FLEET"  # environment variable of all processes: the fleet's folder
TRAIN = {"server": "server_train", "client": "client_train"}


class FleetError(RuntimeError):
    """A process died, or something did not happen in time; says which, and its log."""


@dataclass(frozen=True)
class Run:
    """A run of `simulation.run_rounds`, by names instead of functions.

    name: of its folder; a run that was cut short and is started again under its name
    goes on from the last round. params: initial model state. rounds, seed, keep_local
    and the order of reduction are as in `run_rounds`. quorum: valid updates that a
    round needs. deadline: seconds that a round may take. aggregate: "weighted_average"
    or a server rule, with its options and trainable names. settings: plain numbers and
    texts for the hospitals' own function. evaluate: the silos test the global model
    before they train, and the last one. metrics: names that may be reported, beside
    those of `exchange.Limits`. stop: {"metric": name, "patience": rounds}, and
    "higher_is_better": False for a loss.
    """

    name: str
    params: Params
    rounds: int
    seed: int
    quorum: int
    deadline: int = 60
    aggregate: str = "weighted_average"
    options: Mapping[str, float] = field(default_factory=dict)
    trainable: Collection[str] = ()
    keep_local: Collection[str] = ()
    settings: Mapping[str, float | str] = field(default_factory=dict)
    evaluate: bool = True
    metrics: Collection[str] = ()
    stop: Mapping[str, Any] | None = None
    max_norm: float | None = None
    max_bytes: int | None = None


class Fleet:
    """Server and hospitals of a `silos.yaml`, each a process of its own, on localhost.

    silos: path of the file. folder: for kits, logs and results; git must ignore it.
    sandbox_kind: None takes the best that this machine has. ready: seconds to wait
    until all are connected. Use it as a context manager; or `start` and `stop`.
    """

    def __init__(
        self,
        silos: str | Path,
        folder: str | Path,
        *,
        sandbox_kind: str | None = None,
        ready: float = 90,
    ) -> None:
        self.federation = provision.read_silos(silos)
        if self.federation.host not in provision.LOOPBACK:
            raise ValueError(f"a fleet is for localhost, not {self.federation.host!r}")
        self.folder, self.ready = Path(folder).resolve(), ready
        self.kits, self.logs = self.folder / "kits", self.folder / "logs"
        self.sandbox_kind = sandbox_kind or sandbox.available_sandbox()
        self.sites = [site.site_name(silo.name) for silo in self.federation.silos]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.seconds: dict[str, float] = {}  # how long each step took
        self.session: Any = None

    def __enter__(self) -> Fleet:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Provision if need be, start all processes, wait until all are connected."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        atexit.register(self.stop)
        try:
            with self._timed("provision"):
                if not self.kits.exists():
                    provision.provision(self.federation, self.folder)
            port = self.federation.port or provision.free_port()
            provision.set_port(self.kits, port)
            self._link_code()
            self.sweep()
            with self._timed("ready"):
                for who in ("server", *self.sites):
                    self.start_process(who)
                self.wait_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all processes, at the latest after some seconds; may be called again."""
        atexit.unregister(self.stop)
        with self._timed("stop"):
            self._close_session()
            for process in self.processes.values():
                if process.poll() is None:
                    process.terminate()
            for process in self.processes.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=3)
            self.sweep()
            self.processes.clear()
        if hasattr(self, "lock_file"):
            self.lock_file.close()

    def start_process(self, who: str) -> None:
        """Start, or start again, "server" or a site's process."""
        kit, kind = self.kits / who, "server" if who == "server" else "client"
        for name in ("shutdown.fl", "restart.fl"):
            (kit / name).unlink(missing_ok=True)
        options = ["secure_train=true", "config_folder=config"]
        options += [f"uid={who}", f"org={self._organisation(who)}"]
        command = [sys.executable, "-u", "-m"]
        command += [f"nvflare.private.fed.app.{kind}.{TRAIN[kind]}", "-m", str(kit)]
        command += ["-s", f"fed_{kind}.json", "--set", *options]
        confined = sandbox.sandboxed(
            command,
            read=[self.folder / "code", *self._readable(who)],
            write=[kit],
            kind=self.sandbox_kind,
        )
        self.logs.mkdir(exist_ok=True)
        with (self.logs / f"{who}.log").open("ab") as log:
            self.processes[who] = subprocess.Popen(
                confined,
                cwd=kit,
                env=self._environment(kit),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # an interrupt is for us to handle
            )

    def wait_ready(self) -> None:
        """Wait until the server has heard of all hospitals; FleetError if it takes long
        or a process ends."""
        os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # or it prints a lot
        from nvflare.fuel.flare_api.flare_api import new_secure_session

        logging.getLogger("nvflare").setLevel(logging.CRITICAL)
        self._close_session()
        end, connected = time.monotonic() + self.ready, set()
        while not set(self.sites) <= connected:
            self._check_alive(["server", *self.sites])
            if time.monotonic() > end:
                raise FleetError(
                    f"only {sorted(connected)} connected in {self.ready} s\n"
                    + "".join(
                        self._log_end(s) for s in self.sites if s not in connected
                    )
                )
            time.sleep(0.2)
            with contextlib.suppress(Exception):  # not up yet
                if self.session is None:
                    kit = str(self.kits / "admin")
                    with contextlib.redirect_stdout(None):
                        self.session = new_secure_session(
                            self.federation.admin, kit, timeout=5
                        )
                info = self.session.get_system_info()
                connected = {client.name for client in info.client_info}

    def run(self, run: Run, *, timeout: float = 3600) -> Iterator[dict[str, Any]]:
        """Start a run and yield its events until it is over; the last one is "done".

        Events: start, round_start, update, refused, missing, back, round_end, tested,
        stopped, done; each a dict with "event", "time" and what belongs to it. Raises
        FleetError if the run fails, the server dies, or after `timeout` seconds.
        Closing the iterator, or an interrupt, aborts the run.
        """
        folder = self._write_job(run)
        log = self.kits / "server" / "runs" / run.name / "events.jsonl"
        seen = log.stat().st_size if log.exists() else 0
        end, over = time.monotonic() + timeout, False
        job, checked = self.session.submit_job(str(folder)), time.monotonic()
        try:
            while not over:
                self._check_alive(["server"])
                events, seen = _new_events(log, seen)
                for event in events:
                    over = event["event"] in LAST
                    yield event
                    if over and event["event"] != "done":
                        raise FleetError(f"run {run.name!r}: {event['reason']}")
                if time.monotonic() > end:
                    raise FleetError(f"run {run.name!r} took more than {timeout} s")
                if not events and time.monotonic() - checked > 2:
                    checked = time.monotonic()
                    self._check_job(job, log, seen)
                time.sleep(0.05)
        finally:
            if not over:
                with contextlib.suppress(Exception):
                    self.session.abort_job(job)

    def result(self, run: Run) -> Params:
        """The final global model of a run that is done, without silos' own entries."""
        folder = self.kits / "server" / "runs" / run.name / "final"
        expected = {k: v for k, v in run.params.items() if k not in set(run.keep_local)}
        found = exchange.read_model(folder, expected=expected)
        return {name: found[name] for name in expected}

    def ledger(self, silo: str) -> list[dict[str, Any]]:
        """What crossed a hospital's boundary, from the ledger in its own kit."""
        return exchange.read_ledger(self.kits / site.site_name(silo) / "ledger.jsonl")[
            0
        ]

    def usage(self) -> list[dict[str, Any]]:
        """CPU seconds and resident MB of each process of this fleet."""
        rows = []
        for process in self._own_processes():
            with contextlib.suppress(psutil.Error):
                line, cpu = process.cmdline(), process.cpu_times()
                role = next((p for p in line if p.startswith("nvflare.private")), "")
                place = next((Path(p) for p in line if str(self.kits) in p), Path())
                row = {"who": place.name, "role": role.rpartition(".")[2]}
                row |= {"pid": process.pid, "cpu_s": round(cpu.user + cpu.system, 2)}
                rows.append(row | {"mb": process.memory_info().rss >> 20})
        return rows

    def sweep(self) -> int:
        """Kill whatever carries this fleet's mark; how many there were."""
        found = self._own_processes()
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=3)
        return len(found)

    def _own_processes(self) -> list[psutil.Process]:
        own = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == str(self.folder):
                    own.append(process)
        return [process for process in own if process.pid != os.getpid()]

    def _lock(self) -> None:
        """One fleet per folder: a second one would sweep the first one's processes."""
        self.lock_file = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock_file.close()
            raise FleetError(
                f"another fleet runs in {self.folder}; stop it, or name another folder"
            ) from None

    def _link_code(self) -> None:
        """A folder with nothing but a link to this package, for the import path."""
        link = self.folder / "code" / "fl_helpers"
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(Path(__file__).resolve().parent.parent)

    def _readable(self, who: str) -> list[str]:
        """A hospital's data folder, and its client function's file."""
        if who == "server":
            return []
        own = site.read_site(self.kits / who)
        file = own.client.rpartition(":")[0]
        return [own.data, file] if file.endswith(".py") else [own.data]

    def _environment(self, kit: Path) -> dict[str, str]:
        (kit / "tmp").mkdir(exist_ok=True)
        keep = {k: v for k, v in os.environ.items() if k in ("LANG", "PATH")}
        return keep | {
            MARK: str(self.folder),
            "HOME": str(kit),
            "TMPDIR": str(kit / "tmp"),
            "PYTHONPATH": str(self.folder / "code"),
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "2",
        }

    def _organisation(self, who: str) -> str:
        owners = {site.site_name(s.name): s.organisation for s in self.federation.silos}
        return owners.get(who, self.federation.organisation)

    def _write_job(self, run: Run) -> Path:
        """The run as the engine takes it: names, numbers, the initial model, no code.

        Its id stays the same when it is started again, and changes with its content.
        """
        spec = {k: v for k, v in asdict(run).items() if k != "params"}
        for key in ("trainable", "keep_local", "metrics"):
            spec[key] = sorted(spec[key])
        spec |= {"names": list(run.params)}
        spec["silos"] = {site.site_name(s.name): s.name for s in self.federation.silos}
        folder = self.folder / "jobs" / run.name
        app = folder / "app" / "config"
        spec["run"] = _run_id(folder / "run.json", spec)
        app.mkdir(parents=True, exist_ok=True)
        save_file(dict(run.params), app / executor.INITIAL)
        meta = {"name": run.name, "resource_spec": {}, "min_clients": run.quorum}
        meta |= {"deploy_map": {"app": ["@ALL"]}}
        own = {k: spec[k] for k in ("run", "seed", "names", "keep_local", "settings")}
        base = {"format_version": 2, "components": []}
        base |= {"task_data_filters": [], "task_result_filters": []}
        workflow = {"id": "rounds", "path": _path(controller.RoundController)}
        workflow |= {"args": {"spec": spec}}
        trainer = {"path": _path(executor.SiteExecutor), "args": own}
        server = base | {"workflows": [workflow]}
        server |= {"server": {"task_request_interval": 0.25}}
        tasks = {"tasks": ["train", "evaluate"], "executor": trainer}
        _dump(folder / "meta.json", meta)
        _dump(app / "config_fed_server.json", server)
        _dump(app / "config_fed_client.json", base | {"executors": [tasks]})
        return folder

    def _check_alive(self, names: list[str]) -> None:
        for who in names:
            process = self.processes.get(who)
            if process is None or process.poll() is not None:
                code = process.returncode if process else None
                raise FleetError(f"{who} ended with code {code}\n{self._log_end(who)}")

    def _check_job(self, job: str, log: Path, seen: int) -> None:
        """The engine's own verdict, for failures that our controller cannot report."""
        status = "unknown"
        with contextlib.suppress(Exception):
            status = str(self.session.get_job_meta(job).get("status"))
        if status.startswith(("FINISHED", "FAILED", "ABORTED")):
            if not any(e["event"] in LAST for e, _ in _new_events(log, seen)):
                raise FleetError(
                    f"the run ended as {status}\n{self._log_end('server')}"
                )

    def _log_end(self, who: str, lines: int = 15) -> str:
        path = self.logs / f"{who}.log"
        text = path.read_text(errors="replace") if path.exists() else ""
        return f"last lines of {path}:\n" + "\n".join(text.splitlines()[-lines:]) + "\n"

    def _close_session(self) -> None:
        session, self.session = self.session, None
        if session is not None:
            with contextlib.suppress(Exception):
                session.close()

    @contextlib.contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[step] = round(time.monotonic() - started, 2)


LAST = ("done", "failed", "no_quorum")


def _run_id(path: Path, spec: Mapping[str, Any]) -> str:
    """The id of a run that was started before with the same content, or a new one."""
    content = json.loads(json.dumps(spec))
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["spec"] != content:
            differ = [k for k in content if kept["spec"].get(k) != content[k]]
            raise ValueError(
                f"run {spec['name']!r} was started before with another {differ}; give "
                "this one another name"
            )
        return kept["run"]
    path.parent.mkdir(parents=True, exist_ok=True)
    run = uuid.uuid4().hex
    _dump(path, {"run": run, "spec": content})
    return run


def _new_events(path: Path, start: int) -> tuple[list[dict[str, Any]], int]:
    """Events in the whole lines after byte `start`, and the byte after them."""
    if not path.exists():
        return [], start
    with path.open("rb") as file:
        file.seek(start)
        whole = file.read().rpartition(b"\n")[0]
    lines = whole.splitlines()
    return [json.loads(line) for line in lines], start + len(whole) + bool(lines)


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__name__}"


def _dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
