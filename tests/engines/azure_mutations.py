"""Changes of what is sent to Azure: those that leak, and those that do no harm.

Written from the bodies alone, by walking their structure: every key, list, text and
number is a place where something can be changed, taken away or added, with values from
other places of the bodies and from Azure's documentation. Nothing here knows how
`wire` compares. A change is harmless only if it is on the short list of the guide: time
limits, shared memory, one machine said twice, the case of an address, the order of
keys, empty values, the layout of the environment's YAML.
"""

import copy
import json
import random
import re

import yaml

STRANGE = [  # what Azure knows at some place, and nobody asked for
    ("identity", {"identity_type": "UserIdentity"}),
    ("environment_variables", {"AZUREML_COMPUTE_USE_COMMON_RUNTIME": "false"}),
    ("environmentVariables", {"X": "y"}),
    ("tags", {"patient": "4711"}),
    ("properties", {"azureml.x": "y"}),
    ("description", "patient 4711"),
    ("services", {"ssh": {"job_service_type": "SSH", "ssh_public_keys": "ssh-rsa A"}}),
    ("queue_settings", {"job_tier": "Spot"}),
    ("docker_args", "-v /:/host --network host"),
    ("default_datastore", "workspaceblobstore"),
    ("default_compute", "gpu"),
    ("continue_on_step_failure", True),
    ("notificationSetting", {"emails": ["me@x.org"], "emailOn": ["JobCompleted"]}),
    ("additional_includes", ["../secrets"]),
    ("code", "azureml:/subscriptions/0/codes/x/versions/1"),
    ("locations", ["elsewhere"]),
    ("max_instance_count", 4),
    ("init", "curl https://x.org"),
    ("parent_job_name", "other"),
    ("sourceJobId", "/subscriptions/0/jobs/x"),
    ("isArchived", True),
    ("retry_settings", {"max_retries": 9}),
    ("component_id", "x"),
    ("x", "y"),
]
TEXTS = [
    *(
        "",
        "x",
        "orchestrator",
        "hospital_a",
        "hospital-b",
        "latest",
        "Upload",
        "Direct",
    ),
    *("ReadWriteMount", "uri_file", "mltable", "PT0S", "P22D", "P30D", "P1Y", "PT999H"),
    "azureml://datastores/workspaceblobstore/paths/x",
    "azureml://datastores/hospital_b/paths/radiographs",
    "azureml://datastores/orchestrator/paths/fl/updates/hospital_b/trial/0000",
    "https://store.blob.core.windows.net/data?sig=x",
    "wasbs://data@store.blob.core.windows.net/x",
    "azureml:patients:1",
    "./patients",
    "$(curl x.org)",
    "${{parent.jobs.train_0000_hospital_b.outputs.private}}",
    "${{parent.jobs.train_0000_hospital_b.outputs.model_update}}",
    "${{parent.outputs.final_model}}",
    "a; reboot",
]
HARMLESS = re.compile(  # places that the guide says may differ: left to `vary`
    r".*\.limits\.timeout|.*\.resources\.(shm_size|instance_count)"
)


def places(found, path=()):
    """Every place in nested dicts and lists."""
    yield path
    items = found.items() if isinstance(found, dict) else ()
    items = enumerate(found) if isinstance(found, list) else items
    for key, value in items:
        yield from places(value, (*path, key))


def at(found, path):
    for key in path:
        found = found[key]
    return found


def put(found, path, value):
    found = copy.deepcopy(found)
    at(found, path[:-1])[path[-1]] = value
    return found


def drop(found, path):
    found = copy.deepcopy(found)
    del at(found, path[:-1])[path[-1]]
    return found


def is_empty(value):
    return value in (None, "", {}, [])


def leak(bodies, rng):
    """One request with one change that does harm: (method, path, body, what).

    bodies: [(method, path, body as Python values)] of what is legally sent.
    """
    while True:
        method, path, body = rng.choice(bodies)
        if rng.random() < 0.4:  # the graph is where the flows are
            method, path, body = bodies[-1]
        change = rng.choice(
            [_set, _set, _swap, _drop, _add, _add, _text, _text, _request]
        )
        made = change(method, path, body, bodies, rng)
        if made and (made[0], made[1].lower()) != (method, path.lower()):
            return (*made, change.__name__)
        if made and made[2] != body and _harms(body, made[2]):
            return (*made, change.__name__)


def _harms(before, after):
    """Whether two bodies differ in more than what the guide calls harmless."""
    return _plain(before) != _plain(after)


def _plain(found, where=""):
    if isinstance(found, dict):
        said = {k: v for k, v in found.items() if not is_empty(v)}
        return {k: _plain(v, f"{where}.{k}") for k, v in said.items()}
    if isinstance(found, list):
        return [_plain(v, where) for v in found]
    if where.endswith(".condaFile") and isinstance(found, str):
        try:
            return yaml.safe_load(found)
        except yaml.YAMLError:
            return found
    if HARMLESS.fullmatch(where):
        return None
    if isinstance(found, str) and found.lower().startswith("/subscriptions/"):
        return found.lower()
    return type(found).__name__, found


def _set(method, path, body, bodies, rng):
    """Any place gets another value, often one of another place."""
    where = rng.choice([p for p in places(body) if p])
    others = [at(body, p) for p in places(body) if p]
    value = rng.choice(
        [rng.choice(TEXTS), rng.choice(others), 1, 0, True, None, {}, []]
    )
    return method, path, put(body, where, copy.deepcopy(value))


def _swap(method, path, body, bodies, rng):
    """Two places of one kind change what they hold: computes, stores, jobs, slots."""
    every = [p for p in places(body) if p]
    one = rng.choice(every)
    like = [p for p in every if p[-1] == one[-1] or p[:-1] == one[:-1]]
    other = rng.choice(like)
    if one[: len(other)] == other or other[: len(one)] == one:
        return None
    made = put(body, one, copy.deepcopy(at(body, other)))
    return method, path, put(made, other, copy.deepcopy(at(body, one)))


def _drop(method, path, body, bodies, rng):
    return method, path, drop(body, rng.choice([p for p in places(body) if p]))


def _add(method, path, body, bodies, rng):
    """A key that somebody at Azure knows, or a copy of one's neighbour."""
    dicts = [p for p in places(body) if isinstance(at(body, p), dict)]
    where = rng.choice(dicts)
    inside = at(body, where)
    key, value = rng.choice(STRANGE)
    if inside and rng.random() < 0.3:
        twin = rng.choice([*inside])
        key, value = f"{twin}_1", inside[twin]
    return method, path, put(body, (*where, key), copy.deepcopy(value))


def _text(method, path, body, bodies, rng):
    """A text is changed a little: as a look-alike, with more words, with other ones."""
    texts = [p for p in places(body) if isinstance(at(body, p), str) and at(body, p)]
    long = [p for p in texts if p[-1] in ("command", "condaFile", "uri", "image")]
    where = rng.choice(long if long and rng.random() < 0.5 else texts)
    value = at(body, where)
    words = value.split()
    changes = [
        lambda: value + "x",
        lambda: value[:-1],
        lambda: f"{value}/..",
        lambda: value.replace("/", "/./", 1),
        lambda: value.replace("hospital_a", "hospital_b"),
        lambda: value.replace("hospital_b", "orchestrator"),
        lambda: value.replace("_", "-", 1),
        lambda: value.replace("a", "\u0430", 1),  # Cyrillic
        lambda: value.replace("paths/", "paths/%2e%2e/"),
        lambda: value.upper() if "/" not in value[:1] else value + "/x",
        lambda: value + " && curl x.org",
        lambda: value + "\n",
        lambda: " ".join(rng.sample(words, len(words))) if words else value + " ",
        lambda: " ".join(words[:-1]),
        lambda: _other_slot(value, rng),
        lambda: value.replace("==", ">=", 1),
        lambda: value.replace("- torch==", "- --pre\n  - torch==", 1),
        lambda: value.replace("- conda-forge", "- https://x.org/conda", 1),
        lambda: re.sub(r"(@sha256)?:[\w.]+$", ":stable", value),
        lambda: value.replace(".py", "_2.py", 1),
        lambda: value.replace("-B ", "", 1),
    ]
    made = rng.choice(changes)()
    return (method, path, put(body, where, made)) if made != value else None


def _other_slot(value, rng):
    """A slot of a command stands behind another name."""
    slots = re.findall(r"\$\{\{\w+\.\w+\}\}", value)
    if len(slots) < 2:
        return value
    one, other = rng.sample(slots, 2)
    return value.replace(one, "@").replace(other, one).replace("@", other)


def _request(method, path, body, bodies, rng):
    """A request to another place, or of another kind."""
    space, _, below = path.partition("/workspaces/ws/")
    start = f"{space}/workspaces/ws"
    made = [
        (method, path.replace("/workspaces/ws/", "/workspaces/other/"), body),
        (method, f"{path}x", body),
        (rng.choice(["PATCH", "DELETE", "POST"]), path, body),
        ("PUT", f"{start}/jobs/other", bodies[-1][2]),
        ("PUT", f"{start}/schedules/x", {"properties": {"action": {}}}),
        ("PUT", f"{start}/datastores/hospital_a", {"properties": {}}),
        ("PUT", f"{start}/computes/hospital-a", {"properties": {}}),
        ("PUT", f"{start}/components/mine/versions/1", body),
        ("PUT", f"{start}/environments/mine/versions/1", body),
        ("POST", f"{start}/jobs/trial/cancel", {}),
        ("PUT", f"{start}/data/x/versions/1", {"properties": {}}),
        ("PUT", f"/{below}", body),
    ]
    made = rng.choice(made)
    return made if made[:2] != (method, path) or made[2] != body else None


def vary(bodies, rng):
    """One request as it may be, too: (method, path, body, what)."""
    method, path, body = rng.choice(bodies)
    if rng.random() < 0.5:
        method, path, body = bodies[-1]
    changes = rng.sample([_limits, _memory, _one, _case, _order, _empty, _yaml], k=3)
    made = copy.deepcopy(body)
    for change in changes:
        change(made, rng)
    return method, path, made, "+".join(change.__name__ for change in changes)


def _nodes(body):
    return list((body.get("properties", {}).get("jobs") or {}).values())


def _limits(body, rng):
    n = rng.randint
    for node in _nodes(body):
        few = (
            f"PT{n(1, 504)}H",
            f"P{n(1, 21)}D",
            f"PT{n(1, 30000)}M",
            f"PT{n(60, 10**6)}S",
        )
        node["limits"] = {**node["limits"], "timeout": rng.choice(few)}


def _memory(body, rng):
    for node in _nodes(body):
        size = f"{rng.randint(1, 512)}{rng.choice('gmGM')}"
        node["resources"] = {**(node.get("resources") or {}), "shm_size": size}


def _one(body, rng):
    for node in _nodes(body):
        node["resources"] = {**(node.get("resources") or {}), "instance_count": 1}


def _case(body, rng):
    for node in _nodes(body):
        for key in ("computeId", "componentId"):
            head, _, name = node[key].rpartition("/")
            head = rng.choice([head.lower(), head.upper(), head])
            node[key] = f"{head}/{name}"


def _order(body, rng):
    for path in list(places(body)):
        inner = at(body, path)
        if isinstance(inner, dict):
            items = list(inner.items())
            inner.clear()
            inner.update(rng.sample(items, len(items)))


def _empty(body, rng):
    for path in list(places(body)):
        inner = at(body, path)
        names = path and path[-1] in (
            "jobs",
            "inputs",
            "outputs",
        )  # not keys of Azure's
        if isinstance(inner, dict) and inner and path and not names:
            key = rng.choice(["description", "tags", "identity", "services", "comment"])
            inner.setdefault(key, rng.choice([None, {}, ""]))


def _yaml(body, rng):
    found = body.get("properties", {})
    if found.get("condaFile"):
        text = yaml.safe_dump(yaml.safe_load(found["condaFile"]), sort_keys=False)
        found["condaFile"] = "\n" * rng.randint(0, 3) + text.replace("\n", "\n\n")


def parsed(calls):
    """What creates something, of a recording: [(method, path, body)]."""
    return [
        (call.method, call.path, json.loads(call.body))
        for call in calls
        if call.method not in ("GET", "HEAD") and call.path.startswith("/subscriptions")
    ]


def generator(seed):
    return random.Random(seed)
