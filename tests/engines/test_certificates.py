"""Dates of certificates, said before the engine drops a connection without a word."""

import re
from datetime import datetime, timedelta, timezone

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from fl_helpers.cross_silo.on_premises import certificates

START = datetime(2020, 3, 1, 12, tzinfo=timezone.utc)
END = datetime(2021, 3, 1, 12, tzinfo=timezone.utc)


def write_certificate(path, name="Hospital-A", start=START, end=END):
    """A certificate that signs itself: only its dates and names are looked at."""
    key = ec.generate_private_key(ec.SECP256R1())
    own = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    made = x509.CertificateBuilder(own, own, key.public_key(), 4711, start, end)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(made.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))


@pytest.fixture
def kit(tmp_path):
    write_certificate(tmp_path / "startup" / "client.crt")
    late = START + timedelta(days=36_500)
    write_certificate(tmp_path / "startup" / "rootCA.pem", "authority", end=late)
    return tmp_path


def test_certificates_of_a_kit(kit):
    own, root = certificates.certificates(kit)
    path = kit / "startup" / "client.crt"
    names = ("Hospital-A", "Hospital-A")
    assert own == certificates.Certificate(path, *names, START, END)
    assert root.subject == "authority"


@pytest.mark.parametrize(
    "now, said",
    [
        (START, []),
        (END - timedelta(days=31), []),
        (END - timedelta(days=29, hours=1), ["ends on 2021-03-01 12:00 UTC, in 29 d"]),
        (
            END + timedelta(minutes=1),
            ["ended on 2021-03-01 12:00 .* says 2021-03-01 1"],
        ),
        # Both are not valid yet: the authority's begins at the same time.
        (START - timedelta(days=1), ["valid from 2020-03-01 .* says 2020-02-29"] * 2),
    ],
)
def test_what_is_wrong_is_said_with_both_dates(kit, now, said):
    found = certificates.certificate_problems(kit, now=now)
    assert len(found) == len(said)
    for line, pattern in zip(found, said, strict=True):
        assert re.search(pattern, line), line
        assert str(kit / "startup") in line


def test_files_that_are_no_certificates_are_named(kit):
    path = kit / "startup" / "client.crt"
    path.write_bytes(path.read_bytes()[:200])
    (line,) = certificates.certificate_problems(kit, now=START)
    assert str(path) in line and "copy it again" in line
    (line,) = certificates.certificate_problems(kit / "nothing")
    assert "has no certificate" in line


def test_the_command_says_all_kits_and_gives_a_code(kit, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["certificates", str(kit)])
    write_certificate(kit / "startup" / "client.crt", end=START + timedelta(days=1))
    assert certificates.main() == 1
    assert "ended on 2020-03-02" in capsys.readouterr().out


def test_a_process_says_it_at_the_start_and_every_day(kit, monkeypatch):
    waits, said = [], []

    class Timer:
        def __init__(self, seconds, look):
            waits.append(seconds)
            self.look = look

        def start(self):
            assert self.daemon
            if len(waits) < 4:
                self.look()

    monkeypatch.setattr(certificates.threading, "Timer", Timer)
    write_certificate(kit / "startup" / "client.crt", end=START + timedelta(days=1))
    certificates.watch(kit, said.append)
    day = 24 * 3600
    assert waits == [certificates.SOON, day, day, day] and len(said) == 3
