"""Draw architecture.png, a round and its files: python docs/pics/architecture.py."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Circle, FancyBboxPatch

DOWN, UP = "#0072B2", "#D55E00"  # as in federation.py
INK, GREY, SKY, PALE = "#1F2933", "#5F6B76", "#E6F1F8", "#F4F6F8"
WAYS = ("simulation", "on premises", "Azure ML")
COLUMNS = (4.05, 5.95, 7.75)  # inches from the left

# (step, file on each way); one text for all three is the same file on all of them.
ORCHESTRATOR_BEFORE = (
    ("agree on a run", ("simulation.py", "run.py", "run.py")),
    ("send the global model", ("simulation.py", "controller.py", "pipeline.py")),
)
SILO = (
    ("receive and check it", ("simulation.py", "turn.py", "jobs/common.py")),
    ("load the data, say how to train", ("silos.py", "hospital.py", "hospital.py")),
    ("train", ("training.py",)),
    ("check what may leave", ("exchange.py", "gate.py", "jobs/train.py")),
)
ORCHESTRATOR_AFTER = (
    ("check what came", ("exchange.py",)),
    ("average", ("aggregation.py  robust.py",)),
    ("remember, go on or stop", ("checkpoint.py", "record.py", "rounds.py")),
)
BANDS = (
    ("orchestrator", ORCHESTRATOR_BEFORE, SKY, DOWN),
    ("each silo", SILO, PALE, INK),
    ("orchestrator", ORCHESTRATOR_AFTER, SKY, DOWN),
)
ROW, GAP, TOP, WIDTH = 0.36, 0.42, 0.62, 9.4


def band(ax, y, title, rows, fill, line, first):
    """Draw one place with its steps below y; returns where it ends."""
    height = ROW * len(rows) + 0.16
    shape = FancyBboxPatch(
        (0.85, y - height), WIDTH - 1.0, height, fc=fill, ec=line, lw=1.8,
        boxstyle="round,pad=0,rounding_size=0.1",
    )  # fmt: skip
    ax.add_patch(shape)
    where = {"rotation": 90, "ha": "center", "va": "center", "weight": "bold"}
    ax.text(0.62, y - height / 2, title.replace(" ", "\n"), color=line, **where)
    for k, (step, files) in enumerate(rows):
        at = y - 0.08 - ROW * (k + 0.5)
        ax.add_patch(Circle((1.1, at), 0.125, fc="white", ec=line, lw=1.5))
        ax.text(1.1, at - 0.01, str(first + k), ha="center", va="center", fontsize=8.5)
        ax.text(1.33, at, step, va="center")
        mono = {"family": "DejaVu Sans Mono", "fontsize": 9, "va": "center"}
        if len(files) == 1:
            ax.plot([COLUMNS[0], WIDTH - 0.3], [at - 0.15] * 2, color=GREY, lw=0.8)
            ax.text(6.75, at, files[0], ha="center", weight="bold", **mono)
        else:
            for x, name in zip(COLUMNS, files, strict=True):
                ax.text(x, at, name, **mono)
    return y - height


def crossing(ax, y, text, colour):
    """What goes from one place to the next, between y and the band below."""
    arrow = {"arrowstyle": "-|>", "lw": 2.4, "color": colour, "mutation_scale": 16}
    ax.annotate("", (2.0, y - GAP + 0.02), (2.0, y - 0.02), arrowprops=arrow)
    ax.text(2.2, y - GAP / 2, text, color=colour, va="center", weight="bold")


def main():
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10})
    plt.rcParams["text.color"] = INK
    steps = sum(len(rows) for _, rows, _, _ in BANDS)
    height = TOP + ROW * steps + 3 * 0.16 + 2 * GAP + 0.1
    fig = plt.figure(figsize=(WIDTH, height), facecolor="white")
    ax = fig.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, height))
    ax.axis("off")
    for x, way in zip(COLUMNS, WAYS, strict=True):
        ax.text(x, height - 0.3, way, weight="bold", va="center")
    y, first = height - TOP + 0.1, 1
    messages = (("global model", DOWN), ("update", UP))
    for number, (title, rows, fill, line) in enumerate(BANDS):
        y = band(ax, y, title, rows, fill, line, first)
        first += len(rows)
        if number < 2:
            crossing(ax, y, *messages[number])
            y -= GAP
    path = Path(__file__).with_suffix(".png")
    fig.savefig(path, dpi=160, metadata={"Software": None})
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
