"""An update written, hashed, read and validated, against its bytes plain.

To a disk, where plain bytes are flushed to the device as ours are; and to memory, where
nothing is as slow as a disk and the two SHA-256 passes show.
"""

import hashlib
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from common import FULL, compare, report, row

from fl_helpers.exchange import Ledger, read_update, write_update
from fl_helpers.models import torchvision_model


def plain(folder, data):
    with (folder / "plain").open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    assert len((folder / "plain").read_bytes()) == len(data)


def ours(folder, update, ledger=None):
    how = dict(round_index=0, expected=update.params, ledger=ledger)
    write_update(folder, update, **how)
    read_update(folder, silo=update.silo, **how)


def main():
    torch.set_num_threads(1)
    params = torchvision_model("resnet18", 10).state_dict()
    update = SimpleNamespace(silo="a", params=params, num_examples=1, metrics={})
    rows = []
    places = {"disk": None, "memory": Path("/dev/shm")}
    for place, parent in places.items():
        if parent and not parent.is_dir():
            print(f"SKIPPED: {parent}, no file system in memory")
            continue
        with tempfile.TemporaryDirectory(dir=parent) as name:
            folder, other = Path(name, "update"), Path(name)
            write_update(folder, update, round_index=0)
            data = (folder / "update.safetensors").read_bytes()
            reference = partial(plain, other, data)
            times = compare(reference, partial(ours, folder, update))
            case = f"update to {place} and back"
            rows.append(row(case, times.wall, times=times))
            if not FULL:  # what follows has no bounds
                continue
            ledger = Ledger(other / "ledger.jsonl")
            times = compare(reference, partial(ours, folder, update, ledger))
            rows.append(row(f"{case}, with ledger", times.wall, times=times))

            def hashes(data=data):
                for _ in range(2):  # who writes, and who reads
                    hashlib.sha256(data).digest()

            times = compare(reference, hashes)
            case = f"two SHA-256 passes alone / plain in {place}"
            rows.append(row(case, times.wall, times=times))
    return report(f"exchange / plain bytes, {len(data) / 1e6:.1f} MB", rows)


if __name__ == "__main__":
    sys.exit(main())
