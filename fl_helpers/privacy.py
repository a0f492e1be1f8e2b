"""Differential privacy: noise that bounds what anybody can learn about one patient.

Record level (`train_privately`): each silo trains with DP-SGD, so that its update, and
all that is made of it, would be nearly the same without any one of its records. Silo
level (`privatise_update`): the global model would be nearly the same without any one
silo's update; with a handful of silos, the noise drowns the model.

Not covered: a patient with several records (each is one), the number of examples sent
with an update, settings chosen by looking at the records, further runs on the same
records (their epsilons add up). Needs torch and Opacus: copy this file on its own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from opacus.accountants import RDPAccountant
from opacus.accountants.utils import get_noise_multiplier
from opacus.optimizers import DPOptimizer
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

Params = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Spent = tuple[tuple[float, float, int], ...]  # (noise multiplier, sample rate, steps)

SPENT = "own_privacy_spent"  # the entry of the state that holds what a silo has spent

# Orders of Renyi divergence to choose from. Opacus' own start at 1.1, too high for
# little noise on whole updates, and have more fractions, which are slow.
_ORDERS = [1.001, 1.003, 1.01, 1.03, 1.1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4]
_ORDERS += [4.5, 5, 5.5, *range(6, 65), 128, 256, 512, 1024]


class BudgetExceeded(RuntimeError):
    """The next steps would cost more than is left; they were not taken."""

    code = "PRIVACY_BUDGET_SPENT"  # what a silo of a real run answers, no more


@dataclass(frozen=True)
class Budget:
    """With or without one record (or silo), the chance of anything that can be seen
    changes by a factor of at most exp(epsilon), but for a chance of delta."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not (self.epsilon > 0 and 0 < self.delta < 1):
            raise ValueError(f"need epsilon > 0 and delta between 0 and 1, got {self}")


@dataclass(frozen=True)
class Mechanism:
    """What DP-SGD does in one turn of a silo.

    noise_multiplier: standard deviation of the noise on the sum of a step's gradients,
    in units of max_grad_norm, the L2 norm (over all parameters) that each example's
    gradient is clipped to. sample_rate: chance of each example to be in a step, > 0 to
    1. steps: per turn. The epsilon does not depend on max_grad_norm."""

    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        _check_steps(self.noise_multiplier, self.sample_rate, self.steps)
        if not 0 < self.max_grad_norm < math.inf:
            raise ValueError(f"max_grad_norm must be > 0, got {self.max_grad_norm}")


@dataclass(frozen=True)
class PrivateUpdate:
    """As `training.Update`. No training loss: it would be a number without noise."""

    silo: str
    params: Params
    num_examples: int
    metrics: dict[str, float]


@lru_cache(maxsize=4096)  # silos with the same settings ask the same, round by round
def epsilon_spent(spent: Spent, delta: float) -> float:
    """Upper bound on the epsilon of these steps (Renyi accounting, Mironov 2017).
    A sample rate of 1 is the Gaussian mechanism."""
    if any(noise == 0 for noise, _, _ in spent):
        return math.inf
    accountant = RDPAccountant()
    accountant.history = list(spent)
    return float(accountant.get_epsilon(delta, alphas=_ORDERS))  # of nothing: 0


@lru_cache(maxsize=256)
def noise_for(budget: Budget, *, sample_rate: float, steps: int) -> float:
    """The least noise multiplier with which so many steps keep within the budget."""
    if math.isinf(budget.epsilon):
        return 0.0
    goal = dict(target_epsilon=budget.epsilon, target_delta=budget.delta)
    how = dict(sample_rate=sample_rate, steps=steps, alphas=_ORDERS)
    return get_noise_multiplier(**goal, **how)


def nothing_spent() -> Params:
    """What an account needs before the first round; it stays in the silo, and in the
    checkpoint: `run_rounds(params | nothing_spent(), ...)` with
    `Terms(keep_local=[SPENT])`."""
    return {SPENT: torch.zeros(0, 3, dtype=torch.float64)}


class Account:
    """What one silo has spent of its budget, in a simulation; a real run has
    `cross_silo.account`. params: with the entry of `nothing_spent`, as its last round
    left it. A round whose entry was lost is not counted: played again, it must draw the
    same noise."""

    needs_rng = True  # to draw the noise from

    def __init__(self, params: Params, budget: Budget, *, silo: str) -> None:
        if SPENT not in params:
            raise ValueError(
                f"silo {silo!r} has no record of what it spent; start the run from "
                "`params | nothing_spent()` with keep_local=[SPENT]"
            )
        self.budget, self.silo = budget, silo
        for row in params[SPENT].tolist():
            _check_steps(*row, silo=silo)
        self.spent: Spent = tuple((z, q, int(t)) for z, q, t in params[SPENT].tolist())

    @property
    def epsilon(self) -> float:
        return epsilon_spent(self.spent, self.budget.delta)

    def spend(self, noise_multiplier: float, sample_rate: float, steps: int) -> None:
        """Book steps before they are taken; if too dear, book nothing and raise."""
        more = noise_multiplier, sample_rate, steps
        self.spent = more_spent(self.spent, more, self.budget, self.silo)

    def begin(self, mechanism: Mechanism, about: Callable[[], bytes]) -> None:
        """Book a turn."""
        self.spend(mechanism.noise_multiplier, mechanism.sample_rate, mechanism.steps)

    def entries(self) -> Params:
        """The entry to keep in the silo: [kinds of steps, 3]."""
        return {SPENT: torch.tensor(self.spent, dtype=torch.float64).reshape(-1, 3)}


def train_privately(
    model: nn.Module,
    silo: Any,
    *,
    mechanism: Mechanism,
    account: Any,
    lr: float,
    rng: torch.Generator | None = None,
    momentum: float = 0.0,
    loss_fn: Loss = F.cross_entropy,
) -> PrivateUpdate:
    """Train with DP-SGD on the silo's training examples (Abadi et al. 2016, Alg. 1).

    A step takes each example with chance sample_rate (Poisson sampling, which the
    accounting assumes), clips its gradient, adds noise to the sum, and divides by
    sample_rate * N.

    model: changed in place, on its own device; no BatchNorm, no dropout.
    silo: with its name, and its training examples as train: x [N, ...], y [N].
    mechanism: clipping, noise, sampling and number of steps.
    account: an `Account`, in a real run a `cross_silo.account.SiloTurn`; the steps are
        booked there before they are taken.
    lr, momentum: of the steps.
    rng: CPU generator, in a simulation; who knows its seed can take the noise off
        again. In a real run None: the account has a generator of its own.
    loss_fn: loss_fn(logits, y) is the mean over a batch.

    Returns an update with the model's own names and the account's entry, on the CPU;
    metrics are `epsilon` (spent so far) and `steps`. Raises BudgetExceeded before an
    example is looked at, ValueError for what DP cannot work with, FloatingPointError on
    divergence."""
    _check(model, silo, account)
    if account.needs_rng == (rng is None):
        raise ValueError(
            "in a simulation give an Account and the round's rng; in a real run a "
            "SiloTurn and no rng: the noise comes from the silo's own secret"
        )
    about = partial(_about, model, silo, mechanism, lr, momentum, loss_fn)
    rng = account.begin(mechanism, about) or rng
    _take_steps(model, silo, mechanism, lr, momentum, loss_fn, rng)
    params = {k: v.detach().to("cpu", copy=True) for k, v in model.state_dict().items()}
    if not all(bool(value.isfinite().all()) for value in params.values()):
        raise FloatingPointError(
            f"training diverged in silo {silo.name!r} with lr={lr}; try a smaller lr"
        )
    metrics = {"epsilon": account.epsilon, "steps": float(mechanism.steps)}
    entries = params | account.entries()
    return PrivateUpdate(silo.name, entries, len(silo.train[0]), metrics)


def _take_steps(
    model: nn.Module,
    silo: Any,
    mechanism: Mechanism,
    lr: float,
    momentum: float,
    loss_fn: Loss,
    rng: torch.Generator,
) -> None:
    """The steps of `train_privately`; what they cost is booked by now."""
    rate = mechanism.sample_rate
    model.train()
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device = next(model.parameters()).device
    x, y = (part.to(device) for part in silo.train)
    noise_rng = rng  # torch wants one on the device of the noise
    if device.type != "cpu":
        seed = int(torch.randint(2**62, (), generator=rng))
        noise_rng = torch.Generator(device).manual_seed(seed)
    optimizer = DPOptimizer(
        torch.optim.SGD(weights.values(), lr=lr, momentum=momentum),
        noise_multiplier=mechanism.noise_multiplier,
        max_grad_norm=mechanism.max_grad_norm,
        expected_batch_size=rate * len(x),
        generator=noise_rng,
    )
    batches = UniformWithReplacementSampler(
        num_samples=len(x), sample_rate=rate, generator=rng, steps=mechanism.steps
    )
    for batch in batches:
        gradients = _per_example(model, weights, x[batch], y[batch], loss_fn)
        optimizer.zero_grad()
        for name, weight in weights.items():
            weight.grad_sample = gradients[name]
        optimizer.step()
    for weight in weights.values():
        del weight.grad_sample, weight.summed_grad


def dp_problems(model: nn.Module) -> list[str]:
    """Why `train_privately` would refuse a model; empty if it would not. Layers that
    mix examples, keep statistics or draw numbers, frozen ones too. Sets train mode."""
    bad = []
    for path, module in model.named_modules():
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        rates = (getattr(module, name, 0) for name in ("p", "dropout"))
        if norm or getattr(module, "track_running_stats", False):
            bad.append(f"{path} ({type(module).__name__}) shares statistics")
        elif any(isinstance(rate, float) and rate > 0 for rate in rates):
            bad.append(f"{path} ({type(module).__name__}) draws outside of rng")
    return bad + [str(error) for error in ModuleValidator.validate(model.train())]


def secret_rng(
    secret: bytes, params: Mapping[str, Tensor], round_index: int
) -> torch.Generator:
    """A generator that only who holds the secret can repeat.

    secret: 32 bytes or more that stay in the silo. The same round from the same params
    draws the same again: playing it twice with the same settings and records reveals
    no more than once, with others it gives the noise away. `cross_silo.account` takes
    care of that, and is the way for a real run. Not of cryptographic quality, nor is
    noise in floating point (Mironov 2012)."""
    if len(secret) < 32:
        raise ValueError(f"the secret must have >= 32 bytes, got {len(secret)}")
    digest = hashlib.shake_256(secret + str(round_index).encode())
    for name, value in sorted(params.items()):
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return generator_of(digest)


def generator_of(digest: Any) -> torch.Generator:
    """A generator whose whole state comes from a SHAKE-256."""
    # Not manual_seed: on the CPU it uses 32 bits of a seed, few enough to try them all.
    # So the digest becomes the state itself, which torch gives as bytes: 24 of a header
    # (seed, counters; fresh from manual_seed they say "draw new numbers first"), then
    # the Mersenne Twister's 624 words of 32 bits, each in 8 bytes.
    words = np.frombuffer(digest.digest(624 * 4), "<u4").astype("<u8")
    state = torch.Generator().manual_seed(0).get_state()
    state[24 : 24 + words.nbytes] = torch.from_numpy(words.view(np.uint8))
    return torch.Generator().set_state(state)


def with_tanh(model: nn.Module) -> nn.Module:
    """Put Tanh in place of every ReLU, in the model itself, and return it: bounded
    activations keep gradients near the clipping norm (Papernot et al. 2021)."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.ReLU):
            model.set_submodule(path, nn.Tanh())
    return model


def privatise_update(
    update: Any,
    start: Mapping[str, Tensor],
    *,
    account: Account,
    clip: float,
    noise_multiplier: float,
    num_silos: int,
    rng: torch.Generator,
) -> PrivateUpdate:
    """Silo-level DP: clip a whole update and add this silo's share of the noise
    (McMahan et al. 2018, Alg. 1; distributed noise as in Kairouz et al. 2021).

    update: with silo and params; not modified.
    start: params that training began with.
    account: what the silo has spent; this update is booked there.
    clip: the delta is scaled to at most this L2 norm, over all entries.
    noise_multiplier: standard deviation of the noise on the sum, in units of clip.
    num_silos: how many take part; each adds 1 / sqrt(num_silos) of that noise.
    rng: CPU generator, as in `train_privately`.

    The epsilon that is booked is for those who see only the sum (secure aggregation),
    while no silo drops out or tells its noise. The update counts as 1 example, or a
    large silo would weigh more than clip allows. Raises BudgetExceeded; ValueError for
    whole-number entries."""
    state = {name: value for name, value in start.items() if name != SPENT}
    whole = [name for name, value in state.items() if not value.is_floating_point()]
    if whole:
        raise ValueError(
            f"no norm bounds {whole[:3]} of silo {update.silo!r}; use a model without "
            "BatchNorm, small_cnn(norm='group')"
        )
    if not (clip > 0 and account.budget.delta < 1 / num_silos):
        raise ValueError(
            f"clip must be > 0 and delta below 1 / num_silos = {1 / num_silos:.2g}, "
            f"got {clip} and {account.budget.delta:g}"
        )
    account.spend(noise_multiplier, 1.0, 1)
    delta = {name: update.params[name] - value for name, value in state.items()}
    norm = math.sqrt(sum(v.double().square().sum().item() for v in delta.values()))
    scale, std = min(1.0, clip / (norm + 1e-12)), noise_multiplier * clip
    params = account.entries()
    for name, value in delta.items():
        noise = torch.randn(value.shape, generator=rng, dtype=value.dtype)
        params[name] = state[name] + scale * value + std / num_silos**0.5 * noise
    return PrivateUpdate(update.silo, params, 1, {"epsilon": account.epsilon})


def advantage(epsilon: float, delta: float) -> dict[str, float]:
    """What epsilon leaves an adversary to gain on one patient, whatever it knows.

    odds: the factor by which its odds that a patient was among the records may change,
    but for a chance of delta. certainty: how sure it may be afterwards, if it was even
    before. found: the best share of patients found at 1 % of false alarms (Kairouz, Oh
    and Viswanath 2015, theorem 2.1)."""
    odds = math.exp(epsilon) if epsilon < 700 else math.inf
    found = _most_found(epsilon, delta, 0.01)
    return {"odds": odds, "certainty": belief_after(0.5, epsilon), "found": found}


def spending_table(
    rounds: Iterable[Mapping[str, Any]], budget: Budget, *, mechanism: str = "DP-SGD"
) -> list[dict[str, Any]]:
    """What each silo had spent after each round: rows with silo, round (from 0),
    mechanism, epsilon (so far), remaining, and its `advantage`. rounds:
    `History.rounds`, with each silo's epsilon in its training metrics."""
    rows = []
    for record in rounds:
        for silo, metrics in sorted(record["train"].items()):
            row = {"silo": silo, "round": record["round"], "mechanism": mechanism}
            row["epsilon"] = metrics["epsilon"]
            row["remaining"] = budget.epsilon - metrics["epsilon"]
            rows.append(row | advantage(metrics["epsilon"], budget.delta))
    return rows


def _per_example(
    model: nn.Module, weights: Params, x: Tensor, y: Tensor, loss_fn: Loss
) -> Params:
    """Gradient of each example's loss, [N, ...] per parameter; buffers do not change.
    (Opacus' own hooks fail with layers that work in place.)"""
    values = {name: weight.detach() for name, weight in weights.items()}
    buffers = dict(model.named_buffers())
    if len(x) == 0:  # nobody was drawn: a step of noise alone, or the gap would tell
        return {name: v.new_zeros(0, *v.shape) for name, v in values.items()}

    def loss(values: Params, x: Tensor, y: Tensor) -> Tensor:
        return loss_fn(functional_call(model, values | buffers, (x[None],)), y[None])

    return vmap(grad(loss), in_dims=(None, 0, 0))(values, x, y)


def _check_steps(noise: float, rate: float, steps: float, *, silo: str = "") -> None:
    whole = steps >= 1 and steps % 1 == 0
    if not (0 <= noise < math.inf and 0 < rate <= 1 and whole):
        raise ValueError(
            "noise_multiplier must be finite and >= 0, sample_rate > 0 and <= 1, steps "
            f"a whole number >= 1; got {noise}, {rate} and {steps}"
            + (f" in the account of silo {silo!r}" if silo else "")
        )


def more_spent(
    spent: Spent, more: tuple[float, float, int], budget: Budget, silo: str
) -> Spent:
    """What has been spent after more steps, if the budget allows them."""
    _check_steps(*more, silo=silo)
    rows, (noise, rate, steps) = list(spent), more
    if rows and rows[-1][:2] == (noise, rate):
        rows[-1] = (noise, rate, rows[-1][2] + steps)
    else:
        rows.append(more)
    after = epsilon_spent(tuple(rows), budget.delta)
    if after > budget.epsilon:
        before = epsilon_spent(spent, budget.delta)
        raise BudgetExceeded(
            f"silo {silo!r} stops: it has spent epsilon {before:.2f} of "
            f"{budget.epsilon:g} (delta {budget.delta:g}), and {steps} "
            f"more steps with noise {noise:.3g} would make it "
            f"{after:.2f}; keep the last round's model, or plan with noise_for"
        )
    return tuple(rows)


def _about(
    model: nn.Module, silo: Any, mechanism: Mechanism, lr: float, momentum: float,
    loss_fn: Loss,
) -> bytes:  # fmt: skip
    """Whatever an update depends on, beside its noise."""
    digest = hashlib.sha256(repr((mechanism, lr, momentum)).encode())
    digest.update(f"{getattr(loss_fn, '__qualname__', '')} {silo.name}".encode())
    parts = {**model.state_dict(), "x": silo.train[0], "y": silo.train[1]}
    for name, value in parts.items():
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.digest()


def _check(model: nn.Module, silo: Any, account: Any) -> None:
    n, labels, bad = len(silo.train[0]), len(silo.train[1]), dp_problems(model)
    delta, real = account.budget.delta, not account.needs_rng
    if real and delta * n > 0.1:
        raise ValueError(
            f"silo {silo.name!r} has {n} patients, and delta is {delta:g}; in a real "
            f"run it must be at most a tenth of 1 / patients, {0.1 / n:.2g}"
        )
    if not 0 < n == labels or delta >= 1 / n:
        raise ValueError(
            f"silo {silo.name!r} has {n} inputs, {labels} labels, delta={delta:g}; it "
            "needs as many of both, at least one, and a delta well below 1 / examples"
        )
    if bad:
        raise ValueError(
            f"DP-SGD cannot train silo {silo.name!r}'s model: {'; '.join(bad[:3])}. "
            "Use GroupNorm, as small_cnn(norm='group') does, or opacus.validators."
            "ModuleValidator.fix(model), and set dropout to 0"
        )


def belief_after(prior: float, epsilon: float) -> float:
    """The most that anybody may believe that a patient took part, after seeing all.

    prior: what they believed before, 0 to 1. By Bayes' rule the odds prior / (1 -
    prior) grow at most by exp(epsilon); the chance delta that this fails is left out.
    """
    if not (0 <= prior <= 1 and epsilon >= 0):
        raise ValueError(
            f"need a prior from 0 to 1 and epsilon >= 0, got {prior} and {epsilon}"
        )
    return 0.0 if prior == 0 else prior / (prior + (1 - prior) * math.exp(-epsilon))


def most_found(budget: Budget, *, false_alarms: float = 0.01) -> float:
    """The largest share of patients that any test can find, whatever it looks at.

    false_alarms: share of the strangers that the test takes for patients, 0 to 1.
    Compare with `tpr` of `attacks.membership_success`, which is what one attack did
    find. (Kairouz et al. 2015, theorem 2.1: all tests under (epsilon, delta).)
    """
    if not 0 <= false_alarms <= 1:
        raise ValueError(f"false_alarms must be 0 to 1, got {false_alarms}")
    return _most_found(budget.epsilon, budget.delta, false_alarms)


def _most_found(epsilon: float, delta: float, false_alarms: float) -> float:
    shrink = math.exp(-epsilon)
    by_factor = false_alarms / shrink if shrink else math.inf
    rest = max(0.0, 1 - false_alarms - delta)
    return min(1.0, by_factor + delta, 1 - shrink * rest)
