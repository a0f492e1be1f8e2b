"""A federation on Azure ML for the tests: its `silos.yaml`, and plans of it."""

import functools
from dataclasses import fields

import yaml

from fl_helpers.cross_silo.azure_ml import pipeline
from fl_helpers.cross_silo.azure_ml.plan import Part
from fl_helpers.cross_silo.federation import read_federation
from fl_helpers.cross_silo.run import Run
from fl_helpers.exchange import Limits

from . import hospital

METRICS = ["train_loss", "steps", "test_loss", "test_accuracy"]
NAMES = ("Hospital A", "Hospital B", "Hospital C")


def content(names=NAMES):
    """What a `silos.yaml` says, as Python values."""
    keys = [name.replace(" ", "-").lower() for name in names]
    return {
        "project": "trial",
        "silos": [
            {
                "name": name,
                "azure_ml": {
                    "compute": key,
                    "datastore": key.replace("-", "_"),
                    "data": "radiographs",
                },
            }
            for name, key in zip(names, keys, strict=True)
        ],
        "azure_ml": {
            "workspace": {
                "subscription_id": "00000000-0000-0000-0000-000000000000",
                "resource_group": "rg",
                "name": "ws",
            },
            "orchestrator": {"compute": "orchestrator", "datastore": "orchestrator"},
            "client": f"{hospital.__file__}:client",
            "released": ["model_update", "scores"],
            "metrics": METRICS,
        },
    }


def full_content():
    """With a real-looking subscription, and a step that prepares the data."""
    found = content()
    number = "12345678-9abc-def0-1234-56789abcdef0"
    found["azure_ml"]["workspace"]["subscription_id"] = number
    found["azure_ml"]["prepare"] = f"{hospital.__file__}:prepare"
    return found


def read(folder, found):
    """A federation from such values."""
    (folder / "silos.yaml").write_text(yaml.safe_dump(found))
    return read_federation(folder / "silos.yaml", engine="azure_ml")


def make_run(params, **more):
    """2 rounds and seed 0 if nothing else is said; all metrics may leave."""
    more = {"name": "trial", "rounds": 2, "seed": 0} | more
    more.setdefault("limits", Limits(metrics=frozenset(METRICS)))
    return Run(params=params, **more)


def build(fed, params, folder, **more):
    """The plan of a run, or of a part of it."""
    known = {field.name for field in fields(Part)} - {"name", "rounds"}
    part = {key: more.pop(key) for key in known & more.keys()}
    part |= {key: more.pop(f"part_{key}") for key in ("name", "rounds")
             if f"part_{key}" in more}  # fmt: skip
    run = make_run(params, **more)
    return pipeline.build_pipeline(run, fed, folder, part=Part(**part))


@functools.cache
def model():
    import torch

    torch.manual_seed(0)
    return hospital.new_model()
