"""Runs the rounds at the coordinator's server: quorum, deadline, checks, checkpoint.

It sends the global model, takes what comes back within the deadline, refuses what is
not an update of this model, and calls an aggregate of `fl_helpers.aggregation` in the
order of the silos' names: the same bits as `simulation.run_rounds`.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
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
from safetensors.torch import load_file, save_file

from fl_helpers import exchange
from fl_helpers.aggregation import make_aggregate
from fl_helpers.cross_silo.on_premises.executor import CONFIG, INITIAL, end_with_parent
from fl_helpers.cross_silo.on_premises.gate import pack, unpack
from fl_helpers.robust import ROBUST_RULES
from fl_helpers.simulation import Metrics, Params

START_UP = 60  # seconds that the hospitals' workers may need before the first task


class NoQuorum(RuntimeError):
    """Fewer valid updates than agreed: the round does not count."""


@dataclass(frozen=True)
class Answers:
    """What came back for one task, by silo: updates, and reasons of refusals."""

    updates: dict[str, exchange.ReceivedUpdate] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def should_stop(scores: list[float], stop: dict[str, Any]) -> bool:
    """Whether none of the last `stop["patience"]` scores is better than all before."""
    patience = stop["patience"]
    if len(scores) <= patience:
        return False
    best = max if stop.get("higher_is_better", True) else min
    before = best(scores[:-patience])
    return best(before, *scores[-patience:]) == before


class RoundController(Controller):
    """A run as `fleet.Run` describes it; `spec` has its fields, and {site: silo}.

    Writes into `runs/<name>/` of the server's kit: `events.jsonl`, `model_<r>/` (the
    global model after r rounds), `final/`, `state.json`, `ledger.jsonl`.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        torch.set_num_threads(1)  # the number of threads changes the last bits
        self.spec, self.silos = spec, spec["silos"]
        self.lock = threading.Lock()  # answers come in by several threads
        self.absent: set[str] = set()  # sites that did not answer when last asked
        self.heard: set[str] = set()  # sites that asked for work since
        self.started = 0.0  # when the last task went out
        self.limits = exchange.Limits(
            max_bytes=spec["max_bytes"],
            max_norm=spec["max_norm"],
            metrics=exchange.Limits().metrics | set(spec["metrics"]),
        )

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.START_RUN:
            end_with_parent()
        if event_type == EventType.BEFORE_PROCESS_TASK_REQUEST:
            self.heard.add(fl_ctx.get_peer_context().get_identity_name())

    def start_controller(self, fl_ctx: FLContext) -> None:
        # Seconds; NVFlare 2.9.0 does not pass on the constructor's task_check_period.
        self.communicator._task_check_period = 0.05
        workspace = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
        job, kept = fl_ctx.get_job_id(), set(self.spec["keep_local"])
        initial = load_file(Path(workspace.get_app_dir(job)) / CONFIG / INITIAL)
        names = [name for name in self.spec["names"] if name not in kept]
        self.params = {name: initial[name] for name in names}
        self.download = Path(workspace.get_run_dir(job)) / "final"
        self.folder = Path(workspace.get_root_dir()) / "runs" / self.spec["name"]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.ledger = exchange.Ledger(self.folder / "ledger.jsonl")

    def stop_controller(self, fl_ctx: FLContext) -> None:
        pass

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        self.abort, self.context = abort_signal, fl_ctx
        try:
            self._play()
        except Exception as error:
            kind = "no_quorum" if isinstance(error, NoQuorum) else "failed"
            kind = "aborted" if self.abort.triggered else kind
            self._event(kind, reason=str(error))
            self.system_panic(str(error), fl_ctx)

    def _play(self) -> None:
        spec = self.spec
        rule = (spec["aggregate"], self.params, spec["trainable"], spec["options"])
        self.aggregate = make_aggregate(*rule, more=ROBUST_RULES)
        state = self._resume()
        self._event("start", round=state["rounds_done"], rounds=spec["rounds"])
        while state["rounds_done"] < spec["rounds"]:
            self._round(state["rounds_done"], state)
            if spec["stop"] and should_stop(state["scores"], spec["stop"]):
                self._event("stopped", round=state["rounds_done"] - 1)
                break
        done = state["rounds_done"]
        if spec["evaluate"]:
            self._tested(done, self._ask("evaluate", done, self._present(done)), state)
        for folder in (self.folder / "final", self.download):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(self._model(done), folder)
        self._event("done", rounds=done)

    def _round(self, index: int, state: dict[str, Any]) -> None:
        """One round: the global model, the checkpoint and `state` move on together."""
        sites = self._present(index)
        self._event("round_start", round=index, silos=[self.silos[s] for s in sites])
        answers = self._ask("train", index, sites)
        seconds = round(time.monotonic() - self.started, 3)
        missing = self._note_absent(index, sites, answers)
        self._tested(index, answers, state)
        if len(answers.updates) < self.spec["quorum"]:
            raise NoQuorum(
                f"round {index}: {len(answers.updates)} valid updates, the quorum is "
                f"{self.spec['quorum']}; missing: {missing}, refused: "
                f"{answers.refused}; start the run again when more hospitals are "
                "there, it goes on from the last round"
            )
        updates = [answers.updates[silo] for silo in sorted(answers.updates)]
        self.params = self.aggregate(iter(updates))
        state["rounds_done"] = index + 1
        self._save(state)
        self._event(
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

    def _ask(self, task: str, index: int, sites: list[str]) -> Answers:
        """Send a task and wait until all have answered, or for the deadline."""
        message, answers = pack(self._model(index)), Answers()
        self.bytes_down = len(message[exchange.MODEL])
        message["round"], message["evaluate"] = index, self.spec["evaluate"]
        work = Task(
            name=task,
            data=message,
            timeout=self.spec["deadline"] + (0 if self.started else START_UP),
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
        silo, message = self.silos[client_task.client.name], client_task.result
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
            self._event("refused", **passed, reason=reason)
        else:
            with self.lock:
                answers.updates[silo] = update
            if trains:
                passed |= {"bytes": update.num_bytes}
                self._event("update", **passed, metrics=_split(update.metrics)[0])
        client_task.result = None  # free the memory

    def _read(
        self, message: Shareable, silo: str, index: int, expected: Params
    ) -> exchange.ReceivedUpdate:
        folder = self.folder / "inbox" / silo
        try:
            update = exchange.read_update(
                unpack(message, folder, exchange.UPDATE),
                expected,
                silo=silo,
                round_index=index,
                limits=self.limits,
                ledger=self.ledger,
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        # The model's own order: a rule may add up entries, and the order shows.
        return replace(update, params={k: update.params[k] for k in expected})

    def process_result_of_unknown_task(self, *_: Any, **__: Any) -> None:
        """An answer after the deadline is not used."""

    def _present(self, index: int) -> list[str]:
        """Who is asked: not those who did not answer and have not asked for work since.
        So a hospital costs the others at most one deadline."""
        for site in sorted(self.absent & self.heard):
            self._event("back", round=index, silo=self.silos[site])
        self.absent -= self.heard
        return [site for site in sorted(self.silos) if site not in self.absent]

    def _note_absent(self, index: int, sites: list[str], answers: Answers) -> list[str]:
        heard = answers.updates.keys() | answers.refused.keys()
        missing = [site for site in sites if self.silos[site] not in heard]
        for site in missing:
            self._event("missing", round=index, silo=self.silos[site])
        self.absent.update(missing)
        self.heard.difference_update(missing)
        return [self.silos[site] for site in missing]

    def _tested(self, index: int, answers: Answers, state: dict[str, Any]) -> None:
        """Scores of the global model after `index` rounds; they come with the next."""
        test = {k: _split(u.metrics)[1] for k, u in sorted(answers.updates.items())}
        if any(test.values()):
            self._event("tested", rounds=index, test=test)
        metric = (self.spec["stop"] or {}).get("metric")
        found = [scores[metric] for scores in test.values() if metric in scores]
        if found:
            state["scores"].append(sum(found) / len(found))

    def _model(self, rounds_done: int) -> Path:
        return self.folder / f"model_{rounds_done:04d}"

    def _memory(self, rounds_done: int) -> Path:
        return self.folder / f"memory_{rounds_done:04d}.safetensors"

    def _save(self, state: dict[str, Any]) -> None:
        """Model and memory first, `state.json` last: it says which of them count."""
        done = state["rounds_done"]
        exchange.write_model(self._model(done), self.params, round_index=done)
        if hasattr(self.aggregate, "state_dict"):
            save_file(self.aggregate.state_dict(), self._memory(done))
            self._memory(done - 2).unlink(missing_ok=True)
        temporary = self.folder / "state.json.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / "state.json")

    def _resume(self) -> dict[str, Any]:
        """Go on from the last round that was saved, or begin."""
        path = self.folder / "state.json"
        if not path.exists():
            exchange.write_model(self._model(0), self.params, round_index=0)
            return {"run": self.spec["run"], "rounds_done": 0, "scores": []}
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["run"] != self.spec["run"]:
            raise ValueError(f"{self.folder} belongs to another run; name it otherwise")
        done = state["rounds_done"]
        found = exchange.read_model(
            self._model(done), expected=self.params, round_index=done
        )
        self.params = {name: found[name] for name in self.params}
        if hasattr(self.aggregate, "load_state_dict"):
            self.aggregate.load_state_dict(load_file(self._memory(done)))
        return state

    def _event(self, kind: str, **content: Any) -> None:
        line = json.dumps({"event": kind, "time": round(time.time(), 3), **content})
        with self.lock, (self.folder / "events.jsonl").open("a") as file:
            file.write(line + "\n")


def _split(metrics: Metrics) -> tuple[Metrics, Metrics]:
    """Metrics of the training, and of the global model on the silo's test set."""
    test = {k[5:]: value for k, value in metrics.items() if k.startswith("test_")}
    return {k: v for k, v in metrics.items() if not k.startswith("test_")}, test
