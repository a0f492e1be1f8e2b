"""train_locally and run_rounds on a GPU, against bare loops there with the same steps.

Skipped where there is none. Both sides start and end with data and model in the memory
of the host. Python goes ahead while a GPU works, so each run waits for it at its end.
"""

import copy
import sys

import torch
from common import cnn_215k, compare, image_silos, report, row, sgd_epoch

from fl_helpers.aggregation import weighted_average
from fl_helpers.models import torchvision_model
from fl_helpers.silos import Examples, Silo
from fl_helpers.simulation import Execution, run_rounds
from fl_helpers.training import train_locally

LR, BATCH = 0.05, 32
CASES = (("CNN, 215,370 parameters", cnn_215k),)
CASES += (("ResNet-18", lambda: torchvision_model("resnet18", 10, in_channels=1)),)


def moved(silo, device):
    return Silo(silo.name, Examples(*(part.to(device) for part in silo.train)), None)


def bare_training(model, silo, device):
    own = copy.deepcopy(model).to(device).train()
    sgd_epoch(own, moved(silo, device), LR, BATCH, torch.Generator().manual_seed(0))
    return own.to("cpu").state_dict()


def training(model, silo, device):
    options = dict(epochs=1, lr=LR, batch_size=BATCH)
    rng = torch.Generator().manual_seed(0)
    own = copy.deepcopy(model).to(device)
    return train_locally(own, silo, rng=rng, **options).params


def bare_rounds(model, silos, device, rounds=2):
    """Silos' data are moved once, the model stays there from round to round."""
    own = copy.deepcopy(model).to(device).train()
    params = {name: value.clone() for name, value in own.state_dict().items()}
    silos, rng = [moved(silo, device) for silo in silos], torch.Generator()
    for _ in range(rounds):
        mean = {name: torch.zeros_like(value) for name, value in params.items()}
        for silo in silos:
            own.load_state_dict(params)
            sgd_epoch(own, silo, LR, BATCH, rng)
            for name, value in own.state_dict().items():
                mean[name] += value / len(silos) if value.is_floating_point() else 0
        params = mean
    return {name: value.cpu() for name, value in params.items()}


def rounds_of(model, silos, device, rounds=2):
    own = copy.deepcopy(model).to(device)

    def client_update(params, silo, *, round_index, rng):
        own.load_state_dict(params)
        options = dict(epochs=1, lr=LR, batch_size=BATCH, rng=rng)
        return train_locally(own, silo, **options)

    run = dict(rounds=rounds, seed=0, execution=Execution(progress=False))
    start = model.state_dict()
    return run_rounds(start, silos, client_update, weighted_average, **run).params


def timed(function, *arguments):
    def run():
        function(*arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def measure(device, num_images=3200, pairs=7):
    rows = []
    for label, make_model in CASES:
        model, (one,) = make_model(), image_silos(1, BATCH)
        by_hand = bare_training(model, one, device)  # a single step: the same work
        for name, value in training(model, one, device).items():
            torch.testing.assert_close(value, by_hand[name], rtol=1e-3, atol=1e-3)
        silos = image_silos(4, num_images // 4)
        (one,) = image_silos(1, num_images)
        for what, bare, ours, data in (
            ("train_locally", bare_training, training, one),
            ("run_rounds, 4 silos", bare_rounds, rounds_of, silos),
        ):
            work = model, data, device
            times = compare(timed(bare, *work), timed(ours, *work), pairs=pairs)
            rows.append(row(f"{what}, {label}, GPU", times.wall, times=times))
            slow = timed(ours, model, data, "cpu")
            times = compare(slow, timed(ours, *work), pairs=1)
            rows.append(row(f"{what}, {label}, GPU / CPU", times.wall, times=times))
    return report("on a GPU / bare loop there", rows)


def main():
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        print("SKIPPED: no CUDA device")
        return 0
    print(torch.cuda.get_device_name())
    return measure("cuda")


if __name__ == "__main__":
    sys.exit(main())
