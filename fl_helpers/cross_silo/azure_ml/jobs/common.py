"""What the jobs share. With `run.json`, `start.py` and the files of `fl_helpers` beside
it, this folder is the code snapshot that `snapshot.write_snapshots` writes."""

from __future__ import annotations

import fl_helpers.cross_silo.short_lived  # noqa: F401, before PyTorch

# isort: split
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fl_helpers import exchange
from fl_helpers.cross_silo import turn
from fl_helpers.cross_silo.run import Run, from_plain
from fl_helpers.simulation import Metrics, Params

HERE = Path(__file__).resolve().parent
INITIAL, MEMORY = "initial.safetensors", "memory.safetensors"
KEPT = "entries that stay in the silo"  # who sends what a silo keeps for itself
BUDGET, SPENT = "budget.json", "PRIVACY_BUDGET_SPENT"
MLFLOW_NAMES = 50  # of metrics, that Azure ML takes in one run
torch.set_num_threads(1)  # the number of threads changes the last bits


def read_content() -> dict[str, Any]:
    """What `run.json` says: the plain run, the silos' names by their keys, and the
    silos' own functions, `client` and `prepare`."""
    return json.loads((HERE / "run.json").read_text(encoding="utf-8"))


def read_run() -> Run:
    """The run that this code snapshot belongs to, without content of its params."""
    return from_plain(read_content()["run"])


def load_client(
    args: Namespace, run: Run, place: turn.Place | None = None
) -> turn.Client:
    """The silo's own functions; ValueError if the data are another silo's."""
    content = read_content()
    entry, silo = here(content["client"]), content["silos"][args.silo]
    place = place or own_place(args, run, "draw")
    return turn.load_client(entry, args.data, run.settings, silo=silo, place=place)


def own_place(args: Namespace, run: Run, only: str) -> turn.Place | None:
    """The silo's budget, as it wrote it into its own store itself, and for this process
    a copy of the turn that was booked; None for a silo without an account."""
    if args.account is None:
        return None
    try:
        budget = json.loads((args.account / BUDGET).read_text(encoding="utf-8"))
        epsilon, delta = float(budget["epsilon"]), float(budget["delta"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"the silo's own {BUDGET} must be in its account's folder, with numbers "
            f"epsilon and delta: {error!r}"
        ) from None
    folder = Path(tempfile.mkdtemp())
    if only == "draw" and args.booked:
        shutil.copy(args.booked / turn.ACCOUNT, folder)
    return turn.Place(folder, run.name, epsilon, delta, only)


def here(entry: str) -> str:
    """A function's place; a file's is this folder."""
    return str(HERE / entry) if entry.split(":")[0].endswith(".py") else entry


def receive_model(args: Namespace, run: Run, ledger: exchange.Ledger | None) -> Params:
    """The global model after `args.round` rounds, and the silo's own entries."""
    own = {name: run.params[name] for name in sorted(run.keep_local)}
    if own:  # of whatever round: a silo may have missed some
        own = exchange.read_model(args.kept, own, silo=KEPT)
    return turn.receive(run, args.model, own, round_index=args.round, ledger=ledger)


def folder(text: str) -> Path:
    """A folder on the command line, whatever the process does to its own."""
    return Path(text).resolve()


def silo_parser() -> ArgumentParser:
    """What all jobs that read a silo's model and data are told."""
    parser = ArgumentParser()
    parser.add_argument("--silo", required=True)
    for name in ("round", "max_bytes"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--metrics", required=True)
    for name in ("data", "model", "private"):
        parser.add_argument(f"--{name}", type=folder, required=True)
    for name in ("kept", "account", "booked"):
        parser.add_argument(f"--{name}", type=folder)
    return parser


def gather_parser() -> ArgumentParser:
    """What the jobs are told that read one update of each silo."""
    parser = ArgumentParser()
    for name in ("round", "max_bytes"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--metrics", required=True)
    parser.add_argument("--report", type=folder, required=True)
    parser.add_argument("--updates", nargs="+", required=True, help="key=folder")
    return parser


def is_first() -> bool:
    """Whether this is the one process of a job, or the first of several: it writes."""
    return os.environ.get("RANK", "0") == "0"


def run_silo_job(
    job: Callable[[Namespace], None], parser: ArgumentParser, what: str
) -> None:
    """Do a silo's job with its arguments, see `run_privately`. what: is said outside,
    after the silo's name; {round} in it is the job's."""
    args = parser.parse_args()
    about = f"{args.silo}, {what.format(**vars(args))}"
    run_privately(args.private, about, lambda: job(args))


def run_privately(private: Path, what: str, job: Callable[[], None]) -> None:
    """Do a silo's job; all that it prints goes to `log.txt` in private, its own store.

    What a job prints, and what it writes to `outputs/` where it starts, would leave the
    silo: Azure ML keeps it in the workspace's store. Of an error only the type leaves,
    for its text may name a patient; of a spent budget, its code. Ends the process.
    """
    private.mkdir(parents=True, exist_ok=True)
    name = "log.txt" if is_first() else f"log_{int(os.environ['RANK'])}.txt"
    outside, log = os.dup(1), os.open(private / name, os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1), os.dup2(log, 2)  # for good: threads and exit handlers print, too
    os.chdir(private)
    try:
        job()
        said, code = "done", 0
    except BaseException as error:
        traceback.print_exc()
        spent = getattr(error, "code", None) == SPENT
        what_kind = SPENT if spent else type(error).__name__
        said, code = f"{what_kind}; more in the silo, private/{name}", 1
    os.write(outside, f"{what}: {said}\n".encode())
    sys.exit(code)


def limits(args: Namespace, run: Run) -> exchange.Limits:
    """What may leave a silo, as the plan says it."""
    metrics = frozenset(args.metrics.split(",")) - {""}
    return replace(run.limits, metrics=metrics, max_bytes=args.max_bytes)


def receive(
    args: Namespace, run: Run, expected: Params, found: dict[str, Metrics]
) -> Iterator[exchange.ReceivedUpdate]:
    """Updates, checked, in the order of the silos' names; found: gets their metrics."""
    ledger = exchange.Ledger(args.report / "ledger.jsonl")
    pairs, names = (
        (text.split("=", 1) for text in args.updates),
        read_content()["silos"],
    )
    for silo, path in sorted((names[key], path) for key, path in pairs):
        update = exchange.read_update(
            path,
            expected,
            silo=silo,
            round_index=args.round,
            limits=limits(args, run),
            ledger=ledger,
        )
        found[silo] = update.metrics
        yield replace(update, params=run.in_order(update.params))


def report(target: Path, round_index: int, found: Mapping[str, Metrics]) -> None:
    """Write the silos' metrics to `metrics.jsonl`, and to MLflow on Azure ML.

    Tests of a round are of the model that it began with. MLflow gets "silo/metric" at
    step `round_index`, in the run of the whole pipeline; a fault of it is printed.
    """
    lines = [
        {"round": round_index, "silo": silo, "metric": metric, "value": value}
        for silo, metrics in found.items()
        for metric, value in metrics.items()
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (target / "metrics.jsonl").write_text(text, encoding="utf-8")
    if os.environ.get("MLFLOW_TRACKING_URI") and importlib.util.find_spec("mlflow"):
        try:
            _log(lines, round_index)
        except Exception:  # the round is done, whatever becomes of its curves
            traceback.print_exc()


def _log(lines: list[dict[str, Any]], round_index: int) -> None:
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    import mlflow

    client = mlflow.MlflowClient()
    run = os.environ.get("AZUREML_ROOT_RUN_ID") or os.environ["MLFLOW_RUN_ID"]
    # The same names in each round: all silos' tests first, they are few and matter.
    order = sorted(lines, key=lambda line: (line["metric"][:5] != "test_", *_key(line)))
    for line in islice(order, MLFLOW_NAMES):
        name = f"{line['silo']}/{line['metric']}"
        client.log_metric(run, name, line["value"], step=round_index)
    if len(lines) > MLFLOW_NAMES:
        print(f"{len(lines) - MLFLOW_NAMES} metrics are only in metrics.jsonl")


def _key(line: Mapping[str, Any]) -> tuple[str, str]:
    return line["metric"], line["silo"]


def save_memory(target: Path, rule: Any) -> None:
    """Write what a server rule remembers, into the orchestrator's own store."""
    save_file(rule.state_dict(), target / MEMORY)


def load_memory(source: Path, rule: Any) -> None:
    """Let a server rule go on from there."""
    rule.load_state_dict(load_file(source / MEMORY))
