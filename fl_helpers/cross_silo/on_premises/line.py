"""The line to the coordinator's server: what is asked over it, and what is made of
its silence. Only errors of the connection are borne; all others are raised."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from nvflare.fuel.flare_api.api_spec import (
    InvalidTarget,
    JobNotFound,
    NoClientsAvailable,
    NoReply,
    SessionClosed,
)

from fl_helpers.cross_silo.on_premises.refusals import explained

OVER = ("FINISHED", "FAILED", "ABORTED", "ABANDONED")  # how such a status begins
FRESH = 25  # seconds since a site's last heartbeat, which comes every 10
GONE = 5  # looks in a row that do not find a job before it counts as lost
LOST = "LOST, the server was started anew"


class RunError(RuntimeError):
    """A run, a server or a silo failed; the message says which, and why."""


@dataclass(frozen=True)
class Patience:
    """silence: seconds without an answer of the server, after which that is an event,
    and again. give_up: seconds of it that end the run. restarts: how often in a row,
    without a finished round between them, a run goes on from its last round after the
    engine gave it up, as it does when one silo reports a failure.
    """

    silence: float = 30
    give_up: float = 600
    restarts: int = 2


class Line:
    """A session of NVFlare's `new_secure_session`, for one run."""

    def __init__(self, session: Any, patience: Patience) -> None:
        self.session, self.patience = session, patience
        self.answered = self.said = time.monotonic()
        self.reason = ""
        self.missed = 0  # looks that did not find the job

    def heard(self) -> None:
        """There was a sign of life."""
        self.answered = self.said = time.monotonic()

    def ask(self, call: Callable[..., Any], *given: Any) -> Any:
        """The answer of one of the session's methods; None if it cannot connect."""
        try:
            found = call(*given)
        except ConnectionError as error:
            self.reason = str(error)
            return None
        except SessionClosed as error:
            raise RunError(
                "the session with the server was closed on this side: open one and run "
                "the same lines again, the run goes on"
            ) from error
        self.heard()
        return found

    def silence(self) -> Iterator[dict[str, Any]]:
        """An event if there was no answer for long; RunError for too long."""
        now = time.monotonic()
        silent = round(now - self.answered)
        if silent >= self.patience.give_up:
            raise RunError(
                f"the server has not answered for {silent} s ({self.reason}): start "
                "it; its log says why it ended. Then run the same lines again: the run "
                "goes on from its last finished round"
            )
        if now - self.said >= self.patience.silence:
            self.said = now
            about = {"seconds": silent, "reason": self.reason}
            yield {"event": "no_answer", "time": time.time(), **about}

    def verdict(self, job: str) -> str:
        """How the engine says that the job ended; empty if it has not.

        After a restart the server lists a job of before as running for ever: one that
        it does not run is lost.
        """
        meta = self.ask(self.session.get_job_meta, job)
        status = str(meta.get("status")) if meta else ""
        if status.startswith(OVER):
            return status
        self.missed += 1
        if not meta or not self._should_run(status) or self._runs(job) is not False:
            self.missed = 0
        return LOST if self.missed >= GONE else ""

    def lives(self, job: str) -> bool | None:
        """Whether a job of before still runs, or will; None if nobody answers."""
        try:
            meta = self.ask(self.session.get_job_meta, job)
        except JobNotFound:
            return False
        if meta is None:
            return None
        status = str(meta.get("status"))
        if status.startswith(OVER):
            return False
        return self._runs(job) if self._should_run(status) else True

    def _should_run(self, status: str) -> bool:
        return status.endswith(("RUNNING", "DISPATCHED"))

    def _runs(self, job: str) -> bool | None:
        info = self.ask(self.session.get_system_info)
        return None if info is None else job in {each.job_id for each in info.job_info}

    def connected(self) -> set[str]:
        """Sites that the server has heard of lately."""
        info = self.ask(self.session.get_system_info)
        since = time.time() - FRESH
        found = info.client_info if info else ()
        return {each.name for each in found if each.last_connect_time > since}

    def idle(self, job: str, sites: Collection[str]) -> set[str]:
        """Of these sites, those that are connected, but do not take part in a job, as
        they were started anew since it began."""
        asked = sorted(self.connected() & {*sites})
        try:
            found = asked and self.ask(self.session.check_status, "client", asked)
        except (InvalidTarget, NoClientsAvailable, NoReply):  # gone between two asks
            return set()
        rows = (found or {}).get("client_status", ())
        there = {row["client_name"] for row in rows if row["status"] != "no_reply"}
        return there - {row["client_name"] for row in rows if row.get("job_id") == job}

    def left_out(self, job: str, sites: Collection[str]) -> dict[str, str] | None:
        """Sites that the engine could not give the job to, and why; None before it has
        tried."""
        meta = self.ask(self.session.get_job_meta, job)
        detail = (meta or {}).get("job_deploy_detail")
        if not detail:
            return None
        lines = [each.replace(": NVFLARE_ERROR", "", 1) for each in detail]
        said = dict(each.split(": ", 1) for each in lines if ": " in each)
        absent = "it was not connected when the run began"
        found = {site: said.get(site, absent) for site in sites}
        return {site: explained(why) for site, why in found.items() if why != "OK"}
