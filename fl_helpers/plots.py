"""The notebooks' figures: images, outlines, label mix, heat map, curves, time line.

Each function draws one figure and returns it; colours can be told apart by colour-blind
readers (Okabe and Ito 2008). Needs numpy and matplotlib: copy this file on its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")
APPROACH_COLORS = {  # the same colour for the same approach in every figure
    "local": "#0072B2",
    "federated": "#E69F00",
    "centralized": "#009E73",
    "ensemble": "#CC79A7",
}
STYLE = {
    "figure.figsize": (6, 3.5),
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "axes.prop_cycle": plt.cycler(color=COLORS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "font.size": 10,
}


def use_style() -> None:
    """Set the look of all figures that follow."""
    plt.rcParams.update(STYLE)


def show_images(rows: Mapping[str, np.ndarray], titles: Sequence[str] = ()) -> Figure:
    """Show a grid of images: one labelled row per entry.

    rows: {label: images [C, H, W] or [C, H, W, 3], uint8}, C columns; titles: one per
    column.
    """
    columns = max(len(images) for images in rows.values())
    fig, axes = plt.subplots(
        len(rows),
        columns,
        figsize=(0.9 * columns + 1, 0.92 * len(rows)),
        squeeze=False,
    )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
        for axis, image in zip(line, images, strict=False):
            axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=10)
    return fig


def show_outlines(
    images: np.ndarray,
    outlines: Mapping[str, np.ndarray],
    titles: Sequence[str] = (),
) -> Figure:
    """Show images in a row, with outlines drawn on them.

    images: [C, H, W] grey. outlines: {label: masks [C, H, W] bool}, each label in a
    colour of its own; titles: one per image.
    """
    fig, axes = plt.subplots(
        1, len(images), figsize=(1.5 * len(images), 2.1), squeeze=False
    )
    colors = dict(zip(outlines, COLORS[1:], strict=False))
    for k, axis in enumerate(axes[0]):
        axis.imshow(images[k], cmap="gray")
        axis.set(xticks=[], yticks=[])
        axis.set_title(titles[k] if titles else "", fontsize=9)
        for label, masks in outlines.items():
            if masks[k].any():
                axis.contour(masks[k], levels=[0.5], colors=colors[label], linewidths=1)
    handles = [plt.Line2D([], [], color=color) for color in colors.values()]
    fig.legend(handles, [*colors], loc="outside lower center", ncols=len(colors))
    return fig


def plot_label_mix(
    partitions: Mapping[str, Mapping[str, Sequence[int]]], classes: Sequence[str]
) -> Figure:
    """Draw the rows per silo and class as stacked bars, one panel per partition.

    partitions: {panel title: {silo name: rows per class}}.
    """
    fig, axes = plt.subplots(
        1, len(partitions), figsize=(2.6 + 2.1 * len(partitions), 3), sharey=True
    )
    for axis, (title, silos) in zip(
        np.atleast_1d(axes), partitions.items(), strict=True
    ):
        names = [name.removeprefix("Hospital ") for name in silos]
        counts = np.array(list(silos.values()))  # [silos, classes]
        bottom = np.zeros(len(names))
        for label, column in zip(classes, counts.T, strict=True):
            axis.bar(names, column, bottom=bottom, label=label)
            bottom += column
        axis.set(title=title, xlabel="hospital")
    np.atleast_1d(axes)[0].set_ylabel("radiographs")
    handles, labels = np.atleast_1d(axes)[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=len(classes))
    return fig


def plot_matrix(
    percent: np.ndarray,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    row_label: str,
    column_label: str,
    value_label: str,
    diverging: bool = False,
    full: bool = False,
) -> Figure:
    """Draw a heat map of percentages [R, C] with the number in each cell.

    diverging: the values are differences; white is 0, both directions have a colour.
    full: colours go from 0 to 100 %, so that figures can be compared by them; else from
    the smallest value to the largest. NaN leaves a cell empty.
    """
    row_height = 0.52 if len(rows) <= 8 else 0.34
    fig, axis = plt.subplots(
        figsize=(2.6 + 0.95 * len(columns), 1.4 + row_height * len(rows))
    )
    largest = np.nanmax(np.abs(percent))
    least, most = (0, 100) if full else (np.nanmin(percent), np.nanmax(percent))
    look = dict(cmap="cividis", vmin=least, vmax=most)
    if diverging:
        look = dict(cmap="PuOr", vmin=-largest, vmax=largest)
    image = axis.imshow(percent, aspect="auto", **look)
    middle = (least + most) / 2
    for (i, j), value in np.ndenumerate(percent):
        if np.isnan(value):
            continue
        dark = abs(value) > 0.6 * largest if diverging else value < middle
        color = "white" if dark else "black"
        text = f"{value:+.1f}" if diverging else f"{value:.1f}"
        axis.text(j, i, text, ha="center", va="center", color=color)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    axis.set(xlabel=column_label, ylabel=row_label)
    axis.spines[:].set_visible(False)
    fig.colorbar(image, label=value_label)
    return fig


def plot_rounds(
    per_silo: Mapping[str, Sequence[float]],
    *,
    references: Mapping[str, float] | None = None,
    ylabel: str = "balanced accuracy (%)",
    ylim: tuple[float, float] | None = (0, 100),
) -> Figure:
    """Draw a metric in percent over rounds: thin per silo, thick mean, dashed levels.

    per_silo: {silo name: one value per round}; references: {approach: level}, named at
    the right edge, and then the silos are grey. ylim: None zooms in on the values.
    """
    fig, axis = plt.subplots()
    curves = np.array(list(per_silo.values()))  # [silos, rounds]
    rounds = np.arange(1, curves.shape[1] + 1)
    for name, curve in zip(per_silo, curves, strict=True):
        look = {"color": "0.75"} if references else {"label": name, "alpha": 0.8}
        axis.plot(rounds, curve, lw=1, **look)
    color = APPROACH_COLORS["federated"] if references else "black"
    axis.plot(rounds, curves.mean(axis=0), lw=2.5, color=color, label="mean")
    for label, level in (references or {}).items():
        color, edge = APPROACH_COLORS.get(label, "0.35"), axis.get_yaxis_transform()
        axis.axhline(level, ls="--", color=color, lw=1.5, label=label)
        axis.text(1.01, level, label, color=color, va="center", transform=edge)
    axis.set(xlabel="communication round", ylabel=ylabel, ylim=ylim)
    if not references:
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def plot_comparison(
    results: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    xlabel: str = "balanced accuracy (%)",
) -> Figure:
    """Compare approaches per silo: a dot per seed, a bar at their mean.

    results: {approach: {silo name: one percentage per seed}}, same silos for all.
    """
    names = list(next(iter(results.values())))
    fig, axis = plt.subplots(figsize=(6.5, 1.2 + 0.62 * len(names)))
    offsets = np.linspace(-0.24, 0.24, len(results))
    spare = [c for c in COLORS if c not in {APPROACH_COLORS.get(a) for a in results}]
    for k, (approach, silos) in enumerate(results.items()):
        color = APPROACH_COLORS.get(approach) or spare.pop(0)
        for i, name in enumerate(names):
            y, values = i + offsets[k], np.asarray(silos[name])
            label = approach if i == 0 else None
            axis.plot(values, [y] * len(values), "o", ms=5, alpha=0.7, color=color)
            axis.plot(
                [values.mean()] * 2,
                [y - 0.1, y + 0.1],
                lw=3,
                color=color,
                label=label,
            )
        if i % 2 == 0:
            axis.axhspan(i - 0.5, i + 0.5, color="0.96", zorder=0)
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel=xlabel, ylim=(len(names) - 0.5, -0.5))
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def plot_timeline(
    spans: Iterable[tuple[str, float, float, str]],
    *,
    marks: Mapping[float, str] | None = None,
    steps: str = "",
    title: str = "",
    xlabel: str = "seconds",
) -> Figure:
    """Draw who did what when: one line per name, a bar from start to end per span.

    spans: (name, start, end, kind), kind "update", "refused" or "missing", lines in
    sorted order. marks: {time: text}, vertical lines with a text below the bars. steps:
    what begins at each start, such as "round": counted from 1 on the upper edge.
    """
    spans, marks = list(spans), marks or {}
    names = sorted({name for name, *_ in spans})
    fig, axis = plt.subplots(figsize=(7.5, 1.7 + 0.38 * len(names)))
    for kind, number in {"update": 0, "refused": 5, "missing": 6}.items():
        color, label = COLORS[number], kind  # the label is of its first bar only
        for name, start, end, _ in (span for span in spans if span[3] == kind):
            y = names.index(name)
            axis.barh(y, end - start, 0.62, start, color=color, ec="w", label=label)
            label = None
    for time, text in marks.items():
        axis.axvline(time, color="0.2", lw=1.2, ls=":")
        axis.text(time, len(names) - 0.15, f" {text}", va="bottom", fontsize=9)
    axis.set_yticks(range(len(names)), names)
    below = len(names) - (0.1 if marks else 0.4)
    axis.set(xlabel=xlabel, ylim=(below, -0.6), title=title)
    if steps:
        starts = sorted({start for _, start, *_ in spans})
        upper = axis.secondary_xaxis("top", xlabel=steps)
        upper.set_xticks(starts, range(1, len(starts) + 1), ha="left")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def plot_victims(
    gains: Mapping[str, Sequence[float]],
    *,
    xlabel: str = "SSIM of the attack less SSIM of the public mean",
) -> Figure:
    """Draw a dot per victim, and count those above 0: averages hide who was hurt.

    gains: {row: one number per victim}, above 0 where an attack knew something.
    """
    fig, axis = plt.subplots(figsize=(7, 1 + 0.3 * len(gains)))
    edge = axis.get_yaxis_transform()  # x in shares of the axis, y in rows
    for row, values in enumerate(map(np.asarray, gains.values())):
        colors = np.where(values > 0, COLORS[5], COLORS[6])
        axis.scatter(values, [row] * len(values), s=28, alpha=0.8, c=colors)
        found = f"{(values > 0).sum()} of {len(values)}"
        axis.text(1.02, row, found, va="center", transform=edge)
    axis.axvline(0, color="0.4", ls="--")
    axis.set_yticks(range(len(gains)), list(gains))
    axis.set(xlabel=xlabel, ylim=(len(gains) - 0.5, -0.5))


class Gain(Protocol):
    """A mean with its interval, such as `comparison.Interval`."""

    mean: float
    low: float
    high: float


def plot_gains(
    panels: Mapping[str, Mapping[str, tuple[Gain, bool]]],
    *,
    xlabel: str,
    xlim: tuple[float, float] | None = None,
) -> Figure:
    """Draw gains with their intervals: one panel per entry, one line per row, 0 marked.

    panels: {panel: {row: (gain, clear)}}, such as from `comparison.judge`; a panel may
    lack rows. A clear gain has a full dot, green if better, red if worse; all others
    are hollow and grey. xlim: cuts intervals off that are longer.
    """
    rows = list(dict.fromkeys(row for panel in panels.values() for row in panel))
    size = (
        1.2 + 0.075 * max(map(len, rows)) + 2.1 * len(panels),
        1.3 + 0.28 * len(rows),
    )
    fig, axes = plt.subplots(
        1, len(panels), figsize=size, sharey=True, sharex=True, squeeze=False
    )
    for axis, (title, gains) in zip(axes.flat, panels.items(), strict=True):
        for row, (gain, clear) in gains.items():
            color = (COLORS[2] if gain.mean > 0 else COLORS[5]) if clear else "0.55"
            y, face = rows.index(row), color if clear else "white"
            axis.plot([gain.low, gain.high], [y, y], lw=2, color=color)
            axis.plot(gain.mean, y, "o", ms=6, mfc=face, mec=color)
        axis.axvline(0, color="0.2", lw=1, zorder=0)
        axis.set_title(title, fontsize=10)
    axes[0, 0].set_yticks(range(len(rows)), rows)
    axes[0, 0].set(ylim=(len(rows) - 0.5, -0.5), xlim=xlim)
    fig.supxlabel(xlabel, fontsize=10)
    return fig


def plot_survival(curves: Mapping[str, Any], *, unit: str, xmax: float) -> Figure:
    """Draw survival curves, known at the ends of intervals, each with its band.

    curves: {label: a curve with .time, .share, .low and .high, as `survival.Curve`},
    shares between 0 and 1. unit: of time. xmax: where the axis ends.
    """
    fig, axis = plt.subplots()
    for color, (label, curve) in zip(COLORS, curves.items(), strict=False):
        time = np.concatenate([[0], curve.time])
        share, low, high = (
            100 * np.concatenate([[1], part])
            for part in (curve.share, curve.low, curve.high)
        )
        axis.fill_between(time, low, high, color=color, alpha=0.15, lw=0)
        axis.plot(time, share, "o-", color=color, ms=4, lw=1.5, label=label)
    axis.set(xlim=(0, xmax), ylim=(0, 101), xlabel=unit, ylabel="without event (%)")
    axis.legend()
    return fig


def plot_forest(
    estimates: Mapping[str, Mapping[str, tuple[float, float, float]]],
    *,
    xlabel: str,
    truth: Mapping[str, float] | None = None,
) -> Figure:
    """Draw estimates with their intervals, a panel for each covariate.

    estimates: {panel: {label: (estimate, low, high)}}, the same labels in all; ratios
    on a logarithmic axis, on which 1 is marked. truth: {panel: value}, a dashed line.
    """
    height = 0.9 + 0.3 * max(len(rows) for rows in estimates.values())
    size = (2.2 + 2 * len(estimates), height)
    fig, axes = plt.subplots(
        1, len(estimates), figsize=size, sharey=True, squeeze=False
    )
    for axis, (panel, rows) in zip(axes[0], estimates.items(), strict=True):
        for place, (middle, low, high) in enumerate(rows.values()):
            color = COLORS[0] if place < len(rows) - 1 else COLORS[1]
            axis.plot([low, high], [place, place], color=color, lw=1.5)
            axis.plot(middle, place, "o", color=color, ms=5)
        axis.axvline(1, color="0.7", lw=1, zorder=0)
        if truth:
            axis.axvline(truth[panel], color=COLORS[2], ls="--", lw=1.2, zorder=0)
        axis.set(xscale="log", xlabel=xlabel, title=panel)
        low, high = axis.get_xlim()
        ticks = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.4, 2, 3, 5, 10)
        axis.set_xticks([tick for tick in ticks if low <= tick <= high])
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.set_yticks(range(len(rows)), rows)
    axes[0, 0].invert_yaxis()
    return fig


class CurvePoint(Protocol):
    """A point of a calibration curve, such as `validation.Bin`; shares are 0 to 1."""

    score: float
    share: float
    low: float
    high: float


def plot_calibration(
    panels: Mapping[str, Mapping[str, Sequence[CurvePoint]]],
) -> Figure:
    """Draw what a model says against what is true, with intervals: a panel per silo.

    panels: {panel: {curve: points}}, the same curves in all. On the dashed line a score
    is the share of patients who have the disease.
    """
    width = 1 + 2 * len(panels)
    fig, axes = plt.subplots(1, len(panels), figsize=(width, 3), sharey=True)
    for axis, (title, curves) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        axis.plot([0, 100], [0, 100], ls="--", color="0.6", lw=1)
        for (label, points), color in zip(curves.items(), COLORS, strict=False):
            x, y, low, high = (
                100 * np.array([(p.score, p.share, p.low, p.high) for p in points]).T
            )
            look = {"fmt": "o-", "ms": 4, "lw": 1.3, "elinewidth": 1}
            axis.errorbar(x, y, [y - low, high - y], color=color, label=label, **look)
        axis.set(xlim=(0, 100), ylim=(0, 100), aspect="equal")
        axis.set_title(title, fontsize=10)
    np.atleast_1d(axes)[0].set_ylabel("has the disease (%)")
    fig.supxlabel("the model says (%)", fontsize=10)
    handles, labels = np.atleast_1d(axes)[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return fig


def plot_intervals(
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    xlabel: str,
    references: Mapping[str, float] | None = None,
    withheld: str = "withheld",
) -> Figure:
    """Draw values with intervals: one panel per entry, one line per row.

    panels: {panel: {row: (value, low, high, ...)}}, shares from 0 to 1, or differences
    of shares, drawn in percent; the same rows in all; NaN as a value
    writes `withheld` instead. In one or two panels colours follow the rows and values
    are written, else colours follow the panels. references: {panel: value}, a dashed
    line.
    """
    rows, few = list(next(iter(panels.values()))), len(panels) <= 2
    size = (1.5 + len(panels) * (2.6 if few else 1.75), 1.1 + 0.32 * len(rows))
    fig, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, sharex=True)
    for column, (axis, panel) in enumerate(
        zip(np.atleast_1d(axes), panels, strict=True)
    ):
        for y, share in enumerate(panels[panel].values()):
            value, low, high = (100 * part for part in share[:3])
            if np.isnan(value):
                edge = axis.get_yaxis_transform()  # x in shares of the axis, y in rows
                place = {"va": "center", "ha": "center", "transform": edge}
                place |= {"backgroundcolor": "white", "fontsize": 9}
                axis.text(0.5, y, withheld, color="0.5", **place)
                continue
            color = COLORS[(y if few else column) % len(COLORS)]
            axis.plot([low, high], [y, y], color=color, lw=2)
            axis.plot(value, y, "o", color=color, ms=6)
            if few:
                axis.text(value, y - 0.14, f"{value:.1f}", ha="center", va="bottom")
        if references:
            axis.axvline(100 * references[panel], color="0.4", ls="--", lw=1, zorder=0)
        axis.set_title(panel, fontsize=10)
    first = np.atleast_1d(axes)[0]
    first.set_yticks(range(len(rows)), rows)
    first.set_ylim(len(rows) - 0.5, -0.65)
    fig.supxlabel(xlabel, fontsize=10)
    return fig
