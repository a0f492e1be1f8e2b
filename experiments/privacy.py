"""What privacy costs, and what attacks find without it; many seeds.

    python -m experiments.privacy tune     # docs/results/privacy_tuning.csv
    python -m experiments.privacy grid     # docs/results/privacy.csv
    python -m experiments.privacy attacks  # docs/results/privacy_attacks.csv
    python -m experiments.privacy          # a quick look: one seed, prints only

Four hospitals of `synthetic_cxr`. Learning rate, momentum and number of steps of DP-SGD
are chosen for each epsilon, on validation sets and seeds that nothing else uses; the
privacy that this choosing costs is not counted. The noise was planned with a delta that
is too large beside 800 patients: notebook 07 says what epsilon it is at 1e-5. Rows that
a file has are not computed again, so that a run which was stopped goes on.
"""

import argparse
import copy
import json
import math
import os
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import torch

from experiments.grids import run_jobs
from fl_helpers import attacks
from fl_helpers.aggregation import weighted_average
from fl_helpers.compression import (
    FromDeltas,
    compress_update,
    quantise,
    top_k,
    zero_residual,
)
from fl_helpers.models import mlp, small_cnn, smooth_cnn
from fl_helpers.privacy import (
    Account,
    Budget,
    Mechanism,
    noise_for,
    nothing_spent,
    privatise_update,
    train_privately,
    with_tanh,
)
from fl_helpers.silos import make_silos, partition_by_site, split_silo, to_tensor
from fl_helpers.simulation import Execution, Terms, run_alone, run_rounds
from fl_helpers.synthetic_cxr import synthetic_cxr
from fl_helpers.training import (
    PlainSGD,
    Step,
    cosine_schedule,
    evaluate,
    sgd_client,
    train_locally,
)

RESULTS = Path(__file__).parents[1] / "docs/results"
RAW = Path(__file__).parents[1] / "runs"  # rows as they are computed, to go on from
SIZES, TEST_SHARE, VALIDATION_SHARE = (1600, 1200, 800, 400), 0.5, 0.25
ROUNDS, CLIP, DELTA = 10, 1.0, 1e-3
EPSILONS = (math.inf, 8.0, 3.0, 1.0, 0.5)
NOISES = (0.0, 0.1, 0.3, 1.0)  # of silo-level DP
TUNING_SEEDS, SEEDS = (100, 101), range(5)
SPAN, BOUNDS, CLASSES = 4.0, (-2.0, 2.0), 3  # inputs of the models go from -2 to 2

PACKERS = {
    "8 bits": quantise,
    "top 10 %": partial(top_k, share=0.1),
    "top 1 %": partial(top_k, share=0.01),
    "top 10 %, no feedback": partial(top_k, share=0.1),
}
MODELS = {
    "FedAvg": partial(small_cnn, CLASSES),
    "FedAvg, GroupNorm": partial(small_cnn, CLASSES, norm="group"),
    "silo level": partial(small_cnn, CLASSES, norm="group"),
    "compressed": partial(small_cnn, CLASSES),
}
SETTINGS = {  # what each approach chooses from
    "FedAvg": [dict(lr=lr) for lr in (0.02, 0.04, 0.08)],
    "FedAvg, GroupNorm": [dict(lr=lr) for lr in (0.01, 0.02, 0.04)],
    "DP-SGD": [
        dict(rate=rate, steps=steps, lr=lr, momentum=momentum)
        for rate, steps in ((0.15, 5), (0.1, 10))
        for lr, momentum in ((1.0, 0.0), (2.0, 0.0), (0.2, 0.9), (0.4, 0.9))
    ],
    "silo level": [dict(lr=lr) for lr in (0.01, 0.02, 0.04)],
}


def private_cnn():
    return with_tanh(small_cnn(CLASSES, width=4, norm="group"))


def model_of(approach):
    return private_cnn if approach.startswith("DP-SGD") else MODELS[approach]


@lru_cache(maxsize=4)
def hospitals(seed, validation):
    data = synthetic_cxr(SIZES, heterogeneity=0.25, seed=seed)
    sites = partition_by_site(data.site)
    silos = make_silos(data.x, data.y, sites, test_share=TEST_SHARE, seed=seed)
    if validation:
        cut = dict(test_share=VALIDATION_SHARE, seed=seed)
        silos = [split_silo(s.name, s.train, **cut) for s in silos]
    return silos


def load(make, params):
    model = make()
    model.load_state_dict({name: params[name] for name in model.state_dict()})
    return model


# -- utility


def plain_client(make, *, lr, epochs=2):
    how = dict(epochs=epochs, lr=cosine_schedule(lr, ROUNDS), batch_size=16)
    return sgd_client(make, **how).update


def private_client(epsilon, *, rate, steps, lr, momentum):
    budget = Budget(epsilon, DELTA)
    noise = noise_for(budget, sample_rate=rate, steps=ROUNDS * steps)
    how = dict(mechanism=Mechanism(noise, CLIP, rate, steps), lr=lr, momentum=momentum)

    def client(params, silo, *, round_index, rng):
        account = Account(params, budget, silo=silo.name)
        model = load(private_cnn, params)
        return train_privately(model, silo, account=account, rng=rng, **how)

    return client


def silo_level_client(noise, num_silos, *, lr):
    train = plain_client(MODELS["silo level"], lr=lr, epochs=1)
    budget = Budget(math.inf, 1e-2)

    def client(params, silo, *, round_index, rng):
        update = train(params, silo, round_index=round_index, rng=rng)
        account = Account(params, budget, silo=silo.name)
        how = dict(account=account, clip=CLIP, noise_multiplier=noise)
        return privatise_update(update, params, num_silos=num_silos, rng=rng, **how)

    return client


def packing_client(level, *, lr):
    train = plain_client(MODELS["compressed"], lr=lr)
    forgets = level.endswith("no feedback")

    def client(params, silo, **options):
        update = train(params, silo, **options)
        packed = compress_update(update.params, params, PACKERS[level])
        if forgets:
            packed |= zero_residual(update.params)
        return replace(update, params=packed)

    return client


def fit(approach, level, silos, seed, options):
    """Returns {silo: model}, epsilon, and bytes that a silo sends in a round."""
    make = model_of(approach)
    torch.manual_seed(seed)
    start = make().state_dict()
    here = Execution(workers=1, progress=False)
    run = dict(rounds=ROUNDS, seed=seed, execution=here)
    own, aggregate = {}, weighted_average
    if approach.startswith("DP-SGD"):
        client, own = private_client(float(level), **options), nothing_spent()
    elif approach == "silo level":
        client = silo_level_client(float(level), len(silos), **options)
        own = nothing_spent()
    elif approach == "compressed":
        client, own = packing_client(level, **options), zero_residual(start)
        aggregate = FromDeltas(start, weighted_average)
    else:
        client = plain_client(make, **options)
    if approach.endswith("alone"):
        params = run_alone(start | own, silos, client, **run)
        return {name: load(make, p) for name, p in params.items()}, float(level), 0
    keep = Terms(keep_local=list(own))
    history = run_rounds(start | own, silos, client, aggregate, terms=keep, **run)
    last = history.rounds[-1]
    epsilon = last["train"][silos[0].name].get("epsilon", math.inf)
    model = load(make, history.params)
    return {s.name: model for s in silos}, epsilon, last["bytes_up"] // len(silos)


COLUMNS = (
    "approach", "level", "seed", "options", "silo", "balanced_accuracy", "auroc",
    "epsilon", "bytes_up", "membership_auroc", "membership_tpr",
)  # fmt: skip
KEYS = COLUMNS[:4]


def score(job):
    """Rows of one job: (approach, level, seed, options, validation)."""
    approach, level, seed, options, validation = job
    torch.set_num_threads(1)
    silos = hospitals(seed, validation)
    key = dict(zip(KEYS, key_of(job), strict=True))
    try:
        models, epsilon, sent = fit(approach, level, silos, seed, options)
    except FloatingPointError:  # diverged: no score
        return [key | {"silo": s.name, "balanced_accuracy": 0.0} for s in silos]
    rows = []
    for silo in silos:
        metrics = evaluate(models[silo.name], silo.test)
        row = {name: metrics[name] for name in ("balanced_accuracy", "auroc")}
        row |= dict(epsilon=epsilon, bytes_up=sent)
        if len(silo.test.y) >= 100:
            found = attacks.audit_membership(models[silo.name], silo.train, silo.test)
            row["membership_auroc"] = found["auroc"]
            row["membership_tpr"] = found["tpr"]
        row = {k: round(v, 5) for k, v in row.items()}
        rows.append(key | {"silo": silo.name} | row)
    return rows


def key_of(job):
    """The first four columns of a job's rows."""
    return (job[0], str(job[1]), job[2], json.dumps(job[3], sort_keys=True))


SCORES = dict(
    work=score, columns=COLUMNS, keys=KEYS, identify=key_of, text=("level", "options")
)


def levels(approach):
    named = {"DP-SGD": EPSILONS, "silo level": NOISES}
    return [str(level) for level in named.get(approach, ["none"])]


def best_settings(path=RESULTS / "privacy_tuning.csv"):
    """{(approach, level): options} with the best mean validation score."""
    table = pd.read_csv(path, dtype={"level": str})
    best = table.loc[table.groupby(["approach", "level"]).balanced_accuracy.idxmax()]
    return best.set_index(["approach", "level"]).options.map(json.loads).to_dict()


def grid_jobs(best, seeds):
    cases = [(a, level, options) for (a, level), options in best.items()]
    cases += [("DP-SGD alone", c[1], c[2]) for c in cases if c[0] == "DP-SGD"]
    cases += [("compressed", name, best["FedAvg", "none"]) for name in PACKERS]
    return [(a, level, seed, o, False) for a, level, o in cases for seed in seeds]


# -- attacks


def sent_by(model, x, y, *, epochs=1, batch_size=None, epsilon=None):
    """Gradient direction in the update of a silo with these examples."""
    silo, mine = SimpleNamespace(name="a", train=(x, y)), copy.deepcopy(model)
    rng = torch.Generator().manual_seed(0)
    if epsilon is None:
        how = dict(epochs=epochs, batch_size=batch_size or len(y))
        how |= dict(step=Step(PlainSGD(weight_decay=0)))
        update = train_locally(mine, silo, lr=0.01, rng=rng, **how)
    else:
        budget = Budget(epsilon, DELTA)
        noise = noise_for(budget, sample_rate=1.0, steps=1)
        account = Account(nothing_spent(), budget, silo="a")
        how = dict(mechanism=Mechanism(noise, CLIP, 1.0, 1), lr=1.0, account=account)
        update = train_privately(mine, silo, rng=rng, **how)
    return attacks.sent_gradient(model.state_dict(), update.params, model)


SMOOTH = "smooth CNN"
INVERSIONS = {  # condition: model, images per silo, silos summed, how they trained
    "one image, one step": (SMOOTH, 1, 1, {}),
    "one image, 5 steps": (SMOOTH, 1, 1, dict(epochs=5)),
    "one image, 20 steps": (SMOOTH, 1, 1, dict(epochs=20)),
    "batch of 2": (SMOOTH, 2, 1, {}),
    "batch of 4": (SMOOTH, 4, 1, {}),
    "batch of 8": (SMOOTH, 8, 1, {}),
    "sum of 4 silos, one image each": (SMOOTH, 1, 4, {}),
    "sum of 4 silos, 4 images each": (SMOOTH, 4, 4, {}),
    "DP-SGD, epsilon 1000": (SMOOTH, 1, 1, dict(epsilon=1000.0)),
    "DP-SGD, epsilon 8": (SMOOTH, 1, 1, dict(epsilon=8.0)),
    "small_cnn, GroupNorm, one image": ("FedAvg, GroupNorm", 1, 1, {}),
    "small_cnn, BatchNorm, one image": ("FedAvg", 1, 1, {}),
}


def invert(condition, seed):
    """One victim per seed, from another hospital each time."""
    data = synthetic_cxr([60] * 4, heterogeneity=0.5, seed=1000 + seed)
    x, y = to_tensor(data.x), torch.from_numpy(data.y).long()
    rows = [60 * (seed % 4), *range(200, 240)]  # the victim comes first
    victim = x[rows[0]]
    public = synthetic_cxr([60] * 4, heterogeneity=0.5, seed=2000 + seed)
    guess = to_tensor(public.x).mean(0)
    how = dict(span=SPAN)
    baseline = attacks.ssim(guess, victim, **how)
    name, per_silo, num_silos, options = INVERSIONS[condition]
    torch.manual_seed(seed)
    model = smooth_cnn(CLASSES) if name == SMOOTH else MODELS[name]()
    rows = rows[: per_silo * num_silos]
    parts = [rows[k::num_silos] for k in range(num_silos)]
    sent = [sent_by(model, x[part], y[part], **options) for part in parts]
    total = {k: sum(one[k] for one in sent) for k in sent[0]}
    rng = torch.Generator().manual_seed(seed)
    how_long = dict(search=attacks.Search(iterations=300), rng=rng, bounds=BOUNDS)
    found = attacks.invert_gradient(model, total, y[rows], x.shape[1:], **how_long)
    (best,) = attacks.closest(found, victim[None], span=SPAN)
    return {
        "ssim": attacks.ssim(best, victim, **how),
        "psnr": attacks.psnr(best, victim, **how),
        "ssim of a public mean image": baseline,
    }


def invert_mlp(size, seed):
    """Share of a batch that the first linear layer's gradient gives away."""
    data = synthetic_cxr([size], seed=1000 + seed)
    x, y = to_tensor(data.x), torch.from_numpy(data.y).long()
    torch.manual_seed(seed)
    model = mlp(1024, CLASSES, hidden=(64,))
    sent = sent_by(model, x.flatten(1), y)
    found = attacks.invert_linear(sent["body.0.weight"], sent["body.0.bias"])
    best = attacks.closest(found.unflatten(1, (1, 32, 32)), x, span=SPAN)
    close = [attacks.psnr(a, b, span=SPAN) > 30 for a, b in zip(best, x, strict=True)]
    return {"recovered above 30 dB": sum(close) / size}


MEMBERSHIP = {  # condition: images a model is trained on, epochs
    "150 images, 30 epochs": (150, 30),
    "150 images, 5 epochs": (150, 5),
    "600 images, 10 epochs": (600, 10),
}


def find_members(condition, seed):
    """Each of 8 models is attacked in turn, with the other 7 as shadows."""
    n, epochs = MEMBERSHIP[condition]
    data = synthetic_cxr([2 * n], seed=1000 + seed)
    examples = to_tensor(data.x), torch.from_numpy(data.y).long()
    taught = attacks.shadow_halves(2 * n, 8, torch.Generator().manual_seed(seed))
    models, test = [], []
    for k, rows in enumerate(taught):
        torch.manual_seed(100 * seed + k)
        model = small_cnn(CLASSES)
        part = [part[rows] for part in examples]
        rng = torch.Generator().manual_seed(100 * seed + k)
        how = dict(epochs=epochs, lr=0.02, batch_size=16, rng=rng)
        train_locally(model, SimpleNamespace(name=str(k), train=part), **how)
        test.append(evaluate(model, tuple(p[~rows] for p in examples))["accuracy"])
        models.append(model)
    results = attacks.attack_in_turn(models, taught, examples)
    found = {f"{a}: {k}": r[k] for a, r in results.items() for k in ("auroc", "tpr")}
    return found | {"test accuracy": sum(test) / 8}


COUNTS = ((72, 12, 12), (12, 72, 12), (12, 12, 72), (48, 36, 12))
LABEL_MIX = {  # condition: model, learning rate, epochs, sum over silos?
    "GroupNorm, lr 0.005, one epoch": ("FedAvg, GroupNorm", 0.005, 1, False),
    "BatchNorm, lr 0.005, one epoch": ("FedAvg", 0.005, 1, False),
    "BatchNorm, lr 0.02, one epoch": ("FedAvg", 0.02, 1, False),
    "GroupNorm, lr 0.005, 5 epochs": ("FedAvg, GroupNorm", 0.005, 5, False),
    "sum of 4 silos, GroupNorm, one epoch": ("FedAvg, GroupNorm", 0.005, 1, True),
}


def find_label_mix(condition, seed):
    """Largest error of a share, mean over four silos with unlike mixes."""
    name, lr, epochs, summed = LABEL_MIX[condition]
    data = synthetic_cxr([400, 400], heterogeneity=0.0, seed=1000 + seed)
    x, y = to_tensor(data.x), torch.from_numpy(data.y).long()
    torch.manual_seed(seed)
    model = MODELS[name]()

    def change(examples, k):
        silo = SimpleNamespace(name="a", train=examples)
        how = dict(epochs=epochs, lr=lr, batch_size=16)
        rng = torch.Generator().manual_seed(k)
        update = train_locally(copy.deepcopy(model), silo, rng=rng, **how)
        return update.params["head.bias"] - model.head.bias.detach()

    simulated, mixes = [], []
    for k in range(30):
        rng = torch.Generator().manual_seed(k)
        shares = -torch.rand(CLASSES, generator=rng).log()
        own = (x[400:520], y[400:520])
        drawn = attacks.draw_mix(own, shares / shares.sum(), 96, rng)
        simulated.append(change(drawn, k))
        mixes.append(torch.bincount(drawn[1], minlength=CLASSES) / 96)
    seen = []
    for k, counts in enumerate(COUNTS):
        pick = [(y[:400] == c).nonzero()[:n, 0] for c, n in enumerate(counts)]
        pick = torch.cat(pick)
        seen.append(change((x[pick], y[pick]), 100 + k))
    if summed:
        seen = [torch.stack(seen).mean(0)] * len(seen)
    guess = partial(attacks.label_mix, simulated=torch.stack(simulated))
    true = torch.tensor(COUNTS) / 96
    got = torch.stack([guess(c, mixes=torch.stack(mixes)) for c in seen])
    error = (got - true).abs().amax(dim=1).mean().item()
    equal = (1 / CLASSES - true).abs().amax(dim=1).mean().item()
    return {"largest error": error, "largest error of an equal mix": equal}


ATTACKS = {
    "inversion": (INVERSIONS, invert, range(8)),
    "inversion of a linear layer": ((1, 2, 8, 32), invert_mlp, range(8)),
    "membership": (MEMBERSHIP, find_members, range(3)),
    "label mix": (LABEL_MIX, find_label_mix, range(5)),
}
ATTACK_COLUMNS = ("attack", "condition", "seed", "measure", "value")


def attack(job):
    name, condition, seed = job
    torch.set_num_threads(1)
    key = condition if condition in ATTACKS[name][0] else int(condition)
    found = ATTACKS[name][1](key, seed)
    row = dict(attack=name, condition=condition, seed=seed)
    return [row | {"measure": k, "value": round(v, 5)} for k, v in found.items()]


# -- stages


def tune(processes):
    jobs = [
        (approach, level, seed, options, True)
        for approach, choices in SETTINGS.items()
        for level in levels(approach)
        for options in choices
        for seed in TUNING_SEEDS
    ]
    table = run_jobs(jobs, RAW / "privacy_tuning.csv", processes, **SCORES)
    keys = ["approach", "level", "options"]  # mean over silos and seeds
    table = table.groupby(keys, sort=False).balanced_accuracy.mean().round(4)
    table.reset_index().to_csv(
        RESULTS / "privacy_tuning.csv", index=False, lineterminator="\n"
    )


def grid(processes):
    jobs = grid_jobs(best_settings(), SEEDS)
    table = run_jobs(jobs, RAW / "privacy.csv", processes, **SCORES)
    table = table.sort_values(["approach", "level", "seed", "silo"], kind="stable")
    table.to_csv(RESULTS / "privacy.csv", index=False, lineterminator="\n")


def attack_all(processes):
    jobs = [
        (name, str(condition), seed)
        for name, (conditions, _, seeds) in ATTACKS.items()
        for condition in conditions
        for seed in seeds
    ]
    how = dict(work=attack, columns=ATTACK_COLUMNS, keys=ATTACK_COLUMNS[:3])
    how["text"] = ("condition",)
    table = run_jobs(jobs, RAW / "privacy_attacks.csv", processes, **how)
    table = table.sort_values(["attack", "condition", "seed"], kind="stable")
    table.to_csv(RESULTS / "privacy_attacks.csv", index=False, lineterminator="\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", nargs="?", choices=("tune", "grid", "attacks"))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    stages = {"tune": tune, "grid": grid, "attacks": attack_all}
    if options.stage:
        return stages[options.stage](options.processes)
    for job in grid_jobs(best_settings(), [0]):
        rows = score(job)
        mean = sum(row["balanced_accuracy"] for row in rows) / len(rows)
        print(f"{job[0]:18} {job[1]:22} {100 * mean:5.1f}")


if __name__ == "__main__":
    main()
