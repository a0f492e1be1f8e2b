"""What the pre-check looks at in a kit, of the connection and of the machine.

A check takes the kit's folder and returns whether it is ok (None: for somebody to
judge), what was found and, if it is not ok, what to do. It changes nothing. Of the
data it looks at the files' rights only.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import subprocess
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path

import psutil
import torch
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from fl_helpers.cross_silo import sandbox
from fl_helpers.cross_silo.on_premises import gate, site
from fl_helpers.cross_silo.on_premises.certificates import (
    certificate_problems,
    certificates,
)
from fl_helpers.cross_silo.run import SMALLEST_SET
from fl_helpers.cross_silo.secure import fingerprint

Verdict = tuple[bool | None, str, str]
GIB = 2**30
GUIDE = "docs/on-premises.md"
KINDS = {"fed_client.json": "hospital", "fed_server.json": "server"}
KINDS |= {"fed_admin.json": "admin"}
SETTINGS_FRAME = 4  # with which HTTP/2, and so gRPC, answers (RFC 9113, 6.5)
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
VERIFY = {  # OpenSSL's codes for a certificate of the server that is not accepted
    9: "is not valid yet: is this machine's clock right?",
    10: "has ended: telephone the coordinator",
    62: "is of another name: is the address in the kit right?",
    64: "is of another address: the kit must have the server's name",
}


def kind_of(kit: Path) -> str:
    """Whose kit it is: "hospital", "server" or "admin"; ValueError for no kit."""
    for name, kind in KINDS.items():
        if (kit / "startup" / name).exists():
            return kind
    raise ValueError(
        f"{kit} is no start-up kit: it has no startup/fed_client.json; give the folder "
        "that holds startup/ and local/"
    )


# ---- the kit


def _user(kit: Path) -> Verdict:
    if os.geteuid() == 0:
        said = "you are root, who may read and change everything"
        return None, said, "run it as the service's user: runuser -u fl -- ..."
    return True, "an ordinary user of this machine", ""


def _dates(kit: Path) -> Verdict:
    now = datetime.now(timezone.utc)
    if problems := certificate_problems(kit, now=now):
        try:
            valid = all(c.not_before <= now <= c.not_after for c in certificates(kit))
        except (ValueError, OSError):  # one that cannot be read is a problem, above
            valid = False
        remedy = f"renew it, {GUIDE}, Renewal; or set the clock, if that is wrong"
        return None if valid else False, "; ".join(problems), remedy
    end = min(c.not_after for c in certificates(kit))
    return True, f"valid until {end:%Y-%m-%d}", ""


def _chain(kit: Path) -> Verdict:
    own, root = (_certificate(kit, name) for name in (_own(kit), "rootCA.pem"))
    remedy = f"put back the files of one and the same kit, {GUIDE}, Kits"
    try:
        own.verify_directly_issued_by(root)
    except (ValueError, TypeError, InvalidSignature):
        said = "the certificate was not signed by this federation's authority"
        return False, said, remedy
    key = load_pem_private_key(_key_file(kit).read_bytes(), None).public_key()
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    if key.public_bytes(*form) != own.public_key().public_bytes(*form):
        return False, "the key is not the one of this certificate", remedy
    return True, "signed by this federation's authority, with this key", ""


def _identity(kit: Path) -> Verdict:
    """Whom the certificate names, against the settings."""
    names = {a.oid: str(a.value) for a in _certificate(kit, _own(kit)).subject}
    oids = x509.NameOID.COMMON_NAME, x509.NameOID.ORGANIZATION_NAME
    found = tuple(names.get(oid) for oid in oids)
    if kind_of(kit) == "server":
        wanted = (_address(kit)[0], found[1])
    else:
        settings = site.read_site(kit)
        wanted = (settings.name, settings.organisation)
    if found != wanted:
        said = f"the certificate is of {found}, the settings say {wanted}"
        remedy = "correct silo and organisation in local/site.json, or use your own kit"
        return False, said, remedy
    return True, f"the certificate is of {found[0]}", ""


def _key(kit: Path) -> Verdict:
    found = _key_file(kit).stat()
    lent = found.st_uid == 0 != os.geteuid()  # root's, and read by our group only
    if found.st_mode & (0o037 if lent else 0o077):
        said = "other users of this machine can read or change the private key"
        remedy = "if it may have been copied, ask for a new kit"
        return False, said, f"chmod 600 startup/{_key_file(kit).name}; {remedy}"
    return True, "nobody else on this machine can read it", ""


def _policy(kit: Path) -> Verdict:
    """Whether the kit was hardened, as `site.harden_site` and `harden_server` do."""
    if kind_of(kit) == "server":
        found = json.loads((kit / "local" / "resources.json").read_text())
        parts = {part["path"] for part in found["components"]}
        ok = found.get("class_allow_list") == list(site.SERVER_CLASSES)
        ok, how = ok and f"{site.HERE}.guards.HubGuard" in parts, "harden_server"
    else:
        found, how = gate.explain_policy(kit), "harden_site"
        trains = ", ".join(site.CLASSES)
        answers = f"{trains}, {site.ANSWERS}"  # if the hospital allows questions
        ok = (
            found["who may bring code"] == "nobody"
            and found["which class may answer"] in (trains, answers)
            and found["what every result passes"] == f"{site.HERE}.gate.EgressGate"
            and found["what every message passes"] == f"{site.HERE}.guards.SiteGuard"
        )
    if not ok:
        remedy = f"run site.{how}, {GUIDE}, Kits; start no kit without it"
        return False, "it is weaker than the one that this project writes", remedy
    return True, "runs bring no code, and results pass the gate", ""


def _policy_rights(kit: Path) -> Verdict:
    if os.statvfs(kit / "local").f_flag & os.ST_RDONLY:
        return True, "it is mounted read-only", ""
    paths = [kit / "local", *(kit / "local").iterdir()]
    remedy = f"chown root:fl and chmod as in {GUIDE}, The hospital's page"
    if any(path.stat().st_mode & 0o022 for path in paths):
        return False, "other users than its owner can change it", remedy
    if any(path.stat().st_uid == kit.stat().st_uid for path in paths):
        said = "the user that runs the service can change it"
        return None, said, f"{remedy}; in a trial leave it"
    return True, "the user that runs the service cannot change it", ""


def _settings(kit: Path) -> Verdict:
    found = site.read_site(kit)
    said = f"silo {found.silo!r}, data in {found.data}, function {found.client}"
    return True, said, ""


def _data_rights(kit: Path) -> Verdict:
    """There, readable by this user, and by nobody who does not need it."""
    data = Path(site.read_site(kit).data)
    if not data.exists():
        remedy = "put the data there, or correct `data` in local/site.json"
        return False, f"there is no {data}", remedy
    some = islice(data.rglob("*"), 10_000)
    if closed := sum(not os.access(path, os.R_OK) for path in (data, *some)):
        remedy = f"chgrp -R fl and chmod -R g+rX on it, {GUIDE}, The hospital's page"
        return False, f"this user cannot read {closed} of its files", remedy
    ways = all(folder.stat().st_mode & 0o001 for folder in data.parents)
    if ways and data.stat().st_mode & 0o004:
        return None, "every user of this machine can read it", "chmod -R o= on it"
    return True, "this user can read it, other users cannot", ""


def confirmed(kit: Path, *, needed: bool | None = None) -> Verdict:
    """Whose certificates are believed in secure sums, `local/peers.json`.

    needed: None is whether updates, or answers, leave this kit in secure sums only.
    """
    if needed is None:
        files = (kit / "local" / name for name in ("egress.json", "questions.json"))
        rules = [json.loads(path.read_text()) for path in files if path.exists()]
        needed = any(each.get("secure") for each in rules)
    path = kit / "local" / "peers.json"
    known = site.read_local(kit, path.name) if path.exists() else {}
    others = {**known.get("confirmed", {})}
    own = others.pop(site.read_site(kit).silo, None)
    mine = fingerprint((kit / "startup" / _own(kit)).read_bytes())
    remedy = f"compare all fingerprints by telephone, then site.confirm, {GUIDE}"
    if not needed:
        return True, "not asked for: this kit is not set to secure sums only", ""
    if own not in (None, mine):
        said = "the own certificate is another than the one that is confirmed here"
        return False, said, f"was it renewed? {remedy}"
    if known.get("independent"):
        return True, "the authority vouches for all; it is not the coordinator's", ""
    if own is None or len(others) < SMALLEST_SET - 1:
        said = f"{len(others)} certificates of others, own: {own is not None}"
        return False, f"{said}; no secure sum will be answered", remedy
    return True, f"{len(others)} certificates of others, and the own one", ""


# ---- the connection


def _name(kit: Path) -> Verdict:
    host, _ = _address(kit)
    try:
        found = sorted({a[4][0] for a in socket.getaddrinfo(host, None)})
    except OSError:
        remedy = "add it to /etc/hosts or to your DNS; ask the coordinator for the name"
        return False, f"{host} has no address", remedy
    return True, f"{host} is {', '.join(found)}", ""


def _connection(kit: Path) -> Verdict:
    """A real TLS handshake with the kit's certificate; only a greeting is sent."""
    host, port = _address(kit)
    where = f"{host} port {port}"
    context = ssl.create_default_context(cafile=kit / "startup" / "rootCA.pem")
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # NVFlare's root is not strict
    context.load_cert_chain(kit / "startup" / _own(kit), _key_file(kit))
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), timeout=10) as raw,
            context.wrap_socket(raw, server_hostname=host) as tls,
        ):
            tls.sendall(HELLO)
            answer = tls.recv(9)
    except OSError as error:
        if kind_of(kit) == "server" and isinstance(error, ConnectionRefusedError):
            return None, f"nothing listens at {where} yet", "start the server"
        return False, *_refused(error, where)
    if answer[3:4] != bytes([SETTINGS_FRAME]):
        remedy = "is it the right port? A proxy that opens TLS must let it through"
        return False, f"what answers at {where} is not the federation's", remedy
    return True, f"{where} answers, and both certificates are accepted", ""


def _refused(error: OSError, where: str) -> tuple[str, str]:
    """What was found and what to do, of an error of a connection."""
    if isinstance(error, ssl.SSLCertVerificationError):
        if why := VERIFY.get(error.verify_code):
            return f"the certificate of {where} {why}", f"{GUIDE}, Operations"
        remedy = "is it the right server? A proxy that opens TLS must let it through"
        return f"{where} is not of this federation's authority", remedy
    if isinstance(error, ssl.SSLError):
        remedy = "has your certificate ended? Telephone the coordinator"
        return f"{where} does not accept this kit ({error.reason})", remedy
    if isinstance(error, ConnectionRefusedError):
        remedy = "is the server started? Ask the coordinator for the port"
        return f"nothing listens at {where}", remedy
    if isinstance(error, socket.gaierror):
        return f"{where} has no address", "see the server's name, above"
    remedy = f"open this port outbound in your firewall, {GUIDE}, Firewall"
    return f"no answer from {where} ({type(error).__name__})", remedy


def _clock(kit: Path) -> Verdict:
    """The server's answer has no time, so only what this machine says of itself."""
    now = f"this machine says {datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
    command = ["timedatectl", "show", "-p", "NTPSynchronized", "--value"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
        kept = done.stdout.strip() == "yes"
    except (OSError, subprocess.TimeoutExpired):
        kept = False
    if kept:
        return True, f"kept right by a time server; {now}", ""
    remedy = "compare it by telephone: a minute does not matter, an hour does"
    said = f"not compared with the server's, which does not say its time; {now}"
    return None, said, remedy


# ---- the machine


def _sandbox(kit: Path) -> Verdict:
    if (kind := sandbox.available_sandbox()) == "none":
        return False, "none works", "install bubblewrap, or a Linux of 5.13 or later"
    return True, kind, ""


def _disk(kit: Path) -> Verdict:
    free, need = shutil.disk_usage(kit).free, GIB + 20 * _model_bytes(kit)
    said = f"{free / GIB:.1f} GiB free, {need / GIB:.1f} are needed"
    if free < need:
        return False, said, "delete old runs, or move the kit to a larger disk"
    return True, said, ""


def _memory(kit: Path) -> Verdict:
    free = psutil.virtual_memory().available
    need = GIB + 8 * _model_bytes(kit)  # Python with torch twice, and copies of a model
    said = f"{free / GIB:.1f} GiB free, {need / GIB:.1f} are needed without the data"
    if free < need:
        return False, said, "end other programs, or take a larger machine"
    return True, said, ""


def _gpu(kit: Path) -> Verdict:
    if torch.cuda.is_available():
        return True, torch.cuda.get_device_name(0), ""
    if Path("/dev/nvidia0").exists():
        remedy = "install a torch that fits to its driver"
        return None, "there is one, and this torch cannot use it", remedy
    return None, "none: training takes the CPU", ""


ALL = {"user": _user, "certificate dates": _dates, "certificate chain": _chain}
ALL |= {"private key": _key, "server's name": _name, "connection": _connection}
ALL |= {"clock": _clock}
HARDENED = {"identity": _identity, "policy": _policy, "sandbox": _sandbox}
HARDENED |= {"policy is protected": _policy_rights}
HARDENED |= {"free disk": _disk, "memory": _memory}
OWN = {"own settings": _settings, "data folder": _data_rights, "GPU": _gpu}
OWN |= {"confirmed certificates": confirmed}
CHECKS = {"admin": ALL, "server": ALL | HARDENED, "hospital": ALL | HARDENED | OWN}


# ---- the kit's files


def _own(kit: Path) -> str:
    return "server.crt" if kind_of(kit) == "server" else "client.crt"


def _key_file(kit: Path) -> Path:
    return (kit / "startup" / _own(kit)).with_suffix(".key")


def _certificate(kit: Path, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((kit / "startup" / name).read_bytes())


def _address(kit: Path) -> tuple[str, int]:
    """The server's name and port, as the kit has them."""
    name = next(n for n, kind in KINDS.items() if kind == kind_of(kit))
    found = json.loads((kit / "startup" / name).read_text())
    if kind_of(kit) == "admin":
        return found["admin"]["host"], int(found["admin"]["port"])
    host, _, port = found["servers"][0]["service"]["target"].rpartition(":")
    return host, int(port)


def _model_bytes(kit: Path) -> int:
    """Of the model that was agreed to; 0 before that, and at the coordinator."""
    try:
        return sum(v.nbytes for v in gate.read_policy(kit).expected.values())
    except Exception:  # another row says so
        return 0
