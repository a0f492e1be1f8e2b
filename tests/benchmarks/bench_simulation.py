"""run_rounds against a federation written as one bare loop, and in two threads."""

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from common import at_most, cnn_215k, compare, image_silos, report, sgd_epoch, timed

from fl_helpers.aggregation import weighted_average
from fl_helpers.models import small_cnn
from fl_helpers.simulation import default_workers, run_rounds
from fl_helpers.training import train_locally

LR, ROUNDS, SAMPLED = 0.05, 20, 10


def federate(model, silos, batch_size, *, workers, **options):
    """A run of run_rounds; each worker thread trains in a model of its own."""
    models = threading.local()

    def client_update(params, silo, *, round_index, rng):
        if not hasattr(models, "own"):
            models.own = copy.deepcopy(model)
        models.own.load_state_dict(params)
        options = dict(lr=LR, batch_size=batch_size, rng=rng)
        return train_locally(models.own, silo, epochs=1, **options)

    run = dict(seed=0, progress=False, workers=workers) | options
    start = model.state_dict()
    return run_rounds(start, silos, client_update, weighted_average, **run)


def two_threads(model, silos):
    """What two threads reach on this machine, now: the bare loop, half of it each."""

    def work(half):
        own, rng = copy.deepcopy(model).train(), torch.Generator().manual_seed(0)
        for silo in half:
            sgd_epoch(own, silo, LR, 32, rng)

    options = dict(initializer=torch.set_num_threads, initargs=(1,))
    with ThreadPoolExecutor(2, **options) as pool:
        list(pool.map(work, (silos[::2], silos[1::2])))


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
    # Wall time, against bare threads in the same run: on a busy machine both have less
    # than two cores, so the speed-up over one worker is shown, and is no goal.
    times = compare(
        lambda: two_threads(big, silos),
        lambda: federate(big, silos, 32, rounds=1, workers=2),
    )
    label = "4 silos x 1,000 images, 2 workers"
    rows.append(at_most(f"{label}, wall", times.wall, 1.05, 0.1))
    speed_up = compare(
        lambda: federate(big, silos, 32, rounds=1, workers=2),
        lambda: federate(big, silos, 32, rounds=1, workers=1),
    ).wall
    print(f"{label}: {speed_up:.2f} times as fast as 1 worker")
    return report("run_rounds / bare loop", rows)


if __name__ == "__main__":
    sys.exit(main())
