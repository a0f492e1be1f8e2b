"""How a silo's worker, the process that trains in a run, is started and ended.

It is started again if it dies, and it ends when the one that started it ends. This file
imports no torch, so that the process that only waits for runs stays small.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import threading
import time
from collections.abc import Mapping
from typing import Any

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_launcher_spec import JobHandleSpec, JobReturnCode
from nvflare.app_common.job_launcher.client_process_launcher import (
    ClientProcessJobLauncher,
)
from nvflare.utils.job_launcher_utils import get_credential_env

from fl_helpers.cross_silo.on_premises.site import read_site

PARENT = "FL_PARENT"  # environment variable of a worker: the process that started it


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

    def launch_job(self, job_meta: dict[str, Any], fl_ctx: FLContext) -> JobHandleSpec:
        kit = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_root_dir()
        given = fl_ctx.get_prop(FLContextKey.JOB_PROCESS_ARGS) or {}
        command = shlex.split(self.get_command(job_meta, fl_ctx))
        environment = os.environ | get_credential_env(given)
        environment |= {PARENT: str(os.getpid())}
        return Worker(command, environment, read_site(kit).relaunches)


class Worker(JobHandleSpec):
    """A worker process; over when it ends by itself, is stopped, or has died too often.

    Its death is not reported: the run goes on without this silo.
    """

    def __init__(
        self, command: list[str], environment: Mapping[str, str], relaunches: int
    ) -> None:
        self.command, self.environment = command, environment
        self.left, self.stopped = relaunches, False
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command, env=self.environment, stdin=subprocess.DEVNULL
        )

    def terminate(self) -> None:
        self.stopped = True
        self.process.kill()

    def poll(self) -> JobReturnCode:
        codes = {0: JobReturnCode.SUCCESS, 9: JobReturnCode.ABORTED}
        return codes.get(self.process.poll(), JobReturnCode.UNKNOWN)

    def wait(self) -> None:
        while self.process.wait() not in (0, 9) and not self.stopped and self.left > 0:
            self.left -= 1
            time.sleep(1.0)
            if not self.stopped:
                self.process = self._start()
