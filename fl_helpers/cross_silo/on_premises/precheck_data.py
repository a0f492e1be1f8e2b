"""The part of the pre-check that runs the hospital's own function on its own data.

The function loads the data and trains one batch in a process of its own, confined and
without network (`precheck_trial`); its update then passes the gate, and nothing is
sent. What that process answers is put into words here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fl_helpers import exchange
from fl_helpers.cross_silo import sandbox
from fl_helpers.cross_silo.on_premises import gate
from fl_helpers.cross_silo.on_premises.precheck_kit import Verdict
from fl_helpers.cross_silo.on_premises.precheck_trial import UPDATE, Asked, try_out
from fl_helpers.cross_silo.on_premises.site import Site
from fl_helpers.training import Update

Row = dict[str, Any]


def row(item: str, ok: bool | None, found: str, remedy: str = "") -> Row:
    """A line of the pre-check. ok: None is for somebody to judge, or was not looked at.
    remedy: what to do, "" if nothing."""
    return {"item": item, "ok": ok, "found": found, "remedy": remedy}


ITEMS = ("client function", "data", "silo name", "labels", "patients", "units")
ITEMS += ("one batch", "gate")
LOOK = "look at it with --show-errors, whose output is for the hospital's eyes only"
FAILED = {  # codes of `precheck_trial`: what was found, and what to do
    "FAILED": ("the hospital's function raised {error}{line}", LOOK),
    "CANNOT_READ": (
        "the hospital's function could not read a file: {error}{line}",
        "is `data` in local/site.json the right folder, complete and undamaged, and "
        f"may the service's user read all of it? If so, {LOOK}",
    ),
    "KEY_MISSING": (
        "the hospital's function misses a key: {error}{line}",
        "a setting of the run or a column of the data has another name than the "
        f"function expects; {LOOK}",
    ),
    "WRONG_SILO": (
        "the data name another silo than local/site.json",
        "correct `silo` or `data` in local/site.json: the name must be the one in the "
        "certificate, and the data those of this hospital",
    ),
    "NOT_A_CLIENT": (
        "the function does not take (data, settings), or returns no `Client`",
        "begin with a copy of fl_helpers/cross_silo/hospital.py",
    ),
    "NOT_BOOKED": (
        "there is a privacy budget, and the function trained without the account",
        "train as private_client of fl_helpers/cross_silo/hospital.py does, or take "
        "the budget out of local/site.json",
    ),
    "LOSS_NOT_FINITE": (
        "the loss, or another number that it reports, is NaN or infinite",
        "look for empty and absurd values in the data, then try a smaller lr",
    ),
    "TIMEOUT": (
        "it took longer than the pre-check waits",
        "give a copy of `data` with fewer files, or look for a loop in the function",
    ),
    "ENDED": (
        "the process that loads the data and trains was ended from outside, or could "
        "not start",
        f"is there enough memory, and may it read its Python? Then {LOOK}",
    ),
}
REFUSALS = {  # words of `exchange.Refused`, none of which names a record
    "secure runs only": (
        "the policy lets updates out in secure sums only, the run is not secure",
        "ask the coordinator for a secure run, or agree to a plain one with gate.allow",
    ),
    "metrics are not on the list": (
        "the function reports numbers that local/egress.json does not allow",
        "name them in gate.allow(..., metrics=[...]), or do not return them",
    ),
    "model's entries": (
        "the update lacks entries of the model, or has some that nobody agreed to",
        "the function must train the model that was agreed to, and return its state",
    ),
    "expected": (
        "an entry of the update has another shape or type than was agreed to",
        "the function must train the model that was agreed to",
    ),
    "NaN or infinite": (
        "the trained weights are NaN or infinite",
        "look for empty and absurd values in the data, then try a smaller lr",
    ),
    "norm": (
        "the update went further than max_norm in local/egress.json lets it",
        "train with a smaller lr or fewer epochs, or agree on another max_norm",
    ),
    "bytes": (
        "the update is larger than max_bytes in local/egress.json",
        "agree on another max_bytes with gate.allow; None is what the model needs",
    ),
}


def data_rows(
    kit: Path,
    site: Site,
    asked: Asked,
    folder: Path,
    *,
    ranges: Mapping[str, Any] | None = None,
    whole: bool = False,
    show_errors: bool = False,
) -> list[Row]:
    """The rows of `ITEMS`: one trial, see `try_out`, judged item by item.

    show_errors: what the hospital's function printed and raised stands in the row that
    is not ok, too.
    """
    if sandbox.available_sandbox() == "none":
        return [row(item, None, "not tried without a sandbox") for item in ITEMS]
    found = try_out(site, asked, folder, ranges=ranges, whole=whole)
    found |= {"ranges": ranges or {}, "kit": kit, "update": folder / "out" / UPDATE}
    found |= {"folder": folder, "show_errors": show_errors, "whole": whole}
    failed, rows = found.get("failed"), []
    at = _item_of(failed) if failed else ""
    for item in ITEMS:
        if any(each["item"] == at for each in rows):
            rows.append(row(item, None, "not reached"))
            continue
        try:
            judge = _failed if item == at else _JUDGES[item]
            rows.append(row(item, *judge(found, asked)))
        except Exception:  # the process is the hospital's own code, and may lie
            said = "the process did not give an answer that can be read"
            rows.append(row(item, False, said, LOOK))
    if show_errors and found["said"]:
        shown = next((r for r in rows if r["ok"] is False or r["item"] == at), rows[-1])
        shown["found"] += f"\n{found['said']}"
    return rows


def _item_of(failed: Mapping[str, Any]) -> str:
    stage = "silo name" if failed.get("code") == "WRONG_SILO" else failed.get("stage")
    return stage if stage in ITEMS else ITEMS[0]


def _failed(found: Mapping[str, Any], asked: Asked) -> Verdict:
    """Only codes, a class name and a line number are taken from the process."""
    code, error, line = (found["failed"].get(key) for key in ("code", "error", "line"))
    code = code if code in FAILED else "FAILED"
    name = error if isinstance(error, str) and error.isidentifier() else "an error"
    where = f" (line {line} of its file)" if type(line) is int else ""
    said, remedy = FAILED[code]
    if code == "KEY_MISSING" and not asked.told:
        said, remedy = "not tried: {error}{line}", (
            "the function seems to need the settings of a run: ask the coordinator for "
            "the run's folder and give it with --run"
        )  # fmt: skip
        return None, said.format(error=name, line=where), remedy
    return False, said.format(error=name, line=where), remedy


def _loaded(found: Mapping[str, Any], asked: Asked) -> Verdict:
    return True, "it can be imported", ""


def _data(found: Mapping[str, Any], asked: Asked) -> Verdict:
    sizes = [
        f"{int(labels['n'])} to {part} with"
        for part, labels in found.get("labels", {}).items()
        if labels
    ]
    return True, f"{' and '.join(sizes) or 'examples'} were loaded", ""


def _name(found: Mapping[str, Any], asked: Asked) -> Verdict:
    return True, "the data are of the silo in local/site.json", ""


def _labels(found: Mapping[str, Any], asked: Asked) -> Verdict:
    """Counts are for the hospital; only what no training can take is not ok."""
    settings = asked.run.settings if asked.run else {}
    said, wrong, missing = [], [], []
    for part in ("train", "test"):
        labels = found["labels"].get(part)
        if not labels:
            continue
        if labels["missing"]:
            wrong.append(f"{int(labels['missing'])} of {part} have no label")
        if labels["counts"] is None:
            continue
        counts = {int(k): int(n) for k, n in labels["counts"].items()}
        said.append(f"{part}: {counts}")
        classes = int(settings.get("num_classes", max(counts, default=0) + 1))
        wrong += [f"{part} has class {k}" for k in counts if not 0 <= k < classes]
        missing += [f"{part} has no class {k}" for k in {*range(classes)} - {*counts}]
    if wrong:
        remedy = "correct the column or the folders that the labels are read from"
        return False, "; ".join(wrong + said), remedy
    if missing:
        remedy = "if that is so, tell the coordinator; else look at how labels are read"
        return None, "; ".join(missing + said), remedy
    if not said:
        return None, "no labels that are classes: nothing to count", ""
    return True, "; ".join(said), ""


def _patients(found: Mapping[str, Any], asked: Asked) -> Verdict:
    """A patient in both parts makes every test result look better than it is."""
    known, both = found["patients"]["known"], found["patients"]["both"]
    what = "patients" if known else "examples that are equal in every bit"
    if both:
        remedy = "split by patient: `silos.make_silos(..., patients=...)` does so"
        said = f"{int(both)} {what} stand in the training and in the test part"
        return False, said, remedy
    if known:
        return True, "no patient stands in both parts", ""
    if both is None:
        return None, "there is no test part to compare with", ""
    said = "no example stands in both parts; patients could not be compared"
    remedy = "give the silo train_patients and test_patients, a name per example"
    return None, said, remedy


def _units(found: Mapping[str, Any], asked: Asked) -> Verdict:
    if not found["ranges"]:
        remedy = "give the ranges that were agreed on, a JSON file, with --ranges"
        return None, "no ranges to compare with", remedy
    wrong = []
    for name in found["ranges"]:
        state = found["units"][name]
        if type(state) is int:
            size = f"{10 ** abs(state):,}"
            wrong.append(
                f"{name} is about {size} times too {'large' if state > 0 else 'small'}"
            )
        elif state == "no column":
            wrong.append(f"there is no column for {name}")
        elif state != "inside":
            wrong.append(f"more than 5 % of {name} lie outside of the agreed range")
    if not wrong:
        return True, f"{len(found['ranges'])} quantities in their ranges", ""
    remedy = "convert to the agreed unit where the data are loaded; compare the columns"
    return False, "; ".join(wrong), remedy


def _batch(found: Mapping[str, Any], asked: Asked) -> Verdict:
    if asked.run is None:
        remedy = "agree to a model first, or give the run's folder with --run"
        return None, "not tried: no model is agreed to", remedy
    how = "" if asked.told else "; settings and weights of the run were not known"
    what = "a whole turn" if found["whole"] else "a batch (--whole: a whole turn)"
    said = f"{what} was trained and tested, with numbers that are finite{how}"
    return True, said, ""


def _gate(found: Mapping[str, Any], asked: Asked) -> Verdict:
    """Pass the trial's update through the gate, as in a run."""
    if asked.run is None or not (found["kit"] / "local" / "egress.json").exists():
        remedy = "agree to a model: gate.allow, docs/hospital-administrator.md"
        return None, "not tried: nothing may leave yet", remedy
    silo, count, metrics = found["numbers"]
    update = Update(silo, load_file(found["update"]), count, metrics)
    start = {name: asked.start[name] for name in asked.run.shared}
    try:
        how = {"folder": found["folder"], "secure": asked.run.secure}
        gate.rehearse(found["kit"], update, start, **how)
    except exchange.Refused as refused:
        reason = refused.reason
        said, remedy = next(
            (v for words, v in REFUSALS.items() if words in reason),
            ("the gate refuses the update", LOOK),
        )
        said += f"\n{reason}" if found["show_errors"] else ""
        return False, said, remedy
    return True, "the update may leave; it was thrown away", ""


_JUDGES = {"client function": _loaded, "data": _data, "silo name": _name}
_JUDGES |= {"labels": _labels, "patients": _patients, "units": _units}
_JUDGES |= {"one batch": _batch, "gate": _gate}
