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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_launcher_spec import JobHandleSpec, JobReturnCode
from nvflare.app_common.job_launcher.client_process_launcher import (
    ClientProcessJobLauncher,
)
from nvflare.utils.job_launcher_utils import get_credential_env

HERE = "fl_helpers.on_premises"
ADMIN_RIGHTS = ("submit_job", "manage_job", "download_job", "view", "operate")
NEVER = ("byoc", "clone_job", "shell_commands")  # byoc: jobs that carry code
ROLES = ("project_admin", "org_admin", "lead", "member")


@dataclass(frozen=True)
class Site:
    """A hospital's own settings, `local/site.json` in its kit.

    silo: its name in all results. data: what its client function gets as the place of
    its data. client: "module:function" or "/path/to/file.py:function". relaunches:
    how often a worker that died is started again within a run.
    """

    silo: str
    data: str
    client: str
    relaunches: int = 2


def site_name(silo: str) -> str:
    """A silo's name as the engine can take it: "Hospital A" is site "Hospital-A"."""
    return silo.replace(" ", "-")


def read_site(kit: str | Path) -> Site:
    """The hospital's settings; ValueError for keys that are not known."""
    path = Path(kit) / "local" / "site.json"
    try:
        return Site(**json.loads(path.read_text(encoding="utf-8")))
    except TypeError as error:
        raise ValueError(f"{path}: {error}; known keys: {Site.__doc__}") from None


def write_site(kit: str | Path, site: Site) -> None:
    """Set the hospital's settings."""
    write_json(Path(kit) / "local" / "site.json", vars(site))


class RelaunchLauncher(ClientProcessJobLauncher):
    """Starts a hospital's worker, again if it dies: by itself the engine would fail the
    run of all hospitals at once."""

    def launch_job(self, job_meta: dict[str, Any], fl_ctx: FLContext) -> JobHandleSpec:
        kit = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_root_dir()
        given = fl_ctx.get_prop(FLContextKey.JOB_PROCESS_ARGS) or {}
        return _Worker(
            shlex.split(self.get_command(job_meta, fl_ctx)),
            os.environ | get_credential_env(given),
            read_site(kit).relaunches,
        )


class _Worker(JobHandleSpec):
    """A worker process; ended for good if it ends by itself, is stopped, or dies once
    too often."""

    def __init__(
        self, command: list[str], environment: Mapping[str, str], relaunches: int
    ) -> None:
        self.command, self.environment = command, dict(environment)
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
        # Any other death is not reported: the run goes on without this hospital.
        return codes.get(self.process.poll(), JobReturnCode.UNKNOWN)

    def wait(self) -> None:
        while self.process.wait() not in (0, 9) and not self.stopped and self.left > 0:
            self.left -= 1
            time.sleep(1.0)
            if not self.stopped:
                self._start()


def harden_site(kit: str | Path, site: Site) -> None:
    """Write a hospital's policy into its kit: no code from jobs, one executor, the gate
    and the guard; and its own settings, `site`."""
    local = Path(kit) / "local"
    nv = "nvflare.app_common"
    components = {
        "resource_manager": f"{nv}.resource_managers.gpu_resource_manager."
        "GPUResourceManager",
        "resource_consumer": f"{nv}.resource_consumers.gpu_resource_consumer."
        "GPUResourceConsumer",
        "process_launcher": f"{HERE}.site.RelaunchLauncher",
        "site_guard": f"{HERE}.guards.SiteGuard",
    }
    no_gpu = {"num_of_gpus": 0, "mem_per_gpu_in_GiB": 0}
    resources = {
        "format_version": 2,
        "class_list_enforcement_mode": "enforce",
        "class_allow_list": [f"{HERE}.executor.SiteExecutor"],
        "allow_log_streaming": False,
        "client": {"retry_timeout": 30},
        "components": [
            {"id": id, "path": path, "args": no_gpu if id == "resource_manager" else {}}
            for id, path in components.items()
        ],
    }
    write_json(local / "resources.json", resources)
    write_json(local / "authorization.json", _authorization())
    gate = {"path": f"{HERE}.gate.EgressGate", "args": {}}
    scope = {"name": "federated_learning", "task_result_filters": [gate]}
    scopes = {"scopes": [scope], "default_scope": scope["name"]}
    write_json(local / "privacy.json", scopes)
    write_site(kit, site)


def harden_server(kit: str | Path) -> None:
    """Write the server's policy into its kit: our controller only, the guard, and
    stores of its own (by default all servers of a machine share one)."""
    local = Path(kit) / "local"
    resources = json.loads((local / "resources.json.default").read_text())
    resources["class_allow_list"] = [f"{HERE}.controller.RoundController"]
    resources["servers"][0]["heart_beat_timeout"] = 30  # seconds; by default 600
    storage = resources["snapshot_persistor"]["args"]["storage"]["args"]
    storage["root_dir"] = str(Path(kit).resolve() / "snapshots")
    for component in resources["components"]:
        if component["id"] == "job_manager":
            component["args"]["uri_root"] = str(Path(kit).resolve() / "jobs")
    guard = {"id": "hub_guard", "path": f"{HERE}.guards.HubGuard", "args": {}}
    resources["components"].append(guard)
    write_json(local / "resources.json", resources)
    write_json(local / "authorization.json", _authorization())


def _authorization() -> dict[str, Any]:
    """Only the coordinator's administrator acts, and nobody runs code or a shell."""
    admin = dict.fromkeys(ADMIN_RIGHTS, "any") | dict.fromkeys(NEVER, "none")
    roles = {role: {"view": "any"} for role in ROLES} | {"project_admin": admin}
    return {"format_version": "1.0", "permissions": roles}


def write_json(path: Path, content: Any) -> None:
    """Write one of the small files of a kit's `local/` folder."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
