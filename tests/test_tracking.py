"""A run in MLflow: the same names from every engine, nothing leaves this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # before the next line
mlflow = pytest.importorskip("mlflow", reason="needs MLflow, the extra 'tracking'")
pytest.importorskip("alembic", reason="needs alembic, the extra 'tracking'")

from fl_helpers import exchange, tracking  # noqa: E402
from fl_helpers.report import rounds_of_events, rounds_of_metrics  # noqa: E402
from fl_helpers.tracking import log_run  # noqa: E402

ROOT = Path(__file__).parent.parent
ROUNDS = [
    {
        "round": r,
        "silos": ["A", "B"],
        "missing": {} if r else {"C": "unreachable"},
        "train": {"A": {"train_loss": 0.9 - r}, "B": {"train_loss": 0.5}},
        "test": {"A": {"auroc": 0.5 + 0.25 * r}, "B": {"auroc": 0.75 + 0.25 * r}},
        "bytes_down": 2000,
        "bytes_up": 1000,
        "seconds": 1.5,
    }
    for r in range(2)
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One for all tests: to make the tables takes a second or two."""
    return tmp_path_factory.mktemp("tracking") / "a b#cü" / "store"


def client_of(store):
    return mlflow.MlflowClient(f"sqlite:///{store}/mlflow.db")


def logged(store, run):
    """{name of run: {metric: [(step, value), ...]}}, "" is the federation."""
    client = client_of(store)
    parent = client.get_run(run)
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run}'"
    )
    found = {child.data.tags["silo"]: child for child in children} | {"": parent}
    return {
        name: {
            key: [
                (m.step, m.value) for m in client.get_metric_history(r.info.run_id, key)
            ]
            for key in r.data.metrics
        }
        for name, r in found.items()
    }


def test_one_run_with_one_per_silo_in_it(store):
    run = log_run(ROUNDS, store, title="T", settings={"lr": 0.1, "seed": 0})
    found = logged(store, run)
    assert found["A"] == {
        "train_loss": [(1, 0.9), (2, 0.9 - 1)],
        "test_auroc": [(1, 0.5), (2, 0.75)],
    }
    assert set(found) == {"", "A", "B", "C"} and found["C"] == {}
    assert found[""] == {
        "mean_test_auroc": [(1, 0.625), (2, 0.875)],  # (0.5 + 0.75) / 2, (0.75 + 1) / 2
        "silos_used": [(1, 2), (2, 2)],
        "silos_missing": [(1, 1), (2, 0)],
        "bytes_down": [(1, 2000), (2, 2000)],
        "bytes_up": [(1, 1000), (2, 1000)],
        "seconds": [(1, 1.5), (2, 1.5)],
    }
    parent = client_of(store).get_run(run)
    assert parent.data.params == {"lr": "0.1", "seed": "0"}
    assert parent.info.run_name == "T" and parent.info.status == "FINISHED"
    assert parent.info.user_id == "unknown"  # no name of a user


def test_every_engine_gives_the_same_names(store):
    events = [
        {"event": "round_end", "round": 0, "silos": ["A"], "missing": [], "refused": {},
         "train": {"A": {"train_loss": 1.0}}, "bytes_down": 9, "bytes_up": 9,
         "seconds": 1.0, "time": 0},
        {"event": "tested", "rounds": 1, "test": {"A": {"auroc": 0.5}}},
    ]  # fmt: skip
    lines = [
        {"round": 0, "silo": "A", "metric": "train_loss", "value": 1.0},
        {"round": 1, "silo": "A", "metric": "test_auroc", "value": 0.5},
    ]
    simulated = ROUNDS[0] | {
        "silos": ["A"],
        "missing": {},
        "train": {"A": {"train_loss": 1.0}},
        "test": {"A": {"auroc": 0.5}},
    }
    runs = {"simulation": [simulated], "own machines": rounds_of_events(events)}
    runs["Azure ML"] = rounds_of_metrics(lines)
    found = {
        engine: logged(store, log_run(rounds, store, title="T", engine=engine))
        for engine, rounds in runs.items()
    }
    first = found["simulation"]
    assert first["A"] == {"train_loss": [(1, 1.0)], "test_auroc": [(1, 0.5)]}
    assert all(of["A"] == first["A"] for of in found.values())
    assert found["own machines"][""].keys() == first[""].keys()
    unknown = {"bytes_down", "bytes_up", "seconds"}  # in Azure's ledgers only
    assert found["Azure ML"][""].keys() == first[""].keys() - unknown


def test_model_and_report_are_kept_as_they_are(store, tmp_path):
    params = {"w": torch.arange(6.0).reshape(2, 3)}
    exchange.write_model(tmp_path, params, round_index=2)
    (tmp_path / "report.html").write_text("<p>ü")
    files = [tmp_path / "model.safetensors", tmp_path / "report.html"]
    run = log_run(ROUNDS, store, title="T", files=files)
    kept = store / "files" / run / "artifacts"
    assert load_file(kept / "model.safetensors")["w"].equal(params["w"])
    assert (kept / "report.html").read_bytes() == files[1].read_bytes()
    assert sorted(path.name for path in kept.iterdir()) == [f.name for f in files]


def test_pickles_and_files_of_one_name_are_refused(store, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/a.json").write_text("{}")
    (tmp_path / "a.json").write_text("{}")
    torch.save({"w": torch.zeros(2)}, tmp_path / "model.pt")
    torch.save({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    for files, why in (
        ([tmp_path / "model.pt"], r"model.pt is not one of .*exchange.write_model"),
        ([tmp_path / "model.safetensors"], "exchange.write_model"),
        ([tmp_path / "a.json", tmp_path / "b/a.json"], "same name"),
    ):
        with pytest.raises(ValueError, match=why):
            log_run(ROUNDS, tmp_path / "new", title="T", files=files)
    with pytest.raises(FileNotFoundError):
        log_run(ROUNDS, tmp_path / "new", title="T", files=[tmp_path / "none.json"])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "uri",
    ["https://me:secret@host", "http://localhost:5000", "databricks://x", "file:///tmp",
     "postgresql://host/db", "azureml://x", "sqlite:///x.db", "s3:bucket"],
)  # fmt: skip
def test_an_address_is_refused_unless_asked_for(uri, monkeypatch):
    with pytest.raises(ValueError, match="remote=True") as refused:
        log_run(ROUNDS, uri, title="T")
    assert "secret" not in str(refused.value)
    asked = []
    monkeypatch.setattr(tracking, "_client", lambda uri: asked.append(uri) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        log_run(ROUNDS, uri, title="T", remote=True)
    assert asked == [uri]


def test_bad_input_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="at least one record"):
        log_run([], tmp_path, title="T")
    for name in ("what?", "a%20b"):
        with pytest.raises(ValueError, match="another folder"):
            log_run(ROUNDS, tmp_path / name, title="T")
    (tmp_path / "mlflow.db").write_text("not a database " * 99)
    with pytest.raises(ValueError, match="mlflow.db is no database"):
        log_run(ROUNDS, tmp_path, title="T")
    (tmp_path / "mlflow.db").unlink()
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(
        ImportError, match='pip install "mlflow-skinny>=3,<4" SQLAlchemy'
    ):
        log_run(ROUNDS, tmp_path, title="T")


def test_a_run_that_raises_is_marked(store):
    with pytest.raises(mlflow.exceptions.MlflowException):
        log_run(ROUNDS, store, title="T", experiment="bad", settings={"a\nb": 1})
    client = client_of(store)
    group = client.get_experiment_by_name("bad").experiment_id
    (run,) = client.search_runs([group])
    assert run.info.status == "FAILED"


def test_the_address_in_the_environment_is_not_used(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://192.0.2.1:9")
    assert "A" in logged(store, log_run(ROUNDS, store, title="T"))


values = st.floats(allow_nan=True, allow_infinity=True)
scores = st.dictionaries(st.sampled_from("ABC"), st.fixed_dictionaries({"x": values}))


@settings(
    max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture],
    deadline=None,
)  # fmt: skip
@given(test=scores)
def test_a_mean_is_of_all_or_of_none_and_finite(test):
    of_all = tracking._of_all({"round": 0, "silos": [], "test": test})
    numbers = [metrics["x"] for metrics in test.values()]
    if numbers and torch.tensor(numbers, dtype=torch.float64).isfinite().all():
        expected = torch.tensor(numbers, dtype=torch.float64).mean().item()
        assert of_all["mean_test_x"] == pytest.approx(expected)
    else:
        assert not torch.tensor(of_all.get("mean_test_x", torch.nan)).isfinite()


def test_values_that_are_not_finite_are_left_out(store):
    test = {
        "A": {"auroc": float("nan")},
        "B": {"auroc": float("inf")},
        "C": {"f1": 1.0},
    }
    found = logged(store, log_run([ROUNDS[0] | {"test": test}], store, title="T"))
    assert found["A"].keys() == found["B"].keys() == {"train_loss"}
    assert found["C"] == {"test_f1": [(1, 1.0)]} and "mean_test_f1" not in found[""]


WATCHED = """
import sys, threading
seen = []
def watch(event, args):
    if event in ("socket.getaddrinfo", "socket.connect", "socket.sendto"):
        seen.append(args)
        raise OSError("no network in this test")
sys.addaudithook(watch)
sys.path[:0] = [{root!r}]
{code}
for thread in threading.enumerate():
    if thread is not threading.main_thread():
        thread.join(10)
print(len(seen), seen)
"""
LOG = """
from fl_helpers.tracking import log_run
log_run([dict(round=0, silos=["A"])], {store!r}, title="T")
"""
PLAIN = """
from mlflow import MlflowClient
MlflowClient("sqlite:///" + {store!r} + "/mlflow.db").create_experiment({name!r})
"""


@pytest.mark.parametrize("code", [LOG, "import mlflow" + LOG, PLAIN])
def test_nothing_is_sent_anywhere(code, store, request):
    """In a process without the variables by which MLflow knows tests; the last one is
    MLflow by itself: what it would send shows that this test can fail."""
    store.mkdir(parents=True, exist_ok=True)
    code = code.format(store=str(store), name=request.node.name)
    done = subprocess.run(
        [sys.executable, "-c", WATCHED.format(root=str(ROOT), code=code)],
        env={"PATH": os.environ["PATH"], "HOME": str(store)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    count, hosts = done.stdout.split(maxsplit=1)
    if "log_run" in code:
        assert count == "0", hosts
    else:
        assert "mlflow" in hosts
