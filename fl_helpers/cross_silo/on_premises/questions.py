"""What a hospital answers in an analysis: functions on its own list, and sums only.

A question is the name of a function of `fl_helpers` and plain settings, never code.
Without `allow_questions` a hospital answers none. Before a number is worked out, the
question is checked, written down, and its cohort is compared with those before; before
the number leaves, so are the points at which it cuts times or scores, and columns of
regressions are looked at for categories that few patients have.
"""

from __future__ import annotations

import fcntl
import inspect
import json
import math
import resource
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable, make_reply
from torch import Tensor

from fl_helpers import (
    exchange,
    federated_statistics,
    regression,
    survival,
    trees,
    validation,
)
from fl_helpers.analysis import CohortLedger, TooFew, as_arrays
from fl_helpers.cross_silo.cohorts import Cohort
from fl_helpers.cross_silo.on_premises import disclosure
from fl_helpers.cross_silo.on_premises.disclosure import Denied
from fl_helpers.cross_silo.on_premises.gate import SEALED, Sums, pack
from fl_helpers.cross_silo.on_premises.site import ANSWERS, write_local
from fl_helpers.cross_silo.turn import Tables
from fl_helpers.training import Update

KNOWN: dict[str, Callable[..., Mapping[str, Any]]] = {
    f"{module.__name__}:{name}": value
    for module in (federated_statistics, regression, survival, trees, validation)
    for name, value in vars(module).items()
    if name.startswith("silo_") or name == "finest_counts"
}
ONE_BY_ONE = {  # no sums: means, and arrays whose form shows what is hidden in a silo
    "fl_helpers.federated_statistics:silo_table",
    "fl_helpers.validation:finest_counts",
    "fl_helpers.validation:silo_auroc_difference",
}
LIMITS = ("min_rows", "min_count", "min_events")  # settings that a hospital sets
COHORTS = "analysis/cohorts.jsonl"  # of a kit, for `analysis.CohortLedger`
QUESTIONS = "analysis/questions.jsonl"  # of a kit: time, hash and text of each
ANSWER = exchange.Limits(metrics=frozenset())  # of an answer: arrays, nothing else
MAX_QUESTION, MAX_ANSWER = 2**22, 2**24  # bytes
MEMORY = 2**31  # bytes that an answer may need beside what the process has
LARGEST = 10_000  # whole number, and length of a list, in settings
SKETCH = "fl_helpers.federated_statistics:silo_sketch"


@dataclass(frozen=True)
class Question:
    """What is asked. table: which of a hospital's; "" is that of the function's module.
    where: {column: [lowest, highest]}, whose rows; None is no limit."""

    function: str
    settings: Mapping[str, Any]
    table: str = ""
    where: Mapping[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        return json.dumps(asdict(self), allow_nan=False)


def read_question(text: Any) -> Question:
    """Read `Question.text` of somebody who is not trusted; Denied for all else."""
    if type(text) is not str or len(text) > MAX_QUESTION:
        raise Denied(f"a question is a text of at most {MAX_QUESTION} characters")
    try:
        question = Question(**json.loads(text, object_pairs_hook=_once))
    except (ValueError, TypeError, RecursionError) as error:
        raise Denied(f"no question: {type(error).__name__}") from None
    if type(question.function) is not str or type(question.table) is not str:
        raise Denied("function and table must be texts")
    for part in (question.settings, question.where):
        if type(part) is not dict:
            raise Denied("settings and where must be by name")
        _check_plain(part, "", 0)
    for bounds in question.where.values():
        if not (type(bounds) is list and len(bounds) == 2):
            raise Denied("where must give the lowest and the highest value")
        if not {*map(type, bounds)} <= {int, float, type(None)}:
            raise Denied("where must give numbers, or null for no limit")
    return question


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise Denied("a name appears twice")
    return dict(pairs)


def _check_plain(value: Any, name: str, depth: int) -> None:
    """Numbers, texts, and lists and names of them, none of them huge."""
    parts = value if type(value) is list else ()
    if type(value) is dict:
        parts = value.values()
        if any(len(key) > 200 for key in value):
            raise Denied("a name is too long")
    if len(parts) > LARGEST or depth > 8 or type(value) is str and len(value) > 200:
        raise Denied(f"setting {name[:40]!r} is too long or too deep")
    if type(value) is int and abs(value) > (2**53 if name == "rows" else LARGEST):
        raise Denied(f"setting {name[:40]!r} has a number above {LARGEST}")
    if type(value) is float and (not math.isfinite(value) or name == "categories"):
        raise Denied(f"setting {name[:40]!r} must be finite, categories whole numbers")
    names = value if type(value) is dict else [name] * len(parts)
    for key, part in zip(names, parts, strict=True):
        _check_plain(part, key, depth + 1)


# -- the hospital's rules


def allow_questions(
    kit: str | Path,
    functions: Collection[str] = tuple(KNOWN),
    *,
    minimum: int = 10,
    secure: bool = False,
) -> None:
    """Set which questions a hospital answers, in its kit's `local/questions.json`.

    functions: "module:function", of `KNOWN`; by default all of them, () is none, as
    without a call of this. minimum: rows, events or patients in a cell that an answer
    must be about; a question may ask for more, not for fewer. secure: answers leave in
    secure sums only. Lets runs name the class that answers, too. Raises ValueError for
    other functions, and a minimum below 2.
    """
    unknown = sorted({*functions} - KNOWN.keys())
    if unknown or minimum < 2:
        raise ValueError(f"not known: {unknown[:3]}; or minimum {minimum} below 2")
    path = Path(kit) / "local" / "resources.json"
    resources = json.loads(path.read_text(encoding="utf-8"))
    classes = [c for c in resources["class_allow_list"] if c != ANSWERS]
    resources["class_allow_list"] = classes + [ANSWERS] * bool(functions)
    write_local(kit, "resources.json", resources)
    rules = {"functions": sorted(functions), "minimum": minimum, "secure": secure}
    write_local(kit, "questions.json", rules)


@dataclass(frozen=True)
class Rules:
    """What `allow_questions` set."""

    functions: Collection[str]
    minimum: int
    secure: bool = False

    def check(
        self, question: Question, *, sealed: bool = False
    ) -> tuple[Callable[..., Any], dict[str, Any]]:
        """The function of a question, and its settings with this hospital's minimum.

        sealed: its answer leaves in a secure sum. Raises Denied for a function that is
        not on the list, settings that it does not have, a minimum below the hospital's
        own, a plain answer where secure sums only are allowed, and a function whose
        answers are no sums in a secure one.
        """
        name = question.function
        if self.secure and not sealed:
            raise Denied("this hospital answers in secure sums only")
        if sealed and name in ONE_BY_ONE:
            raise Denied("answers of this function are for each silo, they do not add")
        if name not in self.functions or name not in KNOWN:
            raise Denied("the function is not on this hospital's list")
        function, settings = KNOWN[name], dict(question.settings)
        known = inspect.signature(function).parameters
        for limit in known.keys() & {*LIMITS}:
            usual = max(self.minimum, known[limit].default)
            if type(settings.setdefault(limit, usual)) is not int:
                raise Denied(f"{limit} must be a whole number")
            if settings[limit] < self.minimum:
                raise Denied(f"{limit} must be at least {self.minimum} here")
        try:
            inspect.signature(function).bind(None, **settings)
        except TypeError as error:
            raise Denied(f"settings of {name}: {error}") from None
        return function, settings


def read_rules(kit: str | Path) -> Rules:
    """What `allow_questions` set; Denied without a call of it."""
    path = Path(kit) / "local" / "questions.json"
    if not path.exists():
        raise Denied("this hospital answers no questions; see `allow_questions`")
    return Rules(**json.loads(path.read_text(encoding="utf-8")))


# -- the hospital's rows


def table_of(question: Question) -> str:
    """The table that a question names, or that of its function."""
    module = question.function.partition(":")[0].rpartition(".")[2]
    return question.table or module


def cohort(tables: Tables, question: Question) -> tuple[Any, np.ndarray]:
    """The rows that a question is about, and whose they are, bool [patients]."""
    name = table_of(question)
    if name not in tables.tables or not question.where.keys() <= tables.columns.keys():
        raise Denied("this hospital has no such table or column")
    data, inside = tables.tables[name], np.ones(tables.patients, dtype=bool)
    inside = np.asarray(tables.rows.get(name, inside))
    if _length(data) != inside.sum() or inside.shape != (tables.patients,):
        raise ValueError(f"table {name!r} does not have the rows that `rows` says")
    chosen = inside.copy()
    for column, (low, high) in question.where.items():
        value = np.asarray(tables.columns[column], dtype=np.float64)
        chosen &= value >= (-math.inf if low is None else low)
        chosen &= value <= (math.inf if high is None else high)
    return (_some(data, chosen[inside]) if question.where else data), chosen


def _length(data: Any) -> int:
    parts = data.values() if isinstance(data, Mapping) else data
    return len(next(iter(parts))) if isinstance(data, (Mapping, tuple)) else len(data.y)


def _some(data: Any, rows: np.ndarray) -> Any:
    if isinstance(data, Mapping):
        return {name: np.asarray(part)[rows] for name, part in data.items()}
    if isinstance(data, tuple):
        return type(data)(*(np.asarray(part)[rows] for part in data))
    raise Denied("this table cannot be asked by cohort")


# -- an answer


def answer(
    kit: Path,
    silo: str,
    tables: Tables,
    text: Any,
    number: Any,
    *,
    sealed: bool = False,
) -> Sums:
    """Check a question, write it and its cohort down, and only then work it out.

    sealed: as in `Rules.check`. Raises Denied, and whatever else its function raises:
    `TooFew` and the like.
    """
    if type(number) is not int or not 0 < number < 10**9:
        raise Denied("a question has a number")
    question, rules = read_question(text), read_rules(kit)
    function, settings = rules.check(question, sealed=sealed)
    data, chosen = cohort(tables, question)
    about = f"{question.function} {json.dumps(dict(question.where))}"
    with _locked(kit) as path:
        _note(kit, text, number)
        _check_rows(int(chosen.sum()), rules)
        CohortLedger(path, minimum=rules.minimum).admit(chosen, about=about)
        if question.function == SKETCH:  # of the difference of two it needs as many
            ledger = CohortLedger(path, minimum=federated_statistics.SKETCH)
            ledger.admit(chosen, about=about, data="sketch")
    with _limited(MEMORY):
        arrays = as_arrays(silo, function(data, **settings))
    if question.function in disclosure.PRODUCTS and not sealed:
        disclosure.check_columns(data, rules.minimum)
    found = [*disclosure.cuts(question.function, data, settings, arrays)]
    with _locked(kit) as path:
        ledger = CohortLedger(path, minimum=rules.minimum)
        digest = sha256(np.packbits(chosen).tobytes()).hexdigest()[:16]
        of = f"{digest} {table_of(question)}"
        for what, part in found:
            rows = chosen.copy()
            rows[chosen] = part
            ledger.admit_part(rows, about=about, data=f"{of} {what}")
    whose = Cohort(chosen, _data_digest(tables)) if sealed else None
    return Sums(arrays, number, question, int(chosen.sum()), whose)


@contextmanager
def _locked(kit: Path) -> Iterator[Path]:
    """The ledger of cohorts, for one at a time: several runs may ask at once."""
    path = kit / COHORTS
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path


def _data_digest(tables: Tables) -> str:
    """Of what a question can choose rows by; with it, a row is the same patient."""
    digest = sha256(f"{tables.patients}".encode())
    for kind in (tables.columns, tables.rows):
        for name in sorted(kind):
            values = np.ascontiguousarray(kind[name], dtype=np.float64)
            digest.update(f" {name} ".encode() + values.tobytes())
    return digest.hexdigest()


def _check_rows(rows: int, rules: Rules) -> None:
    """Also of none: else it would show whether there is such a patient."""
    if rows < rules.minimum:
        raise TooFew(f"fewer than {rules.minimum} rows, or none")


def _note(kit: Path, text: str, number: int) -> None:
    """What was asked, for whoever looks after it; a long model is cut short."""
    digest, now = sha256(text.encode()).hexdigest(), round(time.time(), 3)
    line = json.dumps({"time": now, "sha256": digest, "question": text[:4000]})
    with (kit / QUESTIONS).open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    item = {"what": "question", "bytes": len(text), "sha256": digest}
    about = {"silo": "orchestrator", "round_index": number, "verdict": "accepted"}
    exchange.Ledger(kit / "ledger.jsonl").add([item], direction="in", **about)


@contextmanager
def _limited(memory: int) -> Iterator[None]:
    """No more than so many bytes beside what the process has; Denied beyond."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + memory
    limit = min([limit, *(v for v in (soft, hard) if v != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    except MemoryError:
        raise Denied(f"the answer would need more than {memory} bytes") from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def release(kit: Path, found: Sums, silo: str, ledger: exchange.Ledger) -> Shareable:
    """An answer as a message: the files of `exchange`, and what is in them.

    The gate's part: it checks again, and every array is a line of the ledger; of an
    answer that is sealed, what leaves is.
    """
    rules = read_rules(kit)
    rules.check(found.question, sealed=found.seal is not None)
    _check_rows(found.rows, rules)
    name = found.question.function
    params = {
        f"{name} {key}": torch.from_numpy(
            np.ascontiguousarray(value).reshape(value.shape)
        )
        for key, value in found.arrays.items()
    }
    layout = {key: [str(v.dtype)[6:], list(v.shape)] for key, v in params.items()}
    text = json.dumps(layout)
    expected_of(text, name)  # or nobody would take it
    update, limits = Update(silo, params, 1, {}), ANSWER
    if found.seal:
        _look(update, found.number, ledger)
        update, limits = found.seal(found.arrays, text), SEALED
    if update is None:
        return _say_layout(text, silo, found.number, ledger)
    how = {"round_index": found.number, "limits": limits, "ledger": ledger}
    with tempfile.TemporaryDirectory() as folder:
        exchange.write_update(folder, update, **how)
        message = pack(folder)
    if limits is ANSWER:
        message["layout"] = text
    return message


def _look(update: Update, number: int, ledger: exchange.Ledger) -> None:
    """Refuse what could not leave as it is, before it is sealed."""
    about = {"silo": update.silo, "round_index": number, "direction": "out"}
    try:
        exchange.check_update(update, update.params, **about, limits=ANSWER)
    except exchange.Refused as error:
        ledger.add([{"what": "answer"}], **about, verdict="refused", reason=str(error))
        raise


def _say_layout(
    text: str, silo: str, number: int, ledger: exchange.Ledger
) -> Shareable:
    """The names, types and shapes of an answer, before it is asked for in a sum."""
    digest = sha256(text.encode()).hexdigest()
    item = {"what": "layout", "bytes": len(text), "sha256": digest}
    about = {"direction": "out", "silo": silo, "round_index": number}
    ledger.add([item], **about, verdict="accepted")
    message = make_reply(ReturnCode.OK)
    message["layout"] = text
    return message


def expected_of(layout: Any, function: str) -> dict[str, Tensor]:
    """The entries that an answer says that it has, as tensors without content.

    Raises ValueError for other names, types and sizes than an answer may have.
    """
    if type(layout) is not str or len(layout) > 2**16:
        raise ValueError("an answer says what is in it, in at most 65,536 characters")
    expected, size = {}, 0
    for key, (dtype, shape) in json.loads(layout, object_pairs_hook=_once).items():
        if not (
            key.startswith(f"{function} ") and key.isprintable() and len(key) < 300
        ):
            raise ValueError("an array is named after its function")
        whole = len(shape) <= 4 and all(type(n) is int and n >= 0 for n in shape)
        size += 8 * math.prod(shape) if whole else math.inf
        if dtype not in ("float64", "int64") or size > MAX_ANSWER:
            raise ValueError(f"{key[:80]!r}: {dtype!r} {shape!r} may not be answered")
        expected[key] = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    return expected
