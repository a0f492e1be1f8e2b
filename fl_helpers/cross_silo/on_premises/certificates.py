"""Until when a kit's certificates are valid, in plain words.

The engine drops a connection with an expired certificate, or one of a clock that is
wrong, without a line in any log. So each process says it when it starts, and
`python -m fl_helpers.cross_silo.on_premises.certificates kit` says it at any time.
This file imports no torch, so that the process that only waits for runs stays small.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509

AHEAD = timedelta(days=30)  # of the end of a certificate, that it is said
SOON, DAY = 3, 86_400  # seconds


@dataclass(frozen=True)
class Certificate:
    """One certificate of a kit. path: of its file. subject, issuer: common names.
    not_before, not_after: when it is valid, in UTC."""

    path: Path
    subject: str
    issuer: str
    not_before: datetime
    not_after: datetime


def certificates(kit: str | Path) -> list[Certificate]:
    """Those in the `startup/` folder of a kit: its own and the authority's.

    Raises ValueError that names the file for one that cannot be read, FileNotFoundError
    if there is none.
    """
    startup = Path(kit) / "startup"
    paths = sorted([*startup.glob("*.crt"), *startup.glob("*.pem")])
    if not paths:
        raise FileNotFoundError(
            f"{startup} has no certificate: is {kit} a start-up kit? Unpack it again"
        )
    return [_read(path) for path in paths]


def certificate_problems(kit: str | Path, *, now: datetime | None = None) -> list[str]:
    """What is wrong with a kit's certificates, a line each; empty if all is well.

    now: with a time zone; None is this machine's clock. A certificate that ends within
    30 days is a line, too.
    """
    now = now or datetime.now(timezone.utc)
    try:
        found = certificates(kit)
    except (ValueError, OSError) as error:
        return [str(error)]
    return [line for certificate in found if (line := _problem(certificate, now))]


def watch(kit: str | Path, say: Callable[[str], None], *, wait: float = SOON) -> None:
    """Say what is wrong soon, when the process has its log, and then every day.

    wait: seconds before that.
    """

    def look() -> None:
        for line in certificate_problems(kit):
            say(line)
        watch(kit, say, wait=DAY)

    timer = threading.Timer(wait, look)
    timer.daemon = True
    timer.start()


def _read(path: Path) -> Certificate:
    try:
        found = x509.load_pem_x509_certificate(path.read_bytes())
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as a certificate ({error}): copy it again from the "
            "kit as it was handed over, or renew it, docs/on-premises.md, Renewal"
        ) from None
    dates = found.not_valid_before_utc, found.not_valid_after_utc
    return Certificate(path, _name(found.subject), _name(found.issuer), *dates)


def _name(name: x509.Name) -> str:
    found = name.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return str(found[0].value) if found else name.rfc4514_string()


def _problem(certificate: Certificate, now: datetime) -> str:
    """A sentence with both dates, for whoever has to decide which of them is wrong."""
    who = f"{certificate.path} (of {certificate.subject})"
    start, end = certificate.not_before, certificate.not_after
    clock = f"this machine's clock says {_date(now)}"
    if now < start:
        return (
            f"{who} is valid from {_date(start)} only, and {clock}: set the clock "
            "(`timedatectl`); until then all connections are refused"
        )
    if now > end:
        return (
            f"{who} ended on {_date(end)}, and {clock}: if the clock is right, renew "
            "it, docs/on-premises.md, Renewal; until then all connections are refused"
        )
    if now > end - AHEAD:
        return (
            f"{who} ends on {_date(end)}, in {(end - now).days} days: renew it before, "
            "docs/on-premises.md, Renewal"
        )
    return ""


def _date(time: datetime) -> str:
    return f"{time.astimezone(timezone.utc):%Y-%m-%d %H:%M} UTC"


def main() -> int:
    """Print the problems of the kits on the command line; 1 if there are any."""
    found = [line for kit in sys.argv[1:] for line in certificate_problems(kit)]
    print("\n".join(found) or "all certificates are valid for 30 days or more")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
