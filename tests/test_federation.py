"""`silos.yaml`: one reader for all engines; an error says file, line and key."""

import re
from pathlib import Path

import pytest
import yaml

from fl_helpers.cross_silo import federation
from fl_helpers.cross_silo.federation import read_federation

EXAMPLE = Path(federation.__file__).with_name("silos.yaml")
NAMES = ["Hospital A", "Hospital B", "Hospital C", "Hospital D"]


def content(*engines):
    """The example, with the sections of some engines only."""
    found = yaml.safe_load(EXAMPLE.read_text())
    for engine in {"on_premises", "azure_ml"} - {*engines}:
        for part in (found, *found["silos"]):
            del part[engine]
    return found


def read(tmp_path, found, engine=None):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(found))
    return read_federation(tmp_path / "mine.yaml", engine=engine)


def test_the_example_file_serves_both_engines():
    found = read_federation(EXAMPLE)
    assert [silo.name for silo in found.silos] == NAMES
    first = found.silos[0]
    assert first.on_premises.data == str(EXAMPLE.parent / "data/hospital_a")
    assert first.azure_ml.key == "hospital_a"
    assert first.azure_ml.outbox == found.azure_ml.orchestrator.datastore
    assert found.azure_ml.released == {"model_update", "scores"}
    assert (found.on_premises.host, found.on_premises.port) == ("localhost", 0)


def test_a_section_that_nobody_needs_may_be_left_out(tmp_path):
    for used, other in (("on_premises", "azure_ml"), ("azure_ml", "on_premises")):
        found = read(tmp_path, content(used), used)
        assert getattr(found, other) is None and getattr(found, used) is not None
        assert {getattr(silo, other) for silo in found.silos} == {None}
        with pytest.raises(ValueError, match=rf"line \d: {other}\.\w+.* is missing"):
            read(tmp_path, content(used), other)


def test_silos_are_in_the_order_of_their_names(tmp_path):
    found = content("on_premises", "azure_ml")
    found["silos"].reverse()
    silos = read(tmp_path, found).silos
    assert [silo.name for silo in silos] == NAMES
    assert [silo.azure_ml.compute[-1] for silo in silos] == list("abcd")


def test_a_functions_file_is_beside_the_silos_yaml(tmp_path):
    found = content("on_premises", "azure_ml")
    found["azure_ml"]["client"] = "mine.py:client"
    made = read(tmp_path, found)
    assert made.azure_ml.client == f"{tmp_path}/mine.py:client"
    assert made.on_premises.client == "fl_helpers.cross_silo.hospital:client"


def test_only_some_silos():
    some = read_federation(EXAMPLE).only(["Hospital D", "Hospital B"])
    assert [silo.name for silo in some.silos] == ["Hospital B", "Hospital D"]
    with pytest.raises(ValueError, match=r"no such silos: \['Hospital E'\]"):
        some.only(["Hospital B", "Hospital E"])


def silo(number, section=None, **change):
    """A change of one silo, or of its section for an engine."""
    return lambda c: (c["silos"][number][section] if section else c["silos"][number]
                      ).update(change)  # fmt: skip


ANY = [
    (lambda c: c["silos"][1].pop("name"), r"silos\[1\].name is missing"),
    (lambda c: c.pop("project"), "project is missing"),
    (lambda c: c.update(rounds=3), "rounds is not a known key"),
    (silo(0, x=1), r"silos\[0\].x is not a known key"),
    (lambda c: c.update(silos=[]), r"silos\[0\].name is missing"),
    (lambda c: c["silos"].append("me"), r"silos\[4\] needs keys of its own"),
    (silo(1, name="a/b"), r"silos\[1\].name must match"),
    (silo(1, name=7), r"silos\[1\].name must match .* got 7"),
    (silo(1, name="Hospital A"), r"silos\[1\].name .* used twice"),
    (silo(1, name="Hospital-A"), r"silos\[1\].name .* used twice"),
]
ON_PREMISES = [
    (lambda c: c.pop("on_premises"), "on_premises.admin is missing"),
    (lambda c: c["on_premises"].pop("port"), "on_premises.port is missing"),
    (
        lambda c: c["silos"][1]["on_premises"].pop("data"),
        r"silos\[1\].on_premises.data is missing",
    ),
    (lambda c: c.update(on_premises="me"), "on_premises needs keys .* on_premises.adm"),
    (silo(0, name="server"), r"silos\[0\].name .* twice: reserved"),
    (lambda c: c["on_premises"].update(port=70000), "port must be at most 65535"),
    (lambda c: c["on_premises"].update(port=True), "on_premises.port must match"),
    (lambda c: c["on_premises"].update(host="fl.org"), "port 0 .* localhost only"),
    (lambda c: c["on_premises"].update(admin="me"), "on_premises.admin must match"),
    (lambda c: c["on_premises"].update(client="x"), "on_premises.client must match"),
]
AZURE = [
    (lambda c: c.pop("azure_ml"), "azure_ml.workspace.subscription_id is missing"),
    (
        lambda c: c["silos"][1].pop("azure_ml"),
        r"silos\[1\].azure_ml.compute is miss",
    ),
    (lambda c: c.update(silos=c["silos"][:1]), r"silos\[1\].name is missing"),
    (silo(1, name="Hospital-A"), r"key 'hospital_a', used twice: silos\[0\].name"),
    (silo(1, name="Orchestrator"), "key 'orchestrator', used twice: orchestrator"),
    (
        silo(1, "azure_ml", compute="Hospital-A"),
        r"gives the compute 'Hospital-A', used twice: silos\[0\].azure_ml.compute",
    ),
    (
        silo(1, "azure_ml", datastore="orchestrator"),
        "gives the datastore 'orchestrator', used twice: orchestrator",
    ),
    (
        silo(1, "azure_ml", outbox="hospital_a"),
        r"outbox 'hospital_a' belongs to 'silos\[0\].azure_ml.datastore'; it must be",
    ),
    (silo(1, "azure_ml", data="x/../../y"), r"data must be a folder of its own"),
    (silo(1, "azure_ml", data="fl/x"), r"data must be a folder of its own"),
    (silo(1, "azure_ml", data="/x"), "data must match"),
    (lambda c: c["azure_ml"].update(client="x"), "azure_ml.client must match"),
    (
        lambda c: c["azure_ml"].update(environment="azureml:x@latest"),
        "environment must match",
    ),
    (
        lambda c: c["azure_ml"]["workspace"].update(subscription_id="mine"),
        "subscription_id must match",
    ),
    (lambda c: c["azure_ml"].update(metrics=["a b"]), r"metrics\[0\] must match"),
]


@pytest.mark.parametrize(
    "engine, change, message",
    [
        *(("on_premises", *case) for case in ANY + ON_PREMISES),
        *(("azure_ml", *case) for case in ANY + AZURE),
    ],
)
def test_an_error_names_the_file_the_line_and_the_key(
    tmp_path, engine, change, message
):
    found = content(engine)
    change(found)
    with pytest.raises(ValueError, match=rf"mine\.yaml: line \d+: .*{message}"):
        read(tmp_path, found, engine)


def test_the_line_is_the_one_of_the_key_or_where_it_should_be(tmp_path):
    text = EXAMPLE.read_text()
    lines = text.splitlines()
    for change, key in (
        (("port: 0 ", "port: 99999 "), "on_premises.port must be"),
        (("compute: hospital-c", "compute: c"), r"silos\[2\].azure_ml.compute must"),
        (("compute: hospital-c, ", ""), r"silos\[2\].azure_ml.compute is missing"),
    ):
        (tmp_path / "mine.yaml").write_text(text.replace(*change))
        number = 1 + next(k for k, line in enumerate(lines) if change[0] in line)
        with pytest.raises(ValueError, match=rf"mine\.yaml: line {number}: {key}"):
            read_federation(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    "text, message",
    [
        ("silos: [", "mine.yaml is not YAML"),
        ("", "mine.yaml: line 1: project is missing"),
        ("&a [*a]", "mine.yaml is not YAML"),
        ("project: a\n\nproject: b\n", "line 3: project is given twice"),
        ("silos: []\n\nsilos: []\n", "line 3: silos is given twice"),
        ("project: a\nsilos:\n- {name: x,\n   nam: y}\n", "line 4: silos[0].nam is"),
        ("[1, 2]", "line 1: [0] is not a known key"),
        ("5", "line 1:  is not a known key"),
    ],
)
def test_a_file_that_is_something_else(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_federation(tmp_path / "mine.yaml")
