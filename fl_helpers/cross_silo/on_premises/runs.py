"""A run: what it is, how the engine is told, and what is heard of it.

Used by `fleet.Fleet` on one machine. With hospitals on real ones, the coordinator calls
`play` on the server's machine, with a session of the administrator's kit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from fl_helpers import exchange
from fl_helpers.aggregation import make_aggregate
from fl_helpers.cross_silo.on_premises.controller import RoundController
from fl_helpers.cross_silo.on_premises.executor import INITIAL, SiteExecutor
from fl_helpers.cross_silo.on_premises.site import Site
from fl_helpers.robust import ROBUST_RULES
from fl_helpers.simulation import Params

LAST = ("done", "failed", "no_quorum")
MAY_CHANGE = ("rounds", "quorum", "deadline", "stop")  # of a run that is resumed


class RunError(RuntimeError):
    """A run, a server or a hospital failed; the message says which, and why."""


@dataclass(frozen=True)
class Run:
    """A run of `simulation.run_rounds`, by names instead of functions.

    name: of its folder; started again under its name, a run goes on from its last
    round. params: initial model state. rounds, seed, keep_local: as in `run_rounds`.
    quorum: valid updates that a round needs. deadline: seconds that it may take.
    aggregate: "weighted_average", a server or robust rule with its options and the
    trainable names. settings: plain numbers and texts for the hospitals' own function.
    evaluate: the silos test the global model before they train, and the last one.
    metrics: names that may be reported ("test_loss" if `evaluate` gives "loss"), beside
    those of `exchange.Limits`; max_norm and max_bytes as there. stop: {"metric": name,
    "patience": rounds}, "higher_is_better": False for a loss; stop when the mean over
    silos no longer gets better.
    """

    name: str
    params: Params
    rounds: int
    seed: int
    quorum: int
    deadline: int = 60
    aggregate: str = "weighted_average"
    options: Mapping[str, float] = field(default_factory=dict)
    trainable: Collection[str] = ()
    keep_local: Collection[str] = ()
    settings: Mapping[str, float | str] = field(default_factory=dict)
    evaluate: bool = True
    metrics: Collection[str] = ()
    stop: Mapping[str, Any] | None = None
    max_norm: float | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,60}", self.name):
            raise ValueError(
                f"name must be letters, digits, _ and -, got {self.name!r}"
            )
        for key in ("rounds", "quorum", "deadline"):
            value = getattr(self, key)
            if type(value) is not int or value < 1:
                raise ValueError(f"{key} must be an integer >= 1, got {value!r}")
        unknown = sorted(set(self.keep_local) - self.params.keys())
        if unknown:
            raise ValueError(
                f"keep_local names entries that params lacks: {unknown[:3]}"
            )
        rule = (self.aggregate, self.params, self.trainable, self.options)
        make_aggregate(*rule, more=ROBUST_RULES)


def play(
    run: Run,
    session: Any,
    *,
    sites: Collection[Site],
    server_kit: Path,
    jobs: Path,
    check: Callable[[], None] = lambda: None,
    timeout: float = 3600,
    restarts: int = 2,
) -> Iterator[dict[str, Any]]:
    """Start a run and yield its events until it is over; the last one is "done".

    session: of NVFlare's `new_secure_session`. sites: who is asked. jobs: a folder for
    what the engine is told. check: called again and again; raises if it should end.
    restarts: how often a run goes on from its last round after the engine gave it up,
    as it does when one hospital reports a failure. Events: start, round_start, update,
    refused, missing, back, tested, round_end, restart, stopped, done; each a dict with
    "event", "time" and what belongs to it. Raises RunError if the run fails, or after
    `timeout` seconds. Closing the iterator, or an interrupt, aborts the run.
    """
    log = server_kit / "runs" / run.name / "events.jsonl"
    folder = write_job(run, jobs.resolve(), sites)  # else the engine looks elsewhere
    end = time.monotonic() + timeout
    for left in reversed(range(restarts + 1)):
        try:
            yield from _play_once(run, session, folder, log, check, end)
            return
        except _GivenUp as error:
            if not left:
                raise RunError(
                    f"run {run.name!r} ended {restarts + 1} times, as {error}; the "
                    "server's log says which hospital reported a failure"
                ) from None
            yield {"event": "restart", "time": time.time(), "reason": str(error)}


class _GivenUp(Exception):
    """The engine ended a run that had begun, and our controller had no say in it."""


def _play_once(
    run: Run,
    session: Any,
    folder: Path,
    log: Path,
    check: Callable[[], None],
    end: float,
) -> Iterator[dict[str, Any]]:
    seen = log.stat().st_size if log.exists() else 0
    over, begun = False, False
    job, asked = session.submit_job(str(folder)), time.monotonic()
    try:
        while not over:
            check()
            if time.monotonic() > end:
                raise RunError(f"run {run.name!r} is not over in the time it was given")
            verdict = ""
            if time.monotonic() - asked > 2:  # before the events: they come first
                asked, verdict = time.monotonic(), _verdict(session, job)
            events, seen = new_events(log, seen)
            for event in events:
                over, begun = event["event"] in LAST, True
                yield event
                if over and event["event"] != "done":
                    raise RunError(f"run {run.name!r}: {event['reason']}")
            if verdict and not events:
                if begun and "ABORTED" not in verdict:  # that was somebody's wish
                    raise _GivenUp(verdict)
                raise RunError(f"run {run.name!r} ended as {verdict}")
            time.sleep(0.05)
    finally:
        if not over:
            with contextlib.suppress(Exception):
                session.abort_job(job)


def result(run: Run, server_kit: Path) -> Params:
    """The final global model of a run that is done, without silos' own entries."""
    expected = {k: v for k, v in run.params.items() if k not in run.keep_local}
    folder = server_kit / "runs" / run.name / "final"
    found = exchange.read_model(folder, expected=expected)
    return {name: found[name] for name in expected}


def write_job(run: Run, jobs: Path, sites: Collection[Site]) -> Path:
    """The run as the engine takes it: names, numbers, the initial model; no code."""
    if run.quorum > len(sites):
        raise ValueError(f"quorum {run.quorum}, but there are {len(sites)} hospitals")
    folder = jobs / run.name
    app = folder / "app" / "config"
    app.mkdir(parents=True, exist_ok=True)
    save_file(dict(run.params), app / INITIAL)
    spec = {k: v for k, v in vars(run).items() if k != "params"}
    for key in ("trainable", "keep_local", "metrics"):
        spec[key] = sorted(spec[key])
    spec["names"], spec["silos"] = list(run.params), {s.name: s.silo for s in sites}
    spec["initial"] = hashlib.sha256((app / INITIAL).read_bytes()).hexdigest()
    spec["run"] = run_id(folder / "run.json", spec)
    own = {k: spec[k] for k in ("run", "seed", "names", "keep_local", "settings")}
    trainer = {
        "tasks": ["train", "evaluate"],
        "executor": _component(SiteExecutor, own),
    }
    rounds = {"id": "rounds", **_component(RoundController, {"spec": spec})}
    empty = ("components", "task_data_filters", "task_result_filters")
    base = {"format_version": 2, **{key: [] for key in empty}}
    poll = {"task_request_interval": 0.1}  # seconds; by default 2
    _dump(
        folder / "meta.json",
        {
            "name": run.name,
            "resource_spec": {},
            "min_clients": run.quorum,
            "deploy_map": {"app": ["@ALL"]},
        },
    )
    server = base | {"workflows": [rounds], "server": poll}
    _dump(app / "config_fed_server.json", server)
    _dump(app / "config_fed_client.json", base | {"executors": [trainer]})
    return folder


def run_id(path: Path, spec: Mapping[str, Any]) -> str:
    """The id of a run that was started before with the same content, or a new one."""
    fixed = {k: v for k, v in spec.items() if k not in MAY_CHANGE}
    fixed = json.loads(json.dumps(fixed))
    if not path.exists():
        _dump(path, {"run": uuid.uuid4().hex, "spec": fixed})
    kept = json.loads(path.read_text())
    differ = [k for k, v in fixed.items() if kept["spec"].get(k) != v]
    if differ:
        raise ValueError(
            f"run {spec['name']!r} was started before with another {differ}; give this "
            "one another name"
        )
    return kept["run"]


def new_events(path: Path, start: int) -> tuple[list[dict[str, Any]], int]:
    """Events in the whole lines after byte `start`, and the byte after them."""
    if not path.exists():
        return [], start
    with path.open("rb") as file:
        file.seek(start)
        whole = file.read().rpartition(b"\n")[0]
    lines = whole.splitlines()
    return [json.loads(line) for line in lines], start + len(whole) + bool(lines)


def _verdict(session: Any, job: str) -> str:
    """How the engine says that the job ended; empty if it has not."""
    with contextlib.suppress(Exception):  # the next look may work
        status = str(session.get_job_meta(job).get("status"))
        return status if status.startswith(("FINISHED", "FAILED", "ABORTED")) else ""
    return ""


def _component(kind: type, args: Mapping[str, Any]) -> dict[str, Any]:
    return {"path": f"{kind.__module__}.{kind.__name__}", "args": args}


def _dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
