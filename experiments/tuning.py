"""Learning rates of notebooks 01-03, chosen on validation data.

Writes docs/results/tuning.csv, about 10 minutes per data set. Each approach (each
hospital alone, federated, centralized) gets the same grid of learning rates;
hospitals alone may also choose how long to train. Validation sets are cut from the
training sets: test sets are not touched, and the seeds are none that a notebook uses.
"""

import argparse
import csv
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fl_helpers.aggregation import weighted_average
from fl_helpers.data import drop_duplicates, load_medmnist
from fl_helpers.models import small_cnn
from fl_helpers.silos import (
    make_silos,
    partition_by_quantity,
    partition_by_site,
    pool_silos,
    split_silo,
)
from fl_helpers.simulation import Execution, run_alone, run_rounds
from fl_helpers.synthetic_cxr import synthetic_cxr
from fl_helpers.training import cosine_schedule, sgd_client

SIZES = (1200, 900, 600, 300)
TEST_SHARE, VALIDATION_SHARE = 0.75, 0.25
ROUNDS, LOCAL_EPOCHS, BATCH_SIZE = 12, 2, 16
LEARNING_RATES = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16)
SEEDS = (100, 101, 102, 103)


def validation_silos(dataset, root, seed):
    """Silos whose `test` is a validation set, cut from the training set."""
    if dataset == "synthetic_cxr":
        data = synthetic_cxr(SIZES, heterogeneity=0.25, seed=seed)
        partition = partition_by_site(data.site)
    else:
        data = drop_duplicates(load_medmnist(dataset, root))
        exactly = dict(seed=seed, num_rows=sum(SIZES))
        partition = partition_by_quantity(data.y, SIZES, **exactly)
    silos = make_silos(data.x, data.y, partition, test_share=TEST_SHARE, seed=seed)
    cut = dict(test_share=VALIDATION_SHARE, seed=seed)
    return [split_silo(s.name, s.train, **cut) for s in silos], len(data.classes)


def score(dataset, root, seed, lr):
    """Validation balanced accuracy, mean over hospitals, of each approach."""
    silos, num_classes = validation_silos(dataset, root, seed)
    total = sum(len(silo.train.y) for silo in silos)
    torch.manual_seed(seed)
    start = small_cnn(num_classes).state_dict()

    def client(epochs):
        how = dict(lr=cosine_schedule(lr, ROUNDS), batch_size=BATCH_SIZE)
        return sgd_client(partial(small_cnn, num_classes), epochs=epochs, **how)

    def mean_score(models):
        scores = [own_epochs.evaluate(models[s.name], s) for s in silos]
        return np.mean([metrics["balanced_accuracy"] for metrics in scores])

    def everyone(params):
        return {silo.name: params for silo in silos}

    run = dict(rounds=ROUNDS, seed=seed, execution=Execution(progress=False))
    average = (weighted_average,)
    own_epochs = client(LOCAL_EPOCHS)
    same_steps = client(lambda silo: LOCAL_EPOCHS * (total / len(silo.train.y)))
    federated = run_rounds(start, silos, own_epochs, *average, **run)
    centralized = run_rounds(start, [pool_silos(silos)], own_epochs, *average, **run)
    return {
        "local, own epochs": mean_score(run_alone(start, silos, own_epochs, **run)),
        "local, same steps": mean_score(run_alone(start, silos, same_steps, **run)),
        "federated": mean_score(everyone(federated.params)),
        "centralized": mean_score(everyone(centralized.params)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="synthetic_cxr")
    parser.add_argument("--root", default="data/cache")
    parser.add_argument("--out", type=Path, default=Path("docs/results/tuning.csv"))
    options = parser.parse_args()
    new = not options.out.exists()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(["dataset", "seed", "lr", "approach", "balanced_accuracy"])
        for seed in SEEDS:
            for lr in LEARNING_RATES:
                for name, value in score(
                    options.dataset, options.root, seed, lr
                ).items():
                    writer.writerow([options.dataset, seed, lr, name, f"{value:.4f}"])
                file.flush()


if __name__ == "__main__":
    main()
