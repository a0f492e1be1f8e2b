"""A silo's answers in a secure run: `secure.Member` put between training and the gate.

An update is trained and looked at as in any run; then the gate has it sealed, and what
leaves are integers that nobody can read alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvflare.apis.shareable import Shareable

from fl_helpers import exchange
from fl_helpers.cross_silo import turn
from fl_helpers.cross_silo.fixed_point import Plain, encode
from fl_helpers.cross_silo.on_premises.gate import Spoken, Unreleased
from fl_helpers.cross_silo.on_premises.job import Job
from fl_helpers.cross_silo.on_premises.site import read_local, read_site
from fl_helpers.cross_silo.secure import (
    Denied,
    Identity,
    Member,
    Question,
    read_identity,
)
from fl_helpers.training import Update

PEERS = {"confirmed": {}, "independent": False}  # of a kit without `site.confirm`


def identity_of(kit: Path) -> Identity:
    """A hospital's certificate and key, and whom it has confirmed."""
    startup, peers = kit / "startup", kit / "local" / "peers.json"
    names = ("client.crt", "client.key", "rootCA.pem")
    known = read_local(kit, peers.name) if peers.exists() else PEERS
    return read_identity(*(startup / name for name in names), known)


def member_of(job: Job, kit: Path) -> Member:
    """A hospital's side of the sums of a run, which remembers in `secure/` of a kit."""
    folder, silo = kit / "secure" / job.id, read_site(kit).silo
    return Member(folder, silo, job.id, job.silos.values(), identity_of(kit))


def rehearse(
    kits: Path, folder: Path, run: str
) -> tuple[dict[str, Member], dict[str, bytes]]:
    """The silos' sides of a run in one process, from the kits of a trial, to try out
    what they answer; and their hellos. They have met, and remember it in folder."""
    paths = [path.parents[1] for path in sorted(kits.glob("*/local/site.json"))]
    found = {read_site(kit).silo: kit for kit in paths}
    members = {
        silo: Member(folder / kit.name, silo, run, found, identity_of(kit))
        for silo, kit in found.items()
    }
    hellos = {silo: member.hello() for silo, member in members.items()}
    for member in members.values():
        member.meet(hellos)
    return members, hellos


def refusal(step: Callable[[Any], Any], asked: Any) -> str:
    """Why a step of a rehearsal is denied, as a silo's log would say, or ""."""
    try:
        step(asked)
    except Denied as error:
        return str(error)
    return ""


class SecureSite:
    """A silo in a secure run; what it must not forget is in `secure/` of its kit."""

    def __init__(self, job: Job, kit: Path, client: turn.Client) -> None:
        self.job, self.kit, self.client = job, kit, client
        self.metrics = job.run.limits.metrics
        self.member = member_of(job, kit)

    def answer(
        self,
        task: str,
        message: Shareable,
        train: Callable[[str, Shareable, Path], Unreleased],
    ) -> Unreleased | Spoken:
        """train: makes the plain update of a task, if that was not done before."""
        if task == "keys":
            return Spoken("hello", self.member.hello())
        asked = Question.read(message["question"])
        if task == "open":
            return Spoken("mask", self.member.open(asked))
        self._check(task, message, asked)
        if task == "examples":
            self.member.meet(message["hellos"])
            examples = len(self.client.silo.train[0])
            found = Unreleased(Update(self.member.silo, {}, examples, {}), 0)
        elif self.member.kept(asked):
            found = Unreleased(None, asked.round)
        else:
            found = train(task, message, self.kit)
        start = found.start if task == "train" else {}
        found.seal = lambda update: self._seal(update, start, asked)
        return found

    def _check(self, task: str, message: Shareable, asked: Question) -> None:
        """Before a record is looked at: is this what may be answered?"""
        model = message.get(exchange.MODEL, b"")
        same = asked.kind, asked.round, asked.model
        digest = hashlib.sha256(model).hexdigest() if model else ""
        if same != (task, message["round"], digest):
            raise Denied(f"the question is for {same}, the task is {task!r}")
        self.member.check(asked)

    def _seal(
        self, update: Update | None, start: exchange.Params, asked: Question
    ) -> Update:
        """What leaves for an update that the gate has looked at."""
        if update is None:
            plain = self.member.kept(asked)
        else:
            silo, limits = self.member.silo, self.job.run.limits
            exchange.check_update(update, start, silo=silo, limits=limits)
            metrics = self.metrics if asked.kind != "examples" else ()
            plain = encode(update, start, total=asked.total, metrics=metrics)
        return sealed(self.member.silo, self.member.answer(asked, plain), asked)


def sealed(silo: str, masked: Plain, asked: Question) -> Update:
    """Masked integers as an update that `exchange` takes: of one example, it says."""
    parts = {"masked_numbers": torch.from_numpy(masked.numbers.view(np.int64))}
    if len(masked.weights):
        parts["masked_weights"] = torch.from_numpy(masked.weights.view(np.int32))
    return Update(silo, parts, 1, {"attempt": float(asked.attempt)})
