"""A hospital's privacy account: on its own disk, for all runs and engines.

In a real run nobody outside may decide what has been spent: not by another name for the
run, by asking a round again, or by ending a worker. So the account is no part of the
run. It is a file where lines are added before noise is drawn, and the noise comes from
a secret beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fl_helpers.cross_silo.turn import ACCOUNT
from fl_helpers.privacy import (
    Budget,
    Mechanism,
    Spent,
    advantage,
    epsilon_spent,
    generator_of,
    more_spent,
)

try:
    import fcntl
except ImportError:  # Windows: one process at a time
    fcntl = None


class Booked(Exception):
    """A turn is in the account, and this process was to do no more than that."""


class SiloAccount:
    """What a silo of real runs has spent on one data set: in a file of its own, for all
    runs and engines, where lines are only ever added.

    path: of the file, such as "privacy/chest_radiographs.jsonl". Its first line is the
    secret of the noise: keep it in the silo, and in the silo's backup. A turn is on the
    disk before its noise is drawn, so that a silo that is refused, late or killed has
    spent it, and only the very same turn can be drawn again.

    only: "" books and draws. Where what one process writes is kept only once it has
    ended, one books (it raises Booked before noise is drawn), and another one draws
    (it refuses what was not booked): "book" and "draw".
    """

    def __init__(
        self, path: str | Path, budget: Budget, *, silo: str, only: str = ""
    ) -> None:
        if only not in ("", "book", "draw"):
            raise ValueError(f"only must be '', 'book' or 'draw', got {only!r}")
        self.path, self.budget, self.silo = Path(path), budget, silo
        self.only = only
        self.path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """All turns, in the order they were booked."""
        return [line for line in self._all_lines() if "run" in line]

    def _all_lines(self) -> list[dict[str, Any]]:
        """Those of the file. One that a crash tore was not booked: its noise was never
        drawn. Raises ValueError for a file that was damaged otherwise."""
        texts = self.path.read_text().split("\n") if self.path.exists() else []
        try:
            return [json.loads(text) for text in texts if text.endswith("}")]
        except ValueError as error:
            raise ValueError(
                f"{self.path} is damaged: {error}; bring the hospital's backup back, "
                "and never start an account anew on the same records"
            ) from None

    @property
    def spent(self) -> Spent:
        rows: Counter[tuple[float, float]] = Counter()
        for line in self.lines:
            rows[line["noise"], line["rate"]] += line["steps"]
        return tuple((z, q, t) for (z, q), t in sorted(rows.items()))

    @property
    def epsilon(self) -> float:
        return epsilon_spent(self.spent, self.budget.delta)

    def said(self) -> str:
        """What has been spent, in words, for a report."""
        runs = {line["run"] for line in self.lines}
        left = advantage(self.epsilon, self.budget.delta)
        return (
            f"{self.silo}: epsilon {self.epsilon:.2f} of {self.budget.epsilon:g} is "
            f"spent (delta {self.budget.delta:g}); rounds: {len(self.lines)}, runs: "
            f"{len(runs)}. Who thought it as likely as not that a patient's "
            f"record was used can be sure to {100 * left['certainty']:.0f} % at most, "
            "and who accepts 1 % of false alarms finds "
            f"{100 * left['found']:.0f} % of patients at most."
        )

    def rows(self) -> list[dict[str, Any]]:
        """One per turn, as `privacy.spending_table` has them, for a report."""
        return [
            {"silo": self.silo, "round": n["round"], "mechanism": "DP-SGD"}
            | {"epsilon": n["epsilon"], "delta": n["delta"]}
            | {"remaining": self.budget.epsilon - n["epsilon"]}
            for n in self.lines
        ]

    def turn(self, run: str, round_index: int) -> SiloTurn:
        """The account in one round of one run, for `train_privately`."""
        return SiloTurn(self, run, round_index)


class SiloTurn:
    """A `SiloAccount` in one round of one run; see `SiloAccount.turn`."""

    needs_rng = False  # it has a secret of its own

    def __init__(self, account: SiloAccount, run: str, round_index: int) -> None:
        self.account, self.run, self.round_index = account, run, round_index
        self.budget = account.budget

    @property
    def epsilon(self) -> float:
        return self.account.epsilon

    def begin(
        self, mechanism: Mechanism, about: Callable[[], bytes]
    ) -> torch.Generator:
        """Book a turn, and return the generator of its noise.

        about: called once it is sure that the budget allows the turn; tells whatever
        the update depends on. The same again is not booked twice, and draws the same.
        Raises BudgetExceeded, ValueError for a round that was answered otherwise, or
        that was not booked where it only draws, and Booked where it only books."""
        own, row = self.account, (mechanism.noise_multiplier, mechanism.sample_rate)
        about_turn = {"run": self.run, "round": self.round_index}
        with own.path.open("a+b", buffering=0) as file:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX)
            known = [n for n in own.lines if about_turn.items() <= n.items()]
            after = own.spent
            if not known and own.only == "draw":
                raise ValueError(
                    f"silo {own.silo!r} has not booked round {self.round_index} of run "
                    f"{self.run!r}; nothing was trained"
                )
            if not known:
                more = *row, mechanism.steps
                after = more_spent(after, more, self.budget, own.silo)
            secret = _secret(own, file)
            key = hashlib.sha256(json.dumps(about_turn).encode() + about()).hexdigest()
            if known and known[0]["turn"] != key:
                raise ValueError(
                    f"silo {own.silo!r} has answered round {self.round_index} of run "
                    f"{self.run!r} for another model, data or settings; it draws no "
                    "noise for it again: take another name for another run"
                )
            if not known:
                line = about_turn | {"turn": key, "noise": row[0], "rate": row[1]}
                line |= {"steps": mechanism.steps, "silo": own.silo}
                line |= {"epsilon": epsilon_spent(after, self.budget.delta)}
                now = datetime.now(timezone.utc).isoformat(timespec="seconds")
                _append(file, line | {"delta": self.budget.delta, "time": now})
        if own.only == "book":
            raise Booked
        return generator_of(hashlib.shake_256(f"{secret} {key}".encode()))

    def entries(self) -> dict[str, Tensor]:
        """Nothing: the account is not part of the model's state."""
        return {}


def gather(folder: Path, target: Path, *, run: str = "", round_index: int = -1) -> None:
    """Write an account of what was booked in separate files, each once, see `book.py`.

    folder: has them at any depth: a secret, and the turn that was booked with it. run,
    round_index: of the turn that goes on from its own secret; all others are of the
    past. Raises ValueError for a damaged file."""
    own, others = list[str](), list[str]()
    for path in sorted(folder.rglob(ACCOUNT)):
        texts = path.read_text().splitlines()
        try:
            secret, about = map(json.loads, texts)
            same = (about["run"], about["round"]) == (run, round_index)
            known = "secret" in secret and {"noise", "rate", "steps"} <= about.keys()
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise ValueError(f"{path} is damaged; bring the hospital's backup back")
        if same and not own:
            own = texts
        elif texts[1] not in (*own, *others):  # the same turn may be kept twice
            others.append(texts[1])
    target.write_text("".join(f"{text}\n" for text in (*own, *others)))


def kept(account: SiloAccount, run: str, round_index: int) -> str:
    """Of an account that `gather` began: one turn, as a file of its own keeps it."""
    found = account._all_lines()
    secret = next(n for n in found if "secret" in n)
    about = {"run": run, "round": round_index}
    line = next(n for n in found if about.items() <= n.items())
    return f"{json.dumps(secret)}\n{json.dumps(line)}\n"


def _secret(account: SiloAccount, file: Any) -> str:
    """The first line's, which is made with the file."""
    found = [n["secret"] for n in account._all_lines() if "secret" in n]
    if not found:
        found = [secrets.token_hex(32)]
        os.chmod(account.path, 0o600)
        _append(file, {"secret": found[0]})
    return found[0]


def _append(file: Any, line: Mapping[str, Any]) -> None:
    """Add a line, which is on the disk when this returns."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    text = json.dumps(line) + "\n"
    if size and file.read(1) != b"\n":
        text = "\n" + text
    if file.write(text.encode()) != len(text):
        raise OSError("the account's disk is full; nothing was trained")
    os.fsync(file.fileno())
    if not size and hasattr(os, "O_DIRECTORY"):  # the file's name is new, too
        folder = os.open(Path(file.name).parent, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)
