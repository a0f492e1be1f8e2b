"""What the coordinator's server keeps of a run, in `runs/<name>/` of its kit.

`events.jsonl`, `ledger.jsonl`, `final/`, and of each of the last rounds `model_<r>/`
(the global model after r rounds), the memory of its rule and `state_<r>.json`.
`state.json` is the newest of these: from it a run goes on that was interrupted, and
from the one before if a file is damaged. `lock` holds the job that plays the run.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from fl_helpers import exchange
from fl_helpers.cross_silo.on_premises.refusals import require_room
from fl_helpers.simulation import Params

KEEP = 10  # rounds whose models are kept, beside the final one


@dataclass
class State:
    """How far a run has come. run: the id of its job. scores: see `run.Stop`. memory:
    SHA-256 of the file with the rule's; "" if it has none."""

    run: str
    rounds_done: int = 0
    scores: list[float] = field(default_factory=list)
    memory: str = ""


class Record:
    """The folder of one run; several threads may write events."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock = folder, threading.Lock()
        self.ledger = exchange.Ledger(folder / "ledger.jsonl")  # makes the folder

    @contextmanager
    def alone(self, job: str, seconds: float = 30) -> Iterator[None]:
        """No second job plays this run meanwhile; `lock` says which one does.

        seconds: that one of before may need to end. Raises RuntimeError after them.
        """
        with (self.folder / "lock").open("a+", encoding="utf-8") as file:
            end = time.monotonic() + seconds
            while not _is_ours(file):
                if time.monotonic() > end:
                    other = (self.folder / "lock").read_text(encoding="utf-8")
                    raise RuntimeError(
                        f"job {other} plays this run already; `play` follows it"
                    )
                time.sleep(0.2)
            file.truncate(0)
            file.write(job)
            file.flush()
            yield

    def event(self, kind: str, **content: Any) -> None:
        line = json.dumps({"event": kind, "time": round(time.time(), 3), **content})
        with self.lock, (self.folder / "events.jsonl").open("a") as file:
            file.write(line + "\n")

    def model(self, rounds_done: int) -> Path:
        return self.folder / f"model_{rounds_done:04d}"

    def inbox(self, round_index: int, silo: str) -> Path:
        """Where an update lies until its round is over; see `keeps_updates`."""
        return self.folder / "inbox" / f"{round_index:04d}" / silo

    def empty_inbox(self) -> None:
        if not self.keeps_updates:
            shutil.rmtree(self.folder / "inbox", ignore_errors=True)

    @property
    def local(self) -> Path:
        """Of the server's kit."""
        return self.folder.parents[1] / "local"

    @property
    def keeps_updates(self) -> bool:
        """Whether a file `local/keep_updates` in its kit makes the server keep what it
        has read. An orchestrator decides that by itself, and no silo can see it."""
        return (self.local / "keep_updates").exists()

    @property
    def keep(self) -> int:
        """Rounds whose models are kept: the number in the file `local/keep_models`."""
        path = self.local / "keep_models"
        text = path.read_text(encoding="utf-8").strip() if path.exists() else str(KEEP)
        if not text.isdecimal() or int(text) < 2:
            raise ValueError(f"{path} must hold an integer >= 2, got {text!r}")
        return int(text)

    def memory(self, rounds_done: int) -> Path:
        return self.folder / f"memory_{rounds_done:04d}.safetensors"

    def state(self, rounds_done: int) -> Path:
        return self.folder / f"state_{rounds_done:04d}.json"

    def require_room(self, params: Params, *, rounds: int, silos: int) -> None:
        """Raises Refusal if the disk has no room for so many rounds, with an update of
        each silo, and the final model twice: the engine keeps one."""
        model = sum(value.nbytes for value in params.values())
        models = min(rounds, self.keep) + silos + 2
        what = f"a run with a model of {model / 1e6:,.1f} MB and {silos} silos"
        require_room(self.folder, models * model + 10**6, what)

    def save(self, state: State, params: Params, rule: Any) -> None:
        """Model and memory first, the state last: it says which of them count."""
        done = state.rounds_done
        exchange.write_model(self.model(done), params, round_index=done)
        if hasattr(rule, "state_dict"):
            save_file(rule.state_dict(), self.memory(done))
            state.memory = _digest(self.memory(done).read_bytes())
        about = asdict(state)
        text = json.dumps(about | {"sha256": _digest(_canonical(about))})
        for path in (self.state(done), self.folder / "state.json"):
            replace_file(path, text)
        for old in _rounds_in(self.folder):
            if old <= done - self.keep:
                self._forget(old)

    def _forget(self, rounds_done: int) -> None:
        shutil.rmtree(self.model(rounds_done), ignore_errors=True)
        for path in (self.memory(rounds_done), self.state(rounds_done)):
            path.unlink(missing_ok=True)

    def resume(self, run: str, params: Params, rule: Any) -> tuple[State, Params]:
        """The state and the model of the last round that was saved, or of none.

        params: the initial model, and its layout. rule: goes on from its memory.
        A file that is damaged is an event, and the round before it is taken. Raises
        ValueError if the folder has the state of another run, or only damaged ones.
        """
        newest, bad = self.folder / "state.json", set()
        older = sorted(self.folder.glob("state_*.json"), reverse=True)
        paths = [path for path in (newest, *older) if path.exists()]
        for path in paths:
            try:
                state = _read_state(path, run)
                if state.rounds_done not in bad:
                    return state, self._load(state, params, rule)
            except _OtherRun:
                raise
            except Exception as error:
                bad.add(getattr(error, "round", None))
                self._say_damaged(path, error)
        if paths and not (older and self.model(0).exists()):
            raise ValueError(
                f"no checkpoint in {self.folder} can be read, events.jsonl says why: "
                "bring the folder back from a backup, or start a run of another name"
            )
        exchange.write_model(self.model(0), params, round_index=0)
        return State(run), params

    def _load(self, state: State, params: Params, rule: Any) -> Params:
        """The model of a state; the rule goes on from the memory of it."""
        done, path = state.rounds_done, self.model(state.rounds_done)
        try:
            model = exchange.read_model(path, params, round_index=done)
            if hasattr(rule, "load_state_dict"):
                path = self.memory(done)
                if state.memory and _digest(path.read_bytes()) != state.memory:
                    raise ValueError("it does not have the SHA-256 of its state")
                rule.load_state_dict(load_file(path))
        except Exception as error:
            raise _Unreadable(path, done, error) from error
        return model

    def _say_damaged(self, path: Path, error: Exception) -> None:
        path = getattr(error, "path", path)
        reason = f"{path} cannot be used ({error}); it goes on from the last that can"
        self.event("damaged", file=str(path), reason=reason)

    def publish(self, rounds_done: int, download: Path) -> None:
        """The last model is the final one, here and in the engine's own download."""
        for folder in (self.folder / "final", download):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(self.model(rounds_done), folder)


class _OtherRun(ValueError):
    """The folder belongs to a run with another id."""


class _Unreadable(ValueError):
    """A file of a checkpoint; round: of how many that is."""

    def __init__(self, path: Path, round: int, error: Exception) -> None:
        super().__init__(getattr(error, "reason", str(error)))
        self.path, self.round = path, round


def _read_state(path: Path, run: str) -> State:
    found = json.loads(path.read_text(encoding="utf-8"))
    digest = found.pop("sha256", None)  # older runs have none
    if digest and digest != _digest(_canonical(found)):
        raise ValueError("it does not have its own SHA-256")
    state = State(**found)
    if state.run != run:
        raise _OtherRun(f"{path.parent} belongs to another run; name it otherwise")
    return state


def _rounds_in(folder: Path) -> list[int]:
    return [int(path.name.split("_")[1]) for path in folder.glob("model_*")]


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def replace_file(path: Path, text: str) -> None:
    """Write a file anew, on the disk before it takes the place of the old one."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _is_ours(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
