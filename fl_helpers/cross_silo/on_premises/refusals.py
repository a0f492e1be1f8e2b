"""Why a hospital answers no: all codes that may leave it in the place of an update.

A code says what kind of thing went wrong and carries nothing of a record; the reason
itself is in the hospital's own log. Of anything that has no code here, the engine's
`EXECUTION_EXCEPTION` leaves.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

GATE = "TASK_RESULT_FILTER_ERROR"  # the engine's own, of a result that may not leave
FAILED = "EXECUTION_EXCEPTION"  # the engine's own, of what has no better code
SPENT = "PRIVACY_BUDGET_SPENT"
CODES = {  # code: what it means, and who does what
    "JOB_REFUSED": "the job is not of the agreed form; is the same version installed "
    "at the coordinator and at the hospital?",
    "CLASS_REFUSED": "the job names a class that is not on its list, and was not "
    "started there",
    "MODEL_REFUSED": "the model is not the one that it agreed to, or was damaged on "
    "its way; compare with its `gate.allow`",
    "KIT_DAMAGED": "a file of its kit is missing or damaged; its log names the file",
    "CLIENT_UNKNOWN": "the client function of its settings cannot be loaded; its log "
    "says why",
    "DATA_UNREADABLE": "its data cannot be read, or belong to another silo; its log "
    "names the file",
    "OWN_ENTRIES_LOST": "the entries that it keeps are of later rounds only; start a "
    "new run",
    "DISK_FULL": "its disk is full; make room there, it is asked again",
    "OUT_OF_MEMORY": "its machine or GPU has too little memory; a smaller batch",
    SPENT: "its privacy budget is spent, its part in the run ends",
    "TURN_NOT_BOOKED": "it has a privacy budget, and its client function trained "
    "without its account; its log says which function to copy",
    "SECURE_SUM_DENIED": "the question could reveal an update or an answer, or "
    "somebody is not who they say; its log says which",
    "QUESTION_DENIED": "the question is not on its list, or has settings that it does "
    "not take; its log says which",
    "TOO_FEW": "the answer would describe too few patients, alone or beside an earlier "
    "one",
    GATE: "its gate let the result not out; its ledger says why",
    FAILED: "its training failed; its log says why",
}


class Refusal(Exception):
    """What a hospital refuses; only `code` leaves, the text is for its log."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


@contextmanager
def blamed(code: str, *kinds: type[BaseException]) -> Iterator[None]:
    """Give errors of these kinds a code, unless they have one."""
    try:
        yield
    except kinds as error:
        if code_of(error) == FAILED:
            error.code = code
        raise


def code_of(error: BaseException, otherwise: str = FAILED) -> str:
    """All that leaves of an error: its own code, or that of what it came from."""
    for each in _chain(error):
        if _is_full(each):
            return "DISK_FULL"
        code = getattr(each, "code", None)
        if isinstance(code, str) and code in CODES:
            return code
        if isinstance(each, MemoryError) or type(each).__name__ == "OutOfMemoryError":
            return "OUT_OF_MEMORY"
    return otherwise


def explained(code: str) -> str:
    """A code with what it means, for the coordinator."""
    return f"{code} ({CODES[code]})" if code in CODES else code


def require_room(folder: str | Path, needed: int, what: str) -> None:
    """Raises Refusal if the disk of a folder has fewer than so many bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise Refusal(
            "DISK_FULL",
            f"the disk of {folder} has {free / 1e6:,.0f} MB left, {what} needs "
            f"{needed / 1e6:,.0f} MB: make room, then start the same run again",
        )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was made of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_full(error: BaseException) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, OSError) and (
        error.errno in full or "disk full" in str(error)
    )
