"""What each hospital of the tests brings: data from its folder, a model, training."""

import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import nn

from fl_helpers.cross_silo.turn import Client
from fl_helpers.scaffold import ControlVariates
from fl_helpers.training import ProximalTerm, Update, evaluate, train_locally


def new_model():
    """With BatchNorm: floating buffers, and an integer one."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(196, 2)
    )


def load_silo(folder):
    data = load_file(Path(folder) / "data.safetensors")
    examples = (data["x"], data["y"])
    name = (Path(folder) / "name").read_text()
    return SimpleNamespace(name=name, train=examples, test=examples)


def model_of(params):
    model = new_model()
    model.load_state_dict({name: params[name] for name in model.state_dict()})
    return model


def functions(settings):
    """(update, evaluate), the same in the simulation and at a hospital."""

    def update(params, silo, *, round_index, rng):
        model, adjust = model_of(params), []
        variates = ControlVariates(params) if settings.get("scaffold") else None
        if settings.get("mu"):
            adjust.append(ProximalTerm(model, settings["mu"]))
        if variates:
            adjust.append(variates.correct)
        done = train_locally(
            model,
            silo,
            epochs=1,
            lr=0.05,
            batch_size=8,
            rng=rng,
            adjust_gradients=lambda model: [change(model) for change in adjust],
        )
        if variates:
            params = done.params | variates.entries()
            return Update(done.silo, params, done.num_examples, done.metrics)
        if "ballast" in params:  # so that there is much to send
            done.params["ballast"] = params["ballast"] * 0.5 + done.num_examples
        return done

    def test(params, silo):
        found = evaluate(model_of(params), silo.test)
        return {name: found[name] for name in ("loss", "accuracy")}

    return update, test


def client(data, settings):
    update, test = functions(settings)

    def with_faults(params, silo, *, round_index, rng):
        """A file in the hospital's own folder says what goes wrong in which round."""
        done = update(params, silo, round_index=round_index, rng=rng)
        print(f"trained in round {round_index}", flush=True)  # into its own log

        def fault():
            path = data / "faults"
            lines = path.read_text().splitlines() if path.exists() else []
            return dict(line.split(" ", 1) for line in lines).get(str(round_index), "")

        while fault() == "held":  # until the file says something else
            time.sleep(0.05)
        return spoil(fault(), done)

    return Client(load_silo(data), with_faults, test)


def private(data, settings, place):
    """With DP-SGD, in the hospital's own account. A hospital's folder may say in which
    round its process is killed, when it has drawn noise."""
    from fl_helpers.privacy import Mechanism, train_privately  # as slow as PyTorch

    silo, account = load_silo(data), place.account((data / "name").read_text())
    step = Mechanism(2.0, max_grad_norm=1.0, sample_rate=0.5, steps=2)

    def update(params, silo, *, round_index, rng):
        model = private_model()
        model.load_state_dict(params)
        turn = account.turn(place.run, round_index)
        how = {"mechanism": step, "account": turn, "lr": settings["lr"]}
        done = train_privately(model, silo, **how)
        if (data / "kill").exists() and (data / "kill").read_text() == str(round_index):
            os.kill(os.getpid(), signal.SIGKILL)
        return Update(done.silo, done.params, done.num_examples, {"steps": 2.0})

    return Client(silo, update)


def private_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 2))


def prepare(data, target, settings):
    """Data as `client` takes them, from a hospital's own form: here they are that."""
    for path in Path(data).iterdir():
        shutil.copy(path, target)


def spoil(fault, update):
    name = next(k for k in update.params if k.endswith("weight"))
    value = update.params[name]
    if fault.startswith("slow"):
        time.sleep(float(fault.split()[1]))
    elif fault == "raise":
        raise RuntimeError("cannot read /archive/patient_4711.dcm")
    elif fault.startswith("read"):
        Path(fault.split(" ", 1)[1]).read_bytes()
    elif fault == "nan":
        value.fill_(torch.nan)
    elif fault == "shape":
        update.params[name] = torch.zeros(3)
    elif fault == "lacks":
        del update.params[name]
    elif fault == "images":
        update.params["images"] = torch.zeros(8, 1, 16, 16)
    elif fault == "metric":
        update.metrics["patient_4711"] = 1.0
    return update
