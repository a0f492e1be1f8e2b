"""What crosses a silo's boundary: safetensors, a small manifest, and a ledger of it.

A silo writes `update.safetensors` and `manifest.json` into a folder of its own; the
orchestrator reads that folder and refuses whatever is not exactly an update of its
model: in bounded memory, without running or unpickling anything. The global model
travels in the same form. Hashes find damage and mix-ups, not forgery: that the folder
or message comes from this silo is for the transport (TLS, storage rights) to prove.
Needs torch and safetensors: copy this file on its own.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor

Params = dict[str, Tensor]

MANIFEST = "manifest.json"
UPDATE = "update.safetensors"
MODEL = "model.safetensors"

_VERSION = 1  # of the manifest
_MAX_MANIFEST = 65_536  # bytes
_DTYPES = {  # what may cross, by its name in safetensors; all of it can be averaged
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MANIFEST_TYPES = {
    "version": int,
    "silo": str,
    "round": int,
    "num_examples": int,
    "metrics": dict,
    "bytes": int,
    "sha256": str,
}


class UpdateLike(Protocol):
    """What may leave a silo, such as `training.Update`."""

    @property
    def silo(self) -> str: ...
    @property
    def params(self) -> Mapping[str, Tensor]: ...
    @property
    def num_examples(self) -> int: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class Limits:
    """What an update may be, beside having exactly the global model's entries.

    max_bytes: of the safetensors file; None is what the global model needs, plus a
    header. max_norm: L2 norm of the delta to the global model over all floating
    entries (BatchNorm statistics and SCAFFOLD's variates too); None is no limit.
    metrics: the names that may be reported. max_examples: the largest num_examples.
    """

    max_bytes: int | None = None
    max_norm: float | None = None
    metrics: frozenset[str] = frozenset({"train_loss", "steps", "loss_before"})
    max_examples: int = 10**9


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class ReceivedUpdate:
    """An accepted update, ready for `weighted_average` and the server rules.

    sha256 and num_bytes: of the safetensors file.
    """

    silo: str
    round_index: int
    params: Params
    num_examples: int
    metrics: dict[str, float]
    sha256: str
    num_bytes: int


class Refused(ValueError):
    """Something that must not cross the boundary; `silo` sent it, `reason` says why."""

    def __init__(self, silo: str, reason: str) -> None:
        super().__init__(silo, reason)
        self.silo, self.reason = silo, reason

    def __str__(self) -> str:
        return f"refused what {self.silo!r} sends: {self.reason}"


class Ledger:
    """A file with one JSON line for each item that crossed the boundary, or tried to.

    Lines hold time (UTC), direction ("out" or "in"), silo (who sends), round, what,
    shape, dtype, bytes, sha256, verdict ("accepted" or "refused") and reason; never
    the values themselves. Each call is on the disk when it returns, and a crash within
    it spoils no other line. An item is recorded before it is released or handed on.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def add(
        self,
        direction: str,
        *,
        silo: str,
        round_index: int | None,
        what: str,
        verdict: str,
        reason: str = "",
        num_bytes: int | None = None,
        sha256: str | None = None,
    ) -> None:
        """Append one line about an item that is not a tensor."""
        line = _line(direction, silo, round_index, what, num_bytes, sha256)
        self._append([line | {"verdict": verdict, "reason": reason}])

    def add_params(
        self,
        direction: str,
        params: Mapping[str, Tensor],
        *,
        silo: str,
        round_index: int | None,
    ) -> None:
        """Append one line for each entry of an accepted model state."""
        lines = []
        for name, value in params.items():
            digest = hashlib.sha256(_raw(value)).hexdigest()
            line = _line(direction, silo, round_index, name, value.nbytes, digest)
            line |= {"shape": list(value.shape), "dtype": str(value.dtype)[6:]}
            lines.append(line | {"verdict": "accepted", "reason": ""})
        self._append(lines)

    def _append(self, lines: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        with self.path.open("a+b", buffering=0) as file:
            if file.seek(0, os.SEEK_END) > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a crash tore the last line: leave it behind
                    text = "\n" + text
            data = memoryview(text.encode())
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())


def read_ledger(path: str | Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Read a ledger: its entries, and the numbers (from 1) of lines torn by a crash."""
    entries, torn = [], []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        try:
            entries += [json.loads(line)] if line.strip() else []
        except ValueError:
            torn.append(number)
    return entries, torn


def check_update(
    update: UpdateLike,
    expected: Mapping[str, Tensor],
    *,
    silo: str,
    round_index: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
    direction: str = "in",
    ledger: Ledger | None = None,
) -> None:
    """Refuse an update in memory that is not one of the model `expected` by `silo`.

    expected: the entries of the global model that the silo started from; names, shapes
    and dtypes must be the same, values finite, `limits` kept. round_index: compared
    with the update's own, if it has one; written to the ledger. Nothing is modified.
    Raises Refused.
    """
    with _judged(ledger, direction, silo, round_index, "update"):
        _check(update, expected, silo, round_index, limits)
    if ledger:
        _record_accepted(ledger, direction, update, round_index)


def write_update(
    folder: str | Path,
    update: UpdateLike,
    *,
    round_index: int,
    expected: Mapping[str, Tensor] | None = None,
    limits: Limits = DEFAULT_LIMITS,
    ledger: Ledger | None = None,
) -> Path:
    """Release an update: `update.safetensors` and `manifest.json` in `folder`.

    expected: the global model that the silo started from, to hold the update to its
    names, shapes and the norm limit here already; None checks the rest only. A crash
    leaves what was there before, or nothing that a receiver accepts. Returns the
    folder. Raises Refused, before anything is written, for what a receiver would
    refuse.
    """
    reference = update.params if expected is None else expected
    with _judged(ledger, "out", update.silo, round_index, UPDATE):
        _check(update, reference, update.silo, round_index, limits)
        data = _serialise(update.params)
        _check_size(UPDATE, len(data), _max_bytes(reference, limits))
    manifest = _manifest(update.silo, round_index, data)
    manifest["num_examples"] = update.num_examples
    manifest["metrics"] = {name: float(v) for name, v in update.metrics.items()}
    if ledger:
        _record_accepted(ledger, "out", update, round_index)
    return _write_pair(Path(folder), UPDATE, data, manifest)


def read_update(
    folder: str | Path,
    expected: Mapping[str, Tensor],
    *,
    silo: str,
    round_index: int,
    limits: Limits = DEFAULT_LIMITS,
    ledger: Ledger | None = None,
) -> ReceivedUpdate:
    """Receive what `write_update` wrote, from a folder that is not trusted.

    expected: the global model that was sent out. Not followed or waited for: symbolic
    links, pipes, devices. At most `limits.max_bytes` are read, each file once; what is
    checked is what is returned. Raises Refused for anything that is not an update of
    `silo`, for this round, of this model.
    """
    with _judged(ledger, "in", silo, round_index, UPDATE):
        manifest, data = _read_pair(
            Path(folder), UPDATE, _MANIFEST_TYPES, _max_bytes(expected, limits)
        )
        update = ReceivedUpdate(
            manifest["silo"],
            manifest["round"],
            {},
            manifest["num_examples"],
            manifest["metrics"],
            manifest["sha256"],
            len(data),
        )
        _check_header(update, silo, round_index, limits)
        update.params.update(_parse(data, expected, manifest["sha256"]))
        _check(update, expected, silo, round_index, limits)
    if ledger:
        _record_accepted(ledger, "in", update, round_index)
    return update


def write_model(
    folder: str | Path,
    params: Mapping[str, Tensor],
    *,
    round_index: int,
    silo: str = "orchestrator",
    ledger: Ledger | None = None,
) -> Path:
    """Publish the global model: `model.safetensors` and `manifest.json` in `folder`.

    silo: who publishes it. Anyone can use the file without this project:
    `model.load_state_dict(safetensors.torch.load_file("model.safetensors"))`.
    Returns the folder. Raises Refused for NaN, infinite values and unusual dtypes.
    """
    with _judged(ledger, "out", silo, round_index, MODEL):
        _check_params(params, params)
    if ledger:
        ledger.add_params("out", params, silo=silo, round_index=round_index)
    data = _serialise(params)
    return _write_pair(Path(folder), MODEL, data, _manifest(silo, round_index, data))


def read_model(
    folder: str | Path,
    *,
    expected: Mapping[str, Tensor] | None = None,
    round_index: int | None = None,
    max_bytes: int = 2**32,
    silo: str = "orchestrator",
    ledger: Ledger | None = None,
) -> Params:
    """Receive what `write_model` wrote; checked as an update is.

    expected: `model.state_dict()` of the silo's own model, for names, shapes and
    dtypes; None takes any model up to max_bytes. round_index: None takes any round.
    Raises Refused.
    """
    types = {k: _MANIFEST_TYPES[k] for k in ("version", "silo", "round")}
    types |= {k: _MANIFEST_TYPES[k] for k in ("bytes", "sha256")}
    with _judged(ledger, "in", silo, round_index, MODEL):
        manifest, data = _read_pair(Path(folder), MODEL, types, max_bytes)
        _check_sender(manifest["silo"], silo, manifest["round"], round_index)
        params = _parse(data, expected, manifest["sha256"])
        _check_params(params, params if expected is None else expected)
    if ledger:
        ledger.add_params("in", params, silo=silo, round_index=manifest["round"])
    return params


@contextmanager
def _judged(
    ledger: Ledger | None,
    direction: str,
    silo: str,
    round_index: int | None,
    what: str,
) -> Iterator[None]:
    """Turn an error of the checks within into Refused, and record it."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        reason = str(error)[:1000]
        if ledger:
            ledger.add(
                direction,
                silo=silo,
                round_index=round_index,
                what=what,
                verdict="refused",
                reason=reason,
            )
        raise Refused(silo, reason) from error


def _record_accepted(
    ledger: Ledger, direction: str, update: UpdateLike, round_index: int | None
) -> None:
    ledger.add_params(
        direction, update.params, silo=update.silo, round_index=round_index
    )
    ledger.add(
        direction,
        silo=update.silo,
        round_index=round_index,
        what=", ".join(["num_examples", *sorted(update.metrics)]),
        verdict="accepted",
        num_bytes=8 * (1 + len(update.metrics)),
    )


def _line(
    direction: str,
    silo: str,
    round_index: int | None,
    what: str,
    num_bytes: int | None,
    sha256: str | None,
) -> dict[str, Any]:
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    line = {"time": now, "direction": direction, "silo": silo, "round": round_index}
    line |= {"what": what, "shape": None, "dtype": None}
    return line | {"bytes": num_bytes, "sha256": sha256}


def _check(
    update: UpdateLike,
    expected: Mapping[str, Tensor],
    silo: str,
    round_index: int | None,
    limits: Limits,
) -> None:
    _check_header(update, silo, round_index, limits)
    _check_params(update.params, expected)
    if limits.max_norm is not None:
        norm = _delta_norm(update.params, expected)
        if not norm <= limits.max_norm:
            raise ValueError(
                f"the delta to the global model has norm {norm:.6g}, the limit is "
                f"{limits.max_norm}; train with a smaller lr or fewer epochs, or agree "
                "on a higher max_norm"
            )


def _check_header(
    update: UpdateLike, silo: str, round_index: int | None, limits: Limits
) -> None:
    """Everything but the tensors."""
    own_round = getattr(update, "round_index", round_index)
    _check_sender(update.silo, silo, own_round, round_index)
    count = update.num_examples
    if type(count) is not int or not 1 <= count <= limits.max_examples:
        raise ValueError(
            f"num_examples must be an integer from 1 to {limits.max_examples}, got "
            f"{_shown(count)}; leave a silo without training data out of the round"
        )
    if not isinstance(update.metrics, Mapping):
        raise ValueError(f"metrics must be a dict, got {_shown(update.metrics)}")
    unknown = [name for name in update.metrics if name not in limits.metrics]
    if unknown:
        raise ValueError(
            f"{len(unknown)} metrics are not on the allow-list "
            f"{sorted(limits.metrics)}: {_some(unknown)}; leave them out, or agree on "
            "Limits(metrics=...)"
        )
    for name, value in update.metrics.items():
        if not _is_number(value):
            raise ValueError(
                f"metric {name!r} must be one finite number, got {_shown(value)}; "
                "send float(value), or leave it out"
            )


def _check_sender(
    found: Any, silo: str, found_round: Any, round_index: int | None
) -> None:
    if type(found) is not str or found != silo:
        raise ValueError(
            f"it says it comes from {_some([found])}, expected {silo!r}; two silos "
            "share a folder or a name"
        )
    if round_index is not None and found_round != round_index:
        raise ValueError(
            f"it belongs to round {_shown(found_round)}, expected {round_index}; it is "
            "late or was sent twice: leave it out of this round"
        )


def _check_params(params: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    if not isinstance(params, Mapping):
        raise ValueError(f"params must be a dict of tensors, got {_shown(params)}")
    _check_names(params, expected)
    for name, value in params.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            raise ValueError(f"{name!r} must be a dense tensor, got {_shown(value)}")
        if value.device.type != "cpu":
            raise ValueError(f"{name!r} is on {value.device}; send value.cpu()")
        want = expected[name]
        if value.dtype not in _DTYPES.values() or value.dtype != want.dtype:
            raise ValueError(
                f"{name!r} has dtype {value.dtype}, expected {want.dtype}, one of "
                f"{sorted(_DTYPES)}; all silos must train the same model"
            )
        if value.shape != want.shape:
            raise ValueError(
                f"{name!r} has shape {tuple(value.shape)}, expected "
                f"{tuple(want.shape)}; all silos must train the same model"
            )
        _check_values(name, value.detach())


def _check_names(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    if missing or unknown:
        raise ValueError(
            f"the entries are not those of the global model: {len(missing)} missing "
            f"{_some(missing)}, {len(unknown)} unknown {_some(unknown)}; all silos "
            "must train the same model and keep the same entries local"
        )


def _check_values(name: str, value: Tensor) -> None:
    if value.dtype == torch.bool and int(_raw_bytes(value).max(initial=0)) > 1:
        raise ValueError(f"{name!r} has booleans that are neither 0 nor 1")
    # A sum is NaN or infinite if any entry is; finite entries may overflow it, too.
    if value.is_floating_point() and not math.isfinite(value.sum().item()):
        bad = int((~value.isfinite()).sum())
        if bad:
            raise ValueError(
                f"{name!r} has {bad} NaN or infinite values, allowed are 0; the "
                "training diverged: look at its loss, try a smaller lr"
            )


def _delta_norm(params: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    squares = 0.0
    for name, value in params.items():
        if value.is_floating_point():
            delta = value.detach().double() - expected[name].detach().double()
            squares += float(torch.linalg.vector_norm(delta)) ** 2
    return math.sqrt(squares)


def _check_size(name: str, size: int, limit: int) -> None:
    if size > limit:
        raise ValueError(
            f"{name} has {size} bytes, the limit is {limit}; send this model's entries "
            "only, or agree on a higher limit"
        )


def _max_bytes(expected: Mapping[str, Tensor], limits: Limits) -> int:
    if limits.max_bytes is not None:
        return limits.max_bytes
    return sum(value.nbytes for value in expected.values()) + _max_header(expected)


def _max_header(expected: Mapping[str, Tensor] | None) -> int:
    """Bytes that a safetensors header may have: generous, but small."""
    if expected is None:
        return 2**23
    return 4096 + sum(512 + 6 * len(name) for name in expected)


def _parse(data: bytes, expected: Mapping[str, Tensor] | None, sha256: str) -> Params:
    """Check a safetensors file's header, then its hash, then read it."""
    length, limit = int.from_bytes(data[:8], "little"), _max_header(expected)
    if len(data) < 8 or length > min(limit, len(data) - 8):
        raise ValueError(
            f"it is not a whole safetensors file: {len(data)} bytes with a header of "
            f"{length}, the limit is {limit}; write it with write_update"
        )
    header = _json(data[8 : 8 + length], "the safetensors header")
    if expected is not None:
        _check_names(header, expected)
    for name, entry in header.items():
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        known = _DTYPES.get(dtype) if isinstance(dtype, str) else None
        if known is None or (expected and known != expected[name].dtype):
            raise ValueError(
                f"the dtype of {_some([name])} is not allowed, or not that of the "
                f"global model; allowed are {sorted(_DTYPES)}"
            )
        if expected and entry.get("shape") != list(expected[name].shape):
            raise ValueError(
                f"{name!r} does not have the global model's shape "
                f"{tuple(expected[name].shape)}; all silos must train the same model"
            )
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(
            "the SHA-256 of the weights is not that of the manifest; the file was "
            "damaged on its way: send it again"
        )
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # whatever a version of the library raises
        raise ValueError(f"it is not a valid safetensors file: {error}") from error


def _json(data: bytes, what: str) -> dict[str, Any]:
    """Strict JSON: an object, UTF-8, no key twice, no NaN."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key appears twice")
        return dict(pairs)

    def no_constant(text: str) -> None:
        raise ValueError(f"{text} is not a number")

    try:
        found = json.loads(
            data.decode(), object_pairs_hook=once, parse_constant=no_constant
        )
    except UnicodeDecodeError:
        raise ValueError(f"{what} is not UTF-8 text; it must be JSON") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not plain JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{what} must be a JSON object, got {_shown(found)}")
    return found


def _manifest(silo: str, round_index: int, data: bytes) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "silo": silo,
        "round": round_index,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _read_pair(
    folder: Path, name: str, types: Mapping[str, type], max_bytes: int
) -> tuple[dict[str, Any], bytes]:
    """Manifest and weights of a folder that holds these two files and nothing else."""
    try:
        _check_folder(folder, {name, MANIFEST})
        manifest = _json(_read_file(folder / MANIFEST, _MAX_MANIFEST), MANIFEST)
        _check_manifest(manifest, types)
        data = _read_file(folder / name, max_bytes)
    except OSError as error:
        raise ValueError(
            f"{name} or {MANIFEST} cannot be read: {error.strerror}; the folder must "
            "hold both as plain files"
        ) from error
    if len(data) != manifest["bytes"]:
        raise ValueError(
            f"{name} has {len(data)} bytes, its manifest says "
            f"{_shown(manifest['bytes'])}; it was cut short or replaced: send it again"
        )
    return manifest, data


def _check_folder(folder: Path, allowed: set[str]) -> None:
    if folder.is_symlink():
        raise ValueError(f"{folder.name!r} is a symbolic link; links are not followed")
    with os.scandir(folder) as entries:
        for entry in entries:  # stops at the first: a folder may hold millions
            if entry.name not in allowed:
                raise ValueError(
                    f"the folder holds {_some([entry.name])}; allowed are "
                    f"{sorted(allowed)}: give each update a folder of its own"
                )


def _check_manifest(manifest: dict[str, Any], types: Mapping[str, type]) -> None:
    missing = [key for key in types if key not in manifest]
    unknown = [key for key in manifest if key not in types]
    if missing or unknown:
        raise ValueError(
            f"{MANIFEST} lacks {missing} and has {len(unknown)} unknown keys "
            f"{_some(unknown)}; write it with this version of exchange.py"
        )
    for key, kind in types.items():
        if type(manifest[key]) is not kind:
            raise ValueError(
                f"{key} in {MANIFEST} must be {kind.__name__}, got "
                f"{_shown(manifest[key])}"
            )
    if manifest["version"] != _VERSION:
        raise ValueError(
            f"{MANIFEST} has version {_shown(manifest['version'])}, expected "
            f"{_VERSION}; use the same exchange.py everywhere"
        )


def _read_file(path: Path, limit: int) -> bytes:
    """Read a plain file once, without following links or waiting for pipes."""
    flags = os.O_RDONLY
    for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY", "O_CLOEXEC"):
        flags |= getattr(os, flag, 0)  # not every system has all of them
    if path.is_symlink():
        raise ValueError(f"{path.name} is a symbolic link; links are not followed")
    with open(os.open(path, flags), "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path.name} is not a plain file; send a plain file")
        _check_size(path.name, status.st_size, limit)
        data = file.read(limit + 1) if status.st_size else b""
    _check_size(path.name, len(data), limit)
    return data


def _write_pair(
    folder: Path, name: str, data: bytes, manifest: Mapping[str, Any]
) -> Path:
    """Both files are whole on the disk before either is renamed into place.

    Without a manifest nothing is accepted, so the old one goes first and the new one
    comes last: at no time do an old and a new file pass for a pair.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(manifest, allow_nan=False, indent=1) + "\n"
    parts = {name: data, MANIFEST: text.encode()}
    try:
        for part, content in parts.items():
            with (folder / f"{part}.tmp").open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        (folder / MANIFEST).unlink(missing_ok=True)
        for part in parts:
            os.replace(folder / f"{part}.tmp", folder / part)
    finally:
        for part in parts:
            (folder / f"{part}.tmp").unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return folder


def _serialise(params: Mapping[str, Tensor]) -> bytes:
    """Safetensors bytes; the same for the same params."""
    seen: set[int] = set()
    plain = {}
    for name, value in params.items():
        value = value.detach().contiguous()
        storage = value.untyped_storage().data_ptr()
        plain[name] = value.clone() if storage in seen else value  # shared: not allowed
        seen.add(storage)
    return safetensors.torch.save(plain)


def _raw(value: Tensor) -> Any:
    return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


_raw_bytes = _raw


def _is_number(value: Any) -> bool:
    if type(value) is int:
        return abs(value) <= 2**53  # what a float holds exactly
    return type(value) is float and math.isfinite(value)


def _shown(value: Any) -> str:
    """A short description for a message; no content but a number."""
    if type(value) is float or (type(value) is int and abs(value) < 10**30):
        return repr(value)
    return f"a {type(value).__name__}"


def _some(names: list[Any]) -> str:
    """At most three names, cut short, with nothing that could break a line."""
    return ", ".join(ascii(name)[:60] for name in names[:3] if type(name) is str)
