"""Four hospitals with tables: alone, an ensemble, federated, by three kinds of model.

    python -m experiments.tables tune    # docs/results/tables_tuning.csv; minutes
    python -m experiments.tables    # docs/results/tables.csv; minutes
    python -m experiments.tables --tables "tables/*.csv" --site clinic --outcome died \
        --ranges '{"age": [18, 100]}' --out runs/tables.csv    # your own

Each seed divides every hospital's patients anew. Everything was fixed before the test
sets were looked at: ridge 1, 30 trees of depth 2, a third of the patients for testing,
and for federated averaging the rate that experiments/strategies.py had chosen on
validation data. The small network has one hidden layer. Alone, pooled and in the
federation it takes the same number of gradient steps, with a rate for each of the
three that `tune` has chosen, from one grid, on parts of the training rows.
"""

import argparse
import csv
import json
from glob import glob
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from fl_helpers import federated_statistics as statistics
from fl_helpers import regression, trees
from fl_helpers.aggregation import weighted_average
from fl_helpers.analysis import ask_silos
from fl_helpers.comparison import tuned_rates
from fl_helpers.data import load_heart_disease
from fl_helpers.models import mlp
from fl_helpers.silos import (
    Examples,
    Silo,
    make_silos,
    partition_by_site,
    pool_silos,
    scale_silos,
    split_silo,
)
from fl_helpers.simulation import Execution, run_rounds
from fl_helpers.training import classification_metrics, cosine_schedule, sgd_client

RESULTS = Path(__file__).parents[1] / "docs/results/tables.csv"
TUNING = RESULTS.with_name("tables_tuning.csv")
SEEDS, TEST_SHARE, MIN_COUNT = range(10), 0.35, 10
GROWTH = trees.Growth(trees=30, depth=2, rate=0.2, min_rows=10)
BINS, RIDGE, ROUNDS, EPOCHS, RATE, HIDDEN = 16, 1.0, 12, 2, 0.01, (32,)
TUNING_SEEDS, VALIDATION_SHARE = range(100, 105), 0.25
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # of which the network chooses
RANGES = {  # lowest and highest possible value; 0 mg/dl of cholesterol is a missing one
    "age": (18, 100),
    "resting_bp": (60, 240),
    "cholesterol": (50, 650),
    "max_heart_rate": (50, 220),
    "st_depression": (-3, 7),
}
HEADER = (
    "seed", "method", "approach", "silo", "healthy", "ill", "auroc",
    "balanced_accuracy",
)  # fmt: skip


def heart_table():
    heart = load_heart_disease()
    table = pd.DataFrame(heart.x, columns=list(heart.features))
    return table.assign(disease=heart.y, site=heart.site)


def split(table, seed, *, site, outcome, ranges):
    """Silos of a table with NaN where a value is missing or impossible; columns."""
    columns = [c for c in table if c not in (site, outcome)]
    for name, (low, high) in ranges.items():
        table = table.assign(
            **{name: table[name].where(table[name].between(low, high))}
        )
    table = table.dropna(subset=[c for c in [*columns, outcome] if c not in ranges])
    x, y = table[columns].to_numpy("float32"), table[outcome].to_numpy("int64")
    rows = partition_by_site(table[site].to_numpy(str))
    return make_silos(x, y, rows, test_share=TEST_SHARE, seed=seed), columns


def filled(silos, columns):
    """Columns in spreads from the federated mean of the training rows, NaN as 0."""
    sent = [local_sums(silo, columns) for silo in silos]
    whole = [over_all(sent, column) for column in columns]
    mean, spread = np.array([(c.mean, c.spread) for c in whole]).T

    def fill(part):
        return Examples(part.x.nan_to_num(0), part.y)

    scaled = scale_silos(silos, mean, spread)
    return [Silo(s.name, fill(s.train), fill(s.test)) for s in scaled]


def local_sums(silo, columns):
    values = dict(zip(columns, silo.train.x.numpy().T, strict=True))
    return statistics.local_table(silo.name, values, min_rows=1)


def over_all(sent, column):
    """One column over the hospitals that have it: Switzerland has no cholesterol."""
    parts = {str(k): {column: p[column]} for k, p in enumerate(sent) if column in p}
    return statistics.combine_tables(parts)[column]


def rows_as(kind, silos):
    return {s.name: kind(s.train.x.numpy(), s.train.y.numpy()) for s in silos}


def logistic(silos):
    """Probabilities [N] of rows [N, F], as a function."""
    ask = ask_silos(rows_as(regression.Table, silos))
    features = silos[0].train.x.shape[1]
    fit = regression.fit_logistic(ask, features, ridge=RIDGE, min_rows=0)
    return lambda x: 1 / (1 + np.exp(-fit.beta[0] - x @ fit.beta[1:]))


def boosted(silos, bins, min_count=0):
    ask = ask_silos(rows_as(trees.Rows, silos))
    model = trees.fit_trees(ask, bins, growth=GROWTH, min_count=min_count)
    return model.scores


def averaged(silos, seed, *, lr=RATE, hidden=(), epochs=EPOCHS):
    def make_model():
        return mlp(silos[0].train.x.shape[1], 2, hidden=hidden)

    how = dict(epochs=epochs, lr=cosine_schedule(lr, ROUNDS), batch_size=16)
    client = sgd_client(make_model, **how)
    torch.manual_seed(seed)
    model, execution = make_model(), Execution(progress=False)
    run = dict(rounds=ROUNDS, seed=seed, execution=execution)
    start = model.state_dict()
    history = run_rounds(start, silos, client.update, weighted_average, **run)
    model.load_state_dict(history.params)
    return lambda x: model(torch.tensor(x)).softmax(1)[:, 1].detach().numpy()


def networks(silos, seed, rates):
    """`answers` of a network; rates: {"alone", "FedAvg" and "pooled": learning rate}.

    Averaging the models of a single hospital, or of the pooled rows, is plain training.
    """
    total = sum(len(s.train.y) for s in silos)

    def alone(members):
        epochs = EPOCHS * total / len(members[0].train.y)  # as many steps as all
        how = dict(lr=rates["alone"], epochs=epochs)
        return averaged(members, seed, hidden=HIDDEN, **how)

    members = {"FedAvg": silos, "pooled": [pool_silos(silos)]}
    together = {
        name: averaged(some, seed, hidden=HIDDEN, lr=rates[name])
        for name, some in members.items()
    }
    return answers(alone, silos, together)


def enough(y):
    """Whether labels y [N] hold ten of both."""
    return int(torch.bincount(y, minlength=2).min()) >= MIN_COUNT


def answers(method, silos, together):
    """(approach, silo, probabilities of its test rows).

    together: {approach: the model of all}.

    A hospital with fewer than ten training patients of a class has no model of its
    own: it answers with its share of ill patients, and sends nothing to the ensemble.
    """
    own = {s.name: method([s]) for s in silos if enough(s.train.y)}
    for silo in silos:
        x = silo.test.x.numpy()
        each = {name: model(x) for name, model in own.items()}
        share = np.full(len(x), silo.train.y.double().mean())
        yield "alone", silo, each.get(silo.name, share)
        yield "ensemble", silo, np.mean([*each.values()], axis=0)
        for approach, model in together.items():
            yield approach, silo, model(x)


def measure(score, y):
    inside = np.clip(np.float64(score), 1e-9, 1 - 1e-9)
    logits = torch.tensor(np.log(np.column_stack([1 - inside, inside])))
    found = classification_metrics(logits, y)
    return [round(100 * found[name], 3) for name in HEADER[-2:]]


def compare(table, seed, *, site="site", outcome="disease", ranges=RANGES):
    """Rows of `HEADER` of one seed."""
    silos, columns = split(table, seed, site=site, outcome=outcome, ranges=ranges)
    ready = filled(silos, columns)
    bins = trees.even_bins({c: ranges.get(c, 2) for c in columns}, bins=BINS)
    able = [s for s in silos if enough(s.train.y)]
    fewer = {
        "without the small": boosted(able, bins),
        "rule of ten": boosted(able, bins, MIN_COUNT),
    }
    one = {"federated": logistic(ready), "FedAvg": averaged(ready, seed)}
    found = [("logistic", *row) for row in answers(logistic, ready, one)]
    rates = tuned_rates(TUNING, "heart_disease")
    found += [("network", *row) for row in networks(ready, seed, rates)]
    one = {"federated": boosted(silos, bins)}
    grown = answers(lambda members: boosted(members, bins), silos, one)
    found += [("trees", *row) for row in grown]
    for approach, model in fewer.items():
        found += [("trees", approach, s, model(s.test.x.numpy())) for s in able]
    for method, approach, silo, score in found:
        patients = torch.bincount(silo.test.y, minlength=2).tolist()
        key = (seed, method, approach, silo.name, *patients)
        yield (*key, *measure(score, silo.test.y))


def tune(table):
    """Rows for `tuned_rates`: the network on rows that were cut from the training rows.

    Means over the hospitals that have a model of their own.
    """
    for seed in TUNING_SEEDS:
        whole, columns = split(
            table, seed, site="site", outcome="disease", ranges=RANGES
        )
        cut = dict(test_share=VALIDATION_SHARE, seed=seed)
        silos = filled([split_silo(s.name, s.train, **cut) for s in whole], columns)
        for lr in RATES:
            scores = {"alone": [], "FedAvg": [], "pooled": []}
            for approach, silo, score in networks(
                silos, seed, dict.fromkeys(scores, lr)
            ):
                if approach in scores and enough(silo.train.y):
                    scores[approach].append(measure(score, silo.test.y)[1] / 100)
            for approach, values in scores.items():
                yield "heart_disease", seed, lr, approach, f"{np.mean(values):.4f}"


def write(path, header, rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=("compare", "tune"))
    parser.add_argument("--tables", help="a file with all hospitals, or one of each")
    parser.add_argument("--site", default="site", help="column of the hospital")
    parser.add_argument("--outcome", default="disease", help="column, 0 or 1")
    parser.add_argument("--ranges", type=json.loads, default=RANGES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.tables and options.out == RESULTS:
        parser.error("your own tables need --out, such as runs/tables.csv")
    table = heart_table()
    if options.tables:
        table = pd.concat([pd.read_csv(f) for f in sorted(glob(options.tables))])
    torch.set_num_threads(1)
    if options.what == "tune":
        header = ("dataset", "seed", "lr", "approach", HEADER[-1])
        return write(TUNING, header, tune(table))
    how = dict(site=options.site, outcome=options.outcome, ranges=options.ranges)
    rows = (row for seed in SEEDS for row in compare(table, seed, **how))
    return write(options.out, HEADER, rows)


if __name__ == "__main__":
    main()
