"""What every framework here gets and returns: data, model, settings, result.

Each script is called as `python peers/<script>.py WORKLOAD RESULT.json SEED [ROUNDS]`.
"""

import json
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[1]))

from common import cnn_215k, sgd_epoch  # noqa: E402

from fl_helpers.silos import Examples, Silo  # noqa: E402

CONTRAST = 0.15  # of a class's pattern to the noise: hard enough to tell models apart


@dataclass(frozen=True)
class Workload:
    """FedAvg over `sampled` of `silos`, one local epoch of whole batches a round."""

    silos: int
    images: int  # of each silo
    sampled: int
    batch_size: int
    rounds: int
    pictures: bool = False  # W3: a Dataset, augmentation, ResNet-18, AdamW
    augment: bool = True

    @property
    def lr(self):
        """Momentum and weight decay: see common.sgd_epoch, pictures.adamw."""
        return 1e-3 if self.pictures else 0.02

    @property
    def steps(self):
        return self.rounds * self.sampled * (self.images // self.batch_size)


WORKLOADS = {
    "W1": Workload(silos=4, images=1000, sampled=4, batch_size=32, rounds=5),
    "W2": Workload(silos=100, images=100, sampled=10, batch_size=20, rounds=20),
    "W3": Workload(4, images=256, sampled=4, batch_size=16, rounds=3, pictures=True),
    # One batch per silo: no order of batches, so all must agree to rounding.
    "tiny": Workload(silos=4, images=100, sampled=4, batch_size=100, rounds=3),
    "tiny pictures": Workload(2, 8, 2, 8, rounds=1, pictures=True, augment=False),
}


def images(num_images, seed):
    """28 x 28 images of 10 classes: a coarse pattern per class, and noise."""
    rng = torch.Generator().manual_seed(1)
    patterns = torch.randn(10, 1, 7, 7, generator=rng)
    patterns = nn.functional.interpolate(patterns, scale_factor=4)
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(10, (num_images,), generator=rng)
    x = torch.randn(num_images, 1, 28, 28, generator=rng)
    return Examples(x + CONTRAST * patterns[y], y)


@cache
def silo(name, k):
    """Silo k of a workload; made where it is used, the same everywhere."""
    workload = WORKLOADS[name]
    if workload.pictures:
        from pictures import Pictures

        train = Pictures(workload.images, 100 + k, augment=workload.augment)
    else:
        train = images(workload.images, seed=100 + k)
    return Silo(f"silo {k:03d}", train, train)


class Model(nn.Sequential):
    """common.cnn_215k from the same start everywhere; NVFlare wants a class."""

    def __init__(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__(*cnn_215k())


def model_of(name):
    """The model of a workload, before round 1."""
    if not WORKLOADS[name].pictures:
        return Model()
    from pictures import Network

    return Network()


def train(model, name, k, *, seed, round_index):
    """One silo's work in one round, in place; returns the number of steps."""
    rng = torch.Generator().manual_seed(hash((seed, k, round_index)) % 2**63)
    workload, own = WORKLOADS[name], silo(name, k)
    how = workload.lr, workload.batch_size, rng
    if not workload.pictures:
        return sgd_epoch(model.train(), own, *how)
    from pictures import epoch

    return epoch(model.train(), own.train, *how)


def arguments():
    """Name of the workload, the workload, where its result goes, seed."""
    name, path, seed, *rounds = sys.argv[1:]
    workload = WORKLOADS[name]
    if rounds:
        workload = replace(workload, rounds=int(rounds[0]))
    return name, workload, Path(path), int(seed)


def write_result(path, params, *, ends, steps):
    """ends: the clock at the end of each round, where a framework tells it."""
    save_file(dict(params), path.with_suffix(".safetensors"))
    path.write_text(json.dumps(dict(ends=ends, steps=int(steps))))


def test_loss(name, params):
    """Mean cross-entropy and accuracy on images that nobody trained on: 4,000, or 1,000
    pictures."""
    model = model_of(name).eval()
    model.load_state_dict(params)
    if WORKLOADS[name].pictures:
        from pictures import Pictures

        data = Pictures(1000, 99, augment=False)
        x, y = torch.stack([data[k][0] for k in range(len(data))]), data.y
    else:
        x, y = images(4000, seed=99)
    with torch.no_grad():
        logits = torch.cat([model(part) for part in x.split(500)])
    loss = nn.functional.cross_entropy(logits, y).item()
    return loss, (logits.argmax(1) == y).float().mean().item()
