"""Training and evaluation inside one silo; knows nothing of federations or engines.

In: a torch model and a silo's tensors. Out: an update (parameters after local
training) or metrics. Needs only torch: copy this file on its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.sgd import sgd
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
Loss = Callable[[Tensor, Tensor], Tensor]  # of logits and labels; per example


class SiloLike(Protocol):
    """What training needs of a silo: its name and its training examples (x, y)."""

    @property
    def name(self) -> str: ...
    @property
    def train(self) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Update:
    """What a silo sends after local training.

    silo: the silo's name. params: the model's whole state_dict after training, on
    the CPU. num_examples: training examples (not batches). metrics: plain numbers.
    """

    silo: str
    params: dict[str, Tensor]
    num_examples: int
    metrics: dict[str, float] = field(default_factory=dict)


def train_locally(
    model: nn.Module,
    silo: SiloLike,
    *,
    epochs: float,
    lr: float,
    batch_size: int,
    rng: torch.Generator,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    adjust_gradients: Callable[[nn.Module], None] | None = None,
    loss_fn: Loss = F.cross_entropy,
) -> Update:
    """Run `epochs` passes of minibatch SGD on the silo's training examples.

    model: changed in place; it holds the parameters to start from, and is trained on
        the device on which it is.
    silo: its train is x [N, ...] float, y [N] class indices.
    epochs: passes over the examples; may be a fraction.
    lr, momentum, weight_decay: as of `torch.optim.SGD`.
    batch_size: examples in a step.
    rng: CPU generator, the only source of randomness (order of examples, dropout and
        other layers of torch that draw numbers; on a GPU, dropout is seeded from it).
    adjust_gradients: called with the model before each step; may change the parameters'
        .grad in place, as `ProximalTerm` and `scaffold.ControlVariates.correct` do.
    loss_fn: loss_fn(logits, y) is the mean loss of a batch, per example.

    Each epoch takes N // batch_size steps of exactly batch_size examples (one step
    with all of them if N is smaller); the rest is left out of that epoch, as with
    DataLoader(drop_last=True). Returns an Update whose params are copies; metrics
    are `train_loss` (mean over steps) and `steps`.
    Raises ValueError for empty or mismatched data, FloatingPointError on divergence.
    """
    x, y = silo.train
    _check_inputs(silo.name, x, y, epochs, lr, batch_size)
    device = _device(model)
    x, y = x.to(device), y.to(device)
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    velocity: list[Tensor | None] = [None] * len(weights)
    settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    steps = num_steps(len(x), epochs=epochs, batch_size=batch_size)
    total_loss = torch.zeros((), device=device)
    seeded = _seeded(model, rng, device)
    for batch in _batches(len(x), batch_size, steps, rng, device):
        with seeded:
            logits = model(x[batch])
        loss = loss_fn(logits, y[batch])
        model.zero_grad()
        loss.backward()
        if adjust_gradients:
            adjust_gradients(model)
        _sgd_step(weights, velocity, **settings)
        total_loss += loss.detach()  # stays on the device: no wait per step
    return _finished(silo, model.state_dict(), total_loss.item() / steps, steps, lr)


class ProximalTerm:
    """FedProx: holds local training near where it started (Li et al. 2020, eq. 2).

    Adds the gradient of mu/2 * |w - w_start|^2, which is mu * (w - w_start), as
    `train_locally(model, ..., adjust_gradients=ProximalTerm(model, mu))`.
    model: with the parameters to start from. mu: >= 0; 0 is plain SGD.
    """

    def __init__(self, model: nn.Module, mu: float) -> None:
        if not mu >= 0:
            raise ValueError(f"mu must be >= 0, got {mu}")
        self.mu = mu
        self.start = [w.detach().clone() for w in model.parameters()]

    def __call__(self, model: nn.Module) -> None:
        """Add the term to the gradients of the model's parameters, in place."""
        with torch.no_grad():
            for weight, start in zip(model.parameters(), self.start, strict=True):
                if weight.grad is not None:
                    weight.grad.add_(weight - start, alpha=self.mu)


@dataclass(frozen=True)
class ClientFunctions:
    """What a silo does in a run: a client of `simulation.run_rounds`.

    update(params, silo, round_index=, rng=): local training, returns an `Update`.
    evaluate(params, silo): metrics of a model on the silo's test set.
    draws_only_from_rng: whether update and evaluate draw random numbers from rng alone,
        as `train_locally` does; then silos can train in threads.
    """

    update: Callable[..., Update]
    evaluate: Callable[[Mapping[str, Tensor], Any], dict[str, float]] | None = None
    draws_only_from_rng: bool = False


def sgd_client(
    make_model: Callable[[], nn.Module],
    *,
    epochs: float | Callable[[SiloLike], float],
    lr: float | Callable[[int], float],
    batch_size: int,
    proximal_mu: float = 0.0,
    loss_fn: Loss = F.cross_entropy,
    metrics: Collection[str] | None = None,
) -> ClientFunctions:
    """Make the usual client: load the params, `train_locally`; load them, `evaluate`.

    make_model: called once, here, without a trace in torch's global generator; every
        turn has a copy of its own. Entries of params that the model does not have, such
        as control variates, are left out.
    epochs: passes over a silo's training examples, or a function of the silo.
    lr: a number, or a function of the round such as `cosine_schedule(0.05, rounds)`.
    batch_size: examples in a step.
    proximal_mu: weight of FedProx's term; 0 is plain SGD.
    loss_fn: as in `train_locally`, for the test too.
    metrics: names of what the test keeps of `evaluate`; None is all.
    """
    with torch.random.fork_rng(devices=()):
        template = make_model()
    ProximalTerm(template, proximal_mu)  # raises now for what it would raise later
    how = {"batch_size": batch_size, "loss_fn": loss_fn}

    def load(params: Mapping[str, Tensor]) -> nn.Module:
        model = copy.deepcopy(template)
        names = model.state_dict().keys()
        model.load_state_dict({k: v for k, v in params.items() if k in names})
        return model

    def update(
        params: Mapping[str, Tensor],
        silo: SiloLike,
        *,
        round_index: int,
        rng: torch.Generator,
    ) -> Update:
        model = load(params)
        return train_locally(
            model,
            silo,
            epochs=epochs(silo) if callable(epochs) else epochs,
            lr=lr(round_index) if callable(lr) else lr,
            rng=rng,
            adjust_gradients=ProximalTerm(model, proximal_mu) if proximal_mu else None,
            **how,
        )

    def test(params: Mapping[str, Tensor], silo: Any) -> dict[str, float]:
        scores = evaluate(load(params), silo.test, loss_fn=loss_fn)
        return scores if metrics is None else {name: scores[name] for name in metrics}

    return ClientFunctions(update, test, draws_only_from_rng=True)


def num_steps(num_examples: int, *, epochs: float, batch_size: int) -> int:
    """Count the SGD steps that `train_locally` takes; at least one."""
    return max(1, round(epochs * max(1, num_examples // batch_size)))


def cosine_lr(lr: float, round_index: int, rounds: int) -> float:
    """Decay the learning rate over rounds: lr at round 0, near 0 at the last one.

    Half a cosine (Loshchilov and Hutter 2017, eq. 5, without restarts), constant
    within a round, so that every engine and every silo uses the same value.
    """
    return lr * 0.5 * (1 + math.cos(math.pi * round_index / rounds))


def cosine_schedule(lr: float, rounds: int) -> Callable[[int], float]:
    """`cosine_lr` as a function of the round, for `sgd_client`."""
    return lambda round_index: cosine_lr(lr, round_index, rounds)


def norm_entries(model: nn.Module) -> list[str]:
    """Names of the state entries of a model's normalisation layers.

    Scale, shift, and running statistics: FedBN leaves them in the silo (Li et al. 2021,
    Algorithm 1), `Terms(keep_local=norm_entries(model))`.
    """
    layers = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
    return [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, layers)
        for name in module.state_dict()
    ]


def reestimate_statistics(model: nn.Module, x: Tensor, *, batch_size: int = 64) -> None:
    """Give a model's BatchNorm layers the running statistics of one silo's inputs.

    What FedAvg averages describes no silo when scanners differ. This needs neither
    labels nor training: one pass over x [N, ...], N >= 2, at the silo (AdaBN, Li et al.
    2016). Changes the model's buffers in place, and nothing else. Each statistic is
    the plain mean over the batches.
    """
    if len(x) < 2 or batch_size < 2:
        raise ValueError(
            f"a variance needs at least 2 inputs in a batch, got {len(x)} inputs and "
            f"batch_size={batch_size}"
        )
    modes = [(module, module.training) for module in model.modules()]
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.track_running_stats
    ]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches, not a moving one
        norm.train()
    try:
        with torch.no_grad():
            for batch in x.split(batch_size):
                if len(batch) > 1:
                    model(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, was_training in modes:
            module.training = was_training


def evaluate(
    model: nn.Module,
    examples: tuple[Tensor, Tensor],
    *,
    batch_size: int = 1024,
    loss_fn: Loss = F.cross_entropy,
) -> dict[str, float]:
    """Measure a classifier on examples it was not trained on.

    examples: x [N, ...], y [N] class indices; model(x) gives logits [N, K], on the
    device on which the model is.
    Returns loss (per example), accuracy, balanced_accuracy (mean sensitivity of the
    classes present), auroc (K = 2: class 1 against 0; else mean of one-vs-rest), and
    sensitivity_k, specificity_k for each class k; shares are in [0, 1], and a value
    that is not defined (class absent) is NaN. Parameters and modes are left as found.
    """
    x, y = examples
    if len(x) == 0 or len(x) != len(y):
        raise ValueError(f"cannot evaluate {len(x)} inputs with {len(y)} labels")
    modes = [(module, module.training) for module in model.modules()]
    device = _device(model)
    model.eval()
    try:
        with torch.inference_mode():
            logits = torch.cat([model(part.to(device)) for part in x.split(batch_size)])
    finally:
        for module, was_training in modes:
            module.training = was_training
    logits, y = logits.cpu().float(), y.cpu()
    scores = {"loss": loss_fn(logits, y).item()}
    return scores | classification_metrics(logits.softmax(dim=1), y)


def classification_metrics(probabilities: Tensor, y: Tensor) -> dict[str, float]:
    """Accuracy, balanced accuracy, AUROC and per-class rates from class probabilities.

    probabilities: [N, K]; y: [N] class indices. See `evaluate` for the names.
    """
    num_classes = probabilities.shape[1]
    pairs = y * num_classes + probabilities.argmax(dim=1)
    confusion = torch.bincount(pairs, minlength=num_classes**2).double()
    confusion = confusion.view(num_classes, num_classes)  # rows: true, columns: said
    hits, actual, said = confusion.diag(), confusion.sum(1), confusion.sum(0)
    sensitivity = hits / actual  # NaN where the class is absent
    specificity = 1 - (said - hits) / (len(y) - actual)
    one_vs_rest = range(1, 2) if num_classes == 2 else range(num_classes)
    aucs = torch.tensor([_auroc(probabilities[:, k], y == k) for k in one_vs_rest])
    metrics = {
        "accuracy": hits.sum().item() / len(y),
        "balanced_accuracy": sensitivity.nanmean().item(),
        "auroc": aucs.nanmean().item(),
    }
    for k in range(num_classes):
        metrics[f"sensitivity_{k}"] = sensitivity[k].item()
        metrics[f"specificity_{k}"] = specificity[k].item()
    return metrics


def _auroc(score: Tensor, positive: Tensor) -> float:
    """Chance that a positive scores above a negative, ties counted half."""
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if num_positive == 0 or num_negative == 0:
        return float("nan")
    _, level, count = score.unique(return_inverse=True, return_counts=True)
    mean_rank = (count.cumsum(0) - (count - 1) / 2).double()  # [levels], from 1
    rank_sum = mean_rank[level][positive].sum().item()
    above = rank_sum - num_positive * (num_positive + 1) / 2
    return above / (num_positive * num_negative)


def _device(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return CPU if first is None else first.device


def _finished(
    silo: SiloLike, state: Mapping[str, Tensor], loss: float, steps: int, lr: float
) -> Update:
    """The update, its params copied to the CPU, if they are finite; loss: per step."""
    params = {k: v.detach().to("cpu", copy=True) for k, v in state.items()}
    if not math.isfinite(loss) or not _all_finite(params):
        raise FloatingPointError(
            f"training diverged in silo {silo.name!r}: mean loss {loss} after "
            f"{steps} steps with lr={lr}; try a smaller lr, or look for NaN in the data"
        )
    metrics = {"train_loss": loss, "steps": float(steps)}
    return Update(silo.name, params, len(silo.train[0]), metrics)


def _batches(
    n: int,
    batch_size: int,
    steps: int,
    rng: torch.Generator,
    device: torch.device,
) -> Iterator[Tensor]:
    """Index tensors for `steps` batches, reshuffled whenever an epoch is used up."""
    per_epoch = max(1, n // batch_size)
    for step in range(steps):
        position = step % per_epoch
        if position == 0:
            order = torch.randperm(n, generator=rng).to(device)  # not in each step
        yield order[position * batch_size : (position + 1) * batch_size]


def _sgd_step(
    weights: list[nn.Parameter], velocity: list[Tensor | None], **settings: float
) -> None:
    """One step of `torch.optim.SGD`, in place, by the function that is behind it.

    The bits are the same, but whoever makes the object imports torch's compiler: time
    and memory in each process of a silo (docs/benchmarks.md).
    """
    moved = [k for k, weight in enumerate(weights) if weight.grad is not None]
    buffers = [velocity[k] for k in moved]
    with torch.no_grad():
        sgd(
            [weights[k] for k in moved],
            [weights[k].grad for k in moved],
            buffers,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            **settings,
        )
    for k, buffer in zip(moved, buffers, strict=True):
        velocity[k] = buffer


class _DrawFrom(TorchDispatchMode):
    """In this thread, let every operation that draws numbers draw from `rng`.

    By themselves dropout layers draw from torch's global generator, which belongs to
    the whole process: silos that train in other threads would change the result.
    """

    def __init__(self, rng: torch.Generator) -> None:
        super().__init__()
        self.rng = rng

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _can_draw(func):
            kwargs = {**kwargs, "generator": self.rng}
        return func(*args, **kwargs)


@cache
def _can_draw(operation: Any) -> bool:
    return any(a.name == "generator" for a in operation._schema.arguments)


def _seeded(
    model: nn.Module, rng: torch.Generator, device: torch.device
) -> AbstractContextManager[Any]:
    """Context for forward passes whose draws come from `rng`; nothing if none draw."""
    if not _draws(model):
        return nullcontext()
    if device.type != "cpu":  # there, dropout draws from the device's own generator
        torch.cuda.manual_seed(int(torch.randint(2**62, (), generator=rng)))
        return nullcontext()
    return _DrawFrom(rng)


def _draws(model: nn.Module) -> bool:
    """Whether a forward pass in training mode draws random numbers."""
    return any(
        isinstance(module, nn.RReLU) or isinstance(rate, float) and rate > 0
        for module in model.modules()
        for rate in (getattr(module, name, 0) for name in ("p", "dropout"))
    )


def _all_finite(params: dict[str, Tensor]) -> bool:
    # A sum is one quick read, and NaN or infinite if any entry is; finite entries may
    # overflow it, so that each of them is looked at only then.
    return all(
        math.isfinite(value.sum().item()) or bool(value.isfinite().all())
        for value in params.values()
    )


def _check_inputs(
    name: str,
    x: Tensor,
    y: Tensor,
    epochs: float,
    lr: float,
    batch_size: int,
) -> None:
    if len(x) == 0 or len(x) != len(y):
        raise ValueError(
            f"silo {name!r} has {len(x)} inputs and {len(y)} labels; "
            "give it the same number of both, at least one"
        )
    for label, value in (("epochs", epochs), ("lr", lr), ("batch_size", batch_size)):
        if not value > 0:
            raise ValueError(f"{label} must be > 0, got {value} (silo {name!r})")
