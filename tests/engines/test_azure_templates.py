"""The Bicep files of docs/azure, as far as they can be checked without a compiler."""

import re
from pathlib import Path

import pytest
import yaml

from fl_helpers.cross_silo.federation import read_federation

HERE = Path(__file__).parents[2] / "docs" / "azure"
FILES = sorted(HERE.rglob("*.bicep"))
VERSIONS = {  # of the resource types, as published
    "Microsoft.Authorization/roleAssignments": "2022-04-01",
    "Microsoft.ContainerRegistry/registries": "2023-07-01",
    "Microsoft.KeyVault/vaults": "2023-07-01",
    # The preview has what keeps keys out of jobs, and makes the network at once.
    "Microsoft.MachineLearningServices/workspaces": "2024-10-01 2024-10-01-preview",
    "Microsoft.MachineLearningServices/workspaces/computes": "2024-10-01",
    "Microsoft.MachineLearningServices/workspaces/datastores": "2024-10-01",
    "Microsoft.MachineLearningServices/workspaces/outboundRules": "2024-10-01",
    "Microsoft.ManagedIdentity/userAssignedIdentities": "2023-01-31",
    "Microsoft.Network/privateDnsZones": "2020-06-01",
    "Microsoft.Network/privateDnsZones/virtualNetworkLinks": "2020-06-01",
    "Microsoft.Network/privateEndpoints": "2024-01-01",
    "Microsoft.Network/privateEndpoints/privateDnsZoneGroups": "2024-01-01",
    "Microsoft.Network/virtualNetworks": "2024-01-01",
    "Microsoft.Resources/resourceGroups": "2024-03-01",
    "Microsoft.Storage/storageAccounts": "2023-05-01",
    "Microsoft.Storage/storageAccounts/blobServices": "2023-05-01",
    "Microsoft.Storage/storageAccounts/blobServices/containers": "2023-05-01",
}
STRING = r"'(?:[^'\\\n]|\\.)*'"
by_name = dict(ids=lambda path: path.name)


def code(path):
    """A file without its comments."""
    token = re.compile(rf"({STRING})|//[^\n]*")
    return token.sub(lambda found: found[1] or "", path.read_text())


def blocks(path, kind):
    """{name: text} of declarations, up to the next line that starts one."""
    found = re.split(r"(?m)^(?=(?:param|var|module|resource|output|@)\b|@)", code(path))
    named = (re.match(rf"{kind} (\w+)", text) for text in found)
    return {m[1]: text for m, text in zip(named, found, strict=True) if m}


@pytest.mark.parametrize("path", FILES, **by_name)
def test_brackets_and_strings_are_closed(path):
    text, open_ones = re.sub(STRING, "", code(path)), []
    assert "'" not in text
    for sign in re.findall(r"[\[\](){}]", text):
        if sign in "[({":
            open_ones.append(sign)
        else:
            assert open_ones and open_ones.pop() + sign in ("[]", "()", "{}")
    assert not open_ones


@pytest.mark.parametrize("path", FILES, **by_name)
def test_types_have_the_versions_we_looked_up(path):
    for kind, version in re.findall(r"'(Microsoft[\w./]+)@([\w-]+)'", code(path)):
        assert version in VERSIONS[kind].split()


@pytest.mark.parametrize("path", FILES, **by_name)
def test_what_is_declared_is_used(path):
    text = code(path)
    for kind in ("param", "var"):
        for name in blocks(path, kind):
            assert len(re.findall(rf"\b{name}\b", text)) > 1, name


@pytest.mark.parametrize("path", FILES, **by_name)
def test_modules_get_what_they_ask_for(path):
    for name, text in blocks(path, "module").items():
        target = path.parent / re.match(rf"module \w+ ({STRING})", text)[1].strip("'")
        asked = blocks(target, "param")
        inside = re.search(r"(?s)params: \{(.*?)\n {2,4}\}", text)[1]
        given = set(re.findall(r"(?m)^ +(\w+): ", inside))
        needed = {p for p, text in asked.items() if "=" not in text}
        assert needed <= given <= set(asked), (path.name, name, needed ^ given)
        outputs = blocks(target, "output")
        for used in re.findall(rf"\b{name}(?:\[[^\]]*\])?\.outputs\.(\w+)", code(path)):
            assert used in outputs, f"{name}.outputs.{used}"


def test_no_key_opens_a_store():
    everything = "\n".join(map(code, FILES))
    for word in (
        "listKeys",
        "AccountKey",
        "Sas'",
        "Insights",
        "adminUserEnabled: true",
    ):
        assert word not in everything
    for file in ("store", "workspace"):
        assert "allowSharedKeyAccess: false" in code(HERE / f"modules/{file}.bicep")
    workspace = code(HERE / "modules/workspace.bicep")
    assert "systemDatastoresAuthMode: 'Identity'" in workspace
    datastore = code(HERE / "modules/datastore.bicep")
    assert "credentials: { credentialsType: 'None' }" in datastore


def test_every_compute_pulls_images_and_the_private_network_reaches_the_registry():
    compute = code(HERE / "modules/compute.bicep")
    assert "if (private)" not in compute and "acrPull" in compute
    network = code(HERE / "modules/network.bicep")
    zones = re.search(r"var names = \[(.*)\]", network)[1].split(", ")
    for kind, zone in (("amlworkspace", 0), ("blob", 2), ("registry", 3)):
        assert re.search(rf"kind: '{kind}'\n +zones: \[zones\[{zone}\]", network)
    assert zones[3] == "'privatelink${acr}'"


def test_names_that_azure_limits(tmp_path):
    """3 to 33 characters of an outbound rule: its number; 3 to 32 of a compute."""
    assert "name: 'store-${i}'" in code(HERE / "modules/routes.bicep")
    from . import azure_trial

    for bad in ("ab", "x" * 33, "ends-", "1st", "under_score"):
        content = azure_trial.content()
        content["silos"][0]["azure_ml"]["compute"] = bad
        with pytest.raises(ValueError, match=r"line \d+: silos\[0\].azure_ml.compute"):
            azure_trial.read(tmp_path, content)
    content = azure_trial.content()
    content["silos"][0]["azure_ml"]["datastore"] = "Hospital_A"
    with pytest.raises(ValueError, match="azure_ml.datastore must match"):
        azure_trial.read(tmp_path, content)


def test_a_silo_gets_no_right_on_another_ones_store():
    """By the text of each assignment: the orchestrator is party 0, silo i is i + 1."""
    sandbox, found = HERE / "sandbox.bicep", set()
    for text in blocks(sandbox, "module").values():
        if "rights.bicep" in text:
            fields = dict(re.findall(r"(?m)^ +(\w+): (.+)$", text))
            fields = {k: re.sub(r"stores\[(.+?)\]\.outputs\..*", r"\1", v)
                      for k, v in fields.items()}  # fmt: skip
            keys = ("account", "container", "principal", "role", "condition")
            found.add(tuple(fields.get(key, "") for key in keys))
    assert found == {
        ("i", "i == 0 ? 'runs' : 'data'", "i", "contributor", ""),  # each its own
        ("0", "'runs'", "i + 1", "reader", "readByPath ? modelsOnly : ''"),
        ("0", "outboxes[i]", "i + 1", "contributor", ""),  # its own outbox
        ("0", "outboxes[i]", "0", "reader", ""),
        ("0", "'runs'", "runner", "reader", ""),  # a person downloads the model
    }


def condition():
    """The condition on reading the orchestrator's store, its variables filled in."""
    texts = {
        name: re.search(rf"= ({STRING})", text)
        for name, text in blocks(HERE / "sandbox.bicep", "var").items()
    }
    texts = {k: m[1][1:-1].replace("\\'", "'") for k, m in texts.items() if m}
    found = texts["modelsOnly"]
    while "${" in found:
        found = re.sub(r"\$\{(\w+)\}", lambda m: texts[m[1]], found)
    return found


@pytest.mark.parametrize(
    "allowed, asked",
    [
        (True, {"path": "fl/models/first/0003/model.safetensors"}),
        (False, {"path": "fl/memory/first/0003/memory.safetensors"}),
        (False, {"path": "fl/reports/first/0003/ledger.jsonl"}),
        (False, {"path": "fl/modelsx"}),
        (True, {"operation": "Blob.List", "prefix": "fl/models/first/0003/"}),
        (False, {"operation": "Blob.List", "prefix": "fl/reports/"}),
        (False, {"operation": "Blob.List", "prefix": ""}),
    ],
)
def test_a_silo_reads_and_lists_models_only(allowed, asked):
    """What Azure's documentation says of such a condition, in Python's terms."""
    kind = r"Microsoft\.Storage/storageAccounts/blobServices/containers/blobs"
    text = re.sub(rf"ActionMatches{{'{kind}/read'}}", "True", condition())
    text = re.sub(r"SubOperationMatches{('[\w.]+')}", r"(operation == \1)", text)
    compare = (
        rf"@(?:Resource|Request)\[{kind}:(path|prefix)\] StringStartsWith ('[^']+')"
    )
    text = re.sub(compare, r"\1.startswith(\2)", text).replace("!(", "not (")
    text = text.replace(" AND ", " and ").replace(" OR ", " or ").replace("NOT", "not")
    values = {"operation": "", "path": "", "prefix": ""} | asked
    assert eval(text, {"__builtins__": {}}, values) is allowed


def test_its_outputs_are_a_silos_yaml(tmp_path):
    """Filled in as Azure would, for two silos."""
    outputs = blocks(HERE / "sandbox.bicep", "output")
    line = re.search(r"'(- .*)'", outputs["silosYaml"])[1]
    lines = []
    for silo in ("hospital_a", "hospital_b"):
        text = line.replace("${replace(silo, '_', '-')}", silo.replace("_", "-"))
        lines.append(text.replace("${silo}", silo).replace("FOLDER", "radiographs"))
    space = re.search(r"'(\{sub.*)'", outputs["workspaceYaml"])[1]
    number = "11111111-1111-1111-1111-111111111111"
    space = space.replace("${subscription().subscriptionId}", number)
    space = space.replace("${prefix}", "flchest")
    space = space.replace("${workspace.outputs.name}", "flchest-workspace")
    example = yaml.safe_load(
        (HERE.parents[1] / "fl_helpers/cross_silo/silos.yaml").read_text()
    )
    del example["on_premises"]
    example["silos"] = yaml.safe_load("\n".join(lines))
    example["azure_ml"]["workspace"] = yaml.safe_load(space)
    (tmp_path / "silos.yaml").write_text(yaml.safe_dump(example))
    found = read_federation(tmp_path / "silos.yaml", engine="azure_ml")
    assert [silo.azure_ml.outbox for silo in found.silos] == [
        "updates_hospital_a",
        "updates_hospital_b",
    ]
    assert found.azure_ml.workspace.name == "flchest-workspace"
