"""What the coordinator's server keeps of a run, in `runs/<name>/` of its kit.

`events.jsonl`, `ledger.jsonl`, `model_<r>/` (the global model after r rounds), `final/`
and `state.json`, from which a run goes on that was interrupted.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from fl_helpers import exchange
from fl_helpers.simulation import Params


@dataclass
class State:
    """How far a run has come. run: the id of its job. scores: see `run.Stop`."""

    run: str
    rounds_done: int = 0
    scores: list[float] = field(default_factory=list)


class Record:
    """The folder of one run; several threads may write events."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock = folder, threading.Lock()
        self.ledger = exchange.Ledger(folder / "ledger.jsonl")  # makes the folder

    def event(self, kind: str, **content: Any) -> None:
        line = json.dumps({"event": kind, "time": round(time.time(), 3), **content})
        with self.lock, (self.folder / "events.jsonl").open("a") as file:
            file.write(line + "\n")

    def model(self, rounds_done: int) -> Path:
        return self.folder / f"model_{rounds_done:04d}"

    def inbox(self, round_index: int, silo: str) -> Path:
        """Where an update lies while it is read; see `keeps_updates`."""
        return self.folder / "inbox" / f"{round_index:04d}" / silo

    @property
    def keeps_updates(self) -> bool:
        """Whether a file `local/keep_updates` in its kit makes the server keep what it
        has read. An orchestrator decides that by itself, and no silo can see it."""
        return (self.folder.parents[1] / "local" / "keep_updates").exists()

    def memory(self, rounds_done: int) -> Path:
        return self.folder / f"memory_{rounds_done:04d}.safetensors"

    def save(self, state: State, params: Params, rule: Any) -> None:
        """Model and memory first, `state.json` last: it says which of them count."""
        done = state.rounds_done
        exchange.write_model(self.model(done), params, round_index=done)
        if hasattr(rule, "state_dict"):
            save_file(rule.state_dict(), self.memory(done))
            self.memory(done - 2).unlink(missing_ok=True)
        temporary = self.folder / "state.json.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(asdict(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / "state.json")

    def resume(self, run: str, params: Params, rule: Any) -> tuple[State, Params]:
        """The state and the model of the last round that was saved, or of none.

        params: the initial model, and its layout. rule: goes on from its memory.
        Raises ValueError if the folder has the state of another run.
        """
        path = self.folder / "state.json"
        if not path.exists():
            exchange.write_model(self.model(0), params, round_index=0)
            return State(run), params
        state = State(**json.loads(path.read_text(encoding="utf-8")))
        if state.run != run:
            raise ValueError(f"{self.folder} belongs to another run; name it otherwise")
        done = state.rounds_done
        if hasattr(rule, "load_state_dict"):
            rule.load_state_dict(load_file(self.memory(done)))
        return state, exchange.read_model(self.model(done), params, round_index=done)

    def publish(self, rounds_done: int, download: Path) -> None:
        """The last model is the final one, here and in the engine's own download."""
        for folder in (self.folder / "final", download):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(self.model(rounds_done), folder)
