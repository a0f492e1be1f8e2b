"""The robust rules against one add_ per tensor, on updates of a ResNet-18.

8 updates; with --full also 32, and 100 once. Each update has memory of
its own, as in a real round: numbers that do not fit into what is free are skipped.
"""

import sys
from functools import partial
from types import SimpleNamespace

import torch
from common import FULL, compare, extra_memory, free_memory, report, row

from fl_helpers.models import torchvision_model
from fl_helpers.robust import (
    NormClipping,
    coordinate_median,
    geometric_median,
    krum,
    trimmed_mean,
)

PAIRS = {8: 5, 32: 5, 100: 1} if FULL else {8: 5}


def make_updates(start, number):
    """Silos that went differently far; one in eight ten times as far as the others."""
    rng, updates = torch.Generator().manual_seed(0), []
    for k in range(number):
        size = (1e-3 if k % 8 else 1e-2) * (1 + k / number)
        params = {
            name: value + size * torch.randn(value.shape, generator=rng)
            if value.is_floating_point()
            else value.clone()
            for name, value in start.items()
        }
        update = SimpleNamespace(silo=f"{k:03d}", params=params, num_examples=1)
        updates.append(update)
    return updates


def one_pass(updates):
    mean = {name: value.clone() for name, value in updates[0].params.items()}
    for update in updates[1:]:
        for name, value in update.params.items():
            mean[name].add_(value)
    return mean


def rules(start, number):
    few = max(1, number // 8)
    return {
        "coordinate_median": coordinate_median,
        "trimmed_mean": partial(trimmed_mean, trim=few),
        "krum": partial(krum, malicious=few),
        "geometric_median": geometric_median,
        "NormClipping": lambda updates: NormClipping(start)(updates),
    }


def main():
    torch.set_num_threads(1)
    start = torchvision_model("resnet18", 10).state_dict()
    size = sum(value.nbytes for value in start.values())
    rows = []
    for number, pairs in PAIRS.items():
        if free_memory() < 1.5 * number * size + 2e9:
            print(f"SKIPPED: {number} updates do not fit into the free memory")
            continue
        updates = make_updates(start, number)
        how = dict(pairs=pairs, warm_up=False)
        for name, rule in rules(start, number).items():
            case = f"{name}, {number} updates"
            work = partial(one_pass, updates), partial(rule, updates)
            extra = extra_memory(work[1])[0] / size if FULL else None  # has no bound
            times = compare(*work, **how)
            rows.append(row(case, times.wall, times=times))
            if extra is not None:
                rows.append(row(f"{case}, extra memory", extra, unit="models"))
        del updates
    return report("robust rules / one add_ per tensor, 11.2 M parameters", rows)


if __name__ == "__main__":
    sys.exit(main())
