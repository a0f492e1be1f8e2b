"""Run inside of a container by test_containers.py: one turn, and what is in reach."""

import ctypes
import json
import os
import socket
from pathlib import Path

import torch
from safetensors.torch import save_file

from fl_helpers.cross_silo import sandbox
from fl_helpers.cross_silo.on_premises import job, precheck, trainer
from fl_helpers.cross_silo.run import Run
from fl_helpers.models import small_cnn

KIT = Path("/srv/fl/kit")
SETTINGS = {"num_classes": 2, "rounds": 3, "epochs": 1, "lr": 0.05, "batch_size": 8}


def new_run():
    torch.manual_seed(0)
    return Run("x", small_cnn(2).state_dict(), rounds=3, seed=1, settings=SETTINGS)


def write(path):
    return lambda: Path(path).write_text("x")


def mount():
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", b"/tmp", b"tmpfs", 0, None):
        raise OSError(ctypes.get_errno(), "mount")


def load_into_the_kernel():
    libc = ctypes.CDLL(None, use_errno=True)
    bpf = {"x86_64": 321, "aarch64": 280}[os.uname().machine]
    if libc.syscall(bpf, 0, None, 0) < 0 and ctypes.get_errno() in (1, 38):
        raise OSError(ctypes.get_errno(), "bpf")


ATTEMPTS = {
    "read the key": lambda: (KIT / "startup/client.key").read_text(),
    "read the data": lambda: next(Path("/srv/fl/data").iterdir()).read_bytes(),
    "write in the kit": write(KIT / "ledger.jsonl"),
    "write in /tmp": write("/tmp/x"),
    "change the key": write(KIT / "startup/client.key"),
    "change the policy": write(KIT / "local/egress.json"),
    "a new file of policy": write(KIT / "local/new"),
    "change the data": write("/srv/fl/data/new"),
    "change the code": write("/opt/fl/client/hospital.py"),
    "change the package": write("/opt/fl/code/fl_helpers/new.py"),
    "write in the root": write("/new"),
    "write in /etc": write("/etc/hosts"),
    "a setting of the kernel": write("/proc/sys/vm/swappiness"),
    "become root": lambda: os.setuid(0),
    "give a file away": lambda: os.chown("/tmp/x", 0, 0),
    "mount": mount,
    "a device": lambda: os.mknod("/tmp/d", 0o20666, os.makedev(1, 1)),
    "load into the kernel": load_into_the_kernel,
    "another machine": lambda: socket.create_connection(("203.0.113.7", 1), timeout=5),
}


def works(attempt):
    try:
        attempt()
    except OSError:
        return False
    return True


def main():
    status = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in status if ":\t" in line)
    said = {
        "done": [name for name, attempt in ATTEMPTS.items() if works(attempt)],
        "status": {k: v.split() for k, v in status.items()},
        "network": os.listdir("/sys/class/net"),
        "sandbox": sandbox.available_sandbox(),
        "rows": {row["item"]: row["ok"] for row in precheck.precheck(KIT)},
    }
    run = new_run()
    job_of_it = job.Job("0" * 32, {"Hospital-A": "Hospital A"}, run, KIT)
    its = trainer.Trainer(KIT, job_of_it)
    update, _ = its.turn("train", run.params, 0)
    its.close()
    save_file(update.params, KIT / "update")
    said["examples"] = update.num_examples
    (KIT / "said").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
