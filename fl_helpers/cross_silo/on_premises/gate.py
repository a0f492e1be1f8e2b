"""The gate that everything leaves a hospital by, and the ledger of what did.

What may leave is in `local/egress.json` of the hospital's kit, set by `allow`; what did
leave is in `ledger.jsonl`.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from torch import Tensor

from fl_helpers import exchange
from fl_helpers.cross_silo.on_premises.refusals import CODES, GATE, Refusal, code_of
from fl_helpers.cross_silo.on_premises.site import read_local, read_site, write_local
from fl_helpers.training import Update

SEALED = exchange.Limits(metrics=frozenset({"attempt"}))  # of a masked update


def allow(
    kit: str | Path,
    params: Mapping[str, Tensor],
    *,
    keep_local: Collection[str] = (),
    metrics: Iterable[str] = (),
    max_bytes: int | None = None,
    max_norm: float | None = None,
    secure: bool = False,
) -> None:
    """Set what may leave the hospital: one model's entries, and named metrics.

    params: the state of the model that the hospital agreed to train; only names, shapes
    and dtypes are kept. keep_local: entries that must not leave. metrics: names of
    plain numbers, beside the default of `exchange.Limits`. max_bytes: of one update;
    None is what the entries need. max_norm: of an update's change to the model. secure:
    updates leave in secure sums only. Without a call of this, nothing may leave.
    """
    layout = {
        name: [list(value.shape), str(value.dtype).removeprefix("torch.")]
        for name, value in params.items()
        if name not in keep_local
    }
    allowed = sorted(exchange.Limits().metrics | set(metrics))
    policy = {"entries": layout, "metrics": allowed, "max_bytes": max_bytes}
    policy |= {"max_norm": max_norm, "secure": secure}
    write_local(kit, "egress.json", policy)


class Policy(NamedTuple):
    """What may leave: entries as tensors without content, the limits, and whether in
    secure sums only."""

    expected: dict[str, Tensor]
    limits: exchange.Limits
    secure: bool


def read_policy(kit: str | Path) -> Policy:
    """What `allow` set. Raises Refusal if nothing was, or if it is damaged."""
    path = Path(kit) / "local" / "egress.json"
    if not path.exists():
        raise Refusal(
            "MODEL_REFUSED", f"{path} is missing: `gate.allow` says what may leave"
        )
    policy = read_local(kit, path.name)
    try:
        expected = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            for name, (shape, dtype) in policy["entries"].items()
        }
        limits = exchange.Limits(
            max_bytes=policy["max_bytes"],
            max_norm=policy.get("max_norm"),
            metrics=frozenset(policy["metrics"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Refusal(
            "KIT_DAMAGED", f"{path} is damaged ({error!r}): call `gate.allow` again"
        ) from error
    return Policy(expected, limits, policy.get("secure", False))


def explain_policy(kit: str | Path) -> dict[str, str]:
    """A hospital's policy on one page: question and answer, read from its kit."""
    local = Path(kit) / "local"

    def read(name: str) -> Any:
        return json.loads((local / name).read_text())

    rights, resources = (
        read("authorization.json")["permissions"],
        read("resources.json"),
    )
    scope = read("privacy.json")["scopes"][0]
    components = {part["id"]: part["path"] for part in resources["components"]}
    leaves = "nothing, until the hospital agrees to a model"
    if (local / "egress.json").exists():
        entries, limits, secure = read_policy(kit)
        size = sum(value.nbytes for value in entries.values())
        leaves = f"{len(entries)} entries of one model, {size:,} bytes; num_examples; "
        leaves += ", ".join(sorted(limits.metrics))
        leaves += "; in secure sums only" if secure else ""
    if (local / "questions.json").exists():
        rules = read("questions.json")
        leaves += f"; answers of {len(rules['functions'])} functions of an analysis, "
        leaves += f"about {rules['minimum']} patients or more"
        leaves += ", in secure sums only" if rules.get("secure") else ""
    lists = {
        "who may start a run": [k for k, v in rights.items() if v.get("submit_job")],
        "who may bring code": [k for k, v in rights.items() if v.get("byoc") == "any"],
        "which class may answer": resources["class_allow_list"],
        "what every result passes": [f["path"] for f in scope["task_result_filters"]],
        "what every message passes": [components["site_guard"]],
    }
    page = {question: ", ".join(found) or "nobody" for question, found in lists.items()}
    return page | {"what may leave": leaves}


class Unreleased:
    """An update inside a hospital. The engine cannot serialise an object with slots:
    without the gate nothing leaves, instead of everything.

    start: what of the model its training began with. seal: makes of an update that may
    leave what does; None lets it out as it is. An update of None was sealed before.
    kept: a folder that holds what left until the next answer; None keeps nothing."""

    __slots__ = ("kept", "round_index", "seal", "start", "update")

    def __init__(
        self,
        update: Update | None,
        round_index: int,
        start: Mapping[str, Tensor] | None = None,
        seal: Callable[[Update | None], Update] | None = None,
        kept: Path | None = None,
    ) -> None:
        self.update, self.round_index = update, round_index
        self.start, self.seal, self.kept = start, seal, kept


class Sums:
    """A hospital's answer to a question of an analysis, see `questions.release`.

    number: of the question in its run. rows: patients that the answer is about. cohort:
    which ones, `cohorts.Cohort`. seal: makes of the arrays and the text of their layout
    an update that leaves in their place, or None, for the layout alone; without it they
    leave as they are."""

    __slots__ = ("arrays", "cohort", "number", "question", "rows", "seal")

    def __init__(
        self,
        arrays: Any,
        number: int,
        question: Any,
        rows: int,
        cohort: Any = None,
        seal: Callable[[Any, str], Update | None] | None = None,
    ) -> None:
        self.arrays, self.number = arrays, number
        self.question, self.rows = question, rows
        self.cohort, self.seal = cohort, seal


class Spoken:
    """A short message of the protocol of secure sums: a silo's hello, or its mask."""

    __slots__ = ("content", "what")
    SIZES: ClassVar = {"hello": 20_000, "mask": 32}  # bytes at most

    def __init__(self, what: str, content: bytes) -> None:
        self.what, self.content = what, content


class EgressGate(Filter):
    """Every task result leaves through here, and only here it is made ready to leave.

    The executor hands over an `Unreleased` update. If it is exactly what
    `local/egress.json` allows, it is written to the ledger and replaced by the two
    files of `exchange.write_update`; otherwise the result is refused as a whole, and
    only a code leaves. Of an error, too, only the code leaves.
    """

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        kit = Path(fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_root_dir())
        ledger = exchange.Ledger(kit / "ledger.jsonl")
        try:
            silo, found = read_site(kit).silo, shareable.get("update")
        except (ValueError, TypeError) as error:  # it does not even know its name
            self.logger.error(f"the gate let nothing out: {error}")
            return _say(ledger, "KIT_DAMAGED", "?")
        code = shareable.get_return_code()
        if code != ReturnCode.OK:
            known = {*vars(ReturnCode).values(), *CODES}
            return _say(ledger, code if code in known else ReturnCode.ERROR, silo)
        try:
            if type(found) is Spoken:
                return _speak(ledger, found, silo)
            if type(found) is Sums:
                from fl_helpers.cross_silo.on_premises import questions  # large

                return questions.release(kit, found, silo, ledger)
            if type(found) is not Unreleased or type(found.round_index) is not int:
                raise TypeError("the result is not an update of a round")
            task = fl_ctx.get_prop(FLContextKey.TASK_NAME)
            return _release(kit, ledger, found, silo, task)
        except Exception as error:
            self.logger.warning(f"the gate let nothing out: {error}")
            return _say(ledger, code_of(error, GATE), silo)


def _release(
    kit: Path, ledger: exchange.Ledger, found: Unreleased, silo: str, task: str
) -> Shareable:
    """The update as a message, if all of it may leave."""
    policy, index, update = read_policy(kit), found.round_index, found.update
    expected = policy.expected if task == "train" else {}  # else: numbers only
    about = {"silo": silo, "round_index": index, "direction": "out"}
    try:
        if policy.secure and found.seal is None:
            raise exchange.Refused(silo, "this hospital takes part in secure runs only")
        if update is not None:
            _look(update, found, expected, policy.limits, about)
    except exchange.Refused as error:
        head = about | {"verdict": "refused", "reason": error.reason}
        ledger.add([{"what": "update"}], **head)
        raise
    limits = policy.limits
    if found.seal:
        update = found.seal(update)
        expected, limits = update.params, SEALED
    limits = replace(limits, max_norm=None)  # it was looked at
    exchange.check_update(update, expected, **about, limits=limits, ledger=ledger)
    with tempfile.TemporaryDirectory() as folder:
        folder = found.kept or folder
        exchange.write_update(folder, update, round_index=index, limits=limits)
        found.update = found.start = update = None  # on the disk: free the memory
        return pack(folder)


def _look(
    update: Update,
    found: Unreleased,
    expected: Mapping[str, Tensor],
    limits: exchange.Limits,
    about: Mapping[str, Any],
) -> None:
    """Refuse what may not leave: first by its layout, then how far it went."""
    norm = limits.max_norm
    limits = replace(limits, max_norm=None)
    exchange.check_update(update, expected, **about, limits=limits)
    if norm is not None and expected:
        limits = replace(limits, max_norm=norm)
        exchange.check_update(update, found.start, **about, limits=limits)


def _speak(ledger: exchange.Ledger, found: Spoken, silo: str) -> Shareable:
    size = len(found.content) if isinstance(found.content, bytes) else math.inf
    if size > Spoken.SIZES[found.what]:
        raise ValueError(f"a {found.what} of {size} bytes")
    digest = hashlib.sha256(found.content).hexdigest()
    item = {"what": found.what, "bytes": size, "sha256": digest}
    ledger.add([item], direction="out", silo=silo, round_index=None, verdict="accepted")
    message = make_reply(ReturnCode.OK)
    message[found.what] = found.content
    return message


def _say(ledger: exchange.Ledger, code: str, silo: str) -> Shareable:
    """A code, and its line in the ledger; if there is no room for that, the one that
    says so."""
    item = {"what": f"code {code}", "bytes": len(code)}
    try:
        ledger.add(
            [item], direction="out", silo=silo, round_index=None, verdict="accepted"
        )
    except OSError as error:
        code = code_of(error, GATE)
    return make_reply(code)


def pack(folder: str | Path) -> Shareable:
    """The files of a folder that `exchange` wrote, as a message."""
    message = Shareable()
    for path in sorted(Path(folder).iterdir()):
        message[path.name] = path.read_bytes()
    return message


def unpack(message: Mapping[str, Any], folder: str | Path, weights: str) -> Path:
    """Write the two files of a message into a folder, for `exchange` to check.

    weights: `exchange.UPDATE` or `exchange.MODEL`. Raises ValueError if one is missing
    or is not bytes; nothing else of the message is looked at.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (weights, exchange.MANIFEST):
        content = message.get(name)
        if not isinstance(content, bytes):
            raise ValueError(f"the message lacks {name}; it must be bytes")
        (folder / name).write_bytes(content)
    return folder


def rehearse(
    kit: str | Path,
    update: Update,
    start: Mapping[str, Tensor],
    *,
    folder: str | Path,
    secure: bool = False,
) -> None:
    """Pass an update through the gate as in a run, and throw it away.

    start: of the model that its training began with. folder: for a ledger of its own:
    the hospital's says only what left. secure: as in a run of secure sums. Raises
    `exchange.Refused` for what may not leave.
    """
    kit, ledger = Path(kit), exchange.Ledger(Path(folder) / "ledger.jsonl")
    seal = (lambda update: replace(update, metrics={})) if secure else None
    found = Unreleased(update, 0, start, seal)
    _release(kit, ledger, found, read_site(kit).silo, "train")
