"""A silo's masks against the bare keystreams that they are made of, and the bytes.

The answer to a question with 4 and with 20 silos, for updates of 4.5 and 45 MB: that is
3 and 19 masks of pairs and one of its own.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import compare, report, row
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from fl_helpers.cross_silo.fixed_point import Plain, encode
from fl_helpers.exchange import write_update
from fl_helpers.models import torchvision_model
from fl_helpers.training import Update

BOUND = {"goal": 1.5, "bound": 2.0}
PIECE = 1 << 18  # bytes made at once
SIZES = {"4.5 MB": 1_125_000, "45 MB": 11_250_000}  # values of four bytes


def keystreams(size, masks):
    """Made, and not added to anything."""
    zeros, stream = bytes(PIECE), bytearray(PIECE + 63)
    for _ in range(masks):
        cipher = Cipher(algorithms.ChaCha20(bytes(32), bytes(16)), mode=None)
        cipher = cipher.encryptor()
        for _ in range(0, 4 * size, PIECE):
            cipher.update_into(zeros, stream)


def mask(plain, masks):
    for number in range(masks):
        plain.add(number.to_bytes(32, "little"))


def on_disk(update):
    """Bytes of the two files that leave."""
    with tempfile.TemporaryDirectory() as folder:
        write_update(folder, update, round_index=0)
        return sum(path.stat().st_size for path in Path(folder).iterdir())


def bytes_ratio():
    """A masked ResNet-18 in float32, with ten metrics, over the plain one."""
    start = torchvision_model("resnet18", 10).state_dict()
    metrics = [f"metric_{k}" for k in range(10)]
    update = Update("a", start, 100, {})
    plain = encode(update, start, total=400, metrics=metrics)
    parts = {
        "masked_weights": torch.from_numpy(plain.weights.view(np.int32)),
        "masked_numbers": torch.from_numpy(plain.numbers.view(np.int64)),
    }
    return on_disk(Update("a", parts, 1, {})) / on_disk(update)


def main():
    case = "bytes of a masked update / a plain one"
    rows = [row(case, bytes_ratio()) | {"goal": 1.05, "bound": 1.05}]
    for name, size in SIZES.items():
        for silos in (4, 20):
            plain = Plain(np.zeros(size, np.uint32), np.zeros(21, np.uint64))
            times = compare(
                lambda size=size, silos=silos: keystreams(size, silos),
                lambda plain=plain, silos=silos: mask(plain, silos),
                pairs=3,
            )
            case = f"masks of {silos} silos, {name} / bare keystreams, CPU"
            rows.append(row(case, times.cpu, times=times) | BOUND)
            begun = time.process_time()
            mask(plain, silos)
            spent = time.process_time() - begun
            rows.append(row(f"masks of {silos} silos, {name}", spent, unit="CPU s"))
    return report("masks of secure sums", rows)


if __name__ == "__main__":
    sys.exit(main())
