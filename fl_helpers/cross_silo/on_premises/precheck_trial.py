"""A trial of the hospital's own function on its own data, from which nothing is sent.

`try_out` starts this file as a program, in a sandbox without network. It loads the
data, looks at them and trains one batch. It answers with codes, class names of errors
and numbers of examples, never with the text of an error or a value of a record.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fl_helpers.cross_silo import sandbox, turn
from fl_helpers.cross_silo.on_premises.site import INITIAL, RUN, Site
from fl_helpers.cross_silo.on_premises.trainer import code_of_client
from fl_helpers.cross_silo.run import Run, from_plain, to_plain
from fl_helpers.silos import Rows
from fl_helpers.simulation import Params

Plan = Mapping[str, Any]
FOUND, UPDATE = "found.json", "update.safetensors"
LOOKED_AT = 2000  # examples that are read, where reading each of them could take long
POWERS = (-6, -3, -2, -1, 1, 2, 3, 6)  # of ten, by which units are mixed up


@dataclass(frozen=True)
class Asked:
    """What the hospital will be asked for. start: the initial model, or values of its
    layout; None if the hospital has agreed to no model yet. told: whether it comes from
    the coordinator."""

    run: Run | None
    start: Params | None
    told: bool


def read_asked(folder: str | Path) -> Asked:
    """The run that the coordinator handed over: `job.write_job`'s folder `app/config`,
    or its file `run.json` alone.

    Raises ValueError, TypeError or KeyError for what is no run.
    """
    path = Path(folder)
    path = path / RUN if path.is_dir() else path
    found = json.loads(path.read_text(encoding="utf-8"))
    run = from_plain(found.get("run", found))
    initial = path.with_name(INITIAL)
    start = load_file(initial) if initial.exists() else start_of(run.params)
    layout = {name: (value.shape, value.dtype) for name, value in start.items()}
    if layout != {name: (v.shape, v.dtype) for name, v in run.params.items()}:
        raise ValueError(f"{initial} is not the model that {path} describes")
    return Asked(run, start, told=True)


def start_of(layout: Mapping[str, Tensor]) -> Params:
    """Values to begin a trial with, where only names, shapes and dtypes are known."""
    rng, start = torch.Generator().manual_seed(0), {}
    for name, value in layout.items():
        if value.is_floating_point() and value.dim() > 1:  # He et al. 2015, eq. 10
            scale = math.sqrt(2 / max(1, value[0].numel()))
            drawn = scale * torch.randn(value.shape, generator=rng)
            start[name] = drawn.to(value.dtype)
        elif name.endswith((".weight", "_var")):
            start[name] = torch.ones(value.shape, dtype=value.dtype)
        else:
            start[name] = torch.zeros(value.shape, dtype=value.dtype)
    return start


def try_out(
    site: Site,
    asked: Asked,
    folder: Path,
    *,
    ranges: Mapping[str, Any] | None = None,
    whole: bool = False,
    timeout: float = 900,
) -> dict[str, Any]:
    """Load the hospital's data and train, in a sandbox without network.

    folder: an empty one, for what is handed over. ranges: {name:
    {"column", "low", "high"}}. whole: train a silo's whole turn, not one batch.
    timeout: seconds. Returns what
    the process found; "failed" has a stage and a code.
    """
    given, out = folder / "given", folder / "out"
    for path in (given, out, folder / "code"):
        path.mkdir()
    (folder / "code" / "fl_helpers").symlink_to(Path(__file__).parents[2])
    if asked.run:
        (given / RUN).write_text(json.dumps(to_plain(asked.run)), encoding="utf-8")
        save_file(asked.start, given / INITIAL)
    plan = {key: getattr(site, key) for key in ("client", "data", "silo")}
    plan |= {"epsilon": site.epsilon, "delta": site.delta, "given": str(given)}
    plan |= {"ranges": dict(ranges or {}), "whole": whole, "out": str(out)}
    command = [sys.executable, "-m", __name__, json.dumps(plan)]
    own = {key: value for key, value in os.environ.items() if key in ("LANG", "PATH")}
    own |= {"HOME": str(out), "TMPDIR": str(out), "OMP_NUM_THREADS": "1"}
    read = [site.data, given, folder / "code", *code_of_client(site.client)]
    fence = {"read": read, "write": [out], "network": site.network}
    confined = sandbox.sandboxed(command, **fence)
    failed = {"stage": "client function", "code": "ENDED", "error": "", "line": None}
    try:
        done = subprocess.run(
            confined,
            env=own | {"PYTHONPATH": str(folder / "code")},
            cwd=out,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
        )
        found = json.loads((out / FOUND).read_bytes()[:1_000_000])
        said = done.stderr
    except subprocess.TimeoutExpired as error:
        found = {"failed": failed | {"code": "TIMEOUT"}}
        said = error.stderr or b""
    except (OSError, ValueError):  # killed, or it wrote something else
        found, said = {"failed": failed}, done.stderr
    return found | {"said": said.decode(errors="replace")[-4000:]}


# ---- the confined process


def main() -> None:
    """Do what the plan on the command line says, and write what was found."""
    plan = json.loads(sys.argv[1])
    torch.set_num_threads(1)  # as in a run
    found: dict[str, Any] = {}
    try:
        _try(plan, found)
    except BaseException:  # whatever the hospital's function does
        traceback.print_exc()  # read by the hospital only, if it asks for it
    (Path(plan["out"]) / FOUND).write_text(json.dumps(found), encoding="utf-8")


@contextmanager
def _stage(found: dict[str, Any], name: str, plan: Plan) -> Iterator[None]:
    """Note where it fails and how, without the text of the error."""
    found["stage"] = name
    try:
        yield
    except BaseException as error:
        found["failed"] = {"stage": name, **describe(error, plan["client"])}
        raise


def describe(error: BaseException, client: str) -> dict[str, Any]:
    """An error without its text: a code, the name of its class, and the line of the
    hospital's file at which it came up."""
    steps = traceback.extract_tb(error.__traceback__)
    file = client.rpartition(":")[0]
    line = next((s.lineno for s in reversed(steps) if s.filename == file), None)
    if isinstance(error, SyntaxError):
        line = error.lineno
    ours = bool(steps) and steps[-1].filename == turn.__file__
    code = "FAILED"
    if ours and isinstance(error, ValueError) and "the data are of" in str(error):
        code = "WRONG_SILO"
    elif isinstance(error, turn.NotBooked):
        code = "NOT_BOOKED"
    elif isinstance(error, FloatingPointError):
        code = "LOSS_NOT_FINITE"
    elif ours and isinstance(error, TypeError):
        code = "NOT_A_CLIENT"
    elif isinstance(error, KeyError):
        code = "KEY_MISSING"
    elif isinstance(error, OSError):
        code = "CANNOT_READ"
    name = type(error).__name__
    safe = name.isascii() and name.isidentifier() and not any(map(str.isdigit, name))
    return {"code": code, "error": name[:40] if safe else "an error", "line": line}


def _try(plan: Plan, found: dict[str, Any]) -> None:
    given, out = Path(plan["given"]), Path(plan["out"])
    asked = read_asked(given) if (given / RUN).exists() else None
    settings = asked.run.settings if asked else {}
    with _stage(found, "client function", plan):
        turn.load_function(plan["client"])
    with _stage(found, "data", plan):
        place = _place(plan, out)
        how = {"silo": plan["silo"], "place": place}
        client = turn.load_client(plan["client"], plan["data"], settings, **how)
        found["labels"] = _labels(client.silo)
    with _stage(found, "patients", plan):
        found["patients"] = _overlap(client.silo)
    with _stage(found, "units", plan):
        found["units"] = _units(client.silo, plan["ranges"])
    if not asked:
        return
    with _stage(found, "one batch", plan):
        if not plan["whole"]:
            few = _few(client.silo, int(settings.get("batch_size", 8)))
            client = replace(client, silo=few)
        update, _ = turn.train(asked.run, client, asked.start, round_index=0)
        place.check_booked(client.silo.name, 0)
        metrics = {str(k): float(v) for k, v in update.metrics.items()}
        if not all(map(math.isfinite, metrics.values())):
            raise FloatingPointError("a metric is not finite")
        found["numbers"] = [update.silo, update.num_examples, metrics]
        tensors = {str(k): v.detach().clone() for k, v in update.params.items()}
        save_file({k: v.contiguous() for k, v in tensors.items()}, out / UPDATE)


def _place(plan: Plan, out: Path) -> turn.Place:
    """A privacy account of the trial's own: nothing of it is released or spent."""
    (out / "privacy").mkdir()
    budget = plan["epsilon"], plan["delta"]
    return turn.Place(out / "privacy", "precheck", *budget)


def _part(silo: Any, name: str) -> Any:
    """A silo's examples for training or testing; None if it has none."""
    return getattr(silo, name, None)


def _y(examples: Any) -> Tensor | None:
    pair = isinstance(examples, tuple | list)
    y = examples[1] if pair else getattr(examples, "y", None)
    return torch.as_tensor(y) if y is not None else None


def _labels(silo: Any) -> dict[str, Any]:
    """Per part: how many examples, of which class, without a label; None if the labels
    are no classes."""
    found = {}
    for part in ("train", "test"):
        examples = _part(silo, part)
        y = _y(examples) if examples is not None else None
        if y is None or y.dim() != 1:
            found[part] = None
            continue
        missing = y.isnan() if y.is_floating_point() else y < 0
        kept = y[~missing]
        whole = not y.is_floating_point() or bool((kept == kept.round()).all())
        few = whole and len(kept.unique()) <= 100
        classes = zip(*kept.long().unique(return_counts=True), strict=True)
        counts = {int(k): int(n) for k, n in classes} if few else None
        found[part] = {"counts": counts, "missing": int(missing.sum()), "n": len(y)}
    return found


def _patients(silo: Any, part: str) -> list[str] | None:
    """Patients, one per example: of the silo, or of the files that it reads."""
    named = getattr(silo, f"{part}_patients", None)
    if named is not None:
        return [str(each) for each in named]
    examples, rows = _part(silo, part), None
    while examples is not None and not isinstance(examples, tuple | list):
        if hasattr(examples, "index"):  # `images.ImageFiles`
            patients = examples.index.patient
            chosen = range(len(patients)) if rows is None else rows
            return [str(patients[k]) for k in chosen]
        if isinstance(examples, Rows):
            own = examples.rows
            rows = own if rows is None else own[rows]
        examples = getattr(examples, "examples", None)
    return None


def _overlap(silo: Any) -> dict[str, Any]:
    """How many patients, or equal examples, stand in both parts."""
    if _part(silo, "train") is None or _part(silo, "test") is None:
        return {"known": False, "both": None}
    sides = [_patients(silo, part) for part in ("train", "test")]
    known = None not in sides
    if not known:
        sides = [_digests(_part(silo, part)) for part in ("train", "test")]
    return {"known": known, "both": len(set(sides[0]) & set(sides[1]))}


def _inputs(examples: Any) -> Iterator[Tensor]:
    """Inputs without augmentation, the first ones of a Dataset."""
    if isinstance(examples, tuple | list):
        yield from examples[0]
        return
    while hasattr(examples, "transform") and hasattr(examples, "examples"):
        examples = examples.examples
    for k in range(min(len(examples), LOOKED_AT)):
        yield torch.as_tensor(examples[k][0])


def _digests(examples: Any) -> list[str]:
    values = (x.contiguous().reshape(-1).view(torch.uint8) for x in _inputs(examples))
    return [hashlib.sha256(value.numpy().tobytes()).hexdigest() for value in values]


def _units(silo: Any, ranges: Mapping[str, Any]) -> dict[str, Any]:
    """Of each agreed quantity: "inside", "outside", a power of ten, or "no column"."""
    if not ranges:
        return {}
    x = torch.stack([each for each in _inputs(_part(silo, "train"))])
    return {name: _unit(x, agreed) for name, agreed in ranges.items()}


def _unit(x: Tensor, agreed: Mapping[str, float]) -> str | int:
    column, low, high = (agreed[key] for key in ("column", "low", "high"))
    if x.dim() < 2 or column >= x.shape[1]:
        return "no column"
    values = x[:, int(column)].reshape(-1).double()
    values = values[values.isfinite()]
    if not len(values):
        return "outside"
    inside = (values >= low) & (values <= high)
    if inside.double().mean() >= 0.95:
        return "inside"
    middle = values.median().item()
    for power in sorted(POWERS, key=abs):
        if not low <= middle <= high and low <= middle / 10.0**power <= high:
            return power
    return "outside"


def _few(silo: Any, n: int) -> Any:
    """The same silo with a batch to train on, and up to 16 to test with."""
    few = copy.copy(silo)
    for part, most in (("train", n), ("test", 16 * n)):
        examples = _part(silo, part)
        if examples is None:
            continue
        pair = isinstance(examples, tuple | list)
        size = len(examples[0] if pair else examples)
        rows = torch.linspace(0, size - 1, min(size, most)).long()  # of all classes
        if pair:
            parts = [torch.as_tensor(each)[rows] for each in examples]
            named = hasattr(examples, "_fields")
            cut = type(examples)(*parts) if named else type(examples)(parts)
        else:
            y = _y(examples)
            cut = Rows(examples, rows.numpy(), y[rows] if y is not None else None)
        if is_dataclass(few):
            few = replace(few, **{part: cut})
        else:
            setattr(few, part, cut)
    return few


if __name__ == "__main__":
    main()
