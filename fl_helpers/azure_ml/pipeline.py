"""The rounds of a run as a graph of Azure ML jobs: scatter to the silos, gather, again.

Built with `azure-ai-ml`, without a workspace or network. Every job is pinned to the
compute of one party, every output to a folder of one datastore (`federation.place`).
Check the plan before you send it: `plan.check_plan`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fl_helpers.aggregation import SERVER_RULES, make_aggregate
from fl_helpers.azure_ml.federation import Federation, Party, place

HERE = Path(__file__).resolve().parent
IMAGE = "mcr.microsoft.com/azureml/openmpi4.1.0-ubuntu22.04:20260715.v1"
IN_SILO = ("train", "evaluate", "prepare")
AT_ORCHESTRATOR = ("initial", "aggregate", "collect")


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
    aggregate: str = "weighted_average",
    options: Mapping[str, float] | None = None,
    trainable: Collection[str] = (),
    keep_local: Collection[str] = (),
    evaluate: bool = True,
    final: bool = True,
    max_norm: float | None = None,
    warm_start: tuple[str, int] | None = None,
) -> Any:
    """Build the jobs of a run; returns a `PipelineJob` of azure-ai-ml.

    params: initial model state, not modified. folder: where the code snapshots are
    written, `folder/code/`; keep it until the job is submitted. run: its name, of a new
    one each time: what jobs write must not be there before. rounds, seed, keep_local: as
    in `simulation.run_rounds`. client, settings: see `client.load_client`; None takes
    the federation's. aggregate: "weighted_average", or a server rule with its options
    and trainable names. evaluate: the silos test the model before they train, and
    `final`, the last one; False for a graph that others follow. max_norm: as in
    `exchange.Limits`.

    warm_start: (run, rounds done) to go on from, of the same federation and model;
    params then give names and shapes only. With as many rounds as are done, the graph
    only tests the model. Raises ValueError for what cannot be run.
    """
    first = warm_start[1] if warm_start else 0
    _check(federation, params, run, first, rounds, keep_local, final and evaluate)
    make_aggregate(aggregate, params, trainable, options)
    content = {
        "silos": {silo.key: silo.name for silo in federation.silos},
        "entries": {
            name: [list(value.shape), str(value.dtype).removeprefix("torch.")]
            for name, value in params.items()
        },
        "keep_local": sorted(keep_local),
        "settings": dict(settings or {}),
        "evaluate": evaluate,
        "aggregate": aggregate,
        "options": dict(options or {}),
        "trainable": sorted(trainable),
        "max_norm": max_norm,
    }
    client = client or federation.client
    code = write_snapshots(folder, content, client, None if warm_start else params)
    builder = _Builder(
        federation,
        run,
        seed,
        keep=bool(keep_local),
        remember=aggregate in SERVER_RULES,
        metrics=",".join(sorted(federation.metrics)) or ",",
        max_bytes=_max_bytes(params, keep_local),
        components=_components(federation, code, content),
    )
    return builder.build(first, rounds, warm_start, final and evaluate)


def write_snapshots(
    folder: str | Path,
    content: Mapping[str, Any],
    client: str,
    initial: Mapping[str, Tensor] | None,
) -> dict[str, Path]:
    """Write what is uploaded: `code/silo` and `code/orchestrator` in folder.

    Each holds the jobs' scripts, the files of `fl_helpers`, `run.json`, and an
    `.amlignore` that lets nothing else pass; the silos' the file of the client, too, the
    orchestrator's the initial model. Returns {name of a job's script: its folder}.
    """
    code = Path(folder).resolve() / "code"
    place, _, function = client.rpartition(":")
    own = [Path(place)] if place.endswith(".py") else []
    parts = {"silo": IN_SILO, "orchestrator": AT_ORCHESTRATOR}
    for part, scripts in parts.items():
        shutil.rmtree(code / part, ignore_errors=True)
        (code / part / "fl_helpers").mkdir(parents=True)
        for name in ("common.py", ".amlignore", *(f"{s}.py" for s in scripts)):
            shutil.copyfile(HERE / "jobs" / name, code / part / name)
        for path in HERE.parent.glob("*.py"):
            shutil.copyfile(path, code / part / "fl_helpers" / path.name)
        entry = f"{own[0].name}:{function}" if own else client
        text = json.dumps({**content, "client": entry}, indent=1)
        (code / part / "run.json").write_text(text + "\n", encoding="utf-8")
    for path in own:
        if (code / "silo" / path.name).exists():
            raise ValueError(f"{path.name} is the name of a job; rename the file")
        shutil.copyfile(path, code / "silo" / path.name)
    if initial is not None:
        whole = {name: value.contiguous() for name, value in initial.items()}
        save_file(whole, code / "orchestrator" / "initial.safetensors")
    return {script: code / part for part, names in parts.items() for script in names}


@dataclass(frozen=True)
class _Builder:
    """What all jobs of a graph need to know; one method per kind of job."""

    federation: Federation
    run: str
    seed: int
    keep: bool
    remember: bool
    metrics: str
    max_bytes: int
    components: Mapping[str, Any]

    def build(
        self, first: int, rounds: int, warm_start: tuple[str, int] | None, final: bool
    ) -> Any:
        """The whole graph, rounds `first` to `rounds` - 1."""
        from azure.ai.ml import dsl

        @dsl.pipeline(
            name=f"fl_{self.federation.project}",
            display_name=self.run,
            experiment_name=self.federation.project,
        )
        def scatter_gather() -> dict[str, Any]:
            state = self.from_run(*warm_start) if warm_start else self.initial()
            for index in range(first, rounds):
                state = self.round(index, state)
            if final:
                self.test(rounds, state)
            return {"final_model": state["model"]} if rounds > first else {}

        job = scatter_gather()
        if rounds > first:
            main = self.federation.orchestrator.datastore
            job.outputs.final_model = _output(main, place("models", self.run, rounds))
        job.settings.force_rerun = True  # a round is never another one's result
        return job

    def from_run(self, run: str, done: int) -> dict[str, Any]:
        """The state that an earlier run left."""
        main = self.federation.orchestrator.datastore
        state = {"model": _input(main, place("models", run, done))}
        if self.remember:
            state["memory"] = _input(main, place("memory", run, done))
        for silo in self.federation.silos if self.keep else ():
            state[silo.key] = _input(silo.datastore, place("kept", run, done))
        return state

    def initial(self) -> dict[str, Any]:
        """The job that publishes the initial model."""
        node = self.at_orchestrator("initial", "initial", {})
        self.write(node, "next_model", place("models", self.run, 0))
        state = {"model": node.outputs["next_model"]}
        if self.remember:
            self.write(node, "next_memory", place("memory", self.run, 0))
            state["memory"] = node.outputs["next_memory"]
        if self.keep:
            self.write(node, "kept", place("models", self.run, "kept"))
            kept = {silo.key: node.outputs["kept"] for silo in self.federation.silos}
            state |= kept
        return state

    def round(self, index: int, state: dict[str, Any]) -> dict[str, Any]:
        """Train in every silo, aggregate; returns the state after it."""
        new, updates = {}, {}
        for silo in self.federation.silos:
            inputs = {"round": index, "seed": self.seed}
            node = self.in_silo("train", f"{index:04d}", silo, state, inputs)
            update = place("updates", self.run, index, silo.key)
            node.outputs["model_update"] = _output(silo.outbox, update)
            updates[f"update_{silo.key}"] = node.outputs["model_update"]
            if self.keep:
                kept = place("kept", self.run, index + 1)
                node.outputs["next_kept"] = _output(silo.datastore, kept)
                new[silo.key] = node.outputs["next_kept"]
        before = {k: state[k] for k in ("model", "memory") if k in state}
        limits = {"metrics": self.metrics, "max_bytes": self.max_bytes}
        inputs = {"round": index, **limits, **before, **updates}
        node = self.at_orchestrator("aggregate", f"aggregate_{index:04d}", inputs)
        self.write(node, "next_model", place("models", self.run, index + 1))
        self.write(node, "report", place("reports", self.run, index))
        if self.remember:
            self.write(node, "next_memory", place("memory", self.run, index + 1))
            new["memory"] = node.outputs["next_memory"]
        return new | {"model": node.outputs["next_model"]}

    def test(self, rounds: int, state: dict[str, Any]) -> None:
        """Test the final model in every silo, collect the scores."""
        updates = {}
        for silo in self.federation.silos:
            node = self.in_silo("evaluate", "final", silo, state, {"round": rounds})
            scores = place("updates", self.run, "scores", silo.key)
            node.outputs["scores"] = _output(silo.outbox, scores)
            updates[f"update_{silo.key}"] = node.outputs["scores"]
        limits = {"metrics": self.metrics, "max_bytes": 1024}
        inputs = {"round": rounds, **limits, **updates}
        node = self.at_orchestrator("collect", "collect", inputs)
        self.write(node, "report", place("reports", self.run, "scores"))

    def in_silo(
        self, kind: str, step: str, silo: Party, state: Any, inputs: dict[str, Any]
    ) -> Any:
        """A job at a silo: its data, the model, its own store."""
        size = self.max_bytes if kind == "train" else 1024
        inputs |= {"silo": silo.key, "metrics": self.metrics, "max_bytes": size}
        inputs |= {"data": _input(silo.datastore, silo.data), "model": state["model"]}
        inputs |= {"kept": state[silo.key]} if self.keep else {}
        node = self.components[kind](**inputs)
        node.name, node.compute = f"{kind}_{step}_{silo.key}", silo.compute
        private = place("private", self.run, f"{kind}_{step}")
        # Mounted, so that the log of a job that fails is there, too.
        node.outputs["private"] = _output(silo.datastore, private, mode="rw_mount")
        if silo.instance_type:
            node.set_resources(instance_type=silo.instance_type)
        return node

    def at_orchestrator(self, kind: str, name: str, inputs: dict[str, Any]) -> Any:
        node = self.components[kind](**inputs)
        node.name, node.compute = name, self.federation.orchestrator.compute
        if self.federation.orchestrator.instance_type:
            node.set_resources(instance_type=self.federation.orchestrator.instance_type)
        return node

    def write(self, node: Any, output: str, path: str) -> None:
        """Give a job's output its folder in the orchestrator's store."""
        main = self.federation.orchestrator.datastore
        node.outputs[output] = _output(main, path)


def _input(datastore: str, path: str) -> Any:
    from azure.ai.ml import Input

    uri = f"azureml://datastores/{datastore}/paths/{path}"
    return Input(type="uri_folder", mode="ro_mount", path=uri)


def _output(datastore: str, path: str, mode: str = "upload") -> Any:
    from azure.ai.ml import Output

    uri = f"azureml://datastores/{datastore}/paths/{path}"
    return Output(type="uri_folder", mode=mode, path=uri)


def _components(
    federation: Federation, code: Mapping[str, Path], content: Mapping[str, Any]
) -> dict[str, Any]:
    """The kinds of jobs, with inputs and outputs of this run. Made anew for each graph:
    submitting one changes them."""
    keep, remember = bool(content["keep_local"]), content["aggregate"] in SERVER_RULES
    folder, limits = "uri_folder", {"metrics": "string", "max_bytes": "integer"}
    kept = {"kept": folder} if keep else {}
    memory = {"memory": folder} if remember else {}
    in_silo = {"silo": "string", "round": "integer", **limits}
    in_silo |= {"data": folder, "model": folder, **kept}
    updates = {f"update_{silo.key}": folder for silo in federation.silos}
    gather = {"round": "integer", **limits, **updates}
    next_kept = ["next_kept"] if keep else []
    next_model = ["next_model", *(["next_memory"] if remember else [])]
    found = {  # kind: (inputs, outputs)
        "initial": ({}, [*next_model, *kept]),
        "train": (
            in_silo | {"seed": "integer"},
            ["model_update", "private", *next_kept],
        ),
        "aggregate": (gather | {"model": folder, **memory}, [*next_model, "report"]),
        "evaluate": (in_silo, ["scores", "private"]),
        "collect": (gather, ["report"]),
    }
    return {
        kind: _component(kind, code[kind], inputs, outputs, federation.environment)
        for kind, (inputs, outputs) in found.items()
    }


def _component(
    kind: str, code: Path, inputs: dict[str, str], outputs: list[str], environment: str
) -> Any:
    from azure.ai.ml import Input, Output, command
    from azure.ai.ml.entities import Environment

    line = ["python", f"{kind}.py"]
    updates = [name for name in inputs if name.startswith("update_")]
    for name in inputs:
        if name not in updates:
            line += [f"--{name}", f"${{{{inputs.{name}}}}}"]
    for name in outputs:
        line += [f"--{name}", f"${{{{outputs.{name}}}}}"]
    if updates:
        pairs = (f"{n.removeprefix('update_')}=${{{{inputs.{n}}}}}" for n in updates)
        line += ["--updates", *pairs]
    modes = {"uri_folder": {"mode": "ro_mount"}}
    conda = HERE / "jobs" / "conda.yaml"
    node = command(
        name=f"fl_{kind}",
        display_name=kind,
        code=str(code),
        command=" ".join(line),
        environment=environment or Environment(image=IMAGE, conda_file=str(conda)),
        inputs={n: Input(type=t, **modes.get(t, {})) for n, t in inputs.items()},
        outputs={name: Output(type="uri_folder") for name in outputs},
        is_deterministic=False,
    )
    return node.component


def _max_bytes(params: Mapping[str, Tensor], keep_local: Collection[str]) -> int:
    """Bytes that an update may have: its entries, and a header."""
    sent = {name: value for name, value in params.items() if name not in keep_local}
    return 1024 + sum(v.nbytes + 256 + 6 * len(k) for k, v in sent.items())


def _check(
    federation: Federation,
    params: Mapping[str, Tensor],
    run: str,
    first: int,
    rounds: int,
    keep_local: Collection[str],
    final: bool,
) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,60}", run):
        raise ValueError(f"run must be letters, digits, _ and -, got {run!r}")
    if not 0 <= first <= rounds or rounds < 1 or (first == rounds and not final):
        raise ValueError(
            f"rounds must be > {first}, the rounds that are done, got {rounds}"
        )
    unknown = sorted(set(keep_local) - params.keys())
    if unknown:
        raise ValueError(f"keep_local names entries that params lacks: {unknown[:3]}")
    if len(set(keep_local)) == len(params):
        raise ValueError("keep_local names every entry; nothing would be shared")
    if len(federation.silos) < 2:
        raise ValueError(f"a run needs 2 silos, got {len(federation.silos)}")
