"""A finished run in MLflow, in a folder on this machine, to compare it with others.

Nothing here is used unless you call it; MLflow's usage telemetry is off. Needs MLflow,
an extra: `pip install "mlflow-skinny>=3,<4" SQLAlchemy alembic`, the smallest set that
writes a local store (SQLite; MLflow's file store is no longer kept up), or all of
`mlflow` to look at it in a browser. Copy this file on its own.
"""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]

NO_TELEMETRY = ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK")
KINDS = (".safetensors", ".json", ".jsonl", ".html", ".csv", ".txt", ".md", ".png")
BATCH = 1000  # metrics that MLflow takes at once


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

    rounds: `History.rounds`, `rounds_of_events` or `rounds_of_metrics`; from all three,
    the same names. store: a folder, made if need be, that gets `mlflow.db` and the
    files; MLflow notes its path, so leave it there. settings: seed, learning rate and
    so on, as parameters. files: the model as safetensors, the report, ledgers; of the
    kinds in KINDS, so no pickle. remote: store is a tracking URI instead, and titles,
    names of silos, metrics and files go there.

    A step is a round, from 1. Per silo: what training returned, as it is called, and
    tests as "test_...". For all: "mean_test_..." if every silo tested has a value,
    silos_used, silos_missing, and bytes_down, bytes_up, seconds if they are recorded.
    Values that are not finite are left out.

    Telemetry stays off in this process. Each call makes another run; one that raises on
    its way is marked FAILED. Raises ValueError without a round, for an address without
    `remote`, or for a file that is not taken; ImportError without MLflow; RuntimeError
    if it was imported before, with its telemetry on.
    """
    if not rounds:
        raise ValueError("rounds must have at least one record, got none; run it first")
    paths = _checked(files)
    address = re.match(
        r"([A-Za-z][\w+.-]+):", str(store)
    )  # one letter is a Windows disk
    if address and not remote:  # not shown whole: it may hold a password
        raise ValueError(
            f"store must be a folder on this machine, got a {address[1]}: address; "
            "remote=True sends the run there"
        )
    folder = Path(store).absolute()
    client = _client(str(store) if remote else f"sqlite:///{_made(folder)}/mlflow.db")
    where = None if remote else (folder / "files").as_uri()
    found = client.get_experiment_by_name(experiment)
    group = (
        found.experiment_id if found else client.create_experiment(experiment, where)
    )

    run = client.create_run(group, run_name=title, tags={"engine": engine}).info.run_id
    open_runs = [run]
    try:
        for name, value in (settings or {}).items():
            client.log_param(run, name, value)
        _log(client, run, _of_all(rounds))
        for silo, metrics in _per_silo(rounds).items():
            tags = {"mlflow.parentRunId": run, "silo": silo}
            child = client.create_run(group, run_name=silo, tags=tags).info.run_id
            open_runs.append(child)
            _log(client, child, metrics)
        for path in paths:
            client.log_artifact(run, str(path))
    except BaseException:
        for each in open_runs:
            client.set_terminated(each, "FAILED")
        raise
    for each in open_runs:
        client.set_terminated(each)
    return run


def _checked(files: Iterable[str | Path]) -> list[Path]:
    """The files, if each exists, has a name of its own and is of a kind in KINDS."""
    paths = [Path(file) for file in files]
    names = [path.name for path in paths]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} is not a file; name files that exist")
        if names.count(path.name) > 1:
            raise ValueError(
                f"two files are called {path.name}; give each its own name"
            )
        with path.open("rb") as file:
            head = file.read(9)
        broken = path.suffix == ".safetensors" and head[8:] != b"{"
        if path.suffix not in KINDS or broken:
            raise ValueError(
                f"{path} is not one of {', '.join(KINDS)}; a pickle runs code when it is "
                "loaded: write the model with `exchange.write_model`"
            )
    return paths


def _made(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    return folder.as_posix()


def _client(uri: str) -> Any:
    """MLflow's client, with telemetry off before it is imported: it starts there."""
    off = [os.environ.get(name, "").lower() in ("true", "1") for name in NO_TELEMETRY]
    if "mlflow" in sys.modules and not any(off):
        raise RuntimeError(
            "mlflow was imported with its telemetry on; set "
            f"{NO_TELEMETRY[0]}=true before, or import it after this call"
        )
    os.environ.update(dict.fromkeys(NO_TELEMETRY, "true"))
    try:
        from mlflow import MlflowClient

        return MlflowClient(uri, registry_uri=uri)
    except ImportError as error:
        raise ImportError(
            f"tracking needs MLflow with a local store ({error}); "
            'pip install "mlflow-skinny>=3,<4" SQLAlchemy alembic'
        ) from error


def _per_silo(rounds: Sequence[Record]) -> dict[str, list[tuple[str, float, int]]]:
    """{silo: [(metric, value, step)]}, of all silos that a record names."""
    kinds = ("silos", "missing", "train", "test")
    names = {name for r in rounds for kind in kinds for name in r.get(kind, ())}
    found: dict[str, list[tuple[str, float, int]]] = {
        name: [] for name in sorted(names)
    }
    for record in rounds:
        for kind, prefix in (("train", ""), ("test", "test_")):
            for silo, metrics in record.get(kind, {}).items():
                found[silo] += [
                    (prefix + k, v, record["round"] + 1) for k, v in metrics.items()
                ]
    return found


def _of_all(rounds: Sequence[Record]) -> list[tuple[str, float, int]]:
    """[(metric, value, step)] of the federation."""
    found: list[tuple[str, float, int]] = []
    for record in rounds:
        row: dict[str, float] = {"silos_used": len(record["silos"])}
        row["silos_missing"] = len(record.get("missing", ()))
        for key in ("bytes_down", "bytes_up", "seconds"):
            row |= {key: record[key]} if record.get(key) is not None else {}
        tests = list(record.get("test", {}).values())
        for name in dict.fromkeys(key for metrics in tests for key in metrics):
            values = [metrics.get(name, math.nan) for metrics in tests]
            row[f"mean_test_{name}"] = sum(values) / len(values)  # NaN: one has none
        found += [(name, value, record["round"] + 1) for name, value in row.items()]
    return found


def _log(client: Any, run: str, metrics: Sequence[tuple[str, float, int]]) -> None:
    from mlflow.entities import Metric

    now = int(1000 * time.time())
    kept = [
        Metric(k, float(v), now, step) for k, v, step in metrics if math.isfinite(v)
    ]
    for i in range(0, len(kept), BATCH):
        client.log_batch(run, metrics=kept[i : i + BATCH])
