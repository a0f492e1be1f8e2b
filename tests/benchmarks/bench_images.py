"""Images read one by one against a hand-written DataLoader loop and a plain listing."""

import copy
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import (
    FULL,
    cnn_215k,
    compare,
    extra_memory,
    image_silos,
    memory,
    report,
    row,
)
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fl_helpers.aggregation import weighted_average
from fl_helpers.images import ImageFiles, index_images
from fl_helpers.models import freeze, small_cnn, torchvision_model
from fl_helpers.silos import Silo, make_silos, partition_by_site
from fl_helpers.simulation import Execution, Terms, run_rounds, state_bytes
from fl_helpers.training import Step, frozen_entries, sgd_client, train_locally

BATCH, LR, PLAIN = 32, 0.05, Step()


def loader_loop(model, data, rng):
    """What anyone would write for a Dataset."""
    optimizer = torch.optim.SGD(model.parameters(), LR, 0.9, weight_decay=1e-4)
    for x, y in DataLoader(data, BATCH, shuffle=True, drop_last=True, generator=rng):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def dataset_rows():
    (silo,) = image_silos(1, 1600)
    data, model = TensorDataset(*silo.train), cnn_215k().train()
    start = copy.deepcopy(model.state_dict())
    lazy = Silo("a", data, data)

    def bare():
        model.load_state_dict(start)
        loader_loop(model, data, torch.Generator().manual_seed(0))

    def ours(silo=lazy, step=PLAIN):
        model.load_state_dict(start)
        rng = torch.Generator().manual_seed(0)
        how = dict(epochs=1, lr=LR, batch_size=BATCH, rng=rng, step=step)
        train_locally(model, silo, **how)

    times = compare(bare, ours, pairs=9)
    case = "train_locally of a Dataset / DataLoader loop"
    rows = [row(f"{case}, CPU", times.cpu, times=times)]
    rows += [row(f"{case}, clock", times.wall, times=times)]
    last = partial(ours, silo, Step(channels_last=True))
    model.to(memory_format=torch.contiguous_format)
    times = compare(partial(plain, ours, model, silo), last, pairs=9)
    case = "channels_last / plain, CNN of 215,370 parameters, CPU"
    return [*rows, row(case, times.cpu, times=times)]


def plain(ours, model, silo):
    model.to(memory_format=torch.contiguous_format)
    ours(silo)


def write_folder(root, count, size, distinct=None):
    """Images of noise, in which nothing compresses, for four hospitals.

    distinct: so many are written, and all others are hard links to them: a folder of
    gigabytes to whoever reads it, and some megabytes on the disk.
    """
    rng, written = np.random.default_rng(0), []
    for k in range(count):
        path = root / f"Hospital {k % 4}" / f"class {k // 4 % 2}" / f"{k:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if distinct and k >= distinct:
            path.hardlink_to(written[k % distinct])
            continue
        pixels = rng.integers(256, size=(size, size), dtype=np.uint8)
        Image.fromarray(pixels).save(path, compress_level=0)
        written.append(path)


def index_row(root):
    def listing():
        for path in root.glob("*/*/*.png"):
            with Image.open(path) as image:
                assert image.size

    times = compare(listing, lambda: index_images(root), pairs=5)
    print(f"index of {len(index_images(root)):,} files: {times.candidate:.1f} s")
    case = "index of PNG files / opening each with Pillow, CPU"
    return row(case, times.cpu, times=times)


def memory_row(root, count, size):
    """A round over images of which memory never holds more than a batch."""
    index = index_images(root)
    files = ImageFiles(index, image_size=64)
    parts = partition_by_site(index.site)
    silos = make_silos(files, index.y, parts, test_share=0.2, seed=0)
    client = sgd_client(lambda: small_cnn(2), epochs=1, lr=LR, batch_size=16)
    start, here = small_cnn(2).state_dict(), Execution(workers=2, progress=False)

    def federate():
        run = dict(rounds=1, seed=0, execution=here)
        return run_rounds(start, silos, client, weighted_average, **run)

    federate()  # what is loaded and compiled once is not the data's
    extra, _ = extra_memory(federate)
    peak, images = memory("VmHWM") / 1e6, count * size**2 / 1e6
    print(f"{extra / 1e6:.0f} MB for {images:.0f} MB of images, {peak:.0f} MB in all")
    case = "memory of a run over a folder / its decoded images"
    return row(case, extra / (count * size**2))


def head_row():
    """Four silos with a ResNet-18, of which the head is trained: one round's bytes."""
    model = freeze(torchvision_model("resnet18", 2), up_to="layer4")
    params = model.state_dict()
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(4, 3, 32, 32, generator=rng), torch.arange(4) % 2
    silos = [Silo(name, (x, y), (x, y)) for name in "ABCD"]
    client = sgd_client(lambda: model, epochs=1, lr=LR, batch_size=4)
    history = run_rounds(
        params, silos, client.update, weighted_average, rounds=1, seed=0,
        terms=Terms(keep_local=frozen_entries(model)),
        execution=Execution(1, progress=False),
    )  # fmt: skip
    head = {name: params[name] for name in ("fc.weight", "fc.bias")}
    assert history.bytes_sent == 2 * 4 * state_bytes(head)  # to the byte
    whole = 2 * 4 * state_bytes(params)
    case = "bytes of a round, head only / whole ResNet-18"
    return row(case, history.bytes_sent / whole)


def main():
    torch.set_num_threads(1)
    rows = dataset_rows()
    with tempfile.TemporaryDirectory() as folder:
        many = Path(folder, "many")
        write_folder(many, 20_000 if FULL else 2_000, 16)
        rows.append(index_row(many))
    if FULL:
        with tempfile.TemporaryDirectory() as folder:
            count, size = 500, 2048  # 2.1 GB of pixels, 0.1 GB on the disk
            write_folder(Path(folder), count, size, distinct=25)
            rows.append(memory_row(Path(folder), count, size))
    rows.append(head_row())
    return report("images: train_locally / by hand", rows)


if __name__ == "__main__":
    sys.exit(main())
