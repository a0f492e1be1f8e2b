"""A finished run in MLflow, in a folder on this machine, to compare it with others.

Nothing is logged unless you call this, and MLflow's usage telemetry is off. Needs
MLflow, an extra: `pip install "mlflow-skinny>=3,<4" SQLAlchemy alembic` is the least
that writes a local store (SQLite; MLflow no longer keeps up its file store). Copy this
file on its own.
"""

from __future__ import annotations

import math
import os
import re
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]

NO_TELEMETRY = ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK")
KINDS = (".safetensors", ".json", ".jsonl", ".html", ".csv", ".txt", ".md", ".png")


def log_run(
    rounds: Sequence[Record],
    store: str | Path,
    *,
    title: str,
    engine: str = "simulation",
    settings: Mapping[str, Any] | None = None,
    files: Iterable[str | Path] = (),
    experiment: str = "federated learning",
    remote: bool = False,
) -> str:
    """Log a finished run: one MLflow run, and one within it per silo. Returns its id.

    rounds: `History.rounds`, `rounds_of_events` or `rounds_of_metrics`: the same names
    from each. store: a folder, made if need be, for `mlflow.db` and the files; MLflow
    notes its path, so leave it there. settings: seed, learning rate and so on, become
    parameters. files: the model as safetensors, the report, ledgers; of the kinds in
    KINDS, so no pickle. remote: store is a tracking URI instead, and everything goes
    there, names of silos too.

    A step is a round, from 1. Per silo: what training returned, under its own name, and
    tests as "test_...". For all: "mean_test_..." if every silo tested has a value,
    silos_used, silos_missing; bytes_down, bytes_up and seconds if recorded. Values that
    are not finite are left out.

    Telemetry stays off in this process. Each call adds a run; one that raises on its
    way is marked FAILED. Raises ValueError without a round, for an address without
    `remote`, or for a file that is not taken; ImportError without MLflow.
    """
    if not rounds:
        raise ValueError("rounds must have at least one record, got none; run it first")
    paths = _checked(files)
    address = re.match(r"([A-Za-z][\w+.-]+):", str(store))  # one letter: Windows' disks
    if address and not remote:  # not shown whole: it may hold a password
        raise ValueError(
            f"store must be a folder on this machine, got an address ({address[1]}:); "
            "remote=True sends the run there"
        )
    folder, uri, where = Path(store).absolute(), str(store), None
    if not remote:
        uri, where = f"sqlite:///{_database(folder).as_posix()}", folder / "files"
    client = _client(uri)
    group = client.get_experiment_by_name(experiment)
    if group is None:
        client.create_experiment(experiment, where and where.as_uri())
        group = client.get_experiment_by_name(experiment)
    with _run(client, group.experiment_id, title, {"engine": engine}) as run:
        for name, value in (settings or {}).items():
            client.log_param(run, name, value)
        _log(client, run, {r["round"] + 1: _of_all(r) for r in rounds})
        for silo, rows in _per_silo(rounds).items():
            tags = {"mlflow.parentRunId": run, "silo": silo}
            with _run(client, group.experiment_id, silo, tags) as child:
                _log(client, child, rows)
        for path in paths:
            client.log_artifact(run, str(path))
    return run


def _checked(files: Iterable[str | Path]) -> list[Path]:
    """The files, if each exists, has a name of its own and is of a kind in KINDS."""
    paths = [Path(file) for file in files]
    if len({path.name for path in paths}) < len(paths):
        raise ValueError("two files have the same name; give each its own")
    for path in paths:
        with path.open("rb") as file:
            head = file.read(9)  # of safetensors: the header's length, and its start
        broken = path.suffix == ".safetensors" and head[8:] != b"{"
        if path.suffix not in KINDS or broken:
            raise ValueError(
                f"{path} is not one of {', '.join(KINDS)}; a pickle can run code when "
                "it is loaded: write the model with `exchange.write_model`"
            )
    return paths


def _database(folder: Path) -> Path:
    """The folder's database, tried first: MLflow would try again for an hour."""
    if set("?%") & set(str(folder)):  # an address would read them as its own
        raise ValueError(
            f"store must have no ? or %, got {folder}; name another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with closing(sqlite3.connect(folder / "mlflow.db")) as database:
            database.execute("SELECT name FROM sqlite_master").fetchall()
    except sqlite3.Error as error:
        raise ValueError(
            f"{folder / 'mlflow.db'} is no database that can be opened ({error}); name "
            "another folder"
        ) from error
    return folder / "mlflow.db"


def _client(uri: str) -> Any:
    """MLflow's client, its telemetry off before the import and at every call."""
    os.environ.update(dict.fromkeys(NO_TELEMETRY, "true"))
    try:
        from mlflow import MlflowClient

        return MlflowClient(uri, registry_uri=uri)
    except ImportError as error:
        raise ImportError(
            f"tracking needs MLflow with a local store ({error}); "
            'pip install "mlflow-skinny>=3,<4" SQLAlchemy alembic'
        ) from error


@contextmanager
def _run(client: Any, group: str, name: str, tags: dict[str, str]) -> Iterator[str]:
    run = client.create_run(group, run_name=name, tags=tags).info.run_id
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    finally:
        client.set_terminated(run, status)


def _per_silo(rounds: Sequence[Record]) -> dict[str, dict[int, dict[str, float]]]:
    """{silo: {step: metrics}}, of all silos that a record names."""
    kinds = ("silos", "missing", "train", "test")
    names = {name for r in rounds for kind in kinds for name in r.get(kind, ())}

    def row(record: Record, silo: str) -> dict[str, float]:
        tests = record.get("test", {}).get(silo, {})
        tests = {f"test_{name}": value for name, value in tests.items()}
        return {**record.get("train", {}).get(silo, {}), **tests}

    steps = {record["round"] + 1: record for record in rounds}
    return {n: {step: row(r, n) for step, r in steps.items()} for n in sorted(names)}


def _of_all(record: Record) -> dict[str, float]:
    """A round's metrics of the federation."""
    row: dict[str, float] = {"silos_used": len(record["silos"])}
    row["silos_missing"] = len(record.get("missing", ()))
    sums = ("bytes_down", "bytes_up", "seconds")
    row |= {key: record[key] for key in sums if record.get(key) is not None}
    tests = list(record.get("test", {}).values())
    for name in {key for metrics in tests for key in metrics}:
        values = [metrics.get(name, math.nan) for metrics in tests]
        row[f"mean_test_{name}"] = sum(values) / len(values)  # NaN if a silo lacks it
    return row


def _log(client: Any, run: str, rows: Mapping[int, Mapping[str, float]]) -> None:
    """Log {step: metrics}, without values that are not finite."""
    from mlflow.entities import Metric

    now = int(1000 * time.time())
    for step, row in rows.items():
        kept = {k: float(v) for k, v in row.items() if math.isfinite(v)}
        client.log_batch(run, [Metric(k, v, now, step) for k, v in kept.items()])
