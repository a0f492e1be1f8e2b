"""Three hospitals with data of their own, and one fleet for all tests that need one."""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.signal import Signal
from nvflare.apis.workspace import Workspace
from safetensors.torch import save_file

from fl_helpers import exchange
from fl_helpers.cross_silo.on_premises import executor, gate, job, site, trainer
from fl_helpers.cross_silo.run import Run
from fl_helpers.exchange import Limits

from . import hospital

SIZES = {"Hospital A": 40, "Hospital B": 24, "Hospital C": 32}
METRICS = ("test_loss", "test_accuracy")
LIMITS = Limits(metrics=Limits().metrics | {*METRICS})
SILOS_YAML = """\
project: trial
on_premises: {organisation: coordinator, admin: admin@coordinator.org, host: localhost,
              port: 0, client: "{client}"}
silos:
"""


@pytest.fixture(scope="session")
def silos_yaml(tmp_path_factory):
    """A `silos.yaml` with the hospitals' data folders beside it."""
    return write_trial(tmp_path_factory.mktemp("trial"), SIZES)


def write_trial(folder, sizes):
    """Such a file and such folders, for hospitals of these sizes."""
    rng = torch.Generator().manual_seed(0)
    text = SILOS_YAML.replace("{client}", f"{hospital.__file__}:client")
    for number, (name, n) in enumerate(sizes.items()):
        data = folder / "data" / f"hospital_{number}"
        data.mkdir(parents=True)
        x, y = torch.randn(n, 1, 16, 16, generator=rng), torch.arange(n) % 2
        x[y == 1] += 0.5
        save_file({"x": x, "y": y}, data / "data.safetensors")
        (data / "name").write_text(name)
        own = f"{{organisation: h{number}, data: {data}}}"
        text += f"  - {{name: {name}, on_premises: {own}}}\n"
    (folder / "silos.yaml").write_text(text)
    return folder / "silos.yaml"


@pytest.fixture(scope="session")
def params():
    torch.manual_seed(0)
    return hospital.new_model().state_dict()


@pytest.fixture(scope="session")
def silos(silos_yaml):
    folders = sorted((silos_yaml.parent / "data").iterdir())
    return [hospital.load_silo(folder) for folder in folders]


@pytest.fixture
def faults(silos_yaml):
    """faults("Hospital B", {1: "raise"}): what goes wrong there, by round."""
    written = []

    def set_faults(silo, plan):
        number = list(SIZES).index(silo)
        path = silos_yaml.parent / "data" / f"hospital_{number}" / "faults"
        path.write_text("\n".join(f"{r} {fault}" for r, fault in plan.items()))
        written.append(path)

    yield set_faults
    for path in written:
        path.unlink(missing_ok=True)


def telling_bytes(words):
    """Three words in a row of an encoded answer, at each place where none is small."""
    size = np.abs(words.view(np.int64))
    starts = [at for at in range(len(words) - 2) if size[at : at + 3].min() > 2**40]
    assert starts
    return [words[at : at + 3].tobytes() for at in starts]


def wait_until(condition, seconds, what):
    """Poll until condition() holds; fail after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.1)


# ---- one hospital's kit, and its executor, without a process


STATE = {"w": torch.ones(2, 2), "n": torch.tensor(3), "own": torch.zeros(4)}
SENT = {name: STATE[name] for name in ("w", "n")}


@pytest.fixture
def kit(tmp_path):
    for name in ("startup", "local"):
        (tmp_path / name).mkdir()
    own = site.Site("Hospital A", "hospital_a", "/data", "hospital:client")
    site.harden_site(tmp_path, own)
    gate.allow(tmp_path, STATE, keep_local=["own"], metrics=["test_loss"])
    return tmp_path


COUNTING = """
from types import SimpleNamespace
from fl_helpers.cross_silo.turn import Client
from fl_helpers.training import Update

def client(data, settings):
    silo = SimpleNamespace(name=data.name, train=([0], [0]))
    def update(params, silo, *, round_index, rng):
        params = {**params, "own": params["own"] + 1}
        return Update(silo.name, params, 1, {"train_loss": 0.5})
    def evaluate(params, silo):
        return {"loss": 0.25, "worst": float("nan")}
    return Client(silo, update, evaluate)
"""


def in_this_process(kit, job):
    """What `trainer.Trainer` does, without a process: tests of the executor are many,
    and test_trainer.py looks at the process."""
    return trainer.Trainee(trainer.plan_of(kit, job))


@pytest.fixture
def train(kit, tmp_path, monkeypatch):
    """train(round): what the executor of a kit makes of a task; "own" counts up."""
    monkeypatch.setattr(executor, "Trainer", in_this_process)
    (tmp_path / "mine.py").write_text(COUNTING)
    own = site.read_site(kit)
    own = replace(own, data="/Hospital A", client=f"{tmp_path}/mine.py:client")
    site.write_site(kit, own)
    workspace, context = Workspace(str(kit)), FLContext()
    context.set_prop(FLContextKey.WORKSPACE_OBJECT, workspace)
    context.set_prop(FLContextKey.CURRENT_RUN, "job")
    run = Run("x", STATE, rounds=1, seed=1, keep_local=["own"])
    sent = job.write_job(run, tmp_path / "jobs", ["Hospital A"]) / "site" / job.CONFIG
    shutil.copytree(sent, Path(workspace.get_app_dir("job")) / job.CONFIG)

    def train(round_index, task="train", sent=SENT):
        own = executor.SiteExecutor()  # a new one
        exchange.write_model(tmp_path / "model", sent, round_index=round_index)
        message = gate.pack(tmp_path / "model")
        message["round"] = round_index
        return own.execute(task, message, context, Signal())

    train.run_json = Path(workspace.get_app_dir("job")) / job.CONFIG / job.RUN
    return train
