"""A finished run as one HTML file to read, print, sign and file, with a model card.

It loads nothing and runs no script. What a run did not record, or you did not state, is
said to be missing. Needs jinja2: copy this file on its own.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2

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
DASHES = ("none", "6 3", "2 3")
PACKAGES = ("torch", "numpy", "safetensors", "opacus", "nvflare", "azure-ai-ml")
WIDE = 6  # columns of a table of results
MANY = 40  # items per hospital, or refusals, that are shown one by one


def write_report(
    rounds: Sequence[Record],
    path: str | Path,
    *,
    title: str,
    metric: str = "balanced_accuracy",
    engine: str = "simulation",
    silos: Iterable[Record] = (),
    references: Mapping[str, Mapping[str, float]] | None = None,
    privacy: Iterable[Record] = (),
    ledger: Iterable[Record] = (),
    files: Iterable[str | Path] = (),
    figures: Mapping[str, Any] | None = None,
    card: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    reproduce: str = "",
) -> Path:
    """Write the report of a finished run and return its path.

    rounds: `History.rounds`, `rounds_of_events` or `rounds_of_metrics`. metric: the one
    to draw, and to name the worst hospital by; more is better. engine: shown as it is.
    silos: one row per silo, such as `summarize_silos` gives, with "silo" and numbers.
    references: {"local": {silo: value of metric}}, to compare with. privacy: rows of
    `privacy.spending_table`; a "delta" in them is shown. ledger: entries of
    `exchange.read_ledger`, of all ledgers that you have. files: to be named with their
    SHA-256, such as the model and the ledgers. figures: {caption: matplotlib figure}.
    card: texts for the fields of `CARD`. settings: seed, learning rate and so on.
    environment: replaces what `describe_environment` finds. reproduce: the commands.

    All texts are escaped. Raises ValueError without a round, or for an unknown field of
    the card.
    """
    if not rounds:
        raise ValueError("rounds must have at least one record, got none; run it first")
    unknown = sorted(set(card or {}) - set(CARD))
    if unknown:
        raise ValueError(f"card has the fields {list(CARD)}, got {unknown}")
    curves = _per_silo(rounds, metric)
    results = _results(rounds, metric, references or {})
    content = {
        "title": title,
        "engine": engine,
        "metric": metric.replace("_", " "),
        "made": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        "silos": _federation(rounds, silos),
        "results": results,
        "charts": [
            _chart(curves, metric),
            _chart(_per_silo(rounds, "train_loss", "train"), "train_loss"),
        ],
        "traffic": _traffic(rounds),
        "faults": _faults(rounds),
        "privacy": _spent(privacy),
        "ledger": _crossed(list(ledger)),
        "files": [_digest(Path(file)) for file in files],
        "figures": {k: _as_data(v) for k, v in (figures or {}).items()},
        "card": {field: (card or {}).get(field, "") for field in CARD},
        "settings": settings or {},
        "environment": describe_environment() if environment is None else environment,
        "reproduce": reproduce,
    }
    text = _templates().from_string(TEMPLATE).render(content)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")
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
    templates.filters |= {"number": _number, "size": _size}
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


def _mean(cells: Sequence[float | None]) -> float | None:
    """None unless every silo has a value: otherwise it would be of another group."""
    known = [value for value in cells if value is not None]
    return sum(known) / len(known) if len(known) == len(cells) else None


def _chart(
    curves: Mapping[str, Sequence[tuple[int, float]]], metric: str
) -> dict[str, Any] | None:
    """What the template draws as SVG, 700 x 260: lines, ticks, keys."""
    if not curves:
        return None
    points = [point for curve in curves.values() for point in curve]
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    share = 0 <= low and high <= 1 and metric != "train_loss"
    step = 0.25 if share else _step(max(0.0, high) - min(0.0, low))
    low = step * math.floor(min(0.0, low) / step)
    high = 1.0 if share else step * max(1, math.ceil(high / step))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) if last > first else 0.5
        return round(56 + 420 * across, 1), round(
            222 - 200 * (y - low) / (high - low), 1
        )

    lines = []
    for i, (name, curve) in enumerate(curves.items()):
        where = [place(*point) for point in curve]
        lines.append(
            {
                "name": name if len(name) <= 24 else name[:23] + "…",
                "color": COLORS[i % len(COLORS)],
                "dash": DASHES[i // len(COLORS) % len(DASHES)],
                "points": " ".join(f"{x},{y}" for x, y in where),
                "end": where[-1],
                "y": 26 + 18 * i,
            }
        )
    steps = [low + step * k for k in range(round((high - low) / step) + 1)]
    apart = max(1, math.ceil(_step(2 * (last - first)) / 2))
    at = [x for x in range(first, last + 1) if (x - first) % apart == 0]
    at += [last] if last - at[-1] > apart / 2 else []
    return {
        "label": metric.replace("_", " "),
        "lines": lines,
        "height": max(260, 40 + 18 * len(lines)),
        "y": [(place(first, y)[1], f"{y:.3g}") for y in steps],
        "x": [(place(x, low)[0], x) for x in at],
    }


def _step(span: float) -> float:
    """1, 2 or 5 times a power of ten, so that there are three to seven steps."""
    if span <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(span))
    return next(s for s in (0.2, 0.5, 1.0, 2.0) if 5 * s * power >= span) * power


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
    """A matplotlib figure as a PNG inside a URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { --ink: #1f2933; --quiet: #5c6b7a; --line: #d5dce3; --mark: #0072b2; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, "Segoe UI", "Liberation Sans", Arial, sans-serif;
 color: var(--ink); background: #eef1f4; margin: 0; }
main { background: #fff; max-width: 900px; margin: 24px auto; padding: 48px 56px;
 border-top: 6px solid var(--mark); }
h1 { font-size: 28px; line-height: 1.2; margin: 4px 0; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 40px 0 10px; padding-bottom: 5px;
 border-bottom: 2px solid var(--ink); break-after: avoid; }
h3 { font-size: 15px; margin: 20px 0 6px; break-after: avoid; }
p { margin: 6px 0; }
.kind { color: var(--mark); font-weight: 600; letter-spacing: .08em;
 text-transform: uppercase; font-size: 12px; }
.quiet { color: var(--quiet); }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px;
 margin-top: 22px; }
.tile { border: 1px solid var(--line); border-radius: 6px; padding: 10px 14px; }
.tile b { display: block; font-size: 22px; line-height: 1.3; overflow-wrap: anywhere; }
.tile span { color: var(--quiet); font-size: 13px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: 8px 0; font-size: 14px; }
th, td { text-align: left; padding: 6px 10px; border-bottom: 1px solid var(--line);
 vertical-align: top; unicode-bidi: isolate; overflow-wrap: anywhere; }
th { font-weight: 600; border-bottom: 1.5px solid var(--ink); overflow-wrap: normal; }
tbody th { border-bottom: 1px solid var(--line); }
tr { break-inside: avoid; }
td:first-child { min-width: 150px; }
.mid { min-width: 90px; }
.dense { font-size: 12px; }
.dense td { padding: 2px 8px; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.n { white-space: normal; vertical-align: bottom; }
tr.worst td { background: #fdf3e7; }
tr.mean td { font-weight: 600; border-top: 1.5px solid var(--ink); }
.lack { color: #9a3412; background: #fdf3e7; padding: 1px 7px; border-radius: 4px;
 font-weight: 600; }
.tag { color: #9a3412; font-size: 12px; font-weight: 600; }
code, pre { font: 12.5px/1.5 ui-monospace, "Liberation Mono", Consolas, monospace; }
.hash { font-size: 9px; word-break: break-all; }
pre { background: #f4f6f8; padding: 12px 14px; border-radius: 6px; 
 white-space: pre-wrap; overflow-wrap: anywhere; }
svg, figure img { max-width: 100%; height: auto; display: block; }
figure { margin: 14px 0; break-inside: avoid; }
figcaption { color: var(--quiet); font-size: 13px; }
svg text { font: 12px system-ui, "Liberation Sans", Arial, sans-serif;
 fill: var(--ink); }
dl { display: grid; grid-template-columns: 190px 1fr; margin: 8px 0; }
dt, dd { padding: 7px 10px 7px 0; margin: 0; border-bottom: 1px solid var(--line);
 overflow-wrap: anywhere; white-space: pre-line; }
dt { font-weight: 600; }
.sign { display: grid; grid-template-columns: 2fr 2fr 1fr; gap: 28px; margin-top: 60px;
 break-inside: avoid; }
.sign div { border-top: 1px solid var(--ink); padding-top: 4px; color: var(--quiet);
 font-size: 13px; }
@media (max-width: 640px) { main { padding: 24px 16px; margin: 0; }
 .tiles { grid-template-columns: 1fr 1fr; }
 dl, .sign { grid-template-columns: 1fr; } dt { border: 0; padding-bottom: 0; }
 .sign { row-gap: 48px; } }
@page { margin: 18mm 16mm; }
@media print { body { background: #fff; font-size: 10.5pt; }
 main { margin: 0; padding: 0; max-width: none; border: 0; }
 .wide { overflow: visible; }
 * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
</style>
</head>
<body>
{% macro lack(text="not stated") %}<span class="lack">{{ text }}</span>{% endmacro %}
{% macro chart(c, title) %}
<figure>
<svg viewBox="0 0 700 {{ c.height }}" role="img" aria-label="{{ title }}">
{% for y, text in c.y %}
<line x1="56" x2="476" y1="{{ y }}" y2="{{ y }}" stroke="#d5dce3"/>
<text x="50" y="{{ y + 4 }}" text-anchor="end">{{ text }}</text>
{% endfor %}
{% for x, text in c.x %}
<text x="{{ x }}" y="240" text-anchor="middle">{{ text }}</text>
{% endfor %}
<text x="266" y="257" text-anchor="middle">round</text>
{% for line in c.lines %}
<polyline points="{{ line.points }}" fill="none" stroke="{{ line.color }}"
 stroke-width="2" stroke-dasharray="{{ line.dash }}"/>
<circle cx="{{ line.end[0] }}" cy="{{ line.end[1] }}" r="3" fill="{{ line.color }}"/>
<line x1="496" x2="520" y1="{{ line.y }}" y2="{{ line.y }}" stroke="{{ line.color }}"
 stroke-width="2" stroke-dasharray="{{ line.dash }}"/>
<text x="527" y="{{ line.y + 4 }}">{{ line.name }}</text>
{% endfor %}
</svg>
<figcaption>{{ title }}</figcaption>
</figure>
{% endmacro %}
<main>
<div class="kind">Report of a federated training run</div>
<h1>{{ title }}</h1>
<p class="quiet">Engine: {{ engine }} · written {{ made }} ·
 this file loads nothing and runs no script</p>

<div class="tiles">
<div class="tile"><b>{{ silos.rows | length }}</b><span>hospitals</span></div>
<div class="tile"><b>{{ silos.rounds }}</b><span>rounds</span></div>
{% if results and results.worst is not none %}
<div class="tile"><b>{{ results.mean | number }}</b>
<span>mean {{ metric }} of hospitals</span></div>
<div class="tile"><b>{{ results.low | number }}</b>
<span>worst: {{ results.worst }}</span></div>
{% endif %}
<div class="tile"><b>{{ traffic.both | size }}</b><span>sent, both ways</span></div>
<div class="tile"><b>{{ faults | length }}</b><span>updates missing</span></div>
<div class="tile"><b>{% if privacy %}
ε ≤ {{ "%.3g" % (privacy | map(attribute="epsilon") | max) }}{% else %}none{% endif %}
</b><span>differential privacy</span></div>
<div class="tile"><b>{{ "{:,}".format(ledger.lines) if ledger.lines else "none" }}</b>
<span>lines of egress ledgers</span></div>
</div>

<h2>1 Federation</h2>
<div class="wide"><table>
<thead><tr><th>Hospital</th>{% for key in silos.columns %}<th class="n">{{ key }}</th>
{% endfor %}<th class="n">rounds used</th></tr></thead>
<tbody>{% for name, cells, count in silos.rows %}
<tr><td>{{ name }}</td>{% for cell in cells %}<td class="n">{{ cell | number }}</td>
{% endfor %}<td class="n">{{ count }} of {{ silos.rounds }}</td></tr>
{% endfor %}</tbody></table></div>
{% if not silos.columns %}<p>Numbers of examples: {{ lack() }}</p>{% endif %}

<h2>2 Results per hospital</h2>
{% if results %}
<p class="quiet">Each hospital's own test set,
 model after round {{ results.round }}.</p>
{% for part in results.tables %}
<div class="wide"><table>
<thead><tr><th>Hospital</th>{% for key in part.columns %}<th class="n">{{ key }}</th>
{% endfor %}</tr></thead>
<tbody>{% for name, cells in part.rows %}
<tr{% if name == results.worst %} class="worst"{% endif %}><td>{{ name }}
{% if name == results.worst %}<span class="tag">worst</span>{% endif %}</td>
{% for cell in cells %}<td class="n">{{ cell | number }}</td>{% endfor %}</tr>
{% endfor %}
<tr class="mean"><td>Mean of hospitals</td>
{% for cell in part.means %}<td class="n">{{ cell | number }}</td>{% endfor %}</tr>
</tbody></table></div>
{% endfor %}
{% else %}
<p>{{ lack("not measured") }} No round of this run has a test.</p>
{% endif %}
{% if charts[0] %}{{ chart(charts[0], "Test " ~ charts[0].label ~ " per hospital") }}
{% endif %}
{% if charts[1] %}{{ chart(charts[1], "Training loss per hospital") }}{% endif %}
{% for caption, uri in figures.items() %}
<figure><img src="{{ uri }}" alt="{{ caption }}"><figcaption>{{ caption }}</figcaption>
</figure>
{% endfor %}

<h2>3 What was sent</h2>
<table><tbody>
<tr><td>To the hospitals (global model)</td>
<td class="n">{{ traffic.down | size }}</td></tr>
<tr><td>From the hospitals (updates used)</td>
<td class="n">{{ traffic.up | size }}</td></tr>
<tr><td>Time of all rounds</td><td class="n">
{% if traffic.seconds is none %}not recorded
{% else %}{{ "{:,.1f}".format(traffic.seconds) }} s{% endif %}</td></tr>
</tbody></table>

<h3>Egress ledger</h3>
{% if ledger.lines %}
<div class="wide"><table>
<thead><tr><th>Sender</th><th>Direction</th><th class="n">Rounds</th>
<th class="n">Items</th><th class="n">Size</th><th class="n">Refused</th>
<th class="n">Kinds</th></tr></thead>
<tbody>{% for silo, direction, row in ledger.sums %}
<tr><td>{{ silo }}</td><td>{{ direction }}</td>
<td class="n">{{ row.rounds | length }}</td>
<td class="n">{{ row["items"] | number }}</td><td class="n">{{ row.bytes | size }}</td>
<td class="n">{{ row.refused }}</td><td class="n">{{ row.what | length }}</td></tr>
{% endfor %}</tbody></table></div>
<p class="quiet">{{ "{:,}".format(ledger.lines) }} lines were read. "out" was written by
the sender, "in" by the receiver. Section 8 has the items of the last round.</p>
{% else %}
<p>{{ lack("no ledger given") }} This report cannot say what left a hospital.</p>
{% endif %}

<h2>4 Privacy ledger</h2>
{% if privacy %}
<div class="wide"><table>
<thead><tr><th>Hospital</th><th>Mechanism</th><th class="n">Rounds</th>
<th class="n">ε spent</th><th class="n">δ</th><th class="n">ε left</th></tr></thead>
<tbody>{% for row in privacy %}
<tr><td>{{ row.silo }}</td><td>{{ row.mechanism }}</td>
<td class="n">{{ row.rounds }}</td>
<td class="n">{{ row.epsilon | number }}</td><td class="n">{% if row.delta is none %}
{{ lack() }}{% else %}{{ "%.2g" % row.delta }}{% endif %}</td>
<td class="n">{{ row.remaining | number }}</td></tr>
{% endfor %}</tbody></table></div>
{% else %}
<p>{{ lack("none recorded") }} No differential privacy was recorded for this run. Its
updates and its model may reveal training data to whoever holds them.</p>
{% endif %}

<h2>5 Faults</h2>
{% if faults %}
<p>An update counts as missing if it did not come, came too late or was refused; the
round went on without it.</p>
<div class="wide"><table>
<thead><tr><th class="n">Round</th><th>Hospital</th><th>Reason</th></tr></thead>
<tbody>{% for number, silo, reason in faults %}
<tr><td class="n">{{ number }}</td><td>{{ silo }}</td><td>{{ reason }}</td></tr>
{% endfor %}</tbody></table></div>
{% else %}
<p>None was recorded: every update that was asked for was used.</p>
{% endif %}
{% if ledger.refused %}
<h3>Refused at a boundary, by the ledger</h3>
<div class="wide"><table>
<thead><tr><th>Sender</th><th>Direction</th><th class="mid">What</th><th>Reason</th>
</tr></thead>
<tbody>{% for e in ledger.refused %}
<tr><td>{{ e.silo }}</td><td>{{ e.direction }}</td><td>{{ e.what }}</td>
<td>{{ e.reason }}</td></tr>
{% endfor %}</tbody></table></div>
{% if ledger.more_refused %}<p>{{ ledger.more_refused }} more are in the ledger.</p>
{% endif %}
{% endif %}

<h2>6 Model card</h2>
<dl>
{% for field, text in card.items() %}
<dt>{{ field }}</dt><dd>{% if text %}{{ text }}{% else %}{{ lack() }}{% endif %}</dd>
{% endfor %}
<dt>Results per hospital</dt><dd>
{%- if results and results.worst is not none -%}
Section 2. Mean {{ metric }} {{ results.mean | number }};
 worst {{ results.low | number }} ({{ results.worst }}).
{%- else -%}{{ lack("not measured") }}{% endif %}</dd>
</dl>

<h2>7 How to reproduce</h2>
{% if reproduce %}<pre>{{ reproduce }}</pre>{% else %}<p>Commands: {{ lack() }}</p>
{% endif %}
<h3>Settings</h3>
{% if settings %}
<dl>{% for name, value in settings.items() %}<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}</dl>
{% else %}<p>{{ lack() }}</p>{% endif %}
<h3>Environment</h3>
{% if environment %}
<dl>{% for name, value in environment.items() %}<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}</dl>
{% else %}<p>{{ lack() }}</p>{% endif %}

<h2>8 Evidence</h2>
<h3>Files</h3>
{% if files %}
<div class="wide"><table>
<thead><tr><th>File</th><th class="n">Size</th><th>SHA-256</th></tr></thead>
<tbody>{% for name, size, sha256 in files %}
<tr><td>{{ name }}</td><td class="n">{{ size | size }}</td>
<td><code class="hash">{{ sha256 }}</code></td></tr>
{% endfor %}</tbody></table></div>
{% else %}<p>Model and ledger files: {{ lack() }}</p>{% endif %}
{% if ledger.last %}
<h3>What left each hospital in its last round</h3>
<div class="wide"><table class="dense">
<thead><tr><th>Item</th><th>Shape</th><th class="n">Size</th>
<th>SHA-256</th></tr></thead>
<tbody>{% for silo, number, items, more in ledger.last %}
<tr><th colspan="4">{{ silo }}{% if number is not none %}, round {{ number + 1 }}
{% endif %}</th></tr>
{% for e in items %}
<tr><td>{{ e.what }}</td>
<td>{{ e.shape | join(" × ") if e.shape else "number" }}</td>
<td class="n">{{ e.bytes | size }}</td>
<td><code class="hash">{{ e.sha256 or "–" }}</code></td></tr>
{% endfor %}
{% if more > 0 %}<tr><td colspan="4">{{ more }} more are in the ledger.</td></tr>
{% endif %}
{% endfor %}</tbody></table></div>
{% endif %}

<div class="sign"><div>Reviewed by, role</div><div>Signature</div><div>Date</div></div>
</main>
</body>
</html>
"""
