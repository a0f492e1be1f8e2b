"""What the jobs share. With `run.json` and the files of `fl_helpers` beside it, this
folder is the code snapshot that `pipeline.write_snapshots` writes."""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib
import importlib.util
import json
import math
import os
import runpy
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fl_helpers import exchange
from fl_helpers.aggregation import make_aggregate
from fl_helpers.cross_silo.turn import Client, load_client
from fl_helpers.robust import ROBUST_RULES

HERE = Path(__file__).resolve().parent
INITIAL, MEMORY = "initial.safetensors", "memory.safetensors"
KEPT = "entries that stay in the silo"  # who sends what a silo keeps for itself
torch.set_num_threads(1)  # the number of threads changes the last bits
atexit.register(gc.freeze)  # a job that ends need not take torch apart: seconds


@dataclass(frozen=True)
class Run:
    """The content of `run.json`.

    silos: {key: name}. entries: {name: [shape, dtype]} of the model's state, in the
    model's order. The other fields are as in `pipeline.build_pipeline`.
    """

    silos: dict[str, str]
    entries: dict[str, list[Any]]
    keep_local: list[str]
    client: str
    prepare: str
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

    def in_order(self, params: Mapping[str, Any]) -> exchange.Params:
        """The model's own order of entries: a rule may add up, and the order shows."""
        return {name: params[name] for name in self.entries if name in params}

    def load_client(self, data: Path, key: str) -> Client:
        """The silo's own functions; ValueError if the data are another silo's."""
        entry, silo = _here(self.client), self.silos[key]
        return load_client(entry, data, self.settings, silo=silo)

    def load_prepare(self) -> Callable[[Path, Path, dict[str, Any]], None]:
        place, _, name = _here(self.prepare).rpartition(":")
        if place.endswith(".py"):
            return runpy.run_path(place)[name]
        return getattr(importlib.import_module(place), name)

    def read_state(self, args: Namespace, ledger: exchange.Ledger) -> exchange.Params:
        """The global model after `args.round` rounds, and the silo's own entries."""
        index = args.round
        params = exchange.read_model(
            args.model, self.expected(), round_index=index, ledger=ledger
        )
        if self.keep_local:
            own = self.expected(kept=True)
            # Of whatever round: a silo may have missed some.
            params |= exchange.read_model(args.kept, own, silo=KEPT)
        return self.in_order(params)

    def rule(self, params: exchange.Params) -> Any:
        """The aggregation, standing at the shared entries of the model."""
        names = [name for name in self.trainable if name not in self.keep_local]
        rule = (self.aggregate, params, names, self.options)
        return make_aggregate(*rule, more=ROBUST_RULES)


def read_run() -> Run:
    """The run that this code snapshot belongs to."""
    return Run(**json.loads((HERE / "run.json").read_text(encoding="utf-8")))


def _here(entry: str) -> str:
    """A function's place; a file's is this folder."""
    return str(HERE / entry) if entry.split(":")[0].endswith(".py") else entry


def arguments(folders: str, values: str = "", updates: bool = False) -> Namespace:
    """Read the command line. Names with a "?" may be absent, values are texts or, if
    they end in "=", integers; updates: key=folder for each silo."""
    parser = argparse.ArgumentParser()
    for name in folders.split():
        must = not name.endswith("?")
        parser.add_argument(f"--{name.rstrip('?')}", type=_folder, required=must)
    for name in values.split():
        kind = int if name.endswith("=") else str
        parser.add_argument(f"--{name.rstrip('=')}", type=kind, required=True)
    if updates:
        parser.add_argument("--updates", nargs="+", required=True)
    return parser.parse_args()


def _folder(text: str) -> Path:
    return Path(text).resolve()


def run_privately(folder: Path, what: str, job: Callable[[], None]) -> None:
    """Do a silo's job; all that it prints goes to `log.txt` in folder, its own store.

    What a job prints, and what it writes to `outputs/` where it starts, would leave the
    silo: Azure ML keeps it in the workspace's store. Of an error only the type leaves,
    for its text may name a patient. Ends the process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outside, log = os.dup(1), os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1), os.dup2(log, 2)  # for good: threads and exit handlers print, too
    os.chdir(folder)
    try:
        job()
        said, code = "done", 0
    except BaseException as error:
        traceback.print_exc()
        said, code = f"{type(error).__name__}; more in the silo, private/log.txt", 1
    os.write(outside, f"{what}: {said}\n".encode())
    sys.exit(code)


def test(client: Client, params: exchange.Params) -> dict[str, float]:
    """Metrics of the model on the silo's test set, those that are numbers."""
    found = client.evaluate(params, client.silo) if client.evaluate else {}
    metrics = {f"test_{name}": float(value) for name, value in found.items()}
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def limits(args: Namespace, max_norm: float | None = None) -> exchange.Limits:
    """What may leave a silo, as the plan says it."""
    return exchange.Limits(
        max_norm=max_norm,
        metrics=frozenset(args.metrics.split(",")) - {""},
        max_bytes=args.max_bytes,
    )


def receive(
    args: Namespace, run: Run, expected: exchange.Params, found: dict[str, Any]
) -> Iterator[exchange.ReceivedUpdate]:
    """Updates, checked, in the order of the silos' names; found: gets their metrics."""
    ledger = exchange.Ledger(args.report / "ledger.jsonl")
    pairs = [update.split("=", 1) for update in args.updates]
    for silo, folder in sorted((run.silos[key], folder) for key, folder in pairs):
        update = exchange.read_update(
            folder,
            expected,
            silo=silo,
            round_index=args.round,
            limits=limits(args, run.max_norm),
            ledger=ledger,
        )
        found[silo] = update.metrics
        yield replace(update, params=run.in_order(update.params))


def report(folder: Path, round_index: int, found: dict[str, dict[str, float]]) -> None:
    """Write the silos' metrics to `metrics.jsonl`, and to MLflow on Azure ML.

    Tests of a round are of the model that it began with. MLflow gets "silo/metric" at
    step `round_index`, in the run of the whole pipeline.
    """
    lines = [
        {"round": round_index, "silo": silo, "metric": metric, "value": value}
        for silo, metrics in found.items()
        for metric, value in metrics.items()
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    if os.environ.get("MLFLOW_TRACKING_URI") and importlib.util.find_spec("mlflow"):
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        import mlflow

        client = mlflow.MlflowClient()
        run = os.environ.get("AZUREML_ROOT_RUN_ID") or os.environ["MLFLOW_RUN_ID"]
        for line in lines:
            name = f"{line['silo']}/{line['metric']}"
            client.log_metric(run, name, line["value"], step=round_index)


def save_memory(folder: Path, rule: Any) -> None:
    """Write what a server rule remembers, into the orchestrator's own store."""
    save_file(rule.state_dict(), folder / MEMORY)


def load_memory(folder: Path, rule: Any) -> None:
    """Let a server rule go on from there."""
    rule.load_state_dict(load_file(folder / MEMORY))
