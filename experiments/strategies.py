"""What helps when hospitals differ: every strategy on every federation, many seeds.

    python -m experiments.strategies tune   # docs/results/strategies_tuning.csv
    python -m experiments.strategies grid   # strategies.csv, diagnosis.csv
    python -m experiments.strategies confirm  # strategies_confirmed.csv, after grid
    python -m experiments.strategies        # a quick look: one seed, prints only

Each strategy gets the same tuning effort in each federation: six settings, on
validation sets cut from the training sets, with seeds that nothing else uses. All take
the same number of gradient steps. What is clear then is run again, on seeds that
nothing used before. Rows that a file has are not computed again, so that a run which
was stopped goes on.
"""

import argparse
import functools
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from experiments.grids import run_jobs
from fl_helpers import aggregation as server
from fl_helpers.comparison import holds
from fl_helpers.data import drop_duplicates, load_heart_disease, load_medmnist
from fl_helpers.differences import (
    feature_distance,
    image_features,
    label_divergence,
)
from fl_helpers.federated_statistics import combine_statistics, local_statistics
from fl_helpers.models import mlp, small_cnn
from fl_helpers.scaffold import ControlVariates, zero_variates
from fl_helpers.silos import (
    Examples,
    Silo,
    make_silos,
    partition_by_quantity,
    partition_by_site,
    partition_dirichlet,
    pool_silos,
    split_silo,
)
from fl_helpers.simulation import Execution, Terms, run_alone, run_rounds
from fl_helpers.synthetic_cxr import apply_scanner, scanner_for, synthetic_cxr
from fl_helpers.training import (
    PlainSGD,
    ProximalTerm,
    Step,
    cosine_lr,
    evaluate,
    norm_entries,
    reestimate_statistics,
    train_locally,
)

RESULTS = Path(__file__).parents[1] / "docs/results"
RAW = Path(__file__).parents[1] / "runs"  # rows as they are computed, to go on from
ROUNDS, LOCAL_EPOCHS, BATCH_SIZE, MOMENTUM = 12, 2, 16, 0.9
SIZES, TEST_SHARE, VALIDATION_SHARE = (1200, 900, 600, 300), 0.75, 0.25

FEDERATIONS = {  # (data set, how its hospitals differ): how to make them
    ("synthetic_cxr", "nothing"): dict(scanner_shift=0, prevalence_shift=0),
    ("synthetic_cxr", "both, half"): dict(scanner_shift=0.5, prevalence_shift=0.5),
    ("synthetic_cxr", "both, full"): dict(scanner_shift=1, prevalence_shift=1),
    ("synthetic_cxr", "scanner, full"): dict(scanner_shift=1, prevalence_shift=0),
    ("synthetic_cxr", "label mix, full"): dict(scanner_shift=0, prevalence_shift=1),
    ("pneumoniamnist", "Dirichlet 100"): dict(alpha=100),
    ("pneumoniamnist", "Dirichlet 0.5"): dict(alpha=0.5),
    ("pneumoniamnist", "Dirichlet 0.1"): dict(alpha=0.1),
    ("pneumoniamnist", "scanner, full"): dict(scanner_shift=1),
    ("heart_disease", "by site"): {},
}
# Learning rates to choose from, in steps of two around what notebooks 01-03 chose.
RATES = {
    "synthetic_cxr": (0.005, 0.01, 0.02, 0.04, 0.08, 0.16),
    "pneumoniamnist": (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08),
    "heart_disease": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
}
KNOBS = {  # a strategy's own settings; with k of them, 6 / k learning rates are tried
    "FedProx": [dict(mu=mu) for mu in (0.1, 1.0)],
    "Fine-tuning": [dict(factor=factor) for factor in (0.05, 0.25)],
    "FedAvgM": [dict(momentum=beta) for beta in (0.5, 0.9)],
    "FedAdagrad": [dict(server_lr=lr) for lr in (0.01, 0.03, 0.1)],
    "FedAdam": [dict(server_lr=lr) for lr in (0.01, 0.03, 0.1)],
    "FedYogi": [dict(server_lr=lr) for lr in (0.01, 0.03, 0.1)],
    "q-FedAvg": [dict(q=q) for q in (0.01, 0.1)],
}
# Not for logistic regression: it has no normalisation, and its last layer is all of it.
NEEDS_LAYERS = ("FedAvg, GroupNorm", "FedBN", "FedPer", "Own statistics")
STRATEGIES = (
    "Local", "Centralized", "FedAvg", "FedAvg, twice as often", "FedAvg, GroupNorm",
    "FedProx", "SCAFFOLD", "FedNova", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi",
    "q-FedAvg", "FedBN", "FedPer", "Local bias", "Fine-tuning", "Own statistics",
)  # fmt: skip


# More seeds for the table: its sets are tiny, and training takes no time.
def tuning_seeds(dataset):
    return range(100, 110 if dataset == "heart_disease" else 102)


def evaluation_seeds(dataset):
    return range(10 if dataset == "heart_disease" else 5)


CONFIRMING_SEEDS = range(5, 8)


def settings(dataset, strategy):
    """The six settings that a strategy chooses from."""
    knobs = KNOBS.get(strategy, [{}])
    count = 6 // len(knobs)
    middle = RATES[dataset][3 - count // 2 : 3 - count // 2 + count]
    return [dict(lr=lr) | knob for lr in middle for knob in knobs]


@functools.lru_cache(maxsize=4)
def make_federation(dataset, differ, seed, validation, root):
    """Silos of a federation; for tuning, their `test` is cut from the training set."""
    options = FEDERATIONS[dataset, differ]
    if dataset == "synthetic_cxr":
        data = synthetic_cxr(SIZES, seed=seed, **options)
        partition = partition_by_site(data.site)
    elif dataset == "heart_disease":
        data = load_heart_disease()
        partition = partition_by_site(data.site)
    else:
        data = drop_duplicates(load_medmnist(dataset, root))
        partition = partition_radiographs(data, seed, **options)
    share = 0.35 if dataset == "heart_disease" else TEST_SHARE
    silos = make_silos(data.x, data.y, partition, test_share=share, seed=seed)
    if validation:
        cut = dict(test_share=VALIDATION_SHARE, seed=seed)
        silos = [split_silo(s.name, s.train, **cut) for s in silos]
    if dataset == "heart_disease":
        silos = standardize(silos)
    return silos, len(data.classes)


def partition_radiographs(data, seed, *, alpha=None, scanner_shift=0):
    """Deal out radiographs of one centre, by label or as if from other scanners."""
    if alpha is None:
        partition = partition_by_quantity(data.y, SIZES, seed=seed, num_rows=sum(SIZES))
        for k, rows in enumerate(partition.values()):
            scanner = scanner_for(k, scanner_shift)
            data.x[rows] = apply_scanner(data.x[rows], scanner, seed)
        return partition
    rows = np.random.default_rng(seed).permutation(len(data.y))[: sum(SIZES)]
    skew = dict(alpha=alpha, min_per_class=16, max_draws=10**5, seed=seed)
    drawn = partition_dirichlet(data.y[rows], len(SIZES), **skew)
    return {name: rows[index] for name, index in drawn.items()}


def standardize(silos):
    """Scale table columns by the mean and spread over all hospitals' training rows,
    which federated statistics give without pooling (notebook 02)."""
    parts = [
        local_statistics(s.name, s.train.x.numpy(), bin_edges=(0, 1)) for s in silos
    ]
    whole = combine_statistics(parts)
    mean = torch.as_tensor(whole.mean, dtype=torch.float32)
    spread = torch.as_tensor(whole.variance, dtype=torch.float32).sqrt()

    def scaled(part):
        return Examples((part.x - mean) / spread, part.y)

    return [Silo(s.name, scaled(s.train), scaled(s.test)) for s in silos]


def fit(strategy, silos, num_classes, seed, *, lr, **knobs):
    """Train with one strategy. Returns {silo: its model}, and the bytes sent."""
    norm = "group" if strategy == "FedAvg, GroupNorm" else "batch"
    features = silos[0].train.x.shape[1]

    def new_model():
        if silos[0].train.x.dim() == 2:
            return mlp(features, num_classes, hidden=())
        return small_cnn(num_classes, in_channels=features, norm=norm)

    def load(params):
        model = new_model()
        model.load_state_dict({name: params[name] for name in model.state_dict()})
        return model

    torch.manual_seed(seed)
    model = new_model()
    start, variates = model.state_dict(), zero_variates(model)
    trainable = [name for name, _ in model.named_parameters()]
    total = sum(len(silo.train.y) for silo in silos)
    often = 2 if strategy == "FedAvg, twice as often" else 1
    rounds, local_epochs = ROUNDS * often, LOCAL_EPOCHS / often

    def client(
        params, silo, *, round_index, rng, lr=lr, steps_of_all=False, mu=0, **options
    ):
        epochs = local_epochs * (total / len(silo.train.y) if steps_of_all else 1)
        rate = cosine_lr(lr, round_index, rounds)
        how = dict(epochs=epochs, lr=rate, batch_size=BATCH_SIZE)
        how |= dict(step=Step(PlainSGD(MOMENTUM)))
        model = load(params)
        if mu:
            options["adjust_gradients"] = ProximalTerm(model, mu)
        return train_locally(model, silo, rng=rng, **how, **options)

    def scaffold(params, silo, **options):
        variates = ControlVariates(params)
        update = client(params, silo, adjust_gradients=variates.correct, **options)
        return replace(update, params=update.params | variates.entries())

    def with_loss(params, silo, **options):
        before = evaluate(load(params), silo.train)["loss"]
        update = client(params, silo, **options)
        return replace(update, metrics=update.metrics | {"loss_before": before})

    run = dict(rounds=rounds, seed=seed, execution=Execution(workers=1, progress=False))

    def federate(
        client=client, aggregate=server.weighted_average, params=start, keep=()
    ):
        terms = Terms(keep_local=keep)
        history = run_rounds(params, silos, client, aggregate, terms=terms, **run)
        models = {silo.name: load(history.params_of(silo.name)) for silo in silos}
        return models, history.bytes_sent

    def by_rule(rule, client=client, **options):
        return federate(client, rule(start, trainable, **options))

    def alone(silos):
        own = run_alone(start, silos, partial(client, steps_of_all=True), **run)
        return {name: load(params) for name, params in own.items()}

    def centralized():
        (model,) = alone([pool_silos(silos)]).values()
        return {silo.name: model for silo in silos}

    def fine_tuned(factor):
        most = run | dict(rounds=ROUNDS - 1)
        average = server.weighted_average
        history = run_rounds(start, silos, client, average, **most)
        tune = partial(client, lr=factor * lr)
        own = run_alone(history.params, silos, tune, **run | dict(rounds=1))
        return {name: load(params) for name, params in own.items()}, history.bytes_sent

    def own_statistics():
        models, sent = federate()
        for silo in silos:
            reestimate_statistics(models[silo.name], silo.train.x)
        return models, sent

    own_variates = [name for name in variates if name.startswith("own_variate.")]
    shared_and_own = dict(params=start | variates, keep=own_variates)
    train = {
        "Local": lambda: (alone(silos), 0),
        "Centralized": lambda: (centralized(), 0),
        "FedAvg": federate,
        "FedAvg, twice as often": federate,
        "FedAvg, GroupNorm": federate,
        "FedProx": lambda mu: federate(partial(client, mu=mu)),
        "SCAFFOLD": lambda: federate(scaffold, **shared_and_own),
        "FedNova": lambda: by_rule(server.FedNova, momentum=MOMENTUM),
        "FedAvgM": lambda momentum: by_rule(server.FedAvgM, momentum=momentum),
        "FedAdagrad": lambda server_lr: by_rule(server.FedAdagrad, lr=server_lr),
        "FedAdam": lambda server_lr: by_rule(server.FedAdam, lr=server_lr),
        "FedYogi": lambda server_lr: by_rule(server.FedYogi, lr=server_lr),
        "q-FedAvg": lambda q: by_rule(server.QFedAvg, with_loss, q=q, lipschitz=1 / lr),
        "FedBN": lambda: federate(keep=norm_entries(model)),
        "FedPer": lambda: federate(keep=["head.weight", "head.bias"]),
        "Local bias": lambda: federate(keep=["head.bias"]),
        "Fine-tuning": fine_tuned,
        "Own statistics": own_statistics,
    }
    return train[strategy](**knobs)


def diagnose(silos):
    """What can be said before training, from counts and sums only."""
    counts = {s.name: torch.bincount(s.train.y).tolist() for s in silos}
    longest = max(map(len, counts.values()))
    counts = {n: c + [0] * (longest - len(c)) for n, c in counts.items()}

    def summary(silo):
        x = silo.train.x.numpy()
        x = x if x.ndim == 2 else image_features(x)
        return local_statistics(silo.name, x, bin_edges=(0, 1))

    divergence = label_divergence(counts)
    sums = [summary(silo) for silo in silos]
    distance = feature_distance(sums, combine_statistics(sums))
    total = sum(len(s.train.y) for s in silos)
    return [
        {
            "silo": s.name,
            "size_share": len(s.train.y) / total,
            "label_divergence": divergence[s.name],
            "feature_distance": distance[s.name],
        }
        for s in silos
    ]


def score(job):
    """Rows of one job: (dataset, differ, seed, strategy, options, validation, root)."""
    dataset, differ, seed, strategy, options, validation, root = job
    torch.set_num_threads(1)
    silos, num_classes = make_federation(dataset, differ, seed, validation, root)
    key = dict(dataset=dataset, differ=differ, seed=seed, strategy=strategy)
    key["options"] = json.dumps(options, sort_keys=True)
    try:
        models, sent = fit(strategy, silos, num_classes, seed, **options)
    except FloatingPointError:  # diverged: no score
        return [key | {"silo": s.name, "balanced_accuracy": 0.0} for s in silos]
    rows = []
    for silo in silos:
        metrics = evaluate(models[silo.name], silo.test)
        chosen = ("balanced_accuracy", "auroc", "accuracy")
        measured = {name: round(metrics[name], 5) for name in chosen}
        rows.append(key | {"silo": silo.name} | measured | {"bytes": sent})
    return rows


COLUMNS = (
    "dataset", "differ", "seed", "strategy", "options", "silo", "balanced_accuracy",
    "auroc", "accuracy", "bytes",
)  # fmt: skip


def key_of(job):
    """The first five columns of a job's rows."""
    return (*job[:4], json.dumps(job[4], sort_keys=True))


SCORES = dict(work=score, columns=COLUMNS, keys=COLUMNS[:5], identify=key_of)


def strategies_for(dataset):
    tabular = dataset == "heart_disease"
    return [s for s in STRATEGIES if not (tabular and s in NEEDS_LAYERS)]


def best_settings(path=RESULTS / "strategies_tuning.csv"):
    """The setting with the best validation score, per federation and strategy.

    Score: mean over seeds minus their standard deviation, so that a learning rate at
    the edge of a cliff, where one seed in two collapses, is not chosen.
    """
    keys = ["dataset", "differ", "strategy", "options"]
    table = pd.read_csv(path)
    seeds = table.groupby([*keys, "seed"], sort=False).balanced_accuracy.mean()
    seeds = seeds.groupby(keys, sort=False)
    steady = (seeds.mean() - seeds.std(ddof=0)).reset_index()
    best = steady.loc[steady.groupby(keys[:3], sort=False).balanced_accuracy.idxmax()]
    return best.set_index(keys[:3]).options.map(json.loads).to_dict()


def clear_gains(table):
    """{(data set, how hospitals differ): strategies clearly better than FedAvg}."""
    found = {}
    for key, rows in table.groupby(["dataset", "differ"], sort=False):
        by = rows.pivot_table("balanced_accuracy", ["silo", "seed"], "strategy")
        for strategy in by.columns.drop(["Local", "Centralized", "FedAvg"]):
            above = (by[strategy] - by["FedAvg"]).unstack("silo")
            if holds(
                above.drop(columns="Switzerland", errors="ignore").to_dict("list")
            ):
                found.setdefault(key, []).append(strategy)
    return found


def confirming_jobs(root):
    """What is clear in the grid, and FedAvg, again: other patients, splits, weights."""
    best, table = best_settings(), pd.read_csv(RESULTS / "strategies.csv")
    return [
        (*key, seed, strategy, best[(*key, strategy)], False, root)
        for key, strategies in clear_gains(table).items()
        for seed in CONFIRMING_SEEDS
        for strategy in ("FedAvg", *strategies)
    ]


def write(table, name):
    """Committed results, federation by federation, with one name for each."""
    short = table.dataset.str.split("_").str[0] + ": " + table.differ
    table = table.assign(federation=short)
    order = {f"{d.split('_')[0]}: {how}": k for k, (d, how) in enumerate(FEDERATIONS)}
    keys = [key for key in ("federation", "seed", "strategy", "silo") if key in table]
    places = {"federation": order, "strategy": {s: k for k, s in enumerate(STRATEGIES)}}

    def place(column):
        return column.map(places[column.name]) if column.name in places else column

    table = table.sort_values(keys, key=place, kind="stable")
    table.to_csv(RESULTS / name, index=False, lineterminator="\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", nargs="?", choices=("tune", "grid", "confirm"))
    parser.add_argument("--root", default="data/cache", help="PneumoniaMNIST file")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    root = options.root
    if options.stage == "tune":
        jobs = [
            (*key, seed, strategy, setting, True, root)
            for key in FEDERATIONS
            for seed in tuning_seeds(key[0])
            for strategy in strategies_for(key[0])
            for setting in settings(key[0], strategy)
        ]
        table = run_jobs(
            jobs, RAW / "strategies_tuning.csv", options.processes, **SCORES
        )
        keys = ["dataset", "differ", "strategy", "options", "seed"]  # mean over silos
        table = table.groupby(keys, sort=False).balanced_accuracy.mean().round(4)
        write(table.reset_index(), "strategies_tuning.csv")
    elif options.stage == "grid":
        best = best_settings()
        cases = [(key, s) for key in FEDERATIONS for s in evaluation_seeds(key[0])]
        jobs = [
            (*key, seed, strategy, best[(*key, strategy)], False, root)
            for key, seed in cases
            for strategy in strategies_for(key[0])
        ]
        table = run_jobs(jobs, RAW / "strategies.csv", options.processes, **SCORES)
        write(table, "strategies.csv")
        rows = [
            dict(dataset=key[0], differ=key[1], seed=seed) | row
            for key, seed in cases
            for row in diagnose(make_federation(*key, seed, False, root)[0])
        ]
        write(pd.DataFrame(rows).round(5), "diagnosis.csv")
    elif options.stage == "confirm":
        jobs, path = confirming_jobs(root), RAW / "strategies_confirmed.csv"
        write(run_jobs(jobs, path, options.processes, **SCORES), path.name)
    else:
        best = best_settings()
        case = ("heart_disease", "by site")
        for strategy in strategies_for(case[0]):
            rows = score((*case, 0, strategy, best[(*case, strategy)], False, root))
            mean = np.mean([row["balanced_accuracy"] for row in rows])
            print(f"{strategy:24} {100 * mean:5.1f}")


if __name__ == "__main__":
    main()
