"""run_rounds against a federation written as one bare loop, and in two threads."""

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from common import FULL, cnn_215k, compare, image_silos, report, row, sgd_epoch
from torch import nn

from fl_helpers.aggregation import weighted_average
from fl_helpers.models import small_cnn
from fl_helpers.silos import Examples, Silo
from fl_helpers.simulation import Execution, Terms, default_workers, run_rounds
from fl_helpers.training import ClientFunctions, Step, train_locally

LR = 0.05


def federate(
    model, silos, batch_size, *, workers, rounds, silos_per_round=None, step=Step()
):
    """A run of run_rounds; each worker thread trains in a model of its own."""
    models = threading.local()

    def client_update(params, silo, *, round_index, rng):
        if not hasattr(models, "own"):
            models.own = copy.deepcopy(model)
        models.own.load_state_dict(params)
        options = dict(lr=LR, batch_size=batch_size, rng=rng, step=step)
        return train_locally(models.own, silo, epochs=1, **options)

    client = ClientFunctions(client_update, draws_only_from_rng=True)
    run = dict(rounds=rounds, seed=0, terms=Terms(silos_per_round=silos_per_round))
    run |= dict(execution=Execution(workers=workers, progress=False))
    return run_rounds(model.state_dict(), silos, client, weighted_average, **run)


def two_threads(model, silos):
    """What two threads reach on this machine, now: the bare loop, half of it each."""

    def work(half):
        own, rng = copy.deepcopy(model).train(), torch.Generator().manual_seed(0)
        for silo in half:
            sgd_epoch(own, silo, LR, 32, rng)

    options = dict(initializer=torch.set_num_threads, initargs=(1,))
    with ThreadPoolExecutor(2, **options) as pool:
        list(pool.map(work, (silos[::2], silos[1::2])))


def bare_loop(model, silos, *, rounds, sampled, batch_size):
    """The same number of steps on the same silos, averaged by hand, nothing else."""
    model = copy.deepcopy(model).train()
    params = {name: value.clone() for name, value in model.state_dict().items()}
    rng = torch.Generator().manual_seed(0)
    for _ in range(rounds):
        mean = {name: torch.zeros_like(value) for name, value in params.items()}
        for k in torch.randperm(len(silos), generator=rng)[:sampled]:
            model.load_state_dict(params)
            sgd_epoch(model, silos[k], LR, batch_size, rng)
            for name, value in model.state_dict().items():
                mean[name] += value / sampled if value.is_floating_point() else 0
        params = mean


def overhead(
    case, model, silos, *, rounds, sampled, batch_size, pairs=5, step=Step(), **how
):
    """CPU time of run_rounds, in bare loops. how: for `compare`."""
    run = dict(rounds=rounds, silos_per_round=sampled, workers=1, step=step)
    loop = dict(rounds=rounds, sampled=sampled, batch_size=batch_size)
    times = compare(
        lambda: bare_loop(model, silos, **loop),
        lambda: federate(model, silos, batch_size, **run),
        pairs=pairs,
        **how,
    )
    return row(case, times.cpu, times=times)


def against_serial(case, model, silos, clock, **how):
    """A round with other options, in rounds of one worker, silo after silo."""
    run = dict(rounds=1, workers=1)
    times = compare(
        lambda: federate(model, silos, 32, **run),
        lambda: federate(model, silos, 32, **(run | how)),
    )
    return row(f"{case}, {clock}", getattr(times, clock.lower()), times=times)


def tabular_silos(num_silos, num_rows):
    rng = torch.Generator().manual_seed(0)
    silos = []
    for k in range(num_silos):
        x = torch.randn(num_rows, 30, generator=rng)
        train = Examples(x, torch.randint(2, (num_rows,), generator=rng))
        silos.append(Silo(f"silo {k:03d}", train, train))
    return silos


def main():
    torch.set_num_threads(1)
    big, silos = cnn_215k(), image_silos(100, 100)
    sample = dict(rounds=2, sampled=10, batch_size=20, pairs=15)
    few = dict(rounds=1, sampled=4, batch_size=32)
    rows = [
        overhead(
            "100 silos, 10 sampled, small CNN, CPU", small_cnn(10), silos, **sample
        ),
        overhead("100 silos, 10 sampled, CNN, CPU", big, silos, **sample),
        overhead(
            "4 silos x 1,000 images, CPU", big, image_silos(4, 1000),
            warm_up=False, **few,  # the model has just been trained
        ),
        overhead(
            "4 silos x 1,000 images, channels_last, CPU", big, image_silos(4, 1000),
            step=Step(channels_last=True), **few,
        ),
    ]  # fmt: skip
    tiny = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 2))
    if default_workers(big.state_dict(), 4) < 2:
        print("one core only: no speed-up to measure")
        return report("run_rounds / bare loop", rows)
    # Wall time, against bare threads in the same run: on a busy machine both have less
    # than two cores. So the speed-up over one worker has no bound, and is for the page.
    silos = image_silos(4, 1000)
    times = compare(
        lambda: two_threads(big, silos),
        lambda: federate(big, silos, 32, rounds=1, workers=2),
    )
    rows.append(row("2 workers / 2 bare threads, wall", times.wall, times=times))
    tables = tabular_silos(10, 2000)
    both = (("CNN", big, silos), ("tabular", tiny, tables)) if FULL else ()
    for name, model, data in both:
        case = f"2 workers / 1 worker, {name}"
        rows.append(against_serial(case, model, data, "wall", workers=2))
    return report("run_rounds / bare loop", rows)


if __name__ == "__main__":
    sys.exit(main())
