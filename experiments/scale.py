"""How large a federation may grow, on paper: the tables of docs/scale.md.

    python -m experiments.scale   # rewrites the tables of the page

Bytes and times on a line are arithmetic (`planning.run_cost`). What a byte costs the
server is measured: 8 updates of 45 MB read from folders, hashed, checked and averaged,
on the machine that benchmarks.csv names, taken in proportion to the bytes.
"""

import csv
import math
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

from fl_helpers.aggregation import weighted_average
from fl_helpers.planning import run_cost
from tools.pages import filled

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs/scale.md", ROOT / "docs/results/benchmarks.csv"
RESNET_BYTES = 44_802_848  # of one of the 8 updates
MILLION, BILLION = 4 * 10**6, 4 * 10**9  # bytes of so many float32
HEAD = 4 * (2048 + 1) * 14  # bytes: 2,048 features in, 14 findings out
CASES = {  # name: (silos, bytes of what travels)
    "1,000 silos, 1 M parameters": (1_000, MILLION),
    "10,000 silos, 1 M parameters": (10_000, MILLION),
    "20 hospitals, 1 B parameters": (20, BILLION),
    "20 hospitals, head of a 1 B model": (20, HEAD),
}
LINES = {"10 Mbit/s": 10, "100 Mbit/s": 100, "1 Gbit/s": 1_000, "10 Gbit/s": 10_000}
BUDGET = 60  # seconds for a round's exchange, where one server is said to stop
# Assumed, in a currency of yours: an hour of the server, a GB that leaves its cloud.
PRICE_HOUR, PRICE_GB = 0.5, 0.08


def measured():
    """Seconds per byte at the server, how much of them hashes, and on which machine."""
    with RESULTS.open(newline="") as file:
        found = {row["case"]: row for row in csv.DictReader(file)}
    average = found["average of 8 updates from folders, wall"]
    hashes = found["two SHA-256 passes alone / plain in disk"]
    return SimpleNamespace(
        second_per_byte=float(average["ours_s"]) / (8 * RESNET_BYTES),
        hash_per_byte=float(hashes["ours_s"]) / (2 * RESNET_BYTES),
        models=float(found["average of 8 updates from folders, extra memory"]["value"]),
        machine=average["machine"],
        date=average["date"],
    )


def on_the_line(silos, size, mbit_per_s):
    """Seconds of one round's transfer, both directions, on a line that all share."""
    how = dict(rounds=1, training_minutes=0, mbit_per_s=mbit_per_s)
    return 3600 * run_cost(size, silos=silos, **how)["hours"]


def one_round(silos, size, server):
    """{heading: value} of one round with one server."""
    seconds = {name: on_the_line(silos, size, mbit) for name, mbit in LINES.items()}
    core = server.second_per_byte * size * silos
    hours = (seconds["1 Gbit/s"] + core) / 3600
    return {
        "GB, both ways": 2 * size * silos / 1e9,
        **{f"s, {name}": value for name, value in seconds.items()},
        "s, server's core": core,
        "of that hash": server.hash_per_byte * size * silos,
        "server, GB": server.models * size / 1e9,
        "price": hours * PRICE_HOUR + silos * size / 1e9 * PRICE_GB,
    }


def where_it_stops(size, server):
    """How many silos one server serves in BUDGET seconds, by what binds it."""
    found = {name: BUDGET / on_the_line(1, size, mbit) for name, mbit in LINES.items()}
    found["one core"] = BUDGET / (server.second_per_byte * size)
    return {name: math.floor(silos) for name, silos in found.items()}


def two_levels(silos, size, mbit_per_s, server):
    """Branches, and seconds of a round with one level and with two, transfer and core.

    As many branches as a branch has silos; each place has a line of this speed, and
    branches work at the same time."""

    def place(children):
        core = server.second_per_byte * size * children
        return on_the_line(children, size, mbit_per_s) + core

    branches = math.ceil(math.sqrt(silos))
    two = place(math.ceil(silos / branches)) + place(branches)
    return branches, place(silos), two


def in_branches(branch_of):
    """An aggregate for `run_rounds`: each branch's average, then that of the branches.

    branch_of: a function of a silo's name; the silos of a branch must be neighbours in
    the order of names, so that one branch's average exists at a time."""

    def branches(updates):
        for branch, own in groupby(updates, lambda update: branch_of(update.silo)):
            examples = []
            params = weighted_average(_noted(own, examples))
            n = sum(examples)
            yield SimpleNamespace(silo=branch, params=params, num_examples=n)

    return lambda updates: weighted_average(branches(updates))


def _noted(updates, examples):
    for update in updates:
        examples.append(update.num_examples)
        yield update


def shown(value):
    """A count as it is, another number with three digits."""
    if isinstance(value, int):
        return f"{value:,}"
    digits = 2 - math.floor(math.log10(value)) if value else 0
    return f"{round(value, digits):,.{max(0, digits)}f}"


def markdown(rows):
    """{first column: {heading: value}} as a table."""
    heads = list(next(iter(rows.values())))
    text = f"| | {' | '.join(heads)} |\n|---{'|---:' * len(heads)}|\n"
    for name, cells in rows.items():
        text += f"| {name} | {' | '.join(map(shown, cells.values()))} |\n"
    return text


def tables():
    """{mark: Markdown} for the page."""
    server = measured()
    speed = f"{1e-9 / server.second_per_byte:.2f} GB/s"
    alone = f"{1e-9 / server.hash_per_byte:.2f} GB/s"
    rows = {name: one_round(*case, server) for name, case in CASES.items()}
    sizes = {"1 M parameters": MILLION, "1 B parameters": BILLION, "head": HEAD}
    stops = {name: where_it_stops(size, server) for name, size in sizes.items()}
    levels = {}
    for name, (silos, size) in list(CASES.items())[:2]:
        keys = "branches", "s, one level", "s, two levels"
        levels[name] = dict(
            zip(keys, two_levels(silos, size, 1_000, server), strict=True)
        )
    about = (
        f"Measured on {server.date} ({server.machine}), one core: an update is read, "
    )
    about += (
        f"hashed, checked and averaged at {speed}; SHA-256 alone runs at {alone}.\n"
    )
    return {
        "machine": about,
        "round": markdown(rows),
        "stops": markdown(stops),
        "levels": markdown(levels),
    }


def fill(page):
    """The page with its tables made anew."""
    for name, text in tables().items():
        page = filled(page, f"\n{text}", f"<!-- {name} -->")
    return page


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text()))
