"""A plan as `azure-ai-ml` has it: `PipelineJob`, or a file for `az ml job create`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from azure.ai.ml import Input, Output, PyTorchDistribution, command, dsl
from azure.ai.ml.entities import (
    CommandJobLimits,
    Environment,
    JobResourceConfiguration,
    PipelineJob,
)

from fl_helpers.cross_silo.azure_ml.plan import Flow, Job, Plan
from fl_helpers.cross_silo.azure_ml.snapshot import environments

logging.getLogger("azure.ai.ml").setLevel("ERROR")  # notes on experimental classes
TYPES = {int: "integer", str: "string"}


def to_job(plan: Plan) -> PipelineJob:
    """The plan as a job, to look at or to change; `workspace.submit` makes its own.

    Azure's own client changes what it sends: make a new one for each use.
    """
    project, made = plan.federation.project, dict[str, Any]()
    components = {}

    @dsl.pipeline(name=f"fl_{project}", display_name=plan.name, experiment_name=project)
    def scatter_gather() -> dict[str, Any]:
        for job in plan.jobs:
            if job.kind not in components:
                components[job.kind] = _component(plan, job)
            made[job.name] = _node(job, components[job.kind], made, plan)
        return {
            key: made[flow.producer].outputs[flow.output]
            for key, flow in plan.outputs.items()
        }

    result = scatter_gather()
    result.name = plan.name
    for key, flow in plan.outputs.items():  # for `jobs.download`
        result.outputs[key] = _output(flow, "upload")
    result.settings.force_rerun = True  # a round is never another one's result
    # With a property of this kind the SDK leaves out the repository, branch and commit.
    result.properties = properties(plan)
    return result


def properties(plan: Plan) -> dict[str, str]:
    """What a job says of itself."""
    return {"plan": plan.digest, "mlflow.source.git.commit": "not sent"}


def write_yaml(plan: Plan, path: str | Path) -> Path:
    """Write the plan as a file for `az ml job create --file`; returns its path."""
    to_job(plan).dump(str(path))
    return Path(path)


def _node(job: Job, component: Any, made: dict[str, Any], plan: Plan) -> Any:
    inputs: dict[str, Any] = dict(job.literals)
    for flow in job.reads:
        inputs[flow.name] = (
            made[flow.producer].outputs[flow.output]
            if flow.producer
            else Input(type="uri_folder", mode=flow.mode, path=flow.uri)
        )
    node = component(**inputs)
    node.name, node.compute = job.name, job.party.compute
    for flow in job.writes:
        node.outputs[flow.name] = _output(flow, flow.mode)
    node.limits = CommandJobLimits(timeout=3600 * plan.federation.azure_ml.hours)
    party = job.party
    given = {"instance_type": party.instance_type, "shm_size": party.shm_size}
    if given := {key: value for key, value in given.items() if value}:
        # Not set_resources: all jobs of a kind would share them.
        node.resources = JobResourceConfiguration(**given)
    if job.kind == "train" and party.processes > 1:
        count = party.processes
        node.distribution = PyTorchDistribution(process_count_per_instance=count)
    return node


def _output(flow: Flow, mode: str) -> Output:
    return Output(type="uri_folder", mode=mode, path=flow.uri)


def _component(plan: Plan, job: Job) -> Any:
    """The kind of job that takes such inputs."""
    inputs = {k: Input(type=TYPES[type(v)]) for k, v in job.literals.items()}
    folder = Input(type="uri_folder", mode="ro_mount")
    inputs |= {flow.name: folder for flow in job.reads}
    environment = environments(plan.federation)[job.code]
    if not isinstance(environment, str):
        conda = environment.get("conda")
        environment = Environment(image=environment["image"], conda_file=conda)
    return command(
        name=f"fl_{job.kind}",
        display_name=job.kind,
        code=str(plan.code[job.code]),
        command=job.command,
        environment=environment,
        inputs=inputs,
        outputs={flow.name: Output(type="uri_folder") for flow in job.writes},
        is_deterministic=False,
    ).component
