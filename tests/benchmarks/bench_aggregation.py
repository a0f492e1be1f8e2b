"""weighted_average over 100 updates of a ResNet-18 against one add_ per tensor."""

import resource
import sys
from functools import partial
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


def average(states):
    return weighted_average(updates(states))


def resnet_states():
    return [torchvision_model("resnet18", 10).state_dict() for _ in range(BUFFERS)]


def extra_memory(states):
    """Peak memory of one aggregation, in models."""
    # The memory that is in use now must be the highest so far, or a peak below it
    # would not show: fill up to it.
    filler = torch.ones(max(0, peak_rss() - current_rss()) + 2**20, dtype=torch.int8)
    before = current_rss()
    weighted_average(updates(states))
    extra = peak_rss() - before
    del filler
    return extra / sum(value.nbytes for value in states[0].values())


def main():
    torch.set_num_threads(1)
    rows, repetitions = [], []
    if sys.platform == "linux":
        extra = extra_memory(resnet_states())
        rows.append(at_most("extra memory, in models", extra, 1.2, 0.05))
    for _ in range(3):  # where the tensors lie in memory changes the ratio by 0.2
        states = resnet_states()
        reference = partial(one_pass, states)
        ours = partial(average, states)
        repetitions.append(compare(reference, ours, pairs=5))
    times = sorted(repetitions, key=lambda times: times.cpu)[1]
    rows.append(timed("time of 100 updates", times, 1.5, 0.2))
    return report("weighted_average / one add_ per tensor, 11.2 M parameters", rows)


if __name__ == "__main__":
    sys.exit(main())
