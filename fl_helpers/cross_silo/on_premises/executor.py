"""Trains at the hospital. Installed there: a run names this class, it brings no code.

How the model is built and where the data are is the hospital's own setting
(`local/site.json`): a function that returns a `client.Client`.
"""

from __future__ import annotations

import math
import os
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from safetensors.torch import load_file, save_file

from fl_helpers import exchange
from fl_helpers.cross_silo.on_premises.gate import Unreleased, read_policy, unpack
from fl_helpers.cross_silo.on_premises.guards import SiteGuard
from fl_helpers.cross_silo.on_premises.site import PARENT, read_site
from fl_helpers.cross_silo.turn import Client, load_client
from fl_helpers.simulation import Params, silo_rng
from fl_helpers.training import Update

CONFIG = "config"  # not the engine's own setting: some kits' start.sh leave it empty
INITIAL = "initial.safetensors"  # beside the run's configuration, at every site


def end_with_parent() -> None:
    """End this process soon after the one that started it, however that one ended.

    A worker is told who that is: when it asks, its parent may be gone already.
    """
    parent = int(os.environ.get(PARENT, os.getppid()))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


class SiteExecutor(Executor):
    """Answers the tasks "train" and "evaluate" of a run.

    run: its id. seed: of the run. names: entries of the model's state, in the model's
    order. keep_local: those that never leave; they are kept in the kit, with the two
    last rounds' values, so that a worker or a server that died can do a round again.
    settings: plain numbers and texts for the hospital's function.
    """

    def __init__(
        self,
        run: str,
        seed: int,
        names: list[str],
        keep_local: list[str],
        settings: dict[str, Any],
    ) -> None:
        super().__init__()
        torch.set_num_threads(1)  # the number of threads changes the last bits
        self.run, self.seed, self.names = run, seed, names
        self.keep_local, self.settings = keep_local, settings
        self.guard = SiteGuard()
        self.client: Client | None = None
        end_with_parent()  # not at START_RUN: that waits for a server that may be gone

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        self.guard.handle_event(event_type, fl_ctx)

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, signal: Signal
    ) -> Shareable:
        workspace = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
        self.kit = Path(workspace.get_root_dir())
        self.config = Path(workspace.get_app_dir(fl_ctx.get_job_id())) / CONFIG
        try:
            update = self._answer(task_name, shareable)
        except Exception:  # its text may name a patient: it stays in the log here
            self.logger.exception(f"task {task_name!r} failed")
            return make_reply(ReturnCode.EXECUTION_EXCEPTION)
        result = make_reply(ReturnCode.OK)
        result["update"] = Unreleased(update, shareable["round"])
        return result

    def _answer(self, task: str, message: Shareable) -> Update:
        site, round_index = read_site(self.kit), message["round"]
        if self.client is None:
            self.client = load_client(
                site.client, site.data, self.settings, silo=site.silo
            )
        client, silo = self.client, self.client.silo
        params = self._global_model(message, round_index)
        params |= self._own_entries(round_index)
        params = {name: params[name] for name in self.names}
        metrics: dict[str, float] = {}
        if message["evaluate"] and client.evaluate:
            found = client.evaluate(params, silo)
            metrics = {f"test_{k}": float(v) for k, v in found.items()}
            metrics = {k: v for k, v in metrics.items() if math.isfinite(v)}
        if task == "evaluate":
            return Update(silo.name, {}, len(silo.train[0]), metrics)
        rng = silo_rng(self.seed, silo.name, round_index)
        update = client.update(params, silo, round_index=round_index, rng=rng)
        self._keep({k: update.params[k] for k in self.keep_local}, round_index)
        sent = {k: v for k, v in update.params.items() if k not in self.keep_local}
        return replace(update, params=sent, metrics={**update.metrics, **metrics})

    def _global_model(self, message: Shareable, round_index: int) -> Params:
        expected, _ = read_policy(self.kit)
        ledger = exchange.Ledger(self.kit / "ledger.jsonl")
        with tempfile.TemporaryDirectory() as folder:
            unpack(message, folder, exchange.MODEL)
            return exchange.read_model(
                folder, expected=expected, round_index=round_index, ledger=ledger
            )

    def _own_entries(self, round_index: int) -> Params:
        """Entries that stay here, as they were before this round."""
        kept = [p for p in self._kept() if int(p.stem) < round_index]
        found = load_file(kept[-1] if kept else self.config / INITIAL)
        return {name: found[name] for name in self.keep_local}

    def _keep(self, own: Params, round_index: int) -> None:
        if not own:
            return
        path = self.kit / "kept" / self.run / f"{round_index:06d}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(own, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
        for old in self._kept()[:-2]:
            old.unlink()

    def _kept(self) -> list[Path]:
        return sorted((self.kit / "kept" / self.run).glob("*.safetensors"))
