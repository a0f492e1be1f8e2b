"""Runs the rounds at the coordinator's server: quorum, deadline, checks, checkpoint.

It sends the global model, takes what comes back within the deadline, refuses what is
not an update of this model, and calls the run's rule in the order of the silos' names:
the same bits as `simulation.run_rounds`.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from fl_helpers import exchange
from fl_helpers.cross_silo.on_premises.gate import pack, unpack
from fl_helpers.cross_silo.on_premises.job import Job, read_job
from fl_helpers.cross_silo.on_premises.record import Record, State
from fl_helpers.cross_silo.on_premises.worker import end_with_parent
from fl_helpers.simulation import Metrics, NoQuorum, Params

SPENT = "PRIVACY_BUDGET_SPENT"  # the answer of a silo that takes part no more
START_UP = 60  # seconds that the silos' workers may need before the first task


@dataclass(frozen=True)
class Answers:
    """What came back for one task, by silo: updates, and reasons of refusals.

    silos: those whose updates count; a secure sum has one update for all of them.
    """

    updates: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    silos: tuple[str, ...] = ()


class RoundController(Controller):
    """The run of its job; a silo is called "site" where NVFlare's name of it is meant.

    Writes into `runs/<name>/` of the server's kit, see `record.Record`.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.set_num_threads(1)  # the number of threads changes the last bits
        self.lock = threading.Lock()  # answers come in by several threads
        self.absent: set[str] = set()  # sites that did not answer when last asked
        self.heard: set[str] = set()  # sites that asked for work since
        self.ended: set[str] = set()  # silos whose privacy budget is spent
        self.started = 0.0  # when the last task went out
        self.bytes_down = 0  # of the model in it
        self.params: Params = {}  # the global model
        # What is not known before the run starts.
        self.job: Job | None = None
        self.record: Record | None = None
        self.rule: Callable[[Iterator[exchange.ReceivedUpdate]], Params] | None = None
        self.download: Path | None = None
        self.context: FLContext | None = None
        self.abort: Signal | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.START_RUN:
            end_with_parent()
        if event_type == EventType.BEFORE_PROCESS_TASK_REQUEST:
            self.heard.add(fl_ctx.get_peer_context().get_identity_name())

    def start_controller(self, fl_ctx: FLContext) -> None:
        # Seconds; NVFlare 2.9.0 does not pass on the constructor's task_check_period.
        self.communicator._task_check_period = 0.05
        workspace = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
        self.job = read_job(fl_ctx)
        self.record = Record(Path(workspace.get_root_dir(), "runs", self.job.run.name))
        self.download = Path(workspace.get_run_dir(fl_ctx.get_job_id())) / "final"

    def stop_controller(self, fl_ctx: FLContext) -> None:
        pass

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        self.abort, self.context = abort_signal, fl_ctx
        try:
            self._play()
        except Exception as error:
            kind = "no_quorum" if isinstance(error, NoQuorum) else "failed"
            kind = "aborted" if self.abort.triggered else kind
            self.record.event(kind, reason=str(error))
            self.system_panic(str(error), fl_ctx)

    def _play(self) -> None:
        job, run, record = self.job, self.job.run, self.record
        initial = job.initial(run.shared)
        self.rule = run.make_rule(initial)
        state, self.params = record.resume(job.id, initial, self.rule)
        record.event("start", round=state.rounds_done, rounds=run.rounds)
        self._begin()
        while state.rounds_done < run.rounds and self._round(state):
            if run.stop and run.stop.reached(state.scores):
                record.event("stopped", round=state.rounds_done - 1)
                break
        done = state.rounds_done
        if run.evaluate and (sites := self._present(done)):
            self._tested(done, self._ask("evaluate", done, sites), state)
        record.publish(done, self.download)
        record.event("done", rounds=done)

    def _begin(self) -> None:
        """Before the first round, also of a run that is resumed."""

    def _round(self, state: State) -> bool:
        """One round: the global model, the checkpoint and `state` move on together.
        False if hospitals have spent their budgets, so that there is none any more."""
        index, sites = state.rounds_done, self._present(state.rounds_done)
        silos = [self.job.silos[site] for site in sites]
        self.record.event("round_start", round=index, silos=silos)
        answers = self._ask("train", index, sites)
        seconds = round(time.monotonic() - self.started, 3)
        missing = self._note_absent(index, sites, answers)
        self._tested(index, answers, state)
        if not self._is_quorate(index, answers, missing):
            return False
        updates = [answers.updates[silo] for silo in sorted(answers.updates)]
        self.params = self.rule(iter(updates))
        state.rounds_done = index + 1
        self.record.save(state, self.params, self.rule)
        self.record.event(
            "round_end",
            round=index,
            seconds=seconds,
            silos=list(answers.silos),
            refused=answers.refused,
            missing=missing,
            bytes_down=len(sites) * self.bytes_down,
            bytes_up=sum(u.num_bytes for u in updates),
            train={u.silo: _split(u.metrics)[0] for u in updates},
        )
        return True

    @property
    def quorum(self) -> int:
        return self.job.run.quorum or len(self.job.silos)

    def _is_quorate(self, index: int, answers: Answers, missing: list[str]) -> bool:
        """False if those that are missing for good are; raises NoQuorum otherwise."""
        if len(answers.silos) >= self.quorum:
            return True
        why = (
            f"round {index}: {len(answers.silos)} valid updates, the quorum is "
            f"{self.quorum}; missing: {missing}, refused: {answers.refused}"
        )
        if len(self.job.silos) - len(self.ended) < self.quorum:
            spent = f"the privacy budget is spent at {sorted(self.ended)}"
            self.record.event("stopped", round=index - 1, reason=f"{spent}; {why}")
            return False
        raise NoQuorum(
            f"{why}; start the run again when more silos are there, it goes on from "
            "the last round"
        )

    def _ask(self, task: str, index: int, sites: list[str]) -> Answers:
        """The answers of all, or those that came before the deadline."""
        message = pack(self.record.model(index))
        self.bytes_down = len(message[exchange.MODEL])
        answers = self._send(task, index, sites, message)
        return replace(answers, silos=tuple(sorted(answers.updates)))

    def _send(
        self, task: str, index: int, sites: list[str], message: Shareable
    ) -> Answers:
        """Send a task and wait until all have answered, or for the deadline."""
        answers = Answers()
        message["round"] = index
        work = Task(
            name=task,
            data=message,
            timeout=self.job.run.deadline + (0 if self.started else START_UP),
            result_received_cb=partial(self._received, answers=answers, index=index),
        )
        self.started = time.monotonic()
        self.broadcast_and_wait(
            work, self.context, sites, len(sites), abort_signal=self.abort
        )
        if self.abort.triggered:
            raise RuntimeError("the run was aborted")
        with self.lock:  # what comes later finds the task closed
            return Answers(dict(answers.updates), dict(answers.refused))

    def _received(
        self, client_task: ClientTask, fl_ctx: FLContext, answers: Answers, index: int
    ) -> None:
        """Check one answer; a refusal is an event, not an error."""
        silo, message = self.job.silos[client_task.client.name], client_task.result
        passed = {"round": index, "silo": silo}
        passed["seconds"] = round(time.monotonic() - self.started, 3)
        try:
            if (code := message.get_return_code()) != ReturnCode.OK:
                if code == SPENT:
                    self.ended.add(silo)
                raise exchange.Refused(silo, f"the site answered {code}")
            task = client_task.task.name
            update = self._take(task, message, silo, index)
        except Exception as error:  # whatever came: it costs this silo's update only
            reason = getattr(error, "reason", f"{type(error).__name__}: {error}")
            with self.lock:
                answers.refused[silo] = reason
            self.record.event("refused", **passed, reason=reason)
        else:
            with self.lock:
                answers.updates[silo] = update
            if task == "train":
                passed |= {"bytes": update.num_bytes}
                metrics = _split(update.metrics)[0]
                self.record.event("update", **passed, metrics=metrics)
        client_task.result = None  # free the memory

    def _take(self, task: str, message: Shareable, silo: str, index: int) -> Any:
        """What a silo answered, checked."""
        expected = self.params if task == "train" else {}
        return self._read(message, silo, index, expected, self.job.run.limits)

    def _read(
        self,
        message: Shareable,
        silo: str,
        index: int,
        expected: Params,
        limits: exchange.Limits,
    ) -> exchange.ReceivedUpdate:
        folder = self.record.inbox(index, silo)
        try:
            update = exchange.read_update(
                unpack(message, folder, exchange.UPDATE),
                expected,
                silo=silo,
                round_index=index,
                limits=limits,
                ledger=self.record.ledger,
            )
        finally:
            if not self.record.keeps_updates:
                shutil.rmtree(folder, ignore_errors=True)
        # The model's own order: a rule may add up entries, and the order shows.
        return replace(update, params={k: update.params[k] for k in expected})

    def process_result_of_unknown_task(self, *_: object, **__: object) -> None:
        """An answer after the deadline is not used."""

    def _present(self, index: int) -> list[str]:
        """Who is asked: not those who did not answer and have not asked for work since.
        So a silo costs the others at most one deadline."""
        for site in sorted(self.absent & self.heard):
            self.record.event("back", round=index, silo=self.job.silos[site])
        self.absent -= self.heard
        silos = self.job.silos
        gone = self.absent | {site for site in silos if silos[site] in self.ended}
        return sorted(silos.keys() - gone)

    def _note_absent(self, index: int, sites: list[str], answers: Answers) -> list[str]:
        heard, silos = {*answers.silos, *answers.refused}, self.job.silos
        missing = [site for site in sites if silos[site] not in heard]
        for site in missing:
            self.record.event("missing", round=index, silo=silos[site])
        self.absent.update(missing)
        self.heard.difference_update(missing)
        return [silos[site] for site in missing]

    def _tested(self, index: int, answers: Answers, state: State) -> None:
        """Scores of the global model after `index` rounds; they come with the next."""
        test = {k: _split(u.metrics)[1] for k, u in sorted(answers.updates.items())}
        if any(test.values()):
            self.record.event("tested", rounds=index, test=test)
        metric = self.job.run.stop.metric if self.job.run.stop else None
        found = [scores[metric] for scores in test.values() if metric in scores]
        if found:
            state.scores.append(sum(found) / len(found))


def _split(metrics: Metrics) -> tuple[Metrics, Metrics]:
    """Metrics of the training, and of the global model on the silo's test set."""
    test = {k[5:]: value for k, value in metrics.items() if k.startswith("test_")}
    return {k: v for k, v in metrics.items() if not k.startswith("test_")}, test
