"""A real run: what the silos and the orchestrator agree on, the same on every engine.

A run is names, numbers and an initial model; it never brings code. `to_plain` and
`from_plain` are the one form in which it travels to the machines that carry it out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fl_helpers.aggregation import make_aggregate
from fl_helpers.exchange import Limits, UpdateLike
from fl_helpers.robust import ROBUST_RULES
from fl_helpers.simulation import Params, Stop

SMALLEST_SET = 3  # silos in a secure sum
NEED_THE_AVERAGE = ("weighted_average", "FedAvgM", "FedAdagrad", "FedYogi", "FedAdam")


@dataclass(frozen=True)
class Run:
    """A run of `simulation.run_rounds`, by names instead of functions.

    name: of its folder, too; started again under its name, a run goes on from its last
        round. Letters, digits, _ and -.
    params: initial model state, not modified.
    rounds, seed: as in `run_rounds`.
    quorum: valid updates that a round needs; None is those of all silos.
    deadline: seconds that a round may take, where the engine can keep to it.
    wait_for_quorum: seconds that a round waits for silos to come back before it ends
        the run without a quorum; on your own machines only.
    aggregate: "weighted_average", or a server rule or robust rule by its name.
    options: keyword arguments of that rule.
    trainable: names of the entries that gradients change, for a rule that needs them.
    keep_local: names of entries that never leave a silo.
    settings: plain numbers and texts for the silos' own function, `turn.load_client`.
    evaluate: the silos test the global model before they train, and the last one.
    stop: end before the last round; None plays all of them.
    secure: the orchestrator gets the sum of a round's updates only, see `secure`; a
        rule must need no more than their average, and metrics come as means.
    limits: what an update may be, `exchange.Limits`; its metrics are the names that may
        be reported: what training returns, and "test_loss" if `evaluate` gives "loss".

    Raises ValueError for what cannot be run, before anything is sent.
    """

    name: str
    params: Params
    rounds: int
    seed: int
    quorum: int | None = None
    deadline: int = 60
    wait_for_quorum: int = 0
    aggregate: str = "weighted_average"
    options: Mapping[str, float] = field(default_factory=dict)
    trainable: Collection[str] = ()
    keep_local: Collection[str] = ()
    settings: Mapping[str, float | str] = field(default_factory=dict)
    evaluate: bool = True
    stop: Stop | None = None
    secure: bool = False
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,60}", self.name):
            raise ValueError(
                f"name must be letters, digits, _ and -, got {self.name!r}"
            )
        _check_counts(self)
        _check_entries(self)
        _check_plain(self.settings)
        if self.limits.norm_factor is not None:
            raise ValueError(
                "limits.norm_factor is for `run_rounds` only, a real run does not "
                "remember norms; set limits.max_norm"
            )
        self.make_rule(self.shared)
        if self.secure:
            _check_secure(self)

    @property
    def shared(self) -> Params:
        """The entries of params that travel, in the model's order."""
        return {k: v for k, v in self.params.items() if k not in self.keep_local}

    def in_order(self, params: Mapping[str, Tensor]) -> Params:
        """The same entries in the model's order: a rule may add up, the order shows."""
        return {name: params[name] for name in self.params if name in params}

    def make_rule(self, params: Params) -> Callable[[Iterable[UpdateLike]], Params]:
        """The aggregation, standing at params, the shared entries of a global model."""
        trained = sorted(set(self.trainable) - set(self.keep_local))
        rule = (self.aggregate, params, trained, self.options)
        return make_aggregate(*rule, more=ROBUST_RULES)


def to_plain(run: Run) -> dict[str, Any]:
    """A run as JSON takes it: of params only the layout, which the key "params" holds.

    Equal runs give equal values, whatever collections their names came in.
    """
    plain = {item.name: getattr(run, item.name) for item in fields(run)}
    plain["params"] = {
        name: [list(value.shape), str(value.dtype).removeprefix("torch.")]
        for name, value in run.params.items()
    }
    for key in ("trainable", "keep_local"):
        plain[key] = sorted(plain[key])
    for key in ("options", "settings"):
        plain[key] = dict(plain[key])
    if not run.wait_for_quorum:  # as runs were written that did not know it
        del plain["wait_for_quorum"]
    plain["stop"] = asdict(run.stop) if run.stop else None
    plain["limits"] = asdict(run.limits) | {"metrics": sorted(run.limits.metrics)}
    return plain


def from_plain(plain: Mapping[str, Any]) -> Run:
    """The run that `to_plain` described, with params that have no content.

    params: tensors of the device "meta": names, shapes and dtypes, in the model's
    order. Raises ValueError as `Run` does, TypeError for keys that are not known and
    for values of another type.
    """
    _check_types(plain)
    limits = dict(plain["limits"])
    limits["metrics"] = frozenset(limits["metrics"])
    params = {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for name, (shape, dtype) in plain["params"].items()
    }
    stop = Stop(**plain["stop"]) if plain["stop"] else None
    made = {"params": params, "limits": Limits(**limits), "stop": stop}
    return Run(**{**plain, **made})


def _check_types(plain: Mapping[str, Any]) -> None:
    """Of what was sent: plain values only, before anything is made of them."""
    for key, kind in _PLAIN.items():
        value = plain.get(key, kind.default)
        if type(value) not in kind.types:
            raise TypeError(f"{key} of a run must not be {value!r}")
        inside = value.values() if isinstance(value, dict) else value or ()
        if kind.items and not all(type(item) in kind.items for item in inside):
            raise TypeError(f"{key} of a run must not hold {value!r}")
    for shape, dtype in plain["params"].values():
        sizes = [size for size in shape if type(size) is int and size >= 0]
        if sizes != shape or not isinstance(getattr(torch, dtype), torch.dtype):
            raise TypeError(f"params of a run must not hold {[shape, dtype]}")


class _Kind(NamedTuple):
    """types: of a value. items: of what a collection holds. default: of older runs."""

    types: tuple[type, ...]
    items: tuple[type, ...] = ()
    default: Any = None


_NUMBERS, _NONE = (int, float), type(None)
_PLAIN = {  # of each key of a run as JSON has it
    **{key: _Kind((int,)) for key in ("rounds", "seed", "deadline")},
    **{key: _Kind((str,)) for key in ("name", "aggregate")},
    **{key: _Kind((bool,)) for key in ("evaluate", "secure")},
    **{key: _Kind((list,), (str,)) for key in ("trainable", "keep_local")},
    "params": _Kind((dict,), (list,)),
    "quorum": _Kind((int, _NONE)),
    "wait_for_quorum": _Kind((int,), default=0),
    "options": _Kind((dict,), (*_NUMBERS, bool)),
    "settings": _Kind((dict,), (*_NUMBERS, bool, str)),
    "stop": _Kind((dict, _NONE), (str, int, bool)),
    "limits": _Kind((dict,), (*_NUMBERS, _NONE, list)),
}


def _check_counts(run: Run) -> None:
    for key in ("rounds", "quorum", "deadline"):
        value = getattr(run, key)
        if key == "quorum" and value is None:
            continue
        if type(value) is not int or value < 1:
            raise ValueError(f"{key} must be an integer >= 1, got {value!r}")
    if type(run.wait_for_quorum) is not int or run.wait_for_quorum < 0:
        raise ValueError(
            f"wait_for_quorum must be an integer >= 0, got {run.wait_for_quorum!r}"
        )
    if type(run.seed) is not int:
        raise ValueError(f"seed must be an integer, got {run.seed!r}")


def _check_entries(run: Run) -> None:
    unknown = sorted(set(run.keep_local) - run.params.keys())
    if unknown:
        raise ValueError(f"keep_local names entries that params lacks: {unknown[:3]}")
    if not run.shared:
        raise ValueError("keep_local must name entries of params, not all of them")


def _check_secure(run: Run) -> None:
    """All that is known is the average of the updates, of no fewer than three."""
    if run.aggregate not in NEED_THE_AVERAGE:
        raise ValueError(
            f"aggregate {run.aggregate!r} looks at each silo's update, which a secure "
            f"run hides; take one of {NEED_THE_AVERAGE}, set limits.max_norm, which "
            "the silos then see to themselves, or run without secure"
        )
    if run.quorum is not None and run.quorum < SMALLEST_SET:
        raise ValueError(
            f"a secure run needs a quorum of {SMALLEST_SET} or more, got {run.quorum}: "
            "the sum of two tells each of them the other's update"
        )


def _check_plain(settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        if type(key) is not str or type(value) not in (bool, int, float, str):
            raise ValueError(
                f"settings must be plain numbers and texts by name, got {key!r}: a "
                f"{type(value).__name__}; give float(value), or a name that the "
                "silo's function knows"
            )
