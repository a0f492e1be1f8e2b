"""A run round by round: a graph for each round, and a decision after it.

One graph for all rounds (`pipeline.build_pipeline(rounds=R)`) is one submission, and
the service does the rest; but it fails as a whole and cannot stop early. Here a run
goes on without a silo that fails (with a quorum), stops when scores no longer get
better, and is resumed where it was interrupted. The price is a submission per round.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fl_helpers.cross_silo.azure_ml.federation import Federation, Party
from fl_helpers.cross_silo.azure_ml.pipeline import build_pipeline

Metrics = list[dict[str, Any]]


class NoQuorum(RuntimeError):
    """Fewer silos than agreed: the round does not count."""


def play_rounds(
    federation: Federation,
    params: Mapping[str, Tensor],
    folder: str | Path,
    play: Callable[[Any, Federation], Metrics],
    *,
    run: str,
    rounds: int,
    seed: int,
    quorum: int | None = None,
    stop: Mapping[str, Any] | None = None,
    show: Callable[[str], None] = print,
    **how: Any,
) -> dict[str, Any]:
    """Play a run round by round and test its last model; go on if it was interrupted.

    play(job, federation) runs a graph, here or on Azure ML, and returns its metrics, as
    in `run_locally.Result`. If jobs fail it raises an error that has their names in
    `jobs`; then the round is played anew without these jobs' silos. quorum: how many
    must be left; None is all. folder: gets `state.json` and the code snapshots. stop:
    {"metric": name, "patience": rounds}, "higher_is_better": False for a loss; stop
    when the mean over silos no longer gets better. how, params: as in `build_pipeline`;
    `prepare` is called in each round.

    Returns the state: run and rounds_done (where the model is, as for `warm_start`),
    metrics, and missing, {round: silos}. Raises NoQuorum, ValueError if folder has the
    state of another run, and what play raises if the orchestrator's job fails.
    """
    path, names = Path(folder) / "state.json", [s.name for s in federation.silos]
    about = {"run": run, "seed": seed, "silos": names, "how": repr(sorted(how.items()))}
    state = _resume(path, about)

    def play_with(some: Federation, final: bool) -> Metrics:
        state["tries"], done = state["tries"] + 1, state["rounds_done"]
        # Each try has a name of its own: it writes where nothing is yet.
        state["last_try"] = f"{run}-{state['tries']:04d}"
        _save(path, state)
        job = build_pipeline(
            *(some, params, folder),
            run=state["last_try"],
            rounds=done + (not final),
            seed=seed,
            final=final,
            warm_start=(state["run"], done) if state["run"] else None,
            kept={silo: tuple(place) for silo, place in state["kept"].items()},
            **how,
        )
        return play(job, some)

    while state["rounds_done"] < rounds and not state["stopped"]:
        done = state["rounds_done"]
        there = _with_quorum(play_with, federation, quorum, state, final=False)
        start = {silo: (state["last_try"], 0) for silo in names}  # who misses round 0
        last = {silo.name: (state["last_try"], done + 1) for silo in there}
        state["kept"] = {**start, **state["kept"], **last}
        state["run"], state["rounds_done"] = state["last_try"], done + 1
        state["stopped"] = bool(stop) and should_stop(state["metrics"], stop)
        _save(path, state)
        show(f"round {done} done, with {', '.join(last)}")
    if how.get("evaluate", True) and not state["tested"]:
        _with_quorum(play_with, federation, quorum, state, final=True)
        state["tested"] = True
        _save(path, state)
    return state


def should_stop(metrics: Metrics, stop: Mapping[str, Any]) -> bool:
    """Whether none of the last `patience` scores is better than all before; a score is
    the mean over silos."""
    scores: dict[int, list[float]] = {}
    for line in metrics:
        if line["metric"] == stop["metric"]:
            scores.setdefault(line["round"], []).append(line["value"])
    means = [sum(values) / len(values) for _, values in sorted(scores.items())]
    best = max if stop.get("higher_is_better", True) else min
    before = means[: -stop["patience"]]
    return bool(before) and best(means) == best(before)


def _with_quorum(
    play_with: Callable[[Federation, bool], Metrics],
    federation: Federation,
    quorum: int | None,
    state: dict[str, Any],
    *,
    final: bool,
) -> tuple[Party, ...]:
    """Play until it works, each time without the silos that failed; who took part."""
    done, needed = state["rounds_done"], quorum or len(federation.silos)
    some, missing = federation, list[str]()
    while len(some.silos) >= max(2, needed):
        try:
            state["metrics"] += play_with(some, final)
            state["missing"] |= {str(done): missing} if missing else {}
            return some.silos
        except RuntimeError as error:
            jobs = set(getattr(error, "jobs", ()))
            kinds = ("prepare", f"train_{done:04d}", "evaluate")
            lost = [
                s.name for s in some.silos if {f"{k}_{s.key}" for k in kinds} & jobs
            ]
            if not lost:
                raise
            missing += lost
            some = some.only([s.name for s in some.silos if s.name not in lost])
    raise NoQuorum(
        f"round {done}: {len(some.silos)} silos are left, the quorum is {needed}; "
        f"failed: {missing}; start again when they are there, it goes on from here"
    )


def _resume(path: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """The state that is there, or that of a new run."""
    state: dict[str, Any] = {"run": "", "last_try": "", "rounds_done": 0, "tries": 0}
    state |= {"stopped": False, "tested": False, "metrics": [], "missing": {}}
    state |= {"kept": {}, "about": dict(about)}
    if path.exists():
        state = json.loads(path.read_text(encoding="utf-8"))
    differ = [key for key in about if state["about"].get(key) != about[key]]
    if differ:
        raise ValueError(f"{path} is of another run: {differ} differ; use a new folder")
    return state


def _save(path: Path, state: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".tmp").open("w", encoding="utf-8") as file:
        json.dump(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path.with_suffix(".tmp"), path)
