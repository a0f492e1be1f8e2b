"""What a hospital refuses, and what of that leaves it: a code, nothing of a record."""

import errno
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import make_reply
from nvflare.lighter.tool_consts import NVFLARE_SIG_FILE

from fl_helpers import exchange
from fl_helpers.cross_silo.on_premises import (
    executor,
    job,
    refusals,
    site,
    validator,
)
from fl_helpers.cross_silo.run import Run, from_plain, to_plain

from .conftest import SENT, STATE
from .test_on_premises_parts import ledger, through

DOCS = Path(__file__).parents[2] / "docs"
SECRET = "patient_4711"


def test_the_codes_are_on_the_page_for_troubles_and_no_others():
    text = (DOCS / "troubleshooting.md").read_text()
    section = text.split("## A hospital answers a code")[1].split("\n## ")[0]
    assert re.findall(r"^\| `([A-Z_]+)` \|", section, re.M) == [*refusals.CODES]


def test_a_code_is_that_of_the_error_or_of_what_it_came_from():
    full = OSError(errno.ENOSPC, "No space left on device")
    torn = OSError("ledger.jsonl took 10 of 200 bytes: disk full")
    for cause in (full, torn):
        error = exchange.Refused("Hospital A", SECRET)
        error.__context__ = cause  # as `exchange` raises it
        assert refusals.code_of(error) == "DISK_FULL"
    assert refusals.code_of(torch.OutOfMemoryError(SECRET)) == "OUT_OF_MEMORY"
    assert refusals.code_of(ValueError(SECRET)) == "EXECUTION_EXCEPTION"
    for code in (SECRET, 404, [SECRET]):  # what an error of somebody else has there
        error = ValueError()
        error.code = code
        assert refusals.code_of(error, "OTHER") == "OTHER"


def break_client(kit, text):
    path = kit / "mine.py"
    path.write_text(text)
    own = replace(site.read_site(kit), client=f"{path}:client")
    site.write_site(kit, own)


CLIENT = "def client(data, settings):\n    "


@pytest.mark.parametrize(
    "text, code",
    [
        ("def other(): pass", "CLIENT_UNKNOWN"),
        (f"import {SECRET}", "CLIENT_UNKNOWN"),
        ("def client(:", "CLIENT_UNKNOWN"),
        (CLIENT + f"open('/archive/{SECRET}.dcm')", "DATA_UNREADABLE"),
        (CLIENT + "raise MemoryError", "OUT_OF_MEMORY"),
        (CLIENT + f"raise RuntimeError('{SECRET}')", "EXECUTION_EXCEPTION"),
    ],
)
def test_each_thing_that_a_hospitals_function_gets_wrong(train, kit, text, code):
    break_client(kit, text)
    answer = train(0)
    assert answer.get_return_code() == code
    sent = through(kit, answer)  # and the gate lets the code out as it is
    assert sent.get_return_code() == code and SECRET not in str(dict(sent))
    assert [e["what"] for e in ledger(kit)] == [f"code {code}"]


def test_a_model_that_was_not_agreed_to_is_refused(train, kit):
    other = {name: torch.zeros(9) for name in SENT}
    assert train(0, sent=other).get_return_code() == "MODEL_REFUSED"
    (kit / "local" / "egress.json").unlink()
    assert train(0).get_return_code() == "MODEL_REFUSED"


def test_a_hospital_with_a_budget_lets_nothing_out_that_was_not_booked(train, kit):
    own = site.read_site(kit)
    site.write_site(kit, replace(own, epsilon=3.0, delta=1e-3))
    answer = train(0)  # its client trains without the account
    assert answer.get_return_code() == "TURN_NOT_BOOKED"
    assert through(kit, answer).get_return_code() == "TURN_NOT_BOOKED"
    site.write_site(kit, own)
    assert train(0).get_return_code() == ReturnCode.OK


@pytest.mark.parametrize("name", ["site.json", "egress.json"])
@pytest.mark.parametrize("content", ["", '{"silo": "Hosp', "[]", "{}"])
def test_a_damaged_file_of_a_kit_is_named(train, kit, caplog, name, content):
    (kit / "local" / name).write_text(content)
    answer = train(0)
    assert answer.get_return_code() == "KIT_DAMAGED"
    assert through(kit, answer).get_return_code() == "KIT_DAMAGED"
    assert [e["what"] for e in ledger(kit)] == ["code KIT_DAMAGED"]
    assert str(kit / "local" / name) in caplog.text
    assert re.search("backup|harden|gate.allow", caplog.text)


def test_on_a_full_disk_nothing_is_trained_and_the_code_says_so(
    train, kit, monkeypatch
):
    usage = SimpleNamespace(free=10**6)  # a turn needs more than a megabyte
    monkeypatch.setattr(refusals.shutil, "disk_usage", lambda folder: usage)
    answer = train(0)
    assert answer.get_return_code() == "DISK_FULL" and not (kit / "kept").exists()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exchange.Ledger, "add", full)  # not even room for a line
    sent = through(kit, make_reply(ReturnCode.EXECUTION_EXCEPTION))
    assert sent.get_return_code() == "DISK_FULL"


# ---- forged jobs


def forge(train, **change):
    found = json.loads(train.run_json.read_text())
    run = found["run"] | {k: v for k, v in change.items() if k in found["run"]}
    top = {k: v for k, v in change.items() if k not in found["run"]}
    train.run_json.write_text(json.dumps(found | top | {"run": run}))


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../../escaped"},
        {"name": "/tmp/escaped"},
        {"name": 4711},
        {"id": "../../escaped"},
        {"id": None},
        {"silos": {"..": ".."}},
        {"silos": {"Hospital-B": "Hospital A"}},
        {"silos": ["Hospital A"]},
        {"rounds": "1"},
        {"deadline": 1.5},
        {"secure": 0},
        {"keep_local": "own"},
        {"settings": {"lr": [0.1]}},
        {"limits": {"metrics": [], "max_norm": {"a": 1}}},
        {"params": {"w": [[2, "2"], "float32"]}},
        {"params": {"w": [[2, -2], "float32"]}},
        {"params": {"w": [[2, 2], "load"]}},
        {"unknown": 1},
    ],
    ids=lambda change: str(*change.items()),
)
def test_a_forged_job_is_refused_and_writes_nothing(train, kit, change):
    before = {path for path in kit.parent.rglob("*")}
    if "unknown" in change:
        found = json.loads(train.run_json.read_text())
        found["run"] |= change
        train.run_json.write_text(json.dumps(found))
    else:
        forge(train, **change)
    assert train(0).get_return_code() == "JOB_REFUSED"
    made = {path for path in kit.parent.rglob("*")} - before
    assert {path.name for path in made} <= {"model", exchange.MODEL, exchange.MANIFEST}
    assert not (kit.parent / "escaped").exists() and not Path("/tmp/escaped").exists()


@pytest.mark.parametrize("index", ["../../escaped", -1, 1.0, True, None, 10**6])
def test_a_task_of_no_round_is_refused(train, kit, monkeypatch, index):
    execute = executor.SiteExecutor.execute

    def forged(self, task, message, *rest):
        message["round"] = index
        return execute(self, task, message, *rest)

    monkeypatch.setattr(executor.SiteExecutor, "execute", forged)
    assert train(0).get_return_code() == "JOB_REFUSED"
    assert not (kit / "kept").exists()


# ---- jobs, when they arrive


def app(tmp_path):
    run = Run("x", STATE, rounds=1, seed=1)
    return job.write_job(run, tmp_path / "jobs", ["Hospital A"]) / "app"


def test_a_job_of_ours_is_taken_when_it_arrives(tmp_path):
    folder = app(tmp_path)
    for place in (folder, folder / job.CONFIG):  # as the engine signs it
        (place / NVFLARE_SIG_FILE).write_text("{}")
    assert validator.JobValidator().validate(str(folder)) == ("", {})


def rewrite(folder, change):
    path = folder / job.CONFIG / "config_fed_client.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


STOCK = {"path": "nvflare.app_common.np.np_trainer.NPTrainer", "args": {}}


@pytest.mark.parametrize(
    "spoil, code",
    [
        (lambda c: c | {"executors": [{"executor": STOCK}]}, "CLASS_REFUSED"),
        (lambda c: c | {"components": [{"id": "x", **STOCK}]}, "CLASS_REFUSED"),
        (lambda c: c | {"components": [{"name": "NPTrainer"}]}, "CLASS_REFUSED"),
        (lambda c: c | {"task_data_filters": [{"filters": [STOCK]}]}, "CLASS_REFUSED"),
        (lambda c: "text", ""),  # names nothing; the engine refuses it by itself
    ],
)
def test_a_job_with_other_classes_is_refused_when_it_arrives(
    tmp_path, spoil, code, caplog
):
    folder = app(tmp_path)
    rewrite(folder, spoil)
    assert validator.JobValidator().validate(str(folder))[0] == code
    assert not code or "NPTrainer" in caplog.text


@pytest.mark.parametrize("name", ["config/config_fed_client.conf", "more/x", "x.py"])
def test_a_job_with_other_files_is_refused_when_it_arrives(tmp_path, name):
    folder = app(tmp_path)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    assert validator.JobValidator().validate(str(folder)) == ("JOB_REFUSED", {})
    (folder / name).unlink()
    (folder / job.CONFIG / "config_fed_client.json").write_text("{")
    assert validator.JobValidator().validate(str(folder))[0] == "JOB_REFUSED"


def test_a_task_of_another_kind_is_refused(train):
    assert train(0, task="keys").get_return_code() == "JOB_REFUSED"


def test_jobs_of_older_versions_stay_readable():
    run = Run("x", STATE, rounds=1, seed=1, limits=exchange.Limits(max_norm=1))
    plain = json.loads(json.dumps(to_plain(run)))
    assert "wait_for_quorum" not in plain  # as those were written that do not know it
    assert from_plain(plain).wait_for_quorum == 0
    patient = to_plain(replace(run, wait_for_quorum=60))
    assert from_plain(json.loads(json.dumps(patient))).wait_for_quorum == 60
    with pytest.raises(ValueError, match="wait_for_quorum must be an integer >= 0"):
        replace(run, wait_for_quorum=-1)
