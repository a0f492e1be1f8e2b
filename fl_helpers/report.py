"""A finished run or validation as one HTML file to read and sign, with a model card.

It loads nothing and runs no script. What a run did not record, or you did not state, is
said to be missing. Needs jinja2 and matplotlib: copy this file on its own, with
`report.html`, the page that it fills in.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from numbers import Integral
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

Record = Mapping[str, Any]

CARD = (
    "Intended use",
    "Not to be used for",
    "Data and labels",
    "Training",
    "Known limits and failures",
    "Responsible",
    "Licence and release",
)
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#B07D00", "#666666")
LINES = ("-", "--", ":")
PACKAGES = ("torch", "numpy", "safetensors", "opacus", "nvflare", "azure-ai-ml")
WIDE = 6  # columns of a table of results
TEMPLATE = Path(__file__).with_name("report.html")
FEW = 10  # patients of a class; a value of fewer is not ranked
MANY = 40  # items per hospital, or refusals, that are shown one by one


@dataclass(frozen=True)
class Results:
    """What was measured, per silo.

    metric: the one to draw, and to name the worst hospital by; more is better.
    silos: one row per silo, such as `summarize_silos` gives, with "silo" and numbers.
    references: {"local": {silo: value of metric}}, to compare with.
    figures: {caption: matplotlib figure} of your own.
    """

    metric: str = "balanced_accuracy"
    silos: Iterable[Record] = ()
    references: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Evidence:
    """What was written down on the way.

    privacy: rows of `privacy.spending_table`; a "delta" in them is shown.
    ledger: entries of `exchange.read_ledger`, of all ledgers that you have.
    files: to be named with their SHA-256, such as the model and the ledgers.
    """

    privacy: Iterable[Record] = ()
    ledger: Iterable[Record] = ()
    files: Iterable[str | Path] = ()


@dataclass(frozen=True)
class Origin:
    """How the run was made.

    engine: shown as it is. settings: seed, learning rate and so on. environment: None
    is what `describe_environment` finds. reproduce: the commands.
    """

    engine: str = "simulation"
    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] | None = None
    reproduce: str = ""


@dataclass(frozen=True)
class Validation:
    """What a test of a model without training found.

    silos: {silo: {"ill": 135, "healthy": 540, "AUROC": (0.76, 0.71, 0.81)}}: a number
    per measure, or value, low and high, such as a `validation.Share`.
    groups: {silo: {subgroup: the same}}, None for a subgroup that was withheld.
    metric, group_metric: measures to name the worst by; more is better.
    """

    silos: Mapping[str, Record] = field(default_factory=dict)
    groups: Mapping[str, Mapping[str, Record | None]] = field(default_factory=dict)
    metric: str = "AUROC"
    group_metric: str = "sensitivity"


def write_report(
    rounds: Sequence[Record],
    path: str | Path,
    *,
    title: str,
    results: Results = Results(),
    validation: Validation = Validation(),
    evidence: Evidence = Evidence(),
    origin: Origin = Origin(),
    card: Mapping[str, str] | None = None,
) -> Path:
    """Write the report of a finished run or validation and return its path.

    rounds: `History.rounds`, `rounds_of_events` or `rounds_of_metrics`; [] of a
    validation without training.
    path: of the new file; its folder is made.
    title: of the page.
    results, validation, evidence, origin: what was measured, written down, how made.
    card: texts for the fields of `CARD`.

    All texts are escaped. Raises ValueError without a round and a validation, or for an
    unknown field of the card.
    """
    if not rounds and not validation.silos:
        raise ValueError("rounds must have at least one record, got none; run it first")
    card = dict(card or {})
    unknown = sorted(set(card) - set(CARD))
    if unknown:
        raise ValueError(f"card has the fields {list(CARD)}, got {unknown}")
    metric, environment = results.metric, origin.environment
    figures = _chart(_per_silo(rounds, metric), f"test {metric.replace('_', ' ')}")
    figures |= _chart(_per_silo(rounds, "train_loss", "train"), "training loss")
    content = {
        "title": title,
        "engine": origin.engine,
        "metric": metric.replace("_", " "),
        "made": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        "silos": _federation(rounds, results.silos),
        "results": _results(rounds, metric, results.references),
        "tested": _ranked({"": validation.silos}, validation.metric),
        "groups": _ranked(validation.groups, validation.group_metric),
        "figures": figures | {k: _as_data(v) for k, v in results.figures.items()},
        "traffic": _traffic(rounds),
        "faults": _faults(rounds),
        "privacy": _spent(evidence.privacy),
        "ledger": _crossed(list(evidence.ledger)),
        "files": [_digest(Path(file)) for file in evidence.files],
        "card": {field: card.get(field, "") for field in CARD},
        "settings": origin.settings,
        "environment": describe_environment() if environment is None else environment,
        "reproduce": origin.reproduce,
    }
    page = _templates().from_string(TEMPLATE.read_text(encoding="utf-8"))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(page.render(content), encoding="utf-8")
    return Path(path)


def rounds_of_events(events: Iterable[Record]) -> list[dict[str, Any]]:
    """The rounds of a run on own machines, from its events (`on_premises.runs.play`, or
    the lines of `events.jsonl`). A round that was played twice counts as the last time.
    """
    rounds: dict[int, dict[str, Any]] = {}
    tested: dict[int, Any] = {}
    for event in events:
        if event["event"] == "round_end":
            record = {k: v for k, v in event.items() if k not in ("event", "time")}
            missing = dict.fromkeys(event["missing"], "no answer in time")
            rounds[event["round"]] = record | {"missing": missing | event["refused"]}
        elif event["event"] == "tested":  # the model after so many rounds
            tested[event["rounds"] - 1] = event["test"]
    return [rounds[i] | {"test": tested.get(i, {})} for i in sorted(rounds)]


def rounds_of_metrics(
    metrics: Iterable[Record], missing: Mapping[str, Sequence[str]] | None = None
) -> list[dict[str, Any]]:
    """The rounds of a run on Azure ML, from the lines with round, silo, metric and
    value of its result or its state; missing: as in the state of `play_rounds`. Tests
    of a round are of the model that it began with. Bytes are in the ledgers only."""
    rounds: dict[int, dict[str, Any]] = {}
    for line in metrics:
        of_test = line["metric"].startswith("test_")
        kind, name = ("test" if of_test else "train"), line["metric"]
        record = rounds.setdefault(line["round"] - of_test, {"train": {}, "test": {}})
        record[kind].setdefault(line["silo"], {})[name.removeprefix("test_")] = line[
            "value"
        ]
    result = []
    for i in sorted(i for i in rounds if i >= 0):
        lost = (missing or {}).get(str(i), ())
        record = {"round": i, "silos": sorted(rounds[i]["train"]), **rounds[i]}
        result.append(record | {"missing": dict.fromkeys(lost, "its job failed")})
    return result


def describe_environment(folder: str | Path = ".") -> dict[str, str]:
    """Versions of Python and of what is installed, kind of machine, and the commit of
    the repository that folder is in; no names of hosts, users or folders."""
    found = {"Python": platform.python_version()}
    found["Machine"] = f"{platform.system()} {platform.machine()}"
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    commit = _git(folder, "rev-parse", "HEAD")
    found["Commit"] = commit or "not in a repository"
    if commit:
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
        found["Commit"] += " with changes that are not committed" if changed else ""
    return found


def _git(folder: str | Path, *command: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *command],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _templates() -> jinja2.Environment:
    """Everything is escaped: names and reasons come from outside."""
    templates = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"number": _number, "size": _size, "interval": _interval}
    return templates


def _number(value: Any) -> str:
    """Whole numbers with separators, others with three decimals, None as a dash."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _size(value: float | None) -> str:
    """Bytes in decimal units."""
    if value is None:
        return "not recorded"
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}" if unit != "bytes" else f"{value:.0f} bytes"
        value /= 1000
    return f"{value:,.3g} GB" if value < 1000 else f"{value:,.0f} GB"


def _names(rounds: Sequence[Record]) -> list[str]:
    """All silos that a record names, in order."""
    kinds = ("train", "test", "missing", "silos")
    return sorted(
        {name for record in rounds for k in kinds for name in record.get(k, ())}
    )


def _per_silo(
    rounds: Sequence[Record], metric: str, kind: str = "test"
) -> dict[str, list[tuple[int, float]]]:
    """{silo: [(round from 1, finite value)]}, of the rounds that have it."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in rounds:
        for silo, metrics in sorted(record.get(kind, {}).items()):
            value = metrics.get(metric)
            if value is not None and math.isfinite(value):
                curves.setdefault(silo, []).append((record["round"] + 1, value))
    return dict(sorted(curves.items()))


def _federation(rounds: Sequence[Record], silos: Iterable[Record]) -> dict[str, Any]:
    """A table of who took part, and in how many rounds."""
    rows = {row["silo"]: {k: v for k, v in row.items() if k != "silo"} for row in silos}
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    took_part = {
        name: sum(name in record.get("silos", ()) for record in rounds)
        for name in dict.fromkeys([*rows, *_names(rounds)])
    }
    table = [
        (name, [rows.get(name, {}).get(key) for key in columns], count)
        for name, count in took_part.items()
    ]
    return {"columns": columns, "rows": table, "rounds": len(rounds)}


def _results(
    rounds: Sequence[Record],
    metric: str,
    references: Mapping[str, Mapping[str, float]],
) -> dict[str, Any] | None:
    """The last test, per silo, with references, mean and worst, in tables of WIDE
    columns; None without a test."""
    tested = [record for record in rounds if record.get("test")]
    if not tested:
        return None
    last = tested[-1]
    rows, names = last["test"], sorted(last["test"])
    keys = list(dict.fromkeys([metric, *(key for name in names for key in rows[name])]))
    values = {
        name: rows[name][metric]
        for name in names
        if metric in rows[name] and math.isfinite(rows[name][metric])
    }
    columns = [(metric, [rows[name].get(metric) for name in names])]
    columns += [(r, [known.get(n) for n in names]) for r, known in references.items()]
    columns += [(key, [rows[name].get(key) for name in names]) for key in keys[1:]]
    parts = [columns[i : i + WIDE] for i in range(0, len(columns), WIDE)]
    return {
        "round": last["round"] + 1,
        "worst": min(values, key=values.__getitem__) if values else None,
        "low": min(values.values(), default=None),
        "mean": sum(values.values()) / len(values) if values else None,
        "tables": [
            {
                "columns": [name.replace("_", " ") for name, _ in part],
                "rows": [(n, [v[i] for _, v in part]) for i, n in enumerate(names)],
                "means": [_mean(cells) for _, cells in part],
            }
            for part in parts
        ],
    }


def _ranked(tables: Mapping[str, Mapping], metric: str) -> dict[str, Any]:
    """Cells, and whose value of metric is the lowest among those of FEW and more."""
    rows = {(s, g): row for s, table in tables.items() for g, row in table.items()}
    shown = {name: _cells(name, row) for name, row in rows.items() if row is not None}
    keys = list(dict.fromkeys(key for cells in shown.values() for key in cells))
    if shown and metric not in keys:
        raise ValueError(f"no row has the measure {metric!r}, got {keys}")
    keys.sort(key=lambda key: key != metric)  # it comes first
    value = {
        name: cells[metric]
        for name, cells in shown.items()
        if math.isfinite(cells.get(metric, (math.nan,))[0])
        and min(rows[name]["ill"], rows[name]["healthy"]) >= FEW
    }
    worst, *others = sorted(value, key=lambda name: value[name][0]) or [None]
    return {
        "keys": [keys[i : i + WIDE - 2] for i in range(0, len(keys), WIDE - 2)],
        "rows": [(name, rows[name], shown.get(name)) for name in rows],
        "withheld": [name for name in rows if name not in shown],
        "unranked": [name for name in shown if name not in value],
        "ranked": len(value),
        "worst": worst,
        "low": value.get(worst),
        "alike": [n for n in others if value[n][1] <= value[worst][2]],
    }


def _cells(name: tuple, row: Record) -> dict[str, tuple[float, float, float]]:
    """{measure: value, low and high, NaN if not given} of a row with two counts."""
    for kind in ("ill", "healthy"):
        if not isinstance(row.get(kind), Integral) or row[kind] < 0:
            raise ValueError(f"{name} must have a count {kind!r}, got {row.get(kind)}")
    cells = {}
    for key in (key for key in row if key not in ("ill", "healthy")):
        parts = row[key] if isinstance(row[key], tuple) else (row[key],) + (None,) * 2
        parts = [math.nan if v is None else float(v) for v in parts[:3]]
        if len(parts) != 3 or parts[0] < parts[1] or parts[0] > parts[2]:
            raise ValueError(f"{name}: {key!r} is (value, low, high), got {row[key]}")
        cells[key] = tuple(parts)
    return cells


def _interval(cell: Sequence[float] | None) -> str:
    """A value, with its bounds if it has some; a line ends before them only."""
    value, low, high = map(_number, cell or (None,) * 3)
    return value if "–" in (value, low) else f"{value} ({low}\xa0to\xa0{high})"


def _mean(cells: Sequence[float | None]) -> float | None:
    """None unless every silo has a value: otherwise it would be of another group."""
    known = [value for value in cells if value is not None]
    return sum(known) / len(known) if len(known) == len(cells) else None


def _chart(
    curves: Mapping[str, Sequence[tuple[int, float]]], label: str
) -> dict[str, str]:
    """{caption: picture} of one line per silo over the rounds; empty without a value.

    Drawn without pyplot, which would choose a window system and keep the figure.
    """
    if not curves:
        return {}
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.subplots()
    for i, (name, curve) in enumerate(curves.items()):
        style = LINES[i // len(COLORS) % len(LINES)]
        how = {"color": COLORS[i % len(COLORS)], "linestyle": style, "marker": "."}
        short = name if len(name) <= 24 else name[:23] + "…"
        axes.plot(*zip(*curve, strict=True), **how, label=short.lstrip("_"))
    axes.set(xlabel="round", ylabel=label)
    if axes.dataLim.y0 >= 0 and axes.dataLim.y1 <= 1:
        axes.set_ylim(0, 1)  # a share: no zoom that makes little look like much
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    legend = figure.legend(loc="outside right upper", frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a dollar in a name is a dollar
    return {f"{label.capitalize()} per hospital": _as_data(figure)}


def _traffic(rounds: Sequence[Record]) -> dict[str, Any]:
    """Bytes and seconds of all rounds; None where a record lacks them."""

    def total(key: str) -> float | None:
        values = [record.get(key) for record in rounds]
        return None if None in values else sum(values)

    down, up = total("bytes_down"), total("bytes_up")
    both = None if down is None or up is None else down + up
    return {"down": down, "up": up, "both": both, "seconds": total("seconds")}


def _faults(rounds: Sequence[Record]) -> list[tuple[int, str, str]]:
    return [
        (record["round"] + 1, silo, reason)
        for record in rounds
        for silo, reason in sorted(record.get("missing", {}).items())
    ]


def _spent(rows: Iterable[Record]) -> list[dict[str, Any]]:
    """The last row per silo and mechanism, and how many rounds it took."""
    last: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        key = (row["silo"], row["mechanism"])
        spent = last.get(key, {"rounds": 0})["rounds"] + 1
        last[key] = {"delta": None, **row, "rounds": spent}
    return [last[key] for key in sorted(last)]


def _crossed(entries: Sequence[Record]) -> dict[str, Any]:
    """Who sent what: a sum per silo and direction, what was refused, and the items of
    each silo's last round out."""
    sums: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in entries:
        key = (entry["silo"], entry["direction"])
        row = sums.setdefault(
            key, {"items": 0, "bytes": 0, "refused": 0, "what": {}, "rounds": set()}
        )
        if entry["verdict"] == "refused":
            row["refused"] += 1
            continue
        row["items"] += 1
        row["bytes"] += entry["bytes"] or 0
        row["what"][entry["what"]] = None
        row["rounds"].add(entry["round"])
    out = [e for e in entries if e["direction"] == "out" and e["verdict"] != "refused"]
    newest = {e["silo"]: e["round"] for e in out}
    last: dict[str, list[Record]] = {silo: [] for silo in sorted(newest)}
    for entry in out:
        if entry["round"] == newest[entry["silo"]]:
            last[entry["silo"]].append(entry)
    refused = [e for e in entries if e["verdict"] == "refused"]
    return {
        "sums": [(*key, sums[key]) for key in sorted(sums)],
        "last": [(k, newest[k], v[:MANY], len(v) - MANY) for k, v in last.items()],
        "refused": refused[:MANY],
        "more_refused": max(0, len(refused) - MANY),
        "lines": len(entries),
    }


def _digest(path: Path) -> tuple[str, int, str]:
    """Name, size and SHA-256 of a file, read in pieces."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
            size += len(piece)
    return path.name, size, digest.hexdigest()


def _as_data(figure: Any) -> str:
    """A matplotlib figure as a picture inside a URI, sharp in print too."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    picture = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/svg+xml;base64,{picture}"
