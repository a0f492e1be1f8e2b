"""Numbers as integers that can be masked and added: updates, and answers of analyses.

An update is read again as its average. A value is the change to the model that a round
began with, times the silo's share of all examples, in steps of 2^-22, modulo 2^32. So
the weight of a silo is inside, the sum of integers has the same bits in any order, and
`SecureAverage` is a secure run in a simulation. An answer is read again as the sum of
the answers, see `decode_arrays`.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

from fl_helpers.training import Update

Params = dict[str, Tensor]

FRACTION_BITS = 22  # of the 32 of a value: steps of 2.4e-7, changes below 256
WHOLE_BITS = 8  # of an entry of whole numbers: its changes below 4 million
NUMBER_BITS = 32  # of the 64 of a metric, which must be below a million
ALL = "all silos"  # whose update the sum is
PART_BITS = 53  # of a float64 that one of its words carries
PARTS = {torch.float64: 8, torch.int64: 2}  # words of a number in an answer
LOWEST = 212  # such a word counts steps of 2^-212, or a power of 2^53 times that
MOST_SILOS = 2 ** (63 - PART_BITS) - 1  # whose words add up below 2^63


class Plain(NamedTuple):
    """An update in fixed point: weights uint32 [values], modulo 2^32, and numbers
    uint64 [1 + 2 per metric], modulo 2^64: examples, then value and 1 of each metric.
    update: SHA-256 of the entries that it was made of, "" if there are none.
    """

    weights: np.ndarray
    numbers: np.ndarray
    update: str = ""

    def digest(self) -> str:
        digest = hashlib.sha256(self.weights.data)
        digest.update(self.numbers.data)
        return digest.hexdigest()

    def add(self, key: bytes, *, plus: bool = True) -> None:
        """Add the keystream of a key, or take it away, in place."""
        cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
        for values in (self.weights, self.numbers):
            _add_stream(values, cipher, plus)

    def plus(self, other: Plain) -> None:
        """Add another one, in place."""
        for values, more in zip(self[:2], other[:2], strict=True):
            np.add(values, more, out=values)


def _add_stream(values: np.ndarray, cipher: Any, plus: bool) -> None:
    """Piece by piece: what is in the processor's cache is added soonest."""
    size = 1 << 18  # bytes of a piece
    zeros, stream = bytes(size), bytearray(size + 63)
    per = size // values.itemsize
    for start in range(0, len(values), per):
        part = values[start : start + per]
        cipher.update_into(memoryview(zeros)[: part.nbytes], stream)
        mask = np.frombuffer(stream, values.dtype.newbyteorder("<"), len(part))
        np.add(part, mask, out=part) if plus else np.subtract(part, mask, out=part)


def encode(
    update: Any, start: Mapping[str, Tensor], *, total: int, metrics: Collection[str]
) -> Plain:
    """Changes to start times the silo's share of all examples, and its numbers.

    update: with silo, params, num_examples and metrics; not modified. metrics: names;
    of one that the update lacks, a random number is added, so that nobody learns that
    of the others. Raises ValueError for changes that are too large for 32 bits.
    """
    _check(update, start, total)
    share, parts, digest = update.num_examples / total, [], hashlib.sha256()
    for name in sorted(start):
        value = update.params[name].detach().contiguous()
        digest.update(name.encode())
        digest.update(value.view(-1).view(torch.uint8).numpy())
        bits = _bits(start[name])
        delta = value.double() - start[name].double()
        if delta.numel() and not delta.abs().max() < 2.0 ** (30 - bits):
            raise ValueError(
                f"silo {update.silo!r} changed {name!r} by {delta.abs().max():.3g}; in "
                f"a secure sum a change must be below {2 ** (30 - bits)}: use a "
                "smaller lr, or scale the inputs"
            )
        steps = (delta * (share * 2.0**bits)).round_().to(torch.int64)
        parts.append(steps.flatten().numpy().astype(np.uint32))
    weights = np.concatenate(parts) if parts else np.empty(0, np.uint32)
    return Plain(weights, _numbers(update, metrics), digest.hexdigest() * bool(parts))


def _check(update: Any, start: Mapping[str, Tensor], total: int) -> None:
    """At least what `weighted_average` checks; NaN is too large a change."""
    found, silo = update.num_examples, update.silo
    if type(found) is not int or not 0 < found <= (total if start else found):
        raise ValueError(
            f"silo {silo!r} has {found} of {total} examples; it must be a whole number "
            "> 0 that is part of the total"
        )
    own = {name: (v.shape, v.dtype) for name, v in update.params.items()}
    want = {name: (v.shape, v.dtype) for name, v in start.items()}
    if differ := sorted(k for k in own | want if own.get(k) != want.get(k)):
        raise ValueError(
            f"silo {silo!r} sent another model: name, shape or dtype of {differ[:3]}; "
            "all silos must train the same architecture"
        )


def _numbers(update: Any, metrics: Collection[str]) -> np.ndarray:
    numbers = [update.num_examples]
    for name in sorted(metrics):
        value = update.metrics.get(name)
        if value is not None and abs(value) < 2**20:
            numbers += [round(value * 2**NUMBER_BITS) % 2**64, 1]
        else:
            numbers += [secrets.randbits(64), 0]
    return np.array(numbers, np.uint64)


def decode(
    added: Plain,
    start: Mapping[str, Tensor],
    *,
    total: int,
    several: int,
    metrics: Collection[str],
) -> Update:
    """The average behind a sum without masks, as the update of `ALL`.

    total: as in `encode`; several: how many silos were added. Each value is off by at
    most half a step of 2^-22 per silo, times total over the examples of those added. A
    metric is the mean over silos, each counted once, and left out if one silo lacks it.
    Raises ValueError for a sum that cannot be one.
    """
    examples = int(added.numbers[0])
    if not several <= examples <= 2**40:
        raise ValueError(
            f"the sum over {several} silos has {examples} examples: the masks did not "
            "cancel, so one silo was told something else, or did not keep to it"
        )
    steps = torch.from_numpy(added.weights.view(np.int32).astype(np.float64))
    flat = iter(steps.split([start[name].numel() for name in sorted(start)]))
    params = {}
    for name in sorted(start):
        old, scale = start[name], total / examples / 2.0 ** _bits(start[name])
        new = old.double() + (next(flat) * scale).reshape(old.shape)
        new = new if old.is_floating_point() else new.round()
        params[name] = new.to(old.dtype)
    values = added.numbers[1:].reshape(-1, 2)
    means = {
        name: float(value.view(np.int64)) / 2**NUMBER_BITS / several
        for name, (value, count) in zip(sorted(metrics), values, strict=True)
        if count == several
    }
    return Update(ALL, {k: params[k] for k in start}, examples, means)


def _bits(value: Tensor) -> int:
    return FRACTION_BITS if value.is_floating_point() else WHOLE_BITS


# -- answers of analyses


def words_of(layout: Mapping[str, Tensor]) -> int:
    """Words of 8 bytes that an answer needs. layout: its arrays, without content."""
    return 1 + sum(value.numel() * PARTS[value.dtype] for value in layout.values())


def encode_arrays(silo: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """An answer as uint64 words, modulo 2^64, whose sums `decode_arrays` reads.

    arrays: float64 or int64; not modified. First the number 1, by which the masks are
    seen to have cancelled; then each array in the order of names, as one piece for each
    of its `PARTS`. A float64 is cut exactly where its bits are worth 2^-212 or more,
    which are all of them from 2^-160 on; what is below is rounded.

    Raises ValueError, naming silo and array, for other types, and values of 2^212 or
    more, NaN and infinite ones.
    """
    words = [np.ones(1, np.int64)]
    for name in sorted(arrays):
        value = np.asarray(arrays[name]).ravel()
        if value.dtype == np.int64:
            words += [value & (2**32 - 1), value >> 32]
        elif value.dtype == np.float64:
            words += _cut(silo, name, value)
        else:
            raise ValueError(
                f"silo {silo!r} has {name!r} as {value.dtype}, not float64"
            )
    return np.concatenate(words).view(np.uint64)


def _cut(silo: str, name: str, value: np.ndarray) -> list[np.ndarray]:
    """What float64 [values] are made of, as int64 up to 2^53, the lowest bits first."""
    if value.size and not np.abs(value).max() < 2.0**LOWEST:
        raise ValueError(
            f"silo {silo!r} has {name!r} up to {np.abs(value).max():.3g}; in a secure "
            f"sum values must be finite and below 2^{LOWEST}: scale the columns"
        )
    parts, rest = [], value
    for part in range(PARTS[torch.float64] - 1, 0, -1):
        power = PART_BITS * part - LOWEST
        whole = np.trunc(np.ldexp(rest, -power))
        rest = rest - np.ldexp(whole, power)  # exact: the lower bits of the same number
        parts.append(whole.astype(np.int64))
    parts.append(np.rint(np.ldexp(rest, LOWEST)).astype(np.int64))
    return parts[::-1]


def decode_arrays(
    added: np.ndarray, layout: Mapping[str, Tensor], *, several: int
) -> dict[str, np.ndarray]:
    """The sums behind words that were added, by name.

    added: uint64 [words_of(layout)], without masks; not modified. layout: the arrays,
    without content. several: how many silos were added, at most `MOST_SILOS`.

    int64 sums are exact. A float64 is the exact sum, rounded once, so it does not
    depend on the order of the silos; each value below 2^-160 adds an error of at most
    2^-213. `analysis.ask_silos` rounds after each silo: of S silos with values v, the
    two differ by at most S * (2^-53 * sum |v| + 2^-212). Raises ValueError for a sum
    that cannot be one, and for an int64 that overflows.
    """
    values = added.view(np.int64)
    if not 0 < several <= MOST_SILOS or len(values) != words_of(layout):
        raise ValueError(
            f"{len(values)} words of {several} silos, at most {MOST_SILOS}"
        )
    if values[0] != several:
        raise ValueError(
            f"the masks of {several} silos did not cancel: one was told something "
            "else, or did not keep to it"
        )
    found, start = {}, 1
    for name in sorted(layout):
        kind, size = layout[name].dtype, layout[name].numel()
        parts = values[start : start + size * PARTS[kind]].reshape(PARTS[kind], size)
        start += parts.size
        added_up = _put_together(name, kind, parts.astype(object))
        found[name] = added_up.reshape(tuple(layout[name].shape))
    return {name: found[name] for name in layout}


def _put_together(name: str, kind: torch.dtype, parts: np.ndarray) -> np.ndarray:
    """The numbers [values] of which parts [PARTS, values] are, as Python's integers."""
    bits = 32 if kind == torch.int64 else PART_BITS
    whole = [sum(int(p) << (bits * k) for k, p in enumerate(n)) for n in parts.T]
    if kind == torch.float64:  # Python rounds a quotient of integers once, correctly
        return np.array([number / 2**LOWEST for number in whole], np.float64)
    if any(not -(2**63) <= number < 2**63 for number in whole):
        raise ValueError(f"the sum of {name!r} is beyond the range of int64")
    return np.array(whole, np.int64)


class SecureAverage:
    """An aggregate of `run_rounds` with the same bits as a secure run.

    rule: `weighted_average`, or one that stands at params and needs the average only.
    params: the initial model, what travels of it. total: examples of all silos; None
    is of those whose updates come first.
    """

    def __init__(self, rule: Any, params: Params, *, total: int | None = None) -> None:
        self.rule, self.params, self.total = rule, dict(params), total

    def __call__(self, updates: Iterable[Any]) -> Params:
        found = list(updates)
        names = [update.silo for update in found]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"silos {twice} sent two updates; only one counts")
        if not found:
            raise ValueError("no updates to average; at least one silo must take part")
        self.total = self.total or sum(update.num_examples for update in found)
        how = {"total": self.total, "metrics": ()}
        parts = [encode(update, self.params, **how) for update in found]
        for part in parts[1:]:
            parts[0].plus(part)
        return self.move(decode(parts[0], self.params, several=len(found), **how))

    def move(self, mean: Any) -> Params:
        """The next global model, from the average."""
        self.params = self.rule(iter([mean]))
        return self.params

    def state_dict(self) -> Params:
        inner = self.rule.state_dict() if hasattr(self.rule, "state_dict") else {}
        state = {f"rule.{name}": value for name, value in inner.items()}
        state |= {f"model.{name}": value for name, value in self.params.items()}
        return state | {"total": torch.tensor(self.total or 0)}

    def load_state_dict(self, state: Params) -> None:
        parts: dict[str, Params] = {"rule": {}, "model": {}}
        for name, value in state.items():
            kind, _, rest = name.partition(".")
            parts.get(kind, {})[rest] = value
        if hasattr(self.rule, "load_state_dict"):
            self.rule.load_state_dict(parts["rule"])
        self.params, self.total = parts["model"], int(state["total"]) or None
