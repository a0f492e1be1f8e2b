"""Which rule withstands which attack: rules x attacks x 0, 1 or 2 malicious of six.

    python -m experiments.poisoning grid   # docs/results/poisoning.csv
    python -m experiments.poisoning        # a quick look: one seed, prints only

Scores are those of the four hospitals that are honest in every case. Rules are set for
one malicious hospital, since nobody knows the number beforehand. Rows that the file has
are not computed again, so that a run which was stopped goes on.
"""

import argparse
import functools
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from experiments.grids import run_jobs
from fl_helpers import poisoning, robust
from fl_helpers.aggregation import weighted_average
from fl_helpers.models import small_cnn
from fl_helpers.robust import NormClipping
from fl_helpers.silos import Examples, make_silos, partition_by_site
from fl_helpers.simulation import Execution, run_rounds
from fl_helpers.synthetic_cxr import synthetic_cxr
from fl_helpers.training import cosine_schedule, evaluate, sgd_client

RESULTS = Path(__file__).parents[1] / "docs/results/poisoning.csv"
RAW = Path(__file__).parents[1] / "runs/poisoning.csv"  # rows as they are computed
SIZES, TEST_SHARE = (960, 800, 640, 480, 400, 320), 0.75
ROUNDS, LOCAL_EPOCHS, BATCH_SIZE, LR = 8, 2, 16, 0.04  # LR: docs/results/tuning.csv
MALICIOUS = ("Hospital C", "Hospital D")  # with 18 % and 13 % of the training images
TARGET = 0  # what the backdoor makes of a marked image: "normal"
SEEDS = range(10, 13)  # nothing was chosen on them

ATTACKS = {  # what is done to (the data, the update)
    "none": (None, None),
    "labels": ("labels", None),
    "labels, x5": ("labels", partial(poisoning.scale_delta, factor=5)),
    "labels, claims x10": ("labels", partial(poisoning.claim_examples, factor=10)),
    "sign, x3": (None, partial(poisoning.scale_delta, factor=-3)),
    "noise, x5": (None, partial(poisoning.send_noise, factor=5)),
    "a little": (None, None),  # done to the aggregation
    "backdoor": ("backdoor", None),
    "backdoor, x5": ("backdoor", partial(poisoning.scale_delta, factor=5)),
}
WEAK = ("noise, x5", "a little")  # tried with two only
# How a rule is made for one run, from the initial model and its trainable entries, over
# which distances go: BatchNorm statistics would outweigh them (seen on other seeds).
RULES = {
    "weighted average": lambda start, entries: weighted_average,
    "norm clipping": lambda start, entries: NormClipping(start, entries=entries),
    "median": lambda start, entries: robust.coordinate_median,
    "trimmed mean": lambda start, entries: partial(robust.trimmed_mean, trim=1),
    "Krum": lambda start, entries: partial(robust.krum, malicious=1, entries=entries),
    "Multi-Krum": lambda start, entries: partial(
        robust.krum, malicious=1, keep=4, entries=entries
    ),
    "geometric median": lambda start, entries: partial(
        robust.geometric_median, entries=entries
    ),
}
REFERENCES = {
    "equal votes": lambda start, entries: partial(robust.trimmed_mean, trim=0),
    "without them": lambda start, entries: weighted_average,  # of the honest ones alone
}
COLUMNS = (
    "heterogeneity", "malicious", "attack", "rule", "seed", "balanced_accuracy",
    "worst", "attack_success", "without_marker",
)  # fmt: skip


@functools.lru_cache(maxsize=2)
def make_federation(heterogeneity, seed):
    data = synthetic_cxr(SIZES, heterogeneity=heterogeneity, seed=seed)
    partition = partition_by_site(data.site)
    return make_silos(data.x, data.y, partition, test_share=TEST_SHARE, seed=seed)


def poison_data(silo, kind, seed):
    x, y = silo.train
    if kind == "labels":
        return replace(silo, train=Examples(x, poisoning.flip_labels(y, 3)))
    rng = torch.Generator().manual_seed(seed)
    marked = poisoning.implant_marker(x, y, target=TARGET, share=0.5, rng=rng)
    return replace(silo, train=Examples(*marked))


def load(params):
    model = small_cnn(3)
    model.load_state_dict(params)
    return model


CLIENT = sgd_client(
    partial(small_cnn, 3),
    epochs=LOCAL_EPOCHS,
    lr=cosine_schedule(LR, ROUNDS),
    batch_size=BATCH_SIZE,
)


def train(heterogeneity, malicious, attack, rule, seed):
    """Returns the history of the run."""
    silos, names = make_federation(heterogeneity, seed), MALICIOUS[:malicious]
    torch.manual_seed(seed)
    model = small_cnn(3)
    start, entries = model.state_dict(), [name for name, _ in model.named_parameters()]
    aggregate, update = (RULES | REFERENCES)[rule](start, entries), CLIENT.update
    kind, change = ATTACKS[attack]
    if rule == "without them":
        silos = [silo for silo in silos if silo.name not in names]
    elif kind:
        silos = [poison_data(s, kind, seed) if s.name in names else s for s in silos]
    if change:
        known = {} if attack == "labels, claims x10" else {"entries": entries}
        update = poisoning.with_attack(CLIENT.update, names, partial(change, **known))
    if attack == "a little":
        little = partial(poisoning.a_little_is_enough, z=1.5, entries=entries)
        aggregate = little(aggregate, names)
    here = Execution(workers=1, progress=False)
    options = dict(rounds=ROUNDS, seed=seed, execution=here)
    return run_rounds(start, silos, update, aggregate, **options)


def score(job):
    """The row of one job: (heterogeneity, malicious, attack, rule, seed)."""
    torch.set_num_threads(1)
    model = load(train(*job).params)
    silos = make_federation(job[0], job[-1])
    tests = [silo.test for silo in silos if silo.name not in MALICIOUS]
    accuracy = [evaluate(model, test)["balanced_accuracy"] for test in tests]
    seen = Examples(*map(torch.cat, zip(*tests, strict=True)))
    marked, plain = (
        poisoning.backdoor_success(model, seen, target=TARGET, mark=mark)
        for mark in (poisoning.add_marker, torch.clone)
    )
    numbers = [np.mean(accuracy), min(accuracy), marked, plain]
    numbers = [round(float(value), 4) for value in numbers]
    return dict(zip(COLUMNS, (*job, *numbers), strict=True))


def rows_of(job):
    return [score(job)]


def jobs_for(seeds=SEEDS):
    """Every attack where hospitals differ as usual; who is honest, however they do."""
    for seed in seeds:
        for heterogeneity in (0.0, 0.25, 1.0):
            for rule in (*RULES, "equal votes"):
                yield heterogeneity, 0, "none", rule, seed
        for malicious in (1, 2):
            yield 0.25, malicious, "none", "without them", seed
            for attack in list(ATTACKS)[1:]:
                if malicious == 1 and attack in WEAK:
                    continue
                for rule in RULES:
                    yield 0.25, malicious, attack, rule, seed


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", nargs="?", choices=("grid",))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if options.stage == "grid":
        how = dict(work=rows_of, columns=COLUMNS, keys=COLUMNS[:5])
        table = run_jobs(jobs_for(), RAW, options.processes, **how)
        table.to_csv(RESULTS, index=False, lineterminator="\n")
    else:
        for rule in RULES:
            print(*score((0.25, 1, "backdoor, x5", rule, 0)).values())


if __name__ == "__main__":
    main()
