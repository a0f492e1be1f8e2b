"""weighted_average over 100 updates of a ResNet-18 against one add_ per tensor."""

import sys
from functools import partial
from types import SimpleNamespace

import torch
from common import compare, extra_memory, report, row, summary

from fl_helpers.aggregation import weighted_average
from fl_helpers.models import torchvision_model

NUM_UPDATES, BUFFERS = 100, 3


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


def main():
    torch.set_num_threads(1)
    rows, runs = [], []
    if sys.platform == "linux":
        states = resnet_states()
        extra, _ = extra_memory(partial(average, states))
        model = sum(value.nbytes for value in states[0].values())
        case = "average of 100 updates, extra memory"
        rows.append(row(case, extra / model, unit="models"))
    for _ in range(3):  # where the tensors lie in memory changes the ratio by 0.2
        states = resnet_states()
        reference = partial(one_pass, states)
        ours = partial(average, states)
        runs += compare(reference, ours, pairs=5).runs
    times = summary(runs)
    rows.append(row("average of 100 updates, CPU", times.cpu, times=times))
    return report("weighted_average / one add_ per tensor, 11.2 M parameters", rows)


if __name__ == "__main__":
    sys.exit(main())
