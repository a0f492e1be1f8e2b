"""Bodies that the SDK sends, answers of the fake, and templates: as Azure publishes."""

import copy
import json
from pathlib import Path

import pytest
import requests

from fl_helpers.cross_silo.azure_ml import workspace
from fl_helpers.cross_silo.azure_ml.preflight import preflight

from . import azure_trial, fake_azure, published_types

pytestmark = published_types.needed
TEMPLATES = Path(__file__).parents[2] / "docs" / "azure"
KNOWN = [  # azure-ai-ml 1.35 sends a number where a text is published
    "$.properties.properties.hash_version: 202208 is not a str"
]


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """[(type, whether it is an answer, body)] of looking, sending, waiting."""
    folder = tmp_path_factory.mktemp("types")
    content = azure_trial.full_content()
    content["silos"][0]["azure_ml"] |= {"processes": 2, "shm_size": "8g"}
    fed = azure_trial.read(folder, content)
    fake = fake_azure.Instant(fed, folder / "cloud")
    fake.params = azure_trial.model().state_dict()
    plan = azure_trial.build(fed, fake.params, folder)
    credential = fake_azure.Credential()
    with pytest.MonkeyPatch.context() as patch:
        send = fake_azure.adapter(fake)
        patch.setattr(requests.adapters.HTTPAdapter, "send", send)
        connection = workspace.connect(fed, credential=credential)
        preflight(connection, fed, credential=credential)
        workspace.submit(connection, plan, approved=plan.digest)
        workspace.wait(connection, plan.name, show_progress=False)
    return list(bodies(fake.calls))


def bodies(calls):
    for call in calls:
        kind = published_types.resource_of(call.path, call.query.get("api-version"))
        if not kind or not published_types.is_published(kind):
            continue
        if call.method == "PUT":
            yield kind, False, json.loads(call.body)
        status, answer = call.answer[:2]
        if status < 300 and isinstance(answer, dict) and "value" not in answer:
            yield kind, True, answer


def wrong(kind, answered, body):
    found = published_types.check(kind, body, answered=answered)
    return [text for text in found if text not in KNOWN]


def test_every_body_and_every_answer_is_as_published(recording):
    problems = {
        f"{'answer' if answered else 'sent'} {kind}: {text}"
        for kind, answered, body in recording
        for text in wrong(kind, answered, body)
    }
    assert problems == set()
    seen = {(kind.partition("@")[0].rpartition("/")[0], a) for kind, a, _ in recording}
    assert len(seen) >= 6, seen
    assert len(recording) >= 40


def test_planted_errors_are_found_in_what_is_sent(recording):
    jobs = next(b for k, a, b in recording if "/jobs@" in k and not a)
    kind = next(k for k, a, b in recording if "/jobs@" in k and not a)
    for change in (
        lambda p: p.update(experimentname="x"),
        lambda p: p.update(jobType="Graph"),
        lambda p: p.update(displayName=7),
        lambda p: p.update(isArchived="no"),
        lambda p: p.update(status="Completed"),  # read-only
        lambda p: p["outputs"]["final_model"].update(mode="upload"),
        lambda p: p["outputs"]["final_model"].update(jobOutputType="folder"),
        lambda p: p.update(tags={"x": 1}),
        lambda p: p.pop("jobType"),
    ):
        bad = copy.deepcopy(jobs)
        change(bad["properties"])
        assert wrong(kind, False, bad), bad


def test_planted_errors_are_found_in_answers(recording):
    kind, _, answer = next(r for r in recording if "/computes@" in r[0] and r[1])
    for change in (
        lambda p: p.update(computeType="Cluster"),
        lambda p: p.update(provisioningState="Done"),
        lambda p: p["properties"].update(vmSize=4),
        lambda p: p["properties"]["scaleSettings"].update(maxNodes=1),
        lambda p: p["properties"]["scaleSettings"].pop("maxNodeCount"),
    ):
        bad = copy.deepcopy(answer)
        change(bad["properties"])
        assert wrong(kind, True, bad), bad


def test_every_resource_of_the_templates_is_as_published():
    problems, count = [], 0
    for path in sorted(TEMPLATES.rglob("*.bicep")):
        for name, kind, line, ways in published_types.resources(path):
            count += 1
            for body in ways:
                for key in ("parent", "scope", "dependsOn"):
                    body.pop(key, None)
                found = published_types.check(kind, body)
                problems += [f"{path.name}:{line} {name} {text}" for text in found]
    assert not problems
    assert count >= 20


@pytest.mark.parametrize(
    "change",
    [
        ("computeType: 'AmlCompute'", "computeType: 'Cluster'"),
        ("vmSize: vmSize", "vmsize: vmSize"),
        ("maxNodeCount: 1", "maxNodeCount: '1'"),
        ("vmPriority: 'Dedicated'", "vmPriority: 'Cheap'"),
        ("        maxNodeCount: 1\n", ""),
        ("type: 'UserAssigned'", "kind: 'UserAssigned'"),
    ],
)
def test_planted_errors_are_found_in_templates(change, tmp_path):
    text = (TEMPLATES / "modules/compute.bicep").read_text()
    assert change[0] in text
    (tmp_path / "x.bicep").write_text(text.replace(*change))
    found = published_types.resources(tmp_path / "x.bicep")
    assert any(
        published_types.check(kind, body) for _, kind, _, ways in found for body in ways
    )
