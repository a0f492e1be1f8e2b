"""Starting a run, and what is heard of it.

Used by `fleet.Fleet` on one machine. With silos on real ones, the coordinator calls
`play` on the server's machine, with a session of the administrator's kit.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fl_helpers import exchange
from fl_helpers.cross_silo.on_premises.certificates import certificate_problems
from fl_helpers.cross_silo.on_premises.job import write_job
from fl_helpers.cross_silo.on_premises.line import LOST, Line, Patience, RunError
from fl_helpers.cross_silo.on_premises.site import site_name
from fl_helpers.cross_silo.run import Run
from fl_helpers.simulation import Params

__all__ = ["Patience", "RunError", "new_events", "play", "result", "spans"]
LAST = ("done", "failed", "no_quorum")
LOOK = 2  # seconds between two questions to the server
# Seconds before a silo that came back may make the run start anew once more:
REJOIN = 300  # while the others go on without it
WAITED_FOR = 30  # while the round waits for it


def play(
    run: Run,
    session: Any,
    *,
    silos: Collection[str],
    server_kit: Path,
    jobs: Path,
    check: Callable[[], None] = lambda: None,
    timeout: float = 3600,
    patience: Patience = Patience(),  # noqa: B008 - it is frozen
) -> Iterator[dict[str, Any]]:
    """Start a run, or follow the job that plays it already, and yield its events until
    it is over; the last one is "done".

    session: of NVFlare's `new_secure_session`.
    silos: names of those that are asked.
    server_kit: the server's; it gets the run's results.
    jobs: a folder for what the engine is told.
    check: called again and again; raises if the run should end.
    timeout: seconds for the whole run.
    patience: with a silent server, and with an engine that gives up.

    Events of the run: start, round_start, update, refused (with what its code "means"),
    missing, back, waiting (whom for, how long), tested, asked_again (in a secure run,
    with the smaller set), round_end, damaged (a checkpoint, with its file), stopped,
    done. Events of this side: attached (with all that the job said so far after it),
    left_out (a silo that the job could not be given to), no_answer (of the server, for
    how many seconds), restart, certificate (what is wrong with the server's). Each is a
    dict with "event", "time" and what belongs to it.
    Raises RunError if the run fails. Closing the iterator, or an interrupt, aborts it;
    if this process is killed, the run goes on, and the same lines follow it.
    """
    line = Line(session, patience)
    watch = Watch(run, line, [*silos], server_kit / "runs" / run.name, check)
    watch.end = time.monotonic() + timeout
    for problem in certificate_problems(server_kit):
        yield _event("certificate", reason=problem)
    folder = write_job(run, jobs.resolve(), silos)  # else the engine looks elsewhere
    yield from watch.attach()
    yield from watch.play(folder)


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


class GivenUp(Exception):
    """The engine ended a run that had begun, and our controller had no say in it; or a
    job that it can no more be played in."""


class CameBack(GivenUp):
    """Silos are there again, and can take part in another job only."""


@dataclass
class Watch:
    """One run, as it is seen from the coordinator's side.

    folder: of the run, at the server. end: when the time for it is over. job: the
    engine's name of the job that plays it. seen: bytes of its log that were read.
    away: silos that are missing, as its events say. waiting: whether the run waits for
    them. left_out: silos that the job could not be given to, and why. looked: when
    those that are away were last looked for. rejoined: when a silo last made the run
    start anew. held: those that were told of as back, and must wait for that.
    """

    run: Run
    line: Line
    silos: list[str]
    folder: Path
    check: Callable[[], None]
    end: float = 0.0
    job: str = ""
    seen: int = 0
    away: set[str] = field(default_factory=set)
    waiting: bool = False
    left_out: dict[str, str] = field(default_factory=dict)
    looked: float = -math.inf
    rejoined: dict[str, float] = field(default_factory=dict)
    held: list[str] = field(default_factory=list)

    @property
    def log(self) -> Path:
        return self.folder / "events.jsonl"

    def pause(self, seconds: float = 0.05) -> None:
        self.check()
        if time.monotonic() > self.end:
            raise RunError(
                f"run {self.run.name!r} is not over in the time it was given"
            )
        time.sleep(seconds)

    def play(self, folder: Path) -> Iterator[dict[str, Any]]:
        """Follow the job that there is, or a new one, and another after it if that is
        given up. folder: what a new one is made of."""
        restarts = left = self.line.patience.restarts
        while True:
            try:
                if not self.job:
                    yield from self.gather()
                    yield from self.submit(folder)
                for event in self.follow():
                    left = restarts if event["event"] == "round_end" else left
                    yield event
                return
            except GivenUp as error:
                counts = not isinstance(error, CameBack)
                if counts and not left:
                    raise RunError(
                        f"run {self.run.name!r} ended {restarts + 1} times without a "
                        f"round between, as {error}; the server's log says which silo "
                        "reported a failure"
                    ) from None
                left, self.job = left - counts, ""
                yield _event("restart", reason=str(error))

    def attach(self) -> Iterator[dict[str, Any]]:
        """Take the job that was started before, if it still plays the run."""
        path = self.folder / "job.json"
        if not path.exists():
            return
        with contextlib.suppress(ValueError, KeyError):  # torn: it was not begun
            known = json.loads(path.read_text(encoding="utf-8"))
            job, seen = str(known["job"]), int(known["seen"])
            if any(each["event"] in LAST for each in new_events(self.log, seen)[0]):
                return  # it is over, even if the engine takes a while to say so
            while (lives := self.line.lives(job)) is None:
                yield from self.line.silence()
                self.pause(1)
            if lives:
                self.job, self.seen = job, seen
                yield _event("attached", job=job)

    def gather(self) -> Iterator[dict[str, Any]]:
        """If the run waits for its quorum, do so before the engine is told of it."""
        needed = self.run.quorum or len(self.silos)
        end, said = time.monotonic() + self.run.wait_for_quorum, 0.0
        while self.run.wait_for_quorum:
            there = self.line.connected()
            missing = [silo for silo in self.silos if site_name(silo) not in there]
            if len(self.silos) - len(missing) >= needed:
                return
            yield from self.line.silence()
            now = time.monotonic()
            if now > end:
                raise RunError(
                    f"run {self.run.name!r}: {missing} are not connected, the quorum "
                    f"is {needed}: their logs say why, look at network and dates of "
                    "certificates; then run the same lines again"
                )
            if now - said > self.line.patience.silence:
                said = now
                yield _event("waiting", silos=missing, seconds=round(end - now))
            self.pause(1)

    def submit(self, folder: Path) -> Iterator[dict[str, Any]]:
        """Have the run played, and note in which job."""
        self.seen = self.log.stat().st_size if self.log.exists() else 0
        while not (job := self.line.ask(self.line.session.submit_job, str(folder))):
            yield from self.line.silence()
            self.pause(1)
        self.job, self.away, self.waiting, self.left_out = job, set(), False, {}
        self.held = []
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "job.json"
        text = json.dumps({"job": job, "seen": self.seen})
        path.with_suffix(".tmp").write_text(text, encoding="utf-8")
        os.replace(path.with_suffix(".tmp"), path)

    def follow(self) -> Iterator[dict[str, Any]]:
        """The events of the job, until the last one; GivenUp if it ends without."""
        over, begun, told, asked = False, False, False, time.monotonic()
        try:
            while not over:
                self.pause()
                verdict = ""
                if (
                    time.monotonic() - asked > LOOK
                ):  # before the events: they come first
                    asked, verdict = time.monotonic(), self.line.verdict(self.job)
                    if not told:
                        told = yield from self._say_left_out()
                events = self._new_events()
                for event in events:
                    over, begun = event["event"] in LAST, True
                    yield event
                    if over and event["event"] != "done":
                        raise RunError(f"run {self.run.name!r}: {event['reason']}")
                if verdict and not events:
                    self._end(verdict, begun)
                if not over:
                    yield from self.line.silence()
                    yield from self._rejoin(events)
        finally:
            if not over:
                with contextlib.suppress(Exception):
                    self.line.session.abort_job(self.job)

    def _new_events(self) -> list[dict[str, Any]]:
        events, self.seen = new_events(self.log, self.seen)
        for event in events:
            self.line.heard()
            kind = event["event"]
            self.waiting = kind == "waiting" or (self.waiting and kind != "round_end")
            self.away |= {*event["silos"]} if kind == "waiting" else set()
            self.away |= {event["silo"]} if kind == "missing" else set()
            self.away -= {event["silo"]} if kind in ("back", "update") else set()
        return events

    def _end(self, verdict: str, begun: bool) -> None:
        """The engine says that the job is over, without a last event."""
        aborted = "ABORTED" in verdict  # that was somebody's wish
        if verdict == LOST or (not aborted and (begun or self.run.wait_for_quorum)):
            raise GivenUp(verdict)
        left = f"; left out: {self.left_out}" if self.left_out else ""
        raise RunError(
            f"run {self.run.name!r} ended as {verdict}; the server's log says why{left}"
        )

    def _say_left_out(self) -> Iterator[dict[str, Any]]:
        """Returns whether it is known by now who takes part."""
        sites = {site_name(silo): silo for silo in self.silos}
        found = self.line.left_out(self.job, sites)
        for site, reason in (found or {}).items():
            self.away.add(sites[site])
            self.left_out[sites[site]] = reason
            yield _event("left_out", silo=sites[site], reason=reason)
        return found is not None

    def _rejoin(self, events: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Start anew between two rounds, or in one that waits, for silos that came back
        and do not take part, for the engine gives a job to those only that are there
        when it begins."""
        between = any(event["event"] == "round_end" for event in events)
        if not (self.run.wait_for_quorum and self.away and (between or self.waiting)):
            return
        now = time.monotonic()
        if now - self.looked < LOOK:  # not at every turn
            return
        self.looked = now
        sites = {site_name(silo): silo for silo in self.away}
        found = sorted(sites[site] for site in self.line.idle(self.job, sites))
        pause = WAITED_FOR if self.waiting else REJOIN
        after = {k: pause + self.rejoined.get(k, -math.inf) - now for k in found}
        back = [silo for silo in found if after[silo] <= 0]
        if found and not back and found != self.held:
            self.held = found
            seconds = round(min(after.values()))
            reason = "they are back; for their sake the run started anew just before"
            yield _event("waiting", silos=found, seconds=seconds, reason=reason)
        if not back:
            return
        self.rejoined |= dict.fromkeys(back, now)
        self.line.ask(self.line.session.abort_job, self.job)
        until = time.monotonic() + 60
        while not self.line.verdict(self.job) and time.monotonic() < until:
            yield from self.line.silence()
            self.pause(0.5)
        yield from self._new_events()
        raise CameBack(f"{back} came back and take part again")


def _event(kind: str, **content: Any) -> dict[str, Any]:
    return {"event": kind, "time": round(time.time(), 3), **content}


def new_events(path: Path, start: int) -> tuple[list[dict[str, Any]], int]:
    """Events in the whole lines after byte `start`, and the byte after them.

    A line that is damaged is an event "damaged" with the file's name.
    """
    if not path.exists():
        return [], start
    with path.open("rb") as file:
        file.seek(start)
        whole = file.read().rpartition(b"\n")[0]
    lines = whole.splitlines()
    return [_parse(line, path) for line in lines], start + len(whole) + bool(lines)


def _parse(line: bytes, path: Path) -> dict[str, Any]:
    try:
        return {"event": "damaged", **json.loads(line)}
    except (ValueError, TypeError) as error:
        reason = f"a line of {path} cannot be read ({error}); the run does not need it"
        return _event("damaged", file=str(path), reason=reason)
