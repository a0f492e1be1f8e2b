"""The bodies that a plan is at Azure, rendered from the plan alone.

`wire` compares what the SDK made with them. Computes, components, code and environments
have names of ours here: Azure's are made up when they are sent.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import yaml

from fl_helpers.cross_silo.azure_ml.plan import Flow, Job, Plan
from fl_helpers.cross_silo.azure_ml.sdk import TYPES, properties
from fl_helpers.cross_silo.azure_ml.snapshot import environments

MODES = {"ro_mount": "ReadOnlyMount", "rw_mount": "ReadWriteMount", "upload": "Upload"}


def graph_of(plan: Plan) -> dict[str, Any]:
    """The legal job of a plan: the value of `properties` when it is sent."""
    names = {
        kind: component_name(plan, kind) for kind in {job.kind for job in plan.jobs}
    }
    return {
        "displayName": plan.name,
        "experimentName": plan.federation.project,
        "properties": properties(plan),
        "jobs": {job.name: _node(plan, job, names[job.kind]) for job in plan.jobs},
        "outputs": {
            name: {"uri": flow.uri, "mode": "Upload", "jobOutputType": "uri_folder"}
            for name, flow in plan.outputs.items()
        },
        "settings": {"force_rerun": True, "_source": "DSL"},
        "jobType": "Pipeline",
        "isArchived": False,
    }


def _node(plan: Plan, job: Job, component: str) -> dict[str, Any]:
    promoted = {(f.producer, f.output): name for name, f in plan.outputs.items()}
    party, inputs = job.party, {}
    for key, value in job.literals.items():
        inputs[key] = {"value": str(value), "job_input_type": "literal"}
    for flow in job.reads:
        bound = f"${{{{parent.jobs.{flow.producer}.outputs.{flow.output}}}}}"
        inputs[flow.name] = (
            {"value": bound, "job_input_type": "literal"}
            if flow.producer
            else _folder(flow, "job_input_type")
        )
    outputs = {}
    for flow in job.writes:
        name = promoted.get((job.name, flow.name))
        value = {"value": f"${{{{parent.outputs.{name}}}}}", "type": "literal"}
        outputs[flow.name] = value if name else _folder(flow, "job_output_type")
    several = job.kind == "train" and party.processes > 1
    processes = {"process_count_per_instance": party.processes}
    return {
        "name": job.name,
        "type": "command",
        "computeId": party.compute,
        "componentId": component,
        "inputs": inputs,
        "outputs": outputs,
        "limits": {"timeout": _duration(plan), "job_limits_type": "Command"},
        "resources": {"instance_type": party.instance_type, "shm_size": party.shm_size},
        "distribution": {"distribution_type": "PyTorch"} | processes if several else {},
        "_source": "BUILDER",
    }


def _folder(flow: Flow, kind: str) -> dict[str, str]:
    return {"uri": flow.uri, "mode": MODES[flow.mode], kind: "uri_folder"}


def _duration(plan: Plan) -> str:
    """As ISO 8601 and the SDK write it: P1DT12H."""
    days, hours = divmod(plan.federation.azure_ml.hours, 24)
    return "P" + (f"{days}D" if days else "") + (f"T{hours}H" if hours else "")


def spec_of(plan: Plan, kind: str) -> dict[str, Any]:
    """The legal component of a kind of job; empty if the plan has none."""
    job = next((job for job in plan.jobs if job.kind == kind), None)
    if job is None:
        return {}
    inputs = {key: {"type": TYPES[type(v)]} for key, v in job.literals.items()}
    folder = {"type": "uri_folder", "mode": "ro_mount"}
    return {
        "name": f"fl_{kind}",
        "display_name": kind,
        "type": "command",
        "command": job.command,
        "code": f"code {job.code} {plan.codes[job.code]}",
        "environment": environment_text(environments(plan.federation)[job.code]),
        "inputs": inputs | {flow.name: folder for flow in job.reads},
        "outputs": {flow.name: {"type": "uri_folder"} for flow in job.writes},
        "is_deterministic": False,
        "_source": "BUILDER",
    }


def component_name(plan: Plan, kind: str) -> str:
    """One name for a component: two have it only if they are equal."""
    text = json.dumps(spec_of(plan, kind), sort_keys=True)
    return f"component {kind} {hashlib.sha256(text.encode()).hexdigest()}"


def environment_text(found: Any) -> str:
    """One text for an environment, whoever says it; conda files in one form."""
    if isinstance(found, str):
        return found
    conda = found.get("conda") or found.get("conda_file") or found.get("condaFile")
    if isinstance(conda, str):
        text, conda = conda, yaml.safe_load(conda)
        words = sorted(yaml.safe_dump(conda).split())
        # Not every reader of YAML takes other signs than these for the end of a line.
        if sorted(text.split()) != words or not re.fullmatch(r"([ -~]|\r?\n)*", text):
            raise ValueError("more than it means: a comment, a key twice, other signs")
    return json.dumps([found.get("image"), conda], sort_keys=True)
