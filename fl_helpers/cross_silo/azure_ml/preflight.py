"""Look at all that a run on Azure ML needs, before it is sent.

It only reads, and it sees what the one who asks may see: not what the silos' identities
may do in the stores. That is decided where they are created, see docs/azure/.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from fl_helpers.cross_silo.azure_ml.problems import AzureProblem, explain
from fl_helpers.cross_silo.azure_ml.workspace import sign_in
from fl_helpers.cross_silo.federation import Federation, Party

ARM, PROVIDER = "https://management.azure.com", "Microsoft.MachineLearningServices"
NEEDED = [  # what somebody must be allowed to do in the workspace to send a run
    f"{PROVIDER}/workspaces/{action}"
    for action in (
        *("computes/read", "datastores/read", "jobs/read", "jobs/write"),
        *("codes/versions/write", "components/versions/write"),
        *("environments/versions/write", "experiments/runs/submit/action"),
    )
]


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was found, and what is wrong with it, "" if nothing."""

    party: str
    what: str
    name: str
    found: str
    problem: str = ""


def preflight(
    client: Any, federation: Federation, *, credential: Any = None
) -> list[Finding]:
    """Look at permissions, computes, quotas, identities, datastores, environment.

    client, credential: as of `workspace.connect`. Raises AzureProblem with all that is
    wrong at once.
    """
    parties = federation.parties
    computes = {p: _ask(lambda p=p: client.compute.get(p.compute)) for p in parties}
    clusters = {p: compute for p, (compute, _) in computes.items() if compute}
    findings = [_permissions(federation, credential or sign_in())]
    findings += [_compute(party, *found) for party, found in computes.items()]
    findings += [*_identities(clusters), *_quotas(client, list(clusters.values()))]
    findings += _datastores(client, federation)
    findings += [*_assets(client, federation)]
    wrong = [
        f"{f.party}: {f.what} {f.name!r}: {f.problem}" for f in findings if f.problem
    ]
    if wrong:
        raise AzureProblem("\n- ".join(["not ready:", *wrong]))
    return findings


def _ask(call: Callable[[], Any]) -> tuple[Any, str]:
    """(answer, "") or (None, what is wrong)."""
    from azure.core.exceptions import AzureError

    try:
        return call(), ""
    except AzureError as error:
        return None, explain(error)


def _permissions(federation: Federation, credential: Any) -> Finding:
    """Whether you may send a run, as far as the resource manager tells."""
    space = federation.azure_ml.workspace
    found, problem = _ask(lambda: _read_permissions(space, credential))
    missing = [action for action in NEEDED if not _may(action, found or ())]
    if missing and not problem:
        names = ", ".join(action.split("/", 2)[2] for action in missing)
        problem = f"a role is missing for {names}; ask the workspace's owner for "
        problem += "`AzureML Data Scientist`"
    seen = f"{len(NEEDED) - len(missing)} of {len(NEEDED)} that are needed"
    return Finding("you", "permissions in", space.name, seen, problem)


def _may(action: str, permissions: Iterable[dict[str, Any]]) -> bool:
    def holds(patterns: list[str]) -> bool:
        return any(fnmatchcase(action.lower(), each.lower()) for each in patterns)

    return any(
        holds(p["actions"]) and not holds(p.get("notActions") or [])
        for p in permissions
    )


def _read_permissions(space: Any, credential: Any) -> list[dict[str, Any]]:
    """What azure-ai-ml does not ask the resource manager for."""
    from azure.core import PipelineClient
    from azure.core.pipeline.policies import BearerTokenCredentialPolicy, RetryPolicy
    from azure.core.rest import HttpRequest

    link = f"{ARM}/subscriptions/{space.subscription_id}/resourceGroups/"
    link += f"{space.resource_group}/providers/{PROVIDER}/workspaces/{space.name}"
    link += "/providers/Microsoft.Authorization/permissions?api-version=2022-04-01"
    token = BearerTokenCredentialPolicy(credential, f"{ARM}/.default")
    found = []
    with PipelineClient(ARM, policies=[RetryPolicy(), token]) as arm:
        while link:
            answer = arm.send_request(HttpRequest("GET", link))
            answer.raise_for_status()
            found += answer.json()["value"]
            link = answer.json().get("nextLink")
    return found


def _compute(party: Party, compute: Any, problem: str) -> Finding:
    seen = ""
    if compute:
        low, high = (getattr(compute, f"{m}_instances", None) for m in ("min", "max"))
        nodes = f", {compute.size}, {low} to {high} nodes" if high is not None else ""
        seen = f"{compute.type}{nodes}"
        state = compute.provisioning_state
        state = getattr(state, "value", state)
        if state != "Succeeded":
            problem = f"it is {state}; look at it in the studio"
        elif high is not None and high < 1:
            problem = "it can have no nodes; raise its maximum"
        elif compute.type not in ("amlcompute", "kubernetes"):
            problem = f"it is a {compute.type}; use a cluster or Kubernetes"
    return Finding(party.name, "compute", party.compute, seen, problem)


def _identities(clusters: dict[Party, Any]) -> Iterator[Finding]:
    """Each compute has one of its own: it alone decides what the jobs may reach."""
    owners: dict[str, str] = {}
    for party, compute in clusters.items():
        identity = getattr(compute, "identity", None)
        given = getattr(identity, "user_assigned_identities", None) or ()
        found = [each.resource_id for each in given]
        found += filter(None, [getattr(identity, "principal_id", None)])
        problem = ""
        if not found:
            problem = "it has none; give it one with rights on its own store only"
        for key in found:
            other = owners.setdefault(key.lower(), party.name)
            if other != party.name:
                problem = f"{other!r} has it, too; each party needs its own"
        name = ", ".join(key.rpartition("/")[2] for key in found)
        yield Finding(party.name, "identity", party.compute, name, problem)


def _quotas(client: Any, computes: list[Any]) -> Iterator[Finding]:
    """Whether one machine of each fits into the limits of its family, all at once."""
    clusters = [each for each in computes if each.type == "amlcompute"]
    for region in sorted({cluster.location for cluster in clusters}):
        sizes, problem = _ask(lambda r=region: [*client.compute.list_sizes(location=r)])
        usages, why = _ask(lambda r=region: [*client.compute.list_usage(location=r)])
        if problem or why:
            yield Finding("all", "quota in", region, "", problem or why)
            continue
        # azure-ai-ml 1.35 fills these under the service's own names only.
        cores = {s.name.lower(): (s.family, vars(s).get("vCPUs", 0)) for s in sizes}
        needed: Counter[str] = Counter()
        for cluster in clusters:
            family, count = cores.get(cluster.size.lower(), ("", 0))
            needed[family] += count if cluster.location == region else 0
        for family, count in needed.items():
            for usage in usages:
                text = "".join(str(usage.name).split()).lower()
                if not family or family.lower() not in text or "lowpriority" in text:
                    continue
                if not _counts(str(usage.id), client.workspace_name):
                    continue
                seen = f"{family}: {count} cores needed, limit {usage.limit}, "
                seen += f"{vars(usage).get('currentValue')} in use"
                short = 0 <= usage.limit < count
                problem = f"{seen}; ask for more in the portal, Quotas" if short else ""
                yield Finding("all", "quota in", region, seen, problem)


def _counts(limit: str, workspace: str) -> bool:
    """Whether a limit, by its id, is the subscription's or this workspace's."""
    of_another = "/workspaces/" in limit and f"/workspaces/{workspace}/" not in limit
    return not of_another and "/computes/" not in limit


def _datastores(client: Any, federation: Federation) -> Iterator[Finding]:
    """There, without a key in it, and no two parties in one container."""
    owners: dict[tuple[str, ...], str] = {}
    names = {party.datastore: party for party in federation.parties}
    main = federation.azure_ml.orchestrator
    names |= {party.outbox: main for party in federation.parties if party.outbox}
    for name, party in names.items():
        store, problem = _ask(lambda name=name: client.datastores.get(name))
        seen = ""
        if store:
            parts = ("container_name", "filesystem", "file_share_name")
            held = next((v for p in parts if (v := getattr(store, p, None))), "")
            seen = f"{store.account_name}/{held}"
            other = owners.setdefault((store.account_name, held), party.name)
            if other != party.name:
                problem = f"it is {seen}, as one of {other!r}; each party needs its own"
            elif type(store.credentials).__name__ != "NoneCredentialConfiguration":
                problem = "it holds a key, which all jobs of the workspace can use; "
                problem += "register it without credentials"
        yield Finding(party.name, "datastore", name, seen, problem)


def _assets(client: Any, federation: Federation) -> Iterator[Finding]:
    """The environment is there; a silo's data asset is in its own datastore."""
    named = federation.azure_ml.environment
    if named.startswith("azureml:") and "/" not in named:
        name, version = named.removeprefix("azureml:").split(":")
        _, problem = _ask(lambda: client.environments.get(name, version))
        yield Finding("all", "environment", name, version, problem)
    for party in federation.parties:
        if not party.data.startswith("azureml:"):
            continue
        name, version = party.data.removeprefix("azureml:").split(":")
        asset, problem = _ask(lambda n=name, v=version: client.data.get(n, v))
        path = str(asset.path) if asset else ""
        below = path.partition("/datastores/")[2]
        if asset and not below.startswith(f"{party.datastore}/paths/"):
            problem = f"it is {path}, not in its own datastore {party.datastore!r}"
        yield Finding(party.name, "data asset", name, path, problem)
