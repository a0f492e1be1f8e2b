"""A hospital's own settings and policy, in the `local/` folder of its kit.

They belong to the hospital: a run can neither bring code nor change them. This file
imports no torch, so that the process that only waits for runs stays small.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_launcher_spec import JobHandleSpec, JobReturnCode
from nvflare.app_common.job_launcher.client_process_launcher import (
    ClientProcessJobLauncher,
)
from nvflare.utils.job_launcher_utils import get_credential_env

HERE = "fl_helpers.cross_silo.on_premises"
PARENT = "FL_PARENT"  # environment variable of a worker: the process that started it


@dataclass(frozen=True)
class Site:
    """A hospital's own settings, `local/site.json` in its kit.

    silo: its name in all results. organisation: in its certificate. data: the place of
    its data, given to its client function. client: "module:function" or
    "/path/to/file.py:function", see `client.load_client`. relaunches: how often a
    worker that died is started again within a run.
    """

    silo: str
    organisation: str
    data: str
    client: str
    relaunches: int = 2

    @property
    def name(self) -> str:
        """As the engine can take it: silo "Hospital A" is site "Hospital-A"."""
        return self.silo.replace(" ", "-")


def read_site(kit: str | Path) -> Site:
    """The hospital's settings; TypeError for keys that are missing or not known."""
    return Site(**json.loads((Path(kit) / "local" / "site.json").read_text()))


def harden_site(
    kit: str | Path, site: Site, *, admin_role: str = "project_admin"
) -> None:
    """Write a hospital's settings and policy into its kit: no code from runs, one
    executor, the gate (`gate.EgressGate`) and the guard.

    admin_role: in the certificate of the coordinator's administrator, who alone may
    start runs; "lead" if it was made with `nvflare cert`. Raises ValueError for a role
    that the engine does not know.
    """
    manager = "nvflare.app_common.resource_managers.gpu_resource_manager"
    consumer = "nvflare.app_common.resource_consumers.gpu_resource_consumer"
    no_gpu = {"num_of_gpus": 0, "mem_per_gpu_in_GiB": 0}
    resources = {
        "format_version": 2,
        "class_list_enforcement_mode": "enforce",
        "class_allow_list": [f"{HERE}.executor.SiteExecutor"],
        "allow_log_streaming": False,
        "client": {"retry_timeout": 30},
        "components": [
            _component("resource_manager", f"{manager}.GPUResourceManager", no_gpu),
            _component("resource_consumer", f"{consumer}.GPUResourceConsumer"),
            _component("process_launcher", f"{HERE}.site.RelaunchLauncher"),
            _component("site_guard", f"{HERE}.guards.SiteGuard"),
        ],
    }
    gate = {"path": f"{HERE}.gate.EgressGate", "args": {}}
    scope = {"name": "federated_learning", "task_result_filters": [gate]}
    scopes = {"scopes": [scope], "default_scope": scope["name"]}
    write_local(kit, "resources.json", resources)
    write_local(kit, "authorization.json", _authorization(admin_role))
    write_local(kit, "privacy.json", scopes)
    write_local(kit, "site.json", asdict(site))


def harden_server(kit: str | Path, *, admin_role: str = "project_admin") -> None:
    """Write the server's policy into its kit: our controller only, the guard, and
    stores of its own (by default all servers of a machine share one); admin_role as in
    `harden_site`."""
    kit = Path(kit).resolve()
    resources = json.loads((kit / "local" / "resources.json.default").read_text())
    resources["class_allow_list"] = [f"{HERE}.controller.RoundController"]
    resources["servers"][0]["heart_beat_timeout"] = 30  # seconds; by default 600
    storage = resources["snapshot_persistor"]["args"]["storage"]
    storage["args"]["root_dir"] = str(kit / "snapshots")
    for component in resources["components"]:
        if component["id"] == "job_manager":
            component["args"]["uri_root"] = str(kit / "jobs")
    resources["components"] += [_component("hub_guard", f"{HERE}.guards.HubGuard")]
    write_local(kit, "resources.json", resources)
    write_local(kit, "authorization.json", _authorization(admin_role))


def write_local(kit: str | Path, name: str, content: Any) -> None:
    """Write one of the files of a kit's `local/` folder."""
    path = Path(kit) / "local" / name
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _component(id: str, path: str, args: Mapping[str, Any] | None = None) -> Any:
    return {"id": id, "path": path, "args": args or {}}


def _authorization(admin_role: str) -> dict[str, Any]:
    """Only the coordinator's administrator acts; nobody brings code or a shell."""
    known = ("project_admin", "org_admin", "lead", "member")
    if admin_role not in known:
        raise ValueError(f"admin_role must be one of {known}, got {admin_role!r}")
    roles = {role: {"view": "any"} for role in known}
    may = ("submit_job", "manage_job", "download_job", "view", "operate")
    never = ("byoc", "clone_job", "shell_commands")
    roles[admin_role] = dict.fromkeys(may, "any") | dict.fromkeys(never, "none")
    return {"format_version": "1.0", "permissions": roles}


class RelaunchLauncher(ClientProcessJobLauncher):
    """Starts a hospital's worker, again if it dies: by itself the engine would fail the
    run of all hospitals at once."""

    def launch_job(self, job_meta: dict[str, Any], fl_ctx: FLContext) -> JobHandleSpec:
        kit = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_root_dir()
        given = fl_ctx.get_prop(FLContextKey.JOB_PROCESS_ARGS) or {}
        command = shlex.split(self.get_command(job_meta, fl_ctx))
        environment = os.environ | get_credential_env(given)
        environment |= {PARENT: str(os.getpid())}
        return Worker(command, environment, read_site(kit).relaunches)


class Worker(JobHandleSpec):
    """A worker process; over when it ends by itself, is stopped, or has died too often.

    Its death is not reported: the run goes on without this hospital.
    """

    def __init__(
        self, command: list[str], environment: Mapping[str, str], relaunches: int
    ) -> None:
        self.command, self.environment = command, environment
        self.left, self.stopped = relaunches, False
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(
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
                self._start()
