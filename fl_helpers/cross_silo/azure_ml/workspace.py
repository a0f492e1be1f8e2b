"""The Azure ML workspace: connect, send a run, wait for it, download the model.

Nothing is sent that `plan.check_plan` refuses, and telemetry is always off. What is in
the workspace is looked at by `preflight`. `azure-ai-ml` is imported when it is needed.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from fl_helpers import exchange
from fl_helpers.cross_silo.azure_ml.federation import Federation
from fl_helpers.cross_silo.azure_ml.plan import check_plan, read_plan
from fl_helpers.cross_silo.azure_ml.problems import AzureProblem, in_plain_words

LAST = ("Completed", "Failed", "Canceled")
Metrics = list[dict[str, Any]]


def is_configured(federation: Federation) -> bool:
    """Whether `silos.yaml` names a subscription, not the zeros of the example."""
    return not set(federation.workspace.subscription_id) <= {"0", "-"}


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

    if not is_configured(federation):
        raise AzureProblem(
            "silos.yaml names no subscription yet; fill in azure_ml.workspace: "
            "docs/azure-ml.md has the way from an empty subscription"
        )
    space = federation.workspace
    place = space.subscription_id, space.resource_group, space.name
    client = MLClient(credential or sign_in(), *place, enable_telemetry=False)
    with in_plain_words(f"workspace {space.name!r}"):
        client.workspaces.get(space.name)
    return client


def submit(client: Any, job: Any, federation: Federation) -> Any:
    """Check the plan of a job, then send it; returns what Azure ML made of it.

    job: of `pipeline.build_pipeline`. Sending changes it: build it anew for any other
    use. The run's name becomes the job's, so that a second one with it is refused. The
    result has `name` and `studio_url`. Raises PlanRefused before anything is sent, or
    AzureProblem.
    """
    check_plan(read_plan(job._to_dict()), federation)
    job.name = job.name or job.display_name
    with in_plain_words(f"run {job.name!r}"):
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

    poll, timeout: seconds. An interrupt ends the waiting, not the run. Raises
    AzureProblem if the run fails, with the names of the jobs that did, or if it is not
    over in time.
    """
    end = time.monotonic() + timeout
    with tqdm(desc=name, unit="job", disable=not show_progress) as bar:
        while True:
            job, status, jobs = _look_at(client, name)
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


def _look_at(client: Any, name: str) -> tuple[Any, str, dict[str, str]]:
    """A run, its status, and {job: status}; a job is listed once it is queued."""
    with in_plain_words(f"run {name!r}"):
        job = client.jobs.get(name)
        found = client.jobs.list(parent_job_name=name)
        jobs = {child.display_name: str(child.status) for child in found}
    return job, str(getattr(job.status, "value", job.status)), jobs


def player(
    client: Any, folder: str | Path, **how: Any
) -> Callable[[Any, Any], Metrics]:
    """What `rounds.play_rounds` needs to run its graphs on Azure ML: send, wait, read.

    folder: where reports go. how: as in `wait`.
    """

    def play(job: Any, federation: Federation) -> Metrics:
        sent = submit(client, job, federation)
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
