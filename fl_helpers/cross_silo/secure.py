"""Secure sums in a real run: the orchestrator learns the sum of the silos' updates, or
answers in an analysis, and no silo's own. The whole protocol, without an engine;
`docs/security.md` draws it.

1. *Hello.* For each run a silo makes an X25519 key and signs it with its certificate,
   together with the run's id, the hash of the code and the participants. All others
   verify that against the authority that they have pinned.
2. *Answer.* To a `Question` (round, attempt, set of silos, model) a silo answers with
   its update in fixed point, plus a mask with each other silo of the set, which cancel
   in the sum, plus a mask of its own.
3. *Open.* When all of a set have answered, each tells its own mask. If one is missing,
   none does: a smaller set is announced, and the same update is asked for once more,
   under new masks. A silo opens one attempt of a round and then answers no other, so
   two sets of one round never both become readable, and a late answer stays noise.

All that a question says goes into the masks: silos that were told different things
(another set, model, total) give answers that do not cancel. What a silo has answered
and opened is in its folder, on the disk before it is sent.

Not covered: an orchestrator together with all silos of a set but one; what the sum
itself says, of the difference between rounds too; a silo that lies about its update
or its weight. Pairwise masks as in Bonawitz et al. 2017, section 4; their secret shares
are left out, since whoever drops out is left out by asking again. Not reviewed outside.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, x25519
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fl_helpers.cross_silo.cohorts import subtracts
from fl_helpers.cross_silo.fixed_point import Plain
from fl_helpers.cross_silo.run import SMALLEST_SET

try:
    import fcntl
except ImportError:  # Windows: one process at a time
    fcntl = None

HELLO, ANSWERED, PLAIN = "hello.json", "answered.jsonl", "plain.npz"  # of a run
OPENED = "opened.jsonl"  # of all runs of a silo, one folder above
MAX_HELLO = 20_000  # bytes


class Denied(ValueError):
    """A silo does not answer: what it is asked could reveal an update."""

    code = "SECURE_SUM_DENIED"  # all that leaves the silo of it


@dataclass(frozen=True)
class Question:
    """What the silos of a sum are asked; who was told otherwise adds other masks.

    run: the id of the run. kind: "examples" (how many each has, once), "train",
    "evaluate", or "answer" in an analysis. silos: the set, in order of names. model:
    SHA-256 of the model that was sent, or of what is asked and the form of its answer.
    total: examples of all participants, which weights are shares of.
    """

    run: str
    kind: str
    round: int
    attempt: int
    silos: tuple[str, ...]
    model: str = ""
    total: int = 1

    @classmethod
    def read(cls, content: str) -> Question:
        """From JSON that is not trusted; raises Denied for what is no question."""
        try:
            found = json.loads(content)
            names = found["silos"] if type(found["silos"]) is list else [None]
            asked = cls(**{**found, "silos": tuple(names)})
        except (ValueError, TypeError, KeyError) as error:
            raise Denied(f"this is no question: {error}") from None
        texts = (asked.run, asked.kind, asked.model, *asked.silos)
        whole = (asked.round, asked.attempt, asked.total)
        right = {*map(type, texts)} == {str} and {*map(type, whole)} == {int}
        if not (right and min(whole) >= 0 < asked.total):
            raise Denied(
                "this is no question: a field has another type, or is negative"
            )
        if asked.kind not in ("examples", "train", "evaluate", "answer"):
            raise Denied(f"there is no kind {asked.kind!r} of questions")
        return asked

    def text(self) -> str:
        """The one form in which it travels and goes into the masks."""
        return json.dumps(asdict(self), sort_keys=True)


# -- who is who


@dataclass(frozen=True)
class Identity:
    """A silo's certificate and private key, and whom it believes.

    authority: the certificate that all participants' must be signed by. confirmed:
    {silo: SHA-256 of its certificate}, as told by telephone. independent: the authority
    is not the coordinator's, so that no confirmation is needed.
    """

    certificate: bytes
    key: Any
    authority: x509.Certificate
    confirmed: Mapping[str, str] = field(default_factory=dict)
    independent: bool = False

    def sign(self, content: bytes) -> bytes:
        return self.key.sign(content, *_scheme(self.key))


def read_identity(
    certificate: Path, key: Path, authority: Path, peers: Mapping[str, Any]
) -> Identity:
    """From the PEM files of a kit. peers: `confirmed` and `independent`."""
    secret = serialization.load_pem_private_key(key.read_bytes(), None)
    root = x509.load_pem_x509_certificate(authority.read_bytes())
    return Identity(certificate.read_bytes(), secret, root, **peers)


def fingerprint(certificate: bytes) -> str:
    """SHA-256 of a PEM certificate, as `openssl x509 -fingerprint -sha256` has it."""
    digest = x509.load_pem_x509_certificate(certificate).fingerprint(hashes.SHA256())
    return digest.hex(":").upper()


@cache
def code_hash() -> str:
    """SHA-256 over all Python files of this package."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)} ".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def read_hello(
    content: bytes, silo: str, expected: Mapping[str, Any], identity: Identity
) -> bytes:
    """The masking key of a silo, from what it signed.

    expected: run, code and silos, as this silo has them itself. Raises Denied for a
    hello that is not from that silo, for that run and that code.
    """
    try:
        if len(content) > MAX_HELLO:
            raise ValueError(f"{len(content)} bytes")
        hello = json.loads(content)
        said, pem = hello["said"], hello["certificate"].encode()
        signature, key = bytes.fromhex(hello["signature"]), bytes.fromhex(said["key"])
        certificate = x509.load_pem_x509_certificate(pem)
        x25519.X25519PublicKey.from_public_bytes(key)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Denied(f"what {silo!r} says is no hello: {error}") from None
    _check_certificate(certificate, silo, identity)
    try:
        public = certificate.public_key()
        public.verify(signature, _signed(said), *_scheme(public))
    except InvalidSignature:
        raise Denied(
            f"the key of {silo!r} is not signed with its certificate: it was changed "
            "on its way, or somebody poses as it"
        ) from None
    for name, value in {"silo": silo, **expected}.items():
        if said.get(name) != value:
            raise Denied(
                f"{silo!r} signed another {name}: {str(said.get(name))[:60]!r}, here "
                f"it is {str(value)[:60]!r}; install the same code, start a new run"
            )
    return key


def _check_certificate(
    certificate: x509.Certificate, silo: str, identity: Identity
) -> None:
    try:
        certificate.verify_directly_issued_by(identity.authority)
    except (ValueError, TypeError, InvalidSignature):
        raise Denied(
            f"the certificate of {silo!r} is not from the authority pinned here"
        ) from None
    now = datetime.now(timezone.utc)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise Denied(f"the certificate of {silo!r} is not valid now; renew it")
    names = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    if [name.value for name in names] != [silo.replace(" ", "-")]:
        raise Denied(f"{silo!r} shows the certificate of {names[0].value!r}")
    found = certificate.fingerprint(hashes.SHA256()).hex(":").upper()
    known = identity.confirmed.get(silo)
    if known is None and not identity.independent:
        raise Denied(
            f"the certificate of {silo!r} is not confirmed here, and whoever has the "
            f"authority's key could have made it; compare {found} by telephone, then "
            "`site.confirm` it"
        )
    if known not in (None, found):
        raise Denied(f"the certificate of {silo!r} is {found}, confirmed was {known}")


def _scheme(key: Any) -> tuple[Any, ...]:
    if isinstance(key, rsa.RSAPrivateKey | rsa.RSAPublicKey):
        return padding.PKCS1v15(), hashes.SHA256()
    if isinstance(key, ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey):
        return (ec.ECDSA(hashes.SHA256()),)
    raise Denied(f"certificates have RSA or elliptic keys, not {type(key).__name__}")


def _signed(said: Mapping[str, Any]) -> bytes:
    return b"fl_helpers secure sum 1\n" + json.dumps(said, sort_keys=True).encode()


# -- a silo's side


class Member:
    """A silo's side of the sums of one run.

    folder: the silo's own, for this run alone; it holds keys, and whatever was answered
    is written there first. participants: all silos of the run.
    """

    def __init__(
        self,
        folder: str | Path,
        silo: str,
        run: str,
        participants: Collection[str],
        identity: Identity,
    ) -> None:
        self.folder, self.silo, self.identity = Path(folder), silo, identity
        self.participants = sorted(participants)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.said = {"run": run, "code": code_hash(), "silos": self.participants}
        if silo not in self.participants or len(self.participants) < SMALLEST_SET:
            raise Denied(f"{silo!r} in a run of {self.participants}: at least three")
        self.key, self.secret = self._keys()

    def _keys(self) -> tuple[x25519.X25519PrivateKey, bytes]:
        """Those of this run: made once, on the disk before anybody hears of them."""
        path = self.folder / "keys.json"
        if not path.exists():
            made = {"key": secrets.token_hex(32), "secret": secrets.token_hex(32)}
            _replace(path, json.dumps(made | self.said).encode())
        kept = json.loads(path.read_text())
        for name in ("run", "silos"):
            if kept[name] != self.said[name]:
                raise Denied(f"this run began with another {name}: {kept[name]}")
        raw = bytes.fromhex(kept["key"])
        key = x25519.X25519PrivateKey.from_private_bytes(raw)
        return key, bytes.fromhex(kept["secret"])

    def hello(self) -> bytes:
        """What all others are to be told."""
        key = self.key.public_key().public_bytes_raw().hex()
        said = {"silo": self.silo, "key": key, **self.said}
        signature = self.identity.sign(_signed(said)).hex()
        shown = self.identity.certificate.decode()
        hello = {"said": said, "certificate": shown, "signature": signature}
        return json.dumps(hello).encode()

    def meet(self, hellos: Mapping[str, bytes]) -> None:
        """Verify what all others said, once: later keys of this run are not taken."""
        if sorted(hellos) != self.participants:
            raise Denied(f"hellos of {sorted(hellos)}, the run has {self.participants}")
        keys = {
            name: read_hello(content, name, self.said, self.identity).hex()
            for name, content in hellos.items()
        }
        if keys[self.silo] != self.key.public_key().public_bytes_raw().hex():
            raise Denied(f"somebody poses as {self.silo!r}, with a key not ours")
        path = self.folder / HELLO
        known = json.loads(path.read_text()) if path.exists() else keys
        if changed := sorted(name for name in keys if keys[name] != known[name]):
            raise Denied(f"{changed} come with another key than before, in one run")
        _replace(path, json.dumps(keys).encode())

    def kept(self, asked: Question) -> Plain | None:
        """What was made ready for this round before, or None."""
        path, known = self.folder / f"{asked.kind}_{PLAIN}", self._answered(asked)
        if not path.exists() or not known:
            return None
        with np.load(path, allow_pickle=False) as found:
            plain = Plain(found["weights"], found["numbers"], str(found["update"]))
        return plain if plain.digest() == known[-1]["plain"] else None

    def check(self, asked: Question) -> None:
        """Raises Denied for what must not be answered, before anything is looked at."""
        others = set(asked.silos) - set(self.participants)
        if asked.run != self.said["run"] or others or self.silo not in asked.silos:
            raise Denied(f"this is for {asked.silos} of {asked.run!r}, not for here")
        if len(asked.silos) < SMALLEST_SET or [*asked.silos] != sorted({*asked.silos}):
            raise Denied(
                f"a sum of {len(asked.silos)} silos is refused, the smallest is "
                f"{SMALLEST_SET}: the sum of two tells each of them the other's update"
            )
        log = self._answered(asked, all_rounds=True)
        if any(line["round"] > asked.round for line in log):
            raise Denied(f"round {asked.round} is over, it is not answered again")
        for line in (line for line in log if line["round"] == asked.round):
            known, what = Question(**_fields(line)), f"round {asked.round}"
            if (known.model, known.total) != (asked.model, asked.total):
                raise Denied(f"{what} was answered for another model or question")
            if line["opened"] and asked != known:
                raise Denied(
                    f"{what} was opened for {list(known.silos)}; its update under "
                    f"{list(asked.silos)} could be subtracted"
                )
            if asked.attempt < known.attempt:
                raise Denied(f"attempt {asked.attempt} of {what} is over")
            if asked.attempt == known.attempt and asked != known:
                raise Denied(
                    f"{what}, attempt {asked.attempt} was answered for the set "
                    f"{list(known.silos)}, not for {list(asked.silos)}"
                )

    def answer(self, asked: Question, plain: Plain) -> Plain:
        """The same with all masks; on the disk, before it is returned, that it was."""
        with self._alone():
            return self._answer(asked, plain)

    def _answer(self, asked: Question, plain: Plain) -> Plain:
        self.check(asked)
        digest, before = plain.digest(), self._answered(asked)
        if any(line["plain"] != digest for line in before):
            raise Denied(f"round {asked.round} was answered with another update")
        if not before:
            _replace(self.folder / f"{asked.kind}_{PLAIN}", plain)
        self._check_update(asked, plain.update)
        if not any(Question(**_fields(line)) == asked for line in before):
            about = {"plain": digest, "update": plain.update, "opened": False}
            _append(self.folder / ANSWERED, asdict(asked) | about)
        masked = Plain(plain.weights.copy(), plain.numbers.copy())
        masked.add(self._own_mask(asked))
        for peer in asked.silos:
            if peer != self.silo:
                masked.add(self._pair_mask(peer, asked), plus=self.silo < peer)
        return masked

    def open(self, asked: Question) -> bytes:
        """The own mask of the last answer, once all of its set have given theirs."""
        with self._alone():
            return self._open(asked)

    def _open(self, asked: Question) -> bytes:
        self.check(asked)
        answered = self._answered(asked)
        if not answered or Question(**_fields(answered[-1])) != asked:
            raise Denied(
                f"round {asked.round} is to be opened, but was not answered so"
            )
        update = answered[-1]["update"]
        self._check_update(asked, update)
        if not answered[-1]["opened"]:
            path, silos = self.folder.parent / OPENED, [*asked.silos]
            if [update, silos] not in ([n["update"], n["silos"]] for n in _lines(path)):
                _append(path, {"run": asked.run, "update": update, "silos": silos})
            _append(self.folder / ANSWERED, answered[-1] | {"opened": True})
        return self._own_mask(asked)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process of this silo looks and writes meanwhile: one that is about
        to end may still run when the next one has been started."""
        with (self.folder.parent / "lock").open("a") as file:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _check_update(self, asked: Question, update: str) -> None:
        """Two sums of the very same update, or patients, differ by who is missing."""
        folder, silos = self.folder.parent, [*asked.silos]
        for line in _lines(folder / OPENED) if update else ():
            other = line["silos"] != silos
            if other and (why := subtracts(folder, line["update"], update)):
                raise Denied(
                    f"{why[0]} in the sum of {line['silos']} in run {line['run']}; in "
                    f"one of {silos} it could be subtracted: {why[1]}"
                )

    def _answered(
        self, asked: Question, *, all_rounds: bool = False
    ) -> list[dict[str, Any]]:
        """Lines of the log of this kind of question; of this round only, or of all."""
        lines = [n for n in _lines(self.folder / ANSWERED) if n["kind"] == asked.kind]
        return [n for n in lines if all_rounds or n["round"] == asked.round]

    def _own_mask(self, asked: Question) -> bytes:
        return _derive(self.secret, b"own", asked)

    def _pair_mask(self, peer: str, asked: Question) -> bytes:
        path = self.folder / HELLO
        if not path.exists():
            raise Denied("the participants of this run have not said hello yet")
        public = bytes.fromhex(json.loads(path.read_text())[peer])
        shared = self.key.exchange(x25519.X25519PublicKey.from_public_bytes(public))
        return _derive(shared, b"pair", asked)


def _fields(line: Mapping[str, Any]) -> dict[str, Any]:
    """What of a line of the log is the question."""
    plain = {k: line[k] for k in Question.__dataclass_fields__}
    return plain | {"silos": tuple(plain["silos"])}


def _lines(path: Path) -> list[dict[str, Any]]:
    """Of a log; one that was torn by a kill was never promised to anybody."""
    texts = path.read_text().splitlines() if path.exists() else []
    return [json.loads(text) for text in texts if text.endswith("}")]


def _append(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line to a log; it is on the disk when this returns."""
    new = not path.exists()
    torn = not new and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * torn + json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
    if new:
        _sync(path.parent)


def _derive(secret: bytes, purpose: bytes, asked: Question) -> bytes:
    info = b"fl_helpers secure sum 1 " + purpose + b"\n" + asked.text().encode()
    return HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(secret)


def _replace(path: Path, content: bytes | Plain) -> None:
    """Write a file that only its owner can read; it is whole, or the old one."""
    temporary = path.with_suffix(".tmp")
    with open(
        os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb"
    ) as f:
        if isinstance(content, bytes):
            f.write(content)
        else:
            np.savez(f, **content._asdict())
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """The names in a folder are on the disk, too, not the content of its files only."""
    if hasattr(os, "O_DIRECTORY"):
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(opened)
        os.close(opened)


# -- the orchestrator's side


class Sum:
    """The answers to one question, added up as they come; nothing else is kept."""

    def __init__(self, asked: Question) -> None:
        self.asked, self.total = asked, None
        self.silos: set[str] = set()
        self.opened: dict[str, bytes] = {}

    def add(self, silo: str, masked: Plain) -> None:
        if silo in self.silos or silo not in self.asked.silos:
            raise ValueError(f"no answer of {silo!r} is expected (now)")
        if self.total is None:
            self.total = masked
        else:
            self.total.plus(masked)
        self.silos.add(silo)

    def read(self) -> Plain:
        """Without the silos' own masks; the masks of pairs have cancelled."""
        missing = set(self.asked.silos) - (self.silos & self.opened.keys())
        if missing:
            raise ValueError(f"{sorted(missing)} did not answer and open")
        for silo in self.asked.silos:
            self.total.add(self.opened.pop(silo), plus=False)
        return self.total
