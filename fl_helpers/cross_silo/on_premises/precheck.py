"""Is this machine ready for a run? One command for a hospital or the coordinator.

`python -m fl_helpers.cross_silo.on_premises.precheck KIT` looks at the kit, the machine
and the connection (`precheck_kit`), and lets the hospital's own function train one
batch on its own data (`precheck_data`). Nothing is sent and nothing of the kit is
changed. The table is for whoever runs it; `--for-coordinator` prints one line per item.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fl_helpers.cross_silo.on_premises import gate, site
from fl_helpers.cross_silo.on_premises.precheck_data import ITEMS, Row, data_rows, row
from fl_helpers.cross_silo.on_premises.precheck_kit import (
    CHECKS,
    GUIDE,
    confirmed,
    kind_of,
)
from fl_helpers.cross_silo.on_premises.precheck_trial import (
    Asked,
    read_asked,
    start_of,
)
from fl_helpers.cross_silo.run import Run

PAGE = "docs/hospital-administrator.md"
NVFLARE = "2.9.0"  # the guards rely on this version's internals


def precheck(
    kit: str | Path,
    *,
    run: str | Path | None = None,
    ranges: str | Path | None = None,
    expect: str = "",
    whole: bool = False,
    show_errors: bool = False,
) -> list[Row]:
    """Look at all that a run needs, and return a row {item, ok, found, remedy} of each.

    kit: of a hospital, the server, or the administrator. run: folder or `run.json` of
    the run that is planned, from the coordinator. ranges: a JSON file {name: {"column",
    "low", "high"}} of what your function hands to the model. expect: the coordinator's
    `shared_line`. whole: train a whole turn instead of one batch. show_errors: put
    texts of errors into the rows, which may name a patient.

    ok is True, False, or None: not looked at, or for you to judge. Nothing is sent but
    a greeting to the server's port. Raises ValueError for a folder that is no kit.
    """
    kit = Path(kit).resolve()
    kind = kind_of(kit)
    rows = [_safely(item, check, kit) for item, check in CHECKS[kind].items()]
    rows.append(_versions(expect))
    if kind == "hospital":
        with tempfile.TemporaryDirectory() as folder:
            options = {"ranges": ranges, "whole": whole, "show_errors": show_errors}
            rows += _trial(kit, run, Path(folder), **options)
    return rows


def _safely(item: str, check: Callable[[Path], Any], kit: Path) -> Row:
    """The row of a check; if it fails itself, one that says so: what it reads are the
    kit's own files, which hold no record."""
    try:
        return row(item, *check(kit))
    except Exception as error:
        said = f"the kit cannot be read: {type(error).__name__}: {error}"
        remedy = "copy the kit again as it was handed over, then set it up again"
        return row(item, False, said, remedy)


def _versions(expect: str) -> Row:
    """What all machines must share."""
    line, said = shared_line(), []
    if f"nvflare {NVFLARE}" not in line:
        said = [f"nvflare must be {NVFLARE}"]
    elif expect:
        theirs = " ".join(expect.split()).split(" · ")
        said = [f"{p!r} is not {theirs}" for p in line.split(" · ") if p not in theirs]
    if said:
        remedy = f"install the same version on all machines, {GUIDE}, Install"
        return row("versions", False, f"{line}: {'; '.join(said)}", remedy)
    if expect:
        return row("versions", True, f"{line}: as at the coordinator")
    remedy = "compare this line by telephone, or give the coordinator's with --expect"
    return row("versions", None, line, remedy)


def shared_line() -> str:
    """Versions, and a hash of this package's code, to be compared by telephone."""
    package, digest = Path(__file__).parents[2], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    code = digest.hexdigest()
    parts = {"code": f"{code[:4]}-{code[4:8]}-{code[8:12]}"}
    parts |= {"python": ".".join(platform.python_version_tuple()[:2])}
    parts |= {name: version(name) for name in ("torch", "nvflare")}
    return " · ".join(f"{name} {value}" for name, value in parts.items())


# ---- what will be asked for, and the trial


def _trial(
    kit: Path,
    run: str | Path | None,
    folder: Path,
    *,
    ranges: str | Path | None,
    whole: bool,
    show_errors: bool,
) -> list[Row]:
    """The agreement against the run, then the hospital's function on its data."""
    item, file = "what may leave", "what --run names"
    not_reached = [row(each, None, "not reached") for each in ITEMS]
    try:
        asked = read_asked(run) if run else None
        file = "what --ranges names"
        agreed = _read_ranges(ranges) if ranges else {}
        file = "local/egress.json"
        asked = asked or _agreed(kit)
        found = _may_leave(kit, asked)
    except Exception as error:
        said = f"{file} cannot be read: {type(error).__name__}: {error}"
        remedy = "ask the coordinator for it again"
        if file == "local/egress.json":
            remedy = f"agree to a model again, {PAGE}"
        return [row(item, False, said, remedy), *not_reached]
    try:
        own = site.read_site(kit)
    except Exception:  # said already
        return [row(item, *found), *not_reached]
    options = {"ranges": agreed, "whole": whole, "show_errors": show_errors}
    return [row(item, *found), *data_rows(kit, own, asked, folder, **options)]


def _agreed(kit: Path) -> Asked:
    """Without the run, a trial of the model that the hospital has agreed to."""
    if not (kit / "local" / "egress.json").exists():
        return Asked(None, None, told=False)
    policy = gate.read_policy(kit)
    about = {"rounds": 1, "seed": 0, "limits": policy.limits, "secure": policy.secure}
    run = Run("precheck", policy.expected, **about)
    return Asked(run, start_of(policy.expected), told=False)


def _read_ranges(path: str | Path) -> dict[str, Any]:
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    for name, agreed in found.items():
        if agreed.keys() != {"column", "low", "high"}:
            raise ValueError(f"{name!r} must have column, low and high")
        if not agreed["low"] < agreed["high"] or not agreed["column"] >= 0:
            raise ValueError(f"{name!r}: low must be below high, column 0 or more")
    return found


def _may_leave(kit: Path, asked: Asked) -> tuple[bool | None, str, str]:
    """local/egress.json against the model that the hospital will be asked for."""
    remedy = f"agree to the model of the run, {PAGE}, or tell the coordinator that you "
    remedy += "do not"
    if not (kit / "local" / "egress.json").exists():
        return False, "nothing: no model is agreed to", remedy
    policy = gate.read_policy(kit)
    count, limits = len(policy.expected), policy.limits
    said = f"{count} entries of one model, and {', '.join(sorted(limits.metrics))}"
    if not asked.told:
        more = "give the run's folder with --run to compare it"
        return None, said, more
    mine, theirs = (
        {name: (value.shape, value.dtype) for name, value in params.items()}
        for params in (policy.expected, asked.run.shared)
    )
    differ = [n for n in {**theirs, **mine} if mine.get(n) != theirs.get(n)]
    if differ:
        said = f"{len(differ)} entries are not those of the run, such as {differ[0]!r}"
        return False, said, remedy
    if policy.secure and not asked.run.secure:
        said = "secure sums only, and the run is a plain one"
        return False, said, "ask the coordinator for a secure run"
    if asked.run.secure and (believed := confirmed(kit, needed=True))[0] is False:
        return believed
    more = sorted(asked.run.limits.metrics - limits.metrics)
    if more:
        said += f"; the run would take {', '.join(more)}, too"
        return None, said, "gate.allow(..., metrics=[...]) if you agree"
    return True, said, ""


# ---- the command


WORDS = {True: "ok", False: "NOT OK", None: "-"}


def as_table(rows: list[Row]) -> str:
    """The rows in plain words, for whoever ran the check."""
    wide = max(len(each["item"]) for each in rows) + 2
    lines = []
    for each in rows:
        found = each["found"].replace("\n", "\n" + " " * (9 + wide))
        lines.append(f"{WORDS[each['ok']]:<8} {each['item']:<{wide}}{found}")
        if each["remedy"]:
            lines.append(f"{'':<8} {'':<{wide}}-> {each['remedy']}")
    wrong = sum(each["ok"] is False for each in rows)
    open_ = sum(each["ok"] is None for each in rows)
    lines.append(f"NOT READY: {wrong} of {len(rows)} items" if wrong else "ready")
    lines[-1] += f"; {open_} are for you to judge (-)" if open_ else ""
    return "\n".join(lines)


def for_coordinator(rows: list[Row]) -> str:
    """One line per item: ok or not, and nothing else of the hospital."""
    words = {True: "ok", False: "not ok", None: "not checked"}
    return "\n".join(f"{each['item']}: {words[each['ok']]}" for each in rows)


def main(arguments: list[str] | None = None) -> int:
    """Print what was found; 1 if something is not ok."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kit", help="folder with startup/ and local/")
    parser.add_argument("--run", help="folder or run.json of the run that is planned")
    parser.add_argument("--ranges", help="JSON file of agreed ranges")
    parser.add_argument("--expect", default="", help="the coordinator's versions line")
    parser.add_argument("--whole", action="store_true", help="train a whole turn")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="rows for a script")
    shown.add_argument("--for-coordinator", action="store_true", help="ok or not only")
    parser.add_argument(
        "--show-errors",
        action="store_true",
        help="what the hospital's function says; may name patients: for your eyes only",
    )
    given = vars(parser.parse_args(arguments))
    if given["for_coordinator"] and given["show_errors"]:
        parser.error("--show-errors is for the hospital, not for the coordinator")
    as_json, brief = given.pop("json"), given.pop("for_coordinator")
    rows = precheck(given.pop("kit"), **given)
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        print(for_coordinator(rows) if brief else as_table(rows))
    return int(any(each["ok"] is False for each in rows))


if __name__ == "__main__":
    sys.exit(main())
