"""weighted_average over 100 updates of a ResNet-18 against one add_ per tensor.

From memory, and from folders as the silos write them: hashes and checks included.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from common import FULL, compare, extra_memory, report, row, summary
from safetensors.torch import load_file

from fl_helpers.aggregation import weighted_average
from fl_helpers.exchange import read_update, write_update
from fl_helpers.models import torchvision_model

NUM_UPDATES, BUFFERS, FROM_FOLDERS = 100, 3, 8


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


def write_folders(states, parent):
    folders = []
    for k in range(FROM_FOLDERS):
        update = SimpleNamespace(silo=str(k), num_examples=1, metrics={})
        update.params = states[k % BUFFERS]
        folders.append(write_update(parent / str(k), update, round_index=0))
    return folders


def one_pass_over_files(folders):
    mean = {}
    for folder in folders:
        for name, value in load_file(folder / "update.safetensors").items():
            if name not in mean:
                mean[name] = value
            elif value.is_floating_point():
                mean[name].add_(value, alpha=1 / FROM_FOLDERS)
    return mean


def average_folders(folders, expected):
    how = dict(expected=expected, round_index=0)
    return weighted_average(read_update(f, silo=f.name, **how) for f in folders)


def average(states):
    return weighted_average(updates(states))


def resnet_states():
    return [torchvision_model("resnet18", 10).state_dict() for _ in range(BUFFERS)]


def from_folders(states):
    """Rows of the average over updates that come as files, the page cache warm."""
    rows, case = [], f"average of {FROM_FOLDERS} updates from folders"
    with tempfile.TemporaryDirectory() as parent:
        folders = write_folders(states, Path(parent))
        ours = partial(average_folders, folders, states[0])
        if sys.platform == "linux":
            extra, _ = extra_memory(ours)
            model = sum(value.nbytes for value in states[0].values())
            rows.append(row(f"{case}, extra memory", extra / model, unit="models"))
        if FULL:  # it has no bound
            times = compare(partial(one_pass_over_files, folders), ours, pairs=3)
            rows.append(row(f"{case}, wall", times.wall, times=times))
    return rows


def sums(states):
    """The check for NaN alone: one read of all values."""
    for update in updates(states):
        for value in update.params.values():
            value.sum().item()


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
    if FULL:  # it has no bound
        times = compare(partial(one_pass, states), partial(sums, states), pairs=3)
        rows.append(row("the check for NaN alone, CPU", times.cpu, times=times))
    rows += from_folders(resnet_states())
    return report("weighted_average / one add_ per tensor, 11.2 M parameters", rows)


if __name__ == "__main__":
    sys.exit(main())
