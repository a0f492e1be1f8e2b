"""Draw secure_sums.png, a round of a secure run: python docs/pics/secure_sums.py."""

from pathlib import Path

import matplotlib.pyplot as plt

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"
PLACES = {"Hospital A": 0.0, "orchestrator": 1.7, "Hospital B": 2.5, "Hospital C": 3.1}
BEFORE, ROUND = "once per run", "each round"
TURN = ("train; gate, norm limit", "write to own disk")
MESSAGES = [  # from, to, what it says, colour; or a heading
    BEFORE,
    ("Hospital A", "orchestrator", "key, run, code, participants; signed", BLUE),
    ("orchestrator", "Hospital A", "all hellos: verify, agree on pair keys", GREY),
    None,
    ("Hospital A", "orchestrator", "number of patients + masks", BLUE),
    ROUND,
    ("orchestrator", "Hospital A", "model, set {A, B, C}", GREY),
    TURN,
    ("Hospital A", "orchestrator", "update + pair masks + own mask", BLUE),
    ("orchestrator", "Hospital A", "all have answered: open", GREY),
    ("Hospital A", "orchestrator", "own mask (32 bytes)", BLUE),
    ("orchestrator", "orchestrator", "sum; pair masks have cancelled", ORANGE),
]


def draw():
    fig, axis = plt.subplots(figsize=(9, 5.4), dpi=150)
    for name, x in PLACES.items():
        axis.plot([x, x], [-0.3, -len(MESSAGES)], color="0.8", zorder=0)
        axis.text(x, 0, name, ha="center", va="bottom", weight="bold")
    for row, message in enumerate(MESSAGES, start=1):
        if isinstance(message, str):
            axis.text(-0.95, -row, message, va="center", color=GREY, style="italic")
        elif message is TURN:
            how = {"ha": "center", "va": "center", "fontsize": 9}
            box = {"facecolor": "white", "edgecolor": BLUE, "boxstyle": "round"}
            axis.text(0, -row, "train; gate, norm limit\nwrite to own disk",
                      bbox=box, **how)  # fmt: skip
        elif message:
            arrow(axis, row, *message)
    white = {"facecolor": "white", "edgecolor": "none"}
    how = {"ha": "center", "color": GREY, "bbox": white}
    axis.text(2.8, -9, "B and C do\nthe same", **how)
    style = {"arrowstyle": "<|-|>", "color": ORANGE, "linestyle": "dashed"}
    axis.annotate("", (2.5, -4.35), (0, -4.35), arrowprops=style)
    secret = "pair key: only A and B can compute it"
    axis.text(0.85, -4.2, secret, ha="center", fontsize=9, color=ORANGE)
    axis.set(xlim=(-1, 3.45), ylim=(-len(MESSAGES) - 0.6, 0.6))
    axis.axis("off")
    return fig


def arrow(axis, row, start, end, text, color):
    a, b = PLACES[start], PLACES[end]
    if a == b:
        box = {"facecolor": "white", "edgecolor": color, "boxstyle": "round"}
        axis.text(a, -row, text, ha="center", va="center", fontsize=9, bbox=box)
        return
    style = {"arrowstyle": "-|>", "color": color, "shrinkA": 2, "shrinkB": 2}
    axis.annotate("", (b, -row - 0.15), (a, -row - 0.15), arrowprops=style)
    axis.text(
        (a + b) / 2, -row, text, ha="center", va="bottom", fontsize=9, color=color
    )


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_suffix(".png"), bbox_inches="tight")
