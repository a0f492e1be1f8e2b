"""A hospital's client for a folder of images, without an engine around it."""

import numpy as np
import pytest
import torch
from PIL import Image

from fl_helpers.cross_silo import hospital_images
from fl_helpers.cross_silo.turn import load_client
from fl_helpers.simulation import silo_rng
from fl_helpers.training import frozen_entries

SETTINGS = {"up_to": "layer4", "image_size": 32, "rounds": 2, "epochs": 1, "lr": 0.01}
SETTINGS |= {"batch_size": 4, "workers": 0}


@pytest.fixture
def data(tmp_path):
    """Ten patients with two images each, two classes."""
    rng = np.random.default_rng(0)
    for k in range(20):
        label = "sick" if k // 2 % 2 else "well"
        path = tmp_path / "images/North" / label / f"p{k // 2}_{k % 2}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(256, size=(40, 40), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return tmp_path


def test_the_client_trains_the_head_and_tests_other_patients(data):
    entry = f"{hospital_images.__name__}:client"
    client = load_client(entry, data, SETTINGS, silo="North")
    rows = client.silo.train.examples.rows, client.silo.test.rows
    assert {k // 2 for k in rows[0]}.isdisjoint(k // 2 for k in rows[1])
    assert (len(rows[0]), len(rows[1])) == (16, 4)
    torch.manual_seed(0)
    model = hospital_images.network("layer4")
    params = model.state_dict()
    rng = silo_rng(0, "North", 0)
    after = client.update(params, client.silo, round_index=0, rng=rng).params
    moved = [name for name in params if not params[name].equal(after[name])]
    assert moved == ["fc.weight", "fc.bias"]
    assert set(frozen_entries(model)) == params.keys() - set(moved)
    assert client.evaluate(after, client.silo).keys() == {"balanced_accuracy", "auroc"}


def test_a_hospital_without_one_class_is_told(data):
    for path in (data / "images/North/sick").iterdir():
        path.unlink()
    (data / "images/North/sick").rmdir()
    message = r"\['North'\] in .*images has the classes \('well',\), not .*; name its"
    with pytest.raises(ValueError, match=message):
        hospital_images.load_silo(data, image_size=32)


def test_a_hospital_with_another_name_for_a_class_is_told(data):
    """Else its `zzz` would be trained as the others' `well`, without an error."""
    (data / "images/North/sick").rename(data / "images/North/zzz")
    with pytest.raises(ValueError, match=r"classes \('well', 'zzz'\), not \('sick'"):
        hospital_images.load_silo(data, image_size=32)


def test_a_damaged_file_is_left_out_and_named(data):
    path = data / "images/North/sick/p1_0.png"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.warns(UserWarning, match="1 damaged files left out: .*p1_0.png"):
        silo = hospital_images.load_silo(data, image_size=32)
    assert len(silo.train) + len(silo.test) == 19
