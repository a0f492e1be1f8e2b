"""Certificates and start-up kits, from one readable file (`silos.yaml`).

The coordinator provisions once and hands each hospital its own kit over a safe channel.
NVFlare's provisioner makes the certificates; this file checks the input, moves the
authority's private key away from the kits, and sets each kit's policy.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fl_helpers.on_premises.site import (
    Site,
    harden_server,
    harden_site,
    site_name,
)

PATTERNS = {  # what the certificates and the engine can take
    "project": r"[A-Za-z0-9][A-Za-z0-9_-]{0,40}",
    "organisation": r"[A-Za-z0-9_]{1,60}",
    "admin": r"[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[A-Za-z]{2,}",
    "host": r"[A-Za-z0-9]([A-Za-z0-9.-]{0,60}[A-Za-z0-9])?",
    "name": r"[A-Za-z0-9][A-Za-z0-9 _-]{0,60}",
    "data": r"[^\0]+",
    "client": r"[^:]+:[A-Za-z_]\w*",
}
LOOPBACK = ("localhost", "127.0.0.1")


@dataclass(frozen=True)
class SiloEntry:
    """One hospital: its name in all results, the organisation in its certificate, and
    where its data are on its own machine."""

    name: str
    organisation: str
    data: str


@dataclass(frozen=True)
class Federation:
    """Who takes part: the content of a `silos.yaml`, with absolute paths.

    client: the hospitals' function, see `executor.load_client`.
    """

    project: str
    organisation: str
    admin: str
    host: str
    port: int
    client: str
    silos: tuple[SiloEntry, ...]


def read_silos(path: str | Path) -> Federation:
    """Read and check a `silos.yaml`.

    Raises ValueError that names the file and the key for anything missing, unknown,
    ill-formed or used twice.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is not YAML: {error}") from None
    top = _Section(content, path.name, "", "project coordinator server client silos")
    coordinator = top.section("coordinator", "organisation admin")
    server = top.section("server", "host port")
    entries = content["silos"]
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path.name}: silos must be a list with at least one entry")
    silos = []
    for index, entry in enumerate(entries):
        keys = "name organisation data"
        section = _Section(entry, path.name, f"silos[{index}].", keys)
        data = str(path.parent.resolve() / section.text("data"))
        silos.append(
            SiloEntry(section.text("name"), section.text("organisation"), data)
        )
    _check_names([silo.name for silo in silos], path.name)
    client = top.text("client")
    if client.split(":")[0].endswith(".py"):
        client = str(path.parent.resolve() / client)
    return Federation(
        project=top.text("project"),
        organisation=coordinator.text("organisation"),
        admin=coordinator.text("admin"),
        host=server.text("host"),
        port=server.port(),
        client=client,
        silos=tuple(silos),
    )


def provision(federation: Federation, folder: str | Path) -> Path:
    """Make certificates and one start-up kit for each participant.

    folder: where to; must be ignored by git, for kits hold private keys. Afterwards
    `folder/kits/` holds `server`, `admin` and one kit per hospital, each with its
    policy (`site.harden_site`), and `folder/authority/` the key that signs
    certificates: take it off this machine; it is needed only to add a hospital.
    Returns the folder of the kits. Raises ValueError for a folder that git would
    take, FileExistsError if it holds kits already.
    """
    folder = Path(folder).resolve()
    kits, authority = folder / "kits", folder / "authority"
    if kits.exists():
        raise FileExistsError(f"{kits} exists; delete it, or name another folder")
    _refuse_folder_in_git(folder)
    authority.mkdir(parents=True, exist_ok=True)
    authority.chmod(0o700)
    made = _run_provisioner(federation, authority)
    kits.mkdir(mode=0o700)
    shutil.move(made / federation.host, kits / "server")
    shutil.move(made / federation.admin, kits / "admin")
    harden_server(kits / "server")
    for silo in federation.silos:
        kit = kits / site_name(silo.name)
        shutil.move(made / kit.name, kit)
        harden_site(kit, Site(silo.name, silo.data, federation.client))
    for path in [*kits.rglob("*"), *authority.rglob("*")]:
        path.chmod(0o700 if path.is_dir() or path.suffix == ".sh" else 0o600)
    return kits


def set_port(kits: str | Path, port: int) -> None:
    """Let all kits of a trial on one machine use another port of the server."""
    for path in Path(kits).glob("*/startup/fed_*.json"):
        content = json.loads(path.read_text())
        for server in content.get("servers", []):
            host = server["service"]["target"].rpartition(":")[0]
            server["service"]["target"] = f"{host}:{port}"
            if "admin_port" in server:
                server["admin_port"] = port
        if "admin" in content:
            content["admin"]["port"] = port
        path.write_text(json.dumps(content, indent=2))


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run_provisioner(federation: Federation, workspace: Path) -> Path:
    """Let NVFlare write the kits; returns the folder that it put them in."""
    from nvflare.lighter.provision import prepare_builders, prepare_project
    from nvflare.lighter.provisioner import Provisioner

    project = _nvflare_project(federation)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        provisioner = Provisioner(str(workspace), prepare_builders(project))
        result = provisioner.provision(prepare_project(project), mode="normal")
    if result.get("build_error"):
        raise RuntimeError(f"provisioning failed: {said.getvalue()[-1500:]}")
    return Path(result["current_prod_dir"])


def _nvflare_project(federation: Federation) -> dict[str, Any]:
    server = {"name": federation.host, "type": "server"}
    server |= {
        "org": federation.organisation,
        "fed_learn_port": federation.port or 8002,
    }
    admin = {"name": federation.admin, "type": "admin"}
    admin |= {"org": federation.organisation, "role": "project_admin"}
    silos = [
        {"name": site_name(silo.name), "type": "client", "org": silo.organisation}
        for silo in federation.silos
    ]
    builders = [
        ("workspace.WorkspaceBuilder", {"template_file": ["master_template.yml"]}),
        (
            "static_file.StaticFileBuilder",
            {"config_folder": "config", "scheme": "grpc"},
        ),
        ("cert.CertBuilder", {}),
        ("signature.SignatureBuilder", {}),
    ]
    return {
        "api_version": 3,
        "name": federation.project,
        "description": federation.project,
        "participants": [server, *silos, admin],
        "builders": [
            {"path": f"nvflare.lighter.impl.{path}", "args": args}
            for path, args in builders
        ],
    }


class _Section:
    """A mapping of the file, whose errors name the key."""

    def __init__(self, content: Any, file: str, prefix: str, keys: str) -> None:
        self.content, self.file, self.prefix = content, file, prefix
        if not isinstance(content, Mapping):
            where = prefix.rstrip(".") or "the file"
            raise ValueError(f"{file}: {where} must have the keys {keys.split()}")
        for key in sorted(set(keys.split()) - set(content)):
            raise ValueError(f"{file}: {prefix}{key} is missing")
        for key in sorted(map(str, set(content) - set(keys.split()))):
            raise ValueError(
                f"{file}: {prefix}{key} is not a known key; known: {keys.split()}"
            )

    def section(self, key: str, keys: str) -> _Section:
        return _Section(self.content[key], self.file, f"{self.prefix}{key}.", keys)

    def text(self, key: str) -> str:
        value = self.content[key]
        if not isinstance(value, str) or not re.fullmatch(PATTERNS[key], value):
            raise ValueError(
                f"{self.file}: {self.prefix}{key} must match {PATTERNS[key]}, "
                f"got {value!r}"
            )
        return value

    def port(self) -> int:
        port, host = self.content["port"], self.content["host"]
        if not isinstance(port, int) or isinstance(port, bool) or not 0 <= port < 65536:
            raise ValueError(
                f"{self.file}: {self.prefix}port must be 0 to 65535, got {port!r}"
            )
        if port == 0 and host not in LOOPBACK:
            raise ValueError(
                f"{self.file}: {self.prefix}port 0 (any) is for localhost only; "
                f"hospitals that connect to {host!r} need a fixed one"
            )
        return port


def _check_names(names: list[str], file: str) -> None:
    sites = [site_name(name).lower() for name in names]
    for index, site in enumerate(sites):
        if site in ("server", "admin", "localhost"):
            raise ValueError(f"{file}: silos[{index}].name {site!r} is reserved")
        if site in sites[:index]:
            raise ValueError(
                f"{file}: silos[{index}].name {names[index]!r} is used twice"
            )


def _refuse_folder_in_git(folder: Path) -> None:
    """Private keys must not be committed: inside a repository, git must ignore them."""
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    with contextlib.suppress(FileNotFoundError):  # no git, no repository
        command = ["git", "-C", str(existing), "check-ignore", "-q"]
        code = subprocess.run([*command, str(folder / "kits")], capture_output=True)
        if code.returncode == 1:  # 0: ignored, 128: not a repository
            raise ValueError(
                f"{folder} would be taken by git, but kits hold private keys; "
                "choose a folder below runs/"
            )
