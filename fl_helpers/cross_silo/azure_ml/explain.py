"""A plan for the eyes of a data-protection officer: tables, a text to sign, a picture.

All of it is read off the plan that is checked and sent, not off what was meant.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fl_helpers.cross_silo.azure_ml.pipeline import check_plan
from fl_helpers.cross_silo.azure_ml.plan import Flow, Job, Plan
from fl_helpers.cross_silo.azure_ml.snapshot import environments
from fl_helpers.cross_silo.federation import Party


@dataclass(frozen=True)
class Explanation:
    """rows: one dict per silo, for a table. markdown: the same as a text to sign."""

    rows: list[dict[str, Any]]
    markdown: str


def explain_plan(plan: Plan) -> Explanation:
    """Say of each silo what is read, where it runs, what leaves, how much, to whom.

    The text ends with the plan's digest, which `workspace.submit` asks for. Raises
    PlanRefused for a plan that is not the one of its run.
    """
    check_plan(plan)
    rows = [_row(plan, silo) for silo in plan.silos]
    text = [
        f"# What leaves each silo: {plan.federation.project}, run {plan.name}",
        f"{len(plan.jobs)} jobs, in {len(rows)} silos and at the orchestrator. No job "
        "reads another silo's store or update, and nothing but what is listed here "
        "leaves a silo. Byte counts are limits that the jobs enforce.",
        *map(_table, rows),
        "## What runs",
        "One command for each kind of job; each begins with a look at the code beside "
        "it, and stops if that has another digest.",
        "\n".join(
            f"- `{line}`" for line in dict.fromkeys(j.command for j in plan.jobs)
        ),
        "## Code and environment",
        "\n".join([*_codes(plan), *_environments(plan)]),
        f"Machine hours at most, by the jobs' time limits: {_hours(plan.jobs, plan)}.",
        "## Signed",
        f"All of it, by its SHA-256: `{plan.digest}`",
        "\n".join(f"- {silo.name}: ____________" for silo in plan.silos),
    ]
    return Explanation(rows, "\n\n".join(text) + "\n")


def _table(row: dict[str, Any]) -> str:
    lines = [f"| {key} | {value} |" for key, value in row.items() if key != "silo"]
    return "\n".join([f"## {row['silo']}", "", "| | |", "|---|---|", *lines])


def _codes(plan: Plan) -> list[str]:
    return [f"- code `{key}`: SHA-256 `{digest}`" for key, digest in plan.codes.items()]


def _environments(plan: Plan) -> list[str]:
    lines = []
    for key, found in environments(plan.federation).items():
        conda = found.get("conda") if isinstance(found, dict) else None
        packages = (
            conda["dependencies"][:-1] + conda["dependencies"][-1]["pip"]
            if conda
            else []
        )
        name = found["image"] if isinstance(found, dict) else found
        more = f" with {', '.join(packages)}" if packages else ""
        lines.append(f"- environment `{key}`: `{name}`{more}")
    return lines


def _hours(jobs: Iterable[Job], plan: Plan) -> int:
    return len(list(jobs)) * plan.federation.azure_ml.hours


def _row(plan: Plan, silo: Party) -> dict[str, Any]:
    jobs = [job for job in plan.jobs if job.party == silo]
    reads = {flow for job in jobs for flow in job.reads}
    leaving = [
        (job, flow) for job in jobs for flow in job.writes if flow.store == silo.outbox
    ]
    kinds = sorted({flow.name for _, flow in leaving})
    counts = {k: sum(flow.name == k for _, flow in leaving) for k in kinds}
    sizes = [int(job.literals["max_bytes"]) for job, _ in leaving]
    names = {n for job, _ in leaving for n in str(job.literals["metrics"]).split(",")}
    own = {flow for flow in reads if flow.store in (silo.datastore, "")}
    return {
        "silo": silo.name,
        "runs on": silo.compute,
        "reads of its own": _folders(own),
        "reads of others": _folders(reads - own),
        "writes to its own": _folders(
            f for job in jobs for f in job.writes if f.store == silo.datastore
        ),
        "leaves": ", ".join(f"{count} x {kind}" for kind, count in counts.items()),
        "numbers in it": ", ".join(sorted(["num_examples", *(names - {""})])),
        "bytes at most": f"{max(sizes, default=0):,} each, {sum(sizes):,} in all",
        "to": _folders(flow for _, flow in leaving),
        "machine hours at most": _hours(jobs, plan),
    }


def _folders(flows: Iterable[Flow]) -> str:
    """Datastores and folders, without the last part if there are several."""
    found = sorted({(flow.store or "asset", flow.path) for flow in flows})
    above = [(store, path.rpartition("/")[0]) for store, path in found]
    shown = {
        f"{store}: {folder}/"
        if folder and above.count((store, folder)) > 1  # never the whole store
        else f"{store}: {path}"
        for (store, path), (_, folder) in zip(found, above, strict=True)
    }
    return ", ".join(sorted(shown))


def draw_plan(plan: Plan) -> Any:
    """The jobs of a plan, one lane per party: a matplotlib figure.

    From left to right in the order in which they can run. A lane's border is the trust
    boundary: down across it go models, up across it what the silo releases.
    """
    import matplotlib.pyplot as plt

    column = _columns(plan)
    lanes = [plan.federation.azure_ml.orchestrator, *plan.silos]
    row = {party: -k for k, party in enumerate(lanes)}
    at = {job.name: (column[job.name], row[job.party]) for job in plan.jobs}
    width = max(column.values()) + 1
    size = (min(9.6, 2.6 + 0.9 * width), 0.9 + 0.8 * len(lanes))
    fig, ax = plt.subplots(figsize=size, layout="constrained")
    for party, y in zip(lanes, row.values(), strict=True):
        style = dict(facecolor="#eef2f7" if y else "#fdf3e1", edgecolor="#667")
        lane = plt.Rectangle((-2.1, y - 0.42), width + 1.6, 0.84, zorder=0, **style)
        ax.add_patch(lane)
        ax.text(-2.0, y + 0.3, party.name, weight="bold", va="top", fontsize=10)
        held = f"data: {party.data}" if party.data else "no patient data"
        ax.text(-2.0, y - 0.05, held, va="top", fontsize=9, color="#445")
    for job in plan.jobs:
        for flow in job.reads:
            if flow.producer:
                _arrow(ax, at[flow.producer], at[job.name])
        label = job.kind
        if job.kind in ("book", "train", "aggregate"):
            label += f"\nround {job.literals['round']}"
        box = dict(boxstyle="round,pad=0.3", facecolor="white", edgecolor="#334")
        ax.text(*at[job.name], label, ha="center", va="center", fontsize=9, bbox=box)
    for color, text in (("#0072B2", "global model"), ("#D55E00", "released by a silo")):
        ax.plot([], [], color=color, label=text)
    ax.plot([], [], color="#889", label="stays with its party")
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
    color = "#0072B2" if down else "#D55E00" if up else "#889"
    style = dict(arrowstyle="-|>", color=color, lw=0.9, shrinkA=16, shrinkB=16)
    style["alpha"] = 0.85
    ax.annotate("", xy=end, xytext=start, arrowprops=style, zorder=0.5)
