"""Models of the notebooks: a small CNN, a U-Net, an MLP, any torchvision classifier.

Each of these functions returns a plain `nn.Module` with random weights drawn from
torch's global generator (seed it with `torch.manual_seed`). `check_model` looks at a
model of your own before you federate it. Copy this file on its own.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["batch", "group", "none"]


def small_cnn(
    num_classes: int, *, in_channels: int = 1, width: int = 8, norm: Norm = "batch"
) -> nn.Module:
    """Three convolutions and a linear head; about 7,500 parameters at width 8.

    Input [N, in_channels, H, W] with H, W >= 16; output logits [N, num_classes].
    norm: "batch" learns fastest here; "group" keeps no running statistics (needed for
    differential privacy, and safer when hospitals' scanners differ). Parameters of the
    head start with "head.", all others with "body.".
    """
    if width % 2:
        raise ValueError(f"width must be even (two norm groups), got {width}")
    body = nn.Sequential(
        nn.Conv2d(in_channels, width, 5, stride=2, padding=2, bias=norm == "none"),
        _norm_2d(norm, width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=norm == "none"),
        _norm_2d(norm, 2 * width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2 * width, 4 * width, 3, padding=1, bias=norm == "none"),
        _norm_2d(norm, 4 * width),
        nn.ReLU(),
        # A 4 x 4 grid, not one mean: where in the chest a finding lies matters.
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
    )
    head = nn.Linear(4 * width * 16, num_classes)
    return nn.Sequential(OrderedDict(body=body, head=head))


def mlp(
    num_features: int, num_classes: int, *, hidden: Sequence[int] = (32,)
) -> nn.Module:
    """Fully connected network for tables; hidden=() is logistic regression.

    Input [N, num_features]; output logits [N, num_classes]. No normalisation layers,
    so every entry of the state can be averaged.
    """
    layers: list[nn.Module] = []
    size = num_features
    for units in hidden:
        layers += [nn.Linear(size, units), nn.ReLU()]
        size = units
    head = nn.Linear(size, num_classes)
    return nn.Sequential(OrderedDict(body=nn.Sequential(*layers), head=head))


class Ensemble(nn.Module):
    """Several models as one, whose probability is the mean of theirs.

    Of local models it is a federation without rounds: each silo sends its model once,
    and nothing is averaged but the answers. models: same inputs, same classes, or an
    outline each; they are kept, not copied.
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        if not self.models:
            raise ValueError("an ensemble needs at least one model, got none")

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes], or [N, 1, ...] of models with one output channel,
        for inputs x [N, ...]."""
        outputs = torch.stack([model(x) for model in self.models])
        if outputs.shape[2] == 1:  # yes or no: the log of the odds
            yes, no = F.logsigmoid(outputs), F.logsigmoid(-outputs)
            return yes.logsumexp(dim=0) - no.logsumexp(dim=0)
        answers = outputs.log_softmax(dim=2)
        return answers.logsumexp(dim=0) - math.log(len(self.models))


def torchvision_model(
    name: str,
    num_classes: int,
    *,
    in_channels: int = 3,
    weights: str | Path | None = None,
) -> nn.Module:
    """Any classifier of torchvision.models, with its first and last layer adapted.

    name: for example "resnet18". in_channels: 1 for radiographs; given weights, the
    first kernel is the mean over its channels, so grey images see familiar filters.
    weights: None (random); a file with a state_dict of this model, .pt or .pth, read
    without running code, whose last layer is not used; or a torchvision weights name
    such as "DEFAULT", which downloads them. Raises ValueError for a name that is
    unknown or cannot be adapted, and for a file of another model.
    """
    from torchvision import models  # 1 s to import: only when asked for

    if name not in models.list_models(module=models):
        raise ValueError(
            f"torchvision has no classifier {name!r}; one of "
            f"{', '.join(models.list_models(module=models)[:5])}, ..."
        )
    if name in ("googlenet", "inception_v3"):
        raise ValueError(f"{name} trains with further heads; choose another model")
    file = weights is not None and Path(weights).suffix in (".pt", ".pth")
    model = models.get_model(name, weights=None if file else weights)
    if file:
        _load_but_the_head(model, Path(weights), name)
    _replace_head(model, num_classes, name)
    if in_channels != 3:
        _replace_stem(model, in_channels)
    return model


class SmallUNet(nn.Module):
    """A U-Net for outlines (Ronneberger et al. 2015), 120,545 parameters at width 16.

    It looks at an image at three scales and puts them together again, so that each
    pixel is judged with its surroundings. Input [N, in_channels, H, W] with H and W
    divisible by 8; output [N, 1, H, W], above 0 inside. It works at half of the image's
    resolution. GroupNorm keeps no running statistics. width: divisible by 4.
    """

    def __init__(self, *, in_channels: int = 1, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 2, stride=2)
        self.fine = _two_convolutions(width, width)
        self.middle = _two_convolutions(width, 2 * width)
        self.coarse = _two_convolutions(2 * width, 4 * width)
        self.middle_again = _two_convolutions(6 * width, 2 * width)
        self.fine_again = _two_convolutions(3 * width, width)
        self.head = nn.Conv2d(width, 1, 1)
        # Few pixels are inside: training that begins near "none" does not get stuck.
        nn.init.constant_(self.head.bias, -3.0)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(self.stem(x))
        middle = self.middle(F.max_pool2d(fine, 2))
        coarse = self.coarse(F.max_pool2d(middle, 2))
        middle = self.middle_again(torch.cat([_twice(coarse), middle], dim=1))
        fine = self.fine_again(torch.cat([_twice(middle), fine], dim=1))
        return _twice(self.head(fine))


def smooth_cnn(num_classes: int, *, size: int = 32) -> nn.Module:
    """Three convolutions with Tanh, no pooling and no normalisation: the kind of model
    from whose gradients images are rebuilt best (`attacks.invert_gradient`).

    Input [N, 1, size, size]; output logits [N, num_classes].
    """
    layers: list[nn.Module] = []
    for channels, stride in ((1, 2), (12, 2), (12, 1)):
        layers += [nn.Conv2d(channels, 12, 5, stride=stride, padding=2), nn.Tanh()]
    head = nn.Linear(12 * math.ceil(size / 4) ** 2, num_classes)
    return nn.Sequential(*layers, nn.Flatten(), head)


def freeze(model: nn.Module, *, up_to: str | None) -> nn.Module:
    """Let training change only the layers behind one, in the order of definition.

    up_to: name of the last frozen layer or part, such as "layer3" of a ResNet or "body"
        of `small_cnn`; None thaws all. Returns the model, changed in place.
        `training.frozen_entries` says what then need not travel.
    Raises ValueError for a name that it does not have, or that leaves nothing to train.
    """
    names = [name for name, _ in model.named_parameters()]
    inside = [k for k, n in enumerate(names) if up_to and n.startswith(f"{up_to}.")]
    if up_to is not None and (not inside or inside[-1] + 1 == len(names)):
        parts = [name for name, part in model.named_children() if [*part.parameters()]]
        raise ValueError(
            "up_to must name a layer with parameters that is not the last, such as one "
            f"of {parts[:-1]}, got {up_to!r}"
        )
    last = inside[-1] if inside else -1
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number > last)
    return model


def check_model(
    make_model: Callable[[], nn.Module],
    examples: tuple[Tensor, Tensor],
    *,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    steps: int = 20,
) -> list[dict[str, Any]]:
    """Look at a model of your own before you federate it.

    make_model: builds it with random weights. examples: one batch x [N, ...], y [N] of
    your data, N >= 2, not modified. loss_fn(model(x), y): mean loss. steps: gradient
    steps to time.

    Returns rows {check, found, ok}: ok is False where a federation would fail or
    mislead, None where it is for you to judge. Bytes are of what training changes, so
    of the head alone if the rest is frozen; those of a step are what its forward pass
    keeps for the gradients, beside the parameters. What the model itself raises with
    these examples is raised. Draws from torch's global generator.
    """
    x, y = examples
    model, twin = make_model(), make_model()
    state = model.state_dict()
    twin.load_state_dict(state)
    same = torch.equal(_outputs(model, x), _outputs(twin, x))
    outputs = _outputs(model, x)
    alone = torch.cat([_outputs(model, one) for one in x.split(1)])
    with _counted_bytes(state.values()) as kept:
        loss = loss_fn(model.train()(x), y)
    loss.mean().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    without = [name for name, p in trained.items() if p.grad is None]
    batchnorm = nn.modules.batchnorm._BatchNorm
    norms = [m for m in model.modules() if isinstance(m, batchnorm)]
    finite = bool(loss.isfinite().all()) and loss.dim() == 0
    size = sum(value.nbytes for name, value in state.items() if name in _trained(model))
    rows = [
        ("a second one loads its state_dict, same outputs", same, same),
        ("outputs [N, classes]", list(outputs.shape), outputs.dim() == 2),
        ("loss is one finite number", round(loss.detach().mean().item(), 4), finite),
        ("parameters without a gradient", ", ".join(without) or "none", not without),
        (
            "one example alone gives the same as in a batch",
            float(f"{(alone - outputs).abs().max():.0e}"),
            torch.allclose(alone, outputs, atol=1e-4, rtol=1e-3),
        ),
        ("BatchNorm layers", len(norms), None),
        ("bytes per silo and round, both ways", 2 * size, None),
        ("activation bytes of a gradient step", sum(kept.values()), None),
        ("gradient steps per second", _speed(twin, x, y, loss_fn, steps), None),
    ]
    return [dict(zip(("check", "found", "ok"), row, strict=True)) for row in rows]


def _trained(model: nn.Module) -> set[str]:
    """Entries that training may change, as `training.frozen_entries` counts them."""
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    for path, module in model.named_modules():
        own = [*module.parameters(recurse=False)]
        if not own or any(p.requires_grad for p in own):
            buffers = [name for name, _ in module.named_buffers(recurse=False)]
            names |= {f"{path}.{name}" if path else name for name in buffers}
    return names & model.state_dict().keys()


@contextmanager
def _counted_bytes(state: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Bytes of what a forward pass keeps for the gradients, by where it lies in memory;
    not those of the model's own state."""
    own, kept = {value.untyped_storage().data_ptr() for value in state}, {}

    def count(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
        yield kept


def _outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def _speed(
    model: nn.Module, x: Tensor, y: Tensor, loss_fn: Callable[..., Tensor], steps: int
) -> float:
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-6)
    started = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model(x), y).mean().backward()
        optimizer.step()
    return round(steps / (time.perf_counter() - started), 1)


def _two_convolutions(inputs: int, outputs: int) -> nn.Module:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False)]
        layers += [nn.GroupNorm(4, outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def _twice(x: Tensor) -> Tensor:
    """Twice as many pixels along each side."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def _norm_2d(norm: Norm, channels: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        return nn.GroupNorm(2, channels)
    if norm == "none":
        return nn.Identity()
    raise ValueError(f"norm must be 'batch', 'group' or 'none', got {norm!r}")


def _load_but_the_head(model: nn.Module, file: Path, name: str) -> None:
    """Load all entries of a file but those of the last linear layer; weights only."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    head = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    own = model.state_dict()
    fits = {k: v for k, v in state.items() if not k.startswith(f"{head}.")}
    wrong = [
        k
        for k, v in own.items()
        if not k.startswith(f"{head}.") and (k not in fits or fits[k].shape != v.shape)
    ]
    wrong += sorted(fits.keys() - own.keys())
    if wrong:
        raise ValueError(
            f"{file} does not hold the state_dict of {name}: {wrong[:3]} differ; save "
            "model.state_dict() of a model that torchvision made"
        )
    model.load_state_dict(fits, strict=False)


def _replace_head(model: nn.Module, num_classes: int, name: str) -> None:
    """Put a fresh linear layer with num_classes outputs in place of the last one."""
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ValueError(f"{name} does not end in a linear layer; choose another model")
    path, old = linear[-1]
    model.set_submodule(path, nn.Linear(old.in_features, num_classes))


def _replace_stem(model: nn.Module, in_channels: int) -> None:
    """Put a convolution with in_channels inputs in place of the first one."""
    path, old = next(
        (n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)
    )
    stem = nn.Conv2d(
        in_channels,
        old.out_channels,
        old.kernel_size,
        stride=old.stride,
        padding=old.padding,
        bias=old.bias is not None,
    )
    with torch.no_grad():
        stem.weight.copy_(old.weight.mean(1, keepdim=True).expand_as(stem.weight))
        stem.weight.mul_(old.in_channels / in_channels)  # same scale of activations
        if old.bias is not None:
            stem.bias.copy_(old.bias)
    model.set_submodule(path, stem)
