"""A report says what it was given, says what is missing, and runs nothing."""

import base64
import hashlib
import re
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from fl_helpers import exchange, report
from fl_helpers.privacy import Budget, spending_table
from fl_helpers.report import (
    Evidence,
    Origin,
    Results,
    Validation,
    rounds_of_events,
    rounds_of_metrics,
    write_report,
)
from fl_helpers.training import Update

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
ROUNDS = [
    {
        "round": r,
        "silos": ["A", "B"],
        "missing": {},
        "train": {"A": {"train_loss": 0.9, "epsilon": 1.0 + r}, "B": {"epsilon": 2.0}},
        "test": {"A": {"accuracy": 0.6 + 0.1 * r}, "B": {"accuracy": 0.8 + 0.1 * r}},
        "bytes_down": 2000,
        "bytes_up": 1000,
        "seconds": 1.5,
    }
    for r in range(2)
]


class Page(HTMLParser):
    """Tags, attributes and the text of a page, blank between cells."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(path.read_text("utf-8"))
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.words.append(data)


def read(tmp_path, rounds=ROUNDS, **how):
    """The page, with the fields of Results, Evidence and Origin as keywords."""
    how = {"title": "T", "metric": "accuracy", "environment": {}} | how
    for name, kind in (
        ("results", Results),
        ("evidence", Evidence),
        ("origin", Origin),
    ):
        own = {f.name: how.pop(f.name) for f in fields(kind) if f.name in how}
        how[name] = kind(**own)
    return Page(write_report(rounds, tmp_path / "new" / "report.html", **how))


def decoded(uri):
    return base64.b64decode(uri.partition(",")[2]).decode()


def test_results_name_the_worst_hospital_and_the_mean(tmp_path):
    page = read(tmp_path, references={"alone": {"A": 0.5, "B": 0.75}})
    # after the last round: 0.7 and 0.9, so the mean is 0.8; alone (0.5 + 0.75) / 2
    assert "A worst 0.700 0.500 B 0.900 0.750" in page.text
    assert "Mean of hospitals 0.800 0.625" in page.text
    assert "model after round 2" in page.text


def test_a_mean_needs_every_hospital(tmp_path):
    page = read(tmp_path, references={"alone": {"A": 0.5}})
    assert "B 0.900 – Mean of hospitals 0.800 –" in page.text


def test_a_score_that_is_no_number_is_not_the_worst(tmp_path):
    test = {"A": {"accuracy": float("nan")}, "B": {"accuracy": 0.9}}
    page = read(tmp_path, [ROUNDS[0] | {"test": test}])
    assert "B worst 0.900" in page.text and "A – " in page.text


def test_bytes_and_seconds_are_sums(tmp_path):
    page = read(tmp_path)
    assert "(global model) 4 kB" in page.text and "(updates used) 2 kB" in page.text
    assert "6 kB sent, both ways" in page.text and "3.0 s" in page.text
    unknown = [{k: v for k, v in ROUNDS[0].items() if "bytes" not in k}]
    assert "(updates used) not recorded" in read(tmp_path, unknown).text


def test_faults_are_named(tmp_path):
    assert "None was recorded" in read(tmp_path).text
    late = ROUNDS[1] | {"silos": ["A"], "missing": {"B": "TimeoutError: no answer"}}
    page = read(tmp_path, [ROUNDS[0], late])
    assert "2 B TimeoutError: no answer" in page.text
    assert "A 2 of 2 B 1 of 2" in page.text and "1 updates missing" in page.text


def test_the_privacy_ledger_ends_with_what_was_spent(tmp_path):
    budget = Budget(8.0, 1e-5)
    rows = spending_table(ROUNDS, budget)
    page = read(tmp_path, privacy=[row | {"delta": budget.delta} for row in rows])
    assert "A DP-SGD 2 2.000 1e-05 6.000 B DP-SGD 2 2.000 1e-05 6.000" in page.text
    assert "ε ≤ 2 differential" in page.text
    assert "A DP-SGD 2 2.000 not stated" in read(tmp_path, privacy=rows).text


def test_the_egress_ledger_is_summed_and_its_last_round_shown(tmp_path):
    ledger = exchange.Ledger(tmp_path / "ledger.jsonl")
    for index in range(2):
        update = Update("A", {"w": torch.full((2, 3), float(index))}, 5, {})
        exchange.write_update(
            tmp_path / "out", update, round_index=index, ledger=ledger
        )
    update.params["w"][0] = torch.nan
    with pytest.raises(exchange.Refused):
        exchange.write_update(tmp_path / "out", update, round_index=2, ledger=ledger)
    entries = exchange.read_ledger(ledger.path)[0]
    page = read(tmp_path, ledger=entries, files=[ledger.path])
    # twice: 6 floats of 4 bytes and the count, 8 bytes; then a refusal
    assert "A out 2 4 64 bytes 1 2 " in page.text
    ones = hashlib.sha256(torch.ones(2, 3).numpy().tobytes()).hexdigest()
    assert f"A, round 2 w 2 × 3 24 bytes {ones} num_examples number" in page.text
    assert hashlib.sha256(ledger.path.read_bytes()).hexdigest() in page.text
    assert entries[-1]["reason"] in page.text


def test_what_is_missing_is_said(tmp_path):
    page = read(tmp_path, [ROUNDS[0] | {"test": {}}], card={"Training": "done"})
    fields = [field for field in report.CARD if field != "Training"]
    assert all(f"{field} not stated" in page.text for field in fields)
    assert "Training done" in page.text and "not measured" in page.text
    assert "no ledger given" in page.text and "none recorded" in page.text
    assert "Commands: not stated" in page.text
    assert "Numbers of examples: not stated" in page.text


class Figure:
    def savefig(self, buffer, **how):
        buffer.write(b"svg")


def test_no_text_from_outside_becomes_markup(tmp_path):
    entry = dict.fromkeys(("what", "silo", "direction", "reason", "sha256"), EVIL)
    entry |= {"round": 0, "shape": [1], "bytes": 4, "verdict": "accepted"}
    own = {EVIL: {EVIL: 0.5, "accuracy": 0.5, "train_loss": 0.5}}
    record = {"round": 0, "silos": [EVIL], "missing": {EVIL: EVIL}}
    spent = {"silo": EVIL, "mechanism": EVIL, "epsilon": 1.0, "remaining": 1.0}
    page = read(
        tmp_path,
        [record | {"train": own, "test": own}],
        title=EVIL,
        engine=EVIL,
        silos=[{"silo": EVIL, EVIL: EVIL}],
        references={EVIL: {EVIL: 0.5}},
        privacy=[spent],
        ledger=[
            entry | {"direction": "out"},
            entry | {"verdict": "refused"},
        ],
        figures={EVIL: Figure()},
        card=dict.fromkeys(report.CARD, EVIL),
        settings={EVIL: EVIL},
        environment={EVIL: EVIL},
        reproduce=EVIL,
    )
    assert page.text.count("alert(1)") > 25
    assert "script" not in page.tags
    assert page.tags.count("img") == 3  # two charts and the figure
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert sources[-1] == "data:image/svg+xml;base64,c3Zn"  # the base64 of b"svg"
    for chart in map(decoded, sources[:-1]):  # XML that holds no markup of the name
        assert {e.tag.rpartition("}")[2] for e in ElementTree.fromstring(chart).iter()
                } & {"script", "img", "image"} == set()  # fmt: skip
    assert "default-src 'none'" in (tmp_path / "new/report.html").read_text()


def test_nothing_is_loaded_and_no_folder_is_named(tmp_path):
    path = write_report(ROUNDS, tmp_path / "r.html", title="T")
    text = path.read_text()
    assert not re.search(r"https?://|<link|<script|@import|url\(", text)
    assert str(Path.cwd()) not in text and str(tmp_path) not in text
    page = Page(path)
    assert re.search(r"Commit ([0-9a-f]{40}|not in a repository)", page.text)
    assert "torch 2." in page.text


def test_bad_calls_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one record, got none"):
        read(tmp_path, [])
    with pytest.raises(ValueError, match=r"Intended use.*got \['Purpose'\]"):
        read(tmp_path, card={"Purpose": "x"})


def test_events_of_own_machines_become_rounds():
    end = {"event": "round_end", "time": 0.0, "silos": ["A"], "bytes_down": 20}
    end |= {"bytes_up": 10, "seconds": 2.0, "train": {"A": {"train_loss": 0.5}}}
    events = [
        {"event": "start", "time": 0.0, "round": 0, "rounds": 2},
        {"event": "tested", "time": 0.0, "rounds": 0, "test": {"A": {"auroc": 0.5}}},
        {**end, "round": 0, "missing": ["B"], "refused": {"C": "not finite"}},
        {"event": "tested", "time": 0.0, "rounds": 1, "test": {"A": {"auroc": 0.7}}},
        {**end, "round": 1, "missing": ["C"], "refused": {}},
        {**end, "round": 1, "missing": [], "refused": {}},  # played again
        {"event": "tested", "time": 0.0, "rounds": 2, "test": {"A": {"auroc": 0.8}}},
    ]
    first, second = rounds_of_events(events)
    assert first["missing"] == {"B": "no answer in time", "C": "not finite"}
    assert first["test"] == {"A": {"auroc": 0.7}} and first["bytes_up"] == 10
    assert second["missing"] == {} and second["test"] == {"A": {"auroc": 0.8}}


def test_metrics_of_azure_become_rounds(tmp_path):
    lines = [
        {"round": 0, "silo": "A", "metric": "test_accuracy", "value": 0.3},  # before
        {"round": 0, "silo": "A", "metric": "train_loss", "value": 1.0},
        {"round": 1, "silo": "A", "metric": "test_accuracy", "value": 0.6},
        {"round": 1, "silo": "A", "metric": "train_loss", "value": 0.8},
        {"round": 2, "silo": "A", "metric": "test_accuracy", "value": 0.7},
    ]
    first, second = rounds_of_metrics(lines, {"1": ["B"]})
    assert first["test"] == {"A": {"accuracy": 0.6}} and first["missing"] == {}
    assert second["test"] == {"A": {"accuracy": 0.7}} and second["silos"] == ["A"]
    assert second["missing"] == {"B": "its job failed"}
    page = read(tmp_path, [first, second])
    assert "A 2 of 2 B 0 of 2" in page.text and "A worst 0.700" in page.text


def test_a_chart_has_a_line_per_hospital_and_names_as_they_are(tmp_path):
    loss = {"a $x$": {"train_loss": 0.5}, "_b": {"train_loss": float("nan")}, "c": {}}
    rounds = [
        {"round": r, "silos": [], "missing": {}, "train": loss, "test": {}}
        for r in (0, 1)
    ]
    assert report._per_silo(rounds, "train_loss", "train") == {
        "a $x$": [(1, 0.5), (2, 0.5)]  # finite values only, rounds from 1
    }
    page = read(tmp_path, rounds)
    (source,) = [value for name, value in page.attributes if name == "src"]
    assert decoded(source).count('id="legend_1"') == 1
    assert "Training loss per hospital" in page.text


def examples():
    text = (Path(__file__).parent.parent / "docs/report.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, re.S)


def test_the_example_of_the_documents_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(examples()[0], {})
    page = Page(tmp_path / "runs/demo/report.html")
    assert "3 Hospital C ConnectionError" in page.text
    assert "Hospital C 80 80" in page.text and "5 of 6" in page.text
    assert page.text.count("Hospital D, round 6") == 1


def test_the_example_of_a_validation_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(examples()[1], names)
    page = Page(tmp_path / "runs/validation/report.html")
    silos, groups = names["silos"], names["groups"]
    worst = min(silos, key=lambda name: silos[name]["AUROC"][0])
    assert (
        f"Worst hospital: {worst}: AUROC {silos[worst]['AUROC'][0]:.3f} (" in page.text
    )
    hidden = [name for of in groups.values() for name, row in of.items() if not row]
    assert hidden and f"{len(hidden)} of 6 subgroups withheld" in page.text
    assert page.tags.count("img") == 1 and "rounds" not in page.text


SILOS = {
    "A": {"ill": 40, "healthy": 60, "AUROC": (0.8, 0.7, 0.9), "Brier": 0.2},
    "B": {"ill": 30, "healthy": 50, "AUROC": (0.65, 0.6, 0.72), "Brier": 0.25},
    "C": {"ill": 9, "healthy": 90, "AUROC": (0.5, 0.3, 0.7), "Brier": 0.1},
    "D": {"ill": 50, "healthy": 50, "AUROC": (0.9, 0.85, 0.95), "Brier": 0.1},
}
GROUPS = {
    "A": {"young": None, "old": {"ill": 20, "healthy": 20, "sensitivity": 0.75}},
    "B": {"old": {"ill": 30, "healthy": 10, "sensitivity": 0.5}, "young": None},
    "C": {"old": {"ill": 9, "healthy": 90, "sensitivity": 0.1}},
}


def validated(tmp_path, silos=SILOS, groups=GROUPS, **how):
    found = Validation(silos, groups, **how)
    path = tmp_path / "report.html"
    return Page(write_report([], path, title="T", validation=found))


def test_a_validation_names_the_worst_hospital_that_enough_patients_carry(tmp_path):
    """C has the lowest value and nine ill; A's interval begins at .7, below B's .72."""
    page = validated(tmp_path)
    said = "B: AUROC 0.650 (0.600 to 0.720), of 30 ill and 50 healthy patients; the "
    said += (
        "lowest of 3 hospitals. Intervals do not tell it apart from A . Not ranked, "
    )
    said += "since fewer than ten ill or healthy patients, or no value: C ."
    text = page.text.replace("A.", "A .").replace("C.", "C .")
    assert f"Worst hospital: {said}" in text and f"Worst hospital {said}" in text
    assert "C not ranked 9 90 0.500 (0.300 to 0.700) 0.100" in text
    assert "Report of a validation without training" in text
    assert "(9 ill, 90 healthy); D (50 ill, 50 healthy)" in text
    assert "rounds" not in text and "update" not in text


def test_a_validation_names_the_worst_subgroup_and_shows_what_was_withheld(tmp_path):
    page = validated(tmp_path)
    said = (
        "B, old: sensitivity 0.500, of 30 ill and 10 healthy patients; the lowest of 2"
    )
    assert f"Worst subgroup: {said} subgroups." in page.text
    assert f"Worst subgroup {said} subgroups." in page.text
    assert "A, young withheld A, old 20 20 0.750" in page.text
    assert "2 of 5 subgroups withheld" in page.text
    assert "than these. Withheld: A, young; B, young." in page.text


def test_where_too_few_carry_every_value_no_worst_is_named(tmp_path):
    nobody = {"A": {"young": None}, "C": GROUPS["C"]}
    page = validated(tmp_path, {"C": SILOS["C"], "E": None}, nobody)
    assert (
        "Worst hospital: not named No hospitals can be ranked. Not ranked" in page.text
    )
    assert "Worst subgroup: not named No subgroups can be ranked." in page.text
    assert "E withheld" in page.text and "Withheld: E; A, young." in page.text
    page = validated(tmp_path, {"A": SILOS["A"]}, {"A": {"young": None}})
    assert "Worst subgroup: not named" in page.text
    assert "Worst subgroup not measured" in validated(tmp_path, SILOS, {}).text


def test_a_run_can_have_a_validation_as_well(tmp_path):
    page = read(tmp_path, validation=Validation(SILOS))
    assert "Mean of hospitals 0.800" in page.text and "B worst 30 50" in page.text


def test_no_name_of_a_validation_becomes_markup(tmp_path):
    row = {"ill": 20, "healthy": 20, EVIL: (0.5, 0.4, 0.6)}
    other, few = row | {EVIL: 0.55}, row | {"ill": 1}
    silos = {EVIL: row, EVIL + "2": other, EVIL + "3": few, EVIL + "4": None}
    how = {"metric": EVIL, "group_metric": EVIL}
    page = validated(tmp_path, silos, {EVIL: silos}, **how)
    assert page.text.count("alert(1)") > 40
    assert "script" not in page.tags and "img" not in page.tags


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"healthy": 20, "AUROC": 0.5}, "'A'.* count 'ill', got None"),
        ({"ill": 20, "healthy": 2.5, "AUROC": 0.5}, "'A'.* count 'healthy', got 2.5"),
        ({"AUROC": (0.8, 0.02)}, r"'AUROC' is \(value, low, high\)"),  # an error
        ({"AUROC": (0.8, 0.9, 0.95)}, r"got \(0.8, 0.9, 0.95\)"),
        ({"accuracy": 0.8}, r"no row has the measure 'AUROC', got \['accuracy'\]"),
    ],
)
def test_a_row_of_a_validation_that_is_none_is_refused(tmp_path, row, message):
    counts = {"ill": 20, "healthy": 20} if "healthy" not in row else {}
    with pytest.raises(ValueError, match=message):
        validated(tmp_path, {"A": counts | row})
    assert not (tmp_path / "report.html").exists()
