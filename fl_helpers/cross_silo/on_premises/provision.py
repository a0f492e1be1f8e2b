"""Certificates and start-up kits, from one readable file (`silos.yaml`).

The coordinator provisions once and hands each hospital its own kit over a safe channel.
NVFlare's provisioner makes the certificates; this file checks the input, moves the
authority's private key away from the kits, and sets each kit's policy.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fl_helpers.cross_silo.on_premises.site import Site, harden_server, harden_site

LOOPBACK = ("localhost", "127.0.0.1")
SHAPES = {  # each key of the file, and what the certificates and the engine can take
    "project": r"[A-Za-z0-9][\w-]{0,40}",
    "silos[].name": r"[A-Za-z0-9][\w -]{0,60}",
    "silos[].on_premises.organisation": r"\w{1,60}",
    "silos[].on_premises.data": r".+",
    "on_premises.organisation": r"\w{1,60}",
    "on_premises.admin": r"[\w.%+-]+@[A-Za-z0-9.-]+\.[A-Za-z]{2,}",
    "on_premises.host": r"[A-Za-z0-9]([A-Za-z0-9.-]{0,60}[A-Za-z0-9])?",
    "on_premises.port": r"\d{1,5}",
    "on_premises.client": r"[^:]+:[A-Za-z_]\w*",
}
OTHERS = re.compile(r"(silos\[\d+\]\.)?azure_ml\b.*")  # another engine's sections


@dataclass(frozen=True)
class Federation:
    """Who takes part: the content of a `silos.yaml`, with absolute paths."""

    project: str
    organisation: str
    admin: str
    host: str
    port: int
    sites: tuple[Site, ...]


def read_silos(path: str | Path) -> Federation:
    """Read and check a `silos.yaml`.

    Raises ValueError that names the file and the key for anything missing, unknown,
    ill-formed or used twice.
    """
    path, here = Path(path), Path(path).parent.resolve()
    try:
        found = dict(_leaves(yaml.safe_load(path.read_text(encoding="utf-8"))))
        found = {k: v for k, v in found.items() if not OTHERS.fullmatch(k)}
        count = _check(found)
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is not YAML: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    client = found["on_premises.client"]
    if client.split(":")[0].endswith(".py"):
        client = str(here / client)
    sites = []
    for k in range(count):
        own = f"silos[{k}].on_premises."
        place = str(here / found[f"{own}data"])
        silo, owner = found[f"silos[{k}].name"], found[f"{own}organisation"]
        sites.append(Site(silo, owner, place, client))
    keys = ("organisation", "admin", "host", "port")
    own = {key: found[f"on_premises.{key}"] for key in keys}
    return Federation(project=found["project"], **own, sites=tuple(sites))


def provision(federation: Federation, folder: str | Path) -> Path:
    """Make certificates and one start-up kit for each participant.

    folder: where to; must be ignored by git, for kits hold private keys. Afterwards
    `folder/kits/` holds `server`, `admin` and one kit per hospital, each with its
    policy, and `folder/authority/` the key that signs certificates: take it off this
    machine; it is needed only to add a hospital. Returns the folder of the kits.
    Raises ValueError for a folder that git would take, FileExistsError if it holds
    kits already.
    """
    folder = Path(folder).resolve()
    kits, authority = folder / "kits", folder / "authority"
    if kits.exists():
        raise FileExistsError(f"{kits} exists; delete it, or name another folder")
    _refuse_folder_in_git(folder)
    authority.mkdir(parents=True, exist_ok=True, mode=0o700)
    made = _run_provisioner(federation, authority)
    kits.mkdir(mode=0o700)
    shutil.move(made / federation.host, kits / "server")
    shutil.move(made / federation.admin, kits / "admin")
    harden_server(kits / "server")
    for site in federation.sites:
        shutil.move(made / site.name, kits / site.name)
        harden_site(kits / site.name, site)
    for path in [*kits.rglob("*"), *authority.rglob("*")]:
        path.chmod(0o700 if path.is_dir() or path.suffix == ".sh" else 0o600)
    return kits


def set_port(kits: Path, port: int) -> None:
    """Let all kits of a trial on one machine use another port of the server."""
    before = re.compile(rf'("port": |"admin_port": |(?:{"|".join(LOOPBACK)}):)\d+')
    for path in kits.glob("*/startup/fed_*.json"):
        path.write_text(before.sub(rf"\g<1>{port}", path.read_text()))


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run_provisioner(federation: Federation, workspace: Path) -> Path:
    """Let NVFlare write the kits; returns the folder that it put them in."""
    from nvflare.lighter.provision import prepare_builders, prepare_project
    from nvflare.lighter.provisioner import Provisioner

    owner = {"org": federation.organisation}
    server = {"name": federation.host, "type": "server", **owner}
    server["fed_learn_port"] = federation.port or 8002  # 0: a fleet sets it later
    admin = {"name": federation.admin, "type": "admin", "role": "project_admin"}
    clients = [
        {"name": site.name, "type": "client", "org": site.organisation}
        for site in federation.sites
    ]
    settings = {"config_folder": "config", "scheme": "grpc"}
    builders = {
        "workspace.WorkspaceBuilder": {"template_file": ["master_template.yml"]},
        "static_file.StaticFileBuilder": settings,
        "cert.CertBuilder": {},
        "signature.SignatureBuilder": {},
    }
    project = {
        "api_version": 3,
        "name": federation.project,
        "participants": [server, *clients, admin | owner],
        "builders": [
            {"path": f"nvflare.lighter.impl.{path}", "args": args}
            for path, args in builders.items()
        ],
    }
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        provisioner = Provisioner(str(workspace), prepare_builders(project))
        result = provisioner.provision(prepare_project(project), mode="normal")
    if result.get("build_error"):
        raise RuntimeError(f"provisioning failed: {said.getvalue()[-1500:]}")
    return Path(result["current_prod_dir"])


def _leaves(content: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Values of nested lists and mappings, by keys such as "silos[1].name"."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    elif isinstance(content, list):
        for index, value in enumerate(content):
            yield from _leaves(value, f"{key}[{index}]")
    else:
        yield key, content


def _check(found: dict[str, Any]) -> int:
    """Check keys and values; returns the number of silos."""
    numbers = [int(n) for n in re.findall(r"silos\[(\d+)\]", " ".join(found))]
    count = max(numbers, default=0) + 1
    wanted = {k.replace("[]", f"[{n}]") for k in SHAPES for n in range(count)}
    for key in sorted(wanted - found.keys()):
        raise ValueError(f"{key} is missing")
    for key, value in found.items():
        if key not in wanted:
            raise ValueError(f"{key} is not a known key; known: {', '.join(SHAPES)}")
        shape = SHAPES[re.sub(r"\[\d+\]", "[]", key)]
        kind = int if key == "on_premises.port" else str
        if type(value) is not kind or not re.fullmatch(shape, str(value), re.ASCII):
            raise ValueError(f"{key} must match {shape}, got {value!r}")
    host, port = found["on_premises.host"], found["on_premises.port"]
    if port > 65535:
        raise ValueError(f"on_premises.port must be 0 to 65535, got {port}")
    if port == 0 and host not in LOOPBACK:
        raise ValueError("on_premises.port 0 (any) is for localhost only; choose one")
    seen = ["server", "admin", "localhost"]
    for k in range(count):
        name = found[f"silos[{k}].name"]
        if (site := name.replace(" ", "-").lower()) in seen:
            raise ValueError(f"silos[{k}].name {name!r} is reserved or used twice")
        seen.append(site)
    return count


def _refuse_folder_in_git(folder: Path) -> None:
    """Private keys must not be committed: inside a repository, git must ignore them."""
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    command = ["git", "-C", str(existing), "check-ignore", "-q", str(folder / "kits")]
    with contextlib.suppress(FileNotFoundError):  # no git, no repository
        code = subprocess.run(command, capture_output=True).returncode
        if code == 1:  # 0: ignored, 128: not a repository
            raise ValueError(
                f"{folder} would be taken by git, but kits hold private keys; "
                "choose a folder below runs/"
            )
