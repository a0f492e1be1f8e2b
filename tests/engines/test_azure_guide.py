"""What docs/azure-ml.md says is what happens, as far as a machine can show."""

import re
from pathlib import Path

import pytest
import requests
import yaml

from fl_helpers.cross_silo.azure_ml import pipeline, run_locally, workspace

from . import azure_trial, fake_azure

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/azure-ml.md").read_text()


def blocks(language):
    return re.findall(rf"(?s)```{language}\n(.*?)```", GUIDE)


def test_the_python_of_the_guide_runs(tmp_path, monkeypatch):
    from fl_helpers.models import small_cnn

    example = yaml.safe_load((ROOT / "fl_helpers/cross_silo/silos.yaml").read_text())
    space = {"subscription_id": "1" * 8 + "-2222" * 3 + "-" + "3" * 12}
    example["azure_ml"]["workspace"] |= space
    monkeypatch.chdir(tmp_path)
    silos = azure_trial.read(tmp_path, example)
    azure = fake_azure.Instant(silos, tmp_path / "cloud")
    azure.params = small_cnn(3).state_dict()
    send = fake_azure.adapter(azure)
    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
    monkeypatch.setattr("azure.identity.DefaultAzureCredential", fake_azure.Credential)
    monkeypatch.setattr("time.sleep", fake_azure.quick_sleep)
    played = []

    def run(checked, folder, *, data):
        pipeline.check_plan(checked)
        assert data.keys() == {silo.name for silo in checked.silos}
        played.append(checked)

    monkeypatch.setattr(run_locally, "run", run)  # test_azure_local.py has the real one
    workspace.sign_in.cache_clear()
    names = {}
    for text in blocks("python"):
        exec(compile(text, "docs/azure-ml.md", "exec"), names)
    workspace.sign_in.cache_clear()
    assert not azure.unknown
    assert list(azure.jobs) == ["first", "second-0001", "second-0002", "second-0003"]
    assert len(played[0].jobs) == 1 + 2 * 5 + 5
    signed = Path("runs/first/plan.md").read_text()
    assert "SHA-256" in signed and "Hospital D" in signed
    assert names["model"].keys() == azure.params.keys()


def test_times_and_hours_follow_the_formula():
    """minutes = b + R (2 o + t + a) + 2 o + 1, and so on, for the numbers given."""
    said = re.search(r"For (`o` = .*?), all in minutes", GUIDE)[1]
    n = {k: float(v) for k, v in re.findall(r"`(\w+)` = ([\d.]+)", said)}
    rows = re.findall(r"(?m)^\| (\d+) \| (\d+) \| (.+) \|$", GUIDE)
    assert len(rows) == 4
    for rounds, silos, rest in rows:
        r, s = int(rounds), int(silos)
        jobs = 1 + r * (s + 1) + s + 1
        minutes = n["b"] + r * (2 * n["o"] + n["t"] + n["a"]) + 2 * n["o"] + 1
        cold = minutes + 2 * n["b"] * r + 2 * n["b"]
        hours = (s + 1) * (minutes + n["idle"]) / 60
        told = [int(cell) for cell in rest.split(" | ")]
        assert told[0] == jobs
        for value, true in zip(told[1:], (minutes, cold, hours), strict=True):
            assert abs(value - true) <= 0.51


def test_what_is_deployed_takes_the_parameters_of_the_guide():
    for text in blocks("bash"):
        for file in re.findall(r"--template-file (\S+\.bicep)", text):
            params = re.findall(r"(?m)^param (\w+)", (ROOT / file).read_text())
            given = set(re.findall(r"\b(\w+)=", text.split("--parameters", 1)[1]))
            assert given and given <= set(params)
    assert "idle" in params and "readByPath" in params  # named in the text


@pytest.mark.parametrize(
    "message", re.findall(r"(?m)^\| `([^`|]+?)(?: \.\.\.)?`(?:, `([^`]+)`)? \|", GUIDE)
)
def test_messages_in_the_table_are_ours(message):
    ours = [
        p.read_text() for p in (ROOT / "fl_helpers/cross_silo/azure_ml").rglob("*.py")
    ]
    for text in filter(None, message):
        kind = re.sub(r"_\d{4}.*", "", text)  # a job's name has its kind
        if kind not in ("initial", "image build failed"):
            assert any(kind in source for source in ours), text
