"""Draw federation.png, the figure of the README: python docs/pics/federation.py."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Arc, Circle, Ellipse, FancyBboxPatch, Rectangle

DOWN, UP = "#0072B2", "#D55E00"  # blue and vermillion of Okabe and Ito (2008)
INK, GREY, SKY, PALE, LIGHT = "#1F2933", "#5F6B76", "#E6F1F8", "#F4F6F8", "#D9E0E7"
HOSPITALS = {"A": 4, "B": 3, "C": 2, "D": 1}  # name: discs in its data base
LEFT, WIDTH, PITCH, FLOOR, ROOF = 0.2, 1.78, 1.94, 0.6, 2.5  # inches
CENTRE = {"ha": "center", "va": "center", "zorder": 7}


def box(ax, x, y, width, height, radius=0.12, **style):
    shape = f"round,pad=0,rounding_size={radius}"
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, **style))


def arrow(ax, x, start, end, colour):
    head = "-|>,head_length=0.5,head_width=0.26"
    style = {"arrowstyle": head, "mutation_scale": 16, "lw": 2.6, "color": colour}
    style |= {"shrinkA": 0, "shrinkB": 0}
    ax.annotate("", (x, end), (x, start), arrowprops=style, zorder=6)


def padlock(ax, x, y, size=1.0):
    ring = {"color": INK, "lw": 2.2 * size, "zorder": 6}
    ax.add_patch(Arc((x, y + 0.16 * size), 0.13 * size, 0.2 * size, theta2=180, **ring))
    body = {"fc": INK, "ec": "white", "lw": 0.8, "zorder": 6.5, "radius": 0.03}
    box(ax, x - 0.11 * size, y, 0.22 * size, 0.17 * size, **body)


def records(ax, x, y, discs):
    """Draw a data base of so many discs, standing on y, with a padlock on it."""
    half, step, flat = 0.27, 0.135, 0.14
    for disc in range(discs):
        low, order = y + disc * step, 3 + disc * 0.1
        rim = {"fc": LIGHT, "ec": GREY, "lw": 0.9}
        ax.add_patch(Ellipse((x, low), 2 * half, flat, zorder=order - 0.05, **rim))
        side = Rectangle((x - half, low), 2 * half, step, color=LIGHT, zorder=order)
        ax.add_patch(side)
        top = Ellipse((x, low + step), 2 * half, flat, zorder=order + 0.05, **rim)
        ax.add_patch(top)
    for edge in (x - half, x + half):
        ax.plot([edge] * 2, [y, y + discs * step], color=GREY, lw=0.9, zorder=5)
    padlock(ax, x + 0.21, y - 0.05)


def no_exit(ax, x, start):
    """Draw a path up from the records that ends, crossed out, at the wall."""
    ax.plot([x, x], [start, ROOF], color=GREY, lw=1.6, ls=(0, (2, 1.5)), zorder=4)
    ax.add_patch(Circle((x, ROOF), 0.115, fc="white", ec=INK, lw=1.8, zorder=6))
    for tilt in (-1, 1):
        ends = [ROOF - 0.05 * tilt, ROOF + 0.05 * tilt]
        ax.plot([x - 0.05, x + 0.05], ends, color=INK, lw=2.2, zorder=7)


def network(ax, x, y, colour, scale=1.0):
    """Draw a small neural network centred on x, y."""
    columns = ((-0.2, (-0.1, 0.1)), (0, (-0.2, 0, 0.2)), (0.2, (0,)))
    layers = [[(x + dx * scale, y + dy * scale) for dy in ys] for dx, ys in columns]
    for left, right in zip(layers, layers[1:], strict=False):
        for a in left:
            for b in right:
                ax.plot(*zip(a, b, strict=True), color=colour, lw=0.9, zorder=3)
    for node in sum(layers, []):
        dot = {"fc": "white", "ec": colour, "lw": 1.5, "zorder": 4}
        ax.add_patch(Circle(node, 0.055 * scale, **dot))


def silo(ax, left, name, discs):
    box(ax, left, FLOOR, WIDTH, ROOF - FLOOR, fc=PALE, ec=INK, lw=2.4, zorder=1)
    ax.text(left + WIDTH / 2, 0.79, f"Hospital {name}", weight="bold", **CENTRE)
    data, model = left + 0.45, left + 1.24
    records(ax, data, 1.33, discs)
    no_exit(ax, data, 1.44 + discs * 0.135)
    network(ax, model, 1.56, INK)
    for x, label in ((data, "records"), (model, "training")):
        ax.text(x, 1.1, label, fontsize=9, color=GREY, **CENTRE)
    arrow(ax, model - 0.17, 3.5, 1.87, DOWN)
    arrow(ax, model + 0.17, 1.87, 3.5, UP)


def main():
    font = {"font.family": "DejaVu Sans", "font.size": 10.5, "text.color": INK}
    plt.rcParams.update(font)
    fig = plt.figure(figsize=(8, 4.6), facecolor="white")
    ax = fig.add_axes((0, 0, 1, 1), xlim=(0, 8), ylim=(0, 4.6))
    ax.axis("off")
    box(ax, LEFT, 3.55, 7.6, 0.86, fc=SKY, ec=DOWN, lw=1.8, zorder=1)
    network(ax, 2.1, 3.98, DOWN, 1.3)
    ax.text(2.62, 4.12, "Orchestrator", fontsize=14, weight="bold", va="center")
    ax.text(2.62, 3.83, "averages the updates into the next global model", va="center")
    for place, (name, discs) in enumerate(HOSPITALS.items()):
        silo(ax, LEFT + place * PITCH, name, discs)
    note = {"fontsize": 10, "va": "center", "linespacing": 1.3}
    ax.text(1.17, 3.03, "global\nmodel", color=DOWN, ha="right", weight="bold", **note)
    ax.text(1.73, 3.14, "update", color=UP, weight="bold", **note)
    ax.text(1.73, 2.87, "weights, number\nof examples", color=UP, **note)
    padlock(ax, 1.83, 0.17, 1.1)
    text = "Each hospital is a silo: patient records stay inside its walls."
    ax.text(2.07, 0.27, text, va="center")
    path = Path(__file__).with_suffix(".png")
    fig.savefig(path, dpi=200, metadata={"Software": None})
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
