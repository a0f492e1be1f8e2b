"""Kill a run of `run_rounds` with SIGKILL, go on, and compare the final bits.

    python tests/killed.py FOLDER

Started by `test_faults.py`, in a process of its own: it forks, and torch must not have
used threads before. Each child is one attempt at the run; it ends by itself or is
killed, at a chosen event (a silo begins, half of a checkpoint is written, ...) or by
the clock.
"""

import hashlib
import io
import json
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from conftest import batchnorm_model, play

from fl_helpers import checkpoint
from fl_helpers.aggregation import FedAdam
from fl_helpers.exchange import Limits, check_update
from fl_helpers.faults import crash, unreachable, with_faults
from fl_helpers.training import train_locally

events = []  # names of what has happened in this process
kill_at = None  # number of the event at which it ends


def event(name):
    if len(events) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    events.append(name)


def client(params, silo, *, round_index, rng):
    event(f"silo {silo.name} begins")
    model = batchnorm_model()
    model.load_state_dict(params)
    return train_locally(model, silo, epochs=1, lr=0.1, batch_size=8, rng=rng)


def save_in_halves(content, file, save=torch.save):
    whole = io.BytesIO()
    save(content, whole)
    data = whole.getvalue()
    event("before writing")
    file.write(data[: len(data) // 2])
    file.flush()
    event("half is written")
    file.write(data[len(data) // 2 :])
    event("all is written, not flushed")


def replace_watched(source, target, replace=os.replace):
    event("before renaming")
    replace(source, target)
    event("renamed")


def go(checkpoint=None):
    """One run with everything that a checkpoint must hold; returns the final bits."""
    rng = torch.Generator().manual_seed(0)
    silos = [
        SimpleNamespace(
            name=name,
            train=(torch.randn(n, 1, 16, 16, generator=rng), torch.arange(n) % 2),
        )
        for name, n in zip("abcd", (24, 16, 32, 16), strict=True)
    ]
    torch.manual_seed(0)
    model = batchnorm_model()
    start, names = model.state_dict(), [name for name, _ in model.named_parameters()]
    faults = {("b", 1): [crash], ("c", 3): unreachable}
    history = play(
        start,
        silos,
        with_faults(client, faults),
        FedAdam(start, names, lr=0.05),
        rounds=6,
        seed=1,
        silos_per_round=3,
        quorum=2,
        check=partial(check_update, limits=Limits(norm_factor=4.0)),
        keep_local=["3.bias"],
        workers=1,
        checkpoint=checkpoint,
        on_round=lambda record, params: event("round done"),
    )
    digest = hashlib.sha256()
    for params in (history.params, *(history.local[name] for name in "abcd")):
        for name in sorted(params):
            digest.update(params[name].numpy().tobytes())
    facts = [[r[k] for k in ("round", "silos", "missing")] for r in history.rounds]
    return f"{digest.hexdigest()} {facts}"


def attempt(folder, number=None, seconds=None):
    """One process that runs or goes on; returns its result, None if it was killed."""
    global kill_at
    child = os.fork()
    if child == 0:
        kill_at = number
        result = go(folder / "run.pt")
        (folder / "unfinished").write_text(json.dumps([result, events]))
        (folder / "unfinished").rename(folder / "result")
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), "the run failed; see above"
    done = folder / "result"
    return json.loads(done.read_text()) if done.exists() else None


def main(root):
    torch.set_num_threads(1)
    checkpoint.torch.save, checkpoint.os.replace = save_in_halves, replace_watched
    expected = go()
    events.clear()
    folder = root / "whole"
    folder.mkdir()
    started = time.monotonic()
    found, names = attempt(folder)
    length = time.monotonic() - started
    assert found == expected
    first = names.index("before writing")  # all of the first one, then anything
    rng = random.Random(0)
    points = [*range(first, first + 6), *rng.sample(range(len(names)), 10)]
    for point in points:
        folder = root / f"at_{point}"
        folder.mkdir(exist_ok=True)
        assert attempt(folder, number=point) is None
        attempt(folder, number=rng.randrange(4, 40))  # and perhaps once more
        found, _ = attempt(folder)
        assert found == expected, f"killed at {point}, {names[point]}"
    print(f"killed at {[names[point] for point in points]}")
    kills = 0
    for folder in (root / f"by_time_{k}" for k in range(4)):
        folder.mkdir()
        found, wanted = None, kills + 3
        while found is None:
            wait = rng.uniform(0, length) if kills < wanted else None
            found = attempt(folder, seconds=wait)
            kills += found is None
        assert found[0] == expected, f"killed {kills} times"
    print(f"killed by time {kills} times")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
