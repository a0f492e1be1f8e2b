"""Aggregation when a hospital may be broken or malicious: rules that outvote it.

Each takes a round's updates, as `weighted_average` does, and returns the next global
model: `run_rounds(..., aggregate=partial(trimmed_mean, trim=1))`. They help against a
minority only, and take from honest hospitals that differ from the others: measure both.
Needs numpy and torch: copy this file on its own.

Every silo has one vote: num_examples, which is its own claim, counts in `NormClipping`
only. All updates are in memory; beside them there are one or two models, three to five
for `geometric_median` and `NormClipping`.
Floating entries, BatchNorm statistics too, go through the rule, half precision in
float32: a variance stays within those of the silos. Integer and boolean entries
(BatchNorm counters) take the maximum. Updates are ordered by silo name first, so that
the order of arrival does not show in a bit of the result.

Distances and norms are L2, over the floating entries that `entries` names; None is all.
BatchNorm statistics can outweigh all parameters: name the trainable ones then, and know
that poison in the statistics alone is not seen.

Left out: Bulyan (El Mhamdi et al. 2018) needs 4 * malicious + 3 silos, seven for one;
FLTrust (Cao et al. 2021) needs labelled patients at the orchestrator, which has none.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

Params = dict[str, Tensor]
Updates = Iterable[Any]  # with silo, params and num_examples
Entries = Collection[str] | None

_VALUES = 500_000  # looked at at a time, all silos together


def coordinate_median(updates: Updates) -> Params:
    """For each number in the model, the median of the silos' values (Yin et al. 2018,
    Definition 1); the mean of the middle two, if the silos are an even number.

    While fewer than half of the silos are malicious, each number is between those of
    honest ones. Raises ValueError, naming the silo, for no updates, a silo that appears
    twice, names, shapes or dtypes that differ, and NaN or infinite values."""
    updates = _gather(updates)
    return _trimmed(updates, (len(updates) - 1) // 2)


def trimmed_mean(updates: Updates, *, trim: int) -> Params:
    """For each number, the mean without the `trim` lowest and highest values (Yin et
    al. 2018, Definition 2, where trim is a share of the silos).

    trim: at least the number of malicious silos, less than half of all. 0 is the plain
    mean. Raises ValueError as `coordinate_median`, and for too few updates."""
    if trim < 0:
        raise ValueError(f"trim must be >= 0 silos at each end, got {trim}")
    return _trimmed(_gather(updates, 2 * trim + 1, f"trim={trim}"), trim)


def krum(
    updates: Updates, *, malicious: int, keep: int = 1, entries: Entries = None
) -> Params:
    """The update with the nearest neighbours, or the mean of the `keep` best: Krum and
    Multi-Krum (Blanchard et al. 2017, section 4).

    Its score is the sum of squared distances to the K - malicious - 2 nearest others.
    malicious: how many may be; needs K >= 2 * malicious + 3 updates. keep: 1 to
    K - malicious. What Krum returns is one hospital's model: the others trained for
    nothing. Raises ValueError as `coordinate_median`, and for too few updates."""
    if malicious < 0:
        raise ValueError(f"malicious must be >= 0 silos, got {malicious}")
    updates = _gather(updates, 2 * malicious + 3, f"malicious={malicious}")
    most = len(updates) - malicious
    if not 1 <= keep <= most:
        raise ValueError(
            f"keep must be 1 to {most} (updates - malicious), got {keep}; 1 is Krum"
        )
    distances = _squared_distances(updates, entries)
    nearest = distances.sort(dim=1).values[:, 1 : most - 1]  # column 0 is itself
    best = nearest.sum(dim=1).argsort(stable=True)[:keep]
    return _trimmed([updates[k] for k in sorted(best.tolist())], 0)


def geometric_median(updates: Updates, *, entries: Entries = None) -> Params:
    """The model with the smallest sum of distances to the silos' (Pillutla et al. 2022,
    Algorithm 2, with equal weights; on a silo's own model, where the step is undefined,
    that of Vardi and Zhang 2000, eq. 2.6).

    A mean in which whoever is far away counts less; with fewer than half malicious, it
    stays near the honest ones. Starts from the coordinate median, or from a silo's
    model if its sum is smaller: steps lower the sum, and would only creep towards such
    a model. Ends when a step lowers the sum by less than a millionth, when the silos
    that it stands on outweigh the others' pull, or after 200 steps. Raises ValueError
    as `coordinate_median`."""
    updates = _gather(updates)
    centre = _trimmed(updates, (len(updates) - 1) // 2)
    distances = _distances_to(centre, updates, entries)
    between = _squared_distances(updates, entries).sqrt()
    best = int(between.sum(dim=1).argmin())
    if between[best].sum() < distances.sum():
        distances, only = between[best], torch.zeros(len(updates)).double()
        only[best] = 1
        centre = _weighted(updates, only, updates[best].params)
    for _ in range(200):
        usual = distances.median().item()
        if usual == 0:  # half of them are here: nothing has a smaller sum
            break
        here = distances <= 1e-6 * usual
        pull = torch.where(here, 0, 1 / distances)
        step = 1.0
        if here.any():  # they hold on with a force of 1 each, the others pull
            force = _force(centre, updates, pull, entries)
            if force <= here.sum():
                break
            step = 1 - here.sum() / force
        centre = _weighted(updates, step * pull / pull.sum(), centre)
        before = distances.sum()
        distances = _distances_to(centre, updates, entries)
        if before - distances.sum() <= 1e-6 * before:
            break
    return centre


@dataclass(eq=False, repr=False)
class NormClipping:
    """FedAvg of deltas that are shortened to a common length (Sun et al. 2019, section
    5): who shouts is heard no louder than the others.

    params: the model that the first round starts from. max_norm: norm that a delta may
    have; None is the median of the round's. Longer ones are scaled, none is left out;
    weighted by num_examples. It changes an attack's length, not its direction. It must
    know the global model, so it is an object for one run, and part of its checkpoint.
    Raises ValueError as `coordinate_median`; then nothing has changed."""

    params: Mapping[str, Tensor]
    _: KW_ONLY
    max_norm: float | None = None
    entries: Entries = None

    def __post_init__(self) -> None:
        if self.max_norm is not None and not self.max_norm > 0:
            raise ValueError(f"max_norm must be > 0 or None, got {self.max_norm}")
        self.params = {k: value.detach().clone() for k, value in self.params.items()}

    def __call__(self, updates: Updates) -> Params:
        updates = _gather(updates)
        norms = _distances_to(self.params, updates, self.entries)
        limit = norms.quantile(0.5).item() if self.max_norm is None else self.max_norm
        scale = (limit / norms).clamp(max=1)  # 0 / 0: not heard, did not move
        share = torch.tensor([float(u.num_examples) for u in updates]).double()
        new = _weighted(updates, scale * share / share.sum(), self.params)
        self.params = self.params | {name: value.clone() for name, value in new.items()}
        return new

    def state_dict(self) -> Params:
        """The global model; a copy."""
        return {name: value.clone() for name, value in self.params.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict` of the same model."""
        self.params = {name: state[name].clone() for name in self.params}


def _maker(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The rule, to be made as one with a memory: from params and trainable entries."""
    known, remembers = inspect.signature(rule), inspect.isclass(rule)

    def make(params: Params, trainable: Iterable[str], **options: Any) -> Any:
        if "entries" in known.parameters:
            options = {"entries": tuple(trainable) or None} | options
        known.bind(params, **options)  # TypeError for an option that it does not take
        return rule(params, **options) if remembers else partial(rule, **options)

    return make


# By name, for `aggregation.make_aggregate(more=ROBUST_RULES)` in the real runs;
# distances go over the trainable entries, if some are named.
ROBUST_RULES: dict[str, Callable[..., Any]] = {
    rule.__name__: _maker(rule)
    for rule in (coordinate_median, trimmed_mean, krum, geometric_median, NormClipping)
}


def _trimmed(updates: Sequence[Any], trim: int) -> Params:
    kept = slice(trim, len(updates) - trim)

    def mean_of_middle(values: Tensor, name: str, part: slice) -> Tensor:
        if trim:  # numpy sorts short rows many times faster than torch
            values = torch.from_numpy(np.sort(values.T.contiguous().numpy())[:, kept]).T
        return values.mean(dim=0, dtype=torch.float64)

    return _reduce(updates, mean_of_middle)


def _weighted(updates: Sequence[Any], weights: Tensor, start: Params) -> Params:
    """The model at start + sum of weight * (update - start)."""
    heard = weights > 0  # not 0 times something huge

    def combine(values: Tensor, name: str, part: slice) -> Tensor:
        x = start[name].detach().reshape(-1)[part].double()
        return x + weights[heard] @ (values[heard].double() - x)

    return _reduce(updates, combine)


def _reduce(
    updates: Sequence[Any], rule: Callable[[Tensor, str, slice], Tensor]
) -> Params:
    """The model with rule(values [K, n], entry's name, part of it) for each number."""
    result = {}
    for name, first in updates[0].params.items():
        result[name] = torch.empty(first.shape, dtype=first.dtype)
        if not first.is_floating_point():
            result[name].copy_(first)
            for update in updates[1:]:
                torch.maximum(result[name], update.params[name], out=result[name])
    for name, part, values in _parts(updates):
        result[name].view(-1)[part] = rule(values, name, part)
    return result


def _parts(
    updates: Sequence[Any], entries: Entries = None
) -> Iterator[tuple[str, slice, Tensor]]:
    """Each floating entry, a part of it at a time: values [K, n], one row per silo."""
    step, chosen = max(1, _VALUES // len(updates)), updates[0].params.keys()
    if entries is not None:
        chosen &= set(entries)
        if not chosen:
            raise ValueError(
                f"entries names none of the model's: {sorted(entries)[:3]}"
            )
    for name, first in updates[0].params.items():
        if not first.is_floating_point() or name not in chosen:
            continue
        wide = torch.promote_types(first.dtype, torch.float32)
        rows = [update.params[name].detach().reshape(-1) for update in updates]
        for start in range(0, first.numel(), step):
            part = slice(start, start + step)
            yield name, part, torch.stack([row[part] for row in rows]).to(wide)


def _distances_to(centre: Params, updates: Sequence[Any], entries: Entries) -> Tensor:
    """[K]: distance of each update to a model."""
    squared = torch.zeros(len(updates), dtype=torch.float64)
    for name, part, values in _parts(updates, entries):
        gap = values.double() - centre[name].detach().reshape(-1)[part]
        squared += gap.square().sum(dim=1)
    return squared.sqrt()


def _force(
    centre: Params, updates: Sequence[Any], pull: Tensor, entries: Entries
) -> float:
    """Length of the sum of pull * (update - centre)."""
    squared, heard = 0.0, pull > 0
    for name, part, values in _parts(updates, entries):
        gap = values[heard].double() - centre[name].reshape(-1)[part]
        squared += (pull[heard] @ gap).square().sum().item()
    return math.sqrt(squared)


def _squared_distances(updates: Sequence[Any], entries: Entries) -> Tensor:
    """[K, K]: squared distance of each two updates.

    From the differences: the usual short cut over inner products is wrong as soon as
    one silo sends huge values."""
    squared = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    pairs = tuple(torch.triu_indices(*squared.shape, 1))
    for _, _, values in _parts(updates, entries):
        squared[pairs] += torch.pdist(values.double()).square()
    return squared + squared.T


def _gather(updates: Updates, at_least: int = 1, because: str = "a round") -> list[Any]:
    """The updates in the order of silo names; refuses what cannot be compared."""
    found = sorted(updates, key=lambda update: update.silo)
    if len(found) < at_least:
        raise ValueError(
            f"{because} needs at least {at_least} updates, got {len(found)}; ask for a "
            "quorum of as many"
        )
    names, layout = [update.silo for update in found], None
    for update in found:
        if names.count(update.silo) > 1:
            raise ValueError(f"silo {update.silo!r} sent two updates; only one counts")
        n = update.num_examples  # True is 1 to Python; inf would outweigh everybody
        if isinstance(n, bool) or not 0 < n < math.inf:
            raise ValueError(
                f"silo {update.silo!r} reports num_examples={n}; it must be a finite "
                "number > 0: leave a silo without training data out of the round"
            )
        own = {k: (v.shape, v.dtype) for k, v in update.params.items()}
        layout = own if layout is None else layout
        differ = sorted(k for k in own | layout if own.get(k) != layout.get(k))
        if differ:
            raise ValueError(
                f"silos {names[0]!r} and {update.silo!r} sent different models: name, "
                f"shape or dtype of {differ[:3]}; all must train the same architecture"
            )
        for name, value in update.params.items():
            _check_finite(update.silo, name, value)
    return found


def _check_finite(silo: str, name: str, value: Tensor) -> None:
    # A sum is NaN or infinite if any entry is; finite entries may overflow it, too.
    if not value.is_floating_point() or math.isfinite(value.sum().item()):
        return
    bad = int((~value.isfinite()).sum())
    if bad:
        raise ValueError(
            f"silo {silo!r} sent {bad} NaN or infinite values in {name!r}; training "
            "diverged or the file is damaged: leave it out, look at its training loss"
        )
