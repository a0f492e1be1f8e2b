"""Training and evaluation inside one silo; knows nothing of federations or engines.

In: a torch model and a silo's examples, two tensors or any map-style Dataset. Out: an
update (parameters after local training) or metrics. Needs only torch: copy this file on
its own.
"""

from __future__ import annotations

import copy
import math
import random
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.sgd import sgd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

CPU = torch.device("cpu")
Loss = Callable[[Tensor, Tensor], Tensor]  # of outputs and labels; per example
Metrics = Callable[[Tensor, Tensor], dict[str, float]]  # of all outputs and labels
Examples = (
    tuple[Tensor, Tensor] | Dataset
)  # x [N, ...] and y [N, ...], or (x, y) by index


class SiloLike(Protocol):
    """What training needs of a silo: its name and its training examples."""

    @property
    def name(self) -> str: ...
    @property
    def train(self) -> Examples: ...


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


@dataclass(frozen=True)
class PlainSGD:
    """SGD with momentum, as `torch.optim.SGD`, to the last bit."""

    momentum: float = 0.9
    weight_decay: float = 1e-4


@dataclass(frozen=True)
class Step:
    """How a gradient step is made.

    optimizer: PlainSGD, or a function optimizer(model, lr) that makes any
        torch.optim.Optimizer, such as AdamW with groups. It is made anew in each turn:
        what it remembers is not part of an update.
    max_norm: L2 norm, over all parameters, that gradients are clipped to.
    accumulate: batches whose mean gradient makes one step.
    autocast: torch.bfloat16 for layers that may be less exact; None is float32.
        float16 would need a scaled loss, which is left out.
    channels_last: lay images out with channels last; the same up to rounding, and
        faster for convolutions.
    workers: processes that load a Dataset; 0 loads between steps, to the same bits, and
        for one silo at a time if silos train in threads.
    """

    optimizer: PlainSGD | Callable[[nn.Module, float], torch.optim.Optimizer] = (
        PlainSGD()
    )
    max_norm: float | None = None
    accumulate: int = 1
    autocast: torch.dtype | None = None
    channels_last: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        if self.accumulate < 1 or self.workers < 0:
            raise ValueError(
                "accumulate must be >= 1 and workers >= 0, got "
                f"{self.accumulate} and {self.workers}"
            )
        if self.max_norm is not None and not self.max_norm > 0:
            raise ValueError(f"max_norm must be > 0 or None, got {self.max_norm}")
        if self.autocast not in (None, torch.bfloat16):
            raise ValueError(
                f"autocast must be torch.bfloat16 or None, got {self.autocast}"
            )


def train_locally(
    model: nn.Module,
    silo: SiloLike,
    *,
    epochs: float,
    lr: float,
    batch_size: int,
    rng: torch.Generator,
    adjust_gradients: Callable[[nn.Module], None] | None = None,
    loss_fn: Loss = F.cross_entropy,
    step: Step = Step(),
) -> Update:
    """Run `epochs` passes of minibatch SGD on the silo's training examples.

    model: changed in place; it holds the parameters to start from, and is trained on
        the device on which it is. Frozen parameters stay, and so do the statistics of
        a BatchNorm layer whose scale and shift are frozen.
    silo: its train is x [N, ...] float and y [N, ...], such as class indices; or a
        Dataset of N such examples, which is read batch by batch.
    epochs: passes over the examples; may be a fraction.
    lr: of the steps.
    batch_size: examples in a batch.
    rng: CPU generator, the only source of randomness: order of examples, dropout and
        other layers of torch that draw numbers (on a GPU they are seeded from it), and
        what a Dataset draws from the generators of torch, numpy and Python.
    adjust_gradients: called with the model before each step; may change the parameters'
        .grad in place, as `ProximalTerm` and `scaffold.ControlVariates.correct` do.
    loss_fn: loss_fn(outputs, y) is the mean loss of a batch, per example.
    step: optimizer, clipping, precision.

    Each epoch takes N // batch_size whole batches (one of all examples if N is smaller)
    and leaves the rest out, as DataLoader(drop_last=True). Returns an Update whose
    params are copies; metrics are `train_loss` (mean over batches) and `steps`.
    Raises ValueError for empty or mismatched data, FloatingPointError on divergence,
    and what the Dataset or the loss raise, with the name of the silo.
    """
    _check_inputs(silo, epochs, lr, batch_size)
    n, device = num_examples(silo), _device(model)
    total, steps = num_steps(n, epochs=epochs, batch_size=batch_size), 0
    _prepare(model, step)
    take_step = _stepper(model, lr, step)
    loss_of = _forward(model, silo.name, loss_fn, rng, step)
    total_loss = torch.zeros((), device=device)
    order = (n, batch_size, total, rng)
    for number, (x, y) in enumerate(_loaded(silo, order, device, step)):
        first = number - number % step.accumulate
        loss = loss_of(x, y)
        if number == first:
            model.zero_grad()
        share = min(step.accumulate, total - first)
        (loss / share if share > 1 else loss).backward()
        if number + 1 == first + share:
            if adjust_gradients:
                adjust_gradients(model)
            take_step()
            steps += 1
        total_loss += loss.detach()  # stays on the device: no wait per step
    return _finished(silo, model, total_loss.item() / total, steps, lr)


def num_examples(silo: SiloLike) -> int:
    """How many training examples a silo has, tensors or a Dataset."""
    return len(silo.train[0] if _is_pair(silo.train) else silo.train)


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
    metrics: Metrics | Collection[str] | None = None,
    step: Step = Step(),
) -> ClientFunctions:
    """Make the usual client: load the params, `train_locally`; load them, `evaluate`.

    make_model: called once, here, without a trace in torch's global generator; every
        turn has a copy of its own. Entries of params that the model does not have, such
        as control variates, are left out.
    epochs: passes over a silo's training examples, or a function of the silo.
    lr: a number, or a function of the round such as `cosine_schedule(0.05, rounds)`.
    batch_size: examples in a batch.
    proximal_mu: weight of FedProx's term; 0 is none.
    loss_fn: as in `train_locally`, for the test too.
    metrics: a function as in `evaluate`, or names of what the test keeps; None is all.
    step: as in `train_locally`.
    """
    with torch.random.fork_rng(devices=()):
        template = make_model()
    ProximalTerm(template, proximal_mu)  # raises now for what it would raise later
    how = {"batch_size": batch_size, "loss_fn": loss_fn, "step": step}
    measured = metrics if callable(metrics) else classification_metrics
    kept = None if callable(metrics) else metrics

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
        scores = evaluate(load(params), silo.test, loss_fn=loss_fn, metrics=measured)
        return scores if kept is None else {name: scores[name] for name in kept}

    return ClientFunctions(update, test, draws_only_from_rng=True)


def num_steps(num_examples: int, *, epochs: float, batch_size: int) -> int:
    """Count the batches that `train_locally` takes; at least one."""
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


def frozen_entries(model: nn.Module) -> list[str]:
    """Names of the state entries that `train_locally` leaves as they are.

    Parameters that need no gradient, and the buffers of a layer all of whose parameters
    are frozen. Every silo has them from the start, so that only the others travel, are
    averaged and are counted in bytes: `Terms(keep_local=frozen_entries(model))`, and
    the same in a real run.
    """
    names = [name for name, p in model.named_parameters() if not p.requires_grad]
    for path, module in model.named_modules():
        if _is_frozen(module):
            buffers = [name for name, _ in module.named_buffers(recurse=False)]
            names += [f"{path}.{name}" if path else name for name in buffers]
    return [name for name in model.state_dict() if name in set(names)]


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
    examples: Examples,
    *,
    batch_size: int = 1024,
    loss_fn: Loss = F.cross_entropy,
    metrics: Metrics | None = None,
) -> dict[str, float]:
    """Measure a model on examples it was not trained on.

    model: on any device. Parameters and modes are left as found.
    examples: x [N, ...] and y [N, ...], or a Dataset of N, read batch by batch; the
        outputs of all are kept on the CPU.
    batch_size: examples that are on the device at a time.
    loss_fn: as in `train_locally`.
    metrics: metrics(outputs [N, ...], y [N, ...]) returns plain numbers by name, such
        as the functions of metrics.py. None is for classes: `classification_metrics`
        of the softmax of the outputs.

    Returns these metrics and `loss` (per example).
    """
    count = len(examples[0] if _is_pair(examples) else examples)
    if count == 0 or _is_pair(examples) and len(examples[1]) != count:
        labels = len(examples[1]) if _is_pair(examples) else count
        raise ValueError(f"cannot evaluate {count} inputs with {labels} labels")
    modes = [(module, module.training) for module in model.modules()]
    outputs, labels, device = [], [], _device(model)
    model.eval()
    try:
        with torch.inference_mode():
            for x, y in _streamed(examples, count, batch_size):
                outputs.append(model(x.to(device)).cpu().float())
                labels.append(y.cpu())
    finally:
        for module, was_training in modes:
            module.training = was_training
    said, y = torch.cat(outputs), torch.cat(labels)
    scores = {"loss": loss_fn(said, y).item()}
    return scores | (classification_metrics if metrics is None else metrics)(said, y)


def classification_metrics(logits: Tensor, y: Tensor) -> dict[str, float]:
    """Accuracy, balanced accuracy, AUROC and rates per class.

    logits: [N, K], or log probabilities; y: [N] class indices. Returns accuracy,
    balanced_accuracy (mean sensitivity of the classes present), auroc (K = 2: class 1
    against 0; else mean of one-vs-rest), and sensitivity_k, specificity_k for each
    class k; shares are in [0, 1], and what is not defined (class absent) is NaN.
    """
    probabilities = logits.softmax(dim=1)
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


def _is_pair(examples: Examples) -> bool:
    """Whether examples are tensors x and y, not a Dataset."""
    return isinstance(examples, tuple | list)


def _device(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return CPU if first is None else first.device


def _finished(
    silo: SiloLike, model: nn.Module, loss: float, steps: int, lr: float
) -> Update:
    """The update, its params copied to the CPU, if they are finite; loss: per batch."""
    how = {"copy": True, "memory_format": torch.contiguous_format}
    params = {k: v.detach().to("cpu", **how) for k, v in model.state_dict().items()}
    if not math.isfinite(loss) or not _all_finite(params):
        raise FloatingPointError(
            f"training diverged in silo {silo.name!r}: mean loss {loss} after "
            f"{steps} steps with lr={lr}; try a smaller lr, or look for NaN in the data"
        )
    metrics = {"train_loss": loss, "steps": float(steps)}
    return Update(silo.name, params, num_examples(silo), metrics)


Order = tuple[int, int, int, torch.Generator]  # examples, in a batch, batches, rng


def _batches(order: Order, device: torch.device) -> Iterator[Tensor]:
    """Index tensors for so many batches, reshuffled whenever an epoch is used up."""
    n, batch_size, batches, rng = order
    per_epoch = max(1, n // batch_size)
    for number in range(batches):
        position = number % per_epoch
        if position == 0:
            rows = torch.randperm(n, generator=rng).to(device)  # not in each step
        yield rows[position * batch_size : (position + 1) * batch_size]


def _loaded(
    silo: SiloLike, order: Order, device: torch.device, step: Step
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches x, y of an order, on the device."""
    layout = torch.channels_last if step.channels_last else torch.preserve_format
    if _is_pair(silo.train):
        x, y = (part.to(device) for part in silo.train)
        x = x.to(memory_format=layout) if x.dim() == 4 else x
        for rows in _batches(order, device):
            yield x[rows], y[rows]
        return
    rows = [part.tolist() for part in _batches(order, CPU)]  # now: loaders work ahead
    fork = torch.Generator().set_state(order[-1].get_state())  # draws nothing from rng
    seed = int(torch.randint(2**62, (), generator=fork))
    loader = DataLoader(
        _Batches(silo.train, f"silo {silo.name!r}"),
        batch_sampler=[[seed + k, *part] for k, part in enumerate(rows)],
        collate_fn=_as_it_is,
        num_workers=step.workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(seed),  # not torch's global one
    )
    for x, y in loader:
        x, y = (part.to(device, non_blocking=True) for part in (x, y))
        yield (x.to(memory_format=layout) if x.dim() == 4 else x), y


def _streamed(
    examples: Examples, count: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """All examples in their order, batch by batch."""
    if _is_pair(examples):
        yield from zip(*(part.split(batch_size) for part in examples), strict=True)
        return
    batches = _Batches(examples, "the test set")
    for start in range(0, count, batch_size):
        rows = range(start, min(start + batch_size, count))
        yield batches.__getitems__([start, *rows])


_ONE_AT_A_TIME = threading.Lock()  # the generators seeded below belong to the process


class _Batches(Dataset):
    """Whole batches of a Dataset: [seed, *rows] gives x, y.

    A batch's draws depend on its seed, not on who loads it, in which process or when:
    the generators of torch, numpy and Python are seeded for it and restored afterwards.
    """

    def __init__(self, examples: Dataset, owner: str) -> None:
        self.examples, self.owner = examples, owner

    def __getitems__(self, batch: list[int]) -> tuple[Tensor, Tensor]:
        seed, *rows = batch
        # A worker is alone in its process, and would inherit a lock that somebody held.
        with nullcontext() if get_worker_info() else _ONE_AT_A_TIME, _drawn_from(seed):
            try:
                x, y = default_collate([self.examples[row] for row in rows])
                _check_pixels(x, rows)
            except Exception as error:
                raise _told(f"{self.owner}, examples {rows[:3]} ...", error) from error
        return x, y


def _check_pixels(x: Tensor, rows: list[int]) -> None:
    """Raise which examples of a batch hold NaN or infinity; a sum is one quick read."""
    if not x.is_floating_point() or math.isfinite(x.sum().item()):
        return
    bad = [row for row, one in zip(rows, x, strict=True) if not one.isfinite().all()]
    if bad:
        raise ValueError(
            f"NaN or infinity in the inputs of example(s) {bad[:3]}; correct or leave "
            "them out"
        )


@contextmanager
def _drawn_from(seed: int) -> Iterator[None]:
    old = np.random  # what augmentations use, and nobody can pass them a Generator
    before = torch.get_rng_state(), old.get_state(), random.getstate()  # noqa: NPY002
    torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
    old.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        old.set_state(before[1])
        random.setstate(before[2])


def _as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch


def _told(owner: str, error: Exception) -> RuntimeError:
    """An error of the user's Dataset, model or loss that says whose data it was."""
    hint = ""
    if isinstance(error, IndexError):  # how cross_entropy refuses a label
        hint = "; labels must be 0 to one less than the model's outputs"
    if "equal size" in str(error):  # how examples are refused that cannot be stacked
        hint = "; give all images one size and number of channels"
    if "Target size" in str(error):  # how a loss refuses masks
        hint = "; give masks a channel of their own, and the size of the output"
    return RuntimeError(f"{owner}: {type(error).__name__}: {error}{hint}")


def _stepper(model: nn.Module, lr: float, step: Step) -> Callable[[], None]:
    """What makes a step of the gradients that are there."""
    weights = [p for p in model.parameters() if p.requires_grad]
    if isinstance(step.optimizer, PlainSGD):
        velocity: list[Tensor | None] = [None] * len(weights)
        settings = {"lr": lr, **vars(step.optimizer)}

        def move() -> None:
            _sgd_step(weights, velocity, **settings)
    else:
        move = step.optimizer(model, lr).step

    def take() -> None:
        if step.max_norm is not None:
            nn.utils.clip_grad_norm_(weights, step.max_norm)
        move()

    return take


def _is_frozen(module: nn.Module) -> bool:
    """Whether a layer has parameters of its own, none of which is trained."""
    own = [p.requires_grad for p in module.parameters(recurse=False)]
    return bool(own) and not any(own)


def _prepare(model: nn.Module, step: Step) -> None:
    """Set the mode and the layout of a model that is to be trained."""
    if step.channels_last:
        model.to(memory_format=torch.channels_last)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and _is_frozen(module):
            module.eval()  # its statistics are those that its scale was made for


def _forward(
    model: nn.Module, silo: str, loss_fn: Loss, rng: torch.Generator, step: Step
) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of a batch; an error of the model or the loss names the silo."""
    device = _device(model)
    seeded, cast = _seeded(model, rng, device), nullcontext()
    if step.autocast:
        cast = torch.autocast(device.type, step.autocast)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        try:
            with seeded, cast:
                return loss_fn(model(x), y)
        except Exception as error:
            raise _told(f"silo {silo!r}", error) from error

    return loss_of


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


def _check_inputs(silo: SiloLike, epochs: float, lr: float, batch_size: int) -> None:
    name, count = silo.name, num_examples(silo)
    labels = len(silo.train[1]) if _is_pair(silo.train) else count
    if count == 0 or count != labels:
        raise ValueError(
            f"silo {name!r} has {count} inputs and {labels} labels; "
            "give it the same number of both, at least one"
        )
    for label, value in (("epochs", epochs), ("lr", lr), ("batch_size", batch_size)):
        if not value > 0:
            raise ValueError(f"{label} must be > 0, got {value} (silo {name!r})")
