"""Is a hospital's pod as closed as the one in `deploy/kubernetes.yaml`?

`python -m fl_helpers.cross_silo.on_premises.pod_policy FILE ...` reads manifests ("-":
standard input, such as what `helm template` prints) and says each weakness with its
field and the remedy. It needs no cluster. PyYAML and the standard library only.
"""

from __future__ import annotations

import argparse
import ipaddress
import posixpath
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

KIT = "/srv/fl/kit"
WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job")
HARMLESS = ("Namespace", "PersistentVolumeClaim", "PersistentVolume", "ConfigMap")
HARMLESS += ("ServiceAccount", "ResourceQuota", "LimitRange", "PodDisruptionBudget")
DNS = {"kubernetes.io/metadata.name": "kube-system"}  # labels of its namespace


class Pod(NamedTuple):
    """A pod's `spec` in a workload: where it stands, and what selects it."""

    where: str
    namespace: str
    labels: Mapping[str, Any]
    spec: Any


def weaknesses(documents: Iterable[Any]) -> list[str]:
    """What makes these manifests weaker than the shipped one, as "where: field is
    value; remedy"; none is an empty list.

    documents: as YAML gives them, all that concerns the pod together; not modified. A
    kind that is not known here is named, too: nobody has looked at it.
    """
    documents = [*_flat(documents)]
    pods = [pod for pod in map(_pod, documents) if pod]
    found = [] if pods else ["no workload: give the manifest with the hospital's pod"]
    for document in documents:
        found += _other(document)
    policies = [d for d in documents if _at(d, "kind") == "NetworkPolicy"]
    for pod in pods:
        found += [*_pod_rules(pod), *_container_rules(pod), *_network(pod, policies)]
    return found


def _flat(documents: Iterable[Any]) -> Iterator[Any]:
    for document in documents:
        if str(_at(document, "kind")).endswith("List"):
            yield from _flat(_each(document, "items"))
        elif document is not None:
            yield document


def _at(found: Any, *keys: str) -> Any:
    """What stands there, or None."""
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _each(found: Any, *keys: str) -> list[Any]:
    """The list that stands there; what is no list is one entry, which no rule takes."""
    here = _at(found, *keys)
    return here if isinstance(here, list) else [] if here is None else [here]


def _where(document: Any) -> str:
    return f"{_at(document, 'kind')} {_at(document, 'metadata', 'name')}"


def _pod(document: Any) -> Pod | None:
    kind, body = _at(document, "kind"), _at(document, "spec")
    if kind == "CronJob":
        body = _at(body, "jobTemplate", "spec")
    if kind in (*WORKLOADS, "CronJob"):
        body = _at(body, "template")
    elif kind == "Pod":
        body = document
    else:
        return None
    labels = _at(body, "metadata", "labels")
    space = _at(document, "metadata", "namespace") or "default"
    named = labels if isinstance(labels, Mapping) else {}
    return Pod(_where(document), space, named, _at(body, "spec"))


def _other(document: Any) -> Iterator[str]:
    """What stands beside the pods, and how many of them there are."""
    kind, where = _at(document, "kind"), _where(document)
    if kind == "Secret" and (_at(document, "data") or _at(document, "stringData")):
        remedy = "make it from the kit with kubectl create secret, keep it in no file"
        yield f"{where}: data holds a secret in plain text; {remedy}"
    elif kind in ("Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"):
        remedy = "delete it: a hospital starts its workers itself, in its own pod"
        yield f"{where}: kind is {kind!r}, a right in the cluster; {remedy}"
    elif kind not in (*HARMLESS, *WORKLOADS, "CronJob", "Pod", "NetworkPolicy"):
        if kind != "Secret":
            yield f"{where}: kind is {kind!r}, not known here; look at it yourself"
    count = _at(document, "spec", "replicas")
    if kind == "DaemonSet" or (kind in WORKLOADS and count not in (None, 0, 1)):
        remedy = "set 1: two pods would be one hospital twice"
        yield f"{where}: spec.replicas is {count!r}; {remedy}"


def _pod_rules(pod: Pod) -> Iterator[str]:
    if _at(pod.spec, "automountServiceAccountToken") is not False:
        value = _at(pod.spec, "automountServiceAccountToken")
        remedy = "set false: the pod must have no right in the cluster"
        yield f"{pod.where}: automountServiceAccountToken is {value!r}; {remedy}"
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if value := _at(pod.spec, field):
            remedy = "delete it: no firewall and no other process of the node is ours"
            yield f"{pod.where}: {field} is {value!r}; {remedy}"
    for volume in _each(pod.spec, "volumes"):
        field = f"volumes[{_at(volume, 'name')}]"
        if _at(volume, "hostPath") is not None:
            remedy = "take a claim: the node's own files must stay out of reach"
            yield f"{pod.where}: {field}.hostPath is there; {remedy}"
        for source in _each(volume, "projected", "sources"):
            if _at(source, "serviceAccountToken") is not None:
                remedy = "delete it: the pod must have no right in the cluster"
                yield f"{pod.where}: {field} has a serviceAccountToken; {remedy}"


def _container_rules(pod: Pod) -> Iterator[str]:
    kinds = ("containers", "initContainers", "ephemeralContainers")
    boxes = _each(pod.spec, "containers")
    passing = [
        _at(v, "name")
        for v in _each(pod.spec, "volumes")
        if _at(v, "emptyDir") is not None
    ]
    mounts = [mount for box in boxes for mount in _each(box, "volumeMounts")]
    held = [_at(m, "name") for m in mounts if _at(m, "mountPath") == KIT]
    if not held or any(name in passing for name in held):
        remedy = "mount a claim there: ledger and accounts must outlive the pod"
        yield f"{pod.where}: volumeMounts[{KIT}] is no claim; {remedy}"
    for kind in kinds:
        for container in _each(pod.spec, kind):
            where = f"{pod.where}: {kind}[{_at(container, 'name')}]"
            for rule in (_security, _supplies, _mounts):
                yield from (f"{where}.{said}" for said in rule(container, pod.spec))


def _security(container: Any, spec: Any) -> Iterator[str]:
    def own(*keys: str) -> Any:
        return _at(container, "securityContext", *keys)

    def either(key: str) -> Any:  # the container's own wins
        found = own(key)
        return _at(spec, "securityContext", key) if found is None else found

    wanted = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True}
    for key, value in wanted.items():
        if own(key) is not value:
            yield f"securityContext.{key} is {own(key)!r}; set {str(value).lower()}"
    if own("privileged"):
        yield "securityContext.privileged is true; delete it: it undoes all the others"
    if either("runAsNonRoot") is not True:
        said = f"securityContext.runAsNonRoot is {either('runAsNonRoot')!r}"
        yield f"{said}; set true, the image has the user 10001"
    if either("runAsUser") == 0:
        yield "securityContext.runAsUser is 0; set 10001, the image's user"
    profile = _at(either("seccompProfile"), "type")
    if profile not in ("RuntimeDefault", "Localhost"):
        yield f"securityContext.seccompProfile.type is {profile!r}; set RuntimeDefault"
    if "ALL" not in _each(container, "securityContext", "capabilities", "drop"):
        dropped = own("capabilities", "drop")
        yield f"securityContext.capabilities.drop is {dropped!r}; set [ALL]"
    if added := own("capabilities", "add"):
        yield f"securityContext.capabilities.add is {added!r}; delete it: none is used"
    if own("procMount") not in (None, "Default"):
        yield f"securityContext.procMount is {own('procMount')!r}; delete it"


def _supplies(container: Any, spec: Any) -> Iterator[str]:
    """Image, resources, environment, ports."""
    image = _at(container, "image")
    if not re.search(r"@sha256:[0-9a-f]{64}$", str(image)):
        remedy = "name it by digest, registry/name@sha256:...: a tag can be moved"
        yield f"image is {image!r}; {remedy}"
    for kind, what in (("requests", "cpu"), ("requests", "memory")) + (
        ("limits", "memory"),
    ):
        if _at(container, "resources", kind, what) is None:
            remedy = "set it: else one pod can take the node's memory or starve"
            yield f"resources.{kind}.{what} is None; {remedy}"
    given = [_at(e, "valueFrom", "secretKeyRef") for e in _each(container, "env")]
    given += [_at(each, "secretRef") for each in _each(container, "envFrom")]
    for secret in filter(None, given):
        remedy = "mount it as a read-only file: all processes inherit the environment"
        yield f"env has the secret {_at(secret, 'name')!r}; {remedy}"
    for port in _each(container, "ports"):
        if value := _at(port, "hostPort"):
            yield f"ports.hostPort is {value!r}; delete it: nothing connects here"


def _mounts(container: Any, spec: Any) -> Iterator[str]:
    volumes = {str(_at(v, "name")): v for v in _each(spec, "volumes")}
    read_only, writable = set(), set()
    for mount in _each(container, "volumeMounts"):
        path = posixpath.normpath(str(_at(mount, "mountPath")))
        volume = volumes.get(str(_at(mount, "name")))
        if _at(mount, "readOnly") is True:
            read_only.add(path)
            continue
        writable.add(path)
        if _at(volume, "emptyDir") is None and path != KIT:
            secret = any(_at(volume, kind) for kind in ("secret", "projected"))
            what = "keys" if secret else "data, code and policy"
            remedy = f"set true: {what} must not change under a run"
            value = _at(mount, "readOnly")
            yield f"volumeMounts[{path}].readOnly is {value!r}; {remedy}"
    for path in (f"{KIT}/startup", f"{KIT}/local"):
        if KIT in writable and path not in read_only:
            remedy = "mount the kit's folder there, read-only: key and policy"
            yield f"volumeMounts[{path}] is not there or not read-only; {remedy}"
    if _each(container, "volumeDevices"):
        yield "volumeDevices is there; delete it: a raw device has no rights of files"


# ---- the network


def _network(pod: Pod, policies: list[Any]) -> Iterator[str]:
    """All policies that may select a pod count, for what one allows is allowed."""
    mine = [each for each in policies if _selects(each, pod)]
    sure = [e for e in mine if not _at(e, "spec", "podSelector", "matchExpressions")]
    for kind in ("Ingress", "Egress"):
        if not any(kind in _each(each, "spec", "policyTypes") for each in sure):
            remedy = f"add a NetworkPolicy that selects it, with policyTypes [{kind}]"
            yield f"{pod.where}: no NetworkPolicy closes its {kind.lower()}; {remedy}"
    servers = set()
    for policy in mine:
        where = _where(policy)
        if _each(policy, "spec", "ingress"):
            remedy = "delete it: nothing connects to a hospital"
            yield f"{where}: spec.ingress allows connections; {remedy}"
        for number, rule in enumerate(_each(policy, "spec", "egress")):
            field = f"{where}: spec.egress[{number}]"
            yield from (f"{field}.{said}" for said in _egress(rule))
            cidrs = [_at(peer, "ipBlock", "cidr") for peer in _each(rule, "to")]
            servers |= {str(cidr) for cidr in cidrs if cidr is not None}
    if len(servers) > 1:
        remedy = "leave the coordinator's server only"
        yield f"{pod.where}: spec.egress allows {sorted(servers)}; {remedy}"


def _selects(policy: Any, pod: Pod) -> bool:
    """Whether it may select the pod; expressions are not worked out here."""
    if (_at(policy, "metadata", "namespace") or "default") != pod.namespace:
        return False
    wanted = _at(policy, "spec", "podSelector", "matchLabels") or {}
    return isinstance(wanted, Mapping) and wanted.items() <= pod.labels.items()


def _egress(rule: Any) -> Iterator[str]:
    ports = [(_at(p, "protocol"), _at(p, "port")) for p in _each(rule, "ports")]
    whole = any(_at(port, "endPort") for port in _each(rule, "ports"))
    if not ports or whole or not all(isinstance(n, int) for _, n in ports):
        remedy = "list the server's port as {protocol: TCP, port: 8002}"
        yield f"ports is {_at(rule, 'ports')!r}; {remedy}"
    if not _each(rule, "to"):
        yield "to is empty, which is everybody; name the server's address"
    for peer in _each(rule, "to"):
        cidr = _at(peer, "ipBlock", "cidr")
        space = _at(peer, "namespaceSelector", "matchLabels")
        if cidr is None and space == DNS and all(n == 53 for _, n in ports):
            continue
        if cidr is None:
            remedy = "name the server's address as an ipBlock; of the cluster only DNS"
            yield f"to is {peer!r}; {remedy}"
        elif not _is_one(cidr):
            yield f"to.ipBlock.cidr is {cidr!r}; name one address, 203.0.113.7/32 say"


def _is_one(cidr: Any) -> bool:
    try:
        return ipaddress.ip_network(str(cidr)).num_addresses == 1
    except ValueError:
        return False


def main() -> None:
    """Exit code 0: as closed as the shipped one; 1: weaker; 2: it cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="- is standard input")
    documents = []
    for name in parser.parse_args().files:
        try:
            text = sys.stdin.read() if name == "-" else Path(name).read_text("utf-8")
            documents += [*yaml.safe_load_all(text)]
        except (OSError, ValueError, yaml.YAMLError) as error:
            print(f"{name} cannot be read: {error}", file=sys.stderr)
            sys.exit(2)
    found = weaknesses(documents)
    print("\n".join(found) or "as closed as the manifest that this project ships")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
