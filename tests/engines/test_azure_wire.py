"""What is sent is the plan: a change of a real recording is refused, or harmless."""

import json
import os
import re

import pytest
import requests
import yaml

from fl_helpers.cross_silo.azure_ml import pipeline, plan, sdk, wire, workspace
from fl_helpers.training import norm_entries

from . import azure_mutations, azure_trial, fake_azure

FULL = bool(os.environ.get("FULL"))
A, B = "train_0000_hospital_a", "train_0000_hospital_b"
STORE = "azureml://datastores"


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    """(plan, calls): 2 rounds, 3 silos, every kind of job and folder, as sent."""
    folder = tmp_path_factory.mktemp("wire")
    content = azure_trial.full_content()
    content["silos"][1]["azure_ml"] |= {"processes": 2, "shm_size": "8g"}
    content["silos"][2]["azure_ml"]["instance_type"] = "gpu-4"
    fed = azure_trial.read(folder, content)
    fake = fake_azure.FakeAzure(fed, folder / "cloud")
    model = azure_trial.model()
    made = azure_trial.build(
        *(fed, model.state_dict(), folder),
        aggregate="FedAdam",
        trainable=[name for name, _ in model.named_parameters()],
        keep_local=norm_entries(model),
    )
    checked, check = [], wire.Gate.check
    with pytest.MonkeyPatch.context() as patch:
        send = fake_azure.adapter(fake)
        patch.setattr(requests.adapters.HTTPAdapter, "send", send)
        patch.setattr(
            *(wire.Gate, "check"), lambda *all: checked.append(all[1:3]) or check(*all)
        )
        connection = workspace.connect(fed, credential=fake_azure.Credential())
        workspace.submit(connection, made, approved=made.digest)
    assert not fake.unknown
    creating = [(c.method, c.path) for c in fake.calls if "blob" not in c.path]
    assert {c for c in creating if c[0] != "GET" and c[1][0] == "/"} <= set(checked)
    return made, fake.calls


@pytest.fixture(scope="module")
def gate(sent):
    """A gate that has seen all of it, and is still open for the plan."""
    made, calls = sent
    gate = wire.Gate(made.federation)
    gate.plan = made
    for call in calls:
        if call.method in ("PUT", "POST") and call.path.startswith("/subscriptions"):
            gate.check(call.method, call.path, call.body)
            gate.note(call.path, call.body, call.answer[1])
    return gate


@pytest.fixture(scope="module")
def bodies(sent):
    found = azure_mutations.parsed(sent[1])
    assert found[-1][1].endswith("/jobs/trial") and len(found) > 10
    return found


def refusal(gate, method, path, body):
    """What the gate says of a request; "" if it lets it pass."""
    try:
        gate.check(method, path, json.dumps(body).encode())
    except plan.PlanRefused as error:
        return str(error)
    return ""


# ---- any change


def test_no_change_that_leaks_passes(gate, bodies):
    rng = azure_mutations.generator(0)
    passed, kinds = [], set()
    for _ in range(2000 if FULL else 300):
        method, path, body, what = azure_mutations.leak(bodies, rng)
        kinds.add((what, path.split("/")[-2]))
        if not refusal(gate, method, path, body):
            passed.append((what, method, path, body))
    assert not passed, passed[:3]
    assert len(kinds) >= 12  # of every kind, at every kind of request


def test_no_harmless_change_is_refused(gate, bodies):
    rng = azure_mutations.generator(1)
    for _ in range(2000 if FULL else 200):
        method, path, body, what = azure_mutations.vary(bodies, rng)
        assert refusal(gate, method, path, body) == "", what


def test_the_generator_finds_what_a_careless_check_lets_pass(bodies):
    """A control: of one that compares computes, stores and commands only, many pass."""

    def careless(body):
        text = json.dumps(body, sort_keys=True)
        return re.findall(r'"(?:computeId|uri|command)": "[^"]*"', text)

    legal, rng, passed = (
        {p: careless(b) for _, p, b in bodies},
        (azure_mutations.generator(0)),
        0,
    )
    for _ in range(300):
        _, path, body, _ = azure_mutations.leak(bodies, rng)
        passed += legal.get(path) == careless(body)
    assert passed > 50


# ---- changes by name: what was found from outside, and the nearest of each kind


def graph(change):
    """A change of the body that creates the run."""

    def made(bodies):
        method, path, body = bodies[-1]
        body = json.loads(json.dumps(body))
        change(body["properties"])
        return method, path, body

    return made


def component(kind, change):
    def made(bodies):
        for method, path, body in bodies:
            spec = (
                body["properties"].get("componentSpec") if "properties" in body else 0
            )
            if spec and spec["name"] == f"fl_{kind}":
                body = json.loads(json.dumps(body))
                change(body["properties"])
                return method, path, body
        raise AssertionError(kind)

    return made


def environment(change):
    def made(bodies):
        method, path, body = next(b for b in bodies if "/environments/" in b[1])
        body = json.loads(json.dumps(body))
        found = body["properties"]
        found["condaFile"] = yaml.safe_load(found["condaFile"])
        change(found)
        found["condaFile"] = yaml.safe_dump(found["condaFile"])
        return method, path, body

    return made


def swap_slots(found):
    """The log goes to the update's place: the leak that a text of slots would hide."""
    spec = found["componentSpec"]
    text = spec["command"].replace("outputs.private", "outputs.@")
    text = text.replace("outputs.model_update", "outputs.private")
    spec["command"] = text.replace("outputs.@", "outputs.model_update")


def job(key, value, name=A):
    return graph(lambda p: p["jobs"][name].update({key: value}))


def pip(line):
    return environment(
        lambda found: found["condaFile"]["dependencies"][-1]["pip"].append(line)
    )


def text(change):
    def made(bodies):
        method, path, body = next(b for b in bodies if "/environments/" in b[1])
        found = body["properties"]
        found = found | {"condaFile": change(found["condaFile"])}
        return method, path, {"properties": found}

    return made


def uri(path):
    return {"uri": path, "mode": "ReadOnlyMount", "job_input_type": "uri_folder"}


def flow(kind, name, value, at=A):
    return graph(lambda p: p["jobs"][at][kind].update({name: value}))


def written(path):
    return {"uri": path, "mode": "Upload", "job_output_type": "uri_folder"}


NAMED = {  # what is changed: (how, what the refusal says)
    "two slots of a command": (component("train", swap_slots), "command"),
    "another script": (
        component("train", lambda p: p["componentSpec"].update(
            command=p["componentSpec"]["command"].replace("train.py", "prepare.py"))),
        "command"),
    "a job of another kind": (
        graph(lambda p: p["jobs"][A].update(
            componentId=p["jobs"]["collect"]["componentId"])), "componentId"),
    "tags of a job": (job("tags", {"patient": "4711"}), "tags"),
    "an identity": (job("identity", {"identity_type": "UserIdentity"}), "identity"),
    "a service": (job("services", {"x": {"job_service_type": "SSH"}}), "services"),
    "environment variables": (
        job("environment_variables", {"X": "1"}), "environment_variables"),
    "an unknown setting": (
        graph(lambda p: p["settings"].update(x=1)), "settings.x"),
    "a default datastore": (
        graph(lambda p: p["settings"].update(default_datastore="workspaceblobstore")),
        "settings.default_datastore"),
    "old results": (
        graph(lambda p: p["settings"].update(force_rerun=False)), "force_rerun"),
    "a parameter of a component": (
        component("train", lambda p: p["componentSpec"]["inputs"].update(
            more={"type": "string", "default": "x"})), "inputs.more"),
    "a component that is deterministic": (
        component("train", lambda p: p["componentSpec"].update(is_deterministic=True)),
        "is_deterministic"),
    "docker arguments": (
        job("resources", {"docker_args": "-v /:/host"}), "docker_args"),
    "several machines": (job("resources", {"instance_count": 2}), "instance_count"),
    "a job that is null": (graph(lambda p: p["jobs"].update(more=None)), "more: it is"),
    "a look-alike that has an ASCII lower case": (  # the Kelvin sign
        graph(lambda p: p["jobs"][A].update(
            computeId=p["jobs"][A]["computeId"].replace("rk", "r\u212a"))),
        "not ours"),
    "the same key in another case": (job("Outputs", {}), "one meaning"),
    "several processes that nobody asked for": (
        job("distribution", {"distribution_type": "PyTorch"}), "distribution"),
    "another silo's compute": (
        graph(lambda p: p["jobs"][A].update(computeId=p["jobs"][B]["computeId"])),
        "computeId"),
    "a compute by its name only": (
        graph(lambda p: p["jobs"][A].update(computeId="hospital-a")), "not ours"),
    "a component by our name of it": (
        graph(lambda p: p["jobs"][A].update(componentId="component train")),
        "componentId"),
    "a compute of another workspace": (
        graph(lambda p: p["jobs"][A].update(
            computeId=p["jobs"][A]["computeId"].replace("/ws/", "/other/"))),
        "computeId"),
    "another silo's data": (
        flow("inputs", "data", uri(f"{STORE}/hospital_b/paths/radiographs")), "data"),
    "a local folder": (flow("inputs", "data", uri("./patients")), "data"),
    "a web address": (flow("inputs", "data", uri("https://x.org/y")), "data"),
    "a path upwards": (
        flow("inputs", "data", uri(f"{STORE}/hospital_a/paths/x/../y")), "data"),
    "an input that can be written": (
        flow("inputs", "data", uri(f"{STORE}/hospital_a/paths/radiographs")
             | {"mode": "ReadWriteMount"}), "data.mode"),
    "another silo's update": (
        flow("inputs", "model", {
            "value": "${{parent.jobs.train_0000_hospital_b.outputs.model_update}}",
            "job_input_type": "literal"}, at="train_0001_hospital_a"), "inputs.model"),
    "the log in the outbox": (
        flow("outputs", "private", written(
            f"{STORE}/orchestrator/paths/fl/updates/hospital_a/trial/x")), "private"),
    "an output over the data": (
        flow("outputs", "private", written(f"{STORE}/hospital_a/paths/radiographs")),
        "private"),
    "an output without a place": (flow("outputs", "private", {}), "private"),
    "more numbers": (
        flow("inputs", "metrics", {"value": "steps,age", "job_input_type": "literal"}),
        "metrics"),
    "one update twice": (
        flow("inputs", "update_hospital_b", {
            "value": "${{parent.jobs.train_0000_hospital_a.outputs.model_update}}",
            "job_input_type": "literal"}, at="aggregate_0000"), "update_hospital_b"),
    "a job more": (
        graph(lambda p: p["jobs"].update(more=p["jobs"][A])), "more: it is"),
    "a job less": (graph(lambda p: p["jobs"].pop("collect")), "collect: it is nothing"),
    "an archive": (graph(lambda p: p.update(isArchived=True)), "isArchived"),
    "a component that says nothing": (
        component("train", lambda p: p.pop("componentSpec")), "no such kind of job"),
    "a package of any version": (pip("torch>=2"), "torch>=2"),
    "a wildcard": (pip("torch==2.*"), r"torch==2\.\*"),
    "an option": (pip("--pre"), "the environment"),
    "another index": (pip("--index-url https://x.org"), "the environment"),
    "a package from the web": (pip("x @ https://x.org/x.whl"), "the environment"),
    "words in a comment": (text(lambda t: "# patient 4711\n" + t), "the environment"),
    "a key twice, of which others take the first": (
        text(lambda t: "dependencies: [x=1]\n" + t), "the environment"),
    "an address that is taken": (  # the silos' gets what has MLflow
        lambda bodies: (*bodies[1][:2], bodies[0][2]), "mlflow"),
    "a name in the address of code": (
        lambda bodies: next(
            (m, p.replace(p.split("/")[-3], "patient-4711"), b)
            for m, p, b in bodies if p.endswith("/versions/1")), "its parts"),
    "a foreign channel": (
        environment(lambda f: f["condaFile"]["channels"].append("https://x.org")),
        "the environment"),
    "a moving image": (
        environment(lambda f: f.update(image="python:stable")), "python:stable"),
    "a build": (
        environment(lambda f: f.update(build={"contextUri": "x"})), "build"),
    "code from elsewhere": (
        lambda bodies: next(
            (m, p, {"properties": b["properties"] | {"codeUri": "https://x.org/silo"}})
            for m, p, b in bodies if "codeUri" in b.get("properties", {})),
        "codeUri"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_a_change(name, gate, bodies):
    change, said = NAMED[name]
    assert re.search(said, refusal(gate, *change(bodies)))


@pytest.mark.parametrize(
    "time", ["P22D", "P21DT1S", "PT505H", "PT9999999S", "PT0S", "P0D", "P", "P1DT",
             "-P1D", "P1M", "P\u0661D", "P1D\n", "P" + "9" * 5000 + "D"],
)  # fmt: skip
def test_a_time_limit_is_more_than_nothing_and_at_most_21_days(time, gate, bodies):
    made = graph(lambda p: p["jobs"][A]["limits"].update(timeout=time))(bodies)
    assert re.search("timeout", refusal(gate, *made))


@pytest.mark.parametrize("time", ["P21D", "PT504H", "P20DT23H60M", "PT1S", "P1DT12H"])
def test_a_time_limit_may_be_another(time, gate, bodies):
    made = graph(lambda p: p["jobs"][A]["limits"].update(timeout=time))(bodies)
    assert not refusal(gate, *made)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.replace(b'"computeId": ', b'"computeId": "/x", "computeId": ', 1),
        lambda t: t.replace(b'"uri": ', b'"uri": "x", "ur\\u0069": ', 1),
        lambda t: t.replace(b'"jobs": ', b'"Jobs": {}, "jobs": ', 1),
        lambda t: b"\xef\xbb\xbf" + t,
        lambda t: t.decode().encode("utf-16"),
        lambda t: t + b"{}",
        lambda t: b"[" * 100_000,
        lambda t: iter([t]),
    ],
)
def test_a_body_has_one_meaning(change, gate, bodies):
    method, path, body = bodies[-1]
    body = json.dumps(body).encode()
    gate.check(method, path, body)
    with pytest.raises(plan.PlanRefused):
        gate.check(method, path, change(body))


ARM = "https://management.azure.com"


@pytest.mark.parametrize(
    "method, start, query",
    [
        ("PUT", "https://x.org", "api-version=1"),
        ("PUT", "http://management.azure.com", "api-version=1"),
        ("PUT", f"{ARM}:8443", "api-version=1"),
        ("PUT", f"{ARM}@x.org", "api-version=1"),
        ("PUT", ARM, "api-version=1&patient=4711"),
        ("GET", ARM, "api-version=1"),  # with a body
    ],
)
def test_the_plan_is_sent_to_azure_only(
    method, start, query, gate, bodies, monkeypatch
):
    went, answer = [], requests.Response()
    answer.status_code = 503
    monkeypatch.setattr(
        *(requests.adapters.HTTPAdapter, "send"),
        lambda self, request, **_: went.append(request) or answer,
    )
    _, path, body = bodies[-1]
    body = json.dumps(body).encode()
    legal = requests.Request("PUT", f"{ARM}{path}?api-version=1", data=body).prepare()
    assert gate.send(legal) is answer and went.pop() is legal  # a control
    url = f"{start}{path}?{query}"
    with pytest.raises(plan.PlanRefused):
        gate.send(requests.Request(method, url, data=body).prepare())
    assert not went


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"[]", b"{", b'{"properties": 1}', b'{"properties": {}}', b"\xff"],
)
def test_whatever_is_sent_it_is_refused_not_a_crash(body, gate, bodies):
    for method, path, _ in bodies:
        with pytest.raises(plan.PlanRefused):
            gate.check(method, path, body)


def test_nothing_that_could_run_is_sent_without_a_plan(sent, bodies):
    shut = wire.Gate(sent[0].federation)
    start = bodies[-1][1].rpartition("/jobs/")[0]
    for below in (
        *("jobs/x", "JOBS/x", "components/x/versions/1", "codes/x/versions/1"),
        *(
            "schedules/x",
            "Schedules/x",
            "onlineEndpoints/x/deployments/y",
            "computes/x",
        ),
        *("datastores/hospital_a", "environments/x/versions/1", "outboundRules/x"),
        *("models/x/../../jobs/x", "data/x/versions/1/more", "connections/x"),
    ):
        for method in ("PUT", "PATCH", "DELETE", "put"):
            with pytest.raises(plan.PlanRefused, match="workspace.submit sends"):
                shut.check(method, f"{start}/{below}", b"{}")
    for below in ("jobs", "batchEndpoints/x/jobs", "schedules/x/trigger", "listKeys"):
        with pytest.raises(plan.PlanRefused, match="workspace.submit sends"):
            shut.check("POST", f"{start}/{below}", b"{}")
    shut.check("POST", f"{start}/jobs/x/cancel", b"")
    shut.check("PUT", f"{start}/models/x/versions/1", b"{}")
    shut.check("PUT", f"{start}/data/x/versions/1", b"{}")
    shut.check("GET", f"{start}/jobs/x", None)


def test_code_that_others_registered_is_not_taken(sent, gate):
    """The SDK asks for code of the same hash: only what went through here is told."""
    start = f"https://management.azure.com{sent[1][0].path}"
    url = f"{start}/codes/x/versions?api-version=1&hash={{}}&hashVersion=202208"
    for known, count in ((next(iter(gate.codes)), 1), ("0" * 64, 0)):
        request = requests.Request("GET", url.format(known)).prepare()
        assert len(gate.send(request).json()["value"]) == count


# ---- by hand, from Azure's published types, by somebody who did not write the checks


def output(uri, **more):
    return {"uri": uri, "mode": "Upload", "job_output_type": "uri_folder"} | more


def put(kind, name, key, value):
    """A setting of a folder of a silo's job."""
    return graph(lambda p: p["jobs"][A][kind][name].update({key: value}))


def top(**more):
    return graph(lambda p: p.update(more))


def environment_of(**more):
    def made(bodies):
        method, path, body = next(b for b in bodies if "/environments/" in b[1])
        return method, path, {"properties": body["properties"] | more}

    return made


def spec(**more):
    return component("train", lambda p: p["componentSpec"].update(more))


def compute(change):
    return graph(
        lambda p: p["jobs"][A].update(computeId=change(p["jobs"][A]["computeId"]))
    )


BY_HAND = [
    *(put("outputs", "private", key, value) for key, value in {
        "mode": "Direct", "assetName": "patients", "asset_version": "1",
        "path_on_compute": "/mnt", "auto_delete_setting": {"value": "1d"},
        "uri": f"{STORE}/HOSPITAL_A/paths/fl/private/trial/train_0000"}.items()),
    *(put("outputs", "private", "uri", f"{STORE}/hospital_a/paths/{path}") for path in (
        "/fl/private/trial/train_0000", "fl/private/trial/train%5f0000",
        "fl\\private\\trial", "fl/private/trial/train_0000\u00a0",
        "fl/private/${{name}}", "fl/./private/trial/train_0000")),
    *(put("inputs", "data", "uri", uri) for uri in (
        "AzureML://datastores/hospital_a/paths/radiographs",
        f"{STORE}/hospital_a/paths/radiographs/",
        "azureml://subscriptions/s/workspaces/ws/datastores/hospital_a/paths/x",
        "abfss://data@store.dfs.core.windows.net/x", "azureml://jobs/x/outputs/y",
        "azureml://registries/x/data/y/versions/1", "/subscriptions/x/data/y")),
    *(put("inputs", "data", "mode", mode) for mode in ("Direct", "EvalMount")),
    put("inputs", "round", "value", 0), put("inputs", "round", "value", ["0"]),
    put("inputs", "seed", "value", "0 "), put("inputs", "metrics", "value", ""),
    *(flow(kind, "more", value) for kind in ("inputs", "outputs")
      for value in ({}, None, "")),
    *(graph(lambda p, v=v: p["jobs"].update(more=v)) for v in ({}, "", [])),
    graph(lambda p: p["outputs"].update(more={})),
    graph(lambda p: p["outputs"].update(more=output(f"{STORE}/hospital_b/paths/x"))),
    graph(lambda p: p["properties"].update({"patient 4711": ""})),
    graph(lambda p: p["properties"].update({"patient 4711": None})),
    job("patient Maria, 4711", ""), job("patient_maria", None), job("$ref", ""),
    job("$values", []), job("output\u017f", {}), job("\uff4futputs", {}),
    top(tags={"patient 4711": None}), top(**{"job\u017f": {}}),
    top(inputs={"x": {"value": "1", "job_input_type": "literal"}}),
    top(notificationSetting={"webhooks": {"x": {"webhookType": "AzureDevOps"}}}),
    top(services={"x": {"jobServiceType": "JupyterLab"}}), top(isArchived=0),
    top(identity={"identityType": "UserIdentity"}), top(sourceJobId="/x"),
    graph(lambda p: p["settings"].update(on_finalize="collect")),
    graph(lambda p: p["settings"].update(force_rerun=1)),
    job("distribution", {"distribution_type": "Mpi"}), job("type", "sweep"),
    graph(lambda p: p["jobs"][B]["distribution"].update(
        process_count_per_instance=True)),
    *(job("resources", {"shm_size": size}) for size in ("8g --privileged", "8g\n")),
    *(job("resources", {"instance_count": count}) for count in (True, 1.0)),
    job("limits", {"timeout": "P1D", "job_limits_type": "Sweep"}),
    compute(lambda c: f"{c}/../hospital-b"), compute(lambda c: f"{c}/"),
    compute(lambda c: c.replace("l-a", "l%2Da")), compute(lambda c: [c]),
    spec(limits={"timeout": "soon"}), spec(additional_includes=["../x"]),
    spec(code="git+https://github.com/x/y"), spec(identity={"type": "managed"}),
    spec(environment={"image": "x"}), spec(environment="azureml:x@latest"),
    spec(environment="azureml:/subscriptions/x/environments/y/versions/1"),
    component("train", lambda p: p["componentSpec"]["outputs"].update(more={})),
    component("train", lambda p: p["componentSpec"]["inputs"].update(more={})),
    component("train", lambda p: p["componentSpec"]["inputs"]["data"].update(
        optional=True)),
    component("train", lambda p: p["componentSpec"]["outputs"]["private"].update(
        early_available=True)),
    *(text(lambda t, s=s: t.replace("\n", s)) for s in ("\u2028", "\x85", "\r")),
    *(text(lambda t, s=s: t.replace("- torch", f"-{s}torch")) for s in "\t\u00a0"),
    text(lambda t: f"%YAML 1.1\n---\n{t}"), text(lambda t: f"{t}...\n"),
    text(lambda t: t.replace("torch==", "#torch==", 1)),
    environment_of(osType="Windows"), environment_of(autoRebuild="OnBaseImageUpdate"),
    environment_of(condaFile="x"), environment_of(condaFile={"x": 1}),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(BY_HAND)))
def test_a_leak_that_was_thought_of(number, gate, bodies):
    method, path, body = BY_HAND[number](bodies)
    assert json.dumps(body) not in [json.dumps(b) for _, _, b in bodies]
    assert refusal(gate, method, path, body), body


def test_code_comes_from_where_it_was_uploaded(gate, bodies):
    """Not from what a message of ours would say, at an address that nobody uploaded."""
    method, path, body = next(
        b for b in bodies if "codeUri" in b[2].get("properties", {})
    )
    other = path.replace(path.split("/")[-3], "1" * 8 + "-2222" * 3 + "-" + "3" * 12)
    for where in (
        "None/silo",
        "where it was uploaded/silo",
        body["properties"]["codeUri"],
    ):
        changed = {"properties": body["properties"] | {"codeUri": where}}
        assert "not uploaded" in refusal(gate, method, other, changed)


def test_what_is_written_in_another_way_is_the_same(gate, bodies):
    """Addresses in capitals, and what the guide says may differ."""
    method, path, body = bodies[-1]
    for change in (str.upper, str.lower, str.title, lambda a: f"azureml:{a}"):
        made = json.loads(json.dumps(body))
        for node in made["properties"]["jobs"].values():
            node |= {key: change(node[key]) for key in ("computeId", "componentId")}
        assert not refusal(gate, method, path, made)
    for more in (
        job("resources", {"instance_count": "1", "shm_size": "64G"}),
        job("description", None),
        job("environment_variables", {}),
        top(computeId=None, notificationSetting=None, sourceJobId=""),
        text(lambda t: t.replace("\n", "\r\n")),
        text(lambda t: yaml.safe_dump(yaml.safe_load(t), indent=8)),
    ):
        assert not refusal(gate, *more(bodies))


# ---- the plan itself


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x["silos"][0]["azure_ml"].update(data="azureml:radiographs:3"),
        lambda x: x["azure_ml"].update(environment="azureml:fl-gpu:3"),
        lambda x: x["azure_ml"]["workspace"].update(resource_group="rg.(x)"),
    ],
)
def test_what_silos_yaml_may_say_passes_as_the_sdk_sends_it(
    change, tmp_path, monkeypatch
):
    """Azure's own client writes data assets and environments as addresses."""
    content = azure_trial.full_content()
    change(content)
    fed = azure_trial.read(tmp_path, content)
    fake = fake_azure.FakeAzure(fed, tmp_path / "cloud")
    made = azure_trial.build(fed, azure_trial.model().state_dict(), tmp_path, rounds=1)
    send = fake_azure.adapter(fake)
    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
    connection = workspace.connect(fed, credential=fake_azure.Credential())
    workspace.submit(connection, made, approved=made.digest)
    bodies, gate = azure_mutations.parsed(fake.calls), wire.Gate(fed)
    gate.plan = made
    for call in fake.calls:
        if call.method in ("PUT", "POST") and call.path.startswith("/subscriptions"):
            gate.check(call.method, call.path, call.body)
            gate.note(call.path, call.body, call.answer[1])
    node = json.dumps(bodies[-1][2]["properties"]["jobs"]["prepare_hospital_a"])
    if "radiographs/versions/3" in node:
        for other in ("radiographs/versions/2", "other/versions/3", "radiographs:3"):
            text = json.dumps(bodies[-1][2]).replace("radiographs/versions/3", other)
            body = json.loads(text)
            assert "inputs.data" in refusal(gate, *bodies[-1][:2], body)
        text = json.dumps(bodies[-1][2]).replace("/ws/data/", "/other/data/")
        assert "not ours" in refusal(gate, *bodies[-1][:2], json.loads(text))


@pytest.mark.parametrize(
    "part",
    [
        {"name": "../x"},
        {"name": "a b; curl x.org"},
        {"name": "x\n"},
        {"start": ("../updates/hospital_b/trial", 0)},
        {"start": ("", 1)},
        {"start": ("x", "../1")},
        {"kept": {"Hospital A": ("../../private/trial", 1)}},
    ],
)
def test_a_graph_that_no_signature_covers_leads_nowhere_else(part, sent):
    """Its name, and where it starts, are not in the digest: they are parts of paths."""
    from dataclasses import replace

    made = sent[0]
    with pytest.raises(ValueError, match="graphs have names"):
        pipeline._check_run(made.run, made.federation, plan.Part(**part))
    with pytest.raises(plan.PlanRefused, match="graphs have names"):
        pipeline.check_plan(replace(made, part=plan.Part(**part)))


def test_a_plan_that_was_changed_is_refused(sent):
    from dataclasses import replace

    made = sent[0]
    pipeline.check_plan(made)
    first = replace(made.jobs[0], literals={"round": 7})
    other = made.federation.only(["Hospital A", "Hospital B"])
    for changed in (
        replace(made, jobs=(first, *made.jobs[1:])),
        replace(made, jobs=made.jobs[:-1]),
        replace(made, jobs=(*made.jobs, made.jobs[0])),
        replace(made, outputs={}),
        replace(made, digest="0" * 64),
        replace(made, codes=made.codes | {"silo": "0" * 64}),
        replace(made, federation=other),
        replace(made, codes={}),  # never a KeyError, or another surprise
        replace(made, code={}),
        replace(made, outputs=None),
        replace(made, jobs=(None,)),
        replace(made, run=None),
        replace(made, part=plan.Part(silos=frozenset(["Hospital X", "Hospital Y"]))),
    ):
        with pytest.raises(plan.PlanRefused):
            pipeline.check_plan(changed)


def test_no_other_file_is_sent_with_the_code_not_even_a_harmless_one(sent):
    """A job may find some of the service's beside its code; what is sent has none."""
    more = sent[0].code["silo"] / "notes.txt"
    more.write_text("patient 4711")
    try:
        with pytest.raises(plan.PlanRefused, match="notes.txt"):
            pipeline.check_plan(sent[0])
    finally:
        more.unlink()


def test_a_job_of_the_sdk_is_compared_without_a_network(sent):
    made = sent[0]
    wire.check_job(sdk.to_job(made), made)
    changes = {
        "computeId": lambda job: setattr(job.jobs[A], "compute", "hospital-b"),
        "tags": lambda job: setattr(job.jobs[A], "tags", {"x": "y"}),
        "the run: description": lambda job: setattr(job, "description", "x"),
        "command": lambda job: setattr(job.jobs[A].component, "command", "python x.py"),
        "its name": lambda job: setattr(job, "name", "other"),
        "code": lambda job: setattr(job.jobs[A].component, "code", "/tmp"),
        "default_compute": lambda job: setattr(job.settings, "default_compute", "x"),
        "not to be sent": lambda job: job.jobs[A].inputs.update(model=object()),
    }
    for said, change in changes.items():
        job = sdk.to_job(made)
        change(job)
        with pytest.raises(plan.PlanRefused, match=said):
            wire.check_job(job, made)


def test_the_file_for_the_command_line_is_the_same_run(sent, tmp_path):
    """`az ml job create --file` loads it as `load_job` does."""
    from azure.ai.ml import load_job

    made = sent[0]
    job = load_job(sdk.write_yaml(made, tmp_path / "plan.yaml"))
    found = job._to_rest_object().properties
    legal = sdk.to_job(made)._to_rest_object().properties
    assert found["jobs"].keys() == legal["jobs"].keys()
    for key in ("displayName", "experimentName", "properties", "outputs"):
        assert wire._plain(found[key]) == wire._plain(legal[key]) != {}, key
    assert found["settings"]["force_rerun"] is True
    assert {k for k, v in found["settings"].items() if v} == {"force_rerun", "_source"}
    for name, node in legal["jobs"].items():
        for key in node.keys() - {"componentId", "_source"}:
            assert found["jobs"][name].get(key) == node[key], (name, key)
        one, other = (
            side["jobs"][name]["componentId"]._to_rest_object().properties
            for side in (found, legal)
        )
        for key in ("command", "inputs", "outputs", "is_deterministic"):
            assert one.component_spec.get(key) == other.component_spec.get(key)
        assert str(one.component_spec["code"]) == str(other.component_spec["code"])
