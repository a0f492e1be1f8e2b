"""What an update or a model gives away: three attacks, to teach and to audit with.

Gradient inversion rebuilds a training image from what a silo sent. Membership inference
tells from a finished model who was in its training set. Property leakage guesses a
silo's label mix from its update. All are run by someone who follows the protocol and
only looks (honest but curious); one who also tampers with the model can do more. An
attack that fails proves nothing. Needs only torch: copy this file on its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

Loss = Callable[[Tensor, Tensor], Tensor]
Examples = tuple[Tensor, Tensor]  # x [N, ...], y [N]


# -- gradient inversion


def sent_gradient(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], model: nn.Module
) -> dict[str, Tensor]:
    """Direction of the gradient in an update, {parameter: before - after}.

    before: the global params a silo started from; after: what it sent; model: says
    which entries are trained. After one step without weight decay it is the gradient,
    times the learning rate; after several, a mixture of gradients along the way."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return {name: before[name] - after[name] for name in names}


def invert_linear(weight: Tensor, bias: Tensor) -> Tensor:
    """Inputs of a linear layer from its gradients, exactly and at once.

    A unit's weight gradient is its bias gradient times the input, so the ratio is the
    input itself: for one example from any unit that fired, for a batch from a unit
    that fired for one example only (Phong et al. 2018, section 3). weight [units,
    features], bias [units]: of any one scale. Returns [units that fired, features];
    those of units that several examples fired are mixtures."""
    fired = bias.abs() > 1e-6 * bias.abs().max()
    return weight[fired] / bias[fired, None]


@dataclass(frozen=True)
class Search:
    """How `invert_gradient` looks. iterations: steps of Adam, on the gradient's sign;
    lr: of the first ones, times the inputs' range; smoothness: weight of the total
    variation."""

    iterations: int = 400
    lr: float = 0.1
    smoothness: float = 1e-3


def invert_gradient(
    model: nn.Module,
    gradient: Mapping[str, Tensor],
    labels: Tensor,
    shape: Sequence[int],
    *,
    rng: torch.Generator,
    bounds: tuple[float, float] = (0.0, 1.0),
    search: Search = Search(),
    loss_fn: Loss = F.cross_entropy,
) -> Tensor:
    """Images whose gradient points where the sent one does (Geiping et al. 2020).

    Minimises 1 - cosine of the gradients + smoothness * total variation.

    model: with the params that the silo started from; not modified.
    gradient: as from `sent_gradient`, of any scale.
    labels: [N], the batch's classes, assumed known; that of one example can be read
        off, see `labels_of_one`.
    shape: of one input, such as (1, 32, 32).
    rng: draws the images that the search starts from.
    bounds: smallest and largest value of an input.
    search: how long, in what steps.
    loss_fn: the one that the silo trained with.

    Returns [N, *shape], in any order."""
    names = list(gradient)
    state = {name: p.detach() for name, p in model.named_parameters()}
    weights = {name: state[name].requires_grad_() for name in names}
    target = torch.cat([gradient[name].flatten() for name in names])
    low, high = bounds
    x = torch.rand(len(labels), *shape, generator=rng) * (high - low) + low
    x.requires_grad_()
    optimizer = torch.optim.Adam([x], lr=search.lr * (high - low))
    at = [search.iterations * k // 8 for k in (3, 5, 7)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, at, gamma=0.1)
    for _ in range(search.iterations):
        loss = loss_fn(functional_call(model, state, (x,)), labels)
        found = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        found = torch.cat([g.flatten() for g in found])
        misfit = 1 - F.cosine_similarity(found, target, dim=0)
        (x.grad,) = torch.autograd.grad(misfit + search.smoothness * _variation(x), x)
        x.grad.sign_()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            x.clamp_(low, high)
    return x.detach()


def labels_of_one(bias_gradient: Tensor) -> Tensor:
    """Class of the one example behind a gradient, from that of the last layer's bias
    (Zhao et al. 2020): only the true class is pulled up. Returns labels [1]."""
    return bias_gradient.argmin().reshape(1)


def psnr(image: Tensor, original: Tensor, *, span: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB: 10 log10(span^2 / mean squared error); above
    30 is hard to tell apart. span: largest less smallest possible value."""
    error = (image - original).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(span**2 / error)


def ssim(
    image: Tensor, original: Tensor, *, span: float = 1.0, window: int = 7
) -> float:
    """Structural similarity, 1 for equal images (Wang et al. 2004, eq. 13), mean over
    square windows that all count the same. Images [..., H, W], at least a window.
    What knows nothing is not at 0: compare with the mean of public images."""
    a, b = (t.reshape(1, -1, *t.shape[-2:]).double() for t in (image, original))

    def mean(t: Tensor) -> Tensor:
        return F.avg_pool2d(t, window, stride=1)

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    both = mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    likeness = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (likeness * (2 * both + c2) / (var_a + var_b + c2)).mean().item()


def likeness(images: Tensor, originals: Tensor, *, span: float = 1.0) -> list[float]:
    """The `ssim` of each image with its original; both [N, ...]."""
    pairs = zip(images, originals, strict=True)
    return [ssim(image, original, span=span) for image, original in pairs]


def closest(images: Tensor, originals: Tensor, *, span: float = 1.0) -> Tensor:
    """For each original, the reconstruction most like it by `ssim`; [N, ...]."""
    best = [
        max(images, key=lambda image, o=original: ssim(image, o, span=span))
        for original in originals
    ]
    return torch.stack(best)


# -- membership inference


def example_losses(
    model: nn.Module,
    examples: Examples,
    *,
    batch_size: int = 512,
    loss_fn: Callable[..., Tensor] = F.cross_entropy,
) -> Tensor:
    """Loss of each example [N], in evaluation mode. examples: x [N, ...], y [N].
    loss_fn takes reduction="none". Works on a copy of the model."""
    x, y = examples
    model = copy.deepcopy(model).eval()
    with torch.inference_mode():
        parts = zip(x.split(batch_size), y.split(batch_size), strict=True)
        losses = [loss_fn(model(a), b, reduction="none") for a, b in parts]
    return torch.cat(losses).cpu()


def audit_membership(
    model: nn.Module,
    members: Examples,
    strangers: Examples,
    *,
    loss_fn: Callable[..., Tensor] = F.cross_entropy,
) -> dict[str, float]:
    """Can the training examples of a model be told by their low loss?
    (Yeom et al. 2018.)

    members: examples that it was trained on; strangers: of the same hospital, and not;
    each x [N, ...], y [N]. Returns as `membership_success`. This is the simplest
    attack: read a high value as a leak, not a low one as safety."""
    both = (members, strangers)
    return membership_success(
        *(-example_losses(model, e, loss_fn=loss_fn) for e in both)
    )


def membership_success(
    members: Tensor, strangers: Tensor, *, false_alarms: float = 0.01
) -> dict[str, float]:
    """How well scores tell members from strangers; higher means member.

    auroc: chance that a member scores above a stranger, ties half; 0.5 is guessing.
    tpr: share of members found when at most a share `false_alarms` of the strangers is
    taken for one (Carlini et al. 2022 report it at 0.01): what a patient has to fear,
    even if the mean is harmless. tpr_error: standard error of tpr. Raises ValueError
    with fewer than 1 / false_alarms strangers: such a share is then less than one."""
    if len(strangers) * false_alarms < 1 or len(members) == 0:
        raise ValueError(
            f"{len(members)} members and {len(strangers)} strangers cannot measure "
            f"{false_alarms} false alarms; take some members, and at least "
            f"{math.ceil(1 / false_alarms)} strangers"
        )
    above = (members[:, None] > strangers).double().mean()
    equal = (members[:, None] == strangers).double().mean()
    allowed = int(len(strangers) * false_alarms + 1e-9)
    threshold = strangers.sort(descending=True).values[allowed]
    tpr = (members > threshold).double().mean().item()
    error = math.sqrt(tpr * (1 - tpr) / len(members))
    return {"auroc": (above + equal / 2).item(), "tpr": tpr, "tpr_error": error}


def shadow_halves(num_examples: int, num_shadows: int, rng: torch.Generator) -> Tensor:
    """Which examples each shadow model is trained on: bool [num_shadows, N].

    Each example is in half of the models (num_shadows is even), so that there are as
    many with it as without it."""
    if num_shadows < 4 or num_shadows % 2:
        raise ValueError(
            f"num_shadows must be even and >= 4 (better 16), got {num_shadows}"
        )
    order = torch.rand(num_shadows, num_examples, generator=rng).argsort(dim=0)
    return order < num_shadows // 2


def likelihood_ratio(
    model: nn.Module, shadows: Sequence[nn.Module], taught: Tensor, examples: Examples
) -> Tensor:
    """Membership score of each example, by models trained with and without it (LiRA,
    Carlini et al. 2022, Algorithm 1, with one variance for all examples).

    shadows: models trained as the attacked one was, shadow k on the rows taught[k] of
    the examples (`shadow_halves`); they stand for what the attacker can train on data
    of its own. The statistic log(p / (1 - p)), p the probability of the true class, is
    nearly normal, with another mean for models that saw the example; the score [N] is
    the log ratio of the two densities at the attacked model's value."""
    values = torch.stack([_logit(example_losses(m, examples)) for m in shadows])
    halves = ((values * mask).sum(0) / mask.sum(0) for mask in (taught, ~taught))
    with_it, without = halves
    residual = values - torch.where(taught, with_it, without)
    freedom = values.numel() - 2 * values.shape[1]
    variance = residual.square().sum() / freedom
    seen = _logit(example_losses(model, examples))
    return ((seen - without) ** 2 - (seen - with_it) ** 2) / (2 * variance)


def attack_in_turn(
    models: Sequence[nn.Module], taught: Tensor, examples: Examples
) -> dict[str, dict[str, float]]:
    """Both attacks on each model, with all other models as its shadows.

    models: model k was trained on the rows taught[k] of the examples (`shadow_halves`).
    Returns {"loss" and "likelihood ratio": as `membership_success`, all models' scores
    together}."""
    scores: dict[str, list[Tensor]] = {"loss": [], "likelihood ratio": []}
    for k, attacked in enumerate(models):
        rest = [j for j in range(len(models)) if j != k]
        others = [models[j] for j in rest]
        ratio = likelihood_ratio(attacked, others, taught[rest], examples)
        scores["loss"].append(-example_losses(attacked, examples))
        scores["likelihood ratio"].append(ratio)
    together = {name: torch.stack(values) for name, values in scores.items()}
    return {
        name: membership_success(values[taught], values[~taught])
        for name, values in together.items()
    }


# -- property leakage


def draw_mix(
    examples: Examples, mix: Tensor, count: int, rng: torch.Generator
) -> Examples:
    """`count` of the examples, with about these shares of each class [K], shuffled;
    drawn with replacement, so a few of each class are enough."""
    x, y = examples
    weights = mix.double()[y] / torch.bincount(y, minlength=len(mix)).double()[y]
    rows = torch.multinomial(weights, count, replacement=True, generator=rng)
    return x[rows], y[rows]


def label_mix(change: Tensor, simulated: Tensor, mixes: Tensor) -> Tensor:
    """Share of each class in a silo's training data [K], guessed from its update.

    Training raises the last layer's bias for classes that are more frequent than the
    model expects. The attacker knows the model and the recipe: it trains on examples of
    its own with many label mixes (`draw_mix`) and sees how the bias answers. change
    [F]: last layer's bias in the silo's update less that of the global model, or other
    numbers that depend on the mix; simulated [S, F]: those of the attacker's own
    updates; mixes [S, K]. Fits log(mix) = change @ slope + offset by least squares (a
    small relative of Melis et al. 2019, section 4.2)."""
    if len(simulated) != len(mixes) or len(mixes) < 2 * (len(change) + 1):
        raise ValueError(
            f"{len(simulated)} simulated updates with {len(mixes)} mixes cannot fit "
            f"{len(change)} numbers; make at least {2 * (len(change) + 1)}"
        )
    ones = torch.ones(len(mixes) + 1, 1, dtype=torch.float64)
    seen = torch.cat([torch.cat([simulated, change[None]]).double(), ones], dim=1)
    target = (mixes.double() + 0.02).log()  # a class may be absent
    target -= target.mean(1, keepdim=True)
    # gelsd: bias changes add up to 0 over the classes, so one column says nothing new.
    fit = torch.linalg.lstsq(seen[:-1], target, driver="gelsd").solution
    return (seen[-1] @ fit).softmax(0).float()


def _logit(losses: Tensor) -> Tensor:
    """log(p / (1 - p)) of losses -log(p), finite also for p near 1."""
    losses = losses.double().clamp(1e-6, 50)
    return -losses - torch.log(-torch.expm1(-losses))


def _variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels."""
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean()
    return down + (images[..., 1:] - images[..., :-1]).abs().mean()
