"""What crosses a silo's boundary: safetensors, a small manifest, and a ledger of it.

A silo writes `update.safetensors` and `manifest.json` into a folder; the orchestrator
reads it and refuses whatever is not exactly an update of its model, in bounded memory,
without unpickling anything. The global model travels in the same form. A hash finds
damage and mix-ups, not forgery: who sent a folder or message is for the transport to
prove (TLS, storage rights). Needs numpy and torch: copy this file on its own.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Params = dict[str, Tensor]

MANIFEST, UPDATE, MODEL = "manifest.json", "update.safetensors", "model.safetensors"

_MODEL_KEYS = {"version": int, "silo": str, "round": int, "bytes": int, "sha256": str}
_UPDATE_KEYS = _MODEL_KEYS | {"num_examples": int, "metrics": dict}
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_VERSION = 1  # of the manifest
_DTYPES = {  # what may cross, as safetensors names it; all of it can be averaged
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
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

    max_norm: L2 norm of the delta to the global model, over all floating entries
    (BatchNorm statistics and SCAFFOLD's variates too). None is no limit: values that
    are finite but huge pass, and can overflow the average.
    norm_factor: a limit that follows the run, this many times the median of the last 50
    norms that were accepted in earlier rounds; none before there are 5. It finds broken
    and crude updates; who knows it stays below it.
    metrics: names that may be reported. max_examples: the largest num_examples.
    max_bytes: of the safetensors file; None is what the global model's entries need,
    plus a header.
    """

    max_norm: float | None = None
    norm_factor: float | None = None
    metrics: frozenset[str] = frozenset({"train_loss", "steps", "loss_before"})
    max_examples: int = 10**9
    max_bytes: int | None = None


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class ReceivedUpdate:
    """An accepted update, ready for `weighted_average` and the server rules.

    sha256, num_bytes: of the safetensors file. norm: of the delta to the global model;
    None without a limit for it.
    """

    silo: str
    round_index: int
    params: Params
    num_examples: int
    metrics: dict[str, float]
    sha256: str
    num_bytes: int
    norm: float | None


class Refused(ValueError):
    """Something that must not cross the boundary: `silo` sends it, `reason` says why
    not, with the limit and the remedy."""

    def __init__(self, silo: str, reason: str) -> None:
        super().__init__(silo, reason)
        self.silo, self.reason = silo, reason

    def __str__(self) -> str:
        return f"refused what {self.silo!r} sends: {self.reason}"


class Ledger:
    """A file with one JSON line for each item that crossed the boundary, or tried to.

    A line has time (UTC), direction ("out" or "in"), silo (who sends), round, what,
    shape, dtype, bytes, sha256, verdict ("accepted" or "refused") and reason; never a
    value. When a method returns, its lines are on the disk; a crash within it spoils no
    other line. Items are recorded before they are released or handed on.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def add(
        self,
        items: Iterable[Mapping[str, Any]],
        *,
        direction: str,
        silo: str,
        round_index: int | None,
        verdict: str,
        reason: str = "",
    ) -> None:
        """Append one line per item.

        items: as `ledger_items` makes them.
        direction: "out" or "in".
        silo, round_index: who sends it, and in which round.
        verdict, reason: "accepted" or "refused", and why.
        """
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": now, "direction": direction, "silo": silo, "round": round_index}
        line |= dict.fromkeys(("what", "shape", "dtype", "bytes", "sha256"))
        line |= {"verdict": verdict, "reason": reason}
        text = "".join(json.dumps({**line, **item}) + "\n" for item in items)
        with self.path.open("a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            if size and file.read(1) != b"\n":  # a crash tore this line: leave it so
                text = "\n" + text
            written = file.write(text.encode())  # at once: others may append, too
            os.fsync(file.fileno())
        if written != len(text):
            raise OSError(f"{self.path} took {written} of {len(text)} bytes: disk full")


def ledger_items(
    params: Mapping[str, Tensor], numbers: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """What the ledger says of each entry of params, and of the numbers beside them."""
    items: list[dict[str, Any]] = [
        {
            "what": name,
            "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
            "bytes": value.nbytes,
            "sha256": hashlib.sha256(_as_bytes(value)).hexdigest(),
        }
        for name, value in params.items()
    ]
    return items + [{"what": name, "bytes": 8} for name in numbers]


def read_ledger(path: str | Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Read a ledger: its entries, and the numbers (from 1) of lines torn by a crash."""
    entries: list[dict[str, Any]] = []
    torn: list[int] = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        try:
            entries += [json.loads(line)] if line else []
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
    norms: Sequence[float] = (),
    direction: str = "in",
    ledger: Ledger | None = None,
) -> float | None:
    """Refuse an update in memory that is not one of `silo`, for the model `expected`.

    update: not modified.
    expected: the global model's entries that the silo started from: names, shapes and
        dtypes must be the same.
    silo: whose it must be.
    round_index: compared with the update's own, if it has one.
    limits: what else it must keep to; values must be finite.
    norms: those accepted in earlier rounds, for `Limits.norm_factor`.
    direction: for the ledger, "in" or "out".
    ledger: where the verdict is written; None is nowhere.

    Returns the norm of the delta, None without a limit for it. Raises Refused.
    """
    with _gate(ledger, direction, silo, round_index, "update") as passed:
        _check_numbers(update, silo, round_index, limits)
        norm = _check_params(update.params, expected, _norm_limit(limits, norms))
        passed.append((update.params, ["num_examples", *update.metrics]))
    return norm


def write_update(
    folder: str | Path,
    update: UpdateLike,
    *,
    round_index: int,
    expected: Mapping[str, Tensor] | None = None,
    limits: Limits = DEFAULT_LIMITS,
    ledger: Ledger | None = None,
) -> Path:
    """Release an update: write `update.safetensors` and `manifest.json` into folder.

    folder: of this update alone; made if it is not there.
    update: what is released; not modified.
    round_index: of the manifest.
    expected: the global model that the silo started from, to hold the update to its
        names, shapes and the norm limit before it leaves; None checks the rest only.
    limits, ledger: as in `check_update`.

    A crash leaves the old pair, or nothing that a receiver takes. Returns the folder.
    Raises Refused, before anything is written, for what a receiver would refuse.
    """
    expected = update.params if expected is None else expected
    with _gate(ledger, "out", update.silo, round_index, UPDATE) as passed:
        _check_numbers(update, update.silo, round_index, limits)
        _check_params(update.params, expected, _norm_limit(limits))
        parts = to_parts(update.params)
        _check_size(UPDATE, sum(map(len, parts)), _max_bytes(expected, limits))
        passed.append((update.params, ["num_examples", *update.metrics]))
    metrics = {name: float(value) for name, value in update.metrics.items()}
    head = {"silo": update.silo, "round": round_index}
    head |= {"num_examples": update.num_examples, "metrics": metrics}
    return _write(Path(folder), UPDATE, parts, head)


def read_update(
    folder: str | Path,
    expected: Mapping[str, Tensor],
    *,
    silo: str,
    round_index: int,
    limits: Limits = DEFAULT_LIMITS,
    norms: Sequence[float] = (),
    ledger: Ledger | None = None,
) -> ReceivedUpdate:
    """Receive what `write_update` wrote, from a folder that is not trusted.

    folder: whatever is in it.
    expected: the global model that was sent out.
    silo, round_index: whose and of which round it must be.
    limits, norms: as in `check_update`.
    ledger: where each entry and the verdict are written; None is nowhere.

    Each file is read once, never beyond its limit;
    links are not followed, pipes and devices not waited for. Raises Refused for
    whatever is not an update of `silo`, for this round, of this model.
    """
    with _gate(ledger, "in", silo, round_index, UPDATE) as passed:
        found = _read_manifest(Path(folder), UPDATE, _UPDATE_KEYS)
        update = ReceivedUpdate(
            found["silo"],
            found["round"],
            {},
            found["num_examples"],
            found["metrics"],
            found["sha256"],
            found["bytes"],
            norm=None,
        )
        _check_numbers(update, silo, round_index, limits)
        limit = _max_bytes(expected, limits)
        params = _read_params(Path(folder) / UPDATE, found, expected, limit)
        norm = _check_params(params, expected, _norm_limit(limits, norms))
        update = replace(update, params=params, norm=norm)
        passed.append((update.params, ["num_examples", *update.metrics]))
    return update


def write_model(
    folder: str | Path,
    params: Mapping[str, Tensor],
    *,
    round_index: int,
    silo: str = "orchestrator",
    ledger: Ledger | None = None,
) -> Path:
    """Publish the global model: `model.safetensors` and `manifest.json` in folder.

    silo: who publishes it. The file needs nothing of this project to be used:
    `model.load_state_dict(safetensors.torch.load_file("model.safetensors"))`.
    Returns the folder. Raises Refused, as `write_update` does.
    """
    with _gate(ledger, "out", silo, round_index, MODEL) as passed:
        _check_params(params, params, None)
        passed.append((params, []))
    head = {"silo": silo, "round": round_index}
    return _write(Path(folder), MODEL, to_parts(params), head)


def read_model(
    folder: str | Path,
    expected: Mapping[str, Tensor],
    *,
    round_index: int | None = None,
    silo: str = "orchestrator",
    ledger: Ledger | None = None,
) -> Params:
    """Receive what `write_model` wrote, checked as an update is.

    expected: the entries of one's own model, such as `model.state_dict()`, for names,
    shapes and dtypes. round_index: None takes any round. Raises Refused.
    """
    with _gate(ledger, "in", silo, round_index, MODEL) as passed:
        found = _read_manifest(Path(folder), MODEL, _MODEL_KEYS)
        _check_sender(found["silo"], silo, found["round"], round_index)
        limit = _max_bytes(expected, DEFAULT_LIMITS)
        params = _read_params(Path(folder) / MODEL, found, expected, limit)
        _check_params(params, expected, None)
        passed.append((params, []))
    return params


def to_parts(params: Mapping[str, Tensor]) -> list[Any]:
    """A safetensors file in parts: the header's length, the header, each entry's bytes.

    params: tensors on the CPU. Nothing is copied, unlike in `safetensors.torch.save`,
    and memory may be shared: use the parts before an entry changes. Raises ValueError
    for a dtype that may not cross.
    """
    names = sorted(params, key=lambda k: (-params[k].element_size(), k))  # aligned
    header, end = {}, 0
    for name in names:
        shape, start, end = list(params[name].shape), end, end + params[name].nbytes
        header[name] = dict(dtype=_dtype(name, params[name]), shape=shape)
        header[name]["data_offsets"] = [start, end]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    size = len(text).to_bytes(8, "little")
    return [size, text, *(_as_bytes(params[name]) for name in names)]


@contextmanager
def _gate(
    ledger: Ledger | None, direction: str, silo: str, round_index: int | None, what: str
) -> Iterator[list[Any]]:
    """Turn an error of the checks within into Refused, and record what they decide.

    Yields a list for what passed: (params, names of the numbers beside them).
    """
    passed: list[Any] = []
    head = {"direction": direction, "silo": silo, "round_index": round_index}
    try:
        yield passed
    except (ValueError, OSError, RuntimeError) as error:
        reason = str(error)
        if ledger:
            ledger.add([{"what": what}], **head, verdict="refused", reason=reason)
        raise Refused(silo, reason) from error.__cause__
    for params, numbers in passed if ledger else ():
        ledger.add(ledger_items(params, numbers), **head, verdict="accepted")


def _check_numbers(
    update: UpdateLike, silo: str, round_index: int | None, limits: Limits
) -> None:
    """Everything but the tensors."""
    own_round = getattr(update, "round_index", round_index)
    _check_sender(update.silo, silo, own_round, round_index)
    count, metrics = update.num_examples, update.metrics
    if not (isinstance(metrics, Mapping) and isinstance(update.params, Mapping)):
        raise ValueError("params and metrics must be dicts; send an Update")
    if type(count) is not int or not 1 <= count <= limits.max_examples:
        raise ValueError(
            f"num_examples must be an integer from 1 to {limits.max_examples}, got "
            f"{_shown(count)}; leave a silo without training data out of the round"
        )
    unknown = [name for name in metrics if name not in limits.metrics]
    if unknown:
        raise ValueError(
            f"{len(unknown)} metrics are not on the list of those allowed, "
            f"{sorted(limits.metrics)}: {_some(unknown)}; do not send them, or agree "
            "on other Limits.metrics"
        )
    for name, value in metrics.items():
        exact = type(value) is float or type(value) is int and abs(value) <= 2**53
        if not (exact and math.isfinite(value)):
            raise ValueError(
                f"metric {name!r} must be one finite number, got {_shown(value)}; "
                "send float(value), or leave it out"
            )


def _check_sender(found: Any, silo: str, its_round: Any, round_index: Any) -> None:
    if found != silo:
        raise ValueError(
            f"it says it comes from {_some([found])}, expected {silo!r}; do two silos "
            "share a folder or a name?"
        )
    if round_index is not None and its_round != round_index:
        raise ValueError(
            f"it belongs to round {_shown(its_round)}, expected {round_index}; late or "
            "sent twice: leave it out of this round"
        )


def _norm_limit(limits: Limits, norms: Sequence[float] = ()) -> float | None:
    """The norm that a delta may have now: the fixed limit or the running one."""
    if limits.norm_factor is None:
        return limits.max_norm
    limit = math.inf if limits.max_norm is None else limits.max_norm
    if len(norms) < 5:
        return limit
    both = limit, limits.norm_factor * statistics.median(norms[-50:])
    return math.nan if any(map(math.isnan, both)) else min(both)  # NaN refuses all


def _check_params(
    params: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    max_norm: float | None,
) -> float | None:
    """Returns the norm of the delta; None without a limit for it."""
    _check_names(params, expected)
    norm = 0.0
    for name, value in params.items():
        _check_layout(name, value, expected[name])
        _check_values(name, value)
        if max_norm is not None and value.is_floating_point():
            wide = torch.promote_types(value.dtype, torch.float32)
            delta = value.detach().to(wide) - expected[name].detach().to(wide)
            part = torch.linalg.vector_norm(delta, dtype=torch.float64)
            norm = math.hypot(norm, part.item())
    if max_norm is not None and not norm <= max_norm:
        raise ValueError(
            f"the delta to the global model has norm {norm:.6g}, the limit is "
            f"{max_norm}; train with a smaller lr or fewer epochs, or agree "
            "on other Limits (max_norm, norm_factor)"
        )
    return None if max_norm is None else norm


def _check_names(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    if missing or unknown:
        raise ValueError(
            f"it does not have the global model's entries: {len(missing)} missing "
            f"({_some(missing)}), {len(unknown)} unknown ({_some(unknown)}); all silos "
            "must train the same model and keep the same entries local"
        )


def _check_layout(name: str, value: Any, expected: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name!r} is {_shown(value)}; send tensors only")
    found = f"{value.dtype} {list(value.shape)} ({value.layout} on {value.device})"
    want = f"{expected.dtype} {list(expected.shape)}"
    if value.layout != torch.strided or value.device.type != "cpu":
        raise ValueError(f"{name!r} is {found}; send a dense tensor on the CPU: {want}")
    if value.dtype != expected.dtype or value.shape != expected.shape:
        raise ValueError(
            f"{name!r} is {found}, expected {want}; all silos must train the same model"
        )
    _dtype(name, value)


def _dtype(name: str, value: Tensor) -> str:
    """As safetensors names it."""
    if value.dtype not in _DTYPES:
        found = f"{value.dtype} {list(value.shape)}"
        raise ValueError(
            f"{name!r} is {found}; the dtypes that may cross: "
            f"{sorted(_DTYPES.values())}"
        )
    return _DTYPES[value.dtype]


def _check_values(name: str, value: Tensor) -> None:
    if value.dtype == torch.bool and _as_bytes(value).max(initial=0) > 1:
        raise ValueError(f"{name!r} has booleans that are neither 0 nor 1")
    # A sum is NaN or infinite if any entry is; finite entries may overflow it, too.
    if value.is_floating_point() and not math.isfinite(value.sum().item()):
        bad = int((~value.isfinite()).sum())
        if bad:
            raise ValueError(
                f"{name!r} has {bad} NaN or infinite values, none is allowed; the "
                "training diverged: look at its loss, try a smaller lr"
            )


def _check_size(name: str, size: int, limit: int) -> None:
    if size > limit:
        raise ValueError(
            f"{name} has {size} bytes, the limit is {limit}; send the entries of "
            "the global model only, as write_update does"
        )


def _max_bytes(expected: Mapping[str, Tensor], limits: Limits) -> int:
    if limits.max_bytes is not None:
        return limits.max_bytes
    return sum(value.nbytes for value in expected.values()) + _max_header(expected)


def _max_header(expected: Mapping[str, Tensor]) -> int:
    """Bytes that a safetensors header may have; one written here has about a third."""
    return 1024 + sum(256 + 6 * len(name) for name in expected)


def _read_manifest(
    folder: Path, weights: str, keys: Mapping[str, type]
) -> dict[str, Any]:
    """Read the manifest of a folder that holds it, the weights, and nothing else."""
    if folder.is_symlink():
        raise ValueError(f"{folder.name!r} is a link; send a folder")
    with os.scandir(folder) as entries:  # there may be millions
        names = {entry.name for entry in islice(entries, 3)}
    if names != {weights, MANIFEST}:
        raise ValueError(
            f"the folder must hold {weights} and {MANIFEST} only, it has "
            f"{_some(sorted(names)) or 'nothing'}; give each update a folder of its own"
        )
    manifest = _json(MANIFEST, _read_file(folder / MANIFEST, 65_536).tobytes())
    found = {key: type(value) for key, value in manifest.items()}
    differ = sorted(k for k in keys | found if keys.get(k) != found.get(k))
    if differ or manifest["version"] != _VERSION:
        raise ValueError(
            f"{MANIFEST} must be of version {_VERSION}, with the keys {sorted(keys)}; "
            f"{len(differ)} are missing, unknown or of a wrong type ({_some(differ)}): "
            "use the same exchange.py everywhere"
        )
    return manifest


def _read_params(
    path: Path, manifest: Mapping[str, Any], expected: Mapping[str, Tensor], limit: int
) -> Params:
    """Check a safetensors file's size, then its header, then its hash; then load it."""
    data = _read_file(path, limit)
    if len(data) != manifest["bytes"]:
        raise ValueError(
            f"{path.name} has {len(data)} bytes, its manifest says "
            f"{_shown(manifest['bytes'])}; cut short or replaced: send it again"
        )
    length, limit = int.from_bytes(data[:8].tobytes(), "little"), _max_header(expected)
    if not 8 + length <= min(len(data), 8 + limit):
        raise ValueError(
            f"{path.name} is not safetensors, or damaged: a header of {length} bytes "
            f"in {len(data)}, the limit is {limit}; use write_update, no pickle or zip"
        )
    header = _json("the safetensors header", data[8 : 8 + length].tobytes())
    _check_names(header, expected)
    for name, value in expected.items():
        entry, want = header[name], [_DTYPES.get(value.dtype), list(value.shape)]
        if type(entry) is not dict or entry.keys() != _ENTRY_KEYS:
            raise ValueError(f"the entry {name!r} must have {sorted(_ENTRY_KEYS)}")
        found = [entry["dtype"], entry["shape"]]
        if repr(found) != repr(want):  # 2.0 and True are no 2 and 1
            raise ValueError(
                f"{name!r} is {ascii(found)[:60]}, expected {want}; all silos must "
                "train the same model"
            )
    if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
        raise ValueError(
            f"{path.name} does not have the SHA-256 of its manifest; it was damaged or "
            "replaced on its way: send it again"
        )
    params = _views(data[8 + length :], header, expected)
    if params is None:
        raise ValueError(
            f"{path.name} is not valid safetensors: its data_offsets do not fit; write "
            "it with write_update"
        )
    return params


def _views(
    data: Any, header: Mapping[str, Any], expected: Mapping[str, Tensor]
) -> Params | None:
    """The entries as tensors on the memory of data; None if they do not fill it.

    `safetensors.torch.load` would copy all of it: an update, twice in memory.
    """
    # In the order of where they begin, each must begin where the one before ended, and
    # be as long as its shape says: so no byte is in two entries, or in none.
    spans = {name: entry["data_offsets"] for name, entry in header.items()}
    if any(
        type(s) is not list or [*map(type, s)] != [int, int] for s in spans.values()
    ):
        return None
    views, end = {}, 0
    for name in sorted(spans, key=spans.get):
        value, start, end = expected[name], end, end + expected[name].nbytes
        if spans[name] != [start, end] or end > len(data):
            return None
        part = torch.from_numpy(data[start:end])
        if part.data_ptr() % value.element_size():  # not aligned: no view on it
            part = part.clone()
        views[name] = part.view(value.dtype).reshape(value.shape)
    return {name: views[name] for name in expected} if end == len(data) else None


def _read_file(path: Path, limit: int) -> Any:
    """Read a plain file once, without following links or waiting for pipes.

    Returns an array of bytes, for which numpy asks for memory in large pages: the
    kernel has that ready sooner than as many small ones.
    """
    careful = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # POSIX

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | careful)

    with open(path, "rb", opener=opener) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path.name} is not a plain file; send one")
        _check_size(path.name, status.st_size, limit)
        data = np.empty(status.st_size, np.uint8)
        return data[: file.readinto(data)]


def _json(what: str, data: bytes) -> dict[str, Any]:
    """Strict JSON: UTF-8, an object, no key twice, no NaN."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key appears twice")
        return dict(pairs)

    def no_number(text: str) -> None:
        raise ValueError(f"{text} is not a number")

    try:
        found = json.loads(
            data.decode(), object_pairs_hook=once, parse_constant=no_number
        )
    except (ValueError, RecursionError) as error:
        why = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error
        raise ValueError(f"{what} is not plain JSON: {why}; send it again") from error
    if type(found) is not dict:
        raise ValueError(f"{what} must be a JSON object, got {_shown(found)}")
    return found


def _write(folder: Path, name: str, parts: list[Any], head: Mapping[str, Any]) -> Path:
    """Write weights and manifest; both are on the disk before either is renamed.

    Nothing is taken without a manifest: the old one goes first, the new one comes last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with ThreadPoolExecutor(1) as other:  # the hash takes as long as the disk does
            digest = other.submit(_sha256, parts)
            _write_file(folder / f"{name}.tmp", parts)
        manifest = {"version": _VERSION, **head}
        manifest |= {"bytes": sum(map(len, parts)), "sha256": digest.result()}
        text = json.dumps(manifest, indent=1).encode()
        _write_file(folder / f"{MANIFEST}.tmp", [text])
        (folder / MANIFEST).unlink(missing_ok=True)
        for path in (name, MANIFEST):
            os.replace(folder / f"{path}.tmp", folder / path)
    finally:
        for path in (name, MANIFEST):
            (folder / f"{path}.tmp").unlink(missing_ok=True)
    return folder


def _write_file(path: Path, parts: Iterable[Any]) -> None:
    """Write a file, and return when it is on the disk."""
    with path.open("wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def _sha256(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _as_bytes(value: Tensor) -> Any:
    """An array [bytes] on the same memory, if that is contiguous."""
    return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def _shown(value: Any) -> str:
    """A value for a message: a number of usual size, else only its type."""
    if type(value) is float or type(value) is int and abs(value) < 10**18:
        return repr(value)
    return f"a {type(value).__name__}"


def _some(names: list[Any]) -> str:
    """At most three names for a message, cut short, without control characters."""
    return ", ".join(ascii(name)[:60] for name in names[:3])
