"""Trains in a silo. Installed there: a run names this class, it brings no code.

How the model is built and where the data are is the silo's own setting
(`local/site.json`): a function that returns a `turn.Client`. It runs in a process of
its own, see `trainer`.
"""

from __future__ import annotations

import fl_helpers.cross_silo.short_lived  # noqa: F401, before PyTorch

# isort: split
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from safetensors.torch import load_file, save_file

from fl_helpers import exchange
from fl_helpers.cross_silo import turn
from fl_helpers.cross_silo.on_premises.gate import Unreleased, read_policy, unpack
from fl_helpers.cross_silo.on_premises.guards import SiteGuard
from fl_helpers.cross_silo.on_premises.job import Job, read_job, round_of
from fl_helpers.cross_silo.on_premises.refusals import (
    Refusal,
    blamed,
    code_of,
    require_room,
)
from fl_helpers.cross_silo.on_premises.secure_site import SecureSite
from fl_helpers.cross_silo.on_premises.site import read_site
from fl_helpers.cross_silo.on_premises.trainer import Trainer
from fl_helpers.cross_silo.on_premises.worker import end_with_parent
from fl_helpers.simulation import Params
from fl_helpers.training import Update

KEPT = 3  # rounds, of the entries that never leave


class TaskExecutor(Executor):
    """What answers tasks at a hospital; of an error only its code leaves."""

    def __init__(self) -> None:
        super().__init__()
        torch.set_num_threads(1)  # the number of threads changes the last bits
        self.guard = SiteGuard()
        end_with_parent()  # not at START_RUN: that waits for a server that may be gone

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        self.guard.handle_event(event_type, fl_ctx)
        if event_type == EventType.START_RUN:
            # The engine itself waits five minutes for a reply, whatever a job says.
            told = fl_ctx.get_prop(FLContextKey.RUNNER).get_task_timeout
            fl_ctx.get_engine().client.communicator.timeout = told

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, signal: Signal
    ) -> Shareable:
        kit = Path(fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_root_dir())
        try:
            found = self.result(task_name, shareable, kit, fl_ctx)
        except Exception as error:  # its text may name a patient: it stays in the log
            self.logger.exception(f"task {task_name!r} was not answered")
            return make_reply(code_of(error))
        reply = make_reply(ReturnCode.OK)
        reply["update"] = found
        return reply

    def result(
        self, task: str, message: Shareable, kit: Path, context: FLContext
    ) -> Any:
        """What the gate is given; whatever it raises becomes a code."""
        raise NotImplementedError


class SiteExecutor(TaskExecutor):
    """Answers the tasks "train" and "evaluate" of a run with an `Unreleased` update.

    Entries that never leave are kept in the kit, with the three last rounds' values, so
    that a worker or a server that died, or a checkpoint that was damaged, can do a
    round again. The last update that left is kept, too: a server that it did not reach
    asks the same again, and gets it without another training.
    """

    def __init__(self) -> None:
        super().__init__()
        self.job: Job | None = None
        self.trainer: Trainer | None = None
        self.sums: SecureSite | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        super().handle_event(event_type, fl_ctx)
        if event_type == EventType.START_RUN:  # the data load while others connect
            with contextlib.suppress(Exception):  # the first task says what is wrong
                kit = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_root_dir()
                self.job = read_job(fl_ctx)
                self.trainer = Trainer(Path(kit), self.job)

    def result(
        self, task: str, message: Shareable, kit: Path, context: FLContext
    ) -> Any:
        self.job = self.job or read_job(context)
        round_of(message)
        self.trainer = self.trainer or Trainer(kit, self.job)
        self.trainer.ready()
        if not self.job.run.secure:
            return self._answer(task, message, kit)
        with blamed("KIT_DAMAGED", json.JSONDecodeError, OSError):
            self.sums = self.sums or SecureSite(self.job, kit, self.trainer)
        return self.sums.answer(task, message, self._answer)

    def _answer(self, task: str, message: Shareable, kit: Path) -> Unreleased:
        if task not in ("train", "evaluate"):
            raise Refusal("JOB_REFUSED", f"a plain run has no task {task!r}")
        job, index, kept = self.job, round_of(message), kit / "kept" / self.job.id
        require_room(kit, _needed(job), f"round {index} of run {job.run.name!r}")
        with (
            tempfile.TemporaryDirectory() as folder,
            blamed("MODEL_REFUSED", exchange.Refused),
        ):
            params = turn.receive(
                job.run,
                unpack(message, folder, exchange.MODEL),
                _own_entries(job, kept, index),
                round_index=index,
                expected=read_policy(kit).expected,
                ledger=exchange.Ledger(kit / "ledger.jsonl"),
            )
        start = {name: params[name] for name in job.run.shared}
        model = message.pop(exchange.MODEL)  # while it trains, nothing holds the bytes
        asked = hashlib.sha256(model).hexdigest()
        del model
        place = kept / "answer" / f"{task}_{index:06d}_{asked}"
        _forget_answers(kit, but=place)
        if task == "evaluate" or job.run.secure:  # secure sums remember by themselves
            place = None
        update = _kept_answer(place, start, kit, index)
        if update is None:
            update, own = self.trainer.turn(task, params, index)
            _keep(kept, own, index)
        return Unreleased(update, index, start, kept=place)


def _forget_answers(kit: Path, *, but: Path) -> None:
    for old in kit.glob("kept/*/answer/*"):
        if old != but:
            shutil.rmtree(old, ignore_errors=True)


def _kept_answer(
    place: Path | None, start: Params, kit: Path, round_index: int
) -> Update | None:
    """What the gate let out for the very same question, if that is so and is whole."""
    if place is None or not place.exists():
        return None
    limits = replace(read_policy(kit).limits, max_norm=None)  # the gate looks at it
    own = {"silo": read_site(kit).silo, "round_index": round_index}
    try:
        found = exchange.read_update(place, start, **own, limits=limits)
    except exchange.Refused:
        return None
    return Update(found.silo, found.params, found.num_examples, found.metrics)


def _needed(job: Job) -> int:
    """Bytes on the disk for one turn: the model as it comes in, the update as it goes
    out, which is kept, the entries that never leave, and the ledger."""
    return 3 * sum(value.nbytes for value in job.run.params.values()) + 10**6


def _own_entries(job: Job, kept: Path, round_index: int) -> Params:
    """Entries that stay here, as they were before this round."""
    found = sorted(kept.glob("*.safetensors"))
    before = [path for path in found if int(path.stem) < round_index]
    if len(found) == KEPT and not before:
        raise Refusal(
            "OWN_ENTRIES_LOST", f"{kept} has later rounds than {round_index} only"
        )
    return load_file(before[-1]) if before else job.initial(job.run.keep_local)


def _keep(kept: Path, own: Params, round_index: int) -> None:
    if not own:
        return
    kept.mkdir(parents=True, exist_ok=True)
    path = kept / f"{round_index:06d}.safetensors"
    save_file(own, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)
    for old in sorted(kept.glob("*.safetensors"))[:-KEPT]:
        old.unlink()
