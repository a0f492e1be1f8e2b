"""A silo's function, found by file or module name; the example of one."""

from pathlib import Path

import pytest
import torch

from fl_helpers.cross_silo import hospital
from fl_helpers.cross_silo import turn as client
from fl_helpers.models import small_cnn
from fl_helpers.silos import Examples, Silo
from fl_helpers.simulation import silo_rng


def test_the_hospitals_function_is_loaded_by_file_or_by_module(tmp_path):
    code = "from fl_helpers.cross_silo.turn import Client\n"
    code += "def make(data, settings): return Client((data, settings), None)\n"
    code += "def other(data, settings): return 3\n"
    (tmp_path / "mine.py").write_text(code)
    entry = f"{tmp_path}/mine.py:make"
    assert client.load_client(entry, "/data", {"lr": 1}).silo == (
        Path("/data"), {"lr": 1}
    )  # fmt: skip
    with pytest.raises(TypeError, match="must return a Client, got int"):
        client.load_client(f"{tmp_path}/mine.py:other", "/data", {})
    with pytest.raises(ModuleNotFoundError):
        client.load_client("no_such_module:make", "/data", {})
    with pytest.raises(ValueError, match="got 'mine.py'"):
        client.load_client("mine.py", "/data", {})


def test_the_example_trains_what_was_saved(tmp_path):
    x, y = torch.rand(20, 1, 28, 28), torch.arange(20) % 2
    train = Examples(x[:12], y[:12])
    silo = Silo("Hospital A", train, Examples(x[12:], y[12:]))  # of the same memory
    hospital.save_silo(silo, tmp_path)
    settings = {"num_classes": 2, "rounds": 1, "epochs": 1, "lr": 0.1, "batch_size": 4}
    own = client.load_client(
        "fl_helpers.cross_silo.hospital:client", tmp_path, settings
    )
    assert own.silo.name == "Hospital A" and own.silo.test.x.equal(x[12:])
    params = small_cnn(2).state_dict()
    before = {name: value.clone() for name, value in params.items()}
    rng = silo_rng(0, "Hospital A", 0)
    update = own.update(params, own.silo, round_index=0, rng=rng)
    assert update.num_examples == 12 and not update.params["head.bias"].equal(
        params["head.bias"]
    )
    assert all(params[name].equal(value) for name, value in before.items())
    assert set(own.evaluate(params, own.silo)) == {"balanced_accuracy", "auroc"}
