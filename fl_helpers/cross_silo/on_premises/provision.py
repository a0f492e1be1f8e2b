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
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from fl_helpers.cross_silo.federation import LOOPBACK, Federation
from fl_helpers.cross_silo.on_premises.site import (
    Site,
    confirm,
    harden_server,
    harden_site,
)

if TYPE_CHECKING:
    from fl_helpers.silos import Silo


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
    shutil.move(made / federation.on_premises.host, kits / "server")
    shutil.move(made / federation.on_premises.admin, kits / "admin")
    harden_server(kits / "server")
    for site in sites_of(federation):
        shutil.move(made / site.name, kits / site.name)
        harden_site(kits / site.name, site)
    if federation.on_premises.host in LOOPBACK:
        _confirm_all(federation, kits)
    for path in [*kits.rglob("*"), *authority.rglob("*")]:
        path.chmod(0o700 if path.is_dir() or path.suffix == ".sh" else 0o600)
    return kits


def _confirm_all(federation: Federation, kits: Path) -> None:
    """In a trial on one machine, one person is all hospitals, and confirms for all."""
    from fl_helpers.cross_silo.secure import fingerprint

    sites = sites_of(federation)
    paths = {site.silo: kits / site.name / "startup" / "client.crt" for site in sites}
    found = {silo: fingerprint(path.read_bytes()) for silo, path in paths.items()}
    for site in sites:
        confirm(kits / site.name, found)


def write_trial(folder: str | Path, silos: Iterable[Silo], *, client: str) -> Path:
    """Write a `silos.yaml` for a trial on this machine, and each silo's data beside it.

    folder: is made anew; the trial that was in it is lost. client: see
    `turn.load_client`. Returns the path of the file. Raises ValueError for a folder
    with anything else in it.
    """
    from fl_helpers.cross_silo.hospital import save_silo

    folder = Path(folder).resolve()
    if folder.exists() and any(folder.iterdir()):
        if not (folder / "silos.yaml").exists():
            raise ValueError(f"{folder} has other content than a trial; name another")
        shutil.rmtree(folder)
    text = f"""\
project: trial
on_premises: {{organisation: coordinator, admin: admin@coordinator.org,
              host: localhost, port: 0, client: "{client}"}}
silos:
"""
    for silo in silos:
        short = re.sub(r"\W", "_", silo.name)
        save_silo(silo, folder / "data" / short)
        own = f"{{organisation: {short}, data: data/{short}}}"
        text += f"  - {{name: {silo.name}, on_premises: {own}}}\n"
    path = folder / "silos.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def sites_of(federation: Federation) -> list[Site]:
    """The settings that each silo's kit begins with.

    Raises ValueError for a federation without the section `on_premises`.
    """
    if federation.on_premises is None:
        raise ValueError("silos.yaml has no section on_premises; this engine needs it")
    client = federation.on_premises.client
    return [
        Site(silo.name, silo.on_premises.organisation, silo.on_premises.data, client)
        for silo in federation.silos
    ]


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

    own = federation.on_premises
    owner = {"org": own.organisation}
    server = {"name": own.host, "type": "server", **owner}
    server["fed_learn_port"] = own.port or 8002  # 0: a fleet sets it later
    admin = {"name": own.admin, "type": "admin", "role": "project_admin"}
    clients = [
        {"name": site.name, "type": "client", "org": site.organisation}
        for site in sites_of(federation)
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
