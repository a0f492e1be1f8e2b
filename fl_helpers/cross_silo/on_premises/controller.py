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

START_UP = 60  # seconds that the silos' workers may need before the first task


@dataclass(frozen=True)
class Answers:
    """What came back for one task, by silo: updates, and reasons of refusals."""

    updates: dict[str, exchange.ReceivedUpdate] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


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
        while state.rounds_done < run.rounds:
            self._round(state)
            if run.stop and run.stop.reached(state.scores):
                record.event("stopped", round=state.rounds_done - 1)
                break
        done = state.rounds_done
        if run.evaluate:
            self._tested(done, self._ask("evaluate", done, self._present(done)), state)
        record.publish(done, self.download)
        record.event("done", rounds=done)

    def _round(self, state: State) -> None:
        """One round: the global model, the checkpoint and `state` move on together."""
        index, sites = state.rounds_done, self._present(state.rounds_done)
        silos = [self.job.silos[site] for site in sites]
        self.record.event("round_start", round=index, silos=silos)
        answers = self._ask("train", index, sites)
        seconds = round(time.monotonic() - self.started, 3)
        missing = self._note_absent(index, sites, answers)
        self._tested(index, answers, state)
        self._check_quorum(index, answers, missing)
        updates = [answers.updates[silo] for silo in sorted(answers.updates)]
        self.params = self.rule(iter(updates))
        state.rounds_done = index + 1
        self.record.save(state, self.params, self.rule)
        self.record.event(
            "round_end",
            round=index,
            seconds=seconds,
            silos=[u.silo for u in updates],
            refused=answers.refused,
            missing=missing,
            bytes_down=len(sites) * self.bytes_down,
            bytes_up=sum(u.num_bytes for u in updates),
            train={u.silo: _split(u.metrics)[0] for u in updates},
        )

    def _check_quorum(self, index: int, answers: Answers, missing: list[str]) -> None:
        quorum = self.job.run.quorum or len(self.job.silos)
        if len(answers.updates) < quorum:
            raise NoQuorum(
                f"round {index}: {len(answers.updates)} valid updates, the quorum is "
                f"{quorum}; missing: {missing}, refused: {answers.refused}; start the "
                "run again when more silos are there, it goes on from the last round"
            )

    def _ask(self, task: str, index: int, sites: list[str]) -> Answers:
        """Send a task and wait until all have answered, or for the deadline."""
        message, answers = pack(self.record.model(index)), Answers()
        self.bytes_down = len(message[exchange.MODEL])
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
                raise exchange.Refused(silo, f"the site answered {code}")
            trains = client_task.task.name == "train"
            expected = self.params if trains else {}
            update = self._read(message, silo, index, expected)
        except Exception as error:  # whatever came: it costs this silo's update only
            reason = getattr(error, "reason", f"{type(error).__name__}: {error}")
            with self.lock:
                answers.refused[silo] = reason
            self.record.event("refused", **passed, reason=reason)
        else:
            with self.lock:
                answers.updates[silo] = update
            if trains:
                passed |= {"bytes": update.num_bytes}
                metrics = _split(update.metrics)[0]
                self.record.event("update", **passed, metrics=metrics)
        client_task.result = None  # free the memory

    def _read(
        self, message: Shareable, silo: str, index: int, expected: Params
    ) -> exchange.ReceivedUpdate:
        folder = self.record.folder / "inbox" / silo
        try:
            update = exchange.read_update(
                unpack(message, folder, exchange.UPDATE),
                expected,
                silo=silo,
                round_index=index,
                limits=self.job.run.limits,
                ledger=self.record.ledger,
            )
        finally:
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
        return [site for site in sorted(self.job.silos) if site not in self.absent]

    def _note_absent(self, index: int, sites: list[str], answers: Answers) -> list[str]:
        heard, silos = answers.updates.keys() | answers.refused.keys(), self.job.silos
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
