"""The rounds of a run as a graph of Azure ML jobs: scatter to the silos, gather, again.

Built with `azure-ai-ml`, without a workspace or network. Every job is pinned to the
compute of one party, every output to a folder of one datastore (`federation.place`).
Check the plan before it is sent: `plan.check_plan`.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from azure.ai.ml import Input, Output, command, dsl
from azure.ai.ml.entities import (
    Environment,
    JobResourceConfiguration,
    PipelineJob,
)
from safetensors.torch import save_file
from torch import Tensor

from fl_helpers.aggregation import make_aggregate
from fl_helpers.cross_silo.azure_ml.federation import Federation, Party, place
from fl_helpers.robust import ROBUST_RULES

logging.getLogger("azure.ai.ml").setLevel("ERROR")  # notes on experimental classes

JOBS = Path(__file__).resolve().parent / "jobs"
PACKAGE = JOBS.parents[2]
IMAGE = "mcr.microsoft.com/azureml/openmpi4.1.0-ubuntu22.04:20260715.v1"
SCRIPTS = {
    "silo": ("prepare", "train", "evaluate"),
    "orchestrator": ("initial", "aggregate", "collect"),
}


def build_pipeline(
    federation: Federation,
    params: Mapping[str, Tensor],
    folder: str | Path,
    *,
    run: str,
    rounds: int,
    seed: int,
    settings: Mapping[str, float | str] | None = None,
    client: str | None = None,
    prepare: str = "",
    aggregate: str = "weighted_average",
    options: Mapping[str, float] | None = None,
    trainable: Collection[str] = (),
    keep_local: Collection[str] = (),
    evaluate: bool = True,
    final: bool = True,
    max_norm: float | None = None,
    warm_start: tuple[str, int] | None = None,
    kept: Mapping[str, tuple[str, int]] | None = None,
) -> PipelineJob:
    """Build the jobs of a run. Build anew for each use: submitting changes them.

    params: initial model state, not modified. folder: gets the code snapshots, `code/`;
    keep it until the job is submitted. run: its name, a new one for each graph: jobs
    write where nothing is yet. rounds, seed, keep_local: as in `simulation.run_rounds`.
    client, settings: see `client.load_client`; None takes the federation's. prepare: a
    function in the same form, called once in each silo as function(data, target,
    settings); it writes into the folder target what the client then gets as data.
    aggregate: "weighted_average", a server or robust rule; its options; the trainable
    names.
    evaluate: the silos test the model before they train and, if `final`, the last one;
    not final is a graph that others follow. max_norm: as in `exchange.Limits`.

    warm_start: (run, rounds done) to go on from, of the same federation and model; then
    params give names and shapes only, and the graph plays the rounds that are left. If
    none are, it only tests the model. kept: {silo's name: (run, rounds done)} of silos
    that kept their entries elsewhere, as they missed the last rounds. The job's outputs
    are `final_model`, `report` (metrics of the last round) and `scores`.
    Raises ValueError for what cannot be run.
    """
    first, keep_local = warm_start[1] if warm_start else 0, sorted(set(keep_local))
    client = client or federation.client
    _check_rounds(run, first, rounds, final and evaluate)
    _check_names(federation, params, keep_local, client=client, prepare=prepare)
    rule = make_aggregate(aggregate, params, trainable, options, more=ROBUST_RULES)
    content = {
        "silos": {silo.key: silo.name for silo in federation.silos},
        "entries": _layout(params),
        "keep_local": keep_local,
        "client": client,
        "prepare": prepare,
        "settings": dict(settings or {}),
        "evaluate": evaluate,
        "aggregate": aggregate,
        "options": dict(options or {}),
        "trainable": sorted(trainable),
        "max_norm": max_norm,
    }
    sent = {name: value for name, value in params.items() if name not in keep_local}
    graph = _Graph(
        federation,
        run,
        code=write_snapshots(folder, content, None if warm_start else params),
        seed=seed,
        metrics=",".join(sorted(federation.metrics)) or ",",
        # The entries, and a header: what `exchange` takes.
        max_bytes=1024 + sum(v.nbytes + 256 + 6 * len(k) for k, v in sent.items()),
        keep=bool(keep_local),
        remember=hasattr(rule, "state_dict"),
        prepare=bool(prepare),
        kept=kept or {},
    )
    return graph.build(first, rounds, warm_start, final and evaluate)


def write_snapshots(
    folder: str | Path,
    content: Mapping[str, Any],
    initial: Mapping[str, Tensor] | None,
) -> dict[str, Path]:
    """Write what is uploaded: `code/silo` and `code/orchestrator` in folder.

    Each holds the scripts of its jobs, the files of `fl_helpers`, `run.json`, and an
    `.amlignore` that lets nothing else pass. The silos' also has the files of `client`
    and `prepare`, the orchestrator's the initial model. Returns {script: its folder}.
    """
    code, content = Path(folder).resolve() / "code", dict(content)
    own = set[Path]()
    for key in ("client", "prepare"):
        path, _, name = content[key].rpartition(":")
        if path.endswith(".py"):
            own.add(Path(path).resolve())
            content[key] = f"{Path(path).name}:{name}"
    for part, scripts in SCRIPTS.items():
        shutil.rmtree(code / part, ignore_errors=True)
        (code / part / "fl_helpers").mkdir(parents=True)
        for name in ("common.py", ".amlignore", *(f"{s}.py" for s in scripts)):
            shutil.copyfile(JOBS / name, code / part / name)
        for path in [*PACKAGE.glob("*.py"), *PACKAGE.glob("cross_silo/*.py")]:
            target = code / part / "fl_helpers" / path.relative_to(PACKAGE)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        text = json.dumps(content, indent=1) + "\n"
        (code / part / "run.json").write_text(text, encoding="utf-8")
    for path in own:
        if (code / "silo" / path.name).exists():
            raise ValueError(f"{path.name} is the name of another file; rename it")
        shutil.copyfile(path, code / "silo" / path.name)
    if initial is not None:
        whole = {name: value.contiguous() for name, value in initial.items()}
        save_file(whole, code / "orchestrator" / "initial.safetensors")
    return {name: code / part for part, names in SCRIPTS.items() for name in names}


@dataclass(frozen=True)
class _Graph:
    """What the jobs of a graph have in common, and a method for each kind of job.

    A state is what a round starts from: {"model", "memory", "kept_<key of a silo>"},
    each a folder or the output of a job.
    """

    federation: Federation
    run: str
    code: Mapping[str, Path]
    seed: int
    metrics: str
    max_bytes: int
    keep: bool
    remember: bool
    prepare: bool
    kept: Mapping[str, tuple[str, int]]
    components: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)  # {key of a silo: its folder}

    def build(
        self, first: int, rounds: int, warm_start: tuple[str, int] | None, final: bool
    ) -> PipelineJob:
        name, main = self.federation.project, self.federation.orchestrator
        about = {"name": f"fl_{name}", "display_name": self.run}

        @dsl.pipeline(experiment_name=name, **about)
        def scatter_gather() -> dict[str, Any]:
            state = self.left_by(*warm_start) if warm_start else self.initial()
            for silo in self.federation.silos:
                self.data[silo.key] = self.data_of(silo)
            for index in range(first, rounds):
                state = self.round(index, state)
            scores = {"scores": self.test(rounds, state)} if final else {}
            last = {"final_model": state["model"], "report": state.get("report")}
            return scores | (last if rounds > first else {})

        job = scatter_gather()
        paths = {"final_model": place("models", self.run, rounds)}
        paths["report"] = place("reports", self.run, rounds - 1)
        paths["scores"] = place("reports", self.run, "scores")
        for output in job.outputs:  # for `jobs.download`
            job.outputs[output] = _output(main, paths[output])
        job.settings.force_rerun = True  # a round is never another one's result
        return job

    def left_by(self, run: str, done: int) -> dict[str, Any]:
        """The state that an earlier run left."""
        main = self.federation.orchestrator
        state = {"model": _input(main, place("models", run, done))}
        if self.remember:
            state["memory"] = _input(main, place("memory", run, done))
        for silo in self.federation.silos if self.keep else ():
            before, rounds = self.kept.get(silo.name, (run, done))
            state[f"kept_{silo.key}"] = (
                _input(silo, place("kept", before, rounds))
                if rounds
                else _input(main, place("models", before, "kept"))
            )
        return state

    def initial(self) -> dict[str, Any]:
        """A job publishes the initial model."""
        writes = {"next_model": place("models", self.run, 0)}
        if self.remember:
            writes["next_memory"] = place("memory", self.run, 0)
        if self.keep:
            writes["kept"] = place("models", self.run, "kept")
        made = self.at_orchestrator("initial", "initial", {}, writes)
        state = {"model": made["next_model"]}
        if self.remember:
            state["memory"] = made["next_memory"]
        for silo in self.federation.silos if self.keep else ():
            state[f"kept_{silo.key}"] = made["kept"]
        return state

    def data_of(self, silo: Party) -> Any:
        """A silo's data, as they are or as a job prepares them."""
        data = _input(silo, silo.data)
        if not self.prepare:
            return data
        outputs = {
            "prepared": _output(silo, place("prepared", self.run, "data")),
            "private": _private(silo, self.run, "prepare"),
        }
        inputs = {"silo": silo.key, "data": data}
        name = f"prepare_{silo.key}"
        return self.job("prepare", name, silo, inputs, outputs)["prepared"]

    def round(self, index: int, state: dict[str, Any]) -> dict[str, Any]:
        """Train in every silo, aggregate; returns the state after it."""
        updates, new = {}, {}
        for silo in self.federation.silos:
            outputs = {"model_update": self.released(silo, index)}
            outputs["private"] = _private(silo, self.run, f"train_{index:04d}")
            if self.keep:
                kept = place("kept", self.run, index + 1)
                outputs["next_kept"] = _output(silo, kept)
            inputs = self.inputs_of(silo, state, index, self.max_bytes)
            inputs["seed"] = self.seed
            name = f"train_{index:04d}_{silo.key}"
            made = self.job("train", name, silo, inputs, outputs)
            updates[f"update_{silo.key}"] = made["model_update"]
            new |= {f"kept_{silo.key}": made["next_kept"]} if self.keep else {}
        inputs = {"round": index, "metrics": self.metrics, "max_bytes": self.max_bytes}
        inputs |= {k: state[k] for k in ("model", "memory") if k in state} | updates
        writes = {"next_model": place("models", self.run, index + 1)}
        if self.remember:
            writes["next_memory"] = place("memory", self.run, index + 1)
        writes["report"] = place("reports", self.run, index)
        name = f"aggregate_{index:04d}"
        made = self.at_orchestrator("aggregate", name, inputs, writes)
        new |= {"memory": made["next_memory"]} if self.remember else {}
        return new | {"model": made["next_model"], "report": made["report"]}

    def test(self, rounds: int, state: dict[str, Any]) -> Any:
        """Test the final model in every silo, collect the scores; returns these."""
        updates, max_bytes = {}, 1024  # there are only numbers
        for silo in self.federation.silos:
            outputs = {"scores": self.released(silo, "scores")}
            outputs["private"] = _private(silo, self.run, "evaluate")
            inputs = self.inputs_of(silo, state, rounds, max_bytes)
            made = self.job("evaluate", f"evaluate_{silo.key}", silo, inputs, outputs)
            updates[f"update_{silo.key}"] = made["scores"]
        inputs = {"round": rounds, "metrics": self.metrics, "max_bytes": max_bytes}
        writes = {"report": place("reports", self.run, "scores")}
        made = self.at_orchestrator("collect", "collect", inputs | updates, writes)
        return made["report"]

    def inputs_of(
        self, silo: Party, state: dict[str, Any], index: int, max_bytes: int
    ) -> dict[str, Any]:
        """What a job at a silo is told, and what it reads."""
        inputs = {"silo": silo.key, "round": index, "metrics": self.metrics}
        inputs |= {"max_bytes": max_bytes, "data": self.data[silo.key]}
        inputs["model"] = state["model"]
        return inputs | ({"kept": state[f"kept_{silo.key}"]} if self.keep else {})

    def released(self, silo: Party, step: int | str) -> Output:
        """The place of what leaves a silo."""
        path = place("updates", self.run, step, silo.key)
        return _output(silo, path, datastore=silo.outbox)

    def at_orchestrator(
        self, kind: str, name: str, inputs: dict[str, Any], writes: dict[str, str]
    ) -> Any:
        main = self.federation.orchestrator
        outputs = {output: _output(main, path) for output, path in writes.items()}
        return self.job(kind, name, main, inputs, outputs)

    def job(
        self,
        kind: str,
        name: str,
        party: Party,
        inputs: dict[str, Any],
        outputs: dict[str, Output],
    ) -> Any:
        """One job; returns its outputs, for the inputs of others."""
        if kind not in self.components:
            self.components[kind] = _component(
                kind, self.code[kind], inputs, outputs, self.federation.environment
            )
        node = self.components[kind](**inputs)
        node.name, node.compute = name, party.compute
        for output, where in outputs.items():
            node.outputs[output] = where
        if party.instance_type:
            # Not set_resources: all jobs of a kind would share them.
            node.resources = JobResourceConfiguration(instance_type=party.instance_type)
        return node.outputs


def _input(party: Party, path: str) -> Input:
    uri = f"azureml://datastores/{party.datastore}/paths/{path}"
    return Input(type="uri_folder", mode="ro_mount", path=uri)


def _output(
    party: Party, path: str, *, datastore: str = "", mode: str = "upload"
) -> Output:
    uri = f"azureml://datastores/{datastore or party.datastore}/paths/{path}"
    return Output(type="uri_folder", mode=mode, path=uri)


def _private(silo: Party, run: str, step: str) -> Output:
    """Ledger and log, mounted: so that they are there if the job fails, too."""
    return _output(silo, place("private", run, step), mode="rw_mount")


def _component(
    kind: str,
    code: Path,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    environment: str,
) -> Any:
    """The kind of job that takes such inputs; `updates` end its command line."""
    types = {int: "integer", str: "string"}
    ports = {
        name: Input(type=types[type(value)])
        if type(value) in types
        else Input(type="uri_folder", mode="ro_mount")
        for name, value in inputs.items()
    }
    plain = [name for name in inputs if not name.startswith("update_")]
    line = ["python", f"{kind}.py"]
    line += [f"--{name} ${{{{inputs.{name}}}}}" for name in plain]
    line += [f"--{name} ${{{{outputs.{name}}}}}" for name in outputs]
    if updates := [name for name in inputs if name not in plain]:
        keys = [name.removeprefix("update_") for name in updates]
        line += ["--updates", *(f"{k}=${{{{inputs.update_{k}}}}}" for k in keys)]
    pinned = Environment(image=IMAGE, conda_file=str(JOBS / "conda.yaml"))
    return command(
        name=f"fl_{kind}",
        display_name=kind,
        code=str(code),
        command=" ".join(line),
        environment=environment or pinned,
        inputs=ports,
        outputs={name: Output(type="uri_folder") for name in outputs},
        is_deterministic=False,
    ).component


def _layout(params: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """{name: [shape, dtype]} in the model's order."""
    return {
        name: [list(value.shape), str(value.dtype).removeprefix("torch.")]
        for name, value in params.items()
    }


def _check_rounds(run: str, first: int, rounds: int, final: bool) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,60}", run):
        raise ValueError(f"run must be letters, digits, _ and -, got {run!r}")
    if rounds < 1 or not 0 <= first <= rounds or (first == rounds and not final):
        raise ValueError(
            f"rounds must be >= 1 and >= {first}, as many are done; more than these, "
            f"unless the model is tested; got {rounds}"
        )


def _check_names(
    federation: Federation,
    params: Mapping[str, Tensor],
    keep_local: Collection[str],
    **functions: str,
) -> None:
    unknown = sorted(set(keep_local) - params.keys())
    if unknown or len(keep_local) == len(params):
        raise ValueError(
            f"keep_local must name entries of params, not all; unknown: {unknown[:3]}"
        )
    if len(federation.silos) < 2:
        raise ValueError(f"a run needs 2 silos, got {len(federation.silos)}")
    for name, entry in functions.items():
        if entry and not re.fullmatch(r"[^:]+:[A-Za-z_]\w*", entry):
            raise ValueError(
                f"{name} must be module:function or file.py:function, got {entry!r}"
            )
