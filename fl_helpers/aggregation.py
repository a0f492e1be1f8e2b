"""Aggregation at the orchestrator: from the silos' updates to the next global model.

FedAvg (McMahan et al. 2017, Algorithm 1, server side). Simplified: every silo that was
asked is averaged; who is asked is the round loop's business. Needs only torch: copy
this file on its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

Layout = dict[str, tuple[torch.Size, torch.dtype]]  # name: (shape, dtype)


class UpdateLike(Protocol):
    """What aggregation needs of an update: who sent it, the state, and how many
    training examples stand behind it."""

    @property
    def silo(self) -> str: ...
    @property
    def params(self) -> Mapping[str, Tensor]: ...
    @property
    def num_examples(self) -> int: ...


def weighted_average(updates: Iterable[UpdateLike]) -> dict[str, Tensor]:
    """FedAvg: mean of the silos' model states, weighted by their number of examples.

    updates: any iterable, also a generator; one update is in memory at a time, beside
    the running mean. Floating entries (parameters, BatchNorm statistics) are averaged,
    half precision in float32; integer and boolean entries (BatchNorm counters) take
    the maximum. Updates are reduced in the order given: pass them in silo-name order,
    and the result is the same, bit for bit, on every engine.

    Returns a new dict with the updates' names, shapes and dtypes; no input is modified.
    Raises ValueError, naming the silo, for an empty iterable, a silo that appears
    twice, num_examples <= 0, keys, shapes or dtypes that differ from the first
    update's, and NaN or infinite values.
    """
    mean: dict[str, Tensor] = {}
    layout: Layout = {}
    seen: set[str] = set()
    total = 0
    for update in updates:
        _check_header(update, seen)
        if not seen:
            layout = {k: (v.shape, v.dtype) for k, v in update.params.items()}
        _check_layout(update, layout)
        total += update.num_examples
        for name, value in update.params.items():
            _check_finite(update.silo, name, value)
            _accumulate(mean, name, value.detach(), update.num_examples / total)
        seen.add(update.silo)
    if not seen:
        raise ValueError("no updates to average; at least one silo must take part")
    return {name: value.to(layout[name][1]) for name, value in mean.items()}


def _accumulate(
    mean: dict[str, Tensor], name: str, value: Tensor, share: float
) -> None:
    """Fold one tensor into the running mean, in place.

    mean += share * (value - mean), with share = n_k / (n_1 + ... + n_k), gives
    sum(n_i * value_i) / sum(n_i) after the last update. Unlike a sum that is divided
    at the end, it leaves a single update (and equal updates) exactly as they are.
    """
    if value.dtype in (torch.float16, torch.bfloat16):
        value = value.float()
    if name not in mean:
        mean[name] = value.clone(memory_format=torch.contiguous_format)
    elif value.is_floating_point():
        mean[name].lerp_(value, share)
    else:
        torch.maximum(mean[name], value, out=mean[name])


def _check_header(update: UpdateLike, seen: set[str]) -> None:
    if update.silo in seen:
        raise ValueError(f"silo {update.silo!r} sent two updates; one per round counts")
    if not update.num_examples > 0:
        raise ValueError(
            f"silo {update.silo!r} reports num_examples={update.num_examples}; it must "
            "be > 0: leave a silo without training data out of the round"
        )


def _check_layout(update: UpdateLike, layout: Layout) -> None:
    """Refuse an update whose names, shapes or dtypes differ from the first one's."""
    missing = sorted(layout.keys() - update.params.keys())
    unknown = sorted(update.params.keys() - layout.keys())
    if missing or unknown:
        raise ValueError(
            f"silo {update.silo!r} sent another model: missing {missing[:3]}, "
            f"unknown {unknown[:3]}; all silos must train the same architecture"
        )
    for name, value in update.params.items():
        shape, dtype = layout[name]
        if value.shape != shape or value.dtype != dtype:
            raise ValueError(
                f"silo {update.silo!r} sent {name!r} as {tuple(value.shape)}, "
                f"{value.dtype}; the others sent {tuple(shape)}, {dtype}"
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
