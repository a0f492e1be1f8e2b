"""The rounds of a run as a graph of jobs: scatter to the silos, gather, again.

Every job is pinned to the compute of one party, every input and output to a folder of
one datastore (`plan.place`). No SDK, workspace or network is needed; `sdk.to_job` makes
of a plan what Azure ML takes, `run_locally.run` plays it here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from fl_helpers.cross_silo.azure_ml import start
from fl_helpers.cross_silo.azure_ml.plan import (
    Flow,
    Job,
    Part,
    Plan,
    PlanRefused,
    Violation,
    place,
)
from fl_helpers.cross_silo.azure_ml.snapshot import environments, write_snapshots
from fl_helpers.cross_silo.federation import Federation, Party
from fl_helpers.cross_silo.run import Run, to_plain

SCORES_BYTES = 1024  # of an update that has only numbers
WHOLE = Part()


def build_pipeline(
    run: Run, federation: Federation, folder: str | Path, *, part: Part = WHOLE
) -> Plan:
    """Make the plan of a run, and the code that its jobs run.

    run: its `limits.metrics` leave a silo where `silos.yaml` allows them, too; its
    quorum and stop need a graph per round, `rounds.play_rounds`. folder: gets the code
    snapshots, `code/`; keep it until the plan is submitted. part: a part of the run, as
    a graph of its own. The graph's outputs are `final_model`, `report` (metrics of the
    last round) and `scores`. Raises ValueError for what cannot be run.
    """
    _check_run(run, federation, part)
    code, codes = write_snapshots(run, federation, folder)
    jobs, outputs = _graph(run, federation, part, codes)
    digest = _digest(run, federation, codes)
    return Plan(run, federation, part, jobs, outputs, code, codes, digest)


def check_plan(plan: Plan) -> None:
    """Refuse a plan that is not the one of its run and federation, or whose code is not
    what it says. Raises PlanRefused, whatever is wrong with it."""
    try:
        wrong = _compare(plan)
    except Exception as error:
        why = Violation("the plan", "it", f"not complete ({error!r})", "what was built")
        raise PlanRefused([why]) from error
    if wrong:
        raise PlanRefused(wrong)


def _compare(plan: Plan) -> list[Violation]:
    """Where a plan is not the one that `build_pipeline` makes."""
    _check_run(plan.run, plan.federation, plan.part)
    jobs, outputs = _graph(plan.run, plan.federation, plan.part, plan.codes)
    legal, found = ({job.name: job for job in some} for some in (jobs, plan.jobs))
    wrong = [
        Violation(name, "the job", str(found.get(name)), str(legal.get(name)))
        for name in sorted(legal.keys() | found.keys())
        if legal.get(name) != found.get(name)
    ]
    if dict(outputs) != dict(plan.outputs) or len(found) != len(plan.jobs):
        wrong += [Violation("the plan", "it", "not complete", str(outputs))]
    if plan.digest != _digest(plan.run, plan.federation, plan.codes):
        wrong += [Violation("the plan", "its digest", plan.digest, "another")]
    for key, digest in plan.codes.items():
        try:
            start.verify(plan.code[key], digest, exactly=True)
        except (OSError, ValueError) as error:
            wrong += [Violation("the code", key, str(error), digest)]
    return wrong


def _digest(run: Run, federation: Federation, codes: Mapping[str, str]) -> str:
    """SHA-256 of the whole run: who, where, what runs in what, every flow."""
    jobs, outputs = _graph(run, federation, WHOLE, codes)
    own = asdict(federation.azure_ml)
    for key in ("client", "prepare"):  # not where the file lies on this machine
        own[key] = own[key].rpartition("/")[2]
    agreed = {
        "run": to_plain(run),
        "federation": [federation.project, own],
        "environments": environments(federation),
        "codes": dict(codes),
        "jobs": [asdict(job) for job in jobs],
        "outputs": {name: asdict(flow) for name, flow in outputs.items()},
    }
    text = json.dumps(agreed, sort_keys=True, default=sorted)
    return hashlib.sha256(text.encode()).hexdigest()


def _graph(
    run: Run, federation: Federation, part: Part, codes: Mapping[str, str]
) -> tuple[tuple[Job, ...], dict[str, Flow]]:
    graph = _Graph(run, federation, part, codes)
    outputs = graph.build()
    return tuple(graph.jobs), outputs


@dataclass
class _Graph:
    """Collects jobs, by a method for each kind.

    A state is what a round starts from: {"model", "memory", "kept_<key of a silo>"},
    each a flow.
    """

    run: Run
    federation: Federation
    part: Part
    codes: Mapping[str, str]
    jobs: list[Job] = field(default_factory=list)

    def __post_init__(self) -> None:
        run, some = self.run, self.part.silos
        self.name = self.part.name or run.name
        self.main = self.federation.azure_ml.orchestrator
        silos = (self.federation.only(some) if some else self.federation).silos
        self.silos = [silo.azure_ml for silo in silos]
        self.keep = bool(run.keep_local)
        self.remember = hasattr(run.make_rule(run.shared), "state_dict")
        # The entries, and a header: what `exchange` takes.
        size = sum(v.nbytes + 256 + 6 * len(k) for k, v in run.shared.items())
        self.max_bytes = run.limits.max_bytes or 1024 + size
        names = run.limits.metrics & self.federation.azure_ml.metrics
        self.metrics = ",".join(sorted(names)) or ","

    def build(self) -> dict[str, Flow]:
        """All jobs; returns the outputs of the graph."""
        part, rounds = self.part, _rounds(self.run, self.part)
        first = part.start[1] if part.start else 0
        state = self.left_by(*part.start) if part.start else self.initial()
        data = {silo.key: self.data_of(silo) for silo in self.silos}
        for index in range(first, rounds):
            state = self.round(index, state, data)
        outputs = {}
        if self.run.evaluate and part.final:
            outputs["scores"] = self.test(rounds, state, data)
        if rounds > first:
            outputs |= {"final_model": state["model"], "report": state["report"]}
        return outputs

    def left_by(self, name: str, done: int) -> dict[str, Flow]:
        """The state that an earlier graph left."""
        main = self.main
        state = {"model": _read(main, place("models", name, done))}
        if self.remember:
            state["memory"] = _read(main, place("memory", name, done))
        for silo in self.silos if self.keep else ():
            before, rounds = self.part.kept.get(silo.name, (name, done))
            state[f"kept_{silo.key}"] = (
                _read(silo, place("kept", before, rounds))
                if rounds
                else _read(main, place("models", before, "kept"))
            )
        return state

    def initial(self) -> dict[str, Flow]:
        """A job publishes the initial model."""
        writes = {"next_model": place("models", self.name, 0)}
        if self.remember:
            writes["next_memory"] = place("memory", self.name, 0)
        if self.keep:
            writes["kept"] = place("models", self.name, "kept")
        made = self.at_orchestrator("initial", "initial", {}, {}, writes)
        state = {"model": made["next_model"]}
        if self.remember:
            state["memory"] = made["next_memory"]
        for silo in self.silos if self.keep else ():
            state[f"kept_{silo.key}"] = made["kept"]
        return state

    def data_of(self, silo: Party) -> Flow:
        """A silo's data, as they are or as a job prepares them."""
        asset = silo.data.startswith("azureml:")
        data = Flow("data", "" if asset else silo.datastore, silo.data, "ro_mount")
        if not self.federation.azure_ml.prepare:
            return data
        writes = {"prepared": self.own(silo, "prepared", "data")}
        writes["private"] = self.private(silo, "prepare")
        name, literals = f"prepare_{silo.key}", {"silo": silo.key}
        made = self.job("prepare", name, silo, literals, {"data": data}, writes)
        return made["prepared"]

    def round(
        self, index: int, state: dict[str, Flow], data: Mapping[str, Flow]
    ) -> dict[str, Flow]:
        """Train in every silo, aggregate; returns the state after it."""
        updates, new = {}, {}
        for silo in self.silos:
            writes = {"model_update": self.released(silo, index)}
            writes["private"] = self.private(silo, f"train_{index:04d}")
            if self.keep:
                writes["next_kept"] = self.own(silo, "kept", index + 1)
            literals = {"silo": silo.key, **self.limits(index, self.max_bytes)}
            literals["seed"] = self.run.seed
            reads = self.reads_of(silo, state, data)
            if silo.account:
                reads["booked"] = self.book(silo, index, reads)
            name = f"train_{index:04d}_{silo.key}"
            made = self.job("train", name, silo, literals, reads, writes)
            updates[f"update_{silo.key}"] = made["model_update"]
            new |= {f"kept_{silo.key}": made["next_kept"]} if self.keep else {}
        reads = {k: state[k] for k in ("model", "memory") if k in state} | updates
        writes = {"next_model": place("models", self.name, index + 1)}
        if self.remember:
            writes["next_memory"] = place("memory", self.name, index + 1)
        writes["report"] = place("reports", self.name, index)
        literals = self.limits(index, self.max_bytes)
        name = f"aggregate_{index:04d}"
        made = self.at_orchestrator("aggregate", name, literals, reads, writes)
        new |= {"memory": made["next_memory"]} if self.remember else {}
        return new | {"model": made["next_model"], "report": made["report"]}

    def book(self, silo: Party, index: int, reads: dict[str, Flow]) -> Flow:
        """A job of its own books a turn: what it wrote is kept before noise is drawn,
        whatever becomes of the job that trains."""
        path = f"{silo.account}/{self.name}/{index:04d}"
        writes = {"booked": Flow("", silo.datastore, path, "upload")}
        writes["private"] = self.private(silo, f"book_{index:04d}")
        literals = {"silo": silo.key, **self.limits(index, self.max_bytes)}
        name = f"book_{index:04d}_{silo.key}"
        return self.job("book", name, silo, literals, reads, writes)["booked"]

    def test(
        self, rounds: int, state: dict[str, Flow], data: Mapping[str, Flow]
    ) -> Flow:
        """Test the final model in every silo, collect the scores; returns these."""
        updates, limits = {}, self.limits(rounds, SCORES_BYTES)
        for silo in self.silos:
            writes = {"scores": self.released(silo, "scores")}
            writes["private"] = self.private(silo, "evaluate")
            reads, literals = self.reads_of(silo, state, data), {"silo": silo.key}
            name = f"evaluate_{silo.key}"
            made = self.job("evaluate", name, silo, literals | limits, reads, writes)
            updates[f"update_{silo.key}"] = made["scores"]
        writes = {"report": place("reports", self.name, "scores")}
        made = self.at_orchestrator("collect", "collect", limits, updates, writes)
        return made["report"]

    def limits(self, index: int, max_bytes: int) -> dict[str, int | str]:
        """What a job is told of what may leave a silo."""
        return {"round": index, "metrics": self.metrics, "max_bytes": max_bytes}

    def reads_of(
        self, silo: Party, state: dict[str, Flow], data: Mapping[str, Flow]
    ) -> dict[str, Flow]:
        """What a job at a silo reads."""
        reads = {"data": data[silo.key], "model": state["model"]}
        if silo.account:
            reads["account"] = _read(silo, silo.account)
        return reads | ({"kept": state[f"kept_{silo.key}"]} if self.keep else {})

    def released(self, silo: Party, step: int | str) -> Flow:
        """The place of what leaves a silo."""
        path = place("updates", self.name, step, silo.key)
        return Flow("", silo.outbox, path, "upload")

    def own(self, silo: Party, kind: str, step: int | str) -> Flow:
        return Flow("", silo.datastore, place(kind, self.name, step), "upload")

    def private(self, silo: Party, step: str) -> Flow:
        """Ledger and log, mounted: so that they are there if the job fails, too."""
        return replace(self.own(silo, "private", step), mode="rw_mount")

    def at_orchestrator(
        self,
        kind: str,
        name: str,
        literals: dict[str, int | str],
        reads: dict[str, Flow],
        writes: dict[str, str],
    ) -> dict[str, Flow]:
        store = self.main.datastore
        flows = {k: Flow("", store, path, "upload") for k, path in writes.items()}
        return self.job(kind, name, self.main, literals, reads, flows)

    def job(
        self,
        kind: str,
        name: str,
        party: Party,
        literals: dict[str, int | str],
        reads: dict[str, Flow],
        writes: dict[str, Flow],
    ) -> dict[str, Flow]:
        """Add a job; returns its outputs as the inputs of others."""
        job = Job(
            name,
            kind,
            party,
            command="",
            literals=literals,
            reads=tuple(replace(flow, name=key) for key, flow in reads.items()),
            writes=tuple(replace(flow, name=key) for key, flow in writes.items()),
        )
        self.jobs.append(replace(job, command=_command(job, self.codes[job.code])))
        return {
            key: replace(flow, mode="ro_mount", producer=name, output=key)
            for key, flow in writes.items()
        }


def _command(job: Job, code: str) -> str:
    """The one command line of a kind of job; `updates` end it. Words have nothing that
    a shell would interpret, and each slot stands behind its own name."""
    line = ["python -B start.py", code, f"{job.kind}.py"]
    names = [*job.literals, *(flow.name for flow in job.reads)]
    plain = [name for name in names if not name.startswith("update_")]
    line += [f"--{name} ${{{{inputs.{name}}}}}" for name in plain]
    line += [f"--{flow.name} ${{{{outputs.{flow.name}}}}}" for flow in job.writes]
    if updates := [name for name in names if name not in plain]:
        keys = [name.removeprefix("update_") for name in updates]
        line += ["--updates", *(f"{k}=${{{{inputs.update_{k}}}}}" for k in keys)]
    return " ".join(line)


def _read(party: Party, path: str) -> Flow:
    return Flow("", party.datastore, path, "ro_mount")


def _rounds(run: Run, part: Part) -> int:
    return run.rounds if part.rounds is None else part.rounds


def _check_run(run: Run, federation: Federation, part: Part) -> None:
    own = federation.azure_ml
    if run.secure:
        raise ValueError("secure sums are for runs on premises; here, set secure=False")
    if run.wait_for_quorum:
        raise ValueError(
            "wait_for_quorum is for runs on premises; here, set it to 0, and play the "
            "run again when more silos are there"
        )
    _check_names(part)
    count = len((federation.only(part.silos) if part.silos else federation).silos)
    if count < 2:
        raise ValueError(f"a run needs 2 silos, got {count}")
    first, rounds = part.start[1] if part.start else 0, _rounds(run, part)
    tests = part.final and run.evaluate
    if not 0 <= first <= rounds <= run.rounds or (first == rounds and not tests):
        raise ValueError(
            f"rounds must be {first}, as many are done, to {run.rounds}; more than "
            f"these, unless the model is tested; got {rounds}"
        )
    if part.rounds is None and (run.stop or (run.quorum or count) < count):
        raise ValueError(
            "one graph of all rounds has no quorum and no stop; rounds.play_rounds has"
        )
    needed = {"model_update", *(("scores",) if run.evaluate else ())}
    if missing := sorted(needed - own.released):
        raise ValueError(
            f"{missing} may not leave a silo; a run needs them in `released` of "
            "silos.yaml"
        )
    metrics = run.limits.metrics & own.metrics
    if run.evaluate and not any(name.startswith("test_") for name in metrics):
        raise ValueError(
            "the silos test, but no number test_... may leave: limits.metrics of the "
            f"run are {sorted(run.limits.metrics)}, silos.yaml allows "
            f"{sorted(own.metrics)}; name some in both, or set evaluate=False"
        )


def _check_names(part: Part) -> None:
    """Graphs are parts of paths, and no signature is on them: no dots, no slashes."""
    before = [part.start] if part.start else []
    for name, done in [(part.name or "x", 0), *before, *part.kept.values()]:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,70}", name) or type(done) is not int:
            raise ValueError(
                f"graphs have names of letters, digits, _ and -, at most 70, and "
                f"integers as rounds; got {name!r}, {done!r}"
            )
