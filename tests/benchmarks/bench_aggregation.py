"""weighted_average over 100 updates of a ResNet-18 against one add_ per tensor."""

import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from common import at_most, compare, report, timed

from fl_helpers.aggregation import weighted_average
from fl_helpers.models import torchvision_model

NUM_UPDATES, BUFFERS = 100, 3


def current_rss():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_rss():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def updates(states):
    """100 updates that take turns with a few states: 45 MB each, 4.5 GB read."""
    for k in range(NUM_UPDATES):
        state = states[k % BUFFERS]
        yield SimpleNamespace(silo=str(k), num_examples=k + 1, params=state)


def one_pass(states):
    total = NUM_UPDATES * (NUM_UPDATES + 1) // 2  # 1 + 2 + ... + 100
    mean = {}
    for update in updates(states):
        share = update.num_examples / total
        for name, value in update.params.items():
            if name not in mean:
                mean[name] = value * share if value.is_floating_point() else value
            elif value.is_floating_point():
                mean[name].add_(value, alpha=share)
    return mean


def main():
    torch.set_num_threads(1)
    states = [torchvision_model("resnet18", 10).state_dict() for _ in range(BUFFERS)]
    model_bytes = sum(value.nbytes for value in states[0].values())
    rows = []
    if sys.platform == "linux":
        # The memory that is in use now must be the highest so far, or a peak below it
        # would not show: fill up to it.
        filler = torch.ones(
            max(0, peak_rss() - current_rss()) + 2**20, dtype=torch.int8
        )
        before = current_rss()
        weighted_average(updates(states))
        extra = (peak_rss() - before) / model_bytes
        del filler
        rows.append(at_most("extra memory, in models", extra, 1.2, 0.05))
    times = compare(lambda: one_pass(states), lambda: weighted_average(updates(states)))
    rows.append(timed("time of 100 updates", times, 1.5, 0.2))
    return report("weighted_average / one add_ per tensor, 11.2 M parameters", rows)


if __name__ == "__main__":
    sys.exit(main())
