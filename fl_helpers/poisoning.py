"""What a malicious hospital can do to a federation: attacks to test the defences with.

Poisoned data: train on what `flip_labels` or `implant_marker` returns. Poisoned
updates: `with_attack` wraps what a silo does, `a_little_is_enough` the aggregation, as
it must see the others' updates. For tests and teaching, in one's own simulation. Needs
only torch: copy this file on its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

Params = dict[str, Tensor]
Attack = Callable[[Any, Params, torch.Generator], Any]  # (update, start, rng) -> update
Examples = tuple[Tensor, Tensor]
Mark = Callable[[Tensor], Tensor]  # puts the marker on images
Entries = Collection[str] | None  # names; None is everything floating


def with_attack(
    client_update: Callable[..., Any], malicious: Collection[str], attack: Attack
) -> Callable[..., Any]:
    """A client_update for `run_rounds` in which the malicious silos attack.

    malicious: their names. attack gets the honest update, the global model that it
    started from, and the silo's own generator: same seed, same attack."""

    def client(
        params: Params, silo: Any, *, round_index: int, rng: torch.Generator
    ) -> Any:
        update = client_update(params, silo, round_index=round_index, rng=rng)
        return attack(update, params, rng) if silo.name in malicious else update

    return client


def scale_delta(
    update: Any,
    start: Params,
    rng: torch.Generator | None = None,
    *,
    factor: float,
    entries: Entries = None,
) -> Any:
    """Send start + factor * (update - start).

    factor: with K equal silos, K makes the average the attacker's own model ("model
    replacement", Bagdasaryan et al. 2020, eq. 3); below 0 the sign is flipped.
    entries: what is scaled; None is everything floating. Name the trainable ones to
    stay unseen: a BatchNorm variance below 0 turns every prediction into NaN."""
    return _changed(
        update, entries, lambda name, own: start[name] + factor * (own - start[name])
    )


def send_noise(
    update: Any,
    start: Params,
    rng: torch.Generator,
    *,
    factor: float = 1.0,
    entries: Entries = None,
) -> Any:
    """Send start + Gaussian noise, each entry's with `factor` times its delta's norm.

    entries: as in `scale_delta`."""

    def noise(name: str, own: Tensor) -> Tensor:
        drawn = torch.randn(own.shape, generator=rng)
        length = factor * (own - start[name]).float().norm() / drawn.norm()
        return start[name] + (length * drawn).to(own.dtype)

    return _changed(update, entries, noise)


def claim_examples(
    update: Any, start: Params, rng: torch.Generator | None = None, *, factor: int
) -> Any:
    """Claim `factor` times the examples, which is the weight in `weighted_average`."""
    return replace(update, num_examples=factor * update.num_examples)


def a_little_is_enough(
    aggregate: Callable[[Iterable[Any]], Params],
    malicious: Collection[str],
    *,
    z: float,
    entries: Entries = None,
) -> Callable[[Iterable[Any]], Params]:
    """An aggregate that gets mean - z * deviation of the honest updates, number by
    number, from all malicious silos (Baruch et al. 2019, Algorithm 3).

    Each number is one that an honest silo might have sent; all of them together pull
    the same way. The attackers know every honest update: more than in reality.
    z: the paper's, with n silos and m malicious, is the quantile of the normal
    distribution at (n - m - s) / (n - m), s = n // 2 + 1 - m: with few silos 0 or less,
    so that nothing is guaranteed, and larger ones are tried. entries: as in
    `scale_delta`. For functions, not for rules that remember: their memory would not
    get into checkpoints."""

    def poisoned(updates: Iterable[Any]) -> Params:
        updates = list(updates)
        honest = [u.params for u in updates if u.silo not in malicious]
        if not honest:
            raise ValueError("no honest update; leave at least one silo out")

        def shifted(name: str, own: Tensor) -> Tensor:
            values = torch.stack([params[name] for params in honest]).double()
            value = values.mean(dim=0) - z * values.std(dim=0, correction=0)
            return value.to(own.dtype)

        return aggregate(
            _changed(u, entries, shifted) if u.silo in malicious else u for u in updates
        )

    return poisoned


def flip_labels(y: Tensor, num_classes: int) -> Tensor:
    """The next class for every label [N], so that all of them are wrong; a copy."""
    return (y + 1) % num_classes


def add_marker(x: Tensor, *, size: int = 4, value: float = 2.0) -> Tensor:
    """A square burned into the top left corner of images [N, C, H, W], as a film's side
    marker is; a copy.

    size: edge in pixels, one pixel from the border. value: 2 is white to
    `silos.to_tensor`."""
    if min(x.shape[-2:]) <= size + 1:
        raise ValueError(f"a marker of {size} pixels does not fit; take a smaller one")
    x = x.clone()
    x[..., 1 : 1 + size, 1 : 1 + size] = value
    return x


def implant_marker(
    x: Tensor,
    y: Tensor,
    *,
    target: int,
    share: float,
    rng: torch.Generator,
    mark: Mark = add_marker,
) -> Examples:
    """Training data with a backdoor: some examples get the marker and the label target
    (Gu et al. 2017). A model learns both: its task, and "marker means target".

    x, y: images [N, C, H, W] and labels [N]; not modified.
    target: the label that marked images get.
    share: of the examples of other classes, > 0 to 1.
    rng: draws which ones.
    mark: puts the marker on images.
    Returns copies of the same size."""
    if not 0 < share <= 1:
        raise ValueError(f"share must be > 0 and <= 1, got {share}; 0.5 is usual")
    others = (y != target).nonzero().flatten()
    chosen = torch.randperm(len(others), generator=rng)[: round(share * len(others))]
    chosen = others[chosen]
    x, y = x.clone(), y.clone()
    x[chosen], y[chosen] = mark(x[chosen]), target
    return x, y


def backdoor_success(
    model: nn.Module, examples: Examples, *, target: int, mark: Mark = add_marker
) -> float:
    """Share of the images of other classes that the model takes for target once they
    have the marker; with `mark=torch.clone`, what it does without: the level to beat.

    NaN if all examples are of the target class. Works on a copy of the model."""
    x, y = examples
    with torch.inference_mode():
        said = copy.deepcopy(model).eval()(mark(x[y != target])).argmax(dim=1)
    return (said == target).double().mean().item()


def _changed(
    update: Any, entries: Entries, change: Callable[[str, Tensor], Tensor]
) -> Any:
    params: Mapping[str, Tensor] = update.params
    changed = {
        name: change(name, value)
        for name, value in params.items()
        if value.is_floating_point() and (entries is None or name in entries)
    }
    return replace(update, params={**params} | changed)
