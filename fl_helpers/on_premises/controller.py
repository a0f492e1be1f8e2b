"""Runs the rounds at the coordinator's server: quorum, deadline, checks, checkpoint.

It sends the global model, takes what comes back within the deadline, refuses what is
not an update of this model, and calls an aggregate of `fl_helpers.aggregation` in the
order of the silos' names: the same bits as `simulation.run_rounds`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from safetensors.torch import load_file, save_file

from fl_helpers import aggregation, exchange
from fl_helpers.on_premises.executor import INITIAL, end_with_parent
from fl_helpers.on_premises.gate import pack, unpack
from fl_helpers.simulation import Params

START_UP = 60  # seconds that the hospitals' workers may need before the first task
Aggregate = Callable[[Iterable[Any]], Params]


def make_aggregate(
    name: str, params: Params, trainable: list[str], options: dict[str, float]
) -> Aggregate:
    """`weighted_average`, or a new server rule by its name, such as "FedAdam"."""
    if name == "weighted_average":
        return aggregation.weighted_average
    rule = getattr(aggregation, name, None)
    if not (isinstance(rule, type) and issubclass(rule, aggregation.ServerRule)):
        raise ValueError(
            f"aggregate must be weighted_average or a rule of fl_helpers.aggregation, "
            f"got {name!r}"
        )
    return rule(params, trainable, **options)


class NoQuorum(RuntimeError):
    """Fewer valid updates than agreed: the round does not count."""


@dataclass
class Answers:
    """What came back for one task within its deadline; later answers find no place."""

    updates: dict[str, exchange.ReceivedUpdate] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # silo: reason
    bytes_down: int = 0


class RoundController(Controller):
    """A run as `fleet.Run` describes it; `spec` has its fields, and the names of the
    silos by site. Writes into `runs/<name>/` of the server's kit: `events.jsonl`,
    `model_<r>/` (the global model after r rounds), `state.json`, `ledger.jsonl`."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(task_check_period=0.1)
        torch.set_num_threads(1)
        self.spec, self.silos = spec, spec["silos"]  # {site: silo}
        self.lock = threading.Lock()  # results come in by several threads
        self.absent: set[str] = set()  # sites that did not answer when last asked
        self.heard: set[str] = set()  # sites that asked for work since
        self.started = 0.0  # when the last task went out
        limits = {"max_norm": spec["max_norm"], "max_bytes": spec["max_bytes"]}
        allowed = exchange.Limits().metrics | set(spec["metrics"])
        self.limits = exchange.Limits(metrics=allowed, **limits)

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.START_RUN:
            end_with_parent()
        if event_type == EventType.BEFORE_PROCESS_TASK_REQUEST:
            self.heard.add(fl_ctx.get_peer_context().get_identity_name())

    def start_controller(self, fl_ctx: FLContext) -> None:
        workspace = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
        config = Path(workspace.get_app_config_dir(fl_ctx.get_job_id()))
        self.result = Path(workspace.get_run_dir(fl_ctx.get_job_id())) / "final"
        self.folder = Path(workspace.get_root_dir()) / "runs" / self.spec["name"]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.ledger = exchange.Ledger(self.folder / "ledger.jsonl")
        self.initial = load_file(config / INITIAL)
        self.initial = {name: self.initial[name] for name in self.spec["names"]}

    def stop_controller(self, fl_ctx: FLContext) -> None:
        pass

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        self.abort, self.context = abort_signal, fl_ctx
        try:
            self._play()
        except Exception as error:
            kind = "no_quorum" if isinstance(error, NoQuorum) else "failed"
            self._event(kind, reason=str(error))
            self.system_panic(str(error), fl_ctx)

    def _play(self) -> None:
        spec = self.spec
        kept = set(spec["keep_local"])
        self.params = {k: v for k, v in self.initial.items() if k not in kept}
        self.aggregate = make_aggregate(
            spec["aggregate"], self.params, spec["trainable"], spec["options"]
        )
        state = self._resume() or {"run": spec["run"], "rounds_done": 0, "scores": []}
        if state["rounds_done"] == 0:
            exchange.write_model(self._model(0), self.params, round_index=0)
        self._event("start", round=state["rounds_done"], rounds=spec["rounds"])
        while state["rounds_done"] < spec["rounds"]:
            self._round(state["rounds_done"], state)
            if self._should_stop(state["scores"]):
                self._event("stopped", round=state["rounds_done"] - 1)
                break
        if spec["evaluate"]:
            done = state["rounds_done"]
            answers = self._ask("evaluate", done, self._present(done))
            self._tested(done, answers, state)
        final = self._model(state["rounds_done"])
        for target in (self.folder / "final", self.result):  # also for download
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(final, target)
        self._event("done", rounds=state["rounds_done"], sha256=_digest(self.params))

    def _round(self, index: int, state: dict[str, Any]) -> None:
        """One round: the global model, the checkpoint and `state` move on together."""
        started = time.monotonic()
        sites = self._present(index)
        self._event("round_start", round=index, silos=[self.silos[s] for s in sites])
        answers = self._ask("train", index, sites)
        seconds = time.monotonic() - started
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
            seconds=round(seconds, 3),
            silos=[u.silo for u in updates],
            refused=answers.refused,
            missing=missing,
            bytes_down=len(sites) * answers.bytes_down,
            bytes_up=sum(u.num_bytes for u in updates),
            train={u.silo: _without_test(u.metrics) for u in updates},
            sha256=_digest(self.params),
        )

    def _ask(self, task: str, index: int, sites: list[str]) -> Answers:
        """Send a task and wait until all have answered, or for the deadline."""
        message = pack(self._model(index))
        answers = Answers(bytes_down=len(message[exchange.MODEL]))
        message["round"], message["evaluate"] = index, bool(self.spec["evaluate"])
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
        with self.lock:
            return replace(
                answers, updates=dict(answers.updates), refused=dict(answers.refused)
            )

    def _received(
        self, client_task: ClientTask, fl_ctx: FLContext, answers: Answers, index: int
    ) -> None:
        """Check one answer; a refusal is an event, not an error."""
        silo = self.silos[client_task.client.name]
        passed = {"round": index, "silo": silo}
        passed["seconds"] = round(time.monotonic() - self.started, 3)
        code = client_task.result.get_return_code()
        try:
            if code != ReturnCode.OK:
                raise exchange.Refused(silo, f"the site answered {code}")
            update = self._read(client_task.result, silo, index, client_task.task.name)
        except Exception as error:  # whatever came: it costs this silo's update only
            reason = getattr(error, "reason", f"{type(error).__name__}: {error}")
            with self.lock:
                answers.refused[silo] = reason
            self._event("refused", **passed, reason=reason)
        else:
            with self.lock:
                answers.updates[silo] = update
            metrics = _without_test(update.metrics)
            self._event("update", **passed, bytes=update.num_bytes, metrics=metrics)
        finally:
            client_task.result = None  # free the memory

    def _read(
        self, message: Shareable, silo: str, index: int, task: str
    ) -> exchange.ReceivedUpdate:
        expected = self.params if task == "train" else {}
        folder = self.folder / "inbox" / hashlib.sha256(silo.encode()).hexdigest()[:16]
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

    def process_result_of_unknown_task(
        self,
        client: Client,
        task_name: str,
        client_task_id: str,
        result: Shareable,
        fl_ctx: FLContext,
    ) -> None:
        """An answer after the deadline is not used."""

    def _present(self, index: int) -> list[str]:
        """Who is asked: all but those who did not answer and have not asked for work
        since; a round waits for nobody twice."""
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
        test = {
            silo: {k[5:]: v for k, v in update.metrics.items() if k[:5] == "test_"}
            for silo, update in sorted(answers.updates.items())
        }
        if not any(test.values()):
            return
        self._event("tested", rounds=index, test=test)
        metric = (self.spec["stop"] or {}).get("metric")
        found = [scores[metric] for scores in test.values() if metric in scores]
        if found:
            state["scores"].append(sum(found) / len(found))

    def _should_stop(self, scores: list[float]) -> bool:
        """No better mean score within the last `patience` rounds."""
        rule = self.spec["stop"]
        if not rule or len(scores) <= rule["patience"]:
            return False
        sign = 1 if rule.get("higher_is_better", True) else -1
        best = [sign * score for score in scores]
        return max(best[-rule["patience"] :]) <= max(best[: -rule["patience"]])

    def _model(self, rounds_done: int) -> Path:
        return self.folder / f"model_{rounds_done:04d}"

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

    def _memory(self, rounds_done: int) -> Path:
        return self.folder / f"memory_{rounds_done:04d}.safetensors"

    def _resume(self) -> dict[str, Any] | None:
        """Go on from the last round that was saved; None for a new run."""
        path = self.folder / "state.json"
        if not path.exists():
            return None
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


def _without_test(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if not k.startswith("test_")}


def _digest(params: Params) -> str:
    """SHA-256 over names and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(params):
        digest.update(name.encode())
        digest.update(params[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
