"""What goes out to Azure is the plan, exactly: compared before it leaves.

The legal bodies are rendered here from the plan, and what the SDK made is compared with
them, key by key; what is not known is refused. `check_job` does so without a network;
`Gate` at the last step before a socket, for every request that could create something.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from typing import Any
from urllib.parse import unquote, urlsplit

import requests
import yaml
from requests.adapters import HTTPAdapter
from urllib3 import HTTPResponse

from fl_helpers.cross_silo.azure_ml.bodies import (
    component_name,
    environment_text,
    graph_of,
    spec_of,
)
from fl_helpers.cross_silo.azure_ml.pipeline import check_plan
from fl_helpers.cross_silo.azure_ml.plan import Plan, PlanRefused, Violation
from fl_helpers.cross_silo.azure_ml.snapshot import environments
from fl_helpers.cross_silo.federation import Federation

FREE = {  # where a value may differ, and what it may be: nothing more leaves by it
    "limits.timeout": (
        r"P(?=.)((\d{1,9})D)?(T(?=.)((\d{1,9})H)?((\d{1,9})M)?((\d{1,9})S)?)?"
    ),
    "resources.shm_size": r"[1-9]\d{0,4}[bkmgBKMG]",
    "resources.instance_count": "1",
}
LONGEST = 21 * 86_400  # seconds of a job, by Azure ML
EMPTY = (None, {}, [], "")  # as good as a key that is not there,
WORDS = frozenset(  # if the key is a word of Azure's: another one could tell something
    "description tags identity services properties inputs outputs resources limits "
    "distribution environment_variables queue_settings default_compute comment version "
    "default_datastore continue_on_step_failure display_name notificationSetting build "
    "computeId componentId sourceJobId retry_settings parent mode assetName".split()
)
NAMES = ("inputs", "outputs")  # have no words of Azure's below them, but names
ANY_TIME = re.compile(  # without a plan: stop a run, read its outputs, register
    r"POST (jobs/[^/]+/cancel|/.*/(rundata|dataversion/batchGetResolvedUris))|"
    r"PUT (models|data)/[^/]+(/versions/[^/]+)?|"
    r"POST (models|data)/[^/]+/versions/[^/]+/startPendingUpload"
)
HOST = re.compile(  # of Azure: public, in China, of the US government
    r"https://management\.(azure\.com|chinacloudapi\.cn|usgovcloudapi\.net)/"
)
PLAIN = re.compile(r"([A-Za-z0-9_./-]|%2[89])+")  # of a path; parentheses are escaped
SHA256 = re.compile(r"[0-9a-f]{64}")
GUID = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
PARTS = re.compile(  # all that may be created, with names as the SDK makes them up
    rf"PUT jobs/[^/]+|POST codes/{GUID}/versions/1/startPendingUpload|"
    rf"PUT (codes/{GUID}/versions/1|components/azureml_anonymous/versions/{GUID}|"
    r"environments/CliV2AnonymousEnvironment/versions/[0-9a-f]{64})"
)


def check_job(job: Any, plan: Plan) -> None:
    """Refuse a job of the SDK's that is not the plan, as `sdk.to_job` makes it.

    Looks at what would be sent, without a network. Raises PlanRefused.
    """
    check_plan(plan)
    try:
        found = job._to_rest_object().properties
        specs = {name: _spec_of(node) for name, node in found["jobs"].items()}
    except Exception as error:  # whatever the SDK finds wrong with it
        why = Violation("the run", "it", f"not to be sent ({error})", "what it is")
        raise PlanRefused([why]) from error
    wrong, nodes, kinds = [], {}, {j.name: j.kind for j in plan.jobs}
    for name, node in found["jobs"].items():
        nodes[name] = dict(node)
        if name in kinds and specs[name] is not None:
            spec = _offline(specs[name], plan)
            wrong += _differ(spec, spec_of(plan, kinds[name]), name)
            nodes[name]["componentId"] = component_name(plan, kinds[name])
        if name in kinds:
            compute = str(node.get("computeId")).removeprefix("azureml:")
            nodes[name]["computeId"] = _below(compute, plan.federation, "computes")
    graph = {key: found[key] for key in found} | {"jobs": nodes}
    wrong += _check_graph(_plain(graph), str(job.name or plan.name), plan)
    if wrong:
        raise PlanRefused(dict.fromkeys(wrong))


class Gate(HTTPAdapter):
    """Lets out what belongs to a plan, while it is sent; else nothing that could run.

    federation: whose workspace it is. It is the last step of the SDK's own requests;
    answers are those of Azure, but for one: of code that was uploaded before, only what
    went through here is used again.
    """

    def __init__(self, federation: Federation) -> None:
        super().__init__()
        self.federation = federation
        names = [party.compute for party in federation.parties]
        self.computes = {name.lower(): name for name in names}
        self.plan: Plan | None = None
        self.known: dict[str, str] = {}  # what is at an address, by its lower case
        self.uploads: dict[str, str] = {}  # where the code of an address is sent to
        self.codes: dict[str, Any] = {}  # answers, by the SDK's hash of the code

    @contextmanager
    def open_for(self, plan: Plan) -> Iterator[None]:
        """While a plan is sent."""
        self.plan = plan
        try:
            yield
        finally:
            self.plan = None

    def send(
        self, request: requests.PreparedRequest, *args: Any, **more: Any
    ) -> requests.Response:
        """Check a request, send it, remember what Azure made of it."""
        url = urlsplit(request.url)
        path, query = unquote(url.path), url.query.lower()
        if request.method == "GET" and path.endswith("/versions") and "hash=" in query:
            return self._answer(request, query)
        if self.plan and request.method not in ("GET", "HEAD"):
            known = HOST.match(str(request.url)) and PLAIN.fullmatch(url.path)
            if not known or not re.fullmatch(r"api-version=[\w.-]+", query):
                where = request.method, "its address", request.url
                raise PlanRefused(
                    [Violation(*where, "Azure, for a version of its API")]
                )
        self.check(request.method, path, request.body)
        answer = super().send(request, *args, **more)
        if request.method not in ("GET", "HEAD") and answer.ok and self.plan:
            self.note(path, request.body, answer.json())
        return answer

    def check(self, method: str, path: str, body: Any) -> None:
        """Raise PlanRefused for a request that does not belong to the plan."""
        if method in ("GET", "HEAD") and not body:
            return
        below = _below(path, self.federation)
        if self.plan is None:
            if not ANY_TIME.fullmatch(f"{method} {below}"):
                why = Violation(method, path, "sent", "workspace.submit sends")
                raise PlanRefused([why])
            return
        content = _read(body)
        wrong = [Violation(method, path, "without a body of one meaning", "with one")]
        if type(content) is dict and type(content.get("properties", {})) is dict:
            wrong = list(self._check(method, below, path, content, self.plan))
        made = None if wrong else self._name_of(below.split("/")[0], content)
        # What is at an address stays: what was compared may name it already.
        if made and self.known.get(path.lower(), made) != made:
            wrong = [Violation(method, path, made, self.known[path.lower()])]
        if wrong:
            raise PlanRefused(dict.fromkeys(wrong))

    def _check(
        self, method: str, below: str, path: str, body: Any, plan: Plan
    ) -> Iterator[Violation]:
        kind, *rest = below.split("/")
        if not PARTS.fullmatch(f"{method} {below}"):
            yield Violation(method, path, "sent", "nothing more than its parts")
        elif method == "POST":
            upload = {"pendingUploadType": "TemporaryBlobReference"}
            yield from _differ(body, upload, "the code")
        elif kind == "codes":
            yield from _check_code(body, self.uploads.get(path.lower()))
        elif kind == "environments":
            yield from _check_environment(body, plan)
        elif kind == "components":
            yield from self._check_component(body, plan)
        else:
            yield from _check_graph(self._translated(body), rest[0], plan)

    def _check_component(self, body: Any, plan: Plan) -> Iterator[Violation]:
        found = _at(body, "properties", "componentSpec")
        kind = str(_at(found, "name")).removeprefix("fl_")
        if not isinstance(found, dict) or not spec_of(plan, kind):
            yield Violation("a component", "it", _short(found), "no such kind of job")
            return
        code, environment = str(found.get("code")), str(found.get("environment"))
        named = environment  # registered, by its name or by its address
        if environment.startswith("azureml:/subscriptions/"):
            named = self._asset(environment, "environments")
        made = self._made(environment) or (named if named[:8] == "azureml:" else None)
        spec = found | {"code": self._made(code), "environment": made}
        legal = {"isAnonymous": True, "isArchived": False, "componentSpec": "compared"}
        about = {
            **body,
            "properties": body["properties"] | {"componentSpec": "compared"},
        }
        yield from _differ(about, {"properties": legal}, kind)
        yield from _differ(spec, spec_of(plan, kind), kind)

    def _translated(self, body: Any) -> Any:
        """The body of a job, with our names for what was sent before."""
        if not isinstance(body, dict) or not set(body) <= {"properties"}:
            return body
        found, nodes = dict(body.get("properties") or {}), {}
        jobs = found.get("jobs") if isinstance(found.get("jobs"), dict) else {}
        for name, node in jobs.items():
            nodes[name] = node
            if isinstance(node, dict):
                compute = self._ours(str(node.get("computeId")), "computes")
                nodes[name] = node | {
                    "computeId": self.computes.get(compute.lower(), compute),
                    "componentId": self._made(str(node.get("componentId"))),
                    "inputs": self._named(node.get("inputs")),
                }
        return found | {"jobs": nodes}

    def _named(self, inputs: Any) -> Any:
        """Inputs of a job, with data assets as a plan has them."""
        if not isinstance(inputs, dict):
            return inputs
        uris = {name: str(_at(value, "uri")) for name, value in inputs.items()}
        assets = {
            name: inputs[name] | {"uri": self._asset(uri, "data")}
            for name, uri in uris.items()
            if uri.startswith("/subscriptions/")
        }
        return inputs | assets

    def _asset(self, address: str, kind: str) -> str:
        """A version of something registered here, as silos.yaml has it."""
        name, _, version = self._ours(address, kind).partition("/versions/")
        return f"azureml:{name}:{version}"

    def _made(self, address: str) -> str | None:
        """What went through here to an address; None if nothing did."""
        address = address.removeprefix("azureml:")
        return self.known.get(address.lower()) if address.isascii() else None

    def _ours(self, address: str, kind: str) -> str:
        """The name of what is in this workspace; else an address, never a name."""
        address = address.removeprefix("azureml:")
        name = _below(address, self.federation, kind)
        return name if name != address else f"not ours: {address}"

    def note(self, path: str, body: Any, answer: Any) -> None:
        """Remember what was created, by a request that was checked."""
        kind, content = _below(path, self.federation).split("/")[0], _read(body)
        if path.endswith("/startPendingUpload"):
            code = path.removesuffix("/startPendingUpload").lower()
            where = answer.get("blobReferenceForConsumption") or {}
            self.uploads[code] = str(where.get("blobUri"))
        elif made := self._name_of(kind, content):
            self.known[path.lower()] = made
            if kind == "codes":
                self.codes[content["properties"]["properties"]["hash_sha256"]] = answer

    def _name_of(self, kind: str, content: Any) -> str | None:
        """Our name of what a request creates that was checked; None for others."""
        found = content.get("properties") or {}
        if kind == "codes" and found:
            part = found["codeUri"].rpartition("/")[2]
            return f"code {part} {self.plan.codes[part]}"
        if kind == "environments":
            return environment_text(found)
        if kind == "components":
            name = found["componentSpec"]["name"].removeprefix("fl_")
            return component_name(self.plan, name)
        return None

    def _answer(
        self, request: requests.PreparedRequest, query: str
    ) -> requests.Response:
        """Which code is there already: what others say of theirs is not taken."""
        wanted = dict(pair.split("=", 1) for pair in query.split("&")).get("hash")
        found = [self.codes[wanted]] if wanted in self.codes else []
        body, kind = json.dumps({"value": found}).encode(), "application/json"
        about = {"Content-Type": kind, "Content-Length": str(len(body))}
        raw = HTTPResponse(BytesIO(body), about, 200, preload_content=False)
        return self.build_response(request, raw)


# ---- what is found, in our own terms


def _spec_of(node: Mapping[str, Any]) -> dict[str, Any] | None:
    """What kind of job a node is, if it says so itself."""
    component = node.get("componentId")
    if not hasattr(component, "_to_rest_object"):
        return None
    return _plain(component._to_rest_object().properties.component_spec)


def _offline(spec: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """A component that was not sent: code is a folder, the environment an object."""
    folders = {str(plan.code[k]): f"code {k} {v}" for k, v in plan.codes.items()}
    environment = spec.get("environment")
    if isinstance(environment, dict):
        extra = environment.keys() - {"name", "version", "image", "conda_file"}
        environment = sorted(extra) or environment_text(environment)
    code = folders.get(str(spec.get("code")), spec.get("code"))
    return {**spec, "code": code, "environment": environment}


def _check_graph(found: Any, name: str, plan: Plan) -> Iterator[Violation]:
    """The body of the job, with our names for computes and components."""
    if name != plan.name:
        yield Violation("the run", "its name", name, plan.name)
    legal = graph_of(plan)
    jobs = _at(found, "jobs")
    jobs = jobs if type(jobs) is dict else {}
    for key in sorted(legal["jobs"].keys() | jobs.keys()):
        if key not in legal["jobs"]:
            yield Violation(key, "it", "a job", "no such job")
        yield from _differ(jobs.get(key), legal["jobs"].get(key), key)
    rest = {k: v for k, v in legal.items() if k != "jobs"}
    others = {k: v for k, v in found.items() if k != "jobs"} if jobs else found
    yield from _differ(others, rest, "the run")


def _check_code(body: Any, where: str | None) -> Iterator[Violation]:
    if not where:
        yield Violation("the code", "it", "not uploaded", "to be uploaded before")
    uri, found = (
        _at(body, "properties", "codeUri"),
        _at(body, "properties", "properties"),
    )
    digest = str(_at(found, "hash_sha256"))
    parts = [f"{where}/{part}" for part in ("silo", "orchestrator")]
    about = {"hash_sha256": digest, "hash_version": 202208}
    legal = {"codeUri": uri if uri in parts else parts[0], "isAnonymous": True}
    yield from _differ(body, {"properties": legal | {"properties": about}}, "the code")
    if not SHA256.fullmatch(digest):
        yield Violation("the code", "its hash", digest, "a SHA-256")


def _check_environment(body: Any, plan: Plan) -> Iterator[Violation]:
    legal = [
        environment_text(found) for found in environments(plan.federation).values()
    ]
    found = body.get("properties") or {}
    about = {"isAnonymous": True, "isArchived": False}
    others = {k: v for k, v in found.items() if k not in ("condaFile", "image")}
    others = {**body, "properties": others}
    yield from _differ(others, {"properties": about}, "the environment")
    text = _safe_environment(found)
    if text not in legal:
        more = set(re.findall(r'"[^"]*"', text)) - set(
            re.findall(r'"[^"]*"', legal[-1])
        )
        yield Violation("the environment", "it", f"another ({sorted(more)})", legal[-1])


def _safe_environment(found: Mapping[str, Any]) -> str:
    try:
        return environment_text(found)
    except (yaml.YAMLError, TypeError, ValueError):
        return ""


def _below(address: str, federation: Federation, kind: str = "") -> str:
    """What of an address is below the workspace's, or below `kind` in it; else all."""
    space = federation.azure_ml.workspace
    start = f"/subscriptions/{space.subscription_id}/resourceGroups/"
    start += f"{space.resource_group}/providers/Microsoft.MachineLearningServices/"
    start += f"workspaces/{space.name}/" + (f"{kind}/" if kind else "")
    # A letter such as the Kelvin sign has an ASCII one as its lower case.
    known = address.isascii() and address.lower().startswith(start.lower())
    return address[len(start) :] if known else address


def _at(found: Any, *keys: str) -> Any:
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _differ(found: Any, legal: Any, job: str, where: str = "") -> Iterator[Violation]:
    """Where two bodies differ, but for what is free or empty."""
    if isinstance(found, dict) and isinstance(legal, dict):
        names = where.rpartition(".")[2] in NAMES
        for key in sorted(found.keys() | legal.keys()):
            place = f"{where}.{key}" if where else key
            known = key in legal or place in FREE or (key in WORDS and not names)
            if not known:
                yield Violation(job, place, "there", "nothing")
            yield from _differ(found.get(key), legal.get(key), job, place)
        return
    if isinstance(legal, dict) and not any(v not in EMPTY for v in legal.values()):
        legal = None  # resources without any
    same = type(found) is type(legal) and found == legal
    if not (same or _is_free(where, found) or (found in EMPTY and legal in EMPTY)):
        yield Violation(job, where or "it", _short(found), _short(legal))


def _is_free(where: str, value: Any) -> bool:
    """Whether it may be there, whatever the plan says."""
    if where not in FREE or type(value) not in (str, int):
        return False
    found = re.fullmatch(FREE[where], str(value), re.ASCII)
    if not found or where != "limits.timeout":
        return bool(found)
    numbers, sizes = found.group(2, 5, 7, 9), (86_400, 3_600, 60, 1)
    seconds = sum(int(n or 0) * size for n, size in zip(numbers, sizes, strict=True))
    return 0 < seconds <= LONGEST


def _read(body: Any) -> Any:
    """JSON that every reader takes for the same: UTF-8, keys in ASCII and none twice,
    not even in another case, which .NET takes for the same; None for anything else."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = {key.lower() for key, _ in found if key.isascii()}
        if len(keys) < len(found):
            raise ValueError("a key that is there twice, or looks like another")
        return dict(found)

    try:
        text = body if isinstance(body, str) else bytes(body or b"").decode("utf-8")
        return json.loads(text, object_pairs_hook=pairs)
    except (TypeError, ValueError, RecursionError):
        return None


def _short(value: Any) -> str:
    text = "nothing" if value in EMPTY else ascii(value)
    return text if len(text) <= 160 else text[:160] + "..."


def _plain(found: Any) -> Any:
    """Dicts, lists and values of what the SDK made."""
    if hasattr(found, "as_dict"):
        found = found.as_dict()
    if isinstance(found, Mapping):
        return {key: _plain(value) for key, value in found.items()}
    return [_plain(v) for v in found] if isinstance(found, list | tuple) else found
