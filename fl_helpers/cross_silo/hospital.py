"""What a hospital brings to a run: its data, the model, how it trains. Adapt this file.

It is installed at the hospital and named in its settings (`client:` in `silos.yaml`). A
run sends plain settings, never code. An example, so it imports the helpers beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fl_helpers.cross_silo.turn import Client
from fl_helpers.models import small_cnn
from fl_helpers.silos import Examples, Silo
from fl_helpers.simulation import Params
from fl_helpers.training import Update, cosine_lr, evaluate, train_locally

DATA = "data.safetensors"


def client(data: Path, settings: dict[str, Any]) -> Client:
    """Train a `small_cnn` on the examples in a folder.

    settings: num_classes, rounds, epochs, lr, batch_size, and silo, if the folder does
    not say it.
    """

    def with_weights(params: Params) -> nn.Module:
        model = small_cnn(int(settings["num_classes"]))
        model.load_state_dict(params)
        return model

    def update(
        params: Params, silo: Silo, *, round_index: int, rng: torch.Generator
    ) -> Update:
        return train_locally(
            with_weights(params),
            silo,
            epochs=settings["epochs"],
            lr=cosine_lr(settings["lr"], round_index, int(settings["rounds"])),
            batch_size=int(settings["batch_size"]),
            rng=rng,
        )

    def test(params: Params, silo: Silo) -> dict[str, float]:
        scores = evaluate(with_weights(params), silo.test)
        return {name: scores[name] for name in ("balanced_accuracy", "auroc")}

    return Client(load_silo(data), update, test)


def save_silo(silo: Silo, folder: str | Path) -> None:
    """Write a silo's examples into a folder, for its own hospital to read."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"train_x": silo.train.x, "train_y": silo.train.y}
    tensors |= {"test_x": silo.test.x, "test_y": silo.test.y}
    tensors = {name: value.clone() for name, value in tensors.items()}  # not shared
    save_file(tensors, folder / DATA, metadata={"silo": silo.name})


def load_silo(folder: str | Path) -> Silo:
    """Read what `save_silo` wrote."""
    from safetensors import safe_open

    path = Path(folder) / DATA
    with safe_open(path, framework="pt") as file:
        name = file.metadata()["silo"]
    found = load_file(path)
    train, test = (
        Examples(found[f"{part}_x"], found[f"{part}_y"]) for part in ("train", "test")
    )
    return Silo(name, train, test)
