"""What a hospital brings to a run: its data, the model, how it trains. Adapt this file.

It is installed at the hospital and named in its settings (`client:` in `silos.yaml`). A
run sends plain settings, never code. An example, so it imports the helpers beside it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fl_helpers.cross_silo.turn import Client, Place
from fl_helpers.models import mlp, small_cnn
from fl_helpers.silos import Examples, Silo
from fl_helpers.training import cosine_schedule, evaluate, sgd_client

DATA = "data.safetensors"


def client(data: Path, settings: dict[str, Any]) -> Client:
    """Train a `small_cnn` on the examples in a folder.

    settings: num_classes, rounds, epochs, lr, batch_size.
    """
    functions = sgd_client(
        lambda: small_cnn(int(settings["num_classes"])),
        epochs=settings["epochs"],
        lr=cosine_schedule(settings["lr"], int(settings["rounds"])),
        batch_size=int(settings["batch_size"]),
        metrics=("balanced_accuracy", "auroc"),
    )
    return Client(load_silo(data), functions.update, functions.evaluate)


def one_step_client(data: Path, settings: dict[str, Any]) -> Client:
    """Train an `mlp` with one step on a few patients, as in an attack's best case.

    settings: num_classes, patients.
    """
    silo, few = load_silo(data), int(settings["patients"])
    train = Examples(silo.train.x[:few].flatten(1), silo.train.y[:few])
    sizes = train.x.shape[1], int(settings["num_classes"])
    how = {"epochs": 1, "lr": 0.1, "batch_size": few}
    functions = sgd_client(lambda: mlp(*sizes, hidden=(64,)), **how)
    return Client(replace(silo, train=train), functions.update)


def private_client(data: Path, settings: dict[str, Any], place: Place) -> Client:
    """Train a `small_cnn` with DP-SGD, within the hospital's own budget.

    settings: num_classes, noise_multiplier, max_grad_norm, sample_rate, steps, lr. The
    account is the hospital's, for all runs on these data; if it is spent, this
    hospital's part in the run ends.
    """
    from fl_helpers import privacy

    silo = load_silo(data)
    account = place.account(silo.name)
    names = ("noise_multiplier", "max_grad_norm", "sample_rate")
    steps = int(settings["steps"])
    mechanism = privacy.Mechanism(*(settings[name] for name in names), steps)

    def with_weights(params: dict[str, Tensor]) -> nn.Module:
        model = small_cnn(int(settings["num_classes"]), norm="group")
        model.load_state_dict(params)
        return model

    def update(
        params: dict[str, Tensor], silo: Silo, *, round_index: int, rng: Any
    ) -> Any:
        turn = account.turn(place.run, round_index)  # not rng: its seed is the run's
        how = {"mechanism": mechanism, "account": turn, "lr": settings["lr"]}
        done = privacy.train_privately(with_weights(params), silo, **how)
        return replace(done, metrics={"steps": float(steps)})  # epsilon: in the account

    def test(params: dict[str, Tensor], silo: Silo) -> dict[str, float]:
        found = evaluate(with_weights(params), silo.test)
        return {name: found[name] for name in ("balanced_accuracy", "auroc")}

    return Client(silo, update, test)


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
    with safe_open(Path(folder) / DATA, framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}
        name = file.metadata()["silo"]
    train, test = (
        Examples(found[f"{part}_x"], found[f"{part}_y"]) for part in ("train", "test")
    )
    return Silo(name, train, test)
