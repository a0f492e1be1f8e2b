"""The gate that everything leaves a hospital by, and the ledger of what did.

What may leave is in `local/egress.json` of the hospital's kit, set by `allow`; what did
leave is in `ledger.jsonl`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from torch import Tensor

from fl_helpers import exchange
from fl_helpers.cross_silo.on_premises.site import read_site, write_local
from fl_helpers.training import Update


def allow(
    kit: str | Path,
    params: Mapping[str, Tensor],
    *,
    keep_local: Collection[str] = (),
    metrics: Iterable[str] = (),
    max_bytes: int | None = None,
) -> None:
    """Set what may leave the hospital: one model's entries, and named metrics.

    params: the state of the model that the hospital agreed to train; only names, shapes
    and dtypes are kept. keep_local: entries that must not leave. metrics: names of
    plain numbers, beside the default of `exchange.Limits`. max_bytes: of one update;
    None is what the entries need. Without a call of this, nothing may leave.
    """
    layout = {
        name: [list(value.shape), str(value.dtype).removeprefix("torch.")]
        for name, value in params.items()
        if name not in keep_local
    }
    allowed = sorted(exchange.Limits().metrics | set(metrics))
    policy = {"entries": layout, "metrics": allowed, "max_bytes": max_bytes}
    write_local(kit, "egress.json", policy)


def read_policy(kit: str | Path) -> tuple[dict[str, Tensor], exchange.Limits]:
    """What may leave: entries as tensors without content, and the limits."""
    policy = json.loads((Path(kit) / "local" / "egress.json").read_text())
    expected = {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for name, (shape, dtype) in policy["entries"].items()
    }
    limits = exchange.Limits(
        max_bytes=policy["max_bytes"], metrics=frozenset(policy["metrics"])
    )
    return expected, limits


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
        entries, limits = read_policy(kit)
        size = sum(value.nbytes for value in entries.values())
        leaves = f"{len(entries)} entries of one model, {size:,} bytes; num_examples; "
        leaves += ", ".join(sorted(limits.metrics))
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
    without the gate nothing leaves, instead of everything."""

    __slots__ = ("round_index", "update")

    def __init__(self, update: Update, round_index: int) -> None:
        self.update, self.round_index = update, round_index


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
        silo, found = read_site(kit).silo, shareable.get("update")
        code = shareable.get_return_code()
        if code != ReturnCode.OK:
            code = code if code in vars(ReturnCode).values() else ReturnCode.ERROR
            item = {"what": f"code {code}", "bytes": len(code)}
            ledger.add(
                [item], direction="out", silo=silo, round_index=None, verdict="accepted"
            )
            return make_reply(code)
        try:
            if type(found) is not Unreleased or type(found.round_index) is not int:
                raise TypeError("the result is not an update of a round")
            task = fl_ctx.get_prop(FLContextKey.TASK_NAME)
            return _release(kit, ledger, found, silo, task)
        except Exception as error:
            self.logger.warning(f"the gate let nothing out: {error}")
            return make_reply(ReturnCode.TASK_RESULT_FILTER_ERROR)


def _release(
    kit: Path, ledger: exchange.Ledger, found: Unreleased, silo: str, task: str
) -> Shareable:
    """The update as a message, if all of it may leave."""
    expected, limits = read_policy(kit)
    expected = {} if task == "evaluate" else expected  # then: metrics only
    index = found.round_index
    exchange.check_update(
        found.update, expected, silo=silo, round_index=index, limits=limits,
        direction="out", ledger=ledger,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        exchange.write_update(
            folder, found.update, round_index=index, expected=expected, limits=limits
        )
        return pack(folder)


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
