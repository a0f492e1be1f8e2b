"""A run round by round: a graph for each round, and a decision after it.

One graph for all rounds is one submission, and the service does the rest; but it fails
as a whole and cannot stop early. Here a run goes on without a silo that fails (with a
quorum), stops when scores no longer get better, and is resumed where it was
interrupted. The price is a submission per round.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fl_helpers.cross_silo.azure_ml.pipeline import build_pipeline
from fl_helpers.cross_silo.azure_ml.plan import Part, Plan
from fl_helpers.cross_silo.federation import Federation
from fl_helpers.cross_silo.run import Run, to_plain
from fl_helpers.simulation import NoQuorum

Metrics = list[dict[str, Any]]
MAY_CHANGE = ("rounds", "quorum", "deadline", "stop")  # of a run that is resumed


def play_rounds(
    run: Run,
    federation: Federation,
    folder: str | Path,
    play: Callable[[Plan], Metrics],
    *,
    show: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Play a run round by round and test its last model; go on if it was interrupted.

    run: with its quorum and stop. folder: gets `state.json` and the code snapshots.
    play: runs a graph, here or on Azure ML, and returns its metrics, as in
    `run_locally.Result`; if jobs fail it raises an error that has their names in
    `jobs`: then the round is played anew without these jobs' silos. show: gets a line
    after each round.

    Returns the state: name and rounds_done (where the model is, as for `Part.start`),
    metrics, and missing, {round: silos}. Raises NoQuorum, ValueError if folder has the
    state of another run, and what play raises if the orchestrator's job fails.
    """
    driver = _Driver(run, federation, Path(folder), play)
    state = driver.state
    while state["rounds_done"] < run.rounds and not state["stopped"]:
        there = driver.round()
        done = state["rounds_done"] - 1
        show(f"round {done} done, with {', '.join(sorted(there))}")
    if run.evaluate and not state["tested"]:
        driver.play_with_quorum(final=True)
        state["tested"] = True
        driver.save()
    return state


class _Driver:
    """The state of a run, in a file, and how it moves on."""

    def __init__(
        self,
        run: Run,
        federation: Federation,
        folder: Path,
        play: Callable[[Plan], Metrics],
    ) -> None:
        self.run, self.federation, self.folder, self.play = (
            run,
            federation,
            folder,
            play,
        )
        self.names = [silo.name for silo in federation.silos]
        self.path = folder / "state.json"
        about = {k: v for k, v in to_plain(run).items() if k not in MAY_CHANGE}
        about |= {"federation": asdict(federation.azure_ml), "silos": self.names}
        about = json.loads(json.dumps(about, default=sorted))
        self.state: dict[str, Any] = {"name": "", "last_try": "", "rounds_done": 0}
        self.state |= {"tries": 0, "stopped": False, "tested": False, "metrics": []}
        self.state |= {"missing": {}, "kept": {}, "about": about}
        if self.path.exists():
            self.state = json.loads(self.path.read_text(encoding="utf-8"))
        differ = [key for key in about if self.state["about"].get(key) != about[key]]
        if differ:
            raise ValueError(
                f"{self.path} is of another run: {differ} differ; use a new folder"
            )

    def round(self) -> frozenset[str]:
        """Play one round; returns the silos that took part."""
        state, done = self.state, self.state["rounds_done"]
        there = self.play_with_quorum(final=False)
        name = state["last_try"]
        start = {silo: (name, 0) for silo in self.names}  # who misses round 0
        last = {silo: (name, done + 1) for silo in there}
        state["kept"] = {**start, **state["kept"], **last}
        state["name"], state["rounds_done"] = name, done + 1
        state["stopped"] = bool(self.run.stop) and self.run.stop.reached(self.scores())
        self.save()
        return there

    def scores(self) -> list[float]:
        """The mean over silos, one per tested model."""
        found: dict[int, list[float]] = {}
        for line in self.state["metrics"]:
            if line["metric"] == f"test_{self.run.stop.metric}":
                found.setdefault(line["round"], []).append(line["value"])
        return [sum(values) / len(values) for _, values in sorted(found.items())]

    def play_with_quorum(self, *, final: bool) -> frozenset[str]:
        """Play until it works, each time without the silos that failed."""
        done, needed = self.state["rounds_done"], self.run.quorum or len(self.names)
        there, missing = frozenset(self.names), list[str]()
        while len(there) >= max(2, needed):
            try:
                self.state["metrics"] += self.play_with(there, final)
                self.state["missing"] |= {str(done): missing} if missing else {}
                return there
            except RuntimeError as error:
                lost = sorted(there & self.silos_of(getattr(error, "jobs", ())))
                if not lost:
                    raise
                missing += lost
                there -= set(lost)
        raise NoQuorum(
            f"round {done}: {len(there)} silos are left, the quorum is {needed}; "
            f"failed: {missing}; start again when they are there, it goes on from here"
        )

    def play_with(self, there: frozenset[str], final: bool) -> Metrics:
        state, done = self.state, self.state["rounds_done"]
        state["tries"] += 1
        # Each try has a name of its own: it writes where nothing is yet.
        state["last_try"] = f"{self.run.name}-{state['tries']:04d}"
        self.save()
        part = Part(
            name=state["last_try"],
            start=(state["name"], done) if state["name"] else None,
            rounds=done + (not final),
            silos=there,
            kept={silo: tuple(place) for silo, place in state["kept"].items()},
            final=final,
        )
        plan = build_pipeline(self.run, self.federation, self.folder, part=part)
        return self.play(plan)

    def silos_of(self, jobs: Iterable[str]) -> set[str]:
        """Whose jobs these are; the orchestrator's are nobody's."""
        here = f"{self.state['rounds_done']:04d}"
        kinds = ("prepare", f"book_{here}", f"train_{here}", "evaluate")
        return {
            silo.name
            for silo in self.federation.silos
            if {f"{kind}_{silo.azure_ml.key}" for kind in kinds} & set(jobs)
        }

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".tmp").open("w", encoding="utf-8") as file:
            json.dump(self.state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.path.with_suffix(".tmp"), self.path)
