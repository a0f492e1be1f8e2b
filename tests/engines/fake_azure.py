"""A small Azure in this process: resource manager, workspace, run history, blob stores.

It takes the place of the last step of `requests`, where a socket would be opened, so
the Azure libraries above it are real. It records what it was asked and did not know.
What is submitted can be run: from the uploaded files only, as `run_locally` does.
"""

import io
import json
import re
import threading
import time
import uuid
from collections import namedtuple
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape

import requests
from urllib3 import HTTPResponse

from fl_helpers import exchange
from fl_helpers.cross_silo.azure_ml import plan, run_locally
from fl_helpers.cross_silo.run import from_plain

PROVIDERS = "/providers/Microsoft.MachineLearningServices"
WHEN = "2026-11-01T00:00:00Z"
BLOB = {"Last-Modified": "Sun, 01 Nov 2026 00:00:00 GMT", "ETag": '"1"'}
Call = namedtuple("Call", "method path query body headers answer")
OWN = "workspaceblobstore"  # the workspace's default datastore
SILO = ("prepare", "train", "evaluate")
BOUND = re.compile(r"\$\{\{parent\.jobs\.(\w+)\.outputs\.(\w+)\}\}")
MODES = {"ReadOnlyMount": "ro_mount", "ReadWriteMount": "rw_mount", "Upload": "upload"}
ASSETS = "codes|environments|components|models|data"
PAGE = 50  # children of a run, if no number is asked for
SIZE = {"name": "Standard_DS3_v2", "family": "standardDSv2Family", "vCPUs": 4}


class FakeAzure:
    """computes, datastores: name -> resource's properties; change them to break things.

    folder: where runs are executed; a store is `folder/stores/<datastore>`. denied:
    regular expression of a path -> (status, code, message).
    """

    def __init__(self, federation, folder, *, data=None, sandbox_kind=None):
        space = federation.azure_ml.workspace
        self.subscription = f"/subscriptions/{space.subscription_id}"
        self.group = f"{self.subscription}/resourceGroups/{space.resource_group}"
        self.workspace = f"{self.group}{PROVIDERS}/workspaces/{space.name}"
        self.federation, self.folder, self.data = federation, folder, data
        self.sandbox_kind = sandbox_kind
        parties = federation.parties
        self.computes = {party.compute: compute(party.key) for party in parties}
        stores = {p.datastore: p.key for p in parties}
        stores |= {p.outbox: "orchestrator" for p in parties if p.outbox}
        self.datastores = {name: datastore(key, name) for name, key in stores.items()}
        self.permissions = [{"actions": ["*"], "notActions": []}]
        self.usages = [usage("Dedicated", 0, 100), usage("LowPriority", 0, 0)]
        self.usages += [usage("Dedicated", 0, 0, below="/x/workspaces/other")]
        self.denied = {}
        self.calls, self.unknown = [], []
        self.resources, self.blobs, self.jobs, self.children = {}, {}, {}, {}
        self.results, self.errors = {}, {}
        self.lock = threading.RLock()

    def send(self, request):
        """Answer a request of `requests`."""
        url, body = urlsplit(request.url), request.body or b""
        body = body.read() if hasattr(body, "read") else body
        body = body.encode() if isinstance(body, str) else body
        query = {k.lower(): v for k, v in parse_qsl(url.query)}
        path = unquote(url.path)
        call = Call(request.method, path, query, body, dict(request.headers), None)
        with self.lock:
            account = re.fullmatch(r"(\w+)\.blob\.core\.windows\.net", url.netloc)
            if account:
                call = call._replace(path=f"{account[1]}{path}")
                answer = self.deny(call) or self.blob(call)
            else:
                answer = self.deny(call) or self.route(call)
            self.calls.append(call._replace(answer=answer))
            if answer is None:
                self.unknown.append((call.method, url.netloc, call.path))
                answer = failure(404, "NotFaked", f"{call.method} {path}")
        return response(request, *answer)

    def deny(self, call):
        for path, answer in self.denied.items():
            if re.search(path, call.path):
                if isinstance(answer, Exception):
                    raise answer
                return failure(*answer)
        return None

    def body_of(self, name):
        """What was sent to create a job."""
        end = f"/jobs/{name}"
        return next(
            call.body
            for call in self.calls
            if call.method == "PUT" and call.path.endswith(end)
        )

    def route(self, call):
        """(status, content) of a request to the resource manager or the workspace."""
        method, path, query, *_ = call
        if path.lower() == self.workspace.lower():
            return 200, self.describe_workspace()
        if path == "/discovery":
            return 200, dict.fromkeys(("api", "history", "mlflow"), "https://fake.ml")
        if path.endswith("/Microsoft.Authorization/permissions"):
            return 200, {"value": self.permissions}
        if path.startswith(self.subscription + PROVIDERS + "/locations/nowhere/"):
            values = {"usages": self.usages, "vmSizes": [SIZE]}
            return 200, {"value": values[path.rpartition("/")[2]]}
        below = path.split(self.workspace.rpartition("/")[2], 1)[-1].strip("/")
        if "/history/v1.0/" in path or "/data/v1.0/" in path:
            return self.history(call, below)
        if found := re.fullmatch(r"(computes|datastores)/([^/]+)", below):
            known = getattr(self, found[1]) | {OWN: datastore("workspace", OWN)}
            if found[2] not in known:
                return failure(404, "UserError", f"{found[2]} was not found")
            return 200, {"id": path, "name": found[2], **known[found[2]]}
        if found := re.fullmatch(r"datastores", below):
            about = {"id": f"{path}/{OWN}", "name": OWN, **datastore("workspace", OWN)}
            return 200, {"value": [about]}
        if found := re.fullmatch(rf"({ASSETS})/([^/]+)/versions(/[^/]+)?(/.*)?", below):
            return self.asset(call, *found.groups())
        if found := re.fullmatch(r"models/([^/]+)", below):
            return failure(404, "UserError", f"no model {found[1]}")
        if found := re.fullmatch(r"jobs/([^/]+)(/cancel)?", below):
            return self.job(call, *found.groups())
        return None

    def describe_workspace(self):
        about = {"workspaceId": "w-1", "discoveryUrl": "https://fake.ml/discovery"}
        return {
            "id": self.workspace,
            "name": self.federation.azure_ml.workspace.name,
            "type": "Microsoft.MachineLearningServices/workspaces",
            "location": "nowhere",
            "properties": about,
        }

    def asset(self, call, kind, name, version, more):
        """Code, environments and components: kept as they come."""
        if more == "/startPendingUpload":
            url = f"https://workspacestore.blob.core.windows.net/code-{name}"
            return 200, {
                "pendingUploadId": "p1",
                "pendingUploadType": "TemporaryBlobReference",
                "blobReferenceForConsumption": {
                    "blobUri": url,
                    "storageAccountArmId": "/x",
                    "credential": {
                        "credentialType": "SAS",
                        "sasUri": f"{url}?sig=fake",
                    },
                },
            }
        if call.method == "PUT":
            properties = json.loads(call.body)["properties"]
            properties |= {"flavors": {}} if kind == "models" else {}
            about = {"id": call.path, "name": version.strip("/"), **system(kind)}
            self.resources[call.path] = about | {
                "properties": {**properties, "provisioningState": "Succeeded"}
            }
            return 201, self.resources[call.path]
        if not version:
            known = list(self.resources.values()) if "hash" in call.query else []
            known = [each for each in known if call.query["hash"] in str(each)]
            return 200, {"value": known}
        if call.path in self.resources:
            return 200, self.resources[call.path]
        return failure(404, "NotFound", f"{kind} {name}{version}")

    def job(self, call, name, cancel):
        if cancel:
            self.jobs[name]["properties"]["status"] = "Canceled"
            return 200, {}
        if call.method == "PUT":
            if name in self.jobs:
                return failure(409, "Conflict", f"A job named {name} already exists")
            properties = json.loads(call.body)["properties"] | {"status": "NotStarted"}
            studio = {"endpoint": f"https://ml.azure.com/runs/{name}?wsid=x"}
            properties["services"] = {"Studio": {**studio, "jobServiceType": "Studio"}}
            self.jobs[name] = {"id": call.path, "name": name, **system("jobs")}
            self.jobs[name]["properties"] = properties
            self.children[name] = {}
            return 201, self.jobs[name]
        if name not in self.jobs:
            return failure(404, "UserError", f"job {name} was not found")
        return 200, self.jobs[name]

    def history(self, call, below):
        """The run history: the jobs of a pipeline, and where an output is."""
        if found := re.fullmatch(r"runs/([^/]+)/children", below):
            name, children = found[1], self.children[found[1]]
            top = int(call.query.get("$top", PAGE))  # the rest is on the next page
            answer = {
                "value": [
                    {"runId": f"{name}_{i}", "displayName": key, "status": status}
                    for i, (key, status) in enumerate(children.items())
                ][:top]
            }
            if len(children) > top:
                answer["nextLink"] = "https://fake.ml/next"
            return 200, answer
        if below == "rundata":
            name = json.loads(call.body)["runId"]
            outputs = {
                key: {"assetId": f"{name}/{key}", "type": "uri_folder"}
                for key in self.jobs[name]["properties"]["outputs"]
            }
            return 200, {"runMetadata": {"runId": name, "outputs": outputs}}
        if below == "dataversion/batchGetResolvedUris":
            values = {}
            for asset in json.loads(call.body)["values"]:
                name, key = asset.split("/")
                output = self.jobs[name]["properties"]["outputs"][key]
                values[asset] = {"uri": output["uri"], "type": "uri_folder"}
            return 200, {"values": values}
        return None

    def blob(self, call):
        """The blob stores: those of parties are the folders that runs write to."""
        method, path, query, body, headers, _ = call
        account, container, name = (path + "//").split("/", 2)
        name = name.strip("/")
        if query.get("comp") == "list":  # of a container that is there, maybe empty
            prefix = query.get("prefix", "")
            found = {k: v for k, v in self.files(account, container).items()
                     if k.startswith(prefix)}  # fmt: skip
            return 200, *listing(found)
        if query.get("comp") == "metadata":
            return 200, b"", BLOB
        if method == "PUT":
            self.blobs[path] = body
            return 201, b"", BLOB | {"x-ms-request-server-encrypted": "true"}
        found = self.files(account, container).get(name)
        if found is None:
            return 404, b"", {"x-ms-error-code": "BlobNotFound"}
        more = {"x-ms-blob-type": "BlockBlob", "Content-Length": str(len(found))}
        if method == "HEAD":
            return 200, b"", BLOB | more
        more["Content-Range"] = f"bytes 0-{len(found) - 1}/{len(found)}"
        return 206 if found else 200, found, BLOB | more

    def files(self, account, container):
        """{blob: content} of a container."""
        for name, found in self.datastores.items():
            where = found["properties"]
            if (where["accountName"], where["containerName"]) == (account, container):
                root = self.folder / "stores" / name
                files = [path for path in root.rglob("*") if path.is_file()]
                return {str(p.relative_to(root)): p.read_bytes() for p in files}
        start = f"{account}/{container}/"
        return {
            key.removeprefix(start): value
            for key, value in self.blobs.items()
            if key.startswith(start)
        }

    # What was received, and how it is run.

    def received(self, name):
        """The plan that a submitted job is, read off what was sent; its code is what
        was uploaded."""
        job, self.code = self.jobs[name]["properties"], {}
        jobs = [self.received_job(key, node, job) for key, node in job["jobs"].items()]
        text = (next(iter(self.code.values())) / "run.json").read_text()
        nodes = job["jobs"].items()
        makers = {n["outputs"][o].get("value", ""): (k, o) for k, n in nodes
                  for o in n["outputs"]}  # fmt: skip
        return plan.Plan(
            run=from_plain(json.loads(text)["run"]),
            federation=self.federation,
            part=plan.Part(),
            jobs=tuple(jobs),
            outputs={
                key: self.flow(
                    "", *makers[f"${{{{parent.outputs.{key}}}}}"], job, "ro_mount"
                )
                for key in job["outputs"]
            },
            code=self.code,
            codes={j.code: j.command.split()[3] for j in jobs},
            digest=job["properties"]["plan"],
        )

    def received_job(self, name, node, job):
        spec = self.resources[node["componentId"]]["properties"]["componentSpec"]
        kind = re.search(r"(\w+)\.py --", spec["command"])[1]
        code = "silo" if kind in SILO else "orchestrator"
        self.code[code] = Path(self.unpacked(spec["code"]))
        inputs, outputs = node.get("inputs") or {}, node.get("outputs") or {}
        values = {k: v["value"] for k, v in inputs.items() if "value" in v}
        bound = {k: BOUND.fullmatch(v) for k, v in values.items()}
        literals = {k: v for k, v in values.items() if not bound[k]}
        ports = spec.get("inputs") or {}
        ints = {k for k, v in ports.items() if v["type"] == "integer"}
        literals = {k: int(v) if k in ints else v for k, v in literals.items()}
        reads = [
            self.flow(key, *bound[key].groups(), job, mode="ro_mount")
            if bound.get(key)
            else flow(key, inputs[key])
            for key in ports
            if key not in literals
        ]
        writes = [replace(self.flow(k, name, k, job), producer="", output="")
                  for k in spec["outputs"] if k in outputs]  # fmt: skip
        compute = node["computeId"].rpartition("/")[2]
        party = next(p for p in self.federation.parties if p.compute == compute)
        return plan.Job(
            name, kind, party, spec["command"], literals, tuple(reads), tuple(writes)
        )

    def flow(self, key, maker, output, job, mode=""):
        """A folder that a job of the graph makes; maybe the graph says where."""
        where = job["jobs"][maker]["outputs"][output]
        if "uri" not in where:
            promoted = re.fullmatch(r"\$\{\{parent\.outputs\.(\w+)\}\}", where["value"])
            where = job["outputs"][promoted[1]]
        found = flow(key, where)
        return replace(found, mode=mode or found.mode, producer=maker, output=output)

    def unpacked(self, code):
        """The folder of an uploaded code snapshot."""
        where = self.resources[code.removeprefix("azureml:")]["properties"]["codeUri"]
        url = urlsplit(where)
        start = url.netloc.split(".")[0] + url.path.rstrip("/") + "/"
        target = self.folder / "received" / uuid.uuid5(uuid.NAMESPACE_URL, where).hex
        for key, content in self.blobs.items():
            if key.startswith(start):
                path = target / key.removeprefix(start)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        return str(target)

    def execute(self, name):
        """Run what was received; its status can be asked for meanwhile."""
        graph = self.received(name)
        children = self.children[name]
        properties = self.jobs[name]["properties"]
        children |= {job.name: "NotStarted" for job in graph.jobs}
        properties["status"] = "Running"

        def show(line):
            children[next(w for w in line.split() if w in children)] = "Completed"

        try:
            self.results[name] = run_locally.run(
                graph,
                self.folder,
                data=self.data,
                sandbox_kind=self.sandbox_kind,
                show=show,
            )
            properties["status"] = "Completed"
        except Exception as error:
            failed = str(error).split()[0]
            if failed in children:
                children[failed] = "Failed"
            self.errors[name] = error
            properties["status"] = "Failed"

    def start(self, name):
        thread = threading.Thread(target=self.execute, args=[name], daemon=True)
        thread.start()
        return thread


def adapter(fake):
    """Takes the place of `requests.adapters.HTTPAdapter.send`."""
    return lambda self, request, **_: fake.send(request)


_sleep = time.sleep


def quick_sleep(seconds):
    """The Azure libraries wait before they try again; here that is no use."""
    _sleep(min(seconds, 0.05))


class Instant(FakeAzure):
    """Every run that is sent is over at once, with the model `params`.

    failing: names of jobs that fail. scores: {round: metric "test_loss" of all silos}.
    """

    params, failing, scores = {}, (), {}

    def job(self, call, name, cancel):
        answer = super().job(call, name, cancel)
        if call.method == "PUT" and answer[0] == 201:
            graph = self.received(name)
            failed = [job for job in graph.jobs if job.name in self.failing]
            status = "Failed" if failed else "Completed"
            self.jobs[name]["properties"]["status"] = status
            others = "Canceled" if failed else "Completed"
            self.children[name] = {
                job.name: "Failed" if job in failed else others for job in graph.jobs
            }
            for flow in (flow for job in graph.jobs for flow in job.writes):
                folder = self.folder / "stores" / flow.store / flow.path
                if flow.name == "next_model":
                    index = int(flow.path.rpartition("/")[2])
                    exchange.write_model(folder, self.params, round_index=index)
                if flow.name == "report":
                    folder.mkdir(parents=True)
                    (folder / "metrics.jsonl").write_text(self.report(flow))
        return answer

    def report(self, flow):
        index = flow.path.rpartition("/")[2]
        index = int(index) if index.isdigit() else len(self.scores) - 1
        line = {"round": index, "metric": "test_loss", "value": self.scores.get(index)}
        names = [silo.name for silo in self.federation.silos]
        return "".join(json.dumps({**line, "silo": name}) + "\n" for name in names)


def response(request, status, content=b"", headers=None):
    """What `requests` makes of an answer."""
    headers = dict(headers or {})
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
        headers.setdefault("Content-Type", "application/json")
    if request.method == "HEAD":
        content = b""
    headers.setdefault("Content-Length", str(len(content)))
    made = requests.Response()
    made.status_code, made.reason = status, HTTPStatus(status).phrase
    made.headers.update(headers)
    made.url, made.request = request.url, request
    made.raw = HTTPResponse(
        io.BytesIO(content),
        headers=headers,
        status=status,
        preload_content=False,
        request_method=request.method,
    )
    return made


def failure(status, code, message):
    error = {"error": {"code": code, "message": message}}
    return status, error, {"x-ms-error-code": code}


def listing(found):
    items = "".join(
        f"<Blob><Name>{escape(name)}</Name><Properties><Content-Length>{len(content)}"
        "</Content-Length><BlobType>BlockBlob</BlobType></Properties></Blob>"
        for name, content in sorted(found.items())
    )
    text = f"<EnumerationResults><Blobs>{items}</Blobs></EnumerationResults>"
    return text.encode(), {"Content-Type": "application/xml"}


def flow(key, where):
    """A folder as a body of a job says it."""
    found = re.fullmatch(r"azureml://datastores/(\w+)/paths/(.+)", where["uri"])
    store, path = found.groups() if found else ("", where["uri"])
    return plan.Flow(key, store, path, MODES[where["mode"]])


def system(kind):
    made = {"createdAt": WHEN, "createdBy": "fake", "createdByType": "User"}
    return {"type": f"Microsoft.MachineLearningServices/{kind}", "systemData": made}


def compute(key):
    """A cluster with an identity of its own."""
    identity = f"/x/Microsoft.ManagedIdentity/userAssignedIdentities/{key}"
    return {
        "location": "nowhere",
        "identity": {"type": "UserAssigned", "userAssignedIdentities": {identity: {}}},
        "properties": {
            "computeType": "AmlCompute",
            "provisioningState": "Succeeded",
            "properties": {
                "vmSize": SIZE["name"],
                "vmPriority": "Dedicated",
                "scaleSettings": {"maxNodeCount": 1, "minNodeCount": 0},
            },
        },
    }


def datastore(key, name):
    """A blob container without credentials, in the account of a party."""
    return {
        "properties": {
            "datastoreType": "AzureBlob",
            "accountName": key.replace("_", ""),
            "containerName": name.replace("_", "-"),
            "endpoint": "core.windows.net",
            "protocol": "https",
            "credentials": {"credentialsType": "None"},
            "isDefault": False,
        }
    }


def usage(tier, used, limit, below=""):
    """What is used of a family's virtual CPUs, in the subscription or below it."""
    name = f"Standard DSv2 Family Cluster {tier} vCPUs"
    return {
        "id": f"/subscriptions/x{below}/usages/{name.replace(' ', '_')}",
        "type": "Microsoft.MachineLearningServices/vmFamily/usages",
        "currentValue": used,
        "limit": limit,
        "name": {"value": name, "localizedValue": name},
    }


class Credential:
    """Somebody who is signed in. scopes: what tokens were asked for."""

    def __init__(self, **_):
        self.scopes = set()

    def get_token(self, *scopes, **_):
        import jwt
        from azure.core.credentials import AccessToken

        self.scopes |= set(scopes)
        said = {"aud": scopes[0].removesuffix("/.default"), "tid": "tenant"}
        token = jwt.encode(said, "k" * 32, algorithm="HS256")
        return AccessToken(token, int(time.time()) + 3600)
