"""Starting a run, and what is heard of it.

Used by `fleet.Fleet` on one machine. With silos on real ones, the coordinator calls
`play` on the server's machine, with a session of the administrator's kit.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from fl_helpers import exchange
from fl_helpers.cross_silo.on_premises.job import write_job
from fl_helpers.cross_silo.run import Run
from fl_helpers.simulation import Params

LAST = ("done", "failed", "no_quorum")


class RunError(RuntimeError):
    """A run, a server or a silo failed; the message says which, and why."""


def play(
    run: Run,
    session: Any,
    *,
    silos: Collection[str],
    server_kit: Path,
    jobs: Path,
    check: Callable[[], None] = lambda: None,
    timeout: float = 3600,
    restarts: int = 2,
) -> Iterator[dict[str, Any]]:
    """Start a run and yield its events until it is over; the last one is "done".

    session: of NVFlare's `new_secure_session`.
    silos: names of those that are asked.
    server_kit: the server's; it gets the run's results.
    jobs: a folder for what the engine is told.
    check: called again and again; raises if the run should end.
    timeout: seconds for the whole run.
    restarts: how often a run goes on from its last round after the engine gave it up,
        as it does when one silo reports a failure.

    Events: start, round_start, update, refused, missing, back, tested, asked_again (in
    a secure run, with the smaller set), round_end, restart, stopped, done; each a dict
    with "event", "time" and what belongs to it.
    Raises RunError if the run fails. Closing the iterator, or an interrupt, aborts it.
    """
    log = server_kit / "runs" / run.name / "events.jsonl"
    folder = write_job(run, jobs.resolve(), silos)  # else the engine looks elsewhere
    end = time.monotonic() + timeout
    for left in reversed(range(restarts + 1)):
        try:
            yield from _play_once(run, session, folder, log, check, end)
            return
        except _GivenUp as error:
            if not left:
                raise RunError(
                    f"run {run.name!r} ended {restarts + 1} times, as {error}; the "
                    "server's log says which silo reported a failure"
                ) from None
            yield {"event": "restart", "time": time.time(), "reason": str(error)}


def result(run: Run, server_kit: Path) -> Params:
    """The final global model of a run that is done, without silos' own entries."""
    return exchange.read_model(server_kit / "runs" / run.name / "final", run.shared)


def spans(events: Iterable[dict[str, Any]]) -> Iterator[tuple[str, float, float, str]]:
    """From the start of each round to what came of it: (silo, start, end, event).

    start, end: seconds since the first event; event: "update", "refused" or "missing".
    """
    zero = begun = 0.0
    for event in events:
        zero = zero or event["time"]
        now = event["time"] - zero
        if event["event"] == "round_start":
            begun = now
        if event["event"] in ("update", "refused", "missing"):
            yield event["silo"], begun, now, event["event"]


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
