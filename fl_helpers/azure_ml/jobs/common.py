"""What the jobs share: the run that they belong to, and a silo's private log.

All of this folder, `run.json` and the files of `fl_helpers` are one code snapshot.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fl_helpers import exchange
from fl_helpers.aggregation import make_aggregate
from fl_helpers.client import Client, load_client

HERE = Path(__file__).resolve().parent
INITIAL, MEMORY = "initial.safetensors", "memory.safetensors"
KEPT = "entries that stay in the silo"  # who sends what a silo keeps for itself
torch.set_num_threads(1)  # the number of threads changes the last bits


@dataclass(frozen=True)
class Run:
    """The content of `run.json`, as `pipeline.write_snapshot` wrote it.

    silos: {key: name}. entries: {name: [shape, dtype]} of the model's state, in the
    model's order. The other fields are as in `pipeline.build_pipeline`.
    """

    silos: dict[str, str]
    entries: dict[str, list[Any]]
    keep_local: list[str]
    client: str
    settings: dict[str, Any]
    evaluate: bool
    aggregate: str
    options: dict[str, float]
    trainable: list[str]
    max_norm: float | None

    def expected(self, *, kept: bool = False) -> exchange.Params:
        """Shapes and dtypes of the entries that are shared, or of those that stay."""
        return {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            for name, (shape, dtype) in self.entries.items()
            if (name in self.keep_local) == kept
        }

    def load_client(self, data: Path, key: str) -> Client:
        """The silo's own functions; ValueError if the data are another silo's."""
        place = self.client
        if place.split(":")[0].endswith(".py"):
            place = str(HERE / place)
        client = load_client(place, data, self.settings)
        if client.silo.name != self.silos[key]:
            raise ValueError(
                f"the data are of {client.silo.name!r}, this is {self.silos[key]!r}"
            )
        return client

    def rule(self, params: exchange.Params) -> Any:
        """The aggregation, standing at the shared entries of the model."""
        names = [name for name in self.trainable if name not in self.keep_local]
        return make_aggregate(self.aggregate, params, names, self.options)


def read_run() -> Run:
    """The run of this code snapshot."""
    return Run(**json.loads((HERE / "run.json").read_text(encoding="utf-8")))


def arguments(*folders: str, **others: type) -> argparse.Namespace:
    """Read the command line: `--name folder` for each; ends with a dash: may be absent."""
    parser = argparse.ArgumentParser()
    for name in folders:
        required = not name.endswith("-")
        parser.add_argument(f"--{name.rstrip('-')}", type=Path, required=required)
    for name, kind in others.items():
        nargs = "+" if kind is dict else None
        read = _pair if kind is dict else kind
        parser.add_argument(f"--{name}", type=read, nargs=nargs, required=True)
    return parser.parse_args()


def _pair(text: str) -> tuple[str, Path]:
    key, _, folder = text.partition("=")
    return key, Path(folder)


@contextmanager
def privately(folder: Path, what: str) -> Iterator[None]:
    """Send all that is printed within to `log.txt` in folder, a silo's own store.

    What a job prints leaves the silo: Azure ML keeps it in the workspace's store. Of an
    error, only its type is printed, for its text may name a patient.
    """
    folder.mkdir(parents=True, exist_ok=True)
    failed = ""
    with (folder / "log.txt").open("ab", buffering=0) as log:
        sys.stdout.flush(), sys.stderr.flush()
        outside = [os.dup(1), os.dup(2)]
        try:
            os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
            yield
        except BaseException as error:
            traceback.print_exc()
            failed = type(error).__name__
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            for number, copy in enumerate(outside, start=1):
                os.dup2(copy, number), os.close(copy)
    if failed:
        sys.exit(f"{what}: {failed}; its text stays in the silo, in private/log.txt")
    print(f"{what}: done")


def test(client: Client, params: exchange.Params) -> dict[str, float]:
    """Metrics of the model on the silo's test set, those that are numbers."""
    found = client.evaluate(params, client.silo) if client.evaluate else {}
    metrics = {f"test_{name}": float(value) for name, value in found.items()}
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def limits(metrics: str, max_norm: float | None, max_bytes: int) -> exchange.Limits:
    """What may leave a silo. metrics: names with commas between."""
    allowed = frozenset(name for name in metrics.split(",") if name)
    return exchange.Limits(max_norm=max_norm, metrics=allowed, max_bytes=max_bytes)


def in_order(params: Mapping[str, Any], run: Run) -> exchange.Params:
    """The model's own order of entries: a rule may add up, and the order shows."""
    return {name: params[name] for name in run.entries if name in params}


def received(
    args: argparse.Namespace, run: Run, what: exchange.Params, found: dict[str, Any]
) -> Iterator[exchange.ReceivedUpdate]:
    """Updates, checked, in the order of the silos' names; found: gets their metrics."""
    ledger = exchange.Ledger(args.report / "ledger.jsonl")
    allowed = limits(args.metrics, run.max_norm, args.max_bytes)
    folders = {run.silos[key]: folder for key, folder in args.updates}
    for silo in sorted(folders):
        update = exchange.read_update(
            folders[silo],
            what,
            silo=silo,
            round_index=args.round,
            limits=allowed,
            ledger=ledger,
        )
        found[silo] = update.metrics
        yield replace(update, params=in_order(update.params, run))


def report(folder: Path, round_index: int, found: dict[str, dict[str, float]]) -> None:
    """Write metrics to `metrics.jsonl`, and to MLflow if Azure ML listens.

    Tests of a round are of the model that it began with. MLflow gets "silo/metric" at
    step `round_index`, on the run of the whole pipeline.
    """
    lines = [
        {"round": round_index, "silo": silo, "metric": metric, "value": value}
        for silo, metrics in found.items()
        for metric, value in metrics.items()
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    if os.environ.get("MLFLOW_TRACKING_URI") and importlib.util.find_spec("mlflow"):
        import mlflow

        client = mlflow.MlflowClient()
        run = os.environ.get("AZUREML_ROOT_RUN_ID") or os.environ["MLFLOW_RUN_ID"]
        for line in lines:
            key = f"{line['silo']}/{line['metric']}"
            client.log_metric(run, key, line["value"], step=round_index)


def save_memory(folder: Path, rule: Any) -> None:
    """Write what a server rule remembers, into the orchestrator's own store."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(rule.state_dict(), folder / MEMORY)


def load_memory(folder: Path, rule: Any) -> None:
    """Let a server rule go on from there."""
    rule.load_state_dict(load_file(folder / MEMORY))
