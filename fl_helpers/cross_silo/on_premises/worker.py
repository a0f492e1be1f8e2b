"""How a silo's worker, the process that trains in a run, is started and ended.

It is started again if it dies, and it ends when the one that started it ends. This file
imports no torch, so that the process that only waits for runs stays small.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey
from nvflare.apis.job_launcher_spec import JobHandleSpec, JobReturnCode
from nvflare.app_common.job_launcher.client_process_launcher import (
    ClientProcessJobLauncher,
)
from nvflare.utils.job_launcher_utils import get_credential_env

from fl_helpers.cross_silo.on_premises import certificates
from fl_helpers.cross_silo.on_premises.site import read_site

PARENT = "FL_PARENT"  # environment variable of a worker: the process that started it
HOUR = 3600  # seconds
JOB = "[0-9a-f]" * 8 + "-*-*-*-*"  # folders of jobs, as the engine names them


def end_with_parent() -> None:
    """End this process soon after the one that started it, however that one ended.

    A worker is told who that is: when it asks, its parent may be gone already.
    """
    parent = int(os.environ.get(PARENT, os.getppid()))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


class RelaunchLauncher(ClientProcessJobLauncher):
    """Starts a silo's worker, again if it dies: by itself the engine would fail the run
    of all silos at once."""

    def __init__(self) -> None:
        super().__init__()
        self.workers: dict[str, Worker] = {}
        # Here, for the engine says nothing before it has connected; it is in the kit.
        certificates.watch(Path.cwd(), self.logger.error)

    def launch_job(self, job_meta: dict[str, Any], fl_ctx: FLContext) -> JobHandleSpec:
        kit = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_root_dir()
        job = job_meta[JobMetaKey.JOB_ID.value]
        self.workers = {k: v for k, v in self.workers.items() if not v.over}
        remove_models(kit, {job, *self.workers})
        given = fl_ctx.get_prop(FLContextKey.JOB_PROCESS_ARGS) or {}
        command = shlex.split(self.get_command(job_meta, fl_ctx))
        environment = os.environ | get_credential_env(given)
        environment |= {PARENT: str(os.getpid())}
        self.workers[job] = Worker(command, environment, read_site(kit).relaunches)
        return self.workers[job]


def remove_models(kit: str | Path, running: Collection[str]) -> None:
    """Of jobs that are over, remove what the engine unpacked: a model each. Their logs
    stay."""
    for folder in Path(kit).glob(JOB):
        if folder.name not in running:
            for path in folder.glob("app*/"):
                shutil.rmtree(path, ignore_errors=True)


class Worker(JobHandleSpec):
    """A worker process; over when it ends by itself or is stopped.

    Its death is not reported: the run goes on without this silo until it is started
    again. relaunches: how often that is done within `hour` seconds; then it waits until
    the first of these is so long ago.
    """

    def __init__(
        self,
        command: list[str],
        environment: Mapping[str, str],
        relaunches: int,
        *,
        hour: float = HOUR,
    ) -> None:
        self.command, self.environment = command, environment
        self.relaunches, self.hour = relaunches, hour
        self.restarts: list[float] = []  # when, within the last hour
        self.stopped, self.over = threading.Event(), False
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command, env=self.environment, stdin=subprocess.DEVNULL
        )

    def terminate(self) -> None:
        self.stopped.set()
        self.process.kill()

    def poll(self) -> JobReturnCode:
        codes = {0: JobReturnCode.SUCCESS, 9: JobReturnCode.ABORTED}
        return codes.get(self.process.poll(), JobReturnCode.UNKNOWN)

    def wait(self) -> None:
        while self.process.wait() not in (0, 9) and self.relaunches:
            if self.stopped.wait(self._pause()):
                break
            self.restarts.append(time.monotonic())
            self.process = self._start()
        self.over = True

    def _pause(self) -> float:
        """Seconds before the next start."""
        now = time.monotonic()
        self.restarts = [each for each in self.restarts if each > now - self.hour]
        if len(self.restarts) < self.relaunches:
            return min(1.0, self.hour)
        return self.restarts[0] + self.hour - now
