"""A plan for the eyes of a data-protection officer: tables, a text to sign, a picture.

All of it is read off the plan itself, not off what was meant.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_helpers.cross_silo.azure_ml.federation import Federation, Party
from fl_helpers.cross_silo.azure_ml.plan import Flow, Plan, check_plan, digest


@dataclass(frozen=True)
class Explanation:
    """rows: one dict per silo, for a table. markdown: the same as a text to sign."""

    rows: list[dict[str, Any]]
    markdown: str


def explain_plan(plan: Plan, federation: Federation) -> Explanation:
    """Say of each silo what is read, where it runs, what leaves, how much, to whom.

    Only for a plan that passes `check_plan`; raises PlanRefused.
    """
    check_plan(plan, federation)
    rows = [_row(plan, silo) for silo in federation.silos]
    folders = sorted({Path(job.code) for job in plan.jobs})
    codes = [f"- `{path.name}`: SHA-256 `{digest(path)}`" for path in folders]
    runs_in = sorted({job.environment for job in plan.jobs})
    text = [
        f"# What leaves each silo: {federation.project}",
        f"{len(plan.jobs)} jobs, in {len(rows)} silos and at the orchestrator. "
        "Checked: no job reads another silo's store or update, and nothing but what is "
        "listed here leaves a silo. Byte counts are limits that the jobs enforce.",
        *map(_table, rows),
        "## Code and environment",
        "The jobs run the code that was read for this document, if these agree:",
        "\n".join([*codes, *(f"- environment `{name}`" for name in runs_in)]),
        "## Signed",
        "\n".join(f"- {silo.name}: ____________" for silo in federation.silos),
    ]
    return Explanation(rows, "\n\n".join(text) + "\n")


def _table(row: dict[str, Any]) -> str:
    lines = [f"| {key} | {value} |" for key, value in row.items() if key != "silo"]
    return "\n".join([f"## {row['silo']}", "", "| | |", "|---|---|", *lines])


def _row(plan: Plan, silo: Party) -> dict[str, Any]:
    jobs = [job for job in plan.jobs if job.compute == silo.compute]
    reads = {flow for job in jobs for flow in job.reads}
    leaving = [
        (job, flow) for job in jobs for flow in job.writes if flow.store == silo.outbox
    ]
    kinds = sorted({flow.name for _, flow in leaving})
    counts = {k: sum(flow.name == k for _, flow in leaving) for k in kinds}
    sizes = [int(job.literals["max_bytes"]) for job, _ in leaving]
    numbers = {n for job, _ in leaving for n in job.literals["metrics"].split(",")}
    own = {f for f in reads if f.store == silo.datastore}
    return {
        "silo": silo.name,
        "runs on": silo.compute,
        "reads of its own": _folders(own),
        "reads of others": _folders(reads - own),
        "writes to its own": _folders(
            f for job in jobs for f in job.writes if f.store == silo.datastore
        ),
        "leaves": ", ".join(f"{count} x {kind}" for kind, count in counts.items()),
        "numbers in it": ", ".join(sorted(["num_examples", *(numbers - {""})])),
        "bytes at most": f"{max(sizes, default=0):,} each, {sum(sizes):,} in all",
        "to": _folders(flow for _, flow in leaving),
    }


def _folders(flows: Iterable[Flow]) -> str:
    """Datastores and folders, without the last part if there are several."""
    found = sorted({(flow.store, flow.path) for flow in flows})
    above = [(store, path.rpartition("/")[0]) for store, path in found]
    shown = {
        f"{store}: {folder}/"
        if above.count((store, folder)) > 1
        else f"{store}: {path}"
        for (store, path), (_, folder) in zip(found, above, strict=True)
    }
    return ", ".join(sorted(shown))


def draw_plan(plan: Plan, federation: Federation) -> Any:
    """The jobs of a plan, one lane per party: a matplotlib figure.

    From left to right in the order in which they can run. A lane's border is the trust
    boundary: down across it go models, up across it what the silo releases.
    """
    import matplotlib.pyplot as plt

    column = _columns(plan)
    strangers = {j.compute for j in plan.jobs} - {p.compute for p in federation.parties}
    lanes = [
        *federation.parties,
        *(Party(name, name, "") for name in sorted(strangers)),
    ]
    row = {party.compute: -k for k, party in enumerate(lanes)}
    at = {job.name: (column[job.name], row[job.compute]) for job in plan.jobs}
    width = max(column.values()) + 1
    size = (min(13, 2.6 + 1.05 * width), 1.1 + 0.72 * len(lanes))
    fig, ax = plt.subplots(figsize=size, layout="constrained")
    for party, y in zip(lanes, row.values(), strict=True):
        style = dict(facecolor="#eef2f7" if y else "#fdf3e1", edgecolor="#667")
        lane = plt.Rectangle((-2.1, y - 0.42), width + 1.6, 0.84, zorder=0, **style)
        ax.add_patch(lane)
        ax.text(-2.0, y + 0.3, party.name, weight="bold", va="top", fontsize=9)
        held = f"data: {party.data}" if party.data else "no patient data"
        ax.text(-2.0, y - 0.05, held, va="top", fontsize=7, color="#445")
    for job in plan.jobs:
        for flow in job.reads:
            if flow.producer:
                _arrow(ax, at[flow.producer], at[job.name])
        label = job.kind
        round_index = job.literals.get("round")
        if round_index and job.kind in ("train", "aggregate"):
            label += f"\n{round_index}"
        box = dict(boxstyle="round,pad=0.3", facecolor="white", edgecolor="#334")
        ax.text(*at[job.name], label, ha="center", va="center", fontsize=7, bbox=box)
    for color, text in (("#1f77b4", "global model"), ("#d62728", "released by a silo")):
        ax.plot([], [], color=color, label=text)
    ax.plot([], [], color="#aab", label="stays with its party")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    ax.set(xlim=(-2.3, width - 0.3), ylim=(min(row.values()) - 0.55, 0.55))
    ax.axis("off")
    return fig


def _columns(plan: Plan) -> dict[str, int]:
    """How many jobs must have ended before each, along the longest way."""
    column: dict[str, int] = {}
    for job in plan.jobs:  # in an order in which they can run
        before = [column[flow.producer] for flow in job.reads if flow.producer]
        column[job.name] = max(before, default=-1) + 1
    return column


def _arrow(ax: Any, start: tuple[int, int], end: tuple[int, int]) -> None:
    down, up = end[1] < start[1], end[1] > start[1]
    color = "#1f77b4" if down else "#d62728" if up else "#aab"
    style = dict(arrowstyle="-|>", color=color, lw=0.9, shrinkA=14, shrinkB=14)
    style["alpha"] = 0.85
    ax.annotate("", xy=end, xytext=start, arrowprops=style, zorder=0.5)
