"""Every rule of the plan: what breaks it is refused, and its nearest legal one not."""

import copy
import re

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fl_helpers.cross_silo.azure_ml import explain, plan
from fl_helpers.training import norm_entries

from . import azure_trial, hospital

A, B = "train_0000_hospital_a", "train_0000_hospital_b"
STORE = "azureml://datastores"


@pytest.fixture(scope="module")
def fed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    return azure_trial.read(folder, azure_trial.content())


@pytest.fixture(scope="module")
def legal(fed, tmp_path_factory):
    """2 rounds, 3 silos, with every kind of job and of folder that there is."""
    model = azure_trial.model()
    job = azure_trial.job(
        fed,
        model.state_dict(),
        tmp_path_factory.mktemp("code"),
        aggregate="FedAdam",
        trainable=[name for name, _ in model.named_parameters()],
        keep_local=norm_entries(model),
        prepare=f"{hospital.__file__}:{hospital.prepare.__name__}",
    )
    return job._to_dict()


def refusals(found, fed, **more):
    """What is wrong with a plan, as texts; empty if it passes."""
    try:
        plan.check_plan(plan.read_plan(found), fed, **more)
    except plan.PlanRefused as error:
        return [str(violation) for violation in error.violations]
    return []


def changed(legal, where, value):
    """A copy of a plan with one value set, or taken away; where: a path with dots."""
    found = copy.deepcopy(legal)
    *path, last = where.replace("JOB", f"jobs.{A}").split(".")
    inner = found
    for key in path:
        inner = inner.setdefault(key, {})
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return found


def test_the_legal_plan_passes(legal, fed):
    assert refusals(legal, fed) == []
    kinds = {job.kind for job in plan.read_plan(legal).jobs}
    assert kinds == {
        *("initial", "prepare", "train", "aggregate", "evaluate", "collect")
    }


def test_the_file_that_dump_writes_is_the_same_plan(legal, fed, tmp_path):
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(legal, sort_keys=False))
    assert plan.read_plan(tmp_path / "plan.yaml") == plan.read_plan(legal)


AGG = "jobs.aggregate_0000"
OUT = {"type": "uri_folder", "mode": "upload"}
TO = f"{STORE}/orchestrator/paths/fl"
OWN = f"{STORE}/hospital_a/paths"


def bound(job, output):
    return {"path": f"${{{{parent.jobs.{job}.outputs.{output}}}}}"}


RULES = {  # name: (where, what is refused, the rule, what is legal there)
    "a compute of nobody": (
        "JOB.compute", "azureml:gpu-cluster", "compute 'gpu-cluster' belongs to nobody",
        "azureml:hospital-a"),
    "a job on another silo's compute": (
        "JOB.compute", "azureml:hospital-b", "told that it is silo 'hospital_a', and "
        "runs at 'hospital_b'", "hospital-a"),
    "another silo's data": (
        "JOB.inputs.data", f"{STORE}/hospital_b/paths/radiographs",
        "'Hospital A' reads data from the store of 'Hospital B'", f"{OWN}/elsewhere"),
    "a store of nobody": (
        "JOB.inputs.data", f"{STORE}/workspaceblobstore/paths/radiographs",
        "'workspaceblobstore', which belongs to nobody", f"{OWN}/x/"),
    "raw data at the orchestrator": (
        f"{AGG}.inputs.model", f"{OWN}/radiographs",
        "'orchestrator' reads model from the store of 'Hospital A'",
        f"{TO}/models/older/0000"),
    "another silo's old update": (
        "JOB.inputs.model", f"{TO}/updates/hospital_b/older/0000",
        "reads 'fl/updates/hospital_b/older/0000' of the orchestrator's",
        f"{TO}/models/older/0000"),
    "one's own old update": (
        "JOB.inputs.model", f"{TO}/updates/hospital_a/older/0000",
        "reads 'fl/updates/hospital_a", f"{TO}/models/older/0000"),
    "another silo's update": (
        "jobs.train_0001_hospital_a.inputs.model", bound(B, "model_update"),
        "model was made by 'Hospital B'", bound("initial", "next_model")),
    "another silo's kept entries": (
        "jobs.train_0001_hospital_a.inputs.kept", bound(B, "next_kept"),
        "reads kept from the store of 'Hospital B'", bound("initial", "kept")),
    "the server's memory": (
        "JOB.inputs.model", bound("initial", "next_memory"),
        "reads 'fl/memory/trial/0000'", bound("initial", "next_model")),
    "an output that may not leave": (
        "JOB.outputs.private", OUT | {"path": f"{TO}/updates/hospital_a/x/private"},
        "private goes from 'Hospital A' .* may not leave", f"{OWN}/fl/private/x"),
    "an update to another silo": (
        "JOB.outputs.model_update", OUT | {"path": f"{STORE}/hospital_b/paths/fl/x"},
        "a store of 'Hospital B'", f"{TO}/updates/hospital_a/other/0000"),
    "an update in another silo's name": (
        "JOB.outputs.model_update", OUT | {"path": f"{TO}/updates/hospital_b/x/0000"},
        "goes from 'Hospital A' to 'fl/updates/hospital_b",
        f"{TO}/updates/hospital_a/x/0000"),
    "a silo that publishes a model": (
        "JOB.outputs.model_update", OUT | {"path": f"{TO}/models/trial/9"},
        "goes from 'Hospital A' to 'fl/models", f"{TO}/updates/hospital_a/x/0000"),
    "an output over the patients' data": (
        "JOB.outputs.private", f"{OWN}/radiographs", "to 'radiographs'",
        f"{OWN}/fl/private/radiographs"),
    "the orchestrator writes into a silo": (
        f"{AGG}.outputs.report", f"{OWN}/fl/private/x", "a store of 'Hospital A'",
        f"{TO}/reports/x"),
    "the orchestrator writes an update": (
        f"{AGG}.outputs.report", f"{TO}/updates/hospital_a/x/0000",
        "report goes from 'orchestrator'", f"{TO}/reports/updates"),
    "a store that belongs to nobody": (
        f"{AGG}.outputs.report", f"{STORE}/workspaceblobstore/paths/fl/x",
        "'workspaceblobstore', which belongs to nobody", f"{TO}/x"),
    "an output without a path": (
        "JOB.outputs.private", None, "goes to 'nothing'; maybe to the workspace",
        {"path": f"{OWN}/fl/private/x", "mode": "upload"}),
    "a promoted output without a path": (
        "outputs.final_model", {"type": "uri_folder"}, "next_model goes to 'nothing'",
        {"type": "uri_folder", "path": f"{TO}/models/other/0002"}),
    "a local folder": (
        "JOB.inputs.data", {"type": "uri_folder", "path": "./patients"},
        "data is './patients', not a folder of a datastore", f"{OWN}/patients"),
    "a local file": (
        "JOB.inputs.data", "/data/patients", "data is '/data/patients'", f"{OWN}/data"),
    "a web address": (
        "JOB.inputs.data", "https://store.blob.core.windows.net/x", "data is 'https:",
        f"{OWN}/store.blob.core.windows.net/x"),
    "another workspace": (
        "JOB.inputs.data", "azureml://subscriptions/0/resourcegroups/rg/workspaces/ws/"
        "datastores/hospital_a/paths/x", "data is 'azureml://sub", f"{OWN}/x"),
    "a registered asset": (
        "JOB.inputs.data", "azureml:patients:1", "data is 'azureml:patients:1'",
        f"{OWN}/patients"),
    "a path upwards": (
        "JOB.inputs.data", f"{OWN}/x/../../hospital_b/y", r"data is '.*\.\./hospital_b",
        f"{OWN}/x..y/z"),
    "a path upwards, escaped": (
        "JOB.inputs.data", f"{OWN}/x/%2e%2e/y", "data is '.*%2e", f"{OWN}/x/2e"),
    "an output upwards": (
        "JOB.outputs.private", f"{OWN}/fl/../radiographs", "private goes to 'azureml:",
        f"{OWN}/fl/a.b"),
    "a text for a number": (
        "JOB.inputs.round", "one", "round is 'one', not a integer", "0"),
    "a fraction for an integer": (
        "JOB.inputs.seed", 1.5, "seed is '1.5', not a integer", -3),
    "a value that a shell would run": (
        "JOB.inputs.metrics", "steps$(touch x)", r"metrics is 'steps\$\(touch x\)'",
        "steps,train_loss"),
    "a value of two words": (
        "JOB.inputs.metrics", "steps; reboot", "metrics is 'steps; reboot'", "steps"),
    "a number that may not leave": (
        "JOB.inputs.metrics", "steps,age", r"it lets the numbers \['age'\]", "steps"),
    "two jobs that write the same": (
        "JOB.outputs.private", f"{OWN}/fl/kept/trial/0001", "writes where .* does",
        f"{OWN}/fl/kept/trial/0001b"),
    "an output inside another": (
        "JOB.outputs.private", f"{OWN}/fl/kept/trial/0001/log", "writes where .* does",
        f"{OWN}/fl/kept/trial/log/0001"),
    "an output around another": (
        "JOB.outputs.private", f"{OWN}/fl/kept/trial", "writes where .* does",
        f"{OWN}/fl/kept/other"),
    "a read that does not wait": (
        "jobs.train_0001_hospital_a.inputs.model", f"{TO}/models/trial/0001",
        "reads what aggregate_0000.next_model writes", f"{TO}/models/older/0001"),
    "a read of what is around an output": (
        f"{AGG}.inputs.model", f"{TO}/models/trial", "without waiting",
        f"{TO}/models/older"),
    "one update counted twice": (
        f"{AGG}.inputs.update_hospital_b", bound(A, "model_update"),
        r"gathers from \['hospital_a', 'hospital_a', 'hospital_c'\]",
        bound(B, "model_update")),
    "updates of two silos swapped": (
        f"{AGG}.inputs", lambda given: given | {
            "update_hospital_a": given["update_hospital_b"],
            "update_hospital_b": given["update_hospital_a"]},
        "input update_hospital_a is the update of 'hospital_b'", lambda given: given),
    "an update of another round": (
        f"{AGG}.inputs.round", 1, "not of its round, '0001'", 0),
    "an update that two jobs get": (
        "jobs.collect.inputs.update_hospital_a", bound(A, "model_update"),
        "model_update is read by 2 jobs", bound("evaluate_hospital_a", "scores")),
    "an update that nobody gets": (
        f"{AGG}.inputs.update_hospital_a", f"{TO}/updates/hospital_a/older/0000",
        "model_update is read by 0 jobs", bound(A, "model_update")),
    "an aggregation without one silo": (
        AGG, lambda job: without(job, "update_hospital_c"),
        r"gathers from \['hospital_a', 'hospital_b'\]", lambda job: job),
    "no limit of the bytes": (
        "JOB", lambda job: without(job, "max_bytes"), "how large a file",
        lambda job: job),
    "a job with an identity of its own": (
        "JOB.identity", {"type": "user_identity"}, r"the job says \['identity'\]", {}),
    "environment variables": (
        "JOB.environment_variables", {"X": "1"}, "environment_variables", {}),
    "an input that the script does not know": (
        "JOB.inputs.more", f"{OWN}/x", "does not know 'more'",
        lambda _: None),
    "more code": (
        "JOB.component.additional_includes", ["../secrets"], "additional_includes", []),
    "a default datastore": (
        "settings.default_datastore", "azureml:workspaceblobstore",
        r"the settings says \['default_datastore'\]", ""),
    "a default compute": ("compute", "azureml:cpu", r"the plan says \['compute'\]", ""),
    "an input that can be written": (
        "JOB.inputs.data", {"path": f"{OWN}/x", "mode": "rw_mount"},
        "data has the mode rw_mount", {"path": f"{OWN}/x", "mode": "download"}),
    "an output that can be read": (
        "JOB.outputs.private", {"path": f"{OWN}/fl/x", "mode": "direct"},
        "private has the mode direct", {"path": f"{OWN}/fl/x", "mode": "rw_mount"}),
    "a file": (
        "JOB.inputs.data", {"path": f"{OWN}/x", "type": "uri_file"},
        "data is a uri_file", {"path": f"{OWN}/x", "type": "uri_folder"}),
    "a moving environment": (
        "JOB.component.environment", "azureml:fl@latest", "environment is not pinned",
        "azureml:fl:3"),
    "an image without a tag": (
        "JOB.component.environment", {"image": "python"}, "environment is not pinned",
        {"image": "python:3.11.13"}),
    "an image that is built on the way": (
        "JOB.component.environment", {"image": "python:3.11", "build": {"path": "."}},
        "environment is not pinned", {"image": "python:3.11"}),
    "packages of any version": (
        "JOB.component.environment.conda_file.dependencies", ["python=3.11", "torch"],
        "environment is not pinned", ["python=3.11", {"pip": ["torch==2.14.1"]}]),
    "packages of some version": (
        "JOB.component.environment.conda_file.dependencies", [{"pip": ["torch>=2"]}],
        "environment is not pinned", [{"pip": ["--extra-index-url x", "torch==2.1"]}]),
    "a shell command": (
        "JOB.component.command", "python train.py && curl x", "its command is not",
        "python train.py --x y"),
    "a program that is not of the snapshot": (
        "JOB.component.command", "python ../train.py", "its command is not",
        "python train.py"),
    "an input that is not declared": (
        "JOB.component.command", "python train.py ${{inputs.x}}", "names inputs.x",
        "python train.py ${{inputs.silo}}"),
    "code from the web": (
        "JOB.component.code", "git+https://x.org/y", "its code is 'git", "/x/y"),
    "an old result": (
        "settings.force_rerun", lambda _: False, None, True),
    "several machines": (
        "JOB.resources", {"instance_count": 4}, "several machines",
        {"instance_count": 1, "instance_type": "gpu"}),
    "resources that are no mapping": (
        "JOB.resources", "gpu", "'gpu' must be a mapping", {}),
    "more rights for the container": (
        "JOB.resources", {"docker_args": "-v /:/host"}, "docker_args", {}),
    "another kind of job": ("JOB.type", "sweep", "it is not a command", "command"),
    "a job that waits for itself": (
        "JOB.inputs.model", bound("aggregate_0000", "next_model"), "waits for itself",
        bound("initial", "next_model")),
    "a job that is not there": (
        "JOB.inputs.model", bound("magic", "next_model"), "that is not there",
        bound("initial", "next_model")),
}  # fmt: skip


def without(job, name):
    """A job whose script does not have one of its inputs."""
    job = copy.deepcopy(job)
    del job["inputs"][name], job["component"]["inputs"][name]
    words = job["component"]["command"].split()
    slots = [w for w in words if f"inputs.{name}}}" not in w and w != f"--{name}"]
    job["component"]["command"] = " ".join(slots)
    return job


def value_at(legal, where):
    for key in where.replace("JOB", f"jobs.{A}").split("."):
        legal = legal[key] if key in legal else {}
    return legal


@pytest.mark.parametrize("name", RULES)
def test_a_rule(name, legal, fed):
    where, bad, rule, good = RULES[name]
    before = value_at(legal, where)
    bad = bad(before) if callable(bad) else bad
    good = good(before) if callable(good) else good
    if name == "an old result":
        legal = changed(legal, "JOB.component.is_deterministic", True)
        rule = "an old result could be taken"
    said = refusals(changed(legal, where, bad), fed)
    assert any(re.search(rule, text) for text in said), said
    assert all("; " in text for text in said), "a remedy is missing"
    if good is not None:
        assert refusals(changed(legal, where, good), fed) == []


# ---- one input or output re-pointed to anywhere: the flow table, written a second time

PARTIES = ("orchestrator", "hospital_a", "hospital_b", "hospital_c")
FOLDERS = (
    *("radiographs", "fl/models/x/0000", "fl/memory/x/0000", "fl/kept/x/0000"),
    *(f"fl/updates/{key}/x/0000" for key in PARTIES[1:]),
    *("fl/updates", "fl/models", "elsewhere"),
)


def party_of(job):
    return next((key for key in PARTIES if job.endswith(key)), "orchestrator")


def may_read(party, store, path, maker):
    if party == "orchestrator":
        return store == "orchestrator"
    if store == "orchestrator":
        return path.startswith("fl/models/") and maker in (None, "orchestrator")
    return store == party and maker in (None, party)


def may_write(party, store, path, output):
    if party == "orchestrator":
        return store == party and not path.startswith("fl/updates/")
    if store == "orchestrator":
        own = path.startswith(f"fl/updates/{party}/")
        return own and output in ("model_update", "scores")
    return store == party


def place_of(legal, job, output):
    path = legal["jobs"][job]["outputs"][output]
    path = path if isinstance(path, str) else path["path"]
    if "parent.outputs" in path:
        path = legal["outputs"]["final_model"]["path"]
    return tuple(path.removeprefix(f"{STORE}/").split("/paths/"))


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_flow_that_the_table_forbids_is_refused(legal, fed, data):
    jobs = legal["jobs"]
    outputs = [(job, output) for job in jobs for output in jobs[job]["outputs"]]
    inputs = [
        (job, name)
        for job in jobs
        for name, port in jobs[job]["component"].get("inputs", {}).items()
        if port["type"] == "uri_folder"
    ]
    kind = data.draw(st.sampled_from(["read", "bind", "write"]))
    job, name = data.draw(st.sampled_from(outputs if kind == "write" else inputs))
    if kind == "bind":
        maker, output = data.draw(st.sampled_from(outputs))
        store, path = place_of(legal, maker, output)
        value = bound(maker, output)
        allowed = may_read(party_of(job), store, path, party_of(maker))
    else:
        store = data.draw(st.sampled_from(PARTIES))
        path = data.draw(st.sampled_from(FOLDERS))
        value = f"{STORE}/{store}/paths/{path}"
        if kind == "read":
            allowed = may_read(party_of(job), store, path, None)
        else:
            value = OUT | {"path": value}
            allowed = may_write(party_of(job), store, path, name)
    where = f"jobs.{job}.{'outputs' if kind == 'write' else 'inputs'}.{name}"
    if not allowed:
        assert refusals(changed(legal, where, value), fed), (where, value)
    elif kind == "bind" and jobs[job]["inputs"][name] == value:
        assert refusals(changed(legal, where, value), fed) == []


def branches(inner, path=()):
    """Every place in nested mappings, from the outside in."""
    for key, value in inner.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from branches(value, (*path, key))


def test_whatever_a_plan_says_it_is_read_or_refused_not_a_crash(legal, fed):
    """One value at a time, at every place of the plan and of one of its jobs."""
    other = [name for name in legal["jobs"] if name != A]
    places = [p for p in branches(legal) if not (len(p) > 2 and p[1] in other)]
    harmless = set()
    for place in places:
        for value in (*plan.EMPTY, 1.5, True, "x", ["x"], {"x": "y"}, {1: "x"}):
            found = copy.deepcopy(legal)
            inner = found
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            if not refusals(found, fed) and value not in plan.EMPTY:
                harmless.add(place[-1])
    # What a plan may say freely; either of the last two would do.
    assert harmless == {
        *("display_name", "experiment_name", "name", "version", "channels"),
        *("is_deterministic", "force_rerun"),
    }


# ---- the rest


def test_all_violations_are_told_at_once(legal, fed):
    found = changed(legal, "JOB.compute", "azureml:gpu")
    found = changed(found, f"{AGG}.outputs.report", f"{OWN}/fl/x")
    found = changed(found, "jobs.collect.inputs.round", "two")
    with pytest.raises(plan.PlanRefused) as refused:
        plan.check_plan(plan.read_plan(found), fed)
    jobs = {violation.job for violation in refused.value.violations}
    assert {A, "aggregate_0000", "collect"} <= jobs
    assert str(refused.value).count("\n- ") == len(refused.value.violations)


def test_an_asset_on_the_list_may_be_read(legal, fed):
    found = changed(legal, "JOB.inputs.data", "azureml:scanners:1")
    assert refusals(found, fed, allow=["azureml:scanners:1"]) == []
    assert refusals(found, fed, allow=["azureml:scanners:2"])


@pytest.mark.parametrize("found", [{}, {"jobs": {}}, {"jobs": []}, {"jobs": "x"}])
def test_a_plan_without_jobs(found):
    with pytest.raises(plan.PlanRefused, match="it has no jobs"):
        plan.read_plan(found)


def test_a_quorum_is_another_federation(legal, fed):
    said = refusals(legal, fed.only(["Hospital A", "Hospital B"]))
    assert any("'hospital-c' belongs to nobody" in text for text in said)


def test_an_outbox_is_the_orchestrators_store(legal, tmp_path):
    """Each silo's updates may have a datastore of their own: rights per container."""
    content = azure_trial.content()
    content["silos"][0]["azure_ml"]["outbox"] = "inbox_a"
    fed = azure_trial.read(tmp_path, content)
    assert fed.owner(datastore="inbox_a") is fed.orchestrator
    assert any("outbox 'inbox_a'" in text for text in refusals(legal, fed))
    found = legal
    updates = [(A, "model_update", "0000"), ("evaluate_hospital_a", "scores", "scores")]
    updates += [("train_0001_hospital_a", "model_update", "0001")]
    for job, output, step in updates:
        path = f"{STORE}/inbox_a/paths/fl/updates/hospital_a/trial/{step}"
        found = changed(found, f"jobs.{job}.outputs.{output}", path)
    assert refusals(found, fed) == []
    found = changed(
        found, "JOB.inputs.model", f"{STORE}/inbox_a/paths/fl/models/x/0000"
    )
    assert any(
        "silos read only fl/models/ of 'orchest" in t for t in refusals(found, fed)
    )


def test_the_explanation_says_what_leaves_whom_and_how_much(legal, fed):
    found = explain.explain_plan(plan.read_plan(legal), fed)
    row = found.rows[1]
    assert row["silo"] == "Hospital B" and row["runs on"] == "hospital-b"
    prepared = "hospital_b: fl/prepared/trial/data, hospital_b: radiographs"
    assert row["reads of its own"] == f"hospital_b: fl/kept/trial/, {prepared}"
    assert row["reads of others"] == "orchestrator: fl/models/trial/"
    assert row["leaves"] == "2 x model_update, 1 x scores"
    kept = set(norm_entries(azure_trial.model()))
    state = azure_trial.model().state_dict()
    bytes_sent = sum(v.nbytes for k, v in state.items() if k not in kept)
    names = [k for k in state if k not in kept]
    size = bytes_sent + 1024 + sum(256 + 6 * len(name) for name in names)
    assert row["bytes at most"] == f"{size:,} each, {2 * size + 1024:,} in all"
    assert row["to"] == "orchestrator: fl/updates/hospital_b/trial/"
    for text in ("Hospital C", "SHA-256", "test_accuracy", "____", "20260715.v1"):
        assert text in found.markdown
    other = changed(legal, "JOB.inputs.data", f"{STORE}/hospital_b/paths/x")
    with pytest.raises(plan.PlanRefused):
        explain.explain_plan(plan.read_plan(other), fed)


def test_the_picture_has_a_lane_for_each_party_and_every_job(legal, fed):
    import matplotlib.pyplot as plt

    graph = plan.read_plan(changed(legal, "JOB.compute", "azureml:stranger"))
    figure = explain.draw_plan(graph, fed)
    texts = [text.get_text() for text in figure.axes[0].texts]
    for name in ("orchestrator", "Hospital A", "Hospital B", "Hospital C", "stranger"):
        assert texts.count(name) == 1
    assert sum(text.startswith("train") for text in texts) == 6
    plt.close(figure)
