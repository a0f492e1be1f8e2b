"""run_rounds against a federation written as one bare loop, and its speed-up."""

import copy
import sys

import torch
from common import at_least, cnn_215k, compare, image_silos, report, sgd_epoch, timed

from fl_helpers.aggregation import weighted_average
from fl_helpers.models import small_cnn
from fl_helpers.simulation import default_workers, run_rounds
from fl_helpers.training import train_locally

LR, ROUNDS, SAMPLED = 0.05, 20, 10


def federate(model, silos, batch_size, **options):
    def client_update(params, silo, *, round_index, rng):
        own = copy.deepcopy(model)
        own.load_state_dict(params)
        options = dict(lr=LR, batch_size=batch_size, rng=rng)
        return train_locally(own, silo, epochs=1, **options)

    run = dict(seed=0, progress=False) | options
    start = model.state_dict()
    return run_rounds(start, silos, client_update, weighted_average, **run)


def bare_loop(model, silos):
    """The same number of steps on the same silos, averaged by hand, nothing else."""
    model = copy.deepcopy(model).train()
    params = {name: value.clone() for name, value in model.state_dict().items()}
    rng = torch.Generator().manual_seed(0)
    for _ in range(ROUNDS):
        mean = {name: torch.zeros_like(value) for name, value in params.items()}
        for k in torch.randperm(len(silos), generator=rng)[:SAMPLED]:
            model.load_state_dict(params)
            sgd_epoch(model, silos[k], LR, 20, rng)
            for name, value in model.state_dict().items():
                mean[name] += value / SAMPLED if value.is_floating_point() else 0
        params = mean


def main():
    torch.set_num_threads(1)
    rows = []
    silos, model = image_silos(100, 100), small_cnn(10)
    run = dict(rounds=ROUNDS, silos_per_round=SAMPLED, workers=1)
    times = compare(
        lambda: bare_loop(model, silos), lambda: federate(model, silos, 20, **run)
    )
    label = "100 silos, 10 sampled, 20 rounds"
    rows.append(timed(label, times, 1.05, 0.05))

    silos, big = image_silos(4, 1000), cnn_215k()
    if default_workers(big.state_dict(), 4) < 2:
        print("one core only: no speed-up to measure")
        return report("run_rounds / bare loop", rows)
    times = compare(
        lambda: federate(big, silos, 32, rounds=1, workers=2),
        lambda: federate(big, silos, 32, rounds=1, workers=1),
    )
    label = "4 silos x 1,000 images, 215 k: speed-up of 2 workers"
    rows.append(at_least(label, times.wall, 1.7, 0.3))
    return report("run_rounds / bare loop", rows)


if __name__ == "__main__":
    sys.exit(main())
