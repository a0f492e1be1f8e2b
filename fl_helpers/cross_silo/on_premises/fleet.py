"""A whole federation of real processes on this machine, for a notebook or a test.

Provision, start, wait until all hospitals are connected, run, watch, and always shut
down: after the end, an error, an interrupt, and when the notebook's kernel is killed.
Everything listens on the loopback interface only. On real machines each hospital starts
its own kit instead (`startup/start.sh`).
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from fl_helpers import exchange
from fl_helpers.cross_silo import sandbox
from fl_helpers.cross_silo.federation import LOOPBACK, read_federation
from fl_helpers.cross_silo.on_premises import provision, runs, site
from fl_helpers.cross_silo.on_premises.runs import RunError
from fl_helpers.cross_silo.run import Run
from fl_helpers.simulation import Params

if TYPE_CHECKING:
    from fl_helpers.cross_silo.account import SiloAccount
    from fl_helpers.cross_silo.on_premises.analyses import EngineAsk
if sys.platform == "win32":
    raise ImportError("a fleet needs Linux, best with Landlock; on Windows use WSL2")
import fcntl  # noqa: E402 - not on Windows

MARK = "FL_FLEET"  # environment variable of all processes: the fleet's folder


class Fleet:
    """Server and hospitals of a `silos.yaml`, each a process of its own, on localhost.

    silos: path of the file. folder: for kits, logs and results; git must ignore it.
    sandbox_kind: None takes the best that this machine has. ready: seconds to wait
    until all are connected. Use it as a context manager; or `start` and `stop`, both
    in the main thread: processes end with the thread that started them.
    """

    def __init__(
        self,
        silos: str | Path,
        folder: str | Path,
        *,
        sandbox_kind: str | None = None,
        ready: float = 90,
    ) -> None:
        self.federation = read_federation(silos, engine="on_premises")
        self.server = self.federation.on_premises
        if self.server.host not in LOOPBACK:
            raise ValueError(f"a fleet is for localhost, not {self.server.host!r}")
        self.folder, self.ready = Path(folder).resolve(), ready
        self.kits, self.logs = self.folder / "kits", self.folder / "logs"
        self.sandbox_kind = sandbox_kind or sandbox.available_sandbox()
        self.sites = {s.name: s for s in provision.sites_of(self.federation)}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.since: dict[str, float] = {}  # when each process was started
        self.seconds: dict[str, float] = {}  # how long each step took
        self.session: Any = None
        self.lock: Any = None

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
            self.sweep()  # what a fleet that was killed here may have left
            with self._timed("provision"):
                if not self.kits.exists():
                    provision.provision(self.federation, self.folder)
            port = self.server.port or provision.free_port()
            provision.set_port(self.kits, port)
            self._link_code()
            with self._timed("ready"):
                for who in ("server", *self.sites):
                    self.start_process(who)
                self.wait_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all processes, within some seconds; may be called again."""
        atexit.unregister(self.stop)
        with self._timed("stop"):
            self._close_session()
            for process in self.processes.values():
                process.terminate()
            end = time.monotonic() + 3  # for all together; then they are killed
            for process in self.processes.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=max(0.0, end - time.monotonic()))
            self.sweep()
            for process in self.processes.values():
                process.poll()  # so that none stays behind as a zombie
            self.processes.clear()
        if self.lock:
            self.lock.close()

    def start_process(self, who: str) -> None:
        """Start, or start again, "server" or a site's process, confined to its kit and
        its data."""
        kit, read = self.kits / who, [self.folder / "code"]
        kind, organisation = "server", self.server.organisation
        if who != "server":
            kind, organisation = "client", self.sites[who].organisation
            own = site.read_site(kit)
            read += [own.data, own.client.rpartition(":")[0]]
            read += [path for path in [own.tables.rpartition(":")[0]] if path]
        for name in ("shutdown.fl", "restart.fl"):
            (kit / name).unlink(missing_ok=True)
        command = [sys.executable, "-u", "-m"]
        command += [f"nvflare.private.fed.app.{kind}.{kind}_train", "-m", str(kit)]
        command += ["-s", f"fed_{kind}.json", "--set", "secure_train=true"]
        command += ["config_folder=config", f"uid={who}", f"org={organisation}"]
        self.since[who] = time.time()
        with (self.logs / f"{who}.log").open("ab") as log:
            self.processes[who] = subprocess.Popen(
                sandbox.sandboxed(
                    command, read=read, write=[kit], kind=self.sandbox_kind
                ),
                cwd=kit,
                env=self._environment(kit),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # an interrupt is for us to handle
            )

    def wait_ready(self) -> None:
        """Wait until the server has heard of all hospitals; RunError if it takes long
        or a process ends."""
        self._close_session()
        end, missing, last = time.monotonic() + self.ready, set(self.sites), ""
        while missing:
            self._check_alive("server", *self.sites)
            if time.monotonic() > end:
                logs = "\n".join(self._log_end(who) for who in sorted(missing))
                raise RunError(
                    f"{sorted(missing)} did not connect within {self.ready} s{last}"
                    f"\n{logs}"
                )
            time.sleep(0.2)
            try:
                self.session = self.session or self._new_session()
                for client in self.session.get_system_info().client_info:
                    if client.last_connect_time > self.since[client.name]:
                        missing.discard(client.name)
            except Exception as error:  # not up yet
                last = f"; the last look at the server: {type(error).__name__}: {error}"

    def run(self, run: Run, *, timeout: float = 3600) -> Iterator[dict[str, Any]]:
        """Start a run and yield its events, see `runs.play`; RunError with the last
        lines of its log, too, if the server dies."""
        alive = {"check": lambda: self._check_alive("server")}
        return runs.play(run, self.session, **self.places, **alive, timeout=timeout)

    @property
    def places(self) -> dict[str, Any]:
        """Whom `runs.play` and `analyses.asking` ask, and where their files lie."""
        silos = [site.silo for site in self.sites.values()]
        server, jobs = self.kits / "server", self.folder / "jobs"
        return {"silos": silos, "server_kit": server, "jobs": jobs}

    def ask(
        self,
        name: str,
        *,
        quorum: int | None = None,
        deadline: int = 60,
        secure: bool = False,
    ) -> contextlib.AbstractContextManager[EngineAsk]:
        """A run of questions, and its `Ask`: see `analyses.asking` and `Analysis`."""
        from fl_helpers.cross_silo.on_premises import analyses

        analysis = analyses.Analysis(name, quorum, deadline, secure=secure)
        alive = {"check": lambda: self._check_alive("server")}
        return analyses.asking(analysis, self.session, **self.places, **alive)

    def result(self, run: Run) -> Params:
        """The final global model of a run that is done, without silos' own entries."""
        return runs.result(run, self.kits / "server")

    def ledger(self, silo: str) -> list[dict[str, Any]]:
        """What crossed a silo's boundary, from the ledger in its own kit; warns of
        lines that a crash or a disk has damaged."""
        path = self.kits / site.site_name(silo) / "ledger.jsonl"
        entries, torn = exchange.read_ledger(path)
        if torn:
            warnings.warn(
                f"{path}: lines {torn} are damaged and left out; compare with the "
                "server's ledger of the run, or bring the file back from a backup",
                stacklevel=2,
            )
        return entries

    def allow(self, params: Params, **rules: Any) -> None:
        """In a trial, one person is all silos: all let this model out, as `gate.allow`
        says."""
        from fl_helpers.cross_silo.on_premises import gate

        for name in self.sites:
            gate.allow(self.kits / name, params, **rules)

    def allow_questions(self, tables: str, **rules: Any) -> None:
        """In a trial, one person is all silos: all answer what `allow_questions` says,
        about the rows that the function `tables` brings, see `site.Site`."""
        from fl_helpers.cross_silo.on_premises.questions import allow_questions

        for name, own in self.sites.items():
            self.configure(own.silo, tables=tables)
            allow_questions(self.kits / name, **rules)

    def configure(self, silo: str, **settings: Any) -> None:
        """Change some of a silo's own settings, see `site.Site`, for the next run."""
        kit = self.kits / site.site_name(silo)
        site.write_site(kit, replace(site.read_site(kit), **settings))

    def precheck(self, silo: str, run: Run) -> list[dict[str, Any]]:
        """Let a silo check itself for a run, see `precheck.precheck`."""
        from fl_helpers.cross_silo.on_premises import job, precheck

        silos = [each.silo for each in self.sites.values()]
        asked = job.write_job(run, self.folder / "jobs", silos) / "app" / job.CONFIG
        return precheck.precheck(self.kits / site.site_name(silo), run=asked)

    def account(self, silo: str) -> SiloAccount:
        """What a silo has spent of its privacy budget, from the file in its own kit."""
        from fl_helpers.cross_silo.account import SiloAccount
        from fl_helpers.privacy import Budget

        kit = self.kits / site.site_name(silo)
        own = site.read_site(kit)
        budget = Budget(own.epsilon, own.delta)
        return SiloAccount(kit / site.ACCOUNT, budget, silo=silo)

    def kill_worker(self, silo: str) -> None:
        """Kill the process that trains at a silo, as an accident would."""
        kit = str(self.kits / site.site_name(silo))
        for process in self.own_processes():
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if kit in line and "worker_process" in line:
                    process.kill()

    def sweep(self) -> None:
        """Kill whatever carries this fleet's mark."""
        found = self.own_processes()
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=3)

    def own_processes(self) -> list[psutil.Process]:
        """All processes that carry this fleet's mark, workers included."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == str(self.folder):
                    found.append(process)
        return found

    def _lock(self) -> None:
        """One fleet per folder: a second one would sweep the first one's processes."""
        self.logs.mkdir(exist_ok=True)
        self.lock = (self.logs / "lock").open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.close()
            raise RunError(
                f"another fleet runs in {self.folder}; stop it, or name another folder"
            ) from None

    def _link_code(self) -> None:
        """A folder with nothing but a link to this package, for the import path."""
        link = self.folder / "code" / "fl_helpers"
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(Path(__file__).resolve().parents[2])

    def _environment(self, kit: Path) -> dict[str, str]:
        """Nothing of ours but the search path and the language."""
        (kit / "tmp").mkdir(exist_ok=True)
        kept = {k: v for k, v in os.environ.items() if k in ("LANG", "PATH")}
        return kept | {
            MARK: str(self.folder),
            "HOME": str(kit),
            "TMPDIR": str(kit / "tmp"),
            "PYTHONPATH": str(self.folder / "code"),
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "2",
        }

    def _check_alive(self, *names: str) -> None:
        for who in names:
            code = self.processes[who].poll() if who in self.processes else "unknown"
            if code is not None:
                raise RunError(f"{who} ended with code {code}\n{self._log_end(who)}")

    def _log_end(self, who: str, lines: int = 15) -> str:
        path = self.logs / f"{who}.log"
        text = path.read_text(errors="replace") if path.exists() else ""
        return "\n".join([f"last lines of {path}:", *text.splitlines()[-lines:]])

    def _new_session(self) -> Any:
        os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # or it prints a lot
        from nvflare.fuel.flare_api.flare_api import new_secure_session

        logging.getLogger("nvflare").setLevel(logging.CRITICAL)
        with contextlib.redirect_stdout(None):
            kit = str(self.kits / "admin")
            return new_secure_session(self.server.admin, kit, timeout=20)

    def _close_session(self) -> None:
        session, self.session = self.session, None
        with contextlib.suppress(Exception):
            session.close()

    @contextlib.contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[step] = round(time.monotonic() - started, 2)
