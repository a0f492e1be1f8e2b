"""Fed-Heart-Disease as FLamby trains it, beside the figures that it publishes.

    python -m experiments.flamby    # docs/results/flamby.csv; two minutes

Logistic regression, accuracy. Local and centralized: Adam, learning rate 0.001, 50
epochs; FedAvg: SGD, 0.001, 15 rounds of 100 steps; batches of 4. Each hospital's
columns are scaled by its own mean and spread; the centralized model trains on columns
scaled over all hospitals, and is tested on those scaled per hospital. Published by
Ogier du Terrail et al. (2022), arXiv:2210.04620; figures: means over the files
heart_seed42.csv to heart_seed46.csv in
flamby/results/results_benchmark_fed_heart_disease of github.com/owkin/FLamby.
"""

import csv
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.model_selection import train_test_split

from fl_helpers.aggregation import weighted_average
from fl_helpers.data import load_heart_disease
from fl_helpers.models import mlp
from fl_helpers.silos import Examples, Silo, make_silos, partition_by_site
from fl_helpers.simulation import Execution, run_rounds
from fl_helpers.training import PlainSGD, Step, train_locally

RESULTS = Path(__file__).parents[1] / "docs/results/flamby.csv"
SEEDS, OTHER_SPLITS = range(42, 47), range(10)
PUBLISHED = {  # accuracy in percent, hospitals in the order of names
    "local": (74.6, 74.6, 72.5, 70.2),
    "federated": (73.1, 71.9, 65.0, 64.0),
    "centralized": (78.3, 76.4, 75.0, 64.4),
}


def loss(logits, y):
    return F.binary_cross_entropy_with_logits(logits[:, 0], y.float())


def new_model(seed=None):
    if seed is not None:
        torch.manual_seed(seed)
    return mlp(13, 1, hidden=())


def published_test_rows(heart):
    """Which rows of `load_heart_disease()` FLamby tests on, bool [N].

    66 % of each hospital are for training, stratified where a label has more than two.
    """
    test = np.zeros(len(heart), bool)
    for rows in partition_by_site(heart.site).values():
        labels = heart.y[rows]
        few = np.bincount(labels, minlength=2).min() <= 2
        shares = {"train_size": 0.66, "test_size": 0.34, "random_state": 43}
        _, tested = train_test_split(rows, **shares, stratify=None if few else labels)
        test[tested] = True
    return test


def published_split():
    """Columns of each hospital as they are, and its division."""
    heart = load_heart_disease()
    test = published_test_rows(heart)
    silos = []
    for name, rows in partition_by_site(heart.site).items():
        parts = (rows[~test[rows]], rows[test[rows]])
        both = [
            Examples(torch.as_tensor(heart.x[part]), torch.as_tensor(heart.y[part]))
            for part in parts
        ]
        silos.append(Silo(name, *both))
    return silos


def other_split(seed):
    heart = load_heart_disease()
    rows = partition_by_site(heart.site)
    return make_silos(heart.x, heart.y, rows, test_share=0.34, seed=seed)


def scale(silo, like):
    """Both parts of a silo in spreads from the mean of `like`, rows [N, F]."""
    mean, spread = like.mean(0), like.std(0) + 1e-9
    parts = [Examples((p.x - mean) / spread, p.y) for p in (silo.train, silo.test)]
    return Silo(silo.name, *parts)


def by_adam(examples, seed):
    model, rng = new_model(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(50):
        for batch in torch.randperm(len(examples.y), generator=rng).split(4):
            optimizer.zero_grad()
            loss(model(examples.x[batch]), examples.y[batch]).backward()
            optimizer.step()
    return model


def by_fedavg(silos, seed):
    def load(params):
        model = new_model()
        model.load_state_dict(params)
        return model

    def hundred_steps(params, silo, *, round_index, rng):
        how = dict(lr=1e-3, step=Step(PlainSGD(0, 0)), batch_size=4, loss_fn=loss)
        epochs = 100 / (len(silo.train.y) // 4)
        return train_locally(load(params), silo, epochs=epochs, rng=rng, **how)

    start = new_model(seed).state_dict()
    run = dict(rounds=15, seed=seed, execution=Execution(progress=False))
    return load(run_rounds(start, silos, hundred_steps, weighted_average, **run).params)


def accuracies(silos, seed, approaches=tuple(PUBLISHED)):
    """Rows (approach, hospital, percent) of one training seed."""
    own = [scale(silo, silo.train.x) for silo in silos]
    everyone = torch.cat([silo.train.x for silo in silos])
    pooled = [scale(silo, everyone).train for silo in silos]
    pooled = Examples(*(torch.cat(part) for part in zip(*pooled, strict=True)))
    models = {}
    if "local" in approaches:
        models["local"] = [by_adam(silo.train, seed) for silo in own]
    if "federated" in approaches:
        models["federated"] = [by_fedavg(own, seed)] * len(own)
    if "centralized" in approaches:
        models["centralized"] = [by_adam(pooled, seed)] * len(own)
    for approach, trained in models.items():
        for silo, model in zip(own, trained, strict=True):
            with torch.no_grad():
                said = model(silo.test.x)[:, 0] > 0
            hits = (said == silo.test.y.bool()).float().mean()
            yield approach, silo.name, round(100 * hits.item(), 2)


def main():
    torch.set_num_threads(1)
    names = [silo.name for silo in published_split()]
    rows = [
        ("published", "42 to 46", approach, name, value)
        for approach, values in PUBLISHED.items()
        for name, value in zip(names, values, strict=True)
    ]
    for seed in SEEDS:
        rows += [("here", seed, *row) for row in accuracies(published_split(), seed)]
    for seed in OTHER_SPLITS:
        found = accuracies(other_split(seed), seed)
        rows += [("other splits", seed, *row) for row in found]
    with RESULTS.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("source", "seed", "approach", "silo", "accuracy"))
        table.writerows(rows)
    for source in ("published", "here", "other splits"):
        for approach in PUBLISHED:
            per_silo = [
                np.mean([r[4] for r in rows if r[:1] + r[2:4] == (source, approach, n)])
                for n in names
            ]
            print(f"{source:13} {approach:12}", np.round(per_silo, 1))


if __name__ == "__main__":
    main()
