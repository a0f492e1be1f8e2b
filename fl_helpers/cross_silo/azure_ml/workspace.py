"""The Azure ML workspace: connect, send a run, wait for it, download the model.

Nothing is sent but the plan, exactly (`wire.Gate`), and telemetry is always off. What
is in the workspace is looked at by `preflight`. The SDK is imported when it is needed.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import requests
from torch import Tensor
from tqdm import tqdm

from fl_helpers import exchange
from fl_helpers.cross_silo.azure_ml.pipeline import check_plan
from fl_helpers.cross_silo.azure_ml.plan import Plan, PlanRefused, Violation
from fl_helpers.cross_silo.azure_ml.problems import AzureProblem, in_plain_words
from fl_helpers.cross_silo.federation import Federation

LAST = ("Completed", "Failed", "Canceled")
BREAK = 900  # seconds that the connection may be away while a run is waited for
Metrics = list[dict[str, Any]]


def is_configured(federation: Federation) -> bool:
    """Whether `silos.yaml` names a subscription, not the zeros of the example."""
    subscription = federation.azure_ml.workspace.subscription_id
    return not set(subscription) <= {"0", "-"}


@functools.cache
def sign_in() -> Any:
    """Who you are: environment, managed identity, `az login`, or else the browser."""
    from azure.identity import DefaultAzureCredential

    return DefaultAzureCredential(exclude_interactive_browser_credential=False)


def connect(federation: Federation, *, credential: Any = None) -> Any:
    """Connect to the federation's workspace; returns azure-ai-ml's `MLClient`.

    credential: of azure-identity; None is `sign_in()`. Raises AzureProblem if you are
    not signed in, or the workspace is not there or not for you.
    """
    from azure.ai.ml import MLClient
    from azure.core.pipeline.transport import RequestsTransport

    from fl_helpers.cross_silo.azure_ml import wire

    if not is_configured(federation):
        raise AzureProblem(
            "silos.yaml names no subscription yet; fill in azure_ml.workspace: "
            "docs/azure-ml.md has the way from an empty subscription"
        )
    gate, session = wire.Gate(federation), requests.Session()
    for scheme in ("https://", "http://"):
        session.mount(scheme, gate)
    space = federation.azure_ml.workspace
    client = MLClient(
        credential or sign_in(),
        *(space.subscription_id, space.resource_group, space.name),
        enable_telemetry=False,
        transport=RequestsTransport(session=session, session_owner=False),
    )
    _gates[client] = gate
    with in_plain_words(f"workspace {space.name!r}"):
        client.workspaces.get(space.name)
    return client


_gates: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # of the clients made here


def submit(client: Any, plan: Plan, *, approved: str) -> Any:
    """Send a plan that was approved; returns what Azure ML made of it.

    client: of `connect`. approved: the digest that was signed, `Plan.digest`; another
    plan, or code that has changed since, is refused. The plan's name becomes the job's,
    so that a second one with it is refused. The result has `name` and `studio_url`.
    Raises PlanRefused before the run is created, or AzureProblem.
    """
    from fl_helpers.cross_silo.azure_ml import sdk, wire

    gate = _gates.get(client)
    if gate is None:
        raise TypeError("the client must be one of workspace.connect")
    if gate.federation.azure_ml.workspace != plan.federation.azure_ml.workspace:
        ours, other = (f.azure_ml.workspace for f in (gate.federation, plan.federation))
        raise PlanRefused(
            [Violation("the plan", "its workspace", str(other), str(ours))]
        )
    if approved != plan.digest:
        signed = Violation("the plan", "its digest", plan.digest, str(approved))
        raise PlanRefused([signed])
    check_plan(plan)
    job = sdk.to_job(plan)
    wire.check_job(job, plan)
    # Else the SDK takes an earlier component's address from a file, and sends none.
    os.environ["AZURE_ML_DISABLE_ON_DISK_CACHE"] = "True"
    with in_plain_words(f"run {plan.name!r}"), gate.open_for(plan):
        return client.jobs.create_or_update(job)


def wait(
    client: Any,
    name: str,
    *,
    poll: float = 15,
    timeout: float = 86_400,
    show_progress: bool = True,
) -> None:
    """Wait until a run is completed, with a bar over its jobs.

    poll, timeout: seconds. An interrupt ends the waiting, not the run, and so does a
    connection that is away for a quarter of an hour. Raises
    AzureProblem if the run fails, with the names of the jobs that did, or if it is not
    over in time.
    """
    end = time.monotonic() + timeout
    with tqdm(desc=name, unit="job", disable=not show_progress) as bar:
        while True:
            job, status, jobs = _look_again(client, name, poll)
            running = [key for key, state in jobs.items() if state == "Running"]
            bar.total, bar.n = len(job.jobs), list(jobs.values()).count("Completed")
            bar.set_postfix_str(", ".join(running[:4]) or status)
            if status in LAST:
                break
            if time.monotonic() > end:
                raise AzureProblem(
                    f"run {name!r} is not over after {timeout} s, but goes on; wait "
                    "again, or stop it with client.jobs.begin_cancel(name)"
                )
            time.sleep(poll)
    if status != "Completed":
        failed = [key for key, state in jobs.items() if state == "Failed"]
        raise AzureProblem(
            f"run {name!r} is {status}; jobs that failed: {failed}; their logs are at "
            f"{job.studio_url}, but what a silo's job said stays in its own store, in "
            f"fl/private/{name}/",
            failed,
        )


def _look_again(client: Any, name: str, poll: float) -> tuple[Any, str, dict[str, str]]:
    """As `_look_at`, through a break of the connection, which the run does not mind."""
    since = time.monotonic()
    while True:
        try:
            return _look_at(client, name)
        except AzureProblem as problem:
            if not problem.passes or time.monotonic() - since > BREAK:
                raise
            time.sleep(poll)


def _look_at(client: Any, name: str) -> tuple[Any, str, dict[str, str]]:
    """A run, its status, and {job: status}; a job is listed once it is queued."""
    with in_plain_words(f"run {name!r}"):
        job = client.jobs.get(name)
        # Without a number the service lists 50, and the SDK asks for no more of them.
        found = client.jobs.list(parent_job_name=name, max_results=len(job.jobs) + 1)
        jobs = {child.display_name: str(child.status) for child in found}
    return job, str(getattr(job.status, "value", job.status)), jobs


def player(
    client: Any, folder: str | Path, *, approved: str, **how: Any
) -> Callable[[Plan], Metrics]:
    """What `rounds.play_rounds` needs to run its graphs on Azure ML: send, wait, read.

    folder: where reports go. approved: as in `submit`, the same for all graphs of a
    run. how: as in `wait`.
    """

    def play(plan: Plan) -> Metrics:
        sent = submit(client, plan, approved=approved)
        wait(client, sent.name, **how)
        return download_metrics(client, sent.name, Path(folder) / sent.name)

    return play


def download_metrics(client: Any, name: str, folder: str | Path) -> Metrics:
    """Download what silos reported in the last round of a run, and of its final test.

    folder: where its files go. Returns dicts as in `run_locally.Result`. Needs the
    right to read the orchestrator's store. Raises AzureProblem.
    """
    with in_plain_words(f"run {name!r}"):
        outputs = client.jobs.get(name).outputs
    found: Metrics = []
    for output in sorted({"report", "scores"} & set(outputs)):
        path = _download(client, name, folder, output) / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines()
        found += [json.loads(line) for line in lines]
    return found


def download_model(
    client: Any,
    name: str,
    folder: str | Path,
    expected: Mapping[str, Tensor],
) -> exchange.Params:
    """Download the global model of a run that is completed, and check it.

    folder: where its files go. expected: entries of your own model, for names, shapes
    and dtypes, without those that stay in the silos. Needs the right to read the
    orchestrator's store. Raises AzureProblem, or `exchange.Refused`.
    """
    found = _download(client, name, folder, "final_model")
    params = exchange.read_model(found, expected)
    return {key: params[key] for key in expected}


def register_model(client: Any, plan: Plan, *, name: str) -> Any:
    """Register the final model of a plan that is completed; a new version of `name`.

    It stays in the orchestrator's store: the version points to the run's output, so
    that Azure ML shows the run, and its tags are the plan's digest, the report, rounds
    and silos. A safetensors file, so of the type custom_model: MLflow's own form for
    PyTorch is a pickle. Returns Azure's model. Raises AzureProblem.
    """
    from azure.ai.ml.entities import Model

    outputs = f"azureml://jobs/{plan.name}/outputs"
    tags = {"plan": plan.digest, "report": f"{outputs}/report"}
    tags |= {"rounds": str(plan.run.rounds), "run": plan.run.name}
    tags["silos"] = ", ".join(silo.name for silo in plan.silos)
    path = f"{outputs}/final_model"
    model = Model(name=name, path=path, type="custom_model", tags=tags)
    with in_plain_words(f"model {name!r}"):
        return client.models.create_or_update(model)


def _download(client: Any, name: str, folder: str | Path, output: str) -> Path:
    """The local folder of an output of a run; never an empty one."""
    with in_plain_words(f"output {output!r} of run {name!r}"):
        client.jobs.download(name, download_path=str(folder), output_name=output)
    found = Path(folder) / "named-outputs" / output
    if not found.is_dir():
        raise AzureProblem(
            f"run {name!r} has nothing in its output {output!r}; was it completed, and "
            "may you read the orchestrator's store (`Storage Blob Data Reader`)?"
        )
    return found
