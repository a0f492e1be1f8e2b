"""Three hospitals with data of their own, and one fleet for all tests that need one."""

import time

import pytest
import torch
from safetensors.torch import save_file

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


def wait_until(condition, seconds, what):
    """Poll until condition() holds; fail after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.1)
