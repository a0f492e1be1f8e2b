"""A hospital's own settings and policy, in the `local/` folder of its kit.

They belong to the hospital: a run can neither bring code nor change them. This file
imports no torch, so that the process that only waits for runs stays small.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = "fl_helpers.cross_silo.on_premises"
ACCOUNT = "privacy/account.jsonl"  # of a kit, for `cross_silo.account`
CONTROLLERS = (  # of a plain run, of a secure one
    f"{HERE}.controller.RoundController",
    f"{HERE}.secure_controller.SecureController",
)
ANALYSES = (  # likewise, of an analysis
    f"{HERE}.analyses.QuestionController",
    f"{HERE}.secure_questions.SecureQuestionController",
)
ANSWERS = f"{HERE}.analyses.QuestionExecutor"  # at a hospital that allows questions
CLASSES = (f"{HERE}.executor.SiteExecutor",)  # that a job may name at a hospital
SERVER_CLASSES = (*CONTROLLERS, *ANALYSES)  # that one may name at the server
CONFIG = "config"  # not the engine's own setting: some kits' start.sh leave it empty
INITIAL, RUN = "initial.safetensors", "run.json"  # in it, at the server and all silos
FILES = (INITIAL, RUN, "config_fed_client.json", "config_fed_server.json")
LINE = {  # of what travels; the engine's own are for 25 Gbit/s, see its stream_const.py
    "streaming_chunk_size": 2**18,  # bytes; what is sent again if it is lost
    "streaming_window_size": 2**20,  # bytes on their way at once
    "streaming_ack_interval": 2**18,
    "streaming_reliable": True,  # updates, too, not only models
    "streaming_retry_wait": 20,  # seconds: more than a window at a megabit per second
    "streaming_retry_timeout": 120,  # seconds of a cut, then a transfer begins anew
    "streaming_ack_progress_timeout": 120,
    "grpc": {
        "options": [  # the first two are the engine's own
            ["grpc.max_send_message_length", 2**31 - 2**21],
            ["grpc.max_receive_message_length", 2**31 - 2**21],
            # By default 60 s without an answer: then the server hangs up, and the
            # silo's side does not notice and never connects again.
            ["grpc.http2.ping_timeout_ms", 900_000],
            ["grpc.keepalive_timeout_ms", 900_000],
        ]
    },
}
VERSION = 2  # of what `harden_site` writes; 1 named classes in fl_helpers.on_premises


class Damaged(ValueError):
    """A file of a kit cannot be read; the message says which, and what to do."""

    code = "KIT_DAMAGED"  # all that leaves a hospital of it


@dataclass(frozen=True)
class Site:
    """A hospital's own settings, `local/site.json` in its kit.

    silo: its name in all results. organisation: in its certificate. data: the place of
    its data, given to its client function. client: "module:function" or
    "/path/to/file.py:function", see `client.load_client`. relaunches: how often a
    worker that died is started again within an hour; 0 is never. tables: the function
    that brings its rows to an analysis, named like client; "" is none. epsilon, delta:
    its privacy budget, for a client function that trains with one; no run can change
    it. network: whether client may use the network, to ask a data base say.
    """

    silo: str
    organisation: str
    data: str
    client: str
    relaunches: int = 2
    tables: str = ""
    epsilon: float | None = None
    delta: float | None = None
    network: bool = False

    @property
    def name(self) -> str:
        """As the engine can take it."""
        return site_name(self.silo)


def site_name(silo: str) -> str:
    """As the engine can take a silo's name: "Hospital A" is site "Hospital-A"."""
    return silo.replace(" ", "-")


def read_site(kit: str | Path) -> Site:
    """The silo's settings; ValueError for those of a kit that was hardened before, or
    that is damaged. TypeError for keys that are missing or not known.
    """
    path = Path(kit) / "local" / "site.json"
    found = read_local(kit, path.name)
    if (version := found.pop("version", 1)) != VERSION:
        raise Damaged(
            f"{path} is of version {version}, this code takes {VERSION}: harden the "
            "kit again with `harden_site`, see docs/on-premises.md, A new version"
        )
    return Site(**found)


def write_site(kit: str | Path, site: Site) -> None:
    """Write the silo's settings into its kit."""
    write_local(kit, "site.json", {"version": VERSION, **asdict(site)})


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
        "class_allow_list": list(CLASSES),
        "app_validator": {"path": f"{HERE}.validator.JobValidator", "args": {}},
        "allow_log_streaming": False,
        "client": {"retry_timeout": 30},
        "components": [
            _component("resource_manager", f"{manager}.GPUResourceManager", no_gpu),
            _component("resource_consumer", f"{consumer}.GPUResourceConsumer"),
            _component("process_launcher", f"{HERE}.worker.RelaunchLauncher"),
            _component("site_guard", f"{HERE}.guards.SiteGuard"),
        ],
    }
    gate = {"path": f"{HERE}.gate.EgressGate", "args": {}}
    scope = {"name": "federated_learning", "task_result_filters": [gate]}
    scopes = {"scopes": [scope], "default_scope": scope["name"]}
    write_local(kit, "resources.json", resources)
    write_local(kit, "comm_config.json", LINE)
    write_local(kit, "authorization.json", _authorization(admin_role))
    write_local(kit, "privacy.json", scopes)
    write_site(kit, site)


def confirm(
    kit: str | Path,
    fingerprints: Mapping[str, str] | None = None,
    *,
    independent: bool = False,
) -> None:
    """Whose certificates a hospital believes in secure runs, `local/peers.json`.

    fingerprints: {silo: SHA-256 of its certificate, as `secure.fingerprint` or
    `openssl x509 -fingerprint -sha256` shows it}, its own too, compared by telephone.
    independent: the authority's key is not in the coordinator's hands, so that it
    vouches for those that are not listed.
    """
    peers = {"confirmed": dict(fingerprints or {}), "independent": independent}
    write_local(kit, "peers.json", peers)


def harden_server(kit: str | Path, *, admin_role: str = "project_admin") -> None:
    """Write the server's policy into its kit: our controller only, the guard, and
    stores of its own (by default all servers of a machine share one); admin_role as in
    `harden_site`."""
    kit = Path(kit).resolve()
    resources = json.loads((kit / "local" / "resources.json.default").read_text())
    resources["class_allow_list"] = list(SERVER_CLASSES)
    resources["servers"][0]["heart_beat_timeout"] = 30  # seconds; by default 600
    storage = resources["snapshot_persistor"]["args"]["storage"]
    storage["args"]["root_dir"] = str(kit / "snapshots")
    for component in resources["components"]:
        if component["id"] == "job_manager":
            component["args"]["uri_root"] = str(kit / "jobs")
    resources["components"] += [_component("hub_guard", f"{HERE}.guards.HubGuard")]
    write_local(kit, "resources.json", resources)
    write_local(kit, "comm_config.json", LINE)
    write_local(kit, "authorization.json", _authorization(admin_role))


def write_local(kit: str | Path, name: str, content: Any) -> None:
    """Write one of the files of a kit's `local/` folder."""
    path = Path(kit) / "local" / name
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_local(kit: str | Path, name: str) -> dict[str, Any]:
    """One of the files of a kit's `local/` folder; Damaged if it cannot be read."""
    path = Path(kit) / "local" / name
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        reason = "it must be a JSON object"
    except (OSError, ValueError) as error:
        reason = str(error)
    raise Damaged(
        f"{path} is missing or damaged ({reason}): bring it back from a backup, or "
        "harden the kit again, docs/on-premises.md, Kits"
    )


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
