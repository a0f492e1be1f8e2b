"""Secure aggregation: the orchestrator learns the sum of the silos' updates, no more.

For teaching, and not audited: in production use an engine's. The protocol of Bonawitz
et al. 2017 (section 4), against an orchestrator that follows it and only looks. Left
out: signed keys (it could pose as silos), and the silos' agreement on who dropped out
(it could tell them different things). Each two silos share a mask that one adds and the
other subtracts; a mask of its own covers a silo whose update comes late; Shamir shares
of what is behind both let any `threshold` silos clear up after a dropout. Needs numpy,
torch and cryptography: copy this file on its own.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import x25519
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor

PRIME = 2**521 - 1  # the field of the shares; secrets have 256 bits
SHARE_BYTES = 66
FRACTION_BITS = 20  # of the 32 of a value: steps of 1e-6, up to 1,024 either way
PrivateKey = x25519.X25519PrivateKey
Vector = np.ndarray  # uint32 [values]; sums and differences wrap around at 2^32


class Hello(NamedTuple):
    """What a silo tells all others: two public keys, and a hash of its own secret."""

    masking_key: bytes
    sharing_key: bytes
    commitment: bytes


class Participant:
    """One silo's side of one aggregation; every round takes new ones. Only what its
    steps `hello`, `share`, `mask` and `reveal` return goes to the orchestrator; the
    last three happen once: a second `share` would use keys again, and the difference of
    two `mask` is that of the vectors."""

    def __init__(self, name: str, threshold: int) -> None:
        self.name, self.threshold = name, threshold
        self._masking = PrivateKey.generate()
        self._sharing = PrivateKey.generate()
        self._own_seed = secrets.token_bytes(32)
        self._hellos: dict[str, Hello] = {}
        self._held: dict[str, tuple[bytes, bytes]] = {}
        self._steps = ["share", "mask", "reveal"]  # still to come

    def hello(self) -> Hello:
        commitment = hashlib.sha256(self._own_seed).digest()
        return Hello(public(self._masking), public(self._sharing), commitment)

    def share(self, hellos: Mapping[str, Hello]) -> dict[str, bytes]:
        """Shares of both secrets, {receiver: ciphertext that only it can read}."""
        names, t = sorted(hellos), self.threshold
        if not max(3, len(names) // 2 + 1) <= t <= len(names):
            raise ValueError(
                f"threshold must be 3 or more (the sum of two tells each the other's) "
                f"and more than half of the {len(names)} silos, got {t}"
            )
        self._begin("share")
        self._hellos = dict(hellos)
        keys = split(self._masking.private_bytes_raw(), len(names), t)
        seeds = split(self._own_seed, len(names), t)
        return {
            name: self._box(self.name, name).encrypt(bytes(12), key + seed, None)
            for name, key, seed in zip(names, keys, seeds, strict=True)
        }

    def mask(self, vector: Vector, inbox: Mapping[str, bytes]) -> Vector:
        """The vector plus masks. inbox: {sender: ciphertext}; the others are gone."""
        self._begin("mask")
        for sender, ciphertext in inbox.items():
            try:
                both = self._box(sender, self.name).decrypt(bytes(12), ciphertext, None)
            except InvalidTag:
                changed = f"the share from {sender!r} to {self.name!r} was changed"
                raise ValueError(f"{changed} on its way; play it again") from None
            self._held[sender] = both[:SHARE_BYTES], both[SHARE_BYTES:]
        masked = add_mask(vector, self._own_seed)
        for peer in self._held.keys() - {self.name}:
            seed = pair_seed(self._masking, self._hellos[peer].masking_key)
            masked = add_mask(masked, seed, plus=self.name < peer)
        return masked

    def reveal(
        self, survivors: Collection[str], dropped: Collection[str]
    ) -> dict[str, bytes]:
        """One share for each silo: of its own mask if it survived, of its key if it
        dropped out. Never both: together they would uncover its update."""
        if set(survivors) & set(dropped):
            raise ValueError(f"silo {self.name!r} reveals one secret of each, not both")
        if len(self._held.keys() & set(survivors)) < self.threshold:
            few = f"{len(survivors)} silos are left, {self.threshold} are needed"
            raise ValueError(f"{few}: silo {self.name!r} reveals nothing; start again")
        self._begin("reveal")
        seeds = {name: self._held[name][1] for name in survivors}
        return seeds | {name: self._held[name][0] for name in dropped}

    def _begin(self, step: str) -> None:
        if self._steps[:1] != [step]:
            raise ValueError(
                f"silo {self.name!r} is asked to {step}, but each step happens once, in"
                f" order, and {self._steps} are left; start again with new participants"
            )
        self._steps.pop(0)

    def _box(self, sender: str, receiver: str) -> ChaCha20Poly1305:
        """Encryption from one silo to another; a key per direction, used once."""
        peer = self._hellos[receiver if sender == self.name else sender]
        info = f"share {sender!r} {receiver!r}".encode()
        return ChaCha20Poly1305(pair_seed(self._sharing, peer.sharing_key, info))


def unmask(
    masked: Mapping[str, Vector],
    hellos: Mapping[str, Hello],
    revealed: Mapping[str, Mapping[str, bytes]],
    threshold: int,
) -> Vector:
    """The orchestrator's step: the sum of the vectors behind `masked`, and no more.
    revealed: {silo: what its `reveal` returned}; hellos: of all that shared. Raises
    ValueError if too few revealed, or shares do not give back what a silo announced."""
    if len(revealed) < threshold:
        raise ValueError(f"{len(revealed)} silos revealed, {threshold} are needed")
    place = {name: k + 1 for k, name in enumerate(sorted(hellos))}
    total = np.sum(list(masked.values()), axis=0, dtype=np.uint32)
    for name in hellos:
        secret = join({place[by]: revealed[by][name] for by in [*revealed][:threshold]})
        if name in masked:
            genuine = hashlib.sha256(secret).digest() == hellos[name].commitment
            total = add_mask(total, secret, plus=False)
        else:
            key = PrivateKey.from_private_bytes(secret)
            genuine = public(key) == hellos[name].masking_key
            for peer in masked:  # take back what each added for the one that is gone
                seed = pair_seed(key, hellos[peer].masking_key)
                total = add_mask(total, seed, plus=name < peer)
        if not genuine:
            raise ValueError(
                f"the shares for silo {name!r} do not give back what it announced: a "
                "silo changed one; play the round again"
            )
    return total


class Aggregation(NamedTuple):
    """The sum, what the orchestrator saw of each silo, and the bytes that each sent."""

    total: Vector
    masked: dict[str, Vector]
    bytes_up: dict[str, int]


def secure_sum(
    vectors: Mapping[str, Vector], *, threshold: int, dropped: Collection[str] = ()
) -> Aggregation:
    """Play the whole protocol in one process. vectors: {silo: uint32 [values]}.
    dropped: silos that fail after they shared secrets and before they send, the hard
    case. Raises ValueError if fewer than threshold are left."""
    silos = {name: Participant(name, threshold) for name in sorted(vectors)}
    hellos = {name: silo.hello() for name, silo in silos.items()}
    sent = {name: silo.share(hellos) for name, silo in silos.items()}
    alive = [name for name in silos if name not in dropped]
    inbox = {name: {by: boxes[name] for by, boxes in sent.items()} for name in silos}
    masked = {name: silos[name].mask(vectors[name], inbox[name]) for name in alive}
    gone = sorted(silos.keys() - masked.keys())
    revealed = {name: silos[name].reveal(alive, gone) for name in alive}
    total = unmask(masked, hellos, revealed, threshold)
    size = {
        name: sum(map(len, [*hellos[name], *sent[name].values()])) for name in silos
    }
    for name in alive:
        size[name] += masked[name].nbytes + sum(map(len, revealed[name].values()))
    return Aggregation(total, masked, size)


def secure_average(
    updates: Iterable[Any], *, threshold: int, dropped: Collection[str] = ()
) -> dict[str, Tensor]:
    """`weighted_average` by `secure_sum`, of those that did not drop. updates: with
    silo, params (see `encode`), and num_examples, which stays visible. Off by at most
    2^-21 times the number of silos left, over their share of all examples. Raises
    ValueError as `weighted_average` does, and as `encode`."""
    updates = _checked(updates)
    total = sum(update.num_examples for update in updates)
    shares = {update.silo: update.num_examples / total for update in updates}
    vectors = {u.silo: encode(u.params, shares[u.silo], silo=u.silo) for u in updates}
    found = secure_sum(vectors, threshold=threshold, dropped=dropped)
    weight = sum(shares[name] for name in found.masked)
    return decode(found.total, updates[0].params, weight)


def _checked(updates: Iterable[Any]) -> list[Any]:
    """The updates, of which each is from another silo, counts, and fits the first."""
    found, first = {}, None
    for update in updates:
        name, n = update.silo, update.num_examples
        if name in found:
            raise ValueError(f"silo {name!r} sent two updates; one per round counts")
        if isinstance(n, bool) or not 0 < n < math.inf:
            raise ValueError(
                f"silo {name!r} reports num_examples={n}; it must be a finite number > "
                "0: leave a silo without training data out of the round"
            )
        own = {k: (v.shape, v.dtype) for k, v in update.params.items()}
        first = own if first is None else first
        differ = sorted(k for k in own | first if own.get(k) != first.get(k))
        if differ:
            raise ValueError(
                f"silo {name!r} sent another model: name, shape or dtype of "
                f"{differ[:3]}; all silos must train the same architecture"
            )
        found[name] = update
    if not found:
        raise ValueError("no updates to average; at least one silo must take part")
    return list(found.values())


def encode(params: Mapping[str, Tensor], share: float, *, silo: str) -> Vector:
    """Params times share in steps of 2^-20, modulo 2^32, by name; sums cannot overflow
    if shares sum to 1. Raises ValueError for whole numbers and values from 1,024 on."""
    whole = [k for k, v in params.items() if not v.is_floating_point()]
    flat = torch.cat([params[k].detach().double().flatten() for k in sorted(params)])
    limit = 2 ** (30 - FRACTION_BITS)
    if whole or not bool((flat.abs() < limit).all()):
        raise ValueError(
            f"silo {silo!r} has whole-number entries {whole[:3]} or a value of "
            f"{flat.abs().max().item():.3g}; only floating ones below {limit} can be "
            "summed: use a model without BatchNorm"
        )
    return (flat * share * 2**FRACTION_BITS).round().long().numpy().astype(np.uint32)


def decode(
    total: Vector, like: Mapping[str, Tensor], weight: float
) -> dict[str, Tensor]:
    """Undo `encode` of a sum. like: names, shapes and dtypes; weight: sum of shares."""
    flat = torch.from_numpy(total.astype(np.int32).astype(float))
    names = sorted(like)
    parts = (flat / (2**FRACTION_BITS * weight)).split([like[k].numel() for k in names])
    values = dict(zip(names, parts, strict=True))
    return {k: values[k].reshape(v.shape).to(v.dtype) for k, v in like.items()}


def add_mask(vector: Vector, seed: bytes, *, plus: bool = True) -> Vector:
    """Vector plus or minus a keystream: uniform for who does not know the seed."""
    cipher = Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor()
    stream = np.frombuffer(cipher.update(bytes(4 * len(vector))), "<u4")
    return vector + stream if plus else vector - stream


def public(key: PrivateKey) -> bytes:
    """The public half of a key."""
    return key.public_key().public_bytes_raw()


def pair_seed(own: PrivateKey, peer: bytes, info: bytes = b"mask") -> bytes:
    """32 bytes that only the holders of the two private keys can compute."""
    shared = own.exchange(x25519.X25519PublicKey.from_public_bytes(peer))
    return HKDF(SHA256(), 32, salt=None, info=info).derive(shared)


def split(secret: bytes, shares: int, threshold: int) -> list[bytes]:
    """Points 1..shares of a random polynomial of degree threshold - 1 that is the
    secret at 0 (Shamir 1979)."""
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    points = [0] * shares
    for coefficient in [*coefficients, int.from_bytes(secret, "big")]:
        points = [(y * (k + 1) + coefficient) % PRIME for k, y in enumerate(points)]
    return [y.to_bytes(SHARE_BYTES, "big") for y in points]


def join(shares: Mapping[int, bytes]) -> bytes:
    """The secret of {point: share}, by Lagrange interpolation at 0."""
    secret = 0
    for x, share in shares.items():
        top, bottom = int.from_bytes(share, "big"), 1
        for other in shares.keys() - {x}:
            top, bottom = top * other % PRIME, bottom * (other - x) % PRIME
        secret += top * pow(bottom, -1, PRIME)
    return (secret % PRIME % 2**256).to_bytes(32, "big")
