"""A federation on Azure ML for the tests: its `silos.yaml`, and plans of it."""

import functools

import yaml

from fl_helpers.cross_silo.azure_ml import federation, pipeline, plan

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


def read(folder, found):
    """A federation from such values."""
    (folder / "silos.yaml").write_text(yaml.safe_dump(found))
    return federation.read_federation(folder / "silos.yaml")


def job(fed, params, folder, **more):
    """The graph of a run; 2 rounds and seed 0 if nothing else is said."""
    more = {"run": "trial", "rounds": 2, "seed": 0} | more
    return pipeline.build_pipeline(fed, params, folder, **more)


def build(fed, params, folder, **more):
    """The plan of it."""
    return plan.read_plan(job(fed, params, folder, **more)._to_dict())


@functools.cache
def model():
    import torch

    torch.manual_seed(0)
    return hospital.new_model()
