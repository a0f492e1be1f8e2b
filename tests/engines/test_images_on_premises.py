"""Two hospitals with folders of images and a ResNet-18, at 224 pixels: the head alone
travels, and the result is the simulation's, bit for bit."""

import numpy as np
import pytest
import torch
from PIL import Image

from fl_helpers.aggregation import weighted_average
from fl_helpers.cross_silo import hospital_images
from fl_helpers.cross_silo.federation import read_federation
from fl_helpers.cross_silo.on_premises import gate, provision
from fl_helpers.cross_silo.on_premises.fleet import Fleet
from fl_helpers.cross_silo.run import Run
from fl_helpers.exchange import Limits
from fl_helpers.simulation import Execution, Terms, run_rounds
from fl_helpers.training import ClientFunctions, frozen_entries

pytestmark = pytest.mark.engines
NAMES = ("Hospital A", "Hospital B")
SETTINGS = {"up_to": "layer4", "image_size": 224, "rounds": 2, "epochs": 1, "lr": 0.01}
SETTINGS |= {"batch_size": 4, "workers": 0}


@pytest.fixture
def archive(tmp_path):
    """A folder per hospital: two classes, bright and dark, two images a patient."""
    rng = np.random.default_rng(0)
    text = (
        "project: images\n"
        "on_premises: {organisation: hub, admin: a@hub.org, host: localhost, port: 0,\n"
        f'              client: "{hospital_images.__name__}:client"}}\nsilos:\n'
    )
    for number, name in enumerate(NAMES):
        data = tmp_path / f"hospital_{number}"
        for k in range(20):
            label = "sick" if k // 2 % 2 else "well"
            path = data / "images" / name / label / f"p{k // 2}_{k % 2}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            level = 90 + 60 * (label == "sick")
            pixels = rng.normal(level, 30, (240, 250)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(path)
        own = f"{{organisation: h{number}, data: {data}}}"
        text += f"  - {{name: {name}, on_premises: {own}}}\n"
    (tmp_path / "silos.yaml").write_text(text)
    return tmp_path


def test_only_the_head_travels_and_the_bits_are_the_simulations(archive, tmp_path):
    torch.manual_seed(0)
    model = hospital_images.network(SETTINGS["up_to"])
    params, keep = model.state_dict(), frozen_entries(model)
    metrics = ("test_balanced_accuracy", "test_auroc")
    limits = Limits(metrics=Limits().metrics | {*metrics})
    run = Run("images", params, rounds=2, seed=3, quorum=2, deadline=120,
              keep_local=keep, settings=SETTINGS, limits=limits)  # fmt: skip
    folder = tmp_path / "fleet"
    provision.provision(read_federation(archive / "silos.yaml"), folder)
    with Fleet(archive / "silos.yaml", folder, ready=120) as fleet:
        for site in fleet.sites:
            gate.allow(fleet.kits / site, params, keep_local=keep, metrics=metrics)
        list(fleet.run(run, timeout=400))
        found, ledgers = fleet.result(run), [fleet.ledger(name) for name in NAMES]

    here = SETTINGS | {"workers": 2}  # who loads the images changes no bit
    clients = [
        hospital_images.client(archive / f"hospital_{k}", here) for k in range(2)
    ]
    expected = run_rounds(
        params, [c.silo for c in clients],
        ClientFunctions(clients[0].update, clients[0].evaluate), weighted_average,
        rounds=2, seed=3, terms=Terms(keep_local=keep),
        execution=Execution(progress=False),
    )  # fmt: skip
    assert found.keys() == expected.params.keys() == {"fc.weight", "fc.bias"}
    for name, value in expected.params.items():
        assert found[name].equal(value), name
    head = 4 * (512 * 2 + 2)  # bytes, of 45 MB
    for ledger in ledgers:
        sent = [e for e in ledger if e["direction"] == "out" and e["shape"] is not None]
        assert {e["what"] for e in sent} == {"fc.weight", "fc.bias"}
        assert sum(e["bytes"] for e in sent) == 2 * head  # two rounds
