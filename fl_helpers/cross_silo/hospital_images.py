"""What a hospital with a folder of images brings to a run. Adapt this file.

As `hospital.py`, for images that are read one by one, with augmentation, and the last
layers of a network that was trained before. The frozen ones come once, with the run,
and never travel again: start it with `params=network("layer4", weights=FILE)
.state_dict()` and `keep_local=frozen_entries(network("layer4"))`. An example, so it
imports the helpers beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fl_helpers.cross_silo.turn import Client
from fl_helpers.images import Augmented, ImageFiles, index_images
from fl_helpers.models import freeze, torchvision_model
from fl_helpers.silos import Silo, make_silos, partition_by_site
from fl_helpers.training import Step, cosine_schedule, sgd_client

IMAGES = "images"  # images/<hospital>/<class>/<patient>_<number>.png, or .dcm
CLASSES = ("sick", "well")  # names of the folders, in order: the same everywhere


def client(data: Path, settings: dict[str, Any]) -> Client:
    """Train the last layers of a ResNet-18 on the images in a folder.

    settings: up_to (the last frozen layer; "layer4" trains the head only), image_size,
    rounds, epochs, lr, batch_size, workers (processes that load images; 0 in a sandbox
    without shared memory, such as `Fleet`'s).
    """
    functions = sgd_client(
        lambda: network(settings["up_to"]),
        epochs=settings["epochs"],
        lr=cosine_schedule(settings["lr"], int(settings["rounds"])),
        batch_size=int(settings["batch_size"]),
        metrics=("balanced_accuracy", "auroc"),
        step=Step(workers=int(settings["workers"])),
    )
    silo = load_silo(data, image_size=int(settings["image_size"]))
    return Client(silo, functions.update, functions.evaluate)


def network(up_to: str, *, weights: str | Path | None = None) -> nn.Module:
    """The network, frozen up to a layer, for grey images.

    weights: as in `torchvision_model`; a hospital needs none, it gets the run's.
    """
    model = torchvision_model("resnet18", len(CLASSES), in_channels=1, weights=weights)
    return freeze(model, up_to=up_to)


def load_silo(data: Path, *, image_size: int) -> Silo:
    """Index the hospital's own folder; a fifth of the patients is held out."""
    index = index_images(data / IMAGES, patient_of=patient_of, damaged="skip")
    if index.classes != CLASSES:
        raise ValueError(
            f"{sorted(set(index.site.tolist()))} in {data / IMAGES} has the classes "
            f"{index.classes}, not {CLASSES}; name its folders as all hospitals do, or "
            "stay out of this run"
        )
    files = ImageFiles(index, image_size=image_size)
    how = {"test_share": 0.2, "seed": 0, "patients": index.patient}
    (silo,) = make_silos(files, index.y, partition_by_site(index.site), **how)
    return Silo(silo.name, Augmented(silo.train, shift), silo.test)


def patient_of(path: Path) -> str:
    """The patient of a file: what its name says before the first underscore."""
    return path.stem.partition("_")[0]


def shift(image: Tensor) -> Tensor:
    """Move an image [C, H, W] by up to 4 pixels; any transform that draws will do."""
    down, right = torch.randint(-4, 5, (2,)).tolist()
    return image.roll((down, right), dims=(1, 2))
