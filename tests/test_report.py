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


def test_the_example_of_the_documents_runs(tmp_path, monkeypatch):
    text = (Path(__file__).parent.parent / "docs/report.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    page = Page(tmp_path / "runs/demo/report.html")
    assert "3 Hospital C ConnectionError" in page.text
    assert "Hospital C 80 80" in page.text and "5 of 6" in page.text
    assert page.text.count("Hospital D, round 6") == 1
