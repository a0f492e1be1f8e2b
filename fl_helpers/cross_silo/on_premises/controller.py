"""Runs the rounds at the coordinator's server: quorum, deadline, checks, checkpoint.

It sends the global model, takes what comes back within the deadline, refuses what is
not an update of this model, and calls the run's rule in the order of the silos' names:
the same bits as `simulation.run_rounds`. A round without its quorum is asked again for
as long as the run waits for one.
"""

from __future__ import annotations

import fl_helpers.cross_silo.short_lived  # noqa: F401, before PyTorch

# isort: split
import contextlib
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
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
from fl_helpers.cross_silo.on_premises.attendance import Answers, Attendance
from fl_helpers.cross_silo.on_premises.gate import pack, unpack
from fl_helpers.cross_silo.on_premises.job import SOON, Job, read_job
from fl_helpers.cross_silo.on_premises.record import Record, State
from fl_helpers.cross_silo.on_premises.refusals import CODES, SPENT
from fl_helpers.cross_silo.on_premises.worker import end_with_parent
from fl_helpers.simulation import Metrics, NoQuorum, Params

START_UP = 60  # seconds that the silos' workers may need before the first task
AGAIN = "start the same run again when more silos are there, it goes on from here"
REMIND = 50  # seconds after which it says again for whom a run waits
PAUSE = 10  # seconds before a silo that refused is asked the same again
SELDOM = 1.0  # seconds after which a silo without work asks again, at last


class RoundController(Controller):
    """The run of its job; a silo is called "site" where NVFlare's name of it is meant.
    Writes into `runs/<name>/` of the server's kit, see `record.Record`.
    """

    asks_all_again = False  # in a round that waits for its quorum

    def __init__(self) -> None:
        super().__init__()
        torch.set_num_threads(1)  # the number of threads changes the last bits
        self.lock = threading.Lock()  # answers come in by several threads
        self.check_slots = threading.Semaphore(2)  # a check holds a model in memory
        self.there = Attendance({})
        self.rounds_done = 0  # and saved
        self.started = 0.0  # when the last task went out
        self.bytes_down = 0  # of the model in it
        self.sent = 0  # bytes of models in this round
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
            self.there.heard.add(fl_ctx.get_peer_context().get_identity_name())
            self._ask_less_often(fl_ctx)

    def _ask_less_often(self, fl_ctx: FLContext) -> None:
        """Who waits for the others asks for work again after a tenth of that time: each
        question costs the server, and twenty silos ask all at once."""
        waited = time.monotonic() - self.started if self.started else 0.0
        config = fl_ctx.get_prop(FLContextKey.RUNNER).config
        config.task_request_interval = min(max(SOON, waited / 10), SELDOM)

    def start_controller(self, fl_ctx: FLContext) -> None:
        # Seconds; NVFlare 2.9.0 does not pass on the constructor's task_check_period.
        self.communicator._task_check_period = 0.05
        workspace = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
        self.job = read_job(fl_ctx)
        self.there = Attendance(self.job.silos)
        self.record = Record(Path(workspace.get_root_dir(), "runs", self.job.run.name))
        self.download = Path(workspace.get_run_dir(fl_ctx.get_job_id())) / "final"

    def stop_controller(self, fl_ctx: FLContext) -> None:
        pass

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        self.abort, self.context = abort_signal, fl_ctx
        try:
            with self.record.alone(fl_ctx.get_job_id()):
                self._play_or_say_why()
        except Exception as error:
            self.system_panic(str(error), fl_ctx)

    def _play_or_say_why(self) -> None:
        """The run; if it ends early, with the model of its last round as the final."""
        try:
            self._play()
        except Exception as error:
            kind = "no_quorum" if isinstance(error, NoQuorum) else "failed"
            kind = "aborted" if self.abort.triggered else kind
            if kind == "no_quorum":
                with contextlib.suppress(OSError):  # the reason matters more
                    self.record.publish(self.rounds_done, self.download)
            self.record.event(kind, reason=str(error), rounds=self.rounds_done)
            raise

    def _play(self) -> None:
        job, run, record = self.job, self.job.run, self.record
        initial = job.initial(run.shared)
        self.rule = run.make_rule(initial)
        state, self.params = record.resume(job.id, initial, self.rule)
        self.rounds_done = state.rounds_done
        record.require_room(self.params, rounds=run.rounds, silos=len(job.silos))
        record.event("start", round=state.rounds_done, rounds=run.rounds)
        self._begin_patiently()
        while state.rounds_done < run.rounds and self._round(state):
            if run.stop and run.stop.reached(state.scores):
                record.event("stopped", round=state.rounds_done - 1)
                break
        self._say_who_is_back(done := state.rounds_done)
        if run.evaluate and (sites := self.there.present()):
            self._tested(done, self._ask("evaluate", done, sites), state)
        record.publish(done, self.download)
        record.event("done", rounds=done)

    def _begin(self) -> None:
        """Before the first round, also of a run that is resumed."""

    def _begin_patiently(self) -> None:
        end = time.monotonic() + self.job.run.wait_for_quorum
        while True:
            try:
                return self._begin()
            except NoQuorum as error:
                self._wait(0, self._unasked(), str(error), end)

    def _unasked(self) -> Answers:
        """For a question that nobody can be said to have answered."""
        return Answers(refused=dict.fromkeys(self.job.silos.values(), ""))

    def _round(self, state: State) -> bool:
        """One round: the global model, the checkpoint and `state` move on together.
        False if hospitals have spent their budgets, so that there is none any more."""
        index, begun = state.rounds_done, time.monotonic()
        self._say_who_is_back(index)
        self.record.require_room(self.params, rounds=1, silos=len(self.job.silos))
        silos = [self.job.silos[site] for site in self.there.present()]
        self.record.event("round_start", round=index, silos=silos)
        self.sent, missing = 0, set()
        if (answers := self._until_quorate(index, missing)) is None:
            return False
        seconds = round(time.monotonic() - begun, 3)
        self._tested(index, answers, state)
        updates = [answers.updates[silo] for silo in sorted(answers.updates)]
        self.params = self.rule(map(self._whole, updates))
        self.rounds_done = state.rounds_done = index + 1
        self.record.save(state, self.params, self.rule)
        self.record.empty_inbox()
        self.record.event(
            "round_end",
            round=index,
            seconds=seconds,
            silos=list(answers.silos),
            refused=answers.refused,
            missing=sorted(missing - {*answers.silos}),
            bytes_down=self.sent,
            bytes_up=sum(u.num_bytes for u in updates),
            train={u.silo: _split(u.metrics)[0] for u in updates},
        )
        return True

    def _until_quorate(self, index: int, missing: set[str]) -> Answers | None:
        """The answers of a round; those that lack are asked again until the quorum is
        reached. None if hospitals have spent their budgets, so that it cannot be.

        missing: gets silos that missed a deadline. Raises NoQuorum after the last try.
        """
        answers, end = Answers(), time.monotonic() + self.job.run.wait_for_quorum
        sites = self.there.present()
        while True:
            try:
                answers, why = self._ask_again(answers, index, sites), ""
                missing.update(self._note_missing(index, sites, answers))
            except NoQuorum as error:  # of a secure sum that could not be opened
                answers, why = self._unasked(), str(error)
            self.sent += len(sites) * self.bytes_down
            if len(answers.silos) >= self.quorum:
                return answers
            why = why or self.there.why(index, answers, self.quorum)
            if self._is_spent(index, why):
                return None
            sites = self._wait(index, answers, why, end)

    def _is_spent(self, index: int, why: str) -> bool:
        """Whether those that are missing for good are too many for a quorum."""
        ended = sorted(self.there.ended)
        if len(self.job.silos) - len(ended) >= self.quorum:
            return False
        spent = f"the privacy budget is spent at {ended}"
        self.record.event("stopped", round=index - 1, reason=f"{spent}; {why}")
        return True

    def _wait(self, index: int, answers: Answers, why: str, end: float) -> list[str]:
        """Wait for silos to come back; the sites that are to be asked again."""
        begun, silos, said = time.monotonic(), self.job.silos, -math.inf
        known = () if self.asks_all_again else answers.silos
        while (now := time.monotonic()) < end and not self.abort.triggered:
            if now - said > REMIND:
                awaited = {*silos.values()} - {*answers.silos} - self.there.ended
                about = {"silos": sorted(awaited), "seconds": round(end - now)}
                self.record.event("waiting", round=index, **about, reason=why)
                said = now
            time.sleep(0.1)
            self._say_who_is_back(index)
            sites = [s for s in self.there.present() if silos[s] not in known]
            could = {*answers.silos, *(silos[site] for site in sites)}
            calm = time.monotonic() > begun + PAUSE
            again = calm or not any(silos[site] in answers.refused for site in sites)
            if len(could) >= self.quorum and again:
                return sites
        self._check_aborted()
        raise NoQuorum(f"{why}; {AGAIN}")

    @property
    def quorum(self) -> int:
        return self.job.run.quorum or len(self.job.silos)

    def _ask_again(self, before: Answers, index: int, sites: list[str]) -> Answers:
        """Those that lack are asked; what was answered before counts."""
        return before.more(self._ask("train", index, sites))

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
        self._check_aborted()
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
                    self.there.ended.add(silo)
                passed["means"] = CODES.get(code, "")
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
        """What a silo answered, checked; its parameters stay on the disk, see
        `_whole`: those of all silos at once may be more than the memory."""
        train, limits = task == "train", self.job.run.limits
        expected = self.params if train else {}
        update = self._read(message, silo, index, expected, limits, stays=train)
        return replace(update, params={})

    def _read(
        self,
        message: Shareable,
        silo: str,
        index: int,
        expected: Params,
        limits: exchange.Limits,
        *,
        stays: bool = False,
    ) -> exchange.ReceivedUpdate:
        """What came, checked. stays: its files are needed once more."""
        folder, read = self.record.inbox(index, silo), False
        try:
            unpack(message, folder, exchange.UPDATE)
            del message[exchange.UPDATE]  # it is on the disk
            with self.check_slots:
                update = exchange.read_update(
                    folder,
                    expected,
                    silo=silo,
                    round_index=index,
                    limits=limits,
                    ledger=self.record.ledger,
                )
            read = True
        finally:
            if not (self.record.keeps_updates or (stays and read)):
                shutil.rmtree(folder, ignore_errors=True)
        return update

    def _whole(self, update: exchange.ReceivedUpdate) -> exchange.ReceivedUpdate:
        """An update that was taken, with its parameters."""
        if update.params:  # a secure sum is in memory
            return update
        folder = self.record.inbox(update.round_index, update.silo)
        limits = replace(self.job.run.limits, max_norm=None)  # it was looked at
        about = {"silo": update.silo, "round_index": update.round_index}
        try:
            found = exchange.read_update(folder, self.params, **about, limits=limits)
            if found.sha256 != update.sha256:
                raise exchange.Refused(update.silo, "it is another one")
        except exchange.Refused as error:
            raise ValueError(
                f"{folder} was whole when it came, and cannot be used any more "
                f"({error.reason}): look at the disk, then start the same run again"
            ) from error
        return found

    def process_result_of_unknown_task(self, *_: object, **__: object) -> None:
        """An answer after the deadline is not used."""

    def _check_aborted(self) -> None:
        if self.abort.triggered:
            raise RuntimeError("the run was aborted")

    def _say_who_is_back(self, index: int) -> None:
        for silo in self.there.back():
            self.record.event("back", round=index, silo=silo)

    def _note_missing(
        self, index: int, sites: list[str], answers: Answers
    ) -> list[str]:
        missing = self.there.note(index, sites, {*answers.silos, *answers.refused})
        for silo in missing:
            self.record.event("missing", round=index, silo=silo)
        return missing

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
