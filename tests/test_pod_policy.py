"""The shipped pod is closed, each weaker one is found, and says what to do."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_helpers.cross_silo.on_premises import pod_policy

ROOT = Path(__file__).parent.parent
FILE = ROOT / "deploy" / "kubernetes.yaml"
POD = [2, "spec", "template", "spec"]
BOX = [*POD, "containers", 0]
SAFE = [*BOX, "securityContext"]
NET = [1, "spec"]
SECRET = {"name": "key", "valueFrom": {"secretKeyRef": {"name": "fl-startup"}}}
TOKEN = {"projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}}
GONE = object()


@pytest.fixture
def documents():
    return [*yaml.safe_load_all(FILE.read_text())]


def change(documents, path, value):
    *way, last = path
    here = documents
    for step in way:
        here = here[step]
    if value is GONE:
        del here[last]
    elif last == "+":
        here.append(value)
    else:
        here[last] = value
    return documents


def test_the_shipped_one_has_no_weakness(documents):
    before = copy.deepcopy(documents)
    assert pod_policy.weaknesses(documents) == []
    assert documents == before


WEAKER = {  # what is changed: where, to what; the field that is named, and the remedy
    "root": ([*POD, "securityContext", "runAsUser"], 0, "runAsUser", "10001"),
    "may be root": ([*POD, "securityContext", "runAsNonRoot"], GONE, "runAsNonRoot",
                    "set true"),
    "root in the container": ([*SAFE, "runAsNonRoot"], False, "runAsNonRoot",
                              "set true"),
    "root may be written": ([*SAFE, "readOnlyRootFilesystem"], GONE,
                            "readOnlyRootFilesystem is None", "set true"),
    "token": ([*POD, "automountServiceAccountToken"], True,
              "automountServiceAccountToken is True", "set false"),
    "another token": ([*POD, "volumes", "+"], {"name": "t", **TOKEN}, "volumes[t]",
                      "delete it"),
    "capabilities": ([*SAFE, "capabilities"], GONE, "capabilities.drop", "set [ALL]"),
    "one capability": ([*SAFE, "capabilities", "add"], ["NET_RAW"],
                       "capabilities.add is ['NET_RAW']", "delete it"),
    "no seccomp": ([*POD, "securityContext", "seccompProfile", "type"], "Unconfined",
                   "seccompProfile.type is 'Unconfined'", "set RuntimeDefault"),
    "gains privileges": ([*SAFE, "allowPrivilegeEscalation"], GONE,
                         "allowPrivilegeEscalation", "set false"),
    "privileged": ([*SAFE, "privileged"], True, "privileged", "delete it"),
    "unmasked": ([*SAFE, "procMount"], "Unmasked", "procMount", "delete it"),
    "a tag": ([*BOX, "image"], "registry.hospital.example/fl-hospital:1.0",
              "image is 'registry.hospital.example/fl-hospital:1.0'", "by digest"),
    "no limit": ([*BOX, "resources", "limits"], GONE, "resources.limits.memory",
                 "set it"),
    "all may be reached": ([*NET, "egress", 0, "to"], GONE, "egress[0].to",
                           "name the server's address"),
    "a network": ([*NET, "egress", 0, "to", 0, "ipBlock", "cidr"], "0.0.0.0/0",
                  "cidr is '0.0.0.0/0'", "one address"),
    "the cluster": ([*NET, "egress", 0, "to", "+"], {"namespaceSelector": {}},
                    "namespaceSelector", "ipBlock"),
    "another server": ([*NET, "egress", 0, "to", "+"],
                       {"ipBlock": {"cidr": "198.51.100.9/32"}}, "198.51.100.9/32",
                       "server only"),
    "all ports": ([*NET, "egress", 0, "ports"], GONE, "egress[0].ports", "8002"),
    "a range of ports": ([*NET, "egress", 0, "ports", 0, "endPort"], 9000,
                         "egress[0].ports", "8002"),
    "no rule for egress": ([*NET, "policyTypes"], ["Ingress"], "egress",
                           "policyTypes [Egress]"),
    "of another pod": ([*NET, "podSelector", "matchLabels"], {"app": "other"},
                       "no NetworkPolicy", "selects it"),
    "of another namespace": ([1, "metadata", "namespace"], "default",
                             "no NetworkPolicy", "selects it"),
    "of some": ([*NET, "podSelector", "matchExpressions"],
                [{"key": "app", "operator": "Exists"}], "no NetworkPolicy",
                "selects it"),
    "a door": ([*NET, "ingress"], [{}], "spec.ingress", "delete it"),
    "data": ([*BOX, "volumeMounts", 4, "readOnly"], GONE, "[/srv/fl/data].readOnly",
             "set true"),
    "keys": ([*BOX, "volumeMounts", 1, "readOnly"], False,
             "[/srv/fl/kit/startup].readOnly", "set true: keys"),
    "policy in the kit": ([*BOX, "volumeMounts", 2], GONE, "[/srv/fl/kit/local]",
                          "read-only"),
    "no kit": ([*BOX, "volumeMounts", 0], GONE, "[/srv/fl/kit] is no claim", "outlive"),
    "a kit that goes": ([*BOX, "volumeMounts", 0, "name"], "tmp",
                        "[/srv/fl/kit] is no claim", "outlive"),
    "files of the node": ([*POD, "volumes", "+"],
                          {"name": "h", "hostPath": {}}, "volumes[h].hostPath",
                         "take a claim"),
    "the node's network": ([*POD, "hostNetwork"], True, "hostNetwork", "delete it"),
    "a secret inherited": ([*BOX, "env"], [SECRET], "'fl-startup'", "read-only file"),
    "a port of the node": ([*BOX, "ports"], [{"containerPort": 1, "hostPort": 1}],
                           "hostPort", "delete it"),
    "two of one": ([2, "spec", "replicas"], 2, "spec.replicas is 2", "set 1"),
    "a second container": ([*POD, "initContainers"], [{"name": "init", "image": "x"}],
                           "initContainers[init].image", "by digest"),
    "a right": (["+"], {"kind": "RoleBinding", "metadata": {"name": "r"}},
                "RoleBinding r", "delete it"),
    "a key in the file": (["+"], {"kind": "Secret", "data": {"client.key": "x"}},
                          "Secret None: data", "kubectl create secret"),
    "of other makers": (["+"], {"kind": "CiliumNetworkPolicy"},
                        "'CiliumNetworkPolicy', not known", "look at it yourself"),
}  # fmt: skip


@pytest.mark.parametrize("weaker", WEAKER)
def test_a_weaker_one_is_found_with_field_and_remedy(documents, weaker):
    path, value, field, remedy = WEAKER[weaker]
    found = pod_policy.weaknesses(change(documents, path, value))
    assert any(field in said and remedy in said for said in found), found
    assert all("; " in said for said in found)


def test_what_is_as_closed_in_other_words_is_accepted(documents):
    dns = {"namespaceSelector": {"matchLabels": pod_policy.DNS}}
    ports = [{"protocol": "UDP", "port": 53}]
    change(documents, [*NET, "egress", "+"], {"to": [dns], "ports": ports})
    change(documents, [*NET, "podSelector"], {"matchLabels": {"app": "fl-hospital"}})
    body = documents[2]["spec"]["template"]
    profile = body["spec"]["securityContext"].pop("seccompProfile")
    change(documents, [*SAFE, "seccompProfile"], profile)
    assert pod_policy.weaknesses(documents) == []
    documents[2]["kind"] = "Deployment"
    assert pod_policy.weaknesses([{"kind": "List", "items": documents}]) == []
    volume = {"name": "kit", "persistentVolumeClaim": {"claimName": "kit"}}
    body["spec"]["volumes"].append(volume)
    documents[2] = {"kind": "Pod", **body, "metadata": documents[2]["metadata"]}
    documents[2]["metadata"]["labels"] = {"app": "fl-hospital"}
    assert pod_policy.weaknesses(documents) == []
    # DNS of the cluster on another port is a way to any pod of that namespace.
    ports[0]["port"] = 443
    assert pod_policy.weaknesses(documents)


def places(found, path=()):
    if isinstance(found, dict | list):
        keys = found if isinstance(found, dict) else range(len(found))
        for key in keys:
            yield [*path, key]
            yield from places(found[key], (*path, key))


SHIPPED = [*yaml.safe_load_all(FILE.read_text())]
ALL = [*places(SHIPPED)]
CLOSING = [p for p in ALL if "securityContext" in p[:-1] and p[-1] not in (
    "fsGroup", "fsGroupChangePolicy", "runAsGroup", "runAsUser")]  # fmt: skip


def test_no_line_that_closes_can_be_left_out(documents):
    assert len(CLOSING) == 8  # 3 of the pod, 5 of the container
    for path in CLOSING:
        left = change(copy.deepcopy(documents), path, GONE)
        assert pod_policy.weaknesses(left), path


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(ALL),
    st.sampled_from([None, 1, "x", True, [], {}, [1], [[]], {"a": []}, [{"name": {}}]]),
)
def test_no_nonsense_makes_it_fail(path, junk):
    documents = copy.deepcopy(SHIPPED)
    found = pod_policy.weaknesses(change(documents, path, copy.deepcopy(junk)))
    assert all(isinstance(said, str) for said in found)


def test_the_command_says_it_by_its_exit_code(documents, tmp_path):
    def command(*files, given=""):
        line = [sys.executable, "-m", pod_policy.__name__, *map(str, files)]
        done = subprocess.run(line, input=given, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    assert command(FILE) == (0, "as closed as the manifest that this project ships\n")
    weak = json.dumps(change(documents, [*POD, "hostPID"], True)[2])
    code, said = command("-", given=weak)
    assert code == 1 and "StatefulSet fl-hospital: hostPID is True; delete" in said
    (tmp_path / "bad.yaml").write_text("a: [")
    for bad in (tmp_path / "bad.yaml", tmp_path / "none.yaml"):
        code, said = command(bad)
        assert code == 2 and f"{bad} cannot be read" in said
    assert command("-")[0] == 1  # nothing at all is not closed


@pytest.mark.parametrize("version", ["1.29", "1.37"])
def test_the_shipped_one_has_kubernetes_published_types(documents, version):
    types = pytest.importorskip("kubernetes_validate")
    for document in documents:
        types.validate(document, version, strict=True)
    change(documents, [*SAFE, "readOnlyRootFilesytem"], True)
    with pytest.raises(types.ValidationError, match="readOnlyRootFilesytem"):
        types.validate(documents[2], version, strict=True)
