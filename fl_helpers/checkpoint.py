"""A file from which a run of `simulation.run_rounds` goes on after a crash or a stop.

It holds the models, what silos keep, what the aggregation remembers, and all records:
tensors and plain values, read without running code. Needs only torch: copy this file on
its own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Checkpoint:
    """A file that is written every `every` rounds; if it exists, a run goes on from it.

    It ends with the same bits as a run that was never interrupted. The file knows the
    seed, silos, sampling and model, not your functions and their settings: give each
    algorithm a file of its own.
    """

    path: str | Path
    every: int = 1

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be >= 1, got {self.every}")

    def load(self, run: dict[str, Any], rounds: int) -> dict[str, Any] | None:
        """What `save` wrote; None if there is no file.

        run: what must be the same as then. rounds: of the whole run, not fewer than
        are done. Raises ValueError for a file of another run, and leaves it alone.
        """
        path = Path(self.path)
        if not path.exists():
            return None
        other = "name another file, or delete it to start from the first round"
        try:  # our own file; weights_only: tensors and plain values, no code is run
            content = torch.load(path, weights_only=True)
            found, done = content["run"], len(content["rounds"])
        except Exception as error:
            raise ValueError(
                f"{path} is not a checkpoint of run_rounds ({error}); {other}"
            ) from error
        if found != run:
            raise ValueError(
                f"{path} belongs to another run: {found}, this one is {run}; {other}"
            )
        if done > rounds:
            raise ValueError(
                f"{path} belongs to another run: {done} rounds are done, this one has "
                f"{rounds}; ask for more rounds or name another file"
            )
        return content

    def save(self, run: dict[str, Any], content: dict[str, Any]) -> None:
        """Write a temporary file and rename it: a crash leaves the old one."""
        path = Path(self.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            torch.save({"run": run, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
