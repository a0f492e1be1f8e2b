"""Aggregation at the orchestrator: from the silos' updates to the next global model.

`weighted_average` is FedAvg (McMahan et al. 2017, Algorithm 1, server side). The rules
after it remember something between rounds: `rule = FedAdam(params, trainable, lr=0.01)`
is then called with the updates, as `weighted_average` is. Who is asked for an update is
the round loop's business. Needs only torch: copy this file on its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

Params = dict[str, Tensor]
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # name: (shape, dtype)
Step = tuple[Tensor, tuple[Tensor, ...]]  # an entry, and what to remember of it


class UpdateLike(Protocol):
    """What aggregation needs of an update: who sent it, the state, and how many
    training examples stand behind it."""

    @property
    def silo(self) -> str: ...
    @property
    def params(self) -> Mapping[str, Tensor]: ...
    @property
    def num_examples(self) -> float: ...


def weighted_average(updates: Iterable[UpdateLike]) -> dict[str, Tensor]:
    """FedAvg: mean of the silos' model states, weighted by their number of examples.

    updates: any iterable, also a generator; one update is in memory at a time, beside
    the running mean. Floating entries (parameters, BatchNorm statistics) are averaged,
    half precision in float32; integer and boolean entries (BatchNorm counters) take
    the maximum. Updates are reduced in the order given: pass them in silo-name order,
    and the result is the same, bit for bit, on every engine.

    Returns a new dict with the updates' names, shapes and dtypes; no input is modified.
    Raises ValueError, naming the silo, for an empty iterable, a silo that appears
    twice, num_examples that is not a finite number > 0, keys, shapes or dtypes that
    differ from the first update's, and NaN or infinite values."""
    mean: dict[str, Tensor] = {}
    layout: Layout = {}
    seen: set[str] = set()
    total = 0.0
    for update in updates:
        if update.silo in seen:
            raise ValueError(f"silo {update.silo!r} sent two updates; only one counts")
        _check_examples(update)
        layout = layout if seen else _layout(update.params)
        _check_layout(update, layout)
        total += update.num_examples
        for name, value in update.params.items():
            _check_finite(update.silo, name, value)
            _accumulate(mean, name, value.detach(), update.num_examples / total)
        seen.add(update.silo)
        update = value = None  # the next one may be made before these names are its own
    if not seen:
        raise ValueError("no updates to average; at least one silo must take part")
    return {name: value.to(layout[name][1]) for name, value in mean.items()}


_ABOVE_0 = (lambda value: 0 < value < math.inf, "> 0")
_SHARE = (lambda value: 0 <= value < 1, ">= 0 and < 1")
_LIMITS = {  # of the rules' options
    "lr": _ABOVE_0, "tau": _ABOVE_0, "lipschitz": _ABOVE_0,
    "momentum": _SHARE, "beta1": _SHARE, "beta2": _SHARE,
    "q": (lambda value: 0 <= value < math.inf, ">= 0"),
}  # fmt: skip


@dataclass(eq=False, repr=False)
class ServerRule:
    """What the rules below share: the global model, and memory between rounds.

    params: the model that the first round starts from. trainable: names of its
    parameters, `[name for name, _ in model.named_parameters()]`; only these are moved
    by the rule. Every other entry (BatchNorm statistics and counters, SCAFFOLD's
    variates) is averaged: an optimizer step could make a variance negative, and there
    is none for a whole number.

    Calling a rule with the updates of a round returns the next global model, new
    tensors, with the updates' names; entries that stayed in the silos keep out. If an
    update is refused, nothing has changed. One object serves one run: its `state_dict`
    (flat, tensors only) is part of the run's checkpoint.
    Raises ValueError for trainable names that params lacks or that are no floating
    entries, and as `weighted_average`."""

    params: Mapping[str, Tensor]
    trainable: Iterable[str]
    memory: ClassVar[tuple[str, ...]] = ()  # tensors kept for each trainable entry

    def __post_init__(self) -> None:
        self.params = {k: value.detach().clone() for k, value in self.params.items()}
        self.trainable = frozenset(self.trainable)
        floating = {k for k, v in self.params.items() if v.is_floating_point()}
        unknown = sorted(self.trainable - self.params.keys())
        whole = sorted(self.trainable - floating - set(unknown))
        if unknown or whole or not self.trainable:
            raise ValueError(
                "trainable must name floating entries of params, at least one; "
                f"unknown: {unknown[:3]}, whole numbers: {whole[:3]}; take the names "
                "from model.named_parameters(), not from its state_dict()"
            )
        for name, (allowed, said) in _LIMITS.items():
            if name in vars(self) and not allowed(vars(self)[name]):
                raise ValueError(f"{name} must be {said}, got {vars(self)[name]}")
        self.rounds_done = 0
        self._memory = {
            f"{slot}.{name}": torch.zeros_like(self.params[name])
            for slot in self.memory
            for name in sorted(self.trainable)
        }

    def __call__(self, updates: Iterable[UpdateLike]) -> Params:
        mean, scale = self._reduce(updates)
        new, memory = dict(mean), dict(self._memory)
        for name in self.trainable & mean.keys():
            old = [memory[f"{slot}.{name}"] for slot in self.memory]
            x = self.params[name]
            target = x.lerp(mean[name], scale)  # with scale 1 the mean itself
            new[name], kept = self._step(x, target, *old)
            for slot, value in zip(self.memory, kept, strict=True):
                memory[f"{slot}.{name}"] = value
        self.params, self._memory = self.params | new, memory
        self.rounds_done += 1
        return {name: value.clone() for name, value in new.items()}

    def _reduce(self, updates: Iterable[UpdateLike]) -> tuple[Params, float]:
        """Mean of the updates, and how far to go towards it (1: all the way)."""
        return weighted_average(updates), 1.0

    def _step(self, x: Tensor, mean: Tensor, *memory: Tensor) -> Step:
        """Next value of one trainable entry, and what to remember of it."""
        return mean, ()

    def state_dict(self) -> Params:
        """Everything that the next round depends on; copies."""
        state = {f"params.{name}": value for name, value in self.params.items()}
        state = {name: value.clone() for name, value in (state | self._memory).items()}
        return state | {"rounds_done": torch.tensor(self.rounds_done)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict` of the same rule for the same model."""
        own, found = _layout(self.state_dict()), _layout(state)
        differ = sorted(k for k in own | found if own.get(k) != found.get(k))
        if differ:
            raise ValueError(
                f"this is not the state of a {type(self).__name__} for this model: "
                f"{differ[:3]} differ; start anew, or use the rule that wrote it"
            )
        self.params = {name: state[f"params.{name}"].clone() for name in self.params}
        self._memory = {name: state[name].clone() for name in self._memory}
        self.rounds_done = int(state["rounds_done"])


@dataclass(eq=False, repr=False)
class FedAvgM(ServerRule):
    """FedAvg with momentum at the server (Hsu, Qi and Brown 2019).

    delta = mean - x;  v <- momentum * v + delta;  x <- x + lr * v"""

    _: KW_ONLY
    lr: float = 1.0
    momentum: float = 0.9
    memory: ClassVar[tuple[str, ...]] = ("momentum",)

    def _step(self, x: Tensor, mean: Tensor, *memory: Tensor) -> Step:
        (velocity,) = memory
        # lerp, so that lr = 1 without momentum is the mean itself, to the last bit.
        new = x.lerp(mean, self.lr) + self.lr * self.momentum * velocity
        return new, (self.momentum * velocity + (mean - x),)


@dataclass(eq=False, repr=False)
class FedOpt(ServerRule):
    """A step size per parameter (Reddi et al. 2021, Algorithm 2); use one of its three
    kinds, FedAdagrad, FedAdam or FedYogi, which differ in v.

    delta = mean - x;  m <- beta1 * m + (1 - beta1) * delta;  v <- the rule's own
    x <- x + lr * m / (sqrt(v) + tau)

    lr: server learning rate, in units of the parameters: a step moves no entry by much
    more than lr. tau: the smallest scale of a delta that still counts. v starts at 0,
    as in Flower (the paper: at least tau^2)."""

    _: KW_ONLY
    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    memory: ClassVar[tuple[str, ...]] = ("first_moment", "second_moment")

    def _step(self, x: Tensor, mean: Tensor, *memory: Tensor) -> Step:
        first, second = memory
        delta = mean - x
        first = self.beta1 * first + (1 - self.beta1) * delta
        second = self._second_moment(second, delta.square())
        step = self.lr * self._correction() * first / (second.sqrt() + self.tau)
        return x + step, (first, second)

    def _second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        raise NotImplementedError

    def _correction(self) -> float:
        return 1.0


class FedAdagrad(FedOpt):
    """FedOpt with v <- v + delta^2: steps only ever get smaller."""

    def _second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        return v + squared


class FedYogi(FedOpt):
    """FedOpt with v <- v - (1 - beta2) * delta^2 * sign(v - delta^2)."""

    def _second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        return v - (1 - self.beta2) * squared * torch.sign(v - squared)


class FedAdam(FedOpt):
    """FedOpt with v <- beta2 * v + (1 - beta2) * delta^2, and Adam's bias correction.

    In round t = 1, 2, ... the step is multiplied by sqrt(1 - beta2^t) / (1 - beta1^t),
    as in `torch.optim.Adam` (Kingma and Ba 2015). Flower 1.42 has t + 1 there, so that
    its steps differ; Reddi et al. leave the factor out."""

    def _second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        return self.beta2 * v + (1 - self.beta2) * squared

    def _correction(self) -> float:
        t = self.rounds_done + 1
        return math.sqrt(1 - self.beta2**t) / (1 - self.beta1**t)


@dataclass(eq=False, repr=False)
class FedNova(ServerRule):
    """Normalised averaging for silos that take unequal numbers of steps (Wang et al.
    2020, with their tau_eff = sum p_k a_k): who trains longer pulls no harder.

    d_k = (w_k - x) / a_k;  x <- x + (sum p_k a_k) * sum p_k d_k,  p_k = n_k / n

    a_k is the length of the silo's path in units of one gradient step: its number of
    steps (update.metrics["steps"]), or with local momentum rho the sum of the weights
    that its gradients get. momentum: the rho that the silos train with."""

    _: KW_ONLY
    momentum: float = 0.9

    def _reduce(self, updates: Iterable[UpdateLike]) -> tuple[Params, float]:
        sums = {"examples": 0.0, "length": 0.0, "weight": 0.0, "unit": 0.0}

        def reweighted() -> Iterator[UpdateLike]:
            for update in updates:
                _check_examples(update)
                length = self._path_length(_metric(update, "steps"))
                sums["unit"] = sums["unit"] or length
                weight = update.num_examples * (sums["unit"] / length)
                sums["examples"] += update.num_examples
                sums["length"] += update.num_examples * (length / sums["unit"])
                sums["weight"] += weight
                yield _Reweighted(update.silo, update.params, weight)

        mean = weighted_average(reweighted())
        return mean, sums["length"] * sums["weight"] / sums["examples"] ** 2

    def _path_length(self, steps: float) -> float:
        """|a| = sum over j of (1 - rho^j) / (1 - rho), j = 1..steps."""
        rho = self.momentum
        return (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)


@dataclass(eq=False, repr=False)
class QFedAvg(ServerRule):
    """q-FedAvg: silos that the global model serves badly count more (Li et al. 2020,
    Algorithm 2).

    F_k: loss of the global model on silo k's training examples, before it trains
    (update.metrics["loss_before"]).  Delta_k = L * F_k^q * (x - w_k)
    h_k = q * F_k^(q-1) * |L * (x - w_k)|^2 + L * F_k^q
    x <- x - sum(n_k * Delta_k) / sum(n_k * h_k)

    q: 0 is FedAvg; larger is fairer, and takes smaller steps. lipschitz: the paper's L,
    1 / (the silos' learning rate). The paper draws silos in proportion to n_k; here all
    take part and are weighted by it. Entries that are not trainable get the weights
    n_k * F_k^q."""

    _: KW_ONLY
    q: float
    lipschitz: float

    def _reduce(self, updates: Iterable[UpdateLike]) -> tuple[Params, float]:
        sums = {"weight": 0.0, "h": 0.0}

        def reweighted() -> Iterator[UpdateLike]:
            for update in updates:
                _check_examples(update)
                loss = _metric(update, "loss_before") + 1e-10  # 0 has no power q - 1
                weight = update.num_examples * loss**self.q
                curvature = self.q * loss ** (self.q - 1) * self.lipschitz
                curvature *= self._squared_distance(update)
                sums["weight"] += weight
                sums["h"] += weight + update.num_examples * curvature
                yield _Reweighted(update.silo, update.params, weight)

        mean = weighted_average(reweighted())
        return mean, sums["weight"] / sums["h"]

    def _squared_distance(self, update: UpdateLike) -> float:
        names = [name for name in update.params if name in self.trainable]
        gaps = (self.params[k].double() - update.params[k].double() for k in names)
        return sum(gap.square().sum().item() for gap in gaps)


SERVER_RULES: dict[str, type[ServerRule]] = {
    rule.__name__: rule
    for rule in (FedAvgM, FedAdagrad, FedAdam, FedYogi, FedNova, QFedAvg)
}


def make_aggregate(
    name: str,
    params: Mapping[str, Tensor],
    trainable: Iterable[str] = (),
    options: Mapping[str, float] | None = None,
    *,
    more: Mapping[str, Callable[..., Any]] | None = None,
) -> Callable[[Iterable[UpdateLike]], Params]:
    """`weighted_average`, or a new server rule, by name: for runs that bring no code.

    params, trainable: as for a rule. options: its keyword arguments. more: further
    rules by name, made from the same, such as `robust.ROBUST_RULES`. Raises ValueError
    for a name or an option that is not known."""
    options, rules = dict(options or {}), {**SERVER_RULES, **(more or {})}
    if name == "weighted_average" and not options:
        return weighted_average
    if name not in rules:
        raise ValueError(
            f"aggregate must be weighted_average (without options) or one of "
            f"{sorted(rules)}, got {name!r}"
        )
    try:
        return rules[name](params, trainable, **options)
    except TypeError as error:
        raise ValueError(f"{name} does not take {options}: {error}") from None


class _Reweighted(NamedTuple):
    """An update that counts as if it had another number of examples."""

    silo: str
    params: Mapping[str, Tensor]
    num_examples: float


def _metric(update: UpdateLike, name: str) -> float:
    value = getattr(update, "metrics", {}).get(name, math.nan)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(
            f"silo {update.silo!r} reports {name}={value}; this rule needs it as a "
            f"number >= 0 in the update's metrics"
        )
    return value


def _accumulate(
    mean: dict[str, Tensor], name: str, value: Tensor, share: float
) -> None:
    """Fold one tensor into the running mean, in place.

    mean += share * (value - mean), with share = n_k / (n_1 + ... + n_k), gives
    sum(n_i * value_i) / sum(n_i) after the last update. Unlike a sum that is divided
    at the end, it leaves a single update (and equal updates) exactly as they are."""
    if value.dtype in (torch.float16, torch.bfloat16):
        value = value.float()
    if name not in mean:
        mean[name] = value.clone(memory_format=torch.contiguous_format)
    elif value.is_floating_point():
        mean[name].lerp_(value, share)
    else:
        torch.maximum(mean[name], value, out=mean[name])


def _check_examples(update: UpdateLike) -> None:
    n = update.num_examples  # True is 1 to Python; inf would outweigh everybody
    if isinstance(n, bool) or not 0 < n < math.inf:
        raise ValueError(
            f"silo {update.silo!r} reports num_examples={n}; it must be a finite "
            "number > 0: leave a silo without training data out of the round"
        )


def _layout(params: Mapping[str, Tensor]) -> Layout:
    return {name: (tuple(v.shape), v.dtype) for name, v in params.items()}


def _check_layout(update: UpdateLike, layout: Layout) -> None:
    own = _layout(update.params)
    for name in sorted(own | layout):
        if own.get(name) != layout.get(name):
            raise ValueError(
                f"silo {update.silo!r} sent another model: {name!r} is {own.get(name)},"
                f" the others' {layout.get(name)}; all must train one architecture"
            )


def _check_finite(silo: str, name: str, value: Tensor) -> None:
    # A sum is NaN or infinite if any entry is, and is one read of the memory; only
    # when it looks bad is each entry looked at (finite entries may overflow a sum).
    if not value.is_floating_point() or math.isfinite(value.sum().item()):
        return
    bad = int((~value.isfinite()).sum())
    if bad:
        raise ValueError(
            f"silo {silo!r} sent {bad} NaN or infinite values in {name!r}; its "
            "training diverged or its file is damaged: leave it out and look at its "
            "training loss"
        )
